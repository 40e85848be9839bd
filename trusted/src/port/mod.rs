//! The trusted end of the port: one [`Lane`] per process over memory shared with the daemon.
//!
//! The way of a request: a task waits for a transfer buffer ([`LaneFile`] is a
//! [`Disk`](crate::disk::Disk)), copies sealed blocks into it, and awaits a read or write; the lane
//! takes a free index, writes a descriptor and publishes it. [`Lane::poll`] takes completions,
//! checks them against the private table of what is in flight, and wakes the task.
//!
//! Holds whatever the host writes, and whenever it writes it:
//! - every shared word is loaded once and the decision is made on that copy; cursors, ids, lengths
//!   and buffers are private, the shared ones are only ever written;
//! - a request completes at most once, and only if its id (generation and index) is in flight now;
//!   anything else poisons the lane with a [`HostFault`] for good, and all requests end with
//!   [`HostError::Gone`](crate::disk::HostError::Gone);
//! - a buffer is not handed out again while a request on it is in flight, also when the task that
//!   asked has gone away;
//! - one call of [`Lane::poll`] does work bounded by its limit and the number of entries; nothing
//!   panics.
//!
//! Does not hold: progress (the host may stay silent; nothing is timed out), and the truth of a
//! result before the volume has authenticated the bytes.
//!
//! Only `words` touches shared memory, and only by whole aligned 8-byte words. Locks are private,
//! held for tens of nanoseconds, never across a copy, a wake-up or a doorbell.

mod buddy;
mod file;
mod lane;
mod pool;
mod request;
mod table;
mod turnstile;
mod words;

use core::fmt;

pub use file::{LaneFile, LaneTransfer};
pub use lane::{Lane, Plug};
pub use postern_edl::calls::{PosternSleeper as Sleeper, Switchless};
pub use words::SharedWords;
#[cfg(test)]
pub(crate) use words::probe;

/// Largest transfer in blocks: 128 KiB.
pub const MAX_TRANSFER_BLOCKS: usize = 1 << buddy::MAX_ORDER;

/// What a lane asks of the platform: the calls of postern.edl that make no message, and a clock.
///
/// In SGX each of the two is a switchless ocall; where the enclave's process is its own host they
/// signal an eventfd and wait for one. Called without a lock held.
pub trait Doorbell: Switchless + Send + Sync {
    /// Monotonic nanoseconds (CLOCK_MONOTONIC) for the times in descriptors and stamps: claims
    /// for statistics, nothing is decided on them.
    fn now_ns(&self) -> u64;
}

/// How the host broke the port's contract. The lane is then poisoned for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostFault {
    /// More completions announced than the ring has entries, or fewer than were taken.
    CursorOutOfRange {
        /// What the host announced, completions since attach.
        published: u64,
        /// What the enclave had taken, completions since attach.
        taken: u64,
    },
    /// The cursor of announced completions moved backwards.
    CursorWentBack {
        /// What the host announces now.
        published: u64,
        /// What it had announced before.
        before: u64,
    },
    /// A completion for an id that is not in flight and was not the last one of its index.
    UnknownRequest {
        /// The id as the host wrote it.
        id: u64,
    },
    /// A second completion of a request.
    DuplicateCompletion {
        /// The id of the request.
        id: u64,
    },
    /// A result that is neither an errno nor a length that could have been done.
    ResultOutOfRange {
        /// The id of the request.
        id: u64,
        /// The result as the host wrote it.
        result: i64,
        /// The length asked for in bytes.
        asked: u64,
    },
    /// The daemon has gone away, and no other takes over.
    DaemonGone,
}

impl fmt::Display for HostFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::CursorOutOfRange { published, taken } => write!(
                f,
                "the host announced completion {published} when {taken} were taken: out of range"
            ),
            Self::CursorWentBack { published, before } => write!(
                f,
                "the host announced completion {published} after it had announced {before}"
            ),
            Self::UnknownRequest { id } => {
                write!(f, "the host completed request {id:#x}, which is not in flight")
            }
            Self::DuplicateCompletion { id } => {
                write!(f, "the host completed request {id:#x} twice")
            }
            Self::ResultOutOfRange { id, result, asked } => write!(
                f,
                "the host answered request {id:#x} for {asked} bytes with the result {result}"
            ),
            Self::DaemonGone => f.write_str("the daemon has gone away"),
        }
    }
}

impl core::error::Error for HostFault {}

/// Why a port could not be set up: what was passed in does not fit. Nothing the host can cause
/// after set-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortError {
    /// The region does not start at a multiple of 8, is empty, no multiple of 8 long, or wraps
    /// around the address space.
    BadRegion {
        /// Address of the region.
        base: usize,
        /// Its length in bytes.
        bytes: usize,
    },
    /// The region touches the enclave's own memory.
    InsideEnclave {
        /// Address of the region.
        base: usize,
        /// Its length in bytes.
        bytes: usize,
    },
    /// The geometry is not one that [`Geometry::new`](postern_edl::port::Geometry::new) makes, or
    /// its transfer area is shorter than one transfer of [`MAX_TRANSFER_BLOCKS`].
    BadGeometry,
    /// The region is shorter than the geometry needs.
    RegionTooShort {
        /// Bytes that the geometry needs.
        needed: usize,
        /// Bytes there are.
        bytes: usize,
    },
}

impl fmt::Display for PortError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BadRegion { base, bytes } => write!(
                f,
                "port region of {bytes} bytes at {base:#x}: it must be made of whole aligned \
                 8-byte words"
            ),
            Self::InsideEnclave { base, bytes } => write!(
                f,
                "port region of {bytes} bytes at {base:#x} touches enclave memory: it must lie \
                 outside"
            ),
            Self::BadGeometry => write!(
                f,
                "port geometry: entries must be a power of two, the transfer area at least \
                 {MAX_TRANSFER_BLOCKS} blocks of 4096 bytes"
            ),
            Self::RegionTooShort { needed, bytes } => {
                write!(f, "port region of {bytes} bytes is too short: {needed} are needed")
            }
        }
    }
}

impl core::error::Error for PortError {}

/// Counters of a lane since it was made. A snapshot: the numbers are not of one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneStats {
    /// Descriptors published.
    pub submitted: u64,
    /// Completions accepted.
    pub completed: u64,
    /// Batches in which they were taken.
    pub batches: u64,
    /// Doorbells rung.
    pub doorbells: u64,
}
