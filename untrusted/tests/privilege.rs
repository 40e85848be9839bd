//! The serving daemon needs no capability, while the probes that its loader attached count.
//!
//! Needs root, setpriv(1) and the object that `cargo xtask build` builds; says so and passes where
//! one is missing.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/probed.rs"]
mod probed;

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use common::{FakeLane, direct_io_works};
use postern_edl::port::{Submission, op};
use posternd::probes::OBJECT_VARIABLE;
use probed::{Ended, LOADERS, NOBODY, object, parts_for_nobody};

const REQUESTS: u64 = 20;

#[test]
fn a_daemon_of_its_own_user_serves_without_any_capability_while_its_probes_count() {
    let Some(object) = object() else { return };
    // Where nobody may come: /tmp, not the tree.
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    if !direct_io_works(directory.path()) {
        return;
    }
    parts_for_nobody(directory.path(), &object, &["v"]);
    let user = NOBODY.to_string();
    let mut command = Command::new("/usr/bin/setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "--no-new-privs"]);
    command.args(["--inh-caps", LOADERS, "--ambient-caps", LOADERS]);
    command.args(["--bounding-set", &format!("-all,{LOADERS}")]);
    command.arg(path("posternd")).arg("--socket").arg(path("control"));
    command.arg("--root").arg(directory.path()).env_remove(OBJECT_VARIABLE);
    let mut daemon = Ended(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut ready = String::new();
    BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("posternd: ready"), "{ready}");

    let mut lane = FakeLane::attach(&path("control"), 8, 1 << 20);
    let handle = lane.open("v").handle;
    let data = lane.block(0);
    for id in 0..REQUESTS {
        let read = Submission {
            id: id << 32,
            op: op::READ as u32,
            handle,
            length: 4096,
            data,
            ..Submission::default()
        };
        assert_eq!(lane.run(read), 4096);
    }
    let stats = lane.stats();
    assert_eq!(stats.source, "ebpf", "{:?}", stats.source_note);
    let count = |stage: &str| {
        let rows = stats.stages.iter().filter(|row| row.stage == stage);
        rows.map(|row| row.count).sum::<u64>()
    };
    // A probe may be left out where the kernel is inside another one; that has tests of its own.
    assert!((1..=REQUESTS).contains(&count("device")), "{:?}", stats.stages);

    let process = format!("/proc/{}", daemon.0.id());
    for task in std::fs::read_dir(format!("{process}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let line = status.lines().find(|line| line.starts_with(set)).unwrap();
            assert!(line.ends_with("\t0000000000000000"), "{line}");
        }
        assert!(status.contains(&format!("Uid:\t{user}\t{user}\t{user}\t{user}\n")), "{status}");
    }
    let children = format!("{process}/task/{}/children", daemon.0.id());
    assert_eq!(std::fs::read_to_string(children).unwrap_or_default(), "", "the loader has ended");
    lane.end();
}

/// What the daemon says when the loader may not load is what has to be done about it.
#[test]
fn a_daemon_without_the_loaders_capabilities_serves_without_probes_and_says_what_they_need() {
    let Some(object) = object() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    parts_for_nobody(directory.path(), &object, &[]);
    let user = NOBODY.to_string();
    let mut command = Command::new("/usr/bin/setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    command.arg(path("posternd")).arg("--socket").arg(path("control"));
    command.env_remove(OBJECT_VARIABLE);
    let mut daemon = Ended(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut ready = String::new();
    BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("posternd: ready"), "{ready}");
    let mut lane = FakeLane::attach(&path("control"), 8, 4096);
    let stats = lane.stats();
    assert_eq!(stats.source, "daemon");
    let note = stats.source_note.unwrap_or_default();
    assert!(note.contains("CAP_BPF") && note.contains("CAP_PERFMON"), "{note}");
    lane.end();
}
