//! What a host can do with what it stores, beyond flipping bits: older parts, parts of other
//! volumes, other lengths, the whole. docs/THREAT_MODEL.md names these tests.

use alloc::{sync::Arc, vec, vec::Vec};

use super::{
    crash::{formatted, open, tiny},
    disk::{Image, SimDisk},
    nonces,
    run::Runner,
    tamper::{USED, flip, made, opened, options, plain, pointer, refusal, unreadable},
};
use crate::{
    disk::BLOCK,
    errno::Errno,
    platform::Memory,
    volume::{
        OpenOptions, Volume, VolumeError,
        layout::{HEADERS, SUPERBLOCKS},
    },
};

/// Work on the volume in `image` by a process of its own, which draws its own salts.
fn session(image: &Image, seed: u64, close: bool, writes: &[(u64, Vec<u8>)]) -> Image {
    let mut runner = Runner::new(SimDisk::new(seed, tiny().host_blocks, image.clone()));
    let (disk, writes) = (runner.disk.clone(), writes.to_vec());
    runner.block_on(async move {
        let (volume, _) = open(disk.clone(), options()).await.unwrap();
        for (block, bytes) in writes {
            volume.write(&disk, block * 4096, &Memory::new(bytes)).await.unwrap();
        }
        volume.sync(&disk).await.unwrap();
        if close {
            volume.close(&disk).await.unwrap();
        }
    });
    runner.disk.image()
}

/// Another volume under the same key, filled with the same blocks.
fn another() -> Image {
    let writes: Vec<_> = (0..USED).map(|block| (block, plain(block))).collect();
    session(&formatted(77, tiny()), 78, true, &writes)
}

fn copy(to: &mut Image, from: &Image, places: impl IntoIterator<Item = u64>) {
    for place in places {
        match from.get(&place) {
            Some(block) => drop(to.insert(place, block.clone())),
            None => drop(to.remove(&place)),
        }
    }
}

fn read(
    runner: &mut Runner,
    volume: &Arc<Volume>,
    block: u64,
    count: usize,
) -> Result<Vec<u8>, Errno> {
    let (disk, volume) = (runner.disk.clone(), volume.clone());
    runner.block_on(async move {
        let buffer = Memory::new(vec![0xee; count * BLOCK]);
        let done = volume.read(&disk, block * 4096, &buffer).await?;
        let mut bytes = buffer.into_inner();
        bytes.truncate(done);
        Ok(bytes)
    })
}

/// Data, and the guest's bytes within a block that was read, changed and written again.
#[test]
fn no_plain_byte_of_the_guest_is_on_the_host() {
    // A text that chance does not make.
    let secret = *b"plain \xa7 as a text";
    let text: Vec<u8> = secret.iter().copied().cycle().take(3 * BLOCK + 512).collect();
    for close in [false, true] {
        let mut runner = Runner::new(SimDisk::new(5, tiny().host_blocks, made(true)));
        let disk = runner.disk.clone();
        let words = text.clone();
        runner.block_on(async move {
            let (volume, _) = open(disk.clone(), options()).await.unwrap();
            volume.write(&disk, 7 * 4096 + 512, &Memory::new(words)).await.unwrap();
            volume.sync(&disk).await.unwrap();
            if close {
                volume.close(&disk).await.unwrap();
            }
        });
        for (place, block) in runner.disk.image() {
            let found = block.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "place {place} shows the guest's text");
        }
        let (mut runner, volume) = opened(&runner.disk.image(), options());
        let seen = read(&mut runner, &volume.unwrap(), 7, 4).unwrap();
        assert!(seen[512..].starts_with(&text), "the text is not there at all");
    }
}

#[test]
fn reading_a_never_written_block_returns_zeros() {
    let (mut runner, volume) = opened(&made(true), options());
    let volume = volume.unwrap();
    for block in USED..tiny().capacity {
        assert_eq!(read(&mut runner, &volume, block, 1), Ok(vec![0; BLOCK]));
    }
}

#[test]
fn a_range_read_over_a_hole_returns_the_written_blocks_too() {
    nonces::reset();
    let image = session(&formatted(1, tiny()), 2, true, &[(3, plain(3)), (6, plain(6))]);
    let (mut runner, volume) = opened(&image, options());
    let mut expected = vec![0; 8 * BLOCK];
    for block in [3, 6] {
        expected[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&plain(block as u64));
    }
    assert_eq!(read(&mut runner, &volume.unwrap(), 0, 8), Ok(expected));
}

#[test]
fn an_open_error_never_reformats() {
    let image = made(true);
    for places in [&HEADERS[..], &SUPERBLOCKS.concat()] {
        let mut damaged = image.clone();
        places.iter().for_each(|place| flip(&mut damaged, *place, 500));
        places.iter().for_each(|place| flip(&mut damaged, *place, 0));
        // Checks that nothing was written.
        refusal(&damaged);
    }
}

