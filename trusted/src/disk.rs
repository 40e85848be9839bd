//! The untrusted store as the volume sees it: 4 KiB places, read, written and flushed.
//!
//! The volume is written against [`Disk`] alone. Behind it stand the port's lane (live), a host
//! file (offline tools), and the simulated disk with its faults and crashes (tests).
//!
//! What an implementation promises: [`Transfer::write`] has completed at the host when it answers
//! `Ok`; [`Disk::flush`] makes durable what had completed before it was called, nothing else. The
//! bytes that [`Transfer::get`] hands out are whatever the host put there.

use core::future::Future;

use crate::{errno::Errno, platform::Platform};

/// Bytes in a block; the unit of places.
pub const BLOCK: usize = 4096;
/// One block of bytes in private memory.
pub type Block = [u8; BLOCK];

/// Why the host did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// The host's file refused with this errno (positive), e.g. EIO, ENOSPC.
    Errno(i32),
    /// The port was poisoned by a host that broke its contract, or the daemon is gone for good.
    Gone,
}

/// The store of one volume, seen from one process. Cheap to share; all methods take `&self`.
pub trait Disk: Platform {
    /// A transfer buffer.
    type Transfer: Transfer;

    /// Largest number of blocks in one [`Transfer`]. At least 32.
    const MAX_BLOCKS: usize;

    /// Waits for a transfer buffer of `blocks` (1..=[`Self::MAX_BLOCKS`]) blocks.
    ///
    /// A task must not wait for a second buffer while it holds one that is not in flight, unless
    /// it can do without (deadlock): use [`Self::try_transfer`] there.
    fn transfer(
        &self,
        blocks: usize,
    ) -> impl Future<Output = Result<Self::Transfer, HostError>> + Send;

    /// A transfer buffer if one is free now.
    fn try_transfer(&self, blocks: usize) -> Option<Self::Transfer>;

    /// One fdatasync of the host file, issued now.
    fn flush(&self) -> impl Future<Output = Result<(), HostError>> + Send;

    /// Tells the host that `blocks` blocks from `place` on need no space any more: what is read
    /// there afterwards is anything. Nothing relies on it being done.
    fn discard(
        &self,
        place: u64,
        blocks: u64,
    ) -> impl Future<Output = Result<(), HostError>> + Send {
        let _ = (place, blocks);
        core::future::ready(Err(HostError::Errno(Errno::EOPNOTSUPP.0)))
    }

    /// Size of the host file in whole blocks, as the host says.
    fn host_blocks(&self) -> u64;
}

/// A buffer shared with the host. Its content can change between any two looks.
pub trait Transfer: Send {
    /// Length in blocks.
    fn blocks(&self) -> usize;

    /// Copies a sealed block from private memory into the buffer.
    fn put(&mut self, index: usize, block: &Block);

    /// Copies what lies in the buffer into private memory.
    fn get(&self, index: usize, block: &mut Block);

    /// Reads all blocks of the buffer from `place` onwards. `Ok` means that the host claims to
    /// have read all of them.
    fn read(&mut self, place: u64) -> impl Future<Output = Result<(), HostError>> + Send;

    /// Writes the first `blocks` blocks of the buffer at `place` onwards. Short host writes are
    /// re-issued by the implementation (same bytes, same place, at most three times).
    fn write(
        &mut self,
        place: u64,
        blocks: usize,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
}
