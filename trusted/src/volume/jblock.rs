//! One sealed block of the journal, and the records in it.
//!
//! Each block is self-describing: its header carries the salt of its epoch and the tag of the
//! block before, all authenticated, so a block can be checked alone and the chain can be followed
//! without any pointer. Records that must hold together lie in one block.

use alloc::vec::Vec;

use super::{
    crypto::{EpochKey, Forged, Kind, Salt, TAG, Tag},
    layout::{
        FANOUT, MAX_CAPACITY, Order, Ptr, SEQ_END, get_array, get32, get64, put, put32, put64,
    },
};
use crate::disk::{BLOCK, Block};

const MAGIC: &[u8; 8] = b"PSTNJRN1";
const HEADER: usize = 128;
const TAG_AT: usize = HEADER - TAG;
const PAYLOAD: usize = BLOCK - HEADER;
/// Bytes of the payload that records fill. Behind them: when the content was last changed.
const FILLED: usize = PAYLOAD - 8;
/// Bytes of a record (an extent is longer).
const RECORD: usize = 40;
const EXTENT_HEADER: usize = 24;
/// Records that fit into a block whatever they are and however they are glued.
pub(crate) const SURE: usize = FILLED / RECORD - 3;

const MAP: u8 = 1;
const EXTENT: u8 = 2;
const ZERO: u8 = 3;
const SIZE: u8 = 4;
const VOID: u8 = 5;
/// Flag of a MAP record, in the bits of an extent's count.
const CARRIED: u64 = 1;
/// Blocks that one extent may describe.
const EXTENT_MAX: usize = (FILLED - EXTENT_HEADER) / TAG;

/// A change of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// `block` of the guest's file is what `ptr` points to. `carried`: this is newer than what the
    /// map holds, although its order is below the map's cut (its leaf could not be read).
    Map { block: u64, ptr: Ptr, carried: bool },
    /// Blocks `first..first + count` are holes.
    Zero { first: u64, count: u64, order: Order },
    /// The guest's file has `size` bytes.
    Size { size: u64, order: Order },
    /// The `count` writes from `order` on never happened.
    Void { order: Order, count: u64 },
}

/// What a journal block says besides its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Number of the block in the chain.
    pub(crate) seq: u64,
    /// Journal blocks up to this one are durable and settled.
    pub(crate) durable: u64,
    /// Superblock generation known to be durable.
    pub(crate) generation: u64,
    /// Order of this block's seal.
    pub(crate) order: Order,
    /// Salt of its epoch.
    pub(crate) salt: Salt,
    /// Tag of the block before.
    pub(crate) prev: Tag,
}

/// The header's words of a block that may be a journal block of volume `uuid`.
pub(crate) fn peek(bytes: &Block, uuid: &[u8; 16]) -> Option<Header> {
    if &bytes[..8] != MAGIC || bytes[8..16] != uuid[..8] {
        return None;
    }
    let epoch = get32(bytes, 40);
    let counter = get64(bytes, 48);
    let (durable, generation) = (get64(bytes, 24), get64(bytes, 32));
    if epoch > Order::MAX_EPOCH
        || counter > Order::MAX_COUNTER
        || durable >= SEQ_END
        || generation >= SEQ_END
    {
        return None;
    }
    Some(Header {
        seq: get64(bytes, 16),
        durable,
        generation,
        order: Order::new(epoch, counter),
        salt: get_array(bytes, 56),
        prev: get_array(bytes, 80),
    })
}

/// Opens a block that was [`peek`]ed, in place. Returns its tag.
pub(crate) fn open(bytes: &mut Block, key: &EpochKey, header: &Header) -> Result<Tag, Forged> {
    let tag = get_array(bytes, TAG_AT);
    let (clear, payload) = bytes.split_at_mut(HEADER);
    key.open(Kind::Journal, header.order, &clear[..TAG_AT], &tag, payload)?;
    Ok(tag)
}

