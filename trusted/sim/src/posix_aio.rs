//! POSIX AIO (aio_read(3) and its kin) on protected files.
//!
//! Requests are tasks of the process's executor, beside those of native AIO; no helper thread of
//! the C library ever touches a protected file. A request's state is where the C library keeps it,
//! in the guest's `struct aiocb` ([`control`]).
//!
//! Holds: requests that could tell in which order they ran (they overlap and one of them writes,
//! they append, one is a sync of earlier ones) run in the order in which they were made, as on the C
//! library's one queue for each descriptor; all others run beside each other. The guest's `aiocb`
//! says `EINPROGRESS` until the request has ended, and is not touched after that. Whoever waits for
//! a request drives it; with nobody waiting the service thread does.
//! Does not hold: aio_suspend(3) is not continued after a handler with SA_RESTART; `aio_reqprio` is
//! checked and orders nothing.
//!
//! Follows glibc 2.36: which errors a call answers itself and which the request ends with.
#![allow(unsafe_code)]

pub mod control;
pub mod notice;

use core::{
    future::poll_fn,
    ops::Range,
    sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering},
    task::{Poll, Waker},
};
use std::sync::Arc;

use postern_trusted::{errno::Errno, platform::Buffer, sync::Lock};

use crate::{
    files::OpenFile,
    guest::GuestBuffer,
    identity, process, service,
    wait::{self, Signals, WaitEnd},
};
use control::{Control, Operation};
use notice::{Notice, Notices};

/// Not begun: waits for earlier requests.
const WAITING: u8 = 0;
const RUNNING: u8 = 1;
/// Ended or cancelled.
const DONE: u8 = 2;

/// While a wait is also for requests of the C library, look for them this often.
const TICK_NS: u64 = 1_000_000;

/// What aio_cancel(3) answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// `AIO_CANCELED`.
    All = 0,
    /// `AIO_NOTCANCELED`.
    NotAll = 1,
    /// `AIO_ALLDONE`.
    NothingLeft = 2,
}

/// Requests of one lio_listio(3), with the notice that the last of them gives.
pub struct Group {
    left: AtomicUsize,
    notice: Notice,
}

impl Group {
    /// A group of `members` that gives `notice` when the last has [`Self::leave`]d.
    #[must_use]
    pub fn new(members: usize, notice: Notice) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(members), notice })
    }

    /// One member has ended.
    pub fn leave(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            tell(self.notice);
        }
    }
}

/// A request under way.
struct Request {
    fd: i32,
    control: Control,
    operation: Operation,
    file: Arc<OpenFile>,
    offset: i64,
    buffer: Result<GuestBuffer, Errno>,
    notice: Notice,
    group: Option<Arc<Group>>,
    state: AtomicU8,
    waiters: Lock<Vec<Waker>>,
}

impl Request {
    /// Bytes of the file that it concerns.
    fn span(&self) -> Range<u64> {
        let sync = self.operation == Operation::Sync;
        if sync || self.operation == Operation::Write && self.file.append() {
            return 0..u64::MAX;
        }
        let start = u64::try_from(self.offset).unwrap_or(0);
        let length = self.buffer.as_ref().map_or(0, |b| b.len());
        start..start.saturating_add(length as u64)
    }

    /// Whether this request must not begin before `earlier` has ended.
    fn follows(&self, earlier: &Self) -> bool {
        if self.file.index() != earlier.file.index() || earlier.operation == Operation::Sync {
            return false;
        }
        let (mine, its) = (self.span(), earlier.span());
        let only_reads = self.operation == Operation::Read && earlier.operation == Operation::Read;
        !only_reads && mine.start < its.end && its.start < mine.end
    }

    fn begin(&self, as_what: u8) -> bool {
        let to = self.state.compare_exchange(WAITING, as_what, Ordering::AcqRel, Ordering::Acquire);
        to.is_ok()
    }

