//! The one lock of the trusted side: a word that any thread of any process of the family can take.
//!
//! Held for fractions of a microsecond, never across crypto, copying of guest data, I/O or
//! waiting; so it spins, and after a bounded number of spins asks the platform to let others run.
//! The word holds the owner's number, so that a platform can tell that an owner has died, or waits
//! for itself, and end the family instead of spinning for ever.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU32, Ordering};

use lock_api::{GuardSend, RawMutex};
use once_cell::race::OnceRef;

/// What the lock asks of the platform. Set once per process with [`set_hooks`].
pub struct Hooks {
    /// A non-zero number for the calling thread, which no other living thread has.
    pub owner: fn() -> u32,
    /// Called after each round of spinning with the number of a holder, and a way to see whether it
    /// still is: yields the CPU, and does not return if a thread that has died is the holder (what
    /// the lock protects is then torn).
    pub contended: fn(holder: u32, holds: &dyn Fn() -> bool),
}

static HOOKS: OnceRef<'static, Hooks> = OnceRef::new();

/// Installs the platform's hooks. The first call of a process wins; without it the lock spins.
pub fn set_hooks(hooks: &'static Hooks) {
    // A second call is a no-op by contract.
    let _ = HOOKS.set(hooks);
}

const FREE: u32 = 0;
/// Owner number where no platform has set hooks (tests, single-process embedders).
const NOBODY: u32 = u32::MAX;
const SPINS_BEFORE_YIELD: u32 = 200;

/// The lock word. 0 is free, else the owner's number.
pub struct RawLock(AtomicU32);

// SAFETY: 1. Exclusion: the word goes from FREE to an owner only by one successful
//    compare-exchange (Acquire), and back to FREE only in `unlock` (Release), which lock_api calls
//    only from the guard that the successful lock made.
unsafe impl RawMutex for RawLock {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(AtomicU32::new(FREE));
    type GuardMarker = GuardSend;

    fn lock(&self) {
        let hooks = HOOKS.get();
        let me = hooks.map_or(NOBODY, |h| (h.owner)());
        let mut spins = 0;
        // Acquire pairs with the Release in `unlock`.
        while let Err(holder) =
            self.0.compare_exchange_weak(FREE, me, Ordering::Acquire, Ordering::Relaxed)
        {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                core::hint::spin_loop();
                continue;
            }
            spins = 0;
            if let (Some(hooks), true) = (hooks, holder != FREE) {
                (hooks.contended)(holder, &|| self.0.load(Ordering::Relaxed) == holder);
            }
        }
    }

    fn try_lock(&self) -> bool {
        let me = HOOKS.get().map_or(NOBODY, |h| (h.owner)());
        self.0.compare_exchange(FREE, me, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    unsafe fn unlock(&self) {
        self.0.store(FREE, Ordering::Release);
    }
}

/// A value behind the lock.
pub type Lock<T> = lock_api::Mutex<RawLock, T>;
/// Access to a locked value.
pub type LockGuard<'a, T> = lock_api::MutexGuard<'a, RawLock, T>;

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::sync::Arc;

    #[test]
    fn increments_under_the_lock_are_never_lost() {
        let value = Arc::new(Lock::new(0_u64));
        let threads: alloc::vec::Vec<_> = (0..4)
            .map(|_| {
                let value = value.clone();
                std::thread::spawn(move || (0..20_000).for_each(|_| *value.lock() += 1))
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(*value.lock(), 80_000);
    }
}
