//! A host file behind the port, as the volume's [`Disk`].

use alloc::sync::Arc;

use postern_edl::port::{MAX_DISCARD_BYTES, Submission, op};

use super::{
    Lane, MAX_TRANSFER_BLOCKS,
    buddy::{Extent, order_of},
    request::Held,
};
use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    errno::Errno,
    platform::{NoEntropy, Platform},
};

/// How often the rest of a short request is asked for again.
const REISSUES: usize = 3;
const BLOCK_BYTES: u64 = BLOCK as u64;
/// Words in a block.
const BLOCK_WORDS: usize = BLOCK / 8;

/// A host file behind a lane. Cheap to clone.
#[derive(Clone)]
pub struct LaneFile {
    file: Arc<File>,
    submitted_ns: u64,
    guest: u64,
}

struct File {
    lane: Lane,
    handle: u32,
    host_blocks: u64,
    platform: Arc<dyn Platform>,
}

impl LaneFile {
    pub(super) fn new(
        lane: Lane,
        handle: u32,
        host_blocks: u64,
        platform: Arc<dyn Platform>,
    ) -> Self {
        let file = Arc::new(File { lane, handle, host_blocks, platform });
        Self { file, submitted_ns: 0, guest: 0 }
    }

    /// The same file, whose descriptors carry the claims of one guest request: when its call came
    /// in (CLOCK_MONOTONIC nanoseconds) and its number (not 0).
    #[must_use]
    pub fn for_guest(&self, submitted_ns: u64, guest: u64) -> Self {
        Self { file: self.file.clone(), submitted_ns, guest }
    }

    /// The lane behind the file.
    #[must_use]
    pub fn lane(&self) -> &Lane {
        &self.file.lane
    }

    fn hold(&self, blocks: usize, extent: Extent) -> LaneTransfer {
        let held = Held::new(self.file.lane.clone(), Some(extent));
        LaneTransfer {
            held,
            blocks,
            handle: self.file.handle,
            submitted_ns: self.submitted_ns,
            guest: self.guest,
        }
    }
}

impl Platform for LaneFile {
    fn now_ns(&self) -> u64 {
        self.file.platform.now_ns()
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        self.file.platform.random(out)
    }
}

impl Disk for LaneFile {
    type Transfer = LaneTransfer;

    const MAX_BLOCKS: usize = MAX_TRANSFER_BLOCKS;

    /// Buffers are handed out in the order of the calls, whatever their size.
    ///
    /// # Errors
    /// [`HostError::Gone`] of a poisoned lane; `EINVAL` for a number of blocks out of range.
    async fn transfer(&self, blocks: usize) -> Result<LaneTransfer, HostError> {
        let order = order_of(blocks).ok_or(HostError::Errno(Errno::EINVAL.0))?;
        let extent = self.file.lane.0.pool.take(order).await?;
        Ok(self.hold(blocks, extent))
    }

    fn try_transfer(&self, blocks: usize) -> Option<LaneTransfer> {
        let extent = self.file.lane.0.pool.try_take(order_of(blocks)?)?;
        Some(self.hold(blocks, extent))
    }

    async fn flush(&self) -> Result<(), HostError> {
        let mut held = Held::new(self.file.lane.clone(), None);
        let submission = Submission {
            op: op::FLUSH as u32,
            handle: self.file.handle,
            submitted_ns: self.submitted_ns,
            guest: self.guest,
            ..Submission::default()
        };
        held.request(submission).await.map(|_| ())
    }

