//! The record of one request in flight, kept by lane and index in an array the probes share.

use crate::{INDEXES, LANES, index_of, lane_of};

/// Number of slots: one for each lane and index.
pub const SLOTS: u64 = LANES * INDEXES;

/// The slot of an `aio_data`; `None` if its lane is not traced.
#[must_use]
#[inline(always)]
pub const fn slot_of(data: u64) -> Option<u64> {
    let lane = lane_of(data);
    if lane >= LANES { None } else { Some(lane * INDEXES + index_of(data)) }
}

/// One request in flight. All times are CLOCK_MONOTONIC nanoseconds; 0 means not yet.
///
/// Order of the writers: `sys_enter_io_submit` fills it, `sys_exit_io_submit` and the completion
/// stamp it in either order, `sys_exit_io_getevents` empties it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// `aio_data` of the request in flight; 0 if there is none.
    pub id: u64,
    /// AIO context (the address that io_setup returned) it was submitted to; with io_uring, the
    /// address of the kernel's record of the thread that submitted it.
    pub context: u64,
    /// io_submit entered. Kept after the request is reaped: it tells one batch from another.
    pub enter_ns: u64,
    /// io_submit returned; if the device was done before, when the block layer had a place for the
    /// request, 0 where that is unknown.
    pub submitted_ns: u64,
    /// Last completion by the device.
    pub device_end_ns: u64,
    /// io_getevents returned the previous request of this slot, and nobody asked since when it was
    /// delivered.
    pub reaped_ns: u64,
    /// Claimed by the enclave: when the descriptor was published.
    pub enqueued_ns: u64,
    /// See [`link`].
    pub link: u64,
}

const _: () = assert!(core::mem::size_of::<Slot>() == 64);

/// Says in [`link`] that no slot came before.
pub const NO_SLOT: u64 = 0xffff_ffff;

const _: () = assert!(NO_SLOT >= SLOTS);

/// Word [`Slot::link`]: `op | volume << 4 | position << 16 | before << 32`. `volume` (12 bits) is its
/// place among the histograms, `position` (16 bits) counts from 0 in its io_submit call, `before` is the slot of the traced request before it or [`NO_SLOT`].
#[must_use]
#[inline(always)]
pub const fn link(op: u64, volume: u64, position: u64, before: u64) -> u64 {
    op & 0xf | (volume & 0xfff) << 4 | (position & 0xffff) << 16 | before << 32
}

/// Operation in a [`link`].
#[must_use]
#[inline(always)]
pub const fn op_of(link: u64) -> u64 {
    link & 0xf
}

/// Volume in a [`link`].
#[must_use]
#[inline(always)]
pub const fn volume_of(link: u64) -> u64 {
    link >> 4 & 0xfff
}

/// Position in a [`link`].
#[must_use]
#[inline(always)]
pub const fn position_of(link: u64) -> u64 {
    link >> 16 & 0xffff
}

/// Slot before in a [`link`].
#[must_use]
#[inline(always)]
pub const fn before_of(link: u64) -> u64 {
    link >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aio_data;

    #[test]
    fn every_traced_lane_and_index_has_a_slot_of_its_own() {
        assert_eq!(slot_of(aio_data(0, 0, 9)), Some(0));
        assert_eq!(slot_of(aio_data(1, 0, 9)), Some(4096));
        assert_eq!(slot_of(aio_data(63, 4095, 9)), Some(SLOTS - 1));
        assert_eq!(slot_of(aio_data(64, 0, 9)), None);
    }

    #[test]
    fn a_link_gives_back_what_was_put_in() {
        let word = link(3, 32, 4095, SLOTS - 1);
        assert_eq!((op_of(word), position_of(word), before_of(word)), (3, 4095, SLOTS - 1));
        assert_eq!(volume_of(word), 32);
        assert_eq!(before_of(link(1, 0, 0, NO_SLOT)), NO_SLOT);
    }
}
