//! A host file in memory, with faults that a test chooses, and a volume on it.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    vec,
    vec::Vec,
};
use std::sync::Mutex;

use super::{crash::key, nonces};
use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    errno::Errno,
    exec::run_to_end,
    platform::{Memory, NoEntropy, Platform},
    volume::{Chore, FormatOptions, OpenOptions, Volume},
};

/// Places and counts of blocks.
pub(super) type Given = Vec<(u64, u64)>;

/// A host file in memory that answers at once.
#[derive(Clone, Default)]
pub(super) struct MemDisk {
    pub(super) blocks: Arc<Mutex<BTreeMap<u64, Block>>>,
    pub(super) calls: Arc<Mutex<(u64, u64, u64)>>,
    /// A place that cannot be read.
    pub(super) bad: Arc<Mutex<Option<u64>>>,
    /// Places that were written, and how many more the host has room for.
    pub(super) warm: Arc<Mutex<(BTreeSet<u64>, u64)>>,
    /// What was given back: place and blocks; or the host cannot.
    pub(super) discards: Arc<Mutex<Option<Given>>>,
    pub(super) size: u64,
    pub(super) seed: Arc<Mutex<u64>>,
}

pub(super) struct MemTransfer(MemDisk, Vec<Block>);

impl Platform for MemDisk {
    fn now_ns(&self) -> u64 {
        1
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        for byte in out {
            let mut seed = self.seed.lock().unwrap();
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            *byte = (*seed >> 33) as u8;
        }
        Ok(())
    }
}

impl Disk for MemDisk {
    type Transfer = MemTransfer;
    const MAX_BLOCKS: usize = 64;

    async fn transfer(&self, blocks: usize) -> Result<MemTransfer, HostError> {
        Ok(MemTransfer(self.clone(), vec![[0; BLOCK]; blocks]))
    }

    fn try_transfer(&self, blocks: usize) -> Option<MemTransfer> {
        Some(MemTransfer(self.clone(), vec![[0; BLOCK]; blocks]))
    }

    async fn flush(&self) -> Result<(), HostError> {
        self.calls.lock().unwrap().2 += 1;
        Ok(())
    }

    async fn discard(&self, place: u64, count: u64) -> Result<(), HostError> {
        let mut discards = self.discards.lock().unwrap();
        discards.as_mut().ok_or(HostError::Errno(95))?.push((place, count));
        let mut blocks = self.blocks.lock().unwrap();
        blocks.extend((place..place + count).map(|at| (at, [0x5a; BLOCK])));
        Ok(())
    }

    fn host_blocks(&self) -> u64 {
        self.size
    }
}

impl Transfer for MemTransfer {
    fn blocks(&self) -> usize {
        self.1.len()
    }

    fn put(&mut self, index: usize, block: &Block) {
        self.1[index] = *block;
    }

    fn get(&self, index: usize, block: &mut Block) {
        *block = self.1[index];
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        self.0.calls.lock().unwrap().0 += 1;
        if self
            .0
            .bad
            .lock()
            .unwrap()
            .is_some_and(|bad| bad.wrapping_sub(place) < self.1.len() as u64)
        {
            return Err(HostError::Errno(5));
        }
        let blocks = self.0.blocks.lock().unwrap();
        for (i, block) in (0..).zip(&mut self.1) {
            *block = blocks.get(&(place + i)).copied().unwrap_or([0; BLOCK]);
        }
        Ok(())
    }

    async fn write(&mut self, place: u64, count: usize) -> Result<(), HostError> {
        self.0.calls.lock().unwrap().1 += count as u64;
        {
            let mut warm = self.0.warm.lock().unwrap();
            let places = place..place + count as u64;
            let cold = places.clone().filter(|place| !warm.0.contains(place)).count() as u64;
            if cold > warm.1 {
                return Err(HostError::Errno(28));
            }
            warm.1 -= cold;
            warm.0.extend(places);
        }
        let mut blocks = self.0.blocks.lock().unwrap();
        for (i, block) in (0..).zip(&self.1[..count]) {
            if *block == [0; BLOCK] {
                blocks.remove(&(place + i));
            } else {
                blocks.insert(place + i, *block);
            }
        }
        Ok(())
    }
}

pub(super) fn made(size: u64) -> MemDisk {
    nonces::reset();
    let warm = Arc::new(Mutex::new((BTreeSet::new(), u64::MAX)));
    let disk = MemDisk { size: Volume::host_blocks(size), warm, ..MemDisk::default() };
    run_to_end(Volume::format(&disk, &key(), &FormatOptions { size })).unwrap();
    disk
}

pub(super) fn reopen(disk: &MemDisk) -> Volume {
    run_to_end(Volume::open(disk, &key(), &OpenOptions::default())).unwrap().0
}

pub(super) fn write(
    disk: &MemDisk,
    volume: &Volume,
    offset: u64,
    bytes: &[u8],
) -> Result<usize, Errno> {
    run_to_end(volume.write(disk, offset, &Memory::new(bytes.to_vec())))
}

pub(super) fn read(
    disk: &MemDisk,
    volume: &Volume,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, Errno> {
    let buffer = Memory::new(vec![0x55; len]);
    let done = run_to_end(volume.read(disk, offset, &buffer))?;
    let mut bytes = buffer.into_inner();
    bytes.truncate(done);
    Ok(bytes)
}

/// A volume whose first `blocks` blocks were overwritten three times in another order each, with
/// the block's number in every byte.
pub(super) fn overwritten(blocks: u64) -> (MemDisk, Volume) {
    let disk = made(1 << 24);
    let volume = reopen(&disk);
    for step in [1, 37, 53, 101] {
        for n in 0..blocks {
            let block = n * step % blocks;
            write(&disk, &volume, block * 4096, &[block as u8; BLOCK]).unwrap();
        }
        // Gives the places of the round before back.
        run_to_end(volume.run_chore(&disk, Chore::Checkpoint)).unwrap();
    }
    (disk, volume)
}
