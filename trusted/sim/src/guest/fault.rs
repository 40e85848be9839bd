//! SIGSEGV and SIGBUS: ours first, the guest's behind it.
//!
//! The kernel always calls our handler. A fault of the copy leaf is ours and resumes there; every
//! other one goes to what the guest asked for, with the guest's flags and mask in force, or takes
//! the default way: the kernel's own action is put back and the instruction faults again, so that
//! the core dump shows the guest's registers.
//!
//! The guest keeps seeing its own dispositions: [`sigaction`] answers what it had set.
#![allow(unsafe_code)]

use core::{
    arch::global_asm,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
};

use postern_trusted::errno::Errno;

use super::{handlers, mask};
use crate::{death, inside, service, sys};

global_asm!(
    ".pushsection .text.postern_guest,\"ax\",@progbits",
    // The bytes before the label keep unwinders, which look at the return address less one,
    // inside; they know this sequence as the way back from a signal handler.
    "nop",
    ".p2align 4",
    ".globl postern_signal_return",
    ".hidden postern_signal_return",
    ".type postern_signal_return,@function",
    "postern_signal_return:",
    ".byte 0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00", // mov rax, 15 (rt_sigreturn)
    "syscall",
    ".size postern_signal_return, .-postern_signal_return",
    ".popsection",
);

unsafe extern "C" {
    safe static postern_signal_return: u8;
}

/// sa_flags bit: `restorer` is valid (the x86-64 kernel demands it).
const SA_RESTORER: u64 = 0x0400_0000;
const SIGNALS: usize = 65;

/// The kernel's struct sigaction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Action {
    /// SIG_DFL (0), SIG_IGN (1) or a function.
    pub handler: usize,
    /// SA_* bits.
    pub flags: u64,
    /// Where a handler returns to.
    pub restorer: usize,
    /// Signals blocked while the handler runs, bit `signal - 1`.
    pub mask: u64,
}

/// What the guest set for one of the two signals. The words are read one by one in the handler:
/// a thread that changes the disposition while another faults gets one or the other handler, as
/// natively; x86-64 passes all three arguments to either kind.
pub(super) struct Disposition {
    handler: AtomicUsize,
    flags: AtomicU64,
    restorer: AtomicUsize,
    mask: AtomicU64,
}

impl Disposition {
    pub(super) const fn new() -> Self {
        Self {
            handler: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicU64::new(0),
            restorer: AtomicUsize::new(0),
            mask: AtomicU64::new(0),
        }
    }

    pub(super) fn load(&self) -> Action {
        Action {
            handler: self.handler.load(Ordering::Acquire),
            flags: self.flags.load(Ordering::Acquire),
            restorer: self.restorer.load(Ordering::Acquire),
            mask: self.mask.load(Ordering::Acquire),
        }
    }

    pub(super) fn store(&self, action: &Action) {
        self.mask.store(action.mask, Ordering::Release);
        self.restorer.store(action.restorer, Ordering::Release);
        self.flags.store(action.flags, Ordering::Release);
        self.handler.store(action.handler, Ordering::Release);
    }
}

static SEGV: Disposition = Disposition::new();
static BUS: Disposition = Disposition::new();
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// Which of the two signals the guest asked to have blocked while each signal's handler runs,
/// as bits of [`stripped_bits`]. The kernel is not told.
static STRIPPED: [AtomicU8; SIGNALS] = [const { AtomicU8::new(0) }; SIGNALS];

fn disposition(signal: i32) -> Option<&'static Disposition> {
    match signal {
        libc::SIGSEGV => Some(&SEGV),
        libc::SIGBUS => Some(&BUS),
        _ => None,
    }
}

/// Whether the handlers are in place.
#[inline]
pub fn installed() -> bool {
    INSTALLED.load(Ordering::Acquire)
}

/// Puts our handlers before the guest's. Only the first call of a process does something; a
/// forked child inherits them.
pub fn install() {
    if INSTALLED.swap(true, Ordering::AcqRel) {
        return;
    }
    for (signal, guest) in [(libc::SIGSEGV, &SEGV), (libc::SIGBUS, &BUS)] {
        if let Ok(before) = raw_sigaction(signal, None) {
            guest.store(&before);
            let _ = raw_sigaction(signal, Some(&ours(&before)));
        }
    }
    mask::unblock_faults();
    handlers::take_defaults();
}

/// What the kernel is given in place of the guest's `action`: our handler, on the guest's terms.
fn ours(action: &Action) -> Action {
    let has_handler = action.handler != libc::SIG_DFL && action.handler != libc::SIG_IGN;
    let reset = libc::SA_RESETHAND as u64; // Done by us when the guest's handler is called.
    let flags = if has_handler { action.flags & !reset } else { libc::SA_ONSTACK as u64 };
    with_own_return(Action {
        handler: on_fault as *const () as usize,
        flags: flags | libc::SA_SIGINFO as u64,
        mask: if has_handler { action.mask & !mask::FAULTS } else { 0 },
        ..Action::default()
    })
}

