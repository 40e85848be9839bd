//! Files of a protected directory: what the index records of them, in place of a counter.
//!
//! The simulated index keeps a record in memory, is written when the simulation decides, and falls
//! back to what was durable when it crashes.

use alloc::{boxed::Box, sync::Arc, vec, vec::Vec};
use core::{
    future::{self, poll_fn},
    task::{Poll, Waker},
};
use std::sync::Mutex;

use super::{
    crash::{formatted, key, open, tiny},
    disk::{Image, Rng, SimDisk},
    memory::{MemDisk, read, write},
    nonces,
    run::Runner,
};
use crate::{
    counter::{Answer, Counter, CounterError, Lasting, Moves, Record, Swapped},
    disk::BLOCK,
    exec::run_to_end,
    platform::Memory,
    volume::{Chore, CounterUse, OpenOptions, Volume, VolumeError, layout::SUPERBLOCKS},
};

#[derive(Default)]
struct State {
    durable: Option<Record>,
    newest: Option<Record>,
    /// What the image that is being written has.
    flying: Option<Option<Record>>,
    /// What an image has of which nobody knows whether it was written.
    doubtful: Option<Option<Record>>,
    landings: u64,
    /// Each sync is recorded.
    syncs: bool,
    waiters: Vec<Waker>,
}

/// The index, as one file sees it.
#[derive(Clone, Default)]
pub(super) struct SimIndex(Arc<Mutex<State>>);

impl SimIndex {
    /// One that records each sync.
    pub(super) fn of_syncs() -> Self {
        Self(Arc::new(Mutex::new(State { syncs: true, ..State::default() })))
    }

    /// Whether each sync is recorded.
    pub(super) fn counts_syncs(&self) -> bool {
        self.0.lock().unwrap().syncs
    }

    /// Begins to write the table, or ends it.
    pub(super) fn step(&self) {
        let wakers = {
            let mut state = self.0.lock().unwrap();
            match state.flying.take() {
                None => state.flying = Some(state.newest),
                Some(written) => {
                    state.landings += 1;
                    // At times it fails, and may be there all the same.
                    state.doubtful = state.landings.is_multiple_of(5).then_some(written);
                    if state.doubtful.is_none() {
                        state.durable = written;
                    }
                }
            }
            core::mem::take(&mut state.waiters)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends the writing of the table for whoever waits for it. `false`: nobody does.
    pub(super) fn land(&self) -> bool {
        let waited = !self.0.lock().unwrap().waiters.is_empty();
        if waited {
            self.step();
        }
        waited
    }

    /// Writes the table down.
    pub(super) fn settle(&self) {
        while self.pair() != [self.newest(); 2] {
            self.step();
        }
    }

    /// The enclave dies: what was being written is there or not.
    pub(super) fn crash(&self, rng: &mut Rng) {
        let mut state = self.0.lock().unwrap();
        let doubtful = state.doubtful.take();
        if let Some(written) = state.flying.take().or(doubtful)
            && rng.chance(50.0)
        {
            state.durable = written;
        }
        state.newest = state.durable;
        state.waiters.clear();
    }

    pub(super) fn newest(&self) -> Option<Record> {
        self.0.lock().unwrap().newest
    }

    /// The two that a superblock names.
    pub(super) fn pair(&self) -> [Option<Record>; 2] {
        let state = self.0.lock().unwrap();
        [state.durable, state.newest]
    }

    pub(super) fn used(&self) -> CounterUse {
        let moves = if self.counts_syncs() { Moves::Sync } else { Moves::Checkpoint };
        CounterUse { counter: Arc::new(self.clone()), moves, adopt: false }
    }

    pub(super) fn options(&self) -> OpenOptions {
        OpenOptions { counter: Some(self.used()), ..OpenOptions::default() }
    }
}

impl Counter for SimIndex {
    fn load(&self) -> Answer<'_, Option<Record>> {
        Box::pin(future::ready(Ok(self.newest())))
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        Box::pin(poll_fn(move |cx| {
            let mut state = self.0.lock().unwrap();
            if state.flying.is_some() {
                state.waiters.push(cx.waker().clone());
                return Poll::Pending;
            }
            assert_eq!(state.newest, old, "one file has one writer");
            if state.doubtful.is_some() {
                return Poll::Ready(Err(CounterError::Unreachable));
            }
            state.newest = Some(new);
            Poll::Ready(Ok(Swapped::Done))
        }))
    }

    fn lasting(&self) -> Option<Lasting> {
        let [durable, newest] = self.pair();
        Some(Lasting { durable, newest })
    }
}

/// A file and its index.
struct World {
    index: SimIndex,
    seed: u64,
}

impl World {
    fn new() -> (Self, Image) {
        nonces::reset();
        (Self { index: SimIndex::default(), seed: 500 }, formatted(500, tiny()))
    }

