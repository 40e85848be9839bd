//! The boundary between the enclave and the daemon, as code.
//!
//! [`calls`] is generated from `postern.edl` at build time: the only list of control calls.
//! [`port`] is the layout of the shared memory that the data path runs over.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fuzzing"))]
extern crate std;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod port;
pub mod wire;

/// The control calls: types, the host's trait and dispatch, the enclave's calls. Generated from
/// `postern.edl`; how the messages look is in [`crate::wire`].
pub mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls.rs"));
}

/// Protocol version spoken by this build, checked at attach.
pub const VERSION: u32 = 4;

/// Feature bit of an attach: descriptors may ask for [`port::op::DISCARD`].
pub const FEATURE_DISCARD: u64 = 1;

/// Feature bit of an attach: the enclave may tell what only it knows (`postern_tell`).
pub const FEATURE_TELL: u64 = 2;

/// Names of the claims of `postern_tell`. Blocks are of 4096 bytes.
pub const CLAIMS: [&str; 9] = [
    "integrity_failures",
    "checkpoints",
    "flushes",
    "journal_blocks",
    "map_blocks",
    "data_blocks",
    "discarded_blocks",
    "used_blocks",
    "free_blocks",
];
/// So many of them, the first, are counts since the volume was opened; the others are as of now.
pub const COUNTED_CLAIMS: usize = 7;

/// `postern_open` flag: open for reading only.
pub const OPEN_READ_ONLY: u32 = 1;

/// `postern_open` flag: ask whoever has the lease to hand it over.
pub const OPEN_ASK: u32 = 2;

/// State of a lease: somebody else asks for it. Finish, close the file, or keep it.
pub const LEASE_ASKED: u32 = 1;
/// State of a lease: taken away. No descriptor of its handle is served any more.
pub const LEASE_LOST: u32 = 2;

/// What `postern_measured` tells: the volumes, their requests by result, bytes.
pub const MEASURED_VOLUMES: u32 = 1;
/// What `postern_measured` tells: latency by volume, operation and stage, as histograms.
pub const MEASURED_LATENCY: u32 = 2;
/// What `postern_measured` tells: records of single requests.
pub const MEASURED_RECORDS: u32 = 3;
/// What `postern_measured` tells: the probes' programs and what each costs. A wish of 0 or 1 nanoseconds
/// switches the probes off or on.
pub const MEASURED_PROBES: u32 = 4;

/// `postern_file_t` flag: the host file system refused O_DIRECT and the operator allowed buffered I/O.
pub const FILE_BUFFERED: u32 = 1;
