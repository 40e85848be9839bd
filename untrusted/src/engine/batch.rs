//! The iocbs of one io_submit call.
//!
//! They lie one after the other in memory that does not move, so the probe reads a whole batch with
//! one copy. The kernel copies an iocb when it accepts it; the place may be used again after the
//! call.

use std::cell::UnsafeCell;

use libaio_sys::{IO_CMD_FDSYNC, IO_CMD_PREAD, IO_CMD_PWRITE, IOCB_FLAG_RESFD, iocb};
use postern_ebpf_common::TracedIocb;
use postern_edl::port::op;
use rustix::io::Errno;

use super::aio::AioContext;

/// Most requests handed to the kernel by one call. Small, so that the first of a batch is under
/// way early.
pub const BATCH: usize = 32;

const EMPTY: TracedIocb = TracedIocb {
    iocb: [0; 8],
    enqueued_ns: 0,
    picked_ns: 0,
    prev_delivered_ns: 0,
    op: 0,
    length: 0,
    reserved: [0; 3],
};

/// One request as the batch wants it.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// `aio_data`.
    pub data: u64,
    /// Request index of the lane.
    pub index: usize,
    /// Port operation.
    pub op: u64,
    /// Host descriptor.
    pub fd: i32,
    /// Address of the data; 0 for a flush.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the host file.
    pub offset: u64,
    /// For the probe: claimed publication, pickup, claimed delivery of the index's previous request.
    pub stamps: [u64; 3],
}

/// A batch being filled or handed over.
pub struct Batch {
    iocbs: Box<[UnsafeCell<TracedIocb>; BATCH]>,
    pointers: [*mut iocb; BATCH],
    indexes: [usize; BATCH],
    filled: usize,
    accepted: usize,
    /// eventfd that the kernel signals at each completion.
    wake: i32,
}

// SAFETY: the pointers lead into `iocbs`, which the batch owns and which moves with it only as a box.
unsafe impl Send for Batch {}

impl Batch {
    /// An empty batch; completions signal the eventfd `wake`.
    pub fn new(wake: i32) -> Self {
        let iocbs = Box::new([const { UnsafeCell::new(EMPTY) }; BATCH]);
        let pointers = std::array::from_fn(|i| iocbs[i].get().cast::<iocb>());
        Self { iocbs, pointers, indexes: [0; BATCH], filled: 0, accepted: 0, wake }
    }

    /// Whether requests wait for the kernel to accept them.
    pub const fn is_pending(&self) -> bool {
        self.accepted < self.filled
    }

    /// Adds a request. The batch must not be full.
    pub fn push(&mut self, entry: &Entry) {
        if !self.is_pending() {
            (self.filled, self.accepted) = (0, 0);
        }
        let opcode = match entry.op {
            op::READ => IO_CMD_PREAD,
            op::WRITE => IO_CMD_PWRITE,
            _ => IO_CMD_FDSYNC,
        };
        let [enqueued_ns, picked_ns, prev_delivered_ns] = entry.stamps;
        let low = |fd: i32| u64::from(fd.cast_unsigned());
        *self.iocbs[self.filled].get_mut() = TracedIocb {
            iocb: [
                entry.data,
                0,
                u64::from(opcode.cast_unsigned()) | low(entry.fd) << 32,
                entry.address,
                entry.length,
                entry.offset,
                0,
                u64::from(IOCB_FLAG_RESFD) | low(self.wake) << 32,
            ],
            enqueued_ns,
            picked_ns,
            prev_delivered_ns,
            op: entry.op,
            length: entry.length,
            reserved: [0; 3],
        };
        self.indexes[self.filled] = entry.index;
        self.filled += 1;
    }

    /// Hands the waiting requests to the kernel; answers the request indexes it accepted.
    ///
    /// # Errors
    /// What the kernel says of the first waiting request.
    ///
    /// # Safety
    /// As [`AioContext::submit`] for the memory and descriptors of every pushed entry.
    pub unsafe fn submit(&mut self, context: &mut AioContext) -> Result<&[usize], Errno> {
        let first = self.accepted;
        // SAFETY: 1. The pointers lead to iocbs that `self` owns; a `TracedIocb` starts with a
        //    whole `struct iocb` and lies in an UnsafeCell, so the kernel may write its key.
        //    2. Memory and descriptors: the caller vouches.
        let count = unsafe { context.submit(&mut self.pointers[first..self.filled]) }?;
        self.accepted = (first + count).min(self.filled);
        Ok(&self.indexes[first..self.accepted])
    }

    /// The iocbs that wait for the kernel, in order.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn waiting(&mut self) -> impl Iterator<Item = [u64; 8]> + '_ {
        let places = &mut self.iocbs[self.accepted..self.filled];
        places.iter_mut().map(|place| place.get_mut().iocb)
    }

    /// Takes the first waiting request out; answers its request index.
    pub fn drop_first(&mut self) -> Option<usize> {
        let first = self.is_pending().then(|| self.indexes[self.accepted])?;
        self.accepted += 1;
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets and values are those of linux/aio_abi.h.
    #[test]
    fn an_iocb_has_the_kernels_layout_and_lies_128_bytes_after_the_one_before() {
        let mut batch = Batch::new(9);
        let entry = Entry {
            data: 0x9057_0000_0000_0001,
            index: 5,
            op: op::WRITE,
            fd: 7,
            address: 0xabc000,
            length: 8192,
            offset: 1 << 33,
            stamps: [1, 2, 3],
        };
        batch.push(&entry);
        batch.push(&Entry { op: op::FLUSH, address: 0, length: 0, offset: 0, ..entry });
        assert_eq!(batch.pointers[1] as usize - batch.pointers[0] as usize, 128);
        // SAFETY: test code; the batch is alive and no reference to its iocbs is.
        let bytes = unsafe { std::slice::from_raw_parts(batch.pointers[0].cast::<u8>(), 64) };
        let at = |from: usize, len: usize| {
            let mut word = [0; 8];
            word[..len].copy_from_slice(&bytes[from..from + len]);
            u64::from_le_bytes(word)
        };
        assert_eq!(at(0, 8), entry.data);
        assert_eq!((at(16, 2), at(18, 2), at(20, 4)), (1, 0, 7), "opcode, priority, descriptor");
        assert_eq!((at(24, 8), at(32, 8), at(40, 8)), (0xabc000, 8192, 1 << 33));
        assert_eq!((at(56, 4), at(60, 4)), (1, 9), "IOCB_FLAG_RESFD and its eventfd");
        // SAFETY: as above.
        let flush = unsafe { *batch.pointers[1].cast::<u8>().add(16) };
        assert_eq!(flush, 3, "IOCB_CMD_FDSYNC");
    }

    #[test]
    fn an_accepted_batch_starts_again_at_the_front() {
        let mut batch = Batch::new(0);
        let entry = Entry {
            data: 0,
            index: 4,
            op: op::READ,
            fd: 0,
            address: 0,
            length: 0,
            offset: 0,
            stamps: [0; 3],
        };
        batch.push(&entry);
        batch.push(&Entry { index: 6, ..entry });
        assert_eq!(batch.drop_first(), Some(4));
        assert!(batch.is_pending());
        assert_eq!(batch.drop_first(), Some(6));
        assert_eq!((batch.drop_first(), batch.is_pending()), (None, false));
        batch.push(&Entry { index: 8, ..entry });
        assert_eq!((batch.filled, batch.indexes[0]), (1, 8));
    }
}
