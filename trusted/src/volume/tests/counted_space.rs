//! Resizing and snapshots of a volume that is bound to a counter: what they leave is the newest
//! state, and the one before is an old one.

use super::{
    capacity::{resize, sized},
    counter::{SimCounter, counted},
    crash::{formatted, key, open},
    disk::{Image, SimDisk},
    nonces,
    run::Runner,
};
use crate::{
    counter::Moves,
    volume::{Freshness, OpenOptions, Volume, VolumeError, layout::BLOCK_BYTES},
};

const BEFORE: u64 = 130;
const AFTER: u64 = 300;

#[derive(Clone, Copy, Debug)]
enum Change {
    Grow,
    Shrink,
    Keep,
    Release,
}

async fn change(disk: SimDisk, options: OpenOptions, change: Change) -> Result<(), VolumeError> {
    match change {
        Change::Grow => resize(disk, options, sized(AFTER)).await.map(drop),
        Change::Shrink => resize(disk, options, sized(BEFORE / 2)).await.map(drop),
        Change::Keep | Change::Release => {
            let (volume, _) = Volume::open(&disk, &key(), &options).await?;
            if matches!(change, Change::Keep) {
                volume.make_snapshot(&disk, "new", 7).await
            } else {
                volume.delete_snapshot(&disk, "old").await.map(drop)
            }
        }
    }
}

/// A process beside this counter.
fn process(seed: u64, image: &Image, counter: &SimCounter) -> Runner {
    let mut runner = Runner::new(SimDisk::new(seed, sized(AFTER).host_blocks, image.clone()));
    runner.counter = Some(counter.clone());
    runner
}

/// A volume that is bound to a counter, with a snapshot unless it is to shrink.
fn bound(seed: u64, moves: Moves, snapshot: bool) -> (SimCounter, Image) {
    nonces::reset();
    let counter = SimCounter::new(seed);
    let mut runner = process(seed, &formatted(seed, sized(BEFORE)), &counter);
    let (disk, options) = (runner.disk.clone(), counted(&counter, moves, true));
    runner.block_on(async move {
        let (volume, _) = open(disk.clone(), options).await.unwrap();
        if snapshot {
            volume.make_snapshot(&disk, "old", 7).await.unwrap();
        }
        volume.close(&disk).await.unwrap();
    });
    (counter, runner.disk.image())
}

fn opened(
    seed: u64,
    image: &Image,
    counter: &SimCounter,
    moves: Moves,
) -> Result<(u64, usize), VolumeError> {
    let mut runner = process(seed, image, counter);
    let (disk, options) = (runner.disk.clone(), counted(counter, moves, false));
    runner.block_on(async move {
        let (volume, report) = open(disk.clone(), options).await?;
        assert!(matches!(report.freshness, Freshness::Confirmed { .. }));
        let snapshots = volume.snapshots(&disk).await.unwrap().len();
        let capacity = volume.capacity() / BLOCK_BYTES;
        volume.close(&disk).await.unwrap();
        Ok((capacity, snapshots))
    })
}

const CHANGES: [(Change, (u64, usize)); 4] = [
    (Change::Grow, (AFTER, 1)),
    (Change::Shrink, (BEFORE / 2, 0)),
    (Change::Keep, (BEFORE, 2)),
    (Change::Release, (BEFORE, 0)),
];

#[test]
fn resizing_and_snapshots_need_the_counter_of_a_bound_volume_and_leave_no_other_newest_state() {
    for (what, expected) in CHANGES {
        for moves in [Moves::Open, Moves::Checkpoint, Moves::Sync] {
            let (counter, before) = bound(3, moves, !matches!(what, Change::Shrink));
            let mut runner = process(4, &before, &counter);
            let refused = change(runner.disk.clone(), OpenOptions::default(), what);
            let refused = runner.block_on(refused);
            assert!(matches!(refused, Err(VolumeError::CounterNeeded { .. })), "{refused:?}");
            assert!(runner.disk.image() == before, "a refused change has written");

            let changed = change(runner.disk.clone(), counted(&counter, moves, false), what);
            assert_eq!(runner.block_on(changed), Ok(()), "{what:?}");
            let after = runner.disk.image();
            let old = opened(5, &before, &counter, moves);
            assert!(matches!(old, Err(VolumeError::RolledBack { .. })), "{what:?}: {old:?}");
            assert_eq!(opened(6, &after, &counter, moves), Ok(expected), "{what:?}");
        }
    }
}

#[test]
fn a_change_cut_off_anywhere_leaves_a_state_that_the_counter_knows() {
    for (what, new) in CHANGES {
        let (mut steps, mut done) = (0, false);
        while !done {
            let snapshot = !matches!(what, Change::Shrink);
            let (counter, before) = bound(3, Moves::Sync, snapshot);
            let mut runner = process(7 + steps, &before, &counter);
            let changed = change(runner.disk.clone(), counted(&counter, Moves::Sync, false), what);
            done = runner.finish(changed, steps).is_some();
            runner.kill();
            runner.disk.power_cut();
            // A move of the dead process may be served first.
            let found = (0..3).find_map(|n| {
                let found = opened(1000 + n, &runner.disk.image(), &counter, Moves::Sync);
                (found != Err(VolumeError::CounterLost)).then_some(found)
            });
            let found = found.expect("the dead make no more than one move");
            let old = (BEFORE, usize::from(snapshot));
            assert!(found == Ok(new) || !done && found == Ok(old), "{what:?}, {steps}: {found:?}");
            steps += 3;
        }
        assert!(steps > 60, "{what:?} has {steps} steps");
    }
}
