//! A process's end by a signal.
//!
//! To what the family shares a signal that kills is what it is to the kernel: something that takes
//! effect between two calls. So no process of the family dies of one with shared state half
//! changed:
//!
//! - A signal whose default action ends the process has a handler of ours ([`strike`]); the guest
//!   is told of the default action all the same.
//! - SIGKILL that a process under this library sends to another becomes an order that the victim
//!   carries out itself ([`kill`], [`obey`]). It comes as a SIGSEGV, which is never blocked and has
//!   our handler from the library's first moment on.
//!
//! In both cases the thread that is hit comes out of the library first. If the process has a
//! service thread, that one then shuts the gate ([`gate`]), waits for what is under way, closes
//! what is open as exit does, and the process dies of the signal it was sent.
//!
//! Does not hold: SIGKILL that the host sends (a user's shell, the memory killer, a parent's death
//! signal) kills at once; if that was amid work the family ends ([`crate::family::end_torn`]) and
//! the next open recovers. What a killed process without a service thread has inherited stays open
//! until the run ends.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};

use postern_trusted::errno::Errno;

use crate::{
    arena, config, family,
    guest::handlers,
    identity,
    inside::{self, gate},
    message,
    process::{self, Process},
    runtime, service, sys,
    wait::now_ns,
};

/// How long kill(2) waits for the end of a victim that closes what it has; then the kernel kills.
const PATIENCE_NS: u64 = 60_000_000_000;
/// After so many looks, a millisecond apart, the order is given again.
const AGAIN: u32 = 64;
/// What a SIGSEGV carries that is an order.
const ORDER: usize = 0x706f_7374_6b69_6c6c;

/// The process has closed what it had: the thread that was hit may go on to die.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// The service thread itself was hit: no other thread waits to die of it.
static UNAIDED: AtomicBool = AtomicBool::new(false);

/// Dies of `signal`, on a thread that is outside.
pub fn strike(signal: i32) -> ! {
    prepare(signal);
    if signal == libc::SIGKILL {
        process::abort();
    }
    handlers::take_default(signal)
}

/// Before the process dies of `signal`: returns when nothing of the family's is in its hands. Needs
/// little stack.
pub fn prepare(signal: i32) {
    // A vfork child dies alone, in its parent's memory. A thread that is ending the process, or
    // turning it into another program, has nothing left to close.
    if identity::process_id() != sys::getpid() || gate::is_mine() {
        return;
    }
    // A service thread that is only beginning has locks of the family's in hand.
    service::wait_for_start();
    let Some(process) = process::known().filter(|process| process.is_served()) else { return };
    process.doom(signal);
    process.service.kick();
    while !CLOSED.load(Ordering::Acquire) {
        sys::nap();
    }
}

/// For the service thread, whenever it looks: carries out what the process is doomed to.
pub fn look(process: &'static Process) {
    let Some(signal) = process.doomed() else { return };
    // Where another thread ends the process or execs, that goes on.
    if !gate::try_shut() {
        return;
    }
    runtime::close_down();
    CLOSED.store(true, Ordering::Release);
    if UNAIDED.load(Ordering::Relaxed) {
        strike(signal);
    }
    // Nothing may begin any more.
    loop {
        sys::nap();
    }
}

/// For the handler of a signal that was sent, where it runs on the service thread, which dies only
/// after it has closed what there is; `false` on another thread.
fn put_off(signal: i32) -> bool {
    let mine = service::runs_here();
    if let Some(process) = process::known().filter(|_| mine) {
        UNAIDED.store(true, Ordering::Relaxed);
        process.doom(signal);
    }
    mine
}

/// Whether a SIGSEGV is the order to die.
///
/// # Safety
/// `info` is what the kernel gave to the handler.
pub unsafe fn is_order(signal: i32, info: *const libc::siginfo_t) -> bool {
    // SAFETY: the kernel's structure; a queued signal has a value.
    let value = || unsafe { (*info).si_value().sival_ptr as usize };
    // SAFETY: as above.
    signal == libc::SIGSEGV && unsafe { (*info).si_code } == libc::SI_QUEUE && value() == ORDER
}

/// In the handler of an order.
///
/// # Safety
/// `context` is what the kernel gave to the handler.
pub unsafe fn obey(context: *mut libc::ucontext_t) {
    if identity::process_id() != sys::getpid() {
        process::abort();
    }
    // SAFETY: as the caller's.
    unsafe { come_out_and_die(libc::SIGKILL, context) };
}

/// In the handler of a signal that was sent, and that kills: returns if its thread is inside, or the
/// service thread.
///
/// # Safety
/// `context` is what the kernel gave to the handler.
pub unsafe fn come_out_and_die(signal: i32, context: *mut libc::ucontext_t) {
    // SAFETY: as the caller's.
    if !put_off(signal) && !unsafe { inside::defer_death(signal, context) } {
        strike(signal);
    }
}

