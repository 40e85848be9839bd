//! Which seeds run, and what of them failed.

use alloc::{boxed::Box, string::String, vec::Vec};
use std::{format, panic, println};

use super::{
    super::{CANARY, Canary, disk::Image, number, words_of},
    Sim,
};

/// Seeds that plain `cargo test` runs.
pub(in super::super) const DEFAULT_SEEDS: u64 = 150;

/// What the crashes of one seed leave on the host, one image each.
pub(in super::super) fn crash_images(seed: u64) -> Vec<Image> {
    let mut sim = Sim::new(seed, Canary::None);
    sim.run();
    sim.left
}

/// The same with snapshots.
pub(in super::super) fn crash_images_with_snapshots(seed: u64) -> Vec<Image> {
    let mut sim = Sim::with_snapshots(seed, Canary::None);
    sim.run();
    sim.left
}

/// Runs one seed with the plan that suits `plan`, with `canary` broken; the panic's message, if it
/// found something.
pub(in super::super) fn check(seed: u64, plan: Canary, canary: Canary) -> Result<(), String> {
    CANARY.set(canary);
    let snapshots = matches!(plan, Canary::FreeHeld | Canary::SameBirth);
    let result = survived(|| match snapshots {
        true => Sim::with_snapshots(seed, plan),
        false => Sim::new(seed, plan),
    });
    CANARY.set(Canary::None);
    result.map(|_| ())
}

/// Runs one simulation: the number of crashes that it survived, or the panic's message.
fn survived(make: impl FnOnce() -> Sim + panic::UnwindSafe) -> Result<u64, String> {
    panic::catch_unwind(|| {
        let mut sim = make();
        sim.run();
        sim.left.len() as u64
    })
    .map_err(words_of)
}

/// Runs every `step`th of `seeds`; how many crashes, and what was found.
fn run_seeds(
    seeds: core::ops::Range<u64>,
    step: usize,
    make: fn(u64, Canary) -> Sim,
) -> (u64, Vec<String>) {
    let (mut crashes, mut failures) = (0, Vec::new());
    for seed in seeds.step_by(step) {
        match survived(|| make(seed, Canary::None)) {
            Ok(count) => crashes += count,
            Err(message) => failures.push(format!("seed {seed}: {message}")),
        }
    }
    (crashes, failures)
}

#[test]
fn after_any_crash_every_sector_is_as_new_as_its_last_sync() {
    all_seeds(DEFAULT_SEEDS, Sim::new);
}

#[test]
fn after_any_crash_each_snapshot_is_whole_or_not_there_and_the_space_map_is_exact() {
    all_seeds(DEFAULT_SEEDS / 2, Sim::with_snapshots);
}

/// A seed that found it once: of a shrink the size survives a power cut, the rewritten block not.
#[test]
fn what_a_shrink_cut_off_does_not_come_back_although_its_last_block_was_lost() {
    let survived = survived(|| Sim::with_snapshots(29_782, Canary::None));
    assert_eq!(survived.map(|_| ()), Ok(()));
}

fn all_seeds(default: u64, make: fn(u64, Canary) -> Sim) {
    let first = number("POSTERN_SIM_FIRST").unwrap_or(1);
    let seeds = match number("POSTERN_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => first..first + number("POSTERN_SIM_SEEDS").unwrap_or(default),
    };
    let threads = number("POSTERN_SIM_THREADS").unwrap_or(1).max(1);
    let hook = panic::take_hook();
    if seeds.end - seeds.start > 1 {
        panic::set_hook(Box::new(|_| ()));
    }
    let (mut crashes, mut failures) = (0, Vec::new());
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|n| (seeds.start + n..seeds.end, threads as usize))
            .map(|(mine, step)| scope.spawn(move || run_seeds(mine, step, make)))
            .collect();
        for thread in running {
            let (count, found) = thread.join().expect("each seed's panic is caught");
            crashes += count;
            failures.extend(found);
        }
    });
    panic::set_hook(hook);
    println!("{} seeds, {crashes} crashes, {} failures", seeds.end - seeds.start, failures.len());
    assert!(
        failures.is_empty(),
        "{} of {} seeds failed; replay one with POSTERN_SIM_SEED=<seed> cargo test -p \
         postern-trusted after_any_crash\n{}",
        failures.len(),
        seeds.end - seeds.start,
        failures[..failures.len().min(10)].join("\n")
    );
}
