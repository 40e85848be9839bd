//! What a case works with: the file, memory, contexts, and the transcript.
//!
//! Holds: a transcript names no address, no process number and no time, so that two correct runs
//! print the same.

use std::{
    cell::{Cell, RefCell},
    ffi::{CStr, CString},
    fmt::Write as _,
    io::Write as _,
    os::fd::{FromRawFd as _, OwnedFd},
    time::Duration,
};

use crate::{
    aio::{self, Context, EVENT, Event, Iocb, KEY},
    sys::{self, PAGE, load32, load64, put, show, store32, store64},
};

/// Bytes of data that the file starts with; up to [`SIZE`] there is a hole.
pub const DATA: u64 = 32 << 10;
/// Bytes of the file at first.
pub const SIZE: u64 = 256 << 10;
/// Longer than anything takes, shorter than a case may take.
pub const LONG: Duration = Duration::from_secs(20);
/// An address that only the kernel may use.
pub const KERNEL: u64 = 0xffff_8880_0000_0000;
/// An address that no page table has.
pub const NON_CANONICAL: u64 = 0x0000_9000_0000_0000;
/// Memory that a case may take, bytes.
const MEMORY: u64 = 512 << 20;

/// A case's surroundings.
pub struct World {
    /// The file to work on.
    path: CString,
    /// A directory of ordinary files.
    scratch: CString,
    /// Where the transcript goes.
    log: RefCell<std::fs::File>,
    fresh: Cell<bool>,
    next: Cell<u64>,
    end: u64,
    /// The addresses of the iocbs so far: an event names one of them.
    iocbs: RefCell<Vec<u64>>,
}

