//! A hostile host: altered, cut and exchanged blocks. The program sees its own data or an error,
//! never anything else.
//!
//! Places are those of docs/FORMAT.md, in blocks of 4096 bytes.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::Path,
};

use crate::common::{Ended, World, begin, children, end, name_of, signal, until};

const BLOCK: u64 = 4096;
const DAMAGED: i32 = 65;
/// First blocks of the two copies of the static header.
const HEADERS: [u64; 2] = [0, 8];
/// Both slots of the superblock, two copies each.
const SUPERBLOCKS: [u64; 4] = [16, 48, 32, 64];
/// First block of the journal ring.
const RING: u64 = 512;
/// Size of the volumes here: of the guest's file, as fio writes it.
const SIZE: &str = "16m";

/// A host file under attack.
struct Host(File);

impl Host {
    fn open(path: &Path) -> Self {
        Self(OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    fn blocks(&self) -> u64 {
        self.0.metadata().unwrap().len() / BLOCK
    }

    fn read(&self, place: u64) -> [u8; BLOCK as usize] {
        let mut block = [0; BLOCK as usize];
        self.0.read_exact_at(&mut block, place * BLOCK).unwrap();
        block
    }

    fn write(&self, place: u64, block: &[u8]) {
        self.0.write_all_at(block, place * BLOCK).unwrap();
        self.0.sync_data().unwrap();
    }

    /// Inverts one byte of a block; twice restores it.
    fn flip(&self, place: u64, byte: usize) {
        let mut block = self.read(place);
        block[byte] = !block[byte];
        self.write(place, &block);
    }

    /// All of it.
    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(self.blocks() * BLOCK).unwrap()];
        self.0.read_exact_at(&mut image, 0).unwrap();
        image
    }

    /// Puts back what has changed since: by the attack, and by whoever opened the volume then.
    fn restore(&self, image: &[u8]) {
        for (place, block) in (0..).zip(image.chunks_exact(BLOCK as usize)) {
            if self.read(place) != *block {
                self.0.write_all_at(block, place * BLOCK).unwrap();
            }
        }
        self.0.sync_data().unwrap();
    }

    /// Blocks that hold something.
    fn written(&self) -> Vec<u64> {
        (0..self.blocks()).filter(|&place| self.read(place).iter().any(|&byte| byte != 0)).collect()
    }
}

/// A volume whose every 4 KiB carries fio's header, overwritten in part, closed cleanly.
fn filled(world: &World) -> std::path::PathBuf {
    let volume = world.format("v", "16M");
    let size = format!("--size={SIZE}");
    let fill = ["--rw=write", "--bs=64k", "--verify=crc32c", "--verify_interval=4k", &size];
    world.fio(&volume, &fill).expect(0);
    let more = ["--rw=randwrite", "--bs=4k", "--verify=crc32c", "--io_size=4m", &size];
    world.fio(&volume, &more).expect(0);
    volume
}

/// Reads everything as the program does, checking each block's content.
fn read_all(world: &World, volume: &Path) -> Ended {
    let size = format!("--size={SIZE}");
    let check = ["--rw=read", "--bs=4k", "--iodepth=16", "--verify=crc32c", &size];
    world.fio(volume, &check)
}

/// Panics if the program was given a block that is not its own.
#[track_caller]
fn own_data_or_an_error(ended: &Ended, what: &str) {
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(!said.contains("verify failed") && !said.contains("bad magic"), "{what}: {said}");
    let honest =
        ended.code() == 0 || said.contains("Input/output error") || ended.code() == DAMAGED;
    assert!(honest, "{what}: {} {said}", ended.code());
}

#[test]
fn one_flipped_byte_anywhere_gives_the_own_data_or_an_error() {
    let Some(world) = World::new() else { return };
    let volume = filled(&world);
    let host = Host::open(&volume);
    let (image, written) = (host.image(), host.written());
    // The fixed places, and about forty of the others from end to end.
    let step = (written.len() / 40).max(1);
    let fixed = HEADERS.into_iter().chain(SUPERBLOCKS).chain(RING..RING + 8).chain(256..264);
    let places: Vec<u64> = fixed.chain(written.iter().copied().step_by(step)).collect();
    let mut noticed = 0;
    for (turn, place) in places.into_iter().enumerate() {
        let byte = turn * 997 % BLOCK as usize;
        host.flip(place, byte);
        let what = format!("block {place}, byte {byte}");
        let verdict = end(&mut world.postern(["verify", "v"]));
        assert!([0, DAMAGED].contains(&verdict.code()), "{what}: {verdict:?}");
        let ended = read_all(&world, &volume);
        own_data_or_an_error(&ended, &what);
        if ended.code() != 0 {
            noticed += 1;
            assert_eq!(verdict.code(), DAMAGED, "verify misses what a read finds: {what}");
        }
        host.restore(&image);
    }
    assert!(noticed >= 10, "most blocks are live, and {noticed} flips were noticed");
    read_all(&world, &volume).expect(0);
}

