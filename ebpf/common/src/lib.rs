//! What the probes (kernel side) and the daemon (reader) share: records, numbers and arithmetic.
//!
//! Every record is made of 8-byte words, so the layout is the same for every compiler and target.
//! Bucket arithmetic, stage and counter numbers stand here once and are compiled for both sides.
#![no_std]
#![forbid(unsafe_code)]

pub mod config;
pub mod counter;
pub mod histogram;
pub mod slot;

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
    /// The daemon's number of the volume; those that have no histograms of their own count as 0.
    pub volume: u64,
    /// Unused, zero.
    pub reserved: [u64; 2],
}

const _: () = assert!(core::mem::size_of::<TracedIocb>() == TRACED_WORDS * 8);

/// Names of the operations by number (the port's `op`); 0 is unused.
pub const OPERATIONS: [&str; 4] = ["", "read", "write", "flush"];

/// Names of the stages, in the order of a request's way; the numbers are those of [`stage`].
pub const STAGES: [&str; 5] = ["crossing_out", "host_submit", "device", "reap", "crossing_in"];

/// Numbers of the stages.
pub mod stage {
    /// Published by the enclave (claimed) until io_submit is entered.
    pub const CROSSING_OUT: u64 = 0;
    /// io_submit, from its entry until it returns: the whole batch, for each of its requests.
    /// For a request that the device finished before io_submit returned: until the block layer had
    /// a place for it, 0 where that is unknown.
    pub const HOST_SUBMIT: u64 = 1;
    /// From the end of [`HOST_SUBMIT`] until the block
    /// layer saw the device's last completion of the request. Where that is unknown, until
    /// io_getevents returned the request; such requests have no `reap` stage.
    pub const DEVICE: u64 = 2;
    /// From the device's last completion until io_getevents returned the request; with io_uring,
    /// until the kernel wrote its completion to the ring.
    pub const REAP: u64 = 3;
    /// From the end of [`REAP`] until delivered in the enclave (claimed). Learnt from the next
    /// request with the same lane and index, so the last of each index is missing.
    pub const CROSSING_IN: u64 = 4;
}

/// Number of histograms of a volume: every stage of every operation.
pub const SERIES: u64 = (STAGES.len() * (OPERATIONS.len() - 1)) as u64;

/// Most volumes that have histograms of their own, and one more for all others.
pub const VOLUMES: u64 = 33;

/// Number of a volume's histogram of a stage ([`stage`]) and an operation (1..=3).
#[must_use]
#[inline(always)]
pub const fn series(stage: u64, op: u64) -> u64 {
    stage * (OPERATIONS.len() as u64 - 1) + op.wrapping_sub(1)
}

/// Most lanes that can be traced at once.
pub const LANES: u64 = 64;
/// Request indexes per lane.
pub const INDEXES: u64 = 4096;

/// The words of the gate, an array that the daemon writes and the probes read.
pub mod gate {
    /// What is looked at: [`OPEN`], [`CLOSING`] or [`CLOSED`].
    pub const STATE: usize = 0;
    /// When it was opened again, CLOCK_MONOTONIC nanoseconds; 0: it was never closed.
    pub const OPENED_NS: usize = 1;
    /// When a daemon took the probes over from one that had died, CLOCK_MONOTONIC nanoseconds; 0:
    /// never. What was in flight before never ends.
    pub const TAKEN_OVER_NS: usize = 2;
    /// Requests that were in flight when their daemons died. Of no interest to the probes.
    pub const ABANDONED: usize = 3;
    /// Number of words.
    pub const WORDS: usize = 4;

    /// Everything.
    pub const OPEN: u64 = 0;
    /// What is under way, but nothing new.
    pub const CLOSING: u64 = 1;
    /// Nothing.
    pub const CLOSED: u64 = 2;
}

/// The id carried in `aio_data`: `TAG << 48 | lane << 36 | index << 24 | generation (24 bits)`.
/// `lane` is below 4096 ([`LANES`] of them are traced), `index` below [`INDEXES`].
#[must_use]
#[inline(always)]
pub const fn aio_data(lane: u64, index: u64, generation: u64) -> u64 {
    TAG << 48 | (lane & 0xfff) << 36 | (index & 0xfff) << 24 | (generation & 0xff_ffff)
}

/// Lane number in an `aio_data`.
#[must_use]
#[inline(always)]
pub const fn lane_of(data: u64) -> u64 {
    data >> 36 & 0xfff
}

/// Request index in an `aio_data`.
#[must_use]
#[inline(always)]
pub const fn index_of(data: u64) -> u64 {
    data >> 24 & 0xfff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_carries_lane_and_index_and_stays_inside_its_fields() {
        let data = aio_data(0xabc, 0xdef, 0xff12_3456);
        assert_eq!(data, 0x9057_abcd_ef12_3456);
        assert_eq!((lane_of(data), index_of(data)), (0xabc, 0xdef));
    }

    #[test]
    fn every_stage_of_every_operation_has_a_histogram_of_its_own() {
        let mut seen = [false; SERIES as usize];
        for stage in 0..STAGES.len() as u64 {
            for op in 1..OPERATIONS.len() as u64 {
                let at = usize::try_from(series(stage, op)).unwrap();
                assert!(!core::mem::replace(&mut seen[at], true));
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert!(series(0, 0) >= SERIES, "operation 0 has no histogram");
    }

    #[test]
    fn stage_names_and_numbers_agree() {
        assert_eq!(STAGES[stage::CROSSING_OUT as usize], "crossing_out");
        assert_eq!(STAGES[stage::HOST_SUBMIT as usize], "host_submit");
        assert_eq!(STAGES[stage::DEVICE as usize], "device");
        assert_eq!(STAGES[stage::REAP as usize], "reap");
        assert_eq!(STAGES[stage::CROSSING_IN as usize], "crossing_in");
    }
}
