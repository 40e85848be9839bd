//! How a program is told that a request has ended: a signal, or a call in a thread of its own.
//!
//! The service thread gives them: a signal goes to the process, which a handler then interrupts
//! where the program is and not inside this library.
#![allow(unsafe_code)]

use core::ffi::c_void;
use std::collections::VecDeque;

use postern_trusted::{errno::Errno, sync::Lock};

use crate::{identity, sys};

/// si_code of a signal that AIO sends.
const SI_ASYNCIO: i32 = -4;
/// Highest signal number.
const LAST_SIGNAL: i32 = 64;

/// What to do. From the guest's `struct sigevent`; addresses are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// SIGEV_NONE, and what the C library does not know.
    None,
    /// SIGEV_SIGNAL.
    Signal {
        /// sigev_signo.
        number: i32,
        /// sigev_value.
        value: u64,
    },
    /// SIGEV_THREAD.
    Thread {
        /// sigev_notify_function.
        function: u64,
        /// sigev_value.
        value: u64,
        /// sigev_notify_attributes, or 0.
        attributes: u64,
    },
}

impl Notice {
    /// From the first 32 bytes of a `struct sigevent`.
    #[must_use]
    pub fn of_event(event: &[u8; 32]) -> Self {
        let long =
            |at: usize| event[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let int =
            |at: usize| event[at..].first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        let value = long(0);
        match int(12) {
            libc::SIGEV_SIGNAL => Self::Signal { number: int(8), value },
            libc::SIGEV_THREAD => Self::Thread { function: long(16), value, attributes: long(24) },
            _ => Self::None,
        }
    }

    /// Whether it asks for a signal that there is not: the request ends with `EINVAL` then.
    #[must_use]
    pub fn is_impossible(&self) -> bool {
        matches!(self, Self::Signal { number, .. } if !(0..=LAST_SIGNAL).contains(number))
    }

    fn give(self) -> Result<(), Errno> {
        match self {
            Self::None => Ok(()),
            Self::Signal { number, value } => raise(number, value),
            Self::Thread { function, value, attributes } => call(function, value, attributes),
        }
    }
}

/// Notices that are due.
pub struct Notices(Lock<VecDeque<Notice>>);

impl Notices {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self(Lock::new(VecDeque::with_capacity(16)))
    }

    /// One more.
    pub fn push(&self, notice: Notice) {
        self.0.lock().push_back(notice);
    }

    /// Gives all, in order. One that cannot be given (too many queued signals or threads) is lost:
    /// its request has ended, and the guest may have put the structure to other use.
    pub fn give(&self) {
        loop {
            let Some(notice) = self.0.lock().pop_front() else { return };
            let _ = notice.give();
        }
    }
}

impl Default for Notices {
    fn default() -> Self {
        Self::new()
    }
}

/// The kernel's siginfo of a queued signal.
#[repr(C)]
struct SignalInfo {
    number: i32,
    errno: i32,
    code: i32,
    _gap: i32,
    process: u32,
    user: u32,
    value: u64,
    _rest: [u64; 12],
}
const _: () = assert!(size_of::<SignalInfo>() == 128);

fn raise(number: i32, value: u64) -> Result<(), Errno> {
    let process = identity::process_id();
    let info = SignalInfo {
        number,
        errno: 0,
        code: SI_ASYNCIO,
        _gap: 0,
        process,
        user: sys::user_id(),
        value,
        _rest: [0; 12],
    };
    let number = usize::try_from(number).map_err(|_| Errno::EINVAL)?;
    let at = (&raw const info) as usize;
    // SAFETY: 128 readable bytes, which the kernel copies.
    sys::check(unsafe {
        sys::syscall6(libc::SYS_rt_sigqueueinfo, process as usize, number, at, 0, 0, 0)
    })
    .map(drop)
}

type Function = unsafe extern "C" fn(u64);

struct Call {
    function: Function,
    value: u64,
}

extern "C" fn run(call: *mut c_void) -> *mut c_void {
    // The thread inherits the service thread's mask; the C library's have none.
    let nothing = 0_u64;
    // SAFETY: eight readable bytes; no old mask is asked for.
    unsafe {
        let (set, at) = (libc::SIG_SETMASK as usize, (&raw const nothing) as usize);
        sys::syscall6(libc::SYS_rt_sigprocmask, set, at, 0, 8, 0, 0);
    }
    // SAFETY: 1. The box that `call` below made, given to this thread alone. 2. The guest's own
    //    function with the guest's own value, as SIGEV_THREAD's contract has it.
    unsafe {
        let Call { function, value } = *Box::from_raw(call.cast::<Call>());
        function(value);
    }
    core::ptr::null_mut()
}

/// Calls the guest's function in a new thread, detached unless the guest's attributes say else.
fn call(function: u64, value: u64, attributes: u64) -> Result<(), Errno> {
    let address = usize::try_from(function).ok().filter(|&at| at != 0).ok_or(Errno::EINVAL)?;
    // SAFETY: not null; the guest's function, called in `run`.
    let function = unsafe { core::mem::transmute::<usize, Function>(address) };
    let call = Box::into_raw(Box::new(Call { function, value })).cast::<c_void>();
    // SAFETY: 1. `detached` is initialised before it is used and destroyed after; otherwise the
    //    guest's attributes are used, as its contract with the C library has it. 2. `call` passes
    //    to the thread, or back if there is none.
    let failed = unsafe {
        let mut detached: libc::pthread_attr_t = core::mem::zeroed();
        let mut wanted = attributes as *const libc::pthread_attr_t;
        if wanted.is_null() {
            libc::pthread_attr_init(&raw mut detached);
            libc::pthread_attr_setdetachstate(&raw mut detached, libc::PTHREAD_CREATE_DETACHED);
            wanted = &raw const detached;
        }
        let mut thread: libc::pthread_t = 0;
        let failed = libc::pthread_create(&raw mut thread, wanted, run, call);
        if attributes == 0 {
            libc::pthread_attr_destroy(&raw mut detached);
        }
        failed
    };
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: made above, and no thread has it.
    drop(unsafe { Box::from_raw(call.cast::<Call>()) });
    Err(Errno::EAGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `struct sigevent` as a C program lays it out.
    fn event(value: u64, number: i32, notify: i32, function: u64, attributes: u64) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&value.to_ne_bytes());
        bytes[8..12].copy_from_slice(&number.to_ne_bytes());
        bytes[12..16].copy_from_slice(&notify.to_ne_bytes());
        bytes[16..24].copy_from_slice(&function.to_ne_bytes());
        bytes[24..].copy_from_slice(&attributes.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_sigevent_says_what_its_fields_say() {
        let signal = Notice::of_event(&event(7, 34, libc::SIGEV_SIGNAL, 0, 0));
        assert_eq!(signal, Notice::Signal { number: 34, value: 7 });
        assert!(!signal.is_impossible());
        let thread = Notice::of_event(&event(8, 0, libc::SIGEV_THREAD, 0x1000, 0x2000));
        assert_eq!(thread, Notice::Thread { function: 0x1000, value: 8, attributes: 0x2000 });
        for notify in [libc::SIGEV_NONE, 3, 4, 77, -1] {
            assert_eq!(Notice::of_event(&event(1, 2, notify, 3, 4)), Notice::None);
        }
        for number in [-1, 65, i32::MAX] {
            let event = event(0, number, libc::SIGEV_SIGNAL, 0, 0);
            assert!(Notice::of_event(&event).is_impossible(), "{number}");
        }
    }
}
