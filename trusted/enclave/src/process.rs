//! The enclave as a process with one volume open at a daemon: its requests run as tasks, driven by
//! the thread that submits them and waits for them.
//!
//! Holds: a thread that waits looks at the port for a bounded time before it leaves the enclave, so
//! that requests that keep coming cost no exit; it leaves for a limited time only.

use core::{
    future::Future,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, Waker},
};
use std::sync::{Arc, OnceLock};

use postern_trusted::{
    aio::{AioFile, Completion, FileTraits, Op, Request, Wait, WaitEnd},
    errno::Errno,
    exec::{Executor, Start},
    platform::Buffer as _,
    port::{LaneFile, Sleeper},
    volume::{Chore, OpenOptions, SealingPolicy, SlotKey, Volume},
};

use crate::{
    guest::Runtime,
    link::Link,
    sealing::{self, Found},
};

/// Longest look at the port before a sleep, unless it is told otherwise.
const SPIN_NS: u64 = 400_000;
/// Looks between two readings of the clock, and readings of a clock that stands still.
const LOOKS: u32 = 16;
const READINGS: u32 = 1 << 16;
/// Longest sleep: chores of the volume come by time.
const NAP_NS: u64 = 20_000_000;
/// Completions and tasks of one step.
const STEP: usize = 256;
/// Map nodes of the volume in memory.
const CACHE_BYTES: usize = 8 << 20;

/// Where the volume's key comes from.
pub struct Keys<'a> {
    /// A slot of this enclave's, by this policy, which is made if there is none.
    pub seal: Option<SealingPolicy>,
    /// What the host hands in, if it does.
    pub handed_in: &'a dyn Fn() -> Result<Option<SlotKey>, String>,
}

/// The process.
pub struct Process {
    link: Link,
    executor: Executor,
    file: OnceLock<Arc<Opened>>,
    spin_ns: AtomicU64,
}

/// The volume, open.
pub struct Opened {
    volume: Volume,
    disk: LaneFile,
    workers: Box<dyn Start<Job>>,
    /// Of the last request.
    number: AtomicU64,
}

impl Process {
    /// Attaches to the daemon and opens the volume in its host file `name`.
    ///
    /// # Errors
    /// Why not.
    pub fn open(name: &str, keys: &Keys<'_>) -> Result<Arc<Self>, String> {
        let link = Link::attach()?;
        let (executor, spin_ns) = (Executor::new(|| ()), AtomicU64::new(SPIN_NS));
        let process = Arc::new(Self { link, executor, file: OnceLock::new(), spin_ns });
        let disk = process.link.open(name)?;
        let key = process.key(&disk, keys).map_err(|error| format!("{name}: {error}"))?;
        let options = OpenOptions::default();
        let opened = process.block_on(Volume::open(&disk, &key, &options));
        let (volume, report) = opened.map_err(|error| format!("{name}: {error}"))?;
        if !report.clean && report.journal_blocks > 0 {
            println!("recovered: {} journal blocks replayed", report.journal_blocks);
        }
        volume.limit_cache(CACHE_BYTES);
        let workers = process.executor.pool(Job::run);
        let opened = Opened { volume, disk, workers, number: AtomicU64::new(0) };
        // Empty until here.
        let _ = process.file.set(Arc::new(opened));
        Ok(process)
    }

    fn key(&self, disk: &LaneFile, keys: &Keys<'_>) -> Result<SlotKey, String> {
        let none = "standard input holds no key";
        let Some(policy) = keys.seal else { return (keys.handed_in)()?.ok_or(none.into()) };
        let closed = match self.block_on(sealing::find(disk)).map_err(|error| error.to_string())? {
            Found::Opens(key) => return Ok(key),
            Found::Closed(slots) => slots,
        };
        match ((keys.handed_in)()?, closed.as_slice()) {
            (Some(key), _) => self.block_on(sealing::make(disk, &key, policy)),
            (None, []) => Err(format!("no slot is sealed to an enclave yet, and {none}")),
            (None, [slot, ..]) => Err(format!(
                "slot {slot} is sealed to another enclave, to one of a higher version, or on \
                 another machine, and {none} to make one for this one"
            )),
        }
    }

    fn opened(&self) -> Option<&Arc<Opened>> {
        self.file.get()
    }

    /// Bytes of the volume.
    pub fn size(&self) -> u64 {
        self.opened().map_or(0, |file| file.volume.capacity())
    }

    /// How many daemons took over from one that had ended.
    pub fn successors(&self) -> u64 {
        self.link.successors()
    }

