//! Outside: the host's clock, the CPU's randomness, and user memory that holds sealed blocks.
//!
//! Holds: randomness is the CPU's or none.

use core::arch::x86_64::_rdrand64_step;
use std::{
    os::fortanix_sgx::usercalls::{alloc::User, insecure_time},
    sync::{Arc, Mutex, PoisonError},
};

use postern_trusted::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    errno::Errno,
    platform::{NoEntropy, Platform},
};

use crate::port::Port;

/// A host file of sealed blocks, as user memory: the host reads and writes it as it likes.
#[derive(Clone)]
pub struct Outside(Arc<Mutex<User<[u8]>>>);

impl Outside {
    /// `blocks` blocks of it, as zeros.
    pub fn new(blocks: u64) -> Self {
        // The runtime checks that what the host answers lies outside of the enclave.
        let memory = User::<[u8]>::uninitialized(blocks as usize * BLOCK);
        Self(Arc::new(Mutex::new(memory)))
    }

    /// Whether these bytes occur in a block that the host sees.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        let memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be larger than the enclave.
        let mut block = [0; BLOCK];
        (0..memory.len() / BLOCK).any(|place| {
            memory[place * BLOCK..(place + 1) * BLOCK].copy_to_enclave(&mut block[..]);
            // The first byte alone decides nearly always: a call for each place would take minutes.
            block.windows(bytes.len()).any(|window| window[0] == bytes[0] && window == bytes)
        })
    }

    /// Does to the block at `place` what a hostile host might: changes one bit of it.
    pub fn flip_a_bit(&self, place: u64) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = place as usize * BLOCK;
        let mut bytes = [0; 8];
        memory[at..at + 8].copy_to_enclave(&mut bytes[..]);
        bytes[3] ^= 1;
        memory[at..at + 8].copy_from_enclave(&bytes);
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        (self.0.lock().unwrap_or_else(PoisonError::into_inner).len() / BLOCK) as u64
    }
}

impl Platform for Outside {
    fn now_ns(&self) -> u64 {
        u64::try_from(insecure_time().as_nanos()).unwrap_or(u64::MAX)
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        random(out)
    }
}

/// Fills `out` with the CPU's randomness.
fn random(out: &mut [u8]) -> Result<(), NoEntropy> {
    /// How often the CPU is asked again when it has no number ready.
    const TRIES: usize = 32;
    for chunk in out.chunks_mut(8) {
        let mut word = 0;
        // SAFETY: every CPU with SGX has RDRAND.
        let drawn = (0..TRIES).any(|_| unsafe { _rdrand64_step(&mut word) } == 1);
        if !drawn {
            return Err(NoEntropy);
        }
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    Ok(())
}

/// The platform of a program with a port: the clock beside it, and the CPU's randomness.
pub struct Cpu(pub Arc<Port>);

impl Platform for Cpu {
    fn now_ns(&self) -> u64 {
        self.0.now_ns()
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        random(out)
    }
}

impl Disk for Outside {
    type Transfer = Blocks;

    const MAX_BLOCKS: usize = 64;

    async fn transfer(&self, blocks: usize) -> Result<Blocks, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Gone)
    }

    fn try_transfer(&self, blocks: usize) -> Option<Blocks> {
        Some(Blocks { outside: self.clone(), blocks: vec![[0; BLOCK]; blocks] })
    }

    async fn flush(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn host_blocks(&self) -> u64 {
        self.blocks()
    }
}

/// Sealed blocks on their way.
pub struct Blocks {
    outside: Outside,
    blocks: Vec<Block>,
}

impl Blocks {
    fn range(&self, place: u64, blocks: usize) -> Result<core::ops::Range<usize>, HostError> {
        let all = self.outside.blocks();
        let end = place.checked_add(blocks as u64).filter(|end| *end <= all);
        let end = end.ok_or(HostError::Errno(Errno::EIO.0))?;
        Ok(place as usize * BLOCK..end as usize * BLOCK)
    }
}

impl Transfer for Blocks {
    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn put(&mut self, index: usize, block: &Block) {
        self.blocks[index] = *block;
    }

    fn get(&self, index: usize, block: &mut Block) {
        *block = self.blocks[index];
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        let range = self.range(place, self.blocks.len())?;
        let memory = self.outside.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory[range].copy_to_enclave(self.blocks.as_flattened_mut());
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let range = self.range(place, blocks)?;
        let mut memory = self.outside.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory[range].copy_from_enclave(self.blocks[..blocks].as_flattened());
        Ok(())
    }
}
