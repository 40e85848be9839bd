//! The heir: what finishes a process's work when the process is killed.
//!
//! Linux drains the AIO of a process that is killed, closes its files and ends its locks. Here a
//! second process stands by for that: it shares memory and descriptors with the first
//! (`CLONE_VM | CLONE_FILES`) but belongs to no thread group of its, so that a signal which ends
//! the one leaves the other. It sleeps until the first has ended, then drives what is in flight to
//! its end, over the same lane and into the same memory, and leaves the family as an orderly exit
//! would.
//!
//! The heir runs on the thread-local storage of the service thread that made it: it touches that
//! only once the thread is dead.
//!
//! Holds: an heir does nothing while a thread of its process lives. A process that ends or execs by
//! way of this library has no heir any more when it does ([`dismiss`]).
//! Does not hold: a process killed while one of its threads computes inside the library (polls a
//! request, holds a lock of the family) leaves that half done; its heir does not touch it and the
//! family ends ([`crate::family::Family::check_the_dead`]).
#![allow(unsafe_code)]

use core::{
    arch::asm,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
};

use crate::{
    family, files, identity, inside,
    process::{self, Process},
    runtime, sys, wait,
};

/// Room for the heir's calls, in bytes: as much as the service thread has.
const STACK: usize = 256 << 10;
/// How often a sleeping heir looks whether its process became another program behind our back.
const LOOK_SECONDS: i64 = 1;
const KCMP_VM: usize = 1;

/// The process that runs as an heir in this memory; 0 is none. Private to the process.
static MOURNING: AtomicU32 = AtomicU32::new(0);
/// The stack, made once for this memory; 0 is none. A forked child has a copy of it.
static STACK_AT: AtomicUsize = AtomicUsize::new(0);
/// The thread that made the heir.
static MAKER: AtomicU32 = AtomicU32::new(0);

/// Whether the caller is an heir at work.
#[must_use]
pub fn is_one() -> bool {
    let mourning = MOURNING.load(Ordering::Relaxed);
    mourning != 0 && mourning == sys::getpid()
}

/// Makes the calling process's heir, if it has none. Only the service thread may call this. Where
/// the kernel has no pidfd_open(2), or no process is to be had, there is none.
pub fn appoint(process: &'static Process) {
    if process.heir.load(Ordering::Acquire) != 0 {
        return;
    }
    if process.end.load(Ordering::Relaxed) < 0 {
        let Some(end) = watch() else { return };
        process.end.store(end, Ordering::Relaxed);
    }
    let Some(stack) = stack() else { return };
    MAKER.store(sys::gettid(), Ordering::Relaxed);
    // No signal for the end: a parent that waits for any child does not see this one.
    let flags = (libc::CLONE_VM | libc::CLONE_FILES) as usize;
    // SAFETY: 1. The stack is fresh or that of an heir that has been waited for. 2. `stand_by`
    //    never returns and uses nothing but the stack and statics until this thread is dead.
    let made = unsafe { clone(flags, stack + STACK, stand_by) };
    if let Ok(made @ 1..) = u32::try_from(made) {
        process.heir.store(made, Ordering::Release);
    }
}

/// Ends the calling process's heir: the process is about to end, or to become another program.
pub fn dismiss() {
    let Some(process) = process::known() else { return };
    let heir = process.heir.swap(0, Ordering::AcqRel) as usize;
    if heir == 0 || is_one() {
        return;
    }
    // SAFETY: a child of this process that nobody else waits for, so the number is still its; no
    //    status is asked for.
    unsafe {
        sys::syscall6(libc::SYS_kill, heir, libc::SIGKILL as usize, 0, 0, 0, 0);
        let all = libc::__WALL as usize;
        while sys::syscall6(libc::SYS_wait4, heir, 0, all, 0, 0, 0) == -(libc::EINTR as isize) {}
    }
}

/// The heir's stack in this memory.
fn stack() -> Option<usize> {
    let known = STACK_AT.load(Ordering::Relaxed);
    if known != 0 {
        return Some(known);
    }
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as usize;
    // SAFETY: a new mapping where the kernel chooses.
    let made = unsafe { sys::syscall6(libc::SYS_mmap, 0, STACK, protection, flags, usize::MAX, 0) };
    let at = sys::check(made).ok()?;
    STACK_AT.store(at, Ordering::Relaxed);
    Some(at)
}

