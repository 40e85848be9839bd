//! Spinning before sleeping, where it pays.
//!
//! A wake-up costs several microseconds on both sides; a completion that is nearly there is had
//! more cheaply by looking for it. A spin that is lost costs credit, one that is won earns it; out
//! of credit only every 32nd occasion is tried, so the waste is bounded to a small share of one
//! core whatever the device does.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::wait;

/// Longest spin in nanoseconds.
const LONGEST_NS: u64 = 100_000;
const MOST_CREDIT: u32 = 8;
const TRY_EVERY: u32 = 32;
/// Looks between two readings of the clock.
const LOOKS: u32 = 16;

/// The credit of one process. Threads share it; lost updates do no harm.
pub struct Spinner {
    credit: AtomicU32,
    skipped: AtomicU32,
}

impl Spinner {
    /// Full credit.
    #[must_use]
    pub const fn new() -> Self {
        Self { credit: AtomicU32::new(MOST_CREDIT), skipped: AtomicU32::new(0) }
    }

    /// Looks for `there` for a short while, if that has paid lately. Answers whether it came.
    pub fn spin(&self, there: impl Fn() -> bool) -> bool {
        if !self.may_try() {
            return false;
        }
        let end = wait::now_ns() + LONGEST_NS;
        let won = loop {
            if (0..LOOKS).any(|_| {
                core::hint::spin_loop();
                there()
            }) {
                break true;
            }
            if wait::now_ns() >= end {
                break false;
            }
        };
        self.settle(won);
        won
    }

    fn may_try(&self) -> bool {
        if self.credit.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let skipped = self.skipped.fetch_add(1, Ordering::Relaxed) + 1;
        skipped.is_multiple_of(TRY_EVERY)
    }

    fn settle(&self, won: bool) {
        let credit = self.credit.load(Ordering::Relaxed);
        let credit = if won { (credit + 2).min(MOST_CREDIT) } else { credit.saturating_sub(1) };
        self.credit.store(credit, Ordering::Relaxed);
    }
}

impl Default for Spinner {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_looked_for_on_one_occasion_in_32() {
        let spinner = Spinner::new();
        let tried = (0..MOST_CREDIT + 320)
            .filter(|_| spinner.may_try().then(|| spinner.settle(false)).is_some());
        assert_eq!(tried.count() as u32, MOST_CREDIT + 10);
    }

    #[test]
    fn one_success_brings_spinning_back() {
        let spinner = Spinner::new();
        (0..MOST_CREDIT).for_each(|_| spinner.settle(false));
        assert!(!spinner.may_try());
        spinner.settle(true);
        assert!(spinner.may_try());
        assert!(spinner.spin(|| true));
    }
}
