//! One volume and several programs: it passes from one to the other with all that was synced, and
//! one that does not answer loses it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::common::{World, begin, children, end, name_of, signal, until};

/// A program that does to the volume what it is told.
pub struct Server {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// Starts it; answers what it says first.
    pub fn start(command: &mut Command) -> (Self, String) {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut server = Self { child, orders, answers };
        let first = server.answer();
        (server, first)
    }

    pub fn on(world: &World, volume: &Path, program: &Path, options: &[&str]) -> Self {
        let words = [program.to_str().unwrap(), "/sealed/data", "rw"];
        let options = [&["--no-probes"], options].concat();
        let (server, first) = Self::start(&mut world.run_with(volume, &options, words));
        assert_eq!(first, "ready");
        server
    }

    /// One that can only read.
    fn reading(world: &World, volume: &Path, program: &Path) -> (Self, String) {
        let mut shown = std::ffi::OsString::from("/sealed/data=");
        shown.push(volume);
        let mut command = world.postern(["run", "--no-probes", "--volume-ro"]);
        command.arg(shown).arg("--").arg(program).args(["/sealed/data", "ro"]);
        Self::start(&mut command)
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn send(&mut self, order: &str) {
        writeln!(self.orders.as_ref().unwrap(), "{order}").unwrap();
    }

    fn tell(&mut self, order: &str) -> String {
        self.send(order);
        self.answer()
    }

    #[track_caller]
    pub fn expect(&mut self, order: &str, answer: &str) {
        assert_eq!(self.tell(order), answer, "{order}");
    }

    /// The program below `postern run`.
    fn program(&self) -> u32 {
        self.program_called("serve")
    }

    /// The program of this name below `postern run`.
    pub fn program_called(&self, name: &str) -> u32 {
        let all = children(self.child.id());
        all.into_iter().find(|&pid| name_of(pid) == name).expect("the program runs")
    }

    pub fn end(mut self) {
        drop(self.orders.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.orders.take());
        if std::thread::panicking() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn surroundings() -> Option<(World, PathBuf, PathBuf)> {
    let world = World::new()?;
    let volume = world.format("v", "16M");
    let program = world.guest("serve")?;
    Some((world, volume, program))
}

/// Errno numbers, as the guest prints them.
pub const EIO: &str = "5";
const EFBIG: &str = "27";
const EROFS: &str = "30";

#[test]
fn two_programs_take_turns_on_a_volume_and_each_reads_what_the_other_wrote() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut one = Server::on(&world, &volume, &program, &[]);
    one.expect("w 0 1", "ok");
    let mut two = Server::on(&world, &volume, &program, &[]);
    for turn in 0..6 {
        let (writer, reader) =
            if turn % 2 == 0 { (&mut one, &mut two) } else { (&mut two, &mut one) };
        let value = turn + 10;
        writer.expect(&format!("w {turn} {value}"), "ok");
        // Synced or not: a volume is handed over with everything.
        if turn % 3 == 0 {
            writer.expect("s", "ok");
        }
        reader.expect(&format!("r {turn}"), &value.to_string());
        reader.expect("s", "ok");
    }
    one.expect("t 409600", "ok");
    two.expect("z", "409600");
    two.expect("w 100 7", "ok");
    one.expect("z", &(101 * 4096).to_string());
    one.end();
    two.expect("r 100", "7");
    two.end();
    end(&mut world.postern(["verify", "v"])).expect(0);
}

/// Whether process `pid` has a lock on `file` (flock(2)), as proc_locks(5) tells.
fn has_lock(pid: u32, file: &Path) -> bool {
    let inode = std::fs::metadata(file).unwrap().ino().to_string();
    std::fs::read_to_string("/proc/locks").unwrap().lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [_, "FLOCK", _, _, holder, place, ..]
            if holder == pid.to_string() && place.rsplit(':').next() == Some(&inode))
    })
}

