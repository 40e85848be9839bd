//! The volume as a file: sizes, holes, errors, costs; on a host file that answers at once.

use alloc::{collections::BTreeMap, sync::Arc, vec};
use std::sync::Mutex;

use super::{
    crash::key,
    memory::{MemDisk, made, overwritten, read, reopen, write},
};
use crate::{
    disk::{BLOCK, Block},
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{Chore, FormatOptions, OpenOptions, Times, Volume, VolumeError},
};

#[test]
fn bytes_written_anywhere_read_back_and_the_rest_is_zeros() {
    let disk = made(1 << 22);
    let volume = reopen(&disk);
    assert_eq!(write(&disk, &volume, 5000, &[7; 10_000]), Ok(10_000));
    assert_eq!(write(&disk, &volume, (1 << 22) - 3, &[9; 10]), Ok(3), "short at the capacity");
    let mut expected = vec![0; 1 << 22];
    expected[5000..15_000].fill(7);
    expected[(1 << 22) - 3..].fill(9);
    assert!(read(&disk, &volume, 0, 1 << 23).unwrap() == expected);
    run_to_end(volume.close(&disk)).unwrap();
    assert_eq!(write(&disk, &volume, 0, &[1]), Err(Errno::EROFS));
    assert!(read(&disk, &reopen(&disk), 0, 1 << 22).unwrap() == expected);
}

#[test]
fn requests_beyond_the_ends_answer_as_linux_does() {
    let disk = made(1 << 16);
    let volume = reopen(&disk);
    assert_eq!(read(&disk, &volume, 1 << 16, 10), Ok(vec![]));
    assert_eq!(write(&disk, &volume, 1 << 16, &[1]), Err(Errno::ENOSPC));
    assert_eq!(write(&disk, &volume, 1 << 17, &[]), Ok(0));
    assert_eq!(run_to_end(volume.truncate(&disk, (1 << 16) + 1)), Err(Errno::EFBIG));
}

#[test]
fn what_a_shrink_cut_off_reads_as_zeros_after_growing() {
    let disk = made(1 << 16);
    let volume = reopen(&disk);
    write(&disk, &volume, 0, &[3; 1 << 16]).unwrap();
    run_to_end(volume.truncate(&disk, 10_001)).unwrap();
    assert_eq!(volume.size(), 10_001);
    assert_eq!(run_to_end(volume.append(&disk, &Memory::new(vec![4; 5]))), Ok(5));
    run_to_end(volume.truncate(&disk, 1 << 16)).unwrap();
    let mut expected = vec![0; 1 << 16];
    expected[..10_001].fill(3);
    expected[10_001..10_006].fill(4);
    assert!(read(&disk, &volume, 0, 1 << 16).unwrap() == expected);
    assert!(volume.is_hole(16_384, 4096) && !volume.is_hole(8192, 4096));
    run_to_end(volume.sync(&disk)).unwrap();
    drop(volume);
    assert!(read(&disk, &reopen(&disk), 0, 1 << 16).unwrap() == expected);
}

#[test]
fn times_of_content_survive_with_it_and_all_of_them_a_clean_closing() {
    let disk = made(1 << 16);
    let volume = reopen(&disk);
    assert_eq!(volume.times(), Times::default(), "a new volume has no times");
    volume.set_times(Times { accessed: -5, modified: 6, changed: 7 });
    volume.touch(80);
    write(&disk, &volume, 0, &[1; 10]).unwrap();
    run_to_end(volume.sync(&disk)).unwrap();
    drop(volume);
    let volume = reopen(&disk);
    let synced = Times { modified: 80, changed: 80, ..volume.times() };
    assert_eq!(volume.times(), synced, "after a crash behind a sync");
    let set = Times { accessed: -5, modified: i64::MIN, changed: 100 };
    volume.set_times(set);
    run_to_end(volume.close(&disk)).unwrap();
    assert_eq!(reopen(&disk).times(), set, "after a clean closing");
}

#[test]
fn a_punched_range_is_a_hole_and_its_edges_stay() {
    let disk = made(1 << 16);
    let volume = reopen(&disk);
    write(&disk, &volume, 0, &[3; 1 << 16]).unwrap();
    run_to_end(volume.punch(&disk, 5000, 20_000)).unwrap();
    run_to_end(volume.punch(&disk, 40_000, 100)).unwrap();
    let mut expected = vec![3; 1 << 16];
    expected[5000..25_000].fill(0);
    expected[40_000..40_100].fill(0);
    assert!(read(&disk, &volume, 0, 1 << 16).unwrap() == expected);
    assert!(volume.is_hole(8192, 16_384));
    run_to_end(volume.close(&disk)).unwrap();
    let volume = reopen(&disk);
    assert!(read(&disk, &volume, 0, 1 << 16).unwrap() == expected);
}

