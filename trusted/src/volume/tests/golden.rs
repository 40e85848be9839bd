//! Golden images: a volume of each version of the format, as it was once written. Each opens for
//! ever, with its known content, by key file and by passphrase.
//!
//! An image is a list of (number of places (8 bytes), the places (8 bytes each), 4096 bytes);
//! blocks of zeros are left out. One is made once for each version and never again:
//! `cargo test -p postern-trusted -- --ignored make_a_golden_image`.

use alloc::{collections::BTreeMap, string::ToString, sync::Arc, vec, vec::Vec};

use super::{
    crash::{formatted, key, open, read_all, tiny},
    disk::{Image, SimDisk},
    nonces, reader,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    platform::Memory,
    volume::{
        OpenOptions, SlotKey, Stretch, Volume, VolumeError, crypto, header,
        layout::{HEADER_BLOCKS, HEADERS, SUPERBLOCKS, get_array, put, put32, put64},
        slots,
    },
};

/// Version of the format, image.
const GOLDEN: [(u32, &[u8]); 1] = [(1, include_bytes!("golden/v1.image"))];
const PASSPHRASE: &[u8] = "drei Br\u{fc}cken".as_bytes();
const STRETCH: Stretch = Stretch { memory_kib: 32, passes: 2, lanes: 2 };
/// Bytes of the file in the image, not a whole block.
const SIZE: u64 = 100 * 4096 + 1000;

fn sealed(block: u64, version: u8) -> Vec<u8> {
    (0..BLOCK as u64).map(|i| (block * 37 + i * 11 + i / 256) as u8 ^ version).collect()
}

/// What the image's file holds, independent of how it was written.
fn known() -> Vec<u8> {
    let mut out = vec![0; SIZE as usize];
    let mut set = |block: u64, version| {
        let at = (block * 4096) as usize;
        out[at..at + BLOCK].copy_from_slice(&sealed(block, version));
    };
    // In the map; in the journal; in both, where the journal's counts; a neighbouring pair.
    for (block, version) in [(0, 1), (4, 2), (70, 2), (71, 2)] {
        set(block, version);
    }
    // Written, then punched from the middle of block 1 to the middle of block 3.
    set(1, 1);
    set(3, 1);
    out[4096 + 2048..3 * 4096 + 2048].fill(0);
    out
}

fn runner(image: &Image) -> Runner {
    nonces::reset();
    Runner::new(SimDisk::new(40, tiny().host_blocks, image.clone()))
}

/// A volume with a passphrase in its second slot, a map, and a journal that was not closed.
fn made() -> Image {
    let mut runner = runner(&formatted(1_001, tiny()));
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let words = SlotKey::passphrase(PASSPHRASE);
        Volume::put_slot(&disk, &key(), &words, STRETCH, None).await.unwrap();
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        let write = async |volume: &Volume, block: u64, version| {
            let bytes = Memory::new(sealed(block, version));
            volume.write(&disk, block * 4096, &bytes).await.unwrap();
        };
        for block in 0..5 {
            write(&volume, block, 1).await;
        }
        volume.close(&disk).await.unwrap();
        let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
        write(&volume, 4, 2).await;
        let pair = Memory::new([sealed(70, 2), sealed(71, 2)].concat());
        volume.write(&disk, 70 * 4096, &pair).await.unwrap();
        volume.punch(&disk, 4096 + 2048, 2 * 4096).await.unwrap();
        volume.truncate(&disk, SIZE).await.unwrap();
        volume.sync(&disk).await.unwrap();
    });
    runner.disk.image()
}

fn encode(image: &Image) -> Vec<u8> {
    let mut places: BTreeMap<&[u8; BLOCK], Vec<u64>> = BTreeMap::new();
    for (place, block) in image.iter().filter(|(_, block)| ***block != [0; BLOCK]) {
        places.entry(block).or_default().push(*place);
    }
    let mut out = Vec::new();
    for (block, places) in places {
        out.extend_from_slice(&(places.len() as u64).to_le_bytes());
        places.iter().for_each(|place| out.extend_from_slice(&place.to_le_bytes()));
        out.extend_from_slice(block);
    }
    out
}

