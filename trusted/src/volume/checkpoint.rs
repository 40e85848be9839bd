//! Checkpoints: one interval's changes become the durable map.
//!
//! The order of things, and why (each step waits for the one before):
//! 1. *Cut.* Under the lock all lists are swapped at once, so the checkpoint holds no write
//!    without every write that had completed before it was submitted.
//! 2. *Merge.* New nodes, table nodes and space pages go to places that no durable state names.
//! 3. *Carry.* Eager writes that were on their way at the cut have their records before the new
//!    replay start; they are published again behind it. The superblock waits for that.
//! 4. *Flush.* Everything the superblock will name is durable.
//! 5. *Superblock*, to the slot that does not hold the last one; *flush*.
//! 6. *Release.* Only now may the interval's released places be given out again.
//!
//! A checkpoint needs no journal space beyond the reserve and no place beyond what writers left
//! to it, so it can always finish.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{future::poll_fn, task::Poll};
use futures_util::future;

use super::{
    Volume,
    core::{Eager, Health, Map, Pending, wake},
    crypto::{Salt, Tag, sha256},
    delta::{Delta, Zero},
    epochs::TableUpdate,
    jblock::Record,
    journal::Stopped,
    layout::{Order, Ptr, SUPERBLOCKS, nodes_worst},
    places::Places,
    snapshots::{Held, Task},
    spacemap::SpaceUpdate,
    superblock::{Epoch, RECENT, Superblock},
};
use crate::{
    disk::{Block, Disk},
    errno::Errno,
};

/// What the cut took out of the core.
struct Cut {
    frozen: Arc<Delta>,
    interval: u64,
    start: u64,
    prev: Tag,
    order: Order,
    size: u64,
    size_order: Order,
    map: Map,
    epochs: Vec<Epoch>,
    /// Nothing that is merged is younger.
    birth: u32,
    newest: u32,
}

/// What the merge made.
pub(crate) struct Merged {
    pub(crate) root: Ptr,
    pub(crate) allocs: Places,
    pub(crate) frees: Places,
    /// Changes whose leaf could not be read: they stay in the delta.
    pub(crate) carried: Vec<Record>,
    /// Birth number of the nodes it writes.
    pub(crate) birth: u32,
    /// Number of the newest snapshot.
    newest: u32,
    /// Blocks that were given up and stay, for a snapshot.
    pub(crate) held: u64,
}

impl Merged {
    pub(crate) fn new(root: Ptr, birth: u32, newest: u32) -> Self {
        Self {
            root,
            allocs: Places::default(),
            frees: Places::default(),
            carried: Vec::new(),
            birth,
            newest,
            held: 0,
        }
    }

    /// The map no longer reaches this block. Free, unless a snapshot holds it.
    pub(crate) fn release(&mut self, old: &Ptr) {
        if old.birth() > self.newest {
            self.frees.push(old.place());
        } else {
            self.held += 1;
        }
    }
}

impl Volume {
    /// Runs a checkpoint, or waits for the one that is running. For writers that need room.
    pub(crate) async fn make_room<D: Disk>(&self, disk: &D) -> Result<(), Errno> {
        self.checkpoint(disk, false, true).await
    }

    /// Runs a checkpoint. `clean`: nothing will be written after it. `join`: be content with one
    /// that is already running.
    pub(crate) async fn checkpoint<D: Disk>(
        &self,
        disk: &D,
        clean: bool,
        join: bool,
    ) -> Result<(), Errno> {
        self.checkpoint_for(disk, clean, join, None).await
    }

    /// Runs a checkpoint of its own that does something to the snapshots besides.
    pub(crate) async fn checkpoint_with<D: Disk>(
        &self,
        disk: &D,
        task: Option<Task<'_>>,
    ) -> Result<(), Errno> {
        self.checkpoint_for(disk, false, false, task).await
    }