#[test]
fn an_unreadable_buffer_is_efault_or_a_short_count() {
    struct Half;
    impl crate::platform::Buffer for Half {
        fn len(&self) -> usize {
            8 * BLOCK
        }
        fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), crate::platform::Fault> {
            out.fill(6);
            if at + out.len() > 3 * BLOCK { Err(crate::platform::Fault) } else { Ok(()) }
        }
        fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), crate::platform::Fault> {
            if at + data.len() > 3 * BLOCK { Err(crate::platform::Fault) } else { Ok(()) }
        }
    }
    let disk = made(1 << 16);
    let volume = reopen(&disk);
    assert_eq!(run_to_end(volume.write(&disk, 0, &Half)), Ok(3 * BLOCK));
    assert_eq!(run_to_end(volume.read(&disk, 0, &Half)), Ok(3 * BLOCK));
    let mut expected = vec![6; 3 * BLOCK];
    expected.resize(8 * BLOCK, 0);
    assert!(read(&disk, &volume, 0, 8 * BLOCK).unwrap() == expected);
}

#[test]
fn a_sync_of_one_block_costs_one_flush_and_at_most_two_blocks_and_nothing_when_clean() {
    let disk = made(1 << 24);
    let volume = reopen(&disk);
    write(&disk, &volume, 0, &[1; BLOCK]).unwrap();
    run_to_end(volume.sync(&disk)).unwrap();
    for n in 0..20 {
        *disk.calls.lock().unwrap() = (0, 0, 0);
        write(&disk, &volume, n * 4096, &[1; BLOCK]).unwrap();
        run_to_end(volume.sync(&disk)).unwrap();
        let (reads, written, flushes) = *disk.calls.lock().unwrap();
        assert_eq!((reads, flushes), (0, 1));
        assert!(written <= 1 + 2, "{written} blocks written");
        run_to_end(volume.sync(&disk)).unwrap();
        assert_eq!(*disk.calls.lock().unwrap(), (0, written, 1), "a clean sync asks the host");
    }
}

#[test]
fn a_large_read_after_random_overwrites_takes_few_host_requests() {
    let (disk, volume) = overwritten(256);
    read(&disk, &volume, 0, 1 << 20).unwrap();
    *disk.calls.lock().unwrap() = (0, 0, 0);
    let bytes = read(&disk, &volume, 0, 1 << 20).unwrap();
    assert!(bytes.chunks(BLOCK).zip(0..).all(|(block, n)| block.iter().all(|b| *b == n as u8)));
    let (reads, ..) = *disk.calls.lock().unwrap();
    assert!(reads <= 19, "{reads} host requests");
}

#[test]
fn a_place_that_cannot_be_read_costs_the_block_that_lies_there_and_no_other() {
    const BLOCKS: u64 = 64;
    let (disk, volume) = overwritten(BLOCKS);
    let mut hit = 0;
    for place in 0..disk.size {
        if !disk.blocks.lock().unwrap().contains_key(&place) {
            continue;
        }
        *disk.bad.lock().unwrap() = Some(place);
        let first_bad = (0..BLOCKS).find(|n| read(&disk, &volume, n * 4096, BLOCK).is_err());
        let whole = read(&disk, &volume, 0, (BLOCKS * 4096) as usize);
        match first_bad {
            None => assert_eq!(whole.map(|bytes| bytes.len() as u64), Ok(BLOCKS * 4096)),
            Some(0) => assert_eq!(whole, Err(Errno::EIO)),
            Some(n) => assert_eq!(whole.map(|bytes| bytes.len() as u64), Ok(n * 4096)),
        }
        hit += u64::from(first_bad.is_some());
    }
    assert_eq!(hit, BLOCKS, "each block lies in one place");
}

#[test]
fn a_gibibyte_is_formatted_and_opened_with_few_requests_and_little_memory() {
    let disk = made(1 << 30);
    let (_, written, _) = *disk.calls.lock().unwrap();
    assert!(written < 12_000, "{written} blocks written by format");
    *disk.calls.lock().unwrap() = (0, 0, 0);
    let volume = reopen(&disk);
    let (reads, written, flushes) = *disk.calls.lock().unwrap();
    assert!(reads < 300 && written <= 4 && flushes <= 3, "{reads} {written} {flushes}");
    assert_eq!(volume.capacity(), 1 << 30);
    write(&disk, &volume, 123_456_789, &[8; 100_000]).unwrap();
    assert!(read(&disk, &volume, 123_456_789, 100_000).unwrap() == vec![8; 100_000]);
}

