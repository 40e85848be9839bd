//! A hostile enclave reaches nothing but its own lane.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use common::host::InProcess;
use common::{Control, FakeLane, PortParts, direct_io_works, directory};
use postern_edl::calls::{CallError, Enclave};
use postern_edl::port::{Submission, cursor, op};
use rustix::event::{EventfdFlags, eventfd};

const EINVAL: i64 = -22;
const EBADF: i64 = -9;

/// A file whose block `n` begins with the word `n`.
fn disk(directory: &std::path::Path, name: &str) {
    let bytes: Vec<u8> = (0..64u64).flat_map(|n| [n; 512]).flat_map(u64::to_ne_bytes).collect();
    std::fs::write(directory.join(name), bytes).unwrap();
}

/// One request that must work, to see that daemon and lane live.
fn works(lane: &mut FakeLane, handle: u32) {
    let data = lane.block(0);
    let read = Submission {
        id: 1,
        op: op::READ as u32,
        handle,
        offset: 5 * 4096,
        length: 4096,
        data,
        ..Submission::default()
    };
    lane.put(data, 77);
    assert_eq!(lane.run(read), 4096);
    assert_eq!(lane.get(data), [5; 512]);
}

#[test]
fn every_malformed_descriptor_is_refused_and_harms_nobody() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "mine");
    disk(dir.path(), "theirs");
    let theirs = std::fs::read(dir.path().join("theirs")).unwrap();
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut victim = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let victims = victim.open("theirs").handle;
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    // So that the handle of the victim's session is none of this one's.
    let spare = lane.open("mine").handle;
    lane.close(spare).unwrap();
    let handle = lane.open("mine").handle;
    assert_ne!(handle, victims);
    let end = lane.region.geometry().region_bytes() as u64;
    let good = Submission {
        id: 2,
        op: op::WRITE as u32,
        handle,
        offset: 4096,
        length: 4096,
        data: lane.block(0),
        ..Submission::default()
    };
    let flush = Submission { op: 3, offset: 0, length: 0, data: 0, ..good };
    let table = [
        (Submission { op: 0, ..good }, EINVAL),
        (Submission { op: 4, ..good }, EINVAL),
        (Submission { op: u32::MAX, ..good }, EINVAL),
        (Submission { handle: 0, ..good }, EBADF),
        (Submission { handle: spare, ..good }, EBADF),
        (Submission { handle: victims, ..good }, EBADF),
        (Submission { handle: u32::MAX, ..good }, EBADF),
        (Submission { offset: 512, ..good }, EINVAL),
        (Submission { offset: u64::MAX - 4095, ..good }, EINVAL),
        (Submission { offset: i64::MAX as u64 & !4095, ..good }, EINVAL),
        (Submission { length: 0, ..good }, EINVAL),
        (Submission { length: 512, ..good }, EINVAL),
        (Submission { length: 2 << 20, ..good }, EINVAL),
        (Submission { length: !4095, ..good }, EINVAL),
        (Submission { data: 0, ..good }, EINVAL),
        (Submission { data: 4096, ..good }, EINVAL),
        (Submission { data: end - 4096, length: 8192, ..good }, EINVAL),
        (Submission { data: end, ..good }, EINVAL),
        (Submission { data: !4095, ..good }, EINVAL),
        (Submission { data: good.data + 8, ..good }, EINVAL),
        (Submission { offset: 4096, ..flush }, EINVAL),
        (Submission { length: 4096, ..flush }, EINVAL),
        (Submission { data: lane.block(0), ..flush }, EINVAL),
        (Submission { handle: victims, ..flush }, EBADF),
    ];
    for (hostile, errno) in table {
        assert_eq!(lane.run(hostile), errno, "{hostile:?}");
        works(&mut lane, handle);
    }
    assert_eq!(lane.stats().counters["refused_descriptors"], table.len() as u64);
    works(&mut victim, victims);
    drop((lane, victim));
    daemon.stop().unwrap();
    assert_eq!(std::fs::read(dir.path().join("theirs")).unwrap(), theirs);
}

