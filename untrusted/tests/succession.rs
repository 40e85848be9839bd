//! A daemon that is started again goes on with the probes of the one that was killed: a service
//! manager keeps them, as systemd's file descriptor store does.
//!
//! Needs root, setpriv(1) and the object that `cargo xtask build` builds; says so and passes where
//! one is missing.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/probed.rs"]
mod probed;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{FakeLane, direct_io_works};
use postern_edl::port::{Submission, op};
use postern_edl::{MEASURED_LATENCY, MEASURED_PROBES, MEASURED_VOLUMES};
use posternd::passing;
use posternd::probes::kept::NAME;
use posternd::probes::{ABANDONED, OBJECT_NAME, OBJECT_VARIABLE};
use probed::{Ended, LOADERS, NOBODY, object, parts_for_nobody};
use rustix::net::RecvFlags;

/// The end of what sd_notify(3) describes that a service manager has.
struct Manager {
    directory: PathBuf,
    socket: UnixDatagram,
    kept: Vec<OwnedFd>,
}

impl Manager {
    fn new(directory: &Path) -> Self {
        let socket = UnixDatagram::bind(directory.join("notify")).unwrap();
        std::os::unix::fs::chown(directory.join("notify"), Some(NOBODY), Some(NOBODY)).unwrap();
        Self { directory: directory.to_owned(), socket, kept: Vec::new() }
    }

    /// Does what came in says; answers what was said.
    fn read(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        while let Ok((text, descriptors)) = passing::receive(&self.socket, RecvFlags::DONTWAIT) {
            let text = String::from_utf8(text).unwrap();
            if text.contains("FDSTOREREMOVE=1") {
                self.kept.clear();
            } else if text.contains("FDSTORE=1") {
                assert!(text.contains(&format!("FDNAME={NAME}")) && text.contains("FDPOLL=0"));
                // In another order than they came: systemd promises none.
                self.kept.extend(descriptors.into_iter().rev());
            }
            said.push(text);
        }
        said
    }

