//! Snapshots: roots of the map that stay.
//!
//! Every block carries the birth number that was current when it was written, and a snapshot has
//! the number that was current when it was made; then the number counts up. So whatever the map
//! gives up that is not younger than the newest snapshot is held by that snapshot, and nothing
//! else has to be kept in mind: a snapshot costs one block, opening costs nothing. Deleting one
//! walks its tree beside the next one's (or the map's) and skips what both share and what the one
//! before has, too.
//!
//! Holds: one superblock makes a snapshot, or takes it away together with its blocks, so a crash
//! shows all of it or nothing. No node or block that a snapshot reaches is given out again.
//! Does not hold: that a full volume with snapshots keeps taking overwrites.

use alloc::{
    boxed::Box,
    string::{String, ToString},
    vec::Vec,
};

use super::{
    Volume,
    checkpoint::Merged,
    core::{Health, Map},
    crypto::{SINGLE, Salt},
    delta::Delta,
    error::{Misuse, VolumeError},
    freshness::Fresh,
    layout::{
        BLOCK_BYTES, FANOUT, Order, PLACE_BITS, Ptr, child, get32, get64, levels, put, put32, put64,
    },
    ranges::EOF,
    recovery::failed,
    tree::{Bad, Miss},
};
use crate::{
    disk::{BLOCK, Block, Disk, Transfer},
    errno::Errno,
};

/// Bytes of a name at most.
const NAME: usize = 48;
const LABEL: &[u8] = b"postern/1 snapshot table";
const BODY: usize = 32;
const ENTRIES_AT: usize = 64;
const ENTRY: usize = 128;
/// Snapshots in one block of the table.
const PER_BLOCK: usize = 31;
/// Blocks of the table at most.
const MAX_BLOCKS: usize = 32;
/// No birth number reaches this.
const MAX_BIRTH: u32 = (1 << (64 - PLACE_BITS)) - 1;

/// A snapshot, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970, as its maker's clock said.
    pub created: u64,
    /// Bytes of the guest's file in it.
    pub size: u64,
    /// Snapshots have ascending numbers.
    pub number: u32,
}

/// An entry of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) root: Ptr,
    pub(crate) levels: u32,
    pub(crate) size: u64,
    pub(crate) capacity: u64,
    /// Nothing in it is younger.
    pub(crate) birth: u32,
    pub(crate) created: u64,
    pub(crate) name: String,
}

/// What a checkpoint does to the snapshots besides.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Task<'a> {
    /// Keeps its own state under this name.
    Keep { name: &'a str, created: u64 },
    /// Lets the snapshot of this name go.
    Release { name: &'a str },
}

/// The snapshots as a superblock names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// First block of the table; null without snapshots.
    pub(crate) table: Ptr,
    /// Number of the newest snapshot; 0 without.
    pub(crate) newest: u32,
    /// Blocks in use that only snapshots reach.
    pub(crate) blocks: u64,
}

impl Snapshot {
    fn encode(&self, bytes: &mut [u8], at: usize) {
        self.root.encode(bytes, at);
        put64(bytes, at + 32, self.size);
        put64(bytes, at + 40, self.capacity);
        put32(bytes, at + 48, self.birth);
        put32(bytes, at + 52, self.levels);
        put64(bytes, at + 56, self.created);
        bytes[at + 64] = self.name.len() as u8;
        put(bytes, at + 72, self.name.as_bytes());
    }

    /// `None`: numbers that no snapshot has.
    fn decode(bytes: &[u8], at: usize) -> Option<Self> {
        let length = usize::from(bytes[at + 64]);
        let name = core::str::from_utf8(bytes.get(at + 72..at + 72 + length.min(NAME))?).ok()?;
        let snapshot = Self {
            root: Ptr::decode(bytes, at),
            size: get64(bytes, at + 32),
            capacity: get64(bytes, at + 40),
            birth: get32(bytes, at + 48),
            levels: get32(bytes, at + 52),
            created: get64(bytes, at + 56),
            name: name.to_string(),
        };
        let sound = is_name(name)
            && (1..=super::layout::MAX_CAPACITY).contains(&snapshot.capacity)
            && snapshot.size <= snapshot.capacity * BLOCK_BYTES
            && snapshot.levels == levels(snapshot.capacity);
        sound.then_some(snapshot)
    }

    fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            name: self.name.clone(),
            created: self.created,
            size: self.size,
            number: self.birth,
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

fn aad(index: usize) -> [u8; 16] {
    let mut aad = [0; 16];
    aad[0] = 6;
    aad[8..].copy_from_slice(&(index as u64).to_le_bytes());
    aad
}

impl Volume {
    /// The snapshots, oldest first.
    ///
    /// # Errors
    /// [`VolumeError::DamagedSnapshots`] for a table that does not authenticate,
    /// [`VolumeError::Host`].
    pub async fn snapshots<D: Disk>(&self, disk: &D) -> Result<Vec<SnapshotInfo>, VolumeError> {
        let (snapshots, _) = self.table_of_snapshots(disk).await.map_err(unreadable)?;
        Ok(snapshots.iter().map(Snapshot::info).collect())
    }

