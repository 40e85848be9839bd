//! A simulated host file: every answer comes when and in the order the simulation decides.
//!
//! What completed is visible; what was flushed after it completed is durable; of the rest a power
//! cut keeps any subset of 512-byte sectors.

use alloc::{boxed::Box, collections::BTreeMap, sync::Arc, vec::Vec};
use core::{
    future::poll_fn,
    task::{Poll, Waker},
};
use std::sync::{Mutex, PoisonError};

use super::{Canary, canary};
use crate::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    platform::{NoEntropy, Platform},
    volume::layout::SUPERBLOCKS,
};

const SECTOR: usize = 512;
const BUFFERS: usize = 24;

/// A small deterministic generator (SplitMix64).
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(super) fn chance(&mut self, percent: f64) -> bool {
        (self.next() >> 11) as f64 / ((1_u64 << 53) as f64) < percent / 100.0
    }
}

/// Content by place; what is missing is zeros.
pub(super) type Image = BTreeMap<u64, Arc<Block>>;

struct Cached {
    id: u64,
    place: u64,
    blocks: Vec<Arc<Block>>,
    /// Completion number; `None` while in flight.
    completed: Option<u64>,
    /// Asked for by a guest that is dead.
    late: bool,
}

enum Kind {
    Read { place: u64, count: usize },
    Write { cached: u64 },
    Flush { covers: Vec<u64> },
}

struct Op {
    id: u64,
    kind: Kind,
    waker: Option<Waker>,
}

type Answer = Result<Vec<Arc<Block>>, HostError>;

/// How often the host fails, in percent.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) write: f64,
    pub(super) read: f64,
    pub(super) flush: f64,
}

pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) faults: Faults,
    /// Percent of completions that go to the newest request, so that old ones wait long.
    pub(super) newest: f64,
    pub(super) now: u64,
    pub(super) host_blocks: u64,
    durable: Image,
    view: Image,
    cached: Vec<Cached>,
    ops: Vec<Op>,
    answers: BTreeMap<u64, Answer>,
    next: u64,
    buffers: usize,
    waiting: Vec<Waker>,
    /// The process has heard of a failed flush.
    flush_failed: bool,
    /// Host calls since the counters were taken.
    pub(super) written: u64,
    pub(super) flushed: u64,
    pub(super) requests: u64,
    /// Blocks discarded.
    pub(super) discarded: u64,
}

#[derive(Clone)]
pub(super) struct SimDisk(pub(super) Arc<Mutex<State>>);

