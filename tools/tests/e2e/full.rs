//! A host without room: the program gets ENOSPC, the volume stays whole.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{World, end, is_root, skip};

/// A small mounted file system; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(world: &World, size: &str) -> Option<Self> {
        if !is_root() {
            skip("mounting a small file system needs root");
            return None;
        }
        let (image, at) = (world.path("small.img"), world.path("small"));
        std::fs::create_dir(&at).unwrap();
        let run = |program: &str, words: &[&str], more: &[&Path]| {
            end(Command::new(program).args(words).args(more))
        };
        run("truncate", &["-s", size], &[&image]).expect(0);
        let made = run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-m", "0"], &[&image]);
        if made.code() != 0 {
            skip("mkfs.ext4 does not work here");
            return None;
        }
        let mounted = run("mount", &["-o", "loop"], &[&image, &at]);
        if mounted.code() != 0 {
            skip(&format!("no loop device: {}", mounted.stderr.trim()));
            return None;
        }
        Some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_host_gives_enospc_and_the_volume_stays_whole() {
    let Some(world) = World::new() else { return };
    let Some(small) = Small::mount(&world, "64M") else { return };
    let volume = small.0.join("v");
    let name = volume.to_str().unwrap();
    // Sparse: a volume of twice the room can be made, and runs into the end of it.
    end(&mut world.postern(["format", name, "--size", "128M"])).expect(0);
    let kept = ["--rw=write", "--bs=64k", "--size=16m", "--verify=crc32c", "--verify_interval=4k"];
    world.fio(&volume, &[&kept[..], &["--end_fsync=1"]].concat()).expect(0);
    let more = ["--rw=write", "--bs=64k", "--offset=16m", "--size=112m", "--iodepth=8"];
    let ended = world.fio(&volume, &more);
    assert_ne!(ended.code(), 0);
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("No space left on device"), "{said}");
    end(&mut world.postern(["verify", name])).expect(0);
    let check = ["--rw=read", "--bs=64k", "--size=16m", "--verify=crc32c", "--verify_interval=4k"];
    world.fio(&volume, &check).expect(0);
    // What the guest deletes makes room on the host again, where it is given back.
    let punch = ["fallocate", "-p", "-o", "16m", "-l", "112m", "/sealed/data"];
    let giving = ["--no-probes", "--discard", "on"];
    end(&mut world.run_with(&volume, &giving, punch)).expect(0);
    let again = ["--rw=write", "--bs=64k", "--offset=100m", "--size=12m", "--verify=crc32c"];
    world.fio(&volume, &again).expect(0);
    world.fio(&volume, &check).expect(0);
}

/// Fills the file system of `at` to the last block; answers the file to remove.
fn fill(at: &Path) -> PathBuf {
    let fill = at.join("fill");
    for size in ["bs=1M", "bs=4096"] {
        let into = format!("of={}", fill.display());
        let more = ["if=/dev/zero", size, "oflag=append", "conv=notrunc"];
        // Ends for want of room.
        assert_ne!(end(Command::new("dd").args(more).arg(into)).code(), 0);
    }
    fill
}

/// Each overwrite goes to another place first, so a sparse host file needs room for it, too.
#[test]
fn a_volume_that_was_allocated_takes_overwrites_on_a_full_host_and_a_sparse_one_stays_whole() {
    let Some(world) = World::new() else { return };
    let Some(small) = Small::mount(&world, "208M") else { return };
    let volume = small.0.join("v");
    let name = volume.to_str().unwrap();
    end(&mut world.postern(["format", name, "--size", "16M"])).expect(0);
    world.fio(&volume, &["--rw=write", "--bs=64k", "--size=16m", "--end_fsync=1"]).expect(0);
    let over = [
        "--rw=randwrite",
        "--bs=4k",
        "--size=16m",
        "--loops=2",
        "--iodepth=16",
        "--fsync=32",
        "--verify=crc32c",
    ];
    let full = fill(&small.0);
    let ended = world.fio(&volume, &over);
    assert_ne!(ended.code(), 0);
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("No space left on device"), "{said}");
    end(&mut world.postern(["verify", name])).expect(0);
    std::fs::remove_file(full).unwrap();
    let bytes = std::fs::metadata(&volume).unwrap().len().to_string();
    end(Command::new("fallocate").args(["-l", &bytes]).arg(&volume)).expect(0);
    fill(&small.0);
    world.fio(&volume, &over).expect(0);
    end(&mut world.postern(["verify", name])).expect(0);
}

