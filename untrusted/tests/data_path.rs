//! The data path end to end: a fake enclave, the real socket, real memory, real native AIO.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;

use common::host::InProcess;
use common::{FakeLane, direct_io_works, directory, now_ns, skip};
use postern_edl::calls::CallError;
use postern_edl::port::{Submission, cursor, op};
use posternd::engine::Interface;

const FILE_BLOCKS: u64 = 256;

/// A file whose word `i` is `i`.
fn numbered(path: &std::path::Path) {
    let bytes: Vec<u8> = (0..FILE_BLOCKS * 512).flat_map(u64::to_ne_bytes).collect();
    std::fs::write(path, bytes).unwrap();
}

fn read(id: u64, handle: u32, block: u64, data: u64) -> Submission {
    Submission {
        id,
        op: op::READ as u32,
        handle,
        offset: block * 4096,
        length: 4096,
        data,
        enqueued_ns: now_ns(),
        ..Submission::default()
    }
}

fn write(id: u64, handle: u32, block: u64, data: u64) -> Submission {
    Submission { op: op::WRITE as u32, ..read(id, handle, block, data) }
}

fn flush(id: u64, handle: u32) -> Submission {
    let op = op::FLUSH as u32;
    Submission { id, op, handle, enqueued_ns: now_ns(), ..Submission::default() }
}

/// Runs a test with each of the kernel's interfaces that this process may use.
fn with_each_engine(test: impl Fn(&str)) {
    test("--engine=libaio");
    match posternd::engine::probe(Interface::Uring) {
        Ok(()) => test("--engine=io_uring"),
        Err(e) => skip(&format!("io_uring is not to be had here ({e})")),
    }
}

#[test]
fn what_is_written_is_in_the_file_and_what_is_read_comes_from_it() {
    with_each_engine(|engine| {
        let dir = directory();
        if !direct_io_works(dir.path()) {
            return;
        }
        let path = dir.path().join("disk");
        numbered(&path);
        let daemon =
            InProcess::start(dir.path(), &[engine, "--root", dir.path().to_str().unwrap()]);
        let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
        let file = lane.open("disk");
        assert_eq!((file.blocks, file.flags), (FILE_BLOCKS, 0));
        assert!(file.alignment.is_power_of_two() && file.alignment <= 4096, "{file:?}");

        let data = lane.block(3);
        assert_eq!(lane.run(read(7, file.handle, 100, data)), 4096);
        assert_eq!(lane.get(data), (51200..51712).collect::<Vec<u64>>());

        lane.put(data, 1 << 60);
        assert_eq!(lane.run(write(1 << 32 | 7, file.handle, 5, data)), 4096);
        assert_eq!(lane.run(flush(8, file.handle)), 0);
        let bytes = std::fs::read(&path).unwrap();
        let word = |n: usize| u64::from_ne_bytes(bytes[n * 8..n * 8 + 8].try_into().unwrap());
        assert_eq!((word(5 * 512), word(5 * 512 + 511)), (1 << 60, (1 << 60) + 511));
        assert_eq!(
            (word(5 * 512 - 1), word(6 * 512)),
            (2559, 3072),
            "the neighbours are untouched"
        );

        // At the end of the file the kernel answers what pread(2) would: fewer bytes, then none.
        let two = Submission { length: 8192, ..read(9, file.handle, FILE_BLOCKS - 1, data) };
        assert_eq!(lane.run(two), 4096);
        assert_eq!(lane.run(read(9, file.handle, FILE_BLOCKS, data)), 0);
        drop(lane);
        daemon.stop().unwrap();
    });
}

#[test]
fn a_full_ring_of_requests_completes_each_once_over_and_over() {
    with_each_engine(|engine| {
        let dir = directory();
        if !direct_io_works(dir.path()) {
            return;
        }
        numbered(&dir.path().join("disk"));
        let daemon =
            InProcess::start(dir.path(), &[engine, "--root", dir.path().to_str().unwrap()]);
        let mut lane = FakeLane::attach(&daemon.socket, 64, 64 * 4096);
        let handle = lane.open("disk").handle;
        for generation in 0..50u64 {
            let blocks: Vec<u64> =
                (0..64).map(|i| (i * 37 + generation * 11) % FILE_BLOCKS).collect();
            let requests: Vec<_> = blocks
                .iter()
                .enumerate()
                .map(|(i, &block)| read(generation << 32 | i as u64, handle, block, lane.block(i)))
                .collect();
            lane.submit(&requests);
            let mut done = lane.wait(64);
            done.sort_unstable_by_key(|c| c.id);
            let expected: Vec<_> = requests.iter().map(|r| (r.id, 4096)).collect();
            assert_eq!(done.iter().map(|c| (c.id, c.result)).collect::<Vec<_>>(), expected);
            for (i, block) in blocks.iter().enumerate() {
                assert_eq!(lane.get(lane.block(i))[0], block * 512);
            }
            assert!(done.iter().all(|c| c.reaped_ns <= c.published_ns && c.reaped_ns != 0));
        }
        assert_eq!(lane.region.word(cursor::IN_FLIGHT).load(Ordering::Acquire), 0);
        assert_eq!(lane.region.word(cursor::SQ_TAKEN).load(Ordering::Acquire), 50 * 64);
        drop(lane);
        daemon.stop().unwrap();
    });
}

