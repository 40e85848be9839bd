//! A fake enclave: attaches over the real socket with a real memfd and drives the rings, sealing
//! nothing. What it can do wrong on purpose, the tests do.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it")]

pub mod host;

use std::io::{IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use postern_edl::VERSION;
use postern_edl::calls::{
    CallError, Carrier, Enclave, PosternAttachRequest, PosternAttached, PosternCloseRequest,
    PosternFile, PosternMeasuredRequest, PosternOpenRequest, PosternStatsRequest,
};
use postern_edl::port::{self, Completion, Geometry, Submission, cursor, header};
use posternd::region::Region;
use posternd::stats::StatsReport;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Says why a test does not run, past the test harness, which would keep it for itself.
pub fn skip(why: &str) {
    let test = std::thread::current();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {why}", test.name().unwrap_or("test"));
}

/// A blocking control connection.
pub struct Control {
    pub fd: OwnedFd,
    /// Sent with the next message.
    pub descriptors: Vec<OwnedFd>,
}

impl Control {
    pub fn connect(path: &Path) -> Result<Self, Errno> {
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self { fd, descriptors: Vec::new() })
    }

    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = std::mem::take(&mut self.descriptors);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        rustix::net::sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Empty when the daemon closed the connection.
    pub fn receive(&mut self) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; 256 << 10];
        let mut none = RecvAncillaryBuffer::new(&mut []);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(&self.fd, parts, &mut none, RecvFlags::empty()) {
            Ok(message) => {
                let length = message.bytes;
                bytes.truncate(length);
                Ok(bytes)
            }
            Err(Errno::CONNRESET) => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }
}

impl Carrier for Control {
    type Error = Errno;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        self.send(request)?;
        *reply = self.receive()?;
        if reply.is_empty() { Err(Errno::CONNRESET) } else { Ok(()) }
    }
}

/// A port's memory and doorbells, not yet attached.
pub struct PortParts {
    pub memory: OwnedFd,
    pub geometry: Geometry,
    pub doorbell: OwnedFd,
    pub driver: OwnedFd,
    pub service: OwnedFd,
}

impl PortParts {
    pub fn new(entries: usize, data_bytes: usize) -> Self {
        let geometry = Geometry::new(entries, data_bytes).unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("port", flags).unwrap();
        rustix::fs::ftruncate(&memory, geometry.region_bytes() as u64).unwrap();
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        for (word, value) in [
            (header::MAGIC, port::MAGIC),
            (header::VERSION, 1),
            (header::ENTRIES, entries as u64),
            (header::DATA_OFFSET, geometry.data_offset as u64),
            (header::DATA_BYTES, data_bytes as u64),
        ] {
            rustix::io::pwrite(&memory, &value.to_ne_bytes(), word as u64 * 8).unwrap();
        }
        let bell = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Self { memory, geometry, doorbell: bell(), driver: bell(), service: bell() }
    }

    pub fn descriptors(&self) -> Vec<OwnedFd> {
        [&self.memory, &self.doorbell, &self.driver, &self.service]
            .map(|fd| fd.try_clone().unwrap())
            .into()
    }

    pub fn request(&self) -> PosternAttachRequest {
        PosternAttachRequest {
            version: VERSION,
            port_bytes: self.geometry.region_bytes() as u64,
            ..PosternAttachRequest::default()
        }
    }
}

/// An attached lane, seen from the enclave.
pub struct FakeLane {
    pub calls: Enclave<Control>,
    pub attached: PosternAttached,
    pub region: Region,
    pub parts: PortParts,
    pub sq_published: u64,
    pub cq_taken: u64,
}

impl FakeLane {
    /// Attaches a new session.
    pub fn attach(socket: &Path, entries: usize, data_bytes: usize) -> Self {
        Self::join(socket, entries, data_bytes, 0, [0; 2]).expect("attach")
    }