#[test]
fn an_altered_data_block_costs_that_block_and_no_other() {
    let Some(world) = World::new() else { return };
    let volume = filled(&world);
    let host = Host::open(&volume);
    let written = host.written();
    let mut seen = 0;
    for &place in written.iter().rev().step_by(37) {
        host.flip(place, 100);
        let said = end(&mut world.postern(["verify", "v", "--json"]));
        host.flip(place, 100);
        if said.code() == 0 {
            continue; // Not live: nothing names it.
        }
        let Ok(report) = serde_json::from_str::<serde_json::Value>(&said.stdout) else { continue };
        let ranges = report["damaged"].as_array().unwrap();
        if ranges.len() != 1 || ranges[0]["length"] != BLOCK {
            continue; // A node of the map: more hangs on it.
        }
        let block = ranges[0]["offset"].as_u64().unwrap() / BLOCK;
        host.flip(place, 100);
        let dd = |skip: u64, count: u64| {
            let words = [
                "dd".to_owned(),
                "if=/sealed/data".to_owned(),
                "of=/dev/null".to_owned(),
                "bs=4096".to_owned(),
                "iflag=direct".to_owned(),
                format!("skip={skip}"),
                format!("count={count}"),
            ];
            end(&mut world.run(&volume, words))
        };
        let ended = dd(block, 1);
        assert_ne!(ended.code(), 0);
        assert!(ended.stderr.contains("Input/output error"), "{}", ended.stderr);
        if block > 0 {
            dd(block - 1, 1).expect(0);
        }
        if block + 1 < (16 << 20) / BLOCK {
            dd(block + 1, 1).expect(0);
        }
        host.flip(place, 100);
        dd(block, 1).expect(0);
        seen += 1;
        if seen == 3 {
            return;
        }
    }
    panic!("only {seen} live data blocks were found");
}

#[test]
fn exchanged_and_replayed_blocks_are_noticed() {
    let Some(world) = World::new() else { return };
    let volume = filled(&world);
    let host = Host::open(&volume);
    let image = host.image();
    let data: Vec<u64> = host.written().into_iter().filter(|&place| place >= RING + 256).collect();
    let (one, two) = (data[data.len() / 3], data[data.len() / 2]);
    let (first, second) = (host.read(one), host.read(two));
    host.write(one, &second);
    host.write(two, &first);
    own_data_or_an_error(&read_all(&world, &volume), "two blocks exchanged");
    host.restore(&image);
    read_all(&world, &volume).expect(0);

    // Old content in places that were written since: everything but the superblocks goes back.
    let old: Vec<(u64, [u8; BLOCK as usize])> =
        data.iter().map(|&place| (place, host.read(place))).collect();
    let size = format!("--size={SIZE}");
    let over = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c", &size];
    world.fio(&volume, &over).expect(0);
    let mut changed = 0;
    for (place, block) in &old {
        if host.read(*place) != *block {
            host.0.write_all_at(block, place * BLOCK).unwrap();
            changed += 1;
        }
    }
    host.0.sync_data().unwrap();
    assert!(changed > 100, "overwriting changed only {changed} blocks");
    let ended = read_all(&world, &volume);
    own_data_or_an_error(&ended, "older blocks replayed");
    assert_ne!(ended.code(), 0, "replayed blocks went unnoticed");
}

#[test]
fn a_shortened_host_file_is_refused() {
    let Some(world) = World::new() else { return };
    let volume = filled(&world);
    let length = std::fs::metadata(&volume).unwrap().len();
    for shorter in [length - BLOCK, length / 2, 5 * BLOCK, 100, 0] {
        OpenOptions::new().write(true).open(&volume).unwrap().set_len(shorter).unwrap();
        end(&mut world.run(&volume, ["true"])).expect_line(DAMAGED, "v");
        end(&mut world.postern(["info", "v"])).expect_line(DAMAGED, "v");
        end(&mut world.postern(["verify", "v"])).expect_line(DAMAGED, "v");
    }
}

#[test]
fn a_volume_without_header_or_superblock_is_refused_and_not_formatted_anew() {
    let Some(world) = World::new() else { return };
    let volume = filled(&world);
    let host = Host::open(&volume);
    let places: [&[u64]; 2] = [&HEADERS, &SUPERBLOCKS];
    for group in places {
        let kept: Vec<_> = group.iter().map(|&place| (place, host.read(place))).collect();
        for &(place, _) in &kept {
            host.write(place, &[0; BLOCK as usize]);
        }
        let options = ["--no-probes", "--create", "16M"];
        end(&mut world.run_with(&volume, &options, ["true"])).expect_line(DAMAGED, "v");
        end(&mut world.postern(["verify", "v"])).expect_line(DAMAGED, "v");
        for (place, block) in &kept {
            assert_eq!(host.read(*place), [0; BLOCK as usize], "nothing was written there");
            host.write(*place, block);
        }
    }
    read_all(&world, &volume).expect(0);
    // One copy of each is enough.
    host.flip(HEADERS[0], 40);
    read_all(&world, &volume).expect(0);
}

#[test]
fn a_damaged_journal_is_told_or_makes_no_difference() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    let volume = world.format("v", "64M");
    let log = world.path("log");
    let words = |mode: &str| {
        let program = program.to_str().unwrap();
        [program, mode, "/sealed/data", log.to_str().unwrap(), "512", "3"].map(str::to_owned)
    };
    let mut running = begin(&mut world.run(&volume, words("write")));
    until("a hundred syncs", || {
        assert!(running.is_running());
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        (text.lines().filter(|line| line.starts_with('C')).count() > 300).then_some(())
    });
    let all = children(running.pid());
    signal("KILL", all.into_iter().find(|&pid| name_of(pid) == "synclog").unwrap());
    running.wait();

    let host = Host::open(&volume);
    let image = host.image();
    for place in (RING..RING + 60).step_by(7) {
        if host.read(place) == [0; BLOCK as usize] {
            continue;
        }
        host.flip(place, 2000);
        let ended = end(&mut world.run(&volume, words("check")));
        assert!([0, DAMAGED].contains(&ended.code()), "block {place}: {ended:?}");
        host.restore(&image);
    }
    end(&mut world.run(&volume, words("check"))).expect(0);
}
