//! Numbers and small encodings of the format: places, orders, pointers, geometry.
//!
//! Every decoder takes bytes of any content, never panics and bounds what it returns. The format
//! is described field by field in docs/FORMAT.md.

use super::{
    crypto::{TAG, Tag},
    error::{Misuse, VolumeError},
};
use crate::disk::{BLOCK, Block};

/// Bytes in a block, as the format counts.
pub(crate) const BLOCK_BYTES: u64 = BLOCK as u64;
/// Children of a map node.
pub(crate) const FANOUT: u64 = 128;
/// log2 of [`FANOUT`].
pub(crate) const FANOUT_BITS: u32 = 7;
/// Levels of the map at most: 128^6 blocks are more than places can address.
pub(crate) const MAX_LEVELS: u32 = 6;
/// Blocks of a region: what one page of the space map describes.
pub(crate) const REGION: u64 = 32_768;
/// Places of the two slots of the superblock, two copies each.
pub(crate) const SUPERBLOCKS: [[u64; 2]; 2] = [[16, 48], [32, 64]];
/// Places of the two copies of the static header, and their length in blocks.
pub(crate) const HEADERS: [u64; 2] = [0, 8];
/// Blocks of one copy of the static header.
pub(crate) const HEADER_BLOCKS: usize = 8;
/// First place of region 0's slots of the space map (other regions: at their start).
pub(crate) const SPACE_SLOTS_0: u64 = 256;
/// Blocks at the start of each region that hold slots of the space map.
pub(crate) const SPACE_SLOTS: u64 = 8;
/// First place of the journal ring.
pub(crate) const RING_START: u64 = 512;
/// Smallest and largest number of blocks of the ring. The largest fills region 0 up to region 1's
/// space slots.
pub(crate) const RING_BLOCKS: core::ops::RangeInclusive<u64> = 64..=(REGION - RING_START);
/// Blocks of the ring of one file among many, at most: 2 MiB.
const SMALL_RING: u64 = 512;
/// Ring places kept for recovery and close.
pub(crate) const RING_RESERVE: u64 = 8;
/// No sequence number, generation or count of sessions reaches this.
pub(crate) const SEQ_END: u64 = 1 << 62;
/// Bits of a place.
pub(crate) const PLACE_BITS: u32 = 40;
/// Largest capacity in blocks: 64 TiB.
pub(crate) const MAX_CAPACITY: u64 = 1 << 34;
/// Largest host file in blocks.
pub(crate) const MAX_HOST: u64 = 1 << 36;

/// Reads a little-endian `u64` at `at`; the caller's `at` is a constant inside the block.
pub(crate) fn get64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Reads a little-endian `u32` at `at`.
pub(crate) fn get32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Reads `N` bytes at `at`.
pub(crate) fn get_array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Writes bytes at `at`.
pub(crate) fn put(bytes: &mut [u8], at: usize, data: &[u8]) {
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// Writes a little-endian `u64` at `at`.
pub(crate) fn put64(bytes: &mut [u8], at: usize, value: u64) {
    put(bytes, at, &value.to_le_bytes());
}

/// Writes a little-endian `u32` at `at`.
pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

/// The order of a sealed message: epoch (28 bits) and write counter (36 bits). The higher wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order(pub(crate) u64);

impl Order {
    /// Bits of the counter.
    pub(crate) const COUNTER_BITS: u32 = 36;
    /// No epoch number reaches this.
    pub(crate) const MAX_EPOCH: u32 = (1 << 28) - 1;
    /// No counter of an epoch reaches this.
    pub(crate) const MAX_COUNTER: u64 = 1 << 35;

    pub(crate) const fn new(epoch: u32, counter: u64) -> Self {
        Self((epoch as u64) << Self::COUNTER_BITS | counter)
    }

    pub(crate) const fn epoch(self) -> u32 {
        (self.0 >> Self::COUNTER_BITS) as u32
    }

    pub(crate) const fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }

    /// The order `n` seals later.
    pub(crate) const fn plus(self, n: u64) -> Self {
        Self(self.0 + n)
    }
}

/// A pointer to a sealed block: where it lies and what must be found there. 32 bytes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ptr {
    /// Place (40 bits) and birth (24 bits).
    pub(crate) word: u64,
    pub(crate) order: Order,
    pub(crate) tag: Tag,
}

impl Ptr {
    /// Length on disk.
    pub(crate) const BYTES: usize = 32;
    /// The pointer of what was never written.
    pub(crate) const NULL: Self = Self { word: 0, order: Order(0), tag: [0; TAG] };

