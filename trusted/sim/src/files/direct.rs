//! What `O_DIRECT` asks of a transfer.
//!
//! As Linux 6.18 answers on ext4 (iomap) over a device with sectors of 512 bytes that takes memory
//! in steps of 512 (`logical_block_size` 512, `dma_alignment` 511 in /sys/block/*/queue): the file
//! is gone through in runs of data and of holes. A read finds nothing wrong with a hole. Any other
//! run must begin and end at a sector of the file. Its memory, pieces that follow each other
//! without a gap taken as one, must begin and end at a sector too, unless all of it is one piece
//! inside one page: that the block layer does not look at. Where memory is missing the rule holds
//! for what lies before.
//!
//! Linux decides by extent, so two extents side by side are two runs there and one here: a write
//! that is refused may have been done in part on ext4, and is not done here.

use postern_trusted::{
    errno::Errno,
    platform::{self, Buffer, Fault, Memory},
    port::LaneFile,
    volume::Volume,
};

use super::OpenFile;
use crate::{family::standing::Held, guest::Guest};

/// Alignment that `O_DIRECT` asks of offset, address and length, in bytes.
pub const DIRECT_ALIGNMENT: u64 = 512;

/// Bytes of a page of memory, and of a block of the file.
const PAGE: u64 = 4096;

/// One transfer: where in the file, and where in memory.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<R> {
    /// To the file.
    pub write: bool,
    /// Byte offset in the file.
    pub offset: u64,
    /// Guest addresses and bytes of the segments, in order.
    pub ranges: R,
}

impl<R: Iterator<Item = (u64, u64)> + Clone> Transfer<R> {
    /// Whether every segment and the offset lie at sectors: then there is nothing to ask.
    pub fn is_aligned(&self) -> bool {
        let sum = |sum, (base, length): (u64, u64)| sum | base | length;
        self.ranges.clone().fold(self.offset, sum).is_multiple_of(DIRECT_ALIGNMENT)
    }

    fn length(&self) -> u64 {
        self.ranges.clone().map(|(_, length)| length).sum()
    }

    /// The segments of bytes `from..to` of the buffer.
    fn part(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut start = 0;
        self.ranges.clone().filter_map(move |(base, length)| {
            let (first, last) = (from.max(start), to.min(start + length));
            let piece = (base + first.saturating_sub(start), last.saturating_sub(first));
            start += length;
            (piece.1 > 0).then_some(piece)
        })
    }

    /// Whether the device takes bytes `from..to` of the buffer.
    fn is_taken(&self, from: u64, to: u64) -> bool {
        if are_taken(self.part(from, to)) {
            return true;
        }
        // What lies before missing memory goes to the device alone, in whole sectors.
        let there = platform::reach(&Guest, self.ranges.clone(), !self.write);
        let sectors = there.saturating_sub(from) / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT;
        there < to && are_taken(self.part(from, from + sectors))
    }
}

fn are_taken(segments: impl Iterator<Item = (u64, u64)>) -> bool {
    let mut pieces = 0;
    let mut all_at_sectors = true;
    let mut inside_a_page = true;
    let (mut start, mut end) = (0, 0);
    let mut close = |start: u64, end: u64| {
        if start < end {
            pieces += 1;
            all_at_sectors &= (start | end).is_multiple_of(DIRECT_ALIGNMENT);
            inside_a_page &= start / PAGE == (end - 1) / PAGE;
        }
        pieces <= 1 && inside_a_page || all_at_sectors
    };
    for (base, length) in segments {
        if base != end {
            close(start, end);
            start = base;
        }
        end = base + length;
    }
    close(start, end)
}