/// Records of an opened block. Stops at the first that is not of this format.
pub(crate) fn records(bytes: &Block) -> Vec<Record> {
    let length = (get32(bytes, 44) as usize).min(PAYLOAD);
    let payload = &bytes[HEADER..HEADER + length];
    let (mut at, mut out) = (0, Vec::new());
    while at + RECORD <= payload.len() {
        let word = get64(payload, at);
        let kind = (word >> 56) as u8;
        let block = word & ((1 << 40) - 1);
        let (a, b) = (get64(payload, at + 8), Order(get64(payload, at + 16)));
        match kind {
            MAP if block < MAX_CAPACITY => {
                let carried = word >> 40 & CARRIED != 0;
                out.push(Record::Map { block, ptr: Ptr::decode(payload, at + 8), carried });
            }
            EXTENT => {
                let count = (word >> 40 & 0xffff) as usize;
                let end = at + EXTENT_HEADER + count * TAG;
                let overflows = |first: u64| first.checked_add(count as u64).is_none();
                if count == 0
                    || end > payload.len()
                    || block + count as u64 > MAX_CAPACITY
                    || overflows(a)
                    || overflows(b.0)
                {
                    break;
                }
                let first = Ptr { word: a, order: b, tag: [0; TAG] };
                out.extend((0..count).map(|i| {
                    let tag = get_array(payload, at + EXTENT_HEADER + i * TAG);
                    let n = i as u64;
                    let ptr = Ptr { word: first.word + n, order: first.order.plus(n), tag };
                    Record::Map { block: block + n, ptr, carried: false }
                }));
                at = end.next_multiple_of(8);
                continue;
            }
            ZERO if block < MAX_CAPACITY && a <= MAX_CAPACITY => {
                out.push(Record::Zero { first: block, count: a, order: b });
            }
            SIZE if a <= MAX_CAPACITY * BLOCK as u64 => {
                out.push(Record::Size { size: a, order: b });
            }
            VOID if a <= FANOUT * FANOUT && b.0.checked_add(a).is_some() => {
                out.push(Record::Void { order: b, count: a })
            }
            _ => break,
        }
        at += RECORD;
    }
    out
}

/// When the content had last been changed before the block was sealed, in nanoseconds since 1970.
/// `None`: it does not tell.
pub(crate) fn modified(bytes: &Block) -> Option<i64> {
    let time = i64::from_le_bytes(get_array(bytes, HEADER + FILLED));
    // Earlier writers filled the payload to its end.
    (get32(bytes, 44) as usize <= FILLED && time != 0).then_some(time)
}

/// Fills one block with records.
pub(crate) struct Builder {
    bytes: Block,
    used: usize,
}

impl Builder {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; BLOCK], used: 0 }
    }

    const fn left(&self) -> usize {
        FILLED - self.used
    }

    fn word(&mut self, kind: u8, count: u64, block: u64) -> usize {
        let at = HEADER + self.used;
        put64(&mut self.bytes, at, u64::from(kind) << 56 | count << 40 | block);
        at
    }

    /// Takes as many records from the front of `group` (glued: all or none) as fit; returns how
    /// many.
    pub(crate) fn take(&mut self, group: &[Record], glued: bool) -> usize {
        if glued {
            if group.len() * RECORD > self.left() {
                return 0;
            }
            group.iter().for_each(|record| self.single(record));
            return group.len();
        }
        let mut taken = 0;
        while taken < group.len() && self.left() >= RECORD {
            let run = extent(&group[taken..]).min((self.left() - EXTENT_HEADER) / TAG);
            if run >= 2 {
                self.extent(&group[taken..taken + run]);
                taken += run;
            } else {
                self.single(&group[taken]);
                taken += 1;
            }
        }
        taken
    }

    fn single(&mut self, record: &Record) {
        match *record {
            Record::Map { block, ptr, carried } => {
                let at = self.word(MAP, if carried { CARRIED } else { 0 }, block);
                ptr.encode(&mut self.bytes, at + 8);
            }
            Record::Zero { first, count, order } => self.numbers(ZERO, first, count, order),
            Record::Size { size, order } => self.numbers(SIZE, 0, size, order),
            Record::Void { order, count } => self.numbers(VOID, 0, count, order),
        }
        self.used += RECORD;
    }

    fn numbers(&mut self, kind: u8, block: u64, number: u64, order: Order) {
        let at = self.word(kind, 0, block);
        put64(&mut self.bytes, at + 8, number);
        put64(&mut self.bytes, at + 16, order.0);
    }

    fn extent(&mut self, run: &[Record]) {
        let Some(Record::Map { block, ptr, .. }) = run.first() else { return };
        let at = self.word(EXTENT, run.len() as u64, *block);
        put64(&mut self.bytes, at + 8, ptr.word);
        put64(&mut self.bytes, at + 16, ptr.order.0);
        for (i, record) in run.iter().enumerate() {
            if let Record::Map { ptr, .. } = record {
                put(&mut self.bytes, at + EXTENT_HEADER + i * TAG, &ptr.tag);
            }
        }
        self.used += (EXTENT_HEADER + run.len() * TAG).next_multiple_of(8);
    }

    /// Seals the block under `header.order`. `modified`: when the content was last changed.
    pub(crate) fn seal(
        mut self,
        uuid: &[u8; 16],
        key: &EpochKey,
        header: &Header,
        modified: i64,
    ) -> (Block, Tag) {
        let b = &mut self.bytes;
        put(b, HEADER + FILLED, &modified.to_le_bytes());
        put(b, 0, MAGIC);
        put(b, 8, &uuid[..8]);
        put64(b, 16, header.seq);
        put64(b, 24, header.durable);
        put64(b, 32, header.generation);
        put32(b, 40, header.order.epoch());
        put32(b, 44, self.used as u32);
        put64(b, 48, header.order.counter());
        put(b, 56, &header.salt);
        put(b, 80, &header.prev);
        let (clear, payload) = b.split_at_mut(HEADER);
        let tag = key.seal(Kind::Journal, header.order, &clear[..TAG_AT], payload);
        put(clear, TAG_AT, &tag);
        (self.bytes, tag)
    }
}

