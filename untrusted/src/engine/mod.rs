//! The data path of a lane over native AIO or io_uring: takes descriptors from the submission ring, hands them
//! to the kernel in batches, reaps, publishes completions. Knows nothing of tokio: its owner calls
//! [`Engine::turn`] until that has nothing to do, then sleeps between [`Engine::prepare_sleep`] and
//! [`Engine::awake`].
//!
//! Holds whatever the enclave does: each shared word is loaded once; a descriptor reaches the
//! kernel only after every check; an index is in flight at most once; the kernel uses the transfer
//! area only while the mapping is alive (the queue is dropped, and so drained, first).
//! Does not hold: that claimed stamps are true.

mod check;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod libaio;
mod pace;
mod queue;
mod slot;
mod table;
mod trace;
mod uring;
mod waiting;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use postern_ebpf_common::aio_data;
use postern_edl::port::{CQE_WORDS, Completion, Geometry, SQE_WORDS, Submission, cursor, op};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::oneshot;

use crate::files::HostFile;
use crate::limits::{LEAST_AIO, LaneShare, Leave};
use crate::records::Chooser;
use crate::region::Region;
use crate::stats::LaneStats;
use check::Refusal;
use pace::Pace;
use queue::{BATCH, Entry, Queue, REAP, Wanted};
pub use queue::{Interface, probe};
use slot::{Keeper, Slot};
use table::FileTable;
pub use table::{MAX_FILES, slot_of};

/// CLOCK_MONOTONIC in nanoseconds.
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// The eventfds by which the daemon wakes the enclave.
#[derive(Debug)]
pub struct Doorbells {
    /// A: rung while a driver thread sleeps.
    pub driver: OwnedFd,
    /// B: rung while only the service thread wants waking.
    pub service: OwnedFd,
}

/// How an enclave broke its submission ring. No answer is possible; the lane ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenRing {
    /// More published than the ring holds.
    Cursor {
        /// What the cursor said.
        published: u64,
        /// How many the daemon had taken.
        taken: u64,
    },
    /// An id whose index does not exist or is in flight.
    Id {
        /// The id.
        id: u64,
    },
}

impl std::fmt::Display for BrokenRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cursor { published, taken } => {
                write!(f, "submission cursor {published} is out of range ({taken} taken)")
            }
            Self::Id { id } => write!(f, "request id {id:#x} is out of range or in flight"),
        }
    }
}

/// A request that the kernel is not asked for by io_submit: to be done elsewhere, then told by
/// [`Engine::done`].
#[derive(Debug)]
pub struct Work {
    /// Request index.
    pub index: usize,
    /// Where.
    pub place: Place,
    /// The file.
    pub file: Arc<HostFile>,
    /// What is to be done with it.
    pub act: Act,
}

/// Where a request is done that io_submit is not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a thread: it takes a while.
    Thread,
    /// Here and now: it is short, and nothing else is in flight.
    Here,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// fdatasync(2).
    Flush,
    /// fallocate(2) that punches a hole and keeps the size.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
}

impl Work {
    /// Does it: 0 or a negative errno. Blocks.
    #[must_use]
    pub fn run(&self) -> i64 {
        let done = match self.act {
            Act::Flush => rustix::fs::fdatasync(&self.file),
            Act::Discard { offset, length } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.file, flags, offset, length)
            }
        };
        done.map_or_else(|errno| -i64::from(errno.raw_os_error()), |()| 0)
    }
}

/// One lane's data path.
pub struct Engine {
    // Dropped in this order: the queue first, which waits for the kernel.
    queue: Box<dyn Queue>,
    /// The kernel signals it at each completion.
    completed: OwnedFd,
    region: Arc<Region>,
    doorbells: Doorbells,
    lane: u64,
    stats: Arc<LaneStats>,
    slots: Box<[Slot]>,
    chooser: Chooser,
    files: FileTable,
    /// Completions not yet written to the ring: id, result, when reaped.
    staged: Vec<(u64, i64, u64)>,
    work: Vec<Work>,
    flushes: Pace,
    taken: u64,
    published: u64,
    /// Taken and not published.
    in_flight: u64,
    /// Accepted by the kernel and not reaped.
    in_kernel: u64,
    stopped: bool,
    /// Discards were agreed on at attach.
    discards: bool,
    share: LaneShare,
    /// Bytes of the staged completions.
    staged_bytes: u64,
    /// The session is at a limit: nothing is taken before something of this lane is published, or
    /// before this time.
    held: Option<Leave>,
}

