//! A lane: the rings of one process, from the enclave's side.

use alloc::{boxed::Box, sync::Arc};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use core::task::Waker;

use postern_edl::port::{CQE_WORDS, Geometry, MAGIC, Submission, cursor, header, op};

use super::{
    Doorbell, HostFault, LaneFile, LaneStats, MAX_TRANSFER_BLOCKS, PortError, SharedWords, Sleeper,
    pool::Pool,
    table::{Released, Table},
    turnstile::Ticket,
};
use crate::{
    disk::{BLOCK, HostError},
    errno::Errno,
    platform::Platform,
    sync::Lock,
};

/// Layout version written to the header.
const VERSION: u64 = 1;
/// Completions taken under one hold of the lock, and room for what they set free on the stack.
const BATCH: usize = 16;

/// The enclave's end of a port. Cheap to clone; one per process, since a forked child may not use
/// its parent's cursors.
#[derive(Clone)]
pub struct Lane(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) words: SharedWords,
    pub(super) geometry: Geometry,
    bell: Box<dyn Doorbell>,
    state: Lock<State>,
    pub(super) pool: Pool,
    /// Copy of `State::taken` for looks without the lock. Written under the lock.
    taken: AtomicU64,
    /// Whether the table has a fault, for looks without the lock.
    poisoned: AtomicBool,
    /// Threads that sleep, by [`Sleeper`]. The lock orders the stores of the shared flags.
    sleepers: Lock<[u32; 2]>,
    /// Plugs in place.
    plugs: AtomicUsize,
    /// Something was published while a plug was in place.
    owed: AtomicBool,
    completed: AtomicU64,
    batches: AtomicU64,
    doorbells: AtomicU64,
}

struct State {
    table: Table,
    /// Submissions published since attach.
    published: u64,
    /// Completions taken since attach.
    taken: u64,
    /// Completions the host has announced since attach; only grows.
    announced: u64,
    /// The daemon has gone: what is submitted waits for [`Lane::release`].
    withheld: bool,
}

/// A try to submit.
pub(super) enum Submitted {
    /// In flight on this index.
    Yes(u32),
    /// No index is free: the waker waits in the queue.
    Waits,
}

impl Lane {
    /// Lays out the region and writes its header. Attach the daemon afterwards.
    ///
    /// # Errors
    /// [`PortError::BadGeometry`] and [`PortError::RegionTooShort`].
    pub fn new(
        words: SharedWords,
        geometry: Geometry,
        bell: impl Doorbell + 'static,
    ) -> Result<Self, PortError> {
        let known = Geometry::new(geometry.entries, geometry.data_bytes) == Some(geometry);
        if !known || geometry.data_bytes < MAX_TRANSFER_BLOCKS * BLOCK {
            return Err(PortError::BadGeometry);
        }
        let needed = geometry.region_bytes();
        if words.bytes() < needed {
            return Err(PortError::RegionTooShort { needed, bytes: words.bytes() });
        }
        lay_out(&words, &geometry);
        Ok(Self(Arc::new(Inner {
            words,
            geometry,
            bell: Box::new(bell),
            state: Lock::new(State {
                table: Table::new(geometry.entries),
                published: 0,
                taken: 0,
                announced: 0,
                withheld: false,
            }),
            pool: Pool::new(geometry.data_bytes / BLOCK),
            taken: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
            sleepers: Lock::new([0; 2]),
            plugs: AtomicUsize::new(0),
            owed: AtomicBool::new(false),
            completed: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            doorbells: AtomicU64::new(0),
        })))
    }

    /// The daemon has gone and another one is to take over: from now on what is submitted waits for
    /// [`Self::release`], and so does what it has not answered.
    pub fn withhold(&self) {
        self.0.state.lock().withheld = true;
    }

