//! An enclave whose daemon is of another version says so, and its program goes on with `EIO`.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    listen, recv, send, socket_with,
};

use crate::common::{World, end};

const EPROTONOSUPPORT: u64 = 93;

/// A daemon that gives each request this answer, until somebody connects after it was to stop.
fn daemon(socket: &OwnedFd, answer: &[u8], stops: &AtomicBool) {
    std::thread::scope(|scope| {
        loop {
            let peer = accept(socket).unwrap();
            if stops.load(Ordering::SeqCst) {
                return;
            }
            scope.spawn(move || {
                let mut request = [0; 8192];
                while let Ok((1.., _)) = recv(&peer, &mut request, RecvFlags::empty()) {
                    let _ = send(&peer, answer, SendFlags::NOSIGNAL);
                }
            });
        }
    });
}

fn seqpacket() -> OwnedFd {
    let kind = SocketType::SEQPACKET;
    socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

#[test]
fn a_daemon_of_another_version_is_told_from_one_that_is_gone() {
    let Some(world) = World::new() else { return };
    world.format("v", "1M");
    // Of an older daemon: refused. Of a newer one that is careless: it attaches all the same.
    let attached = [0, 99, 0, 0, 1, 1, 2];
    for (n, words) in [&[EPROTONOSUPPORT][..], &attached].into_iter().enumerate() {
        let answer: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let name = format!("d{n}");
        let address = SocketAddrUnix::new(world.path(&name)).unwrap();
        let socket = seqpacket();
        bind(&socket, &address).unwrap();
        listen(&socket, 8).unwrap();
        let stops = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stops);
        let host = std::thread::spawn(move || daemon(&socket, &answer, &told));
        let words = ["run", "--socket", &name, "--volume", "/sealed/data=v", "--key-file", "v.key"];
        let ended = end(&mut world.postern(words.into_iter().chain(["--", "cat", "/sealed/data"])));
        stops.store(true, Ordering::SeqCst);
        rustix::net::connect(seqpacket(), &address).unwrap();
        host.join().unwrap();
        assert_eq!(ended.code(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains("version"), "{}", ended.stderr);
        assert!(ended.stderr.contains("Input/output error"), "{}", ended.stderr);
    }
}
