//! A test double of a process: real memory and real descriptors, files whose requests wait until
//! the test completes them, a clock that moves only when a wait times out, sleep on a condition
//! variable or by script.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    os::unix::fs::FileExt,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use postern_trusted::{
    aio::{
        AioFile, AioHost, Completion, Descriptor, EventCounter, FileTraits, KernelContext, Op,
        Request, RingMapping, Signals, Wait, WaitEnd, WaitKey,
    },
    errno::Errno,
    platform::{Buffer, Fault, GuestMemory},
};

use crate::guest;

/// A thread that sleeps longer than this in a test was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// What a scripted wait does.
pub type Step = Box<dyn FnOnce() -> WaitEnd + Send>;

/// What one wait asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    pub at_least: u32,
    /// From the moment of the call.
    pub for_ns: Option<u64>,
    pub signals: Signals,
}

#[derive(Default)]
struct Sleep {
    sleepers: Vec<(u64, WaitKey, u32)>,
    next: u64,
    script: VecDeque<Step>,
    log: Vec<Waited>,
}

/// io_setup of a context of the kernel's.
pub type KernelMaker = fn(u32) -> Result<Arc<dyn KernelContext>, Errno>;

/// What the machine and the user's rights are.
#[derive(Clone, Copy)]
pub struct Machine {
    pub cpus: u32,
    pub max_nr: u64,
    pub realtime: bool,
    /// Who serves descriptors of the kernel's: contexts of the kernel's own, or nobody (then the
    /// process does it itself, file by file).
    pub kernel: Option<KernelMaker>,
}

impl Default for Machine {
    fn default() -> Self {
        Self { cpus: possible_cpus(), max_nr: 65536, realtime: true, kernel: None }
    }
}

/// The process.
pub struct Process {
    machine: Machine,
    pub nr: AtomicU64,
    /// Rings that may still be mapped; mapping beyond it is ENOMEM.
    pub rings_left: AtomicU32,
    pub rings: AtomicU32,
    /// Where rings lay for the guest when they were unmapped.
    pub unmapped: Mutex<Vec<u64>>,
    pub reaps_seen: AtomicU32,
    pub clock: AtomicU64,
    /// The ring whose tail [`PROBE`] notes.
    pub probed_ring: AtomicU64,
    /// What it has noted.
    pub tails_at_signal: Arc<Mutex<Vec<u32>>>,
    /// Called once, before guest memory is written the next time.
    pub on_write: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Called at every wake-up.
    pub on_wake: Mutex<Option<Box<dyn Fn() + Send>>>,
    files: Mutex<HashMap<i32, Arc<Controlled>>>,
    sleep: Mutex<Sleep>,
    changed: Condvar,
}

impl Process {
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            nr: AtomicU64::new(0),
            rings_left: AtomicU32::new(u32::MAX),
            rings: AtomicU32::new(0),
            unmapped: Mutex::default(),
            reaps_seen: AtomicU32::new(0),
            clock: AtomicU64::new(1_000_000_000),
            probed_ring: AtomicU64::new(0),
            tails_at_signal: Arc::default(),
            on_write: Mutex::default(),
            on_wake: Mutex::default(),
            files: Mutex::default(),
            sleep: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Opens a file whose requests wait for the test. Its descriptor is none of the kernel's.
    pub fn open_controlled(&self, traits: FileTraits) -> Arc<Controlled> {
        let mut files = self.files.lock().unwrap();
        let fd = 1_000_000 + i32::try_from(files.len()).unwrap();
        let file = Arc::new(Controlled {
            fd,
            traits,
            waits: AtomicBool::new(false),
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        files.insert(fd, file.clone());
        file
    }

    /// The next wait that would sleep does this instead.
    pub fn script(&self, step: impl FnOnce() -> WaitEnd + Send + 'static) {
        self.sleep.lock().unwrap().script.push_back(Box::new(step));
    }

    /// The waits made so far; forgets them.
    pub fn waited(&self) -> Vec<Waited> {
        std::mem::take(&mut self.sleep.lock().unwrap().log)
    }

    /// Returns when `count` threads sleep.
    pub fn until_asleep(&self, count: usize) {
        let sleep = self.sleep.lock().unwrap();
        let (_sleep, end) = self
            .changed
            .wait_timeout_while(sleep, FORGOTTEN, |sleep| sleep.sleepers.len() < count)
            .unwrap();
        assert!(!end.timed_out(), "fewer than {count} threads went to sleep");
    }
}

impl GuestMemory for Process {
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        guest::read(from, out)
    }
    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        let before = self.on_write.lock().unwrap().take();
        if let Some(before) = before {
            before();
        }
        guest::write(to, data)
    }
}

