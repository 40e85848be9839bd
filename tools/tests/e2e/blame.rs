//! Where a delay is, the probes say that it is: a stopped daemon, a busy enclave, a full queue of the
//! host, a slow device.
//!
//! Each test holds a few requests for [`HELD`] at one place, a hundred times longer than anything else
//! takes, and compares how much each stage grew. The device is a loop device on a file system in
//! memory that can be frozen: then its writes wait, and no real disk has a say.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    common::{Running, World, begin, end, signal, skip, until},
    devices::{Frozen, Loop, Mounted, Throttled, are_possible},
    lease::Server,
};

/// How long requests are held.
const HELD: Duration = Duration::from_secs(2);
const HELD_NS: u64 = 2_000_000_000;

/// A daemon with its probes on a device that can be held, and a program that does I/O on it. What is
/// first here goes first.
pub struct Scene {
    server: Server,
    daemon: Running,
    socket: PathBuf,
    device: Loop,
    below: Mounted,
    _memory: Loop,
    _base: Mounted,
    world: World,
}

impl Scene {
    /// `None` (said loudly) where this machine can not have it.
    pub fn new() -> Option<Self> {
        let world = World::new()?;
        if !are_possible(&["fsfreeze", "mkfs.ext4"]) {
            return None;
        }
        let program = world.guest("burst")?;
        let base = Mounted::new("tmpfs", None, &world.path("base"))?;
        let memory = Loop::over(&base.path().join("memory"), "400M", false)?;
        let below = Mounted::new("ext4", Some(memory.path()), &world.path("below"))?;
        let device = Loop::over(&below.path().join("device"), "200M", true)?;
        let volume = world.format("v", "16M");
        let mut copy = Command::new("dd");
        copy.arg(format!("if={}", volume.display()));
        copy.arg(format!("of={}", device.path().display()));
        end(copy.args(["bs=1M", "oflag=direct", "conv=fsync", "status=none"])).expect(0);
        let socket = world.path("own.sock");
        let daemon = probed(&world, &socket, device.path())?;
        let mut command = world.postern(["run", "--key-file", "v.key", "--volume"]);
        command.arg("/sealed/data=v").arg("--socket").arg(&socket).arg("--").arg(program);
        let (server, first) = Server::start(command.arg("/sealed/data"));
        assert_eq!(first, "ready");
        let mut scene =
            Self { server, daemon, socket, device, below, _memory: memory, _base: base, world };
        // What is done at the first requests only is over.
        scene.requests(4);
        Some(scene)
    }

    /// What `postern WORDS --json` says of the daemon.
    pub fn ask(&self, words: &[&str]) -> Value {
        let mut command = self.world.postern(words);
        let said = end(command.args(["--json", "--socket"]).arg(&self.socket)).expect(0).stdout;
        serde_json::from_str(&said).unwrap()
    }

    /// The daemon's statistics.
    pub fn report(&self) -> Value {
        self.ask(&["stats"])
    }

    fn counter(&self, name: &str) -> u64 {
        self.report()["counters"][name].as_u64().unwrap()
    }

    /// Nanoseconds spent in each stage so far, by all writes together.
    fn spent(&self) -> BTreeMap<String, u64> {
        let report = self.report();
        let rows = report["stages"].as_array().unwrap().iter();
        rows.filter(|row| row["operation"] == "write")
            .map(|row| (row["stage"].as_str().unwrap().to_owned(), row["sum_ns"].as_u64().unwrap()))
            .collect()
    }

    /// Submits `count` writes.
    fn submit(&mut self, count: u64) {
        self.server.expect(&format!("w {count}"), "ok");
    }

    /// Collects `count` of them, all that there are.
    fn collect(&mut self, count: u64) {
        self.server.expect("g", &count.to_string());
    }

    /// Writes and collects, so often that each place in the lane is used again: only then is it known
    /// when what was there before was delivered.
    pub fn requests(&mut self, times: usize) {
        for _ in 0..times {
            self.submit(32);
            self.collect(32);
        }
    }

    /// Has the device hold what it is asked to write, until what is answered is dropped.
    fn hold(&self) -> Frozen {
        self.below.freeze()
    }

    /// Waits until io_submit was entered with `count` requests more than `before`.
    fn handed_over(&self, before: u64, count: u64) {
        until("the kernel has the requests", || {
            (self.counter("probe_requests_seen") >= before + count).then_some(())
        });
    }