    fn runner(&mut self, image: &Image) -> Runner {
        self.runner_of(image, tiny().host_blocks)
    }

    fn runner_of(&mut self, image: &Image, host_blocks: u64) -> Runner {
        self.seed += 1;
        let mut runner = Runner::new(SimDisk::new(self.seed, host_blocks, image.clone()));
        runner.index = Some(self.index.clone());
        runner
    }

    /// Writes `byte` to a block, syncs, makes a checkpoint at times, closes at times; what the
    /// host has then.
    fn session(&mut self, image: &Image, byte: u8, checkpoint: bool, close: bool) -> Image {
        let mut runner = self.runner(image);
        let (disk, options) = (runner.disk.clone(), self.index.options());
        let counts_syncs = self.index.counts_syncs();
        runner.block_on(async move {
            let (volume, _) = open(disk.clone(), options).await.expect("the newest state opens");
            let bytes = Memory::new(vec![byte; BLOCK]);
            volume.write(&disk, 3 * 4096, &bytes).await.unwrap();
            // Refused after a table of which nobody knows whether it was written.
            let synced = volume.sync(&disk).await;
            assert!(synced.is_ok() || counts_syncs, "{synced:?}");
            if checkpoint {
                volume.run_chore(&disk, Chore::Checkpoint).await.unwrap();
                // Refused then, too.
                let _ = volume.run_chore(&disk, Chore::Register).await;
            }
            if close {
                volume.close(&disk).await.unwrap();
            }
        });
        runner.disk.image()
    }

    fn read(&mut self, image: &Image) -> Result<u8, VolumeError> {
        self.read_of(image, tiny().host_blocks)
    }

    /// Whether the file is said to have been put away must make no difference, true or not.
    fn read_of(&mut self, image: &Image, host_blocks: u64) -> Result<u8, VolumeError> {
        let read = self.read_as(image, host_blocks, false);
        assert_eq!(self.read_as(image, host_blocks, true), read);
        read
    }

