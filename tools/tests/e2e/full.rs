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
}

#[test]
fn a_host_without_room_for_a_volume_is_72_and_nothing_is_left() {
    let Some(world) = World::new() else { return };
    let Some(small) = Small::mount(&world, "16M") else { return };
    let fill = small.0.join("fill");
    // To the last block.
    let _ = end(Command::new("dd")
        .args(["if=/dev/zero", "bs=4096"])
        .arg(format!("of={}", fill.display())));
    let (volume, key) = (small.0.join("v"), world.path("key"));
    std::fs::write(&key, [1; 32]).unwrap();
    let name = volume.to_str().unwrap();
    let format = ["format", name, "--size", "1M", "--key-file", "key"];
    end(&mut world.postern(format)).expect_line(72, name);
    assert!(!volume.exists());
}
