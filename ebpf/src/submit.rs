//! io_submit, and io_uring_enter of the daemon: filling the slots of a batch at its entry, stamping
//! them at its return.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use postern_ebpf_common::config::Config;
use postern_ebpf_common::counter::Counter;
use postern_ebpf_common::slot::{NO_SLOT, before_of, link, op_of, position_of, slot_of, volume_of};
use postern_ebpf_common::{INDEXES, OPERATIONS, TAG, TRACED_WORDS, gate, series, stage};

use crate::state::{
    CHUNK, argument, config, count, current_task, field, gate, is_wanted, opaque, postern_record,
    read_user, read_user_word, scratch, slot_at,
};

/// Bytes of a [`postern_ebpf_common::TracedIocb`].
const STRIDE: u64 = 8 * TRACED_WORDS as u64;

/// Most requests that are looked at in one io_submit: all that a lane can have in flight.
const MOST: u64 = INDEXES;

/// `io_submit(context, count, pointers)` was entered.
#[tracepoint]
pub fn enter_io_submit(tracepoint: TracePointContext) -> u32 {
    if !is_wanted(gate::OPEN) {
        return 0;
    }
    // SAFETY: the record of sys_enter_io_submit: words 2 to 4 are the arguments.
    let (context, requests, pointers) = unsafe {
        let record = tracepoint.as_ptr();
        (field(record, 2), field(record, 3), field(record, 4))
    };
    if requests.cast_signed() <= 0 {
        return 0;
    }
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let looked_at = if requests < MOST { requests } else { MOST };
    let (mut first, mut before) = (0, NO_SLOT);
    while first < MOST && first < looked_at {
        before = postern_take(pointers, looked_at << 32 | first, context, now, before);
        first += CHUNK;
    }
    if requests > looked_at {
        count(Counter::BatchTooLong, requests - looked_at);
    }
    0
}

/// `io_uring_enter(ring, count, ..., flags, requests, length)` was entered. Where it is not to wait for
/// completions, the kernel does not look at its last arguments: the daemon tells with them where it
/// describes the requests, one after the other.
#[tracepoint]
pub fn enter_io_uring_enter(tracepoint: TracePointContext) -> u32 {
    if !is_wanted(gate::OPEN) {
        return 0;
    }
    // SAFETY: the record of sys_enter_io_uring_enter: words 2 to 7 are the arguments.
    let (requests, flags, described, length) = unsafe {
        let record = tracepoint.as_ptr();
        (field(record, 3) as u32, field(record, 5), field(record, 6), field(record, 7))
    };
    if requests == 0 || flags & GETEVENTS != 0 || length != STRIDE {
        return 0;
    }
    let requests = u64::from(requests);
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let looked_at = if requests < MOST { requests } else { MOST };
    let context = current_task();
    let (mut first, mut before) = (0, NO_SLOT);
    while first < MOST && first < looked_at {
        before = postern_take_described(described, looked_at << 32 | first, context, now, before);
        first += CHUNK;
    }
    if requests > looked_at {
        count(Counter::BatchTooLong, requests - looked_at);
    }
    0
}

/// `IORING_ENTER_GETEVENTS` of linux/io_uring.h.
const GETEVENTS: u64 = 1;

/// As [`postern_take`], for requests that are described one after the other at `described`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_take_described(
    described: u64,
    part: u64,
    context: u64,
    now: u64,
    mut before: u64,
) -> u64 {
    let Some(scratch) = scratch() else { return before };
    let first = part & 0xffff_ffff;
    let left = (part >> 32) - first;
    let requests = if left < CHUNK { left } else { CHUNK };
    // Between 1 and CHUNK, in a form the verifier understands.
    let requests = (requests - 1 & (CHUNK - 1)) + 1;
    let end = opaque(requests);
    // SAFETY: `requests` <= CHUNK, the length of the array.
    let read = unsafe {
        let to = (&raw mut (*scratch).iocbs).cast();
        read_user(to, requests * STRIDE, described + first * STRIDE)
    };
    if !read {
        count(Counter::SubmitFault, requests);
        return before;
    }
    let mut seen = 0;
    for i in 0..CHUNK {
        if i >= end {
            break;
        }
        let slot = postern_take_one(i, first + i, context, now, before);
        seen += u64::from(slot != before);
        before = slot;
    }
    count(Counter::Seen, seen);
    before
}

