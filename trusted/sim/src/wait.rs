//! Sleeping and waking inside one process of the simulated enclave.
//!
//! Every sleeper holds an epoll descriptor of its own with the process's kick, the family's kick
//! and the daemon's doorbells in it, all edge-triggered: a ring wakes every sleeper, nobody has to
//! read the eventfds, and a ring between a sleeper's last look and its sleep is kept for it.
//!
//! epoll_pwait2 ends on signals exactly as io_getevents does (EINTR for any handler, SA_RESTART or
//! not, and for SIGSTOP/SIGCONT), ppoll as io_pgetevents does (a stop without a handler restarts
//! it): the two calls that this library sleeps in.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicUsize, Ordering};

use postern_trusted::{errno::Errno, sync::Lock};

use crate::{files, inside, sys};

/// The C library's signal that cancels a thread: deferred like a guest's own, so no reason to end
/// a sleep that nothing ends.
const CANCEL: u64 = 1 << (32 - 1);

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitEnd {
    /// Something rang, or the wait was cut short for no reason: look again.
    Woken,
    /// The deadline passed.
    TimedOut,
    /// A signal handler ran.
    Interrupted,
}

/// Which signals may end a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signals {
    /// The thread's own mask.
    AsTheyAre,
    /// This mask for the time of the sleep, as ppoll(2).
    Masked(u64),
    /// None: handlers run afterwards.
    Held,
}

/// The process's sleeping place.
pub struct Sleepers {
    kick: i32,
    /// Watched by every sleeper.
    bells: Lock<Vec<i32>>,
    /// epoll descriptors of nobody at the moment, all of which know all bells.
    pool: Lock<Vec<i32>>,
    /// Counts bells that came later: an epoll descriptor from before does not know them.
    generation: AtomicUsize,
    sleeping: AtomicUsize,
}

impl Sleepers {
    /// A sleeping place with the family's kick (an eventfd) and one of its own.
    ///
    /// # Errors
    /// What eventfd2(2) says.
    pub fn new(family_kick: i32, keep: impl Fn(i32) -> i32) -> Result<Self, Errno> {
        let kick = keep(eventfd()?);
        let pool = Lock::new(Vec::with_capacity(16));
        Ok(Self {
            kick,
            bells: Lock::new(vec![kick, family_kick]),
            pool,
            generation: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
        })
    }

    /// Adds a doorbell that wakes sleepers. Call before anybody sleeps for it.
    pub fn watch(&self, bell: i32) {
        self.bells.lock().push(bell);
        self.renew();
    }

    /// A doorbell has become another one under the same descriptor: from now on sleepers listen to
    /// that. Those who sleep already do not.
    pub fn renew(&self) {
        // Descriptors made before do not know it; those in use are closed by their users.
        let old = {
            let mut pool = self.pool.lock();
            self.generation.fetch_add(1, Ordering::Relaxed);
            core::mem::take(&mut *pool)
        };
        old.into_iter().for_each(files::close_internal);
        self.kick();
    }

    /// Wakes every sleeper; `false` if there is none. Cheap when nobody sleeps.
    pub fn wake(&self) -> bool {
        // Pairs with the SeqCst increment in `enter`.
        core::sync::atomic::fence(Ordering::SeqCst);
        let anybody = self.sleeping.load(Ordering::SeqCst) > 0;
        if anybody {
            self.kick();
        }
        anybody
    }

    /// Rings the process's kick whether or not somebody sleeps.
    pub fn kick(&self) {
        ring(self.kick);
    }

    /// Threads that sleep or are about to.
    #[must_use]
    pub fn sleeping(&self) -> usize {
        self.sleeping.load(Ordering::SeqCst)
    }

