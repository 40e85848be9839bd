//! Signal dispositions and masks: SIGSEGV and SIGBUS reach the copy leaf first, and the guest is
//! told what it set itself.

use core::ffi::{c_int, c_void};

use libc::sigset_t;
use postern_sim::guest::{
    fault::{self, Action},
    mask::{self, Change},
};
use postern_trusted::errno::Errno;

use crate::next::{Failed, Next, answer, export};

/// A handler as signal(3) takes and returns it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Handler(usize);

impl Failed for Handler {
    const FAILED: Self = Self(libc::SIG_ERR);
}

/// The first 64 signals of a set: all there are.
fn low_word(set: *const sigset_t) -> u64 {
    // SAFETY: the caller's set, at least eight bytes, as the C function demands.
    unsafe { set.cast::<u64>().read_unaligned() }
}

fn is_fault(signal: c_int) -> bool {
    signal == libc::SIGSEGV || signal == libc::SIGBUS
}

fn from_c(new: &libc::sigaction) -> Action {
    Action {
        handler: new.sa_sigaction,
        flags: u64::from(new.sa_flags.cast_unsigned()),
        restorer: 0,
        mask: low_word(&raw const new.sa_mask),
    }
}

fn to_c(old: Action, to: &mut libc::sigaction) {
    // SAFETY: all-zero is a valid set.
    to.sa_mask = unsafe { core::mem::zeroed() };
    // SAFETY: a set is longer than eight bytes.
    unsafe { (&raw mut to.sa_mask).cast::<u64>().write_unaligned(old.mask) };
    to.sa_sigaction = old.handler;
    // The C library hides the flag that it adds itself.
    to.sa_flags = i32::try_from(old.flags & 0x7bff_ffff).unwrap_or(0)
        | if old.flags & 0x8000_0000 != 0 { i32::MIN } else { 0 };
    to.sa_restorer = None;
}

fn set_fault_action(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> Result<c_int, Errno> {
    // SAFETY: null or the caller's action, as the C function demands.
    let new = unsafe { new.as_ref() }.map(from_c);
    let before = fault::sigaction(signal, new.as_ref())?;
    // SAFETY: null or room for an action, as the C function demands.
    if let Some(old) = unsafe { old.as_mut() } {
        to_c(before, old);
    }
    Ok(0)
}

/// A disposition of another signal: its handler runs with the two signals unblocked.
fn set_other_action(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    type Call = unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;
    static NEXT: Next = Next::new(c"sigaction");
    let Some(at) = NEXT.find() else { return answer(|| Err(Errno::ENOSYS)) };
    // SAFETY: the C function of this name.
    let next: Call = unsafe { core::mem::transmute(at) };
    let before = fault::asked_mask(signal);
    // SAFETY: null or the caller's action, as the C function demands.
    let new = unsafe { new.as_ref() };
    let asked = new.map(|new| low_word(&raw const new.sa_mask));
    let copy = new.map(|new| {
        let mut copy = *new;
        let mask = low_word(&raw const new.sa_mask) & !mask::FAULTS;
        // SAFETY: a set is longer than eight bytes.
        unsafe { (&raw mut copy.sa_mask).cast::<u64>().write_unaligned(mask) };
        copy
    });
    let copy = copy.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: null or our copy; null or the caller's room.
    let result = unsafe { next(signal, copy, old) };
    if result == 0 {
        if let Some(asked) = asked {
            fault::note_mask(signal, asked);
        }
        if !old.is_null() {
            // SAFETY: the C library has just filled it.
            unsafe {
                let word = (&raw mut (*old).sa_mask).cast::<u64>();
                word.write_unaligned(word.read_unaligned() | before);
            }
        }
    }
    result
}

/// signal(3) in one of its two meanings.
fn set_handler(signal: c_int, handler: Handler, flags: c_int) -> Handler {
    answer(|| {
        let own = if flags & libc::SA_NODEFER == 0 { mask::bit(signal) } else { 0 };
        let flags = u64::from(flags.cast_unsigned());
        let new = Action { handler: handler.0, flags, restorer: 0, mask: own };
        fault::sigaction(signal, Some(&new)).map(|old| Handler(old.handler))
    })
}

/// A mask change, with the two signals kept out of what the kernel is told.
fn change_mask(
    how: c_int,
    set: *const sigset_t,
    old: *mut sigset_t,
    kernel: impl FnOnce(*const sigset_t) -> c_int,
) -> c_int {
    let before = mask::shadow();
    let result = if set.is_null() {
        kernel(set)
    } else {
        let change = Change::new(how, low_word(set));
        // SAFETY: the caller's set, as the C function demands.
        let mut copy = unsafe { set.read_unaligned() };
        // SAFETY: a set is longer than eight bytes.
        unsafe { (&raw mut copy).cast::<u64>().write_unaligned(change.kernel) };
        let result = kernel(&raw const copy);
        if result == 0 {
            change.commit();
        }
        result
    };
    if result == 0 && !old.is_null() {
        // SAFETY: the caller's room, which the C library has just filled.
        unsafe {
            let word = old.cast::<u64>();
            word.write_unaligned(word.read_unaligned() | before);
        }
    }
    result
}

/// Calls `$name` of the next library with a set of our own.
macro_rules! export_mask {
    ($($name:ident)+) => { $(
        /// Keeps SIGSEGV and SIGBUS unblocked in the kernel.
        ///
        /// # Safety
        /// As the C function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
            type Call = unsafe extern "C" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int;
            static NEXT: crate::next::Next = crate::next::Next::new(
                match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => c"",
                },
            );
            let Some(at) = NEXT.find() else { return libc::ENOSYS };
            // SAFETY: the C function of this name; sets are the caller's or our copy.
            let next = |set| unsafe { core::mem::transmute::<*mut c_void, Call>(at)(how, set, old) };
            if fault::installed() { change_mask(how, set, old, next) } else { next(set) }
        }
    )+ };
}

export_mask! { sigprocmask pthread_sigmask }

export! {
    fn [sigaction, __sigaction](
        signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction,
    ) -> c_int, next => {
        if !fault::installed() {
            return next();
        }
        if is_fault(signal) {
            return answer(|| set_fault_action(signal, new, old));
        }
        set_other_action(signal, new, old)
    };
    fn [signal, bsd_signal, ssignal](signal: c_int, handler: Handler) -> Handler, next =>
        if fault::installed() && is_fault(signal) {
            set_handler(signal, handler, libc::SA_RESTART)
        } else {
            next()
        };
    fn [sysv_signal, __sysv_signal](signal: c_int, handler: Handler) -> Handler, next =>
        if fault::installed() && is_fault(signal) {
            set_handler(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER)
        } else {
            next()
        };
}
