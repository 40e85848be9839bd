//! The heatmap: how many requests took how long, over time.
//!
//! Holds: a row is a power of two of nanoseconds, a column an interval; memory is bounded.

use std::collections::VecDeque;

use super::sample::Buckets;

/// The fastest row: below 2^12 ns (4 µs); the slowest takes all of 2^33 ns (8 s) and more.
const FIRST_BIT: u32 = 12;
/// Number of rows.
pub const ROWS: usize = 23;
/// Most columns.
const COLUMNS: usize = 512;

/// Counts by time and latency, the newest last.
#[derive(Clone, Debug, Default)]
pub struct Heat {
    columns: VecDeque<[u64; ROWS]>,
}

impl Heat {
    /// Adds an interval.
    pub fn push(&mut self, buckets: &Buckets) {
        let mut column = [0; ROWS];
        for (&top_ns, &count) in buckets {
            column[row_of(top_ns)] += count;
        }
        self.columns.push_back(column);
        if self.columns.len() > COLUMNS {
            self.columns.pop_front();
        }
    }

    /// The last `width` columns, oldest first.
    pub fn last(&self, width: usize) -> impl Iterator<Item = &[u64; ROWS]> {
        self.columns.iter().skip(self.columns.len().saturating_sub(width))
    }

    /// The rows that anything lies in, among the last `width` columns, and the highest count there.
    pub fn extent(&self, width: usize) -> Option<(usize, usize, u64)> {
        let used = |row: &usize| self.last(width).any(|column| column[*row] > 0);
        let first = (0..ROWS).find(used)?;
        let last = (0..ROWS).rev().find(used)?;
        let most = self.last(width).flatten().copied().max()?;
        Some((first, last, most))
    }
}

/// The row of a bucket by its largest value.
fn row_of(top_ns: u64) -> usize {
    let bits = u64::BITS - top_ns.leading_zeros();
    (bits.saturating_sub(FIRST_BIT) as usize).min(ROWS - 1)
}

/// The upper end of a row, as a person reads it.
pub fn label(row: usize) -> String {
    let ns = 1u64 << (FIRST_BIT as usize + row);
    match ns {
        _ if row == ROWS - 1 => "more".to_owned(),
        0..1_000_000 => format!("{} us", ns / 1_000),
        1_000_000..1_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{} s", ns / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_the_times_up_to_its_label_and_above_the_one_before() {
        for (ns, row) in [(0, 0), (4_095, 0), (4_096, 1), (8_191, 1), (8_192, 2)] {
            assert_eq!(row_of(ns), row, "{ns}");
        }
        assert_eq!(row_of(u64::MAX), ROWS - 1);
        assert_eq!(
            [label(0), label(8), label(18), label(ROWS - 1)],
            ["4 us", "1 ms", "1 s", "more"]
        );
    }

    #[test]
    fn old_columns_go_and_the_extent_is_that_of_what_is_seen() {
        let mut heat = Heat::default();
        heat.push(&Buckets::from([(4_000, 99)]));
        for n in 0..COLUMNS as u64 + 5 {
            heat.push(&Buckets::from([(10_000, n), (1_000_000, 2)]));
        }
        assert_eq!(heat.last(usize::MAX).count(), COLUMNS);
        assert_eq!(heat.extent(2), Some((2, 8, COLUMNS as u64 + 4)));
        assert_eq!(Heat::default().extent(9), None);
    }
}
