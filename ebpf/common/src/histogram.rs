//! Log-linear buckets of nanoseconds.
//!
//! Values below [`SUB`] have a bucket each; above, every power of two is cut into [`SUB`] equal
//! buckets. A bucket is read back as its middle ([`middle`]), which is at most 1/64 (1.6 %) away
//! from every value in it. Values of [`LIMIT_NS`] and more have no bucket.

const SUB_BITS: u32 = 5;

/// Buckets per power of two.
pub const SUB: u64 = 1 << SUB_BITS;

const LIMIT_BITS: u32 = 37;

/// First value without a bucket: 2^37 ns, about 137 seconds.
pub const LIMIT_NS: u64 = 1 << LIMIT_BITS;

/// Number of buckets.
pub const BUCKETS: usize = (SUB * (LIMIT_BITS - SUB_BITS + 1) as u64) as usize;

/// One histogram as it lies in a per-CPU array. The count is the sum of the buckets.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Histogram {
    /// Sum of all values, nanoseconds.
    pub sum_ns: u64,
    /// Largest value, nanoseconds.
    pub max_ns: u64,
    /// Number of values in each bucket.
    pub buckets: [u64; BUCKETS],
}

/// 8-byte words of one [`Histogram`]: sum, maximum, buckets.
pub const HISTOGRAM_WORDS: usize = 2 + BUCKETS;

const _: () = assert!(core::mem::size_of::<Histogram>() == HISTOGRAM_WORDS * 8);
// The kernel's limit for one per-CPU value.
const _: () = assert!(HISTOGRAM_WORDS * 8 <= 32 << 10);

/// Bucket of `ns`, which must be below [`LIMIT_NS`]; [`BUCKETS`] or more otherwise.
///
/// No branch: the kernel's verifier follows each one separately.
#[must_use]
#[inline(always)]
pub const fn bucket(ns: u64) -> u64 {
    // With the lowest sub-bucket bit set the exponent never falls below the linear part, where the
    // shift is 0: values 0..32 give 0..32, and 32..64 continue with 32..64.
    let exponent = 63 - (ns | SUB).leading_zeros() as u64;
    let shift = exponent - SUB_BITS as u64;
    (shift << SUB_BITS) + (ns >> shift)
}

/// Smallest value in `bucket` (below [`BUCKETS`]).
#[must_use]
pub const fn lowest(bucket: u64) -> u64 {
    let shift = shift_of(bucket);
    (bucket - (shift << SUB_BITS)) << shift
}

/// Largest value in `bucket` (below [`BUCKETS`]).
#[must_use]
pub const fn highest(bucket: u64) -> u64 {
    lowest(bucket) + (1 << shift_of(bucket)) - 1
}

/// The value a bucket (below [`BUCKETS`]) is shown as.
#[must_use]
pub const fn middle(bucket: u64) -> u64 {
    u64::midpoint(lowest(bucket), highest(bucket))
}

const fn shift_of(bucket: u64) -> u64 {
    (bucket >> SUB_BITS).saturating_sub(1)
}

/// The value that at least `per_mille` of a thousand values do not exceed (500 = median), read
/// from its bucket and never above `max_ns`; 0 if all buckets are empty.
#[must_use]
pub fn quantile(buckets: &[u64], max_ns: u64, per_mille: u64) -> u64 {
    let total: u128 = buckets.iter().map(|n| u128::from(*n)).sum();
    let wanted = (total * u128::from(per_mille)).div_ceil(1000).max(1);
    let mut seen = 0;
    for (bucket, n) in (0..).zip(buckets) {
        seen += u128::from(*n);
        if seen >= wanted {
            return middle(bucket).min(max_ns);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    /// 0, 1, 2, ... growing by about 1 % up to the limit, with the neighbours of powers of two.
    fn values() -> impl Iterator<Item = u64> {
        let spread = std::iter::successors(Some(0u64), |v| Some(v + 1 + v / 97));
        let edges = (0..LIMIT_BITS).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        spread.take_while(|v| *v < LIMIT_NS).chain(edges)
    }

    #[test]
    fn a_larger_value_never_falls_into_a_smaller_bucket() {
        let mut all: Vec<u64> = values().collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|w| bucket(w[0]) <= bucket(w[1])));
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(LIMIT_NS - 1), BUCKETS as u64 - 1);
        assert!(bucket(LIMIT_NS) >= BUCKETS as u64);
        assert!(bucket(u64::MAX) >= BUCKETS as u64);
    }

    #[test]
    fn buckets_follow_each_other_without_gap_or_overlap() {
        assert_eq!(lowest(0), 0);
        for b in 0..BUCKETS as u64 - 1 {
            assert_eq!(highest(b) + 1, lowest(b + 1), "bucket {b}");
        }
        assert_eq!(highest(BUCKETS as u64 - 1), LIMIT_NS - 1);
    }

    #[test]
    fn a_value_lies_in_its_own_bucket_and_a_bucket_finds_itself() {
        for v in values() {
            let b = bucket(v);
            assert!(lowest(b) <= v && v <= highest(b), "{v}");
        }
        for b in 0..BUCKETS as u64 {
            assert_eq!((bucket(lowest(b)), bucket(middle(b)), bucket(highest(b))), (b, b, b));
        }
    }

    #[test]
    fn what_is_shown_is_within_1_64th_of_what_was_recorded() {
        for v in values() {
            let error = middle(bucket(v)).abs_diff(v);
            assert!(error * 64 <= v, "{v}: off by {error}");
        }
    }

    /// The expected values come from sorting the values themselves.
    #[test]
    fn a_quantile_is_within_1_64th_of_the_sorted_answer() {
        let mut x = 0x1234_5678_9abc_def0_u64;
        for spread in [1, 8, 20, 28] {
            let mut buckets = [0; BUCKETS];
            let mut sorted = Vec::new();
            for _ in 0..5_000 {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let value = (x >> 28) >> (x % spread);
                buckets[usize::try_from(bucket(value)).unwrap()] += 1;
                sorted.push(value);
            }
            sorted.sort_unstable();
            let max = *sorted.last().unwrap();
            for per_mille in [1, 250, 500, 990, 999, 1000] {
                let rank = (sorted.len() * usize::try_from(per_mille).unwrap()).div_ceil(1000);
                let exact = sorted[rank - 1];
                let shown = quantile(&buckets, max, per_mille);
                assert!(shown.abs_diff(exact) * 64 <= exact, "{per_mille}: {shown} for {exact}");
                assert!(shown <= max);
            }
        }
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        assert_eq!(quantile(&[0; BUCKETS], 0, 500), 0);
    }
}
