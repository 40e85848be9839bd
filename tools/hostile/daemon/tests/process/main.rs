//! Unmodified programs under `postern run` with a daemon that misbehaves: they never see a wrong
//! byte and never crash. Errors are fine; what must not matter makes none.
//!
//! `cargo xtask test` (or `cargo xtask e2e`) names the parts' directory in `POSTERN_E2E_PARTS`.
//! Without it every test here says that it skips, so that a plain `cargo test` stays green.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "the end-to-end tests' helpers, of which these need some")]
#[path = "../../../../tests/e2e/common.rs"]
mod common;
mod image;

use std::{
    io::{BufRead as _, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use common::{Ended, World, begin, children, end, name_of, signal, until};

/// A host may keep answers for itself. A program that waits for one so long loses its daemon, and
/// then has to end by itself: requests wait [`ANOTHER_DAEMON`] for another one.
const STALLED: Duration = Duration::from_secs(15);
/// `--daemon-wait`, seconds.
const ANOTHER_DAEMON: &str = "1";

/// A daemon that misbehaves; ended when dropped.
struct Hostile {
    child: Child,
    socket: PathBuf,
    lines: Lines<BufReader<ChildStdout>>,
    misdeeds: u64,
}

impl Hostile {
    fn start(world: &World, script: &str, seed: u64, more: &[(&str, &Path)]) -> Self {
        let socket = world.path(&format!("{script}-{seed}.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_hostile-daemon"));
        command
            .args(["--script", script, "--seed", &seed.to_string()])
            .arg("--socket")
            .arg(&socket);
        for (option, path) in more {
            let (option, name) = option.split_once(' ').unwrap_or((option, ""));
            let name = if name.is_empty() { String::new() } else { format!("{name}=") };
            command.arg(option).arg(format!("{name}{}", path.display()));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "hostile: ready");
        Self { child, socket, lines, misdeeds: 0 }
    }

    /// Waits for the end of what runs at it, or puts an end to itself first.
    #[track_caller]
    fn see_out(&mut self, what: &str, command: &mut Command) -> Ended {
        let (mut running, started) = (begin(command), Instant::now());
        until("the program ends, or its time is up", || {
            (!running.is_running() || started.elapsed() > STALLED).then_some(())
        });
        if running.is_running() {
            eprintln!("{what}: the host keeps an answer for itself; its daemon is ended");
            self.stop();
        }
        running.wait()
    }

    /// Ends it; answers how many things its lanes did wrong.
    fn end(mut self) -> u64 {
        self.stop();
        self.misdeeds
    }

    fn stop(&mut self) {
        // It ends with its input.
        if self.child.stdin.take().is_some() {
            let last = self.lines.by_ref().map_while(Result::ok).last().unwrap_or_default();
            let count = last.strip_prefix("hostile: misdeeds=").and_then(|n| n.parse().ok());
            self.misdeeds = count.unwrap_or_default();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.stop();
    }
}

/// `postern run` of `program` at a hostile daemon, which knows the volume as `v`.
fn run(world: &World, hostile: &Hostile, shown: &str, wait: &str, program: &[&str]) -> Command {
    let mut command = world.postern(["run", "--key-file", "key", "--daemon-wait", wait]);
    command.arg("--socket").arg(&hostile.socket).args(["--volume", shown, "--"]).args(program);
    command
}

/// A key file, and a volume under it.
fn volume(world: &World, name: &str, size: &str) -> PathBuf {
    std::fs::write(world.path("key"), [7; 32]).unwrap();
    end(&mut world.postern(["format", name, "--size", size, "--key-file", "key"])).expect(0);
    world.path(name)
}

const FIO: [&str; 12] = [
    "fio",
    "--name=hostile",
    "--filename=/sealed/data",
    "--ioengine=libaio",
    "--direct=1",
    "--iodepth=8",
    "--bs=4k",
    "--eta=never",
    "--verify=crc32c",
    "--verify_fatal=1",
    "--verify_state_save=0",
    "--thread",
];

/// Writes 600 blocks at random places, reads and verifies them.
const WORK: [&str; 3] = ["--rw=randwrite", "--size=4m", "--io_size=2400k"];
/// With syncs; the first error ends it. (fio tries a sync that fails for ever if it is to go on.)
const TO_THE_FIRST_ERROR: [&str; 1] = ["--fsync=16"];
/// An error costs that request alone.
const PAST_ERRORS: [&str; 1] = ["--continue_on_error=io"];

fn fio(more: &[&'static str]) -> Vec<&'static str> {
    FIO.iter().chain(more).copied().collect()
}

/// What nobody may ever see of a program, whatever its daemon did.
#[track_caller]
fn saw_no_wrong_byte(what: &str, ended: &Ended) {
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert!(ended.code() < 128, "{what}: ended with {}\n{said}", ended.code());
    said_nothing_bad(what, &said);
}

#[track_caller]
fn said_nothing_bad(what: &str, said: &str) {
    for word in ["verify: bad", "verify failed", "panicked", "stack over"] {
        assert!(!said.contains(word), "{what}: {said}");
    }
}

/// fio at a daemon of this script, for some seeds; answers how many things were done wrong.
fn campaign(script: &str, seeds: std::ops::Range<u64>) -> u64 {
    let Some(world) = World::new() else { return 1 };
    let mut misdeeds = 0;
    for seed in seeds {
        let volume = volume(&world, &format!("v{seed}"), "8M");
        let mut hostile = Hostile::start(&world, script, seed, &[("--file v", &volume)]);
        let how = if seed % 2 == 0 { TO_THE_FIRST_ERROR } else { PAST_ERRORS };
        let words = fio(&[&WORK[..], &how].concat());
        let mut command = run(&world, &hostile, "/sealed/data=v", ANOTHER_DAEMON, &words);
        let what = format!("hostile-daemon --script {script} --seed {seed}");
        let ended = hostile.see_out(&what, &mut command);
        misdeeds += hostile.end();
        saw_no_wrong_byte(&what, &ended);
    }
    misdeeds
}

/// fio at a daemon whose doings make no error, for some seeds; answers how many there were.
fn harmless(script: &str, seeds: std::ops::Range<u64>) -> u64 {
    let Some(world) = World::new() else { return 1 };
    let mut deeds = 0;
    for seed in seeds {
        let volume = volume(&world, &format!("v{seed}"), "8M");
        let hostile = Hostile::start(&world, script, seed, &[("--file v", &volume)]);
        let words = fio(&[&WORK[..], &TO_THE_FIRST_ERROR].concat());
        let ended = end(&mut run(&world, &hostile, "/sealed/data=v", "120", &words));
        deeds += hostile.end();
        let what = format!("hostile-daemon --script {script} --seed {seed}");
        saw_no_wrong_byte(&what, &ended);
        assert_eq!(ended.code(), 0, "{what}\n{}\n{}", ended.stdout, ended.stderr);
        end(&mut world.postern(["verify", &format!("v{seed}"), "--key-file", "key"])).expect(0);
    }
    deeds
}

#[test]
fn a_wrong_byte_would_be_seen() {
    let Some(world) = World::new() else { return };
    let plain = world.path("plain");
    let file = format!("--filename={}", plain.display());
    let words = |more: &[&'static str]| {
        let mut command = world.command("fio");
        command.args(&FIO[1..]).arg(&file).args(more);
        end(&mut command)
    };
    words(&["--rw=write", "--size=64k", "--do_verify=0"]).expect(0);
    let mut bytes = std::fs::read(&plain).unwrap();
    bytes[20_000] ^= 1;
    std::fs::write(&plain, bytes).unwrap();
    let ended = words(&["--rw=read", "--size=64k"]);
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("verify: bad") || said.contains("verify failed"), "{said}");
}

#[test]
fn what_a_daemon_may_do_makes_no_error() {
    harmless("honest", 1..2);
    for script in ["fidgety", "ringing"] {
        assert!(harmless(script, 1..3) > 0, "{script}");
    }
}

#[test]
fn daemons_that_hang_up_amid_calls_and_requests_cost_no_request() {
    harmless("hanging-up", 1..4);
}

#[test]
fn refusals_and_lies_at_the_ring_never_show_a_program_a_wrong_byte() {
    for script in ["refusing", "lying"] {
        assert!(campaign(script, 1..4) > 0, "{script}");
    }
}

#[test]
fn a_broken_ring_and_words_that_change_never_show_a_program_a_wrong_byte() {
    assert!(campaign("breaching", 1..5) > 0);
    campaign("flickering", 1..4);
}

#[test]
fn false_answers_to_control_calls_never_show_a_program_a_wrong_byte() {
    campaign("misinforming", 1..7);
}

#[test]
fn daemons_that_go_on_with_memory_after_they_hung_up_never_show_a_program_a_wrong_byte() {
    campaign("haunting", 1..4);
}

#[test]
fn everything_at_once_never_shows_a_program_a_wrong_byte() {
    assert!(campaign("everything", 1..5) > 0);
}

#[test]
fn a_program_that_waits_for_a_daemon_that_answers_nothing_can_be_killed() {
    let Some(world) = World::new() else { return };
    for script in ["mute", "never-ringing"] {
        let volume = volume(&world, script, "8M");
        let hostile = Hostile::start(&world, script, 1, &[("--file v", &volume)]);
        let program = ["sh", "-c", "cat /sealed/data > copy; exec sleep 1000"];
        let mut running = begin(&mut run(&world, &hostile, "/sealed/data=v", "30", &program));
        let guest = until("the program is there", || {
            assert!(running.is_running(), "it ended by itself");
            children(running.pid()).into_iter().find(|&pid| name_of(pid) == "sh")
        });
        // At whatever it waits for by now: nobody says when a daemon falls silent.
        eprintln!("{script}: process {guest} is killed");
        signal("KILL", guest);
        let ended = running.wait().expect(128 + 9);
        said_nothing_bad(script, &ended.stderr);
    }
}

/// A line of the shell in a protected directory: what it reads is what it wrote, or an error.
#[test]
fn false_answers_about_a_directory_show_a_program_no_wrong_byte_and_no_wrong_file() {
    let Some(world) = World::new() else { return };
    for (script, seeds) in [("honest", 1..2), ("misinforming", 1..6), ("everything", 1..3)] {
        for seed in seeds {
            let name = format!("d-{script}-{seed}");
            let directory = world.path(&name);
            std::fs::create_dir(&directory).unwrap();
            std::fs::write(world.path("key"), [7; 32]).unwrap();
            let mut shown = std::ffi::OsString::from("/data/=");
            shown.push(&directory);
            let begun = ["run", "--no-probes", "--create", "1M", "--key-file", "key", "--volume"];
            let line = "for n in 1 2 3 4; do echo file $n > /data/$n; done";
            let mut made = world.postern(begun);
            end(made.arg(shown).args(["--", "sh", "-c", line])).expect(0);
            let mut hostile =
                Hostile::start(&world, script, seed, &[("--directory d", &directory)]);
            let line = "cd /data || exit 1; for n in 5 6 7; do echo file $n > $n; done; rm 2; mv 3 8; \
                        for n in *; do cat $n; done";
            let program = ["sh", "-c", line];
            let what = format!("hostile-daemon --script {script} --seed {seed}");
            let mut command = run(&world, &hostile, "/data/=d", ANOTHER_DAEMON, &program);
            let ended = hostile.see_out(&what, &mut command);
            saw_no_wrong_byte(&what, &ended);
            let lines: Vec<&str> = ended.stdout.lines().collect();
            let written = |line: &&str| (1..8).any(|n| **line == format!("file {n}"));
            assert!(lines.iter().all(written), "{what}: {}", ended.stdout);
            let mut once = lines.clone();
            once.dedup();
            assert_eq!(once, lines, "{what}");
            if script == "honest" {
                assert_eq!(lines.len(), 6, "{}", ended.stderr);
            }
        }
    }
}

/// A host whose room ends as a program ends: the names of its newest files are not written.
#[test]
fn host_files_whose_names_found_no_room_are_removed_by_the_next_run() {
    let Some(world) = World::new() else { return };
    let (directory, full) = (world.path("d"), world.path("full"));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(world.path("key"), [7; 32]).unwrap();
    let with_a_good_daemon = |line: &str| {
        let begun = ["run", "--no-probes", "--create", "1M", "--key-file", "key", "--volume"];
        let mut command = world.postern(begun);
        command.arg(format!("/data/={}", directory.display())).args(["--", "sh", "-c", line]);
        end(&mut command).expect(0)
    };
    // A table of names that takes longer writes than a host without room has room for.
    let long = "x".repeat(200);
    with_a_good_daemon(&format!("mkdir $(seq -f /data/{long}%g 100)"));
    let lines = [("--directory d", directory.as_path()), ("--full-while", &full)];
    let hostile = Hostile::start(&world, "honest", 1, &lines);
    let line = "for n in a b c d; do echo $n > /data/$n || exit 1; done; : > full";
    end(&mut run(&world, &hostile, "/data/=d", ANOTHER_DAEMON, &["sh", "-c", line])).expect(0);
    drop(hostile);
    let named = with_a_good_daemon("find /data -type f | wc -l").stdout;
    let ids = std::fs::read_dir(&directory).unwrap();
    let ids = ids.filter(|entry| entry.as_ref().unwrap().file_name() != "index").count();
    // Some may have got their names before; the others are gone.
    assert_eq!(named.trim(), ids.to_string());
    end(&mut world.postern(["verify", "d", "--key-file", "key"])).expect(0);
}
