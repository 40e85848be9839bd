//! A host that changes what it stores: a clear refusal or `EIO`, never a wrong byte, never a new
//! volume in the place of the old one.

use alloc::{sync::Arc, vec, vec::Vec};

use super::{
    crash::{formatted, open, read_all, tiny},
    disk::{Image, Rng, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    errno::Errno,
    platform::Memory,
    volume::{
        OpenOptions, SlotKey, Volume, VolumeError,
        layout::{HEADERS, Ptr, SUPERBLOCKS},
    },
};

pub(super) const USED: u64 = 100;

pub(super) fn plain(block: u64) -> Vec<u8> {
    (0..BLOCK).map(|i| (block as usize * 31 + i * 7 + 1) as u8).collect()
}

fn runner(image: &Image) -> Runner {
    Runner::new(SimDisk::new(5, tiny().host_blocks, image.clone()))
}

pub(super) fn options() -> OpenOptions {
    OpenOptions::default()
}

/// A volume with 100 written blocks; closed, or synced and then killed.
pub(super) fn made(closed: bool) -> Image {
    nonces::reset();
    let mut runner = runner(&formatted(1, tiny()));
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let (volume, _) = open(disk.clone(), options()).await.unwrap();
        for block in 0..USED {
            volume.write(&disk, block * 4096, &Memory::new(plain(block))).await.unwrap();
            if block % 10 == 9 {
                volume.sync(&disk).await.unwrap();
            }
        }
        if closed {
            volume.close(&disk).await.unwrap();
        }
    });
    runner.disk.image()
}

pub(super) fn flip(image: &mut Image, place: u64, byte: usize) {
    let mut block = image.get(&place).map_or([0; BLOCK], |block| **block);
    block[byte] ^= 0x10;
    image.insert(place, Arc::new(block));
}

pub(super) fn opened(
    image: &Image,
    options: OpenOptions,
) -> (Runner, Result<Arc<Volume>, VolumeError>) {
    // Each simulated disk draws the same salts again.
    nonces::reset();
    let mut runner = runner(image);
    let volume = runner.block_on(open(runner.disk.clone(), options)).map(|(volume, _)| volume);
    (runner, volume)
}

pub(super) fn refusal(image: &Image) -> VolumeError {
    let (runner, volume) = opened(image, options());
    assert!(runner.disk.image() == *image, "a refused open has written");
    volume.expect_err("the volume opens")
}

/// Reads each block; what reads must be right. Returns those that do not read.
pub(super) fn unreadable(runner: &mut Runner, volume: &Arc<Volume>) -> Vec<u64> {
    unreadable_or_older(runner, volume, false)
}

/// `older`: a block may also read as it was before it was written. Cutting off the tail of a
/// journal looks like a power cut; without a counter nobody can tell.
fn unreadable_or_older(runner: &mut Runner, volume: &Arc<Volume>, older: bool) -> Vec<u64> {
    let (disk, volume) = (runner.disk.clone(), volume.clone());
    runner.block_on(async move {
        let mut bad = Vec::new();
        for block in 0..USED {
            let buffer = Memory::new(vec![0; BLOCK]);
            match volume.read(&disk, block * 4096, &buffer).await {
                Ok(done) => {
                    assert_eq!(done, BLOCK);
                    let bytes = buffer.into_inner();
                    let right = bytes == plain(block) || older && bytes == [0; BLOCK];
                    assert!(right, "block {block} reads as wrong bytes");
                }
                Err(errno) => {
                    assert_eq!(errno, Errno::EIO);
                    bad.push(block);
                }
            }
        }
        bad
    })
}

pub(super) fn pointer(image: &Image, level: u32, index: u64) -> Ptr {
    let (mut runner, volume) = opened(image, OpenOptions { read_only: true, ..options() });
    let (volume, disk) = (volume.unwrap(), runner.disk.clone());
    runner.block_on(async move {
        if level == 0 {
            return volume.resolve(&disk, index).await.unwrap();
        }
        let map = volume.core.lock().map;
        volume.descend(&disk, map.root, map.levels, level - 1, index).await.unwrap()
    })
}

#[test]
fn one_damaged_header_copy_is_made_up_for_by_the_other() {
    let image = made(true);
    for (copy, byte) in [(0, 0), (0, 9), (1, 50), (0, 70)] {
        let mut image = image.clone();
        flip(&mut image, HEADERS[copy], byte);
        let (mut runner, volume) = opened(&image, options());
        assert_eq!(unreadable(&mut runner, &volume.unwrap()), []);
    }
}

