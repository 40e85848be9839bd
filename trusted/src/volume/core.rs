//! The state of an open volume, behind one lock.
//!
//! Everything here is short: look up, allocate, apply, move the state machine. Sealing, encoding,
//! copying and I/O happen outside, on what was taken out under the lock. Tasks that cannot go on
//! leave a waker in one of the lists; lists are taken out under the lock and woken outside.

use alloc::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    vec::Vec,
};
use core::task::Waker;

use super::{
    cache::NodeCache,
    crypto::{EpochKey, Salt, Tag},
    delta::{self, Delta},
    discard::Discards,
    freshness::Fresh,
    jblock::Record,
    layout::{Geometry, Order, Ptr, RING_RESERVE, nodes_worst},
    ranges::RangeLocks,
    snapshots::Held,
    space::{Run, Space},
    superblock::{Bound, Epoch},
    times::Kept,
};
use crate::errno::Errno;

/// Why the volume no longer does everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// All is well.
    Good,
    /// Opened read-only or closed: writes are refused with `EROFS`.
    ReadOnly,
    /// A flush or the journal failed: writes and syncs are refused with `EIO` for good.
    Failed,
}

/// Tasks that wait for something of the core.
#[derive(Default)]
pub(crate) struct Waiters(Vec<Waker>);

impl Waiters {
    pub(crate) fn add(&mut self, waker: &Waker) {
        if !self.0.iter().any(|w| w.will_wake(waker)) {
            self.0.push(waker.clone());
        }
    }

    pub(crate) fn take(&mut self) -> Vec<Waker> {
        core::mem::take(&mut self.0)
    }
}

/// Wakes what was taken out of the core, after its lock was given back.
pub(crate) fn wake(wakers: Vec<Waker>) {
    wakers.into_iter().for_each(Waker::wake);
}

/// A record that waits for its journal block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    pub(crate) record: Record,
    /// The next one belongs into the same journal block.
    pub(crate) glued: bool,
    /// For a VOID: the journal block whose eager record it takes back.
    pub(crate) resolves: Option<u64>,
    /// For an eager record: its write, as slot and serial number.
    pub(crate) eager: Option<(usize, u64)>,
    /// Queued before this many cuts had been made.
    pub(crate) interval: u64,
}

impl Pending {
    pub(crate) const fn new(record: Record) -> Self {
        Self { record, glued: false, resolves: None, eager: None, interval: 0 }
    }
}

/// A write on its way to the host.
pub(crate) struct InFlight {
    pub(crate) run: Run,
    pub(crate) serial: u64,
    /// For an eager one: whether and where its records stand.
    pub(crate) eager: Eager,
}

/// Where the records of a write stand that are published before its data has landed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Eager {
    /// Not eager: published after completion.
    No,
    /// Will be taken into the next journal block.
    Queued,
    /// In this journal block.
    Published(u64),
    /// In this journal block, which a cut has put out of the replay: to be published again.
    Carried(u64),
}

/// The journal's state.
pub(crate) struct Journal {
    /// Next sequence number.
    pub(crate) next: u64,
    /// Tag of the last block.
    pub(crate) prev: Tag,
    /// First block to replay if the power goes now.
    pub(crate) start: u64,
    /// One task seals at a time, for the chain.
    pub(crate) sealing: bool,
    /// Blocks being written.
    pub(crate) writing: Vec<u64>,
    /// Everything up to this one is durable and settled.
    pub(crate) durable: u64,
    /// The mark in the last block.
    pub(crate) marked: u64,
    /// Eager records not yet resolved: journal block → how many writes.
    pub(crate) unresolved: BTreeMap<u64, u32>,
    /// Records that wait for a block.
    pub(crate) pending: VecDeque<Pending>,
    /// Records that must be published again before the running checkpoint's superblock; go first.
    pub(crate) carry: VecDeque<Pending>,
    /// How many records were ever put into and taken out of `pending`.
    pub(crate) queued: u64,
    pub(crate) taken: u64,
    /// Cuts made.
    pub(crate) interval: u64,
    /// Last block that has records.
    pub(crate) last: u64,
    /// Block records published and not yet covered by a durable mark.
    pub(crate) unsettled: u64,
    pub(crate) waiters: Waiters,
}