/// Sends the order; `false` to a process that knows no orders, and where the kernel does not let
/// us.
fn order(id: u32) -> bool {
    if !(obeys(id) || begins(id) && held(id, || obeys(id))) {
        return false;
    }
    // SAFETY: all-zero is a valid siginfo.
    let mut info: libc::siginfo_t = unsafe { core::mem::zeroed() };
    info.si_signo = libc::SIGSEGV;
    info.si_code = libc::SI_QUEUE;
    // si_pid, si_uid, si_value follow the three numbers and their padding.
    let words = (&raw mut info).cast::<usize>();
    let (number, at) = (libc::SIGSEGV as usize, (&raw const info) as usize);
    // SAFETY: 1. The fourth word of sixteen. 2. The structure lives through the call.
    unsafe {
        words.add(3).write(ORDER);
        sys::syscall6(libc::SYS_rt_sigqueueinfo, id as usize, number, at, 0, 0, 0) == 0
    }
}

/// Before SIGKILL goes to `target`, as kill(2) takes it: lets those processes come to an end by
/// themselves that run this library. The caller then sends it all the same.
pub fn kill(target: i32) {
    let me = identity::process_id();
    if me != sys::getpid() || family::family().is_none() {
        return;
    }
    let group = match target {
        0 => sys::process_group(0),
        i32::MIN..=-2 => Some(target.unsigned_abs()),
        _ => None,
    };
    let mut victims = match target {
        1.. => vec![target.unsigned_abs()],
        _ => processes(),
    };
    let meant = |id: u32| group.is_none() || sys::process_group(id) == group;
    victims.retain(|&id| id != me && meant(id) && order(id));
    let until = now_ns() + PATIENCE_NS;
    for nap in 1_u32.. {
        victims.retain(|&id| lives(id));
        if victims.is_empty() || now_ns() > until {
            break;
        }
        if nap.is_multiple_of(AGAIN) {
            // It may have become another program meanwhile.
            victims.retain(|&id| order(id));
        }
        sys::nap();
    }
    if target == me.cast_signed() || group.is_some() && group == sys::process_group(0) {
        runtime::exit_drain();
    }
}

/// Reads `/proc/ID/NAME`.
fn about(id: u32, name: &str) -> Option<Vec<u8>> {
    /// Longest list of mappings looked at.
    const MOST: usize = 4 << 20;
    message::read_file(format!("/proc/{id}/{name}").as_bytes(), MOST).ok()
}

/// Whether an order reaches the library in that process: it is loaded, and catches SIGSEGV.
fn obeys(id: u32) -> bool {
    let catches = || {
        let status = about(id, "status")?;
        let text = core::str::from_utf8(&status).ok()?;
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        Some(caught & 1 << (libc::SIGSEGV - 1) != 0)
    };
    catches().unwrap_or(false) && about(id, "maps").is_some_and(|maps| arena::is_among(&maps))
}

/// Whether a program of a run starts in that process, and the library is not there yet.
fn begins(id: u32) -> bool {
    let name = [config::RUN_VARIABLE.as_bytes(), b"="].concat();
    let started_so =
        |text: Vec<u8>| text.split(|&byte| byte == 0).any(|one| one.starts_with(&name));
    about(id, "environ").is_some_and(started_so)
}

/// Looks at a process while it stands still. It goes on if the answer is yes; a caller that got no
/// kills it.
fn held(id: u32, look: impl FnOnce() -> bool) -> bool {
    const LOOKS: usize = 1000;
    if sys::kill(id, libc::SIGSTOP).is_err() {
        return false;
    }
    for _ in 0..LOOKS {
        match state(id) {
            Some(b'T') | None => break,
            _ => sys::yield_now(),
        }
    }
    let answer = look();
    if answer {
        let _ = sys::kill(id, libc::SIGCONT);
    }
    answer
}

/// The field behind the name in parentheses (proc_pid_stat(5)). `None`: it has ended.
fn state(id: u32) -> Option<u8> {
    let text = about(id, "stat")?;
    let state = memchr::memrchr(b')', &text).and_then(|at| text.get(at + 2).copied());
    state.filter(|state| !matches!(state, b'Z' | b'X'))
}

/// Whether process `id` has ended, also if its parent does not know yet.
#[must_use]
pub fn has_ended(id: u32) -> bool {
    id != identity::process_id() && state(id).is_none()
}

/// Whether a process has not ended; lets one that is stopped go on.
fn lives(id: u32) -> bool {
    let state = state(id);
    if matches!(state, Some(b'T' | b't')) {
        let _ = sys::kill(id, libc::SIGCONT);
    }
    state.is_some()
}

/// All processes there are.
fn processes() -> Vec<u32> {
    let mut all = Vec::new();
    let _ = message::for_each_name(c"/proc", |name| {
        all.extend(core::str::from_utf8(name).ok().and_then(|name| name.parse::<u32>().ok()));
    });
    all
}

/// The process that a descriptor of pidfd_open(2) is for.
///
/// # Errors
/// `EBADF` for another descriptor.
pub fn process_of(pidfd: i32) -> Result<i32, Errno> {
    let path = format!("/proc/self/fdinfo/{pidfd}");
    let text = message::read_file(path.as_bytes(), 4096).map_err(|_| Errno::EBADF)?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    line.and_then(|id| id.trim().parse().ok()).ok_or(Errno::EBADF)
}