fn decode(mut bytes: &[u8]) -> Image {
    let mut image = Image::new();
    let number = |bytes: &mut &[u8]| {
        let (word, rest) = bytes.split_first_chunk().unwrap();
        *bytes = rest;
        u64::from_le_bytes(*word)
    };
    while !bytes.is_empty() {
        let count = number(&mut bytes);
        let places: Vec<u64> = (0..count).map(|_| number(&mut bytes)).collect();
        let (block, rest) = bytes.split_first_chunk::<BLOCK>().unwrap();
        bytes = rest;
        for place in places {
            image.insert(place, Arc::new(*block));
        }
    }
    image
}

fn opened(image: &Image, by: SlotKey, options: OpenOptions) -> Result<Vec<u8>, VolumeError> {
    let mut runner = runner(image);
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let (volume, _) = Volume::open(&disk, &by, &options).await?;
        let bytes = read_all(disk.clone(), Arc::new(volume)).await;
        Ok(bytes.expect("everything reads"))
    })
}

#[test]
fn a_volume_of_every_version_opens_with_its_content_by_key_file_and_by_passphrase() {
    for (version, bytes) in GOLDEN {
        let image = decode(bytes);
        for options in
            [OpenOptions { read_only: true, ..OpenOptions::default() }, OpenOptions::default()]
        {
            for by in [key(), SlotKey::passphrase(PASSPHRASE)] {
                let content = opened(&image, by, options.clone());
                assert!(content == Ok(known()), "version {version}, {options:?}: {content:?}");
            }
        }
        let wrong = SlotKey::passphrase(b"vier");
        assert_eq!(opened(&image, wrong, OpenOptions::default()), Err(VolumeError::WrongKey));
    }
}

#[test]
fn a_volume_of_every_version_goes_on_being_written() {
    for (_, bytes) in GOLDEN {
        let mut runner = runner(&decode(bytes));
        let disk = runner.disk.clone();
        runner.block_on(async move {
            let (volume, report) = open(disk.clone(), OpenOptions::default()).await.unwrap();
            assert!(!report.clean && report.journal_blocks > 0, "{report:?}");
            volume.write(&disk, 0, &Memory::new(sealed(0, 9))).await.unwrap();
            volume.close(&disk).await.unwrap();
        });
        let mut expected = known();
        expected[..BLOCK].copy_from_slice(&sealed(0, 9));
        let image = runner.disk.image();
        assert!(opened(&image, key(), OpenOptions::default()) == Ok(expected));
    }
}

#[test]
fn a_second_implementation_reads_every_version_by_key_file_and_by_passphrase() {
    for (version, bytes) in GOLDEN {
        let image = decode(bytes);
        for secret in [("--key-file", &[42; 32][..]), ("--passphrase-file", PASSPHRASE)] {
            let Some(said) = reader::content_by(&image, secret) else { return };
            assert!(said == known(), "version {version}, {}", secret.0);
        }
    }
}

/// Changes bytes of both header copies and makes sum and MAC good again.
fn with_header(image: &Image, change: impl Fn(&mut [u8])) -> Image {
    let mut image = image.clone();
    for copy in HEADERS {
        let places = copy..copy + HEADER_BLOCKS as u64;
        let blocks: Vec<_> =
            places.clone().map(|p| image.get(&p).map_or([0; BLOCK], |b| **b)).collect();
        let mut bytes = blocks.concat();
        let uuid = get_array(&bytes, 48);
        let master = slots::open(&bytes[BLOCK..BLOCK + 512], &key(), &uuid).unwrap();
        change(&mut bytes);
        let (sum, mac) = (bytes.len() - 64, bytes.len() - 32);
        let digest = crypto::sha256(&bytes[..sum]);
        put(&mut bytes, sum, &digest);
        let under = crypto::derive(&master.0, &[], &[b"postern/1 header", &uuid]);
        let code = crypto::mac(&under, &[&bytes[..mac]]);
        put(&mut bytes, mac, &code);
        for (place, block) in places.zip(bytes.as_chunks::<BLOCK>().0) {
            image.insert(place, Arc::new(*block));
        }
    }
    image
}

