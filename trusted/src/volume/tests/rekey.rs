//! Rekey: what the volume holds stays, whenever it is cut off; what the old key opened does not.

use alloc::{sync::Arc, vec, vec::Vec};

use super::{
    audit,
    crash::{formatted, key, open, read_all, tiny},
    disk::{Image, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    errno::Errno,
    platform::Memory,
    volume::{
        Misuse, OpenOptions, RekeyReport, SlotKey, Stretch, Volume, VolumeError,
        crypto::VolumeKey,
        header,
        layout::{HEADER_BLOCKS, HEADERS, SUPERBLOCKS, put},
        superblock::Superblock,
    },
};

const CHEAP: Stretch = Stretch { memory_kib: 8, passes: 1, lanes: 1 };
/// Bytes of the guest's file: the last block is a part of one.
const SIZE: u64 = 99 * 4096 + 100;

fn runner(seed: u64, image: &Image) -> Runner {
    nonces::reset();
    Runner::new(SimDisk::new(seed, tiny().host_blocks, image.clone()))
}

/// Does `work` on a disk of this image; answers the image after it.
fn on<T, F>(seed: u64, image: &Image, work: impl FnOnce(SimDisk) -> F) -> (Image, T)
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut runner = runner(seed, image);
    let task = work(runner.disk.clone());
    let answer = runner.block_on(task);
    (runner.disk.image(), answer)
}

fn content(block: u64) -> Vec<u8> {
    (0..BLOCK).map(|i| (block as usize * 13 + i * 5 + 3) as u8).collect()
}

fn other() -> SlotKey {
    SlotKey::new([9; 32])
}

/// A volume with holes, sealed in many epochs, that `key()`, `other()` and a passphrase open; and
/// what it holds.
fn made() -> (Image, Vec<u8>) {
    let mut image = formatted(1, tiny());
    let mut expected = vec![0; SIZE as usize];
    for round in 0..40_u64 {
        image = on(100 + round, &image, move |disk| async move {
            let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
            for block in (round % 7..98).step_by(7).filter(|block| !(40..60).contains(block)) {
                let bytes = Memory::new(content(block + round));
                volume.write(&disk, block * 4096, &bytes).await.unwrap();
            }
            volume.truncate(&disk, SIZE).await.unwrap();
            volume.write(&disk, 99 * 4096, &Memory::new(vec![7; 100])).await.unwrap();
            volume.close(&disk).await.unwrap();
        })
        .0;
        for block in (round % 7..98).step_by(7).filter(|block| !(40..60).contains(block)) {
            expected[block as usize * BLOCK..][..BLOCK].copy_from_slice(&content(block + round));
        }
    }
    expected[99 * BLOCK..].fill(7);
    let image = on(300, &image, |disk| async move {
        Volume::put_slot(&disk, &key(), &other(), CHEAP, None).await.unwrap();
        let words = SlotKey::passphrase(b"words");
        Volume::put_slot(&disk, &key(), &words, CHEAP, Some(5)).await.unwrap();
    })
    .0;
    (image, expected)
}

/// What the volume holds, read without writing.
fn read_by(image: &Image, by: SlotKey) -> Result<Vec<u8>, VolumeError> {
    on(7, image, |disk| async move {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let (volume, _) = Volume::open(&disk, &by, &options).await?;
        Ok(read_all(disk, Arc::new(volume)).await.expect("everything reads"))
    })
    .1
}

async fn rekey(disk: SimDisk) -> Result<RekeyReport, VolumeError> {
    Volume::rekey(
        &disk,
        &[&key(), &SlotKey::passphrase(b"words")],
        &OpenOptions::default(),
        |_, _| (),
    )
    .await
}

/// What rekeys leave that are cut off, one after each so many steps, and the end.
pub(super) fn cut_off_images(every: usize) -> Vec<Image> {
    let (before, _) = made();
    let mut images = Vec::new();
    for n in (0..).step_by(every) {
        let mut runner = runner(11 + n, &before);
        let task = rekey(runner.disk.clone());
        let finished = runner.finish(task, n).is_some();
        runner.kill();
        runner.disk.power_cut();
        images.push(runner.disk.image());
        if finished {
            break;
        }
    }
    images
}

