//! How long a lane's flushes take, so that short ones need no thread.
//!
//! Holds: before the first flush none is called short, and one that was slow keeps the next ones
//! from being called so.

/// A flush that is expected to take longer keeps no lane from its other requests.
const SHORT_NS: u64 = 250_000;

/// A running mean of what the flushes of a lane took.
#[derive(Debug, Default)]
pub struct Pace {
    /// Nanoseconds; 0: none seen yet.
    usual_ns: u64,
}

impl Pace {
    /// Counts a flush that took `ns` nanoseconds.
    pub fn learn(&mut self, ns: u64) {
        self.usual_ns = if self.usual_ns == 0 {
            ns.max(1)
        } else {
            // A share of 1/8: some ten flushes make up for one that was ten times as slow.
            (self.usual_ns - self.usual_ns / 8).saturating_add(ns / 8).max(1)
        };
    }

    /// Whether the next flush is expected to be short.
    pub const fn are_short(&self) -> bool {
        self.usual_ns != 0 && self.usual_ns <= SHORT_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushes_are_short_once_seen_and_until_a_slow_one() {
        let mut pace = Pace::default();
        assert!(!pace.are_short());
        pace.learn(45_000);
        assert!(pace.are_short());
        pace.learn(10_000_000);
        assert!(!pace.are_short());
        for _ in 0..40 {
            pace.learn(45_000);
        }
        assert!(pace.are_short());
        pace.learn(u64::MAX);
        pace.learn(u64::MAX);
        assert!(!pace.are_short());
        pace.learn(0);
        assert!(!pace.are_short());
    }
}
