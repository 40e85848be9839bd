//! Opening: from bytes of any content to a consistent volume, or a typed refusal.
//!
//! Holds: nothing is created or reformatted; what a recovery has answered is durable before
//! anything else is (its decisions about uncertain records are written down and flushed); a crash
//! anywhere in between leads to a recovery that answers the same or has answered nothing yet.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    vec::Vec,
};
use futures_util::{StreamExt, stream::FuturesUnordered};

use super::{
    OpenOptions, OpenReport, SlotKey, Volume,
    chores::Progress,
    core::{Core, Health, Map, Pending},
    crypto::{EpochKey, Kind, Salt, Tag, VolumeKey},
    delta::{Delta, Zero},
    error::VolumeError,
    freshness::{self, Fresh},
    front::{Front, Header, Newest, open_superblock, read_header_in},
    header::{self, HeaderBytes},
    jblock::Record,
    layout::{Geometry, Order, Ptr, RING_RESERVE, SUPERBLOCKS},
    ring_scan::{self, Scan},
    superblock::{Epoch, RECENT, Superblock},
    tree::Bad,
};
use crate::{
    disk::{Disk, HostError},
    errno::Errno,
};

/// Data blocks verified at a time.
const VERIFY: usize = 32;

/// Step 4. Of a file that was put away in exactly the state that was found, the journal behind its
/// end can bear no witness: nobody has written to it since.
async fn read_journal<D: Disk>(
    disk: &D,
    key: &VolumeKey,
    options: &OpenOptions,
    newest: &Newest,
) -> Scan {
    let Newest { superblock, id, whole, .. } = newest;
    let geometry = &superblock.geometry;
    let careless = left_out!(BriefScan);
    if careless || options.put_away && *whole {
        let (mut scan, ends) = ring_scan::scan_end(disk, key, geometry, superblock).await;
        let exact = ends && freshness::is_exact(options, key.uuid(), superblock, id, &scan).await;
        if exact {
            // Not a durable mark: a file that rests may be waiting for its flush.
            scan.believed = scan.tip(superblock);
        }
        if careless || exact {
            return scan;
        }
    }
    ring_scan::scan(disk, key, geometry, superblock).await
}

/// What the chain makes of the blocks.
struct Replay {
    delta: Delta,
    size: u64,
    size_order: Order,
    /// Uncertain writes whose data is not there.
    skipped: Vec<Order>,
}

impl Volume {
    /// Opens the volume in the host file behind `disk`, recovering what a crash left.
    ///
    /// Takes the same time whatever the size of the volume. Unless `options.read_only`, the
    /// volume is marked as in use; close it with [`Self::close`].
    ///
    /// # Errors
    /// Any [`VolumeError`] but misuse. The host file is unchanged then, except that a recovery
    /// may have written down some of its decisions.
    pub async fn open<D: Disk>(
        disk: &D,
        key: &SlotKey,
        options: &OpenOptions,
    ) -> Result<(Self, OpenReport), VolumeError> {
        // Keys pass through both: on the heap, so that little of the stack has to be wiped.
        let (header, opening, report) = Box::pin(Self::prepare(disk, key, options)).await?;
        Box::pin(opening.finish(disk, header, report)).await
    }

    /// Whether the host file behind `disk` is still this volume's: nobody has opened it for writing
    /// since. Reads the superblocks, changes nothing. For a holder whose lease may have had a gap.
    ///
    /// # Errors
    /// As [`Self::open`], of what cannot be read.
    pub async fn is_undisturbed<D: Disk>(&self, disk: &D) -> Result<bool, VolumeError> {
        let front = Front::read(disk).await;
        let found = open_superblock(&front, disk, &self.key, true).await?.superblock;
        let core = self.core.lock();
        // Whoever opens for writing begins a session of its own before it writes anything else.
        Ok(found.session == core.session && found.generation >= core.durable_generation)
    }