#[test]
fn a_broken_ring_ends_its_lane_and_no_other() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "mine");
    disk(dir.path(), "theirs");
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut victim = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let victims = victim.open("theirs").handle;
    let flush = |id, handle| Submission { id, op: 3, handle, ..Submission::default() };
    type Break = fn(&mut FakeLane, Submission);
    let breaks: [Break; 5] = [
        |lane, _| lane.publish_cursor(lane.sq_published + 65),
        |lane, _| lane.publish_cursor(u64::MAX),
        |lane, flush| lane.submit(&[Submission { id: 64, ..flush }]),
        |lane, flush| lane.submit(&[Submission { id: u64::MAX, ..flush }]),
        // The same index twice at once, whatever generation it claims.
        |lane, flush| lane.submit(&[flush, Submission { id: flush.id | 1 << 32, ..flush }]),
    ];
    for (n, harm) in breaks.into_iter().enumerate() {
        let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
        let handle = lane.open("mine").handle;
        works(&mut lane, handle);
        harm(&mut lane, flush(7, handle));
        assert_eq!(lane.calls.0.receive(), Ok(Vec::new()), "break {n}: the daemon hangs up");
        works(&mut victim, victims);
        // Everything of the lane is released once its connection is closed.
        let mut next = FakeLane::attach(&daemon.socket, 64, 1 << 20);
        assert!(next.try_open("mine", 0).is_ok(), "break {n}");
        next.end();
    }
    assert_eq!(victim.stats().counters["broken_rings"], 5);
    drop(victim);
    daemon.stop().unwrap();
}

/// A request that shares a slot of the ring with nothing and is rewritten while the daemon looks
/// is decided on one copy: whatever it takes, the file's other blocks stay.
#[test]
fn descriptors_rewritten_all_the_time_never_reach_beyond_what_the_checks_allow() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "mine");
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut lane = FakeLane::attach(&daemon.socket, 2, 8192);
    let handle = lane.open("mine").handle;
    // Word 2, the offset, flips between block 0 and an unaligned place inside block 1.
    let good = Submission {
        id: 1,
        op: op::WRITE as u32,
        handle,
        offset: 0,
        length: 4096,
        data: lane.block(0),
        ..Submission::default()
    };
    for round in 0..300u64 {
        let at = lane.region.geometry().sqe_word(lane.sq_published) + 2;
        lane.submit(&[Submission { id: round << 32 | 1, ..good }]);
        while lane.region.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire) == lane.cq_taken {
            lane.region.word(at).store(6144, Ordering::Relaxed);
            lane.region.word(at).store(0, Ordering::Relaxed);
            if lane.region.word(cursor::SQ_TAKEN).load(Ordering::Acquire) == lane.sq_published {
                break;
            }
        }
        let result = lane.wait(1)[0].result;
        assert!(result == 4096 || result == EINVAL, "{result}");
    }
    drop(lane);
    daemon.stop().unwrap();
    let bytes = std::fs::read(dir.path().join("mine")).unwrap();
    let word = |n: usize| u64::from_ne_bytes(bytes[n * 8..n * 8 + 8].try_into().unwrap());
    assert!((1..64).all(|block| (0..512).all(|i| word(block * 512 + i) == block as u64)));
}