#[test]
fn a_header_damaged_in_both_copies_is_refused_and_left_alone() {
    for (offset, byte, expected) in [
        (0, 0, VolumeError::NotAVolume),
        (0, 50, VolumeError::DamagedHeader),
        (1, 40, VolumeError::DamagedHeader),
        (2, 100, VolumeError::DamagedHeader),
        (7, 4095, VolumeError::DamagedHeader),
    ] {
        let mut image = made(true);
        HEADERS.iter().for_each(|place| flip(&mut image, place + offset, byte));
        // The last byte belongs to the HMAC, which the checksum does not cover.
        assert_eq!(refusal(&image), expected, "byte {byte} of block {offset}");
    }
}

#[test]
fn an_unknown_version_or_feature_is_refused_by_name() {
    let mut image = made(true);
    HEADERS.iter().for_each(|place| flip(&mut image, *place, 8));
    assert_eq!(refusal(&image), VolumeError::UnsupportedVersion { found: 0x11 });
    let mut image = made(true);
    HEADERS.iter().for_each(|place| flip(&mut image, *place, 40));
    assert_eq!(refusal(&image), VolumeError::UnsupportedFeatures { bits: 0x10 });
}

#[test]
fn a_wrong_key_is_refused() {
    let image = made(true);
    let mut runner = runner(&image);
    let disk = runner.disk.clone();
    let refused = runner.block_on(async move {
        Volume::open(&disk, &SlotKey::new([43; 32]), &options()).await.map(|_| ())
    });
    assert_eq!(refused, Err(VolumeError::WrongKey));
    assert!(runner.disk.image() == image);
}

#[test]
fn an_empty_or_foreign_file_is_not_a_volume() {
    assert_eq!(refusal(&Image::new()), VolumeError::NotAVolume);
}

#[test]
fn a_truncated_host_file_is_refused() {
    let image = made(true);
    let mut runner = runner(&image);
    runner.disk.state().host_blocks -= 1;
    let needed = tiny().host_blocks;
    assert_eq!(
        runner.block_on(open(runner.disk.clone(), options())).err(),
        Some(VolumeError::HostFileShort { needed, found: needed - 1 })
    );
}

#[test]
fn one_damaged_superblock_loses_nothing_and_four_refuse() {
    let image = made(true);
    for place in SUPERBLOCKS.into_iter().flatten() {
        let mut image = image.clone();
        flip(&mut image, place, 777);
        let (mut runner, volume) = opened(&image, options());
        assert_eq!(unreadable(&mut runner, &volume.unwrap()), []);
    }
    let mut image = image;
    SUPERBLOCKS.into_iter().flatten().for_each(|place| flip(&mut image, place, 777));
    assert_eq!(refusal(&image), VolumeError::DamagedSuperblock);
}

#[test]
fn a_damaged_block_is_eio_and_its_neighbours_read() {
    let image = made(true);
    let ptr = pointer(&image, 0, 37);
    let mut damaged = image.clone();
    flip(&mut damaged, ptr.place(), 4000);
    let (mut runner, volume) = opened(&damaged, options());
    let volume = volume.unwrap();
    assert_eq!(unreadable(&mut runner, &volume), [37]);
    assert!(volume.counters().integrity_failures > 0);
    // A longer read ends before it, as read(2) does.
    let (disk, again) = (runner.disk.clone(), volume.clone());
    let buffer = Memory::new(vec![0; 8 * BLOCK]);
    let done = runner.block_on(async move { again.read(&disk, 35 * 4096, &buffer).await });
    assert_eq!(done, Ok(2 * BLOCK));
    // Writing it makes it good.
    let (disk, again) = (runner.disk.clone(), volume.clone());
    runner.block_on(async move {
        again.write(&disk, 37 * 4096, &Memory::new(plain(37))).await.unwrap();
    });
    assert_eq!(unreadable(&mut runner, &volume), []);
}

#[test]
fn moved_and_replayed_blocks_are_eio() {
    let image = made(true);
    let (a, b) = (pointer(&image, 0, 3).place(), pointer(&image, 0, 4).place());
    let mut swapped = image.clone();
    swapped.insert(a, image[&b].clone());
    swapped.insert(b, image[&a].clone());
    let (mut runner, volume) = opened(&swapped, options());
    assert_eq!(unreadable(&mut runner, &volume.unwrap()), [3, 4]);
}

