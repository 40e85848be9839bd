//! Publishing: records into sealed, chained journal blocks, and those into the ring.
//!
//! Holds: one task seals at a time, so the chain has one order; a ring place is written again only
//! after the superblock beyond its old block is durable and its old write was answered; a journal
//! block is never rewritten with other bytes.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{future::poll_fn, task::Poll};

use super::{
    Volume,
    core::{Core, Eager, Health, Pending, wake},
    crypto::{EpochKey, TAG},
    jblock::{Builder, Header, Record, SURE},
    layout::{Order, RING_RESERVE},
    read::PIECE,
};
use crate::{
    disk::{Block, Disk, Transfer},
    errno::Errno,
};

/// What a task took out of the core to seal.
struct Batch {
    records: Vec<Pending>,
    /// Header of the first block; the following ones count on from it.
    header: Header,
    /// Blocks it may take.
    blocks: u64,
    /// Key of the epoch that the orders were taken from.
    key: Arc<EpochKey>,
}

/// Why nothing was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The ring has no place: a checkpoint must move the replay start first.
    Full,
    /// The volume failed.
    Errno(Errno),
}

impl Volume {
    /// Publishes everything queued until now (`queued` as seen by the caller), making room with a
    /// checkpoint where the ring is full.
    pub(crate) async fn publish<D: Disk>(&self, disk: &D, queued: u64) -> Result<(), Errno> {
        loop {
            match self.publish_now(disk, queued, RING_RESERVE).await {
                Ok(()) => return Ok(()),
                Err(Stopped::Full) => self.make_room(disk).await?,
                Err(Stopped::Errno(errno)) => return Err(errno),
            }
        }
    }

    /// Publishes everything queued until `queued`, leaving `reserve` places of the ring alone.
    pub(crate) async fn publish_now<D: Disk>(
        &self,
        disk: &D,
        queued: u64,
        reserve: u64,
    ) -> Result<(), Stopped> {
        loop {
            let blocks = {
                let core = self.core.lock();
                let journal = &core.journal;
                if journal.carry.is_empty()
                    && (journal.taken >= queued || journal.pending.is_empty())
                {
                    return Ok(());
                }
                let records = journal.carry.len() + journal.pending.len();
                let room = journal.room(&self.geometry, reserve) as usize;
                if room == 0 && !journal.sealing && journal.writing.is_empty() {
                    return Err(Stopped::Full);
                }
                records.div_ceil(SURE).min(PIECE).min(room.max(1))
            };
            self.write_blocks(disk, blocks, reserve, false).await?;
        }
    }

    /// Writes an empty journal block that carries the durable mark.
    pub(crate) async fn mark<D: Disk>(&self, disk: &D) -> Result<(), Errno> {
        match self.write_blocks(disk, 1, RING_RESERVE, true).await {
            Ok(()) | Err(Stopped::Full) => Ok(()),
            Err(Stopped::Errno(errno)) => Err(errno),
        }
    }

    /// Seals and writes up to `blocks` journal blocks.
    async fn write_blocks<D: Disk>(
        &self,
        disk: &D,
        blocks: usize,
        reserve: u64,
        mark: bool,
    ) -> Result<(), Stopped> {
        let gone = |_| Stopped::Errno(Errno::EIO);
        let mut transfer = disk.transfer(blocks).await.map_err(gone)?;
        let Some(batch) = self.take_batch(blocks as u64, reserve, mark).await? else {
            return Ok(());
        };
        let first = batch.header.seq;
        let (count, resolved) = {
            let mut tags = [[0; TAG]; PIECE];
            let mut header = batch.header;
            let modified = self.times.modified();
            let mut sealed = 0;
            let mut emit = |block: &Block, index: usize| transfer.put(index, block);
            let mut rest = &batch.records[..];
            while sealed < batch.blocks && (sealed == 0 || !rest.is_empty()) {
                let builder = fill(&mut rest);
                let (block, tag) = builder.seal(self.key.uuid(), &batch.key, &header, modified);
                emit(&block, sealed as usize);
                tags[sealed as usize % PIECE] = tag;
                header.prev = tag;
                header.seq += 1;
                header.order = header.order.plus(1);
                sealed += 1;
            }
            debug_assert!(rest.is_empty(), "every record taken has a place");
            let resolved: Vec<u64> = batch.records.iter().filter_map(|p| p.resolves).collect();
            let maps =
                batch.records.iter().filter(|p| matches!(p.record, Record::Map { .. })).count()
                    as u64;
            let wakers = {
                let mut core = self.core.lock();
                core.journal.prev = header.prev;
                core.journal.next += sealed;
                core.journal.sealing = false;
                if let Some(fresh) = core.fresh.as_mut() {
                    let sealed = tags.iter().take(sealed as usize);
                    (first..).zip(sealed).for_each(|(seq, tag)| fresh.sealed(seq, *tag));
                }
                core.journal.marked = batch.header.durable;
                core.journal.writing.extend(first..first + sealed);
                if !batch.records.is_empty() {
                    core.journal.last = first + sealed - 1;
                }
                core.journal.unsettled += maps;
                core.counters.journal_blocks += sealed;
                core.journal.waiters.take()
            };
            wake(wakers);
            (sealed, resolved)
        };
        let place = self.geometry.ring_place(first);
        let mut written = transfer.write(place, count as usize).await;
        if written.is_err() {
            // The same bytes at the same place, once.
            written = transfer.write(place, count as usize).await;
        }
        let wakers = {
            let mut core = self.core.lock();
            core.journal.writing.retain(|seq| !(first..first + count).contains(seq));
            resolved.iter().for_each(|seq| core.journal.resolve(*seq));
            if written.is_err() { core.fail() } else { core.journal.waiters.take() }
        };
        wake(wakers);
        written.map_err(gone)
    }

