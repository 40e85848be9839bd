//! Key slots: who can open a volume, before, during and after a change.

use alloc::{sync::Arc, vec::Vec};

use super::{
    crash::{formatted, key, tiny},
    disk::{Image, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    volume::{
        Misuse, OpenOptions, SealingPolicy, SealingRequest, SlotKey, SlotKind, Stretch, Volume,
        VolumeError, crypto,
        layout::{HEADER_BLOCKS, HEADERS},
    },
};

/// As little work as there is: these tests are about the slots.
const CHEAP: Stretch = Stretch { memory_kib: 8, passes: 1, lanes: 1 };

fn runner(image: &Image) -> Runner {
    nonces::reset();
    Runner::new(SimDisk::new(7, tiny().host_blocks, image.clone()))
}

fn opens(image: &Image, key: SlotKey) -> Result<(), VolumeError> {
    let mut runner = runner(image);
    let disk = runner.disk.clone();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    runner.block_on(async move { Volume::open(&disk, &key, &options).await.map(drop) })
}

fn put(
    image: &Image,
    by: SlotKey,
    new: SlotKey,
    at: Option<usize>,
) -> (Image, Result<usize, VolumeError>) {
    let mut runner = runner(image);
    let disk = runner.disk.clone();
    let answer =
        runner.block_on(async move { Volume::put_slot(&disk, &by, &new, CHEAP, at).await });
    (runner.disk.image(), answer)
}

fn clear(image: &Image, by: SlotKey, number: usize) -> (Image, Result<(), VolumeError>) {
    let mut runner = runner(image);
    let disk = runner.disk.clone();
    let answer =
        runner.block_on(async move { Volume::clear_slot(&disk, &by, number, false).await });
    (runner.disk.image(), answer)
}

fn kinds(image: &Image) -> Vec<(usize, SlotKind)> {
    let mut runner = runner(image);
    let disk = runner.disk.clone();
    let slots = runner.block_on(async move { Volume::slots(&disk).await }).unwrap();
    slots.iter().map(|slot| (slot.number, slot.kind)).collect()
}

fn words() -> SlotKey {
    SlotKey::passphrase(b"correct horse")
}

fn file(byte: u8) -> SlotKey {
    SlotKey::new([byte; 32])
}

#[test]
fn every_key_that_has_a_slot_opens_the_volume_and_no_other() {
    let image = formatted(1, tiny());
    let (image, at) = put(&image, key(), words(), None);
    assert_eq!(at, Ok(1));
    let (image, at) = put(&image, words(), file(9), Some(5));
    assert_eq!(at, Ok(5));
    assert_eq!(
        kinds(&image),
        [(0, SlotKind::KeyFile), (1, SlotKind::Passphrase(CHEAP)), (5, SlotKind::KeyFile)]
    );
    for good in [key(), words(), file(9)] {
        assert_eq!(opens(&image, good), Ok(()));
    }
    for wrong in [file(8), SlotKey::passphrase(b"correct horse "), SlotKey::passphrase(&[9; 32])] {
        assert_eq!(opens(&image, wrong), Err(VolumeError::WrongKey));
    }
    assert_eq!(put(&image, file(8), file(1), None).1, Err(VolumeError::WrongKey));
}

#[test]
fn a_key_whose_slot_was_emptied_or_taken_opens_neither_copy_of_the_header() {
    let image = formatted(1, tiny());
    let (image, _) = put(&image, key(), words(), None);
    let (image, cleared) = clear(&image, words(), 0);
    assert_eq!(cleared, Ok(()));
    let (image, at) = put(&image, words(), file(3), Some(1));
    assert_eq!(at, Ok(1));
    for copy in HEADERS {
        let mut image = image.clone();
        (copy..copy + HEADER_BLOCKS as u64).for_each(|place| drop(image.remove(&place)));
        assert_eq!(opens(&image, key()), Err(VolumeError::WrongKey));
        assert_eq!(opens(&image, words()), Err(VolumeError::WrongKey));
        assert_eq!(opens(&image, file(3)), Ok(()));
    }
}

/// Bytes of FORMAT.md's table: kind 3, the policy, ISVSVN, CPUSVN.
#[test]
fn a_sealing_key_opens_the_slots_that_name_its_request_and_no_others() {
    let image = formatted(1, tiny());
    let request = SealingRequest {
        policy: SealingPolicy::Signer,
        version: 0x0102,
        cpu_version: *b"0123456789abcdef",
    };
    let sealing = |request| SlotKey::sealing(request, [6; 16]);
    let (image, at) = put(&image, key(), sealing(request), None);
    assert_eq!(at, Ok(1));
    assert_eq!(kinds(&image), [(0, SlotKind::KeyFile), (1, SlotKind::Sgx(request))]);
    let slot = &image[&(HEADERS[0] + 1)][512..544];
    assert_eq!(slot[..16], [1, 3, 2, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(slot[16..], *b"0123456789abcdef");

    assert_eq!(opens(&image, sealing(request)), Ok(()));
    let wrong = Err(VolumeError::WrongKey);
    assert_eq!(opens(&image, SlotKey::sealing(request, [7; 16])), wrong);
    for other in [
        SealingRequest { policy: SealingPolicy::Enclave, ..request },
        SealingRequest { version: 0x0101, ..request },
        SealingRequest { cpu_version: [0; 16], ..request },
    ] {
        assert_eq!(opens(&image, sealing(other)), wrong);
    }
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&[6; 16]);
    assert_eq!(opens(&image, SlotKey::new(bytes)), wrong, "a key file of the same bytes");
}

#[test]
fn the_last_slot_stays_and_a_ninth_has_no_place() {
    let mut image = formatted(1, tiny());
    assert_eq!(clear(&image, key(), 0).1, Err(VolumeError::Misuse(Misuse::LastSlot)));
    assert_eq!(clear(&image, key(), 3).1, Err(VolumeError::Misuse(Misuse::NoSlot)));
    for n in 1..8 {
        let (next, at) = put(&image, key(), file(n), None);
        assert_eq!(at, Ok(usize::from(n)));
        image = next;
    }
    let full = Err(VolumeError::Misuse(Misuse::NoSlot));
    assert_eq!(put(&image, key(), file(8), None).1, full);
    assert_eq!(put(&image, key(), file(8), Some(8)).1, full);
    assert_eq!(opens(&image, file(7)), Ok(()));
}

#[test]
fn a_change_that_is_cut_off_anywhere_leaves_a_volume_that_opens() {
    let before = formatted(1, tiny());
    let (after, _) = put(&before, key(), words(), None);
    // The first copy is written over first: both have the same generation.
    let written: Vec<u64> = [HEADERS[1], HEADERS[0]]
        .into_iter()
        .flat_map(|place| place..place + HEADER_BLOCKS as u64)
        .collect();
    assert!(written.iter().all(|place| HEADERS.iter().any(|h| (*h..h + 8).contains(place))));
    for cut in 0..=written.len() {
        let mut image = before.clone();
        for place in &written[..cut] {
            match after.get(place) {
                Some(block) => image.insert(*place, block.clone()),
                None => image.remove(place),
            };
        }
        assert_eq!(opens(&image, key()), Ok(()), "cut off after {cut} blocks");
    }
}

#[test]
fn work_that_a_host_writes_into_a_slot_is_bounded() {
    let (image, _) = put(&formatted(1, tiny()), key(), words(), None);
    for (at, value) in [(4, 1 << 30), (4, 0), (8, 1 << 20), (8, 0), (12, 1000), (12, 0)] {
        let mut image = image.clone();
        for copy in HEADERS {
            let mut bytes: Vec<u8> = (copy..copy + HEADER_BLOCKS as u64)
                .flat_map(|place| image.get(&place).map_or([0; BLOCK], |block| **block))
                .collect();
            bytes[BLOCK + 512 + at..][..4].copy_from_slice(&u32::to_le_bytes(value));
            // The sum takes no key.
            let sum = crypto::sha256(&bytes[..HEADER_BLOCKS * BLOCK - 64]);
            let end = bytes.len();
            bytes[end - 64..end - 32].copy_from_slice(&sum);
            for (place, block) in (copy..).zip(bytes.as_chunks::<BLOCK>().0) {
                image.insert(place, Arc::new(*block));
            }
        }
        assert_eq!(opens(&image, words()), Err(VolumeError::WrongKey));
        assert_eq!(opens(&image, key()), Err(VolumeError::DamagedHeader));
    }
}

#[test]
fn a_derived_key_stays_when_slots_change_and_differs_for_each_name_and_volume() {
    let derived = |image: &Image, by: SlotKey, salt: &'static [u8]| {
        let mut runner = runner(image);
        let disk = runner.disk.clone();
        runner.block_on(async move {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let (volume, _) = Volume::open(&disk, &by, &options).await.unwrap();
            volume.derive_key(salt, b"test").key_file().unwrap()
        })
    };
    let image = formatted(1, tiny());
    let before = derived(&image, key(), b"one");
    let (image, _) = put(&image, key(), words(), None);
    let (image, _) = clear(&image, words(), 0);
    assert_eq!(derived(&image, words(), b"one"), before);
    assert_ne!(derived(&image, words(), b"two"), before);
    assert_ne!(derived(&formatted(2, tiny()), key(), b"one"), before);
}