impl Journal {
    /// Blocks up to this one have all been written.
    pub(crate) fn complete(&self) -> u64 {
        self.writing.iter().min().copied().unwrap_or(self.next) - 1
    }

    /// Ring places that may be written now.
    pub(crate) fn room(&self, geometry: &Geometry, reserve: u64) -> u64 {
        if left_out!(EarlyRing) {
            return geometry.ring_blocks - reserve - self.writing.len() as u64;
        }
        let first = self.writing.iter().min().copied().unwrap_or(self.start).min(self.start);
        (geometry.ring_blocks - reserve).saturating_sub(self.next - first)
    }

    /// What a flush issued now would settle.
    pub(crate) fn settled(&self) -> u64 {
        let unresolved = self.unresolved.keys().next().copied().unwrap_or(u64::MAX);
        self.complete().min(unresolved - 1)
    }

    pub(crate) fn queue(&mut self, pending: Pending) {
        self.pending.push_back(Pending { interval: self.interval, ..pending });
        self.queued += 1;
    }

    /// Drops pending records for which `gone` holds.
    pub(crate) fn drop_pending(&mut self, mut gone: impl FnMut(&Pending) -> bool) {
        let before = self.pending.len();
        self.pending.retain(|pending| !gone(pending));
        self.taken += (before - self.pending.len()) as u64;
    }

    /// A cut is being made, with `frozen`: of writes that were punched since and are not published
    /// only the hole is left. The map will not know when it came to be, so a write that is published
    /// after the cut would be newer than it.
    pub(crate) fn supersede(&mut self, frozen: &Delta) {
        if frozen.zeroes.is_empty() {
            return;
        }
        for pending in self.pending.iter_mut().chain(&mut self.carry) {
            if let Record::Map { block, ptr, .. } = pending.record
                && let Some(order) = frozen.zeroed(block).filter(|zero| *zero > ptr.order)
            {
                pending.record = Record::Zero { first: block, count: 1, order };
            }
        }
    }

    /// An eager write of journal block `seq` has landed or was taken back.
    pub(crate) fn resolve(&mut self, seq: u64) {
        if let Some(count) = self.unresolved.get_mut(&seq) {
            *count -= 1;
            if *count == 0 {
                self.unresolved.remove(&seq);
            }
        }
    }
}

/// The flushes: one in flight, one forming.
#[derive(Default)]
pub(crate) struct Flushes {
    pub(crate) running: bool,
    /// What the last successful flush covers: completions and journal blocks when it was issued.
    pub(crate) stamp: u64,
    pub(crate) seq: u64,
    pub(crate) waiters: Waiters,
}

/// The map as of the last durable checkpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) root: Ptr,
    pub(crate) levels: u32,
    /// An order below it may be older than what the map holds.
    pub(crate) cut: Order,
}

/// The running checkpoint, as others see it.
#[derive(Default)]
pub(crate) struct Checkpoints {
    pub(crate) running: bool,
    /// Nodes that the running one may still need.
    pub(crate) owed: u64,
    /// Its eager writes that are still on their way.
    pub(crate) carried: u64,
    /// How many ended, well or not.
    pub(crate) ended: u64,
    /// How the last one ended.
    pub(crate) outcome: Option<Errno>,
    /// The superblock could not be written: none any more.
    pub(crate) wedged: bool,
    pub(crate) waiters: Waiters,
}

/// Timers of the background work; in nanoseconds of the platform's clock.
#[derive(Default)]
pub(crate) struct Timers {
    pub(crate) pending_since: Option<u64>,
    pub(crate) dirty_since: Option<u64>,
    pub(crate) idle_since: Option<u64>,
    /// `stamp` when `idle_since` was set.
    pub(crate) idle_stamp: u64,
    pub(crate) publish_claimed: bool,
    pub(crate) flush_claimed: bool,
    pub(crate) checkpoint_claimed: bool,
    pub(crate) discard_claimed: bool,
}

/// When the guest syncs after each few writes, records go out beside the data.
#[derive(Default)]
pub(crate) struct Expect {
    /// Syncs in a row that covered few records.
    pub(crate) small: u32,
    /// When the last one was asked for.
    pub(crate) last_ns: u64,
    /// Blocks written since.
    pub(crate) since: u64,
}

