//! Growing and shrinking: another geometry for the same content.
//!
//! What lies before the homes stays; homes and tail get longer or shorter. One superblock changes
//! everything at once: capacity, length of the host file, levels of the map, shape of the space
//! map.
//!
//! Holds: after a crash at any point the volume has its old size or its new one, with the same
//! content. The host file must have its new length before a volume grows, and is cut off only
//! after it has shrunk; longer than needed does no harm.

use alloc::{boxed::Box, vec::Vec};

use super::{
    OpenOptions, SlotKey, Volume,
    checkpoint::Merged,
    error::{Misuse, VolumeError},
    format::warm_slots,
    layout::{BLOCK_BYTES, FANOUT, FANOUT_BITS, Geometry, Ptr, REGION, child, levels},
    merge::Met,
    recovery::failed,
    spacemap,
    superblock::Superblock,
    tree::{Bad, Miss},
    write::Then,
};
use crate::disk::{BLOCK, Disk};

/// What [`Volume::resize`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Bytes the guest may store now.
    pub capacity: u64,
    /// Bytes of the guest's file now.
    pub size: u64,
    /// Blocks of 4096 bytes the host file needs now; what it has beyond them can be cut off.
    pub host_blocks: u64,
    /// Blocks that were moved out of the way.
    pub moved: u64,
}

impl Volume {
    /// Blocks of 4096 bytes that the host file of this volume needs for `size` bytes.
    ///
    /// # Errors
    /// [`VolumeError::Misuse`] for a size that no volume can have.
    pub fn host_blocks_for(&self, size: u64) -> Result<u64, VolumeError> {
        Ok(self.geometry.resized(size)?.host_blocks)
    }