impl Engine {
    /// A data path over `region` for lane number `lane`, within its session's limits.
    ///
    /// # Errors
    /// `EAGAIN` when fs.aio-max-nr is used up, else what the host says.
    pub fn new(
        region: Arc<Region>,
        lane: u64,
        doorbells: Doorbells,
        stats: Arc<LaneStats>,
        share: LaneShare,
        interface: Interface,
    ) -> Result<Self, Errno> {
        use rustix::event::{EventfdFlags, eventfd};
        let entries = region.geometry().entries;
        let completed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let requests = share.aio_requests(u32::try_from(entries).map_err(|_| Errno::INVAL)?);
        let wanted = Wanted {
            requests,
            least: LEAST_AIO,
            wake: completed.as_raw_fd(),
            memory: {
                let Geometry { data_offset, data_bytes, .. } = *region.geometry();
                (region.address(data_offset as u64), data_bytes as u64)
            },
        };
        // SAFETY: the region is mapped as long as `self.region`, which outlives `self.queue`.
        let queue = unsafe { queue::open(interface, &wanted) }?;
        Ok(Self {
            queue,
            completed,
            region,
            doorbells,
            lane,
            stats,
            slots: vec![Slot::default(); entries].into(),
            chooser: Chooser::default(),
            files: FileTable::default(),
            staged: Vec::with_capacity(entries),
            work: Vec::new(),
            flushes: Pace::default(),
            taken: 0,
            published: 0,
            in_flight: 0,
            in_kernel: 0,
            stopped: false,
            discards: false,
            share,
            staged_bytes: 0,
            held: None,
        })
    }

    /// The eventfd that becomes readable when the kernel completes something.
    #[must_use]
    pub const fn completed(&self) -> &OwnedFd {
        &self.completed
    }

    /// Serves discards, which are refused until then.
    pub const fn serve_discards(&mut self) {
        self.discards = true;
    }

    /// Makes a file known under `handle`.
    pub fn add_file(&mut self, handle: u32, file: Arc<HostFile>) {
        let volume = self.stats.place_of(&file.volume);
        self.files.add(handle, file, volume);
    }

    /// Refuses further descriptors for `handle`; `done` hears when the last one in flight has
    /// been published.
    pub fn close_file(&mut self, handle: u32, done: oneshot::Sender<()>) {
        self.files.close(handle, done);
        self.files.answer_closed();
    }

    /// Has the enclave look at its leases.
    pub fn tell_of_leases(&self) {
        // Release: who sees the change sees in the session what it is about. The daemon is the only
        // writer, and what an enclave writes there concerns itself.
        self.word(cursor::LEASES).fetch_add(1, Ordering::Release);
        ring(&self.doorbells.service);
    }

    /// Takes no further descriptors; what is in flight goes on.
    pub const fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub const fn is_drained(&self) -> bool {
        self.in_flight == 0
    }

