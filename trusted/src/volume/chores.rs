//! What is due in the background, and what an open volume tells about itself.

use alloc::{collections::BTreeMap, sync::Arc, vec::Vec};
use core::{fmt, sync::atomic::AtomicBool};

use super::{
    Chore, Counters, Volume,
    cache::NodeCache,
    core::{Checkpoints, Core, Expect, Flushes, Health, Journal, Map, Timers, Waiters, wake},
    crypto::{EpochKey, Salt, VolumeKey},
    delta::Delta,
    discard::Discards,
    freshness::Fresh,
    header::Derivation,
    layout::{BLOCK_BYTES, RING_RESERVE},
    ranges::{EOF, RangeLocks},
    space::Space,
    spacemap,
    superblock::{Bound, Superblock},
    times::Kept,
};
use crate::{disk::Disk, errno::Errno, sync::Lock};

/// Records wait at most this long before they are published, and an idle durable mark before it
/// is written; in nanoseconds. The embedder's tick comes on top.
const PUBLISH_NS: u64 = 25_000_000;
/// Longest time between a write and the flush that covers it, in nanoseconds.
const FLUSH_NS: u64 = 1_000_000_000;
/// Idle time before a checkpoint, in nanoseconds.
const IDLE_NS: u64 = 30_000_000_000;
/// Published records after which a flush is due: what recovery has to verify.
const UNSETTLED: u64 = 32_768;
/// Records that are worth publishing at once.
const MANY: usize = 16 * 96;
/// Changed blocks, and journal blocks, with which a volume may rest: what the next opening reads.
const REST_RECORDS: u64 = 64;
/// Seals after which a new epoch begins: far below what one key can bear.
const ROTATE_AT: u64 = 1 << 32;

/// What an open volume is, for operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Identity of the volume.
    pub uuid: [u8; 16],
    /// Bytes the guest may store.
    pub capacity: u64,
    /// Bytes of the guest's file.
    pub size: u64,
    /// Blocks of the host file.
    pub host_blocks: u64,
    /// Blocks of the journal ring.
    pub journal_blocks: u64,
    /// Journal blocks since the last checkpoint.
    pub journal_used: u64,
    /// Levels of the map.
    pub map_levels: u32,
    /// Blocks in use on the host.
    pub used_blocks: u64,
    /// Those of them that only snapshots reach.
    pub held_blocks: u64,
    /// Blocks free for new writes.
    pub free_blocks: u64,
    /// Blocks changed since the last checkpoint.
    pub delta_records: u64,
    /// Number of the last superblock.
    pub generation: u64,
    /// Openings for writing so far.
    pub session: u64,
    /// Epoch of this opening.
    pub epoch: u32,
    /// Number of the volume key: 1 at first, one more after each rekey.
    pub key_version: u16,
    /// A rekey was begun and is not finished: two volume keys are in use.
    pub rekeying: bool,
    /// Sequence number of the monotonic counter that the volume is bound to, as far as it knows;
    /// `None` if it is bound to none.
    pub counter: Option<u64>,
}

/// How far a volume has come: who opens it again later can tell an
/// older state of it, and another volume, from what others have made of it meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    uuid: [u8; 16],
    /// Of the newest superblock.
    generation: u64,
    /// Journal block up to which all are known to be durable.
    durable: u64,
    /// Last journal block.
    tip: u64,
}

impl Progress {
    /// Of a volume that was found in this state.
    pub(super) const fn found(uuid: [u8; 16], generation: u64, tip: u64) -> Self {
        Self { uuid, generation, durable: 0, tip }
    }

    /// Whether `later`, as it was found, can have come after this. Does not tell a state that
    /// somebody with the key made of an older one: only a monotonic counter does.
    pub(super) fn leads_to(&self, later: &Self) -> bool {
        self.uuid == later.uuid && self.generation <= later.generation && self.durable <= later.tip
    }
}

