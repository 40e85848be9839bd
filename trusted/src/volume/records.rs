//! Block pointers by block, in little memory: what a delta keeps of up to a million writes.
//!
//! Sorted chunks of sorted entries. A chunk that is full gives to a neighbour before it is split, so
//! that chunks which are filled at random are four fifths full (a `BTreeMap`'s nodes two thirds, and
//! it has three times as many).
//!
//! Holds: blocks ascend within a chunk and from chunk to chunk; no chunk is empty; `firsts` names
//! the first block of each.

use alloc::vec::Vec;
use core::ops::Range;

use super::layout::Ptr;

/// Most entries of a chunk, 10 KiB.
const CHUNK: usize = 256;
/// A neighbour with fewer entries takes some of a full chunk's.
const ROOM: usize = CHUNK - CHUNK / 8;

/// Pointers by block.
#[derive(Default)]
pub(crate) struct Records {
    firsts: Vec<u64>,
    chunks: Vec<Vec<(u64, Ptr)>>,
    len: usize,
}

impl Records {
    /// Number of blocks.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The chunk that `block` belongs into; there must be one.
    fn chunk_of(&self, block: u64) -> usize {
        self.firsts.partition_point(|first| *first <= block).saturating_sub(1)
    }

    /// Chunk and place of a block, or where it would be.
    fn find(&self, block: u64) -> (usize, Result<usize, usize>) {
        let chunk = self.chunk_of(block);
        let place = self
            .chunks
            .get(chunk)
            .map_or(Err(0), |entries| entries.binary_search_by_key(&block, |(block, _)| *block));
        (chunk, place)
    }

    /// The pointer of a block.
    pub(crate) fn get(&self, block: u64) -> Option<&Ptr> {
        let (chunk, place) = self.find(block);
        place.ok().map(|place| &self.chunks[chunk][place].1)
    }

    /// The pointer of a block, which is `ptr` if there was none.
    pub(crate) fn entry(&mut self, block: u64, ptr: Ptr) -> &mut Ptr {
        let (chunk, place) = self.find(block);
        let (chunk, place) = match place {
            Ok(place) => (chunk, place),
            Err(place) => {
                self.len += 1;
                let (chunk, place) = self.room(chunk, place, block);
                self.chunks[chunk].insert(place, (block, ptr));
                if place == 0 {
                    self.firsts[chunk] = block;
                }
                (chunk, place)
            }
        };
        &mut self.chunks[chunk][place].1
    }

    /// Makes room for `block` at `place` of `chunk`; answers where that is now.
    fn room(&mut self, chunk: usize, place: usize, block: u64) -> (usize, usize) {
        let Some(entries) = self.chunks.get_mut(chunk) else {
            self.firsts.push(block);
            self.chunks.push(Vec::new());
            return (chunk, place);
        };
        if entries.len() < CHUNK {
            if entries.len() == entries.capacity() {
                // Grows as a vector does, and not beyond a chunk.
                entries.reserve_exact(entries.len().clamp(4, CHUNK - entries.len()));
            }
            return (chunk, place);
        }
        let takes = |entries: Option<&Vec<_>>| entries.is_some_and(|e: &Vec<_>| e.len() < ROOM);
        if place == CHUNK {
            // Blocks that come in ascending order leave full chunks behind.
            if !takes(self.chunks.get(chunk + 1)) {
                self.add_chunk(chunk + 1, block, Vec::with_capacity(CHUNK));
            }
            return (chunk + 1, 0);
        }
        if takes(self.chunks.get(chunk + 1)) {
            let keep = CHUNK - (CHUNK - self.chunks[chunk + 1].len()) / 2;
            let given = self.chunks[chunk].split_off(keep);
            self.firsts[chunk + 1] = given[0].0;
            self.chunks[chunk + 1].splice(..0, given);
            return if place <= keep { (chunk, place) } else { (chunk + 1, place - keep) };
        }
        if chunk > 0 && takes(self.chunks.get(chunk - 1)) {
            let before = self.chunks[chunk - 1].len();
            let give = (CHUNK - before) / 2;
            let (left, right) = self.chunks.split_at_mut(chunk);
            left[chunk - 1].extend(right[0].drain(..give));
            self.firsts[chunk] = right[0][0].0;
            return if place < give { (chunk - 1, before + place) } else { (chunk, place - give) };
        }
        let keep = CHUNK / 2;
        let mut given = Vec::with_capacity(CHUNK);
        given.extend(self.chunks[chunk].drain(keep..));
        self.add_chunk(chunk + 1, given[0].0, given);
        if place <= keep { (chunk, place) } else { (chunk + 1, place - keep) }
    }

