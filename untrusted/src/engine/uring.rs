//! io_uring(7): the port's memory is a registered buffer, so the kernel looks its pages up once and
//! not at each request.
//!
//! Holds: nothing is in flight after the drop, which waits. Completions are worked off by the
//! lane's own thread when it enters the kernel (IORING_SETUP_DEFER_TASKRUN), never by an interrupt
//! of it; older kernels do as they like. A call that submits hands the kernel, in arguments that it
//! does not look at then, where the probes find their description of the batch.

use io_uring::{IoUring, opcode, squeue, types};
use postern_ebpf_common::TracedIocb;
use postern_edl::port::op;
use rustix::io::Errno;

use super::queue::{BATCH, Entry, NOT_TRACED, Queue, REAP, Wanted};
use super::waiting::Waiting;

/// How often a submission is tried again that the kernel has no memory for.
const TRIES: usize = 1000;

/// IORING_ENTER_GETEVENTS (linux/io_uring.h).
const GETEVENTS: u32 = 1;

/// A ring and what is on its way to it.
pub struct Uring {
    ring: IoUring,
    entries: [squeue::Entry; BATCH],
    /// What the probes read of the entries.
    traced: Box<[TracedIocb; BATCH]>,
    waiting: Waiting,
    events: [(u64, i64); REAP],
    /// Accepted by the kernel and not reaped.
    in_kernel: usize,
    /// Whether the data lies in the registered buffer.
    fixed: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Set up by another thread than the one that will use it.
    Disabled,
    Enabled,
    /// The kernel refused all of it: nothing is handed to it any more.
    Broken,
}

/// Whether the kernel lets this process use io_uring.
///
/// # Errors
/// `EPERM` where kernel.io_uring_disabled or a filter says no, `ENOSYS` where there is none.
pub fn probe() -> Result<(), Errno> {
    ring(2).map(drop)
}