#[test]
fn a_volume_comes_back_though_the_daemon_is_killed_amid_it() {
    let Some((world, volume, program)) = surroundings() else { return };
    // So few requests a second that reading what it takes to open the volume lasts.
    let mut one = Server::on(&world, &volume, &program, &["--limit", "iops=20"]);
    one.expect("w 3 7", "ok");
    let mut two = Server::on(&world, &volume, &program, &[]);
    two.expect("r 3", "7");
    two.end();
    let daemon = one.program_called("posternd");
    assert!(!has_lock(daemon, &volume));
    one.send("r 3");
    until("it has the lease again", || has_lock(daemon, &volume).then_some(()));
    signal("KILL", daemon);
    assert_eq!(one.answer(), "7");
    one.end();
}

#[test]
fn the_times_of_a_file_go_with_it_from_program_to_program() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut one = Server::on(&world, &volume, &program, &[]);
    one.expect("w 0 1", "ok");
    one.expect("c 1000000000", "ok");
    let mut two = Server::on(&world, &volume, &program, &[]);
    two.expect("m", "1000000000");
    two.expect("w 1 1", "ok");
    let changed = one.tell("m");
    assert_ne!(changed, "1000000000");
    two.expect("m", &changed);
    two.expect("c 1234567890", "ok");
    one.expect("m", "1234567890");
    let (mut reader, first) = Server::reading(&world, &volume, &program);
    assert_eq!(first, "ready");
    reader.expect("m", "1234567890");
    reader.expect("c 5", EROFS);
    one.expect("m", "1234567890");
    for server in [one, two, reader] {
        server.end();
    }
}

#[test]
fn a_program_that_was_stopped_loses_the_volume_and_hears_of_it_once() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut stopped = Server::on(&world, &volume, &program, &[]);
    stopped.expect("w 0 1", "ok");
    stopped.expect("s", "ok");
    stopped.expect("w 1 1", "ok");
    let pid = stopped.program();
    signal("STOP", pid);
    let mut next = Server::on(&world, &volume, &program, &[]);
    next.expect("r 0", "1");
    next.expect("w 0 2", "ok");
    next.expect("s", "ok");
    // A write that was on its way when the program was stopped must not land later.
    stopped.send("w 0 3");
    signal("CONT", pid);
    let late = stopped.answer();
    assert!(late == EIO || late == "ok", "{late}");
    stopped.expect("s", EIO);
    stopped.expect("s", "ok");
    // What was answered is what is there: on the old lease nothing, on a new one all.
    next.expect("r 0", if late == "ok" { "3" } else { "2" });
    stopped.end();
    next.end();
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn readers_share_a_volume_and_make_room_for_a_writer() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut writer = Server::on(&world, &volume, &program, &[]);
    writer.expect("w 3 33", "ok");
    let (mut one, first) = Server::reading(&world, &volume, &program);
    assert_eq!(first, "ready");
    let (mut two, first) = Server::reading(&world, &volume, &program);
    assert_eq!(first, "ready");
    one.expect("r 3", "33");
    two.expect("r 3", "33");
    end(&mut world.postern(["info", "v", "--wait", "0"])).expect(0);
    one.expect("w 3 1", "9");
    writer.expect("w 3 44", "ok");
    one.expect("r 3", "44");
    two.expect("r 3", "44");
    for server in [one, two, writer] {
        server.end();
    }
    let mut shown = std::ffi::OsString::from("/sealed/data=");
    shown.push(&volume);
    let mut command = world.postern(["run", "--no-probes", "--volume-ro"]);
    command.arg(shown).arg("--").arg(&program).args(["/sealed/data", "rw"]);
    assert_eq!(Server::start(&mut command).1, EROFS);
}

