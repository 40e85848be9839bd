//! Writing the guest's file: every block to a fresh place, never over what is there.
//!
//! Holds: order is taken when a write is submitted, the map changes when it has completed; a
//! failed write changes nothing; plaintext is sealed in private memory and only then copied to a
//! transfer buffer; a write of a part of a block excludes all other writes of that block.

use alloc::{boxed::Box, sync::Arc};
use core::{future::poll_fn, sync::atomic::Ordering, task::Poll};
use futures_util::{StreamExt, future, stream::FuturesOrdered};

use super::{
    Volume,
    core::{Core, Eager, Pending, wake},
    crypto::{EpochKey, Kind, TAG, Tag, aad},
    error::guest_errno,
    freshness::Fresh,
    jblock::Record,
    layout::{BLOCK_BYTES, Order, Ptr},
    ranges::EOF,
    read::{PIECE, PIECES, join, outcome},
    resize::Cutoff,
    space::{Run, Want},
    sync::EXPECT_NS,
};
use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    errno::Errno,
    platform::Buffer,
};

/// Checkpoints that a write lets make room, and that leave it none, before it gives up.
const IN_VAIN: u32 = 32;

/// Blocks an eager write has at most.
const EAGER_BLOCKS: u64 = 8;
/// No write is eager while this many blocks have been written since the last sync.
const EAGER_UNSYNCED: u64 = 32;
/// Records that wait for a journal block before a writer publishes them itself.
const PUBLISH_AT: usize = 16 * 96;

/// Where the plaintext comes from.
pub(crate) enum Source<'a, B: Buffer> {
    /// The guest's buffer, from this byte on.
    Guest(&'a B, usize),
    /// One block in private memory.
    Private(&'a Block),
}

impl<B: Buffer> Clone for Source<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Buffer> Copy for Source<'_, B> {}

/// What happens with the file when a write has landed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then {
    /// It ends where the blocks end, at least.
    Extend,
    /// It ends at this byte at least.
    Reach(u64),
    /// It is cut off, together with the write.
    Cutoff(Cutoff),
}

/// A write that has its place and its order.
struct Started {
    run: Run,
    first: Order,
    birth: u32,
    id: usize,
    key: Arc<EpochKey>,
    eager: bool,
}

/// Why a write could not start.
enum Stop {
    Errno(Errno),
    /// Bring in pages of the space map.
    Page(Want),
    /// Let a checkpoint make room.
    Room,
}

/// How an attempt to write a run ended.
enum Wrote {
    /// So many blocks are applied; fewer than the run only after a fault.
    Done(u64, Option<Errno>),
    /// The host failed; nothing changed.
    Failed(HostError),
}

impl Volume {
    /// Writes `buffer` at byte `offset`; short where the volume's capacity ends.
    ///
    /// The data has reached the host when it returns; it is durable after [`Self::sync`].
    ///
    /// # Errors
    /// `ENOSPC` beyond the capacity or when no place is left, `EROFS`, `EIO`, `EFAULT`; only when
    /// nothing was written from the start of the buffer.
    pub async fn write<D: Disk>(
        &self,
        disk: &D,
        offset: u64,
        buffer: &impl Buffer,
    ) -> Result<usize, Errno> {
        let (len, size) = self.clip(Some(offset), buffer.len())?;
        if len == 0 {
            return Ok(0);
        }
        // Writes beyond the end go on beside each other, but not beside an append or truncate.
        let extends = offset + len as u64 > size;
        let ticket = if extends { Some(self.enter(EOF, EOF, false).await) } else { None };
        let result = self.write_span(disk, offset, len, buffer).await;
        self.leave(ticket);
        result
    }

