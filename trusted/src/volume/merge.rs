//! Merging an interval into the map, bottom up, level by level.
//!
//! Each touched leaf is read once; the higher order wins against what the leaf holds. A leaf that
//! cannot be read does not wedge the volume: its changes are carried over to the next interval
//! and the rest goes on.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use futures_util::{
    StreamExt,
    stream::{FuturesOrdered, FuturesUnordered},
};

use super::{
    Volume,
    checkpoint::Merged,
    core::Map,
    crypto::{Kind, aad},
    delta::{Delta, Zero},
    jblock::Record,
    layout::{FANOUT, FANOUT_BITS, Ptr, child, slot_in_parent},
    read::PIECE,
    space::Run,
    tree::{Bad, Miss},
};
use crate::{
    disk::{BLOCK, Block, Disk, Transfer},
    errno::Errno,
    volume::error::guest_errno,
};

/// Leaves read and written in one go.
const BATCH: usize = 64;

/// A node to be written: index in its level, the pointer it replaces, its content.
pub(crate) type Changed = (u64, Ptr, Box<Block>);

/// Leaves that a delta touches, in order.
struct Leaves<'a> {
    frozen: &'a Delta,
    /// Leaves under zero ranges: disjoint, ascending, inclusive.
    zeroed: Vec<(u64, u64)>,
    next: u64,
    /// What lies before it under zero ranges has been looked for.
    looked: u64,
}

/// What a zero range meets in the map.
pub(crate) enum Met {
    /// No leaf.
    Nothing,
    /// This leaf.
    Leaf(u64),
    /// A node that cannot be read, over these leaves (inclusive).
    Unreadable(u64, u64),
}

impl<'a> Leaves<'a> {
    fn new(frozen: &'a Delta) -> Self {
        let mut ranges: Vec<_> = frozen
            .zeroes
            .iter()
            .filter(|z| z.first < z.end)
            .map(|z| (z.first / FANOUT, (z.end - 1) / FANOUT))
            .collect();
        ranges.sort_unstable();
        let mut zeroed: Vec<(u64, u64)> = Vec::new();
        for (first, last) in ranges {
            match zeroed.last_mut() {
                Some(before) if first <= before.1 => before.1 = before.1.max(last),
                _ => zeroed.push((first, last)),
            }
        }
        Self { frozen, zeroed, next: 0, looked: 0 }
    }
}

