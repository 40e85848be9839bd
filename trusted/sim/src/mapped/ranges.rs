//! A set of bytes of a file, as ranges.

use core::ops::Range;

/// Disjoint ranges that do not touch each other, in order.
#[derive(Debug, Default)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Adds a range.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|old| old.end < range.start);
        let to = self.0.partition_point(|old| old.start <= range.end);
        let start = self.0.get(from).filter(|_| from < to).map_or(range.start, |old| old.start);
        let end = self.0[from..to].last().map_or(range.end, |old| old.end);
        let joined = start.min(range.start)..end.max(range.end);
        self.0.splice(from..to, core::iter::once(joined));
    }

    /// Whether `at` is in the set, and up to where, at most `end`, that stays so.
    #[must_use]
    pub fn run(&self, at: u64, end: u64) -> (bool, u64) {
        let next = self.0.partition_point(|range| range.end <= at);
        match self.0.get(next) {
            Some(range) if range.start <= at => (true, range.end.min(end)),
            Some(range) => (false, range.start.min(end)),
            None => (false, end),
        }
    }

    /// The parts of `range` that are in the set (`inside`) or not.
    pub fn parts(&self, range: Range<u64>, inside: bool) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start;
        core::iter::from_fn(move || {
            while at < range.end {
                let (is_inside, end) = self.run(at, range.end);
                let part = at..end;
                at = end;
                if is_inside == inside {
                    return Some(part);
                }
            }
            None
        })
    }

    /// Bytes in the set below `end`.
    #[must_use]
    pub fn bytes_below(&self, end: u64) -> u64 {
        self.0.iter().map(|range| range.end.min(end).saturating_sub(range.start)).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Against a set of single numbers, for a fixed sequence of numbers that look random.
    #[test]
    fn ranges_hold_what_a_set_of_numbers_holds() {
        let mut state = 1_u64;
        let mut below = |limit: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % limit
        };
        for _ in 0..500 {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for _ in 0..below(12) {
                let (start, length) = (below(60), below(20));
                ranges.add(start..start + length);
                model.extend(start..start + length);
            }
            let start = below(80);
            let range = start..start + below(30);
            for inside in [true, false] {
                let found: Vec<u64> = ranges.parts(range.clone(), inside).flatten().collect();
                let wanted = |at: &u64| model.contains(at) == inside;
                assert_eq!(found, range.clone().filter(wanted).collect::<Vec<_>>());
            }
            assert_eq!(ranges.bytes_below(start), model.range(..start).count() as u64);
            assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
