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
        self.0.splice(from..to, [start.min(range.start)..end.max(range.end)]);
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

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a set of single numbers.
        #[test]
        fn ranges_hold_what_a_set_of_numbers_holds(
            added in proptest::collection::vec((0_u64..60, 0_u64..20), 0..12),
            look in (0_u64..80, 0_u64..30),
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (start, length) in added {
                ranges.add(start..start + length);
                model.extend(start..start + length);
            }
            let range = look.0..look.0 + look.1;
            for inside in [true, false] {
                let found: Vec<u64> = ranges.parts(range.clone(), inside).flatten().collect();
                let expected: Vec<u64> =
                    range.clone().filter(|at| model.contains(at) == inside).collect();
                prop_assert_eq!(found, expected);
            }
            prop_assert_eq!(ranges.bytes_below(look.0), model.range(..look.0).count() as u64);
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
