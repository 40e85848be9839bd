//! The block layer's completions: when the device was done with a request.
//!
//! A completed bio is led back to the request of AIO or io_uring it belongs to through the kernel's
//! own pointers, so merged, split and chained bios are all told apart exactly. Offsets and addresses
//! come from the loader. A request of several bios keeps the last stamp.
//!
//! Does not hold: that every file system is known. A bio whose owner is another's stamps nothing, and
//! its request counts as one whose end at the device is unknown.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use postern_ebpf_common::config::Config;
use postern_ebpf_common::counter::Counter;
use postern_ebpf_common::slot::slot_of;
use postern_ebpf_common::{TAG, gate};

use crate::state::{config, gate, postern_count, read_kernel, slot_at};
use crate::uring::submitter_of;

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
    if gate(gate::STATE) > gate::CLOSING {
        return 0;
    }
    let request: *const u8 = tracepoint.arg(0);
    let request = request as u64;
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let bio = read_kernel(request + config(Config::RequestBio));
    let placed = read_kernel(request + config(Config::RequestStart));
    let (Some([mut bio]), Some([placed])) = (bio, placed) else {
        postern_count(REQUEST, Counter::StampFault as u64, 1);
        return 0;
    };
    let mut turns = 0;
    while turns < MOST_BIOS {
        if bio == 0 {
            return 0;
        }
        bio = postern_stamp(bio, now, placed, REQUEST);
        turns += 1;
    }
    postern_count(REQUEST, Counter::StampTooLong as u64, 1);
    0
}

/// `block_bio_complete(queue, bio)`: a device without requests finished a bio.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn block_bio_complete(tracepoint: BtfTracePointContext) -> i32 {
    if gate(gate::STATE) > gate::CLOSING {
        return 0;
    }
    // Copied, because a function that is verified on its own takes numbers, not pointers.
    let Some([bio]) = read_kernel(tracepoint.as_ptr() as u64 + 8) else {
        postern_count(BIO, Counter::StampFault as u64, 1);
        return 0;
    };
    // SAFETY: no arguments.
    postern_stamp(bio, unsafe { bpf_ktime_get_ns() }, 0, BIO);
    0
}

/// Stamps the slot of the request that `bio` belongs to, if it belongs to one; answers the next bio
/// of the block request, 0 if there is none. `placed` is when the block layer had a place for the
/// block request, 0 if that is unknown.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_stamp(bio: u64, now: u64, placed: u64, writer: u64) -> u64 {
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
            stamp(owner, (end_io, private), (now, placed), writer);
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
fn stamp(bio: u64, (end_io, private): (u64, u64), (now, placed): (u64, u64), writer: u64) {
    let holder = if end_io == config(Config::IomapDioEndIo) {
        private + config(Config::IomapDioIocb)
    } else if end_io == config(Config::BlkdevEndIoAsync) {
        bio - config(Config::BlkdevDioBio) + config(Config::BlkdevDioIocb)
    } else if end_io == config(Config::BlkdevEndIo) {
        private + config(Config::BlkdevDioIocb)
    } else if end_io == config(Config::BtrfsSimpleEndIo) {
        match of_btrfs(bio) {
            Ok(Some(direct)) => direct + config(Config::IomapDioIocb),
            Ok(None) => return,
            Err(()) => {
                postern_count(writer, Counter::StampFault as u64, 1);
                return;
            }
        }
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
    let (id, context) = if complete == config(Config::AioCompleteRw) {
        let request = kiocb - config(Config::AioKiocbRw);
        // Any process can choose an aio_data with our tag; the address of the AIO context tells ours.
        let context = || {
            let [context] = read_kernel(request + config(Config::AioKiocbContext))?;
            read_kernel(context + config(Config::KioctxUserId)).map(|[id]| id)
        };
        match owner(request + config(Config::AioKiocbResult), context, writer) {
            Some(found) => found,
            None => return,
        }
    } else if complete == config(Config::IoCompleteRw) {
        // The kiocb is the first of the request's own, as the loader has seen.
        match owner(kiocb + config(Config::IoReqResult), || submitter_of(kiocb), writer) {
            Some(found) => found,
            None => return,
        }
    } else {
        return;
    };
    let Some(slot) = slot_of(id).and_then(slot_at) else { return };
    // SAFETY: 1. The array's elements are Slots.
    //    2. Race: the slot can not be filled anew before this request's event was reaped, which
    //       comes after this completion. Parts of one request that end at the same time on two CPUs
    //       write nearly the same time. io_submit's return may write its time meanwhile: both are
    //       true.
    unsafe {
        if (*slot).context != context {
            postern_count(writer, Counter::StampForeign as u64, 1);
        } else if (*slot).id != id {
            postern_count(writer, Counter::StampStale as u64, 1);
        } else {
            (*slot).device_end_ns = now;
            if (*slot).submitted_ns == 0 && placed > (*slot).enter_ns {
                (*slot).submitted_ns = placed;
            }
        }
    }
}

/// The id at `at`, if it has our tag, and the context of its request.
#[inline(always)]
fn owner(at: u64, context: impl Fn() -> Option<u64>, writer: u64) -> Option<(u64, u64)> {
    let Some([id]) = read_kernel(at) else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return None;
    };
    if id >> 48 != TAG {
        return None;
    }
    let Some(context) = context() else {
        postern_count(writer, Counter::StampFault as u64, 1);
        return None;
    };
    Some((id, context))
}

/// The `iomap_dio` that a bio of btrfs works for, if it works for one. A bio that was split off has no
/// completion function, and its private word leads to the one it was split from.
#[inline(always)]
fn of_btrfs(bio: u64) -> Result<Option<u64>, ()> {
    let mut record = bio - config(Config::BtrfsBio);
    let mut links = 0;
    while links < 2 {
        let Some([end_io]) = read_kernel(record + config(Config::BtrfsEndIo)) else {
            return Err(());
        };
        let Some([private]) = read_kernel(record + config(Config::BtrfsPrivate)) else {
            return Err(());
        };
        if end_io == config(Config::BtrfsDioEndIo) {
            return Ok(Some(private));
        }
        if end_io != 0 {
            return Ok(None);
        }
        record = private;
        links += 1;
    }
    Ok(None)
}