fn header_of(image: &Image, copy: usize) -> alloc::boxed::Box<header::HeaderBytes> {
    let mut bytes = alloc::boxed::Box::new([0; header::BYTES]);
    for i in 0..HEADER_BLOCKS {
        if let Some(block) = image.get(&(HEADERS[copy] + i as u64)) {
            put(&mut bytes[..], i * BLOCK, &block[..]);
        }
    }
    bytes
}

/// The volume keys of an image that `key()` opens, as a thief would have kept them.
fn stolen(image: &Image) -> VolumeKey {
    header::decode(&header_of(image, 0), &key()).unwrap().key
}

#[test]
fn a_rekeyed_volume_reads_the_same_and_neither_the_old_key_nor_a_dropped_slot_opens_it() {
    let (before, expected) = made();
    let old = stolen(&before);
    let (after, report) = on(5, &before, rekey);
    let report = report.unwrap();
    assert_eq!((report.resumed, report.key_version), (false, 2));
    assert_eq!(
        report.rewritten,
        expected.chunks(BLOCK).filter(|b| b.iter().any(|b| *b != 0)).count() as u64
    );
    for kept in [key(), SlotKey::passphrase(b"words")] {
        assert_eq!(read_by(&after, kept).as_deref(), Ok(&expected[..]));
    }
    assert_eq!(read_by(&after, other()), Err(VolumeError::WrongKey));
    for copy in 0..2 {
        let bytes = header_of(&after, copy);
        assert_eq!(header::decode(&bytes, &other()).err(), Some(VolumeError::WrongKey));
        let keys = header::decode(&bytes, &key()).unwrap();
        assert!(!keys.key.is_retiring());
        assert_eq!(keys.key.version(), 2);
    }
    for (slot, place) in
        SUPERBLOCKS.into_iter().enumerate().flat_map(|(slot, c)| c.map(|p| (slot, p)))
    {
        assert!(Superblock::open(&before[&place], &old, slot).unwrap().is_some(), "the control");
        assert_eq!(Superblock::open(&after[&place], &old, slot), Ok(None));
    }
    // The old roots under the new header: nothing of them is believed.
    let mut grafted = after.clone();
    SUPERBLOCKS.into_iter().flatten().for_each(|p| drop(grafted.insert(p, before[&p].clone())));
    assert_eq!(read_by(&grafted, key()), Err(VolumeError::DamagedSuperblock));
    // No pointer leads to an old epoch, and the space map agrees with the tree.
    on(8, &after, |disk| async move {
        let (volume, report) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        assert!(report.clean);
        assert!((1..volume.info().epoch).all(|id| {
            volume.core.lock().epochs.iter().all(|e| e.id != id || e.key_version == 2)
        }));
        for id in 1..=40 {
            assert!(volume.epoch(&disk, id).await.is_err(), "epoch {id} is remembered");
        }
        volume.close(&disk).await.unwrap();
        audit::audit(disk, volume).await.unwrap();
    });
}

#[test]
fn a_table_of_many_epochs_is_left_behind_and_grows_again() {
    let (mut image, expected) = made();
    // More than a leaf of the table holds, before and after.
    for round in 0..300 {
        if round == 150 {
            image = on(5, &image, rekey).0;
        }
        image = on(2000 + round, &image, |disk| async move {
            let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
            let last = Memory::new(vec![7; 100]);
            volume.write(&disk, 99 * 4096, &last).await.unwrap();
            volume.close(&disk).await.unwrap();
        })
        .0;
    }
    let (image, report) = on(6, &image, rekey);
    assert_eq!(report.unwrap().key_version, 3);
    assert_eq!(read_by(&image, key()).as_deref(), Ok(&expected[..]));
    on(7, &image, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        volume.close(&disk).await.unwrap();
        assert!(volume.table_places(&disk).await.unwrap().len() <= 2, "one path is enough");
        audit::audit(disk, volume).await.unwrap();
    });
}

