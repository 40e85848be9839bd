//! A simulated monotonic counter, and what it has to do for a volume.
//!
//! Requests are answered when the simulation decides; those of a dead caller may still be served
//! later; a reply may be lost although the request was served.

use alloc::{boxed::Box, collections::BTreeMap, sync::Arc, vec, vec::Vec};
use core::{
    future::poll_fn,
    task::{Poll, Waker},
};
use std::sync::Mutex;

use super::{
    CANARY, Canary,
    crash::{formatted, open, tiny},
    disk::{Image, Rng, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    counter::{Answer, Counter, CounterError, Moves, Record, Swapped},
    disk::BLOCK,
    errno::Errno,
    platform::Memory,
    volume::{
        Chore, CounterUse, Freshness, OpenOptions, OpenReport, Volume, VolumeError,
        layout::{RING_START, SUPERBLOCKS},
    },
};

enum Ask {
    Load,
    Swap(Option<Record>, Record),
}

struct State {
    rng: Rng,
    held: Option<Record>,
    asked: Vec<(u64, Ask, Option<Waker>)>,
    answers: BTreeMap<u64, Result<Swapped, CounterError>>,
    next: u64,
    /// Requests up to this one are of dead callers.
    dead: u64,
    /// Percent of requests that get no answer.
    faults: f64,
    moves: u64,
}

/// A counter whose answers come in their own time.
#[derive(Clone)]
pub(super) struct SimCounter(Arc<Mutex<State>>);

impl SimCounter {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: Rng(seed),
            held: None,
            asked: Vec::new(),
            answers: BTreeMap::new(),
            next: 0,
            dead: 0,
            faults: 0.0,
            moves: 0,
        })))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn held(&self) -> Option<Record> {
        self.state().held
    }

    pub(super) fn set_faults(&self, percent: f64) {
        self.state().faults = percent;
    }

    /// Serves one request at random. `false`: there is none.
    pub(super) fn complete_one(&self) -> bool {
        let waker = {
            let mut state = self.state();
            if state.asked.is_empty() {
                return false;
            }
            // What the dead asked for is served late.
            let dead = state.asked.iter().take_while(|(id, ..)| *id <= state.dead).count();
            let (n, late) = (state.asked.len(), state.rng.below(6) == 0);
            if dead == n && !late {
                return false;
            }
            let first = if late { 0 } else { dead };
            let at = first + state.rng.below((n - first) as u64) as usize;
            let (id, ask, waker) = state.asked.remove(at);
            let (faults, kind) = (state.faults, state.rng.below(2));
            let fails = state.rng.chance(faults);
            let answer = match ask {
                // Lost on the way there.
                _ if fails && kind == 0 => Err(CounterError::Unreachable),
                Ask::Swap(old, new) if state.held == old => {
                    state.held = Some(new);
                    state.moves += 1;
                    Ok(Swapped::Done)
                }
                Ask::Load | Ask::Swap(..) => Ok(Swapped::Lost(state.held)),
            };
            // Lost on the way back.
            let answer = if fails { Err(CounterError::Unreachable) } else { answer };
            state.answers.insert(id, answer);
            waker
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Whoever waited is dead; what it asked may still be served.
    pub(super) fn forget_callers(&self) {
        let mut state = self.state();
        state.dead = state.next;
        state.asked.iter_mut().for_each(|(_, _, waker)| *waker = None);
    }

    fn ask(&self, ask: Ask) -> Answer<'_, Swapped> {
        Box::pin(async move {
            let id = {
                let mut state = self.state();
                state.next += 1;
                let id = state.next;
                state.asked.push((id, ask, None));
                id
            };
            poll_fn(|cx| {
                let mut state = self.state();
                if let Some(answer) = state.answers.remove(&id) {
                    return Poll::Ready(answer);
                }
                if let Some(asked) = state.asked.iter_mut().find(|(asked, ..)| *asked == id) {
                    asked.2 = Some(cx.waker().clone());
                }
                Poll::Pending
            })
            .await
        })
    }
}

impl Counter for SimCounter {
    fn load(&self) -> Answer<'_, Option<Record>> {
        Box::pin(async move {
            match self.ask(Ask::Load).await? {
                Swapped::Lost(held) => Ok(held),
                Swapped::Done => Err(CounterError::Malformed),
            }
        })
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        self.ask(Ask::Swap(old, new))
    }
}

/// Opening with the counter.
pub(super) fn counted(counter: &SimCounter, moves: Moves, adopt: bool) -> OpenOptions {
    let counter = Arc::new(counter.clone());
    OpenOptions { counter: Some(CounterUse { counter, moves, adopt }), ..OpenOptions::default() }
}

