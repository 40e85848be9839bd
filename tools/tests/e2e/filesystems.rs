//! What the probes say on each kind of host file system, and on a block device: every request is
//! counted, to the last one; when the device was done is known of each that had one to itself, and of
//! the others it is said that it is not known.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    common::{World, end},
    devices::{Loop, Mounted, are_possible},
    told::{Said, measured},
};

/// Blocks of 4 KiB that fio writes, and then reads once each.
const BLOCKS: u64 = 256;
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
