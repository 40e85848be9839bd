//! Reading everything: what of the volume is damaged.
//!
//! Holds: nothing is written; each damaged block is named, and no other.

use alloc::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use super::{
    Volume,
    crypto::Kind,
    layout::{BLOCK_BYTES, FANOUT, Geometry, Ptr, REGION, child},
    merge::Met,
    records::Records,
    space::{Bitmap, fresh},
    tree::{Bad, Miss},
};
use crate::{
    disk::{Disk, HostError},
    platform::Memory,
};

/// Blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Byte of the guest's file where it begins.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What the host said; `None`: the bytes are not those that were written.
    pub host: Option<HostError>,
}

/// What [`Volume::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Blocks of the guest's file that hold data and are intact.
    pub intact: u64,
    /// Blocks that were never written.
    pub holes: u64,
    /// What is not intact, ascending.
    pub damaged: Vec<Damage>,
}

/// What [`Volume::verify_space`] found, in blocks of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Called free although something lies there: writing would destroy it.
    pub unprotected: u64,
    /// Used by two things in one tree.
    pub twice: u64,
    /// Called in use, and used by nothing.
    pub leaked: u64,
    /// Nodes and pages that cannot be read; what only they reach counts as leaked.
    pub unreadable: u64,
}

impl SpaceReport {
    /// Whether the space map names exactly what is in use, each block once.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        *self == Self::default()
    }
}

/// Places that something uses, by region.
struct Reached {
    geometry: Geometry,
    regions: BTreeMap<u64, Box<Bitmap>>,
}

impl Reached {
    const fn new(geometry: Geometry) -> Self {
        Self { geometry, regions: BTreeMap::new() }
    }

    /// `false` if it was used already, or nothing can lie there.
    fn claim(&mut self, place: u64) -> bool {
        if !self.geometry.is_general(place) {
            return false;
        }
        let bits = self.regions.entry(place / REGION);
        let bits = bits.or_insert_with(|| Box::new([0; (REGION / 64) as usize]));
        let (word, mask) = (&mut bits[(place % REGION / 64) as usize], 1 << (place % 64));
        let first = *word & mask == 0;
        *word |= mask;
        first
    }

    fn absorb(&mut self, other: Self) {
        for (region, bits) in other.regions {
            let mine = self.regions.entry(region);
            let mine = mine.or_insert_with(|| Box::new([0; (REGION / 64) as usize]));
            mine.iter_mut().zip(bits.iter()).for_each(|(mine, bits)| *mine |= bits);
        }
    }
}