#[test]
fn the_service_doorbell_rings_only_while_no_driver_sleeps() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    numbered(&dir.path().join("disk"));
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let handle = lane.open("disk").handle;
    // Both announced: only A rings. The service's eventfd then still counts zero.
    lane.region.word(cursor::SERVICE_SLEEPS).store(1, Ordering::SeqCst);
    lane.region.word(cursor::DRIVER_SLEEPS).store(1, Ordering::SeqCst);
    lane.submit(&[read(1, handle, 0, lane.block(0))]);
    lane.wait(1);
    let stats = lane.stats();
    assert_eq!(stats.counters["doorbells_service"], 0);
    assert!(stats.counters["doorbells_driver"] > 0);
    // Only the service: B rings.
    lane.submit(&[read(1, handle, 0, lane.block(0))]);
    lane.sleep_as(cursor::SERVICE_SLEEPS, &lane.parts.service);
    let mut done = Vec::new();
    lane.take(&mut done);
    assert_eq!(done.len(), 1);
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn lanes_of_a_session_share_its_files_and_strangers_do_not() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    numbered(&dir.path().join("disk"));
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut first = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let handle = first.open("disk").handle;
    let (session, token) = (first.attached.session, first.attached.token);
    let mut joined = FakeLane::join(&daemon.socket, 64, 1 << 20, session, token).unwrap();
    assert_eq!(joined.attached.session, session);
    assert_ne!(joined.attached.lane, first.attached.lane);
    let data = joined.block(0);
    assert_eq!(joined.run(read(1, handle, 9, data)), 4096);
    assert_eq!(joined.get(data)[0], 9 * 512);
    assert_eq!(joined.open("disk").handle, handle, "the same name is the same handle");

    // The session outlives its first lane, with the file still locked.
    drop(first);
    assert_eq!(joined.run(read(2, handle, 10, data)), 4096);
    let wrong = FakeLane::join(&daemon.socket, 64, 1 << 20, session, [token[0], token[1] ^ 1]);
    assert!(matches!(wrong.err(), Some(CallError::Refused(13))), "EACCES");
    let nobody = FakeLane::join(&daemon.socket, 64, 1 << 20, 9999, token);
    assert!(matches!(nobody.err(), Some(CallError::Refused(116))), "ESTALE");

    // Another session has its own handles: this number means nothing there.
    let mut stranger = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let data = stranger.block(0);
    assert_eq!(stranger.run(read(1, handle, 9, data)), -9, "EBADF");
    drop((joined, stranger));
    daemon.stop().unwrap();
}

