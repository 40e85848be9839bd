//! What one session may take, and that the others are served meanwhile.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::host::InProcess;
use common::{FakeLane, direct_io_works, directory, now_ns};
use postern_edl::calls::CallError;
use postern_edl::port::{Submission, op};

const EMFILE: u32 = 24;
const ENOBUFS: u32 = 105;

fn zeros(directory: &Path, name: &str, bytes: u64) {
    let file = std::fs::File::create(directory.join(name)).unwrap();
    file.set_len(bytes).unwrap();
    // O_DIRECT reads of written blocks reach the disk; of holes they would not.
    std::fs::write(directory.join(name), vec![0; usize::try_from(bytes).unwrap()]).unwrap();
}

fn read(lane: &FakeLane, index: u64, handle: u32, length: u64) -> Submission {
    let data = lane.block(0) + index * length;
    Submission {
        id: index,
        op: op::READ as u32,
        handle,
        offset: index * length,
        length,
        data,
        ..Submission::default()
    }
}

#[test]
fn a_session_at_its_limit_of_lanes_is_refused_and_what_ends_makes_room() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &["--session-lanes", "7"]);
    let first = FakeLane::attach(&daemon.socket, 2, 4096);
    let (session, token) = (first.attached.session, first.attached.token);
    let join = || FakeLane::join(&daemon.socket, 2, 4096, session, token);
    let mut lanes = vec![first];
    lanes.extend((1..7).map(|_| join().expect("below the limit")));
    assert_eq!(join().err(), Some(CallError::Refused(EMFILE)));
    // Another session has its own.
    let other = FakeLane::attach(&daemon.socket, 2, 4096);
    let row = lanes[0].stats().each_session[0].clone();
    assert_eq!((row.session, row.lanes, row.refused), (session, 7, 1));
    assert_eq!(u32::try_from(row.process), Ok(std::process::id()));
    let freed = lanes.swap_remove(5);
    let number = freed.attached.lane;
    freed.end();
    assert_eq!(join().unwrap().attached.lane, number, "the lowest free number");
    drop((lanes, other));
    daemon.stop().unwrap();
}

#[test]
fn a_session_at_its_limit_of_memory_is_refused_a_lane_and_keeps_what_it_has() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &["--session-memory", "3M"]);
    let mut first = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let (session, token) = (first.attached.session, first.attached.token);
    let join = |bytes| FakeLane::join(&daemon.socket, 64, bytes, session, token);
    let second = join(1 << 20).unwrap();
    assert_eq!(join(1 << 20).err(), Some(CallError::Refused(ENOBUFS)));
    let small = join(256 << 10).expect("what fits");
    let ports: usize =
        [&first, &second, &small].map(|l| l.region.geometry().region_bytes()).iter().sum();
    assert_eq!(first.stats().each_session[0].memory_bytes, ports as u64);
    second.end();
    join(1 << 20).unwrap();
    drop((first, small));
    daemon.stop().unwrap();
}

#[test]
fn a_session_at_its_limit_of_files_is_refused_until_it_closes_one() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    for name in ["a", "b", "c"] {
        zeros(dir.path(), name, 8192);
    }
    let root = dir.path().to_str().unwrap();
    let daemon = InProcess::start(dir.path(), &["--root", root, "--session-files", "2"]);
    let mut lane = FakeLane::attach(&daemon.socket, 2, 4096);
    let a = lane.open("a").handle;
    lane.open("b");
    assert_eq!(lane.try_open("c", 0).err(), Some(CallError::Refused(EMFILE)));
    assert_eq!(lane.open("a").handle, a, "the same file again is no further one");
    assert_eq!(lane.stats().each_session[0].files, 2);
    lane.close(a).unwrap();
    lane.close(a).unwrap();
    lane.open("c");
    drop(lane);
    daemon.stop().unwrap();
}

/// The rate's lower bound on the time is the test: a slow machine only takes longer.
#[test]
fn a_session_above_its_rate_is_slowed_down_and_loses_nothing() {
    const REQUESTS: u64 = 256;
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    zeros(dir.path(), "v", REQUESTS * 4096);
    let root = dir.path().to_str().unwrap();
    // 1000 requests of 4096 bytes in a second, by one limit or the other.
    for limit in [["--session-iops", "1000"], ["--session-bandwidth", "4000K"]] {
        let daemon = InProcess::start(dir.path(), &["--root", root, limit[0], limit[1]]);
        let mut lane = FakeLane::attach(&daemon.socket, 256, 1 << 20);
        let handle = lane.open("v").handle;
        let began = now_ns();
        let all: Vec<_> = (0..REQUESTS).map(|n| read(&lane, n, handle, 4096)).collect();
        lane.submit(&all);
        let mut done = lane.wait(all.len());
        let took = now_ns() - began;
        done.sort_by_key(|completion| completion.id);
        assert!(done.iter().zip(0..).all(|(c, n)| (c.id, c.result) == (n, 4096)), "{done:?}");
        // 100 ms ahead, and one batch of 32 that is paid for afterwards.
        assert!(took >= 120_000_000, "{limit:?}: {took} ns");
        let row = lane.stats().each_session[0].clone();
        assert_eq!((row.requests, row.bytes), (REQUESTS, REQUESTS * 4096));
        // At its leisure: nothing is held for ever.
        assert_eq!(lane.run(read(&lane, 3, handle, 4096)), 4096);
        drop(lane);
        daemon.stop().unwrap();
    }
}

#[test]
fn a_session_at_depth_512_keeps_no_other_from_being_served() {
    const LENGTH: u64 = 128 << 10;
    const DEPTH: u64 = 512;
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    zeros(dir.path(), "greedy", DEPTH * LENGTH);
    zeros(dir.path(), "modest", 64 * 4096);
    let root = dir.path().to_str().unwrap();
    let daemon = InProcess::start(dir.path(), &["--root", root]);
    let mut greedy = FakeLane::attach(&daemon.socket, 512, 64 << 20);
    let mut modest = FakeLane::attach(&daemon.socket, 2, 4096);
    let (all, one) = (greedy.open("greedy").handle, modest.open("modest").handle);
    let full: Vec<_> = (0..DEPTH).map(|n| read(&greedy, n, all, LENGTH)).collect();
    greedy.submit(&full);
    let mut taken = Vec::new();
    for n in 0..64 {
        let read = Submission { id: 0, offset: n * 4096, ..read(&modest, 0, one, 4096) };
        assert_eq!(modest.run(read), 4096);
        // The greedy one has 512 requests in its ring all the time.
        greedy.take(&mut taken);
        let again: Vec<_> = taken.drain(..).map(|done| full[done.id as usize]).collect();
        greedy.submit(&again);
        if n % 16 == 0 {
            let under_way = modest.stats().each_session[0].in_flight_bytes;
            assert!(under_way <= 16 << 20, "{under_way} bytes under way");
        }
    }
    let rows = modest.stats().each_session;
    assert_eq!((rows[1].held_depth, rows[1].held_rate), (0, 0), "{rows:?}");
    drop((greedy, modest));
    daemon.stop().unwrap();
}