    fn read_as(
        &mut self,
        image: &Image,
        host_blocks: u64,
        put_away: bool,
    ) -> Result<u8, VolumeError> {
        let mut runner = self.runner_of(image, host_blocks);
        let options = OpenOptions { put_away, ..self.index.options() };
        let disk = runner.disk.clone();
        let opened = runner.block_on(async move {
            let (volume, _): (Arc<Volume>, _) = open(disk.clone(), options).await?;
            let buffer = Memory::new(vec![0xee; BLOCK]);
            volume.read(&disk, 3 * 4096, &buffer).await.unwrap();
            Ok(buffer.into_inner()[0])
        });
        if opened.is_err() {
            assert!(runner.disk.image() == *image, "a refused open has written");
        }
        opened
    }
}

fn is_refused(opened: &Result<u8, VolumeError>) -> bool {
    matches!(opened, Err(VolumeError::NotAsRecorded { .. }))
}

#[test]
fn an_older_state_of_one_file_is_refused_once_the_index_has_a_newer_record() {
    let (mut world, fresh) = World::new();
    let mut states = vec![fresh];
    for byte in 1..=4 {
        states.push(world.session(&states[states.len() - 1], byte, byte % 2 == 0, true));
        world.index.settle();
        for (n, old) in states[..states.len() - 1].iter().enumerate() {
            assert!(is_refused(&world.read(old)), "state {n} after session {byte}");
        }
        assert_eq!(world.read(&states[states.len() - 1]), Ok(byte));
    }
}

#[test]
fn a_state_of_before_a_recorded_checkpoint_is_refused_although_the_file_was_never_closed() {
    let (mut world, fresh) = World::new();
    let open = world.session(&fresh, 1, false, false);
    let later = world.session(&open, 2, true, false);
    world.index.settle();
    assert!(is_refused(&world.read(&fresh)));
    assert!(is_refused(&world.read(&open)));
    assert_eq!(world.read(&later), Ok(2));
}

/// Each session ends with a record that is lost with the enclave's memory, or is just being
/// written; the file opens again whichever of them is found.
#[test]
fn a_file_that_is_newer_than_its_record_opens_however_often_the_record_was_lost() {
    for seed in 0..64 {
        let (mut world, mut image) = World::new();
        if seed % 2 == 1 {
            world.index = SimIndex::of_syncs();
        }
        let mut rng = Rng(seed);
        for byte in 1..=6 {
            let (checkpoint, close) = (rng.below(2) == 0, rng.below(3) > 0);
            image = world.session(&image, byte, checkpoint, close);
            for _ in 0..rng.below(4) {
                world.index.step();
            }
            if rng.below(2) == 0 {
                world.index.crash(&mut rng);
            }
            assert_eq!(world.read(&image), Ok(byte), "seed {seed}");
        }
    }
}

/// Two lines of one file from one state: once one is recorded the other is no newer state.
#[test]
fn a_line_that_was_given_up_is_refused_although_its_numbers_are_higher() {
    let (mut world, fresh) = World::new();
    let start = world.session(&fresh, 1, false, true);
    world.index.settle();
    let mut given_up = start.clone();
    for byte in 10..14 {
        given_up = world.session(&given_up, byte, true, false);
        world.index.crash(&mut Rng(1));
    }
    let taken = world.session(&start, 2, false, true);
    world.index.settle();
    assert!(is_refused(&world.read(&given_up)));
    assert_eq!(world.read(&taken), Ok(2));
}

#[test]
fn a_file_that_has_no_record_yet_opens_and_one_that_lost_its_record_does_not() {
    let (mut world, fresh) = World::new();
    let unrecorded = world.session(&fresh, 1, false, false);
    assert_eq!(world.read(&unrecorded), Ok(1));
    let closed = world.session(&unrecorded, 2, false, true);
    world.index.settle();
    // A later session knows the record: an index without it is an older one.
    let later = world.session(&closed, 3, false, false);
    world.index = SimIndex::default();
    assert!(is_refused(&world.read(&later)));
}

/// One session, from the making of the file on, and what the host has after each sync whose record
/// is durable.
#[test]
fn where_each_sync_is_recorded_no_older_state_opens_although_the_file_was_never_closed() {
    for seed in 0..16 {
        nonces::reset();
        let mut world = World { index: SimIndex::of_syncs(), seed: 900 + seed };
        let blocks = Volume::small_host_blocks(1 << 20);
        let mut runner = Runner::new(SimDisk::new(seed, blocks, Image::new()));
        runner.index = Some(world.index.clone());
        let (disk, used) = (runner.disk.clone(), world.index.used());
        let made = runner
            .block_on(async move { Volume::make_open(&disk, &key(), 1 << 20, Some(&used)).await });
        let volume = Arc::new(made.unwrap());
        let mut states = vec![runner.disk.image()];
        for byte in 1..=6 {
            let (disk, volume, index) = (runner.disk.clone(), volume.clone(), world.index.clone());
            runner.block_on(async move {
                let bytes = Memory::new(vec![byte; BLOCK]);
                volume.write(&disk, 3 * 4096, &bytes).await.unwrap();
                if byte == 4 {
                    volume.run_chore(&disk, Chore::Checkpoint).await.unwrap();
                }
                while volume.sync(&disk).await.is_err() {
                    // The table was perhaps not written: once more.
                    index.step();
                }
            });
            world.index.settle();
            for (n, old) in states.iter().enumerate() {
                let opened = world.read_of(old, blocks);
                assert!(
                    is_refused(&opened),
                    "seed {seed}: state {n} after sync {byte}: {opened:?}"
                );
            }
            states.push(runner.disk.image());
            assert_eq!(world.read_of(&states[states.len() - 1], blocks), Ok(byte), "seed {seed}");
        }
    }
}

/// The front is two reads, a journal of 2 MiB sixteen.
#[test]
fn only_a_file_that_was_put_away_and_is_as_recorded_opens_without_its_whole_journal() {
    const CAPACITY: u64 = 64 << 20;
    nonces::reset();
    let disk = MemDisk { size: Volume::small_host_blocks(CAPACITY), ..MemDisk::default() };
    disk.warm.lock().unwrap().1 = u64::MAX;
    let index = SimIndex::default();
    let reads = |put_away| {
        let before = disk.calls.lock().unwrap().0;
        let options = OpenOptions { put_away, read_only: true, ..index.options() };
        let (volume, report) = run_to_end(Volume::open(&disk, &key(), &options)).unwrap();
        assert!(report.loss.is_none(), "{report:?}");
        let opening = disk.calls.lock().unwrap().0 - before;
        (opening, read(&disk, &volume, 0, 1).unwrap()[0])
    };
    // Made and left with a journal block alone; after a crash its data would be checked, too.
    let volume = run_to_end(Volume::make_open(&disk, &key(), CAPACITY, None)).unwrap();
    write(&disk, &volume, 0, &[1; 100]).unwrap();
    run_to_end(volume.rest(&disk)).unwrap();
    assert_eq!((reads(true), reads(false)), ((3, 1), (19, 1)));
    // Opened, and cut off: closed by nobody.
    let (volume, _) = run_to_end(Volume::open(&disk, &key(), &index.options())).unwrap();
    for _ in 0..40 {
        write(&disk, &volume, 0, &[2; 100]).unwrap();
        run_to_end(volume.sync(&disk)).unwrap();
    }
    assert_eq!(reads(true).1, 2);
    assert!(reads(true).0 > 18, "40 journal blocks are more than one read");
    // Closed and recorded.
    run_to_end(volume.close(&disk)).unwrap();
    assert_eq!((reads(true), reads(false)), ((3, 2), (18, 2)));
    // Recorded, but as something else than what is there.
    let (volume, _) = run_to_end(Volume::open(&disk, &key(), &index.options())).unwrap();
    write(&disk, &volume, 0, &[3; 100]).unwrap();
    run_to_end(volume.sync(&disk)).unwrap();
    assert_eq!(reads(true).1, 3);
    assert!(reads(true).0 > 18, "the record names the state before");
}

/// The caller is wrong, and the host shows the superblocks of before.
#[test]
fn a_newer_superblock_that_is_gone_is_noticed_although_the_file_was_said_to_be_put_away() {
    for forget in [false, true] {
        let (mut world, fresh) = World::new();
        let closed = world.session(&fresh, 1, false, true);
        world.index.settle();
        assert_eq!(world.read(&closed), Ok(1));
        let mut later = world.session(&closed, 2, false, false);
        assert_eq!(world.read(&later), Ok(2));
        for place in SUPERBLOCKS.into_iter().flatten() {
            match closed.get(&place).filter(|_| !forget) {
                Some(block) => drop(later.insert(place, block.clone())),
                None if closed.get(&place) != later.get(&place) => drop(later.remove(&place)),
                None => {}
            }
        }
        let refused = world.read(&later);
        assert!(matches!(refused, Err(VolumeError::SuperblockLost { .. })), "{refused:?}");
    }
}
