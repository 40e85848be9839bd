//! The listening socket is somebody else's, as systemd's is: daemons die and start again on it, and
//! programs come to it at any time. None is refused, nothing is lost.

use std::{
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

use crate::{
    common::{World, begin, end, signal},
    kill::{Confirmed, stop, words},
};

const KILLS: usize = 5;

/// A daemon on the socket; killed when dropped.
struct Daemon(Child);

impl Daemon {
    /// Started as systemd starts it: the socket is descriptor 3, and meant for this process.
    fn start(world: &World, socket: &OwnedFd, volume: &Path) -> Self {
        let mut command = Command::new("sh");
        let line = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
        command.args(["-c", line, "sh"]).arg(world.part("posternd"));
        command.args(["--no-probes", "--socket", "d.sock", "--file"]);
        command.arg(format!("v={}", volume.display())).current_dir(world.directory());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let given = socket.as_raw_fd();
        // SAFETY: between fork and exec: system calls, nothing allocates.
        unsafe {
            command.pre_exec(move || {
                // By way of another one: what is there already would keep its close-on-exec flag.
                let copy = libc::fcntl(given, libc::F_DUPFD, 4);
                if copy < 0 || libc::dup2(copy, 3) < 0 || libc::close(copy) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Self(command.spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn on_a_socket_that_was_handed_over_no_program_is_refused_and_no_confirmed_write_is_lost() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    std::fs::write(world.path("key"), [7; 32]).unwrap();
    end(&mut world.postern(["format", "v", "--size", "2M", "--key-file", "key"])).expect(0);
    let volume = world.path("v");
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(world.path("d.sock")).unwrap()).unwrap();
    listen(&socket, 64).unwrap();
    let (sealed, log) = (Path::new("/sealed/data"), world.path("log"));
    let mut confirmed = Confirmed::of(&log);
    let run = |mode: &str, seed| {
        let mut command = world.postern(["run", "--key-file", "key", "--daemon-wait", "120"]);
        command.args(["--socket", "d.sock", "--volume", "/sealed/data=v", "--"]);
        command.args(words(&program, mode, sealed, &log, seed));
        command
    };
    // It comes before any daemon does, and waits.
    let mut running = begin(&mut run("write", 4711));
    let mut daemon = Daemon::start(&world, &socket, &volume);
    for kill in 0..KILLS {
        let enough = confirmed.now() + 1 + kill * 7;
        confirmed.reach(enough, &mut running);
        drop(daemon);
        assert!(world.path("d.sock").exists(), "the socket is not the daemon's to remove");
        daemon = Daemon::start(&world, &socket, &volume);
    }
    let enough = confirmed.now() + 20;
    confirmed.reach(enough, &mut running);
    stop(running);
    // The socket outlives a daemon that stops in order, too.
    signal("TERM", daemon.0.id());
    assert!(daemon.0.wait().unwrap().success());
    let checking = begin(&mut run("check", 0));
    let _daemon = Daemon::start(&world, &socket, &volume);
    let checked = checking.wait();
    assert_eq!(checked.code(), 0, "{} {}", checked.stdout, checked.stderr);
}