impl Volume {
    /// Reads and authenticates every block of the guest's file, and the map above it.
    /// `progress(done, all)` is called in bytes of the file now and then.
    pub async fn verify<D: Disk>(
        &self,
        disk: &D,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> VerifyReport {
        let mut report = VerifyReport::default();
        let size = self.size();
        let blocks = size.div_ceil(BLOCK_BYTES);
        let mut next = 0;
        while next < blocks {
            progress(next * BLOCK_BYTES, size);
            let found = self.next_written(disk, next / FANOUT, (blocks - 1) / FANOUT).await;
            let first = found.map_or(blocks, |leaf| (leaf * FANOUT).max(next));
            report.holes += first - next;
            next = first.saturating_add(FANOUT).min(blocks);
            if first < next {
                self.verify_leaf(disk, first, next, &mut report).await;
            }
        }
        if let Some(last) = report.damaged.last_mut() {
            last.length = last.length.min(size - last.offset);
        }
        progress(size, size);
        report
    }

    /// The first leaf in `from..=last` that may have data.
    async fn next_written<D: Disk>(&self, disk: &D, from: u64, last: u64) -> Option<u64> {
        let (map, changed) = {
            let core = self.core.lock();
            let changed = |maps: &Records| {
                maps.range(from * FANOUT..(last + 1) * FANOUT).next().map(|(b, _)| b / FANOUT)
            };
            let frozen = core.frozen.as_ref().and_then(|frozen| changed(&frozen.maps));
            (core.map, changed(&core.active.maps).into_iter().chain(frozen).min())
        };
        // Of a snapshot the map may have fewer leaves than the volume has now.
        let existing = match self.existing_leaf(disk, &map, from, last).await {
            Met::Nothing => None,
            Met::Leaf(leaf) | Met::Unreadable(leaf, _) => Some(leaf),
        };
        existing.into_iter().chain(changed).min()
    }

    /// Verifies blocks `first..end` of one leaf: in one go, and each by itself where that fails.
    async fn verify_leaf<D: Disk>(
        &self,
        disk: &D,
        first: u64,
        end: u64,
        report: &mut VerifyReport,
    ) {
        let offset = first * BLOCK_BYTES;
        let length = (end * BLOCK_BYTES).min(self.size()) - offset;
        let all = self.read(disk, offset, &Memory::new(vec![0; length as usize])).await;
        let whole = all == Ok(length as usize);
        for block in first..end {
            let bad = match self.resolve(disk, block).await {
                Ok(ptr) if ptr.is_null() => {
                    report.holes += 1;
                    continue;
                }
                Ok(_) if whole => None,
                Ok(ptr) => {
                    self.read_sealed(disk, ptr.place(), &ptr, Kind::Data, 0, block).await.err()
                }
                Err(bad) => Some(bad),
            };
            let Some(bad) = bad else {
                report.intact += 1;
                continue;
            };
            report.damage(block * BLOCK_BYTES, bad);
        }
    }

    /// Compares the space map with everything that map, snapshots and tables reach, as of the last
    /// checkpoint. Reads no data; needs memory for one bit for each block in use.
    pub async fn verify_space<D: Disk>(&self, disk: &D) -> SpaceReport {
        let mut report = SpaceReport::default();
        let (map, root) = {
            let core = self.core.lock();
            (core.map, core.space.root)
        };
        let mut all = self.reached_by(disk, map.root, map.levels, &mut report).await;
        let mut others = Vec::new();
        match self.table_of_snapshots(disk).await {
            Ok((snapshots, places)) => {
                others.extend(places);
                for snapshot in snapshots {
                    let tree =
                        self.reached_by(disk, snapshot.root, snapshot.levels, &mut report).await;
                    all.absorb(tree);
                }
            }
            Err(_) => report.unreadable += 1,
        }
        match self.table_places(disk).await {
            Ok(places) => others.extend(places),
            Err(_) => report.unreadable += 1,
        }
        for place in others {
            report.twice += u64::from(!all.claim(place));
        }
        for region in 0..self.geometry.regions() {
            let Ok((ptr, page)) = self.page(disk, root, region).await else {
                report.unreadable += 1;
                continue;
            };
            let reached = all.regions.get(&region);
            if ptr.is_null() && reached.is_none() {
                continue;
            }
            let fixed = fresh(&self.geometry, region);
            for (word, (page, fixed)) in page.iter().zip(fixed.iter()).enumerate() {
                let (used, reached) = (page & !fixed, reached.map_or(0, |bits| bits[word]));
                report.leaked += u64::from((used & !reached).count_ones());
                report.unprotected += u64::from((reached & !used).count_ones());
            }
        }
        report
    }

    /// What the tree under `root` reaches.
    async fn reached_by<D: Disk>(
        &self,
        disk: &D,
        root: Ptr,
        levels: u32,
        report: &mut SpaceReport,
    ) -> Reached {
        let mut reached = Reached::new(self.geometry);
        let mut open = Vec::from([(root, levels, 0)]);
        while let Some((ptr, below, index)) = open.pop() {
            if ptr.is_null() {
                continue;
            }
            report.twice += u64::from(!reached.claim(ptr.place()));
            let Some(level) = below.checked_sub(1) else { continue };
            let Ok(node) = self.node(disk, &Miss { ptr, level, index }).await else {
                report.unreadable += 1;
                continue;
            };
            for slot in 0..FANOUT {
                open.push((child(&node, slot as usize), level, index * FANOUT + slot));
            }
        }
        reached
    }
}

impl VerifyReport {
    fn damage(&mut self, offset: u64, bad: Bad) {
        let host = match bad {
            Bad::Host(error) => Some(error),
            Bad::Forged => None,
        };
        match self.damaged.last_mut() {
            Some(last) if last.offset + last.length == offset && last.host == host => {
                last.length += BLOCK_BYTES;
            }
            _ => self.damaged.push(Damage { offset, length: BLOCK_BYTES, host }),
        }
    }
}
