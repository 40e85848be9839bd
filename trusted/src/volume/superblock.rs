//! The superblock: root of everything, in two slots of two copies.
//!
//! Holds: each writing has a salt and so a key of its own; a superblock authenticates only in the
//! slot it was written to.

use alloc::vec::Vec;

use super::snapshots::Held;
use super::times::Times;
use super::{
    crypto::{SINGLE, Salt, Tag, VolumeKey},
    error::VolumeError,
    layout::{
        BLOCK_BYTES, Geometry, MAX_LEVELS, Order, Ptr, SEQ_END, get_array, get32, get64, levels,
        put, put32, put64,
    },
};
use crate::{
    counter::Record,
    disk::{BLOCK, Block},
};

const MAGIC: &[u8; 8] = b"PSTRNSUP";
/// A superblock without and with a field of features.
const VERSIONS: [u32; 2] = [1, 2];
const FEATURES_AT: usize = 52;
/// There are snapshots: blocks that the map gives up may be held by them.
const FEATURE_SNAPSHOTS: u32 = 1;
const BODY: usize = 64;
/// Epochs a superblock remembers by itself.
pub(crate) const RECENT: usize = 32;
const RECENT_AT: usize = 640;
/// Levels of the epoch table at most: 127^4 is more than 2^27 epochs; 28 bits need one more.
const MAX_TABLE_LEVELS: u32 = 5;

const FLAG_CLEAN: u32 = 1;

const REGISTERED_AT: usize = 408;
const COUNTER_FLAGS_AT: usize = 448;
const ATTEMPTED_AT: usize = BLOCK - Record::BYTES;
const BOUND: u64 = 1;
const REGISTERED: u64 = 2;
const ATTEMPTED: u64 = 4;

/// What a volume that is bound to a monotonic counter knows of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bound {
    /// What the counter held when the superblock was written.
    pub(crate) registered: Option<Record>,
    /// What a move on its way then would make of it.
    pub(crate) attempted: Option<Record>,
}

impl Bound {
    fn encode(&self, b: &mut Block) {
        let mut flags = BOUND;
        for (record, at, flag) in [
            (self.registered, REGISTERED_AT, REGISTERED),
            (self.attempted, ATTEMPTED_AT, ATTEMPTED),
        ] {
            if let Some(record) = record {
                put(b, at, &record.encode());
                flags |= flag;
            }
        }
        put64(b, COUNTER_FLAGS_AT, flags);
    }

    fn decode(b: &Block) -> Option<Self> {
        let flags = get64(b, COUNTER_FLAGS_AT);
        let record =
            |at: usize, flag: u64| (flags & flag != 0).then(|| Record::decode(&get_array(b, at)));
        (flags & BOUND != 0).then(|| Self {
            registered: record(REGISTERED_AT, REGISTERED),
            attempted: record(ATTEMPTED_AT, ATTEMPTED),
        })
    }
}

/// An epoch that the superblock remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Epoch {
    pub(crate) id: u32,
    pub(crate) salt: Salt,
    pub(crate) key_version: u16,
    /// It stands in the epoch table, too.
    pub(crate) tabled: bool,
}

impl Epoch {
    pub(crate) const BYTES: usize = 32;

    pub(crate) fn encode(&self, bytes: &mut [u8], at: usize) {
        put(bytes, at, &self.salt);
        put32(bytes, at + 24, self.id);
        put(bytes, at + 28, &self.key_version.to_le_bytes());
        put(bytes, at + 30, &u16::from(self.tabled).to_le_bytes());
    }

    pub(crate) fn decode(bytes: &[u8], at: usize) -> Self {
        Self {
            salt: get_array(bytes, at),
            id: get32(bytes, at + 24),
            key_version: u16::from_le_bytes(get_array(bytes, at + 28)),
            tabled: bytes[at + 30] & 1 != 0,
        }
    }
}

/// What a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Counts up with every commit; the highest authentic one is the volume.
    pub(crate) generation: u64,
    /// Closed cleanly: the journal after it is empty.
    pub(crate) clean: bool,
    /// Counts the openings for writing.
    pub(crate) session: u64,
    pub(crate) size: u64,
    pub(crate) size_order: Order,
    pub(crate) geometry: Geometry,
    pub(crate) map_root: Ptr,
    pub(crate) map_levels: u32,
    /// No order below it is missing from the map.
    pub(crate) cut: Order,
    pub(crate) space_root: Ptr,
    pub(crate) table_root: Ptr,
    pub(crate) table_levels: u32,
    /// First journal block to replay and the tag of the one before.
    pub(crate) replay_seq: u64,
    pub(crate) replay_prev: Tag,
    /// Journal blocks up to this one were durable and settled.
    pub(crate) durable: u64,
    /// Number given to blocks born now.
    pub(crate) birth: u32,
    pub(crate) held: Held,
    pub(crate) epochs: Vec<Epoch>,
    /// If the volume is bound to a counter.
    pub(crate) counter: Option<Bound>,
    pub(crate) times: Times,
}

fn aad(bytes: &Block, slot: usize) -> [u8; 32] {
    let mut aad = [0; 32];
    aad[..24].copy_from_slice(&bytes[40..64]);
    aad[24] = slot as u8;
    aad
}

