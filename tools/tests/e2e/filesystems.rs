//! What the probes say on each kind of host file system, and on a block device: every request is
//! counted, to the last one; when the device was done is known of each that had one to itself, and of
//! the others it is said that it is not known.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    common::{World, end, fio_words, skip},
    devices::{Loop, Mounted, are_possible},
};

/// Blocks of 4 KiB that fio writes, and then reads once each.
const BLOCKS: u64 = 256;
/// What may not happen to any request.
const TROUBLES: [&str; 9] = [
    "overwritten",
    "untagged",
    "lane_out_of_range",
    "batch_lost",
    "submit_fault",
    "reap_fault",
    "reap_unmatched",
    "negative_device",
    "negative_reap",
];

/// What a run's statistics say.
struct Said {
    report: Value,
    /// Requests recorded, by stage and operation.
    rows: BTreeMap<(String, String), u64>,
}

impl Said {
    fn counter(&self, name: &str) -> u64 {
        self.report["counters"][name].as_u64().unwrap_or_else(|| panic!("{name}"))
    }

    fn row(&self, stage: &str, operation: &str) -> u64 {
        self.rows.get(&(stage.to_owned(), operation.to_owned())).copied().unwrap_or(0)
    }

    /// Requests of an operation of which it is known when the device was done, and all.
    fn known(&self, operation: &str) -> (u64, u64) {
        (self.row("reap", operation), self.row("device", operation))
    }

    /// Nothing is lost, nothing is counted twice, and what is not known is said.
    #[track_caller]
    fn adds_up(&self) {
        for name in TROUBLES {
            assert_eq!(self.counter(&format!("probe_{name}")), 0, "{name}: {}", self.report);
        }
        let all = ["read", "write", "flush"];
        let recorded: u64 = all.iter().map(|operation| self.row("host_submit", operation)).sum();
        let seen = self.counter("probe_requests_seen") - self.counter("probe_not_accepted");
        assert_eq!(recorded, seen, "{}", self.report);
        let elsewhere = ["flushes_here", "flushes_on_thread", "discards"];
        let elsewhere: u64 = elsewhere.iter().map(|name| self.counter(name)).sum();
        assert_eq!(recorded + elsewhere, self.counter("completions"), "{}", self.report);
        let unknown: u64 =
            all.iter().map(|op| self.known(op)).map(|(known, all)| all - known).sum();
        assert_eq!(self.counter("probe_device_end_unknown"), unknown, "{}", self.report);
        let (reads, writes) = (self.known("read"), self.known("write"));
        let complete = reads.0 == reads.1 && writes.0 == writes.1;
        assert_eq!(self.report["source_note"].is_null(), complete, "{}", self.report);
    }
}

/// fio on the volume in the host file `volume`: what the daemon's statistics say of it. `None` (said
/// loudly) where probes can not run.
fn measured(world: &World, volume: &Path, options: &[&str], load: &[&str]) -> Option<Said> {
    let file = world.path("stats.json");
    let options = [options, &["--key-file", "v.key", "--stats", file.to_str().unwrap()]].concat();
    let words: Vec<String> =
        fio_words("/sealed/data").into_iter().chain(load.iter().map(|w| (*w).to_owned())).collect();
    let mut shown = std::ffi::OsString::from("/sealed/data=");
    shown.push(volume);
    let mut command = world.postern(["run", "--volume"]);
    end(command.arg(shown).args(options).arg("--").args(words)).expect(0);
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    if report["source"] != "ebpf" {
        skip(&format!("no probes: {}", report["source_note"]));
        return None;
    }
    let rows = report["stages"].as_array().unwrap().iter().map(|row| {
        let text = |name: &str| row[name].as_str().unwrap().to_owned();
        ((text("stage"), text("operation")), row["count"].as_u64().unwrap())
    });
    let rows = rows.collect();
    Some(Said { report, rows })
}

/// Writes all, then reads all: what was said of each.
fn both(world: &World, volume: &Path, options: &[&str]) -> Option<[Said; 2]> {
    let size = format!("--size={}k", BLOCKS * 4);
    let write = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=64", &size];
    let written = measured(world, volume, options, &write)?;
    let read =
        measured(world, volume, options, &["--rw=randread", "--bs=4k", "--iodepth=16", &size])?;
    written.adds_up();
    read.adds_up();
    assert!(read.row("device", "read") >= BLOCKS, "{}", read.report);
    Some([written, read])
}