    /// Starts a daemon, with what is kept, `capable` of loading probes or not, and waits until it
    /// serves.
    fn start(&mut self, capable: bool) -> Ended {
        let user = NOBODY.to_string();
        let mut command = Command::new("/usr/bin/setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "--no-new-privs"]);
        if capable {
            command.args(["--inh-caps", LOADERS, "--ambient-caps", LOADERS]);
            command.args(["--bounding-set", &format!("-all,{LOADERS}")]);
        } else {
            command.args(["--inh-caps", "-all", "--bounding-set", "-all"]);
        }
        let count = self.kept.len();
        let names = vec![NAME; count].join(":");
        let line = format!("LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names} exec \"$@\"");
        command.args(["sh", "-c", &line, "sh"]).arg(self.directory.join("posternd"));
        command.arg("--socket").arg(self.directory.join("control"));
        command.arg("--root").arg(&self.directory).env_remove(OBJECT_VARIABLE);
        command.env("NOTIFY_SOCKET", self.directory.join("notify"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let given: Vec<_> = self.kept.iter().map(|fd| fd.as_raw_fd()).collect();
        // SAFETY: between fork and exec: system calls, nothing allocates.
        unsafe {
            command.pre_exec(move || {
                let mut copies = [-1; passing::MOST_DESCRIPTORS];
                for (copy, fd) in copies.iter_mut().zip(&given) {
                    *copy = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 512);
                }
                for (to, copy) in (3..).zip(copies.iter().take(given.len())) {
                    if libc::dup2(*copy, to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut daemon = Ended(command.spawn().unwrap());
        let mut ready = String::new();
        let out = daemon.0.stdout.as_mut().unwrap();
        BufReader::new(out).read_line(&mut ready).unwrap();
        if !ready.starts_with("posternd: ready") {
            let mut said = String::new();
            daemon.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("{ready}{said}");
        }
        daemon
    }

    fn lane(&self) -> FakeLane {
        FakeLane::attach(&self.directory.join("control"), 64, 1 << 20)
    }
}

fn begin() -> Option<(tempfile::TempDir, Manager)> {
    let object = object()?;
    // Where nobody may come: /tmp, not the tree.
    let directory = tempfile::tempdir().unwrap();
    if !direct_io_works(directory.path()) {
        return None;
    }
    parts_for_nobody(directory.path(), &object, &["a", "b"]);
    let manager = Manager::new(directory.path());
    Some((directory, manager))
}

/// Reads `count` blocks of the file `handle`, one after the other.
fn read(lane: &mut FakeLane, handle: u32, count: u64) {
    for at in 0..count {
        let (data, offset) = (lane.block(0), at * 4096);
        let id = lane.sq_published << 32;
        let read = Submission {
            id,
            op: op::READ as u32,
            handle,
            length: 4096,
            data,
            offset,
            ..Submission::default()
        };
        assert_eq!(lane.run(read), 4096);
    }
}

/// Reads that the probes recorded of each volume, by its name.
fn recorded(lane: &mut FakeLane) -> BTreeMap<String, u64> {
    let number = |item: &serde_json::Value| item["volume"].as_u64().unwrap();
    let volumes = lane.measured(MEASURED_VOLUMES, 0, 0);
    let names: BTreeMap<_, _> =
        volumes.iter().map(|item| (number(item), item["name"].as_str().unwrap())).collect();
    let latency = lane.measured(MEASURED_LATENCY, 0, 0);
    let of_probes =
        latency.iter().filter(|item| item["source"] == "ebpf" && item["stage"] == "host_submit");
    of_probes
        .map(|item| {
            let name = names.get(&number(item)).copied().unwrap_or("not open");
            (name.to_owned(), item["count"].as_u64().unwrap())
        })
        .collect()
}

fn counts(pairs: [(&str, u64); 2]) -> BTreeMap<String, u64> {
    pairs.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}

/// Maps that a daemon has open: those that it reads, and none by which the probes could be turned
/// to another process.
fn maps_of(daemon: &Ended) -> usize {
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.0.id())).unwrap();
    let links = open.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    links.filter(|link| link.to_str().is_some_and(|link| link.contains("bpf-map"))).count()
}

/// Panics unless every request that was seen ended, or was in flight when its daemon died. Answers
/// how many were.
#[track_caller]
fn add_up(lane: &mut FakeLane) -> u64 {
    let report = lane.stats();
    let of = |name: &str| report.counters[&format!("probe_{name}")];
    for name in ["reap_unmatched", "overwritten", "batch_lost", "negative_crossing_in"] {
        assert_eq!(of(name), 0, "{name}: {:?}", report.counters);
    }
    let rows = report.stages.iter().filter(|row| row.stage == "host_submit");
    let ended: u64 = rows.map(|row| row.count).sum();
    let gone = of("not_accepted") + of(ABANDONED);
    assert_eq!(of("requests_seen"), ended + gone, "{:?}", report.counters);
    assert_eq!(lane.measured(MEASURED_PROBES, 2, 0)[0]["under_way"], 0);
    of(ABANDONED)
}

#[test]
fn counts_go_on_under_the_names_of_their_volumes_and_no_capability_is_needed_for_it() {
    let Some((_directory, mut manager)) = begin() else { return };
    let daemon = manager.start(true);
    let mut lane = manager.lane();
    assert_eq!(lane.stats().source, "ebpf", "{:?}", lane.stats().source_note);
    let (a, b) = (lane.open("a").handle, lane.open("b").handle);
    read(&mut lane, a, 30);
    read(&mut lane, b, 7);
    assert_eq!(recorded(&mut lane), counts([("a", 30), ("b", 7)]));
    assert_eq!(maps_of(&daemon), 2);
    drop((lane, daemon));
    let said = manager.read();
    assert_eq!(said.len(), 2, "kept and ready: {said:?}");
    for round in 1..4 {
        let daemon = manager.start(false);
        let mut lane = manager.lane();
        // Numbered in the other order, if nobody remembered.
        let (b, a) = (lane.open("b").handle, lane.open("a").handle);
        read(&mut lane, b, 10);
        read(&mut lane, a, 1);
        let expected = counts([("a", 30 + round), ("b", 7 + 10 * round)]);
        assert_eq!(recorded(&mut lane), expected, "{:?}", lane.stats());
        assert_eq!(add_up(&mut lane), 0);
        assert_eq!(maps_of(&daemon), 2);
        drop((lane, daemon));
        assert_eq!(manager.read(), ["READY=1"], "nothing new to keep");
    }
}

#[test]
fn what_was_in_flight_when_a_daemon_died_is_told_from_what_ended() {
    const KILLS: usize = 10;
    let Some((_directory, mut manager)) = begin() else { return };
    let mut abandoned = 0;
    for kill in 0..KILLS {
        let daemon = manager.start(kill == 0);
        let mut lane = manager.lane();
        assert_eq!(lane.stats().source, "ebpf", "{:?}", lane.stats().source_note);
        let now = add_up(&mut lane);
        assert!(now >= abandoned, "{now} < {abandoned}");
        abandoned = now;
        let handle = lane.open("a").handle;
        let reads: Vec<_> = (0..64)
            .map(|at| Submission {
                id: at << 32 | at,
                op: op::READ as u32,
                handle,
                length: 16 << 10,
                data: lane.block(0) + (at << 14),
                offset: (at % 16) << 14,
                ..Submission::default()
            })
            .collect();
        lane.submit(&reads);
        // The probes have seen the first of them, or none is left.
        lane.wait(1 + kill);
        drop((daemon, lane));
        manager.read();
    }
    println!("{abandoned} requests died with their daemons");
}

#[test]
fn other_probes_are_not_taken_over_but_loaded_and_kept_in_their_place() {
    let Some((directory, mut manager)) = begin() else { return };
    let daemon = manager.start(true);
    let mut lane = manager.lane();
    let a = lane.open("a").handle;
    read(&mut lane, a, 5);
    drop((lane, daemon));
    manager.read();
    // An upgrade: the object is another one, if only by a byte behind its end.
    let object = directory.path().join(OBJECT_NAME);
    let mut bytes = std::fs::read(&object).unwrap();
    bytes.push(0);
    std::fs::write(&object, bytes).unwrap();
    let daemon = manager.start(true);
    let mut lane = manager.lane();
    let a = lane.open("a").handle;
    read(&mut lane, a, 3);
    let found = recorded(&mut lane);
    assert_eq!(found, BTreeMap::from([("a".to_owned(), 3)]), "{:?}", lane.stats());
    drop((lane, daemon));
    let said = manager.read();
    assert_eq!(said.len(), 3, "forget, keep, ready: {said:?}");
    // Those of the upgrade are whole.
    let _daemon = manager.start(false);
    let mut lane = manager.lane();
    lane.open("a");
    assert_eq!(recorded(&mut lane), found);
    add_up(&mut lane);
}