    /// Looks at the port for so long before it sleeps, 20 ms or so at most: more time of the
    /// processor, fewer exits.
    pub fn spin_for(&self, ns: u64) {
        self.spin_ns.store(ns, Relaxed);
    }

    /// Closes the volume.
    ///
    /// # Errors
    /// What could not be written.
    pub fn close(&self) -> Result<(), Errno> {
        // Chores hold the volume; it must not be closed under one.
        while self.executor.live() > 0 {
            if !self.step() {
                self.rest(NAP_NS);
            }
        }
        let Some(file) = self.opened().cloned() else { return Ok(()) };
        self.block_on(file.volume.close(&file.disk))
    }

    /// Runs what is ready and takes completions; answers whether there was anything.
    fn step(&self) -> bool {
        // One doorbell for all that this step submits.
        let _plug = self.link.lane.plug();
        let taken = self.link.lane.poll(STEP);
        let polled = self.executor.run(STEP);
        self.start_chore();
        taken > 0 || polled > 0
    }

    fn start_chore(&self) {
        let Some(file) = self.opened() else { return };
        let Some(chore) = file.volume.due(self.link.port.now_ns()) else { return };
        let file = file.clone();
        self.executor.spawn(async move {
            let done = file.volume.run_chore(&file.disk, chore).await;
            if let Err(errno) = done
                && chore != Chore::Register
            {
                eprintln!("background write failed: errno {}", errno.0);
            }
        });
    }

    /// Waits for the daemon: looks for a while, then sleeps, `limit_ns` at most. Comes over to
    /// another one if that one has ended.
    fn rest(&self, limit_ns: u64) {
        if self.is_soon() {
            return;
        }
        self.link.lane.sleep(Sleeper::Driver, limit_ns.min(NAP_NS));
        if self.link.is_lost() {
            let volume = self.opened().map(|file| &file.volume);
            match self.link.come_over(volume) {
                Ok(()) => println!("another daemon took over"),
                Err(why) => eprintln!("the daemon has gone: {why}"),
            }
        }
    }

    /// Looks for completions for a while.
    fn is_soon(&self) -> bool {
        let end = self.link.port.now_ns().saturating_add(self.spin_ns.load(Relaxed));
        for _ in 0..READINGS {
            for _ in 0..LOOKS {
                core::hint::spin_loop();
                if self.link.lane.needs_drive() || self.executor.has_ready() {
                    return true;
                }
            }
            if self.link.port.now_ns() >= end {
                break;
            }
        }
        false
    }

    /// Runs `future` to its end, and everything else meanwhile.
    fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            if !self.step() {
                self.rest(NAP_NS);
            }
        }
    }
}

impl Runtime for Process {
    fn file(&self) -> Result<Arc<dyn AioFile>, Errno> {
        match self.opened() {
            Some(file) => Ok(file.clone()),
            None => Err(Errno::EBADF),
        }
    }

    fn now_ns(&self) -> u64 {
        self.link.port.now_ns()
    }

    fn drive(&self) {
        self.step();
    }

    fn wait(&self, wait: &Wait<'_>) -> WaitEnd {
        loop {
            let progress = self.step();
            if (wait.ready)() {
                return WaitEnd::Ready;
            }
            if progress {
                continue;
            }
            let left = match wait.deadline_ns {
                None => NAP_NS,
                Some(deadline) => match deadline.checked_sub(self.now_ns()) {
                    None | Some(0) => return WaitEnd::TimedOut,
                    Some(left) => left,
                },
            };
            self.rest(left);
        }
    }
}

impl AioFile for Opened {
    fn traits(&self) -> FileTraits {
        FileTraits::REGULAR
    }

    fn completes_in_submit(&self, _: &Request) -> bool {
        false
    }

    fn submit(self: Arc<Self>, request: Request, done: Completion) {
        let file = self.clone();
        self.workers.start(Job { file, request, done });
    }
}

/// A request on its way.
struct Job {
    file: Arc<Opened>,
    request: Request,
    done: Completion,
}

impl Job {
    async fn run(self) {
        let Self { file, request, done } = self;
        let number = file.number.fetch_add(1, Relaxed) + 1;
        let disk = file.disk.for_guest(request.submitted_ns, number);
        let (volume, at, buffer) = (&file.volume, request.offset, &request.buffer);
        done.finish(match request.op {
            Op::Read => volume.read(&disk, at, buffer).await,
            Op::Write => volume.write(&disk, at, buffer).await,
            Op::Fsync | Op::Fdatasync => volume.sync(&disk).await.map(|()| buffer.len()),
        });
    }
}