    /// Steps 1 to 4: reads all that decides what the volume is, asks the counter, and changes
    /// nothing.
    pub(crate) async fn prepare<D: Disk>(
        disk: &D,
        key: &SlotKey,
        options: &OpenOptions,
    ) -> Result<(Header<header::Opened>, Opening, OpenReport), VolumeError> {
        let decode = |bytes: &HeaderBytes| header::decode(bytes, key);
        let front = Front::read(disk).await;
        let header = read_header_in(&front, disk, decode, |opened| opened.generation).await?;
        let (opened, volume_key) = (&header.found, &header.found.key);
        let read_only = options.read_only || opened.read_only;
        let newest = open_superblock(&front, disk, volume_key, read_only).await?;
        drop(front);
        let geometry = newest.superblock.geometry;
        if disk.host_blocks() < geometry.host_blocks {
            return Err(VolumeError::HostFileShort {
                needed: geometry.host_blocks,
                found: disk.host_blocks(),
            });
        }
        let uuid = volume_key.uuid();
        let mut scan = read_journal(disk, volume_key, options, &newest).await;
        let Newest { superblock, slot, id, .. } = newest;
        let tip = scan.tip(&superblock);
        if let Some((place, error)) = scan.broken
            && !read_only
        {
            return Err(VolumeError::Host { place, error });
        }
        let loss = if scan.generation > superblock.generation {
            let (found, durable) = (superblock.generation, scan.generation);
            Some(VolumeError::SuperblockLost { found, durable })
        } else if tip < scan.durable {
            Some(VolumeError::JournalLost { tip, durable: scan.durable })
        } else {
            None
        };
        let found = Progress::found(*volume_key.uuid(), superblock.generation, tip);
        if options.after.is_some_and(|left| !left.leads_to(&found)) {
            return Err(VolumeError::NotWhatWasLeft);
        }
        let lost = loss.is_some();
        if let Some(loss) = &loss
            && !options.accept_loss
            && !read_only
        {
            return Err(*loss);
        }
        let checked = freshness::check(options, uuid, &superblock, &id, &scan).await?;
        if let Some(refusal) = checked.refusal
            && !read_only
        {
            return Err(refusal);
        }
        // Records that the counter vouches for are believed: their data must be there.
        scan.durable = scan.durable.max(checked.vouched);
        let report = OpenReport {
            clean: superblock.clean && scan.chain.is_empty(),
            journal_blocks: scan.chain.len() as u64,
            loss: loss.or(checked.refusal),
            freshness: checked.freshness,
            ..OpenReport::default()
        };
        let used = options.counter.as_ref().filter(|_| !read_only);
        let opening = Opening {
            fresh: used.map(|used| Fresh::new(used, &checked, &superblock, id)),
            fence: used.is_some_and(|used| !used.adopt),
            superblock,
            slot,
            scan,
            read_only,
            lost,
        };
        Ok((header, opening, report))
    }

