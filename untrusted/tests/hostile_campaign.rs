//! Hostile enclaves by seed against a daemon that serves an honest one all along.
//!
//! `POSTERN_HOSTILE_ROUNDS` sets how many hostile deeds to do, `POSTERN_HOSTILE_SEED` the first
//! seed; a failure prints its seed.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use common::host::InProcess;
use common::{Control, FakeLane, PortParts, direct_io_works, directory};
use postern_edl::calls::{Enclave, PosternStatsRequest};
use postern_edl::port::{Submission, cursor, op};
use postern_hostile::Rng;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;

/// Deeds of a run that says nothing else.
const ROUNDS: u64 = 40;
/// Blocks of each file.
const BLOCKS: u64 = 64;

/// The honest enclave: works on its file and knows what must be in it.
struct Honest {
    lane: FakeLane,
    handle: u32,
    /// The first word of each block.
    model: Vec<u64>,
    done: u64,
}

impl Honest {
    fn new(socket: &Path) -> Self {
        let mut lane = FakeLane::attach(socket, 16, 64 << 10);
        let handle = lane.open("honest").handle;
        let mut honest = Self { lane, handle, model: vec![0; BLOCKS as usize], done: 0 };
        (0..BLOCKS).for_each(|block| honest.write(block, block));
        honest
    }

    fn submission(&mut self, op: u64, block: u64) -> Submission {
        self.done += 1;
        Submission {
            id: self.done << 32 | 3,
            op: u32::try_from(op).unwrap(),
            handle: self.handle,
            offset: block * 4096,
            length: 4096,
            data: self.lane.block(2),
            ..Submission::default()
        }
    }

    fn write(&mut self, block: u64, word: u64) {
        let submission = self.submission(op::WRITE, block);
        self.lane.put(submission.data, word);
        assert_eq!(self.lane.run(submission), 4096, "a write of the honest enclave");
        self.model[usize::try_from(block).unwrap()] = word;
    }

    fn read(&mut self, block: u64) {
        let submission = self.submission(op::READ, block);
        self.lane.put(submission.data, !0);
        assert_eq!(self.lane.run(submission), 4096, "a read of the honest enclave");
        let first = self.model[usize::try_from(block).unwrap()];
        let expected: Vec<u64> = (0..512).map(|i| first.wrapping_add(i)).collect();
        assert_eq!(self.lane.get(submission.data), expected, "block {block}");
    }

    /// Something of everything that it may ask for.
    fn works(&mut self, rng: &mut Rng) {
        let block = rng.below(BLOCKS);
        self.write(block, rng.any());
        self.read(block);
        self.read(rng.below(BLOCKS));
        assert!(self.lane.stats().counters["completions"] > 0);
    }
}

/// A descriptor with one or several fields that may not be.
fn malformed(rng: &mut Rng, lane: &FakeLane, handle: u32) -> Submission {
    let area = lane.block(0);
    let mut sub = Submission {
        id: rng.below(16),
        op: u32::try_from(rng.one_of(&[1, 1, 2, 3, 4])).unwrap(),
        handle,
        offset: rng.below(BLOCKS) * 4096,
        length: 4096,
        data: area + rng.below(4) * 4096,
        ..Submission::default()
    };
    for _ in 0..=rng.below(3) {
        let near = rng.one_of(&[0, 1, 511, 512, 4095, 4096, area, area - 1, 1 << 20, 1 << 40]);
        let value = match rng.below(3) {
            0 => near,
            1 => near.wrapping_neg(),
            _ => rng.any(),
        };
        match rng.below(6) {
            0 => sub.id = value,
            1 => sub.op = value as u32,
            2 => sub.handle = value as u32,
            3 => sub.offset = value,
            4 => sub.length = value,
            _ => sub.data = value,
        }
    }
    sub
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// A control message that is none, or a part of one, or too much of one.
fn message(rng: &mut Rng) -> Vec<u8> {
    let mut words: Vec<u64> = vec![rng.below(12)];
    for _ in 0..rng.below(12) {
        let word = rng.one_of(&[0, 1, 8, 4095, u64::MAX, 1 << 63]);
        words.push(if rng.chance(3000) { rng.any() } else { word });
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    match rng.below(5) {
        0 => bytes.truncate(rng.index(bytes.len()) + 1),
        // One inside the other.
        1 => bytes.extend_from_within(..),
        2 => bytes.resize(1 + rng.index(40_000), 0xa5),
        _ => {}
    }
    bytes
}

/// Sends control messages that make no sense, with descriptors beside them.
fn talks_nonsense(rng: &mut Rng, socket: &Path) {
    let mut control = Control::connect(socket).unwrap();
    for _ in 0..=rng.below(4) {
        control.descriptors = (0..rng.below(17)).map(|_| bell()).collect();
        // Longer than the socket takes, or the daemon has hung up.
        if control.send(&message(rng)).is_err() || control.receive().is_ok_and(|m| m.is_empty()) {
            return;
        }
    }
}

/// Asks and asks, and reads no answer.
fn hears_nothing(rng: &mut Rng, socket: &Path) -> FakeLane {
    let mut lane = FakeLane::attach(socket, 2, 4096);
    let mut bytes = Vec::new();
    // The bytes of a call that has a long answer.
    struct Keep<'a>(&'a mut Vec<u8>);
    impl postern_edl::calls::Carrier for Keep<'_> {
        type Error = ();
        fn call(&mut self, request: &[u8], _: &mut Vec<u8>) -> Result<(), ()> {
            self.0.extend_from_slice(request);
            Err(())
        }
    }
    let _ = Enclave(Keep(&mut bytes)).postern_stats(&PosternStatsRequest { capacity: 1 << 17 });
    rustix::io::ioctl_fionbio(&lane.calls.0.fd, true).unwrap();
    for _ in 0..rng.below(200) {
        if lane.calls.0.send(&bytes).is_err() {
            break;
        }
    }
    lane
}

