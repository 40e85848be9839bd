//! Log-linear histograms of nanoseconds: one writer, any number of readers, no lock.
//!
//! Values below 64 ns have a bucket each; above, every power of two is cut into 64 buckets, so a
//! quantile is at most 1/64 (1.6 %) above the true value, never below it. Count, sum and maximum
//! are exact. Values beyond [`LIMIT_NS`] have a bucket of their own, [`Snapshot::overflows`] (their
//! sum and maximum stay true).
//!
//! Holds: [`Histogram::record`] costs four plain loads and stores; memory of buckets that were
//! never used is never touched. Does not hold: a reader that looks while the writer writes may see
//! a count without its sum.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use zerocopy::FromZeros;

const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
const TOP_BIT: u32 = 37;
/// The last is for values beyond the limit.
const BUCKETS: usize = (TOP_BIT - SUB_BITS + 2) as usize * SUB + 1;

/// Largest value with a bucket of its own kind, about 275 seconds.
pub const LIMIT_NS: u64 = (1 << (TOP_BIT + 1)) - 1;

#[allow(clippy::cast_possible_truncation)]
const fn bucket(value: u64) -> usize {
    if value > LIMIT_NS {
        return BUCKETS - 1;
    }
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
#[derive(FromZeros)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    count: AtomicU64,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Histogram {
    /// One that holds nothing.
    #[must_use]
    pub fn new() -> Box<Self> {
        zeroed()
    }

    /// What it holds now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        self.add_to(&mut snapshot);
        snapshot
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Histogram").field("count", &self.count).finish_non_exhaustive()
    }
}

/// `T` with every word 0, on the heap. The allocator answers large zeroed memory without touching
/// it.
pub(crate) fn zeroed<T: FromZeros>() -> Box<T> {
    match T::new_box_zeroed() {
        Ok(zeroed) => zeroed,
        Err(zerocopy::AllocError) => std::alloc::handle_alloc_error(std::alloc::Layout::new::<T>()),
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

    /// Adds what this histogram holds to `into`.
    pub fn add_to(&self, into: &mut Snapshot) {
        if self.count.load(Relaxed) == 0 {
            return;
        }
        for (index, word) in self.buckets[..BUCKETS - 1].iter().enumerate() {
            let count = word.load(Relaxed);
            if count > 0 {
                into.add(bucket_top(index), count);
            }
        }
        into.overflows += self.buckets[BUCKETS - 1].load(Relaxed);
        into.sum_ns = into.sum_ns.wrapping_add(self.sum.load(Relaxed));
        into.max_ns = into.max_ns.max(self.max.load(Relaxed));
    }
}

/// What a histogram held at one time, or several together. Counts are those of the buckets, so
/// that count, quantiles and buckets never contradict each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Largest value of each bucket that is not empty, nanoseconds, and the number of its values.
    buckets: BTreeMap<u64, u64>,
    /// Number of values beyond [`LIMIT_NS`].
    pub overflows: u64,
    /// Sum of the values, nanoseconds.
    pub sum_ns: u64,
    /// Largest value, nanoseconds; 0 if there is none.
    pub max_ns: u64,
}

impl Snapshot {
    /// Adds `count` values of a bucket whose largest value is `top_ns`.
    pub fn add(&mut self, top_ns: u64, count: u64) {
        *self.buckets.entry(top_ns).or_default() += count;
    }

    /// Adds what `other` holds.
    pub fn absorb(&mut self, other: &Self) {
        for (&top_ns, &count) in &other.buckets {
            self.add(top_ns, count);
        }
        self.overflows += other.overflows;
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.values().sum::<u64>() + self.overflows
    }

    /// Largest value of each bucket that is not empty, nanoseconds, ascending, and the number of
    /// its values.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        self.buckets.iter().map(|(&top_ns, &count)| (top_ns, count))
    }

    /// The smallest bucket top that at least `per_mille` of a thousand values do not exceed
    /// (500 = median), nanoseconds; 0 if there is no value.
    #[must_use]
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let total = self.count();
        if total == 0 {
            return 0;
        }
        let wanted = (u128::from(total) * u128::from(per_mille)).div_ceil(1000).max(1);
        let mut seen = 0u128;
        for (&top_ns, &count) in &self.buckets {
            seen += u128::from(count);
            if seen >= wanted {
                return top_ns.min(self.max_ns);
            }
        }
        self.max_ns
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
        assert_eq!(bucket(LIMIT_NS), BUCKETS - 2);
        assert_eq!(bucket(LIMIT_NS + 1), BUCKETS - 1);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    /// The expected values come from sorting the values themselves.
    #[test]
    fn a_quantile_is_never_below_the_sorted_answer_and_at_most_a_64th_above() {
        let histogram = Histogram::new();
        let mut values = Vec::new();
        let mut x = 12345u64;
        for _ in 0..10_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (x >> 40) >> (x % 23);
            histogram.record(value);
            values.push(value);
        }
        values.sort_unstable();
        let histogram = snapshot(&[&histogram]);
        for per_mille in [1, 500, 990, 999, 1000] {
            let exact = values[(values.len() * per_mille as usize).div_ceil(1000) - 1];
            let shown = histogram.quantile(per_mille);
            assert!(shown >= exact && shown <= exact + exact / 64 + 1, "{per_mille}: {shown}");
        }
        assert_eq!(histogram.max_ns, *values.last().unwrap());
        assert_eq!(histogram.sum_ns, values.iter().sum::<u64>());
        assert_eq!(histogram.count(), 10_000);
    }

    fn snapshot(histograms: &[&Histogram]) -> Snapshot {
        let mut all = Snapshot::default();
        for histogram in histograms {
            all.absorb(&histogram.snapshot());
        }
        all
    }

    #[test]
    fn two_halves_together_equal_the_whole() {
        let [left, right, whole] = std::array::from_fn(|_| Histogram::new());
        for value in [0, 63, 64, 1_000, 1_000_000, u64::from(u32::MAX)] {
            left.record(value);
            right.record(value * 3);
            whole.record(value);
            whole.record(value * 3);
        }
        assert_eq!(snapshot(&[&left, &right]), snapshot(&[&whole]));
        let whole = whole.snapshot();
        assert_eq!((whole.count(), whole.sum_ns), (12, 4 * (1_001_127 + u64::from(u32::MAX))));
    }

    #[test]
    fn a_value_beyond_the_limit_is_told_as_such_and_counts() {
        let histogram = Histogram::new();
        for value in [5, LIMIT_NS, LIMIT_NS + 1, 1 << 50] {
            histogram.record(value);
        }
        let shown = snapshot(&[&histogram]);
        assert_eq!((shown.count(), shown.overflows, shown.max_ns), (4, 2, 1 << 50));
        assert_eq!((shown.quantile(500), shown.quantile(990)), (LIMIT_NS, 1 << 50));
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        let empty = snapshot(&[&Histogram::new()]);
        assert_eq!((empty.quantile(500), empty.max_ns, empty.count()), (0, 0, 0));
    }
}