    /// Requests that the owner is to do, since the last call.
    pub fn take_work(&mut self) -> impl Iterator<Item = Work> + '_ {
        self.work.drain(..)
    }

    /// A request handed out by [`Self::take_work`] is done: 0 or a negative errno.
    pub fn done(&mut self, index: usize, result: i64) {
        trace::work_done(self.lane, self.slots[index].id, result);
        self.complete(index, result, now_ns());
        self.publish();
    }

    /// Reaps, takes and submits what there is; answers whether there was anything.
    ///
    /// # Errors
    /// [`BrokenRing`]: the caller stops the lane. What is in flight can still be drained.
    #[inline]
    pub fn turn(&mut self) -> Result<bool, BrokenRing> {
        let mut busy = self.reap();
        // Before the batch is handed over: that takes a while.
        self.publish();
        if self.queue.is_pending() {
            busy |= self.submit();
        }
        let mut taken = Ok(false);
        if !self.stopped && !self.queue.is_pending() {
            taken = self.take();
            // Also what was taken before a broken descriptor.
            if self.queue.is_pending() {
                self.submit();
            }
        }
        self.publish();
        Ok(busy | taken?)
    }

    /// Announces sleep; answers whether there is really nothing to do. If not, or after waking,
    /// call [`Self::awake`].
    pub fn prepare_sleep(&mut self) -> bool {
        self.word(cursor::DAEMON_SLEEPS).store(1, Ordering::Relaxed);
        // Partner: the enclave's fence between its store of SQ_PUBLISHED and load of DAEMON_SLEEPS.
        fence(Ordering::SeqCst);
        // Takes signals of completions already reaped away, so that they do not end the sleep.
        let _ = rustix::io::read(&self.completed, &mut [0u8; 8]);
        !self.has_submissions() && !self.reap()
    }

    /// Takes the announcement of sleep back.
    pub fn awake(&mut self) {
        self.word(cursor::DAEMON_SLEEPS).store(0, Ordering::Relaxed);
        self.publish();
    }

    /// Whether descriptors wait that a turn would take.
    #[inline]
    #[must_use]
    pub fn has_submissions(&self) -> bool {
        !self.stopped
            && !self.queue.is_pending()
            && !self.is_held()
            && self.word(cursor::SQ_PUBLISHED).load(Ordering::Relaxed) != self.taken
    }

    /// When descriptors may be taken again that the session's rates hold back, CLOCK_MONOTONIC
    /// nanoseconds.
    #[must_use]
    pub const fn held_until(&self) -> Option<u64> {
        match self.held {
            Some(Leave::Until(ns)) if !self.stopped => Some(ns),
            _ => None,
        }
    }

    /// Whether the session is at a limit.
    fn is_held(&self) -> bool {
        match self.held {
            None => false,
            Some(Leave::Until(ns)) => now_ns() < ns,
            Some(_) => self.in_flight > 0,
        }
    }

    /// Whether the kernel has completed something that is not yet reaped. Costs no system call.
    #[inline]
    #[must_use]
    pub fn has_completions(&self) -> bool {
        self.in_kernel > 0 && self.queue.has_events()
    }

    /// Records deliveries that no later request of the same index has brought to light.
    pub fn settle(&mut self) {
        let now_ns = now_ns();
        for index in 0..self.slots.len() {
            self.settle_slot(index, now_ns);
        }
        self.chooser.end_interval(now_ns, self.stats.terms(), &self.stats.records);
    }

    /// Records when the last request of an index was delivered, if the enclave has said so.
    fn settle_slot(&mut self, index: usize, now_ns: u64) {
        if self.slots[index].undelivered {
            let stamp = self.region.geometry().stamp_word(index);
            let stamp = self.region.word(stamp).load(Ordering::Relaxed);
            let (slot, keeper) = self.slot(index);
            // If not: not delivered yet, or the stamp of the request before, or none at all.
            slot.deliver(stamp, now_ns, keeper);
        }
    }

    fn slot(&mut self, index: usize) -> (&mut Slot, Keeper<'_>) {
        let Self { slots, stats, chooser, lane, .. } = self;
        (&mut slots[index], Keeper { stats, chooser, lane: *lane, index })
    }

    fn word(&self, index: usize) -> &std::sync::atomic::AtomicU64 {
        self.region.word(index)
    }

    /// Takes up to a batch of descriptors from the ring into the empty batch.
    fn take(&mut self) -> Result<bool, BrokenRing> {
        // Partner: the enclave's Release store after it wrote the descriptors.
        let published = self.word(cursor::SQ_PUBLISHED).load(Ordering::Acquire);
        let waiting = published.wrapping_sub(self.taken);
        if waiting == 0 {
            return Ok(false);
        }
        if waiting > self.slots.len() as u64 {
            return Err(BrokenRing::Cursor { published, taken: self.taken });
        }
        if self.is_held() {
            return Ok(false);
        }
        let picked_ns = now_ns();
        let (most, most_bytes) = match self.share.ask(waiting.min(BATCH as u64), picked_ns) {
            Leave::Take { requests, bytes } => (requests, bytes),
            held => {
                self.held = Some(held);
                return Ok(false);
            }
        };
        self.held = None;
        self.in_flight += most;
        self.word(cursor::IN_FLIGHT).store(self.in_flight, Ordering::Relaxed);
        let (mut broken, mut count, mut bytes) = (None, most, 0);
        for n in 0..most {
            let at = self.region.geometry().sqe_word(self.taken.wrapping_add(n));
            let words: [u64; SQE_WORDS] =
                std::array::from_fn(|i| self.word(at + i).load(Ordering::Relaxed));
            match self.accept(&Submission::from_words(words), picked_ns) {
                Ok(asked) => bytes += asked,
                Err(fault) => {
                    // The one that is broken is taken, and no request.
                    count = n + 1;
                    self.in_flight -= 1;
                    broken = Some(fault);
                    break;
                }
            }
            if bytes >= most_bytes {
                count = n + 1;
                break;
            }
        }
        self.in_flight -= most - count;
        if count < most || broken.is_some() {
            self.word(cursor::IN_FLIGHT).store(self.in_flight, Ordering::Relaxed);
        }
        let requests = count - u64::from(broken.is_some());
        self.share.begin(requests, bytes, picked_ns);
        self.taken = self.taken.wrapping_add(count);
        // Partner: the enclave's Acquire load before it writes a descriptor over an old one.
        self.word(cursor::SQ_TAKEN).store(self.taken, Ordering::Release);
        self.stats.add(|c| &c.submissions, count);
        broken.map_or(Ok(true), Err)
    }

    /// Checks one descriptor; puts it into the batch, or stages its refusal. Answers the bytes that
    /// count as under way.
    fn accept(&mut self, submission: &Submission, picked_ns: u64) -> Result<u64, BrokenRing> {
        let id = submission.id;
        let geometry = *self.region.geometry();
        let index = check::index_of(id, geometry.entries)
            .filter(|&index| !self.slots[index].in_flight)
            .ok_or(BrokenRing::Id { id })?;
        let op = u64::from(submission.op);
        trace::request_start(self.lane, id, op, submission.offset, submission.length);
        let file = check::check(submission, &geometry).and_then(|()| {
            if op == op::DISCARD && !self.discards {
                return Err(Refusal::Invalid);
            }
            let (at, file, volume) = self.files.get(submission.handle).ok_or(Refusal::BadFile)?;
            if matches!(op, op::WRITE | op::DISCARD) && !file.writable {
                return Err(Refusal::BadFile);
            }
            Ok(((at, volume), file.raw()))
        });
        let act = Act::Discard { offset: submission.offset, length: submission.length };
        let (at, fd) = match file {
            Ok(file) => file,
            Err(refusal) => {
                self.stats.add(|c| &c.refused_descriptors, 1);
                self.staged.push((id, refusal.result(), picked_ns));
                return Ok(0);
            }
        };
        self.settle_slot(index, picked_ns);
        if self.slots[index].undelivered {
            let (slot, keeper) = self.slot(index);
            slot.give_up(keeper);
        }
        let delivered_ns = self.slots[index].delivered_ns;
        self.slots[index] = Slot::begin(submission, at, picked_ns, &self.stats);
        let bytes = self.slots[index].bytes();
        let (file, volume) = at;
        self.files.begin(file);
        if op == op::DISCARD {
            self.elsewhere(index, Place::Thread, act);
            return Ok(bytes);
        }
        // The kernel hands IOCB_CMD_FDSYNC to a thread of its own: two wake-ups, which together
        // take as long as the flush of a fast disk.
        if op == op::FLUSH && self.in_flight == 1 && self.flushes.are_short() {
            self.stats.add(|c| &c.flushes_here, 1);
            self.elsewhere(index, Place::Here, Act::Flush);
            return Ok(bytes);
        }
        let address = if op == op::FLUSH { 0 } else { self.region.address(submission.data) };
        self.queue.push(&Entry {
            data: aio_data(self.lane, index as u64, id >> 32),
            index,
            op,
            volume: self.stats.number_at(volume),
            fd,
            address,
            length: submission.length,
            offset: submission.offset,
            stamps: [submission.enqueued_ns, picked_ns, delivered_ns],
        });
        Ok(bytes)
    }

    /// Has the owner of the engine do a request that has just been taken, or refused by the kernel.
    fn elsewhere(&mut self, index: usize, place: Place, act: Act) {
        trace::work_start(self.lane, self.slots[index].id);
        if let Some(file) = self.files.at(self.slots[index].file) {
            self.work.push(Work { index, place, file: Arc::clone(file), act });
        }
    }

    /// Hands the batch to the kernel, as far as it accepts it. Answers whether anything moved.
    fn submit(&mut self) -> bool {
        let mut moved = false;
        while self.queue.is_pending() {
            trace::submit_start(self.lane);
            // SAFETY: 1. Every entry passed `accept`: its range lies in the transfer area of
            //    `self.region`, which outlives `self.queue` (field order, and drop waits).
            //    2. Its descriptor belongs to a file the table keeps until the count of its
            //    requests in flight is zero, or, at drop, longer than the queue.
            let result = unsafe { self.queue.submit() };
            trace::submit_done(self.lane, result.as_ref().map_or(0, |accepted| accepted.len()));
            match result {
                Ok([]) => break,
                Ok(accepted) => {
                    let submitted_ns = now_ns();
                    for &index in accepted {
                        trace::device_start(self.lane, self.slots[index].id);
                        self.slots[index].submitted(submitted_ns, &self.stats);
                    }
                    self.in_kernel += accepted.len() as u64;
                    self.stats.add(|c| &c.batches, 1);
                    moved = true;
                    if self.queue.is_pending() {
                        self.stats.add(|c| &c.submit_retries, 1);
                    }
                }
                Err(Errno::AGAIN) if self.in_kernel > 0 => {
                    // Room comes with the next completion.
                    self.stats.add(|c| &c.submit_retries, 1);
                    break;
                }
                Err(Errno::INTR) => {}
                Err(errno) => {
                    moved = true;
                    self.refused_by_kernel(errno);
                }
            }
        }
        moved
    }

    /// The kernel refused the first waiting request.
    fn refused_by_kernel(&mut self, errno: Errno) {
        let Some(index) = self.queue.drop_first() else { return };
        let slot = self.slots[index];
        if slot.op == op::FLUSH && matches!(errno, Errno::INVAL | Errno::OPNOTSUPP) {
            self.stats.add(|c| &c.flushes_on_thread, 1);
            self.elsewhere(index, Place::Thread, Act::Flush);
            return;
        }
        self.complete(index, -i64::from(errno.raw_os_error()), now_ns());
    }

    /// Takes completions from the kernel and stages them. Answers whether there were any.
    fn reap(&mut self) -> bool {
        let mut any = false;
        while self.in_kernel > 0 {
            let count = self.queue.reap();
            if count == 0 {
                break;
            }
            any = true;
            let reaped_ns = now_ns();
            self.in_kernel = self.in_kernel.saturating_sub(count as u64);
            for n in 0..count {
                let (data, result) = self.queue.event(n);
                let index = usize::try_from(postern_ebpf_common::index_of(data));
                if let Ok(index) = index
                    && self.slots.get(index).is_some_and(|slot| slot.in_flight)
                {
                    trace::device_done(self.lane, self.slots[index].id, result);
                    self.complete(index, result, reaped_ns);
                } else {
                    self.stats.add(|c| &c.unmatched_completions, 1);
                }
            }
            if count < REAP {
                break;
            }
        }
        any
    }

    /// Ends a request that is in flight: counts it and stages its completion.
    fn complete(&mut self, index: usize, result: i64, reaped_ns: u64) {
        let slot = &mut self.slots[index];
        slot.end(result, reaped_ns, &self.stats);
        self.staged_bytes += slot.bytes();
        if slot.op == op::FLUSH {
            self.flushes.learn(reaped_ns.saturating_sub(slot.submitted_ns));
        }
        let (id, file) = (slot.id, slot.file);
        self.files.end(file);
        self.staged.push((id, result, reaped_ns));
    }

    /// Writes the staged completions to the ring and wakes whoever sleeps there.
    fn publish(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        let published_ns = now_ns();
        let count = self.staged.len() as u64;
        for (n, &(id, result, reaped_ns)) in self.staged.iter().enumerate() {
            let at = self.region.geometry().cqe_word(self.published.wrapping_add(n as u64));
            let words: [u64; CQE_WORDS] =
                Completion { id, result, reaped_ns, published_ns }.to_words();
            for (i, word) in words.into_iter().enumerate() {
                self.word(at + i).store(word, Ordering::Relaxed);
            }
        }
        for &(id, result, _) in &self.staged {
            trace::request_done(self.lane, id, result);
        }
        self.staged.clear();
        self.published = self.published.wrapping_add(count);
        // Partner: the enclave's Acquire load before it reads the completions.
        self.word(cursor::CQ_PUBLISHED).store(self.published, Ordering::Release);
        self.in_flight -= count;
        self.word(cursor::IN_FLIGHT).store(self.in_flight, Ordering::Release);
        self.share.end(count, std::mem::take(&mut self.staged_bytes));
        if !matches!(self.held, Some(Leave::Until(_))) {
            self.held = None;
        }
        self.stats.add(|c| &c.completions, count);
        // Partner: the enclave's fence between its store of a sleep word and its last look at
        // CQ_PUBLISHED.
        fence(Ordering::SeqCst);
        if self.word(cursor::DRIVER_SLEEPS).load(Ordering::Relaxed) != 0 {
            self.stats.add(|c| &c.doorbells_driver, 1);
            ring(&self.doorbells.driver);
        } else if self.word(cursor::SERVICE_SLEEPS).load(Ordering::Relaxed) != 0 {
            self.stats.add(|c| &c.doorbells_service, 1);
            ring(&self.doorbells.service);
        }
        self.files.answer_closed();
    }
}

/// Signals an eventfd. It refuses only when its counter is full, and then it is readable anyway.
fn ring(doorbell: &OwnedFd) {
    let _ = rustix::io::write(doorbell, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests;