    /// Waits for its turn to seal and takes records. `None`: nothing is left to do.
    async fn take_batch(
        &self,
        blocks: u64,
        reserve: u64,
        mark: bool,
    ) -> Result<Option<Batch>, Stopped> {
        poll_fn(|cx| {
            let mut core = self.core.lock();
            if core.health == Health::Failed {
                return Poll::Ready(Err(Stopped::Errno(Errno::EIO)));
            }
            let empty = core.journal.carry.is_empty() && core.journal.pending.is_empty();
            if empty && (!mark || core.journal.sealing) {
                return Poll::Ready(Ok(None));
            }
            let room = core.journal.room(&self.geometry, reserve);
            if core.journal.sealing || (room == 0 && !core.journal.writing.is_empty()) {
                core.journal.waiters.add(cx.waker());
                return Poll::Pending;
            }
            let to_end = self.geometry.ring_blocks - core.journal.next % self.geometry.ring_blocks;
            let blocks = blocks.min(room).min(to_end);
            if blocks == 0 {
                return Poll::Ready(Err(Stopped::Full));
            }
            Poll::Ready(take(&mut core, blocks).map(Some).map_err(Stopped::Errno))
        })
        .await
    }

    /// The last journal block with records, sealed or about to be written.
    pub(crate) async fn last_sealed(&self) -> u64 {
        poll_fn(|cx| {
            let mut core = self.core.lock();
            if core.journal.sealing && core.health != Health::Failed {
                core.journal.waiters.add(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(core.journal.last)
        })
        .await
    }

    /// Waits until all journal blocks up to `seq` are written.
    pub(crate) async fn written(&self, seq: u64) -> Result<(), Errno> {
        poll_fn(|cx| {
            let mut core = self.core.lock();
            if core.health == Health::Failed {
                return Poll::Ready(Err(Errno::EIO));
            }
            if core.journal.complete() >= seq {
                return Poll::Ready(Ok(()));
            }
            core.journal.waiters.add(cx.waker());
            Poll::Pending
        })
        .await
    }
}

/// Takes records for at most `blocks` blocks, and everything that sealing them needs.
fn take(core: &mut Core, blocks: u64) -> Result<Batch, Errno> {
    let order: Order = core.orders(blocks)?;
    let seq = core.journal.next;
    let limit = blocks as usize * SURE;
    let mut records = Vec::with_capacity(limit.min(core.journal.pending.len() + 8));
    while records.len() < limit
        && let Some(next) = core.journal.carry.pop_front()
    {
        records.push(next);
    }
    while (records.len() < limit || records.last().is_some_and(|p: &Pending| p.glued))
        && let Some(next) = core.journal.pending.pop_front()
    {
        core.journal.taken += 1;
        records.push(next);
    }
    core.journal.sealing = true;
    for record in &records {
        if let Some((id, serial)) = record.eager
            && let Some(write) = core.in_flight[id].as_mut().filter(|w| w.serial == serial)
            && write.eager == Eager::Queued
        {
            write.eager = Eager::Published(seq);
            *core.journal.unresolved.entry(seq).or_default() += 1;
        }
    }
    let mut durable = core.journal.durable;
    if core.is(canary!(EarlyMark)) {
        durable = seq - 1;
    }
    let header = Header {
        seq,
        durable,
        generation: core.durable_generation,
        order,
        salt: core.salt,
        prev: core.journal.prev,
    };
    Ok(Batch { records, header, blocks, key: core.key.clone() })
}

/// Fills one block from the front of `rest`.
fn fill(rest: &mut &[Pending]) -> Box<Builder> {
    let mut builder = Box::new(Builder::new());
    while let Some(first) = rest.first() {
        let group: Vec<Record> = if first.glued {
            let end = rest.iter().position(|p| !p.glued).map_or(rest.len(), |last| last + 1);
            rest[..end].iter().map(|p| p.record).collect()
        } else {
            rest.iter().take_while(|p| !p.glued).map(|p| p.record).collect()
        };
        let taken = builder.take(&group, first.glued);
        *rest = &rest[taken..];
        if taken < group.len() {
            break;
        }
    }
    builder
}
