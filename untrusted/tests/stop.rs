//! The binary: ready line, exit codes, graceful stop, lost clients.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{FakeLane, direct_io_works, directory};
use postern_edl::port::Submission;
use rustix::process::{Pid, Signal, kill_process};

/// Starts posternd and waits for its ready line.
fn posternd(socket: &Path, arguments: &[&str]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_posternd"))
        .args(["--no-probes", "--socket"])
        .arg(socket)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, format!("posternd: ready on {}\n", socket.display()));
    child
}

/// Its exit code and what it said on stderr.
fn end(mut child: Child) -> (Option<i32>, String) {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code(), text)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn write(index: usize, lane: &FakeLane, handle: u32) -> Submission {
    Submission {
        id: index as u64,
        op: 2,
        handle,
        offset: index as u64 * 65536,
        length: 65536,
        data: lane.block(index * 16),
        ..Submission::default()
    }
}

#[test]
fn exit_codes_tell_usage_socket_and_configuration_apart() {
    let dir = directory();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_posternd")).args(arguments).output().unwrap();
        assert!(output.stdout.is_empty());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(run(&[]).0, Some(2));
    assert_eq!(run(&["--socket", "x", "--nonsense"]).0, Some(2));
    let (code, text) = run(&["--no-probes", "--socket", "/nowhere/at/all"]);
    assert_eq!((code, text.lines().count()), (Some(3), 1), "{text}");
    assert!(text.starts_with("posternd: ") && text.contains("/nowhere/at/all"), "{text}");
    let socket = dir.path().join("control");
    let (code, text) = run(&["--socket", socket.to_str().unwrap(), "--file", "bad"]);
    assert_eq!((code, text.lines().count()), (Some(4), 1), "{text}");
}

#[test]
fn sigterm_completes_what_was_taken_writes_the_statistics_and_exits_cleanly() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(4 << 20).unwrap();
    for by in [Signal::TERM, Signal::INT] {
        let (socket, stats) = (dir.path().join("control"), dir.path().join("stats.json"));
        let root = dir.path().to_str().unwrap();
        let daemon = posternd(&socket, &["--root", root, "--stats-file", stats.to_str().unwrap()]);
        let mut lane = FakeLane::attach(&socket, 64, 64 * 65536);
        let handle = lane.open("disk").handle;
        let writes: Vec<_> = (0..64).map(|i| write(i, &lane, handle)).collect();
        lane.submit(&writes);
        // At least one is under way for certain.
        let mut done = lane.wait(1);
        signal(&daemon, by);
        assert_eq!(lane.calls.0.receive(), Ok(Vec::new()), "the daemon hangs up");
        lane.take(&mut done);
        let word = |index| lane.region.word(index).load(std::sync::atomic::Ordering::Acquire);
        use postern_edl::port::cursor;
        assert_eq!(done.len() as u64, word(cursor::SQ_TAKEN), "all that was taken is answered");
        assert_eq!(word(cursor::IN_FLIGHT), 0);
        assert!(done.iter().all(|c| c.result == 65536), "{done:?}");
        let (code, text) = end(daemon);
        assert_eq!((code, text.as_str()), (Some(0), ""));
        let report: posternd::stats::StatsReport =
            serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap();
        assert_eq!(report.counters["completions"], done.len() as u64);
        assert!(!socket.exists());
    }
}

#[test]
fn a_lost_client_is_drained_before_its_file_is_released() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(4 << 20).unwrap();
    let socket = dir.path().join("control");
    let daemon = posternd(&socket, &["--root", dir.path().to_str().unwrap()]);
    for _ in 0..10 {
        let mut lane = FakeLane::attach(&socket, 64, 64 * 65536);
        let handle = lane.open("disk").handle;
        let writes: Vec<_> = (0..64).map(|i| write(i, &lane, handle)).collect();
        lane.submit(&writes);
        lane.wait(1);
        drop(lane);
        // The lock is given up only after the last write has completed.
        let lock = std::fs::File::open(dir.path().join("disk")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        // Said, not only closed: a process that another test starts has the descriptor for a moment.
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::Unlock).unwrap();
        let mut asker = FakeLane::attach(&socket, 2, 4096);
        let counters = asker.stats().counters;
        assert_eq!(counters["submissions"], counters["completions"]);
        assert_eq!(counters["errors"], 0);
    }
    signal(&daemon, Signal::TERM);
    assert_eq!(end(daemon), (Some(0), String::new()));
}

/// A daemon that dies hard leaves its socket behind; the next one starts over it and can lock the
/// same file.
#[test]
fn after_sigkill_the_next_daemon_starts_and_opens_the_same_file() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
    let socket = dir.path().join("control");
    let root = dir.path().to_str().unwrap().to_owned();
    let first = posternd(&socket, &["--root", &root]);
    let mut lane = FakeLane::attach(&socket, 2, 4096);
    lane.open("disk");
    signal(&first, Signal::KILL);
    assert_eq!(end(first).0, None);
    assert!(socket.exists());
    let second = posternd(&socket, &["--root", &root]);
    let mut lane = FakeLane::attach(&socket, 2, 4096);
    lane.open("disk");
    drop(lane);
    signal(&second, Signal::TERM);
    assert_eq!(end(second).0, Some(0));
}