    /// Applies the chain. Steps 5 and 6.
    async fn replay<D: Disk>(
        &self,
        disk: &D,
        superblock: &Superblock,
        scan: &Scan,
        report: &mut OpenReport,
    ) -> Result<Replay, VolumeError> {
        let trusting = self.core.lock().is(canary!(NoVerify));
        let certain = scan.durable.max(scan.believed);
        let mut void: BTreeSet<Order> = BTreeSet::new();
        let mut replay = Replay {
            delta: Delta::default(),
            size: superblock.size,
            size_order: superblock.size_order,
            skipped: Vec::new(),
        };
        for record in scan.chain.iter().flat_map(|found| &found.records) {
            match *record {
                Record::Void { order, count } => {
                    void.extend((0..count).map(|n| order.plus(n)));
                }
                Record::Zero { first, count, order } => {
                    let end = (first + count).min(self.geometry.capacity);
                    replay.delta.zeroes.push(Zero { first: first.min(end), end, order });
                }
                Record::Size { size, .. } if size > self.capacity() => {
                    return Err(VolumeError::BadGeometry);
                }
                Record::Size { size, order } if order >= replay.size_order => {
                    (replay.size, replay.size_order) = (size, order);
                }
                Record::Size { .. } | Record::Map { .. } => {}
            }
        }
        // The winner of each block; those that fail to verify give way to the next lower one.
        let mut open: Option<BTreeSet<u64>> = None;
        loop {
            let mut winners: BTreeMap<u64, (Ptr, u64)> = BTreeMap::new();
            for found in &scan.chain {
                for record in &found.records {
                    let Record::Map { block, ptr, carried } = *record else { continue };
                    if void.contains(&ptr.order)
                        || block >= self.geometry.capacity
                        || open.as_ref().is_some_and(|open| !open.contains(&block))
                    {
                        continue;
                    }
                    let winner = winners.entry(block).or_insert((ptr, found.header.seq));
                    if carried {
                        replay.delta.carried.insert(block);
                    }
                    if ptr.order >= winner.0.order {
                        *winner = (ptr, found.header.seq);
                    }
                }
            }
            let doubtful: Vec<(u64, Ptr)> = winners
                .iter()
                .filter(|(_, (_, seq))| *seq > certain && !trusting)
                .filter(|(block, (ptr, _))| {
                    replay.delta.zeroed(**block).is_none_or(|zero| zero < ptr.order)
                })
                .map(|(block, (ptr, _))| (*block, *ptr))
                .collect();
            let failed = self.verify_all(disk, &doubtful).await?;
            for (block, (ptr, _)) in winners {
                if !failed.contains(&block) {
                    replay.delta.insert(block, ptr);
                    report.records_applied += 1;
                }
            }
            if failed.is_empty() {
                break;
            }
            report.records_skipped += failed.len() as u64;
            for (block, ptr) in doubtful {
                if failed.contains(&block) {
                    void.insert(ptr.order);
                    replay.skipped.push(ptr.order);
                }
            }
            open = Some(failed);
        }
        Ok(replay)
    }

    /// Reads and opens data blocks; returns those that do not authenticate.
    async fn verify_all<D: Disk>(
        &self,
        disk: &D,
        blocks: &[(u64, Ptr)],
    ) -> Result<BTreeSet<u64>, VolumeError> {
        let mut failed = BTreeSet::new();
        let mut host = None;
        let (mut next, mut going) = (blocks.iter(), FuturesUnordered::new());
        loop {
            while going.len() < VERIFY
                && let Some((block, ptr)) = next.next()
            {
                going.push(async move {
                    let read = self.read_sealed(disk, ptr.place(), ptr, Kind::Data, 0, *block);
                    (*block, ptr.place(), read.await.err())
                });
            }
            match going.next().await {
                None => break,
                Some((_, _, None)) => {}
                Some((block, _, Some(Bad::Forged))) => drop(failed.insert(block)),
                // Perhaps it was synced: a transient failure must not decide that it was not.
                Some((_, place, Some(Bad::Host(error)))) => {
                    host = Some(VolumeError::Host { place, error });
                }
            }
        }
        host.map_or(Ok(failed), Err)
    }
}

/// An opening whose journal has been read.
pub(crate) struct Opening {
    superblock: Superblock,
    slot: usize,
    scan: Scan,
    read_only: bool,
    /// Evidence was found that something is missing, and accepted.
    lost: bool,
    /// The counter, of a volume that is bound to one.
    fresh: Option<Fresh>,
    /// Move the counter before anything is written.
    fence: bool,
}

impl Opening {
    /// Of a volume that has just been made, with the epoch that goes on; and its counter.
    pub(crate) fn of_new(superblock: Superblock, fresh: Option<Fresh>) -> Self {
        Self {
            superblock,
            slot: 0,
            scan: Scan::default(),
            read_only: false,
            lost: false,
            fresh,
            fence: false,
        }
    }

    /// The volume, in its last epoch, whose salt is `salt`.
    pub(crate) fn begin(mut self, opened: header::Opened, salt: Salt) -> Volume {
        let id = self.superblock.epochs.last().map_or(1, |epoch| epoch.id);
        let key = Arc::new(opened.key.epoch(id, &salt));
        let mut core = self.core(key.clone(), salt);
        core.fresh = self.fresh.take();
        // The first sync flushes, whether anything was written or not.
        core.stamp = 1;
        let volume = Volume::new(opened.key, opened.derivation, core);
        volume.remember(key);
        volume
    }

