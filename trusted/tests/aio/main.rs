//! The AIO layer against the kernel: every scenario runs on the contexts of a test double of a
//! process and, where the machine has native AIO, on the kernel itself; both must give the
//! expected answers.
#![allow(clippy::unwrap_used)]

mod allocation;
mod cancel;
mod destroy;
mod events;
mod guest;
mod kernel;
mod model;
mod native;
mod process;
mod setup;
mod slots;
mod submit;
mod threads;

use std::sync::{Arc, Mutex, PoisonError};

use postern_trusted::{aio::AioContexts, errno::Errno};
use process::{Machine, Process};

/// The six calls as a program makes them: addresses in, the kernel's number out (-errno).
trait Aio {
    fn io_setup(&self, nr: u32, ctxp: u64) -> i64;
    fn io_destroy(&self, ctx: u64) -> i64;
    fn io_submit(&self, ctx: u64, nr: i64, iocbpp: u64) -> i64;
    fn io_getevents(&self, ctx: u64, min: i64, nr: i64, events: u64, timeout: u64) -> i64;
    fn io_pgetevents(
        &self,
        ctx: u64,
        min: i64,
        nr: i64,
        events: u64,
        timeout: u64,
        usig: u64,
    ) -> i64;
    fn io_cancel(&self, ctx: u64, iocb: u64, result: u64) -> i64;

    /// The test has moved a ring with mremap: who is not the kernel has to be told.
    fn moved(&self, _from: u64, _to: u64) {}

    /// Submits the batch.
    fn submit(&self, ctx: u64, batch: &guest::Batch) -> i64 {
        self.io_submit(ctx, batch.len(), batch.array())
    }

    /// Takes up to `nr` events without waiting.
    fn reap(&self, ctx: u64, nr: i64, events: &guest::Events) -> i64 {
        self.io_getevents(ctx, 0, nr, events.at(), 0)
    }

    /// A context for `nr` requests.
    fn context(&self, nr: u32) -> u64 {
        let place = guest::Area::new(1);
        assert_eq!(self.io_setup(nr, place.at(0)), 0, "io_setup({nr})");
        place.get(0)
    }
}

/// Our contexts on a test process.
struct Postern {
    process: Arc<Process>,
    contexts: AioContexts,
}

impl Postern {
    fn new() -> Self {
        Self::on(Machine::default())
    }

    fn on(machine: Machine) -> Self {
        let process = Arc::new(Process::new(machine));
        Self { contexts: AioContexts::new(process.clone()), process }
    }
}

fn number(result: Result<usize, Errno>) -> i64 {
    match result {
        Ok(count) => i64::try_from(count).unwrap(),
        Err(Errno(errno)) => -i64::from(errno),
    }
}

impl Aio for Postern {
    fn io_setup(&self, nr: u32, ctxp: u64) -> i64 {
        number(self.contexts.io_setup(nr, ctxp).map(|()| 0))
    }
    fn io_destroy(&self, ctx: u64) -> i64 {
        number(self.contexts.io_destroy(ctx).map(|()| 0))
    }
    fn io_submit(&self, ctx: u64, nr: i64, iocbpp: u64) -> i64 {
        number(self.contexts.io_submit(ctx, nr, iocbpp))
    }
    fn io_getevents(&self, ctx: u64, min: i64, nr: i64, events: u64, timeout: u64) -> i64 {
        number(self.contexts.io_getevents(ctx, min, nr, events, timeout))
    }
    fn io_pgetevents(
        &self,
        ctx: u64,
        min: i64,
        nr: i64,
        events: u64,
        timeout: u64,
        usig: u64,
    ) -> i64 {
        number(self.contexts.io_pgetevents(ctx, min, nr, events, timeout, usig))
    }
    fn io_cancel(&self, ctx: u64, iocb: u64, _: u64) -> i64 {
        number(self.contexts.io_cancel(ctx, iocb).map(|()| 0))
    }
    fn moved(&self, from: u64, to: u64) {
        assert!(self.contexts.relocate(from, to));
    }
}

/// The kernel's contexts belong to the whole test process: a test that tries the address of a
/// destroyed one must not meet that of another test there.
static ASKING_THE_KERNEL: Mutex<()> = Mutex::new(());

/// Runs `scenario` on the kernel, if it can be asked, and on our contexts; both must answer
/// `expected`.
fn agree(expected: &[i64], scenario: impl Fn(&dyn Aio) -> Vec<i64>) {
    let one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = native::Kernel::find() {
        assert_eq!(scenario(&kernel), expected, "the kernel disagrees with the expectation");
    }
    drop(one_at_a_time);
    assert_eq!(scenario(&Postern::new()), expected, "we disagree with the expectation");
}

/// Runs `scenario` on the kernel, if it can be asked, and on our contexts; both must answer the
/// same, whatever it is.
fn agree_with_kernel<T: PartialEq + std::fmt::Debug>(scenario: impl Fn(&dyn Aio) -> T) {
    let _one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(kernel) = native::Kernel::find() else { return };
    assert_eq!(scenario(&Postern::new()), scenario(&kernel), "left: we; right: the kernel");
}

const EPERM: i64 = -1;
const EINTR: i64 = -4;
const EIO: i64 = -5;
const EBADF: i64 = -9;
const EAGAIN: i64 = -11;
const ENOMEM: i64 = -12;
const EFAULT: i64 = -14;
const EINVAL: i64 = -22;
const EOPNOTSUPP: i64 = -95;