    /// Takes a place to sleep in. From here on every ring is kept for this place: look at all
    /// conditions after this and before [`Place::sleep`].
    ///
    /// # Errors
    /// What epoll_create1(2) says (descriptors used up).
    pub fn enter(&self, keep: impl Fn(i32) -> i32) -> Result<Place<'_>, Errno> {
        let (pooled, generation) = {
            let mut pool = self.pool.lock();
            (pool.pop(), self.generation.load(Ordering::Relaxed))
        };
        let epoll = match pooled {
            Some(epoll) => epoll,
            None => self.make(keep)?,
        };
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        Ok(Place { sleepers: self, epoll, generation })
    }

    fn make(&self, keep: impl Fn(i32) -> i32) -> Result<i32, Errno> {
        let cloexec = libc::EPOLL_CLOEXEC as usize;
        // SAFETY: takes no pointers.
        let made =
            sys::check(unsafe { sys::syscall6(libc::SYS_epoll_create1, cloexec, 0, 0, 0, 0, 0) })?;
        let epoll = keep(i32::try_from(made).map_err(|_| Errno::EMFILE)?);
        for bell in self.bells.lock().iter() {
            let event = libc::epoll_event {
                events: (libc::EPOLLIN | libc::EPOLLET) as u32,
                u64: u64::from(bell.unsigned_abs()),
            };
            let at = (&raw const event) as usize;
            let add = libc::EPOLL_CTL_ADD as usize;
            // SAFETY: `event` lives through the call.
            let added = sys::check(unsafe {
                sys::syscall6(libc::SYS_epoll_ctl, epoll as usize, add, *bell as usize, at, 0, 0)
            });
            if let Err(errno) = added {
                files::close_internal(epoll);
                return Err(errno);
            }
        }
        Ok(epoll)
    }

    /// All descriptors this place owns, to be closed by a forked child.
    pub fn descriptors(&self) -> Vec<i32> {
        let mut all = self.pool.lock().clone();
        all.push(self.kick);
        all
    }
}

/// One sleeper's place.
pub struct Place<'a> {
    sleepers: &'a Sleepers,
    epoll: i32,
    /// The sleepers' when the descriptor was made or taken.
    generation: usize,
}

impl Place<'_> {
    /// Sleeps until a bell rings, `timeout_ns` passes (`None`: for ever), or a signal that
    /// `signals` lets through has been handled.
    #[must_use]
    pub fn sleep(&self, timeout_ns: Option<u64>, signals: Signals) -> WaitEnd {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        let timeout = timeout_ns.map(timespec);
        let mask = match signals {
            Signals::AsTheyAre => None,
            Signals::Masked(mask) => Some(mask),
            Signals::Held => Some(!synchronous_signals() | CANCEL),
        };
        let events = (&raw mut event) as usize;
        let timeout_at = timeout.as_ref().map_or(0, |t| (&raw const *t) as usize);
        let mask_at = mask.as_ref().map_or(0, |m| (&raw const *m) as usize);
        let wait = [self.epoll as usize, events, 1, timeout_at, mask_at, 8];
        let pwait = libc::SYS_epoll_pwait2;
        // SAFETY: all objects live through the calls; the kernel's sigset is 8 bytes.
        let answer = unsafe {
            let [epoll, events, one, timeout, mask, bytes] = wait;
            match signals {
                Signals::Held => {
                    sys::check(sys::syscall6(pwait, epoll, events, one, timeout, mask, bytes))
                }
                Signals::AsTheyAre => inside::interruptible(pwait, wait, None),
                Signals::Masked(asked) => {
                    let mut poll =
                        libc::pollfd { fd: self.epoll, events: libc::POLLIN, revents: 0 };
                    let at = (&raw mut poll) as usize;
                    let ppoll = [at, 1, timeout, mask, bytes, 0];
                    let end = inside::interruptible(libc::SYS_ppoll, ppoll, Some(asked));
                    // Takes what rang off the ready list.
                    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                    let now = (&raw const now) as usize;
                    sys::syscall6(pwait, epoll, events, one, now, 0, bytes);
                    end
                }
            }
        };
        match answer {
            Ok(0) => WaitEnd::TimedOut,
            Err(Errno::EINTR) => WaitEnd::Interrupted,
            _ => WaitEnd::Woken,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.sleepers.sleeping.fetch_sub(1, Ordering::SeqCst);
        let mut pool = self.sleepers.pool.lock();
        if self.generation == self.sleepers.generation.load(Ordering::Relaxed) {
            pool.push(self.epoll);
        } else {
            drop(pool);
            files::close_internal(self.epoll);
        }
    }
}

/// Handles the pending signals that `mask` lets through, without sleeping; answers whether there
/// were any.
#[must_use]
pub fn let_in(mask: u64) -> bool {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (now, mask_at) = ((&raw const now) as usize, (&raw const mask) as usize);
    // The mask is in force for the guest's handlers too, which may be deferred.
    // SAFETY: both objects live through the call; no descriptors; the kernel's sigset is 8 bytes.
    let answer =
        unsafe { inside::interruptible(libc::SYS_ppoll, [0, 0, now, mask_at, 8, 0], Some(mask)) };
    answer == Err(Errno::EINTR)
}

/// SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS and the two of the C library, as a kernel
/// mask: never blocked.
#[must_use]
pub fn synchronous_signals() -> u64 {
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, 32, 33]
        .iter()
        .fold(0, |mask, signal| mask | 1 << (signal - 1))
}

/// A new eventfd, close-on-exec, non-blocking.
///
/// # Errors
/// What eventfd2(2) says.
pub fn eventfd() -> Result<i32, Errno> {
    let flags = (libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) as usize;
    // SAFETY: takes no pointers.
    let made = sys::check(unsafe { sys::syscall6(libc::SYS_eventfd2, 0, flags, 0, 0, 0, 0) })?;
    i32::try_from(made).map_err(|_| Errno::EMFILE)
}

/// Adds one to an eventfd.
pub fn ring(eventfd: i32) {
    let one = 1_u64;
    // SAFETY: eight readable bytes. An error (counter full) leaves the bell ringing as it should.
    unsafe {
        sys::syscall6(libc::SYS_write, eventfd as usize, (&raw const one) as usize, 8, 0, 0, 0)
    };
}

/// Whether a write to `descriptor` would not block.
#[must_use]
pub fn is_writable(descriptor: i32) -> bool {
    let mut poll = [asked(descriptor, libc::POLLOUT)];
    look_at(&mut poll, 0);
    poll[0].revents & libc::POLLOUT != 0
}

/// Waits until somebody rings `bell`, an eventfd, or has since the last such wait: `limit_ns`
/// nanoseconds at most, or until a signal was handled.
pub fn for_ring(bell: i32, limit_ns: u64) {
    let mut poll = libc::pollfd { fd: bell, events: libc::POLLIN, revents: 0 };
    let limit = timespec(limit_ns);
    let mut word = 0_u64;
    // SAFETY: all objects live through the calls; no mask is set; the eventfd does not block.
    unsafe {
        let (at, limit) = ((&raw mut poll) as usize, (&raw const limit) as usize);
        sys::syscall6(libc::SYS_ppoll, at, 1, limit, 0, 0, 0);
        if poll.revents & libc::POLLIN != 0 {
            let to = (&raw mut word) as usize;
            sys::syscall6(libc::SYS_read, bell as usize, to, 8, 0, 0, 0);
        }
    }
}

/// A length of time for the kernel.
fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).unwrap_or(0),
    }
}

/// Whether `socket` has hung up.
#[must_use]
pub fn has_hung_up(socket: i32) -> bool {
    let mut poll = [asked(socket, libc::POLLRDHUP)];
    look_at(&mut poll, 0);
    poll[0].revents & HUNG_UP != 0
}

/// What poll(2) says of a connection whose peer has gone.
const HUNG_UP: i16 = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;

const fn asked(fd: i32, events: i16) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// poll(2), for at most so many milliseconds; where it fails nothing has happened.
fn look_at(polls: &mut [libc::pollfd], limit_ms: usize) {
    // SAFETY: the pollfds live through the call, which writes nothing else.
    unsafe {
        sys::syscall6(libc::SYS_poll, polls.as_mut_ptr() as usize, polls.len(), limit_ms, 0, 0, 0)
    };
}

/// Closes a descriptor of our own.
pub fn close(descriptor: i32) {
    // SAFETY: the caller owns it.
    unsafe { sys::syscall6(libc::SYS_close, descriptor as usize, 0, 0, 0, 0, 0) };
}

/// CLOCK_MONOTONIC in nanoseconds (vDSO).
#[must_use]
pub fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable. clock_gettime is async-signal-safe and not interposed.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Processors this process may run on.
#[must_use]
pub fn processors() -> usize {
    let mut mask = [0_u8; 1024];
    let at = mask.as_mut_ptr() as usize;
    // SAFETY: `mask` is writable for its length.
    let answer = sys::check(unsafe {
        sys::syscall6(libc::SYS_sched_getaffinity, 0, mask.len(), at, 0, 0, 0)
    });
    match answer {
        Ok(_) => mask.iter().map(|byte| byte.count_ones() as usize).sum(),
        // More processors than bits: plenty.
        Err(_) => 8 * mask.len(),
    }
}
