//! io_getevents and io_pgetevents: turning a finished request into histograms.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use postern_ebpf_common::config::Config;
use postern_ebpf_common::counter::Counter;
use postern_ebpf_common::slot::{op_of, slot_of, volume_of};
use postern_ebpf_common::{INDEXES, TAG, gate, series, stage};

use crate::state::{
    CHUNK, argument, count, field, gate, is_wanted, opaque, postern_record, read_user, scratch,
    slot_at,
};

/// Most events that are looked at in one call.
const MOST: u64 = INDEXES;
const EVENT_BYTES: u64 = 32;

/// io_getevents returned.
#[tracepoint]
pub fn exit_io_getevents(tracepoint: TracePointContext) -> u32 {
    reaped(&tracepoint)
}

/// io_pgetevents returned.
#[tracepoint]
pub fn exit_io_pgetevents(tracepoint: TracePointContext) -> u32 {
    reaped(&tracepoint)
}

#[inline(always)]
fn reaped(tracepoint: &TracePointContext) -> u32 {
    // SAFETY: the record of a system call's exit: word 2 is the result.
    let events = unsafe { field(tracepoint.as_ptr(), 2) };
    if events.cast_signed() <= 0 || !is_wanted(gate::CLOSING) {
        return 0;
    }
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let from = argument(Config::ArgEvents);
    let mut first = 0;
    while first < MOST && first < events {
        postern_finish(from + first * EVENT_BYTES, events - first, now);
        first += CHUNK;
    }
    if events > MOST {
        count(Counter::ReapTooLong, events - MOST);
    }
    0
}

/// Finishes the requests of the first [`CHUNK`] of the `left` events that lie at `from`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_finish(from: u64, left: u64, now: u64) -> u64 {
    let Some(scratch) = scratch() else { return 0 };
    let events = if left < CHUNK { left } else { CHUNK };
    // Between 1 and CHUNK, in a form the verifier understands.
    let events = (events - 1 & (CHUNK - 1)) + 1;
    let end = opaque(events);
    // SAFETY: `events` <= CHUNK, the length of the array.
    if !unsafe { read_user((&raw mut (*scratch).events).cast(), events * EVENT_BYTES, from) } {
        count(Counter::ReapFault, events);
        return 0;
    }
    for i in 0..CHUNK {
        if i >= end {
            break;
        }
        // SAFETY: i < CHUNK, and the copy above filled that place.
        let id = unsafe { (*scratch).events[i as usize][0] };
        if id >> 48 == TAG {
            postern_finish_one(id, now);
        } else {
            count(Counter::Untagged, 1);
        }
    }
    events
}

/// Records the stages of the request `id`, reaped `now`, and empties its slot.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_finish_one(id: u64, now: u64) -> u64 {
    let Some(slot) = slot_of(id).and_then(slot_at) else { return 0 };
    // SAFETY: 1. The array's elements are Slots.
    //    2. Race: all completions of a request come before its event; its submitter may still be
    //       inside io_submit and stamp the slot, which is read once here.
    let (link, entered, submitted, ended, enqueued) = unsafe {
        if (*slot).id != id {
            // Once the probes were switched off, there are requests that they did not see begin.
            if (*slot).id == 0 && (gate(gate::STATE) | gate(gate::OPENED_NS)) != 0 {
                count(Counter::SubmittedWhileOff, 1);
            } else {
                count(Counter::ReapUnmatched, 1);
            }
            return 0;
        }
        (*slot).id = 0;
        (*slot).reaped_ns = now;
        let s = &*slot;
        (s.link, s.enter_ns, s.submitted_ns, s.device_end_ns, s.enqueued_ns)
    };
    let (op, volume) = (op_of(link), volume_of(link));
    if enqueued == 0 {
        count(Counter::ClaimMissing, 1);
    } else if enqueued > entered {
        count(Counter::NegativeCrossingOut, 1);
    } else {
        postern_record(volume, series(stage::CROSSING_OUT, op), entered - enqueued);
    }
    let known = ended != 0;
    let end = if known { ended } else { now };
    // Unknown, or behind the end by the time between two CPUs: all of it counts as the device's.
    let start = if submitted == 0 || submitted > end { entered } else { submitted };
    postern_record(volume, series(stage::HOST_SUBMIT, op), start - entered);
    if end < start {
        count(Counter::NegativeDevice, 1);
    } else {
        postern_record(volume, series(stage::DEVICE, op), end - start);
    }
    if !known {
        count(Counter::DeviceEndUnknown, 1);
    } else if now < end {
        count(Counter::NegativeReap, 1);
    } else {
        postern_record(volume, series(stage::REAP, op), now - end);
    }
    1
}
