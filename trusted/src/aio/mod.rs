//! Linux native AIO inside the enclave: io_setup, io_submit, io_getevents, io_pgetevents,
//! io_cancel and io_destroy, as a program sees them on Linux.
//!
//! [`AioContexts`] is the table of one process. It asks the process ([`AioHost`]) for descriptors,
//! memory and sleep, hands checked requests to files ([`AioFile`]), and gets each back through its
//! [`Completion`]. What goes to a descriptor that is not ours goes on to a context of the kernel's
//! own ([`KernelContext`]) and comes back as an event in the same ring.
//!
//! Holds whatever guest and files do: a request that was accepted completes exactly once; a slot is
//! held from io_submit until the event has left the ring; guest memory is reached through
//! [`crate::platform::GuestMemory`] or inside a ring only. No lock is held while a file, the host
//! or the guest's memory is being called.
//! Does not hold: that the events a guest reads are true if it writes into its own ring.
//! Follows Linux fs/aio.c; numbers of slots differ: all `nr - 1` slots of a ring can be used from
//! any CPU.

mod context;
mod events;
mod host;
mod iocb;
mod kernel;
mod request;
mod ring;
mod submit;

use alloc::{sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{errno::Errno, platform::Fault, sync::Lock};
pub use context::Completion;
use context::Context;
pub use host::{
    AioFile, AioHost, Descriptor, EventCounter, FileTraits, Signals, Wait, WaitEnd, WaitKey,
};
pub use kernel::{KernelContext, KernelIocb, hurry, take_time};
pub use request::{GuestVector, MAX_RW_BYTES, Op, Request, RwFlags};
pub use ring::RingMapping;

/// Most events that io_setup doubles to: 256 MiB of `struct io_event`.
const MAX_EVENTS: u32 = 0x1000_0000 / 32;

/// The AIO contexts of one process: of all its threads, and of what shares its memory.
pub struct AioContexts {
    host: Arc<dyn AioHost>,
    table: Lock<Table>,
    next_key: AtomicU64,
    /// Callers of [`Self::drain`] that hold submissions up.
    held: AtomicU32,
}

#[derive(Default)]
struct Table {
    /// By the ring's `id`. An empty place is used again, lowest first.
    places: Vec<Option<Entry>>,
    /// Contexts whose destruction waits for requests in flight: not found any more.
    dying: Vec<Arc<Context>>,
}

/// A context that can be looked up.
struct Entry {
    /// Where the guest sees its ring: the id that the guest knows it by.
    address: u64,
    context: Arc<Context>,
}

impl AioContexts {
    /// A table without contexts, for the process `host`.
    #[must_use]
    pub fn new(host: Arc<dyn AioHost>) -> Self {
        Self {
            host,
            table: Lock::new(Table::default()),
            next_key: AtomicU64::new(1),
            held: AtomicU32::new(0),
        }
    }

    /// io_setup(2): makes a context for at least `nr_events` requests and stores its id, the
    /// address of its ring, at guest address `ctxp`, where a zero must lie.
    ///
    /// # Errors
    /// In the kernel's order: `EFAULT` (`ctxp` unreadable), `EINVAL` (no zero there, no events, or
    /// more than a ring can have), `EAGAIN` (more than `aio-max-nr`), `ENOMEM`, `EAGAIN`
    /// (`aio-nr` would pass it), `EFAULT` (`ctxp` not writable; all is undone).
    pub fn io_setup(&self, nr_events: u32, ctxp: u64) -> Result<(), Errno> {
        let mut id = [0; 8];
        self.host.read(ctxp, &mut id).map_err(|Fault| Errno::EFAULT)?;
        if id != [0; 8] || nr_events == 0 {
            return Err(Errno::EINVAL);
        }
        // `possible_cpus` is a small number; the doubling wraps as in the kernel.
        let events = nr_events.max(self.host.possible_cpus().saturating_mul(4)).wrapping_mul(2);
        if events > MAX_EVENTS {
            return Err(Errno::EINVAL);
        }
        if events == 0 || u64::from(nr_events) > self.host.aio_max_nr() {
            return Err(Errno::EAGAIN);
        }
        let ring = self.host.map_ring(ring::ring_bytes(events))?;
        if let Err(errno) = self.host.charge(nr_events) {
            self.host.unmap_ring(ring);
            return Err(errno);
        }
        let address = ring.guest();
        let key = WaitKey(self.next_key.fetch_add(1, Ordering::Relaxed));
        let context = Arc::new(Context::new(self.host.clone(), key, nr_events, ring));
        let place = self.insert(address, context.clone())?;
        if let Err(Fault) = self.host.write(ctxp, &address.to_ne_bytes()) {
            self.destroy(place, &context)?;
            return Err(Errno::EFAULT);
        }
        Ok(())
    }

    /// io_destroy(2): ends a context. Wakes its waiters with `EINVAL`, waits for the requests in
    /// flight, discards events not yet read, takes the ring away.
    ///
    /// # Errors
    /// `EINVAL`: no such context, or its destruction has begun already.
    pub fn io_destroy(&self, ctx: u64) -> Result<(), Errno> {
        let (place, context) = self.find(ctx)?;
        self.destroy(place, &context)
    }

    /// io_cancel(2). Only polls that wait can be cancelled on Linux, and only descriptors of the
    /// kernel's have any: a read, a write or a sync in flight cannot. It never succeeds; the
    /// result's place is never touched. The cancelled request's event comes through the ring, with
    /// `res` 0.
    ///
    /// # Errors
    /// In the kernel's order: `EFAULT`: the iocb's key cannot be read. `EINVAL`: its key is not
    /// zero, there is no such context, or nothing under that address can be cancelled.
    /// `EINPROGRESS`: it is being cancelled.
    pub fn io_cancel(&self, ctx: u64, iocb: u64) -> Result<(), Errno> {
        let mut key = [0; 4];
        self.host
            .read(iocb.wrapping_add(iocb::KEY_OFFSET), &mut key)
            .map_err(|Fault| Errno::EFAULT)?;
        if u32::from_ne_bytes(key) != iocb::KEY {
            return Err(Errno::EINVAL);
        }
        let context = self.lookup(ctx)?;
        Err(if context.cancel(iocb) { Errno::EINPROGRESS } else { Errno::EINVAL })
    }

    /// Moves events of the kernel's contexts into the guest's rings. For whoever hears a
    /// [`KernelContext::bell`] while the guest may not be waiting inside a call.
    pub fn deliver(&self) {
        for context in self.all(|context| context.forwards.is_used()) {
            context.deliver();
        }
    }

    /// The guest moved the ring at `from` to `to` (mremap(2)): the context's id is `to` from now
    /// on. Returns whether there is such a ring.
    pub fn relocate(&self, from: u64, to: u64) -> bool {
        let mut table = self.table.lock();
        let Some(entry) = table.places.iter_mut().flatten().find(|entry| entry.address == from)
        else {
            return false;
        };
        entry.address = to;
        entry.context.set_address(to);
        true
    }

    /// Requests of all contexts that have not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let count = |context: &Arc<Context>| context.in_flight() + context.forwarded();
        self.all(|_| true).iter().map(|context| count(context) as usize).sum()
    }

    /// Holds new submissions up and waits until nothing is in flight: before the process ends or
    /// becomes another program. Submitters sleep until the answer is dropped; forget it where the
    /// process is about to end. What the kernel has is not waited for: the kernel does that itself
    /// when the process's memory goes, and cancels polls, which might never end.
    pub fn drain(&self) -> Drained<'_> {
        self.held.fetch_add(1, Ordering::Relaxed);
        let drained = Drained(self);
        // A context made later has nothing in flight while submissions are held up.
        for context in self.all(|_| true) {
            self.wait_held(context.key, &|| context.in_flight() == 0);
        }
        drained
    }

    /// Leaves the contexts behind without touching them: for the child of a fork, which has a copy
    /// of its parent's table. The rings are still the parent's, and the counts and locks in here
    /// may be those of threads that the child does not have.
    ///
    /// The child makes a new table. A parent's context is unknown there (`EINVAL`), as on Linux.
    pub fn abandon(self) {
        core::mem::forget(self);
    }

    /// The context that guest memory at `ctx` names, if it is this one.
    fn lookup(&self, ctx: u64) -> Result<Arc<Context>, Errno> {
        self.find(ctx).map(|(_, context)| context)
    }

    /// As [`Self::lookup`], with its place in the table.
    fn find(&self, ctx: u64) -> Result<(usize, Arc<Context>), Errno> {
        let mut id = [0; 4];
        self.host.read(ctx, &mut id).map_err(|Fault| Errno::EINVAL)?;
        let place = u32::from_ne_bytes(id) as usize;
        let table = self.table.lock();
        match table.places.get(place) {
            Some(Some(entry)) if entry.address == ctx => Ok((place, entry.context.clone())),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Gives the context the lowest free place in the table.
    fn insert(&self, address: u64, context: Arc<Context>) -> Result<usize, Errno> {
        let places = &mut self.table.lock().places;
        let place = places.iter().position(Option::is_none).unwrap_or(places.len());
        if place == places.len() {
            places.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
            places.push(None);
        }
        context.initialise(u32::try_from(place).map_err(|_| Errno::ENOMEM)?);
        places[place] = Some(Entry { address, context });
        Ok(place)
    }

    fn destroy(&self, place: usize, context: &Arc<Context>) -> Result<(), Errno> {
        {
            let table = &mut *self.table.lock();
            // Whoever empties the place destroys the context.
            let entry = table
                .places
                .get_mut(place)
                .and_then(|entry| entry.take_if(|entry| Arc::ptr_eq(&entry.context, context)))
                .ok_or(Errno::EINVAL)?;
            table.dying.push(entry.context);
        }
        context.kill();
        context.close(|ready| self.wait_held(context.key, ready));
        self.wait_held(context.key, &|| context.in_flight() == 0 && context.forwarded() == 0);
        context.discard();
        self.table.lock().dying.retain(|other| !Arc::ptr_eq(other, context));
        Ok(())
    }

    /// The contexts of which `wanted` holds, among all that may have requests in flight.
    fn all(&self, wanted: impl Fn(&Context) -> bool) -> Vec<Arc<Context>> {
        let table = self.table.lock();
        let living = table.places.iter().flatten().map(|entry| &entry.context);
        living.chain(&table.dying).filter(|context| wanted(context)).cloned().collect()
    }
}

/// Nothing is in flight, and submissions wait for this to be dropped.
#[must_use = "submissions go on when it is dropped"]
pub struct Drained<'a>(&'a AioContexts);

impl Drop for Drained<'_> {
    fn drop(&mut self) {
        let contexts = self.0;
        contexts.held.fetch_sub(1, Ordering::Relaxed);
        for context in contexts.all(|_| true) {
            contexts.host.wake(context.key, u32::MAX);
        }
    }
}
