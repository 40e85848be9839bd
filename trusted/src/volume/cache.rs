//! Nodes of the map (and inner nodes of the space map) that were read and authenticated.
//!
//! Holds: an entry is found only under the whole pointer it was read through (place, order), so a
//! place that was given to another block never answers for its old node. Nodes never change. At
//! most [`BYTES`] of nodes are kept, or what [`NodeCache::limit`] says.

use alloc::{sync::Arc, vec::Vec};

use super::layout::{Order, Ptr};
use crate::disk::{BLOCK, Block};

const WAYS: usize = 8;
/// Nodes kept unless told otherwise: 64 MiB.
const BYTES: usize = 64 << 20;

/// A node in private memory.
pub(crate) type Node = Arc<Block>;

/// What an entry is found under.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    place: u64,
    order: Order,
}

impl Key {
    fn of(ptr: &Ptr) -> Self {
        if left_out!(CacheByPlace) {
            return Self { place: ptr.place(), order: Order(0) };
        }
        Self { place: ptr.place(), order: ptr.order }
    }
}

struct Entry {
    key: Key,
    level: u8,
    used: u32,
    node: Node,
}

/// A set-associative cache; upper levels are kept longer.
pub(crate) struct NodeCache {
    sets: Vec<Vec<Entry>>,
    clock: u32,
}

impl NodeCache {
    pub(crate) fn new() -> Self {
        let mut cache = Self { sets: Vec::new(), clock: 0 };
        cache.limit(BYTES);
        cache
    }

    /// Forgets everything, and keeps at most `bytes` of nodes from now on.
    pub(crate) fn limit(&mut self, bytes: usize) {
        let sets = (bytes / (WAYS * BLOCK)).max(1);
        self.sets = (0..sets).map(|_| Vec::new()).collect();
    }

    fn set(&self, key: Key) -> usize {
        let mixed = (key.place ^ key.order.0.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize % self.sets.len()
    }

    pub(crate) fn get(&mut self, ptr: &Ptr) -> Option<&Node> {
        let key = Key::of(ptr);
        self.clock = self.clock.wrapping_add(1);
        let clock = self.clock;
        let set = self.set(key);
        let set = &mut self.sets[set];
        let entry = set.iter_mut().find(|e| e.key == key)?;
        entry.used = clock;
        Some(&entry.node)
    }

    pub(crate) fn insert(&mut self, ptr: &Ptr, level: u32, node: Node) {
        let key = Key::of(ptr);
        let clock = self.clock;
        let set = self.set(key);
        let set = &mut self.sets[set];
        #[cfg(test)]
        if left_out!(CacheByPlace) && set.iter().any(|e| e.key == key) {
            return;
        }
        set.retain(|e| e.key != key);
        if set.len() == WAYS {
            // Of the lowest level present, the one not used for longest.
            let victim = (0..set.len())
                .max_by_key(|&i| (u8::MAX - set[i].level, clock.wrapping_sub(set[i].used)));
            if let Some(victim) = victim {
                set.swap_remove(victim);
            }
        }
        let level = level.min(255) as u8;
        set.push(Entry { key, level, used: clock, node });
    }
}