#[test]
fn a_tebibyte_opens_like_a_small_volume_and_takes_writes_everywhere() {
    let size = 1 << 40;
    let disk = made(size);
    *disk.calls.lock().unwrap() = (0, 0, 0);
    let volume = reopen(&disk);
    let (reads, written, _) = *disk.calls.lock().unwrap();
    assert!(reads < 1100 && written <= 4, "{reads} reads, {written} blocks written");
    let spots = |n: u64| n * 0x5555_5555_5555 % (size / 4096) * 4096;
    for n in 1..600 {
        write(&disk, &volume, spots(n), &[n as u8; BLOCK]).unwrap();
    }
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    for n in 1..300 {
        write(&disk, &volume, spots(n), &[(n % 200) as u8 + 7; BLOCK]).unwrap();
    }
    run_to_end(volume.sync(&disk)).unwrap();
    drop(volume);
    let volume = reopen(&disk);
    run_to_end(volume.close(&disk)).unwrap();
    let volume = reopen(&disk);
    for n in 1..600_u64 {
        let byte = if n < 300 { (n % 200) as u8 + 7 } else { n as u8 };
        assert!(read(&disk, &volume, spots(n), BLOCK).unwrap() == [byte; BLOCK], "spot {n}");
    }
}

#[test]
fn a_hundred_sessions_leave_every_epoch_readable() {
    let disk = made(1 << 20);
    for n in 0..100_u64 {
        let volume = reopen(&disk);
        write(&disk, &volume, n * 4096, &[n as u8 + 1; BLOCK]).unwrap();
        // Every third one is killed after a sync.
        if n % 3 == 0 {
            run_to_end(volume.sync(&disk)).unwrap();
        } else {
            run_to_end(volume.close(&disk)).unwrap();
        }
    }
    let volume = reopen(&disk);
    for n in 0..100_u64 {
        assert!(read(&disk, &volume, n * 4096, BLOCK).unwrap() == vec![n as u8 + 1; BLOCK]);
    }
    assert!(volume.info().epoch > 100);
}

#[test]
fn killed_sessions_without_a_checkpoint_never_run_out_of_epochs() {
    let disk = made(1 << 20);
    let volume = reopen(&disk);
    write(&disk, &volume, 0, &[5; BLOCK]).unwrap();
    run_to_end(volume.sync(&disk)).unwrap();
    drop(volume);
    for _ in 0..80 {
        drop(reopen(&disk));
    }
    let volume = reopen(&disk);
    assert!(read(&disk, &volume, 0, BLOCK).unwrap() == vec![5; BLOCK]);
}

#[test]
fn an_epoch_that_has_sealed_enough_gives_way_to_a_new_one() {
    let disk = made(1 << 20);
    let volume = reopen(&disk);
    volume.core.lock().rotate_at = 20;
    let first = volume.info().epoch;
    for n in 0..200_u64 {
        write(&disk, &volume, n * 4096, &[n as u8; BLOCK]).unwrap();
        if n % 50 == 49 {
            run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
        }
    }
    assert!(volume.info().epoch >= first + 3);
    run_to_end(volume.sync(&disk)).unwrap();
    drop(volume);
    let volume = reopen(&disk);
    for n in 0..200_u64 {
        assert!(read(&disk, &volume, n * 4096, BLOCK).unwrap() == vec![n as u8; BLOCK]);
    }
}

#[test]
fn chores_publish_flush_and_checkpoint_in_their_time() {
    let disk = made(1 << 20);
    let volume = reopen(&disk);
    let ms = 1_000_000;
    assert_eq!(volume.due(0), None);
    write(&disk, &volume, 0, &[1; BLOCK]).unwrap();
    assert_eq!(volume.due(10 * ms), None);
    assert_eq!(volume.due(40 * ms), Some(Chore::Publish));
    assert_eq!(volume.due(50 * ms), None, "claimed");
    run_to_end(volume.run_chore(&disk, Chore::Publish)).unwrap();
    assert_eq!(volume.due(60 * ms), None);
    assert_eq!(volume.due(1100 * ms), Some(Chore::Flush));
    run_to_end(volume.run_chore(&disk, Chore::Flush)).unwrap();
    // The durable mark, for an idle volume.
    assert_eq!(volume.due(1200 * ms), None);
    assert_eq!(volume.due(1300 * ms), Some(Chore::Publish));
    run_to_end(volume.run_chore(&disk, Chore::Publish)).unwrap();
    assert_eq!(volume.due(2000 * ms), None);
    assert_eq!(volume.due(40_000 * ms), Some(Chore::Checkpoint));
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    assert_eq!(volume.due(90_000 * ms), None);
}

/// The embedder runs these on several threads.
#[allow(dead_code)]
fn every_future_is_send(disk: &MemDisk, volume: &Volume, buffer: &Memory) {
    fn send<T: Send>(_: T) {}
    send(volume.read(disk, 0, buffer));
    send(volume.write(disk, 0, buffer));
    send(volume.append(disk, buffer));
    send(volume.sync(disk));
    send(volume.truncate(disk, 0));
    send(volume.punch(disk, 0, 1));
    send(volume.close(disk));
    send(volume.run_chore(disk, Chore::Flush));
}