    /// Writes `buffer` at the end of the file, wherever that is when its turn comes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn append<D: Disk>(&self, disk: &D, buffer: &impl Buffer) -> Result<usize, Errno> {
        self.append_somewhere(disk, buffer).await.map(|(_, length)| length)
    }

    /// As [`Self::append`]; answers also at which byte the data begins.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn append_somewhere<D: Disk>(
        &self,
        disk: &D,
        buffer: &impl Buffer,
    ) -> Result<(u64, usize), Errno> {
        let ticket = self.enter(EOF, EOF, true).await;
        let result = match self.clip(None, buffer.len()) {
            Ok((0, offset)) => Ok((offset, 0)),
            Ok((len, offset)) => {
                self.write_span(disk, offset, len, buffer).await.map(|done| (offset, done))
            }
            Err(errno) => Err(errno),
        };
        self.leave(Some(ticket));
        result
    }

    /// Bytes that fit below the capacity from `offset` (or the end) on, and the file's size.
    fn clip(&self, offset: Option<u64>, len: usize) -> Result<(usize, u64), Errno> {
        let core = self.core.lock();
        core.writable()?;
        let offset = offset.unwrap_or(core.size);
        let capacity = self.geometry.capacity * BLOCK_BYTES;
        if len > 0 && offset >= capacity {
            return Err(Errno::ENOSPC);
        }
        Ok((capacity.saturating_sub(offset).min(len as u64) as usize, core.size))
    }

    async fn write_span<D: Disk>(
        &self,
        disk: &D,
        offset: u64,
        len: usize,
        buffer: &impl Buffer,
    ) -> Result<usize, Errno> {
        let end = offset + len as u64;
        let (mut at, mut total) = (offset, (0, None));
        while at < end && total.1.is_none() {
            let from = (at % BLOCK_BYTES) as usize;
            let whole = (end - at) / BLOCK_BYTES;
            let buffer_at = (at - offset) as usize;
            if from == 0 && whole > 0 {
                let first = at / BLOCK_BYTES;
                let done = self.write_whole(disk, first, whole, buffer, buffer_at).await;
                join(&mut total, done);
                at += whole * BLOCK_BYTES;
            } else {
                let len = (BLOCK - from).min((end - at) as usize);
                let block = at / BLOCK_BYTES;
                let done = self.write_part(disk, block, from, len, buffer, buffer_at).await;
                join(&mut total, done);
                at += len as u64;
            }
        }
        outcome(total)
    }

    /// Waits until blocks `first..=last` may be written; returns the ticket to give back.
    pub(crate) async fn enter(&self, first: u64, last: u64, exclusive: bool) -> u64 {
        let ticket = {
            let mut core = self.core.lock();
            let exclusive = exclusive && !core.is(canary!(SharedPartial));
            core.ranges.enter(first, last, exclusive)
        };
        self.granted(ticket).await;
        ticket
    }

    async fn granted(&self, ticket: u64) {
        poll_fn(|cx| {
            if self.core.lock().ranges.granted(ticket, Some(cx.waker())) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    pub(crate) fn leave(&self, ticket: Option<u64>) {
        if let Some(ticket) = ticket {
            let wakers = self.core.lock().ranges.leave(ticket);
            wake(wakers);
        }
    }

    /// Writes `count` whole blocks.
    async fn write_whole<D: Disk>(
        &self,
        disk: &D,
        first: u64,
        count: u64,
        buffer: &impl Buffer,
        at: usize,
    ) -> (usize, Option<Errno>) {
        let now = self.expecting_clock(disk);
        let (ticket, granted, started) = {
            let mut core = self.core.lock();
            let ticket = core.ranges.enter(first, first + count - 1, false);
            let granted = core.ranges.granted(ticket, None);
            let started = (granted && count <= PIECE as u64)
                .then(|| start(&mut core, first, count, now, false));
            (ticket, granted, started)
        };
        if !granted {
            self.granted(ticket).await;
        }
        let mut total = (0, None);
        if count <= PIECE as u64 {
            let source = Source::Guest(buffer, at);
            total =
                self.write_piece(disk, first, count, source, started, Then::Extend, false).await;
        } else {
            let (mut next, mut going) = (0, FuturesOrdered::new());
            loop {
                while next < count && going.len() < PIECES && total.1.is_none() {
                    let blocks = (count - next).min(PIECE as u64);
                    let source = Source::Guest(buffer, at + next as usize * BLOCK);
                    let then = Then::Extend;
                    let piece =
                        self.write_piece(disk, first + next, blocks, source, None, then, false);
                    going.push_back(piece);
                    next += blocks;
                }
                // Every write that was begun is waited for, also after a failure.
                let Some(done) = going.next().await else { break };
                join(&mut total, done);
            }
        }
        let (wakers, queued) = {
            let mut core = self.core.lock();
            let many = core.journal.pending.len() >= PUBLISH_AT;
            (core.ranges.leave(ticket), many.then_some(core.journal.queued))
        };
        wake(wakers);
        if let Some(queued) = queued {
            // A failure here shows at the next sync; the write itself has been done.
            let _ = self.publish(disk, queued).await;
        }
        total
    }

    /// Writes a part of one block: reads it, changes it, writes all of it.
    async fn write_part<D: Disk>(
        &self,
        disk: &D,
        block: u64,
        from: usize,
        len: usize,
        buffer: &impl Buffer,
        at: usize,
    ) -> (usize, Option<Errno>) {
        let ticket = self.enter(block, block, true).await;
        let result = async {
            let mut plain = match self.read_again(disk, block, None).await {
                Ok(Some(plain)) => plain,
                Ok(None) => Box::new([0; BLOCK]),
                Err(bad) => return (0, Some(bad.errno())),
            };
            if buffer.copy_in(at, &mut plain[from..from + len]).is_err() {
                return (0, Some(Errno::EFAULT));
            }
            let end = block * BLOCK_BYTES + (from + len) as u64;
            let then = Then::Reach(end);
            let written = self.write_private(disk, block, &plain, then, false).await;
            match written {
                Ok(()) => (len, None),
                Err(errno) => (0, Some(errno)),
            }
        }
        .await;
        self.leave(Some(ticket));
        result
    }

    /// Writes one block from private memory.
    pub(crate) async fn write_private<D: Disk>(
        &self,
        disk: &D,
        block: u64,
        plain: &Block,
        then: Then,
        last: bool,
    ) -> Result<(), Errno> {
        let source = Source::<NoBuffer>::Private(plain);
        let done = self.write_piece(disk, block, 1, source, None, then, last).await;
        done.1.map_or(Ok(()), Err)
    }

    /// Writes what the file holds in up to [`PIECE`] whole blocks again; its size stays. May use the
    /// places that are kept for shrinking.
    pub(crate) async fn write_again<D: Disk>(
        &self,
        disk: &D,
        first: u64,
        count: u64,
        content: &impl Buffer,
    ) -> Result<(), Errno> {
        let (source, then) = (Source::Guest(content, 0), Then::Reach(0));
        let done = self.write_piece(disk, first, count, source, None, then, true).await;
        done.1.map_or(Ok(()), Err)
    }

    /// Writes up to [`PIECE`] blocks, in as many runs as there is contiguous room for. `last`:
    /// may use the places that are kept for shrinking.
    #[allow(clippy::too_many_arguments)]
    async fn write_piece<D: Disk, B: Buffer>(
        &self,
        disk: &D,
        first: u64,
        count: u64,
        source: Source<'_, B>,
        mut started: Option<Result<Started, Stop>>,
        then: Then,
        last: bool,
    ) -> (usize, Option<Errno>) {
        let (mut done, mut retried, mut rooms) = (0, false, 0);
        while done < count {
            let block = first + done;
            let attempt = started.take().unwrap_or_else(|| {
                let now = self.expecting_clock(disk);
                start(&mut self.core.lock(), block, count - done, now, last)
            });
            let attempt = match attempt {
                Ok(started) => started,
                Err(Stop::Errno(errno)) => return (done as usize * BLOCK, Some(errno)),
                Err(Stop::Page(want)) => {
                    match self.bring_in(disk, want).await {
                        Ok(true) => {}
                        Ok(false) => match self.room_for_data(disk, rooms).await {
                            Ok(made) => rooms = made,
                            Err(errno) => return (done as usize * BLOCK, Some(errno)),
                        },
                        Err(bad) => return (done as usize * BLOCK, Some(bad.errno())),
                    }
                    continue;
                }
                Err(Stop::Room) => {
                    match self.room_for_data(disk, rooms).await {
                        Ok(made) => rooms = made,
                        Err(errno) => return (done as usize * BLOCK, Some(errno)),
                    }
                    continue;
                }
            };
            let source = match source {
                Source::Guest(buffer, at) => Source::Guest(buffer, at + done as usize * BLOCK),
                private => private,
            };
            match self.write_run(disk, block, attempt, source, then).await {
                Wrote::Done(blocks, errno) => {
                    done += blocks;
                    if errno.is_some() {
                        return (done as usize * BLOCK, errno);
                    }
                }
                // Once more at another place, under a new order; then the guest is told.
                Wrote::Failed(error) => {
                    if retried || error == HostError::Gone {
                        return (done as usize * BLOCK, Some(guest_errno(error)));
                    }
                    retried = true;
                }
            }
        }
        (done as usize * BLOCK, None)
    }

    /// Lets a checkpoint make room; counts those that were made in vain. One after which others
    /// have taken places again counts for little: the next one frees what theirs replace.
    ///
    /// # Errors
    /// Why the checkpoint failed; `ENOSPC` when too many were made in vain.
    async fn room_for_data<D: Disk>(&self, disk: &D, rooms: u32) -> Result<u32, Errno> {
        self.make_room(disk).await?;
        let busy = self.core.lock().space.busy() > 0;
        let rooms = rooms + if busy { 1 } else { IN_VAIN / 2 };
        if rooms > IN_VAIN { Err(Errno::ENOSPC) } else { Ok(rooms) }
    }

    /// Seals a run, sends it, and applies it when it has landed.
    async fn write_run<D: Disk, B: Buffer>(
        &self,
        disk: &D,
        block: u64,
        started: Started,
        source: Source<'_, B>,
        then: Then,
    ) -> Wrote {
        let Started { mut run, first, birth, id, key, eager } = started;
        let mut transfer = match disk.transfer(run.count as usize).await {
            Ok(transfer) => transfer,
            Err(error) => {
                self.unwind(id, run);
                return Wrote::Failed(error);
            }
        };
        let mut tags = [[0; TAG]; PIECE];
        let sealed = seal(&key, first, block, run.count, source, &mut transfer, &mut tags);
        let mut fault = None;
        if sealed < run.count {
            fault = Some(Errno::EFAULT);
            if sealed == 0 {
                self.unwind(id, run);
                return Wrote::Done(0, fault);
            }
            let unused = Run { place: run.place + sealed, count: run.count - sealed };
            run.count = sealed;
            let mut core = self.core.lock();
            core.space.give_back(unused);
            if let Some(write) = core.in_flight[id].as_mut() {
                write.run = run;
            }
        }
        let ptr =
            |i: u64| Ptr::new(run.place + i, birth, first.plus(i), tags[(i as usize) % PIECE]);
        let eager = eager && !matches!(then, Then::Cutoff(_));
        let queued = if eager { self.queue_eager(id, block, run.count, ptr) } else { None };
        let data = async {
            let written = transfer.write(run.place, run.count as usize).await;
            drop(transfer);
            match written {
                Ok(()) => self.landed(id, block, run.count, ptr, then),
                Err(error) => {
                    self.failed(id, first, run.count);
                    Err(error)
                }
            }
        };
        let written = match queued {
            None => data.await,
            // The journal block travels beside the data.
            Some(queued) => future::join(data, self.publish_now(disk, queued, 16)).await.0,
        };
        match written {
            Ok(()) => Wrote::Done(run.count, fault),
            Err(error) => Wrote::Failed(error),
        }
    }

    /// Queues the records of a write whose data is about to be sent.
    fn queue_eager(
        &self,
        id: usize,
        block: u64,
        count: u64,
        ptr: impl Fn(u64) -> Ptr,
    ) -> Option<u64> {
        let mut core = self.core.lock();
        let write = core.in_flight[id].as_mut()?;
        write.eager = Eager::Queued;
        let eager = Some((id, write.serial));
        for i in 0..count {
            let record = Record::Map { block: block + i, ptr: ptr(i), carried: false };
            core.journal.queue(Pending { eager, ..Pending::new(record) });
        }
        Some(core.journal.queued)
    }

    /// Applies a run that has landed.
    fn landed(
        &self,
        id: usize,
        block: u64,
        count: u64,
        ptr: impl Fn(u64) -> Ptr,
        then: Then,
    ) -> Result<(), HostError> {
        let mut core = self.core.lock();
        let eager = core.landed(id);
        // Before the records of the blocks: a file may be found longer, never blocks beyond it.
        let mut changed = match then {
            Then::Extend => core.extend((block + count) * BLOCK_BYTES),
            Then::Reach(end) => core.extend(end),
            Then::Cutoff(_) => Ok(()),
        };
        let glued = matches!(then, Then::Cutoff(_));
        for i in 0..count {
            let ptr = ptr(i);
            let applied = core.apply(block + i, ptr);
            let record = Record::Map { block: block + i, ptr, carried: false };
            let pending = Pending { glued, ..Pending::new(record) };
            match eager {
                Eager::No if applied => core.journal.queue(pending),
                Eager::Carried(_) if !core.is(canary!(NoCarry)) => {
                    core.journal.carry.push_back(pending);
                }
                _ => {}
            }
        }
        if let Then::Cutoff(cutoff) = then {
            changed = cutoff.apply(&mut core);
        }
        core.stamp += 1;
        core.expect.since += count;
        let carried = matches!(eager, Eager::Carried(_));
        let mut wakers = if carried { core.checkpoints.waiters.take() } else { Default::default() };
        if changed.is_err() {
            wakers = core.fail();
        }
        drop(core);
        wake(wakers);
        changed.map_err(|_| HostError::Gone)
    }

    /// The host refused a run: its places rest until the next checkpoint; what was published of it
    /// is taken back.
    fn failed(&self, id: usize, first: Order, count: u64) {
        let mut core = self.core.lock();
        let serial = core.in_flight[id].as_ref().map_or(0, |write| write.serial);
        let eager = core.in_flight[id].as_ref().map_or(Eager::No, |write| write.eager);
        match eager {
            Eager::No => {}
            Eager::Queued => core.journal.drop_pending(|p| p.eager == Some((id, serial))),
            Eager::Published(seq) | Eager::Carried(seq) => {
                // Stays unresolved until the block with the VOID is written: the mark must not
                // pass it before.
                *core.journal.unresolved.entry(seq).or_default() += 1;
                if core.is(canary!(NoVoid)) {
                    core.journal.resolve(seq);
                } else {
                    let void = Record::Void { order: first, count };
                    core.journal.queue(Pending { resolves: Some(seq), ..Pending::new(void) });
                }
            }
        }
        core.landed(id);
        let wakers = core.checkpoints.waiters.take();
        drop(core);
        wake(wakers);
    }

    /// Gives back a place that was never used.
    fn unwind(&self, id: usize, run: Run) {
        let mut core = self.core.lock();
        core.landed(id);
        core.space.give_back(run);
    }

    /// The time, where it matters for expecting a sync.
    fn expecting_clock<D: Disk>(&self, disk: &D) -> Option<u64> {
        // Relaxed: only a hint, nothing else hangs on it.
        self.expecting.load(Ordering::Relaxed).then(|| disk.now_ns())
    }
}

/// Gives a write its place and its order, under the lock.
fn start(
    core: &mut Core,
    block: u64,
    count: u64,
    now: Option<u64>,
    last: bool,
) -> Result<Started, Stop> {
    core.writable().map_err(Stop::Errno)?;
    if !core.admits(count, count, last) || !core.has_memory() {
        return Err(Stop::Room);
    }
    let run = core.space.data(block, count).map_err(Stop::Page)?;
    let first = core.orders(run.count).map_err(|errno| {
        core.space.give_back(run);
        Stop::Errno(errno)
    })?;
    let id = core.launch(run);
    let recent = now.is_some_and(|now| now.saturating_sub(core.expect.last_ns) < EXPECT_NS);
    let eager = recent
        && !core.fresh.as_ref().is_some_and(Fresh::counts_syncs)
        && run.count <= EAGER_BLOCKS
        && core.expect.since <= EAGER_UNSYNCED
        && core.journal.writing.len() < 2
        && (block + run.count) * BLOCK_BYTES <= core.size
        && core.journal.room(&core.geometry, 16) > 0;
    Ok(Started { run, first, birth: core.birth, id, key: core.key.clone(), eager })
}

/// Seals blocks one by one in private memory and copies them into the transfer. Stops where the
/// guest's buffer cannot be read; returns how many were sealed.
fn seal<T: Transfer, B: Buffer>(
    key: &EpochKey,
    first: Order,
    block: u64,
    count: u64,
    source: Source<'_, B>,
    transfer: &mut T,
    tags: &mut [Tag; PIECE],
) -> u64 {
    let mut scratch = [0; BLOCK];
    for i in 0..count {
        match source {
            Source::Guest(buffer, at) => {
                if buffer.copy_in(at + i as usize * BLOCK, &mut scratch).is_err() {
                    return i;
                }
            }
            Source::Private(plain) => scratch = *plain,
        }
        let aad = aad(Kind::Data, 0, block + i);
        tags[(i as usize) % PIECE] = key.seal(Kind::Data, first.plus(i), &aad, &mut scratch);
        transfer.put(i as usize, &scratch);
    }
    count
}

/// Stands where the source is private memory.
struct NoBuffer;

impl Buffer for NoBuffer {
    fn len(&self) -> usize {
        0
    }

    fn copy_in(&self, _: usize, _: &mut [u8]) -> Result<(), crate::platform::Fault> {
        Err(crate::platform::Fault)
    }

    fn copy_out(&self, _: usize, _: &[u8]) -> Result<(), crate::platform::Fault> {
        Err(crate::platform::Fault)
    }
}
