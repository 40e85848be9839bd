//! Whether the library does anything at all, and its beginning and end.

use core::sync::atomic::{AtomicU32, Ordering};

use postern_sim::{
    config::RUN_VARIABLE,
    files,
    guest::fault,
    identity, inheritance,
    inside::{Scope, gate},
    limits, runtime, sys,
};

const UNKNOWN: u32 = u32::MAX;
const INERT: u32 = u32::MAX - 1;
const ACTIVE: u32 = u32::MAX - 2;

/// One of the constants, or the thread that is finding out.
static STATE: AtomicU32 = AtomicU32::new(UNKNOWN);

/// Whether `postern run` started this program. The first call finds out: it may come before the
/// constructor, from another library's.
pub fn active() -> bool {
    loop {
        match STATE.load(Ordering::Acquire) {
            ACTIVE => return true,
            INERT => return false,
            UNKNOWN => find_out(),
            // What we ourselves call while finding out passes on.
            thread if thread == sys::gettid() => return false,
            _ => sys::yield_now(),
        }
    }
}

#[cold]
fn find_out() {
    let me = sys::gettid();
    if STATE.compare_exchange(UNKNOWN, me, Ordering::Acquire, Ordering::Relaxed).is_err() {
        return;
    }
    // Whoever is inside from here on dies only when it comes out.
    let _inside = Scope::new();
    let asked = is_asked_for();
    if asked {
        gate::prepare();
        fault::install();
    }
    let active = asked && runtime::active();
    if active {
        begin();
    }
    STATE.store(if active { ACTIVE } else { INERT }, Ordering::Release);
}

/// Whether the environment names a run file. Allocates nothing.
fn is_asked_for() -> bool {
    let mut name = [0_u8; 32];
    name[..RUN_VARIABLE.len()].copy_from_slice(RUN_VARIABLE.as_bytes());
    // SAFETY: a C string; nobody changes the environment this early.
    unsafe { !libc::getenv(name.as_ptr().cast()).is_null() }
}

fn begin() {
    // Before any fork: the child inherits the page that tells it apart.
    let _ = identity::process_id();
    limits::refresh();
    crate::process::watch_forks();
    crate::working::inherit();
    // What the program before exec left open.
    inheritance::adopt();
    crate::calls::patch::install();
}

/// Waits for what is in flight and closes what is open: the process is about to end. A vfork child
/// that leaves does so in its parent's memory: nothing is done.
pub fn drain() {
    if STATE.load(Ordering::Acquire) == ACTIVE && identity::process_id() == sys::getpid() {
        let _inside = Scope::new();
        runtime::exit_drain();
    }
}

/// Runs `exec`, which does not return if it succeeds. What the next program inherits is kept for it;
/// a vfork child does no more than that, in its parent's memory.
pub fn around_exec<T>(exec: impl FnOnce() -> T) -> T {
    if STATE.load(Ordering::Acquire) != ACTIVE {
        return exec();
    }
    if identity::process_id() == sys::getpid() {
        runtime::exec_drain();
        let failed = exec();
        runtime::stay();
        return failed;
    }
    inheritance::hand_over(files::inheritable(), Vec::new());
    let failed = exec();
    inheritance::after_failed_exec();
    failed
}

extern "C" fn start() {
    let _ = active();
}

/// Before the C library writes out its streams and calls exit_group(2), where that is not caught.
extern "C" fn end() {
    if STATE.load(Ordering::Acquire) == ACTIVE && !crate::calls::patch::catches_exit() {
        // SAFETY: all streams; takes no pointer.
        unsafe { libc::fflush(core::ptr::null_mut()) };
        drain();
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;
