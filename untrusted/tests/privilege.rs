//! The serving daemon needs no capability, while the probes that its loader attached count.
//!
//! Needs root, setpriv(1) and the object that `cargo xtask build` builds; says so and passes where
//! one is missing.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{FakeLane, direct_io_works, skip};
use postern_edl::port::{Submission, op};
use posternd::engine::Interface;
use posternd::probes::{OBJECT_NAME, OBJECT_VARIABLE, Probes, ProbesUnavailable};

/// A user that owns nothing on any machine.
const NOBODY: u32 = 65534;
/// What the loader needs: capabilities(7).
const LOADERS: &str = "+bpf,+perfmon,+dac_read_search,+syslog";
const REQUESTS: u64 = 20;

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The probes' object, where they can be loaded at all.
fn object() -> Option<PathBuf> {
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/setpriv").exists() {
        skip("needs root and setpriv(1)");
        return None;
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let named = std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from);
    let places = ["", "debug", "release"].map(|sub| target.join(sub).join(OBJECT_NAME));
    let Some(object) = named.into_iter().chain(places).find(|path| path.is_file()) else {
        skip("no postern-probes.o; build it by `cargo xtask build`");
        return None;
    };
    match Probes::load(Some(&object), std::process::id(), Interface::Libaio) {
        Ok(_) => Some(object),
        Err(error @ ProbesUnavailable::Refused { .. }) => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

#[test]
fn a_daemon_of_its_own_user_serves_without_any_capability_while_its_probes_count() {
    let Some(object) = object() else { return };
    // Where nobody may come: /tmp, not the tree.
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    if !direct_io_works(directory.path()) {
        return;
    }
    std::fs::copy(env!("CARGO_BIN_EXE_posternd"), path("posternd")).unwrap();
    std::fs::copy(object, path(OBJECT_NAME)).unwrap();
    std::fs::write(path("v"), vec![0; 1 << 20]).unwrap();
    for name in ["", "posternd", OBJECT_NAME, "v"] {
        std::os::unix::fs::chown(path(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
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
    std::fs::copy(env!("CARGO_BIN_EXE_posternd"), path("posternd")).unwrap();
    std::fs::copy(object, path(OBJECT_NAME)).unwrap();
    for name in ["", "posternd", OBJECT_NAME] {
        std::os::unix::fs::chown(path(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
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