    /// Lays the rings out anew for the next daemon, which attaches afterwards. Only while submissions
    /// are withheld and when nobody uses the region any more; one that does all the same is a
    /// hostile host like any other.
    pub fn renew(&self) {
        let Inner { words, geometry, state, .. } = &*self.0;
        let mut state = state.lock();
        let sleepers = self.0.sleepers.lock();
        debug_assert!(state.withheld, "renewed while the daemon is there");
        state.table.forget_published();
        (state.published, state.taken, state.announced) = (0, 0, 0);
        self.0.taken.store(0, Ordering::Release);
        lay_out(words, geometry);
        for sleeper in [Sleeper::Driver, Sleeper::Service] {
            words.publish(flag(sleeper), u64::from(sleepers[sleeper as usize] > 0));
        }
    }

    /// Hands everything that is in flight to the daemon that has attached: what the one before did
    /// not answer, as it was, and what was submitted since. Flushes for which `refuse` holds end
    /// with `EIO` instead.
    pub fn release(&self, refuse: impl Fn(u32) -> bool) {
        for start in (0..self.0.geometry.entries).step_by(BATCH) {
            let mut wakers = [const { None }; BATCH];
            {
                let mut state = self.0.state.lock();
                for (n, waker) in wakers.iter_mut().enumerate() {
                    let lost = |s: &Submission| u64::from(s.op) == op::FLUSH && refuse(s.handle);
                    *waker = state.table.refuse(start + n, Errno::EIO.0, lost);
                }
            }
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
        let mut state = self.0.state.lock();
        for index in 0..self.0.geometry.entries {
            if let Some(descriptor) = state.table.publish_again(index) {
                self.publish(&mut state, &descriptor);
            }
        }
        state.withheld = false;
        drop(state);
        fence(Ordering::SeqCst);
        self.ring_if_asleep();
    }

    /// Writes a descriptor into the ring, under the lock. Never more than there are entries: an
    /// index is in flight once.
    fn publish(&self, state: &mut State, descriptor: &Submission) {
        let Inner { words, geometry, .. } = &*self.0;
        // The slot is free: descriptors that the daemon has not taken are in flight, those are
        // fewer than entries (a daemon that answers before it takes loses its own descriptor).
        let at = geometry.sqe_word(state.published);
        for (n, word) in descriptor.to_words().into_iter().enumerate() {
            words.store(at + n, word);
        }
        state.published += 1;
        // Release pairs with the daemon's Acquire load: descriptor and data lie before it.
        words.publish(cursor::SQ_PUBLISHED, state.published);
    }

    /// Changes when the daemon has something to say of the session's leases. The host's word:
    /// it says when to ask, nothing else.
    #[must_use]
    pub fn leases(&self) -> u64 {
        self.0.words.load(cursor::LEASES)
    }

    /// The host file behind `handle` (from `postern_open`) of `host_blocks` blocks, as a disk.
    /// Time and randomness come from `platform`.
    #[must_use]
    pub fn file(&self, handle: u32, host_blocks: u64, platform: Arc<dyn Platform>) -> LaneFile {
        LaneFile::new(self.clone(), handle, host_blocks, platform)
    }

    /// Takes at most `limit` completions, checks them and wakes their tasks; returns how many were
    /// accepted. 0 means that none is there, or that the lane is poisoned.
    ///
    /// A request counts as delivered when it is taken here: its stamp is stored under the same
    /// lock, before the task wakes. So the stage "crossing in" ends here, what the task does then
    /// (opening, the guest's event) is the enclave's own. The daemon may read the stamp once it has
    /// seen `CQ_TAKEN` pass the completion; the next use of the index overwrites it. The clock is read
    /// after the host has announced what is taken, so an honest host's own times lie before the stamp.
    ///
    /// Any thread may call it, several at once.
    pub fn poll(&self, limit: usize) -> usize {
        let mut accepted = 0;
        while accepted < limit {
            let seen = self.0.words.observe(cursor::CQ_PUBLISHED);
            if !self.is_untaken(seen) {
                break;
            }
            let now = self.0.bell.now_ns();
            let mut released = [const { Released { waker: None, extent: None } }; BATCH];
            let left = if left_out!(NoLimit) { BATCH } else { limit - accepted };
            let room = released.len().min(left);
            let (taken, fault) = self.take_batch(&mut released[..room], seen, now);
            for Released { waker, extent } in released.into_iter().take(taken) {
                if let Some(extent) = extent {
                    self.0.pool.give(extent);
                }
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            if let Some(fault) = fault {
                self.poison(fault);
                return accepted + taken;
            }
            if taken == 0 {
                break;
            }
            accepted += taken;
        }
        accepted
    }

    /// Fills `released` from the completion ring, with those below `seen`: what was announced when
    /// `now` was read. Each shared word is loaded once; `seen` leaves out, it lets nothing in.
    fn take_batch(
        &self,
        released: &mut [Released],
        seen: u64,
        now: u64,
    ) -> (usize, Option<HostFault>) {
        let Inner { words, geometry, state, .. } = &*self.0;
        let mut state = state.lock();
        if state.table.fault().is_some() && !left_out!(AfterPoison) {
            return (0, None);
        }
        if left_out!(SharedCursor) {
            state.taken = words.load(cursor::CQ_TAKEN);
        }
        // Acquire pairs with the daemon's Release: the completions below it are whole.
        let published = words.observe(cursor::CQ_PUBLISHED);
        let ready = published.wrapping_sub(state.taken);
        if ready > geometry.entries as u64 && !left_out!(AnyCursor) {
            return (0, Some(HostFault::CursorOutOfRange { published, taken: state.taken }));
        }
        if published < state.announced && !left_out!(CursorBack) {
            return (0, Some(HostFault::CursorWentBack { published, before: state.announced }));
        }
        state.announced = published;
        let ready = ready.min(seen.saturating_sub(state.taken));
        let mut fault = None;
        let mut count = 0;
        for place in released.iter_mut().take(usize::try_from(ready).unwrap_or(usize::MAX)) {
            const { assert!(CQE_WORDS >= 2) };
            let at = geometry.cqe_word(state.taken);
            let (id, mut result) = (words.load(at), words.load(at + 1).cast_signed());
            if left_out!(TwiceLoaded) {
                result = words.load(at + 1).cast_signed();
            }
            match state.table.complete(id, result) {
                Ok((index, freed)) => {
                    *place = freed;
                    words.store(geometry.stamp_word(index), now);
                }
                Err(broken) => {
                    fault = Some(broken);
                    break;
                }
            }
            state.taken += 1;
            count += 1;
        }
        if count > 0 {
            // Release: the slots are free for the daemon, the stamps are stored.
            words.publish(cursor::CQ_TAKEN, state.taken);
            self.0.taken.store(state.taken, Ordering::Release);
            self.0.completed.fetch_add(count as u64, Ordering::Relaxed);
            self.0.batches.fetch_add(1, Ordering::Relaxed);
        }
        (count, fault)
    }

    /// Whether the host announces completions that were not taken. A hint: [`Self::poll`] looks
    /// for itself. Never of a poisoned lane.
    #[must_use]
    pub fn needs_drive(&self) -> bool {
        self.is_untaken(self.0.words.observe(cursor::CQ_PUBLISHED))
    }

    /// Whether a cursor that the host has announced is not that of what was taken.
    fn is_untaken(&self, published: u64) -> bool {
        published != self.0.taken.load(Ordering::Acquire)
            && (!self.0.poisoned.load(Ordering::Acquire) || left_out!(AfterPoison))
    }

    /// Requests that the host has not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.state.lock().table.in_flight()
    }

    /// Announces that the calling thread is about to sleep until its doorbell rings. `true`: it
    /// may sleep; `false`: there is something to poll. Exactly one [`Self::cancel_sleep`] must
    /// follow each call, whatever it answered. The caller holds no [`Plug`].
    ///
    /// A poisoned lane answers `true`: no completion will come, its tasks were woken. Whoever
    /// sleeps must therefore be woken by its executor's notifier too.
    ///
    /// Stores the flag, then a SeqCst fence, then looks at the completion cursor. The daemon stores
    /// the cursor, then a SeqCst fence, then looks at the flag: one of the two sees the other.
    #[must_use = "false means that there is work: do not sleep"]
    pub fn prepare_sleep(&self, sleeper: Sleeper) -> bool {
        {
            let mut sleepers = self.0.sleepers.lock();
            let count = &mut sleepers[sleeper as usize];
            *count += 1;
            if *count == 1 {
                self.0.words.publish(flag(sleeper), 1);
            }
        }
        fence(Ordering::SeqCst);
        !self.needs_drive()
    }

    /// Takes back one [`Self::prepare_sleep`].
    pub fn cancel_sleep(&self, sleeper: Sleeper) {
        let mut sleepers = self.0.sleepers.lock();
        let count = &mut sleepers[sleeper as usize];
        debug_assert!(*count > 0, "cancel_sleep without prepare_sleep");
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.0.words.publish(flag(sleeper), 0);
        }
    }