    async fn checkpoint_for<D: Disk>(
        &self,
        disk: &D,
        clean: bool,
        join: bool,
        task: Option<Task<'_>>,
    ) -> Result<(), Errno> {
        let mut waited = None;
        let mine = poll_fn(|cx| {
            let mut core = self.core.lock();
            if let Some(ended) = waited
                && core.checkpoints.ended > ended
                && join
            {
                return Poll::Ready(core.checkpoints.outcome.map_or(Ok(false), Err));
            }
            if core.health != Health::Good || core.checkpoints.wedged {
                return Poll::Ready(Err(Errno::EIO));
            }
            if core.checkpoints.running {
                waited = waited.or(Some(core.checkpoints.ended));
                core.checkpoints.waiters.add(cx.waker());
                return Poll::Pending;
            }
            core.checkpoints.running = true;
            Poll::Ready(Ok(true))
        })
        .await?;
        if !mine {
            return Ok(());
        }
        let result = self.run_checkpoint(disk, clean, task).await;
        let wakers = {
            let mut core = self.core.lock();
            core.checkpoints.running = false;
            core.checkpoints.ended += 1;
            core.checkpoints.outcome = result.err();
            let mut wakers = core.checkpoints.waiters.take();
            wakers.extend(core.journal.waiters.take());
            wakers
        };
        wake(wakers);
        result
    }

    async fn run_checkpoint<D: Disk>(
        &self,
        disk: &D,
        clean: bool,
        task: Option<Task<'_>>,
    ) -> Result<(), Errno> {
        let cut = self.cut(matches!(task, Some(Task::Keep { .. }))).await?;
        let done = self.write_checkpoint(disk, &cut, clean, task).await;
        if done.is_err() {
            self.abort(&cut);
        }
        done
    }

    /// Step 1. Needs no journal space: records that were not published yet need not be. `keep`:
    /// whatever is written after the cut is younger than what was before.
    async fn cut(&self, keep: bool) -> Result<Cut, Errno> {
        poll_fn(|cx| {
            let mut guard = self.core.lock();
            let core = &mut *guard;
            if core.health == Health::Failed {
                return Poll::Ready(Err(Errno::EIO));
            }
            if core.journal.sealing {
                // The tag of the last block is not known yet.
                core.journal.waiters.add(cx.waker());
                return Poll::Pending;
            }
            let frozen = Arc::new(core::mem::take(&mut core.active));
            core.frozen = Some(frozen.clone());
            let settled = core.is(canary!(InFlightSettled));
            let in_flight = core.in_flight.iter().flatten().filter(|_| !settled);
            core.space.cut(in_flight.map(|write| write.run).chain(core.discards.going));
            let mut queued = Vec::new();
            for (id, slot) in core.in_flight.iter_mut().enumerate() {
                let Some(write) = slot else { continue };
                match write.eager {
                    Eager::Published(seq) => {
                        write.eager = Eager::Carried(seq);
                        core.checkpoints.carried += 1;
                    }
                    Eager::Queued => {
                        write.eager = Eager::No;
                        queued.push((id, write.serial));
                    }
                    Eager::No | Eager::Carried(_) => {}
                }
            }
            if !queued.is_empty() {
                core.journal.drop_pending(|p| p.eager.is_some_and(|e| queued.contains(&e)));
            }
            core.journal.supersede(&frozen);
            core.journal.interval += 1;
            core.checkpoints.owed = nodes_worst(core.geometry.capacity, frozen.weight()) + 8;
            let birth = core.birth;
            core.birth += u32::from(keep && !core.is(canary!(SameBirth)));
            Poll::Ready(Ok(Cut {
                frozen,
                interval: core.journal.interval,
                start: core.journal.next,
                prev: core.journal.prev,
                order: Order::new(core.key.id, core.counter),
                size: core.size,
                size_order: core.size_order,
                map: core.map,
                epochs: core.epochs.clone(),
                birth,
                newest: if core.is(canary!(FreeHeld)) { 0 } else { core.held.newest },
            }))
        })
        .await
    }