/// Fills the slots of up to [`CHUNK`] requests of the batch whose addresses lie at `pointers`; `part`
/// is `requests in the batch << 32 | position of the first to fill`. `before` is the slot of the
/// request before that; answers that of the last.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_take(
    pointers: u64,
    part: u64,
    context: u64,
    now: u64,
    mut before: u64,
) -> u64 {
    let first = part & 0xffff_ffff;
    let left = (part >> 32) - first;
    let end = if left < CHUNK { left } else { CHUNK };
    let pointers = pointers + first * 8;
    let contiguous = postern_fetch(pointers, end) == 1;
    let mut seen = 0;
    for i in 0..CHUNK {
        if i >= end {
            break;
        }
        let slot = if contiguous {
            postern_take_one(i, first + i, context, now, before)
        } else {
            postern_chase(pointers + i * 8, first + i, context, now, before)
        };
        seen += u64::from(slot != before);
        before = slot;
    }
    count(Counter::Seen, seen);
    before
}

/// Copies up to [`CHUNK`] requests, whose addresses lie at `pointers`, to the scratch memory, if they
/// lie one after the other; answers 1 if they do.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_fetch(pointers: u64, requests: u64) -> u64 {
    let Some(scratch) = scratch() else { return 0 };
    // Between 1 and CHUNK, in a form the verifier understands.
    let requests = (requests - 1 & (CHUNK - 1)) + 1;
    let end = opaque(requests);
    // SAFETY: `requests` <= CHUNK, the length of both arrays; i < CHUNK.
    unsafe {
        if !read_user((&raw mut (*scratch).pointers).cast(), requests * 8, pointers) {
            return 0;
        }
        let base = (*scratch).pointers[0];
        for i in 1..CHUNK {
            if i >= end {
                break;
            }
            if (*scratch).pointers[i as usize] != base + i * STRIDE {
                return 0;
            }
        }
        u64::from(read_user((&raw mut (*scratch).iocbs).cast(), requests * STRIDE, base))
    }
}

/// Fills the slot of the one request whose address lies at `pointer`; answers its slot, or `before`
/// where it has none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_chase(
    pointer: u64,
    position: u64,
    context: u64,
    now: u64,
    before: u64,
) -> u64 {
    let Some(scratch) = scratch() else { return before };
    // SAFETY: room for one TracedIocb.
    let iocb = unsafe { &raw mut (*scratch).iocbs[0] };
    // A request that is not ours may be no more than a `struct iocb`: look at its tag first.
    let Some(address) = read_user_word(pointer) else {
        count(Counter::SubmitFault, 1);
        return before;
    };
    match read_user_word(address) {
        Some(data) if data >> 48 != TAG => {
            count(Counter::Untagged, 1);
            return before;
        }
        Some(_) => {}
        None => {
            count(Counter::SubmitFault, 1);
            return before;
        }
    }
    // SAFETY: as above.
    if !unsafe { read_user(iocb.cast(), STRIDE, address) } {
        count(Counter::SubmitFault, 1);
        return before;
    }
    postern_take_one(0, position, context, now, before)
}

/// Fills the slot of the request that was copied to place `i`; answers the slot, or `before` where
/// the request has none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_take_one(
    i: u64,
    position: u64,
    context: u64,
    now: u64,
    before: u64,
) -> u64 {
    let Some(scratch) = scratch() else { return before };
    if i >= CHUNK {
        return before;
    }
    // SAFETY: in bounds; nobody else uses this CPU's scratch memory meanwhile.
    let request = unsafe { &(*scratch).iocbs[i as usize] };
    let id = request.iocb[0];
    if id >> 48 != TAG {
        count(Counter::Untagged, 1);
        return before;
    }
    let op = request.op;
    if op == 0 || op >= OPERATIONS.len() as u64 {
        count(Counter::BadOperation, 1);
        return before;
    }
    let Some(index) = slot_of(id) else {
        count(Counter::LaneOutOfRange, 1);
        return before;
    };
    let Some(slot) = slot_at(index) else { return before };
    // SAFETY: 1. The array's elements are Slots.
    //    2. Race: a stale completion may stamp meanwhile; whole words, and the id tells it.
    unsafe {
        if (*slot).id != 0 {
            // Else its daemon died, which is known.
            if (*slot).enter_ns > gate(gate::TAKEN_OVER_NS) {
                count(Counter::Overwritten, 1);
            }
        } else if (*slot).reaped_ns > gate(gate::OPENED_NS)
            && (*slot).reaped_ns > gate(gate::TAKEN_OVER_NS)
        {
            // Else what was delivered is another request, which was not seen.
            crossing_in((*slot).link, (*slot).reaped_ns, request.prev_delivered_ns, now);
        }
        (*slot).id = id;
        (*slot).context = context;
        (*slot).enter_ns = now;
        (*slot).submitted_ns = 0;
        (*slot).device_end_ns = 0;
        (*slot).reaped_ns = 0;
        (*slot).enqueued_ns = request.enqueued_ns;
        let volume = request.volume;
        let volume = if volume < config(Config::Volumes) { volume } else { 0 };
        (*slot).link = link(op, volume, position, before);
    }
    index
}

