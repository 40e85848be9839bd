//! Random sequences of calls: generated from a seed, done in a process of their own, told step by
//! step. The same seed gives the same steps everywhere; steps can be left out, so that a
//! difference can be narrowed down to few of them.
//!
//! Holds: only what is determined is told. Events of requests that complete later are reaped at
//! once, all of them, and told in the order of their `data`; never more requests are held than a
//! context was made for.

mod act;
mod plan;

use std::{collections::BTreeSet, ffi::CStr};

use self::{act::Actor, plan::plan};
use crate::run;

/// Which sequences, and which of their steps.
#[derive(clap::Args, Debug)]
pub struct Choice {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Leave out so many of the first seeds
    #[arg(long, default_value_t = 0)]
    skip: usize,
    /// Only these steps and requests, by number; without it all
    #[arg(long, value_delimiter = ',')]
    keep: Option<Vec<u32>>,
    /// Only print how many steps and requests the first seed's sequence has
    #[arg(long)]
    size: bool,
}

/// Does the chosen sequences and prints what each said.
pub fn run(choice: &Choice, path: &CStr, scratch: &CStr) {
    if choice.size {
        println!("== size\n{}", plan(choice.seed).size);
        return;
    }
    let keep: Option<BTreeSet<u32>> =
        choice.keep.as_ref().map(|numbers| numbers.iter().copied().collect());
    run::hold(path);
    for seed in (choice.seed..choice.seed.saturating_add(choice.count)).skip(choice.skip) {
        let plan = plan(seed);
        let said = run::transcript(path, scratch, &|world| {
            let mut actor = Actor::new(world);
            for step in plan.steps.iter().filter(|step| kept(keep.as_ref(), step.number)) {
                actor.act(step, &|number| kept(keep.as_ref(), number));
            }
            actor.end();
        });
        print!("== seed {seed}\n{said}");
    }
}

fn kept(keep: Option<&BTreeSet<u32>>, number: u32) -> bool {
    keep.is_none_or(|keep| keep.contains(&number))
}