    /// Steps 2 to 6.
    async fn write_checkpoint<D: Disk>(
        &self,
        disk: &D,
        cut: &Cut,
        clean: bool,
        task: Option<Task<'_>>,
    ) -> Result<(), Errno> {
        let mut merged = self.merge(disk, &cut.map, &cut.frozen, cut.birth, cut.newest).await?;
        let held = match task {
            Some(task) => self.change_snapshots(disk, task, cut.map, cut.size, &mut merged).await?,
            None => {
                let held = self.core.lock().held;
                Held { blocks: held.blocks + merged.held, ..held }
            }
        };
        let Merged { root, mut allocs, mut frees, carried, .. } = merged;
        let mut new = core::mem::take(&mut self.core.lock().retable);
        new.extend(cut.epochs.iter().filter(|epoch| !epoch.tabled).cloned());
        let table = self.update_table(disk, &new, &mut allocs, &mut frees).await?;
        let freed = self.freed_runs(&frees);
        if self.core.lock().is(canary!(EarlyDiscard)) {
            for (start, end) in &freed {
                let _ = disk.discard(*start, end - start).await;
            }
        }
        let space = self.update_space(disk, allocs, frees).await?;
        self.carry(disk, carried).await?;
        let (stamp, seq, skip) = {
            let mut core = self.core.lock();
            core.stamp += 1;
            (core.stamp, core.journal.complete(), core.is(canary!(NoNodeFlush)))
        };
        if !skip {
            self.flush(disk, stamp, seq).await?;
        }
        let rotated = self.rotation(disk)?;
        let mut superblock = self.superblock(cut, root, &table, &space, held, clean);
        superblock.epochs.extend(rotated.clone());
        let slot = self.commit(disk, &superblock).await?;
        self.release(cut, superblock, slot, &table, space, rotated, clean);
        self.core.lock().discards.freed(freed);
        Ok(())
    }

    /// Step 3.
    async fn carry<D: Disk>(&self, disk: &D, carried: Vec<Record>) -> Result<(), Errno> {
        {
            let mut core = self.core.lock();
            for record in carried {
                match record {
                    Record::Map { block, ptr, .. } => {
                        core.active.insert(block, ptr);
                        core.active.carried.insert(block);
                        core.space.keep(ptr.place());
                    }
                    Record::Zero { first, count, order } => {
                        core.active.zeroes.push(Zero { first, end: first + count, order });
                    }
                    Record::Size { .. } | Record::Void { .. } => {}
                }
                core.journal.carry.push_back(Pending::new(record));
            }
        }
        poll_fn(|cx| {
            let mut core = self.core.lock();
            if core.health == Health::Failed {
                return Poll::Ready(Err(Errno::EIO));
            }
            if core.checkpoints.carried == 0 || core.is(canary!(NoCarryWait)) {
                return Poll::Ready(Ok(()));
            }
            core.checkpoints.waiters.add(cx.waker());
            Poll::Pending
        })
        .await?;
        match self.publish_now(disk, 0, 0).await {
            Ok(()) => {}
            Err(Stopped::Full) => return Err(Errno::ENOSPC),
            Err(Stopped::Errno(errno)) => return Err(errno),
        }
        let last = self.last_sealed().await;
        self.written(last).await
    }

    /// A new epoch, when this one has sealed enough.
    fn rotation<D: Disk>(&self, disk: &D) -> Result<Option<Epoch>, Errno> {
        let core = self.core.lock();
        if core.counter < core.rotate_at || core.key.id >= Order::MAX_EPOCH {
            return Ok(None);
        }
        let mut salt: Salt = [0; 24];
        disk.random(&mut salt).map_err(|_| Errno::EIO)?;
        let key_version = self.key.version();
        Ok(Some(Epoch { id: core.key.id + 1, salt, key_version, tabled: false }))
    }

    fn superblock(
        &self,
        cut: &Cut,
        root: Ptr,
        table: &TableUpdate,
        space: &SpaceUpdate,
        held: Held,
        clean: bool,
    ) -> Superblock {
        let core = self.core.lock();
        let keep = cut.epochs.len().saturating_sub(RECENT / 2);
        Superblock {
            generation: core.generation + 1,
            clean: clean && core.journal.next == cut.start,
            session: core.session,
            size: cut.size,
            size_order: cut.size_order,
            geometry: core.geometry,
            map_root: root,
            map_levels: cut.map.levels,
            cut: cut.order,
            space_root: space.root,
            table_root: table.root,
            table_levels: table.levels,
            replay_seq: cut.start,
            replay_prev: cut.prev,
            durable: core.journal.durable,
            birth: core.birth,
            held,
            epochs: cut.epochs[keep..]
                .iter()
                .filter(|epoch| !core.renewing || epoch.key_version == self.key.version())
                .map(|epoch| Epoch { tabled: true, ..epoch.clone() })
                .collect(),
            // `commit` knows.
            counter: None,
            times: core.times.get(),
        }
    }