impl OpenFile {
    /// Whether `O_DIRECT` lets `transfer` through. Asks the map of the file only where something
    /// is misaligned.
    ///
    /// # Errors
    /// `EINVAL`: misaligned. `EIO`: the map cannot be read.
    pub async fn check_direct<R>(&self, held: &Held, transfer: Transfer<R>) -> Result<(), Errno>
    where
        R: Iterator<Item = (u64, u64)> + Clone,
    {
        let Transfer { write, offset, .. } = transfer;
        if transfer.is_aligned() || !write && offset >= self.volume.size() {
            return Ok(());
        }
        let disk = &held.disk()?;
        let volume = &held.volume;
        let end = offset.saturating_add(transfer.length());
        let mut at = offset;
        while at < end {
            let hole = is_hole_at(volume, disk, at).await?;
            let mut run = next_block(at).min(end);
            while run < end && is_hole_at(volume, disk, run).await? == hole {
                run = next_block(run).min(end);
            }
            let at_sectors = (at | run).is_multiple_of(DIRECT_ALIGNMENT);
            if (write || !hole) && !(at_sectors && transfer.is_taken(at - offset, run - offset)) {
                return Err(Errno::EINVAL);
            }
            at = run;
        }
        Ok(())
    }

    /// What a read answers that moved `moved` bytes from `offset` on. With `O_DIRECT` it goes on
    /// to its end behind the end of the file: with zeros, which do not count.
    ///
    /// # Errors
    /// `EFAULT`: there is no memory for the zeros.
    pub fn end_read(
        &self,
        offset: u64,
        buffer: &impl Buffer,
        moved: usize,
    ) -> Result<usize, Errno> {
        let ended = moved > 0 && offset.saturating_add(moved as u64) >= self.volume.size();
        if self.direct() && ended {
            let zeros = [0; PAGE as usize];
            for at in (moved..buffer.len()).step_by(zeros.len()) {
                let part = &zeros[..zeros.len().min(buffer.len() - at)];
                buffer.copy_out(at, part).map_err(|Fault| Errno::EFAULT)?;
            }
        }
        Ok(moved)
    }
}

/// Whether the block at `offset` is a hole, or lies beyond the end. Reads the map if need be.
async fn is_hole_at(volume: &Volume, disk: &LaneFile, offset: u64) -> Result<bool, Errno> {
    let start = offset - offset % PAGE;
    if !volume.is_hole(start, PAGE) {
        // Data, or not known: what was read is.
        let byte = Memory::new(vec![0]);
        volume.read(disk, start, &byte).await?;
    }
    Ok(volume.is_hole(start, PAGE))
}

fn next_block(offset: u64) -> u64 {
    (offset - offset % PAGE).saturating_add(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.18.44 answered on ext4 over virtio-blk, for 512 and more bytes of data.
    #[test]
    fn memory_is_taken_at_sectors_or_as_one_piece_inside_a_page() {
        let page = 0x10_0000;
        let taken = |segments: &[(u64, u64)]| {
            are_taken(segments.iter().map(|(base, length)| (page + base, *length)))
        };
        for (segments, expected) in [
            (&[(0, 8192)][..], true),
            (&[(1, 512)], true),
            (&[(256, 512)], true),
            (&[(1, 4096)], false),
            (&[(256, 8192)], false),
            (&[(512, 8192)], true),
            (&[(0, 256), (4096, 256)], false),
            (&[(0, 256), (256, 256)], true),
            (&[(0, 511), (511, 1)], true),
            (&[(0, 512), (4352, 512)], false),
            (&[(0, 4096), (8192, 2048), (16384, 2048)], true),
            (&[(0, 2000), (2000, 6192)], true),
            (&[], true),
        ] {
            assert_eq!(taken(segments), expected, "{segments:?}");
        }
    }

    #[test]
    fn a_part_is_cut_out_of_the_segments_and_empty_ones_are_left_out() {
        let ranges = [(100, 10), (7, 0), (200, 10), (300, 10)].into_iter();
        let transfer = Transfer { write: false, offset: 0, ranges };
        let part: Vec<_> = transfer.part(5, 25).collect();
        assert_eq!(part, [(105, 5), (200, 10), (300, 5)]);
        assert_eq!(transfer.part(30, 40).count(), 0);
        assert_eq!(transfer.length(), 30);
    }
}
