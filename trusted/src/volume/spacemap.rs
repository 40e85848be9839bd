//! The space map on the host: one bitmap page per region, under a tree of fixed shape.
//!
//! Every page and node has two slots in fixed places; a checkpoint writes the slot that the
//! durable parent does not name, up to the root in the superblock. So nothing is allocated for
//! the map itself, and the durable map stays whole while the next one is written.
//!
//! A pointer of this tree has no place; its word holds the free blocks below (32 bits), the slot
//! (bit 39), and for pages the region's high-water mark (24 bits from bit 40). A null pointer:
//! nothing below was ever given out.

use alloc::{boxed::Box, collections::BTreeMap, sync::Arc, vec::Vec};
use futures_util::{StreamExt, stream::FuturesUnordered};

use super::{
    Volume,
    cache::Node,
    crypto::{Kind, aad},
    layout::{
        FANOUT, FANOUT_BITS, Geometry, PLACE_BITS, Ptr, REGION, SPACE_SLOTS_0, child, get64, put64,
        slot_in_parent,
    },
    places::Places,
    read::PIECES,
    space::{Bitmap, Want, fresh},
    tree::Bad,
};
use crate::{
    disk::{BLOCK, Block, Disk, Transfer},
    errno::Errno,
};

/// Level of the root; pages have level 0.
const ROOT: u32 = 3;
const SLOT_BIT: u32 = 39;
/// Times the host may fail on a page before its region is given up.
const HOST_FAILURES: u32 = 3;

/// What a checkpoint made of the space map.
pub(crate) struct SpaceUpdate {
    pub(crate) changed: BTreeMap<u64, Option<Box<Bitmap>>>,
    pub(crate) root: Ptr,
    pub(crate) free: u64,
}

/// Place of a slot of the space map.
pub(crate) fn place(level: u32, index: u64, slot: u64) -> u64 {
    let region = index << (FANOUT_BITS * level);
    let base = if region == 0 { SPACE_SLOTS_0 } else { region * REGION };
    base + u64::from(level) * 2 + slot
}

fn slot(ptr: &Ptr) -> u64 {
    ptr.word >> SLOT_BIT & 1
}

/// Free blocks below a pointer of the tree.
fn free(geometry: &Geometry, ptr: &Ptr, level: u32, index: u64) -> u64 {
    if !ptr.is_null() {
        return ptr.word & 0xffff_ffff;
    }
    let shift = FANOUT_BITS * level;
    let end = ((index + 1) << shift).min(geometry.regions());
    ((index << shift)..end).map(|region| geometry.general_in(region)).sum()
}

/// Free blocks of the whole map under `root`.
pub(crate) fn total_free(geometry: &Geometry, root: &Ptr) -> u64 {
    free(geometry, root, ROOT, 0)
}

fn bitmap(geometry: &Geometry, region: u64, block: &Block) -> Box<Bitmap> {
    // Whatever the page says, places of the format itself are never free.
    let mut map = fresh(geometry, region);
    map.iter_mut().enumerate().for_each(|(i, word)| *word |= get64(block, i * 8));
    map
}

impl Volume {
    async fn space_node<D: Disk>(
        &self,
        disk: &D,
        ptr: &Ptr,
        level: u32,
        index: u64,
    ) -> Result<Node, Bad> {
        if let Some(node) = self.core.lock().cache.get(ptr) {
            return Ok(node.clone());
        }
        let at = place(level, index, slot(ptr));
        let node: Node =
            Arc::from(self.read_sealed(disk, at, ptr, Kind::Space, level, index).await?);
        self.core.lock().cache.insert(ptr, level, node.clone());
        Ok(node)
    }

    /// The pointer to the node of `level` with `index` under `root`.
    async fn space_ptr<D: Disk>(
        &self,
        disk: &D,
        root: Ptr,
        level: u32,
        index: u64,
    ) -> Result<Ptr, Bad> {
        let mut ptr = root;
        for above in (level + 1..=ROOT).rev() {
            if ptr.is_null() {
                break;
            }
            let shift = FANOUT_BITS * (above - level);
            let node = self.space_node(disk, &ptr, above, index >> shift).await?;
            ptr = child(&node, slot_in_parent(index >> (shift - FANOUT_BITS)));
        }
        Ok(ptr)
    }