    /// Step 5. Writes a superblock to the slot that does not hold the last one, and flushes.
    /// Returns the slot.
    pub(crate) async fn commit<D: Disk>(
        &self,
        disk: &D,
        superblock: &Superblock,
    ) -> Result<usize, Errno> {
        let slot = {
            let core = self.core.lock();
            if core.is(canary!(SameSlot)) { core.slot } else { 1 - core.slot }
        };
        let mut salt: Salt = [0; 24];
        disk.random(&mut salt).map_err(|_| Errno::EIO)?;
        let superblock = Superblock { counter: self.hold_counter().await, ..superblock.clone() };
        let sealed = Box::new(superblock.seal(&self.key, &salt, slot));
        let committed = self.write_superblock(disk, &sealed, slot).await;
        let done = committed.is_ok().then(|| (&superblock, sha256(&*sealed)));
        self.release_counter(done);
        committed.map(|()| slot)
    }

    async fn write_superblock<D: Disk>(
        &self,
        disk: &D,
        sealed: &Block,
        slot: usize,
    ) -> Result<(), Errno> {
        let [a, b] = SUPERBLOCKS[slot];
        let (a, b) =
            future::join(self.put_block(disk, a, sealed), self.put_block(disk, b, sealed)).await;
        if let Err(errno) = a.and(b) {
            // It may be there or not. Both states can be recovered from as long as no other
            // superblock is written: the journal goes on from the old replay start.
            self.core.lock().checkpoints.wedged = true;
            return Err(errno);
        }
        let stamp = {
            let mut core = self.core.lock();
            core.stamp += 1;
            core.stamp
        };
        self.flush(disk, stamp, 0).await
    }

    /// Step 6.
    #[allow(clippy::too_many_arguments)]
    fn release(
        &self,
        cut: &Cut,
        superblock: Superblock,
        slot: usize,
        table: &TableUpdate,
        space: SpaceUpdate,
        rotated: Option<Epoch>,
        clean: bool,
    ) {
        let key = rotated.map(|epoch| {
            let key = Arc::new(self.key.epoch(epoch.id, &epoch.salt));
            self.remember(key.clone());
            (key, epoch.salt)
        });
        let mut guard = self.core.lock();
        let core = &mut *guard;
        let frozen = core.frozen.take();
        core.map = Map { root: superblock.map_root, levels: superblock.map_levels, cut: cut.order };
        if core.discards.wanted() {
            let unnamed = core.space.unnamed(&space.changed);
            core.discards.freed(unnamed);
        }
        core.space.complete(space.changed, space.root, space.free);
        core.journal.start = cut.start;
        core.journal.drop_pending(|pending| pending.interval < cut.interval);
        core.journal.unresolved.retain(|seq, _| *seq >= cut.start);
        core.generation = superblock.generation;
        core.durable_generation = superblock.generation;
        core.slot = slot;
        core.epochs = superblock.epochs;
        core.table_root = table.root;
        core.table_levels = table.levels;
        core.held = superblock.held;
        core.checkpoints.owed = 0;
        core.counters.checkpoints += 1;
        if let Some((key, salt)) = key {
            core.key = key;
            core.salt = salt;
            core.counter = 1;
        }
        if clean {
            core.health = Health::ReadOnly;
        }
        drop(guard);
        // A large map is freed here, outside the lock.
        drop(frozen);
    }

    /// The checkpoint was given up: its interval goes on, nothing it released is free.
    fn abort(&self, cut: &Cut) {
        let mut guard = self.core.lock();
        let core = &mut *guard;
        core.active.absorb(&cut.frozen);
        core.frozen = None;
        core.space.abort();
        core.checkpoints.owed = 0;
    }
}
