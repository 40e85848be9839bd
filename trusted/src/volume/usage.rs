//! How the space of the host file is used: what is free, and in how many pieces.

use super::{
    Volume,
    layout::REGION,
    space::{Bitmap, fresh},
};
use crate::disk::Disk;

/// The space map in numbers, as of the last checkpoint. Blocks of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Blocks in use: data, map, snapshots.
    pub used: u64,
    /// Runs of used blocks that lie side by side on the host. `used / used_runs` is the mean
    /// length: the measure of how fragmented the data lies.
    pub used_runs: u64,
    /// Free blocks.
    pub free: u64,
    /// Runs of free blocks.
    pub free_runs: u64,
    /// Length of the longest of them.
    pub longest_free: u64,
    /// Regions of 128 MiB whose page of the space map cannot be read; they are left out.
    pub unreadable: u64,
}

impl Usage {
    /// Mean length of a run of used blocks; 0 if there is none.
    #[must_use]
    pub fn mean_used(&self) -> f64 {
        mean(self.used, self.used_runs)
    }

    /// Mean length of a run of free blocks; 0 if there is none.
    #[must_use]
    pub fn mean_free(&self) -> f64 {
        mean(self.free, self.free_runs)
    }
}

#[allow(clippy::cast_precision_loss)]
fn mean(blocks: u64, runs: u64) -> f64 {
    if runs == 0 { 0.0 } else { blocks as f64 / runs as f64 }
}

/// Goes through the places in order.
#[derive(Default)]
struct Walk {
    usage: Usage,
    /// Length of the run of free blocks that ends here.
    free: u64,
    /// The last place was in use.
    used: bool,
}

impl Walk {
    /// `free` places in a row.
    fn free(&mut self, count: u64) {
        self.usage.free_runs += u64::from(self.free == 0 && count > 0);
        self.usage.free += count;
        self.free += count;
        self.usage.longest_free = self.usage.longest_free.max(self.free);
        self.used = false;
    }

    fn used(&mut self) {
        self.usage.used += 1;
        self.usage.used_runs += u64::from(!self.used);
        (self.used, self.free) = (true, 0);
    }

    /// Places of the format itself end every run.
    const fn fixed(&mut self) {
        (self.used, self.free) = (false, 0);
    }

    fn page(&mut self, page: &Bitmap, fixed: &Bitmap) {
        for (page, fixed) in page.iter().zip(fixed) {
            match (page, fixed) {
                (0, 0) => self.free(64),
                (_, &u64::MAX) => self.fixed(),
                _ => (0..64).for_each(|bit| match (page >> bit & 1, fixed >> bit & 1) {
                    (_, 1) => self.fixed(),
                    (1, _) => self.used(),
                    _ => self.free(1),
                }),
            }
        }
    }
}

impl Volume {
    /// How the space of the host file is used. Reads one block for each 128 MiB that were ever
    /// used; for a volume that nobody writes to.
    pub async fn usage<D: Disk>(&self, disk: &D) -> Usage {
        let root = self.core.lock().space.root;
        let mut walk = Walk::default();
        for region in 0..self.geometry.regions() {
            match self.page(disk, root, region).await {
                Ok((_, page)) => walk.page(&page, &fresh(&self.geometry, region)),
                Err(_) => {
                    walk.usage.unreadable += 1;
                    walk.fixed();
                }
            }
        }
        walk.usage
    }
}

const _: () = assert!(REGION.is_multiple_of(64));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_counted_across_words_and_ended_by_fixed_places() {
        let (mut page, mut fixed) =
            ([0_u64; (REGION / 64) as usize], [0_u64; (REGION / 64) as usize]);
        // Bits 0..8 fixed; 8..70 used; the rest free but for the last place.
        fixed[0] = 0xff;
        page[0] = u64::MAX;
        page[1] = (1 << 6) - 1;
        page[(REGION / 64 - 1) as usize] = 1 << 63;
        let mut walk = Walk::default();
        walk.page(&page, &fixed);
        let usage = walk.usage;
        assert_eq!((usage.used, usage.used_runs), (63, 2));
        assert_eq!((usage.free, usage.free_runs), (REGION - 71, 1));
        assert_eq!(usage.longest_free, REGION - 71);
        assert!((usage.mean_used() - 31.5).abs() < 1e-9);
        assert!((Usage::default().mean_free()).abs() < 1e-9);
    }
}
