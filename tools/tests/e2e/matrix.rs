//! fio in its many shapes; after each a second process opens the volume again and verifies all of
//! it.
//!
//! Every 4 KiB (512 bytes in the small shape) carries fio's own header with its offset and
//! checksum, written by the first pass, so the last pass can read with any block size.

use crate::common::{World, end, fio_words, skip};

const DEPTHS: [&str; 3] = ["--iodepth=1", "--iodepth=32", "--iodepth=128"];
const SYNCS: [&str; 3] = ["--fsync=0", "--fsync=1", "--fdatasync=16"];
/// Block size, verified piece, bytes without syncs, bytes with a sync after each write.
const SHAPES: [(&str, &str, &str, &str); 5] = [
    ("--bs=512", "--verify_interval=512", "2m", "256k"),
    ("--bs=4k", "--verify_interval=4k", "16m", "2m"),
    ("--bs=64k", "--verify_interval=4k", "16m", "8m"),
    ("--bs=1m", "--verify_interval=4k", "32m", "32m"),
    ("--bsrange=4k-256k", "--verify_interval=4k", "32m", "16m"),
];

/// Every shape at every depth and with every kind of sync, for one kind of load.
fn every_shape(rw: &str) {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    let rw_word = format!("--rw={rw}");
    for (number, (bs, piece, size, synced_size)) in SHAPES.into_iter().enumerate() {
        let whole = format!("--size={size}");
        let fill = ["--rw=write", "--bs=64k", "--verify=crc32c", "--do_verify=0", piece, &whole];
        world.fio(&volume, &fill).expect(0);
        for (turn, depth) in DEPTHS.into_iter().enumerate() {
            let sync = SYNCS[(turn + number) % SYNCS.len()];
            let part = if sync == SYNCS[0] { &whole } else { &format!("--size={synced_size}") };
            let load = [&rw_word, bs, depth, sync, part, "--verify=crc32c", piece];
            let said = format!("{load:?}");
            let ended = world.fio(&volume, &load);
            assert_eq!(ended.code(), 0, "{said}: {} {}", ended.stdout, ended.stderr);
            let check = ["--rw=read", "--bs=64k", "--verify=crc32c", "--iodepth=8", piece, &whole];
            let ended = world.fio(&volume, &check);
            assert_eq!(ended.code(), 0, "again after {said}: {} {}", ended.stdout, ended.stderr);
        }
    }
}

#[test]
fn random_writes_verify_and_are_there_when_the_volume_is_opened_again() {
    every_shape("randwrite");
}

#[test]
fn random_reads_verify() {
    every_shape("randread");
}

#[test]
fn mixed_reads_and_writes_verify_and_are_there_when_the_volume_is_opened_again() {
    every_shape("randrw");
}

#[test]
fn sequential_writes_verify_and_are_there_when_the_volume_is_opened_again() {
    every_shape("write");
}

#[test]
fn sequential_reads_verify() {
    every_shape("read");
}

/// The demo's own check: fio replays its random sequence and compares without writing.
#[test]
fn a_second_process_finds_exactly_what_the_first_wrote() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    let load = ["--rw=randrw", "--bs=4k", "--iodepth=32", "--size=64m", "--verify=crc32c"];
    world.fio(&volume, &load).expect(0);
    let again: Vec<&str> = load.iter().copied().chain(["--verify_only"]).collect();
    world.fio(&volume, &again).expect(0);
}

/// Blocks of every kind, and syncs, by the other engine; then read by the usual one.
#[test]
fn what_goes_by_io_uring_verifies_and_is_there_when_the_volume_is_opened_again() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    let whole = ["--size=32m", "--verify=crc32c", "--verify_interval=4k"];
    let fill = ["--rw=write", "--bs=64k", "--do_verify=0"];
    let load = ["--rw=randrw", "--bsrange=4k-256k", "--iodepth=32", "--fsync=16"];
    for words in [&fill[..], &load] {
        let program = fio_words("/sealed/data").into_iter();
        let program = program.chain(words.iter().chain(&whole).map(|&word| word.to_owned()));
        let ended = end(&mut world.run_with(&volume, &["--engine=io_uring"], program)).expect(0);
        if ended.stderr.contains("host I/O goes by libaio") {
            return skip("the kernel does not let the daemon use io_uring");
        }
    }
    let [size, verify, piece] = whole;
    world.fio(&volume, &["--rw=read", "--bs=64k", size, verify, piece]).expect(0);
}

#[test]
fn two_jobs_of_one_program_work_on_one_volume() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    for how in [&["--thread"][..], &[]] {
        let mut load = vec!["--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c"];
        load.extend(["--numjobs=2", "--size=16m", "--offset_increment=16m"]);
        load.extend(how);
        world.fio(&volume, &load).expect(0);
        let check = ["--rw=read", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--size=32m"];
        world.fio(&volume, &check).expect(0);
    }
}

/// The control of this file: the same checks on a plain file do see a single wrong byte.
#[test]
fn fio_sees_one_wrong_byte_in_a_plain_file() {
    use std::os::unix::fs::FileExt as _;
    let Some(world) = World::new() else { return };
    let file = world.path("plain");
    let fill = ["--rw=write", "--bs=64k", "--size=1m", "--verify=crc32c", "--verify_interval=4k"];
    world.plain_fio(&file, &fill).expect(0);
    let plain = std::fs::OpenOptions::new().read(true).write(true).open(&file).unwrap();
    let mut byte = [0];
    plain.read_exact_at(&mut byte, 300_000).unwrap();
    plain.write_all_at(&[!byte[0]], 300_000).unwrap();
    plain.sync_all().unwrap();
    let check = ["--rw=read", "--bs=64k", "--size=1m", "--verify=crc32c", "--verify_interval=4k"];
    assert_ne!(world.plain_fio(&file, &check).code(), 0);
}
