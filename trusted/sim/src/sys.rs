//! Raw system calls: the simulated enclave's own way to the kernel, past every interposed symbol.

use core::arch::asm;

/// System call `number` with six arguments. Answers the kernel's value: -4095..=-1 is an error.
///
/// # Safety
/// As the system call itself: pointers among the arguments must be valid for what it does.
#[inline]
pub unsafe fn syscall6(
    number: i64,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    let result: isize;
    // SAFETY: 1. Registers: the kernel clobbers rcx and r11 and returns in rax; nothing else
    //    changes. 2. Memory: the caller vouches for the arguments.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Splits a kernel answer into a value or a positive errno.
///
/// # Errors
/// The errno, if the kernel answered -4095..=-1.
#[inline]
pub fn check(result: isize) -> Result<usize, postern_trusted::errno::Errno> {
    if (-4095..0).contains(&result) {
        return Err(postern_trusted::errno::Errno(i32::try_from(-result).unwrap_or(5)));
    }
    Ok(result.cast_unsigned())
}
