//! `cargo xtask hostile`: the campaign against a hostile host, as long as one likes.

use anyhow::Result;
use clap::Args;

use crate::shell::{Tree, run, step};

/// Options of `cargo xtask hostile`.
#[derive(Args, Debug)]
pub struct Options {
    /// Steps to do; a night is a thousand million
    #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only leave out each check on purpose, and see that the campaign notices
    #[arg(long)]
    canaries: bool,
}

/// Runs the campaign, then the canaries.
///
/// # Errors
/// If a seed fails (it is printed, with the way to replay it), or a canary is not caught.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    let campaign = |filter: &str| {
        let mut command = tree.cargo();
        command.args(["test", "--profile", "crash", "--package", "postern-trusted", "--lib"]);
        command.arg(filter).args(["--", "--nocapture"]);
        command
    };
    if !options.canaries {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        step("hostile host", || {
            run(campaign("no_hostile_host")
                .env("POSTERN_HOSTILE_STEPS", options.steps.to_string())
                .env("POSTERN_HOSTILE_SEED", options.seed.to_string())
                .env("POSTERN_HOSTILE_THREADS", threads.to_string()))
        })?;
    }
    step("canaries", || run(&mut campaign("volume::tests::hostile::canaries")))
}