impl Core {
    /// The state of a volume whose superblock has been read and whose journal is empty.
    pub(crate) fn new(superblock: &Superblock, map: Map, key: Arc<EpochKey>, salt: Salt) -> Self {
        let geometry = superblock.geometry;
        let free = spacemap::total_free(&geometry, &superblock.space_root);
        Self {
            geometry,
            health: Health::Good,
            key,
            salt,
            counter: 1,
            rotate_at: ROTATE_AT,
            size: superblock.size,
            size_order: superblock.size_order,
            birth: superblock.birth,
            session: superblock.session,
            generation: superblock.generation,
            durable_generation: superblock.generation,
            slot: 0,
            epochs: superblock.epochs.clone(),
            table_root: superblock.table_root,
            table_levels: superblock.table_levels,
            held: superblock.held,
            retable: Vec::new(),
            renewing: false,
            active: Delta::default(),
            frozen: None,
            map,
            cache: NodeCache::new(),
            space: Space::new(geometry, superblock.space_root, free),
            discards: Discards::default(),
            journal: Journal {
                next: superblock.replay_seq,
                prev: superblock.replay_prev,
                start: superblock.replay_seq,
                sealing: false,
                writing: Default::default(),
                durable: superblock.durable,
                marked: superblock.durable,
                unresolved: BTreeMap::new(),
                pending: Default::default(),
                carry: Default::default(),
                queued: 0,
                taken: 0,
                interval: 0,
                last: superblock.replay_seq - 1,
                unsettled: 0,
                waiters: Waiters::default(),
            },
            flushes: Flushes::default(),
            checkpoints: Checkpoints::default(),
            ranges: RangeLocks::default(),
            in_flight: Default::default(),
            launched: 0,
            stamp: 0,
            timers: Timers::default(),
            expect: Expect::default(),
            counters: Counters::default(),
            fresh: None,
            bound: superblock.counter,
            times: Arc::new(Kept::new(superblock.times)),
            #[cfg(test)]
            canary: super::tests::canary(),
        }
    }

    fn counter_sequence(&self) -> Option<u64> {
        let sequence = |bound: Bound| bound.registered.map_or(0, |record| record.sequence);
        self.fresh.as_ref().map(Fresh::sequence).or_else(|| self.bound.map(sequence))
    }

    fn due(&mut self, now: u64) -> Option<Chore> {
        if self.health != Health::Good {
            return None;
        }
        if self.wants_register(now) {
            return Some(Chore::Register);
        }
        let waiting = self.journal.pending.len() + self.journal.carry.len();
        // A mark is worth a block only if it says something about records.
        let unmarked =
            self.journal.durable > self.journal.marked && self.journal.last > self.journal.marked;
        let timers = &mut self.timers;
        if !timers.checkpoint_claimed && !self.checkpoints.running && !self.checkpoints.wedged {
            let changed = !self.active.is_empty();
            if timers.idle_stamp != self.stamp || timers.idle_since.is_none() {
                (timers.idle_stamp, timers.idle_since) = (self.stamp, Some(now));
            }
            let idle = timers.idle_since.is_some_and(|since| now.saturating_sub(since) >= IDLE_NS);
            if changed && idle || self.wants_checkpoint() {
                self.timers.checkpoint_claimed = true;
                return Some(Chore::Checkpoint);
            }
        }
        let timers = &mut self.timers;
        let dirty = self.stamp > self.flushes.stamp || self.journal.last > self.flushes.seq;
        match (dirty, timers.dirty_since) {
            (false, _) => timers.dirty_since = None,
            (true, None) => timers.dirty_since = Some(now),
            (true, Some(since)) => {
                let late = now.saturating_sub(since) >= FLUSH_NS;
                if !timers.flush_claimed && (late || self.journal.unsettled > UNSETTLED) {
                    timers.flush_claimed = true;
                    return Some(Chore::Flush);
                }
            }
        }
        if !self.timers.discard_claimed && self.discards.is_due(now) {
            self.timers.discard_claimed = true;
            return Some(Chore::Discard);
        }
        let timers = &mut self.timers;
        if waiting == 0 && !unmarked {
            timers.pending_since = None;
            return None;
        }
        let since = *timers.pending_since.get_or_insert(now);
        let late = now.saturating_sub(since) >= PUBLISH_NS;
        if timers.publish_claimed || !(late || waiting >= MANY) {
            return None;
        }
        timers.publish_claimed = true;
        Some(Chore::Publish)
    }
}