#[test]
fn a_rekey_cut_off_anywhere_leaves_a_volume_that_reads_the_same_and_goes_on_to_its_end() {
    let (before, expected) = made();
    let mut steps = 0;
    for n in 0.. {
        let mut runner = runner(11 + n, &before);
        let task = rekey(runner.disk.clone());
        let finished = runner.finish(task, n).is_some();
        runner.kill();
        if n % 2 == 0 {
            runner.disk.power_cut();
        } else {
            runner.disk.guest_kill();
        }
        let cut = runner.disk.image();
        assert_eq!(read_by(&cut, key()).as_deref(), Ok(&expected[..]), "cut off after {n}");
        // In between it is used as ever, by whatever key it opens with.
        let by = if n % 3 == 0 { other() } else { key() };
        let (used, wrote) = on(500 + n, &cut, |disk| async move {
            let (volume, _) = Volume::open(&disk, &by, &OpenOptions::default()).await?;
            volume.write(&disk, 50 * 4096, &Memory::new(vec![3; BLOCK])).await.unwrap();
            volume.sync(&disk).await.unwrap();
            Ok::<_, VolumeError>(())
        });
        let mut expected = expected.clone();
        match wrote {
            Ok(()) => expected[50 * BLOCK..51 * BLOCK].fill(3),
            Err(error) => assert_eq!((error, n % 3), (VolumeError::WrongKey, 0)),
        }
        let (after, report) = on(900 + n, &used, rekey);
        report.unwrap();
        assert_eq!(read_by(&after, key()).as_deref(), Ok(&expected[..]), "cut off after {n}");
        let keys = header::decode(&header_of(&after, 1), &key()).unwrap().key;
        assert!(!keys.is_retiring(), "cut off after {n}");
        let old = stolen(&before);
        for (slot, copies) in SUPERBLOCKS.into_iter().enumerate() {
            assert_eq!(Superblock::open(&after[&copies[0]], &old, slot), Ok(None));
        }
        on(1300 + n, &after, |disk| async move {
            let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
            volume.close(&disk).await.unwrap();
            audit::audit(disk, volume).await.unwrap();
        });
        steps += 1;
        if finished {
            break;
        }
    }
    assert!(steps > 150, "a rekey of {steps} steps is none");
}

#[test]
fn a_header_that_carries_a_rekey_in_one_copy_has_begun_it_for_every_key() {
    let (before, expected) = made();
    let (begun, answer) = on(5, &before, |disk| async move {
        Volume::rekey_begin(&disk, &[&key()], &OpenOptions::default()).await
    });
    assert_eq!(answer, Ok(true));
    for first in 0..2 {
        for cut in 0..=HEADER_BLOCKS as u64 {
            let mut image = begun.clone();
            for i in 0..HEADER_BLOCKS as u64 {
                image.insert(HEADERS[1 - first] + i, before[&(HEADERS[1 - first] + i)].clone());
                if i >= cut {
                    image.insert(HEADERS[first] + i, before[&(HEADERS[first] + i)].clone());
                }
            }
            assert_eq!(read_by(&image, key()).as_deref(), Ok(&expected[..]), "{cut} blocks");
            // The last block has the sum: until it is there, nothing has happened.
            let dropped = read_by(&image, other());
            match cut {
                8 => assert_eq!(dropped, Err(VolumeError::WrongKey)),
                _ => assert_eq!(dropped.as_deref(), Ok(&expected[..]), "{cut} blocks"),
            }
        }
    }
}

#[test]
fn a_copy_of_the_header_that_was_left_behind_is_written_before_anything_is_sealed() {
    let (before, expected) = made();
    let (begun, _) = on(5, &before, |disk| async move {
        Volume::rekey_begin(&disk, &[&key()], &OpenOptions::default()).await
    });
    let mut image = begun;
    (0..8).for_each(|i| drop(image.insert(HEADERS[0] + i, before[&(HEADERS[0] + i)].clone())));
    let (mut opened, _) = on(6, &image, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        volume.close(&disk).await.unwrap();
    });
    // The copy that carried the rekey first is destroyed: the other one has it too.
    (0..8).for_each(|i| drop(opened.remove(&(HEADERS[1] + i))));
    assert_eq!(read_by(&opened, key()).as_deref(), Ok(&expected[..]));
    assert_eq!(read_by(&opened, other()), Err(VolumeError::WrongKey));
}