impl AioHost for Process {
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno> {
        let take = |left: u32| left.checked_sub(1);
        self.rings_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .map_err(|_| Errno::ENOMEM)?;
        self.rings.fetch_add(1, Ordering::Relaxed);
        // SAFETY: creates a descriptor, which is owned here.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"[aio]".as_ptr(), 0)) };
        file.set_len(bytes as u64).unwrap();
        let view = guest::map(bytes, file.as_raw_fd());
        let alias = guest::map(bytes, file.as_raw_fd());
        // SAFETY: the alias is unmapped in `unmap_ring` only, and nobody makes references into it.
        Ok(unsafe { RingMapping::new(view.as_ptr() as u64, alias, bytes) })
    }

    fn unmap_ring(&self, mapping: RingMapping) {
        self.rings.fetch_sub(1, Ordering::Relaxed);
        self.unmapped.lock().unwrap().push(mapping.guest());
        guest::unmap(mapping.guest(), mapping.bytes());
        guest::unmap(mapping.alias().as_ptr() as u64, mapping.bytes());
    }

    fn file(&self, fd: i32) -> Result<Descriptor, Errno> {
        if let Some(file) = self.files.lock().unwrap().get(&fd) {
            return Ok(Descriptor::Served(file.clone()));
        }
        let plain = Plain::find(fd)?;
        Ok(match self.machine.kernel {
            Some(_) => Descriptor::Kernels,
            None => Descriptor::Served(Arc::new(plain)),
        })
    }

    fn kernel_context(&self, nr_events: u32) -> Result<Arc<dyn KernelContext>, Errno> {
        self.machine.kernel.ok_or(Errno::ENOSYS)?(nr_events)
    }

    fn event_counter(&self, fd: i32) -> Result<Arc<dyn EventCounter>, Errno> {
        if fd == PROBE {
            let ring = self.probed_ring.load(Ordering::Relaxed);
            return Ok(Arc::new(Probe { ring, log: self.tails_at_signal.clone() }));
        }
        // SAFETY: takes numbers only; the copy is owned here.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return Err(Errno::EBADF);
        }
        // SAFETY: a descriptor of our own.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        let kind = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        if kind.to_str() != Some("anon_inode:[eventfd]") {
            return Err(Errno::EINVAL);
        }
        Ok(Arc::new(Counter(copy.into())))
    }

    fn possible_cpus(&self) -> u32 {
        self.machine.cpus
    }

    fn aio_max_nr(&self) -> u64 {
        self.machine.max_nr
    }

    fn charge(&self, nr: u32) -> Result<(), Errno> {
        let add = |now: u64| Some(now + u64::from(nr)).filter(|sum| *sum <= self.machine.max_nr);
        self.nr
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .map_err(|_| Errno::EAGAIN)?;
        Ok(())
    }

    fn uncharge(&self, nr: u32) {
        self.nr.fetch_sub(u64::from(nr), Ordering::Relaxed);
    }

    fn may_use_realtime_io(&self) -> bool {
        self.machine.realtime
    }

    fn now_ns(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    fn drive(&self) {}

    fn wait(&self, wait: Wait<'_>) -> WaitEnd {
        let for_ns = wait.deadline_ns.map(|at| at.saturating_sub(self.now_ns()));
        let mut sleep = self.sleep.lock().unwrap();
        sleep.log.push(Waited { at_least: wait.at_least, for_ns, signals: wait.signals });
        if let Some(step) = sleep.script.pop_front() {
            drop(sleep);
            return step();
        }
        let me = sleep.next;
        sleep.next += 1;
        sleep.sleepers.push((me, wait.key, wait.at_least));
        if !(wait.ready)() {
            if let Some(deadline) = wait.deadline_ns {
                sleep.sleepers.retain(|sleeper| sleeper.0 != me);
                self.clock.fetch_max(deadline, Ordering::Relaxed);
                return WaitEnd::TimedOut;
            }
            self.changed.notify_all();
            let asleep = |sleep: &mut Sleep| sleep.sleepers.iter().any(|sleeper| sleeper.0 == me);
            let (_sleep, end) = self.changed.wait_timeout_while(sleep, FORGOTTEN, asleep).unwrap();
            assert!(!end.timed_out(), "nobody woke a sleeper that asks for {}", wait.at_least);
            return WaitEnd::Ready;
        }
        sleep.sleepers.retain(|sleeper| sleeper.0 != me);
        WaitEnd::Ready
    }

    /// Wakes exactly those that must be woken.
    fn wake(&self, key: WaitKey, have: u32) {
        if let Some(look) = &*self.on_wake.lock().unwrap() {
            look();
        }
        let mut sleep = self.sleep.lock().unwrap();
        sleep.sleepers.retain(|sleeper| sleeper.1 != key || sleeper.2 > have);
        drop(sleep);
        self.changed.notify_all();
    }

    fn reaps_in_user_space(&self) {
        self.reaps_seen.fetch_add(1, Ordering::Relaxed);
    }
}

/// A file whose requests wait until the test completes them.
pub struct Controlled {
    fd: i32,
    traits: FileTraits,
    /// io_submit waits for its requests.
    pub waits: AtomicBool,
    queue: Mutex<VecDeque<(Request, Completion)>>,
    changed: Condvar,
}

impl Controlled {
    pub fn fd(&self) -> i32 {
        self.fd
    }