/// Filled to the last block, overwritten three times over at random, and synced all the while.
#[test]
fn a_full_volume_keeps_taking_overwrites() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "48M");
    world.fio(&volume, &["--rw=write", "--bs=256k", "--size=48m", "--end_fsync=1"]).expect(0);
    let over = [
        "--rw=randwrite",
        "--bs=4k",
        "--size=48m",
        "--loops=3",
        "--iodepth=16",
        "--fsync=64",
        "--verify=crc32c",
        "--randseed=7",
    ];
    world.fio(&volume, &over).expect(0);
    let told = end(&mut world.postern(["info", "v", "--json"])).expect(0);
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    let number = |name: &str| told[name].as_u64().unwrap();
    assert!(number("used_bytes") >= 48 << 20, "{told}");
    // What is used and free adds up in runs that are counted.
    assert!(number("used_runs") > 0 && number("free_runs") > 0, "{told}");
    assert!(number("longest_free_run_bytes") <= number("free_bytes"), "{told}");
    // All of it can be deleted.
    let punch = ["fallocate", "-p", "-o", "0", "-l", "48m", "/sealed/data"];
    end(&mut world.run(&volume, punch)).expect(0);
    let told = end(&mut world.postern(["info", "v", "--json"])).expect(0);
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert!(told["used_bytes"].as_u64().unwrap() <= 1 << 20, "{told}");
    end(&mut world.postern(["verify", "v"])).expect(0);
}

/// Bytes that the host's file system has given to a file.
fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(file).unwrap().blocks() * 512
}

const MIB: u64 = 1 << 20;

#[test]
fn what_the_guest_deletes_goes_back_to_the_host_if_it_is_to() {
    let Some(world) = World::new() else { return };
    let probe = world.path("probe");
    std::fs::write(&probe, vec![1; 1 << 20]).unwrap();
    let punch = ["-p", "-o", "0", "-l", "1m"];
    if end(Command::new("fallocate").args(punch).arg(&probe)).code() != 0 {
        return skip("the file system of the target directory punches no holes");
    }
    let volume = world.format("v", "256M");
    let fresh = allocated(&volume);
    let fill = ["--rw=write", "--bs=1m", "--size=128m"];
    let delete = ["fallocate", "-p", "-o", "1m", "-l", "127m", "/sealed/data"];
    for giving in ["off", "on"] {
        world.fio(&volume, &fill).expect(0);
        let full = allocated(&volume);
        assert!(full >= fresh + 120 * MIB, "{full} bytes after writing, {fresh} before");
        let options = ["--no-probes", "--discard", giving];
        end(&mut world.run_with(&volume, &options, delete)).expect(0);
        let after = allocated(&volume);
        let told = end(&mut world.postern(["info", "v", "--json"])).expect(0);
        let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!(told["allocated_bytes"], after);
        if giving == "on" {
            assert!(after <= full - 100 * MIB, "{after} bytes after deleting, {full} before");
        } else {
            assert!(after >= full, "{after} bytes after deleting, {full} before");
        }
        end(&mut world.postern(["verify", "v"])).expect(0);
    }
    let look = ["--rw=read", "--bs=1m", "--size=128m"];
    world.fio(&volume, &look).expect(0);
}

#[test]
fn a_host_without_room_for_a_volume_is_72_and_nothing_is_left() {
    let Some(world) = World::new() else { return };
    let Some(small) = Small::mount(&world, "16M") else { return };
    fill(&small.0);
    let (volume, key) = (small.0.join("v"), world.path("key"));
    std::fs::write(&key, [1; 32]).unwrap();
    let name = volume.to_str().unwrap();
    let format = ["format", name, "--size", "1M", "--key-file", "key"];
    end(&mut world.postern(format)).expect_line(72, name);
    assert!(!volume.exists());
}