impl Superblock {
    /// Encodes and seals it for `slot` with a fresh `salt`.
    pub(crate) fn seal(&self, key: &VolumeKey, salt: &Salt, slot: usize) -> Block {
        let mut b = [0; BLOCK];
        put(&mut b, 0, salt);
        put(&mut b, 40, MAGIC);
        let features = if self.held.newest > 0 { FEATURE_SNAPSHOTS } else { 0 };
        put32(&mut b, 48, VERSIONS[usize::from(features != 0)]);
        put32(&mut b, FEATURES_AT, features);
        put64(&mut b, 64, self.generation);
        put32(&mut b, 72, slot as u32);
        put32(&mut b, 76, if self.clean { FLAG_CLEAN } else { 0 });
        put64(&mut b, 80, self.session);
        put64(&mut b, 88, self.size);
        put64(&mut b, 96, self.size_order.0);
        let g = &self.geometry;
        let numbers = [
            g.capacity,
            g.host_blocks,
            g.ring_start,
            g.ring_blocks,
            g.reserve_start,
            g.reserve_blocks,
            g.home_start,
            g.home_stride,
            g.slack,
        ];
        for (i, number) in numbers.into_iter().enumerate() {
            put64(&mut b, 104 + 8 * i, number);
        }
        self.map_root.encode(&mut b, 176);
        put32(&mut b, 208, self.map_levels);
        put32(&mut b, 212, self.table_levels);
        put64(&mut b, 216, self.cut.0);
        self.space_root.encode(&mut b, 224);
        self.table_root.encode(&mut b, 256);
        self.held.table.encode(&mut b, 288);
        put64(&mut b, 320, self.held.blocks);
        put32(&mut b, 328, self.held.newest);
        put64(&mut b, 368, self.replay_seq);
        put(&mut b, 376, &self.replay_prev);
        put64(&mut b, 392, self.durable);
        put32(&mut b, 400, self.birth);
        put32(&mut b, 404, self.epochs.len() as u32);
        for (i, epoch) in self.epochs.iter().take(RECENT).enumerate() {
            epoch.encode(&mut b, RECENT_AT + i * Epoch::BYTES);
        }
        if let Some(bound) = &self.counter {
            bound.encode(&mut b);
        }
        self.times.encode(&mut b);
        let aad = aad(&b, slot);
        let tag = key.single(b"postern/1 superblock", salt).seal(SINGLE, &aad, &mut b[BODY..]);
        put(&mut b, 24, &tag);
        b
    }

    /// Opens what lies in `slot`. `None`: not authentic there (never written, torn, forged).
    ///
    /// # Errors
    /// [`VolumeError::BadGeometry`], [`VolumeError::UnsupportedVersion`].
    pub(crate) fn open(
        bytes: &Block,
        key: &VolumeKey,
        slot: usize,
    ) -> Result<Option<Self>, VolumeError> {
        if &bytes[40..48] != MAGIC {
            return Ok(None);
        }
        let mut b = *bytes;
        let salt: Salt = get_array(&b, 0);
        let tag = get_array(&b, 24);
        let aad = aad(&b, slot);
        let sealed = &mut b[BODY..];
        if key.open_single(b"postern/1 superblock", &salt, &aad, &tag, sealed).is_err() {
            return Ok(None);
        }
        let version = get32(&b, 48);
        if !VERSIONS.contains(&version) {
            return Err(VolumeError::UnsupportedVersion { found: version });
        }
        let features = get32(&b, FEATURES_AT);
        let unknown = features & !FEATURE_SNAPSHOTS;
        if unknown != 0 {
            return Err(VolumeError::UnsupportedFeatures { bits: u64::from(unknown) });
        }
        let number = |i: usize| get64(&b, 104 + 8 * i);
        let geometry = Geometry {
            capacity: number(0),
            host_blocks: number(1),
            ring_start: number(2),
            ring_blocks: number(3),
            reserve_start: number(4),
            reserve_blocks: number(5),
            home_start: number(6),
            home_stride: number(7),
            slack: number(8),
        }
        .check()?;
        let count = get32(&b, 404) as usize;
        let superblock = Self {
            generation: get64(&b, 64),
            clean: get32(&b, 76) & FLAG_CLEAN != 0,
            session: get64(&b, 80),
            size: get64(&b, 88),
            size_order: Order(get64(&b, 96)),
            geometry,
            map_root: Ptr::decode(&b, 176),
            map_levels: get32(&b, 208),
            cut: Order(get64(&b, 216)),
            space_root: Ptr::decode(&b, 224),
            table_root: Ptr::decode(&b, 256),
            table_levels: get32(&b, 212),
            replay_seq: get64(&b, 368),
            replay_prev: get_array(&b, 376),
            durable: get64(&b, 392),
            birth: get32(&b, 400),
            held: Held {
                table: Ptr::decode(&b, 288),
                blocks: get64(&b, 320),
                newest: get32(&b, 328),
            },
            epochs: (0..count.min(RECENT))
                .map(|i| Epoch::decode(&b, RECENT_AT + i * Epoch::BYTES))
                .collect(),
            counter: Bound::decode(&b),
            times: Times::decode(&b),
        };
        let ok = get32(&b, 72) as usize == slot
            && count <= RECENT
            && superblock.map_levels == levels(geometry.capacity)
            && superblock.map_levels <= MAX_LEVELS
            && superblock.table_levels <= MAX_TABLE_LEVELS
            && superblock.size <= geometry.capacity * BLOCK_BYTES
            && (features & FEATURE_SNAPSHOTS != 0) == (superblock.held.newest > 0)
            && superblock.held.table.is_null() == (superblock.held.newest == 0)
            && superblock.held.newest < 1 << 24
            && superblock.held.blocks <= geometry.host_blocks
            && (1..SEQ_END).contains(&superblock.replay_seq)
            && superblock.durable < SEQ_END
            && superblock.generation < SEQ_END
            && superblock.session < SEQ_END
            && superblock.birth < 1 << 24
            && superblock.epochs.iter().all(|epoch| epoch.id <= Order::MAX_EPOCH);
        if ok { Ok(Some(superblock)) } else { Err(VolumeError::BadGeometry) }
    }
}