    pub(crate) const fn new(place: u64, birth: u32, order: Order, tag: Tag) -> Self {
        Self { word: place | (birth as u64) << PLACE_BITS, order, tag }
    }

    pub(crate) const fn place(&self) -> u64 {
        self.word & ((1 << PLACE_BITS) - 1)
    }

    pub(crate) const fn birth(&self) -> u32 {
        (self.word >> PLACE_BITS) as u32
    }

    pub(crate) const fn is_null(&self) -> bool {
        self.word == 0 && self.order.0 == 0
    }

    pub(crate) fn decode(bytes: &[u8], at: usize) -> Self {
        Self {
            word: get64(bytes, at),
            order: Order(get64(bytes, at + 8)),
            tag: get_array(bytes, at + 16),
        }
    }

    pub(crate) fn encode(&self, bytes: &mut [u8], at: usize) {
        put64(bytes, at, self.word);
        put64(bytes, at + 8, self.order.0);
        put(bytes, at + 16, &self.tag);
    }
}

/// Child `index` (0..128) of a node.
pub(crate) fn child(node: &Block, index: usize) -> Ptr {
    Ptr::decode(node, (index % FANOUT as usize) * Ptr::BYTES)
}

/// Index of the node of `level` that covers `block`.
pub(crate) const fn node_index(block: u64, level: u32) -> u64 {
    block >> (FANOUT_BITS * (level + 1))
}

/// Slot of the child in its parent, for the child with `index` in its own level.
pub(crate) const fn slot_in_parent(index: u64) -> usize {
    (index % FANOUT) as usize
}

/// Levels of a map over `blocks` blocks.
pub(crate) const fn levels(blocks: u64) -> u32 {
    let mut levels = 1;
    while FANOUT_BITS * levels < 64 && (1 << (FANOUT_BITS * levels)) < blocks {
        levels += 1;
    }
    levels
}

/// Map nodes that `records` changed blocks can touch at most, all levels together.
pub(crate) fn nodes_worst(capacity: u64, records: u64) -> u64 {
    (0..levels(capacity))
        .map(|level| (node_index(capacity.saturating_sub(1), level) + 1).min(records))
        .sum()
}

/// Blocks behind the homes of a volume of `capacity` blocks.
const fn tail(capacity: u64) -> u64 {
    let gib = (1 << 30) / BLOCK_BYTES;
    let eighth = capacity / 8;
    if eighth < gib / 8 {
        gib / 8
    } else if eighth > 64 * gib {
        64 * gib
    } else {
        eighth
    }
}

/// Where everything lies in the host file. All in blocks; in the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Blocks the guest may store.
    pub(crate) capacity: u64,
    /// Blocks of the host file.
    pub(crate) host_blocks: u64,
    pub(crate) ring_start: u64,
    pub(crate) ring_blocks: u64,
    /// Places for map nodes, written at format.
    pub(crate) reserve_start: u64,
    pub(crate) reserve_blocks: u64,
    /// Leaf `i` has its home at `home_start + i * home_stride`.
    pub(crate) home_start: u64,
    pub(crate) home_stride: u64,
    /// Free blocks that only the checkpoint may take.
    pub(crate) slack: u64,
}

impl Geometry {
    /// The geometry of a new volume of `size` bytes.
    pub(crate) fn for_size(size: u64) -> Result<Self, VolumeError> {
        if size == 0 || !size.is_multiple_of(BLOCK_BYTES) {
            return Err(VolumeError::Misuse(Misuse::SizeNotWholeBlocks));
        }
        let capacity = size / BLOCK_BYTES;
        if capacity > MAX_CAPACITY {
            return Err(VolumeError::Misuse(Misuse::TooLarge));
        }
        let ring_blocks = (capacity / 32).clamp(*RING_BLOCKS.start(), *RING_BLOCKS.end());
        Ok(Self::with_ring(capacity, ring_blocks))
    }

    /// The geometry of one file among many: a small journal, which is read at each opening.
    pub(crate) fn for_small_file(size: u64) -> Result<Self, VolumeError> {
        let usual = Self::for_size(size)?;
        Ok(Self::with_ring(usual.capacity, usual.ring_blocks.min(SMALL_RING)))
    }

    /// This geometry with room for `size` bytes: everything before the homes stays where it is.
    pub(crate) fn resized(&self, size: u64) -> Result<Self, VolumeError> {
        let capacity = Self::for_size(size)?.capacity;
        let homes = capacity.div_ceil(FANOUT) * self.home_stride;
        let host_blocks = self.home_start + homes + tail(capacity);
        Self { capacity, host_blocks, ..*self }.check()
    }