/// Records how the previous request of a slot, `link`, got back into the enclave.
#[inline(always)]
fn crossing_in(link: u64, reaped_ns: u64, delivered_ns: u64, now: u64) {
    if delivered_ns == 0 {
        return;
    }
    if delivered_ns < reaped_ns || delivered_ns > now {
        count(Counter::NegativeCrossingIn, 1);
    } else {
        let at = series(stage::CROSSING_IN, op_of(link));
        postern_record(volume_of(link), at, delivered_ns - reaped_ns);
    }
}

/// io_submit returned.
#[tracepoint]
pub fn exit_io_submit(tracepoint: TracePointContext) -> u32 {
    if !is_wanted(gate::CLOSING) {
        return 0;
    }
    let requests = argument(Config::ArgCount);
    if requests.cast_signed() <= 0 {
        return 0;
    }
    let last = if requests < MOST { requests - 1 } else { MOST - 1 };
    let newest = read_user_word(argument(Config::ArgPointers) + last * 8);
    // SAFETY: the record of sys_exit_io_submit: word 2 is the result.
    let result = unsafe { field(tracepoint.as_ptr(), 2) };
    returned(newest.and_then(read_user_word), argument(Config::ArgContext), result)
}

/// io_uring_enter returned.
#[tracepoint]
pub fn exit_io_uring_enter(tracepoint: TracePointContext) -> u32 {
    if !is_wanted(gate::CLOSING) {
        return 0;
    }
    let requests = argument(Config::ArgCount) & 0xffff_ffff;
    // The fourth argument is the flags here.
    let flags = argument(Config::ArgEvents);
    if requests == 0 || flags & GETEVENTS != 0 || argument(Config::ArgLength) != STRIDE {
        return 0;
    }
    let last = if requests < MOST { requests - 1 } else { MOST - 1 };
    let newest = read_user_word(argument(Config::ArgDescribed) + last * STRIDE);
    // SAFETY: the record of sys_exit_io_uring_enter: word 2 is the result.
    let result = unsafe { field(tracepoint.as_ptr(), 2) };
    returned(newest, current_task(), result)
}

/// The call that submitted the batch whose last request is `newest` answers `result`.
#[inline(always)]
fn returned(newest: Option<u64>, context: u64, result: u64) -> u32 {
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let accepted = if result.cast_signed() < 0 { 0 } else { result };
    let Some(id) = newest.filter(|id| id >> 48 == TAG) else {
        count(Counter::BatchLost, 1);
        return 0;
    };
    let Some(mut index) = slot_of(id) else { return 0 };
    let Some(newest) = slot_at(index) else { return 0 };
    // SAFETY: as in `postern_take_one`.
    let entered = unsafe {
        let found = (*newest).id;
        // Once the probes were switched off, an empty slot may never have had this request.
        let switched = (gate(gate::STATE) | gate(gate::OPENED_NS)) != 0;
        if found == 0 && switched {
            return 0;
        }
        if found != id && found != 0 || (*newest).context != context {
            count(Counter::BatchLost, 1);
            return 0;
        }
        (*newest).enter_ns
    };
    let mut turns = 0;
    while turns < MOST && index != NO_SLOT {
        index = postern_settle(index, entered, context, now, accepted);
        turns += CHUNK;
    }
    0
}

/// Stamps or empties up to [`CHUNK`] slots of the batch that entered io_submit at `entered`, from
/// the slot `index` backwards; answers where to go on, [`NO_SLOT`] at the end.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_settle(
    mut index: u64,
    entered: u64,
    context: u64,
    now: u64,
    accepted: u64,
) -> u64 {
    for _ in 0..CHUNK {
        // NO_SLOT is no element.
        let Some(slot) = slot_at(index) else { return NO_SLOT };
        // SAFETY: as in `postern_take_one`.
        unsafe {
            if (*slot).enter_ns != entered || (*slot).context != context {
                // Used by a later batch already: the rest of this one can not be found.
                count(Counter::BatchLost, 1);
                return NO_SLOT;
            }
            let link = (*slot).link;
            if (*slot).id != 0 {
                if position_of(link) >= accepted {
                    (*slot).id = 0;
                    count(Counter::NotAccepted, 1);
                } else if (*slot).device_end_ns == 0 {
                    (*slot).submitted_ns = now;
                } else {
                    count(Counter::CompletedInSubmit, 1);
                }
            }
            index = before_of(link);
        }
    }
    index
}