#[test]
fn a_program_with_a_lock_on_the_file_keeps_the_volume() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut holder = Server::on(&world, &volume, &program, &[]);
    holder.expect("l", "ok");
    let words = [program.to_str().unwrap(), "/sealed/data", "rw"];
    end(&mut world.postern(["info", "v", "--wait", "1"])).expect_line(73, "in use");
    let mut command = world.run_with(&volume, &["--no-probes", "--wait", "1"], words);
    end(&mut command).expect_line(73, "in use");
    holder.expect("u", "ok");
    end(&mut world.postern(["info", "v"])).expect(0);
    holder.expect("w 0 1", "ok");
    holder.end();
}

#[test]
fn who_waits_for_a_killed_program_gets_the_volume() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut holder = Server::on(&world, &volume, &program, &["--exclusive"]);
    holder.expect("w 5 55", "ok");
    holder.expect("s", "ok");
    let pid = holder.program();
    let waiting = begin(&mut world.postern(["info", "v", "--wait", "100"]));
    signal("KILL", pid);
    waiting.wait().expect(0);
    assert!(!holder.child.wait().unwrap().success());
    let mut next = Server::on(&world, &volume, &program, &[]);
    next.expect("r 5", "55");
    next.end();
}

#[test]
fn a_snapshot_of_a_volume_at_work_opens_and_the_work_goes_on() {
    let Some((world, volume, _)) = surroundings() else { return };
    let fio = [
        "fio",
        "--name=x",
        "--filename=/sealed/data",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--size=16m",
        "--loops=40",
        "--fsync=64",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    let mut running = begin(&mut world.run(&volume, fio));
    for name in ["one", "two", "three"] {
        end(&mut world.postern(["snapshot", "create", "v", name])).expect(0);
    }
    assert!(running.is_running(), "the snapshots were made at work");
    end(&mut world.postern(["verify", "v"])).expect(0);
    running.wait().expect(0);
    for name in ["one", "two", "three"] {
        let copy = format!("copy-{name}");
        end(&mut world.postern(["snapshot", "export", "v", name, &copy, "--plain"])).expect(0);
        assert_eq!(std::fs::metadata(world.path(&copy)).unwrap().len(), 16 << 20);
    }
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn a_volume_that_is_resized_at_work_has_its_new_room_at_once() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut server = Server::on(&world, &volume, &program, &[]);
    server.expect("w 7 77", "ok");
    server.expect("t 50331648", EFBIG);
    end(&mut world.postern(["resize", "v", "--size", "64M"])).expect(0);
    server.expect("t 50331648", "ok");
    server.expect("w 12287 99", "ok");
    server.expect("s", "ok");
    server.expect("r 7", "77");
    // Its data is in the way; nothing happens to it.
    end(&mut world.postern(["resize", "v", "--size", "8M"])).expect(64);
    server.expect("r 12287", "99");
    server.expect("t 1048576", "ok");
    end(&mut world.postern(["resize", "v", "--size", "8M"])).expect(0);
    server.expect("t 16777216", EFBIG);
    server.expect("r 7", "77");
    server.expect("w 2047 5", "ok");
    server.end();
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn a_volume_that_the_host_put_back_while_it_was_handed_over_is_refused() {
    let Some((world, volume, program)) = surroundings() else { return };
    let mut server = Server::on(&world, &volume, &program, &[]);
    server.expect("w 0 1", "ok");
    end(&mut world.postern(["info", "v"])).expect(0);
    // Handed over, and not yet taken back: the program has not asked for anything.
    let old = world.path("old");
    std::fs::copy(&volume, &old).unwrap();
    server.expect("w 0 2", "ok");
    end(&mut world.postern(["info", "v"])).expect(0);
    let new = world.path("new");
    std::fs::copy(&volume, &new).unwrap();
    std::fs::copy(&old, &volume).unwrap();
    server.expect("r 0", EIO);
    std::fs::copy(&new, &volume).unwrap();
    server.expect("r 0", "2");
    server.end();
    end(&mut world.postern(["verify", "v"])).expect(0);
}
