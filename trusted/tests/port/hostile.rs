//! A host that breaks its contract: each class by name, then all of them at random.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use postern_edl::port::{SQ_OFFSET, cursor};
use postern_trusted::{
    disk::{Disk, HostError, Transfer},
    exec::Executor,
    port::{HostFault, Lane},
};
use proptest::{prelude::*, sample::Index};

use crate::host::{CountingBell, Host, executor, file, pattern};

/// What became of tasks, by number.
type Ends = Arc<Mutex<BTreeMap<u64, Result<(), HostError>>>>;

struct Scene {
    host: Host,
    lane: Lane,
    executor: Executor,
    ends: Ends,
    started: u64,
}

impl Scene {
    fn new(entries: usize) -> Self {
        let (host, lane) = Host::with_lane(entries, 256 << 10, CountingBell::default());
        Self { host, lane, executor: executor(), ends: Ends::default(), started: 0 }
    }

    /// Starts a read (even) or write (odd) of one block.
    fn start(&mut self) {
        let (disk, ends, n) = (file(&self.lane), self.ends.clone(), self.started);
        self.started += 1;
        self.executor.spawn(async move {
            let end = match disk.transfer(1).await {
                Err(error) => Err(error),
                Ok(mut transfer) if n.is_multiple_of(2) => transfer.read(n).await,
                Ok(mut transfer) => {
                    transfer.put(0, &pattern(n));
                    transfer.write(n, 1).await
                }
            };
            let before = ends.lock().unwrap().insert(n, end);
            assert_eq!(before, None, "task {n} ended twice");
        });
        self.executor.run(usize::MAX);
    }

    /// Polls and expects `fault`, and all tasks at their end.
    fn expect(mut self, fault: HostFault) {
        self.lane.poll(usize::MAX);
        assert_eq!(self.lane.fault(), Some(fault));
        self.executor.run(usize::MAX);
        assert_eq!(self.executor.live(), 0, "everybody was told");
        let gone =
            self.ends.lock().unwrap().values().filter(|e| **e == Err(HostError::Gone)).count();
        assert!(gone > 0);
        self.start();
        assert_eq!(self.ends.lock().unwrap()[&(self.started - 1)], Err(HostError::Gone));
    }
}

/// A scene with three requests in flight; the first id.
fn three() -> (Scene, u64) {
    let mut scene = Scene::new(8);
    (0..3).for_each(|_| scene.start());
    let id = scene.host.take()[0].id;
    (scene, id)
}

#[test]
fn a_second_completion_of_a_request_poisons_the_lane() {
    let (mut scene, id) = three();
    scene.host.answer(id, 4096);
    scene.host.answer(id, 4096);
    scene.expect(HostFault::DuplicateCompletion { id });
}

#[test]
fn a_second_completion_after_the_task_has_taken_the_first_poisons_the_lane() {
    let (mut scene, id) = three();
    scene.host.answer(id, 4096);
    scene.lane.poll(usize::MAX);
    scene.executor.run(usize::MAX);
    scene.host.answer(id, 4096);
    scene.expect(HostFault::DuplicateCompletion { id });
}

#[test]
fn a_completion_of_the_last_use_of_an_index_in_flight_again_poisons_the_lane() {
    let (mut scene, id) = three();
    scene.host.answer(id, 4096);
    scene.lane.poll(usize::MAX);
    scene.executor.run(usize::MAX);
    scene.start();
    let again = scene.host.take()[0].id;
    assert_eq!((again as u32, again >> 32), (id as u32, (id >> 32) + 1));
    scene.host.answer(id, 4096);
    scene.expect(HostFault::UnknownRequest { id });
}

#[test]
fn a_completion_of_an_id_that_was_never_issued_poisons_the_lane() {
    for forge in [0, 1, 7, 1 << 32 | 7, 1 << 32 | 8, 5 << 32, u64::MAX, 1 << 63] {
        let (mut scene, _) = three();
        scene.host.answer(forge, 4096);
        scene.expect(HostFault::UnknownRequest { id: forge });
    }
}

#[test]
fn a_completion_before_anything_was_asked_poisons_the_lane() {
    for forge in [0, 1] {
        let mut scene = Scene::new(8);
        scene.host.answer(forge, 0);
        assert_eq!(scene.lane.poll(usize::MAX), 0);
        assert_eq!(scene.lane.fault(), Some(HostFault::UnknownRequest { id: forge }));
    }
}

#[test]
fn a_result_that_cannot_be_poisons_the_lane() {
    for result in [4097, 4608, 8192, 1, 511, 4095, -4096, i64::MIN, i64::MAX] {
        let (mut scene, id) = three();
        scene.host.answer(id, result);
        scene.expect(HostFault::ResultOutOfRange { id, result, asked: 4096 });
    }
}