/// A host with a counter.
struct World {
    counter: SimCounter,
    /// Another one for each process: salts are random.
    seed: u64,
}

type Opened = Result<(Arc<Volume>, OpenReport), VolumeError>;

impl World {
    /// And a volume that is bound to it.
    fn new(moves: Moves) -> (Self, Image) {
        nonces::reset();
        Self::beside(moves, 100)
    }

    fn beside(moves: Moves, seed: u64) -> (Self, Image) {
        let mut world = Self { counter: SimCounter::new(9), seed };
        let (mut process, opened) = world.open_with(&formatted(seed, tiny()), moves, true);
        let volume = opened.unwrap().0;
        process.close(&volume).unwrap();
        let image = process.0.disk.image();
        (world, image)
    }

    fn process(&mut self, image: &Image) -> Process {
        self.seed += 1;
        let disk = SimDisk::new(self.seed, tiny().host_blocks, image.clone());
        let mut runner = Runner::new(disk);
        runner.counter = Some(self.counter.clone());
        Process(runner)
    }

    fn open_with(&mut self, image: &Image, moves: Moves, adopt: bool) -> (Process, Opened) {
        let mut process = self.process(image);
        let opened = process.open(counted(&self.counter, moves, adopt));
        (process, opened)
    }

    fn opened(&mut self, image: &Image, moves: Moves) -> (Process, Arc<Volume>) {
        let (process, opened) = self.open_with(image, moves, false);
        (process, opened.unwrap().0)
    }

    fn refusal(&mut self, image: &Image) -> VolumeError {
        let (process, opened) = self.open_with(image, Moves::Sync, false);
        assert!(process.0.disk.image() == *image, "a refused open has written");
        opened.map(|_| ()).unwrap_err()
    }
}

struct Process(Runner);

impl Process {
    fn open(&mut self, options: OpenOptions) -> Opened {
        self.0.block_on(open(self.0.disk.clone(), options))
    }

    fn close(&mut self, volume: &Arc<Volume>) -> Result<(), Errno> {
        let (disk, volume) = (self.0.disk.clone(), volume.clone());
        self.0.block_on(async move { volume.close(&disk).await })
    }

    fn write(&mut self, volume: &Arc<Volume>, block: u64, byte: u8) -> Result<usize, Errno> {
        let (disk, volume) = (self.0.disk.clone(), volume.clone());
        let bytes = Memory::new(vec![byte; BLOCK]);
        self.0.block_on(async move { volume.write(&disk, block * 4096, &bytes).await })
    }

    fn sync(&mut self, volume: &Arc<Volume>) -> Result<(), Errno> {
        let (disk, volume) = (self.0.disk.clone(), volume.clone());
        self.0.block_on(async move { volume.sync(&disk).await })
    }

    fn chore(&mut self, volume: &Arc<Volume>, chore: Chore) -> Result<(), Errno> {
        let (disk, volume) = (self.0.disk.clone(), volume.clone());
        self.0.block_on(async move { volume.run_chore(&disk, chore).await })
    }

    fn read(&mut self, volume: &Arc<Volume>, block: u64) -> Result<u8, Errno> {
        let (disk, volume) = (self.0.disk.clone(), volume.clone());
        let bytes = self.0.block_on(async move {
            let buffer = Memory::new(vec![0xee; BLOCK]);
            volume.read(&disk, block * 4096, &buffer).await?;
            Ok(buffer.into_inner())
        })?;
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        Ok(bytes[0])
    }
}

fn is_rolled_back(error: VolumeError) -> bool {
    matches!(error, VolumeError::RolledBack { .. })
}

#[test]
fn a_whole_disk_rollback_is_refused() {
    for moves in [Moves::Open, Moves::Checkpoint, Moves::Sync] {
        let (mut world, old) = World::new(moves);
        let (mut process, volume) = world.opened(&old, moves);
        process.write(&volume, 3, 7).unwrap();
        process.close(&volume).unwrap();
        let new = process.0.disk.image();
        assert!(is_rolled_back(world.refusal(&old)), "{moves:?}");
        let (mut process, volume) = world.opened(&new, moves);
        assert_eq!(process.read(&volume, 3), Ok(7), "{moves:?}");
    }
}

#[test]
fn a_state_of_before_the_opening_is_refused_even_if_nothing_was_written_since() {
    let (mut world, old) = World::new(Moves::Open);
    let (process, volume) = world.opened(&old, Moves::Open);
    drop((process, volume));
    assert!(is_rolled_back(world.refusal(&old)));
}