impl World {
    /// Surroundings whose transcript goes to `log`.
    pub fn new(path: &CStr, scratch: &CStr, log: std::fs::File) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = sys::map(0, MEMORY, protection, libc::MAP_NORESERVE);
        assert!(start > 0, "mmap: {}", show(start));
        let next = start.cast_unsigned();
        Self {
            path: path.to_owned(),
            scratch: scratch.to_owned(),
            log: RefCell::new(log),
            fresh: Cell::new(false),
            next: Cell::new(next),
            end: next + MEMORY,
            iocbs: RefCell::default(),
        }
    }

    // The transcript.

    /// Says something.
    pub fn say(&self, text: impl AsRef<str>) {
        let mut line = text.as_ref().to_owned();
        line.push('\n');
        // One write for each line: forked children say something too.
        let _ = self.log.borrow_mut().write_all(line.as_bytes());
    }

    /// Says what a call answered.
    pub fn see(&self, what: &str, answer: i64) -> i64 {
        self.say(format!("{what}: {}", show(answer)));
        answer
    }

    /// Says what a call answered, which `rule` is about: if the kernel itself answers something
    /// else, the case does not do what it is meant to.
    pub fn rule(&self, what: &str, answer: i64, rule: i64) -> i64 {
        self.see(what, answer);
        if answer != rule {
            self.say(format!("{}: the rule says {}", crate::BROKEN_RULE, show(rule)));
        }
        answer
    }

    /// What must work for the case to mean anything.
    #[track_caller]
    pub fn must(&self, what: &str, answer: i64) -> u64 {
        u64::try_from(answer).unwrap_or_else(|_| panic!("{what}: {}", show(answer)))
    }

    // Memory.

    /// Zeroed memory; of a page or more it starts at a page and inaccessible memory follows the
    /// last page.
    pub fn memory(&self, len: u64) -> u64 {
        let paged = len >= PAGE;
        let align = if paged { PAGE } else { 64 };
        let at = self.next.get().next_multiple_of(align);
        let mut end = at + len;
        if paged {
            end = end.next_multiple_of(PAGE);
            sys::protect(end, PAGE, libc::PROT_NONE);
            end += PAGE;
        }
        assert!(end <= self.end, "a case takes too much memory");
        self.next.set(end);
        at
    }

    /// One page with a protection.
    pub fn page(&self, protection: i32) -> u64 {
        let at = self.memory(PAGE);
        sys::protect(at, PAGE, protection);
        at
    }

    /// Memory filled with a byte.
    pub fn filled(&self, len: u64, byte: u8) -> u64 {
        let at = self.memory(len.max(PAGE));
        sys::put_bytes(at, &vec![byte; usize::try_from(len).unwrap_or(0)]);
        at
    }

    /// An array of segments.
    pub fn vector(&self, segments: &[(u64, u64)]) -> u64 {
        let at = self.memory((16 * segments.len() as u64).max(64));
        for (place, (base, len)) in (at..).step_by(16).zip(segments) {
            store64(place, *base);
            store64(place + 8, *len);
        }
        at
    }

    /// A timespec.
    pub fn time(&self, seconds: i64, nanoseconds: i64) -> u64 {
        let at = self.memory(16);
        put(at, &[seconds, nanoseconds]);
        at
    }

    /// A timespec.
    pub fn duration(&self, time: Duration) -> u64 {
        let [seconds, nanoseconds] = aio::timespec(time);
        self.time(seconds, nanoseconds)
    }

    /// Sum over some memory: tells whether it is the same in both runs.
    pub fn sum(at: u64, len: u64) -> u64 {
        sys::bytes(at, len).iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    }

    /// Says what some memory holds.
    pub fn see_memory(&self, what: &str, at: u64, len: u64) {
        self.say(format!("{what}: {:016x}", Self::sum(at, len)));
    }

    // The file.

    /// Opens the file, which starts as [`DATA`] bytes of data and a hole.
    pub fn open(&self, flags: i32) -> i32 {
        if !self.fresh.replace(true) {
            self.lay_out();
        }
        let fd = sys::open(&self.path, flags);
        assert!(fd >= 0, "open: {}", show(fd.into()));
        fd
    }

    fn lay_out(&self) {
        let fd = sys::open(&self.path, libc::O_RDWR | libc::O_CREAT);
        assert!(fd >= 0, "open: {}", show(fd.into()));
        let data = self.memory(DATA);
        sys::put_bytes(data, &(0..DATA).map(byte_of_file).collect::<Vec<_>>());
        self.must("truncate", sys::ftruncate(fd, 0));
        assert_eq!(sys::pwrite(fd, data, DATA, 0), DATA.cast_signed());
        self.must("extend", sys::ftruncate(fd, SIZE.cast_signed()));
        self.must("fsync", sys::fsync(fd));
        sys::close(fd);
    }

    /// Says the file's size.
    pub fn see_size(&self, fd: i32) {
        self.see("size", sys::lseek(fd, 0, libc::SEEK_END));
    }

    /// Says the file's size and what it holds.
    pub fn see_file(&self) {
        let fd = self.open(libc::O_RDONLY);
        let size = sys::lseek(fd, 0, libc::SEEK_END);
        let (len, buffer) = (size.cast_unsigned().min(1 << 20), self.memory(1 << 20));
        let got = sys::pread(fd, buffer, len, 0);
        self.say(format!(
            "file: size {} read {} sum {:016x}",
            show(size),
            show(got),
            Self::sum(buffer, len)
        ));
        sys::close(fd);
    }

    /// A path in the directory of ordinary files.
    pub fn scratch(&self, name: &str) -> CString {
        let mut path = self.scratch.to_bytes().to_vec();
        path.push(b'/');
        path.extend(name.as_bytes());
        CString::new(path).unwrap_or_default()
    }

    // Contexts and requests.

    /// A new context.
    #[track_caller]
    pub fn context(&self, nr: u64) -> Context {
        let at = self.memory(8);
        self.must("io_setup", aio::setup(nr, at));
        Context(load64(at))
    }

    /// Stores an iocb; events name it by its number.
    pub fn place(&self, iocb: &Iocb) -> u64 {
        let at = self.memory(64);
        iocb.store(at);
        self.iocbs.borrow_mut().push(at);
        at
    }

    /// Stores addresses of iocbs, one after the other.
    pub fn list(&self, addresses: &[u64]) -> u64 {
        let at = self.memory(8 * addresses.len().max(1) as u64);
        for (place, address) in (at..).step_by(8).zip(addresses) {
            store64(place, *address);
        }
        at
    }

    /// io_submit(2) of these iocbs.
    pub fn submit(&self, context: Context, iocbs: &[Iocb]) -> i64 {
        let addresses: Vec<u64> = iocbs.iter().map(|iocb| self.place(iocb)).collect();
        aio::submit(context.0, iocbs.len() as i64, self.list(&addresses))
    }

    /// An event as the transcript has it.
    pub fn event(&self, event: &Event) -> String {
        let iocbs = self.iocbs.borrow();
        let mut text = format!("event: data {:#x} ", event.data);
        let _ = match iocbs.iter().position(|at| *at == event.obj) {
            Some(number) => write!(text, "iocb {number} "),
            None => write!(text, "iocb unknown "),
        };
        let _ = write!(text, "res {} res2 {}", show(event.res), show(event.res2));
        text
    }

    /// io_getevents(2) of exactly `count`, waiting at most [`LONG`].
    pub fn take(&self, context: Context, count: i64) -> (i64, Vec<Event>) {
        let at = self.memory(EVENT * count.cast_unsigned().max(1));
        let got = aio::get(context.0, count, count, at, self.duration(LONG));
        let events = (0..got.max(0).cast_unsigned()).map(|i| Event::load(at + i * EVENT));
        (got, events.collect())
    }

    /// Reaps and says `count` events, in the ring's order.
    pub fn reap(&self, context: Context, count: i64) {
        let (got, events) = self.take(context, count);
        self.see("io_getevents", got);
        for event in events {
            self.say(self.event(&event));
        }
    }

    /// Reaps and says `count` events, sorted: their order is not defined.
    pub fn reap_any_order(&self, context: Context, count: i64) {
        let (got, mut events) = self.take(context, count);
        self.see("io_getevents", got);
        events.sort_by_key(|event| (event.data, event.obj));
        for event in events {
            self.say(self.event(&event));
        }
    }

    /// Submits one request and reaps it.
    pub fn one_in(&self, context: Context, iocb: Iocb) -> i64 {
        let answer = self.see("io_submit", self.submit(context, &[iocb]));
        if answer == 1 {
            self.reap(context, 1);
        }
        answer
    }

    /// The same in a context of its own.
    pub fn one(&self, iocb: Iocb) -> i64 {
        self.one_in(self.context(8), iocb)
    }

    /// The same, where the event must be in the ring when io_submit returns.
    pub fn one_at_once(&self, iocb: Iocb) -> i64 {
        self.one_at_once_in(self.context(8), iocb)
    }

    /// The same in a context that is there.
    pub fn one_at_once_in(&self, context: Context, iocb: Iocb) -> i64 {
        let answer = self.see("io_submit", self.submit(context, &[iocb]));
        if answer == 1 {
            self.see("in the ring", context.ready().into());
            self.reap(context, 1);
        }
        answer
    }

    /// `aio_key` of the iocb with this number.
    pub fn see_key(&self, number: usize) {
        let at = self.iocbs.borrow()[number];
        self.say(format!("aio_key of iocb {number}: {}", load32(at + KEY)));
    }

    /// The address of the iocb with this number.
    pub fn iocb(&self, number: usize) -> u64 {
        self.iocbs.borrow()[number]
    }

    /// Makes `at` known as an iocb's address.
    pub fn name_iocb(&self, at: u64) {
        self.iocbs.borrow_mut().push(at);
    }

    // Other descriptors.

    /// A pipe: reading and writing end.
    pub fn pipe(&self, flags: i32) -> (i32, i32) {
        let at = self.memory(8);
        self.must("pipe", sys::call(libc::SYS_pipe2, &[at, sys::word(flags)]));
        (load32(at).cast_signed(), load32(at + 4).cast_signed())
    }

    /// A pair of connected UNIX sockets.
    pub fn sockets(&self, kind: i32) -> (i32, i32) {
        let (at, family) = (self.memory(8), sys::word(libc::AF_UNIX));
        self.must("socketpair", sys::call(libc::SYS_socketpair, &[family, sys::word(kind), 0, at]));
        (load32(at).cast_signed(), load32(at + 4).cast_signed())
    }

    /// An eventfd.
    pub fn eventfd(&self, count: u32, flags: i32) -> i32 {
        let fd = sys::call(libc::SYS_eventfd2, &[count.into(), sys::word(flags)]);
        self.must("eventfd", fd).cast_signed() as i32
    }

    /// What an eventfd has counted.
    pub fn see_counter(&self, fd: i32) {
        let at = self.memory(8);
        let got = sys::call(libc::SYS_read, &[sys::word(fd), at, 8]);
        self.see("eventfd read", got);
        self.say(format!("eventfd counted {}", load64(at)));
    }

    /// write(2) of a few bytes.
    pub fn write(&self, fd: i32, text: &str) -> i64 {
        let at = self.memory(64.max(text.len() as u64));
        sys::put_bytes(at, text.as_bytes());
        sys::call(libc::SYS_write, &[sys::word(fd), at, text.len() as u64])
    }

    /// Says how a child ended.
    pub fn see_child(&self, what: &str, pid: i32) {
        let status = sys::wait_for(pid, 0);
        self.say(format!("{what}: {}", how_it_ended(status)));
    }

    /// Runs `work` in a forked child and says how it ended.
    pub fn in_child(&self, what: &str, work: impl FnOnce()) {
        let pid = sys::fork();
        if pid == 0 {
            work();
            sys::quit(0);
        }
        self.see_child(what, pid);
    }

    /// A flag that threads and forked children share.
    pub fn shared_word(&self) -> u64 {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) } as u64;
        store32(at, 0);
        at
    }
}

