//! A host file in memory, for fuzz targets: it answers at once, and what was written is there.

use alloc::{boxed::Box, collections::BTreeMap, sync::Arc, vec::Vec};
use core::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    platform::{NoEntropy, Platform},
};

/// Content by place; what is missing is zeros.
pub(super) type Image = BTreeMap<u64, Arc<Block>>;

/// Polls without an end after which a task waits for itself: every answer is there at once.
const POLLS: u32 = 1 << 20;

struct State {
    image: Image,
    random: u64,
    now: u64,
}

#[derive(Clone)]
pub(super) struct Host {
    state: Arc<Mutex<State>>,
    blocks: u64,
}

impl Host {
    /// `seed` decides its randomness.
    pub(super) fn new(image: Image, blocks: u64, seed: u64) -> Self {
        Self { state: Arc::new(Mutex::new(State { image, random: seed, now: 1 })), blocks }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn image(&self) -> Image {
        self.state().image.clone()
    }
}

impl Platform for Host {
    fn now_ns(&self) -> u64 {
        let mut state = self.state();
        state.now += 1_000_000;
        state.now
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut state = self.state();
        for byte in out {
            state.random = state.random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = (state.random >> 56) as u8;
        }
        Ok(())
    }
}

pub(super) struct Slots {
    host: Host,
    blocks: Vec<Box<Block>>,
}

impl Disk for Host {
    type Transfer = Slots;
    const MAX_BLOCKS: usize = 32;

    async fn transfer(&self, blocks: usize) -> Result<Slots, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Gone)
    }

    fn try_transfer(&self, blocks: usize) -> Option<Slots> {
        assert!((1..=Self::MAX_BLOCKS).contains(&blocks), "a transfer of {blocks} blocks");
        let blocks = (0..blocks).map(|_| Box::new([0; BLOCK])).collect();
        Some(Slots { host: self.clone(), blocks })
    }

    async fn flush(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn host_blocks(&self) -> u64 {
        self.blocks
    }
}

impl Transfer for Slots {
    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn put(&mut self, index: usize, block: &Block) {
        *self.blocks[index] = *block;
    }

    fn get(&self, index: usize, block: &mut Block) {
        *block = *self.blocks[index];
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        let end = place.checked_add(self.blocks.len() as u64);
        assert!(end.is_some_and(|end| end <= self.host.blocks), "read beyond the host file");
        let state = self.host.state();
        for (place, block) in (place..).zip(&mut self.blocks) {
            **block = state.image.get(&place).map_or([0; BLOCK], |block| **block);
        }
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let end = place.checked_add(blocks as u64);
        assert!(end.is_some_and(|end| end <= self.host.blocks), "write beyond the host file");
        let mut state = self.host.state();
        for (place, block) in (place..).zip(&self.blocks[..blocks]) {
            state.image.insert(place, Arc::new(**block));
        }
        Ok(())
    }
}

/// Runs `future` to its end.
pub(super) fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..POLLS {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
    panic!("a task waits for ever although the host answers at once");
}