/// Every write has the device to itself, and so has each read of what was written; reads of what never
/// was (places of the journal) need no device.
#[track_caller]
fn is_exact([written, read]: &[Said; 2]) {
    let (known, all) = written.known("write");
    assert!(known == all && all >= BLOCKS, "{}", written.report);
    assert!(read.known("read").0 >= BLOCKS, "{}", read.report);
}

/// A loop device in memory. What is first goes first.
fn device(world: &World) -> Option<(Loop, Mounted)> {
    let base = Mounted::new("tmpfs", None, &world.path("base"))?;
    let device = Loop::over(&base.path().join("image"), "400M", false)?;
    Some((device, base))
}

/// A file system of `kind` on such a device, and the volume `v` on it; to be
/// bound in this order, so that the last goes first.
fn on(kind: &str) -> Option<(World, (Loop, Mounted), Mounted, PathBuf)> {
    let world = World::new()?;
    if !are_possible(&[&format!("mkfs.{kind}")]) {
        return None;
    }
    let device = device(&world)?;
    let mounted = Mounted::new(kind, Some(device.0.path()), &world.path("mounted"))?;
    let volume = mounted.path().join("v");
    format(&world, &volume, &[]);
    Some((world, device, mounted, volume))
}

fn format(world: &World, volume: &Path, options: &[&str]) {
    let key = world.path("v.key");
    std::fs::write(&key, [7; 32]).unwrap();
    let mut command = world.postern(["format", "--size", "16M", "--key-file"]);
    end(command.arg(&key).arg(volume).args(options)).expect(0);
}

#[test]
fn on_ext4_the_device_is_known_of_every_request() {
    let Some((world, _device, _mounted, volume)) = on("ext4") else { return };
    let Some(said) = both(&world, &volume, &[]) else { return };
    is_exact(&said);
}

#[test]
fn io_uring_is_followed_like_native_aio() {
    let Some((world, _device, _mounted, volume)) = on("ext4") else { return };
    let options = ["--engine", "io_uring"];
    let Some(said) = both(&world, &volume, &options) else { return };
    is_exact(&said);
}

#[test]
fn on_xfs_the_device_is_known_of_every_request() {
    let Some((world, _device, _mounted, volume)) = on("xfs") else { return };
    let Some(said) = both(&world, &volume, &[]) else { return };
    is_exact(&said);
}

/// Which requests btrfs takes through memory differs from kernel to kernel (writes to files with
/// checksums, since Linux 6.15): that both kinds are told apart is what counts.
#[test]
fn on_btrfs_what_went_through_memory_is_told_from_what_did_not() {
    let Some((world, _device, _mounted, volume)) = on("btrfs") else { return };
    both(&world, &volume, &[]);
}

#[test]
fn in_memory_there_is_no_device_and_the_probes_say_so() {
    let Some(world) = World::new() else { return };
    if !are_possible(&[]) {
        return;
    }
    let Some(mounted) = Mounted::new("tmpfs", None, &world.path("mounted")) else { return };
    let volume = mounted.path().join("v");
    format(&world, &volume, &["--allow-buffered"]);
    let Some([written, read]) = both(&world, &volume, &["--allow-buffered"]) else { return };
    assert_eq!((written.known("write").0, read.known("read").0), (0, 0), "{}", read.report);
    let note = read.report["source_note"].as_str().unwrap();
    assert!(note.contains("device times are not exact"), "{note}");
}

#[test]
fn on_a_block_device_the_device_is_known_of_every_request() {
    let Some(world) = World::new() else { return };
    if !are_possible(&[]) {
        return;
    }
    let Some(memory) = device(&world) else { return };
    let device = memory.0.path();
    let volume = world.path("v");
    format(&world, &volume, &[]);
    let mut copy = Command::new("dd");
    copy.arg(format!("if={}", volume.display())).arg(format!("of={}", device.display()));
    end(copy.args(["bs=1M", "oflag=direct", "conv=fsync", "status=none"])).expect(0);
    let Some(said) = both(&world, device, &[]) else { return };
    is_exact(&said);
}
