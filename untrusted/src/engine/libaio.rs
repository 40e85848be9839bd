//! Native AIO: io_submit(2) and io_getevents(2), through libaio.
//!
//! Holds: the iocbs of a batch lie one after the other in memory that does not move, so the probe
//! reads all of them with one copy (the kernel copies an iocb when it accepts it; its place may be
//! used again after the call). The context never outlives its requests' memory when the callers of
//! [`Queue::submit`] keep their promise, because dropping it waits for every request
//! (io_destroy(2)).

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};

use libaio_sys as sys;
use libaio_sys::{IO_CMD_FDSYNC, IO_CMD_PREAD, IO_CMD_PWRITE, IOCB_FLAG_RESFD, iocb};
use postern_ebpf_common::TracedIocb;
use postern_edl::port::op;
use rustix::io::Errno;

use super::queue::{BATCH, Entry, NOT_TRACED, Queue, REAP, Wanted};
use super::waiting::Waiting;

/// A batch of iocbs and the context they go into.
pub struct Libaio {
    context: AioContext,
    iocbs: Box<[UnsafeCell<TracedIocb>; BATCH]>,
    pointers: [*mut iocb; BATCH],
    waiting: Waiting,
    /// eventfd that the kernel signals at each completion.
    wake: i32,
}

// SAFETY: the pointers lead into `iocbs`, which `self` owns and which moves with it only as a box.
unsafe impl Send for Libaio {}

impl Libaio {
    /// io_setup(2) for as many requests as are wanted, or for fewer where fs.aio-max-nr leaves no
    /// more.
    ///
    /// # Errors
    /// `EAGAIN` when fs.aio-max-nr is used up, else as io_setup(2).
    pub fn new(wanted: &Wanted) -> Result<Self, Errno> {
        let context = AioContext::new(wanted.requests, wanted.least)?;
        let iocbs = Box::new([const { UnsafeCell::new(NOT_TRACED) }; BATCH]);
        let pointers = std::array::from_fn(|i| iocbs[i].get().cast::<iocb>());
        Ok(Self { context, iocbs, pointers, waiting: Waiting::default(), wake: wanted.wake })
    }
}

impl Queue for Libaio {
    fn is_pending(&self) -> bool {
        self.waiting.is_pending()
    }

    fn push(&mut self, entry: &Entry) {
        let opcode = match entry.op {
            op::READ => IO_CMD_PREAD,
            op::WRITE => IO_CMD_PWRITE,
            _ => IO_CMD_FDSYNC,
        };
        let low = |fd: i32| u64::from(fd.cast_unsigned());
        let iocb = [
            entry.data,
            0,
            u64::from(opcode.cast_unsigned()) | low(entry.fd) << 32,
            entry.address,
            entry.length,
            entry.offset,
            0,
            u64::from(IOCB_FLAG_RESFD) | low(self.wake) << 32,
        ];
        *self.iocbs[self.waiting.add(entry.index)].get_mut() = entry.traced(iocb);
    }

    unsafe fn submit(&mut self) -> Result<&[usize], Errno> {
        let places = self.waiting.places();
        // SAFETY: 1. The pointers lead to iocbs that `self` owns; a `TracedIocb` starts with a
        //    whole `struct iocb` and lies in an UnsafeCell, so the kernel may write its key.
        //    2. Memory and descriptors: the caller vouches.
        let count = unsafe { self.context.submit(&mut self.pointers[places]) }?;
        Ok(self.waiting.accept(count))
    }

    fn drop_first(&mut self) -> Option<usize> {
        self.waiting.drop_first()
    }

    #[inline]
    fn reap(&mut self) -> usize {
        self.context.reap()
    }

    #[inline]
    fn event(&self, n: usize) -> (u64, i64) {
        self.context.event(n)
    }

    #[inline]
    fn has_events(&self) -> bool {
        self.context.has_events()
    }
}

/// A native AIO context, and room for the events it reaps.
struct AioContext {
    context: sys::io_context_t,
    events: Box<[sys::io_event; REAP]>,
}

// SAFETY: the context is a number that the kernel ties to the process, not to a thread.
unsafe impl Send for AioContext {}

