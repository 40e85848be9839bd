//! Leases: who may use a host file, how it passes on, and that nobody who lost it reaches it.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::Ordering;

use common::host::InProcess;
use common::{Control, FakeLane, direct_io_works, directory};
use postern_edl::calls::{
    CallError, Enclave, PosternFile, PosternKeepRequest, PosternLease, PosternLeaseRequest,
};
use postern_edl::port::{Submission, cursor, op};
use postern_edl::{LEASE_ASKED, LEASE_LOST, OPEN_ASK, OPEN_READ_ONLY};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

const ENOENT: u32 = 2;
const EBADF: u32 = 9;
const EAGAIN: u32 = 11;
const EBUSY: u32 = 16;
const EMFILE: u32 = 24;
const ENOTCONN: u32 = 107;
const ESTALE: u32 = 116;

fn disk(directory: &Path, name: &str) {
    std::fs::write(directory.join(name), [0; 16 * 4096]).unwrap();
}

fn daemon(directory: &Path, hold_ms: &str, timeout_ms: &str) -> InProcess {
    let root = directory.to_str().unwrap();
    let terms = ["--root", root, "--lease-hold-ms", hold_ms, "--lease-timeout-ms", timeout_ms];
    InProcess::start(directory, &terms)
}

fn refused<T: std::fmt::Debug>(answer: Result<T, CallError<Errno>>) -> u32 {
    match answer {
        Err(CallError::Refused(errno)) => errno,
        other => panic!("{other:?}"),
    }
}

/// The first lease that the daemon has something to say of.
fn told(lane: &mut FakeLane) -> Result<PosternLease, CallError<Errno>> {
    lane.calls.postern_lease(&PosternLeaseRequest { first: 0 }).map(|reply| reply.lease)
}

/// Waits on doorbell B until the port's word of the leases has changed from `seen`.
fn wait_for_news(lane: &FakeLane, seen: u64) -> u64 {
    loop {
        let word = lane.region.word(cursor::LEASES).load(Ordering::Acquire);
        if word != seen {
            return word;
        }
        let patience = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
        let bell = &lane.parts.service;
        let rung = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(rung, 1, "no doorbell within 20 s");
        rustix::io::read(bell, &mut [0u8; 8]).unwrap();
    }
}

/// Opens as an enclave does that waits.
fn insist(lane: &mut FakeLane, name: &str, flags: u32) -> PosternFile {
    loop {
        match lane.try_open(name, flags | OPEN_ASK) {
            Ok(file) => return file,
            Err(CallError::Refused(EAGAIN)) => std::thread::yield_now(),
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn write(handle: u32, data: u64) -> Submission {
    Submission { id: 1, op: op::WRITE as u32, handle, length: 4096, data, ..Submission::default() }
}

#[test]
fn a_holder_that_is_asked_hands_over_and_gets_it_back() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    let daemon = daemon(dir.path(), "0", "600000");
    let mut first = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut second = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut handle = first.open("disk").handle;
    assert_eq!(refused(told(&mut first)), ENOENT);
    let mut seen = [0; 2];
    for turn in 0..4 {
        let (holder, other) = match turn % 2 {
            0 => (&mut first, &mut second),
            _ => (&mut second, &mut first),
        };
        assert_eq!(refused(other.try_open("disk", 0)), EBUSY, "who does not ask does not wait");
        assert_eq!(refused(other.try_open("disk", OPEN_ASK)), EAGAIN);
        seen[turn % 2] = wait_for_news(holder, seen[turn % 2]);
        assert_eq!(told(holder), Ok(PosternLease { handle, state: LEASE_ASKED }));
        let data = holder.block(0);
        assert_eq!(holder.run(write(handle, data)), 4096, "who is asked may finish");
        holder.close(handle).unwrap();
        assert_eq!(refused(told(holder)), ENOENT);
        handle = insist(other, "disk", 0).handle;
    }
    drop((first, second));
    daemon.stop().unwrap();
}

#[test]
fn a_holder_that_does_not_answer_loses_the_lease_and_its_late_writes_do_not_land() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    disk(dir.path(), "other");
    let daemon = daemon(dir.path(), "0", "50");
    let mut silent = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut second = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let handle = silent.open("disk").handle;
    let kept = silent.open("other").handle;
    let data = silent.block(0);
    silent.put(data, 1000);
    assert_eq!(silent.run(write(handle, data)), 4096);

    let mine = insist(&mut second, "disk", 0).handle;
    let block = second.block(0);
    second.put(block, 2000);
    assert_eq!(second.run(write(mine, block)), 4096);
    silent.put(data, 3000);
    assert_eq!(silent.run(write(handle, data)), -i64::from(EBADF), "fenced");
    assert_eq!(told(&mut silent), Ok(PosternLease { handle, state: LEASE_LOST }));
    let keep = silent.calls.postern_keep(&PosternKeepRequest { handle });
    assert_eq!(refused(keep), ESTALE);
    let bytes = std::fs::read(dir.path().join("disk")).unwrap();
    assert_eq!(bytes[..8], 2000u64.to_ne_bytes(), "the new holder's write stands");
    assert_eq!(silent.run(write(kept, data)), 4096, "nothing else is taken");

    // It takes note, and may come back for it.
    silent.close(handle).unwrap();
    assert_eq!(refused(told(&mut silent)), ENOENT);
    assert_eq!(refused(silent.close(handle)), EBADF);
    second.close(mine).unwrap();
    assert_ne!(insist(&mut silent, "disk", 0).handle, handle);
    drop((silent, second));
    daemon.stop().unwrap();
}

#[test]
fn a_holder_may_keep_what_it_is_asked_for() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    let daemon = daemon(dir.path(), "0", "600000");
    let mut holder = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut other = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let handle = holder.open("disk").handle;
    assert_eq!(refused(other.try_open("disk", OPEN_ASK)), EAGAIN);
    let seen = wait_for_news(&holder, 0);
    holder.calls.postern_keep(&PosternKeepRequest { handle }).unwrap();
    assert_eq!(refused(told(&mut holder)), ENOENT, "answered");
    // Asked again while the wish stands: it is kept alive by coming for it.
    while holder.region.word(cursor::LEASES).load(Ordering::Acquire) == seen {
        assert_eq!(refused(other.try_open("disk", OPEN_ASK)), EAGAIN);
    }
    assert_eq!(told(&mut holder), Ok(PosternLease { handle, state: LEASE_ASKED }));
    let data = holder.block(0);
    assert_eq!(holder.run(write(handle, data)), 4096);
    drop((holder, other));
    daemon.stop().unwrap();
}

