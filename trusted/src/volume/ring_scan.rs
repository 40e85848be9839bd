//! Reading the journal ring at open: the chain, and the evidence beside it.
//!
//! Every block of the ring is authenticated by itself, so that a block beyond a gap can still bear
//! witness: to the highest durable mark and to the newest superblock that was durable.

use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};
use futures_util::{StreamExt, stream::FuturesOrdered};

use super::{
    crypto::{EpochKey, Salt, Tag, VolumeKey},
    jblock::{self, Header, Record},
    layout::{Geometry, SEQ_END},
    superblock::Superblock,
};
use crate::disk::{BLOCK, Block, Disk, HostError, Transfer};

/// Host requests in flight.
const AHEAD: usize = 8;
/// Blocks of one host request.
const STEP: u64 = 32;

/// One authentic journal block.
pub(crate) struct Found {
    pub(crate) header: Header,
    pub(crate) tag: Tag,
    pub(crate) records: Vec<Record>,
    /// When the content was last changed, if it tells.
    pub(crate) modified: Option<i64>,
}

/// What the ring holds.
#[derive(Default)]
pub(crate) struct Scan {
    /// Blocks from the replay start on, in order.
    pub(crate) chain: Vec<Found>,
    /// Highest durable mark of any authentic block.
    pub(crate) durable: u64,
    /// Records up to this block are believed unread: whoever wrote them has put the volume away.
    pub(crate) believed: u64,
    /// Highest generation that any authentic block knew to be durable.
    pub(crate) generation: u64,
    /// Highest sequence number of any authentic block.
    pub(crate) highest: u64,
    /// Highest epoch of any authentic block.
    pub(crate) epoch: u32,
    /// The host failed on the place where the chain ends.
    pub(crate) broken: Option<(u64, HostError)>,
}

impl Scan {
    /// Last block of the chain.
    pub(crate) fn tip(&self, superblock: &Superblock) -> u64 {
        self.chain.last().map_or(superblock.replay_seq - 1, |found| found.header.seq)
    }

    /// Tag of the last block of the chain.
    pub(crate) fn tip_tag(&self, superblock: &Superblock) -> Tag {
        self.chain.last().map_or(superblock.replay_prev, |found| found.tag)
    }
}

async fn read_step<D: Disk>(
    disk: &D,
    place: u64,
    count: u64,
) -> (u64, u64, Result<D::Transfer, HostError>) {
    let read = async {
        let mut transfer = disk.transfer(count as usize).await?;
        transfer.read(place).await?;
        Ok(transfer)
    };
    (place, count, read.await)
}

/// What was read of the ring so far.
struct Reading<'a> {
    key: &'a VolumeKey,
    geometry: &'a Geometry,
    superblock: &'a Superblock,
    scan: Scan,
    blocks: BTreeMap<u64, Found>,
    failures: BTreeMap<u64, HostError>,
    keys: BTreeMap<(u32, Salt), Vec<EpochKey>>,
}

impl<'a> Reading<'a> {
    fn new(key: &'a VolumeKey, geometry: &'a Geometry, superblock: &'a Superblock) -> Self {
        let scan = Scan { durable: superblock.durable, ..Scan::default() };
        let (blocks, failures, keys) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { key, geometry, superblock, scan, blocks, failures, keys }
    }

    fn look(&mut self, block: &mut Block, place: u64) {
        let (key, superblock, geometry) = (self.key, self.superblock, self.geometry);
        if let Some(found) = authenticate(block, key, &mut self.keys, superblock, geometry, place) {
            let scan = &mut self.scan;
            scan.durable = scan.durable.max(found.header.durable);
            scan.generation = scan.generation.max(found.header.generation);
            scan.highest = scan.highest.max(found.header.seq);
            scan.epoch = scan.epoch.max(found.header.order.epoch());
            self.blocks.insert(found.header.seq, found);
        }
    }

