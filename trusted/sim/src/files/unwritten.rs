//! Where Linux would have pages in its page cache that are still to be written to the disk: what
//! buffered writes leave behind. `RWF_NOWAIT` with `O_DIRECT` answers `EAGAIN` there.
//!
//! Holds: of a fixed size and without allocation; with more ranges at once than it has room for the
//! oldest is forgotten, and after half a minute each is, as the kernel's writeback would have it.
//! What is forgotten is served as if it had been written.

use core::sync::atomic::{AtomicUsize, Ordering};

use postern_trusted::sync::Lock;

use crate::wait::now_ns;

const MOST: usize = 8;
const PAGE: u64 = 4096;
/// The kernel's `dirty_expire_centisecs`.
const KEPT_NS: u64 = 30_000_000_000;

/// Bytes `start..end`, whole pages. Empty: none.
#[derive(Clone, Copy, Default)]
struct Range {
    start: u64,
    end: u64,
    /// Since when.
    since_ns: u64,
}

impl Range {
    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    fn touches(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// Those of one file.
#[derive(Default)]
pub struct Unwritten {
    /// How many there are: most files have none.
    count: AtomicUsize,
    /// The oldest first, with a page or more between any two.
    ranges: Lock<[Range; MOST]>,
}

fn pages(offset: u64, length: u64) -> Range {
    let end = offset.saturating_add(length).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    Range { start: offset - offset % PAGE, end, since_ns: now_ns() }
}

impl Unwritten {
    /// A buffered write.
    pub fn add(&self, offset: u64, length: u64) {
        let mut new = pages(offset, length);
        if new.start >= new.end {
            return;
        }
        let mut ranges = self.ranges.lock();
        let mut kept = 0;
        for index in 0..self.count.load(Ordering::Relaxed) {
            let range = ranges[index];
            if range.touches(&new) {
                (new.start, new.end) = (new.start.min(range.start), new.end.max(range.end));
            } else {
                ranges[kept] = range;
                kept += 1;
            }
        }
        if kept == MOST {
            ranges.rotate_left(1);
            kept -= 1;
        }
        ranges[kept] = new;
        self.count.store(kept + 1, Ordering::Release);
    }

    /// The range was written to the disk, or read past the page cache, which comes to the same.
    pub fn remove(&self, offset: u64, length: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let gone = pages(offset, length);
        let mut ranges = self.ranges.lock();
        let (before, mut after) = (*ranges, [Range::default(); MOST]);
        let mut count = 0;
        for range in &before[..self.count.load(Ordering::Relaxed)] {
            let pieces = if range.overlaps(&gone) {
                [Range { end: gone.start, ..*range }, Range { start: gone.end, ..*range }]
            } else {
                [*range, Range::default()]
            };
            for piece in pieces.into_iter().filter(|piece| piece.start < piece.end) {
                if let Some(place) = after.get_mut(count) {
                    *place = piece;
                    count += 1;
                }
            }
        }
        *ranges = after;
        self.count.store(count, Ordering::Release);
    }

    /// All of it was written: fsync(2).
    pub fn clear(&self) {
        self.count.store(0, Ordering::Release);
    }

    /// Whether any page of the range is still to be written.
    pub fn has(&self, offset: u64, length: u64) -> bool {
        let count = self.count.load(Ordering::Acquire);
        if count == 0 || length == 0 {
            return false;
        }
        let asked = pages(offset, length);
        let fresh = |range: &Range| asked.since_ns.saturating_sub(range.since_ns) < KEPT_NS;
        self.ranges.lock()[..count].iter().any(|range| range.overlaps(&asked) && fresh(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_unwritten_exactly_if_a_model_page_by_page_says_so() {
        let (unwritten, mut model) = (Unwritten::default(), [false; 16]);
        let mut seed = 5_u64;
        for _ in 0..3000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (from, pages, what) = (seed >> 33 & 7, seed >> 40 & 3, seed >> 50 & 7);
            let at = usize::try_from(from).unwrap();
            let touched = at..at + usize::try_from(pages).unwrap() + 1;
            match what {
                0..=2 => {
                    // Not the whole of the first and the last page.
                    unwritten.add(from * PAGE + 17, pages * PAGE + 1);
                    model[touched].fill(true);
                }
                3..=6 => {
                    unwritten.remove(from * PAGE + 5, pages * PAGE + 9);
                    model[touched].fill(false);
                }
                _ => {
                    unwritten.clear();
                    model.fill(false);
                }
            }
            for (page, is) in model.iter().enumerate() {
                assert_eq!(unwritten.has(page as u64 * PAGE + 100, 1), *is, "page {page}");
            }
        }
    }

    #[test]
    fn with_too_many_ranges_the_oldest_is_forgotten() {
        let unwritten = Unwritten::default();
        (0..=MOST as u64).for_each(|n| unwritten.add(n * 3 * PAGE, 1));
        let left: Vec<_> = (0..=MOST as u64).map(|n| unwritten.has(n * 3 * PAGE, 1)).collect();
        assert_eq!(left, [&[false][..], &[true; MOST]].concat());
        unwritten.add(u64::MAX - 1, u64::MAX);
        unwritten.remove(0, u64::MAX);
        assert!(!unwritten.has(0, u64::MAX));
    }
}
