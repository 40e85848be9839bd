//! Socket, names, locks, and O_DIRECT refusals.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use common::host::InProcess;
use common::{Control, FakeLane, direct_io_works, directory};
use postern_edl::calls::CallError;
use posternd::problem::{EXIT_CONFIG, EXIT_SOCKET};
use rustix::fs::FlockOperation;

fn refused(answer: Result<postern_edl::calls::PosternFile, CallError<rustix::io::Errno>>) -> u32 {
    match answer {
        Err(CallError::Refused(errno)) => errno,
        other => panic!("{other:?}"),
    }
}

fn empty(path: &Path) {
    std::fs::write(path, [0; 8192]).unwrap();
}

#[test]
fn the_socket_is_for_its_owner_alone_and_goes_with_the_daemon() {
    let dir = directory();
    let daemon = InProcess::start(dir.path(), &[]);
    let mode = std::fs::metadata(&daemon.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let socket = daemon.socket.clone();
    daemon.stop().unwrap();
    assert!(!socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let dir = directory();
    let socket = dir.path().join("control");
    // Bound and left behind, as by a daemon that was killed.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(Control::connect(&socket).is_err());
    let daemon = InProcess::start(dir.path(), &[]);
    let living = std::fs::metadata(&socket).unwrap().ino();

    let problem = InProcess::try_start(dir.path(), &[]).map(|_| ()).unwrap_err();
    assert_eq!(problem.exit, EXIT_SOCKET, "{problem}");
    assert_eq!(std::fs::metadata(&socket).unwrap().ino(), living);
    drop(FakeLane::attach(&socket, 2, 4096));
    daemon.stop().unwrap();
}

#[test]
fn something_else_at_the_sockets_path_is_left_alone() {
    let dir = directory();
    let path = dir.path().join("control");
    std::fs::write(&path, "precious").unwrap();
    let problem = InProcess::try_start(dir.path(), &[]).map(|_| ()).unwrap_err();
    assert_eq!(problem.exit, EXIT_SOCKET, "{problem}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    // A listening socket of another kind is somebody's, too.
    std::fs::remove_file(&path).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let problem = InProcess::try_start(dir.path(), &[]).map(|_| ()).unwrap_err();
    assert_eq!(problem.exit, EXIT_SOCKET, "{problem}");
}

#[test]
fn wrong_names_and_roots_are_told_at_start() {
    let dir = directory();
    for arguments in [
        ["--file", "nameonly"],
        ["--file", "=path"],
        ["--file", "name="],
        ["--root", "/nowhere/at/all"],
    ] {
        let problem = InProcess::try_start(dir.path(), &arguments).map(|_| ()).unwrap_err();
        assert_eq!(problem.exit, EXIT_CONFIG, "{problem}");
    }
    let twice = InProcess::try_start(dir.path(), &["--file", "a=x", "--file", "a=y"]);
    assert_eq!(twice.map(|_| ()).unwrap_err().exit, EXIT_CONFIG);
}

#[test]
fn only_allowed_names_lead_to_files() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("sub")).unwrap();
    empty(&dir.path().join("outside"));
    empty(&root.join("inside"));
    empty(&root.join("sub/deeper"));
    symlink(dir.path().join("outside"), root.join("link")).unwrap();
    symlink("inside", root.join("near")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("fifo"), rustix::fs::Mode::RWXU).unwrap();
    let mapped = format!("volume={}", dir.path().join("outside").display());
    let late = format!("late={}", dir.path().join("not-yet").display());
    let root_text = root.to_str().unwrap();
    let daemon =
        InProcess::start(dir.path(), &["--root", root_text, "--file", &mapped, "--file", &late]);
    let mut lane = FakeLane::attach(&daemon.socket, 2, 4096);
    for good in ["inside", "sub/deeper", "volume", "sub/../inside"] {
        let file = lane.open(good);
        assert_eq!(file.blocks, 2, "{good}");
        lane.close(file.handle).unwrap();
    }
    let absolute = root.join("inside");
    for (name, errno) in [
        ("", 22),           // EINVAL
        ("nowhere", 2),     // ENOENT
        ("../outside", 18), // EXDEV, openat2(2) RESOLVE_BENEATH
        (absolute.to_str().unwrap(), 18),
        ("link", 40), // ELOOP, RESOLVE_NO_SYMLINKS
        ("near", 40),
        ("sub", 22),  // a directory
        ("fifo", 22), // opening it for I/O would hang
        ("late", 2),
    ] {
        assert_eq!(refused(lane.try_open(name, 0)), errno, "{name:?}");
    }
    assert_eq!(refused(lane.try_open("inside", 0x80)), 22, "unknown flags");
    // A mapped file is looked up when it is opened.
    empty(&dir.path().join("not-yet"));
    assert_eq!(lane.open("late").blocks, 2);
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn a_locked_file_is_refused_until_its_holder_lets_go() {
    let dir = directory();
    if !direct_io_works(dir.path()) {
        return;
    }
    empty(&dir.path().join("disk"));
    let daemon = InProcess::start(dir.path(), &["--root", dir.path().to_str().unwrap()]);
    let mut first = FakeLane::attach(&daemon.socket, 2, 4096);
    let mut second = FakeLane::attach(&daemon.socket, 2, 4096);
    let handle = first.open("disk").handle;
    assert_eq!(refused(second.try_open("disk", 0)), 16, "EBUSY");
    assert_eq!(refused(second.try_open("disk", postern_edl::OPEN_READ_ONLY)), 16);
    // The lock is one that other programs see.
    let outside = std::fs::File::open(dir.path().join("disk")).unwrap();
    assert!(rustix::fs::flock(&outside, FlockOperation::NonBlockingLockShared).is_err());
    first.close(handle).unwrap();
    let held = rustix::fs::flock(&outside, FlockOperation::NonBlockingLockExclusive);
    assert!(held.is_ok(), "free as soon as close is answered");
    assert_eq!(refused(second.try_open("disk", 0)), 16, "locked by another program");
    drop(outside);
    second.open("disk");
    // The end of a session releases as well.
    second.end();
    first.open("disk");
    drop(first);
    daemon.stop().unwrap();
}

/// tmpfs either refuses O_DIRECT at open(2) or, since Linux 6.6, accepts it and means nothing by it.
#[test]
fn a_file_system_without_direct_io_is_refused_unless_buffered_io_is_allowed() {
    let Ok(shm) = tempfile::tempdir_in("/dev/shm") else {
        common::skip("/dev/shm can not be written");
        return;
    };
    if rustix::fs::statfs(shm.path()).unwrap().f_type != 0x0102_1994 {
        common::skip("/dev/shm is no tmpfs");
        return;
    }
    empty(&shm.path().join("disk"));
    let dir = directory();
    let root = shm.path().to_str().unwrap();
    let strict = InProcess::start(dir.path(), &["--root", root]);
    let mut lane = FakeLane::attach(&strict.socket, 2, 4096);
    assert_eq!(refused(lane.try_open("disk", 0)), 22, "EINVAL");
    drop(lane);
    strict.stop().unwrap();

    let lenient = InProcess::start(dir.path(), &["--root", root, "--allow-buffered"]);
    let mut lane = FakeLane::attach(&lenient.socket, 2, 4096);
    let file = lane.open("disk");
    assert_eq!((file.flags, file.blocks), (postern_edl::FILE_BUFFERED, 2));
    let data = lane.block(0);
    lane.put(data, 9000);
    let write = postern_edl::port::Submission {
        id: 1,
        op: 2,
        handle: file.handle,
        offset: 4096,
        length: 4096,
        data,
        ..Default::default()
    };
    assert_eq!(lane.run(write), 4096);
    let flush =
        postern_edl::port::Submission { id: 1, op: 3, handle: file.handle, ..Default::default() };
    assert_eq!(lane.run(flush), 0);
    drop(lane);
    lenient.stop().unwrap();
    let bytes = std::fs::read(shm.path().join("disk")).unwrap();
    assert_eq!(bytes[4096..4104], 9000u64.to_ne_bytes());
}
