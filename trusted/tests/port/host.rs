//! A daemon made of a vector: takes descriptors, keeps blocks, answers when told to.
#![allow(dead_code, reason = "the bench example uses a part of it")]

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use postern_edl::port::{Completion, Geometry, SQE_WORDS, Submission, cursor, op};
use postern_trusted::{
    exec::Executor,
    platform::{NoEntropy, Platform},
    port::{Doorbell, Lane, LaneFile, SharedWords, Sleeper, Switchless},
};

/// Words of a block.
pub const BLOCK_WORDS: usize = 512;

/// No clock and no randomness: the port needs neither.
pub struct NoPlatform;

impl Platform for NoPlatform {
    fn now_ns(&self) -> u64 {
        4711
    }

    fn random(&self, _: &mut [u8]) -> Result<(), NoEntropy> {
        Err(NoEntropy)
    }
}

/// A sleep as the platform is asked for it: the port's address, who sleeps, how long at most.
pub type Slept = (u64, Sleeper, u64);

/// Counts rings and keeps sleeps, which end at once; its clock ticks by one with each look.
#[derive(Clone, Default)]
pub struct CountingBell {
    rings: Arc<AtomicUsize>,
    rung: Arc<AtomicU64>,
    slept: Arc<Mutex<Vec<Slept>>>,
    ticks: Arc<AtomicU64>,
}

impl CountingBell {
    pub fn rings(&self) -> usize {
        self.rings.load(Ordering::Relaxed)
    }

    /// The port that was named in the last ring.
    pub fn rung(&self) -> u64 {
        self.rung.load(Ordering::Relaxed)
    }

    pub fn slept(&self) -> Vec<Slept> {
        self.slept.lock().unwrap().clone()
    }

    pub fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }
}

impl Switchless for CountingBell {
    fn postern_wake(&self, port: u64) -> Result<(), u32> {
        self.rung.store(port, Ordering::Relaxed);
        self.rings.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn postern_sleep(&self, port: u64, sleeper: Sleeper, limit_ns: u64) -> Result<(), u32> {
        self.slept.lock().unwrap().push((port, sleeper, limit_ns));
        Err(4)
    }
}

impl Doorbell for CountingBell {
    fn now_ns(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// The host's side of a region.
pub struct Host {
    pub region: &'static [AtomicU64],
    pub geometry: Geometry,
    pub taken: u64,
    pub answered: u64,
    /// The host file by block number; what is missing reads as zeros.
    pub blocks: BTreeMap<u64, Vec<u64>>,
}

impl Host {
    /// A region with a lane on it.
    pub fn with_lane(
        entries: usize,
        data_bytes: usize,
        bell: impl Doorbell + 'static,
    ) -> (Self, Lane) {
        let geometry = Geometry::new(entries, data_bytes).unwrap();
        let region: &'static [AtomicU64] = Box::leak(
            // Not zero: the lane must not rely on fresh memory.
            (0..geometry.region_bytes() / 8).map(|_| AtomicU64::new(0x5a5a)).collect(),
        );
        let base = region.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: 1. The region is leaked: mapped for ever. 2. Only 8-byte atomics refer to it.
        let words = unsafe { SharedWords::new(base, region.len() * 8, |_, _| true) }.unwrap();
        let lane = Lane::new(words, geometry, bell).unwrap();
        (Self { region, geometry, taken: 0, answered: 0, blocks: BTreeMap::new() }, lane)
    }

    pub fn get(&self, word: usize) -> u64 {
        self.region[word].load(Ordering::Acquire)
    }

    pub fn set(&self, word: usize, value: u64) {
        self.region[word].store(value, Ordering::Release);
    }

    /// The descriptors published since the last call.
    pub fn take(&mut self) -> Vec<Submission> {
        let published = self.get(cursor::SQ_PUBLISHED);
        assert!(published - self.taken <= self.geometry.entries as u64);
        let taken = (self.taken..published)
            .map(|n| {
                let at = self.geometry.sqe_word(n);
                let mut words = [0; SQE_WORDS];
                words.iter_mut().enumerate().for_each(|(i, w)| *w = self.get(at + i));
                Submission::from_words(words)
            })
            .collect();
        self.taken = published;
        self.set(cursor::SQ_TAKEN, published);
        taken
    }

    /// Publishes one completion.
    pub fn answer(&mut self, id: u64, result: i64) {
        let words = Completion { id, result, reaped_ns: 1, published_ns: 2 }.to_words();
        let at = self.geometry.cqe_word(self.answered);
        for (i, word) in words.into_iter().enumerate() {
            self.set(at + i, word);
        }
        self.answered = self.answered.wrapping_add(1);
        self.set(cursor::CQ_PUBLISHED, self.answered);
    }

    /// Moves the first `bytes` bytes of what is asked; returns `bytes` as a result.
    pub fn perform(&mut self, asked: &Submission, bytes: u64) -> i64 {
        let data = usize::try_from(asked.data).unwrap() / 8;
        for (n, first) in (0..bytes).step_by(4096).enumerate() {
            let words = usize::try_from((bytes - first).min(4096) / 8).unwrap();
            let shared = &self.region[data + n * BLOCK_WORDS..][..words];
            let block = self.blocks.entry(asked.offset / 4096 + n as u64);
            if u64::from(asked.op) == op::WRITE {
                let kept = block.or_insert_with(|| vec![0; BLOCK_WORDS]);
                kept.iter_mut().zip(shared).for_each(|(to, w)| *to = w.load(Ordering::Relaxed));
            } else {
                let zeros = vec![0; BLOCK_WORDS];
                let kept = match block {
                    Entry::Occupied(ref entry) => entry.get(),
                    Entry::Vacant(_) => &zeros,
                };
                shared.iter().zip(kept).for_each(|(w, &from)| w.store(from, Ordering::Relaxed));
            }
        }
        i64::try_from(bytes).unwrap()
    }

    /// Does and answers all that is published, in order. Returns how many.
    pub fn serve(&mut self) -> usize {
        let asked = self.take();
        for submission in &asked {
            let result = self.perform(submission, submission.length);
            self.answer(submission.id, result);
        }
        asked.len()
    }
}

/// A disk on the lane: handle 7, a million blocks.
pub fn file(lane: &Lane) -> LaneFile {
    lane.file(7, 1_000_000, Arc::new(NoPlatform))
}

/// An executor that nobody needs to be woken for.
pub fn executor() -> Executor {
    Executor::new(|| ())
}

/// Runs tasks and an honest host until nothing moves.
pub fn settle(executor: &Executor, lane: &Lane, host: &mut Host) {
    loop {
        let polls = executor.run(usize::MAX);
        let served = host.serve();
        let taken = lane.poll(usize::MAX);
        if polls + served + taken == 0 {
            return;
        }
    }
}

/// A block that differs from others in all its words.
pub fn pattern(seed: u64) -> [u8; 4096] {
    let mut block = [0; 4096];
    for (n, bytes) in block.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(
            &(seed << 20 | n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes(),
        );
    }
    block
}
