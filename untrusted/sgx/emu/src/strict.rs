//! Strict mode: what a CPU refuses inside an enclave is refused here too.
//!
//! A filter on the instruction pointer turns each system call made inside the range into a signal,
//! for this process and for ever; CPUID raises a fault on threads that enter.

use std::{io, ptr};

const ARCH_SET_CPUID: libc::c_long = 0x1012;
/// Offsets of the instruction pointer's halves in the kernel's `struct seccomp_data`.
const POINTER_LOW: u32 = 8;
const POINTER_HIGH: u32 = 12;

/// Refuses system calls from the `size` bytes at `base`; both powers of two, aligned to each other.
pub fn refuse_system_calls(base: u64, size: u64) -> io::Result<()> {
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
    let and = |mask| statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask);
    let unless = |value, skip| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k: value,
    };
    let answer = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    // Both halves of the mask and of the base: the range is aligned, so they decide.
    let mask = !(size - 1);
    let (mask_low, mask_high) = (mask as u32, (mask >> 32) as u32);
    let filter = [
        load(POINTER_HIGH),
        and(mask_high),
        unless((base >> 32) as u32, 4),
        load(POINTER_LOW),
        and(mask_low),
        unless(base as u32 & mask_low, 1),
        answer(libc::SECCOMP_RET_TRAP),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: ptr::from_ref(&filter).cast_mut().cast(),
    };
    // SAFETY: the first call takes numbers alone; the second reads `program` and the filter it
    // points to, both alive until it returns, and writes neither.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_TSYNC,
                &raw const program,
            ) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const fn statement(code: u32, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

/// Lets CPUID raise a fault on this thread, or not; `false` where the CPU cannot do that.
pub fn let_cpuid_fault(fault: bool) -> bool {
    // SAFETY: takes numbers alone. Code of this process that asks CPUID afterwards is answered by
    // the fault handler.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, libc::c_long::from(!fault)) == 0 }
}