impl Volume {
    pub(crate) fn new(key: VolumeKey, derivation: Derivation, core: Core) -> Self {
        Self {
            geometry: core.geometry,
            key,
            derivation,
            keys: Lock::new(BTreeMap::new()),
            times: core.times.clone(),
            core: Lock::new(core),
            expecting: AtomicBool::new(false),
        }
    }

    /// The chore that is due now, if any; it is the caller's then, to run with
    /// [`Self::run_chore`]. To be asked after completions and every few milliseconds while
    /// something is unwritten; `now_ns` is the platform's clock.
    ///
    /// Nothing depends on it being called but how much a crash can take, and the time of opening.
    pub fn due(&self, now_ns: u64) -> Option<Chore> {
        self.core.lock().due(now_ns)
    }

    /// Runs a chore that [`Self::due`] gave.
    ///
    /// # Errors
    /// `EIO` when the volume has failed; nothing is lost that was durable.
    pub async fn run_chore<D: Disk>(&self, disk: &D, chore: Chore) -> Result<(), Errno> {
        let (stamp, queued, waiting) = {
            let core = self.core.lock();
            let waiting = core.journal.pending.len() + core.journal.carry.len();
            (core.stamp, core.journal.queued, waiting)
        };
        let result = match chore {
            Chore::Publish if waiting > 0 => self.publish(disk, queued).await,
            Chore::Publish => self.mark(disk).await,
            Chore::Flush => self.sync_to(disk, stamp, queued).await,
            Chore::Checkpoint => self.checkpoint(disk, false, true).await,
            Chore::Register => self.register().await.map_err(|_| Errno::EIO),
            Chore::Discard => {
                self.discard_turn(disk).await;
                Ok(())
            }
        };
        self.decline(chore);
        result
    }

    /// Gives back a chore that [`Self::due`] gave, not run: it is due again after its time.
    pub fn decline(&self, chore: Chore) {
        let mut core = self.core.lock();
        let core = &mut *core;
        let timers = &mut core.timers;
        match chore {
            Chore::Register => {
                if let Some(fresh) = core.fresh.as_mut() {
                    fresh.claimed = false;
                }
            }
            Chore::Publish => (timers.publish_claimed, timers.pending_since) = (false, None),
            Chore::Flush => (timers.flush_claimed, timers.dirty_since) = (false, None),
            Chore::Checkpoint => (timers.checkpoint_claimed, timers.idle_since) = (false, None),
            Chore::Discard => timers.discard_claimed = false,
        }
    }

    /// Waits for all writes, writes everything down, and marks the volume as cleanly closed.
    /// Afterwards it can be read, not written.
    ///
    /// # Errors
    /// `EIO` when something could not be written: the next opening recovers.
    pub async fn close<D: Disk>(&self, disk: &D) -> Result<(), Errno> {
        match self.core.lock().health {
            Health::Good => {}
            Health::ReadOnly => return Ok(()),
            Health::Failed => return Err(Errno::EIO),
        }
        let ticket = self.enter(0, EOF, true).await;
        let mut result = self.checkpoint(disk, true, false).await;
        if self.core.lock().health == Health::Good {
            // Changes that could not be merged stay in the journal: closed, but not cleanly.
            let (stamp, queued) = {
                let core = self.core.lock();
                (core.stamp, core.journal.queued)
            };
            result = result.and(self.sync_to(disk, stamp, queued).await);
        }
        if result.is_ok() {
            result = self.register_close().await.map_err(|_| Errno::EIO);
            self.discard_rest(disk).await;
        }
        let wakers = {
            let mut core = self.core.lock();
            if core.health == Health::Good {
                core.health = Health::ReadOnly;
            }
            core.ranges.leave(ticket)
        };
        wake(wakers);
        result
    }