impl Volume {
    /// Writes the map with `frozen` merged into `map`: nodes of birth number `birth`, beside
    /// snapshots up to `newest`.
    pub(crate) async fn merge<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        frozen: &Delta,
        birth: u32,
        newest: u32,
    ) -> Result<Merged, Errno> {
        let mut merged = Merged::new(map.root, birth, newest);
        let mut updates: Vec<(u64, Ptr)> = Vec::new();
        let mut leaves = Leaves::new(frozen);
        loop {
            let mut batch = Vec::with_capacity(BATCH);
            while batch.len() < BATCH
                && let Some(leaf) = self.next_leaf(disk, map, &mut leaves, &mut merged).await
            {
                batch.push(leaf);
            }
            if batch.is_empty() {
                break;
            }
            self.merge_leaves(disk, map, frozen, &batch, &mut merged, &mut updates).await?;
        }
        for level in 1..map.levels {
            updates = self.merge_level(disk, map, level, &updates, &mut merged).await?;
        }
        if let Some((_, root)) = updates.first() {
            merged.root = *root;
        }
        Ok(merged)
    }

    /// The next leaf that has records, or that exists under a zero range. What a zero range does
    /// under a node that cannot be read is carried over as a whole: it may be most of the volume.
    async fn next_leaf<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        leaves: &mut Leaves<'_>,
        merged: &mut Merged,
    ) -> Option<u64> {
        let from = leaves.next;
        let by_map =
            leaves.frozen.maps.range(from * FANOUT..u64::MAX).next().map(|(b, _)| b / FANOUT);
        let mut by_zero = None;
        'ranges: for (first, last) in &leaves.zeroed {
            let last = by_map.map_or(*last, |leaf| leaf.min(*last));
            loop {
                let first = from.max(leaves.looked).max(*first);
                match self.existing_leaf(disk, map, first, last).await {
                    Met::Nothing => break,
                    Met::Leaf(leaf) => {
                        by_zero = Some(leaf);
                        break 'ranges;
                    }
                    Met::Unreadable(first, last) => {
                        carry_zeroes(leaves.frozen, first, last, merged);
                        leaves.looked = last + 1;
                    }
                }
            }
        }
        let leaf = match (by_map, by_zero) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        leaves.next = leaf + 1;
        Some(leaf)
    }

    /// The first leaf, or node that cannot be read, that the map has in `from..=last`.
    pub(crate) async fn existing_leaf<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        from: u64,
        last: u64,
    ) -> Met {
        let mut leaf = from;
        'next: while leaf <= last {
            let mut ptr = map.root;
            for level in (0..map.levels).rev() {
                let shift = FANOUT_BITS * level;
                if ptr.is_null() {
                    leaf = ((leaf >> shift) + 1) << shift;
                    continue 'next;
                }
                if level == 0 {
                    return Met::Leaf(leaf);
                }
                let miss = Miss { ptr, level, index: leaf >> shift };
                match self.node(disk, &miss).await {
                    Ok(node) => ptr = child(&node, slot_in_parent(leaf >> (shift - FANOUT_BITS))),
                    Err(_) => {
                        let end = ((leaf >> shift) + 1) << shift;
                        return Met::Unreadable(leaf, last.min(end - 1));
                    }
                }
            }
        }
        Met::Nothing
    }

    pub(crate) async fn leaf<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        leaf: u64,
    ) -> Result<Changed, Bad> {
        let ptr = self.descend(disk, map.root, map.levels, 0, leaf).await?;
        let mut content = Box::new([0; BLOCK]);
        if !ptr.is_null() {
            *content = *self.node(disk, &Miss { ptr, level: 0, index: leaf }).await?;
        }
        Ok((leaf, ptr, content))
    }

    async fn merge_leaves<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        frozen: &Delta,
        batch: &[u64],
        merged: &mut Merged,
        updates: &mut Vec<(u64, Ptr)>,
    ) -> Result<(), Errno> {
        let mut reading = FuturesOrdered::new();
        for leaf in batch {
            reading.push_back(self.leaf(disk, map, *leaf));
        }
        let (mut changed, mut at) = (Vec::new(), batch.iter());
        while let (Some(read), Some(leaf)) = (reading.next().await, at.next()) {
            match read {
                Ok((leaf, old, mut content)) => {
                    if apply(frozen, leaf, &mut content, merged) {
                        changed.push((leaf, old, content));
                    }
                }
                Err(_) => carry(frozen, *leaf, merged),
            }
        }
        self.write_nodes(disk, 0, changed, merged, updates).await
    }

    async fn merge_level<D: Disk>(
        &self,
        disk: &D,
        map: &Map,
        level: u32,
        below: &[(u64, Ptr)],
        merged: &mut Merged,
    ) -> Result<Vec<(u64, Ptr)>, Errno> {
        let (mut updates, mut rest) = (Vec::new(), below);
        while !rest.is_empty() {
            let mut changed = Vec::new();
            while changed.len() < BATCH
                && let Some((first, _)) = rest.first()
            {
                let index = first >> FANOUT_BITS;
                let (mine, next) =
                    rest.split_at(rest.partition_point(|(i, _)| i >> FANOUT_BITS == index));
                rest = next;
                let old = self.descend(disk, map.root, map.levels, level, index).await;
                let old = old.map_err(Bad::errno)?;
                let mut content = Box::new([0; BLOCK]);
                if !old.is_null() {
                    let node = self.node(disk, &Miss { ptr: old, level, index }).await;
                    *content = *node.map_err(Bad::errno)?;
                }
                for (i, ptr) in mine {
                    ptr.encode(&mut content[..], slot_in_parent(*i) * Ptr::BYTES);
                }
                changed.push((index, old, content));
            }
            self.write_nodes(disk, level, changed, merged, &mut updates).await?;
        }
        Ok(updates)
    }

    /// Writes nodes side by side where there is room; a node without children is not written,
    /// its parent's pointer becomes null.
    pub(crate) async fn write_nodes<D: Disk>(
        &self,
        disk: &D,
        level: u32,
        changed: Vec<Changed>,
        merged: &mut Merged,
        updates: &mut Vec<(u64, Ptr)>,
    ) -> Result<(), Errno> {
        let before = updates.len();
        let mut writing = Vec::with_capacity(changed.len());
        for (index, old, content) in changed {
            if !old.is_null() {
                merged.release(&old);
            }
            if content.iter().all(|byte| *byte == 0) {
                updates.push((index, Ptr::NULL));
            } else {
                writing.push((index, content));
            }
        }
        let mut going = FuturesUnordered::new();
        let (mut rest, mut failed) = (&writing[..], None);
        while !rest.is_empty() && failed.is_none() {
            match self.node_run(disk, rest.len().min(PIECE) as u64).await {
                Ok(run) => {
                    let (mine, next) = rest.split_at((run.count as usize).min(rest.len()));
                    rest = next;
                    going.push(self.write_node_run(disk, level, merged.birth, run, mine));
                }
                Err(errno) => failed = Some(errno),
            }
        }
        // Every write that was begun is waited for.
        while let Some(done) = going.next().await {
            match done {
                Ok(written) => {
                    merged.allocs.extend(written.iter().map(|(_, ptr)| ptr.place()));
                    updates.extend(written);
                }
                Err(errno) => failed = Some(errno),
            }
        }
        // Batches come in ascending order: those before need no sorting again.
        updates[before..].sort_unstable_by_key(|(index, _)| *index);
        failed.map_or(Ok(()), Err)
    }

    async fn write_node_run<D: Disk>(
        &self,
        disk: &D,
        level: u32,
        birth: u32,
        run: Run,
        nodes: &[(u64, Box<Block>)],
    ) -> Result<Vec<(u64, Ptr)>, Errno> {
        let mut transfer = disk.transfer(nodes.len()).await.map_err(guest_errno)?;
        let (first, key) = {
            let mut core = self.core.lock();
            core.counters.map_blocks += nodes.len() as u64;
            (core.orders(nodes.len() as u64)?, core.key.clone())
        };
        let mut written = Vec::with_capacity(nodes.len());
        for (n, (index, content)) in (0..).zip(nodes) {
            let mut sealed = **content;
            let order = first.plus(n);
            let tag =
                key.seal(Kind::Node, order, &aad(Kind::Node, level as u8, *index), &mut sealed);
            transfer.put(n as usize, &sealed);
            written.push((*index, Ptr::new(run.place + n, birth, order, tag)));
        }
        if transfer.write(run.place, nodes.len()).await.is_err() {
            // The same bytes at another place, once; the old one rests until the next checkpoint.
            let run = self.node_run(disk, nodes.len() as u64).await?;
            if run.count < nodes.len() as u64 {
                return Err(Errno::EIO);
            }
            transfer.write(run.place, nodes.len()).await.map_err(guest_errno)?;
            for (n, (_, ptr)) in (0..).zip(&mut written) {
                *ptr = Ptr::new(run.place + n, birth, ptr.order, ptr.tag);
            }
        }
        let mut core = self.core.lock();
        for ((_, ptr), (_, content)) in written.iter().zip(nodes) {
            core.cache.insert(ptr, level, Arc::new(**content));
        }
        Ok(written)
    }
}