/// Rollback of the whole without a counter: what is not promised.
#[test]
fn a_whole_disk_rollback_opens_where_there_is_no_counter() {
    let old = made(true);
    session(&old, 3, true, &[(1, plain(99))]);
    let (mut runner, volume) = opened(&old, options());
    assert_eq!(unreadable(&mut runner, &volume.unwrap()), []);
}

#[test]
fn blocks_of_another_volume_under_the_same_key_are_eio() {
    let (image, other) = (made(true), another());
    let mut mixed = image.clone();
    for block in [3, 40, 80] {
        let (here, there) = (pointer(&image, 0, block).place(), pointer(&other, 0, block).place());
        mixed.insert(here, other[&there].clone());
    }
    let (mut runner, volume) = opened(&mixed, options());
    assert_eq!(unreadable(&mut runner, &volume.unwrap()), [3, 40, 80]);
}

#[test]
fn a_node_of_another_volume_under_the_same_key_is_eio_for_its_blocks() {
    let (image, other) = (made(true), another());
    let mut mixed = image.clone();
    let (here, there) = (pointer(&image, 1, 0).place(), pointer(&other, 1, 0).place());
    mixed.insert(here, other[&there].clone());
    let (mut runner, volume) = opened(&mixed, options());
    assert_eq!(unreadable(&mut runner, &volume.unwrap()).len() as u64, USED);
}

#[test]
fn superblocks_of_another_volume_under_the_same_key_are_refused() {
    let mut mixed = made(true);
    copy(&mut mixed, &another(), SUPERBLOCKS.concat());
    assert_eq!(refusal(&mixed), VolumeError::DamagedSuperblock);
}

#[test]
fn a_journal_of_another_volume_under_the_same_key_is_refused_or_a_lost_tail() {
    let mut mixed = made(false);
    let ring = tiny().ring_start..tiny().ring_start + tiny().ring_blocks;
    copy(&mut mixed, &another(), ring);
    // Nothing of it authenticates: what the volume's own superblock knows is missed, or not.
    let (mut runner, volume) = opened(&mixed, options());
    if let Ok(volume) = volume {
        for block in 0..USED {
            let bytes = read(&mut runner, &volume, block, 1).unwrap();
            assert!(bytes == plain(block) || bytes == [0; BLOCK], "block {block}");
        }
    }
}

#[test]
fn an_older_node_of_the_map_is_eio_for_its_blocks_and_never_their_older_content() {
    let old = made(true);
    let mut new = session(&old, 3, true, &[(7, plain(8)), (9, plain(8))]);
    let (then, now) = (pointer(&old, 1, 0), pointer(&new, 1, 0));
    assert_ne!(then.order, now.order);
    new.insert(now.place(), old[&then.place()].clone());
    let (mut runner, volume) = opened(&new, options());
    let volume = volume.unwrap();
    for block in 0..USED {
        assert_eq!(read(&mut runner, &volume, block, 1), Err(Errno::EIO), "block {block}");
    }
}

#[test]
fn an_older_version_of_a_block_in_its_place_is_eio() {
    let old = made(true);
    let mut new = session(&old, 3, true, &[(7, plain(8))]);
    let (then, now) = (pointer(&old, 0, 7), pointer(&new, 0, 7));
    new.insert(now.place(), old[&then.place()].clone());
    let (mut runner, volume) = opened(&new, options());
    assert_eq!(read(&mut runner, &volume.unwrap(), 7, 1), Err(Errno::EIO));
}

#[test]
fn an_older_journal_block_in_its_place_is_a_gap_that_is_refused() {
    let old = made(false);
    // A second life uses the ring's first places again only after a lap; put one block back.
    let mut new = old.clone();
    let (early, late) = (tiny().ring_place(2), tiny().ring_place(4));
    new.insert(late, old[&early].clone());
    let why = refusal(&new);
    assert!(matches!(why, VolumeError::JournalLost { tip: 3, .. }), "{why:?}");
}

#[test]
fn an_older_superblock_is_refused_where_the_journal_knows_a_newer_one() {
    let old = made(true);
    // Journal blocks say which superblock was durable when they were written.
    let mut new = session(&old, 3, false, &[(7, plain(8))]);
    copy(&mut new, &old, SUPERBLOCKS.concat());
    let why = refusal(&new);
    assert!(matches!(why, VolumeError::SuperblockLost { .. }), "{why:?}");
}

#[test]
fn bytes_after_the_end_of_the_host_file_change_nothing() {
    let image = made(true);
    let mut runner = Runner::new(SimDisk::new(5, tiny().host_blocks + 64, image));
    for place in tiny().host_blocks..tiny().host_blocks + 64 {
        let mut state = runner.disk.image();
        flip(&mut state, place, 1);
        runner = Runner::new(SimDisk::new(5 + place, tiny().host_blocks + 64, state));
    }
    nonces::reset();
    let volume = runner.block_on(open(runner.disk.clone(), OpenOptions::default())).unwrap().0;
    assert_eq!(volume.info().host_blocks, tiny().host_blocks);
    assert_eq!(unreadable(&mut runner, &volume), []);
}