    /// Whether [`Self::rest`] is the better way to close: little was changed since the last
    /// checkpoint, and no space is to be given back.
    pub fn may_rest(&self) -> bool {
        let core = self.core.lock();
        let space = core.active.zeroes.iter().map(|zero| zero.end - zero.first).sum::<u64>();
        core.health == Health::Good
            && !core.checkpoints.running
            && core.active.weight() <= REST_RECORDS
            && space <= REST_RECORDS
            && core.active.carried.is_empty()
            && core.journal.next - core.journal.start <= REST_RECORDS
            && core.fresh.is_none()
    }

    /// Waits for all writes and publishes them in the journal, without a checkpoint and without a
    /// flush: the next opening finds what it finds after a crash of the process, with nothing
    /// lost. Answers whether a flush of the host file is needed to make it durable. Afterwards the
    /// volume can be read, not written.
    ///
    /// # Errors
    /// `EIO` when something could not be written: the next opening recovers.
    pub async fn rest<D: Disk>(&self, disk: &D) -> Result<bool, Errno> {
        let ticket = self.enter(0, EOF, true).await;
        let queued = self.core.lock().journal.queued;
        let mut result = self.publish(disk, queued).await;
        if result.is_ok() {
            let last = self.last_sealed().await;
            result = self.written(last).await;
        }
        let (wakers, unflushed) = {
            let mut core = self.core.lock();
            if core.health == Health::Good {
                core.health = Health::ReadOnly;
            }
            let unflushed = core.stamp > core.flushes.stamp || core.journal.last > core.flushes.seq;
            (core.ranges.leave(ticket), unflushed)
        };
        wake(wakers);
        result.map(|()| unflushed)
    }

    /// Keeps at most `bytes` of map nodes in memory from now on, 32 KiB at least; 64 MiB at first.
    pub fn limit_cache(&self, bytes: usize) {
        self.core.lock().cache.limit(bytes);
    }

    /// Bytes of the guest's file.
    pub fn size(&self) -> u64 {
        self.core.lock().size
    }

    /// Bytes the guest may store.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.geometry.capacity * BLOCK_BYTES
    }

    /// Whether writes are refused: opened read-only, closed, or failed.
    pub fn read_only(&self) -> bool {
        self.core.lock().health != Health::Good
    }

    /// Counters since it was opened.
    pub fn counters(&self) -> Counters {
        self.core.lock().counters
    }

    /// How far the volume has come.
    pub fn progress(&self) -> Progress {
        let core = self.core.lock();
        Progress {
            uuid: *self.key.uuid(),
            generation: core.durable_generation,
            durable: core.journal.durable,
            tip: core.journal.next - 1,
        }
    }

    /// What the volume is and how full.
    pub fn info(&self) -> Info {
        let core = self.core.lock();
        let free = core.space.available();
        Info {
            uuid: *self.key.uuid(),
            capacity: self.capacity(),
            size: core.size,
            host_blocks: self.geometry.host_blocks,
            journal_blocks: self.geometry.ring_blocks - RING_RESERVE,
            journal_used: core.journal.next - core.journal.start,
            map_levels: core.map.levels,
            used_blocks: self.geometry.general().saturating_sub(free),
            held_blocks: core.held.blocks,
            free_blocks: free,
            delta_records: core.active.weight(),
            generation: core.generation,
            session: core.session,
            epoch: core.key.id,
            key_version: self.key.version(),
            rekeying: self.key.is_retiring(),
            counter: core.counter_sequence(),
        }
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("info", &self.info()).finish_non_exhaustive()
    }
}
