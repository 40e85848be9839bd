//! The service thread: drives when nobody else does.
//!
//! A guest that waits inside io_getevents or a file call drives its own completions; then this
//! thread sleeps. It ticks while requests are in flight (a guest may compute, wait on an eventfd,
//! or reap the ring in user space) and while a volume has something to publish; it listens to
//! doorbell B without a tick's delay once the guest was seen to wait elsewhere. Events of hidden
//! contexts it brings to their rings at once: the guest may wait anywhere for them.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use postern_trusted::port::Sleeper;

use crate::{
    death,
    family::{self, Family},
    host, identity, inside, posix_aio,
    process::{self, Process},
    sys,
    wait::{self, Signals, now_ns},
};

/// Look at what is in flight this often when nobody waits for it.
const TICK_IN_FLIGHT_NS: u64 = 1_000_000;
/// Look for chores this often while a volume is open.
const TICK_OPEN_NS: u64 = 10_000_000;
/// Look for another daemon this often.
const TICK_LOST_NS: u64 = 5_000_000;
/// Look for dead processes of the family this often.
const CENSUS_NS: u64 = 1_000_000_000;
/// How long the guest counts as waiting elsewhere after it was last seen to.
const LISTEN_NS: u64 = 500_000_000;

/// Until when the thread listens to its own doorbell. Private to the process.
static LISTEN_UNTIL: AtomicU64 = AtomicU64::new(0);

/// The guest waits where it does not drive (an eventfd, the ring itself): take over at once from
/// now on for a while.
pub fn take_over() {
    let now = now_ns();
    let before = LISTEN_UNTIL.swap(now + LISTEN_NS, Ordering::Relaxed);
    if before < now {
        process::current().service.kick();
    }
}

/// The process whose thread runs; 0 is none. A forked child finds its parent's number.
static RUNS_IN: AtomicU32 = AtomicU32::new(0);
/// The thread itself.
static THREAD: AtomicU32 = AtomicU32::new(0);
const FREE: u32 = 0;
const ASKED: u32 = 1;
const PARKED: u32 = 2;
static PARKING: AtomicU32 = AtomicU32::new(FREE);

/// Whether the calling thread is the service thread.
#[must_use]
pub fn runs_here() -> bool {
    RUNS_IN.load(Ordering::Acquire) == identity::process_id()
        && THREAD.load(Ordering::Relaxed) == inside::thread_id()
}

/// Whether the calling thread sees to it that the process comes over to another daemon: the service
/// thread, or, while that one stands still, whoever waits.
#[must_use]
pub fn is_mine_to_mend() -> bool {
    runs_here() || PARKING.load(Ordering::Acquire) == PARKED
}

/// How long the calling thread may sleep amid something else before it is to [`Process::mend`];
/// `None`: that is another thread's to do. Nothing rings when the next daemon is there.
#[must_use]
pub fn longest_sleep(process: &Process) -> Option<u64> {
    is_mine_to_mend().then(|| if process.waits_for_a_daemon() { TICK_LOST_NS } else { CENSUS_NS })
}

/// Stops the thread at a place where it holds nothing: exec is about to end it.
pub fn park() {
    // One that is only beginning would be cut off by the process's end with a lock in hand.
    wait_for_start();
    if RUNS_IN.load(Ordering::Acquire) != identity::process_id() {
        return;
    }
    PARKING.store(ASKED, Ordering::Release);
    process::current().service.kick();
    while PARKING.load(Ordering::Acquire) == ASKED {
        sys::yield_now();
    }
}

/// The exec failed: the thread goes on.
pub fn unpark() {
    PARKING.store(FREE, Ordering::Release);
}

fn stay_parked(process: &'static Process) {
    if PARKING.compare_exchange(ASKED, PARKED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        while PARKING.load(Ordering::Acquire) == PARKED {
            death::look(process);
            sys::nap();
        }
    }
}

/// The process that has started its thread. A forked child inherits its parent's number.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// The process for which one could be made.
static MADE_IN: AtomicU32 = AtomicU32::new(0);

/// Starts the thread, once per process. A thread that cannot be made is not an error here: guests
/// that wait inside calls do without.
pub fn start() {
    let me = identity::process_id();
    if STARTED.swap(me, Ordering::Relaxed) == me {
        return;
    }
    // A new thread inherits its maker's mask. Nothing may hit it while it begins, not even an order
    // to die. Past libc's functions, which the preload library replaces.
    let before = set_mask(u64::MAX);
    let builder = std::thread::Builder::new().name("postern-service".into()).stack_size(256 << 10);
    if builder.spawn(run).is_ok() {
        MADE_IN.store(me, Ordering::Release);
    }
    set_mask(before);
}

/// Waits until the thread runs, if there is one.
pub fn wait_for_start() {
    let me = identity::process_id();
    while MADE_IN.load(Ordering::Acquire) == me && RUNS_IN.load(Ordering::Acquire) != me {
        sys::yield_now();
    }
}

/// Sets the calling thread's signal mask; answers the one before.
fn set_mask(mask: u64) -> u64 {
    let mut before = 0_u64;
    // SAFETY: both sets are 8 bytes and live through the call.
    unsafe {
        let (new, old) = ((&raw const mask) as usize, (&raw mut before) as usize);
        let set = libc::SIG_SETMASK as usize;
        sys::syscall6(libc::SYS_rt_sigprocmask, set, new, old, 8, 0, 0);
    }
    before
}

fn run() {
    let Some(family) = family::family() else {
        return MADE_IN.store(0, Ordering::Release);
    };
    let process = process::current();
    THREAD.store(inside::thread_id(), Ordering::Relaxed);
    process.set_served();
    RUNS_IN.store(process.id(), Ordering::Release);
    set_mask(!wait::synchronous_signals());
    let mut census_ns = now_ns();
    let mut drives = 0;
    loop {
        stay_parked(process);
        death::look(process);
        let now = now_ns();
        // Silent since the last look, and nobody sleeps inside a call: then nobody else drives.
        let silent = process.drives() == drives && process.sleepers.sleeping() == 0;
        let listening = now < LISTEN_UNTIL.load(Ordering::Relaxed);
        process.mend();
        host::deliver();
        process.tend(family, silent || listening);
        posix_aio::give_notices();
        drives = process.drives();
        if now - census_ns > CENSUS_NS {
            census_ns = now;
            family.check_the_dead();
            if let Some(link) = process.linked() {
                link.check_daemon();
            }
            family
                .open_volumes()
                .filter_map(|v| v.standing().core())
                .for_each(|c| process.tell(&c));
        }
        rest(process, family, listening);
    }
}

fn rest(process: &'static Process, family: &'static Family, listening: bool) {
    let Ok(place) = process.service.enter(process::keep) else {
        return process::pause();
    };
    let busy = process.linked().is_some_and(|link| link.lane.in_flight() > 0);
    let tick = if process.waits_for_a_daemon() {
        TICK_LOST_NS
    } else if busy {
        TICK_IN_FLIGHT_NS
    } else if family.open_volumes().next().is_some() {
        TICK_OPEN_NS
    } else {
        CENSUS_NS
    };
    if listening {
        process.sleep_in(&place, Sleeper::Service, &|| false, Some(tick), Signals::Held);
    } else {
        let _ = place.sleep(Some(tick), Signals::Held);
    }
}