    /// # Errors
    /// The host's errno; `EINVAL` for more than [`MAX_DISCARD_BYTES`] or a place beyond the reach
    /// of a byte offset; [`HostError::Gone`] of a poisoned lane.
    async fn discard(&self, place: u64, blocks: u64) -> Result<(), HostError> {
        let length = blocks.checked_mul(BLOCK_BYTES).filter(|n| *n <= MAX_DISCARD_BYTES);
        let (Some(length), Some(offset)) = (length, place.checked_mul(BLOCK_BYTES)) else {
            return Err(HostError::Errno(Errno::EINVAL.0));
        };
        let mut held = Held::new(self.file.lane.clone(), None);
        let (op, handle) = (op::DISCARD as u32, self.file.handle);
        let submission = Submission { op, handle, offset, length, ..Submission::default() };
        held.request(submission).await.map(|_| ())
    }

    fn host_blocks(&self) -> u64 {
        self.file.host_blocks
    }
}

/// A buffer of the transfer area.
///
/// When the future of its read or write is dropped in flight, the host may still be at work on the
/// buffer. The transfer is then spent: `put` does nothing, `get` gives zeros, `read` and `write`
/// answer `ECANCELED`. The buffer is used again only after the host has answered.
pub struct LaneTransfer {
    held: Held,
    blocks: usize,
    handle: u32,
    submitted_ns: u64,
    guest: u64,
}

impl LaneTransfer {
    /// Word index of block `index`; `None` if out of range or spent.
    fn word(&self, index: usize) -> Option<usize> {
        debug_assert!(index < self.blocks, "block {index} of {}", self.blocks);
        let first = self.held.settled().filter(|_| index < self.blocks)?;
        let area = self.held.lane().0.geometry.data_offset / 8;
        Some(area + (first + index) * BLOCK_WORDS)
    }

    /// Reads or writes `blocks` blocks at `place`, asking again for what was left out.
    async fn move_blocks(&mut self, op: u64, place: u64, blocks: usize) -> Result<(), HostError> {
        let invalid = HostError::Errno(Errno::EINVAL.0);
        let first = self.held.settled().ok_or(HostError::Errno(Errno::ECANCELED.0))?;
        let total = blocks as u64 * BLOCK_BYTES;
        let offset = place.checked_mul(BLOCK_BYTES).filter(|at| at.checked_add(total).is_some());
        let Some(offset) = offset.filter(|_| (1..=self.blocks).contains(&blocks)) else {
            return Err(invalid);
        };
        let area = self.held.lane().0.geometry.data_offset as u64;
        let data = area + first as u64 * BLOCK_BYTES;
        let mut done = 0;
        for _ in 0..=REISSUES {
            let submission = Submission {
                op: op as u32,
                handle: self.handle,
                offset: offset + done,
                length: total - done,
                data: data + done,
                submitted_ns: self.submitted_ns,
                guest: self.guest,
                ..Submission::default()
            };
            let moved = self.held.request(submission).await?;
            // Whole blocks only: a torn one is moved again from its start.
            done += moved / BLOCK_BYTES * BLOCK_BYTES;
            if done == total || left_out!(ShortIsWhole) {
                return Ok(());
            }
            if op == op::READ && moved == 0 {
                break; // The end of the host file.
            }
        }
        Err(HostError::Errno(Errno::EIO.0))
    }
}

impl Transfer for LaneTransfer {
    fn blocks(&self) -> usize {
        self.blocks
    }

    fn put(&mut self, index: usize, block: &Block) {
        if let Some(word) = self.word(index) {
            self.held.lane().0.words.put_block(word, block);
        }
    }

    fn get(&self, index: usize, block: &mut Block) {
        match self.word(index) {
            Some(word) => self.held.lane().0.words.get_block(word, block),
            None => block.fill(0),
        }
    }

    /// # Errors
    /// The host's errno; `EIO` past the end of the host file; `EINVAL` for a place beyond the
    /// reach of a byte offset; `ECANCELED` if spent; [`HostError::Gone`] of a poisoned lane.
    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        self.move_blocks(op::READ, place, self.blocks).await
    }

    /// # Errors
    /// As [`Self::read`]; `EIO` if the host leaves a rest after three more tries.
    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        self.move_blocks(op::WRITE, place, blocks).await
    }
}
