//! Snapshots, full hosts and volumes, large ones, and what verify says.

use alloc::{format, vec, vec::Vec};

use super::{
    audit,
    crash::{formatted, key, open, read_all, tiny},
    disk::{Rng, SimDisk},
    memory::{made, overwritten, read, reopen, write},
    nonces,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{Chore, Misuse, OpenOptions, Volume, VolumeError},
};

#[test]
fn a_snapshot_reads_as_when_it_was_made_and_is_refused_what_it_cannot_be() {
    let disk = made(1 << 22);
    let volume = reopen(&disk);
    write(&disk, &volume, 0, &[1; 40_000]).unwrap();
    let keep = |name: &str| run_to_end(volume.make_snapshot(&disk, name, 77));
    assert_eq!(keep("one"), Ok(()));
    assert_eq!(keep("one"), Err(VolumeError::Misuse(Misuse::SnapshotExists)));
    for name in ["", "a b", "\u{e9}", &"x".repeat(49)] {
        assert_eq!(keep(name), Err(VolumeError::Misuse(Misuse::SnapshotName)), "{name}");
    }
    write(&disk, &volume, 0, &[2; 20_000]).unwrap();
    run_to_end(volume.truncate(&disk, 30_000)).unwrap();
    assert_eq!(keep("two"), Ok(()));
    run_to_end(volume.punch(&disk, 0, 30_000)).unwrap();
    run_to_end(volume.close(&disk)).unwrap();
    let held = volume.info().held_blocks;
    let at = |name: &str| {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let (volume, _) = run_to_end(Volume::open(&disk, &key(), &options)).unwrap();
        run_to_end(volume.at_snapshot(&disk, name))
    };
    let (one, two) = (at("one").unwrap(), at("two").unwrap());
    assert_eq!((one.size(), two.size()), (1 << 22, 30_000));
    assert!(read(&disk, &one, 0, 40_001).unwrap() == [vec![1; 40_000], vec![0]].concat());
    assert!(
        read(&disk, &two, 0, 40_000).unwrap() == [[2; 20_000].to_vec(), vec![1; 10_000]].concat()
    );
    assert_eq!(write(&disk, &one, 0, &[9]), Err(Errno::EROFS));
    assert_eq!(at("three").err(), Some(VolumeError::Misuse(Misuse::NoSnapshot)));

    let volume = reopen(&disk);
    let names = |volume: &Volume| -> Vec<_> {
        let found = run_to_end(volume.snapshots(&disk)).unwrap();
        found.into_iter().map(|found| (found.name, found.created)).collect()
    };
    assert_eq!(names(&volume), [("one".into(), 77), ("two".into(), 77)]);
    // Blocks 0 to 4 and the tail are only in the first one; so are its leaf and root, and more.
    let freed = run_to_end(volume.delete_snapshot(&disk, "one")).unwrap();
    assert!((8..held).contains(&freed), "{freed} of {held}");
    assert!(read(&disk, &at("two").unwrap(), 0, 1) == Ok(vec![2]));
    assert!(run_to_end(volume.delete_snapshot(&disk, "two")).unwrap() > 0);
    assert_eq!((names(&volume), volume.info().held_blocks), (vec![], 0));
    let gone = run_to_end(volume.delete_snapshot(&disk, "two"));
    assert_eq!(gone, Err(VolumeError::Misuse(Misuse::NoSnapshot)));
}

#[test]
fn a_hundred_snapshots_fill_several_blocks_of_the_table_and_each_can_go() {
    let disk = made(1 << 20);
    let volume = reopen(&disk);
    for n in 0..100_u8 {
        write(&disk, &volume, 0, &[n; 1]).unwrap();
        run_to_end(volume.make_snapshot(&disk, &format!("at{n}"), 0)).unwrap();
    }
    run_to_end(volume.close(&disk)).unwrap();
    let volume = reopen(&disk);
    for n in (0..100_u8).step_by(3) {
        run_to_end(volume.delete_snapshot(&disk, &format!("at{n}"))).unwrap();
    }
    run_to_end(volume.close(&disk)).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    for n in 0..100_u8 {
        let (volume, _) = run_to_end(Volume::open(&disk, &key(), &options)).unwrap();
        match run_to_end(volume.at_snapshot(&disk, &format!("at{n}"))) {
            Ok(then) => assert_eq!(read(&disk, &then, 0, 1), Ok(vec![n])),
            Err(_) => assert_eq!(n % 3, 0),
        }
    }
}

