//! Whether the calling thread is inside the library, and what becomes of signals meanwhile.
//!
//! A call into the library is to the guest what a system call is: signals that arrive meanwhile
//! are handled when it returns. The wrapper around the guest's handlers ([`crate::guest::handlers`])
//! queues a signal that finds its thread inside once more to that thread, blocks what comes after
//! it, and the kernel delivers it when [`leave`] puts the mask back. So a handler that jumps away
//! (siglongjmp), ends its thread or calls the library itself leaves nothing locked and nothing
//! lost.
//!
//! While the process ends or becomes another program nobody enters ([`gate`]).
//!
//! Holds: guest handlers run at depth 0 only; a sleep that may be interrupted ends with
//! [`Errno::EINTR`] for every signal deferred before or during it ([`interruptible`]); `errno` is
//! the call's own whatever the handlers did.
#![allow(unsafe_code)]

pub mod gate;

use core::{
    arch::{asm, global_asm},
    sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence},
};

use postern_trusted::errno::Errno;

use crate::{death, identity, process, sys};

/// One thread's state. Only the thread itself and its signal handlers write to it; [`gate`] reads
/// two words of other threads'.
#[repr(C, align(8))]
pub struct Inside {
    /// Calls under way; those that [`hold`] counts in the upper half.
    depth: AtomicU32,
    /// Something was deferred and not delivered yet. The leaf reads it.
    deferred: AtomicU32,
    /// The mask to go back to when [`Self::deferred`] is set.
    mask: AtomicU64,
    /// The mask of the wait that was interrupted, if [`Self::waited`].
    wait_mask: AtomicU64,
    waited: AtomicU32,
    asked: AtomicU32,
    /// In a wait that a signal may end, with nothing of the family's in hand.
    asleep: AtomicU32,
    /// What the gate's word was when the thread was let in.
    pass: AtomicU32,
    /// The thread's id in process [`Self::process`]; another one after a fork.
    thread: AtomicU32,
    process: AtomicU32,
    /// What was deferred first has a handler with `SA_RESTART`.
    restarts: AtomicU32,
    _rest: u32,
}

const BYTES: usize = 56;
const _: () = assert!(size_of::<Inside>() == BYTES);
const _: () = assert!(core::mem::offset_of!(Inside, deferred) == 4);

/// A call that a handler with `SA_RESTART` interrupted: whoever made it runs the handler
/// ([`outside`]) and makes it again. Linux's `ERESTARTSYS`, which no program sees.
pub const RESTART: Errno = Errno(512);

/// What [`hold`] adds.
const HELD: u32 = 1 << 16;

// Thread-local storage of the initial-exec kind: no call and no allocation to reach it, also in a
// signal handler.
global_asm!(
    ".pushsection .tbss.postern_inside,\"awT\",@nobits",
    ".p2align 3",
    ".globl postern_inside",
    ".hidden postern_inside",
    ".type postern_inside,@object",
    ".size postern_inside,{bytes}",
    "postern_inside:",
    ".zero {bytes}",
    ".popsection",
    // An interruptible system call: (rdi, rsi, rdx, r10, r8, r9) as the kernel takes them, rax the
    // number, r12 the address of `deferred`. Answers -EINTR without asking the kernel if something
    // was deferred; a signal deferred before the instruction has been executed moves execution
    // to `postern_leaf_out`.
    ".pushsection .text.postern_inside,\"ax\",@progbits",
    ".p2align 4",
    ".globl postern_leaf",
    ".hidden postern_leaf",
    ".type postern_leaf,@function",
    "postern_leaf:",
    ".cfi_startproc",
    "cmp dword ptr [r12], 0",
    "jne postern_leaf_out",
    ".globl postern_leaf_call",
    ".hidden postern_leaf_call",
    "postern_leaf_call:",
    "syscall",
    "ret",
    ".globl postern_leaf_out",
    ".hidden postern_leaf_out",
    "postern_leaf_out:",
    "mov rax, -{eintr}",
    "ret",
    ".cfi_endproc",
    ".size postern_leaf, .-postern_leaf",
    ".popsection",
    bytes = const BYTES,
    eintr = const libc::EINTR,
);