/// Counters for operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks that did not authenticate, each time it was seen.
    pub integrity_failures: u64,
    /// Checkpoints that became durable.
    pub checkpoints: u64,
    /// Flushes of the host file.
    pub flushes: u64,
    /// Journal blocks written.
    pub journal_blocks: u64,
    /// Nodes and space pages written.
    pub map_blocks: u64,
    /// Blocks of the guest written.
    pub data_blocks: u64,
    /// Freed blocks that the host took back.
    pub discarded_blocks: u64,
}

/// The state behind the lock.
pub(crate) struct Core {
    pub(crate) geometry: Geometry,
    pub(crate) health: Health,
    pub(crate) key: Arc<EpochKey>,
    pub(crate) salt: Salt,
    pub(crate) counter: u64,
    /// Number of seals after which a checkpoint starts a new epoch.
    pub(crate) rotate_at: u64,
    pub(crate) size: u64,
    pub(crate) size_order: Order,
    pub(crate) birth: u32,
    pub(crate) session: u64,
    pub(crate) generation: u64,
    /// Generation known durable, for the journal's headers.
    pub(crate) durable_generation: u64,
    /// Slot of the last committed superblock.
    pub(crate) slot: usize,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) table_root: Ptr,
    pub(crate) table_levels: u32,
    /// The snapshots.
    pub(crate) held: Held,
    /// Epochs that the next checkpoint writes to the table again, to move its nodes.
    pub(crate) retable: Vec<Epoch>,
    /// The next checkpoint leaves nothing that only a retiring key opens in the tables it writes.
    pub(crate) renewing: bool,
    pub(crate) active: Delta,
    pub(crate) frozen: Option<Arc<Delta>>,
    pub(crate) map: Map,
    pub(crate) cache: NodeCache,
    pub(crate) space: Space,
    pub(crate) discards: Discards,
    pub(crate) journal: Journal,
    pub(crate) flushes: Flushes,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) ranges: RangeLocks,
    pub(crate) in_flight: Vec<Option<InFlight>>,
    pub(crate) launched: u64,
    /// Counts completions that change what a flush makes durable.
    pub(crate) stamp: u64,
    pub(crate) timers: Timers,
    pub(crate) expect: Expect,
    pub(crate) counters: Counters,
    /// If the volume is bound to a monotonic counter.
    pub(crate) fresh: Option<Fresh>,
    /// What the superblock found said of one.
    pub(crate) bound: Option<Bound>,
    pub(crate) times: Arc<Kept>,
    #[cfg(test)]
    pub(crate) canary: super::tests::Canary,
}

/// Whether a block's pointer is known.
pub(crate) enum Found {
    /// What the block is now.
    Here(Ptr),
    /// Ask the map under this root; a delta entry that may be older is given with it.
    InMap(Map, Option<(Order, Ptr)>),
}

impl Core {
    /// Refuses writes of a volume that must not be written.
    pub(crate) fn writable(&self) -> Result<(), Errno> {
        match self.health {
            Health::Good => Ok(()),
            Health::ReadOnly => Err(Errno::EROFS),
            Health::Failed => Err(Errno::EIO),
        }
    }

    /// Takes `n` orders for `n` seals.
    pub(crate) fn orders(&mut self, n: u64) -> Result<Order, Errno> {
        let first = self.counter;
        if first + n >= Order::MAX_COUNTER {
            return Err(Errno::EIO);
        }
        self.counter += if self.is(canary!(SharedNonce)) { n.min(1) } else { n };
        Ok(Order::new(self.key.id, first))
    }

    /// What was last applied to `block`, without reading the map.
    pub(crate) fn find(&self, block: u64) -> Found {
        let active = self.active.get(block);
        let frozen = self.frozen.as_ref().and_then(|frozen| frozen.get(block));
        let newest = match (active, frozen) {
            (Some(a), Some(f)) => Some(if f.0 > a.0 { f } else { a }),
            (a, f) => a.or(f),
        };
        match newest {
            Some((order, ptr)) if order >= self.map.cut || self.is_carried(block) => {
                Found::Here(ptr)
            }
            older => Found::InMap(self.map, older),
        }
    }

    fn is_carried(&self, block: u64) -> bool {
        let frozen = self.frozen.as_ref().is_some_and(|frozen| frozen.carried.contains(&block));
        frozen || self.active.carried.contains(&block)
    }