/// Hangs up and waits until the daemon has released all that was the lane's.
fn leave(mut lane: FakeLane) {
    let control = &mut lane.calls.0;
    rustix::io::ioctl_fionbio(&control.fd, false).unwrap();
    // The daemon may have hung up first.
    let _ = rustix::net::shutdown(&control.fd, rustix::net::Shutdown::Write);
    while control.receive().is_ok_and(|answer| !answer.is_empty()) {}
}

/// One hostile deed. A lane that goes on being a burden for a while is handed back.
fn deed(rng: &mut Rng, socket: &Path) -> Option<FakeLane> {
    match rng.below(9) {
        0 | 1 => talks_nonsense(rng, socket),
        2 => return Some(hears_nothing(rng, socket)),
        3 => {
            // Attaches until it is refused, or has had enough.
            let lane = FakeLane::attach(socket, 2, 4096);
            let (session, token) = (lane.attached.session, lane.attached.token);
            let more: Vec<_> = (0..rng.below(12))
                .map(|_| FakeLane::join(socket, 2, 4096, session, token))
                .collect();
            assert!(FakeLane::join(socket, 2, 4096, session, [token[0], !token[1]]).is_err());
            drop(more);
            return Some(lane);
        }
        4 => {
            // Wrong descriptors, in the wrong order, too few.
            let parts = PortParts::new(4, 8192);
            let mut calls = Enclave(Control::connect(socket).unwrap());
            let mut descriptors = parts.descriptors();
            match rng.below(3) {
                0 => descriptors.truncate(rng.index(4)),
                1 => descriptors.swap(0, 1 + rng.index(3)),
                _ => descriptors[rng.index(4)] = std::fs::File::open("/dev/null").unwrap().into(),
            }
            calls.0.descriptors = descriptors;
            let mut request = parts.request();
            request.port_bytes = rng.one_of(&[request.port_bytes, 0, 4096, u64::MAX]);
            let _ = calls.postern_attach(&request);
        }
        kind => {
            let mut lane = FakeLane::attach(socket, 16, 64 << 10);
            let handle = lane.open("hostile").handle;
            for _ in 0..=rng.below(3) {
                let subs: Vec<_> =
                    (0..=rng.below(15)).map(|_| malformed(rng, &lane, handle)).collect();
                lane.submit(&subs);
            }
            match kind {
                5 => {
                    let to = rng.one_of(&[u64::MAX, 0, 1 << 63, lane.sq_published + 17]);
                    lane.publish_cursor(to);
                }
                // Any word below the transfer area, the header's too, while the daemon works.
                6 => {
                    let words = usize::try_from(lane.block(0)).unwrap() / 8;
                    for _ in 0..rng.below(2000) {
                        lane.region.word(rng.index(words)).store(rng.any(), Ordering::Relaxed);
                    }
                }
                // The memory behind the region is taken away and comes back as zeros.
                7 => {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let bytes = lane.region.geometry().region_bytes() as u64;
                    rustix::fs::fallocate(&lane.parts.memory, flags, 0, bytes).unwrap();
                }
                // A doorbell that blocks whoever rings it.
                _ => {
                    let doorbell = &lane.parts.driver;
                    rustix::io::write(doorbell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
                    let flags = rustix::fs::fcntl_getfl(doorbell).unwrap();
                    let blocking = flags - rustix::fs::OFlags::NONBLOCK;
                    rustix::fs::fcntl_setfl(doorbell, blocking).unwrap();
                    lane.region.word(cursor::DRIVER_SLEEPS).store(1, Ordering::SeqCst);
                    lane.publish_cursor(lane.sq_published);
                }
            }
            return Some(lane);
        }
    }
    None
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_hostile_enclave_keeps_the_daemon_from_serving_an_honest_one() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    for name in ["honest", "hostile", "untouched"] {
        std::fs::write(dir.path().join(name), vec![0x5a; BLOCKS as usize * 4096]).unwrap();
    }
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut honest = Honest::new(&daemon.socket);
    let seed = number("POSTERN_HOSTILE_SEED").unwrap_or(1);
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut burdens: Vec<FakeLane> = Vec::new();
    for _ in 0..number("POSTERN_HOSTILE_ROUNDS").unwrap_or(ROUNDS) {
        // Files and lanes of the ones before are theirs until they are gone.
        burdens.drain(..).for_each(leave);
        burdens.extend(deed(&mut rng, &daemon.socket));
        honest.works(&mut rng);
    }
    burdens.drain(..).for_each(leave);
    let Honest { lane, model, .. } = honest;
    lane.end();
    daemon.stop().unwrap();
    let bytes = std::fs::read(dir.path().join("honest")).unwrap();
    for (block, first) in bytes.chunks_exact(4096).zip(model) {
        assert_eq!(block[..8], first.to_ne_bytes());
    }
    let untouched = std::fs::read(dir.path().join("untouched")).unwrap();
    assert!(untouched.iter().all(|&byte| byte == 0x5a));
}