impl AioContext {
    /// io_setup(2) for `requests` requests in flight, or for fewer, down to `least`, where
    /// fs.aio-max-nr leaves no more.
    ///
    /// # Errors
    /// `EAGAIN` when fs.aio-max-nr is used up, else as io_setup(2).
    fn new(mut requests: u32, least: u32) -> Result<Self, Errno> {
        loop {
            match Self::of(requests) {
                Err(Errno::AGAIN) if requests > least => requests = (requests / 2).max(least),
                other => return other,
            }
        }
    }

    fn of(requests: u32) -> Result<Self, Errno> {
        let requests = i32::try_from(requests).map_err(|_| Errno::INVAL)?;
        let mut context: sys::io_context_t = std::ptr::null_mut();
        // SAFETY: 1. `context` is a zeroed place for the handle, as io_setup(2) asks.
        let result = unsafe { sys::io_setup(requests, &raw mut context) };
        check(result.into())?;
        Ok(Self { context, events: Box::new([sys::io_event::ZEROED; REAP]) })
    }

    /// io_submit(2): answers how many of the first `iocbs` the kernel accepted.
    ///
    /// # Errors
    /// What the kernel says of the first iocb: then none was accepted.
    ///
    /// # Safety
    /// Every pointer leads to a writable `struct iocb`. The memory an accepted iocb names stays
    /// mapped, and its descriptor open, until its event was reaped or this context dropped.
    unsafe fn submit(&mut self, iocbs: &mut [*mut sys::iocb]) -> Result<usize, Errno> {
        let count = libc::c_long::try_from(iocbs.len()).map_err(|_| Errno::INVAL)?;
        // SAFETY: 1. The context is alive. 2. `iocbs` has `count` pointers; the caller vouches for
        //    what they lead to.
        let result = unsafe { sys::io_submit(self.context, count, iocbs.as_mut_ptr()) };
        check(result.into())
    }

    /// io_getevents(2) without waiting: how many events there were, at most [`REAP`];
    /// [`Self::event`] shows them. libaio looks into the ring first, so an empty one costs no
    /// system call.
    #[inline]
    fn reap(&mut self) -> usize {
        let mut at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: 1. The context is alive. 2. `events` has REAP places. 3. The kernel does not keep
        //    the pointers.
        let result = unsafe {
            let events = self.events.as_mut_ptr();
            sys::io_getevents(self.context, 0, REAP as _, events, &raw mut at_once)
        };
        // An error can not occur with these arguments; none reaped is the answer then.
        check(result.into()).unwrap_or(0).min(REAP)
    }

    /// Whether the kernel's ring holds events, seen without a system call. A ring of another
    /// layout than linux/fs/aio.c's answers yes.
    #[inline]
    fn has_events(&self) -> bool {
        const HEAD: usize = 2;
        const TAIL: usize = 3;
        const MAGIC: usize = 4;
        const AIO_RING_MAGIC: u32 = 0xa10a_10a1;
        let word = |n: usize| {
            // SAFETY: 1. A context's number is the address of its ring, which the kernel maps
            //    readable and writable until io_destroy; libaio relies on the same. 2. The header
            //    is aligned 4-byte words. 3. Race: the kernel stores while we load atomically.
            unsafe { AtomicU32::from_ptr(self.context.cast::<u32>().add(n)) }
                .load(Ordering::Acquire)
        };
        word(MAGIC) != AIO_RING_MAGIC || word(HEAD) != word(TAIL)
    }

    /// `aio_data` and result of event `n` (below [`REAP`]) of the last [`Self::reap`].
    #[inline]
    fn event(&self, n: usize) -> (u64, i64) {
        let event = &self.events[n];
        // libaio's types: a pointer for the number given, an unsigned word for the kernel's __s64.
        (event.data as u64, event.res.cast_signed())
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        // SAFETY: 1. The context is alive and not used again.
        let _ = unsafe { sys::io_destroy(self.context) };
    }
}

/// libaio answers a negative errno; it does not set the variable.
fn check(result: i64) -> Result<usize, Errno> {
    usize::try_from(result)
        .map_err(|_| Errno::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets and values are those of linux/aio_abi.h.
    #[test]
    fn an_iocb_has_the_kernels_layout_and_lies_128_bytes_after_the_one_before() {
        let wanted = Wanted { requests: 4, least: 4, wake: 9, memory: (0, 0) };
        let mut batch = Libaio::new(&wanted).unwrap();
        let entry = Entry {
            data: 0x9057_0000_0000_0001,
            index: 5,
            op: op::WRITE,
            volume: 0,
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
}