#[test]
fn a_volume_leads_to_its_own_later_states_alone() {
    let disk = made(1 << 18);
    let image = |disk: &MemDisk| disk.blocks.lock().unwrap().clone();
    let open = |blocks: &BTreeMap<u64, Block>, after| {
        let copy = MemDisk { blocks: Arc::new(Mutex::new(blocks.clone())), ..disk.clone() };
        let options = OpenOptions { after: Some(after), ..OpenOptions::default() };
        run_to_end(Volume::open(&copy, &key(), &options)).map(|_| ())
    };
    // Closed cleanly, synced and dropped, dropped with what was not synced: as hand-over, loss and
    // kill leave it.
    let mut turns = vec![];
    for turn in 0..9 {
        let before = image(&disk);
        let volume = reopen(&disk);
        write(&disk, &volume, turn * 4096, &[1; 4096]).unwrap();
        match turn % 3 {
            0 => run_to_end(volume.close(&disk)).unwrap(),
            1 => run_to_end(volume.sync(&disk)).unwrap(),
            _ => run_to_end(volume.run_chore(&disk, Chore::Publish)).unwrap(),
        }
        turns.push((before, volume.progress(), image(&disk)));
    }
    for (n, (before, left, after)) in turns.iter().enumerate() {
        assert_eq!(open(after, *left), Ok(()), "as it was left: {n}");
        assert_eq!(open(before, *left), Err(VolumeError::NotWhatWasLeft), "older: {n}");
        assert_eq!(open(&turns[8].2, *left), Ok(()), "as others have left it: {n}");
    }
    let seed = Arc::new(Mutex::new(7));
    let other = MemDisk { size: disk.size, warm: disk.warm.clone(), seed, ..MemDisk::default() };
    run_to_end(Volume::format(&other, &key(), &FormatOptions { size: 1 << 18 })).unwrap();
    let fresh = reopen(&other).progress();
    assert_eq!(open(&image(&other), fresh), Ok(()));
    assert_eq!(open(&turns[8].2, fresh), Err(VolumeError::NotWhatWasLeft), "another volume");
}

/// Four homes in a row are given up, with the 32 places that each has to spare; the last one's
/// stay. Then two on either side.
#[test]
fn what_the_guest_gave_up_goes_back_to_the_host_and_the_rest_stays() {
    let disk = made(1 << 24);
    *disk.discards.lock().unwrap() = Some(vec![]);
    let volume = reopen(&disk);
    volume.discard_freed(true);
    write(&disk, &volume, 0, &vec![7; 4 << 20]).unwrap();
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    run_to_end(volume.punch(&disk, 1 << 20, 2 << 20)).unwrap();
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    let given = |disk: &super::memory::MemDisk| {
        disk.discards.lock().unwrap().iter().flatten().map(|(_, count)| count).sum::<u64>()
    };
    // It rests first.
    assert_eq!((volume.due(1), given(&disk)), (None, 0));
    assert_eq!(volume.due(30_000_000_000), Some(Chore::Discard));
    run_to_end(volume.run_chore(&disk, Chore::Discard)).unwrap();
    let first = 4 * 128 + 3 * 32;
    assert_eq!((given(&disk), volume.counters().discarded_blocks), (first, first));
    assert_eq!(volume.due(60_000_000_000), None);
    let mut expected = vec![7; 4 << 20];
    expected[1 << 20..3 << 20].fill(0);
    assert!(read(&disk, &volume, 0, 4 << 20).unwrap() == expected);
    // Closing gives back what has not rested long enough.
    run_to_end(volume.truncate(&disk, 0)).unwrap();
    run_to_end(volume.close(&disk)).unwrap();
    assert_eq!(given(&disk), first + 2 * (2 * 128 + 32));
}

#[test]
fn a_host_that_takes_nothing_back_is_asked_once() {
    let disk = made(1 << 24);
    let volume = reopen(&disk);
    volume.discard_freed(true);
    write(&disk, &volume, 0, &vec![7; 4 << 20]).unwrap();
    run_to_end(volume.truncate(&disk, 0)).unwrap();
    run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    assert_eq!(volume.due(1), None);
    assert_eq!(volume.due(30_000_000_000), Some(Chore::Discard));
    run_to_end(volume.run_chore(&disk, Chore::Discard)).unwrap();
    assert_eq!((volume.due(90_000_000_000), volume.counters().discarded_blocks), (None, 0));
    write(&disk, &volume, 0, &vec![9; 4 << 20]).unwrap();
    assert!(read(&disk, &volume, 0, 4 << 20).unwrap() == vec![9; 4 << 20]);
}
