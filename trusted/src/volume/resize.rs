//! Truncating and punching holes.
//!
//! Holds: bytes beyond the end of the file read as zeros when it grows again: the part of the last
//! block that a shrink cuts off is rewritten as zeros, and that, the hole behind it and the new
//! size are one journal block; a recovery that finds the size without the block rewrites it.

use super::{
    Volume,
    core::{Core, Pending},
    delta::Zero,
    jblock::Record,
    layout::{BLOCK_BYTES, Order},
    ranges::EOF,
    write::Then,
};
use crate::{
    disk::{BLOCK, Disk},
    errno::Errno,
};

/// Changes of a shrink or punch that take effect together, after its block was written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cutoff {
    /// Blocks that become holes.
    pub(crate) first: u64,
    pub(crate) end: u64,
    /// New size of the file, if it changes.
    pub(crate) size: Option<u64>,
}

impl Cutoff {
    /// Applies it, and queues its records glued to what was queued last if `glued`.
    pub(crate) fn apply(&self, core: &mut Core) -> Result<(), Errno> {
        let order: Order = core.orders(2)?;
        if self.first < self.end {
            core.active.zeroes.push(Zero { first: self.first, end: self.end, order });
            let count = self.end - self.first;
            let record = Record::Zero { first: self.first, count, order };
            let glued = self.size.is_some();
            core.journal.queue(Pending { glued, ..Pending::new(record) });
        }
        if let Some(size) = self.size {
            let order = order.plus(1);
            core.size = size;
            core.size_order = order;
            core.journal.queue(Pending::new(Record::Size { size, order }));
        }
        core.stamp += 1;
        Ok(())
    }

    const fn is_nothing(&self) -> bool {
        self.first >= self.end && self.size.is_none()
    }
}

impl Volume {
    /// Makes the file `size` bytes long; what is added reads as zeros.
    ///
    /// # Errors
    /// `EFBIG` beyond the volume's capacity, `EROFS`, `EIO`, `ENOSPC`.
    pub async fn truncate<D: Disk>(&self, disk: &D, size: u64) -> Result<(), Errno> {
        self.core.lock().writable()?;
        if size > self.geometry.capacity * BLOCK_BYTES {
            return Err(Errno::EFBIG);
        }
        let end_ticket = self.enter(EOF, EOF, true).await;
        let ticket = self.enter(size / BLOCK_BYTES, EOF - 1, true).await;
        let result = self.truncate_exclusive(disk, size).await;
        self.leave(Some(ticket));
        self.leave(Some(end_ticket));
        result
    }

    async fn truncate_exclusive<D: Disk>(&self, disk: &D, size: u64) -> Result<(), Errno> {
        let old = self.core.lock().size;
        if size == old {
            return Ok(());
        }
        let cutoff = Cutoff {
            first: size.div_ceil(BLOCK_BYTES),
            end: old.div_ceil(BLOCK_BYTES),
            size: Some(size),
        };
        let within = (size % BLOCK_BYTES) as usize;
        if size < old && within > 0 {
            let block = size / BLOCK_BYTES;
            let plain = self.read_again(disk, block, None).await.map_err(|bad| bad.errno())?;
            if let Some(mut plain) = plain
                && plain[within..].iter().any(|byte| *byte != 0)
            {
                plain[within..].fill(0);
                return self.write_private(disk, block, &plain, Then::Cutoff(cutoff), true).await;
            }
        }
        self.cut_off(disk, cutoff).await
    }

