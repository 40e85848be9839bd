//! io_uring: a request's completion, seen when the kernel writes it to the ring.
//!
//! The daemon takes completions from the ring without a system call, so there is nothing like
//! io_getevents' return to see. The ring is set up so that the kernel writes them when the lane enters
//! it to collect them: that is where a request is turned into histograms.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use postern_ebpf_common::config::Config;
use postern_ebpf_common::slot::slot_of;
use postern_ebpf_common::{TAG, gate};

use crate::reap::postern_finish_one;
use crate::state::{config, gate, read_kernel, slot_at};

/// `io_uring_complete(ring, request, ...)`: the kernel writes a completion. Runs in a thread, never in
/// an interrupt.
#[btf_tracepoint(function = "io_uring_complete")]
pub fn io_uring_complete(tracepoint: BtfTracePointContext) -> i32 {
    if gate(gate::STATE) > gate::CLOSING {
        return 0;
    }
    let request: *const u8 = tracepoint.arg(1);
    let request = request as u64;
    // Some completions belong to no request; those of others on this machine are no concern of ours.
    if request == 0 {
        return 0;
    }
    let Some([id]) = read_kernel(request + config(Config::IoReqResult)) else { return 0 };
    if id >> 48 != TAG {
        return 0;
    }
    let Some(slot) = slot_of(id).and_then(slot_at) else { return 0 };
    let Some(submitter) = submitter_of(request) else { return 0 };
    // SAFETY: 1. The array's elements are Slots. 2. Race: the slot is filled by the submitter alone,
    //    before the request that is completed now exists.
    if unsafe { (*slot).context } == submitter {
        // SAFETY: no arguments.
        postern_finish_one(id, unsafe { bpf_ktime_get_ns() });
    }
    0
}

/// The kernel's record of the thread that submitted a request of io_uring.
#[inline(always)]
pub fn submitter_of(request: u64) -> Option<u64> {
    let [task] = read_kernel(request + config(Config::IoReqTask))?;
    let inner = config(Config::IoTaskTask);
    if inner == u64::MAX {
        return Some(task);
    }
    read_kernel(task + inner).map(|[task]| task)
}