/// Records at the front of `group` that one extent can describe: neighbours in the file, on the
/// host and in order.
fn extent(group: &[Record]) -> usize {
    let Some(Record::Map { block, ptr, carried: false }) = group.first() else { return 1 };
    group
        .iter()
        .take(EXTENT_MAX)
        .zip(0_u64..)
        .take_while(|(record, n)| {
            matches!(record, Record::Map { block: b, ptr: p, carried: false }
                if *b == block + n && p.word == ptr.word + n && p.order.0 == ptr.order.0 + n)
        })
        .count()
}

// With proptest, which does not build for an enclave.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests {
    use super::*;
    use crate::volume::crypto::{Secret, VolumeKey};
    use alloc::vec;
    use proptest::prelude::*;

    fn key() -> (EpochKey, Salt) {
        let salt = [3; 24];
        (VolumeKey::new([1; 16], Secret([2; 32])).epoch(9, &salt), salt)
    }

    fn map(block: u64, place: u64, counter: u64) -> Record {
        let tag = [(counter % 251) as u8; 16];
        let ptr = Ptr::new(place, 1, Order::new(9, counter), tag);
        Record::Map { block, ptr, carried: counter % 5 == 4 && block > 1 << 19 }
    }

    fn round_trip(list: &[Record]) -> (usize, Vec<Record>) {
        crate::volume::tests::nonces::reset();
        let (key, salt) = key();
        let mut builder = Builder::new();
        let taken = builder.take(list, false);
        let header = Header {
            seq: 5,
            durable: 4,
            generation: 3,
            order: Order::new(9, 1 << 30),
            salt,
            prev: [8; 16],
        };
        let (mut bytes, tag) = builder.seal(&[1; 16], &key, &header, -77);
        assert_eq!(peek(&bytes, &[1; 16]), Some(header));
        assert_eq!(open(&mut bytes, &key, &header), Ok(tag));
        assert_eq!(modified(&bytes), Some(-77));
        (taken, records(&bytes))
    }

    #[test]
    fn a_block_holds_99_single_records_or_an_extent_of_246() {
        let singles: Vec<_> = (0..200).map(|i| map(i * 2, 1000 + i, i)).collect();
        let (taken, back) = round_trip(&singles);
        assert_eq!((taken, &back[..]), (99, &singles[..99]));
        let run: Vec<_> = (0..300).map(|i| map(50 + i, 1000 + i, 70 + i)).collect();
        let (taken, back) = round_trip(&run);
        assert_eq!((taken, &back[..]), (246, &run[..246]));
    }

    #[test]
    fn glued_records_are_all_in_a_block_or_none() {
        let mut builder = Builder::new();
        assert_eq!(builder.take(&(0..98).map(|i| map(i * 2, i, i)).collect::<Vec<_>>(), false), 98);
        let glued = vec![map(1, 2, 3), Record::Size { size: 9, order: Order::new(9, 4) }];
        assert_eq!(builder.take(&glued, true), 0);
        assert_eq!(builder.take(&glued[..1], true), 1);
    }

    proptest! {
        #[test]
        fn records_survive_their_encoding(seed in proptest::collection::vec((0_u8..6, 0_u64..1 << 20), 1..90)) {
            let mut next = 100;
            let list: Vec<_> = seed.iter().map(|&(kind, n)| {
                next += 1;
                let order = Order::new(9, next);
                match kind {
                    0 => Record::Zero { first: n, count: n / 2, order },
                    1 => Record::Size { size: n, order },
                    2 => Record::Void { order, count: n % 100 },
                    3 => map(n, n + 5, next),
                    _ => map(next, next + 500, next),
                }
            }).collect();
            let (taken, back) = round_trip(&list);
            prop_assert_eq!(taken, list.len());
            prop_assert_eq!(back, list);
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
            let mut block = [0; BLOCK];
            block.copy_from_slice(&bytes);
            let _ = peek(&block, &[1; 16]);
            let _ = records(&block);
        }
    }
}
