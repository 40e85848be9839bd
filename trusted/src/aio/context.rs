//! One AIO context: its ring, its slots, its requests in flight.
//!
//! Holds whatever the guest scribbles into the ring: `free + busy + completed == slots - 1`, where
//! `busy` are slots of requests not yet completed and `completed` those of events not yet known to
//! have left the ring; so no more than `slots - 1` requests are ever accepted ahead of the guest.
//! The ring is touched under the lock only, and is gone for good before its memory is.
//! Follows `aio_complete` and `refill_reqs_available` of Linux fs/aio.c. Slots are one plain count
//! where Linux hands them out to CPUs in batches.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{
    AioHost, EventCounter, RingMapping, WaitKey,
    kernel::Forwards,
    ring::{EVENT_BYTES, Event},
};
use crate::{errno::Errno, sync::Lock};

/// One context. Shared by the table, the calls under way and the requests in flight.
pub(super) struct Context {
    pub(super) host: Arc<dyn AioHost>,
    /// What sleepers on this context wait for.
    pub(super) key: WaitKey,
    /// Slots of the ring; the trusted copy.
    pub(super) slots: u32,
    /// What io_setup asked for and `aio-nr` was charged with.
    pub(super) charged: u32,
    /// Slots taken whose request has not come to its end (event stored, eventfd signalled), without
    /// those that the kernel has.
    in_flight: AtomicU32,
    /// Requests that the kernel serves.
    pub(super) forwards: Forwards,
    state: Lock<State>,
}

struct State {
    /// `None` once destroyed: then nothing is in flight and nothing will be.
    ring: Option<RingMapping>,
    /// io_destroy has begun: no request is accepted, no event handed out.
    dead: bool,
    /// The writer's position, below `slots`. The guest's copy is not believed here.
    tail: u32,
    /// Slots that may be taken.
    free: u32,
    /// Events stored and not yet known to have left the ring.
    completed: u32,
    /// Where the last reading call left the head.
    head_left: u32,
    /// Counts reading calls that moved the head: tells that another one came between.
    reaps: u64,
}

/// Why no slot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSlot {
    /// All are held by requests in flight or events not yet reaped.
    Full,
    /// The context is being destroyed.
    Dying,
    /// Submissions are held up for the moment.
    Held,
}

/// What a look at the ring found.
pub(super) struct Look {
    /// Position of the first event, below `slots`.
    pub(super) head: u32,
    /// Events from `head` on, as the guest's tail has it; below `slots`.
    pub(super) count: u32,
    /// Head and tail are the same word: a reader leaves the head as it is. Otherwise it writes it
    /// back reduced, even if it took nothing.
    pub(super) empty: bool,
    /// For [`Context::commit`].
    reaps: u64,
}

impl Context {
    pub(super) fn new(
        host: Arc<dyn AioHost>,
        key: WaitKey,
        charged: u32,
        ring: RingMapping,
    ) -> Self {
        let slots = ring.slots();
        Self {
            host,
            key,
            slots,
            charged,
            in_flight: AtomicU32::new(0),
            forwards: Forwards::default(),
            state: Lock::new(State {
                ring: Some(ring),
                dead: false,
                tail: 0,
                free: slots - 1,
                completed: 0,
                head_left: 0,
                reaps: 0,
            }),
        }
    }

    /// The guest moved its view of the ring.
    pub(super) fn set_address(&self, guest: u64) {
        if let Some(ring) = &mut self.state.lock().ring {
            ring.set_guest(guest);
        }
    }

    /// Writes the ring's header, with the context's place in the table.
    pub(super) fn initialise(&self, id: u32) {
        if let Some(ring) = &self.state.lock().ring {
            ring.initialise(id);
        }
    }

    /// Requests that have not come to their end, without those that the kernel has.
    pub(super) fn in_flight(&self) -> u32 {
        // The lock orders this look with `take_slot`: either its request is counted here, or it
        // sees what the caller did before (marked the context dead, held submissions up).
        let _state = self.state.lock();
        // Acquire pairs with the Release in `complete`: what a request did is done.
        self.in_flight.load(Ordering::Acquire)
    }

    /// Requests at the kernel that have not come to their end.
    pub(super) fn forwarded(&self) -> u32 {
        // Acquire pairs with the Release in `end`.
        self.forwards.in_flight.load(Ordering::Acquire)
    }

