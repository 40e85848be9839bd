//! Records that the probes (kernel side) and the daemon (reader) share.
//!
//! Everything is made of 8-byte words, so the layout is the same for every compiler and target.
#![no_std]
#![forbid(unsafe_code)]

/// Words of one [`TracedIocb`].
pub const TRACED_WORDS: usize = 16;

/// High 16 bits of every traced `aio_data`.
pub const TAG: u64 = 0x9057;

/// What the daemon hands to io_submit: the kernel's 64-byte `struct iocb`, and beside it what the
/// probe wants to know. The iocbs of one batch lie one after the other, so that the probe reads
/// the whole batch with one copy.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub struct TracedIocb {
    /// `struct iocb` of linux/aio_abi.h; word 0 is `aio_data`, see [`aio_data`].
    pub iocb: [u64; 8],
    /// Claimed by the enclave: when the descriptor was published (CLOCK_MONOTONIC ns).
    pub enqueued_ns: u64,
    /// Daemon: when the descriptor was taken from the ring.
    pub picked_ns: u64,
    /// Claimed by the enclave: when the previous request of this lane and index was delivered;
    /// 0 if there was none.
    pub prev_delivered_ns: u64,
    /// Port operation ([`OPERATIONS`]).
    pub op: u64,
    /// Length in bytes.
    pub length: u64,
    /// Unused, zero.
    pub reserved: [u64; 3],
}

const _: () = assert!(core::mem::size_of::<TracedIocb>() == TRACED_WORDS * 8);

/// Names of the operations by number (the port's `op`); 0 is unused.
pub const OPERATIONS: [&str; 4] = ["", "read", "write", "flush"];

/// Most lanes that can be traced at once.
pub const LANES: u64 = 64;
/// Request indexes per lane.
pub const INDEXES: u64 = 4096;

/// The id carried in `aio_data`: `TAG << 48 | lane << 36 | index << 24 | generation (24 bits)`.
/// `lane` is below 4096 ([`LANES`] of them are traced), `index` below [`INDEXES`].
#[must_use]
pub const fn aio_data(lane: u64, index: u64, generation: u64) -> u64 {
    TAG << 48 | (lane & 0xfff) << 36 | (index & 0xfff) << 24 | (generation & 0xff_ffff)
}

/// Lane number in an `aio_data`.
#[must_use]
pub const fn lane_of(data: u64) -> u64 {
    data >> 36 & 0xfff
}

/// Request index in an `aio_data`.
#[must_use]
pub const fn index_of(data: u64) -> u64 {
    data >> 24 & 0xfff
}