/// A descriptor that becomes readable when the calling process has ended.
fn watch() -> Option<i32> {
    let me = identity::process_id() as usize;
    // SAFETY: takes numbers only.
    let made = unsafe { sys::syscall6(libc::SYS_pidfd_open, me, 0, 0, 0, 0, 0) };
    Some(process::keep(i32::try_from(sys::check(made).ok()?).ok()?))
}

/// clone(2) onto a stack of its own, beginning at `top` (aligned to 16); answers in the parent
/// alone.
///
/// # Safety
/// The stack belongs to the new process alone; `entry` does not return.
unsafe fn clone(flags: usize, top: usize, entry: extern "C" fn() -> !) -> isize {
    let result: isize;
    // SAFETY: 1. The parent goes on behind the call with rax set, rcx and r11 clobbered. 2. The
    //    child finds an aligned stack that the caller vouches for, calls `entry`, and never comes
    //    back.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone as isize => result,
            in("rdi") flags, in("rsi") top, in("rdx") 0, in("r10") 0, in("r8") 0,
            in("r12") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}

/// What the heir does from its beginning to its end. Its signals are blocked, as the service
/// thread's are.
extern "C" fn stand_by() -> ! {
    // SAFETY: numbers, and a mask of eight bytes. A session of its own: what is sent to the
    // process's group is not for the heir.
    unsafe {
        let mask = !wait::synchronous_signals();
        let (set, at) = (libc::SIG_SETMASK as usize, (&raw const mask) as usize);
        sys::syscall6(libc::SYS_rt_sigprocmask, set, at, 0, 8, 0, 0);
        sys::syscall6(libc::SYS_setsid, 0, 0, 0, 0, 0, 0);
    }
    let ended = sleep_until_alone();
    MOURNING.store(sys::getpid(), Ordering::SeqCst);
    inside::take_over();
    if let Some(process) = process::known() {
        mourn(process, ended);
    }
    leave()
}

fn leave() -> ! {
    loop {
        // SAFETY: ends the calling process.
        unsafe { sys::syscall6(libc::SYS_exit_group, 0, 0, 0, 0, 0, 0) };
    }
}

/// Returns when no thread of the process uses this memory any more; `true`: the process has ended,
/// `false`: it became another program. Uses no thread-local storage.
fn sleep_until_alone() -> bool {
    let Some(known) = process::known() else { leave() };
    let end = known.end.load(Ordering::Relaxed);
    let (process, maker) = (known.id() as usize, MAKER.load(Ordering::Relaxed) as usize);
    loop {
        let mut poll = libc::pollfd { fd: end, events: libc::POLLIN, revents: 0 };
        let limit = libc::timespec { tv_sec: LOOK_SECONDS, tv_nsec: 0 };
        let (at, limit) = ((&raw mut poll) as usize, (&raw const limit) as usize);
        // SAFETY: objects that live through the calls, and numbers.
        let [answer, maker_lives, other_memory] = unsafe {
            let me = sys::getpid() as usize;
            [
                sys::syscall6(libc::SYS_ppoll, at, 1, limit, 0, 8, 0),
                sys::syscall6(libc::SYS_tgkill, process, maker, 0, 0, 0, 0),
                sys::syscall6(libc::SYS_kcmp, process, me, KCMP_VM, 0, 0, 0),
            ]
        };
        if answer > 0 && poll.revents & libc::POLLIN != 0 {
            return true;
        }
        if maker_lives == -(libc::ESRCH as isize) && other_memory > 0 {
            return false;
        }
    }
}

/// Finishes what the process left, and gives back what it held.
fn mourn(process: &'static Process, ended: bool) {
    let Some(family) = family::family() else { return };
    if process.is_torn() {
        return; // The family finds out.
    }
    files::orphaned();
    if let Some(link) = process.linked() {
        link.orphaned();
    }
    process.finish();
    family.let_open(process);
    for directory in &family.directories {
        directory.settle(family);
    }
    runtime::depart(process, ended);
    family.strike(process, ended);
}