    /// Takes the slot that a request keeps until its event has left the ring.
    ///
    /// Whoever sets `held` and then sees no request in flight knows that none will come.
    pub(super) fn take_slot(&self, held: &AtomicU32) -> Result<(), NoSlot> {
        let mut state = self.state.lock();
        if state.dead {
            return Err(NoSlot::Dying);
        }
        if held.load(Ordering::Relaxed) != 0 {
            return Err(NoSlot::Held);
        }
        if state.free == 0 {
            state.refill(self.slots);
        }
        state.free = state.free.checked_sub(1).ok_or(NoSlot::Full)?;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Gives a slot back whose request was refused.
    pub(super) fn return_slot(&self) {
        self.state.lock().free += 1;
        if self.in_flight.fetch_sub(1, Ordering::Release) == 1 {
            self.host.wake(self.key, 0);
        }
    }

    /// A request in flight is the kernel's from now on.
    fn hand_over(&self) {
        self.forwards.in_flight.fetch_add(1, Ordering::Relaxed);
        if self.in_flight.fetch_sub(1, Ordering::Release) == 1 {
            self.host.wake(self.key, 0);
        }
    }

    /// Whether the head moved since the last reading call or the last time this was asked: the
    /// guest reaps without calling.
    pub(super) fn head_was_moved(&self) -> bool {
        let mut state = self.state.lock();
        let Some(head) = state.ring.as_ref().map(RingMapping::head) else { return false };
        core::mem::replace(&mut state.head_left, head) != head
    }

    /// Whether `count` events are there for a reader, or there is no use in waiting for them.
    pub(super) fn has(&self, count: u32) -> bool {
        let state = self.state.lock();
        state.dead || state.look(self.slots).is_none_or(|look| look.count >= count)
    }

    /// Whether io_destroy has begun.
    pub(super) fn is_dead(&self) -> bool {
        self.state.lock().dead
    }

    /// What a reader would find. `None` if the ring is gone.
    pub(super) fn look(&self) -> Option<Look> {
        self.state.lock().look(self.slots)
    }

    /// Copies events from position `from` on into `out`, whole events. `None` if the ring is gone.
    pub(super) fn copy(&self, from: u32, out: &mut [[u8; EVENT_BYTES]]) -> Option<()> {
        let state = self.state.lock();
        let ring = state.ring.as_ref()?;
        let mut slot = from % self.slots;
        for event in out {
            ring.get(slot, event);
            slot = (slot + 1) % self.slots;
        }
        Some(())
    }

    /// Moves the head behind the `count` events found by `look`; false if another reader came
    /// first, then nothing is moved.
    pub(super) fn commit(&self, look: &Look, count: u32) -> bool {
        let mut state = self.state.lock();
        if state.reaps != look.reaps {
            return false;
        }
        let head = (look.head + count) % self.slots;
        if let Some(ring) = &state.ring {
            ring.set_head(head);
        }
        state.head_left = head;
        state.reaps += 1;
        true
    }

    /// Stores the event of a request that holds a slot. Returns the events in the ring.
    fn store(&self, event: Event) -> u32 {
        self.state.lock().push(event, self.slots)
    }

    /// A request has come to its end. From here on io_destroy may return.
    fn end(&self, forwarded: bool, have: u32) {
        let count = if forwarded { &self.forwards.in_flight } else { &self.in_flight };
        // Release pairs with the Acquire in `in_flight` and `forwarded`.
        count.fetch_sub(1, Ordering::Release);
        self.host.wake(self.key, have);
    }

    /// Marks the context as dying, wakes everyone who waits on it and returns the quota. False if
    /// that has been done before.
    pub(super) fn kill(&self) -> bool {
        if core::mem::replace(&mut self.state.lock().dead, true) {
            return false;
        }
        self.host.wake(self.key, u32::MAX);
        self.host.uncharge(self.charged);
        true
    }

    /// Gives the ring's memory back, with the events in it. The context is dead and nothing is in
    /// flight.
    pub(super) fn discard(&self) {
        let ring = self.state.lock().ring.take();
        if let Some(ring) = ring {
            self.host.unmap_ring(ring);
        }
    }
}

impl Drop for Context {
    /// The table itself was dropped: what io_destroy would have done is done now.
    fn drop(&mut self) {
        self.kill();
        // A request in flight keeps its context: nobody has to be waited for.
        self.close(|_| ());
        self.discard();
    }
}

impl State {
    /// Both positions are the guest's to write: each is loaded once and reduced to the slots there
    /// are.
    fn look(&self, slots: u32) -> Option<Look> {
        let ring = self.ring.as_ref()?;
        let (raw_head, raw_tail) = (ring.head(), ring.tail());
        let (head, tail) = (raw_head % slots, raw_tail % slots);
        let count = if head <= tail { tail - head } else { slots - head + tail };
        Some(Look { head, count, empty: raw_head == raw_tail, reaps: self.reaps })
    }