    fn core(&self, key: Arc<EpochKey>, salt: Salt) -> Core {
        let superblock = &self.superblock;
        let tip = self.scan.tip(superblock);
        let map =
            Map { root: superblock.map_root, levels: superblock.map_levels, cut: superblock.cut };
        let mut core = Core::new(superblock, map, key, salt);
        core.health = if self.read_only { Health::ReadOnly } else { Health::Good };
        core.slot = self.slot;
        core.journal.next = tip + 1;
        core.journal.prev = self.scan.tip_tag(superblock);
        core.journal.last = tip;
        core.journal.durable = self.scan.durable.min(tip);
        core.generation = superblock.generation.max(self.scan.generation);
        core
    }

    /// The epoch that goes on from here.
    fn next_epoch(&self) -> Result<u32, VolumeError> {
        let newest = self.superblock.epochs.iter().map(|epoch| epoch.id).max().unwrap_or(0);
        let id = newest.max(self.scan.epoch) + 1;
        if id > Order::MAX_EPOCH { Err(VolumeError::BadGeometry) } else { Ok(id) }
    }

    /// The last block of the chain up to which everything was durable and resolved.
    fn settled(&self) -> (u64, Tag) {
        let chain = self.scan.chain.iter().rev();
        let found = chain.map(|found| (found.header.seq, found.tag));
        let base = (self.superblock.replay_seq - 1, self.superblock.replay_prev);
        found.chain([base]).find(|(seq, _)| *seq <= self.scan.durable).unwrap_or(base)
    }

    /// Moves the counter past what an earlier writer may still have on its way.
    async fn shut_out<D: Disk>(&self, disk: &D, volume: &Volume) -> Result<(), VolumeError> {
        // What was read may lie in a volatile cache only.
        disk.flush().await.map_err(VolumeError::Flush)?;
        if self.fence && !volume.core.lock().is(canary!(NoFence)) {
            let settled = self.settled();
            let tip = settled.0 == self.scan.tip(&self.superblock);
            volume.fence(settled.0, settled.1, tip).await?;
        }
        Ok(())
    }

    /// The volume with another geometry and an epoch of its own, and the superblock to go on
    /// from. Only for an empty journal; writes nothing to the volume but a header's lost copy.
    pub(crate) async fn reshaped<D: Disk>(
        mut self,
        disk: &D,
        header: Header<header::Opened>,
        geometry: Geometry,
    ) -> Result<(Volume, Superblock), VolumeError> {
        let (header, header::Opened { key: volume_key, derivation, .. }) = header.split();
        header.repair(disk).await?;
        let id = self.next_epoch()?;
        let mut salt = [0; 24];
        disk.random(&mut salt)?;
        let key = Arc::new(volume_key.epoch(id, &salt));
        let epoch = Epoch { id, salt, key_version: volume_key.version(), tabled: false };
        self.superblock.epochs.push(epoch);
        self.superblock.geometry = geometry;
        let mut core = self.core(key.clone(), salt);
        core.fresh = self.fresh.take();
        let volume = Volume::new(volume_key, derivation, core);
        volume.remember(key);
        self.shut_out(disk, &volume).await?;
        Ok((volume, self.superblock))
    }

    async fn finish<D: Disk>(
        mut self,
        disk: &D,
        header: Header<header::Opened>,
        mut report: OpenReport,
    ) -> Result<(Volume, OpenReport), VolumeError> {
        let (header, header::Opened { key: volume_key, derivation, .. }) = header.split();
        let key_version = volume_key.version();
        let id = self.next_epoch()?;
        let mut salt = [0; 24];
        if !self.read_only {
            disk.random(&mut salt)?;
        }
        let key = Arc::new(volume_key.epoch(id, &salt));
        let mut core = self.core(key.clone(), salt);
        core.fresh = self.fresh.take();
        let volume = Volume::new(volume_key, derivation, core);
        let replay = volume.replay(disk, &self.superblock, &self.scan, &mut report).await?;
        {
            let mut core = volume.core.lock();
            for record in self.scan.chain.iter().flat_map(|found| &found.records) {
                if let Record::Map { ptr, .. } = record {
                    core.space.name(ptr.place());
                    // A snapshot to come must not be older than anything in it.
                    core.birth = core.birth.max(ptr.birth());
                }
            }
            core.active = replay.delta;
            core.size = replay.size;
            core.size_order = replay.size_order;
            let told = self.scan.chain.iter().rev().find_map(|found| found.modified);
            core.times.set(self.superblock.times.after(told));
        }
        if !self.read_only {
            header.repair(disk).await?;
            volume.remember(key);
            let epoch = Epoch { id, salt, key_version, tabled: false };
            self.settle(disk, &volume, epoch, &replay.skipped).await?;
            if self.may_have_lost_a_write(&replay.skipped) {
                volume.clear_tail(disk).await.map_err(|errno| failed(0, errno))?;
            }
            volume.register_opening().await?;
        }
        Ok((volume, report))
    }

