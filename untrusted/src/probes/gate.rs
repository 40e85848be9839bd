//! The probes' switch: a page of memory that the programs in the kernel read and the daemon writes.
//!
//! Holds: switching takes no system call and no privilege, so a daemon that gave its rights up can do
//! it. Programs stay attached: closed, each ends with its first look.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use postern_ebpf_common::gate::{
    ABANDONED, CLOSED, CLOSING, OPEN, OPENED_NS, STATE, TAKEN_OVER_NS, WORDS,
};

/// Length of the mapping, bytes: what the kernel rounds the map up to on every machine.
const LENGTH: usize = size_of::<[AtomicU64; WORDS]>();

/// The switch. Dropped, it is unmapped; the programs read on what it said last.
pub struct Gate {
    words: NonNull<[AtomicU64; WORDS]>,
}

// SAFETY: the memory is shared with the kernel anyway and is atomics only.
unsafe impl Send for Gate {}
// SAFETY: as above.
unsafe impl Sync for Gate {}

impl Gate {
    /// The switch that lies in the map `map`.
    ///
    /// # Errors
    /// As mmap(2): it is no map of that kind.
    pub fn of(map: BorrowedFd<'_>) -> std::io::Result<Self> {
        // SAFETY: a fresh mapping of one page of a map whose only element is longer than what is read.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LENGTH,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        let words = if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) };
        words.map(|words| Self { words }).ok_or_else(std::io::Error::last_os_error)
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: mapped as long as `self` lives; page-aligned; every bit pattern is a value.
        unsafe { self.words.as_ref() }
    }

    /// Whether new requests are looked at.
    pub fn is_open(&self) -> bool {
        self.words()[STATE].load(Relaxed) == OPEN
    }

    /// Looks at new requests from now on.
    pub fn open(&self, now_ns: u64) {
        if !self.is_open() {
            self.words()[OPENED_NS].store(now_ns, Relaxed);
            self.words()[STATE].store(OPEN, Relaxed);
        }
    }

    /// Looks at no new requests, but at the rest of those that are under way. Answers whether it was
    /// open.
    pub fn begin_to_close(&self) -> bool {
        self.words()[STATE].compare_exchange(OPEN, CLOSING, Relaxed, Relaxed).is_ok()
    }

    /// Looks at nothing any more, unless it was opened meanwhile.
    pub fn close(&self) {
        let _ = self.words()[STATE].compare_exchange(CLOSING, CLOSED, Relaxed, Relaxed);
    }

    /// Requests that were in flight when their daemons died.
    pub fn abandoned(&self) -> u64 {
        self.words()[ABANDONED].load(Relaxed)
    }

    /// Goes on after a daemon that died with `in_flight` requests: of those nothing will come. What
    /// it was about to close is closed.
    pub fn take_over(&self, now_ns: u64, in_flight: u64) {
        let words = self.words();
        words[TAKEN_OVER_NS].store(now_ns, Relaxed);
        words[ABANDONED].store(words[ABANDONED].load(Relaxed).wrapping_add(in_flight), Relaxed);
        self.close();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // SAFETY: the mapping of `of`, which nobody uses any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), LENGTH) };
    }
}
