//! Finding blocks: the deltas first, then the map, whose nodes are read and authenticated as
//! needed.
//!
//! Holds: what is returned was authenticated against the parent's pointer, up to the superblock.
//! A reader holds no lock and no pin: if the map moved on meanwhile and a place was given to
//! another block, authentication fails, and the reader looks again.

use alloc::{boxed::Box, sync::Arc};

use super::{
    Volume,
    cache::Node,
    core::{Core, Found},
    crypto::{EpochKey, Kind, aad},
    layout::{FANOUT_BITS, Order, Ptr, child, node_index, slot_in_parent},
};
use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    errno::Errno,
    volume::error::guest_errno,
};

/// Looks at a moving map this often before giving up.
const RETRIES: usize = 64;

/// Why a sealed block could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// The host failed.
    Host(HostError),
    /// It is not what the pointer names.
    Forged,
}

impl Bad {
    pub(crate) fn errno(self) -> Errno {
        match self {
            Self::Host(error) => guest_errno(error),
            Self::Forged => Errno::EIO,
        }
    }
}

impl From<HostError> for Bad {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

/// A node that must be read to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Miss {
    pub(crate) ptr: Ptr,
    pub(crate) level: u32,
    pub(crate) index: u64,
}

/// What `block` is now, as far as nodes in memory tell.
pub(crate) fn look(core: &mut Core, block: u64) -> Result<Ptr, Miss> {
    let (map, older) = match core.find(block) {
        Found::Here(ptr) => return Ok(ptr),
        Found::InMap(map, older) => (map, older),
    };
    let mut ptr = map.root;
    for level in (0..map.levels).rev() {
        if ptr.is_null() {
            break;
        }
        let Some(node) = core.cache.get(&ptr) else {
            return Err(Miss { ptr, level, index: node_index(block, level) });
        };
        ptr = child(node, slot_in_parent(block >> (FANOUT_BITS * level)));
    }
    Ok(match older {
        Some((order, older)) if order > ptr.order => older,
        _ => ptr,
    })
}

impl Volume {
    /// Reads and opens one sealed block.
    pub(crate) async fn read_sealed<D: Disk>(
        &self,
        disk: &D,
        place: u64,
        ptr: &Ptr,
        kind: Kind,
        level: u32,
        index: u64,
    ) -> Result<Box<Block>, Bad> {
        if place == 0 || place >= self.geometry.host_blocks {
            return Err(Bad::Forged);
        }
        let key = self.key_for(disk, ptr.order).await?;
        let mut transfer = disk.transfer(1).await?;
        transfer.read(place).await?;
        let mut block = Box::new([0; BLOCK]);
        transfer.get(0, &mut block);
        key.open(kind, ptr.order, &aad(kind, level as u8, index), &ptr.tag, &mut block[..])
            .map_err(|_| {
                self.core.lock().counters.integrity_failures += 1;
                Bad::Forged
            })?;
        Ok(block)
    }

    /// The node that `miss` names, from memory or from the host.
    pub(crate) async fn node<D: Disk>(&self, disk: &D, miss: &Miss) -> Result<Node, Bad> {
        if let Some(node) = self.core.lock().cache.get(&miss.ptr) {
            return Ok(node.clone());
        }
        let place = miss.ptr.place();
        let read = self.read_sealed(disk, place, &miss.ptr, Kind::Node, miss.level, miss.index);
        let node: Node = Arc::from(read.await?);
        self.core.lock().cache.insert(&miss.ptr, miss.level, node.clone());
        Ok(node)
    }

    /// What `block` is now.
    pub(crate) async fn resolve<D: Disk>(&self, disk: &D, block: u64) -> Result<Ptr, Bad> {
        let mut failed = None;
        for _ in 0..RETRIES {
            let miss = match look(&mut self.core.lock(), block) {
                Ok(ptr) => return Ok(ptr),
                Err(miss) => miss,
            };
            if let Some((before, bad)) = failed
                && before == miss
            {
                return Err(bad);
            }
            if let Err(bad) = self.node(disk, &miss).await {
                failed = Some((miss, bad));
            }
        }
        Err(failed.map_or(Bad::Forged, |(_, bad)| bad))
    }

    /// The pointer to the leaf (or the lower node of `level`) with `index`, in the map under
    /// `root`, for a checkpoint that owns it.
    pub(crate) async fn descend<D: Disk>(
        &self,
        disk: &D,
        root: Ptr,
        levels: u32,
        level: u32,
        index: u64,
    ) -> Result<Ptr, Bad> {
        let mut ptr = root;
        for above in (level + 1..levels).rev() {
            if ptr.is_null() {
                break;
            }
            let shift = FANOUT_BITS * (above - level);
            let node = self.node(disk, &Miss { ptr, level: above, index: index >> shift }).await?;
            ptr = child(&node, slot_in_parent(index >> (shift - FANOUT_BITS)));
        }
        Ok(ptr)
    }

    /// The key of the epoch that `order` belongs to.
    pub(crate) async fn key_for<D: Disk>(
        &self,
        disk: &D,
        order: Order,
    ) -> Result<Arc<EpochKey>, Bad> {
        let id = order.epoch();
        if let Some(key) = self.keys.lock().get(&id) {
            return Ok(key.clone());
        }
        let epoch = self.epoch(disk, id).await?;
        let key = self.key.epoch_of(epoch.key_version, id, &epoch.salt).ok_or(Bad::Forged)?;
        let key = Arc::new(key);
        self.remember(key.clone());
        Ok(key)
    }

    /// Keeps an expanded key; at most 256 of them.
    pub(crate) fn remember(&self, key: Arc<EpochKey>) {
        let mut keys = self.keys.lock();
        if keys.len() >= 256 && !keys.contains_key(&key.id) {
            keys.pop_first();
        }
        keys.insert(key.id, key);
    }
}