    /// Sleeps until the daemon publishes something, `limit_ns` nanoseconds at most; not at all if
    /// there is something to poll. May return early: look again. The caller holds no [`Plug`]. Who
    /// has to be woken by something else too goes by [`Self::prepare_sleep`] and sleeps by itself.
    pub fn sleep(&self, sleeper: Sleeper, limit_ns: u64) {
        if self.prepare_sleep(sleeper) {
            // An errno is an early return.
            let _ = self.0.bell.postern_sleep(self.0.words.address(), sleeper, limit_ns);
        }
        self.cancel_sleep(sleeper);
    }

    /// Why the lane is poisoned, if it is.
    #[must_use]
    pub fn fault(&self) -> Option<HostFault> {
        self.0.state.lock().table.fault()
    }

    /// Poisons the lane for good: all requests, in flight, waiting and to come, end with
    /// [`HostError::Gone`]. For a carrier that is lost ([`HostFault::DaemonGone`]); broken
    /// contracts are found by [`Self::poll`] itself. The first fault stays.
    pub fn poison(&self, fault: HostFault) {
        if !self.0.state.lock().table.poison(fault) {
            return;
        }
        self.0.poisoned.store(true, Ordering::Release);
        // From here on nothing begins and nobody joins the queue for an index.
        for start in (0..self.0.geometry.entries).step_by(BATCH) {
            let mut wakers = [const { None }; BATCH];
            {
                let mut state = self.0.state.lock();
                for (n, waker) in wakers.iter_mut().enumerate() {
                    *waker = state.table.end(start + n);
                }
            }
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
        loop {
            let waker = self.0.state.lock().table.waiting.dismiss();
            match waker {
                Some(waker) => waker.wake(),
                None => break,
            }
        }
        self.0.pool.close();
    }

    /// Holds doorbells back until the plug is dropped, so that a batch of submissions rings once.
    /// Descriptors are published at once all the same: an awake daemon takes them early. Drop it
    /// before sleeping.
    #[must_use = "doorbells are held back only while the plug lives"]
    pub fn plug(&self) -> Plug<'_> {
        self.0.plugs.fetch_add(1, Ordering::SeqCst);
        Plug(self)
    }

