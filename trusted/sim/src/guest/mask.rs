//! Signal masks: SIGSEGV and SIGBUS stay unblocked in the kernel, the guest is told its own mask.
//!
//! A blocked fault kills the program even with a handler in place, and worker threads that block
//! every signal are common. A thread's shadow is what it believes to have blocked of the two. A
//! new thread starts with an empty shadow (natively it would inherit its creator's).
#![allow(unsafe_code)]

use core::cell::Cell;

use crate::sys;

/// Bit of `signal` in a mask.
#[must_use]
pub const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The two signals that the copy leaf needs.
pub const FAULTS: u64 = bit(libc::SIGSEGV) | bit(libc::SIGBUS);

std::thread_local! {
    static SHADOW: Cell<u64> = const { Cell::new(0) };
}

/// Which of [`FAULTS`] the calling thread believes to have blocked.
#[must_use]
pub fn shadow() -> u64 {
    SHADOW.get()
}

/// What a change of the mask means: what the kernel is told, and the shadow once it has agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Low 64 signals of the set to give to the kernel.
    pub kernel: u64,
    after: u64,
}

impl Change {
    /// A change `how` (SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK) by `set`.
    #[must_use]
    pub fn new(how: i32, set: u64) -> Self {
        let (before, faults) = (shadow(), set & FAULTS);
        let (kernel, after) = match how {
            libc::SIG_BLOCK => (set & !FAULTS, before | faults),
            libc::SIG_UNBLOCK => (set, before & !faults),
            libc::SIG_SETMASK => (set & !FAULTS, faults),
            _ => (set, before),
        };
        Self { kernel, after }
    }

    /// The kernel has taken it.
    pub fn commit(self) {
        SHADOW.set(self.after);
    }
}

/// Unblocks the two signals in the kernel for the calling thread and remembers which were blocked.
pub fn unblock_faults() {
    let (set, mut old) = (FAULTS, 0_u64);
    let unblock = libc::SIG_UNBLOCK as usize;
    // SAFETY: eight readable and eight writable bytes.
    let raw = unsafe {
        let (set, old) = ((&raw const set) as usize, (&raw mut old) as usize);
        sys::syscall6(libc::SYS_rt_sigprocmask, unblock, set, old, 8, 0, 0)
    };
    if raw == 0 {
        SHADOW.set(old & FAULTS);
    }
}
