//! The daemon's static tracepoints: what they cost where nobody follows them, and that the scripts in
//! tools/bpftrace do what they say.

use std::{
    collections::BTreeSet,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    common::{World, begin, end, fio_words, is_root, on_path, signal, skip, until},
    succession::daemon,
};

/// What fio writes; each write is followed by a flush.
const WRITES: u64 = 300;
/// The instruction of a tracepoint that nobody follows.
const NOP: u8 = 0x90;

fn scripts() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("bpftrace");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut scripts: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|end| end == "bt")).collect();
    scripts.sort();
    scripts
}

/// The places of the daemon's tracepoints: name, address in the program. `None` (said loudly) where
/// they can not be read.
fn places(world: &World) -> Option<Vec<(String, u64)>> {
    if !on_path("readelf") {
        skip("binutils are not installed");
        return None;
    }
    let notes = end(Command::new("readelf").arg("-n").arg(world.part("posternd"))).expect(0).stdout;
    let mut places = Vec::new();
    let mut lines = notes.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line == "Provider: postern" {
            let name = lines.next().unwrap().strip_prefix("Name: ").unwrap();
            let at = lines.next().unwrap().strip_prefix("Location: 0x").unwrap();
            let at = u64::from_str_radix(at.split_once(',').unwrap().0, 16).unwrap();
            places.push((name.to_owned(), at));
        }
    }
    Some(places)
}

/// Where a process' program begins in its memory.
fn beginning(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let first = maps.lines().find(|line| line.ends_with("/posternd")).unwrap();
    u64::from_str_radix(first.split_once('-').unwrap().0, 16).unwrap()
}

#[test]
fn a_tracepoint_that_nobody_follows_is_a_nop_and_each_start_has_a_done() {
    let Some(world) = World::new() else { return };
    let Some(places) = places(&world) else { return };
    let names: BTreeSet<&str> = places.iter().map(|(name, _)| name.as_str()).collect();
    let stages = ["device", "request", "submit", "work"];
    let wanted = stages.map(|stage| ["done", "start"].map(|end| format!("{stage}__{end}")));
    assert_eq!(names, wanted.iter().flatten().map(String::as_str).collect());
    let socket = world.path("own.sock");
    let daemon = daemon(&world, &socket, &[]);
    let memory = std::fs::File::open(format!("/proc/{}/mem", daemon.pid())).unwrap();
    for (name, at) in &places {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, beginning(daemon.pid()) + at).unwrap();
        assert_eq!(byte[0], NOP, "{name} at {at:#x}");
    }
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
}

/// Numbers that bpftrace printed of a count.
fn count(said: &str, name: &str) -> u64 {
    let line = said.lines().find_map(|line| line.strip_prefix(&format!("@{name}: ")));
    line.unwrap_or_else(|| panic!("no @{name}: {said}")).parse().unwrap()
}

#[test]
fn each_script_for_bpftrace_shows_what_happens() {
    let Some(world) = World::new() else { return };
    if !is_root() || !on_path("bpftrace") {
        return skip("bpftrace is not installed (`cargo xtask setup`), or this is not root");
    }
    let Some(places) = places(&world) else { return };
    let scripts = scripts();
    assert!(scripts.len() >= 5, "{scripts:?}");
    world.format("v", "16M");
    let socket = world.path("own.sock");
    let daemon = daemon(&world, &socket, &[]);
    let pid = daemon.pid();
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let first = beginning(pid);
    let old = std::env::var_os("PATH").unwrap();
    let path = [world.part("")].into_iter().chain(std::env::split_paths(&old));
    let path = std::env::join_paths(path).unwrap();
    let load = ["--rw=randwrite", "--bs=4k", "--size=4m", "--fsync=1", "--norandommap"];
    let mut words = fio_words("/sealed/data");
    words.extend(load.map(str::to_owned));
    words.push(format!("--number_ios={WRITES}"));
    for script in scripts {
        let text = std::fs::read_to_string(&script).unwrap();
        let mut bpftrace = world.command("bpftrace");
        bpftrace.env("PATH", &path).args(["-p", &pid.to_string()]).arg(&script);
        if script.ends_with("slow.bt") {
            bpftrace.arg("0");
        }
        let mut running = begin(&mut bpftrace);
        until("bpftrace follows the daemon", || {
            assert!(running.is_running(), "{}", script.display());
            let mut followed = places.iter().filter(|(name, _)| text.contains(&format!(":{name}")));
            let all = followed.all(|(_, at)| {
                let mut byte = [NOP];
                memory.read_exact_at(&mut byte, first + at).unwrap();
                byte[0] != NOP
            });
            all.then_some(())
        });
        let socket = socket.to_str().unwrap();
        let options = ["--key-file", "v.key", "--socket", socket];
        end(&mut world.run_with(Path::new("v"), &options, &words)).expect(0);
        signal("INT", running.pid());
        let ended = running.wait();
        let said = &ended.stdout;
        assert_eq!(ended.code(), 0, "{}: {said}{}", script.display(), ended.stderr);
        let shows = |name: &str| assert!(said.contains(&format!("@{name}")), "{said}");
        match script.file_name().unwrap().to_str().unwrap() {
            "requests.bt" => {
                let (started, done) = (count(said, "started"), count(said, "done"));
                assert!(started == done && done >= 2 * WRITES, "{said}");
                shows("microseconds[2]");
            }
            "stages.bt" => ["before:", "device:", "after:"].iter().for_each(|name| shows(name)),
            "batches.bt" => ["accepted:", "microseconds:"].iter().for_each(|name| shows(name)),
            "slow.bt" => {
                let lines = said.lines().filter(|line| line.contains(" 0x")).count();
                assert!(lines as u64 >= 2 * WRITES, "{said}");
            }
            // Whether the daemon flushes by itself depends on how long a flush takes.
            "work.bt" => shows("started:"),
            other => panic!("nothing is known of {other}"),
        }
    }
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
}