#[test]
fn a_cursor_that_jumps_poisons_the_lane() {
    for published in [9, 1 << 32, u64::MAX, 1 << 63] {
        let (scene, _) = three();
        scene.host.set(cursor::CQ_PUBLISHED, published);
        scene.expect(HostFault::CursorOutOfRange { published, taken: 0 });
    }
}

#[test]
fn a_cursor_that_goes_back_poisons_the_lane() {
    let (mut scene, id) = three();
    scene.host.answer(id, 4096);
    scene.lane.poll(usize::MAX);
    scene.host.set(cursor::CQ_PUBLISHED, 0);
    scene.expect(HostFault::CursorOutOfRange { published: 0, taken: 1 });

    let mut scene = Scene::new(8);
    (0..3).for_each(|_| scene.start());
    for sub in scene.host.take().iter().take(2) {
        scene.host.answer(sub.id, 4096);
    }
    scene.host.set(cursor::CQ_PUBLISHED, 3);
    assert_eq!(scene.lane.poll(1), 1);
    scene.host.set(cursor::CQ_PUBLISHED, 2);
    scene.expect(HostFault::CursorWentBack { published: 2, before: 3 });
}

#[test]
fn what_was_answered_before_the_fault_in_the_same_batch_counts() {
    let (mut scene, id) = three();
    scene.host.answer(id, 4096);
    scene.host.answer(77, 0);
    assert_eq!(scene.lane.poll(usize::MAX), 1);
    scene.executor.run(usize::MAX);
    let ends = scene.ends.lock().unwrap();
    assert_eq!(ends[&0], Ok(()));
    assert_eq!([ends[&1], ends[&2]], [Err(HostError::Gone); 2]);
}

#[test]
fn a_cursor_that_always_runs_ahead_bounds_the_work_of_one_call() {
    let mut scene = Scene::new(8);
    (0..8).for_each(|_| scene.start());
    let ids: Vec<_> = scene.host.take().iter().map(|sub| sub.id).collect();
    ids.iter().for_each(|id| scene.host.answer(*id, 4096));
    // Says that a whole lap more is there: the old completions, seen again.
    scene.host.set(cursor::CQ_PUBLISHED, 8);
    assert_eq!(scene.lane.poll(5), 5);
    scene.host.set(cursor::CQ_PUBLISHED, 13);
    assert_eq!(scene.lane.poll(usize::MAX), 3);
    assert_eq!(scene.lane.fault(), Some(HostFault::DuplicateCompletion { id: ids[0] }));
}

#[derive(Clone, Debug)]
enum Step {
    Start,
    Run,
    Poll(usize),
    /// Answers one of the open requests as asked.
    Answer(Index),
    /// Refuses one.
    Refuse(Index, i64),
    /// Does less than was asked.
    Short(Index, i64),
    // From here on the host breaks its contract, or tries what must not matter.
    Replay(Index),
    Forge(u64, i64),
    WrongResult(Index, i64),
    Cursor(u64),
    Nudge(i64),
    Scribble(Index, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let any_index = any::<Index>;
    let near_id = (0..4_u64, 0..10_u64).prop_map(|(generation, index)| generation << 32 | index);
    prop_oneof![
        30 => Just(Step::Start),
        20 => Just(Step::Run),
        30 => (0..20_usize).prop_map(Step::Poll),
        60 => any_index().prop_map(Step::Answer),
        5 => (any_index(), 1..4096_i64).prop_map(|(i, errno)| Step::Refuse(i, -errno)),
        10 => (any_index(), 0..8_i64).prop_map(|(i, sectors)| Step::Short(i, sectors * 512)),
        8 => (any_index(), any::<u64>()).prop_map(|(i, v)| Step::Scribble(i, v)),
        1 => any_index().prop_map(Step::Replay),
        1 => (prop_oneof![near_id, any::<u64>()], -5..5000_i64).prop_map(|(id, r)| Step::Forge(id, r)),
        1 => (any_index(), any::<i64>()).prop_map(|(i, r)| Step::WrongResult(i, r)),
        1 => any::<u64>().prop_map(Step::Cursor),
        1 => (-3..3_i64).prop_map(Step::Nudge),
    ]
}

/// What the contract says of each completion, by plain sets: no generations, no table.
struct Model {
    entries: u64,
    /// Ids published and not completed.
    open: BTreeSet<u64>,
    /// Ids completed.
    closed: Vec<u64>,
    /// The ring as the host wrote it.
    ring: Vec<(u64, i64)>,
    cursor: u64,
    highest: u64,
    taken: u64,
    broken: bool,
}

impl Model {
    fn write(&mut self, id: u64, result: i64) {
        let at = self.cursor % self.entries;
        self.ring[usize::try_from(at).unwrap()] = (id, result);
        self.cursor = self.cursor.wrapping_add(1);
    }

