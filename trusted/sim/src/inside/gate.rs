//! The gate of the library: shut while the process ends or becomes another program.
//!
//! Behind a shut gate only the thread that shut it goes on. Others come to the end of the call they
//! are in, or of a wait that a signal could end, and then stand still until the gate opens again
//! (an exec that failed), or for ever.
//!
//! Holds: once [`all_are_out`], no thread but the caller touches what the family shares, so that
//! the process can end at any moment and leave nothing half changed.
//! Costs, where it is open: two loads and a comparison for each call. The order between a thread's
//! own word and the gate's is made by the thread that shuts it (membarrier(2)).
//! Does not hold: threads beyond [`MOST`] are not waited for.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering, compiler_fence};

use super::{Inside, deliver, here};
use crate::{guest, identity, sys};

/// The gate's word: 0 (a forked child finds that), what follows, or the process whose gate is open.
const SHUT: u32 = u32::MAX;
const BEGINNING: u32 = u32::MAX - 1;

/// Threads of one process that are known.
pub const MOST: usize = 1024;

/// Addresses of the threads' words. One that has ended leaves its own behind; most are used again.
static THREADS: [AtomicUsize; MOST] = [const { AtomicUsize::new(0) }; MOST];

/// membarrier(2) commands.
const PRIVATE_EXPEDITED: usize = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: usize = 1 << 4;

fn membarrier(command: usize) -> isize {
    // SAFETY: takes numbers only.
    unsafe { sys::syscall6(libc::SYS_membarrier, command, 0, 0, 0, 0, 0) }
}

/// Announces to the kernel that the gate may be shut: cheap while the process has one thread.
pub fn prepare() {
    membarrier(REGISTER_PRIVATE_EXPEDITED);
}

impl Inside {
    /// Whether the thread may pass without a further look: it is known, and the gate is as it was
    /// when it became so.
    #[inline]
    pub(super) fn passes(&self) -> bool {
        let gate = identity::gate().load(Ordering::Relaxed);
        // Zeros are a gate at which nobody has registered, and a thread that has not.
        gate != 0 && gate == self.pass.load(Ordering::Relaxed)
    }

    /// The thread has announced itself with `depth`, and does not pass: registers it, or lets it
    /// stand outside until the gate is open.
    #[cold]
    pub(super) fn admit(&self, depth: u32) {
        let (gate, me) = (identity::gate(), identity::process_id());
        loop {
            match gate.load(Ordering::Acquire) {
                0 => begin(gate, me),
                BEGINNING => sys::yield_now(),
                SHUT if self.pass.load(Ordering::Relaxed) == SHUT => return,
                SHUT => {
                    self.depth.store(0, Ordering::Relaxed);
                    compiler_fence(Ordering::SeqCst);
                    if self.deferred.load(Ordering::Relaxed) != 0 {
                        deliver(self);
                    }
                    stand(gate);
                    self.depth.store(depth, Ordering::Relaxed);
                    compiler_fence(Ordering::SeqCst);
                }
                open => {
                    register(core::ptr::from_ref(self) as usize);
                    self.pass.store(open, Ordering::Relaxed);
                    compiler_fence(Ordering::SeqCst);
                    if gate.load(Ordering::Relaxed) == open {
                        return;
                    }
                }
            }
        }
    }

    /// Runs a wait that a signal may end, and that holds nothing of the family's meanwhile. If the
    /// gate is shut when it ends, the thread stands still.
    pub(super) fn asleep<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.asleep.store(1, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        let answer = wait();
        loop {
            self.asleep.store(0, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            let gate = identity::gate();
            if gate.load(Ordering::Relaxed) != SHUT || self.pass.load(Ordering::Relaxed) == SHUT {
                return answer;
            }
            self.asleep.store(1, Ordering::Relaxed);
            stand(gate);
        }
    }
}

/// The first thread of a process: those of its parent are not here.
fn begin(gate: &AtomicU32, me: u32) {
    if gate.compare_exchange(0, BEGINNING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        THREADS.iter().for_each(|thread| thread.store(0, Ordering::Relaxed));
        gate.store(me, Ordering::Release);
    }
}

fn register(at: usize) {
    for thread in &THREADS {
        match thread.compare_exchange(0, at, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(known) if known == at => return,
            Err(_) => {}
        }
    }
}

/// Waits until the gate is no longer shut.
fn stand(gate: &AtomicU32) {
    while gate.load(Ordering::Acquire) == SHUT {
        sys::nap();
    }
}

/// Shuts the gate to all threads but the calling one. Where another thread has shut it, the caller
/// stands still until it is open.
pub fn shut() {
    while !try_shut() {
        here().asleep(|| ());
    }
}

/// As [`shut`]; `false` where another thread has shut it.
#[must_use]
pub fn try_shut() -> bool {
    let (gate, here) = (identity::gate(), here());
    if is_mine() {
        return true;
    }
    loop {
        match gate.load(Ordering::Acquire) {
            0 => begin(gate, identity::process_id()),
            BEGINNING => sys::yield_now(),
            SHUT => return false,
            open => {
                let taken = gate.compare_exchange(open, SHUT, Ordering::AcqRel, Ordering::Acquire);
                if taken.is_ok() {
                    break;
                }
            }
        }
    }
    here.pass.store(SHUT, Ordering::Relaxed);
    // Whoever was inside before is seen to be; whoever comes sees that it is shut.
    if membarrier(PRIVATE_EXPEDITED) != 0 {
        prepare();
        membarrier(PRIVATE_EXPEDITED);
    }
    true
}

/// Opens the gate that the calling thread has shut.
pub fn open() {
    if is_mine() {
        here().pass.store(0, Ordering::Relaxed);
        identity::gate().store(identity::process_id(), Ordering::Release);
    }
}

/// Whether the calling thread is the one that shut the gate.
#[must_use]
pub fn is_mine() -> bool {
    let shut = identity::gate().load(Ordering::Acquire) == SHUT;
    shut && here().pass.load(Ordering::Relaxed) == SHUT
}

/// Whether no other thread is inside, but for waits.
#[must_use]
pub fn all_are_out() -> bool {
    let own = core::ptr::from_ref(here()) as usize;
    THREADS.iter().map(|thread| thread.load(Ordering::Acquire)).all(|at| {
        // A thread that has ended may have taken its memory along.
        let word = |offset: usize| guest::read_u64((at + offset) as u64).unwrap_or(0) as u32;
        at == 0
            || at == own
            || word(core::mem::offset_of!(Inside, depth)) == 0
            || word(core::mem::offset_of!(Inside, asleep)) != 0
    })
}
