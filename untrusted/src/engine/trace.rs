//! Static tracepoints (USDT, provider `postern`) for bpftrace, perf and gdb; scripts are in
//! tools/bpftrace.
//!
//! Holds: where nobody traces, one costs a `nop` and what it takes to have its arguments at hand; each
//! start has one done, with the same lane and id, unless the lane ends in between. A request is named
//! by its lane and its id in the port (generation << 32 | index).
//!
//! Arguments are numbers; none is an address or content.

use probe::probe;

/// A descriptor was taken: lane, id, operation (1 read, 2 write, 3 flush, 4 discard), offset, length.
#[inline(always)]
pub fn request_start(lane: u64, id: u64, op: u64, offset: u64, length: u64) {
    probe!(postern, request__start, lane, id, op, offset, length);
}

/// Its completion is about to be seen by the enclave: lane, id, result.
#[inline(always)]
pub fn request_done(lane: u64, id: u64, result: i64) {
    probe!(postern, request__done, lane, id, result);
}

/// A batch goes to the kernel: lane.
#[inline(always)]
pub fn submit_start(lane: u64) {
    probe!(postern, submit__start, lane);
}

/// The kernel has answered: lane, requests accepted.
#[inline(always)]
pub fn submit_done(lane: u64, accepted: usize) {
    probe!(postern, submit__done, lane, accepted);
}

/// The kernel has accepted a request: lane, id.
#[inline(always)]
pub fn device_start(lane: u64, id: u64) {
    probe!(postern, device__start, lane, id);
}

/// It was reaped: lane, id, result.
#[inline(always)]
pub fn device_done(lane: u64, id: u64, result: i64) {
    probe!(postern, device__done, lane, id, result);
}

/// A request is done by the daemon itself, a flush or a discard: lane, id.
#[inline(always)]
pub fn work_start(lane: u64, id: u64) {
    probe!(postern, work__start, lane, id);
}

/// That is over: lane, id, result.
#[inline(always)]
pub fn work_done(lane: u64, id: u64, result: i64) {
    probe!(postern, work__done, lane, id, result);
}
