//! The completion ring that the guest sees: `struct aio_ring` of Linux fs/aio.c.
//!
//! The guest may scribble over every word at any time, so each is an atomic that is loaded once,
//! and positions are reduced to the number of slots that is kept privately. This is the only file
//! of the AIO layer that follows a pointer.
//!
//! Holds whatever the guest stores: no access leaves the alias.
//! Does not hold: that an event read back is the event that was written.
#![allow(unsafe_code)]

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

/// `AIO_RING_MAGIC`.
pub(super) const MAGIC: u32 = 0xa10a_10a1;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 32;
/// Bytes of a `struct io_event`.
pub(super) const EVENT_BYTES: usize = 32;
/// 8-byte words of a `struct io_event`.
const EVENT_WORDS: usize = EVENT_BYTES / 8;
const PAGE: usize = 4096;

/// Indexes of the header's 4-byte words.
mod word {
    pub const ID: usize = 0;
    pub const NR: usize = 1;
    pub const HEAD: usize = 2;
    pub const TAIL: usize = 3;
    pub const MAGIC: usize = 4;
    pub const COMPAT_FEATURES: usize = 5;
    pub const INCOMPAT_FEATURES: usize = 6;
    pub const HEADER_LENGTH: usize = 7;
}

/// Bytes of a ring that holds `events` events and the two slots that Linux adds.
pub(super) const fn ring_bytes(events: u32) -> usize {
    (HEADER_BYTES + (events as usize + 2) * EVENT_BYTES).next_multiple_of(PAGE)
}

/// One `struct io_event`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    /// `aio_data` of the request.
    pub data: u64,
    /// User address of the iocb.
    pub obj: u64,
    /// Bytes done or a negative errno.
    pub res: i64,
}

impl Event {
    const fn words(self) -> [u64; EVENT_WORDS] {
        [self.data, self.obj, self.res.cast_unsigned(), 0]
    }

    /// Reads a `struct io_event`.
    pub(super) fn parse(bytes: &[u8; EVENT_BYTES]) -> Self {
        let mut words = [0; EVENT_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let [data, obj, res, _] = words;
        Self { data, obj, res: res.cast_signed() }
    }
}

/// A ring: where the guest sees it, and the trusted side's alias of the same memory.
#[derive(Debug)]
pub struct RingMapping {
    guest: u64,
    alias: NonNull<u8>,
    bytes: usize,
}

// SAFETY: 1. Ownership: the alias is reached only through this value, which is not Clone, and
//    `new` obliges its caller to keep it mapped for every thread. 2. Races: all accesses are
//    atomic loads and stores (`header`, `slot`), so any thread may make them.
unsafe impl Send for RingMapping {}
// SAFETY: as for Send: shared access is atomic.
unsafe impl Sync for RingMapping {}

impl RingMapping {
    /// A ring of `bytes` bytes that the guest sees at `guest` and the trusted side at `alias`.
    ///
    /// # Panics
    /// If `bytes` is not a positive multiple of 4096 or `alias` not 8-byte aligned.
    ///
    /// # Safety
    /// `alias` is readable and writable for `bytes` bytes until this value comes back through
    /// [`super::AioHost::unmap_ring`], and no Rust reference to that memory exists meanwhile.
    #[must_use]
    pub unsafe fn new(guest: u64, alias: NonNull<u8>, bytes: usize) -> Self {
        assert!(bytes > 0 && bytes.is_multiple_of(PAGE), "a ring is whole pages");
        assert!(alias.cast::<AtomicU64>().is_aligned(), "a ring is aligned to its words");
        Self { guest, alias, bytes }
    }

    /// Where the guest sees it now: the context's id.
    #[must_use]
    pub const fn guest(&self) -> u64 {
        self.guest
    }

    /// Where the trusted side sees it.
    #[must_use]
    pub const fn alias(&self) -> NonNull<u8> {
        self.alias
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The guest moved its view.
    pub(super) const fn set_guest(&mut self, guest: u64) {
        self.guest = guest;
    }

    /// Slots: what the header's `nr` says as long as the guest leaves it alone.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) const fn slots(&self) -> u32 {
        ((self.bytes - HEADER_BYTES) / EVENT_BYTES) as u32
    }

    fn header(&self, index: usize) -> &AtomicU32 {
        assert!(index < HEADER_BYTES / 4);
        // SAFETY:
        // 1. In bounds: `index` is below 8 and `bytes` at least 4096 (`new`).
        // 2. Alive, aligned, unreferenced: the caller of `new` vouches for it.
        // 3. Race: an atomic, so a store of the guest during our access is defined behaviour.
        unsafe { self.alias.cast::<AtomicU32>().add(index).as_ref() }
    }

    fn slot(&self, slot: u32) -> &[AtomicU64; EVENT_WORDS] {
        assert!(slot < self.slots());
        // SAFETY:
        // 1. In bounds: `slot < slots()`, so HEADER_BYTES + (slot + 1) * EVENT_BYTES <= bytes.
        // 2. Alive, aligned, unreferenced: the caller of `new` vouches for it, and the header is a
        //    multiple of 8 bytes.
        // 3. Race: atomics, as in `header`.
        unsafe {
            self.alias
                .add(HEADER_BYTES)
                .cast::<[AtomicU64; EVENT_WORDS]>()
                .add(slot as usize)
                .as_ref()
        }
    }

    /// Writes the header of a new, empty ring.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn initialise(&self, id: u32) {
        for (index, value) in [
            (word::ID, id),
            (word::NR, self.slots()),
            (word::HEAD, 0),
            (word::TAIL, 0),
            (word::MAGIC, MAGIC),
            (word::COMPAT_FEATURES, 1),
            (word::INCOMPAT_FEATURES, 0),
            (word::HEADER_LENGTH, HEADER_BYTES as u32),
        ] {
            self.header(index).store(value, Ordering::Relaxed);
        }
    }

    /// The reader's position, as the guest left it. Acquire pairs with the reader's Release store:
    /// it has read the slots that it gives back.
    pub(super) fn head(&self) -> u32 {
        self.header(word::HEAD).load(Ordering::Acquire)
    }

    /// Gives slots back to the writer.
    pub(super) fn set_head(&self, head: u32) {
        self.header(word::HEAD).store(head, Ordering::Release);
    }

    /// The writer's position as the guest can see, and alter, it. Acquire pairs with
    /// [`Self::set_tail`].
    pub(super) fn tail(&self) -> u32 {
        self.header(word::TAIL).load(Ordering::Acquire)
    }

    /// Publishes all events before `tail`. Release: a reader that sees it sees them.
    pub(super) fn set_tail(&self, tail: u32) {
        self.header(word::TAIL).store(tail, Ordering::Release);
    }

    /// Stores an event. `slot` is below [`Self::slots`].
    pub(super) fn put(&self, slot: u32, event: Event) {
        for (word, value) in self.slot(slot).iter().zip(event.words()) {
            // Published by `set_tail`.
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Copies what lies in a slot, as bytes of the guest's `struct io_event`.
    pub(super) fn get(&self, slot: u32, out: &mut [u8; EVENT_BYTES]) {
        for (word, bytes) in self.slot(slot).iter().zip(out.as_chunks_mut().0) {
            *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        }
    }
}