    /// Resolves when the request has ended.
    async fn ended(&self) {
        poll_fn(|context| {
            let mut waiters = self.waiters.lock();
            if self.state.load(Ordering::Acquire) == DONE {
                return Poll::Ready(());
            }
            waiters.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn perform(&self) -> Result<usize, Errno> {
        let file = &self.file;
        if self.operation == Operation::Sync {
            if file.is_path() {
                return Err(Errno::EBADF);
            }
            let held = file.volume().hold_soon().await?;
            let disk = held.disk_for_guest(wait::now_ns())?;
            let synced = file.volume().make_durable(&held, &disk).await;
            return file.after_sync(synced).map(|()| 0);
        }
        if self.operation == Operation::Unknown {
            return Err(Errno::EINVAL);
        }
        let offset = u64::try_from(self.offset).map_err(|_| Errno::EINVAL)?;
        let reads = self.operation == Operation::Read;
        if !(if reads { file.readable() } else { file.writable() }) {
            return Err(Errno::EBADF);
        }
        let buffer = self.buffer.as_ref().map_err(|errno| *errno)?;
        if reads {
            if !file.admits_read(offset, buffer).await? {
                return Ok(0);
            }
            return file.read_by_itself(offset, buffer).await;
        }
        file.write_by_itself(offset, buffer).await
    }

    /// Writes the result where the guest looks for it, and tells everybody.
    fn end(&self, result: Result<usize, Errno>) {
        let result = if self.notice.is_impossible() { Err(Errno::EINVAL) } else { result };
        if let Some(owned) = known() {
            let me = core::ptr::from_ref(self);
            owned.unfinished.lock().retain(|other| !core::ptr::eq(Arc::as_ptr(other), me));
        }
        self.control.end(result);
        tell(self.notice);
        if let Some(group) = &self.group {
            group.leave();
        }
        let waiters = {
            let mut waiters = self.waiters.lock();
            self.state.store(DONE, Ordering::Release);
            core::mem::take(&mut *waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
        process::current().sleepers.wake();
    }
}

struct Owned {
    process: u32,
    unfinished: Lock<Vec<Arc<Request>>>,
    notices: Notices,
}

/// Private to the process; a forked child finds its parent's and makes its own: it has none of its
/// parent's requests.
static OWNED: AtomicPtr<Owned> = AtomicPtr::new(core::ptr::null_mut());

fn known() -> Option<&'static Owned> {
    // SAFETY: null or a leaked object in the arena.
    let owned = unsafe { OWNED.load(Ordering::Acquire).as_ref() }?;
    (owned.process == identity::process_id()).then_some(owned)
}

fn owned() -> &'static Owned {
    loop {
        if let Some(owned) = known() {
            return owned;
        }
        let before = OWNED.load(Ordering::Acquire);
        let made = Box::into_raw(Box::new(Owned {
            process: identity::process_id(),
            unfinished: Lock::new(Vec::with_capacity(64)),
            notices: Notices::new(),
        }));
        if OWNED.compare_exchange(before, made, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: made above and published nowhere.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

/// Has the service thread give `notice`; a signal raised here would interrupt this library itself.
fn tell(notice: Notice) {
    if notice == Notice::None || notice.is_impossible() {
        return;
    }
    owned().notices.push(notice);
    process::current().service.kick();
}

/// Gives the notices that are due. For the service thread.
pub fn give_notices() {
    if let Some(owned) = known() {
        owned.notices.give();
    }
}

/// Makes a request of the `aiocb` at `control` and queues it; [`start`] sends it on its way.
///
/// # Errors
/// `EINVAL` for a priority outside 0..=20, told in the `aiocb` too; `EFAULT` if it is not there.
pub fn submit(
    control: Control,
    operation: Operation,
    file: Arc<OpenFile>,
    group: Option<Arc<Group>>,
) -> Result<(), Errno> {
    let asked = control.read()?;
    control.accept(operation, asked.priority)?;
    let owned = owned();
    let request = Arc::new(Request {
        fd: asked.fd,
        control,
        operation,
        file,
        offset: asked.offset,
        buffer: GuestBuffer::single(asked.buffer, asked.length),
        notice: asked.notice,
        group,
        state: AtomicU8::new(WAITING),
        waiters: Lock::new(Vec::new()),
    });
    let earlier: Vec<_> = {
        let mut unfinished = owned.unfinished.lock();
        let earlier = unfinished.iter().filter(|earlier| request.follows(earlier));
        let earlier = earlier.cloned().collect();
        unfinished.push(request.clone());
        earlier
    };
    if request.notice != Notice::None || request.group.is_some() {
        service::take_over();
    }
    // The caller sends it on its way.
    process::current().executor.spawn(async move {
        for earlier in earlier {
            earlier.ended().await;
        }
        if request.begin(RUNNING) {
            let result = request.perform().await;
            request.end(result);
        }
    });
    Ok(())
}

/// Sends queued requests to the daemon.
pub fn start() {
    process::current().start();
}

/// aio_cancel(3) of the request at `control`, or of all of the descriptor `fd`.
///
/// # Errors
/// `EINVAL`: `control` belongs to another descriptor.
pub fn cancel(fd: i32, control: Option<Control>) -> Result<Cancelled, Errno> {
    if let Some(control) = control
        && control.read()?.fd != fd
    {
        return Err(Errno::EINVAL);
    }
    let concerned: Vec<_> = known().map_or_else(Vec::new, |owned| {
        let unfinished = owned.unfinished.lock();
        let concerns = |request: &&Arc<Request>| {
            request.fd == fd && control.is_none_or(|control| request.control == control)
        };
        unfinished.iter().filter(concerns).cloned().collect()
    });
    let mut answer = match control {
        // Not in the list, yet in progress: it is ending at this moment.
        Some(control) if concerned.is_empty() && control.in_progress() => Cancelled::NotAll,
        _ => Cancelled::NothingLeft,
    };
    for request in concerned {
        if request.begin(RUNNING) {
            request.end(Err(Errno::ECANCELED));
            if answer == Cancelled::NothingLeft {
                answer = Cancelled::All;
            }
        } else if request.state.load(Ordering::Acquire) == RUNNING {
            answer = Cancelled::NotAll;
        }
    }
    Ok(answer)
}

/// Whether the request at `control` is one of this process's, and not ended.
#[must_use]
pub fn is_ours(control: Control) -> bool {
    known().is_some_and(|owned| {
        owned.unfinished.lock().iter().any(|request| request.control == control)
    })
}

/// Waits until `ready` holds; with `foreign`, it may come to hold without a word to this library.
///
/// # Errors
/// `EINTR`; `EAGAIN` when `timeout_ns` has passed.
pub fn wait(ready: &dyn Fn() -> bool, foreign: bool, timeout_ns: Option<u64>) -> Result<(), Errno> {
    let process = process::current();
    let deadline = timeout_ns.map(|ns| wait::now_ns().saturating_add(ns));
    loop {
        let progress = process.step();
        if ready() {
            return Ok(());
        }
        if progress {
            continue;
        }
        let left = deadline.map(|deadline| deadline.saturating_sub(wait::now_ns()));
        if left == Some(0) {
            return Err(Errno::EAGAIN);
        }
        let tick = foreign.then_some(TICK_NS);
        let sleep = left.into_iter().chain(tick).min();
        if process.sleep(ready, sleep, Signals::AsTheyAre) == WaitEnd::Interrupted {
            return if ready() { Ok(()) } else { Err(Errno::EINTR) };
        }
    }
}
