//! What the trusted side asks of the place it runs in.

use alloc::vec::Vec;

use crate::sync::Lock;

/// A guest address could not be read or written. Becomes `EFAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// Access to the guest's memory by guest address. Never faults, whatever the address: NULL,
/// kernel, non-canonical, unmapped, protected and half-mapped ranges all answer [`Fault`].
pub trait GuestMemory: Send + Sync {
    /// Copies `out.len()` bytes from guest address `from`. On a fault `out` may be partly written.
    ///
    /// # Errors
    /// [`Fault`] if any byte of the range cannot be read.
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault>;

    /// Copies `data` to guest address `to`. On a fault a prefix may have been written.
    ///
    /// # Errors
    /// [`Fault`] if any byte of the range cannot be written.
    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault>;
}

/// How many bytes from the start on the guest has memory for in `ranges` (addresses and lengths),
/// looked at page by page: memory that can be read, or with `writable` also be written (each
/// page's first byte is stored again).
pub fn reach(
    memory: &(impl GuestMemory + ?Sized),
    ranges: impl Iterator<Item = (u64, u64)>,
    writable: bool,
) -> u64 {
    const PAGE: u64 = 4096;
    let is_there = |at| {
        let mut byte = [0];
        memory.read(at, &mut byte)?;
        if writable { memory.write(at, &byte) } else { Ok(()) }
    };
    let mut start = 0_u64;
    for (base, length) in ranges {
        let (mut at, end) = (base, base.saturating_add(length));
        while at < end {
            if is_there(at).is_err() {
                return start.saturating_add(at - base);
            }
            at = (at | (PAGE - 1)).saturating_add(1);
        }
        start = start.saturating_add(length);
    }
    start
}

/// A logical buffer of a request: bytes 0..len, wherever they lie: guest iovecs, or plain
/// [`Memory`].
pub trait Buffer: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes `at..at + out.len()` of the buffer into `out`.
    ///
    /// # Errors
    /// [`Fault`] if any byte cannot be read.
    fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), Fault>;

    /// Copies `data` over bytes `at..at + data.len()` of the buffer.
    ///
    /// # Errors
    /// [`Fault`] if any byte cannot be written.
    fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), Fault>;
}

/// A buffer in plain memory: what tools, tests and the directory index read into and write from.
pub struct Memory(Lock<Vec<u8>>);

impl Memory {
    /// A buffer of these bytes.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(Lock::new(bytes))
    }

    /// What it holds.
    #[must_use]
    pub fn into_inner(self) -> Vec<u8> {
        self.0.into_inner()
    }
}

impl Buffer for Memory {
    fn len(&self) -> usize {
        self.0.lock().len()
    }

    fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        out.copy_from_slice(self.0.lock().get(at..at + out.len()).ok_or(Fault)?);
        Ok(())
    }

    fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), Fault> {
        self.0.lock().get_mut(at..at + data.len()).ok_or(Fault)?.copy_from_slice(data);
        Ok(())
    }
}

/// The platform has no randomness to give: nothing may be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoEntropy;

/// Time and randomness.
pub trait Platform: Send + Sync {
    /// Monotonic nanoseconds. In SGX it comes from the host: it drives timers and statistics,
    /// never a decision about correctness.
    fn now_ns(&self) -> u64;

    /// Fills `out` with randomness of cryptographic quality (RDRAND, getrandom(2)).
    ///
    /// # Errors
    /// [`NoEntropy`]: the caller must refuse to seal.
    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy>;
}
