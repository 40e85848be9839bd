//! The guest's signal handlers, called through one function of ours that defers them while their
//! thread is inside the library ([`crate::inside`]).
//!
//! Holds: the guest is told the dispositions it set; the kernel is given its flags and masks, but
//! for `SA_RESETHAND`, which takes effect here when the handler is called.
//! A signal whose default action ends the process has a handler too ([`take_defaults`]); the guest
//! is told of the default action.
//! SIGSEGV and SIGBUS have a way of their own ([`fault`]): the copy leaf needs them unblocked, so
//! one that somebody *sends* is handled at once.
//!
//! Does not hold: a disposition set by a program's own system call instruction goes past this;
//! such a handler runs at once, wherever its thread is.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};

use postern_trusted::errno::Errno;

use super::fault::{self, Action, Disposition};
use super::mask;
use crate::{death, identity, inside, sys};

const SIGNALS: usize = 65;

/// What the guest set, by signal number. Private to the process; fork copies it.
static SET: [Disposition; SIGNALS] = [const { Disposition::new() }; SIGNALS];
/// The C library's signal that changes user ids in every thread: answered at once, as it holds
/// nothing and jumps nowhere, and the thread that sent it waits.
const SET_IDS: i32 = 33;
/// The C library's signal that cancels a thread.
const CANCEL: i32 = 32;

/// Whether defaults have been taken over.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Signals whose default action ends the process and that can be handled, without the two that
/// have a way of their own and the C library's two (signal(7)).
fn is_deadly(signal: i32) -> bool {
    const OTHERS: [i32; 13] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGURG,
        libc::SIGWINCH,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        CANCEL,
        SET_IDS,
    ];
    !OTHERS.contains(&signal)
}

/// What the kernel is given in place of the default action.
fn in_place_of_default() -> Action {
    fault::with_own_return(Action {
        handler: on_signal as *const () as usize,
        flags: libc::SA_SIGINFO as u64,
        mask: !inside::NEVER_BLOCKED,
        ..Action::default()
    })
}

/// From now on no signal ends the process by its default action before [`death::prepare`] is done.
pub fn take_defaults() {
    if TAKEN.swap(true, Ordering::AcqRel) {
        return;
    }
    for signal in (1..SIGNALS as i32).filter(|signal| is_deadly(*signal)) {
        if fault::raw_sigaction(signal, None).is_ok_and(|now| now.handler == libc::SIG_DFL) {
            let _ = fault::raw_sigaction(signal, Some(&in_place_of_default()));
        }
    }
}

/// Dies of `signal` by its default action, in a handler of that signal.
pub fn take_default(signal: i32) -> ! {
    fault::die(signal, false);
    let mask = !(inside::NEVER_BLOCKED | mask::bit(signal));
    loop {
        // The signal that was sent again comes as soon as it may.
        inside::set_mask(mask);
        sys::nap();
    }
}

fn has_handler(action: &Action) -> bool {
    action.handler != libc::SIG_DFL && action.handler != libc::SIG_IGN
}

/// rt_sigaction(2) of a signal other than SIGSEGV and SIGBUS: `new` as the guest asks for
/// it, the answer as it was set before.
///
/// # Errors
/// As rt_sigaction(2).
pub fn sigaction(signal: i32, new: Option<&Action>) -> Result<Action, Errno> {
    let set = usize::try_from(signal).ok().and_then(|n| SET.get(n)).ok_or(Errno::EINVAL)?;
    let known = set.load();
    // A vfork child shares this memory, but has dispositions of its own.
    let shared = identity::process_id() != sys::getpid();
    let ends = |new: &Action| {
        new.handler == libc::SIG_DFL && is_deadly(signal) && TAKEN.load(Ordering::Acquire)
    };
    let wrapped = new.map(|new| match new {
        _ if signal == SET_IDS || shared => *new,
        new if has_handler(new) => Action {
            handler: on_signal as *const () as usize,
            flags: new.flags & !(libc::SA_RESETHAND as u64) | libc::SA_SIGINFO as u64,
            ..*new
        },
        new if ends(new) => in_place_of_default(),
        new => *new,
    });
    if let (Some(new), false) = (new, shared) {
        // Before the kernel calls the wrapper for it.
        if has_handler(new) || ends(new) {
            set.store(new);
        }
    }
    match fault::raw_sigaction(signal, wrapped.as_ref()) {
        Ok(old) if old.handler == on_signal as *const () as usize => {
            let mask = if has_handler(&known) { old.mask } else { known.mask };
            Ok(Action { handler: known.handler, flags: known.flags, mask, ..old })
        }
        Ok(old) => Ok(old),
        Err(errno) => {
            if !shared {
                set.store(&known);
            }
            Err(errno)
        }
    }
}

/// The kernel calls this for every signal that has a handler. It unwinds: the C library ends a
/// cancelled thread from inside its handler.
extern "C-unwind" fn on_signal(
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
) {
    let Some(set) = usize::try_from(signal).ok().and_then(|n| SET.get(n)) else { return };
    let action = set.load();
    let restarts = has_handler(&action) && action.flags & libc::SA_RESTART as u64 != 0;
    // SAFETY: the kernel's arguments.
    if unsafe { inside::defer(signal, info, context, restarts) } {
        return;
    }
    match action.handler {
        libc::SIG_DFL => death::strike(signal),
        libc::SIG_IGN => return,
        _ => {}
    }
    if action.flags & libc::SA_RESETHAND as u64 != 0 {
        let default = Action {
            handler: libc::SIG_DFL,
            flags: action.flags & !(libc::SA_SIGINFO as u64),
            ..action
        };
        let _ = sigaction(signal, Some(&default));
    }
    // SAFETY: the guest's own handler with the arguments the kernel gave; a handler of one
    //    argument ignores the others (x86-64 calling convention).
    let handler: extern "C-unwind" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t) =
        unsafe { core::mem::transmute(action.handler) };
    handler(signal, info, context);
}