/// Changes the newest superblock's bytes and seals it again.
fn with_superblock(image: &Image, change: impl Fn(&mut [u8; BLOCK])) -> Image {
    let mut image = image.clone();
    let bytes: Vec<u8> = (0..HEADER_BLOCKS as u64)
        .flat_map(|place| image.get(&place).map_or([0; BLOCK], |block| **block))
        .collect();
    let header: &header::HeaderBytes = bytes[..].try_into().unwrap();
    let opened = header::decode(header, &key()).unwrap();
    let under = opened.key;
    for (slot, copies) in SUPERBLOCKS.into_iter().enumerate() {
        for place in copies {
            let Some(block) = image.get(&place) else { continue };
            let mut b = **block;
            let aad = |b: &[u8; BLOCK]| {
                let mut aad = [0; 32];
                aad[..24].copy_from_slice(&b[40..64]);
                aad[24] = slot as u8;
                aad
            };
            let single = under.single(b"postern/1 superblock", &get_array(&b, 0));
            let (tag, with) = (get_array(&b, 24), aad(&b));
            if single.open(crypto::SINGLE, &with, &tag, &mut b[64..]).is_err() {
                continue;
            }
            change(&mut b);
            let with = aad(&b);
            let tag = single.seal(crypto::SINGLE, &with, &mut b[64..]);
            put(&mut b, 24, &tag);
            image.insert(place, Arc::new(b));
        }
    }
    image
}

#[test]
fn what_a_newer_build_may_write_is_refused_by_name() {
    let image = decode(GOLDEN[0].1);
    let rw = OpenOptions::default();
    let refusal = |image: &Image| opened(image, key(), rw.clone()).unwrap_err();

    let newer = with_header(&image, |bytes| put32(bytes, 8, 2));
    assert_eq!(refusal(&newer), VolumeError::UnsupportedVersion { found: 2 });
    assert!(
        refusal(&newer).to_string().contains("format version 2, which this build does not read")
    );

    let newer = with_header(&image, |bytes| put64(bytes, 40, 1 << 63));
    assert_eq!(refusal(&newer), VolumeError::UnsupportedFeatures { bits: 1 << 63 });
    assert!(refusal(&newer).to_string().contains("0x8000000000000000"));

    let newer = with_superblock(&image, |bytes| put32(bytes, 48, 7));
    assert_eq!(refusal(&newer), VolumeError::UnsupportedVersion { found: 7 });

    let newer = with_superblock(&image, |bytes| {
        put32(bytes, 48, 2);
        put32(bytes, 52, 6);
    });
    assert_eq!(refusal(&newer), VolumeError::UnsupportedFeatures { bits: 6 });

    // Going on from the other slot's older state would lose what the newer build wrote.
    for slot in 0..2 {
        let newer = with_superblock(&image, |bytes| {
            if bytes[72] == slot {
                put32(bytes, 48, 7);
            }
        });
        assert_eq!(refusal(&newer), VolumeError::UnsupportedVersion { found: 7 }, "slot {slot}");
    }

    for (at, value) in [(64, 2), (68, 8192), (72, 3)] {
        let newer = with_header(&image, |bytes| put32(bytes, at, value));
        assert_eq!(refusal(&newer), VolumeError::BadGeometry, "byte {at}");
    }
}

#[test]
fn unknown_features_that_only_writers_must_know_open_read_only_and_others_not_at_all() {
    let image = decode(GOLDEN[0].1);
    for (at, read_only) in [(24, false), (32, true)] {
        let newer = with_header(&image, |bytes| put64(bytes, at, 1 << 40));
        assert!(opened(&newer, key(), OpenOptions::default()) == Ok(known()));
        let mut runner = runner(&newer);
        let disk = runner.disk.clone();
        let refused = runner.block_on(async move {
            let (volume, _) = open(disk.clone(), OpenOptions::default()).await.unwrap();
            volume.write(&disk, 0, &Memory::new(sealed(0, 9))).await.is_err()
        });
        assert_eq!((refused, runner.disk.image() == newer), (read_only, read_only), "byte {at}");
    }
}

/// Writes the image of the present version. Not a test: to be run once for a new version.
#[test]
#[ignore = "writes a golden image into the sources"]
fn make_a_golden_image() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/volume/tests/golden/v1.image");
    std::fs::write(path, encode(&made())).unwrap();
}
