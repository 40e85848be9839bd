//! The daemon ends and another one comes: programs go on without an error, and all they wrote is
//! there.
//!
//! `POSTERN_KILLS` sets how often a daemon is killed (default 20).

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    common::{Running, World, begin, end, signal, skip, until},
    kill::{Confirmed, stop, words},
    launcher::{daemon_at_work, serving},
    lease::{EIO, Server},
};

fn kills() -> usize {
    std::env::var("POSTERN_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

#[test]
fn a_program_goes_on_and_every_confirmed_write_is_there_however_often_the_daemon_is_killed() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    let volume = world.format("v", "2M");
    let (sealed, log) = (Path::new("/sealed/data"), world.path("log"));
    let mut confirmed = Confirmed::of(&log);
    let write = words(&program, "write", sealed, &log, 4711);
    let mut running = begin(&mut world.run(&volume, write));
    let mut last = 0;
    for kill in 0..kills() {
        // Some are killed while they take over, some at work.
        let enough = confirmed.now() + kill * 7 % 40;
        confirmed.reach(enough, &mut running);
        // One that dies has its files open for a moment yet.
        last = until("another daemon serves", || {
            Some(daemon_at_work(&mut running, &volume)).filter(|&daemon| daemon != last)
        });
        signal("KILL", last);
    }
    let enough = confirmed.now() + 20;
    confirmed.reach(enough, &mut running);
    let ended = stop(running);
    assert_eq!(ended.stderr.matches("is started again").count(), kills(), "{}", ended.stderr);
    let checked = end(&mut world.run(&volume, words(&program, "check", sealed, &log, 0)));
    assert_eq!(checked.code(), 0, "{} {}", checked.stdout, checked.stderr);
    end(&mut world.postern(["verify", "v"])).expect(0);
}

/// The launcher keeps them from one daemon to the next, which loads none.
#[test]
fn the_probes_of_a_run_outlive_its_daemons_and_their_counts_add_up() {
    const KILLS: usize = 5;
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    let volume = world.format("v", "2M");
    let (sealed, log) = (Path::new("/sealed/data"), world.path("log"));
    let mut confirmed = Confirmed::of(&log);
    let write = words(&program, "write", sealed, &log, 4711);
    let mut running = begin(&mut world.run_with(&volume, &["--stats", "stats"], write));
    let mut last = 0;
    for _ in 0..KILLS {
        let enough = confirmed.now() + 20;
        confirmed.reach(enough, &mut running);
        last = until("another daemon serves", || {
            Some(daemon_at_work(&mut running, &volume)).filter(|&daemon| daemon != last)
        });
        signal("KILL", last);
    }
    let before_the_last = confirmed.now();
    confirmed.reach(before_the_last + 20, &mut running);
    let ended = stop(running);
    assert_eq!(ended.stderr.matches("is started again").count(), KILLS, "{}", ended.stderr);
    let report = std::fs::read(world.path("stats")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    if report["source"] != "ebpf" {
        return skip(&format!("no probes: {}", report["source_note"]));
    }
    let of = |name: &str| report["counters"][format!("probe_{name}")].as_u64().unwrap();
    for name in ["reap_unmatched", "overwritten", "batch_lost", "negative_crossing_in"] {
        assert_eq!(of(name), 0, "{name}: {report}");
    }
    let rows = report["stages"].as_array().unwrap().iter();
    let ended: u64 = rows
        .filter(|row| row["stage"] == "host_submit")
        .map(|row| row["count"].as_u64().unwrap())
        .sum();
    let gone = of("not_accepted") + of("abandoned");
    assert_eq!(of("requests_seen"), ended + gone, "{report}");
    // The last daemon's own clock knows of its own time alone.
    let own = report["counters"]["submissions"].as_u64().unwrap();
    assert!(ended >= own + before_the_last as u64, "{report}");
}

#[test]
fn fio_with_forked_jobs_verifies_in_a_directory_while_daemons_are_killed() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    std::fs::create_dir(&directory).unwrap();
    let mut shown = std::ffi::OsString::from("/sealed/=");
    shown.push(&directory);
    let mut command = world.postern(["run", "--no-probes", "--create", "64M", "--volume"]);
    command.arg(shown).args([
        "--",
        "fio",
        "--name=x",
        "--directory=/sealed",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=32",
        "--size=4m",
        "--numjobs=3",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--fsync=16",
        "--loops=8",
        "--minimal",
    ]);
    let mut running = begin(&mut command);
    let index = directory.join("index");
    let mut killed = 0;
    while killed < kills() && running.is_running() {
        if let Some(daemon) = serving(&mut running, &index) {
            // The run may be over by now, and its daemon gone.
            let kill = Command::new("kill").args(["-KILL", &daemon.to_string()]).output().unwrap();
            killed += usize::from(kill.status.success());
        }
    }
    assert!(killed > 0);
    running.wait().expect(0);
}

/// A daemon that is nobody's own.
pub fn daemon(world: &World, socket: &Path, options: &[&str]) -> Running {
    let mut command = Command::new(world.part("posternd"));
    command.arg("--socket").arg(socket).arg("--root").arg(world.directory()).arg("--no-probes");
    let mut running = begin(command.args(options));
    until("the daemon listens", || {
        assert!(running.is_running());
        socket.exists().then_some(())
    });
    running
}

fn surroundings() -> Option<(World, PathBuf, PathBuf)> {
    let world = World::new()?;
    world.format("v", "16M");
    let (program, socket) = (world.guest("serve")?, world.path("own.sock"));
    Some((world, program, socket))
}

/// `serve` on the volume `v` of the daemon that listens on `socket`.
pub fn served(world: &World, program: &Path, socket: &Path, options: &[&str]) -> Server {
    let mut command = world.postern(["run", "--key-file", "v.key", "--volume", "/sealed/data=v"]);
    command.arg("--socket").arg(socket).args(options).arg("--").arg(program);
    let (server, first) = Server::start(command.args(["/sealed/data", "rw"]));
    assert_eq!(first, "ready");
    server
}

#[test]
fn a_daemon_that_takes_anothers_place_gets_its_programs() {
    let Some((world, program, socket)) = surroundings() else { return };
    let mut now = daemon(&world, &socket, &[]);
    let mut server = served(&world, &program, &socket, &[]);
    for block in 0..5 {
        server.expect(&format!("w {block} {}", block + 1), "ok");
        let next = daemon(&world, &socket, &["--succeed"]);
        now.wait().expect(0);
        now = next;
        server.expect(&format!("r {block}"), &(block + 1).to_string());
        server.expect("s", "ok");
    }
    server.end();
    // Nobody is there whose place it could take.
    signal("TERM", now.pid());
    now.wait().expect(0);
    let alone = daemon(&world, &socket, &["--succeed"]);
    signal("TERM", alone.pid());
    alone.wait().expect(0);
    assert!(!socket.exists());
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn a_volume_that_others_wrote_while_there_was_no_daemon_is_lost_and_comes_back() {
    let Some((world, program, socket)) = surroundings() else { return };
    let mut now = daemon(&world, &socket, &[]);
    let mut server = served(&world, &program, &socket, &[]);
    server.expect("w 0 1", "ok");
    server.expect("s", "ok");
    server.expect("w 0 2", "ok");
    signal("KILL", now.pid());
    now.wait();
    let volume = world.path("v");
    let mut other = Server::on(&world, &volume, &program, &[]);
    // The daemon had answered: what it was asked is done.
    other.expect("w 1 7", "ok");
    other.end();
    now = daemon(&world, &socket, &[]);
    server.expect("s", EIO);
    server.expect("s", "ok");
    server.expect("r 1", "7");
    server.expect("w 0 3", "ok");
    server.expect("s", "ok");
    server.expect("r 0", "3");
    server.end();
    signal("TERM", now.pid());
    now.wait().expect(0);
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn what_a_program_leaves_running_ends_with_errors_and_does_not_hang() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let [begun, left] = ["begun", "left"].map(|name| world.path(name));
    // Processes that only read, and whoever starts them: some are hit as they end.
    let script = format!(
        "(while cat /sealed/data > {begun}; do :; done; echo > {left}) 2>/dev/null & \
         until test -s {begun}; do :; done",
        begun = begun.display(),
        left = left.display()
    );
    for _ in 0..5 {
        end(&mut world.run(&volume, ["sh", "-c", &script])).expect(0);
        until("the process that was left has ended", || left.exists().then_some(()));
        std::fs::remove_file(&left).unwrap();
        std::fs::remove_file(&begun).unwrap();
    }
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn requests_fail_when_no_daemon_comes_in_time() {
    let Some((world, program, socket)) = surroundings() else { return };
    let now = daemon(&world, &socket, &[]);
    let mut server = served(&world, &program, &socket, &["--daemon-wait", "1"]);
    server.expect("w 0 1", "ok");
    signal("KILL", now.pid());
    now.wait();
    server.expect("w 0 2", EIO);
    server.expect("r 0", EIO);
    server.end();
}