    /// Attaches a new session that had handles up to `handles` at a daemon before.
    pub fn go_on(socket: &Path, entries: usize, data_bytes: usize, handles: u32) -> Self {
        Self::attach_by(socket, entries, data_bytes, |request| request.handles = handles)
            .expect("attach")
    }

    /// Attaches a lane to a session.
    pub fn join(
        socket: &Path,
        entries: usize,
        data_bytes: usize,
        session: u64,
        token: [u64; 2],
    ) -> Result<Self, CallError<Errno>> {
        Self::attach_by(socket, entries, data_bytes, |request| {
            (request.session, request.token) = (session, token);
        })
    }

    fn attach_by(
        socket: &Path,
        entries: usize,
        data_bytes: usize,
        say: impl FnOnce(&mut PosternAttachRequest),
    ) -> Result<Self, CallError<Errno>> {
        let parts = PortParts::new(entries, data_bytes);
        let mut calls = Enclave(Control::connect(socket).expect("connect"));
        calls.0.descriptors = parts.descriptors();
        let mut request = parts.request();
        say(&mut request);
        let attached = calls.postern_attach(&request)?.attached;
        let region = Region::map(&parts.memory, parts.geometry.region_bytes() as u64).unwrap();
        Ok(Self { calls, attached, region, parts, sq_published: 0, cq_taken: 0 })
    }

    /// Says goodbye and waits until the daemon has released everything.
    pub fn end(mut self) {
        rustix::net::shutdown(&self.calls.0.fd, rustix::net::Shutdown::Write).unwrap();
        assert_eq!(self.calls.0.receive(), Ok(Vec::new()));
    }

    pub fn open(&mut self, name: &str) -> PosternFile {
        self.try_open(name, 0).expect("open")
    }

    pub fn open_again(&mut self, name: &str, handle: u32) -> Result<PosternFile, CallError<Errno>> {
        let request = PosternOpenRequest { name: name.to_owned(), flags: 0, handle };
        Ok(self.calls.postern_open(&request)?.file)
    }

    pub fn try_open(&mut self, name: &str, flags: u32) -> Result<PosternFile, CallError<Errno>> {
        let request = PosternOpenRequest { name: name.to_owned(), flags, handle: 0 };
        Ok(self.calls.postern_open(&request)?.file)
    }

    pub fn close(&mut self, handle: u32) -> Result<(), CallError<Errno>> {
        self.calls.postern_close(&PosternCloseRequest { handle }).map(|_| ())
    }

    pub fn stats(&mut self) -> StatsReport {
        let reply = self.calls.postern_stats(&PosternStatsRequest { capacity: 1 << 17 }).unwrap();
        assert_eq!(reply.length, reply.text.len() as u64);
        serde_json::from_slice(&reply.text).unwrap()
    }

    /// All items of `what`, as the daemon pages them.
    pub fn measured(&mut self, what: u32, least_ns: u64, one_in: u64) -> Vec<serde_json::Value> {
        let (mut all, mut first) = (Vec::new(), 0);
        loop {
            let request =
                PosternMeasuredRequest { what, first, least_ns, one_in, capacity: 1 << 17 };
            let reply = self.calls.postern_measured(&request).unwrap();
            let mut page: serde_json::Value = serde_json::from_slice(&reply.text).unwrap();
            all.append(page["items"].as_array_mut().unwrap());
            first = page["next"].as_u64().unwrap();
            if first == 0 {
                return all;
            }
        }
    }

    /// Says that the enclave has the answer to a request of this index now.
    pub fn deliver(&self, index: usize) {
        let stamp = self.region.geometry().stamp_word(index);
        self.region.word(stamp).store(posternd::engine::now_ns(), Ordering::Relaxed);
    }

    /// Byte offset of the `n`th 4096-byte block of the transfer area.
    pub fn block(&self, n: usize) -> u64 {
        (self.region.geometry().data_offset + n * 4096) as u64
    }

