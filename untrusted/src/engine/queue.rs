//! How a lane hands requests to the kernel: one trait, an implementation for each of the kernel's
//! interfaces ([`super::libaio`], [`super::uring`]).
//!
//! Holds: what was pushed is either accepted by the kernel, and then completes exactly once, or is
//! taken out again by its owner.

use std::os::fd::RawFd;

use postern_ebpf_common::TracedIocb;
use rustix::io::Errno;

use super::{libaio::Libaio, uring::Uring};

/// Most requests handed to the kernel by one call. Small, so that the first of a batch is under
/// way early.
pub const BATCH: usize = 32;

/// Most completions taken from the kernel by one call.
pub const REAP: usize = 64;

/// The kernel's interface that carries the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Interface {
    /// Native AIO: io_submit(2). The probes follow these requests into the device.
    #[default]
    Libaio,
    /// io_uring(7) with the port's memory as a registered buffer. The probes follow these as well,
    /// where the kernel has what that takes.
    #[value(name = "io_uring")]
    Uring,
}

/// What a queue needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Most requests in flight at once.
    pub requests: u32,
    /// Fewer than `requests` will do, but not fewer than this.
    pub least: u32,
    /// eventfd that the kernel signals when something completes.
    pub wake: RawFd,
    /// Where the data of all requests lies: address and length in bytes.
    pub memory: (u64, u64),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What the completion brings back.
    pub data: u64,
    /// Request index of the lane.
    pub index: usize,
    /// Port operation: read, write or flush.
    pub op: u64,
    /// The daemon's number of the volume, for the probes.
    pub volume: u64,
    /// Host descriptor.
    pub fd: i32,
    /// Address of the data; 0 for a flush.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the host file.
    pub offset: u64,
    /// For the probes: claimed publication, pickup, claimed delivery of the index's previous
    /// request.
    pub stamps: [u64; 3],
}

impl Entry {
    /// What the probes read of the request; `iocb` is the kernel's part, if it has one.
    pub const fn traced(&self, mut iocb: [u64; 8]) -> TracedIocb {
        let [enqueued_ns, picked_ns, prev_delivered_ns] = self.stamps;
        iocb[0] = self.data;
        TracedIocb {
            iocb,
            enqueued_ns,
            picked_ns,
            prev_delivered_ns,
            op: self.op,
            length: self.length,
            volume: self.volume,
            reserved: [0; 2],
        }
    }
}

/// A place for what the probes read.
pub const NOT_TRACED: TracedIocb = TracedIocb {
    iocb: [0; 8],
    enqueued_ns: 0,
    picked_ns: 0,
    prev_delivered_ns: 0,
    op: 0,
    length: 0,
    volume: 0,
    reserved: [0; 2],
};

/// Requests on their way into the kernel and out of it.
pub trait Queue: Send {
    /// Whether requests wait for the kernel to accept them.
    fn is_pending(&self) -> bool;

    /// Adds a request; at most [`BATCH`] wait at once.
    fn push(&mut self, entry: &Entry);

    /// Hands the waiting requests to the kernel; answers the request indexes it accepted.
    ///
    /// # Errors
    /// What the kernel says of the first waiting request: then none was accepted.
    ///
    /// # Safety
    /// The memory that an accepted request names stays mapped, and its descriptor open, until its
    /// completion was reaped or the queue dropped.
    unsafe fn submit(&mut self) -> Result<&[usize], Errno>;

    /// Takes the first waiting request out; answers its request index.
    fn drop_first(&mut self) -> Option<usize>;

    /// Takes completions without waiting: how many there were, at most [`REAP`]; [`Self::event`]
    /// shows them.
    fn reap(&mut self) -> usize;

    /// Data and result of event `n` of the last [`Self::reap`].
    fn event(&self, n: usize) -> (u64, i64);

    /// Whether there is something to reap, seen without a system call.
    fn has_events(&self) -> bool;
}

/// A queue over the wanted interface.
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// `wanted.memory` stays mapped until the queue is dropped.
pub unsafe fn open(interface: Interface, wanted: &Wanted) -> Result<Box<dyn Queue>, Errno> {
    Ok(match interface {
        Interface::Libaio => Box::new(Libaio::new(wanted)?),
        // SAFETY: the caller's contract is the same.
        Interface::Uring => Box::new(unsafe { Uring::new(wanted) }?),
    })
}

/// Whether this process may use `interface`.
///
/// # Errors
/// What the kernel says.
pub fn probe(interface: Interface) -> Result<(), Errno> {
    match interface {
        Interface::Libaio => Ok(()),
        Interface::Uring => super::uring::probe(),
    }
}