    /// Counters since the lane was made.
    #[must_use]
    pub fn stats(&self) -> LaneStats {
        LaneStats {
            submitted: self.0.state.lock().published,
            completed: self.0.completed.load(Ordering::Relaxed),
            batches: self.0.batches.load(Ordering::Relaxed),
            doorbells: self.0.doorbells.load(Ordering::Relaxed),
        }
    }

    /// Publishes `submission` (id and time of enqueueing are set here) if an index is free and
    /// nobody waits before `ticket`; else joins the queue. While the lane is withheld, [`Self::release`]
    /// publishes it.
    ///
    /// # Errors
    /// [`HostError::Gone`] if the lane is poisoned.
    pub(super) fn submit(
        &self,
        mut submission: Submission,
        ticket: &mut Ticket,
        waker: &Waker,
    ) -> Result<Submitted, HostError> {
        submission.enqueued_ns = self.0.bell.now_ns();
        let mut guard = self.0.state.lock();
        let state = &mut *guard;
        if state.table.fault().is_some() {
            let mine = state.table.waiting.leave(ticket);
            drop(guard);
            drop(mine);
            return Err(HostError::Gone);
        }
        let turn = state.table.waiting.may_take(*ticket);
        let withheld = state.withheld;
        let Some((index, descriptor)) =
            turn.then(|| state.table.begin(submission, waker, withheld)).flatten()
        else {
            let replaced = state.table.waiting.wait(ticket, (), waker);
            drop(guard);
            drop(replaced);
            return Ok(Submitted::Waits);
        };
        if !withheld {
            self.publish(state, &descriptor);
        }
        let mine = state.table.waiting.leave(ticket);
        let next = state.table.next_in_line();
        if left_out!(LockedBell) {
            self.settle();
        }
        drop(guard);
        if !withheld {
            self.settle();
        }
        drop(mine);
        next.inspect(Waker::wake_by_ref);
        Ok(Submitted::Yes(index))
    }