#[test]
fn a_damaged_leaf_is_eio_for_its_blocks_and_does_not_wedge_the_volume() {
    let image = made(true);
    let leaf = pointer(&image, 1, 0);
    let mut damaged = image.clone();
    flip(&mut damaged, leaf.place(), 9);
    let (mut runner, volume) = opened(&damaged, options());
    let volume = volume.unwrap();
    assert_eq!(unreadable(&mut runner, &volume).len() as u64, USED);
    let (disk, again) = (runner.disk.clone(), volume.clone());
    runner.block_on(async move {
        again.write(&disk, 7 * 4096, &Memory::new(plain(7))).await.unwrap();
        again.write(&disk, 128 * 4096, &Memory::new(plain(1))).await.unwrap();
        // The checkpoint keeps what it cannot merge.
        again.make_room(&disk).await.unwrap();
        again.make_room(&disk).await.unwrap();
        again.close(&disk).await.unwrap();
    });
    let (mut runner, volume) = opened(&runner.disk.image(), options());
    let bad = unreadable(&mut runner, &volume.unwrap());
    assert_eq!((bad.len() as u64, bad.contains(&7)), (USED - 1, false));
}

#[test]
fn a_damaged_journal_is_refused_until_the_loss_is_accepted() {
    let image = made(false);
    // The first journal block after the opening's; later ones bear witness.
    let mut damaged = image.clone();
    flip(&mut damaged, tiny().ring_place(2), 2000);
    let why = refusal(&damaged);
    assert!(matches!(why, VolumeError::JournalLost { tip: 1, .. }), "{why:?}");
    let (_, looked) = opened(&damaged, OpenOptions { read_only: true, ..options() });
    assert!(looked.is_ok());
    let (mut runner, accepted) = opened(&damaged, OpenOptions { accept_loss: true, ..options() });
    let volume = accepted.unwrap();
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let bytes = read_all(disk.clone(), volume.clone()).await.unwrap();
        for (block, bytes) in (0_u64..USED).zip(bytes.chunks(BLOCK)) {
            let lost = bytes.iter().all(|byte| *byte == 0);
            assert!(lost || bytes == plain(block), "block {block}");
        }
        volume.write(&disk, 0, &Memory::new(plain(0))).await.unwrap();
        volume.sync(&disk).await.unwrap();
    });
    // Accepted once and for all.
    let (_, again) = opened(&runner.disk.image(), options());
    assert!(again.is_ok());
}

/// Any one changed byte anywhere: refused, `EIO`, or no difference; never another byte.
#[test]
fn no_flipped_bit_yields_a_wrong_byte_or_a_panic() {
    let (mut rng, images) = (Rng(11), [made(true), made(false)]);
    for n in 0..250 {
        let mut image = images[n % 2].clone();
        let written: Vec<u64> =
            image.iter().filter(|(_, b)| ***b != [0; BLOCK]).map(|(p, _)| *p).collect();
        for _ in 0..1 + rng.below(3) {
            let place = written[rng.below(written.len() as u64) as usize];
            flip(&mut image, place, rng.below(4096) as usize);
        }
        let (mut runner, volume) = opened(&image, options());
        if let Ok(volume) = volume {
            unreadable_or_older(&mut runner, &volume, n % 2 == 1);
        }
    }
}

/// A power cut may leave one copy of the newest superblock and the other one as it was before.
#[test]
fn a_superblock_in_one_copy_alone_is_the_newest_and_stays_so() {
    let before = made(true);
    let mut later = runner(&before);
    // Draws other salts than the process before.
    later.disk = SimDisk::new(6, tiny().host_blocks, before.clone());
    let disk = later.disk.clone();
    let generation = later.block_on(async move {
        let (volume, _) = open(disk.clone(), options()).await.unwrap();
        volume.write(&disk, 0, &Memory::new(plain(77))).await.unwrap();
        volume.close(&disk).await.unwrap();
        volume.info().generation
    });
    for place in SUPERBLOCKS.into_iter().flatten() {
        let mut image = later.disk.image();
        image.insert(place, before[&place].clone());
        let read_only = OpenOptions { read_only: true, ..options() };
        let (mut process, volume) = opened(&image, read_only);
        let volume = volume.unwrap();
        assert_eq!(volume.info().generation, generation, "with {place} of before");
        let disk = process.disk.clone();
        let bytes = process.block_on(read_all(disk, volume)).unwrap();
        assert!(bytes[..BLOCK] == plain(77), "with {place} of before");
    }
}
