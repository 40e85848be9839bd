//! Growing and shrinking: content stays, at every crash point, and the space map stays exact.

use alloc::{format, sync::Arc, vec, vec::Vec};

use super::{
    audit,
    crash::{formatted, key, open, read_all, tiny},
    disk::{Image, Rng, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    disk::BLOCK,
    platform::Memory,
    volume::{
        OpenOptions, Resized, Volume, VolumeError,
        layout::{FANOUT, Geometry},
    },
};

/// The tiny volume with another capacity.
pub(super) fn sized(capacity: u64) -> Geometry {
    let homes = capacity.div_ceil(FANOUT) * FANOUT;
    Geometry { capacity, host_blocks: tiny().home_start + homes + 48 + capacity / 8, ..tiny() }
}

pub(super) async fn resize(
    disk: SimDisk,
    options: OpenOptions,
    geometry: Geometry,
) -> Result<Resized, VolumeError> {
    let (volume, _) = Volume::open(&disk, &key(), &options).await?;
    volume.resize_to(&disk, &key(), &options, geometry, |_, _| {}).await
}

struct Sut {
    runner: Runner,
    /// What the file must read as.
    bytes: Vec<u8>,
}

impl Sut {
    fn new(seed: u64, capacity: u64) -> Self {
        nonces::reset();
        let geometry = sized(capacity);
        let disk = SimDisk::new(seed, geometry.host_blocks, formatted(seed, geometry));
        Self { runner: Runner::new(disk), bytes: vec![0; capacity as usize * BLOCK] }
    }

    fn disk(&self) -> SimDisk {
        self.runner.disk.clone()
    }

    fn open(&mut self) -> Arc<Volume> {
        let opened = self.runner.block_on(open(self.disk(), OpenOptions::default()));
        opened.expect("it opens").0
    }

    /// Overwrites blocks in a random order, so that many lie away from their homes.
    fn scatter(&mut self, rng: &mut Rng, blocks: &[u64], rounds: u64) {
        let volume = self.open();
        for _ in 0..blocks.len() as u64 * rounds {
            let block = blocks[rng.below(blocks.len() as u64) as usize];
            let data = vec![rng.below(255) as u8 + 1; BLOCK];
            let at = block as usize * BLOCK;
            self.bytes[at..at + BLOCK].copy_from_slice(&data);
            let (disk, volume) = (self.disk(), volume.clone());
            let written = self
                .runner
                .block_on(async move { volume.write(&disk, at as u64, &Memory::new(data)).await });
            assert_eq!(written, Ok(BLOCK));
        }
        let disk = self.disk();
        self.runner.block_on(async move { volume.close(&disk).await }).unwrap();
    }

    fn resize(&mut self, geometry: Geometry) -> Result<Resized, VolumeError> {
        let now = self.disk().state().host_blocks;
        self.disk().state().host_blocks = now.max(geometry.host_blocks);
        let resized =
            self.runner.block_on(resize(self.disk(), OpenOptions::default(), geometry))?;
        self.disk().state().host_blocks = geometry.host_blocks;
        self.bytes.resize(resized.size as usize, 0);
        Ok(resized)
    }

    /// Everything reads as it should, and the space map names what the tree reaches.
    fn check(&mut self) {
        let volume = self.open();
        let bytes = self.runner.block_on(read_all(self.disk(), volume.clone())).unwrap();
        assert!(bytes == self.bytes, "the content changed");
        let (disk, closing) = (self.disk(), volume.clone());
        self.runner.block_on(async move { closing.close(&disk).await }).unwrap();
        self.runner.block_on(audit::audit(self.disk(), volume)).unwrap();
    }
}

#[test]
fn a_volume_keeps_its_content_through_any_row_of_sizes() {
    for seed in 0..3 {
        let mut rng = Rng(seed);
        let mut sut = Sut::new(seed, 2_000);
        let mut moved = 0;
        let all: Vec<u64> = (0..100).collect();
        sut.scatter(&mut rng, &all, 3);
        for step in 0..5 {
            // One, two or three levels of map, one region or two.
            let sizes = [100, 128, 129, 300, 2_000, 40_000];
            let capacity = if step == 0 { 100 } else { sizes[rng.below(6) as usize] };
            let resized = sut.resize(sized(capacity)).unwrap();
            assert_eq!(resized.capacity, capacity * BLOCK as u64);
            assert_eq!(resized.size, resized.capacity, "a file that filled the volume fills it");
            moved += resized.moved;
            sut.check();
            sut.scatter(&mut rng, &all, 1);
            sut.check();
        }
        assert!(moved > 0, "no block was ever in the way");
    }
}

#[test]
fn a_file_that_does_not_fill_the_volume_keeps_its_size() {
    let mut sut = Sut::new(1, 130);
    let (disk, volume) = (sut.disk(), sut.open());
    sut.runner
        .block_on(async move {
            volume.truncate(&disk, 5000).await?;
            volume.close(&disk).await
        })
        .unwrap();
    sut.bytes.truncate(5000);
    assert_eq!(sut.resize(sized(400)).unwrap().size, 5000);
    sut.check();
    assert_eq!(sut.resize(sized(2)).unwrap().size, 5000);
    sut.check();
    let at = VolumeError::DataInTheWay { offset: 4096 };
    // Two blocks, the second with 904 bytes that were never written: a hole is not in the way.
    let mut rng = Rng(1);
    sut.bytes.resize(2 * BLOCK, 0);
    sut.scatter(&mut rng, &[1], 1);
    assert_eq!(sut.resize(sized(1)).err(), Some(at));
    sut.check();
}

#[test]
fn data_beyond_the_new_size_refuses_the_shrink_and_nothing_changes() {
    let mut rng = Rng(5);
    let mut sut = Sut::new(5, 300);
    sut.scatter(&mut rng, &[7, 211], 3);
    let refused = sut.resize(sized(211)).err();
    assert_eq!(refused, Some(VolumeError::DataInTheWay { offset: 211 * BLOCK as u64 }));
    sut.check();
    sut.resize(sized(212)).unwrap();
    sut.check();
}

#[test]
fn a_host_file_too_short_to_grow_in_is_refused() {
    let mut sut = Sut::new(5, 130);
    let geometry = sized(300);
    let found = sut.disk().state().host_blocks;
    let refused = sut.runner.block_on(resize(sut.disk(), OpenOptions::default(), geometry)).err();
    let needed = geometry.host_blocks;
    assert_eq!(refused, Some(VolumeError::HostFileShort { needed, found }));
    sut.check();
}

/// What a resize leaves that is cut off, one after each so many steps, and the end.
pub(super) fn cut_off_images(from: u64, to: u64, every: usize) -> Vec<Image> {
    let mut made = Sut::new(5, from);
    made.scatter(&mut Rng(5), &(0..from.min(to).min(100)).collect::<Vec<_>>(), 2);
    let image = made.disk().image();
    let mut images = Vec::new();
    for steps in (0..).step_by(every) {
        nonces::reset();
        let host_blocks = sized(from).host_blocks.max(sized(to).host_blocks);
        let mut runner = Runner::new(SimDisk::new(5 ^ steps, host_blocks, image.clone()));
        let task = resize(runner.disk.clone(), OpenOptions::default(), sized(to));
        let done = runner.finish(task, steps).is_some();
        runner.kill();
        runner.disk.power_cut();
        images.push(runner.disk.image());
        if done {
            break;
        }
    }
    images
}

/// Crashes once after each number of steps, until the resize is done before the crash comes.
fn crash_everywhere(from: u64, to: u64, seed: u64) {
    let blocks: Vec<u64> = (0..from.min(to).min(100)).collect();
    let mut made = Sut::new(seed, from);
    made.scatter(&mut Rng(seed), &blocks, 2);
    let (image, bytes) = (made.disk().image(), made.bytes);
    let (mut steps, mut seen) = (0, Vec::new());
    loop {
        nonces::reset();
        let host_blocks = sized(from).host_blocks.max(sized(to).host_blocks);
        let disk = SimDisk::new(seed ^ steps, host_blocks, image.clone());
        let mut sut = Sut { runner: Runner::new(disk), bytes: bytes.clone() };
        let done = sut.runner.finish(resize(sut.disk(), OpenOptions::default(), sized(to)), steps);
        sut.runner.kill();
        if steps % 2 == 0 {
            sut.runner.disk.power_cut();
        } else {
            sut.runner.disk.guest_kill();
        }
        let capacity = sut.open().capacity() / BLOCK as u64;
        assert!(capacity == from || capacity == to, "capacity {capacity} after {steps} steps");
        assert!(done.is_none() || capacity == to, "done, and undone by the crash");
        // The size of the file may have followed already, or not.
        let size = sut.open().size() as usize;
        assert!(size == from as usize * BLOCK || size == to as usize * BLOCK);
        sut.bytes.resize(size, 0);
        sut.check();
        seen.push(capacity);
        // And again to the end, from whatever is there.
        sut.resize(sized(to)).unwrap();
        sut.check();
        if done.is_some() {
            break;
        }
        steps += 1;
    }
    assert!(seen.contains(&from) && seen.contains(&to), "{}", format!("{seen:?}"));
}

#[test]
fn a_crash_while_growing_shows_the_old_size_or_the_new_one() {
    crash_everywhere(120, 300, 3);
}

#[test]
fn a_crash_while_shrinking_shows_the_old_size_or_the_new_one() {
    crash_everywhere(300, 101, 4);
}