/// rt_sigaction(2) by the kernel itself.
///
/// # Errors
/// `EINVAL` for a signal that has no settable disposition.
pub fn raw_sigaction(signal: i32, new: Option<&Action>) -> Result<Action, Errno> {
    let mut old = Action::default();
    let new = new.map_or(0, |action| core::ptr::from_ref(action) as usize);
    let to = (&raw mut old) as usize;
    let signal = usize::try_from(signal).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `new` is null or an action that lives through the call; the kernel writes one
    //    action to `old`; its sigset has eight bytes.
    sys::check(unsafe { sys::syscall6(libc::SYS_rt_sigaction, signal, new, to, 8, 0, 0) })?;
    Ok(old)
}

/// The two signals' bits of a mask, as a byte for [`STRIPPED`].
fn stripped_bits(mask: u64) -> u8 {
    let has = |signal: i32| u8::from(mask & mask::bit(signal) != 0);
    has(libc::SIGSEGV) | has(libc::SIGBUS) << 1
}

fn stripped_mask(bits: u8) -> u64 {
    let one = |at: u8, signal: i32| if bits >> at & 1 == 1 { mask::bit(signal) } else { 0 };
    one(0, libc::SIGSEGV) | one(1, libc::SIGBUS)
}

/// The guest's rt_sigaction(2), once [`installed`]: `new` as it asks for it, the answer as it was
/// set before.
///
/// # Errors
/// As rt_sigaction(2).
pub fn sigaction(signal: i32, new: Option<&Action>) -> Result<Action, Errno> {
    if let Some(guest) = disposition(signal) {
        let old = guest.load();
        if let Some(new) = new {
            raw_sigaction(signal, Some(&ours(new)))?;
            guest.store(new);
        }
        return Ok(old);
    }
    let before = asked_mask(signal);
    let kernel = new.map(|new| Action { mask: new.mask & !mask::FAULTS, ..*new });
    let mut old = handlers::sigaction(signal, kernel.as_ref())?;
    old.mask |= before;
    if let Some(new) = new {
        note_mask(signal, new.mask);
    }
    Ok(old)
}

/// Remembers which of the two signals the guest asked to have blocked while the handler of
/// `signal` runs. The kernel must be given a mask without them.
pub fn note_mask(signal: i32, mask: u64) {
    if let Some(stripped) = usize::try_from(signal).ok().and_then(|n| STRIPPED.get(n)) {
        stripped.store(stripped_bits(mask), Ordering::Relaxed);
    }
}

/// What [`note_mask`] was last told, as a mask.
#[must_use]
pub fn asked_mask(signal: i32) -> u64 {
    let stripped = usize::try_from(signal).ok().and_then(|n| STRIPPED.get(n));
    stripped.map_or(0, |stripped| stripped_mask(stripped.load(Ordering::Relaxed)))
}

/// The kernel calls this for every SIGSEGV and SIGBUS.
extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a valid frame to an SA_SIGINFO handler.
    let instruction = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    // SAFETY: as above. Positive codes are the kernel's: a fault of the instruction itself.
    let is_fault = unsafe { (*info).si_code } > 0;
    if is_fault && let Some(landing) = super::landing(instruction.cast_unsigned() as usize) {
        *instruction = landing as i64;
        return;
    }
    // SAFETY: as above.
    if unsafe { death::is_order(signal, info) } {
        // SAFETY: as above.
        return unsafe { death::obey(context) };
    }
    let Some(guest) = disposition(signal) else { return };
    let action = guest.load();
    let blocked = is_fault && mask::shadow() & mask::bit(signal) != 0;
    match action.handler {
        libc::SIG_IGN if !is_fault => {}
        // The kernel kills a program that blocks the fault it makes.
        // SAFETY: as above.
        handler if handler <= libc::SIG_IGN || blocked => unsafe {
            close_and_die(signal, is_fault, context);
        },
        handler => {
            if action.flags & libc::SA_RESETHAND as u64 != 0 {
                guest.store(&Action { handler: libc::SIG_DFL, ..action });
            }
            // SAFETY: the guest's own handler with the arguments the kernel gave; a handler of
            //    one argument ignores the others (x86-64 calling convention).
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t) =
                unsafe { core::mem::transmute(handler) };
            handler(signal, info, context);
        }
    }
}

/// An action that returns from its handler by a way of ours.
pub(super) fn with_own_return(action: Action) -> Action {
    let restorer = core::ptr::from_ref(&postern_signal_return) as usize;
    Action { flags: action.flags | SA_RESTORER, restorer, ..action }
}

/// Dies, as the guest would have by its own doing: what it has open is closed first. A fault inside
/// the library is another matter: nothing of ours can be relied on.
///
/// # Safety
/// `context` is what the kernel gave to the handler.
unsafe fn close_and_die(signal: i32, is_fault: bool, context: *mut libc::ucontext_t) {
    if !is_fault {
        // SAFETY: as the caller's.
        return unsafe { death::come_out_and_die(signal, context) };
    }
    if !inside::is_inside() && !service::runs_here() {
        death::prepare(signal);
    }
    die(signal, is_fault);
}

/// The default way: a fault happens again at once, a signal that was sent is sent again.
pub(super) fn die(signal: i32, is_fault: bool) {
    let _ = raw_sigaction(signal, Some(&with_own_return(Action::default())));
    if !is_fault {
        let [process, thread] = [sys::getpid(), sys::gettid()].map(|id| id as usize);
        let number = usize::try_from(signal).unwrap_or(0);
        // SAFETY: sends a signal to the calling thread; no pointers.
        unsafe { sys::syscall6(libc::SYS_tgkill, process, thread, number, 0, 0, 0) };
    }
}
