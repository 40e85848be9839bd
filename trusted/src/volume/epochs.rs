//! The epoch table: the salt of every epoch that a pointer may still name.
//!
//! A radix tree of 127 entries per node. Its nodes cannot depend on the salts they hold: each has
//! a salt, and so a key, of its own. The newest epochs stand in the superblock as well.

use alloc::{boxed::Box, vec::Vec};

use super::{
    Volume,
    crypto::{SINGLE, Salt},
    layout::{Order, Ptr, get_array, put},
    places::Places,
    space::Want,
    superblock::Epoch,
    tree::Bad,
};
use crate::{
    disk::{BLOCK, Block, Disk, Transfer},
    errno::Errno,
};

const ENTRIES: u64 = 127;
const BODY: usize = 32;
const LABEL: &[u8] = b"postern/1 epoch table";

fn aad(level: u32, index: u64) -> [u8; 16] {
    let mut aad = [0; 16];
    aad[0] = 5;
    aad[1] = level as u8;
    aad[8..].copy_from_slice(&index.to_le_bytes());
    aad
}

/// Index of the node of `level` that covers epoch `id`.
fn index(id: u32, level: u32) -> u64 {
    u64::from(id) / ENTRIES.pow(level + 1)
}

/// Byte of the entry for `id` in the node of `level`.
fn entry(id: u32, level: u32) -> usize {
    BODY + (u64::from(id) / ENTRIES.pow(level) % ENTRIES) as usize * Epoch::BYTES
}

/// What became of the table.
pub(crate) struct TableUpdate {
    pub(crate) root: Ptr,
    pub(crate) levels: u32,
}

impl Volume {
    async fn table_node<D: Disk>(
        &self,
        disk: &D,
        ptr: &Ptr,
        level: u32,
        index: u64,
    ) -> Result<Box<Block>, Bad> {
        let place = ptr.place();
        if place >= self.geometry.host_blocks {
            return Err(Bad::Forged);
        }
        let mut transfer = disk.transfer(1).await?;
        transfer.read(place).await?;
        let mut block = Box::new([0; BLOCK]);
        transfer.get(0, &mut block);
        let salt: Salt = get_array(&block[..], 0);
        self.key
            .open_single(LABEL, &salt, &aad(level, index), &ptr.tag, &mut block[BODY..])
            .map_err(|_| Bad::Forged)?;
        Ok(block)
    }

    /// What is known of epoch `id`.
    pub(crate) async fn epoch<D: Disk>(&self, disk: &D, id: u32) -> Result<Epoch, Bad> {
        let (mut ptr, levels) = {
            let core = self.core.lock();
            if let Some(epoch) = core.epochs.iter().find(|epoch| epoch.id == id) {
                return Ok(epoch.clone());
            }
            (core.table_root, core.table_levels)
        };
        if levels == 0 || index(id, levels - 1) > 0 {
            return Err(Bad::Forged);
        }
        for level in (0..levels).rev() {
            if ptr.is_null() {
                break;
            }
            let node = self.table_node(disk, &ptr, level, index(id, level)).await?;
            if level == 0 {
                let epoch = Epoch::decode(&node[..], entry(id, 0));
                return if epoch.id == id { Ok(epoch) } else { Err(Bad::Forged) };
            }
            ptr = Ptr::decode(&node[..], entry(id, level));
        }
        Err(Bad::Forged)
    }

    /// Writes the epochs that are not in the table yet. New places go to `allocs`, replaced ones
    /// to `frees`.
    pub(crate) async fn update_table<D: Disk>(
        &self,
        disk: &D,
        epochs: &[Epoch],
        allocs: &mut Places,
        frees: &mut Places,
    ) -> Result<TableUpdate, Errno> {
        let (mut root, mut levels, renewing) = {
            let core = self.core.lock();
            (core.table_root, core.table_levels, core.renewing)
        };
        let kept;
        let mut rest = epochs;
        if renewing {
            frees.extend(self.table_places(disk).await.map_err(Bad::errno)?);
            kept = self.epochs_to_keep(disk, epochs).await.map_err(Bad::errno)?;
            (root, levels, rest) = (Ptr::NULL, 0, &kept);
        }
        // In place as long as they fit one leaf; a leaf at a time.
        while let Some(first) = rest.first() {
            let leaf = index(first.id, 0);
            let (mine, next) = rest.split_at(rest.partition_point(|e| index(e.id, 0) == leaf));
            rest = next;
            while levels == 0 || index(first.id, levels - 1) > 0 {
                if levels > 0 {
                    let mut node = Box::new([0; BLOCK]);
                    root.encode(&mut node[..], BODY);
                    root = self.put_table(disk, node, levels, 0, allocs).await?;
                }
                levels += 1;
            }
            let mut path = Vec::new();
            let mut ptr = root;
            for level in (0..levels).rev() {
                let node = if ptr.is_null() {
                    Box::new([0; BLOCK])
                } else {
                    let read = self.table_node(disk, &ptr, level, index(first.id, level));
                    read.await.map_err(Bad::errno)?
                };
                path.push((ptr, node));
                if level > 0
                    && let Some((_, node)) = path.last()
                {
                    ptr = Ptr::decode(&node[..], entry(first.id, level));
                }
            }
            let mut below = None;
            for level in 0..levels {
                let Some((old, mut node)) = path.pop() else { break };
                match below {
                    None => mine.iter().for_each(|e| e.encode(&mut node[..], entry(e.id, 0))),
                    Some(ptr) => Ptr::encode(&ptr, &mut node[..], entry(first.id, level)),
                }
                if !old.is_null() {
                    // A node of this very update is replaced: its place was never durable.
                    if !allocs.take(old.place()) {
                        frees.push(old.place());
                    }
                }
                let at = index(first.id, level);
                below = Some(self.put_table(disk, node, level, at, allocs).await?);
            }
            root = below.unwrap_or(root);
        }
        Ok(TableUpdate { root, levels })
    }