#[test]
fn an_acknowledged_sync_is_not_taken_back_when_syncs_move_the_counter() {
    let (mut world, image) = World::new(Moves::Sync);
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    let mut images = Vec::new();
    for n in 1..=6 {
        process.write(&volume, n, n as u8).unwrap();
        images.push(process.0.disk.image());
        process.sync(&volume).unwrap();
        if n == 3 {
            process.chore(&volume, Chore::Checkpoint).unwrap();
        }
    }
    let last = process.0.disk.image();
    drop((process, volume));
    for (n, image) in images.iter().enumerate() {
        assert!(is_rolled_back(world.refusal(image)), "before sync {n}");
    }
    let (mut process, volume) = world.opened(&last, Moves::Sync);
    for n in 1..=6 {
        assert_eq!(process.read(&volume, n), Ok(n as u8));
    }
}

#[test]
fn a_sync_before_the_counter_has_moved_is_caught() {
    CANARY.set(Canary::NoRegister);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let result = std::panic::catch_unwind(
        an_acknowledged_sync_is_not_taken_back_when_syncs_move_the_counter,
    );
    std::panic::set_hook(hook);
    CANARY.set(Canary::None);
    assert!(result.is_err());
}

/// Without a counter the same attack looks like a power cut.
#[test]
fn a_journal_cut_off_after_a_sync_is_refused_with_a_counter_and_accepted_without() {
    for bound in [true, false] {
        let (mut world, image) = World::new(Moves::Sync);
        let mut process = world.process(&image);
        let options = if bound {
            counted(&world.counter, Moves::Sync, false)
        } else {
            OpenOptions { unbind: true, ..OpenOptions::default() }
        };
        let volume = process.open(options).unwrap().0;
        process.write(&volume, 1, 1).unwrap();
        let before = process.0.disk.image();
        process.write(&volume, 2, 2).unwrap();
        process.sync(&volume).unwrap();
        let mut cut = process.0.disk.image();
        for place in RING_START..RING_START + tiny().ring_blocks {
            match before.get(&place) {
                Some(block) => drop(cut.insert(place, block.clone())),
                None => drop(cut.remove(&place)),
            }
        }
        drop((process, volume));
        if bound {
            assert!(is_rolled_back(world.refusal(&cut)));
        } else {
            let mut process = world.process(&cut);
            let volume = process.open(OpenOptions::default()).unwrap().0;
            assert_eq!(process.read(&volume, 2), Ok(0));
        }
    }
}

/// A block below a registered sync cannot be passed off as one that had not landed.
#[test]
fn a_synced_block_put_back_is_eio_and_not_an_older_version() {
    let (mut world, image) = World::new(Moves::Sync);
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    process.write(&volume, 5, 1).unwrap();
    process.sync(&volume).unwrap();
    let before = process.0.disk.image();
    process.write(&volume, 5, 2).unwrap();
    process.sync(&volume).unwrap();
    let mut image = process.0.disk.image();
    drop((process, volume));
    let changed: Vec<u64> = image
        .iter()
        .filter(|(place, block)| {
            **place >= RING_START + tiny().ring_blocks && before.get(place) != Some(*block)
        })
        .map(|(place, _)| *place)
        .collect();
    assert_eq!(changed.len(), 1, "the data of the second write");
    image.remove(&changed[0]);
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    assert_eq!(process.read(&volume, 5), Err(Errno::EIO));
    assert_eq!(process.read(&volume, 6), Ok(0));
}

#[test]
fn a_checkpoint_that_the_counter_knows_is_not_taken_back() {
    let (mut world, image) = World::new(Moves::Checkpoint);
    let (mut process, volume) = world.opened(&image, Moves::Checkpoint);
    process.write(&volume, 1, 1).unwrap();
    process.sync(&volume).unwrap();
    let before = process.0.disk.image();
    process.chore(&volume, Chore::Checkpoint).unwrap();
    assert_eq!(volume.due(1), Some(Chore::Register));
    process.chore(&volume, Chore::Register).unwrap();
    assert_eq!(volume.due(1), None);
    let after = process.0.disk.image();
    drop((process, volume));
    assert!(is_rolled_back(world.refusal(&before)));
    let (mut process, volume) = world.opened(&after, Moves::Checkpoint);
    assert_eq!(process.read(&volume, 1), Ok(1));
}

