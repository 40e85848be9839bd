//! What the emulator asks of the real CPU and of the kernel, each in one place.

use std::arch::x86_64::{_mm_pause, _rdtsc};

/// AT_HWCAP2: user space may read and write the GS base.
const FSGSBASE: libc::c_ulong = 2;

/// Whether the kernel lets user space set GS itself.
pub fn has_fsgsbase() -> bool {
    // SAFETY: asks the auxiliary vector, which has no memory of ours in it.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & FSGSBASE != 0 }
}

/// Spends this many cycles of the time stamp counter.
pub fn spend(cycles: u64) {
    if cycles == 0 {
        return;
    }
    // SAFETY: the counter is readable in user space on Linux unless a process forbids it itself.
    let now = || unsafe { _rdtsc() };
    let start = now();
    while now().wrapping_sub(start) < cycles {
        _mm_pause();
    }
}
