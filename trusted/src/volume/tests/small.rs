//! One file among many: made and opened in one write, closed with its journal alone.

use alloc::{sync::Arc, vec, vec::Vec};

use super::{
    crash::{key, open, read_all},
    disk::{Image, SimDisk},
    memory::{MemDisk, read, reopen, write},
    nonces,
    run::Runner,
};
use crate::{
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{OpenOptions, Volume},
};

const CAPACITY: u64 = 1 << 20;

fn empty() -> MemDisk {
    nonces::reset();
    let disk = MemDisk { size: Volume::small_host_blocks(CAPACITY), ..MemDisk::default() };
    disk.warm.lock().unwrap().1 = u64::MAX;
    disk
}

fn made(disk: &MemDisk) -> Volume {
    run_to_end(Volume::make_open(disk, &key(), CAPACITY, None)).unwrap()
}

#[test]
fn a_file_is_made_and_opened_in_one_write_and_flushed_by_its_first_sync() {
    let disk = empty();
    let volume = made(&disk);
    assert_eq!(*disk.calls.lock().unwrap(), (0, 17, 0), "reads, blocks written, flushes");
    assert_eq!((volume.size(), volume.read_only()), (0, false));
    run_to_end(volume.sync(&disk)).unwrap();
    assert_eq!(disk.calls.lock().unwrap().2, 1);
    write(&disk, &volume, 100, &[7; 5000]).unwrap();
    drop(volume);
    // As after a kill of the process: nothing was synced since, and nothing published.
    let volume = reopen(&disk);
    assert_eq!(volume.size(), 0);
    write(&disk, &volume, 100, &[7; 5000]).unwrap();
    run_to_end(volume.close(&disk)).unwrap();
    assert_eq!(read(&disk, &reopen(&disk), 100, 5000), Ok(vec![7; 5000]));
}

#[test]
fn what_rests_costs_a_journal_block_and_is_there_when_it_is_opened_again() {
    let disk = empty();
    let volume = made(&disk);
    write(&disk, &volume, 0, &[1; 6000]).unwrap();
    run_to_end(volume.sync(&disk)).unwrap();
    write(&disk, &volume, 6000, &[2; 6000]).unwrap();
    let before = *disk.calls.lock().unwrap();
    assert!(volume.may_rest());
    assert_eq!(run_to_end(volume.rest(&disk)), Ok(true), "not flushed yet");
    let after = *disk.calls.lock().unwrap();
    assert_eq!((after.0, after.1, after.2), (before.0, before.1 + 1, before.2));
    assert_eq!(write(&disk, &volume, 0, &[1]), Err(Errno::EROFS));
    let expected = [vec![1; 6000], vec![2; 6000]].concat();
    let volume = reopen(&disk);
    assert_eq!(read(&disk, &volume, 0, 12_000), Ok(expected.clone()));
    // Nothing new: nothing to be flushed.
    assert_eq!(run_to_end(volume.rest(&disk)), Ok(false));
    let volume = reopen(&disk);
    run_to_end(volume.close(&disk)).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let (volume, report) = run_to_end(Volume::open(&disk, &key(), &options)).unwrap();
    assert!(report.clean);
    assert_eq!(read(&disk, &volume, 0, 12_000), Ok(expected));
}

#[test]
fn a_file_with_much_to_say_does_not_rest() {
    let disk = empty();
    let volume = made(&disk);
    write(&disk, &volume, 0, &vec![3; 65 * 4096]).unwrap();
    assert!(!volume.may_rest());
    run_to_end(volume.close(&disk)).unwrap();
    let volume = reopen(&disk);
    assert!(volume.may_rest());
    // Its space is to be freed.
    run_to_end(volume.truncate(&disk, 0)).unwrap();
    assert!(!volume.may_rest());
}

/// Both ways to be durable: a sync, and the flush that follows a rest.
#[test]
fn a_new_file_survives_a_power_cut_once_it_was_synced_or_rested_and_flushed() {
    for seed in 0..60_u64 {
        nonces::reset();
        let blocks = Volume::small_host_blocks(CAPACITY);
        let mut runner = Runner::new(SimDisk::new(seed, blocks, Image::new()));
        let bytes: Vec<u8> = (0..20_000).map(|n| (n * 7 + seed) as u8).collect();
        let (disk, written) = (runner.disk.clone(), bytes.clone());
        runner.block_on(async move {
            let volume = Volume::make_open(&disk, &key(), CAPACITY, None).await.unwrap();
            assert_eq!(volume.write(&disk, 0, &Memory::new(written)).await, Ok(20_000));
            if seed % 2 == 0 {
                volume.sync(&disk).await.unwrap();
            } else {
                assert_eq!(volume.rest(&disk).await, Ok(true));
                crate::disk::Disk::flush(&disk).await.unwrap();
            }
        });
        runner.kill();
        runner.disk.power_cut();
        let opened = runner.block_on(open(runner.disk.clone(), OpenOptions::default()));
        let (volume, _) = opened.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let (disk, volume) = (runner.disk.clone(), Arc::clone(&volume));
        let found = runner.block_on(read_all(disk, volume)).unwrap();
        assert!(found == bytes, "seed {seed}");
    }
}
