//! Log-linear histograms of nanoseconds: one writer, any number of readers, no lock.
//!
//! Values below 64 ns have a bucket each; above, every power of two is cut into 64 buckets, so a
//! quantile is at most 1/64 (1.6 %) above the true value, never below it. Count, sum and maximum
//! are exact. Values beyond [`LIMIT_NS`] count in the last bucket (their sum and maximum stay true).
//!
//! Holds: [`Histogram::record`] costs four plain loads and stores. Does not hold: a reader that
//! looks while the writer writes may see a count without its sum.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
const TOP_BIT: u32 = 37;
const BUCKETS: usize = (TOP_BIT - SUB_BITS + 2) as usize * SUB;

/// Largest value with a bucket of its own kind, about 275 seconds.
pub const LIMIT_NS: u64 = (1 << (TOP_BIT + 1)) - 1;

#[allow(clippy::cast_possible_truncation)]
const fn bucket(value: u64) -> usize {
    let value = if value > LIMIT_NS { LIMIT_NS } else { value };
    if value < SUB as u64 {
        return value as usize;
    }
    let shift = 63 - value.leading_zeros() - SUB_BITS;
    (shift as usize + 1) * SUB + (value >> shift) as usize - SUB
}

/// Largest value that falls into `bucket`.
const fn bucket_top(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = (bucket / SUB - 1) as u32;
    (((bucket % SUB + SUB) as u64 + 1) << shift) - 1
}

/// A histogram that one thread writes and others read.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    count: AtomicU64,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

/// Adds to a word that only this thread writes: no locked instruction.
#[inline]
pub(crate) fn bump(word: &AtomicU64, by: u64) {
    word.store(word.load(Relaxed).wrapping_add(by), Relaxed);
}

impl Histogram {
    /// Counts one value, nanoseconds. Only one thread may call this.
    #[inline]
    pub fn record(&self, value_ns: u64) {
        bump(&self.buckets[bucket(value_ns)], 1);
        bump(&self.count, 1);
        bump(&self.sum, value_ns);
        if value_ns > self.max.load(Relaxed) {
            self.max.store(value_ns, Relaxed);
        }
    }

    /// Adds what `other` holds to this one, which nobody else may write meanwhile.
    pub fn absorb(&self, other: &Self) {
        for (mine, theirs) in self.buckets.iter().zip(&other.buckets) {
            bump(mine, theirs.load(Relaxed));
        }
        bump(&self.count, other.count.load(Relaxed));
        bump(&self.sum, other.sum.load(Relaxed));
        self.max.store(self.max.load(Relaxed).max(other.max.load(Relaxed)), Relaxed);
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Sum of the values, nanoseconds.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }

    /// Largest value, nanoseconds; 0 if there is none.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max.load(Relaxed)
    }

    /// The smallest bucket top that at least `per_mille` of a thousand values do not exceed
    /// (500 = median), nanoseconds; 0 if there is no value.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let total: u64 = self.buckets.iter().map(|b| b.load(Relaxed)).sum();
        let wanted = (u128::from(total) * u128::from(per_mille)).div_ceil(1000).max(1);
        let mut seen = 0u128;
        for (index, word) in self.buckets.iter().enumerate() {
            seen += u128::from(word.load(Relaxed));
            if seen >= wanted {
                let top = bucket_top(index);
                return if index == BUCKETS - 1 { self.max() } else { top.min(self.max()) };
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_at_or_below_its_buckets_top_and_above_the_one_before() {
        let mut value = 0u64;
        while value <= LIMIT_NS {
            let at = bucket(value);
            assert!(at < BUCKETS, "{value}");
            assert!(value <= bucket_top(at), "{value}");
            assert!(at == 0 || value > bucket_top(at - 1), "{value}");
            value += 1 + value / 97;
        }
        assert_eq!(bucket(LIMIT_NS), BUCKETS - 1);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    /// The expected values come from sorting the values themselves.
    #[test]
    fn a_quantile_is_never_below_the_sorted_answer_and_at_most_a_64th_above() {
        let histogram = Histogram::default();
        let mut values = Vec::new();
        let mut x = 12345u64;
        for _ in 0..10_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (x >> 40) >> (x % 23);
            histogram.record(value);
            values.push(value);
        }
        values.sort_unstable();
        for per_mille in [1, 500, 990, 999, 1000] {
            let exact = values[(values.len() * per_mille as usize).div_ceil(1000) - 1];
            let shown = histogram.quantile(per_mille);
            assert!(shown >= exact && shown <= exact + exact / 64 + 1, "{per_mille}: {shown}");
        }
        assert_eq!(histogram.max(), *values.last().unwrap());
        assert_eq!(histogram.sum(), values.iter().sum::<u64>());
    }

    #[test]
    fn absorbing_two_halves_equals_recording_the_whole() {
        let (left, right, whole) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for value in [0, 63, 64, 1_000, 1_000_000, u64::from(u32::MAX)] {
            left.record(value);
            right.record(value * 3);
            whole.record(value);
            whole.record(value * 3);
        }
        left.absorb(&right);
        for per_mille in [0, 250, 500, 750, 1000] {
            assert_eq!(left.quantile(per_mille), whole.quantile(per_mille));
        }
        assert_eq!((left.count(), left.sum(), left.max()), (12, whole.sum(), whole.max()));
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        let empty = Histogram::default();
        assert_eq!((empty.quantile(500), empty.max(), empty.count()), (0, 0, 0));
    }
}
