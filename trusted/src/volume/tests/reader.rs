//! The second implementation, `tools/reader` (Python, written from docs/FORMAT.md alone), against
//! this one: on what crashes leave, and on what a host has altered, both say the same.
//!
//! Skips, and says so, where Python has no `cryptography` or `argon2`.

use alloc::{
    format,
    string::{String, ToString},
    sync::Arc,
    vec,
    vec::Vec,
};
use std::{
    eprintln, fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    capacity,
    crash::{crash_images, crash_images_with_snapshots, key, open, roomy, tiny},
    disk::{Image, Rng, SimDisk},
    nonces, rekey,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    errno::Errno,
    platform::Memory,
    volume::{OpenOptions, Times, Volume, crypto},
};

/// The second implementation.
const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/reader");
/// Crash simulations whose images are compared; each has a handful of crashes.
const SEEDS: core::ops::Range<u64> = 1..21;

/// A directory of this test, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("postern-reader-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A Python that can read volumes; `None`, said loudly, if there is none.
fn python() -> Option<&'static str> {
    let found = ["python3", "/usr/bin/python3"].into_iter().find(|python| {
        let mut command = Command::new(python);
        let done = command.arg("-B").arg(READER).arg("--check").output();
        done.is_ok_and(|done| done.status.success())
    });
    if found.is_none() {
        eprintln!(
            "SKIPPED: {}: no python3 with `cryptography` and `argon2` (`cargo xtask setup` installs both)",
            std::thread::current().name().unwrap_or("test")
        );
    }
    found
}

/// What reading a volume gives, in words that both implementations can say: the content's hash
/// with zeros for what is damaged, the damaged blocks, the hash of each snapshot, and the file's
/// times; or that it is refused.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Refused,
    Read { sha256: String, damaged: Vec<u64>, snapshots: Vec<String>, times: [i64; 3] },
}

fn ours(image: &Image) -> Said {
    nonces::reset();
    let mut runner = Runner::new(SimDisk::new(9, roomy().host_blocks, image.clone()));
    // Some are bound to a counter, which neither side has here.
    let options = OpenOptions { unbind: true, ..OpenOptions::default() };
    let opened = runner.block_on(open(runner.disk.clone(), options));
    let Ok((volume, _)) = opened else { return Said::Refused };
    let disk = runner.disk.clone();
    runner.block_on(async move {
        let (bytes, damaged) = content(&disk, &volume).await;
        let mut snapshots = Vec::new();
        for kept in volume.snapshots(&disk).await.unwrap_or_default() {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let (volume, _) = Volume::open(&disk, &key(), &options).await.unwrap();
            let volume = volume.at_snapshot(&disk, &kept.name).await.unwrap();
            snapshots.push(hex(&content(&disk, &Arc::new(volume)).await.0));
        }
        let Times { accessed, modified, changed } = volume.times();
        let times = [accessed, modified, changed];
        Said::Read { sha256: hex(&bytes), damaged, snapshots, times }
    })
}

fn hex(bytes: &[u8]) -> String {
    crypto::sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn content(disk: &SimDisk, volume: &Arc<Volume>) -> (Vec<u8>, Vec<u64>) {
    let (mut out, mut damaged) = (Vec::new(), Vec::new());
    while (out.len() as u64) < volume.size() {
        let length = BLOCK.min((volume.size() - out.len() as u64) as usize);
        let buffer = Memory::new(vec![0xee; length]);
        match volume.read(disk, out.len() as u64, &buffer).await {
            Ok(done) => {
                assert_eq!(done, length);
                out.extend_from_slice(&buffer.into_inner());
            }
            Err(errno) => {
                assert_eq!(errno, Errno::EIO);
                damaged.push((out.len() / BLOCK) as u64);
                out.resize(out.len() + length, 0);
            }
        }
    }
    (out, damaged)
}

fn save(image: &Image, path: &Path) {
    let file = fs::File::create(path).unwrap();
    file.set_len(roomy().host_blocks * BLOCK as u64).unwrap();
    for (place, block) in image {
        file.write_all_at(&block[..], place * BLOCK as u64).unwrap();
    }
}

/// What stands behind `"name": ` in a line of JSON, up to the end of its value.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let from = line.find(&format!("\"{name}\": ")).unwrap_or_else(|| panic!("{name}: {line}"));
    let value = &line[from + name.len() + 4..];
    let mut depth = 0;
    let end = value.find(|c| {
        depth += match c {
            '[' | '{' => 1,
            ']' | '}' => -1,
            _ => 0,
        };
        depth < 0 || depth == 0 && c == ','
    });
    value[..end.unwrap_or(value.len())].trim_matches('"')
}

fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
}

/// What the other one says of each image, in order. `whole`: the space map must be exact.
fn theirs(python: &str, images: &[Image], name: &str, whole: bool) -> Vec<Said> {
    let scratch = Scratch::new(name);
    let key = scratch.0.join("key");
    fs::write(&key, [42; 32]).unwrap();
    let paths: Vec<PathBuf> = (0..images.len()).map(|n| scratch.0.join(n.to_string())).collect();
    for (image, path) in images.iter().zip(&paths) {
        save(image, path);
    }
    let mut command = Command::new(python);
    command.arg("-B").arg(READER);
    command.arg("--key-file").arg(&key).args(whole.then_some("--audit")).args(&paths);
    let done = command.output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert_eq!(said.lines().count(), images.len(), "the reader fell over: {errors}");
    said.lines()
        .map(|line| {
            if line.starts_with("{\"refused\"") {
                return Said::Refused;
            }
            if whole {
                for list in ["leaked", "missing", "twice"] {
                    assert_eq!(field(line, list), "[]", "the space map: {line}");
                }
            }
            let damaged = numbers(field(line, "damaged"))
                .chunks(2)
                .flat_map(|range| range[0]..range[0] + range[1])
                .collect();
            let snapshots = field(line, "snapshots").split("\"sha256\": \"").skip(1);
            let snapshots = snapshots.map(|rest| rest[..64].into()).collect();
            let times = field(line, "times").trim_matches(['[', ']']).split(", ");
            let times: Vec<i64> = times.map(|time| time.parse().unwrap()).collect();
            Said::Read {
                sha256: field(line, "sha256").into(),
                damaged,
                snapshots,
                times: times.try_into().unwrap(),
            }
        })
        .collect()
}