    /// Finds out which events have left the ring and frees their slots.
    fn refill(&mut self, slots: u32) {
        let Some(ring) = &self.ring else { return };
        let head = ring.head() % slots;
        let in_ring = if head <= self.tail { self.tail - head } else { slots - head + self.tail };
        let left = self.completed.saturating_sub(in_ring);
        self.completed -= left;
        self.free += left;
    }

    /// Stores an event and moves the tail. Returns the events in the ring by the guest's head.
    fn push(&mut self, event: Event, slots: u32) -> u32 {
        let Some(ring) = &self.ring else { return 0 };
        ring.put(self.tail, event);
        self.tail = (self.tail + 1) % slots;
        ring.set_tail(self.tail);
        self.completed += 1;
        let head = ring.head() % slots;
        if self.tail > head { self.tail - head } else { self.tail + slots - head }
    }
}

/// The duty to complete one request: its event is stored exactly once, whatever becomes of it.
///
/// Dropping it stores `EIO`: a request that nobody finishes must not hold its slot for ever.
#[must_use = "a request completes with EIO when its Completion is dropped"]
pub struct Completion {
    context: Arc<Context>,
    event: Event,
    counter: Option<Arc<dyn EventCounter>>,
    /// Set when the event is in the ring, for an io_submit that waits for it.
    seen: Option<Arc<AtomicBool>>,
    /// The kernel has the request.
    forwarded: bool,
    finished: bool,
}

impl Completion {
    /// The duty that goes with a slot taken from `context`.
    pub(super) const fn new(
        context: Arc<Context>,
        iocb: u64,
        data: u64,
        counter: Option<Arc<dyn EventCounter>>,
    ) -> Self {
        Self {
            context,
            event: Event { data, obj: iocb, res: 0 },
            counter,
            seen: None,
            forwarded: false,
            finished: false,
        }
    }

    /// Sets `flag` when the request has completed.
    pub(super) fn set_seen(&mut self, flag: Arc<AtomicBool>) {
        self.seen = Some(flag);
    }

    /// Completes the request with a number of bytes or an error: stores the event, moves the
    /// ring's tail, signals the eventfd, wakes whoever waits. What the request has changed must be
    /// visible before (file size, the guest's buffer).
    pub fn finish(mut self, result: Result<usize, Errno>) {
        self.store(match result {
            Ok(bytes) => i64::try_from(bytes).unwrap_or(i64::MAX),
            Err(Errno(errno)) => -i64::from(errno),
        });
    }

    fn store(&mut self, res: i64) {
        if self.finished {
            return;
        }
        let have = self.store_event(res);
        self.tell(have);
    }

    /// The first half of [`Self::finish`]: stores the event. Returns how many are in the ring, for
    /// [`Self::announce`], which must follow. Calls nobody.
    pub(super) fn store_event(&mut self, res: i64) -> u32 {
        self.finished = true;
        self.event.res = res;
        self.context.store(self.event)
    }

    /// The second half of [`Self::finish`]: tells whoever waits.
    pub(super) fn announce(mut self, have: u32) {
        self.tell(have);
    }

    fn tell(&mut self, have: u32) {
        if let Some(counter) = self.counter.take() {
            counter.signal();
        }
        if let Some(seen) = self.seen.take() {
            // Release pairs with the Acquire of the io_submit that waits: the event is stored.
            seen.store(true, Ordering::Release);
        }
        self.context.end(self.forwarded, have);
    }

    /// The guest's address of the iocb.
    pub(super) const fn iocb(&self) -> u64 {
        self.event.obj
    }

    /// The kernel is about to get the request.
    pub(super) fn hand_over(&mut self) {
        self.forwarded = true;
        self.context.hand_over();
    }

    /// The request was refused after all: no event, and its slot is free again.
    pub(super) fn refuse(mut self) {
        self.finished = true;
        self.context.state.lock().free += 1;
        self.context.end(self.forwarded, 0);
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.store(-i64::from(Errno::EIO.0));
    }
}