    fn add_chunk(&mut self, chunk: usize, first: u64, entries: Vec<(u64, Ptr)>) {
        self.firsts.insert(chunk, first);
        self.chunks.insert(chunk, entries);
    }

    /// Takes a block out.
    #[cfg(test)]
    pub(crate) fn remove(&mut self, block: u64) {
        let (chunk, Ok(place)) = self.find(block) else { return };
        self.len -= 1;
        self.chunks[chunk].remove(place);
        match self.chunks[chunk].first() {
            Some((first, _)) => self.firsts[chunk] = *first,
            None => {
                self.firsts.remove(chunk);
                self.chunks.remove(chunk);
            }
        }
    }

    /// The entries of a range of blocks, in ascending order.
    pub(crate) fn range(&self, blocks: Range<u64>) -> impl Iterator<Item = (u64, Ptr)> + '_ {
        let (chunk, place) = self.find(blocks.start);
        let skipped = place.unwrap_or_else(|place| place);
        let rest = self.chunks.get(chunk..).unwrap_or_default();
        let first = rest.first().map_or(&[][..], |entries| &entries[skipped..]);
        let later = rest.get(1..).unwrap_or_default().iter().flatten();
        first.iter().chain(later).copied().take_while(move |(block, _)| *block < blocks.end)
    }

    /// All entries, in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Ptr)> + '_ {
        self.chunks.iter().flatten().copied()
    }
}

// With proptest, which does not build for an enclave.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests {
    use alloc::collections::BTreeMap;

    use super::*;
    use crate::volume::layout::Order;
    use proptest::prelude::*;

    fn ptr(n: u64) -> Ptr {
        Ptr::new(n + 1, 0, Order::new(1, n + 1), [0; 16])
    }

    fn check(records: &Records, model: &BTreeMap<u64, Ptr>) {
        assert_eq!((records.len(), records.is_empty()), (model.len(), model.is_empty()));
        assert!(records.iter().eq(model.iter().map(|(b, p)| (*b, *p))));
        assert_eq!(records.firsts.len(), records.chunks.len());
        for (first, entries) in records.firsts.iter().zip(&records.chunks) {
            assert_eq!(*first, entries[0].0);
            assert!(entries.len() <= CHUNK && entries.capacity() <= CHUNK);
        }
    }

    proptest! {
        /// Runs of ascending blocks, single ones and removals, in any order.
        #[test]
        fn records_are_what_a_btree_map_is(
            steps in proptest::collection::vec((0_u64..4000, 1_u64..400, any::<bool>()), 0..60),
            range in (0_u64..4500, 0_u64..4500),
        ) {
            let (mut records, mut model) = (Records::default(), BTreeMap::new());
            let mut n = 0;
            for (from, count, take) in steps {
                for block in from..from + count {
                    n += 1;
                    if take && block % 3 != 0 {
                        records.remove(block);
                        model.remove(&block);
                    } else if block % 2 == 0 {
                        *records.entry(block, ptr(0)) = ptr(n);
                        model.insert(block, ptr(n));
                    } else {
                        prop_assert_eq!(*records.entry(block, ptr(n)), *model.entry(block).or_insert(ptr(n)));
                    }
                }
            }
            check(&records, &model);
            for block in 0..4500 {
                prop_assert_eq!(records.get(block), model.get(&block));
            }
            let range = range.0.min(range.1)..range.0.max(range.1);
            let expected = model.range(range.clone()).map(|(b, p)| (*b, *p));
            prop_assert!(records.range(range).eq(expected));
        }
    }

    /// What the limits of a delta are reckoned with.
    #[test]
    fn chunks_filled_at_random_are_four_fifths_full_and_ascending_ones_full() {
        let (mut records, mut model) = (Records::default(), BTreeMap::new());
        let mut state = 1_u64;
        for n in 0..100_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *records.entry(state >> 40, ptr(n)) = ptr(n);
            model.insert(state >> 40, ptr(n));
        }
        check(&records, &model);
        let room = |records: &Records| records.chunks.iter().map(Vec::capacity).sum::<usize>();
        assert!(records.len() * 5 >= room(&records) * 4, "{} in {}", records.len(), room(&records));
        let mut records = Records::default();
        for n in 0..100_000 {
            *records.entry(n, ptr(0)) = ptr(n);
        }
        assert!(records.len() + CHUNK > room(&records));
    }
}