#[test]
fn readers_share_a_lease_and_a_writer_asks_them_all() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    let daemon = daemon(dir.path(), "0", "600000");
    let [mut one, mut two, mut writer] =
        std::array::from_fn(|_| FakeLane::attach(&daemon.socket, 4, 1 << 20));
    let first = one.try_open("disk", OPEN_READ_ONLY).unwrap().handle;
    let second = two.try_open("disk", OPEN_READ_ONLY).unwrap().handle;
    assert_eq!(refused(writer.try_open("disk", OPEN_ASK)), EAGAIN);
    for (reader, handle) in [(&mut one, first), (&mut two, second)] {
        wait_for_news(reader, 0);
        assert_eq!(told(reader), Ok(PosternLease { handle, state: LEASE_ASKED }));
        reader.close(handle).unwrap();
    }
    let handle = insist(&mut writer, "disk", 0).handle;
    assert_eq!(refused(one.try_open("disk", OPEN_READ_ONLY | OPEN_ASK)), EAGAIN);
    wait_for_news(&writer, 0);
    writer.close(handle).unwrap();
    insist(&mut one, "disk", OPEN_READ_ONLY);
    drop((one, two, writer));
    daemon.stop().unwrap();
}

#[test]
fn the_death_of_a_holder_frees_the_lease_at_once() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    let daemon = daemon(dir.path(), "600000", "600000");
    let mut holder = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut other = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    holder.open("disk");
    assert_eq!(refused(other.try_open("disk", OPEN_ASK)), EAGAIN);
    drop(holder);
    insist(&mut other, "disk", 0);
    drop(other);
    daemon.stop().unwrap();
}

#[test]
fn another_program_may_ask_and_be_asked() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    disk(dir.path(), "disk");
    let daemon = daemon(dir.path(), "0", "600000");
    let mut lane = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let handle = lane.open("disk").handle;
    let tool = std::fs::File::options().read(true).write(true).open(dir.path().join("disk"));
    let tool = tool.unwrap();
    // Longer than anybody gives way.
    let since = std::time::Instant::now() - std::time::Duration::from_secs(10);
    postern_lease::ask(&tool, postern_lease::Use::Alone, since).unwrap();
    wait_for_news(&lane, 0);
    lane.close(handle).unwrap();
    assert_eq!(postern_lease::take(&tool, postern_lease::Use::Alone, since), Ok(true));
    assert_eq!(refused(lane.try_open("disk", OPEN_ASK)), EAGAIN);
    assert!(postern_lease::is_wanted(&tool, postern_lease::Use::Alone));
    drop(tool);
    insist(&mut lane, "disk", 0);
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn a_hostile_enclave_reaches_no_lease_but_its_own_and_waits_for_a_bounded_number() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    let names: Vec<String> = (0..=64).map(|n| format!("disk{n}")).collect();
    names.iter().for_each(|name| disk(dir.path(), name));
    let daemon = daemon(dir.path(), "600000", "600000");
    let mut victim = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let mut hostile = FakeLane::attach(&daemon.socket, 4, 1 << 20);
    let handles: Vec<u32> = names.iter().map(|name| victim.open(name).handle).collect();
    for handle in handles.into_iter().chain([0, u32::MAX]) {
        let keep = hostile.calls.postern_keep(&PosternKeepRequest { handle });
        assert_eq!(refused(keep), EBADF);
    }
    for name in &names[..64] {
        assert_eq!(refused(hostile.try_open(name, OPEN_ASK)), EAGAIN);
    }
    assert_eq!(refused(hostile.try_open(&names[64], OPEN_ASK)), EMFILE);
    // The same wish again is no further one.
    assert_eq!(refused(hostile.try_open(&names[0], OPEN_ASK)), EAGAIN);
    assert_eq!(refused(hostile.calls.postern_lease(&PosternLeaseRequest { first: 0 })), ENOENT);
    // What an enclave writes into the word of the leases concerns nobody.
    hostile.region.word(cursor::LEASES).store(u64::MAX, Ordering::Relaxed);

    let mut stranger = Enclave(Control::connect(&daemon.socket).unwrap());
    assert_eq!(refused(stranger.postern_lease(&PosternLeaseRequest { first: 0 })), ENOTCONN);
    assert_eq!(refused(stranger.postern_keep(&PosternKeepRequest { handle: 1 })), ENOTCONN);
    drop((victim, hostile));
    daemon.stop().unwrap();
}