impl SimDisk {
    pub(super) fn new(seed: u64, host_blocks: u64, image: Image) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: Rng(seed),
            faults: Faults::default(),
            newest: 0.0,
            now: 1,
            host_blocks,
            durable: image.clone(),
            view: image,
            cached: Vec::new(),
            ops: Vec::new(),
            answers: BTreeMap::new(),
            next: 1,
            buffers: BUFFERS,
            waiting: Vec::new(),
            flush_failed: false,
            written: 0,
            flushed: 0,
            requests: 0,
            discarded: 0,
        })))
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A rule that was seen broken is told once, and not again by every destructor.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes one pending operation at random. `false`: there is none.
    pub(super) fn complete_one(&self) -> bool {
        let waker = {
            let mut state = self.state();
            if state.ops.is_empty() {
                return false;
            }
            let n = state.ops.len();
            let newest = state.newest;
            let at =
                if state.rng.chance(newest) { n - 1 } else { state.rng.below(n as u64) as usize };
            let op = state.ops.remove(at);
            state.complete(op)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// The image as it is for readers now.
    pub(super) fn image(&self) -> Image {
        self.state().view.clone()
    }

    /// The power goes: of what was not flushed any part may be there.
    pub(super) fn power_cut(&self) {
        let mut state = self.state();
        state.forget_requests();
        let mut cached = core::mem::take(&mut state.cached);
        while !cached.is_empty() {
            let n = cached.len() as u64;
            let write = cached.swap_remove(state.rng.below(n) as usize);
            let fate = state.rng.below(10);
            if fate < 3 {
                continue;
            }
            for (i, block) in write.blocks.iter().enumerate() {
                let place = write.place + i as u64;
                let mut now = state.durable.get(&place).map_or([0; BLOCK], |b| **b);
                for sector in 0..BLOCK / SECTOR {
                    if fate < 7 || state.rng.below(2) == 0 {
                        let part = sector * SECTOR..(sector + 1) * SECTOR;
                        now[part.clone()].copy_from_slice(&block[part]);
                    }
                }
                state.durable.insert(place, Arc::new(now));
            }
        }
        state.view = state.durable.clone();
    }

    /// The guest dies: the host goes on, what was in flight is drained (landed or not).
    pub(super) fn guest_kill(&self) {
        let mut state = self.state();
        let flying: Vec<u64> =
            state.cached.iter().filter(|w| w.completed.is_none()).map(|w| w.id).collect();
        let drains = canary() != Canary::LateWrites;
        for id in flying.into_iter().filter(|_| drains) {
            if state.rng.below(2) == 0 {
                state.land(id);
            } else {
                state.cached.retain(|w| w.id != id);
            }
        }
        // What a failed flush has dropped was in a cache only; the next opening sees the medium.
        state.view = state.durable.clone();
        let mut cached: Vec<_> =
            state.cached.iter().map(|w| (w.completed, w.place, w.blocks.clone())).collect();
        cached.retain(|(completed, ..)| completed.is_some());
        cached.sort_by_key(|(completed, ..)| *completed);
        for (_, place, blocks) in cached {
            for (i, block) in (0..).zip(blocks) {
                state.view.insert(place + i, block);
            }
        }
        state.forget_requests();
        state.keep_late_writes();
    }

    async fn answer(&self, id: u64) -> Answer {
        poll_fn(|cx| {
            let mut state = self.state();
            if let Some(answer) = state.answers.remove(&id) {
                return Poll::Ready(answer);
            }
            if let Some(op) = state.ops.iter_mut().find(|op| op.id == id) {
                op.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}

impl State {
    fn forget_requests(&mut self) {
        self.ops.clear();
        self.answers.clear();
        self.waiting.clear();
        self.flush_failed = false;
        self.buffers = BUFFERS;
    }

    /// What is in flight still comes, with nobody to tell (none, if the host waits for it).
    fn keep_late_writes(&mut self) {
        for write in self.cached.iter_mut().filter(|w| w.completed.is_none()) {
            write.late = true;
            let kind = Kind::Write { cached: write.id };
            self.ops.push(Op { id: write.id, kind, waker: None });
        }
    }

    fn land(&mut self, id: u64) {
        self.next += 1;
        let number = self.next;
        if let Some(write) = self.cached.iter_mut().find(|w| w.id == id) {
            write.completed = Some(number);
            for (i, block) in write.blocks.iter().enumerate() {
                self.view.insert(write.place + i as u64, block.clone());
            }
        }
    }

    fn issue(&mut self, kind: impl FnOnce(u64) -> Kind) -> u64 {
        self.next += 1;
        self.requests += 1;
        let id = self.next;
        self.ops.push(Op { id, kind: kind(id), waker: None });
        id
    }

    /// Issues a write.
    fn put(&mut self, place: u64, blocks: Vec<Arc<Block>>) -> u64 {
        let end = place + blocks.len() as u64;
        assert!(end <= self.host_blocks, "write beyond the host file");
        let twice = self.cached.iter().any(|w| {
            let flying = w.completed.is_none() && !w.late;
            flying && w.place < end && place < w.place + w.blocks.len() as u64
        });
        assert!(!twice, "two outstanding writes on place {place}");
        let id = self.issue(|id| Kind::Write { cached: id });
        self.cached.push(Cached { id, place, blocks, completed: None, late: false });
        id
    }

    fn complete(&mut self, op: Op) -> Option<Waker> {
        let eio = Err(HostError::Errno(5));
        let answer = match op.kind {
            Kind::Read { place, count } => {
                if self.rng.chance(self.faults.read) {
                    eio
                } else {
                    let zero = Arc::new([0; BLOCK]);
                    Ok((place..place + count as u64)
                        .map(|place| self.view.get(&place).unwrap_or(&zero).clone())
                        .collect())
                }
            }
            Kind::Write { cached } => {
                if self.rng.chance(self.faults.write) {
                    // It may have landed all the same.
                    if self.rng.below(2) == 0 {
                        self.land(cached);
                    } else {
                        self.cached.retain(|w| w.id != cached);
                    }
                    eio
                } else {
                    self.land(cached);
                    Ok(Vec::new())
                }
            }
            Kind::Flush { covers } => {
                let failed = self.rng.chance(self.faults.flush);
                let mut done: Vec<Cached> = Vec::new();
                let mut rest = Vec::new();
                for write in core::mem::take(&mut self.cached) {
                    let covered = covers.contains(&write.id);
                    if covered && (!failed || self.rng.below(2) == 0) {
                        done.push(write);
                    } else if !covered {
                        rest.push(write);
                    }
                    // Else: marked clean by the failed flush, in memory only from now on.
                }
                self.cached = rest;
                done.sort_by_key(|write| write.completed);
                for write in done {
                    for (i, block) in write.blocks.iter().enumerate() {
                        self.durable.insert(write.place + i as u64, block.clone());
                    }
                }
                if failed { eio } else { Ok(Vec::new()) }
            }
        };
        self.answers.insert(op.id, answer);
        op.waker
    }
}

/// The slot that a block goes to, if it is a superblock.
fn superblock_slot(place: u64, block: &Block) -> Option<usize> {
    let slot = SUPERBLOCKS.iter().position(|copies| copies.contains(&place))?;
    (&block[40..48] == b"PSTRNSUP").then_some(slot)
}

impl Platform for SimDisk {
    fn now_ns(&self) -> u64 {
        self.state().now
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut state = self.state();
        out.iter_mut().for_each(|byte| *byte = state.rng.next() as u8);
        Ok(())
    }
}

pub(super) struct SimTransfer {
    disk: SimDisk,
    blocks: Vec<Box<Block>>,
}

impl Drop for SimTransfer {
    fn drop(&mut self) {
        let wakers = {
            let mut state = self.disk.state();
            state.buffers += 1;
            core::mem::take(&mut state.waiting)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Disk for SimDisk {
    type Transfer = SimTransfer;
    const MAX_BLOCKS: usize = 32;

    async fn transfer(&self, blocks: usize) -> Result<SimTransfer, HostError> {
        assert!((1..=Self::MAX_BLOCKS).contains(&blocks), "a transfer of {blocks} blocks");
        poll_fn(|cx| match self.try_transfer(blocks) {
            Some(transfer) => Poll::Ready(Ok(transfer)),
            None => {
                self.state().waiting.push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    fn try_transfer(&self, blocks: usize) -> Option<SimTransfer> {
        let mut state = self.state();
        if state.buffers == 0 {
            return None;
        }
        state.buffers -= 1;
        drop(state);
        let blocks = (0..blocks).map(|_| Box::new([0xaa; BLOCK])).collect();
        Some(SimTransfer { disk: self.clone(), blocks })
    }

    async fn flush(&self) -> Result<(), HostError> {
        let id = {
            let mut state = self.state();
            assert!(!state.flush_failed, "a flush after one that failed proves nothing");
            state.flushed += 1;
            let covers =
                state.cached.iter().filter(|w| w.completed.is_some()).map(|w| w.id).collect();
            state.issue(|_| Kind::Flush { covers })
        };
        let answer = self.answer(id).await;
        self.state().flush_failed |= answer.is_err();
        answer.map(|_| ())
    }

    /// As a write of anything: of the old content a part may stay, too.
    async fn discard(&self, place: u64, blocks: u64) -> Result<(), HostError> {
        let id = {
            let mut state = self.state();
            let anything = (place..place + blocks)
                .map(|at| match state.rng.below(3) {
                    0 => Arc::new([0; BLOCK]),
                    1 => Arc::new([state.rng.next() as u8; BLOCK]),
                    _ => state.view.get(&at).cloned().unwrap_or_else(|| Arc::new([0; BLOCK])),
                })
                .collect();
            state.discarded += blocks;
            state.put(place, anything)
        };
        self.answer(id).await.map(|_| ())
    }

    fn host_blocks(&self) -> u64 {
        self.state().host_blocks
    }
}

impl Transfer for SimTransfer {
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
        let count = self.blocks.len();
        let id = {
            let mut state = self.disk.state();
            assert!(place + count as u64 <= state.host_blocks, "read beyond the host file");
            state.issue(|_| Kind::Read { place, count })
        };
        let blocks = self.disk.answer(id).await?;
        self.blocks.iter_mut().zip(blocks).for_each(|(to, from)| **to = *from);
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let id = {
            let mut state = self.disk.state();
            if let Some(slot) = superblock_slot(place, &self.blocks[0]) {
                let other = |w: &Cached| superblock_slot(w.place, &w.blocks[0]) == Some(1 - slot);
                let torn = state.cached.iter().any(other);
                assert!(!torn, "a superblock while the one in the other slot is not durable");
            }
            state.written += blocks as u64;
            state.put(place, self.blocks[..blocks].iter().map(|b| Arc::new(**b)).collect())
        };
        self.disk.answer(id).await.map(|_| ())
    }
}