#[test]
fn an_older_superblock_under_a_newer_journal_is_refused() {
    let (mut world, old) = World::new(Moves::Checkpoint);
    let (mut process, volume) = world.opened(&old, Moves::Checkpoint);
    process.write(&volume, 1, 1).unwrap();
    process.close(&volume).unwrap();
    let mut mixed = process.0.disk.image();
    for place in SUPERBLOCKS.into_iter().flatten() {
        match old.get(&place) {
            Some(block) => drop(mixed.insert(place, block.clone())),
            None => drop(mixed.remove(&place)),
        }
    }
    assert!(is_rolled_back(world.refusal(&mixed)));
}

#[test]
fn of_two_enclaves_that_open_one_image_only_one_goes_on() {
    let (mut world, image) = World::new(Moves::Open);
    let (mut first, volume) = world.opened(&image, Moves::Open);
    assert!(is_rolled_back(world.refusal(&image)), "the second finds the counter moved");
    first.write(&volume, 1, 1).unwrap();
    first.close(&volume).unwrap();
}

/// Both ask the counter before either has moved it.
#[test]
fn two_enclaves_that_open_one_image_at_once_repeat_no_nonce_and_one_is_refused() {
    for seed in 0..40 {
        // The table of nonces sees what both seal.
        let (mut world, image) = World::new(Moves::Open);
        world.seed = 1000 + 2 * seed;
        let mut rng = Rng(seed);
        let mut processes = [world.process(&image), world.process(&image)];
        let results: [Arc<Mutex<Option<Opened>>>; 2] = Default::default();
        for (process, result) in processes.iter_mut().zip(&results) {
            let options = counted(&world.counter, Moves::Open, false);
            let (disk, result) = (process.0.disk.clone(), result.clone());
            process.0.spawn(async move {
                let opened = open(disk, options).await;
                *result.lock().unwrap() = Some(opened);
            });
        }
        while processes.iter().any(|process| process.0.live() > 0) {
            processes[rng.below(2) as usize].0.step();
        }
        let opened = results.map(|result| result.lock().unwrap().take().unwrap());
        let well = opened.iter().filter(|opened| opened.is_ok()).count();
        assert_eq!(well, 1, "seed {seed}");
        for (process, opened) in processes.iter_mut().zip(&opened) {
            match opened {
                Ok((volume, _)) => {
                    process.write(volume, 1, 1).unwrap();
                    process.close(volume).unwrap();
                }
                Err(VolumeError::CounterLost | VolumeError::RolledBack { .. }) => {}
                Err(other) => panic!("seed {seed}: {other}"),
            }
        }
    }
}

/// A copy is taken of a volume that is open; the copy opens like one whose writer crashed.
#[test]
fn a_writer_whose_copy_was_opened_is_stopped_at_its_next_move_and_seals_under_other_nonces() {
    let (mut world, image) = World::new(Moves::Sync);
    let (mut first, volume) = world.opened(&image, Moves::Sync);
    first.write(&volume, 1, 1).unwrap();
    first.sync(&volume).unwrap();
    let copy = first.0.disk.image();
    let (mut second, other) = world.opened(&copy, Moves::Sync);
    second.write(&other, 2, 2).unwrap();
    second.sync(&other).unwrap();
    first.write(&volume, 2, 3).unwrap();
    assert_eq!(first.sync(&volume), Err(Errno::EIO));
    assert_eq!(first.write(&volume, 2, 3), Err(Errno::EIO), "its session is over");
    second.write(&other, 3, 3).unwrap();
    second.close(&other).unwrap();
    let fork = first.0.disk.image();
    assert!(is_rolled_back(world.refusal(&fork)));
}

#[test]
fn a_sync_that_cannot_move_the_counter_fails_and_a_later_one_makes_up_for_it() {
    let (mut world, image) = World::new(Moves::Sync);
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    world.counter.set_faults(100.0);
    process.write(&volume, 1, 1).unwrap();
    for _ in 0..4 {
        assert_eq!(process.sync(&volume), Err(Errno::EIO));
    }
    process.write(&volume, 2, 2).unwrap();
    // Checkpoints do not wait for it.
    process.chore(&volume, Chore::Checkpoint).unwrap();
    process.write(&volume, 3, 3).unwrap();
    world.counter.set_faults(0.0);
    process.sync(&volume).unwrap();
    let image = process.0.disk.image();
    drop((process, volume));
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    assert_eq!([1, 2, 3].map(|n| process.read(&volume, n)), [Ok(1), Ok(2), Ok(3)]);
}