unsafe extern "C" {
    safe static postern_leaf: u8;
    safe static postern_leaf_call: u8;
    safe static postern_leaf_out: u8;
}

fn here() -> &'static Inside {
    let at: *const Inside;
    // SAFETY: 1. Computes an address; no memory is written. 2. The variable is defined above, in
    //    the same link, zero-initialised for each thread, aligned and large enough.
    unsafe {
        asm!(
            "mov {at}, qword ptr [rip + postern_inside@GOTTPOFF]",
            "add {at}, qword ptr fs:[0]",
            at = out(reg) at,
            options(nostack, readonly),
        );
        &*at
    }
}

/// The calling thread enters the library. Ends with [`leave`].
#[inline]
pub fn enter() {
    let here = here();
    let depth = here.depth.load(Ordering::Relaxed);
    here.depth.store(depth + 1, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if depth == 0 && !here.passes() {
        here.admit(1);
    }
}

/// The other end of [`enter`]: with the outermost one, handlers run that were deferred. Call with
/// nothing locked and nothing owned: they may jump away.
#[inline]
pub fn leave() {
    compiler_fence(Ordering::SeqCst);
    let here = here();
    let depth = here.depth.load(Ordering::Relaxed).wrapping_sub(1);
    here.depth.store(depth, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if depth == 0 && here.deferred.load(Ordering::Relaxed) != 0 {
        deliver(here);
    }
}

/// Between [`enter`] and [`leave`] for as long as it lives.
pub struct Scope(());

impl Scope {
    /// Enters.
    #[must_use]
    #[inline]
    pub fn new() -> Self {
        enter();
        Self(())
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scope {
    #[inline]
    fn drop(&mut self) {
        // Only a cancelled thread may unwind into the guest.
        if std::thread::panicking() {
            process::abort();
        }
        leave();
    }
}

/// Runs `job` as if the thread were outside: for calls that are passed on to the next library.
/// Unless something is held ([`hold`]).
#[inline]
pub fn outside<T>(job: impl FnOnce() -> T) -> T {
    let state = here();
    let depth = state.depth.load(Ordering::Relaxed);
    if depth == 0 || depth >= HELD {
        return job();
    }
    compiler_fence(Ordering::SeqCst);
    state.depth.store(0, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if state.deferred.load(Ordering::Relaxed) != 0 {
        deliver(state);
    }
    let answer = job();
    // Another thread's after a fork by the job? No: a child's first thread has a copy of this
    // one's storage at the same address.
    state.depth.store(depth, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if !state.passes() {
        state.admit(depth);
    }
    answer
}

/// Handlers stay deferred until [`release`], also while [`outside`]: a fork is under way.
pub fn hold() {
    let here = here();
    here.depth.store(here.depth.load(Ordering::Relaxed) + HELD, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
}

/// The other end of [`hold`].
pub fn release() {
    compiler_fence(Ordering::SeqCst);
    let here = here();
    let depth = here.depth.load(Ordering::Relaxed).saturating_sub(HELD);
    here.depth.store(depth, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if depth == 0 && here.deferred.load(Ordering::Relaxed) != 0 {
        deliver(here);
    }
}

/// Marks that a system call of the C library is being answered by the library; `false` if that is
/// so already: then it is the kernel's. Ends with [`answered`].
#[must_use]
pub fn ask() -> bool {
    here().asked.swap(1, Ordering::Relaxed) == 0
}

/// The other end of [`ask`].
pub fn answered() {
    here().asked.store(0, Ordering::Relaxed);
}

/// Puts the mask back: the kernel delivers what is pending.
#[cold]
fn deliver(here: &Inside) {
    if is_dying() {
        death::strike(DYING_OF.load(Ordering::Relaxed).cast_signed());
    }
    // SAFETY: the calling thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let mask = here.mask.load(Ordering::Relaxed);
    let waited = here.waited.swap(0, Ordering::Relaxed) != 0;
    here.deferred.store(0, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    if waited {
        // As the wait would have: its mask is in force while the handlers run. They may use this
        // thread's `wait_mask` again.
        let mask = here.wait_mask.load(Ordering::Relaxed);
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (now, mask) = ((&raw const now) as usize, (&raw const mask) as usize);
        // SAFETY: no descriptors; a timeout and a mask of 8 bytes that live through the call.
        unsafe { sys::syscall6(libc::SYS_ppoll, 0, 0, now, mask, 8, 0) };
    }
    set_mask(mask);
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Sets the calling thread's mask in the kernel.
pub(crate) fn set_mask(mask: u64) {
    let (how, at) = (libc::SIG_SETMASK as usize, (&raw const mask) as usize);
    // SAFETY: eight readable bytes.
    unsafe { sys::syscall6(libc::SYS_rt_sigprocmask, how, at, 0, 8, 0, 0) };
}

/// Whether the calling thread is inside.
#[must_use]
pub fn is_inside() -> bool {
    here().depth.load(Ordering::Relaxed) != 0
}

/// What a deferred signal leaves unblocked: faults, and the C library's own signal that changes
/// user ids in every thread (it must be answered, and only calls the kernel).
pub const NEVER_BLOCKED: u64 = {
    const fn bit(signal: i32) -> u64 {
        1 << (signal - 1)
    }
    bit(libc::SIGSEGV)
        | bit(libc::SIGBUS)
        | bit(libc::SIGILL)
        | bit(libc::SIGFPE)
        | bit(libc::SIGTRAP)
        | bit(libc::SIGSYS)
        | bit(33)
};

/// For a signal handler: if its thread is inside, defers the signal and answers `true`. `restarts`:
/// the guest's handler has `SA_RESTART`.
///
/// # Safety
/// `info` and `context` are what the kernel gave to the handler that calls this.
pub unsafe fn defer(
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
    restarts: bool,
) -> bool {
    let here = here();
    if here.depth.load(Ordering::Relaxed) == 0 {
        return false;
    }
    // Blocked before it is queued: a handler with SA_NODEFER would come back at once.
    set_mask(!NEVER_BLOCKED);
    let [process, thread] = [sys::getpid(), sys::gettid()].map(|id| id as usize);
    let number = usize::try_from(signal).unwrap_or(0);
    // SAFETY: the kernel's own siginfo, queued to this thread, which is allowed any code.
    let queued = unsafe {
        sys::syscall6(libc::SYS_rt_tgsigqueueinfo, process, thread, number, info as usize, 0, 0)
    };
    if queued != 0 {
        // No room in the queue: the signal without what came with it.
        // SAFETY: takes numbers only.
        unsafe { sys::syscall6(libc::SYS_tgkill, process, thread, number, 0, 0, 0) };
    }
    // SAFETY: the frame the kernel made; its mask is 8 bytes.
    unsafe {
        let mask = (&raw mut (*context).uc_sigmask).cast::<u64>();
        // The outermost of several nested handlers comes last and knows the thread's own mask.
        here.mask.store(mask.read_unaligned(), Ordering::Relaxed);
        mask.write_unaligned(!NEVER_BLOCKED);
        skip_call(context);
    }
    // Of several nested handlers too the outermost decides: the kernel delivered its signal first.
    here.restarts.store(restarts.into(), Ordering::Relaxed);
    here.deferred.store(1, Ordering::Relaxed);
    true
}

/// What a call answers that ended with `EINTR` and that Linux makes again after a handler with
/// `SA_RESTART`: `EINTR` or [`RESTART`].
#[must_use]
pub fn interrupted() -> Errno {
    let here = here();
    let [deferred, restarts] =
        [&here.deferred, &here.restarts].map(|word| word.load(Ordering::Relaxed) != 0);
    if deferred && restarts && !is_dying() { RESTART } else { Errno::EINTR }
}

/// A call of the leaf that has not been made is not made.
///
/// # Safety
/// `context` is what the kernel gave to a handler.
unsafe fn skip_call(context: *mut libc::ucontext_t) {
    let at = |label: &u8| core::ptr::from_ref(label) as usize;
    // SAFETY: as the caller's.
    let instruction = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let before_call = at(&postern_leaf)..=at(&postern_leaf_call);
    if before_call.contains(&(instruction.cast_unsigned() as usize)) {
        *instruction = at(&postern_leaf_out) as i64;
    }
}

/// The process that is to die as soon as its thread comes out, and of which signal.
static DYING: AtomicU32 = AtomicU32::new(0);
static DYING_OF: AtomicU32 = AtomicU32::new(0);

/// For the handler of a signal that is never blocked and was sent: if its thread is inside, the
/// process dies of it when the thread comes out; `false` if it is not.
///
/// # Safety
/// `context` is what the kernel gave to the handler that calls this.
pub unsafe fn defer_death(signal: i32, context: *mut libc::ucontext_t) -> bool {
    let here = here();
    if here.depth.load(Ordering::Relaxed) == 0 {
        return false;
    }
    DYING_OF.store(signal.unsigned_abs(), Ordering::Relaxed);
    DYING.store(identity::process_id(), Ordering::Relaxed);
    // SAFETY: as the caller's.
    unsafe { skip_call(context) };
    here.deferred.store(1, Ordering::Relaxed);
    true
}

fn is_dying() -> bool {
    DYING.load(Ordering::Relaxed) == identity::process_id()
}

/// A system call that a deferred signal interrupts, or keeps from being made, and during which the
/// thread has nothing of the family's in hand. `wait_mask` is the mask that the call itself puts in
/// force, if it does and the guest asked for it: signals that it blocks do not end the call,
/// whenever they came.
///
/// # Safety
/// As [`sys::syscall6`].
pub unsafe fn interruptible(
    number: i64,
    arguments: [usize; 6],
    wait_mask: Option<u64>,
) -> Result<usize, Errno> {
    let here = here();
    // SAFETY: as the caller's.
    here.asleep(|| unsafe { interruptible_here(here, number, arguments, wait_mask) })
}

/// # Safety
/// As [`sys::syscall6`].
unsafe fn interruptible_here(
    here: &Inside,
    number: i64,
    arguments: [usize; 6],
    wait_mask: Option<u64>,
) -> Result<usize, Errno> {
    if let Some(mask) = wait_mask {
        here.wait_mask.store(mask, Ordering::Relaxed);
        here.waited.store(1, Ordering::Relaxed);
    }
    let [a, b, c, d, e, f] = arguments;
    let deferred = core::ptr::from_ref(&here.deferred);
    let result: isize;
    // SAFETY: 1. The leaf has the kernel's calling convention and clobbers; it reads the word that
    //    r12 points to. 2. The caller vouches for the arguments.
    unsafe {
        asm!(
            "call {leaf}",
            leaf = sym postern_leaf,
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            in("r12") deferred,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    if here.deferred.load(Ordering::Relaxed) == 0 {
        here.waited.store(0, Ordering::Relaxed);
    } else if let Some(mask) = wait_mask
        && !is_dying()
        && result == -(libc::EINTR as isize)
        && pending() & !mask == 0
    {
        // All that is deferred came before the wait's mask was in force, and waits behind it. Every
        // signal is blocked by now: whichever the mask lets in ends this call.
        let own = here.mask.load(Ordering::Relaxed);
        // SAFETY: as the caller's.
        let waited = unsafe { sys::syscall6(number, a, b, c, d, e, f) };
        // A handler in the call took that mask for the thread's own.
        here.mask.store(own, Ordering::Relaxed);
        return sys::check(waited);
    }
    sys::check(result)
}

/// The calling thread's blocked signals that have come.
fn pending() -> u64 {
    let mut set = 0_u64;
    // SAFETY: eight writable bytes.
    unsafe { sys::syscall6(libc::SYS_rt_sigpending, (&raw mut set) as usize, 8, 0, 0, 0, 0) };
    set
}

/// The calling thread's id; asks the kernel once for each thread of each process.
#[must_use]
pub fn thread_id() -> u32 {
    let (here, process) = (here(), identity::process_id());
    if here.process.load(Ordering::Relaxed) != process {
        here.thread.store(sys::gettid(), Ordering::Relaxed);
        here.process.store(process, Ordering::Relaxed);
    }
    here.thread.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{fault, handlers};
    use core::sync::atomic::AtomicU32 as Count;

    static SEEN: Count = Count::new(0);

    extern "C" fn on_signal(_: i32, info: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
        // SAFETY: the kernel's argument.
        SEEN.fetch_add(unsafe { (*info).si_value().sival_ptr } as u32, Ordering::Relaxed);
    }

    /// Sets the handler the way a guest does, past the C library.
    fn handle(signal: i32) {
        // SAFETY: 1. All-zero is a valid sigaction. 2. The first call only lends the C library's
        //    way back from a handler.
        unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(signal, &raw const action, core::ptr::null_mut());
        }
        let asked = fault::raw_sigaction(signal, None).unwrap();
        handlers::sigaction(signal, Some(&asked)).unwrap();
        assert_eq!(handlers::sigaction(signal, None).unwrap(), asked, "the guest sees its own");
    }

    fn send(signal: i32, value: usize) {
        // SAFETY: sends a signal to the calling thread.
        unsafe {
            let value = libc::sigval { sival_ptr: value as *mut _ };
            assert_eq!(pthread_sigqueue(libc::pthread_self(), signal, value), 0);
        }
    }

    unsafe extern "C" {
        fn pthread_sigqueue(thread: libc::pthread_t, signal: i32, value: libc::sigval) -> i32;
    }

    fn mask() -> u64 {
        let mut mask = 0_u64;
        // SAFETY: eight writable bytes.
        unsafe {
            let at = (&raw mut mask) as usize;
            sys::syscall6(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK as usize, 0, at, 8, 0, 0)
        };
        mask
    }

    /// One test: they share the process's dispositions.
    #[test]
    fn handlers_run_when_the_outermost_call_leaves_and_no_wait_misses_them() {
        let signal = libc::SIGUSR1;
        handle(signal);
        let before = mask();
        send(signal, 1);
        assert_eq!(SEEN.load(Ordering::Relaxed), 1, "outside: at once");

        enter();
        enter();
        send(signal, 10);
        leave();
        assert_eq!(SEEN.load(Ordering::Relaxed), 1, "inside: deferred");
        // For ever, if the wait did not know.
        // SAFETY: no descriptors, no timeout.
        let waited = unsafe { interruptible(libc::SYS_ppoll, [0; 6], None) };
        assert_eq!(waited, Err(Errno::EINTR));
        leave();
        assert_eq!(SEEN.load(Ordering::Relaxed), 11, "with what came with it");
        assert_eq!(mask(), before);

        enter();
        outside(|| send(signal, 100));
        assert_eq!(SEEN.load(Ordering::Relaxed), 111, "passed on: at once");
        hold();
        outside(|| send(signal, 1000));
        assert_eq!(SEEN.load(Ordering::Relaxed), 111, "held");
        release();
        assert_eq!(SEEN.load(Ordering::Relaxed), 111, "still inside");
        leave();
        assert_eq!(SEEN.load(Ordering::Relaxed), 1111);

        // Deferred before a wait whose mask blocks it: the wait goes to its end.
        enter();
        send(signal, 100_000);
        let (shut, mut now) = (before | 1 << (signal - 1), [0_u64; 2]);
        // SAFETY: no descriptors; a timeout and a mask of eight bytes that live through the call.
        let waited = unsafe {
            let (now, at) = ((&raw mut now) as usize, (&raw const shut) as usize);
            interruptible(libc::SYS_ppoll, [0, 0, now, at, 8, 0], Some(shut))
        };
        assert_eq!((waited, SEEN.load(Ordering::Relaxed)), (Ok(0), 1111));
        leave();
        assert_eq!((SEEN.load(Ordering::Relaxed), mask()), (101_111, before));
        SEEN.fetch_sub(100_000, Ordering::Relaxed);

        // Blocked but for the time of a wait.
        let blocked = before | 1 << (signal - 1);
        set_mask(blocked);
        send(signal, 10_000);
        enter();
        let open = before;
        // SAFETY: no descriptors, no timeout, a mask of eight bytes.
        let waited = unsafe {
            let at = (&raw const open) as usize;
            interruptible(libc::SYS_ppoll, [0, 0, 0, at, 8, 0], Some(open))
        };
        assert_eq!(waited, Err(Errno::EINTR));
        assert_eq!(SEEN.load(Ordering::Relaxed), 1111);
        leave();
        assert_eq!(SEEN.load(Ordering::Relaxed), 11_111);
        assert_eq!(mask(), blocked);
        set_mask(before);
        assert_eq!(thread_id(), sys::gettid());
    }
}