#[test]
fn a_map_that_does_not_fit_the_node_cache_reads_as_written() {
    let size = 1 << 30;
    let disk = made(size);
    let volume = reopen(&disk);
    volume.limit_cache(0);
    let spots = |n: u64| n * 0x5555_5555_5555 % (size / 4096) * 4096;
    for n in 1..700_u64 {
        write(&disk, &volume, spots(n), &[n as u8; BLOCK]).unwrap();
    }
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    for n in (1..700_u64).rev() {
        assert!(read(&disk, &volume, spots(n), BLOCK).unwrap() == [n as u8; BLOCK], "spot {n}");
    }
}

#[test]
fn sixteen_tebibytes_open_with_as_few_requests_as_one() {
    let cost = |size: u64| {
        let disk = made(size);
        *disk.calls.lock().unwrap() = (0, 0, 0);
        let volume = reopen(&disk);
        let calls = *disk.calls.lock().unwrap();
        write(&disk, &volume, size - 4096, &[1; BLOCK]).unwrap();
        run_to_end(volume.close(&disk)).unwrap();
        assert!(read(&disk, &reopen(&disk), size - 4096, BLOCK).unwrap() == [1; BLOCK]);
        calls
    };
    assert_eq!(cost(1 << 40), cost(1 << 44));
}

#[test]
fn verify_counts_what_is_there() {
    let disk = made(1 << 20);
    let volume = reopen(&disk);
    write(&disk, &volume, 8192, &[1; 3 * BLOCK]).unwrap();
    let mut calls = 0;
    let report = run_to_end(volume.verify(&disk, |_, _| calls += 1));
    assert_eq!((report.intact, report.holes, report.damaged.len()), (3, 253, 0));
    assert!(calls > 0);
}

#[test]
fn verify_names_each_damaged_block_and_no_other() {
    let (disk, volume) = overwritten(40);
    run_to_end(volume.close(&disk)).unwrap();
    let blocks = disk.blocks.lock().unwrap().clone();
    let open = || {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        run_to_end(Volume::open(&disk, &key(), &options)).unwrap().0
    };
    assert!(run_to_end(open().verify_space(&disk)).is_exact());
    let (mut data, mut nodes) = (0, 0);
    for place in open().geometry.reserve_start..disk.size {
        let Some(block) = blocks.get(&place) else { continue };
        let mut altered = *block;
        altered[77] ^= 1;
        disk.blocks.lock().unwrap().insert(place, altered);
        let volume = open();
        let damaged = run_to_end(volume.verify(&disk, |_, _| {})).damaged;
        let space = run_to_end(volume.verify_space(&disk));
        disk.blocks.lock().unwrap().insert(place, *block);
        match damaged[..] {
            [] => nodes += u64::from(space.unreadable > 0),
            [bad] if bad.length == 4096 => {
                data += 1;
                assert!(bad.offset < 40 * 4096 && bad.host.is_none());
                assert!(space.is_exact(), "{space:?}");
            }
            // The leaf or a node above it: all its blocks.
            [bad] => {
                nodes += 1;
                assert!(bad.offset == 0 && bad.length >= 40 * 4096);
                assert!(space.unreadable == 1 && space.leaked > 0, "{space:?}");
            }
            _ => panic!("{damaged:?}"),
        }
    }
    assert_eq!(data, 40, "each block lies in one place");
    assert!(nodes >= 3);
}