/// A ring for `requests` requests in flight, with what this kernel has of what we would like.
fn ring(requests: u32) -> Result<IoUring, Errno> {
    let size = BATCH as u32;
    let wish = |wishes: u8| {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(requests.max(size).next_power_of_two()).setup_clamp();
        if wishes > 0 {
            builder.setup_r_disabled().setup_submit_all().setup_coop_taskrun();
            builder.setup_taskrun_flag();
        }
        if wishes > 1 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        builder.build(size)
    };
    let ring = match wish(2) {
        // IORING_SETUP_DEFER_TASKRUN came with Linux 6.1, the others with 5.19.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => wish(1).or_else(|_| wish(0)),
        other => other,
    };
    ring.map_err(|e| errno(&e))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl Uring {
    /// io_uring_setup(2), and the registration of `wanted.memory` and of the eventfd.
    ///
    /// # Errors
    /// What the kernel says. That it pins no memory (RLIMIT_MEMLOCK) is none.
    ///
    /// # Safety
    /// `wanted.memory` stays mapped until this is dropped.
    pub unsafe fn new(wanted: &Wanted) -> Result<Self, Errno> {
        let ring = ring(wanted.requests)?;
        ring.submitter().register_eventfd(wanted.wake).map_err(|e| errno(&e))?;
        let (address, length) = wanted.memory;
        let memory = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: usize::try_from(length).map_err(|_| Errno::INVAL)?,
        };
        // SAFETY: the caller keeps the memory mapped; it is ordinary memory of this process.
        let fixed = unsafe { ring.submitter().register_buffers(&[memory]) }.is_ok();
        Ok(Self {
            ring,
            entries: std::array::from_fn(|_| opcode::Nop::new().build()),
            traced: Box::new([NOT_TRACED; BATCH]),
            waiting: Waiting::default(),
            events: [(0, 0); REAP],
            in_kernel: 0,
            fixed,
            state: State::Disabled,
        })
    }

    fn entry(&self, entry: &Entry) -> squeue::Entry {
        let fd = types::Fd(entry.fd);
        let address = entry.address as *mut u8;
        // A length that passed the checks of a descriptor fits.
        let length = u32::try_from(entry.length).unwrap_or(0);
        let sqe = match (entry.op, self.fixed) {
            (op::READ, true) => {
                opcode::ReadFixed::new(fd, address, length, 0).offset(entry.offset).build()
            }
            (op::READ, false) => {
                opcode::Read::new(fd, address, length).offset(entry.offset).build()
            }
            (op::WRITE, true) => {
                opcode::WriteFixed::new(fd, address, length, 0).offset(entry.offset).build()
            }
            (op::WRITE, false) => {
                opcode::Write::new(fd, address, length).offset(entry.offset).build()
            }
            _ => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        sqe.user_data(entry.data)
    }

    /// The thread that uses the ring is the one that enables it.
    fn enable(&mut self) -> Result<(), Errno> {
        if self.state == State::Disabled {
            match self.ring.submitter().register_enable_rings() {
                // A ring that was not set up disabled answers EBADFD.
                Err(e) if e.raw_os_error() != Some(libc::EBADFD) => return Err(errno(&e)),
                _ => self.state = State::Enabled,
            }
        }
        Ok(())
    }

    /// Hands over what was pushed into the ring: how many requests the kernel took.
    fn enter(&mut self) -> Result<usize, Errno> {
        self.enable()?;
        for _ in 0..TRIES {
            match self.hand_over().map_err(|e| errno(&e)) {
                Err(Errno::INTR) => {}
                // The kernel is short of memory: room comes with a completion.
                Err(Errno::AGAIN | Errno::BUSY) if self.in_kernel > 0 => return Err(Errno::AGAIN),
                Err(Errno::AGAIN | Errno::BUSY) | Ok(0) => std::thread::yield_now(),
                other => return other,
            }
        }
        Err(Errno::IO)
    }

    /// io_uring_enter(2) for what lies in the ring. The first of it is the first that waits.
    fn hand_over(&mut self) -> std::io::Result<usize> {
        let first = self.waiting.places().start;
        let (pushed, overflown) = {
            let ring = self.ring.submission();
            (ring.len(), ring.cq_overflow())
        };
        match (u32::try_from(pushed), self.traced.get(first)) {
            (Ok(count), Some(first)) if !overflown => {
                // SAFETY: without IORING_ENTER_GETEVENTS the kernel does not look at the argument;
                //    the probes read no further than the batch, and only what `self` owns.
                unsafe { self.ring.submitter().enter(count, 0, 0, Some(first)) }
            }
            // The kernel has completions that the ring had no room for: they come first.
            _ => self.ring.submit(),
        }
    }
}

impl Queue for Uring {
    fn is_pending(&self) -> bool {
        self.waiting.is_pending()
    }

    fn push(&mut self, entry: &Entry) {
        let sqe = self.entry(entry);
        let place = self.waiting.add(entry.index);
        self.entries[place] = sqe;
        self.traced[place] = entry.traced([0; 8]);
    }

    unsafe fn submit(&mut self) -> Result<&[usize], Errno> {
        if self.state == State::Broken {
            return Err(Errno::IO);
        }
        let places = self.waiting.places();
        // What an earlier call left in the ring is not pushed again.
        let pushed = self.ring.submission().len();
        for sqe in self.entries[places].iter().skip(pushed) {
            // SAFETY: 1. Memory and descriptors: the caller vouches. 2. The entry is built for a
            //    ring of ordinary entries.
            if unsafe { self.ring.submission().push(sqe) }.is_err() {
                break;
            }
        }
        match self.enter() {
            Ok(count) => {
                self.in_kernel += count;
                Ok(self.waiting.accept(count))
            }
            Err(Errno::AGAIN) => Err(Errno::AGAIN),
            Err(errno) => {
                // The entries in the ring stay there: the kernel reads them only when told.
                self.state = State::Broken;
                Err(errno)
            }
        }
    }

    fn drop_first(&mut self) -> Option<usize> {
        self.waiting.drop_first()
    }

    fn reap(&mut self) -> usize {
        if self.state == State::Disabled {
            return 0;
        }
        // SAFETY: only this thread uses the ring.
        let deferred = unsafe { self.ring.submission_shared() }.taskrun();
        if deferred {
            // SAFETY: no argument, nothing to submit: what was deferred is worked off.
            let _ = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
        }
        let mut count = 0;
        let completions = self.ring.completion();
        for (event, cqe) in self.events.iter_mut().zip(completions) {
            *event = (cqe.user_data(), cqe.result().into());
            count += 1;
        }
        self.in_kernel = self.in_kernel.saturating_sub(count);
        count
    }

    #[inline]
    fn event(&self, n: usize) -> (u64, i64) {
        self.events[n]
    }

    #[inline]
    fn has_events(&self) -> bool {
        // SAFETY: only this thread uses the ring; nothing is pushed or taken meanwhile.
        unsafe {
            !self.ring.completion_shared().is_empty() || self.ring.submission_shared().taskrun()
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            // SAFETY: no argument, nothing to submit.
            let waited =
                unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) };
            if waited.is_err_and(|e| e.kind() != std::io::ErrorKind::Interrupted) {
                break;
            }
            self.reap();
        }
    }
}