#[test]
fn a_volume_with_snapshots_is_rekeyed_after_they_are_deleted_and_gets_none_meanwhile() {
    let (before, expected) = made();
    let refused = |error| assert_eq!(error, Err(VolumeError::Misuse(Misuse::HasSnapshots)));
    let (kept, _) = on(5, &before, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        volume.make_snapshot(&disk, "kept", 7).await.unwrap();
        volume.close(&disk).await.unwrap();
    });
    let (image, answer) = on(6, &kept, rekey);
    refused(answer.map(drop));
    assert_eq!(read_by(&image, other()).as_deref(), Ok(&expected[..]), "a slot is gone");
    assert!(!header::decode(&header_of(&image, 0), &key()).unwrap().key.is_retiring());
    let (image, _) = on(7, &image, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        volume.delete_snapshot(&disk, "kept").await.unwrap();
        volume.close(&disk).await.unwrap();
        let options = OpenOptions::default();
        assert_eq!(Volume::rekey_begin(&disk, &[&key()], &options).await, Ok(true));
        let (volume, _) = open(disk.clone(), options).await.unwrap();
        let made = volume.make_snapshot(&disk, "new", 7).await;
        assert_eq!(made, Err(VolumeError::Misuse(Misuse::Rekeying)));
        volume.close(&disk).await.unwrap();
    });
    let (image, answer) = on(8, &image, rekey);
    assert!(answer.is_ok(), "{answer:?}");
    assert_eq!(read_by(&image, key()).as_deref(), Ok(&expected[..]));
}

#[test]
fn a_damaged_block_stops_a_rekey_by_name_and_once_written_it_goes_on() {
    let (before, mut expected) = made();
    let place = on(4, &before, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        volume.resolve(&disk, 33).await.unwrap().place()
    })
    .1;
    let mut image = before;
    image.insert(place, Arc::new([1; BLOCK]));
    let (image, stopped) = on(5, &image, rekey);
    assert_eq!(stopped, Err(VolumeError::Unreadable { offset: 33 * 4096 }));
    let (image, ()) = on(6, &image, |disk| async move {
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        let lost = volume.read(&disk, 33 * 4096, &Memory::new(vec![0; BLOCK])).await;
        assert_eq!(lost, Err(Errno::EIO));
        volume.write(&disk, 33 * 4096, &Memory::new(vec![1; BLOCK])).await.unwrap();
        volume.close(&disk).await.unwrap();
    });
    expected[33 * BLOCK..34 * BLOCK].fill(1);
    let (image, report) = on(7, &image, rekey);
    assert!(report.unwrap().resumed);
    assert_eq!(read_by(&image, key()).as_deref(), Ok(&expected[..]));
}

#[test]
fn a_key_that_opens_nothing_begins_no_rekey_and_versions_count_up() {
    let (before, expected) = made();
    let (image, refused) = on(5, &before, |disk| async move {
        Volume::rekey(&disk, &[&key(), &SlotKey::new([8; 32])], &OpenOptions::default(), |_, _| ())
            .await
    });
    assert_eq!(refused, Err(VolumeError::WrongKey));
    assert_eq!(read_by(&image, other()).as_deref(), Ok(&expected[..]));
    let (image, first) = on(6, &image, rekey);
    let (image, second) = on(7, &image, rekey);
    assert_eq!((first.unwrap().key_version, second.unwrap().key_version), (2, 3));
    assert_eq!(read_by(&image, SlotKey::passphrase(b"words")).as_deref(), Ok(&expected[..]));
}

#[test]
fn the_work_of_a_passphrase_opens_its_slot_until_that_changes_and_makes_none() {
    let (image, expected) = made();
    let (image, bytes) = on(5, &image, |disk| async move {
        Volume::stretch(&disk, &SlotKey::passphrase(b"words")).await.unwrap().unwrap()
    });
    assert_eq!(read_by(&image, SlotKey::stretched(*bytes)).as_deref(), Ok(&expected[..]));
    assert_eq!(read_by(&image, SlotKey::new(*bytes)), Err(VolumeError::WrongKey));
    let (image, (none, wrong, put)) = on(6, &image, move |disk| async move {
        let none = Volume::stretch(&disk, &key()).await;
        let wrong = Volume::stretch(&disk, &SlotKey::passphrase(b"word")).await;
        let new = SlotKey::stretched(*bytes);
        (none, wrong, Volume::put_slot(&disk, &key(), &new, CHEAP, None).await)
    });
    assert_eq!((none, wrong), (Ok(None), Err(VolumeError::WrongKey)));
    assert_eq!(put, Err(VolumeError::Misuse(Misuse::Stretch)));
    let stretched = on(7, &image, |disk| async move {
        Volume::stretch(&disk, &SlotKey::passphrase(b"words")).await.unwrap().unwrap()
    });
    let (image, stretched) = stretched;
    let (image, _) = on(8, &image, rekey);
    assert_eq!(read_by(&image, SlotKey::stretched(*stretched)), Err(VolumeError::WrongKey));
}
