//! Signals of the launcher: held back by a mask, taken one at a time, passed on to the program.
//!
//! Holds: a signal that someone sends to the launcher reaches the program once. What the terminal
//! sends (Ctrl-C) the kernel gives to the whole foreground group, so the program has it already
//! and it is not passed on a second time.

use core::{mem::MaybeUninit, ptr};
use std::{io, os::unix::process::CommandExt as _, process::Command, time::Duration};

/// What is passed on.
const FORWARDED: [i32; 8] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    libc::SIGCONT,
];

/// A signal that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    /// A child changed its state: look at all of them.
    Child,
    /// Sent to the launcher by a process.
    Sent(i32),
    /// Sent by the kernel to the whole process group.
    Shared(i32),
}

impl Arrived {
    /// The signal number, if it asks the launcher to end before the program has started.
    pub fn ends(self) -> Option<i32> {
        match self {
            Self::Sent(n) | Self::Shared(n)
                if [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM].contains(&n) =>
            {
                Some(n)
            }
            _ => None,
        }
    }
}

/// The signals are blocked from [`Signals::hold`] to the end of the process.
pub struct Signals {
    held: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks the signals of the calling thread. To be called before another thread exists.
    ///
    /// # Errors
    /// What sigprocmask(2) answers.
    pub fn hold() -> io::Result<Self> {
        let mut held = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY:
        // 1. `held` is initialised by sigemptyset before any other use; the numbers are valid, so
        //    the set calls cannot fail.
        // 2. `before` is filled by pthread_sigmask when it answers 0, checked below.
        // 3. SIGCHLD's disposition is process-wide state that nothing else here changes: an
        //    inherited SIG_IGN would take the children's exit statuses away.
        let (answer, held, before) = unsafe {
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::sigemptyset(held.as_mut_ptr());
            libc::sigaddset(held.as_mut_ptr(), libc::SIGCHLD);
            for number in FORWARDED {
                libc::sigaddset(held.as_mut_ptr(), number);
            }
            let answer = libc::pthread_sigmask(libc::SIG_BLOCK, held.as_ptr(), before.as_mut_ptr());
            if answer != 0 {
                return Err(io::Error::from_raw_os_error(answer));
            }
            (answer, held.assume_init(), before.assume_init())
        };
        debug_assert_eq!(answer, 0);
        Ok(Self { held, before })
    }

    /// Waits for the next signal, at most `limit` (for ever if `None`).
    pub fn wait(&self, limit: Option<Duration>) -> Option<Arrived> {
        let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(limit.subsec_nanos().cast_signed()),
        });
        let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: 1. All three point to live locals of the right type, or are null where the call
        //    allows it. 2. `info` is read only when the call answered a signal number.
        let (number, code) = unsafe {
            let number = libc::sigtimedwait(&raw const self.held, info.as_mut_ptr(), limit);
            if number <= 0 {
                return None;
            }
            (number, info.assume_init().si_code)
        };
        Some(match number {
            libc::SIGCHLD => Arrived::Child,
            number if code == libc::SI_KERNEL => Arrived::Shared(number),
            number => Arrived::Sent(number),
        })
    }

    /// Lets the program that `command` starts see the signals as the launcher found them.
    pub fn restore_in(&self, command: &mut Command) {
        let before = self.before;
        // SAFETY: 1. The closure runs between fork and exec: pthread_sigmask is
        //    async-signal-safe, and nothing allocates. 2. `before` is an initialised set.
        unsafe {
            command.pre_exec(move || {
                match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) {
                    0 => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            });
        }
    }
}
