//! Which blocks of the transfer area are free: a buddy allocator, 4 KiB to 128 KiB.
//!
//! All state is private; the host has no say in which buffer is handed out. Free chunks of one
//! size form a linked list, last in first out, so that the buffer used next is the one still warm
//! in the cache. Taking and giving back cost at most [`MAX_ORDER`] splits or joins; a few single
//! blocks, by far the most frequent wish, are set aside unjoined and cost neither. They are joined
//! as soon as a wish cannot be met without them.
//!
//! A chunk of order `o` holds `2^o` blocks and starts at a multiple of that, counted from the start
//! of the area. An area that is no multiple of the largest chunk has smaller ones at its end.

use alloc::{boxed::Box, vec, vec::Vec};

/// Order of the largest chunk: 32 blocks.
pub(super) const MAX_ORDER: u8 = 5;
const ORDERS: usize = MAX_ORDER as usize + 1;

/// Single blocks set aside at most.
const ASIDE: usize = 16;

/// No block; end of a list.
const NONE: u32 = u32::MAX;
/// Not the first block of a free chunk.
const TAKEN: u8 = u8::MAX;

/// A chunk of the transfer area, owned by whoever holds the value. Not `Copy`: giving it back
/// twice does not compile.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First block, from the start of the area.
    block: u32,
    order: u8,
}

impl Extent {
    /// First block, counted from the start of the area.
    pub(super) const fn block(&self) -> usize {
        self.block as usize
    }
}

/// The order of the smallest chunk that holds `blocks`; `None` for none or too many.
pub(super) const fn order_of(blocks: usize) -> Option<u8> {
    match blocks {
        1 => Some(0),
        2 => Some(1),
        3..=4 => Some(2),
        5..=8 => Some(3),
        9..=16 => Some(4),
        17..=32 => Some(5),
        _ => None,
    }
}

#[derive(Clone, Copy)]
struct Link {
    next: u32,
    previous: u32,
    /// Order of the free chunk that starts here, or [`TAKEN`].
    free: u8,
}

/// The free chunks of an area.
pub(super) struct Buddy {
    links: Box<[Link]>,
    heads: [u32; ORDERS],
    /// Single blocks given back last, not joined.
    aside: Vec<u32>,
}

impl Buddy {
    /// An area of `blocks` free blocks; blocks beyond the reach of a `u32` are not used.
    pub(super) fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(NONE).min(NONE - 1);
        let link = Link { next: NONE, previous: NONE, free: TAKEN };
        let mut buddy = Self {
            links: vec![link; count as usize].into_boxed_slice(),
            heads: [NONE; ORDERS],
            aside: Vec::with_capacity(ASIDE),
        };
        // From the end, so that the start of the area is used first.
        let mut end = count;
        while end > 0 {
            #[allow(clippy::cast_possible_truncation, reason = "at most 31")]
            let order = (end.trailing_zeros() as u8).min(MAX_ORDER);
            end -= 1 << order;
            buddy.insert(end, order);
        }
        buddy
    }

    /// Whether [`Self::take`] would find a chunk of `order`.
    pub(super) fn has(&mut self, order: u8) -> bool {
        (order == 0 && !self.aside.is_empty()) || self.smallest(order).is_some()
    }

    /// Takes a chunk of `order`, splitting a larger one if need be.
    pub(super) fn take(&mut self, order: u8) -> Option<Extent> {
        if order == 0
            && let Some(block) = self.aside.pop()
        {
            return Some(Extent { block, order });
        }
        let mut size = self.smallest(order)?;
        let block = self.heads[usize::from(size)];
        self.remove(block, size);
        while size > order {
            size -= 1;
            self.insert(block + (1 << size), size);
        }
        Some(Extent { block, order })
    }

    /// Gives a chunk back.
    pub(super) fn give(&mut self, extent: Extent) {
        if extent.order == 0 && self.aside.len() < ASIDE {
            self.aside.push(extent.block);
        } else {
            self.join(extent.block, extent.order);
        }
    }

    /// The order of the smallest free chunk that is not below `order`.
    fn smallest(&mut self, order: u8) -> Option<u8> {
        let look = |heads: &[u32; ORDERS]| {
            (order..=MAX_ORDER).find(|&order| heads[usize::from(order)] != NONE)
        };
        look(&self.heads).or_else(|| {
            while let Some(block) = self.aside.pop() {
                self.join(block, 0);
            }
            look(&self.heads)
        })
    }

    /// Frees a chunk and joins it with its free neighbours.
    fn join(&mut self, mut block: u32, mut order: u8) {
        while order < MAX_ORDER {
            let buddy = block ^ (1 << order);
            if self.links.get(buddy as usize).is_none_or(|link| link.free != order) {
                break;
            }
            self.remove(buddy, order);
            block &= !(1 << order);
            order += 1;
        }
        self.insert(block, order);
    }

    fn insert(&mut self, block: u32, order: u8) {
        let head = core::mem::replace(&mut self.heads[usize::from(order)], block);
        self.links[block as usize] = Link { next: head, previous: NONE, free: order };
        if let Some(link) = self.links.get_mut(head as usize) {
            link.previous = block;
        }
    }

    fn remove(&mut self, block: u32, order: u8) {
        let Link { next, previous, .. } = self.links[block as usize];
        self.links[block as usize].free = TAKEN;
        match self.links.get_mut(previous as usize) {
            Some(link) => link.next = next,
            None => self.heads[usize::from(order)] = next,
        }
        if let Some(link) = self.links.get_mut(next as usize) {
            link.previous = previous;
        }
    }
}

// With proptest, which does not build for an enclave.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The model is a plain map of which block is taken.
        #[test]
        fn no_block_is_handed_out_twice_and_all_come_back(
            blocks in 1..200_usize,
            script in prop::collection::vec((any::<bool>(), 0..=MAX_ORDER, any::<prop::sample::Index>()), 0..300),
        ) {
            let mut buddy = Buddy::new(blocks);
            let mut taken = vec![false; blocks];
            let mut held: Vec<Extent> = Vec::new();
            for (take, order, which) in script {
                if take {
                    prop_assert_eq!(buddy.has(order), {
                        // An aligned free run of this size exists.
                        taken.chunks_exact(1 << order).any(|run| run.iter().all(|&t| !t))
                    });
                    if let Some(extent) = buddy.take(order) {
                        let range = extent.block()..extent.block() + (1 << order);
                        prop_assert!(extent.block().is_multiple_of(1 << order));
                        prop_assert!(range.end <= blocks);
                        for block in range {
                            prop_assert!(!core::mem::replace(&mut taken[block], true));
                        }
                        held.push(extent);
                    }
                } else if !held.is_empty() {
                    let extent = held.swap_remove(which.index(held.len()));
                    taken[extent.block()..extent.block() + (1 << extent.order)].fill(false);
                    buddy.give(extent);
                }
            }
            held.into_iter().for_each(|extent| buddy.give(extent));
            for _ in 0..blocks / 32 {
                prop_assert!(buddy.take(MAX_ORDER).is_some(), "all joined again");
            }
        }
    }

    #[test]
    fn the_smallest_chunk_that_holds_a_transfer_is_chosen() {
        let orders: Vec<_> = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33].map(order_of).into();
        let expected = [None, Some(0), Some(1), Some(2), Some(2), Some(3), Some(3)];
        assert_eq!(orders[..7], expected);
        assert_eq!(orders[7..], [Some(4), Some(4), Some(5), Some(5), None]);
    }
}
