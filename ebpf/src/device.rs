//! The block layer's completions: when the device was done with a request.
//!
//! A completed bio is led back to the AIO request it belongs to through the kernel's own pointers,
//! so merged, split and chained bios are all told apart exactly. Offsets and addresses come from the
//! loader. A request of several bios keeps the last stamp.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use postern_ebpf_common::TAG;
use postern_ebpf_common::config::Config;
use postern_ebpf_common::counter::Counter;
use postern_ebpf_common::slot::slot_of;

use crate::state::{config, postern_count, read_kernel, slot_at};

/// Numbers for [`postern_count`].
const REQUEST: u64 = 1;
const BIO: u64 = 2;

/// Most bios of one block request that are followed; the kernel merges up to 254.
const MOST_BIOS: u64 = 512;
/// Most links from a split-off bio to the bio it was split from.
const MOST_LINKS: u64 = 8;

/// `block_rq_complete(request, error, bytes)`: a request-based device finished `bytes` of a request.
/// A partial completion stamps bios that are still under way too; their own completion follows.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn block_rq_complete(tracepoint: BtfTracePointContext) -> i32 {
    let request: *const u8 = tracepoint.arg(0);
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some([mut bio]) = read_kernel(request as u64 + config(Config::RequestBio)) else {
        postern_count(REQUEST, Counter::StampFault as u64, 1);
        return 0;
    };
    let mut turns = 0;
    while turns < MOST_BIOS {
        if bio == 0 {
            return 0;
        }
        bio = postern_stamp(bio, now, REQUEST);
        turns += 1;
    }
    postern_count(REQUEST, Counter::StampTooLong as u64, 1);
    0
}

/// `block_bio_complete(queue, bio)`: a device without requests finished a bio.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn block_bio_complete(tracepoint: BtfTracePointContext) -> i32 {
    // Copied, because a function that is verified on its own takes numbers, not pointers.
    let Some([bio]) = read_kernel(tracepoint.as_ptr() as u64 + 8) else {
        postern_count(BIO, Counter::StampFault as u64, 1);
        return 0;
    };
    // SAFETY: no arguments.
    postern_stamp(bio, unsafe { bpf_ktime_get_ns() }, BIO);
    0
}

/// Stamps the slot of the AIO request that `bio` belongs to, if it belongs to one; answers the next
/// bio of the block request, 0 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_stamp(bio: u64, now: u64, writer: u64) -> u64 {
    let Some([next]) = read_kernel(bio + config(Config::BioNext)) else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return 0;
    };
    let mut owner = bio;
    let mut links = 0;
    while links < MOST_LINKS {
        let Some((end_io, private)) = completion_of(owner) else {
            postern_count(writer, Counter::StampFault as u64, 1);
            return next;
        };
        if end_io != config(Config::BioChainEndIo) {
            stamp(owner, end_io, private, now, writer);
            return next;
        }
        owner = private;
        links += 1;
    }
    postern_count(writer, Counter::StampTooLong as u64, 1);
    next
}

/// `bi_end_io` and `bi_private` of a bio.
#[inline(always)]
fn completion_of(bio: u64) -> Option<(u64, u64)> {
    let (end_io, private) = (config(Config::BioEndIo), config(Config::BioPrivate));
    if private == end_io + 8 {
        return read_kernel(bio + end_io).map(|[end_io, private]| (end_io, private));
    }
    let [end_io] = read_kernel(bio + end_io)?;
    let [private] = read_kernel(bio + private)?;
    Some((end_io, private))
}

#[inline(always)]
fn stamp(bio: u64, end_io: u64, private: u64, now: u64, writer: u64) {
    let holder = if end_io == config(Config::IomapDioEndIo) {
        private + config(Config::IomapDioIocb)
    } else if end_io == config(Config::BlkdevEndIoAsync) {
        bio - config(Config::BlkdevDioBio) + config(Config::BlkdevDioIocb)
    } else if end_io == config(Config::BlkdevEndIo) {
        private + config(Config::BlkdevDioIocb)
    } else {
        return;
    };
    let Some([kiocb]) = read_kernel(holder) else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return;
    };
    // Synchronous direct I/O has another owner here (a thread, in the same place): what is read then
    // is not the completion function of AIO.
    let Some([complete]) = read_kernel(kiocb + config(Config::KiocbComplete)) else {
        return;
    };
    if complete != config(Config::AioCompleteRw) {
        return;
    }
    let request = kiocb - config(Config::AioKiocbRw);
    let Some([id]) = read_kernel(request + config(Config::AioKiocbResult)) else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return;
    };
    if id >> 48 != TAG {
        return;
    }
    let Some(slot) = slot_of(id).and_then(slot_at) else { return };
    // Any process can choose an aio_data with our tag; the address of the AIO context tells ours.
    let context = read_kernel(request + config(Config::AioKiocbContext))
        .and_then(|[context]| read_kernel(context + config(Config::KioctxUserId)));
    let Some([context]) = context else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return;
    };
    // SAFETY: 1. The array's elements are Slots.
    //    2. Race: the slot can not be filled anew before this request's event was reaped, which
    //       comes after this completion. Parts of one request that end at the same time on two CPUs
    //       write nearly the same time.
    unsafe {
        if (*slot).context != context {
            postern_count(writer, Counter::StampForeign as u64, 1);
        } else if (*slot).id != id {
            postern_count(writer, Counter::StampStale as u64, 1);
        } else {
            (*slot).device_end_ns = now;
        }
    }
}