/// An exit status in words.
pub fn how_it_ended(status: i64) -> String {
    let Ok(status) = i32::try_from(status) else { return "lost".into() };
    if status < 0 {
        return show(status.into());
    }
    if libc::WIFEXITED(status) {
        format!("exit {}", libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        format!("killed by signal {}", libc::WTERMSIG(status))
    } else {
        format!("status {status:#x}")
    }
}

/// A byte of the file as it starts.
pub fn byte_of_file(offset: u64) -> u8 {
    ((offset / 512) * 31 + offset % 251) as u8
}

/// Waits until a thread of this process sleeps in a system call other than a lock's; false if it
/// ends.
pub fn until_asleep(thread: i32) -> bool {
    until_asleep_in(sys::process(), thread)
}

/// The same for a thread of another process.
pub fn until_asleep_in(process: i32, thread: i32) -> bool {
    until_asleep_where(process, thread, &|number| number != libc::SYS_futex && number >= 0)
}

/// Waits until a thread of this process sleeps in this system call; false if it ends.
pub fn until_asleep_in_call(thread: i32, call: i64) -> bool {
    until_asleep_where(sys::process(), thread, &|number| number == call)
}

fn until_asleep_where(process: i32, thread: i32, meant: &dyn Fn(i64) -> bool) -> bool {
    let path = format!("/proc/{process}/task/{thread}/syscall");
    let mut before = String::new();
    loop {
        let Ok(now) = std::fs::read_to_string(&path) else { return false };
        let number = now.split(' ').next().and_then(|word| word.parse::<i64>().ok());
        if number.is_some_and(meant) && now == before {
            return true;
        }
        before = now;
        sys::give_way();
    }
}

/// Waits until a word has a value.
pub fn until_word(at: u64, value: u32) {
    while load32(at) != value {
        sys::give_way();
    }
}

/// A file in memory without a name, to gather a transcript in.
pub fn nameless_file() -> OwnedFd {
    let name = c"transcript";
    let fd =
        sys::call(libc::SYS_memfd_create, &[name.as_ptr() as u64, u64::from(libc::MFD_CLOEXEC)]);
    let fd = i32::try_from(fd).unwrap_or(-1);
    assert!(fd >= 0, "memfd_create: {}", show(fd.into()));
    // SAFETY: new, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