#[test]
fn a_session_that_goes_on_gets_its_files_under_their_handles_and_no_others() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    for name in ["one", "two", "three"] {
        numbered(&dir.path().join(name));
    }
    let root = dir.path().to_str().unwrap();
    let daemon = InProcess::start(dir.path(), &["--root", root]);
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let [one, two] = ["one", "two"].map(|name| lane.open(name).handle);
    drop(lane);
    daemon.stop().unwrap();

    let daemon = InProcess::start(dir.path(), &["--root", root]);
    let mut fresh = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let refused = fresh.open_again("one", one).err();
    assert!(matches!(refused, Some(CallError::Refused(22))), "EINVAL: {refused:?}");
    drop(fresh);

    let mut lane = FakeLane::go_on(&daemon.socket, 64, 1 << 20, two);
    assert_eq!(lane.open_again("two", two).unwrap().handle, two);
    let data = lane.block(0);
    assert_eq!(lane.run(read(1, two, 9, data)), 4096);
    assert_eq!(lane.get(data)[0], 9 * 512);
    assert_eq!(lane.run(read(1, one, 9, data)), -9, "not yet opened again");
    assert_eq!(lane.open_again("two", two).unwrap().handle, two, "a second time");
    for (name, handle) in [("two", one), ("one", two), ("one", one + 4096), ("one", u32::MAX)] {
        let refused = lane.open_again(name, handle).err();
        assert!(matches!(refused, Some(CallError::Refused(22))), "{name} {handle}: {refused:?}");
    }
    assert_eq!(lane.open_again("one", one).unwrap().handle, one);
    assert_eq!(lane.run(read(1, one, 7, data)), 4096);
    let three = lane.open("three").handle;
    assert!(three > one.max(two), "{three} was never given out");
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn a_closed_handle_is_refused_and_never_names_a_later_file() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    numbered(&dir.path().join("one"));
    numbered(&dir.path().join("two"));
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let one = lane.open("one").handle;
    assert_eq!(lane.open("one").handle, one);
    lane.close(one).unwrap();
    let data = lane.block(0);
    assert_eq!(lane.run(read(1, one, 0, data)), 4096, "opened twice, closed once");
    // In flight when the last close comes: completes first.
    let many: Vec<_> = (0..32).map(|i| read(i, one, i, lane.block(i as usize))).collect();
    lane.submit(&many);
    lane.close(one).unwrap();
    let done = lane.wait(32);
    assert!(done.iter().all(|c| c.result == 4096 || c.result == -9), "{done:?}");
    assert_eq!(lane.run(read(1, one, 0, data)), -9);
    let two = lane.open("two").handle;
    assert_ne!(two, one);
    assert_eq!(lane.run(read(1, one, 0, data)), -9);
    assert_eq!(lane.run(read(1, two, 0, data)), 4096);
    assert!(matches!(lane.close(one), Err(CallError::Refused(9))), "EBADF");
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn a_file_opened_for_reading_is_not_written() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    let path = dir.path().join("disk");
    numbered(&path);
    let before = std::fs::read(&path).unwrap();
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let handle = lane.try_open("disk", postern_edl::OPEN_READ_ONLY).unwrap().handle;
    let data = lane.block(0);
    assert_eq!(lane.run(write(1, handle, 0, data)), -9, "EBADF");
    assert_eq!(lane.run(read(1, handle, 1, data)), 4096);
    let again = lane.try_open("disk", 0);
    assert!(matches!(again, Err(CallError::Refused(16))), "EBUSY: {again:?}");
    drop(lane);
    daemon.stop().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn the_statistics_tell_each_stage_of_each_operation() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    numbered(&dir.path().join("disk"));
    let stats_file = dir.path().join("stats.json");
    let daemon = InProcess::start(
        dir.path(),
        &["--root", dir.path().to_str().unwrap(), "--stats-file", stats_file.to_str().unwrap()],
    );
    let mut lane = FakeLane::attach(&daemon.socket, 64, 1 << 20);
    let handle = lane.open("disk").handle;
    let data = lane.block(0);
    for n in 0..10 {
        assert_eq!(lane.run(read(n, handle, n, data)), 4096);
        let stamp = lane.region.geometry().stamp_word(n as usize);
        lane.region.word(stamp).store(now_ns(), Ordering::Relaxed);
    }
    assert_eq!(lane.run(write(20, handle, 0, data)), 4096);
    assert_eq!(lane.run(flush(21, handle)), 0);
    let report = lane.stats();
    assert_eq!((report.source.as_str(), report.sessions, report.lanes), ("daemon", 1, 1));
    assert!(report.source_note.is_some());
    assert_eq!(report.stages, report.daemon_stages);
    let count = |stage: &str, operation: &str| {
        let row = report.stages.iter().find(|r| r.stage == stage && r.operation == operation);
        row.map_or(0, |row| {
            assert!(row.p50_ns <= row.p99_ns && row.p99_ns <= row.p999_ns, "{row:?}");
            assert!(row.p999_ns <= row.max_ns && row.max_ns <= row.sum_ns, "{row:?}");
            row.count
        })
    };
    for stage in ["crossing_out", "host_submit", "device"] {
        assert_eq!(
            (count(stage, "read"), count(stage, "write"), count(stage, "flush")),
            (10, 1, 1),
            "{stage}"
        );
    }
    assert_eq!((count("crossing_in", "read"), count("crossing_in", "write")), (10, 0));
    let counters = &report.counters;
    assert_eq!((counters["submissions"], counters["completions"]), (12, 12));
    assert_eq!((counters["bytes_read"], counters["bytes_written"]), (40960, 4096));
    assert_eq!((counters["flushes"], counters["errors"]), (1, 0));
    drop(lane);
    daemon.stop().unwrap();
    let last: posternd::stats::StatsReport =
        serde_json::from_slice(&std::fs::read(stats_file).unwrap()).unwrap();
    assert_eq!((last.sessions, last.lanes, last.counters["completions"]), (0, 0, 12));
    assert_eq!(last.stages, report.stages);
}