#[test]
fn an_attach_with_wrong_descriptors_is_refused() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    let not_a_bell: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let file: OwnedFd = tempfile::tempfile_in(dir.path()).unwrap().into();
    let swap = |at: usize, with: &OwnedFd| {
        let parts = PortParts::new(64, 1 << 20);
        let mut descriptors = parts.descriptors();
        descriptors[at] = with.try_clone().unwrap();
        (parts, descriptors)
    };
    let table = [
        swap(0, &file),
        swap(0, &not_a_bell),
        swap(1, &not_a_bell),
        swap(2, &file),
        swap(3, &not_a_bell),
        {
            let parts = PortParts::new(64, 1 << 20);
            let mut descriptors = parts.descriptors();
            descriptors.pop();
            (parts, descriptors)
        },
        (PortParts::new(64, 1 << 20), Vec::new()),
    ];
    for (n, (parts, descriptors)) in table.into_iter().enumerate() {
        let mut calls = Enclave(Control::connect(&daemon.socket).unwrap());
        calls.0.descriptors = descriptors;
        let answer = calls.postern_attach(&parts.request());
        assert!(matches!(answer, Err(CallError::Refused(22))), "case {n}: EINVAL, {answer:?}");
        // The connection is still good for a proper attach.
        let parts = PortParts::new(64, 1 << 20);
        calls.0.descriptors = parts.descriptors();
        calls.postern_attach(&parts.request()).unwrap();
    }
    let parts = PortParts::new(64, 1 << 20);
    let mut calls = Enclave(Control::connect(&daemon.socket).unwrap());
    calls.0.descriptors = parts.descriptors();
    let mut request = parts.request();
    request.version += 1;
    let answer = calls.postern_attach(&request);
    assert!(matches!(answer, Err(CallError::Refused(93))), "EPROTONOSUPPORT: {answer:?}");
    daemon.stop().unwrap();
}

#[test]
fn malformed_oversized_and_descriptor_laden_messages_end_only_their_connection() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    let mut good = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let bell = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let table: [(Vec<u8>, usize); 6] = [
        (vec![1], 0),
        (vec![0; 8], 0),
        (vec![0xff; 64], 0),
        (4u64.to_le_bytes().to_vec(), 0),
        (vec![0; 20_000], 0),
        (3u64.to_le_bytes().repeat(2), 9),
    ];
    for (bytes, descriptors) in table {
        let mut control = Control::connect(&daemon.socket).unwrap();
        control.descriptors = (0..descriptors).map(|_| bell()).collect();
        control.send(&bytes).unwrap();
        assert_eq!(control.receive(), Ok(Vec::new()), "{} bytes, {descriptors} fds", bytes.len());
    }
    // Descriptors with a call that takes none: refused, the connection stays.
    good.calls.0.descriptors = vec![bell()];
    assert!(matches!(good.close(1), Err(CallError::Refused(22))), "EINVAL");
    assert!(matches!(good.close(1), Err(CallError::Refused(9))), "EBADF");
    // Calls that need a lane, on a connection without one.
    let mut bare = Enclave(Control::connect(&daemon.socket).unwrap());
    let open = postern_edl::calls::PosternOpenRequest { name: "x".into(), ..Default::default() };
    assert!(matches!(bare.postern_open(&open), Err(CallError::Refused(107))), "ENOTCONN");
    assert_eq!(good.stats().counters["refused_connections"], 6);
    drop(good);
    daemon.stop().unwrap();
}

/// write(2) to an eventfd whose counter is full blocks unless O_NONBLOCK is set, and the enclave,
/// which shares the open file, can take that flag off.
#[test]
fn a_lane_held_in_a_full_doorbell_is_released_when_its_connection_closes() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "mine");
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let handle = lane.open("mine").handle;
    let bell = lane.parts.driver.try_clone().unwrap();
    rustix::io::write(&bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = rustix::fs::fcntl_getfl(&bell).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    rustix::fs::fcntl_setfl(&bell, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    lane.region.word(cursor::DRIVER_SLEEPS).store(1, Ordering::SeqCst);
    lane.submit(&[Submission { id: 1, op: 3, handle, ..Submission::default() }]);
    while lane.region.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire) == 0 {
        std::thread::yield_now();
    }
    lane.end();
    let mut next = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    assert!(next.try_open("mine", 0).is_ok());
    drop(next);
    daemon.stop().unwrap();
}