    /// Keeps everything that was written until now under `name` (1 to 48 printable ASCII
    /// characters), durably. Writers wait meanwhile. `created`: seconds since 1970.
    ///
    /// # Errors
    /// [`Misuse::SnapshotName`], [`Misuse::SnapshotExists`], [`Misuse::TooManySnapshots`];
    /// [`Misuse::Rekeying`]; [`VolumeError::DamagedSnapshots`], [`VolumeError::Host`] when the
    /// checkpoint failed: there is no snapshot then; those of the counter, where syncs wait for it:
    /// there is one then.
    pub async fn make_snapshot<D: Disk>(
        &self,
        disk: &D,
        name: &str,
        created: u64,
    ) -> Result<(), VolumeError> {
        if !is_name(name) {
            return Err(VolumeError::Misuse(Misuse::SnapshotName));
        }
        let (snapshots, _) = self.table_of_snapshots(disk).await.map_err(unreadable)?;
        if snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Err(VolumeError::Misuse(Misuse::SnapshotExists));
        }
        if self.key.is_retiring() {
            return Err(VolumeError::Misuse(Misuse::Rekeying));
        }
        if snapshots.len() >= PER_BLOCK * MAX_BLOCKS || self.core.lock().birth >= MAX_BIRTH {
            return Err(VolumeError::Misuse(Misuse::TooManySnapshots));
        }
        // Nothing is in flight at the cut: all that bears its birth number is in the snapshot.
        let ticket = self.enter(0, EOF, true).await;
        let made = self.checkpoint_with(disk, Some(Task::Keep { name, created })).await;
        self.leave(Some(ticket));
        made.map_err(|errno| failed(0, errno))?;
        self.register_changed().await
    }

