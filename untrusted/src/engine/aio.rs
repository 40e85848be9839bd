//! One native AIO context of the kernel, through libaio.
//!
//! Holds: the context never outlives its requests' memory when the callers of [`AioContext::submit`]
//! keep their promise, because dropping it waits for every request (io_destroy(2)).

use std::sync::atomic::{AtomicU32, Ordering};

use libaio_sys as sys;
use rustix::io::Errno;

/// Events reaped by one call.
pub const REAP: usize = 64;

/// A native AIO context, and room for the events it reaps.
pub struct AioContext {
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
    pub fn new(mut requests: u32, least: u32) -> Result<Self, Errno> {
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
    pub unsafe fn submit(&mut self, iocbs: &mut [*mut sys::iocb]) -> Result<usize, Errno> {
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
    pub fn reap(&mut self) -> usize {
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
    pub fn has_events(&self) -> bool {
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
    pub fn event(&self, n: usize) -> (u64, i64) {
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