    pub fn put(&self, data: u64, word: u64) {
        for i in 0..512 {
            self.region
                .word(data as usize / 8 + i)
                .store(word.wrapping_add(i as u64), Ordering::Relaxed);
        }
    }

    pub fn get(&self, data: u64) -> Vec<u64> {
        (0..512).map(|i| self.region.word(data as usize / 8 + i).load(Ordering::Relaxed)).collect()
    }

    /// Publishes descriptors and rings if the daemon sleeps.
    pub fn submit(&mut self, submissions: &[Submission]) {
        for submission in submissions {
            let at = self.region.geometry().sqe_word(self.sq_published);
            for (i, word) in submission.to_words().into_iter().enumerate() {
                self.region.word(at + i).store(word, Ordering::Relaxed);
            }
            self.sq_published += 1;
        }
        self.publish_cursor(self.sq_published);
    }

    pub fn publish_cursor(&self, value: u64) {
        self.region.word(cursor::SQ_PUBLISHED).store(value, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.region.word(cursor::DAEMON_SLEEPS).load(Ordering::Relaxed) != 0 {
            rustix::io::write(&self.parts.doorbell, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Takes what is there.
    pub fn take(&mut self, into: &mut Vec<Completion>) {
        let published = self.region.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire);
        while self.cq_taken != published {
            let at = self.region.geometry().cqe_word(self.cq_taken);
            let words = std::array::from_fn(|i| self.region.word(at + i).load(Ordering::Relaxed));
            into.push(Completion::from_words(words));
            self.cq_taken += 1;
        }
        self.region.word(cursor::CQ_TAKEN).store(self.cq_taken, Ordering::Release);
    }

    /// Sleeps on doorbell A until a completion is there.
    pub fn sleep(&self) {
        self.sleep_as(cursor::DRIVER_SLEEPS, &self.parts.driver);
    }

    /// Sleeps on `bell`, announced in word `flag`, until a completion is there.
    pub fn sleep_as(&self, flag: usize, bell: &OwnedFd) {
        self.region.word(flag).store(1, Ordering::Relaxed);
        loop {
            fence(Ordering::SeqCst);
            if self.region.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire) != self.cq_taken {
                break;
            }
            let patience = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
            let rung = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&patience)).unwrap();
            assert_eq!(rung, 1, "no doorbell within 20 s");
            rustix::io::read(bell, &mut [0u8; 8]).unwrap();
        }
        self.region.word(flag).store(0, Ordering::Relaxed);
    }

    /// Waits for `count` completions.
    pub fn wait(&mut self, count: usize) -> Vec<Completion> {
        let mut done = Vec::new();
        loop {
            self.take(&mut done);
            if done.len() >= count {
                return done;
            }
            self.sleep();
        }
    }

    /// Submits one descriptor and answers its result.
    pub fn run(&mut self, submission: Submission) -> i64 {
        self.submit(&[submission]);
        let done = self.wait(1);
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].id, submission.id);
        done[0].result
    }
}

/// CLOCK_MONOTONIC nanoseconds.
pub fn now_ns() -> u64 {
    posternd::engine::now_ns()
}

/// A directory on the file system of the build, which usually takes O_DIRECT.
pub fn directory() -> tempfile::TempDir {
    let near = option_env!("CARGO_TARGET_TMPDIR").unwrap_or(".");
    tempfile::tempdir_in(near).unwrap()
}

/// Whether files in `directory` take O_DIRECT; says loudly when a test skips for lack of it.
pub fn direct_io_works(directory: &Path) -> bool {
    use rustix::fs::{Mode, OFlags};
    let path = directory.join("probe");
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT;
    let works = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).is_ok()
        && rustix::fs::statfs(directory).unwrap().f_type != 0x0102_1994;
    let _ = std::fs::remove_file(&path);
    if !works {
        let directory = directory.display();
        skip(&format!("{directory} does not take O_DIRECT; set CARGO_TARGET_DIR to a disk"));
    }
    works
}