    /// All epochs of the key that seals now, in order; `new` are in no table yet.
    async fn epochs_to_keep<D: Disk>(&self, disk: &D, new: &[Epoch]) -> Result<Vec<Epoch>, Bad> {
        let is_kept = |epoch: &Epoch| epoch.key_version == self.key.version();
        let mut kept: Vec<Epoch> = new.iter().filter(|epoch| is_kept(epoch)).cloned().collect();
        let newest = self.core.lock().key.id;
        for id in (1..=newest).rev() {
            match self.epoch(disk, id).await {
                Ok(epoch) if !is_kept(&epoch) => break,
                Ok(epoch) if kept.iter().all(|k| k.id != id) => kept.push(epoch),
                // A number that no epoch has.
                Ok(_) | Err(Bad::Forged) => {}
                Err(bad) => return Err(bad),
            }
        }
        kept.sort_unstable_by_key(|epoch| epoch.id);
        Ok(kept)
    }

    /// Places of all nodes of the table.
    pub(crate) async fn table_places<D: Disk>(&self, disk: &D) -> Result<Vec<u64>, Bad> {
        let mut places = Vec::new();
        self.walk_table(disk, |ptr, _| places.push(ptr.place())).await?;
        Ok(places)
    }

    /// The epochs of every leaf of the table that lies at `limit` or behind it, or under a node
    /// that does; ascending.
    pub(crate) async fn table_beyond<D: Disk>(
        &self,
        disk: &D,
        limit: u64,
    ) -> Result<Vec<Epoch>, Bad> {
        let (mut epochs, mut beyond) = (Vec::new(), false);
        self.walk_table(disk, |ptr, leaf| {
            beyond |= ptr.place() >= limit;
            epochs.extend(leaf.into_iter().flatten());
        })
        .await?;
        // There are few nodes: all of them move, or none.
        Ok(if beyond { epochs } else { Vec::new() })
    }

    /// Calls `visit` for each node of the table, leaves ascending, with the epochs of a leaf.
    async fn walk_table<D: Disk>(
        &self,
        disk: &D,
        mut visit: impl FnMut(&Ptr, Option<Vec<Epoch>>) + Send,
    ) -> Result<(), Bad> {
        let (root, levels) = {
            let core = self.core.lock();
            (core.table_root, core.table_levels)
        };
        let mut nodes = Vec::from([(root, 0)]);
        for level in (0..levels).rev() {
            let mut below = Vec::new();
            for (ptr, index) in nodes {
                if ptr.is_null() {
                    continue;
                }
                let node = self.table_node(disk, &ptr, level, index).await?;
                let entries = (0..ENTRIES).map(|n| (n, BODY + n as usize * Epoch::BYTES));
                if level > 0 {
                    visit(&ptr, None);
                    below.extend(
                        entries.map(|(n, at)| (Ptr::decode(&node[..], at), index * ENTRIES + n)),
                    );
                } else {
                    let epochs = entries.map(|(_, at)| Epoch::decode(&node[..], at));
                    visit(&ptr, Some(epochs.filter(|epoch| epoch.id != 0).collect()));
                }
            }
            nodes = below;
        }
        Ok(())
    }

    async fn put_table<D: Disk>(
        &self,
        disk: &D,
        mut node: Box<Block>,
        level: u32,
        index: u64,
        allocs: &mut Places,
    ) -> Result<Ptr, Errno> {
        let place = self.node_run(disk, 1).await?.place;
        let mut salt: Salt = [0; 24];
        disk.random(&mut salt).map_err(|_| Errno::EIO)?;
        node[..BODY].fill(0);
        put(&mut node[..], 0, &salt);
        let key = self.key.single(LABEL, &salt);
        let tag = key.seal(SINGLE, &aad(level, index), &mut node[BODY..]);
        self.put_block(disk, place, &node).await?;
        allocs.push(place);
        let birth = self.core.lock().birth;
        Ok(Ptr::new(place, birth, Order(0), tag))
    }

    /// Places for up to `count` nodes of the running checkpoint.
    pub(crate) async fn node_run<D: Disk>(
        &self,
        disk: &D,
        count: u64,
    ) -> Result<super::space::Run, Errno> {
        loop {
            let want = {
                let mut core = self.core.lock();
                match core.space.nodes(count) {
                    Ok(run) => {
                        core.checkpoints.owed = core.checkpoints.owed.saturating_sub(run.count);
                        return Ok(run);
                    }
                    Err(want) => want,
                }
            };
            if !self.bring_in(disk, want).await.map_err(Bad::errno)? && want == Want::More {
                return Err(Errno::ENOSPC);
            }
        }
    }
}