    fn with_ring(capacity: u64, ring_blocks: u64) -> Self {
        let gib = (1 << 30) / BLOCK_BYTES;
        let reserve_start = RING_START + ring_blocks;
        let reserve_blocks = nodes_worst(capacity, 1024) + 256 + 1024;
        let home_stride = if capacity < 4 * gib { 160 } else { 144 };
        let home_start = reserve_start + reserve_blocks;
        let host_blocks = home_start + capacity.div_ceil(FANOUT) * home_stride + tail(capacity);
        Self {
            capacity,
            host_blocks,
            ring_start: RING_START,
            ring_blocks,
            reserve_start,
            reserve_blocks,
            home_start,
            home_stride,
            slack: 256,
        }
    }

    /// Checks numbers that came from an authentic superblock all the same: every later use may
    /// rely on them.
    pub(crate) fn check(self) -> Result<Self, VolumeError> {
        let ok = (1..=MAX_CAPACITY).contains(&self.capacity)
            && self.host_blocks <= MAX_HOST
            && self.ring_start == RING_START
            && RING_BLOCKS.contains(&self.ring_blocks)
            && self.reserve_start == RING_START + self.ring_blocks
            && self.reserve_blocks <= REGION
            && self.home_start == self.reserve_start + self.reserve_blocks
            && (FANOUT..=2 * FANOUT).contains(&self.home_stride)
            && self.slack <= REGION
            && self.home_start + self.capacity.div_ceil(FANOUT) * self.home_stride
                <= self.host_blocks;
        if ok { Ok(self) } else { Err(VolumeError::BadGeometry) }
    }

    /// Regions of the host file, the last one may be partial.
    pub(crate) const fn regions(&self) -> u64 {
        self.host_blocks.div_ceil(REGION)
    }

    /// Whether blocks may ever be allocated at `place`.
    pub(crate) const fn is_general(&self, place: u64) -> bool {
        place >= self.reserve_start
            && place < self.host_blocks
            && (place < REGION || place % REGION >= SPACE_SLOTS)
    }

    /// Blocks of `region` that can be allocated when nothing is.
    pub(crate) const fn general_in(&self, region: u64) -> u64 {
        let start = region * REGION;
        let mut first = start + if region == 0 { 0 } else { SPACE_SLOTS };
        if first < self.reserve_start {
            first = self.reserve_start;
        }
        let mut end = start + REGION;
        if end > self.host_blocks {
            end = self.host_blocks;
        }
        end.saturating_sub(first)
    }

    /// Blocks that can be allocated in a new volume.
    pub(crate) fn general(&self) -> u64 {
        (0..self.regions()).map(|region| self.general_in(region)).sum()
    }

    /// Ring place of journal block `seq`.
    pub(crate) const fn ring_place(&self, seq: u64) -> u64 {
        self.ring_start + seq % self.ring_blocks
    }

    /// First place of the home of the leaf that covers `block`.
    pub(crate) const fn home(&self, block: u64) -> u64 {
        self.home_start + block / FANOUT * self.home_stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gibibyte_has_the_sizes_of_the_format_document() {
        let geometry = Geometry::for_size(1 << 30).unwrap();
        assert_eq!(geometry.ring_blocks, 8192);
        assert_eq!(geometry.reserve_blocks, 1024 + 16 + 1 + 256 + 1024);
        assert_eq!(geometry.home_start, 512 + 8192 + 2321);
        assert_eq!(geometry.check(), Ok(geometry));
        assert_eq!(levels(1 << 18), 3);
    }

    #[test]
    fn homes_and_journal_never_overlap_the_space_slots_of_region_one() {
        for size in [1_u64 << 12, 1 << 26, 1 << 32, 1 << 40, 1 << 44] {
            let geometry = Geometry::for_size(size).unwrap();
            assert!(geometry.ring_start + geometry.ring_blocks <= REGION, "size {size}");
            assert!(!geometry.is_general(REGION));
            assert!(geometry.is_general(REGION + SPACE_SLOTS) || geometry.reserve_start > REGION);
            assert_eq!(geometry.check(), Ok(geometry));
        }
    }

    #[test]
    fn a_pointer_survives_its_encoding() {
        let ptr = Ptr::new((1 << 40) - 1, (1 << 24) - 1, Order::new(77, 1 << 35), [9; 16]);
        let mut bytes = [0; 64];
        ptr.encode(&mut bytes, 17);
        let back = Ptr::decode(&bytes, 17);
        assert_eq!(back, ptr);
        assert_eq!((back.place(), back.birth()), ((1 << 40) - 1, (1 << 24) - 1));
        assert_eq!((back.order.epoch(), back.order.counter()), (77, 1 << 35));
    }
}