    /// What one poll may take, until it sees a breach.
    fn poll(&mut self, limit: usize) -> usize {
        let mut accepted = 0;
        if self.broken || limit == 0 || self.cursor == self.taken {
            return 0;
        }
        let ahead = self.cursor.checked_sub(self.taken);
        if ahead.is_none_or(|n| n > self.entries) || self.cursor < self.highest {
            self.broken = true;
            return 0;
        }
        self.highest = self.cursor;
        while accepted < limit && self.taken < self.cursor {
            let (id, result) = self.ring[usize::try_from(self.taken % self.entries).unwrap()];
            let possible =
                (-4095..0).contains(&result) || (0..=8).any(|sectors| result == sectors * 512);
            if !possible || !self.open.remove(&id) {
                self.broken = true;
                break;
            }
            self.closed.push(id);
            self.taken += 1;
            accepted += 1;
        }
        accepted
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// A request completes at most once and only if it is in flight, whatever the host writes;
    /// the first breach ends everything.
    #[test]
    fn no_host_script_completes_a_request_twice_or_unissued(
        script in prop::collection::vec(step(), 0..300),
        entries in prop_oneof![Just(2_usize), Just(8), Just(32)],
    ) {
        let mut scene = Scene::new(entries);
        let mut model = Model {
            entries: entries as u64,
            open: BTreeSet::new(),
            closed: Vec::new(),
            ring: vec![(0, 0); entries],
            cursor: 0,
            highest: 0,
            taken: 0,
            broken: false,
        };
        // Answers the host has already written for an open id: it does not answer twice by itself.
        let mut answered = BTreeSet::new();
        for step in script {
            let waiting: Vec<u64> = model.open.difference(&answered).copied().collect();
            let pick = |which: Index| waiting[which.index(waiting.len())];
            let words = match step {
                Step::Start => {
                    scene.start();
                    None
                }
                Step::Run => {
                    scene.executor.run(usize::MAX);
                    None
                }
                Step::Poll(limit) => {
                    prop_assert_eq!(scene.lane.poll(limit), model.poll(limit));
                    None
                }
                Step::Answer(which) if !waiting.is_empty() => Some((pick(which), 4096)),
                Step::Refuse(which, result)
                | Step::Short(which, result)
                | Step::WrongResult(which, result) if !waiting.is_empty() => {
                    Some((pick(which), result))
                }
                Step::Replay(which) if !model.closed.is_empty() => {
                    Some((model.closed[which.index(model.closed.len())], 4096))
                }
                Step::Forge(id, result) => Some((id, result)),
                Step::Cursor(value) => {
                    model.cursor = value;
                    None
                }
                Step::Nudge(by) => {
                    model.cursor = model.cursor.wrapping_add_signed(by);
                    None
                }
                Step::Scribble(which, value) => {
                    // Anywhere but the rings and their cursors (the model learns of requests from
                    // the submission ring): must not matter.
                    let word = which.index(scene.host.region.len());
                    let rings = SQ_OFFSET / 8..scene.host.geometry.stamps_offset / 8;
                    let cursors = [cursor::CQ_PUBLISHED, cursor::SQ_PUBLISHED];
                    if !rings.contains(&word) && !cursors.contains(&word) {
                        scene.host.set(word, value);
                    }
                    None
                }
                _ => None,
            };
            if let Some((id, result)) = words {
                answered.insert(id);
                scene.host.answered = model.cursor;
                scene.host.answer(id, result);
                model.write(id, result);
            }
            scene.host.set(cursor::CQ_PUBLISHED, model.cursor);
            for submission in scene.host.take() {
                let index = submission.id & 0xffff_ffff;
                prop_assert!(index < entries as u64);
                prop_assert!(model.open.iter().all(|id| id & 0xffff_ffff != index));
                prop_assert!(!model.closed.contains(&submission.id));
                prop_assert!(model.open.insert(submission.id));
            }
            prop_assert_eq!(scene.lane.fault().is_some(), model.broken);
            prop_assert_eq!(scene.lane.in_flight(), if model.broken { 0 } else { model.open.len() });
        }
        scene.executor.run(usize::MAX);
        let ends = scene.ends.lock().unwrap();
        if model.broken {
            prop_assert_eq!(ends.len() as u64, scene.started);
        } else {
            prop_assert!(ends.values().all(|end| *end != Err(HostError::Gone)));
        }
    }
}