    pub(crate) async fn page<D: Disk>(
        &self,
        disk: &D,
        root: Ptr,
        region: u64,
    ) -> Result<(Ptr, Box<Bitmap>), Bad> {
        let ptr = self.space_ptr(disk, root, 0, region).await?;
        if ptr.is_null() {
            return Ok((ptr, fresh(&self.geometry, region)));
        }
        let at = place(0, region, slot(&ptr));
        let block = self.read_sealed(disk, at, &ptr, Kind::Space, 0, region).await?;
        Ok((ptr, bitmap(&self.geometry, region, &block)))
    }

    /// Brings a page of the space map into memory. `false`: no page has anything free.
    pub(crate) async fn bring_in<D: Disk>(&self, disk: &D, want: Want) -> Result<bool, Bad> {
        match want {
            Want::Page(region) => {
                self.load_region(disk, region).await?;
                Ok(true)
            }
            Want::More => {
                let regions = self.core.lock().space.regions();
                for region in 0..regions {
                    if self.core.lock().space.is_loaded(region) {
                        continue;
                    }
                    let root = self.core.lock().space.root;
                    let ptr = self.space_ptr(disk, root, 0, region).await.unwrap_or(Ptr::NULL);
                    if free(&self.geometry, &ptr, 0, region) > 0 {
                        self.load_region(disk, region).await?;
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    /// A page that is forged, or that the host fails to read again and again, makes its region
    /// unallocatable for this session.
    pub(crate) async fn load_region<D: Disk>(&self, disk: &D, region: u64) -> Result<(), Bad> {
        loop {
            let (root, version) = {
                let core = self.core.lock();
                (core.space.root, core.space.version)
            };
            let page = self.page(disk, root, region).await;
            let mut core = self.core.lock();
            if core.space.is_loaded(region) {
                return Ok(());
            }
            if core.space.version != version {
                continue;
            }
            match page {
                Ok((_, map)) => core.space.load(region, map),
                Err(bad @ Bad::Host(_)) if core.space.fails(region) <= HOST_FAILURES => {
                    return Err(bad);
                }
                Err(_) => {
                    core.space.bad.insert(region);
                    core.space.load(region, Box::new([u64::MAX; (REGION / 64) as usize]));
                }
            }
            return Ok(());
        }
    }

    /// Writes the pages that `allocs` and `frees` change, and their ancestors.
    pub(crate) async fn update_space<D: Disk>(
        &self,
        disk: &D,
        allocs: Places,
        frees: Places,
    ) -> Result<SpaceUpdate, Errno> {
        self.reshape_space(disk, allocs, frees, None).await
    }

    /// As [`Self::update_space`], after a change of the host file's length from `reshaped` blocks
    /// to what the geometry says: the last region that both have gets its new shape, what lay
    /// behind it is forgotten.
    pub(crate) async fn reshape_space<D: Disk>(
        &self,
        disk: &D,
        allocs: Places,
        mut frees: Places,
        reshaped: Option<u64>,
    ) -> Result<SpaceUpdate, Errno> {
        let last = reshaped.map(|old| (old.min(self.geometry.host_blocks) - 1) / REGION);
        let mut forced = last;
        let (root, renewing) = {
            let core = self.core.lock();
            (core.space.root, core.renewing)
        };
        // A pointer may name any place; the map has bits only for those that are given out.
        frees.retain(|place| self.geometry.is_general(place));
        let old_pages = if renewing { self.old_pages(disk, root).await? } else { Vec::new() };
        let mut changed = BTreeMap::new();
        let mut updates: Vec<(u64, Ptr)> = Vec::new();
        let mut batch = Vec::new();
        let (mut next, mut old_pages) = (0, old_pages.into_iter().peekable());
        while let Some(region) = [allocs.next_region(next), frees.next_region(next)]
            .into_iter()
            .chain([old_pages.peek().copied(), forced])
            .flatten()
            .min()
        {
            next = region + 1;
            forced = forced.filter(|last| *last != region);
            old_pages.next_if_eq(&region);
            let (mine_a, mine_f) = (allocs.of(region), frees.of(region));
            let (held, keep, bad) = {
                let space = &self.core.lock().space;
                let keep = space.is_loaded(region) || space.is_touched(region);
                (space.durable(region), keep, space.bad.contains(&region))
            };
            if bad {
                // What is freed there leaks until the map is rebuilt; nothing is given out.
                continue;
            }
            let (old, mut map) = match held {
                Some(map) => {
                    let old = self.space_ptr(disk, root, 0, region).await;
                    (old.map_err(Bad::errno)?, map)
                }
                None => match self.page(disk, root, region).await {
                    Ok(page) => page,
                    // Its key is about to go: a page that reads next time must not be lost.
                    Err(bad @ Bad::Host(_)) if renewing => return Err(bad.errno()),
                    Err(_) => continue,
                },
            };
            if let Some(old) = reshaped
                && last == Some(region)
            {
                grown(&mut map, &self.geometry, region, old);
            }
            let consistent = change(&mut map, mine_f, false) & change(&mut map, mine_a, true);
            debug_assert!(
                consistent || contradicts_on_purpose(),
                "a block is freed or given out twice in region {region}"
            );
            if !consistent {
                return Err(Errno::EIO);
            }
            let mut block = Box::new([0; BLOCK]);
            map.iter().enumerate().for_each(|(i, word)| put64(&mut block[..], i * 8, *word));
            let left = map.iter().map(|word| u64::from(word.count_zeros())).sum();
            let top = mine_a.iter().max().map_or(0, |p| u64::from(*p) + 1);
            let top = top.max(u64::from(old.birth()));
            changed.insert(region, keep.then_some(map));
            batch.push((region, old, block, left, top));
            if batch.len() == PIECES {
                self.write_space(disk, 0, &mut batch, &mut updates).await?;
            }
        }
        self.write_space(disk, 0, &mut batch, &mut updates).await?;
        for level in 1..=ROOT {
            let below = core::mem::take(&mut updates);
            let mut below = &below[..];
            while let Some((first, _)) = below.first() {
                let index = first >> FANOUT_BITS;
                let (mine, rest) =
                    below.split_at(below.partition_point(|(i, _)| i >> FANOUT_BITS == index));
                below = rest;
                let old = self.space_ptr(disk, root, level, index).await.map_err(Bad::errno)?;
                let mut block = Box::new([0; BLOCK]);
                if !old.is_null() {
                    let node = self.space_node(disk, &old, level, index).await;
                    *block = *node.map_err(Bad::errno)?;
                }
                for (i, ptr) in mine {
                    ptr.encode(&mut block[..], slot_in_parent(*i) * Ptr::BYTES);
                }
                if let Some(last) = last.map(|last| last >> (FANOUT_BITS * (level - 1)))
                    && last >> FANOUT_BITS == index
                {
                    block[(slot_in_parent(last) + 1) * Ptr::BYTES..].fill(0);
                }
                let left = (0..FANOUT)
                    .map(|i| {
                        let below = child(&block, i as usize);
                        free(&self.geometry, &below, level - 1, index << FANOUT_BITS | i)
                    })
                    .sum();
                batch.push((index, old, block, left, 0));
                if batch.len() == PIECES {
                    self.write_space(disk, level, &mut batch, &mut updates).await?;
                }
            }
            self.write_space(disk, level, &mut batch, &mut updates).await?;
        }
        let root = updates.first().map_or(root, |(_, ptr)| *ptr);
        Ok(SpaceUpdate { changed, root, free: total_free(&self.geometry, &root) })
    }

    /// The regions whose pages only a retiring volume key opens.
    async fn old_pages<D: Disk>(&self, disk: &D, root: Ptr) -> Result<Vec<u64>, Errno> {
        let mut old = Vec::new();
        for region in 0..self.geometry.regions() {
            let ptr = self.space_ptr(disk, root, 0, region).await.map_err(Bad::errno)?;
            if !ptr.is_null() && self.is_old(disk, &ptr).await.map_err(Bad::errno)? {
                old.push(region);
            }
        }
        Ok(old)
    }

    /// Seals and writes a batch of (index, old pointer, content, free blocks, high-water mark).
    async fn write_space<D: Disk>(
        &self,
        disk: &D,
        level: u32,
        batch: &mut Vec<(u64, Ptr, Box<Block>, u64, u64)>,
        updates: &mut Vec<(u64, Ptr)>,
    ) -> Result<(), Errno> {
        let mut going = FuturesUnordered::new();
        for (index, old, block, left, top) in batch.drain(..) {
            going.push(async move {
                let (order, key) = {
                    let mut core = self.core.lock();
                    core.counters.map_blocks += 1;
                    (core.orders(1)?, core.key.clone())
                };
                let mut sealed = *block;
                let aad = aad(Kind::Space, level as u8, index);
                let tag = key.seal(Kind::Space, order, &aad, &mut sealed);
                let new = if old.is_null() { 0 } else { 1 - slot(&old) };
                let word = left | new << SLOT_BIT | top << PLACE_BITS;
                self.put_block(disk, place(level, index, new), &sealed).await?;
                Ok((index, Ptr { word, order, tag }, block))
            });
        }
        let mut failed = None;
        while let Some(done) = going.next().await {
            match done {
                Ok((index, ptr, block)) => {
                    if level > 0 {
                        self.core.lock().cache.insert(&ptr, level, Arc::from(block));
                    }
                    updates.push((index, ptr));
                }
                Err(errno) => failed = Some(errno),
            }
        }
        updates.sort_unstable_by_key(|(index, _)| *index);
        failed.map_or(Ok(()), Err)
    }

    /// Writes one sealed block to its fixed place; the same bytes there once more if the host
    /// fails.
    pub(crate) async fn put_block<D: Disk>(
        &self,
        disk: &D,
        place: u64,
        sealed: &Block,
    ) -> Result<(), Errno> {
        let mut transfer = disk.transfer(1).await.map_err(super::error::guest_errno)?;
        transfer.put(0, sealed);
        if transfer.write(place, 1).await.is_ok() {
            return Ok(());
        }
        transfer.write(place, 1).await.map_err(super::error::guest_errno)
    }
}

/// Frees the places of `region` that were behind the end of the host file when it had
/// `old_blocks`.
fn grown(map: &mut Bitmap, geometry: &Geometry, region: u64, old_blocks: u64) {
    let fresh = fresh(geometry, region);
    for (n, (word, fresh)) in (0..).zip(map.iter_mut().zip(fresh.iter())) {
        let first = region * REGION + n * 64;
        let old = old_blocks.saturating_sub(first).min(64);
        // Bits that the old file had stay as they are.
        let kept = if old == 64 { u64::MAX } else { (1 << old) - 1 };
        *word = *word & kept | fresh & !kept;
    }
}

/// A fuzz target has sealed structures that contradict each other.
#[cfg(any(test, feature = "fuzzing"))]
fn contradicts_on_purpose() -> bool {
    super::fuzz::is_forged()
}

#[cfg(not(any(test, feature = "fuzzing")))]
const fn contradicts_on_purpose() -> bool {
    false
}

/// Sets or clears the bits of `places`; `false` if one was so already.
fn change(map: &mut Bitmap, places: &[u16], used: bool) -> bool {
    let mut changed = true;
    for place in places {
        let word = &mut map[usize::from(place / 64)];
        let mask = 1 << (place % 64);
        changed &= (*word & mask != 0) != used;
        if used {
            *word |= mask;
        } else {
            *word &= !mask;
        }
    }
    changed
}