    /// Rings if the daemon sleeps; leaves it to the plug if there is one.
    fn settle(&self) {
        let plugged = self.0.plugs.load(Ordering::Relaxed) > 0;
        if plugged {
            self.0.owed.store(true, Ordering::Relaxed);
        }
        // Pairs twice. With the daemon's fence between its flag and its look at SQ_PUBLISHED: we see
        // the flag or it sees the submission. With the fence in `Plug::drop`: it sees what is owed
        // or we see that the plug has gone.
        fence(Ordering::SeqCst);
        if !plugged || self.0.plugs.load(Ordering::Relaxed) == 0 {
            self.ring_if_asleep();
        }
    }

    /// After a SeqCst fence that follows the publishing.
    fn ring_if_asleep(&self) {
        if self.0.words.observe(cursor::DAEMON_SLEEPS) != 0 {
            self.0.doorbells.fetch_add(1, Ordering::Relaxed);
            // A bell that says no is as good as one that nobody hears: nothing is decided on it.
            let _ = self.0.bell.postern_wake(self.0.words.address());
        }
    }

    /// Whether the calling thread holds the lane's lock, as far as one thread alone can tell.
    #[cfg(test)]
    pub(crate) fn is_locked(&self) -> bool {
        self.0.state.try_lock().is_none()
    }

    /// Runs `look` on the table. It must not drop a waker or a buffer.
    pub(super) fn with_table<R>(&self, look: impl FnOnce(&mut Table) -> R) -> R {
        look(&mut self.0.state.lock().table)
    }
}

/// Writes zeros over all but the data, and the header.
fn lay_out(words: &SharedWords, geometry: &Geometry) {
    for word in 0..geometry.data_offset / 8 {
        words.store(word, 0);
    }
    words.store(header::VERSION, VERSION);
    words.store(header::ENTRIES, geometry.entries as u64);
    words.store(header::DATA_OFFSET, geometry.data_offset as u64);
    words.store(header::DATA_BYTES, geometry.data_bytes as u64);
    // Release: whoever sees the magic sees the rest.
    words.publish(header::MAGIC, MAGIC);
}

/// The shared flag of a kind of sleeper.
const fn flag(sleeper: Sleeper) -> usize {
    match sleeper {
        Sleeper::Driver => cursor::DRIVER_SLEEPS,
        Sleeper::Service => cursor::SERVICE_SLEEPS,
    }
}

/// Holds doorbells back while it lives. See [`Lane::plug`].
pub struct Plug<'a>(&'a Lane);

impl Drop for Plug<'_> {
    fn drop(&mut self) {
        let inner = &self.0.0;
        if inner.plugs.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        fence(Ordering::SeqCst);
        if inner.owed.swap(false, Ordering::Relaxed) {
            self.0.ring_if_asleep();
        }
    }
}