    /// Whether `records` more changed blocks, which take `blocks` places, leave enough free that
    /// a checkpoint can always finish. `last` may use what is kept for shrinking.
    pub(crate) fn admits(&self, records: u64, blocks: u64, last: bool) -> bool {
        let nodes = nodes_worst(self.geometry.capacity, self.active.weight() + records);
        let slack = if last { self.geometry.slack / 4 } else { self.geometry.slack };
        self.space.available() >= nodes + self.checkpoints.owed + slack + blocks
    }

    /// Whether the deltas have room in memory.
    pub(crate) fn has_memory(&self) -> bool {
        let frozen = self.frozen.as_ref();
        self.active.maps.len() + frozen.map_or(0, |f| f.maps.len()) < delta::MAX_RECORDS
            && self.active.zeroes.len() < 2 * delta::CUT_ZEROES
    }

    /// Whether the next checkpoint should begin: half of what memory, ring or space allow.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        let used = self.journal.next - self.journal.start;
        let nodes = nodes_worst(self.geometry.capacity, self.active.weight());
        let spare = self.space.available().saturating_sub(nodes + self.geometry.slack);
        self.active.maps.len() >= delta::CUT_RECORDS
            || self.active.zeroes.len() >= delta::CUT_ZEROES
            || used > (self.geometry.ring_blocks - RING_RESERVE) / 2
            || (spare < self.space.busy() && self.space.busy() > 64)
    }

    /// Registers a write; its place counts as in flight until [`Self::landed`].
    pub(crate) fn launch(&mut self, run: Run) -> usize {
        self.launched += 1;
        let entry = Some(InFlight { run, serial: self.launched, eager: Eager::No });
        match self.in_flight.iter().position(Option::is_none) {
            Some(free) => {
                self.in_flight[free] = entry;
                free
            }
            None => {
                self.in_flight.push(entry);
                self.in_flight.len() - 1
            }
        }
    }

    /// The host has answered the write.
    pub(crate) fn landed(&mut self, id: usize) -> Eager {
        let eager = self.in_flight[id].take().map_or(Eager::No, |entry| entry.eager);
        if let Eager::Published(seq) | Eager::Carried(seq) = eager {
            self.journal.resolve(seq);
        }
        if matches!(eager, Eager::Carried(_)) {
            self.checkpoints.carried -= 1;
        }
        eager
    }

    /// Applies one written block; returns whether it is now what the block is.
    pub(crate) fn apply(&mut self, block: u64, ptr: Ptr) -> bool {
        self.counters.data_blocks += 1;
        let newer = self.frozen.as_ref().and_then(|f| f.maps.get(block));
        if newer.is_some_and(|f| f.order > ptr.order) && !self.is(canary!(LastCompletes)) {
            return false;
        }
        #[cfg(test)]
        if self.is(canary!(LastCompletes)) || self.is(canary!(EarlyReuse)) {
            self.break_apply(block, ptr);
        }
        self.active.insert(block, ptr)
    }

    /// The file ends at `end` at least.
    pub(crate) fn extend(&mut self, end: u64) -> Result<(), Errno> {
        if end > self.size {
            let order = self.orders(1)?;
            self.size = end;
            self.size_order = order;
            self.journal.queue(Pending::new(Record::Size { size: end, order }));
        }
        Ok(())
    }

    /// Something failed that no later success can make good.
    pub(crate) fn fail(&mut self) -> Vec<Waker> {
        self.health = Health::Failed;
        let mut wakers = self.journal.waiters.take();
        wakers.extend(self.flushes.waiters.take());
        wakers.extend(self.checkpoints.waiters.take());
        wakers
    }

    #[cfg(test)]
    pub(crate) fn is(&self, canary: super::tests::Canary) -> bool {
        self.canary == canary
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    pub(crate) const fn is(&self, (): ()) -> bool {
        false
    }

    #[cfg(test)]
    fn break_apply(&mut self, block: u64, ptr: Ptr) {
        let old = self.active.maps.get(block).copied();
        if self.is(canary!(EarlyReuse)) {
            let durable = self.frozen.as_ref().and_then(|f| f.maps.get(block)).copied();
            if let Some(old) = old.or(durable).filter(|old| old.order < ptr.order) {
                self.space.forget(old.place());
            }
        } else {
            self.active.maps.remove(block);
        }
    }
}