/// The host's file system is full at some point of a first fill: what was acknowledged reads, and
/// everything can be deleted and written down.
#[test]
fn a_full_host_refuses_writes_and_lets_everything_be_read_and_deleted() {
    let size = 160 << 20;
    for room in [0, 40, 2_000, 24_000, 24_700, 33_000] {
        let disk = made(size);
        disk.warm.lock().unwrap().1 = room;
        let volume = reopen(&disk);
        let (mut written, chunk) = (0, 64 * BLOCK);
        let refused = loop {
            let byte = (written / chunk as u64 % 250) as u8 + 1;
            match write(&disk, &volume, written, &vec![byte; chunk]) {
                Ok(done) => written += done as u64,
                Err(errno) => break errno,
            }
            if let Some(chore) = volume.due(1) {
                let _ = run_to_end(volume.run_chore(&disk, chore));
            }
        };
        assert_eq!(refused, Errno::ENOSPC, "room {room}");
        disk.warm.lock().unwrap().1 = 0;
        assert_eq!(run_to_end(volume.sync(&disk)), Ok(()), "room {room}");
        for at in (0..written).step_by(chunk) {
            let byte = (at / chunk as u64 % 250) as u8 + 1;
            let length = chunk.min((written - at) as usize);
            assert!(read(&disk, &volume, at, length) == Ok(vec![byte; length]), "room {room}");
        }
        assert_eq!(run_to_end(volume.close(&disk)), Ok(()), "room {room}");
        let volume = reopen(&disk);
        assert_eq!(run_to_end(volume.punch(&disk, 0, size)), Ok(()), "room {room}");
        assert_eq!(run_to_end(volume.close(&disk)), Ok(()), "room {room}");
        let volume = reopen(&disk);
        assert!(run_to_end(volume.verify_space(&disk)).is_exact());
        assert!(volume.is_hole(0, size) || run_to_end(volume.verify(&disk, |_, _| {})).intact == 0);
    }
}

#[test]
fn a_full_volume_keeps_taking_overwrites_without_any_chores() {
    nonces::reset();
    let mut runner = Runner::new(SimDisk::new(3, tiny().host_blocks, formatted(3, tiny())));
    let disk = runner.disk.clone();
    let volume = runner.block_on(async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        let (mut rng, capacity) = (Rng(9), tiny().capacity);
        let mut expected = vec![0; capacity as usize * BLOCK];
        for round in 0..40_u64 {
            for n in 0..capacity {
                // Filled first, then overwritten in an order and at random, in turn.
                let random = round % 2 == 1;
                let block = if random { rng.below(capacity) } else { n * 37 % capacity };
                let bytes = vec![(block + round) as u8; BLOCK];
                expected[block as usize * BLOCK..][..BLOCK].copy_from_slice(&bytes);
                volume.write(&disk, block * 4096, &Memory::new(bytes)).await.unwrap();
            }
        }
        assert!(read_all(disk.clone(), volume.clone()).await.unwrap() == expected);
        volume.close(&disk).await.unwrap();
        volume
    });
    assert!(volume.counters().checkpoints > 10);
    let disk = runner.disk.clone();
    runner.block_on(audit::audit(disk, volume)).unwrap();
}

#[test]
fn a_host_that_fails_while_room_is_made_is_eio_and_no_want_of_room() {
    nonces::reset();
    let mut runner = Runner::new(SimDisk::new(5, tiny().host_blocks, formatted(5, tiny())));
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        let capacity = tiny().capacity;
        let write = async |block: u64| {
            volume.write(&disk, block * 4096, &Memory::new(vec![7; BLOCK])).await
        };
        for block in 0..capacity {
            assert_eq!(write(block).await, Ok(BLOCK));
        }
        disk.state().faults.flush = 100.0;
        let mut overwritten = 0;
        let errno = loop {
            match write(overwritten % capacity).await {
                Ok(_) => overwritten += 1,
                Err(errno) => break errno,
            }
        };
        // Every write in between found a place of its own.
        assert_eq!((errno, overwritten < 2 * capacity), (Errno::EIO, true));
    });
}
