//! Changes since a cut, in memory: what the next checkpoint will merge into the map.
//!
//! Holds: the entry of a block is the one with the highest order that was ever applied to it;
//! order of arrival plays no part.

use alloc::{collections::BTreeSet, vec::Vec};

use super::{
    layout::{Order, Ptr},
    records::Records,
};

/// Records of one interval after which a checkpoint is due, for memory's sake.
pub(crate) const CUT_RECORDS: usize = 520_000;
/// Records of both intervals together after which writers wait: about 33 MiB.
pub(crate) const MAX_RECORDS: usize = 700_000;
/// Zero ranges of one interval after which a checkpoint is due; twice that is the limit.
pub(crate) const CUT_ZEROES: usize = 512;

/// Blocks `first..end` became holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zero {
    pub(crate) first: u64,
    pub(crate) end: u64,
    pub(crate) order: Order,
}

/// One interval's changes.
#[derive(Default)]
pub(crate) struct Delta {
    pub(crate) maps: Records,
    pub(crate) zeroes: Vec<Zero>,
    /// Blocks whose entry is newer than what the map holds, whatever its order: their leaf could
    /// not be read when they should have been merged.
    pub(crate) carried: BTreeSet<u64>,
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.maps.is_empty() && self.zeroes.is_empty()
    }

    /// Leaves that its merge touches at most: for the admission of new writes.
    pub(crate) fn weight(&self) -> u64 {
        self.maps.len() as u64 + 2 * self.zeroes.len() as u64
    }

    /// Order of the newest zero range over `block`.
    pub(crate) fn zeroed(&self, block: u64) -> Option<Order> {
        self.zeroes.iter().filter(|z| (z.first..z.end).contains(&block)).map(|z| z.order).max()
    }

    /// The newest change of `block`: its order, and the pointer ([`Ptr::NULL`] for a hole).
    pub(crate) fn get(&self, block: u64) -> Option<(Order, Ptr)> {
        let map = self.maps.get(block).map(|ptr| (ptr.order, *ptr));
        if self.zeroes.is_empty() {
            return map;
        }
        match (map, self.zeroed(block)) {
            (Some((order, _)), Some(zero)) if zero > order => Some((zero, Ptr::NULL)),
            (None, Some(zero)) => Some((zero, Ptr::NULL)),
            _ => map,
        }
    }

    /// Applies a write; the higher order wins. Returns whether it did.
    pub(crate) fn insert(&mut self, block: u64, ptr: Ptr) -> bool {
        let entry = self.maps.entry(block, ptr);
        if entry.order > ptr.order {
            return false;
        }
        *entry = ptr;
        true
    }

    /// Applies everything of `older` that is not superseded here.
    pub(crate) fn absorb(&mut self, older: &Self) {
        for (block, ptr) in older.maps.iter() {
            self.insert(block, ptr);
        }
        self.zeroes.extend_from_slice(&older.zeroes);
        self.carried.extend(&older.carried);
    }
}

// With proptest, which does not build for an enclave.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Write(u64),
        Zero(u64, u64),
    }

    proptest! {
        /// Whatever order the changes arrive in, the one with the highest order is seen.
        #[test]
        fn the_highest_order_wins_whatever_arrives_first(
            steps in proptest::collection::vec(
                prop_oneof![(0_u64..8).prop_map(Step::Write), (0_u64..8, 1_u64..4).prop_map(|(a, n)| Step::Zero(a, n))],
                1..40,
            ).prop_shuffle(),
            shuffle in any::<u64>(),
        ) {
            let mut model = [None; 12];
            for (n, step) in steps.iter().enumerate() {
                match *step {
                    Step::Write(b) => model[b as usize] = Some((n, true)),
                    Step::Zero(a, len) => (a..a + len).for_each(|b| model[b as usize] = Some((n, false))),
                }
            }
            let mut arrival: Vec<usize> = (0..steps.len()).collect();
            arrival.sort_by_key(|n| (*n as u64 + 1).wrapping_mul(shuffle | 1));
            let mut delta = Delta::default();
            for n in arrival {
                let order = Order::new(1, n as u64 + 1);
                match steps[n] {
                    Step::Write(b) => { delta.insert(b, Ptr::new(n as u64 + 1, 0, order, [0; 16])); }
                    Step::Zero(first, len) => delta.zeroes.push(Zero { first, end: first + len, order }),
                }
            }
            for b in 0..12_u64 {
                let seen = delta.get(b).map(|(order, ptr)| (order.counter() as usize - 1, !ptr.is_null()));
                prop_assert_eq!(seen, model[b as usize]);
            }
        }
    }
}