    /// Whether a write that was published is not there, as far as can still be told.
    fn may_have_lost_a_write(&self, skipped: &[Order]) -> bool {
        let mut records = self.scan.chain.iter().flat_map(|found| &found.records);
        !skipped.is_empty()
            || records.any(|record| matches!(record, Record::Void { .. }))
            || !self.superblock.clean && self.scan.chain.is_empty()
    }

    /// Steps 8 and 9: what was decided becomes durable before anything else happens.
    async fn settle<D: Disk>(
        &self,
        disk: &D,
        volume: &Volume,
        epoch: Epoch,
        skipped: &[Order],
    ) -> Result<(), VolumeError> {
        self.shut_out(disk, volume).await?;
        let crowded;
        {
            let mut core = volume.core.lock();
            let needed = (skipped.len() as u64).div_ceil(64) + 2;
            let persist = !core.is(canary!(NoPersist));
            let room = core.journal.room(&volume.geometry, RING_RESERVE);
            crowded = self.lost || room < needed;
            if crowded {
                // Past everything that any block of the ring still claims.
                let next = core.journal.next.max(self.scan.highest + 1).max(self.scan.durable + 1);
                core.journal.next = next;
                core.journal.last = next - 1;
                core.journal.start = next - 1;
                core.journal.durable = next - 1;
            } else if persist {
                for order in skipped {
                    let record = Record::Void { order: *order, count: 1 };
                    core.journal.queue(Pending::new(record));
                }
            }
            let epochs = &mut core.epochs;
            epochs.push(epoch);
        }
        if crowded {
            return volume.checkpoint(disk, false, false).await.map_err(|errno| failed(0, errno));
        }
        let queued = volume.core.lock().journal.queued;
        let published = volume.publish_now(disk, queued, 0).await;
        published.map_err(|_| failed(volume.geometry.ring_start, Errno::EIO))?;
        let (stamp, last) = {
            let mut core = volume.core.lock();
            core.stamp += 1;
            (core.stamp, core.journal.last)
        };
        volume
            .flush(disk, stamp, last)
            .await
            .map_err(|errno| VolumeError::Flush(HostError::Errno(errno.0)))?;
        let superblock = {
            let core = volume.core.lock();
            let keep = core.epochs.len().saturating_sub(RECENT);
            Superblock {
                generation: core.generation + 2,
                clean: false,
                session: self.superblock.session + 1,
                durable: core.journal.durable,
                times: core.times.get(),
                epochs: core.epochs[keep..].to_vec(),
                ..self.superblock.clone()
            }
        };
        let slot = volume.commit(disk, &superblock).await;
        let slot = slot.map_err(|errno| failed(SUPERBLOCKS[1 - self.slot][0], errno))?;
        let full = {
            let mut core = volume.core.lock();
            core.slot = slot;
            core.session = superblock.session;
            core.generation = superblock.generation;
            core.durable_generation = superblock.generation;
            core.epochs.iter().filter(|epoch| !epoch.tabled).count() >= RECENT - 8
        };
        if full {
            // Before the superblock runs out of room for epochs that are in no table.
            volume.checkpoint(disk, false, false).await.map_err(|errno| failed(0, errno))?;
        }
        Ok(())
    }
}

pub(crate) fn failed(place: u64, errno: Errno) -> VolumeError {
    VolumeError::Host { place, error: HostError::Errno(errno.0) }
}
