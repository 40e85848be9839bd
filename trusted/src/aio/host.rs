//! What the contexts ask of the process they live in, and of the files it has open.
//!
//! The contexts know nothing of volumes, threads or system calls: [`AioHost`] is the process
//! (descriptors, memory, waiting), [`AioFile`] is one kind of file behind a descriptor. No method
//! of either is called with a lock of this module held.

use alloc::sync::Arc;

use super::{Completion, KernelContext, Request, RingMapping};
use crate::{errno::Errno, platform::GuestMemory};

/// The process that the contexts belong to.
pub trait AioHost: GuestMemory + 'static {
    /// Maps a ring of `bytes` (a multiple of 4096) zeroed bytes into the guest, shared, page
    /// aligned, and gives the trusted side an alias of its own.
    ///
    /// # Errors
    /// `ENOMEM`, where mmap(2) would refuse.
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno>;

    /// Takes the guest's view of a ring away (where it lies now, see
    /// [`super::AioContexts::relocate`]) and its memory back. Nothing here touches it any more.
    fn unmap_ring(&self, mapping: RingMapping);

    /// What lies behind descriptor `fd`.
    ///
    /// # Errors
    /// `EBADF` if it is not open (a descriptor opened with `O_PATH` counts as not open).
    fn file(&self, fd: i32) -> Result<Descriptor, Errno>;

    /// A context of the kernel's for the requests that one context has on descriptors that are the
    /// kernel's, made by io_setup(2) with `nr_events`.
    ///
    /// # Errors
    /// What the kernel answers; `EMFILE` without a descriptor for its bell.
    fn kernel_context(&self, nr_events: u32) -> Result<Arc<dyn KernelContext>, Errno>;

    /// The eventfd behind descriptor `fd`, kept alive by the answer whatever the guest closes.
    ///
    /// # Errors
    /// `EBADF` if it is not open, `EINVAL` if it is not an eventfd.
    fn event_counter(&self, fd: i32) -> Result<Arc<dyn EventCounter>, Errno>;

    /// CPUs the machine may ever have: the kernel's `num_possible_cpus`. At least 1.
    fn possible_cpus(&self) -> u32;

    /// `/proc/sys/fs/aio-max-nr`.
    fn aio_max_nr(&self) -> u64;

    /// Adds `nr` to the system-wide `aio-nr`. A process that ends gives back what it had charged.
    ///
    /// # Errors
    /// `EAGAIN` if the sum would pass `aio-max-nr`; then nothing was added.
    fn charge(&self, nr: u32) -> Result<(), Errno>;

    /// Takes back what [`Self::charge`] added.
    fn uncharge(&self, nr: u32);

    /// Whether the caller has `CAP_SYS_ADMIN` or `CAP_SYS_NICE` (real-time I/O priority).
    fn may_use_realtime_io(&self) -> bool;

    /// Highest address that a range in user memory may end at (exclusive end, so that a range of
    /// no bytes may start there).
    fn user_end(&self) -> u64 {
        0x7fff_ffff_f000
    }

    /// Monotonic nanoseconds, the clock of [`Wait::deadline_ns`].
    fn now_ns(&self) -> u64;

    /// Sends accepted requests on their way: runs ready tasks, tells the daemon of new work. Called
    /// once for each io_submit that accepted something.
    fn start(&self) {
        self.drive();
    }

    /// Lets the process's requests progress without sleeping: runs ready tasks, takes completions.
    /// A bounded step, so that the first events reach a guest that waits for them while others are
    /// still being worked on. Called at the start of io_getevents.
    fn drive(&self);

    /// Sleeps until `wait.ready` holds, its deadline passes, or a signal handler ran.
    ///
    /// * Requests must progress meanwhile, by this thread or another.
    /// * No wake-up may be lost: `ready` is evaluated after the sleeper became one that
    ///   [`Self::wake`] finds. `ready` may be evaluated at any time by the sleeping thread; it
    ///   takes a context's lock briefly.
    /// * [`WaitEnd::Ready`] may be spurious.
    /// * [`Signals::Masked`] is put in place once even when `ready` holds at once, so that pending
    ///   signals which it unblocks are delivered.
    /// * A handler may leave by siglongjmp and the thread may be cancelled here: the caller holds
    ///   nothing but a reference count.
    fn wait(&self, wait: Wait<'_>) -> WaitEnd;

    /// Wakes the sleepers with this `key` that ask for no more than `have` events. Waking more is
    /// allowed, fewer is not. Called after every completion: costs little where nobody sleeps.
    ///
    /// What the caller stored before is to be seen by a sleeper that this call does not find: one
    /// that looks for sleepers without a lock needs a sequentially consistent fence first, and the
    /// sleeper another between becoming one and evaluating `ready`.
    fn wake(&self, key: WaitKey, have: u32);

    /// The guest was seen to take events out of a ring without calling: from now on completions
    /// must progress although no thread of the guest calls.
    fn reaps_in_user_space(&self);
}

