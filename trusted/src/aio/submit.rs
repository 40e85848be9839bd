//! io_submit(2).
//!
//! Holds: an iocb is either refused, with nothing of it left behind, or completes exactly once;
//! nothing after a refused iocb is touched; events of requests that complete inside the call are
//! in the ring, in order, when it returns.

use alloc::sync::Arc;
use core::{
    cell::OnceCell,
    sync::atomic::{AtomicBool, Ordering},
};

use super::{
    AioContexts, Completion, Descriptor, Signals, Wait,
    context::{Context, NoSlot},
    iocb::{Asked, IOCB_BYTES, Iocb, KEY, KEY_OFFSET},
};
use crate::{errno::Errno, platform::Fault};

/// A slot taken for a request that may yet be refused.
struct Slot<'a>(&'a Arc<Context>);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.return_slot();
    }
}

/// One io_submit under way.
struct Submission<'a> {
    contexts: &'a AioContexts,
    context: Arc<Context>,
    submitted_ns: u64,
    /// Raised by the completion of the request that the call waits for. Made when first needed.
    seen: OnceCell<Arc<AtomicBool>>,
}

impl AioContexts {
    /// io_submit(2): takes the `nr` iocbs whose addresses lie at `iocbpp` and returns how many
    /// were accepted.
    ///
    /// Stops at the first refusal, which is dropped if something was accepted before it.
    ///
    /// # Errors
    /// In the kernel's order: `EINVAL` for a negative `nr` or no such context; then what refuses
    /// the first iocb: `EFAULT`, `EINVAL`, `EAGAIN` (no slot), `EBADF`, `EOPNOTSUPP`, `EPERM`,
    /// `ENOMEM`.
    ///
    /// # Source
    /// `io_submit`, `io_submit_one`, `__io_submit_one` in Linux fs/aio.c. Of racing io_destroy and
    /// io_submit Linux lets the submitter finish; here it stops, which looks like having come
    /// later.
    pub fn io_submit(&self, ctx: u64, nr: i64, iocbpp: u64) -> Result<usize, Errno> {
        let Ok(nr) = u64::try_from(nr) else { return Err(Errno::EINVAL) };
        let context = self.lookup(ctx)?;
        let nr = nr.min(u64::from(context.slots));
        if nr == 0 {
            return Ok(0);
        }
        if context.head_was_moved() {
            self.host.reaps_in_user_space();
        }
        let submission = Submission {
            contexts: self,
            submitted_ns: self.host.now_ns(),
            context,
            seen: OnceCell::new(),
        };
        let mut accepted = 0;
        let mut refusal = None;
        while accepted < nr {
            if let Err(errno) = submission.one(iocbpp.wrapping_add(accepted * 8), accepted > 0) {
                refusal = Some(errno);
                break;
            }
            accepted += 1;
        }
        if accepted > 0 {
            self.host.start();
        }
        match refusal {
            Some(errno) if accepted == 0 => Err(errno),
            _ => Ok(usize::try_from(accepted).unwrap_or(usize::MAX)),
        }
    }
}

impl Submission<'_> {
    /// Submits the iocb whose address lies at `pointer`; `others` were accepted before it.
    fn one(&self, pointer: u64, others: bool) -> Result<(), Errno> {
        let host = &self.contexts.host;
        let mut address = [0; 8];
        host.read(pointer, &mut address).map_err(|Fault| Errno::EFAULT)?;
        let address = u64::from_ne_bytes(address);
        let mut bytes = [0; IOCB_BYTES];
        host.read(address, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        let iocb = Iocb::parse(&bytes)?;

        let slot = self.take_slot()?;
        let file = host.file(iocb.fd)?;
        let counter = iocb.eventfd().map(|fd| host.event_counter(fd)).transpose()?;
        host.write(address.wrapping_add(KEY_OFFSET), &KEY.to_ne_bytes())
            .map_err(|Fault| Errno::EFAULT)?;
        let file = match file {
            Descriptor::Served(file) => file,
            Descriptor::Kernels => {
                core::mem::forget(slot);
                let done = Completion::new(self.context.clone(), address, iocb.data, counter);
                if others {
                    // The kernel may block here for as long as it likes.
                    host.start();
                }
                return self.forward(&bytes, done);
            }
        };
        let asked = iocb.build(host, &file.traits(), self.submitted_ns)?;

        // Accepted: from here on the slot is the completion's.
        core::mem::forget(slot);
        let mut done = Completion::new(self.context.clone(), address, iocb.data, counter);
        match asked {
            Asked::Ready(events) => done.finish(Ok(usize::from(events))),
            Asked::Request(request) if file.completes_in_submit(&request) => {
                let seen = self.seen.get_or_init(Arc::default);
                seen.store(false, Ordering::Relaxed);
                done.set_seen(seen.clone());
                file.submit(request, done);
                self.wait_until(&|| seen.load(Ordering::Acquire));
            }
            Asked::Request(request) => file.submit(request, done),
        }
        Ok(())
    }

    /// Hands a request with a slot to the kernel. If it is complete when the kernel returns, its
    /// event is in the ring and its eventfd signalled when this returns.
    fn forward(&self, bytes: &[u8; IOCB_BYTES], mut done: Completion) -> Result<(), Errno> {
        // A flag of its own: that of a forwarded request may be raised long after this call.
        let seen = Arc::new(AtomicBool::new(false));
        done.set_seen(seen.clone());
        let token = self.context.forward(bytes, done)?;
        if !self.context.is_at_the_kernel(token) {
            // Another thread may have stored the event and be about to signal.
            self.wait_until(&|| seen.load(Ordering::Acquire));
        }
        Ok(())
    }

    fn take_slot(&self) -> Result<Slot<'_>, Errno> {
        loop {
            match self.context.take_slot(&self.contexts.held) {
                Ok(()) => return Ok(Slot(&self.context)),
                Err(NoSlot::Full) => return Err(Errno::EAGAIN),
                Err(NoSlot::Dying) => return Err(Errno::EINVAL),
                Err(NoSlot::Held) => {
                    self.wait_until(&|| self.contexts.held.load(Ordering::Relaxed) == 0);
                }
            }
        }
    }

    /// Sleeps until `ready`, whatever signals come.
    fn wait_until(&self, ready: &dyn Fn() -> bool) {
        self.contexts.wait_held(self.context.key, ready);
    }
}

impl AioContexts {
    /// Sleeps until `ready`, whatever signals come.
    pub(super) fn wait_held(&self, key: super::WaitKey, ready: &dyn Fn() -> bool) {
        while !ready() {
            self.host.wait(Wait {
                key,
                at_least: 0,
                deadline_ns: None,
                signals: Signals::Held,
                ready,
            });
        }
    }
}
