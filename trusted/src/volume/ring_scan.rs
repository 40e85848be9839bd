//! Reading the journal ring at open: the chain, and the evidence beside it.
//!
//! Every block of the ring is authenticated by itself, so that a block beyond a gap can still bear
//! witness: to the highest durable mark and to the newest superblock that was durable.

use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};
use futures_util::{StreamExt, stream::FuturesOrdered};

use super::{
    crypto::{EpochKey, Salt, Tag, VolumeKey},
    error::VolumeError,
    jblock::{self, Header, Record},
    layout::{Geometry, SEQ_END},
    superblock::Superblock,
};
use crate::disk::{BLOCK, Disk, HostError, Transfer};

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

/// Reads the whole ring and follows the chain.
pub(crate) async fn scan<D: Disk>(
    disk: &D,
    key: &VolumeKey,
    geometry: &Geometry,
    superblock: &Superblock,
) -> Result<Scan, VolumeError> {
    let mut scan = Scan { durable: superblock.durable, ..Scan::default() };
    let mut blocks: BTreeMap<u64, Found> = BTreeMap::new();
    let mut failures: BTreeMap<u64, HostError> = BTreeMap::new();
    let mut keys: BTreeMap<(u32, Salt), Vec<EpochKey>> = BTreeMap::new();
    let end = geometry.ring_start + geometry.ring_blocks;
    let step = STEP.min(D::MAX_BLOCKS as u64);
    let (mut next, mut going) = (geometry.ring_start, FuturesOrdered::new());
    let mut block = Box::new([0; BLOCK]);
    loop {
        while next < end && going.len() < AHEAD {
            let count = (end - next).min(step);
            going.push_back(read_step(disk, next, count));
            next += count;
        }
        let Some((place, count, read)) = going.next().await else { break };
        let mut look = |block: &mut _, place| {
            if let Some(found) = authenticate(block, key, &mut keys, superblock, geometry, place) {
                scan.durable = scan.durable.max(found.header.durable);
                scan.generation = scan.generation.max(found.header.generation);
                scan.highest = scan.highest.max(found.header.seq);
                scan.epoch = scan.epoch.max(found.header.order.epoch());
                blocks.insert(found.header.seq, found);
            }
        };
        match read {
            Ok(transfer) => {
                for i in 0..count {
                    transfer.get(i as usize, &mut block);
                    look(&mut block, place + i);
                }
            }
            // One bad block must not hide its neighbours.
            Err(_) => {
                for at in place..place + count {
                    let (_, _, read) = read_step(disk, at, 1).await;
                    match read {
                        Ok(transfer) => {
                            transfer.get(0, &mut block);
                            look(&mut block, at);
                        }
                        Err(error) => drop(failures.insert(at, error)),
                    }
                }
            }
        }
    }
    let (mut seq, mut prev) = (superblock.replay_seq, superblock.replay_prev);
    while let Some(found) = blocks.remove(&seq) {
        if found.header.prev != prev {
            break;
        }
        (seq, prev) = (seq + 1, found.tag);
        scan.chain.push(found);
    }
    let place = geometry.ring_place(seq);
    scan.broken = failures.get(&place).map(|error| (place, *error));
    Ok(scan)
}

/// Checks one block of the ring by itself. Blocks of before the replay start are of no interest.
fn authenticate(
    block: &mut crate::disk::Block,
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