/// What a descriptor leads to.
#[derive(Clone)]
pub enum Descriptor {
    /// A file that is served here.
    Served(Arc<dyn AioFile>),
    /// Something else, of whatever kind: the kernel serves it.
    Kernels,
}

/// An eventfd that a request will signal. Dropping it unsignalled is a request that was rejected.
pub trait EventCounter: Send + Sync {
    /// Adds 1, as the kernel does: never blocks, saturates.
    fn signal(&self);
}

/// Names what sleepers wait for: one context, for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaitKey(pub u64);

/// One wait.
pub struct Wait<'a> {
    /// Which calls of [`AioHost::wake`] mean it.
    pub key: WaitKey,
    /// How many events it asks for.
    pub at_least: u32,
    /// When it gives up, in the clock of [`AioHost::now_ns`]; `None` is never. A deadline that has
    /// passed already means: do not sleep.
    pub deadline_ns: Option<u64>,
    /// What signals do to it.
    pub signals: Signals,
    /// What it waits for. True at once means: do not sleep.
    pub ready: &'a dyn Fn() -> bool,
}

/// What signals do to a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signals {
    /// Nothing: handlers run after the call (uninterruptible sleep).
    Held,
    /// A handler that runs ends the wait, whatever its `SA_RESTART`, as does a stop and continue:
    /// what epoll_wait(2) does.
    Open,
    /// As `Open` under this signal mask (bit `n - 1` blocks signal `n`), which is put in place and
    /// taken back atomically with the sleep, and a stop without a handler restarts the wait: what
    /// ppoll(2) does.
    Masked(u64),
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitEnd {
    /// `ready` holds, or held, or it was a spurious wake-up.
    Ready,
    /// The deadline has passed.
    TimedOut,
    /// A signal ended it.
    Interrupted,
}

/// One open file description.
pub trait AioFile: Send + Sync {
    /// What kind of file it is and how it was opened, now.
    fn traits(&self) -> FileTraits;

    /// Whether `request` must be complete before io_submit goes on to the next: everything on a
    /// regular file without `O_DIRECT` except fsync, and with it what the file system does on the
    /// spot (reads of holes, extending writes on ext4).
    fn completes_in_submit(&self, request: &Request) -> bool;

    /// Starts `request`. [`Completion::finish`] may be called before this returns or later from
    /// any thread; a completion that is dropped finishes with `EIO`. May block where Linux's
    /// io_submit blocks.
    ///
    /// What is wrong with the request in the eyes of the file (alignment, unreadable buffer, end
    /// of file, no space) is its result, never a refusal.
    fn submit(self: Arc<Self>, request: Request, done: Completion);
}

/// What the checks of io_submit want to know of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTraits {
    /// Opened for reading.
    pub readable: bool,
    /// Opened for writing.
    pub writable: bool,
    /// Has read and write methods at all (directories and epoll descriptors have not).
    pub has_data: bool,
    /// Has an fsync method (pipes and sockets have not).
    pub has_fsync: bool,
    /// `RWF_NOWAIT` is understood.
    pub nowait: bool,
    /// `RWF_ATOMIC` writes are understood.
    pub atomic: bool,
    /// `RWF_DONTCACHE` is understood.
    pub dontcache: bool,
    /// Opened with `O_APPEND`.
    pub append: bool,
    /// The inode is append-only (chattr +a).
    pub append_only: bool,
    /// Opened with `O_DSYNC` or `O_SYNC`.
    pub dsync: bool,
    /// Opened with `O_SYNC`.
    pub sync: bool,
    /// poll(2) events that are ready now. Of a file without a poll method:
    /// [`FileTraits::ALWAYS_READY`].
    pub ready: u16,
}

impl FileTraits {
    /// POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM: what a file without a poll method answers.
    pub const ALWAYS_READY: u16 = 0x145;

    /// A regular file opened with `O_RDWR` and nothing else.
    pub const REGULAR: Self = Self {
        readable: true,
        writable: true,
        has_data: true,
        has_fsync: true,
        nowait: true,
        atomic: false,
        dontcache: false,
        append: false,
        append_only: false,
        dsync: false,
        sync: false,
        ready: Self::ALWAYS_READY,
    };
}