    /// After a recovery: makes the bytes of the last block behind the end zeros, durably, if they are
    /// not. Of a shrink the size may have survived, and the rewritten block not.
    pub(crate) async fn clear_tail<D: Disk>(&self, disk: &D) -> Result<(), Errno> {
        let size = self.core.lock().size;
        let (block, within) = (size / BLOCK_BYTES, (size % BLOCK_BYTES) as usize);
        if within == 0 {
            return Ok(());
        }
        match self.read_again(disk, block, None).await {
            Ok(Some(mut plain)) if plain[within..].iter().any(|byte| *byte != 0) => {
                plain[within..].fill(0);
                self.write_private(disk, block, &plain, Then::Reach(0), true).await?;
            }
            // A block that cannot be read shows nothing.
            Ok(_) | Err(_) => return Ok(()),
        }
        let (stamp, queued) = {
            let core = self.core.lock();
            (core.stamp, core.journal.queued)
        };
        self.sync_to(disk, stamp, queued).await
    }

    /// Makes `length` bytes from `offset` on read as zeros; the size stays.
    ///
    /// # Errors
    /// `EROFS`, `EIO`, `ENOSPC`. Parts may have been punched.
    pub async fn punch<D: Disk>(&self, disk: &D, offset: u64, length: u64) -> Result<(), Errno> {
        self.core.lock().writable()?;
        let size = self.core.lock().size;
        let end = offset.saturating_add(length).min(size);
        if offset >= end {
            return Ok(());
        }
        let ticket = self.enter(offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES, true).await;
        let result = self.punch_exclusive(disk, offset, end, size).await;
        self.leave(Some(ticket));
        result
    }

    async fn punch_exclusive<D: Disk>(
        &self,
        disk: &D,
        offset: u64,
        end: u64,
        size: u64,
    ) -> Result<(), Errno> {
        let mut cutoff =
            Cutoff { first: offset.div_ceil(BLOCK_BYTES), end: end / BLOCK_BYTES, size: None };
        if end == size {
            // Bytes after the end are zeros already.
            cutoff.end = end.div_ceil(BLOCK_BYTES);
        }
        let base = |block: u64| block * BLOCK_BYTES;
        if !offset.is_multiple_of(BLOCK_BYTES) {
            let block = offset / BLOCK_BYTES;
            let to = (end - base(block)).min(BLOCK_BYTES);
            self.zero_part(disk, block, (offset - base(block)) as usize, to as usize).await?;
        }
        if cutoff.end >= cutoff.first && end > base(cutoff.end) && end / BLOCK_BYTES == cutoff.end {
            let to = (end - base(cutoff.end)) as usize;
            self.zero_part(disk, cutoff.end, 0, to).await?;
        }
        self.cut_off(disk, cutoff).await
    }

    async fn zero_part<D: Disk>(
        &self,
        disk: &D,
        block: u64,
        from: usize,
        to: usize,
    ) -> Result<(), Errno> {
        debug_assert!(from < to && to <= BLOCK);
        let plain = self.read_again(disk, block, None).await.map_err(|bad| bad.errno())?;
        match plain {
            Some(mut plain) if plain[from..to].iter().any(|byte| *byte != 0) => {
                plain[from..to].fill(0);
                self.write_private(disk, block, &plain, Then::Reach(0), true).await
            }
            _ => Ok(()),
        }
    }

    /// Applies a change that writes no block.
    async fn cut_off<D: Disk>(&self, disk: &D, cutoff: Cutoff) -> Result<(), Errno> {
        if cutoff.is_nothing() {
            return Ok(());
        }
        for _ in 0..3 {
            {
                let mut core = self.core.lock();
                core.writable()?;
                if core.admits(2, 0, true) && core.has_memory() {
                    return cutoff.apply(&mut core);
                }
            }
            self.make_room(disk).await?;
        }
        Err(Errno::ENOSPC)
    }

    /// Whether bytes `offset..offset + length` are known to be holes: never written, punched or
    /// beyond the end. `false` also where the map would have to be read to know.
    #[must_use]
    pub fn is_hole(&self, offset: u64, length: u64) -> bool {
        let mut core = self.core.lock();
        let end = offset.saturating_add(length).min(core.size);
        if offset >= end {
            return true;
        }
        (offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES))
            .all(|block| super::tree::look(&mut core, block).is_ok_and(|ptr| ptr.is_null()))
    }
}