    /// Requests that wait.
    pub fn pending(&self) -> usize {
        self.queue.lock().unwrap().len()
    }

    /// Takes the request that has waited longest.
    pub fn take(&self) -> (Request, Completion) {
        self.take_nth(0)
    }

    /// Takes request number `index` of those that wait.
    pub fn take_nth(&self, index: usize) -> (Request, Completion) {
        self.queue.lock().unwrap().remove(index).unwrap()
    }

    /// Completes the request that has waited longest.
    pub fn complete(&self, result: Result<usize, Errno>) {
        self.take().1.finish(result);
    }

    /// Waits for a request and takes it; `None` once `stop` is set and none is left.
    pub fn take_next(&self, stop: &AtomicBool) -> Option<(Request, Completion)> {
        let mut queue = self.queue.lock().unwrap();
        loop {
            if let Some(next) = queue.pop_front() {
                return Some(next);
            }
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            queue = self.changed.wait(queue).unwrap();
        }
    }

    /// Lets [`Self::take_next`] look at its `stop`.
    pub fn nudge(&self) {
        let _queue = self.queue.lock().unwrap();
        self.changed.notify_all();
    }
}

impl AioFile for Controlled {
    fn traits(&self) -> FileTraits {
        self.traits
    }
    fn completes_in_submit(&self, _: &Request) -> bool {
        self.waits.load(Ordering::Relaxed)
    }
    fn submit(self: Arc<Self>, request: Request, done: Completion) {
        self.queue.lock().unwrap().push_back((request, done));
        self.changed.notify_all();
    }
}

/// A descriptor of the kernel's, with requests done on the spot.
struct Plain {
    file: File,
    traits: FileTraits,
}

impl Plain {
    fn find(fd: i32) -> Result<Self, Errno> {
        // SAFETY: takes numbers only.
        let (flags, copy) =
            unsafe { (libc::fcntl(fd, libc::F_GETFL), libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0)) };
        if copy < 0 {
            return Err(Errno::EBADF);
        }
        // SAFETY: a descriptor of our own.
        let file = unsafe { File::from_raw_fd(copy) };
        if flags & libc::O_PATH != 0 {
            return Err(Errno::EBADF);
        }
        let regular = file.metadata().is_ok_and(|it| it.is_file());
        let directory = file.metadata().is_ok_and(|it| it.is_dir());
        let traits = FileTraits {
            readable: flags & libc::O_ACCMODE != libc::O_WRONLY,
            writable: flags & libc::O_ACCMODE != libc::O_RDONLY,
            has_data: !directory,
            has_fsync: regular || directory,
            append: flags & libc::O_APPEND != 0,
            ..FileTraits::REGULAR
        };
        Ok(Self { file, traits })
    }

    fn perform(&self, request: &Request) -> io::Result<Result<usize, Fault>> {
        let mut bytes = vec![0; request.buffer.len()];
        Ok(match request.op {
            Op::Read => {
                let count = self.file.read_at(&mut bytes, request.offset)?;
                request.buffer.copy_out(0, &bytes[..count]).map(|()| count)
            }
            Op::Write => match request.buffer.copy_in(0, &mut bytes) {
                Ok(()) => Ok(self.file.write_at(&bytes, request.offset)?),
                Err(fault) => Err(fault),
            },
            Op::Fsync => Ok(self.file.sync_all().map(|()| 0)?),
            Op::Fdatasync => Ok(self.file.sync_data().map(|()| 0)?),
        })
    }
}

impl AioFile for Plain {
    fn traits(&self) -> FileTraits {
        self.traits
    }
    fn completes_in_submit(&self, _: &Request) -> bool {
        true
    }
    fn submit(self: Arc<Self>, request: Request, done: Completion) {
        done.finish(match self.perform(&request) {
            Ok(Ok(count)) => Ok(count),
            Ok(Err(Fault)) => Err(Errno::EFAULT),
            Err(error) => Err(Errno(error.raw_os_error().unwrap_or(5))),
        });
    }
}

/// Descriptor of an eventfd that notes the tail of [`Process::probed_ring`] when it is signalled.
pub const PROBE: i32 = 2_000_000;

/// An eventfd that notes the ring's tail.
struct Probe {
    ring: u64,
    log: Arc<Mutex<Vec<u32>>>,
}

impl EventCounter for Probe {
    fn signal(&self) {
        self.log.lock().unwrap().push(guest::ring_word(self.ring, guest::TAIL));
    }
}

struct Counter(File);

impl EventCounter for Counter {
    fn signal(&self) {
        io::Write::write_all(&mut &self.0, &1_u64.to_ne_bytes()).unwrap();
    }
}

/// `num_possible_cpus` of this machine.
pub fn possible_cpus() -> u32 {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or("0".into());
    text.trim()
        .split(',')
        .map(|range| match range.split_once('-') {
            Some((from, to)) => to.parse::<u32>().unwrap() - from.parse::<u32>().unwrap() + 1,
            None => 1,
        })
        .sum()
}