    /// Makes the volume in the host file behind `disk`, which nobody has open, one of `size`
    /// bytes. A file of the guest that filled the volume fills it afterwards, too: holes are added
    /// at its end, or cut off. `progress(done, all)` is called in bytes of the file now and then
    /// while blocks are moved.
    ///
    /// To grow, the host file must already have [`Self::host_blocks_for`] blocks. `options`: the
    /// volume's counter, if it is bound to one, which then moves to the new state.
    ///
    /// # Errors
    /// [`Misuse::HasSnapshots`] for a shrink, [`VolumeError::DataInTheWay`] when data lies beyond the new size,
    /// [`VolumeError::Damaged`] when a block that must be moved is not whole; any of
    /// [`Self::open`]. The volume is as it was then, or closed as after a crash.
    pub async fn resize<D: Disk>(
        disk: &D,
        key: &SlotKey,
        options: &OpenOptions,
        size: u64,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Resized, VolumeError> {
        let (volume, _) = Self::open(disk, key, options).await?;
        let geometry = volume.geometry.resized(size)?;
        volume.resize_to(disk, key, options, geometry, progress).await
    }

    /// As [`Self::resize`], for any geometry that differs in capacity and length only.
    pub(crate) async fn resize_to<D: Disk>(
        self,
        disk: &D,
        key: &SlotKey,
        options: &OpenOptions,
        geometry: Geometry,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Resized, VolumeError> {
        let old = self.geometry;
        let found = disk.host_blocks();
        if found < geometry.host_blocks {
            return Err(VolumeError::HostFileShort { needed: geometry.host_blocks, found });
        }
        let full = self.size() == self.capacity();
        let moved = if geometry.host_blocks < old.host_blocks || geometry.capacity < old.capacity {
            self.clear(disk, &geometry, progress).await?
        } else {
            0
        };
        self.close(disk).await.map_err(|errno| failed(0, errno))?;
        if geometry.host_blocks < old.host_blocks {
            self.check_clear(disk, geometry.host_blocks).await?;
        }
        let (header, opening, report) = Self::prepare(disk, key, options).await?;
        if !report.clean {
            return Err(VolumeError::NotWritable);
        }
        let (volume, before) = opening.reshaped(disk, header, geometry).await?;
        if volume.read_only() {
            return Err(VolumeError::NotWritable);
        }
        warm_slots(disk, &geometry, old.regions()).await?;
        let size = if full { geometry.capacity * BLOCK_BYTES } else { before.size };
        let size = volume.reshape(disk, before, &old, size).await?;
        let host_blocks = geometry.host_blocks;
        Ok(Resized { capacity: volume.capacity(), size, host_blocks, moved })
    }

    /// Moves everything out of what a shrink cuts off. Answers how many blocks.
    async fn clear<D: Disk>(
        &self,
        disk: &D,
        new: &Geometry,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<u64, VolumeError> {
        let errno = |errno| failed(0, errno);
        if self.has_snapshots() {
            return Err(VolumeError::Misuse(Misuse::HasSnapshots));
        }
        self.checkpoint(disk, false, false).await.map_err(errno)?;
        if let Some(block) = self.next_data(disk, new.capacity).await? {
            return Err(VolumeError::DataInTheWay { offset: block * BLOCK_BYTES });
        }
        if self.size() > new.capacity * BLOCK_BYTES {
            self.truncate(disk, new.capacity * BLOCK_BYTES).await.map_err(errno)?;
        }
        self.core.lock().space.fence(new.host_blocks);
        let moved = self.evacuate(disk, new.host_blocks, progress).await?;
        let table = self.table_beyond(disk, new.host_blocks).await;
        self.core.lock().retable = table.map_err(|bad| failed(0, bad.errno()))?;
        Ok(moved)
    }

    /// The first block from `from` on that holds data, in the map of the last checkpoint.
    async fn next_data<D: Disk>(&self, disk: &D, from: u64) -> Result<Option<u64>, VolumeError> {
        let map = self.core.lock().map;
        let last = (self.geometry.capacity - 1) / FANOUT;
        let mut leaf = from / FANOUT;
        while leaf <= last
            && let Met::Leaf(found) | Met::Unreadable(found, _) =
                self.existing_leaf(disk, &map, leaf, last).await
        {
            let damaged = |_| VolumeError::Damaged { offset: found * FANOUT * BLOCK_BYTES };
            let (_, _, content) = self.leaf(disk, &map, found).await.map_err(damaged)?;
            let blocks = found * FANOUT..(found + 1) * FANOUT;
            let data = |block: &u64| !child(&content, (block % FANOUT) as usize).is_null();
            if let Some(block) = blocks.filter(|block| *block >= from).find(data) {
                return Ok(Some(block));
            }
            leaf = found + 1;
        }
        Ok(None)
    }

    /// Writes every block again that lies at `limit` or behind it, or whose map nodes do.
    async fn evacuate<D: Disk>(
        &self,
        disk: &D,
        limit: u64,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<u64, VolumeError> {
        let last = (self.geometry.capacity - 1) / FANOUT;
        let (mut leaf, mut moved) = (0, 0);
        while leaf <= last {
            // Making room may have changed the map since the leaf before.
            let map = self.core.lock().map;
            let (Met::Leaf(found) | Met::Unreadable(found, _)) =
                self.existing_leaf(disk, &map, leaf, last).await
            else {
                break;
            };
            let offset = found * FANOUT * BLOCK_BYTES;
            progress(offset, self.geometry.capacity * BLOCK_BYTES);
            let damaged = |_| VolumeError::Damaged { offset };
            let (_, ptr, content) = self.leaf(disk, &map, found).await.map_err(damaged)?;
            let mut nodes = ptr.place() >= limit;
            for level in 1..map.levels {
                let index = found >> (FANOUT_BITS * level);
                let above = self.descend(disk, map.root, map.levels, level, index).await;
                nodes |= above.map_err(damaged)?.place() >= limit;
            }
            for slot in 0..FANOUT {
                let data = child(&content, slot as usize);
                if !data.is_null() && (data.place() >= limit || nodes) {
                    self.relocate(disk, found * FANOUT + slot).await?;
                    moved += 1;
                    // With one block the checkpoint writes the leaf and all above it.
                    nodes = false;
                }
            }
            leaf = found + 1;
        }
        Ok(moved)
    }

    /// Gives a block another place.
    async fn relocate<D: Disk>(&self, disk: &D, block: u64) -> Result<(), VolumeError> {
        let ticket = self.enter(block, block, true).await;
        let written = match self.read_again(disk, block, None).await {
            Ok(Some(plain)) => self
                .write_private(disk, block, &plain, Then::Reach(0), true)
                .await
                .map_err(|errno| failed(0, errno)),
            Ok(None) => Ok(()),
            Err(Bad::Forged) => Err(VolumeError::Damaged { offset: block * BLOCK_BYTES }),
            Err(bad @ Bad::Host(_)) => Err(failed(0, bad.errno())),
        };
        self.leave(Some(ticket));
        written
    }

    /// Refuses when the space map has anything in use at `limit` or behind it.
    async fn check_clear<D: Disk>(&self, disk: &D, limit: u64) -> Result<(), VolumeError> {
        let root = self.core.lock().space.root;
        for region in limit / REGION..self.geometry.regions() {
            let unreadable = |bad: Bad| failed(spacemap::place(0, region, 0), bad.errno());
            let (ptr, page) = self.page(disk, root, region).await.map_err(unreadable)?;
            let fresh = super::space::fresh(&self.geometry, region);
            let used = |place: u64| {
                let (word, bit) = ((place % REGION / 64) as usize, place % 64);
                (page[word] & !fresh[word]) >> bit & 1 != 0
            };
            let first = limit.max(region * REGION);
            let in_use = (first..self.geometry.host_blocks.min((region + 1) * REGION)).any(used);
            if !ptr.is_null() && in_use {
                return Err(VolumeError::NotWritable);
            }
        }
        Ok(())
    }

    /// Commits the new geometry. Answers the size of the guest's file.
    async fn reshape<D: Disk>(
        &self,
        disk: &D,
        before: Superblock,
        old: &Geometry,
        size: u64,
    ) -> Result<u64, VolumeError> {
        let errno = |errno| failed(0, errno);
        let mut merged = Merged::new(before.map_root, before.birth, before.held.newest);
        let levels = levels(self.geometry.capacity);
        self.fit_levels(disk, before.map_levels, levels, &mut merged).await?;
        let Merged { root, allocs, frees, .. } = merged;
        let space = self.reshape_space(disk, allocs, frees, Some(old.host_blocks)).await;
        let space_root = space.map_err(errno)?.root;
        disk.flush().await.map_err(VolumeError::Flush)?;
        let superblock = {
            let mut core = self.core.lock();
            let order = if size == before.size {
                before.size_order
            } else {
                core.orders(1).map_err(errno)?
            };
            Superblock {
                generation: core.generation + 2,
                clean: true,
                size,
                size_order: order,
                geometry: self.geometry,
                map_root: root,
                map_levels: levels,
                space_root,
                ..before
            }
        };
        self.commit(disk, &superblock).await.map_err(errno)?;
        self.register().await?;
        Ok(size)
    }

    /// Puts nodes over the map's root, or takes them off, until it has `new` levels.
    async fn fit_levels<D: Disk>(
        &self,
        disk: &D,
        old: u32,
        new: u32,
        merged: &mut Merged,
    ) -> Result<(), VolumeError> {
        for level in old..new {
            if !merged.root.is_null() {
                let mut node = Box::new([0; BLOCK]);
                merged.root.encode(&mut node[..], 0);
                let mut written = Vec::new();
                let writing = Vec::from([(0, Ptr::NULL, node)]);
                let done = self.write_nodes(disk, level, writing, merged, &mut written).await;
                done.map_err(|errno| failed(0, errno))?;
                merged.root = written.first().map_or(Ptr::NULL, |(_, ptr)| *ptr);
            }
        }
        for level in (new..old).rev() {
            if !merged.root.is_null() {
                let miss = Miss { ptr: merged.root, level, index: 0 };
                let node = self.node(disk, &miss).await;
                let node = node.map_err(|_| VolumeError::Damaged { offset: 0 })?;
                if node[Ptr::BYTES..].iter().any(|byte| *byte != 0) {
                    return Err(VolumeError::NotWritable);
                }
                merged.frees.push(merged.root.place());
                merged.root = child(&node, 0);
            }
        }
        Ok(())
    }
}