    /// Reads places.
    async fn read<D: Disk>(&mut self, disk: &D, mut next: u64, end: u64) {
        let step = STEP.min(D::MAX_BLOCKS as u64);
        let mut going = FuturesOrdered::new();
        let mut block = Box::new([0; BLOCK]);
        loop {
            while next < end && going.len() < AHEAD {
                let count = (end - next).min(step);
                going.push_back(read_step(disk, next, count));
                next += count;
            }
            let Some((place, count, read)) = going.next().await else { return };
            match read {
                Ok(transfer) => {
                    for i in 0..count {
                        transfer.get(i as usize, &mut block);
                        self.look(&mut block, place + i);
                    }
                }
                // One bad block must not hide its neighbours.
                Err(_) => {
                    for at in place..place + count {
                        let (_, _, read) = read_step(disk, at, 1).await;
                        match read {
                            Ok(transfer) => {
                                transfer.get(0, &mut block);
                                self.look(&mut block, at);
                            }
                            Err(error) => drop(self.failures.insert(at, error)),
                        }
                    }
                }
            }
        }
    }

    /// Follows the chain.
    fn follow(mut self) -> Scan {
        let (mut seq, mut prev) = (self.superblock.replay_seq, self.superblock.replay_prev);
        while let Some(found) = self.blocks.remove(&seq) {
            if found.header.prev != prev {
                break;
            }
            (seq, prev) = (seq + 1, found.tag);
            self.scan.chain.push(found);
        }
        let place = self.geometry.ring_place(seq);
        self.scan.broken = self.failures.get(&place).map(|error| (place, *error));
        self.scan
    }
}

/// Reads the whole ring and follows the chain.
pub(crate) async fn scan<D: Disk>(
    disk: &D,
    key: &VolumeKey,
    geometry: &Geometry,
    superblock: &Superblock,
) -> Scan {
    let mut reading = Reading::new(key, geometry, superblock);
    reading.read(disk, geometry.ring_start, geometry.ring_start + geometry.ring_blocks).await;
    reading.follow()
}

/// Reads the places from the replay start on that a volume which was put away has filled at most,
/// and as many behind them. `false`: it has filled more, or something is there behind the end of the
/// chain, or missing, or the host failed; only the whole ring tells what that means.
pub(crate) async fn scan_end<D: Disk>(
    disk: &D,
    key: &VolumeKey,
    geometry: &Geometry,
    superblock: &Superblock,
) -> (Scan, bool) {
    let mut reading = Reading::new(key, geometry, superblock);
    let first = geometry.ring_place(superblock.replay_seq);
    let ring_end = geometry.ring_start + geometry.ring_blocks;
    let (end, around) = (first + STEP, (first + STEP).saturating_sub(ring_end));
    reading.read(disk, first, end.min(ring_end)).await;
    reading.read(disk, geometry.ring_start, geometry.ring_start + around).await;
    let (found, failed) = (reading.blocks.len(), !reading.failures.is_empty());
    let scan = reading.follow();
    let tip = scan.tip(superblock);
    let ends = scan.chain.len() == found
        && scan.chain.len() as u64 <= STEP / 2
        && scan.durable <= tip
        && scan.generation <= superblock.generation;
    (scan, ends && !failed)
}

/// Checks one block of the ring by itself. Blocks of before the replay start are of no interest.
fn authenticate(
    block: &mut Block,
    key: &VolumeKey,
    keys: &mut BTreeMap<(u32, Salt), Vec<EpochKey>>,
    superblock: &Superblock,
    geometry: &Geometry,
    place: u64,
) -> Option<Found> {
    let header = jblock::peek(block, key.uuid())?;
    let in_reach = header.seq >= superblock.replay_seq
        && header.seq < SEQ_END
        && geometry.ring_place(header.seq) == place;
    if !in_reach {
        return None;
    }
    if keys.len() > 256 {
        keys.clear();
    }
    let id = header.order.epoch();
    let epochs =
        keys.entry((id, header.salt)).or_insert_with(|| key.epochs(id, &header.salt).collect());
    let sealed = (epochs.len() > 1).then(|| Box::new(*block));
    let tag = epochs.iter().find_map(|epoch| {
        let opened = jblock::open(block, epoch, &header);
        if let (Err(_), Some(sealed)) = (&opened, &sealed) {
            // A failed opening wipes what it worked on.
            *block = **sealed;
        }
        opened.ok()
    })?;
    Some(Found { header, tag, records: jblock::records(block), modified: jblock::modified(block) })
}