/// Zero ranges that touch a leaf.
fn zeroes(frozen: &Delta, leaf: u64) -> Vec<Zero> {
    let (first, end) = (leaf * FANOUT, (leaf + 1) * FANOUT);
    frozen.zeroes.iter().filter(|z| z.first < end && z.end > first).copied().collect()
}

/// Merges the delta into a leaf. Returns whether the leaf changed.
fn apply(frozen: &Delta, leaf: u64, content: &mut Block, merged: &mut Merged) -> bool {
    let base = leaf * FANOUT;
    let zeroes = zeroes(frozen, leaf);
    let zeroed = |block: u64| {
        zeroes.iter().filter(|z| (z.first..z.end).contains(&block)).map(|z| z.order).max()
    };
    let mut changed = false;
    if !zeroes.is_empty() {
        for slot in 0..FANOUT as usize {
            let old = child(content, slot);
            if !old.is_null() && zeroed(base + slot as u64).is_some_and(|zero| zero > old.order) {
                merged.release(&old);
                Ptr::NULL.encode(content, slot * Ptr::BYTES);
                changed = true;
            }
        }
    }
    for (block, ptr) in frozen.maps.range(base..base + FANOUT) {
        let slot = slot_in_parent(block);
        let old = child(content, slot);
        if ptr.order > old.order && zeroed(block).is_none_or(|zero| zero < ptr.order) {
            if !old.is_null() {
                merged.release(&old);
            }
            merged.allocs.push(ptr.place());
            ptr.encode(content, slot * Ptr::BYTES);
            changed = true;
        }
    }
    changed
}

/// Keeps the changes of a leaf that cannot be read for the next interval.
fn carry(frozen: &Delta, leaf: u64, merged: &mut Merged) {
    let base = leaf * FANOUT;
    for (block, ptr) in frozen.maps.range(base..base + FANOUT) {
        merged.carried.push(Record::Map { block, ptr, carried: true });
    }
    carry_zeroes(frozen, leaf, leaf, merged);
}

/// Keeps the zero ranges over leaves `first..=last` for the next interval.
fn carry_zeroes(frozen: &Delta, first: u64, last: u64, merged: &mut Merged) {
    let (base, limit) = (first * FANOUT, (last + 1) * FANOUT);
    for zero in frozen.zeroes.iter().filter(|z| z.first < limit && z.end > base) {
        let first = zero.first.max(base);
        let count = zero.end.min(limit) - first;
        merged.carried.push(Record::Zero { first, count, order: zero.order });
    }
}