    /// Lets the snapshot `name` go; answers how many blocks became free. Needs 8 bytes of memory
    /// for each.
    ///
    /// # Errors
    /// [`Misuse::NoSnapshot`]; as [`Self::make_snapshot`].
    pub async fn delete_snapshot<D: Disk>(&self, disk: &D, name: &str) -> Result<u64, VolumeError> {
        let (snapshots, _) = self.table_of_snapshots(disk).await.map_err(unreadable)?;
        if !snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Err(VolumeError::Misuse(Misuse::NoSnapshot));
        }
        let before = self.info().used_blocks;
        let deleted = self.checkpoint_with(disk, Some(Task::Release { name })).await;
        deleted.map_err(|errno| failed(0, errno))?;
        self.register_changed().await?;
        Ok(before.saturating_sub(self.info().used_blocks))
    }

    /// The volume as it was when the snapshot `name` was made, for reading. Of a volume opened
    /// read-only.
    ///
    /// # Errors
    /// [`Misuse::NoSnapshot`], [`VolumeError::DamagedSnapshots`], [`VolumeError::Host`].
    pub async fn at_snapshot<D: Disk>(self, disk: &D, name: &str) -> Result<Self, VolumeError> {
        let (snapshots, _) = self.table_of_snapshots(disk).await.map_err(unreadable)?;
        let snapshot = snapshots.into_iter().find(|snapshot| snapshot.name == name);
        let snapshot = snapshot.ok_or(VolumeError::Misuse(Misuse::NoSnapshot))?;
        {
            let mut core = self.core.lock();
            core.health = Health::ReadOnly;
            core.map = Map { root: snapshot.root, levels: snapshot.levels, cut: Order(0) };
            core.active = Delta::default();
            core.frozen = None;
            core.size = snapshot.size;
        }
        Ok(self)
    }

    /// Where syncs wait for the counter, a change of the snapshots does, too.
    async fn register_changed(&self) -> Result<(), VolumeError> {
        let counts = self.core.lock().fresh.as_ref().is_some_and(Fresh::counts_syncs);
        if counts {
            self.register().await?;
        }
        Ok(())
    }

    /// Whether the volume has snapshots.
    pub(crate) fn has_snapshots(&self) -> bool {
        self.core.lock().held.newest > 0
    }

    /// All entries of the table, oldest first, and the places of its blocks.
    pub(crate) async fn table_of_snapshots<D: Disk>(
        &self,
        disk: &D,
    ) -> Result<(Vec<Snapshot>, Vec<u64>), Bad> {
        let held = self.core.lock().held;
        let (mut ptr, mut snapshots, mut places) = (held.table, Vec::new(), Vec::new());
        while !ptr.is_null() {
            if ptr.place() >= self.geometry.host_blocks || places.len() >= MAX_BLOCKS {
                return Err(Bad::Forged);
            }
            let mut transfer = disk.transfer(1).await?;
            transfer.read(ptr.place()).await?;
            let mut block: Box<Block> = Box::new([0; BLOCK]);
            transfer.get(0, &mut block);
            let salt: Salt = super::layout::get_array(&block[..], 0);
            self.key
                .open_single(LABEL, &salt, &aad(places.len()), &ptr.tag, &mut block[BODY..])
                .map_err(|_| Bad::Forged)?;
            places.push(ptr.place());
            ptr = Ptr::decode(&block[..], BODY);
            for at in (0..PER_BLOCK).map(|n| ENTRIES_AT + n * ENTRY) {
                if block[at + 64] != 0 {
                    snapshots.push(Snapshot::decode(&block[..], at).ok_or(Bad::Forged)?);
                }
            }
        }
        let ascending = snapshots.is_sorted_by(|a, b| a.birth < b.birth);
        let newest = snapshots.last().map_or(0, |snapshot| snapshot.birth);
        if !ascending || newest != held.newest {
            return Err(Bad::Forged);
        }
        Ok((snapshots, places))
    }

    /// Writes the table again with what `task` makes of it, within a checkpoint that has merged
    /// into `map` what was there at the cut.
    pub(crate) async fn change_snapshots<D: Disk>(
        &self,
        disk: &D,
        task: Task<'_>,
        map: Map,
        size: u64,
        merged: &mut Merged,
    ) -> Result<Held, Errno> {
        let (mut snapshots, old) = self.table_of_snapshots(disk).await.map_err(Bad::errno)?;
        let mut blocks = self.core.lock().held.blocks + merged.held;
        match task {
            Task::Keep { name, created } => {
                if !merged.carried.is_empty() {
                    // Changes that could not be merged would be missing from it.
                    return Err(Errno::EIO);
                }
                snapshots.push(Snapshot {
                    root: merged.root,
                    levels: map.levels,
                    size,
                    capacity: self.geometry.capacity,
                    birth: merged.birth,
                    created,
                    name: name.to_string(),
                });
            }
            Task::Release { name } => {
                let at = snapshots.iter().position(|snapshot| snapshot.name == name);
                let at = at.ok_or(Errno::EINVAL)?;
                let gone = snapshots.remove(at);
                let before = at.checked_sub(1).map_or(0, |at| snapshots[at].birth);
                let next = snapshots
                    .get(at)
                    .map_or((merged.root, map.levels), |next| (next.root, next.levels));
                let freed = self.only_in(disk, &gone, next, before).await.map_err(Bad::errno)?;
                blocks = blocks.saturating_sub(freed.len() as u64);
                merged.frees.extend(freed);
            }
        }
        merged.frees.extend(old);
        let mut table = Ptr::NULL;
        let count = snapshots.len().div_ceil(PER_BLOCK);
        for (index, entries) in snapshots.chunks(PER_BLOCK).enumerate().rev() {
            debug_assert!(index < count);
            let mut block = Box::new([0; BLOCK]);
            table.encode(&mut block[..], BODY);
            for (n, entry) in entries.iter().enumerate() {
                entry.encode(&mut block[..], ENTRIES_AT + n * ENTRY);
            }
            let mut salt: Salt = [0; 24];
            disk.random(&mut salt).map_err(|_| Errno::EIO)?;
            put(&mut block[..], 0, &salt);
            let key = self.key.single(LABEL, &salt);
            let tag = key.seal(SINGLE, &aad(index), &mut block[BODY..]);
            let place = self.node_run(disk, 1).await?.place;
            self.put_block(disk, place, &block).await?;
            merged.allocs.push(place);
            table = Ptr::new(place, merged.birth, Order(0), tag);
        }
        let newest = snapshots.last().map_or(0, |snapshot| snapshot.birth);
        Ok(Held { table, newest, blocks })
    }

    /// Places that `gone` reaches and neither the tree under `next` nor the snapshot with the
    /// birth number `before` does.
    async fn only_in<D: Disk>(
        &self,
        disk: &D,
        gone: &Snapshot,
        (mut next, mut levels): (Ptr, u32),
        before: u32,
    ) -> Result<Vec<u64>, Bad> {
        // A volume that has grown since has more levels, with the old root at the far left.
        while levels > gone.levels && !next.is_null() {
            levels -= 1;
            let node = self.node(disk, &Miss { ptr: next, level: levels, index: 0 }).await?;
            next = child(&node, 0);
        }
        let mut freed = Vec::new();
        // Pairs of pointers to the same part of both trees, and the levels below them.
        let mut pairs = Vec::from([(gone.root, next, gone.levels, 0)]);
        while let Some((ptr, beside, below, index)) = pairs.pop() {
            // Nothing under a pointer is younger than it.
            if ptr.is_null() || ptr == beside || ptr.birth() <= before {
                continue;
            }
            freed.push(ptr.place());
            let Some(level) = below.checked_sub(1) else { continue };
            let node = self.node(disk, &Miss { ptr, level, index }).await?;
            let other = match beside.is_null() {
                true => None,
                false => Some(self.node(disk, &Miss { ptr: beside, level, index }).await?),
            };
            for slot in 0..FANOUT {
                let at = slot as usize;
                let beside = other.as_ref().map_or(Ptr::NULL, |other| child(other, at));
                pairs.push((child(&node, at), beside, level, index * FANOUT + slot));
            }
        }
        Ok(freed)
    }
}

fn unreadable(bad: Bad) -> VolumeError {
    match bad {
        Bad::Forged => VolumeError::DamagedSnapshots,
        bad @ Bad::Host(_) => failed(0, bad.errno()),
    }
}