    /// Panics unless `stage` alone grew since `before`, by at least `least` times [`HELD`].
    #[track_caller]
    fn blames(&self, stage: &str, least: u64, before: &BTreeMap<String, u64>) {
        let now = self.spent();
        let grew = |stage: &String| now[stage] - before.get(stage).copied().unwrap_or(0);
        let all: BTreeMap<_, _> = now.keys().map(|stage| (stage.as_str(), grew(stage))).collect();
        assert!(all[stage] >= least * HELD_NS, "{stage}: {all:?}");
        for (other, ns) in all.iter().filter(|(other, _)| **other != stage) {
            assert!(*ns < all[stage] / 2, "{other} as well as {stage}: {all:?}");
        }
    }

    /// Ends the program, then the daemon.
    pub fn end(self) {
        let Self { server, daemon, socket, .. } = self;
        server.end();
        signal("TERM", daemon.pid());
        daemon.wait().expect(0);
        assert!(!socket.exists());
    }
}

/// A daemon with probes that lets `device` be opened as `v`; `None` (said loudly) where probes can not
/// run.
pub fn probed(world: &World, socket: &Path, device: &Path) -> Option<Running> {
    let mut command = Command::new(world.part("posternd"));
    command.arg("--socket").arg(socket).arg("--file").arg(format!("v={}", device.display()));
    let mut daemon = begin(&mut command);
    until("the daemon listens", || {
        assert!(daemon.is_running());
        socket.exists().then_some(())
    });
    let said = end(world.postern(["stats", "--json", "--socket"]).arg(socket)).expect(0).stdout;
    let report: Value = serde_json::from_str(&said).unwrap();
    if report["source"] != "ebpf" {
        skip(&format!("no probes: {}", report["source_note"]));
        return None;
    }
    Some(daemon)
}

/// Stops a process, and waits until it stands.
fn stop(pid: u32) {
    signal("STOP", pid);
    until("the process stands", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let mut states = tasks.map(|task| {
            let text = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            text.rsplit(") ").next().unwrap().starts_with('T')
        });
        states.all(|stands| stands).then_some(())
    });
}

/// The time that passes is what is injected here; nothing waits for anything.
fn hold_still() {
    let until = Instant::now() + HELD;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::sleep(left);
    }
}

#[test]
fn a_stopped_daemon_is_blamed_on_the_way_to_it() {
    let Some(mut scene) = Scene::new() else { return };
    let before = scene.spent();
    stop(scene.daemon.pid());
    scene.submit(8);
    hold_still();
    signal("CONT", scene.daemon.pid());
    scene.collect(8);
    scene.blames("crossing_out", 8, &before);
    scene.end();
}

#[test]
fn a_busy_enclave_is_blamed_on_the_way_back() {
    let Some(mut scene) = Scene::new() else { return };
    let (before, seen) = (scene.spent(), scene.counter("probe_requests_seen"));
    let held = scene.hold();
    scene.submit(8);
    scene.handed_over(seen, 8);
    let enclave = scene.server.program_called("burst");
    stop(enclave);
    drop(held);
    until("the daemon has published them", || {
        let report = scene.report();
        let of = |name: &str| report["counters"][name].as_u64().unwrap();
        (of("completions") == of("submissions")).then_some(())
    });
    // Longer than the device was held.
    (0..3).for_each(|_| hold_still());
    signal("CONT", enclave);
    scene.collect(8);
    until("each place in the lane is used again", || {
        scene.requests(1);
        (scene.spent()["crossing_in"] - before["crossing_in"] >= 24 * HELD_NS).then_some(())
    });
    scene.blames("crossing_in", 24, &before);
    scene.end();
}

/// Four of the requests are with the device, the others wait for a place in its queue.
#[test]
fn a_full_queue_of_the_host_is_blamed_on_handing_over() {
    let Some(mut scene) = Scene::new() else { return };
    scene.device.set("nr_requests", "4");
    scene.device.set("nomerges", "2");
    let (before, seen) = (scene.spent(), scene.counter("probe_requests_seen"));
    // It finds all of them at once, and hands them over by one call.
    stop(scene.daemon.pid());
    scene.submit(32);
    let held = scene.hold();
    signal("CONT", scene.daemon.pid());
    scene.handed_over(seen, 32);
    hold_still();
    drop(held);
    scene.collect(32);
    scene.blames("host_submit", 20, &before);
    scene.end();
}

/// The kernel holds the requests back behind io_submit, on their way to the device's queue: what the
/// device would do if it were slow.
#[test]
fn a_slow_device_is_blamed_on_the_device() {
    let Some(mut scene) = Scene::new() else { return };
    let Some(slow) = Throttled::new(&scene.device, scene.daemon.pid()) else { return };
    let (before, seen) = (scene.spent(), scene.counter("probe_requests_seen"));
    slow.limit(Some(1));
    scene.submit(8);
    scene.handed_over(seen, 8);
    hold_still();
    slow.limit(None);
    scene.collect(8);
    // One or two are let through before.
    scene.blames("device", 4, &before);
    drop(slow);
    scene.end();
}