/// The content of one volume as the other one reads it, with this option and secret; `None`, said
/// loudly, where it cannot run.
pub(super) fn content_by(image: &Image, secret: (&str, &[u8])) -> Option<Vec<u8>> {
    let python = python()?;
    let scratch = Scratch::new(&secret.0[2..]);
    let [volume, key, content] = ["volume", "key", "content"].map(|name| scratch.0.join(name));
    save(image, &volume);
    fs::write(&key, secret.1).unwrap();
    let mut command = Command::new(python);
    command.arg("-B").arg(READER);
    command.arg(secret.0).arg(&key).arg("--content").arg(&content).arg(&volume);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    Some(fs::read(&content).unwrap())
}

fn compare(python: &str, images: &[Image], name: &str, whole: bool) -> Vec<Said> {
    let said = theirs(python, images, name, whole);
    for (n, (image, theirs)) in images.iter().zip(&said).enumerate() {
        assert_eq!(*theirs, ours(image), "image {n} of {}: theirs, ours", images.len());
    }
    said
}

#[test]
fn a_second_implementation_reads_the_same_after_any_crash() {
    let Some(python) = python() else { return };
    let images: Vec<Image> = SEEDS.flat_map(crash_images).collect();
    assert!(images.len() > 30, "only {} crashes", images.len());
    let said = compare(python, &images, "crashes", true);
    let whole = |said: &Said| matches!(said, Said::Read { damaged, .. } if damaged.is_empty());
    assert!(said.iter().all(whole), "a crash has damaged or refused something");
}

#[test]
fn a_second_implementation_reads_the_same_snapshots_and_counts_their_blocks() {
    let Some(python) = python() else { return };
    let images: Vec<Image> = SEEDS.flat_map(crash_images_with_snapshots).collect();
    let said = compare(python, &images, "snapshots", true);
    let kept = |said: &Said| match said {
        Said::Read { damaged, snapshots, .. } if damaged.is_empty() => snapshots.len(),
        _ => panic!("a crash has damaged or refused something"),
    };
    let kept: usize = said.iter().map(kept).sum();
    assert!(kept > 40, "only {kept} snapshots in {} images", images.len());
}

/// Two volume keys at once, and one that has followed another.
#[test]
fn a_second_implementation_reads_the_same_amid_a_rekey_and_after_it() {
    let Some(python) = python() else { return };
    let images = rekey::cut_off_images(23);
    assert!(images.len() > 6, "only {} rekeys were cut off", images.len());
    let said = compare(python, &images, "rekeyed", true);
    assert!(said.iter().all(|one| *one == said[0]), "a rekey has changed the content");
    assert!(matches!(&said[0], Said::Read { damaged, .. } if damaged.is_empty()));
}

#[test]
fn a_second_implementation_reads_the_same_amid_a_resize_and_after_it() {
    let Some(python) = python() else { return };
    for (from, to) in [(120, 300), (300, 101)] {
        let images = capacity::cut_off_images(from, to, 19);
        assert!(images.len() > 3, "only {} resizes were cut off", images.len());
        let said = compare(python, &images, &format!("resized-{to}"), true);
        let read = |said: &Said| matches!(said, Said::Read { damaged, .. } if damaged.is_empty());
        assert!(said.iter().all(read), "a crash has damaged or refused something");
    }
}

#[test]
fn a_second_implementation_refuses_the_same_alterations() {
    let Some(python) = python() else { return };
    let mut rng = Rng(23);
    let mut images: Vec<Image> = SEEDS.flat_map(crash_images).collect();
    for image in &mut images {
        let written: Vec<u64> =
            image.iter().filter(|(_, b)| ***b != [0; BLOCK]).map(|(place, _)| *place).collect();
        let ring: Vec<u64> = written
            .iter()
            .copied()
            .filter(|p| (512..512 + tiny().ring_blocks).contains(p))
            .collect();
        for _ in 0..1 + rng.below(3) {
            let from = if rng.chance(60.0) && !ring.is_empty() { &ring } else { &written };
            let place = from[rng.below(from.len() as u64) as usize];
            let mut block = *image[&place];
            match rng.below(4) {
                // Torn: the first sectors are of before.
                0 => block[..512 * (1 + rng.below(7) as usize)].fill(0),
                1 => block = [0; BLOCK],
                2 => block = *image[&from[rng.below(from.len() as u64) as usize]],
                _ => block[rng.below(BLOCK as u64) as usize] ^= 1 << rng.below(8),
            }
            image.insert(place, Arc::new(block));
        }
    }
    let said = compare(python, &images, "altered", false);
    let refused = said.iter().filter(|said| **said == Said::Refused).count();
    let damaged = |said: &&Said| matches!(said, Said::Read { damaged, .. } if !damaged.is_empty());
    assert!(refused > 0 && refused < said.len(), "{refused} of {} are refused", said.len());
    assert!(said.iter().any(|said| damaged(&said)), "nothing was damaged");
}