#[test]
fn without_an_answer_from_the_counter_nothing_opens_for_writing() {
    let (mut world, image) = World::new(Moves::Open);
    world.counter.set_faults(100.0);
    assert_eq!(world.refusal(&image), VolumeError::Counter(CounterError::Unreachable));
    world.counter.set_faults(0.0);
    let (_, volume) = world.opened(&image, Moves::Open);
    assert!(!volume.read_only());
}

#[test]
fn a_bound_volume_is_written_only_with_its_counter_and_read_without() {
    let (mut world, image) = World::new(Moves::Open);
    let held = world.counter.held().unwrap();
    let mut process = world.process(&image);
    let refused = process.open(OpenOptions::default()).map(|_| ()).unwrap_err();
    assert!(matches!(refused, VolumeError::CounterNeeded { .. }), "{refused}");
    let look = OpenOptions { read_only: true, ..OpenOptions::default() };
    let (volume, report) = process.open(look).unwrap();
    assert!(matches!(report.freshness, Freshness::Unchecked { .. }));
    assert!(volume.info().counter.is_some());
    let look = OpenOptions { read_only: true, ..counted(&world.counter, Moves::Open, false) };
    let (_, report) = process.open(look).unwrap();
    assert_eq!(report.freshness, Freshness::Confirmed { sequence: held.sequence });
    assert_eq!(world.counter.held(), Some(held), "looking moves nothing");
    // Another counter, one that knows nothing of the volume.
    world.counter = SimCounter::new(10);
    assert!(matches!(world.refusal(&image), VolumeError::CounterEmpty { .. }));
}

#[test]
fn a_volume_that_was_never_bound_is_refused_where_a_counter_is_given() {
    let (mut world, _) = World::new(Moves::Open);
    let other = formatted(2, tiny());
    assert_eq!(world.refusal(&other), VolumeError::NotBound);
}

#[test]
fn an_old_state_is_adopted_on_purpose_and_the_newer_one_is_refused_from_then_on() {
    let (mut world, old) = World::new(Moves::Sync);
    let (mut process, volume) = world.opened(&old, Moves::Sync);
    process.write(&volume, 1, 1).unwrap();
    process.close(&volume).unwrap();
    let new = process.0.disk.image();
    let look = OpenOptions { read_only: true, ..counted(&world.counter, Moves::Open, false) };
    let (_, report) = world.process(&old).open(look).unwrap();
    assert_eq!(report.freshness, Freshness::Refused);
    assert!(report.loss.is_some_and(is_rolled_back));
    let (mut process, adopted) = world.open_with(&old, Moves::Sync, true);
    process.close(&adopted.unwrap().0).unwrap();
    let old = process.0.disk.image();
    assert!(is_rolled_back(world.refusal(&new)));
    let (mut process, volume) = world.opened(&old, Moves::Sync);
    assert_eq!(process.read(&volume, 1), Ok(0));
}

#[test]
fn an_unbound_volume_opens_without_a_counter_again() {
    let (mut world, image) = World::new(Moves::Sync);
    let mut process = world.process(&image);
    let options = OpenOptions { unbind: true, ..OpenOptions::default() };
    let volume = process.open(options).unwrap().0;
    process.close(&volume).unwrap();
    let image = process.0.disk.image();
    let (volume, report) = world.process(&image).open(OpenOptions::default()).unwrap();
    assert_eq!((report.freshness, volume.info().counter), (Freshness::Unbound, None));
    assert_eq!(world.refusal(&image), VolumeError::NotBound, "the counter still knows it");
}

#[test]
fn two_volumes_under_one_key_cannot_be_exchanged_where_each_has_its_counter() {
    let (mut world, one) = World::new(Moves::Open);
    let counter = world.counter.clone();
    let (mut other, two) = World::beside(Moves::Open, 200);
    assert!(is_rolled_back(world.refusal(&two)));
    assert!(is_rolled_back(other.refusal(&one)));
    assert!(counter.held().is_some());
}

#[test]
fn a_clean_session_moves_the_counter_twice_and_a_sync_once() {
    let (mut world, image) = World::new(Moves::Sync);
    let moves = |world: &World| world.counter.state().moves;
    let before = moves(&world);
    let (mut process, volume) = world.opened(&image, Moves::Sync);
    assert_eq!(moves(&world), before + 1, "an opening after a clean close");
    process.write(&volume, 1, 1).unwrap();
    process.sync(&volume).unwrap();
    process.sync(&volume).unwrap();
    assert_eq!(moves(&world), before + 2, "one sync, and one with nothing to do");
    process.close(&volume).unwrap();
    assert_eq!(moves(&world), before + 3);
}
