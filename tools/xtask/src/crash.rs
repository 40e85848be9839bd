//! `cargo xtask crash`: the crash simulator of the volume, as long as one likes.

use anyhow::Result;
use clap::Args;

use crate::{
    shell::{Tree, run, step},
    test,
};

/// Options of `cargo xtask crash`.
#[derive(Args, Debug)]
pub struct Options {
    /// Seeds to run; each crashes a volume about three times. A night is a million
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only break each rule of the design on purpose, and see that the simulator notices
    #[arg(long)]
    canaries: bool,
    /// Only record what really reaches the host, and open this many states that a power cut may
    /// leave of it; on the parts that were built last
    #[arg(long, value_name = "STATES", value_parser = clap::value_parser!(u64).range(1..))]
    record: Option<u64>,
}

/// Runs the simulation, then the canaries.
///
/// # Errors
/// If a seed fails (it is printed, with the way to replay it), or a canary is not caught.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    let simulate = |filter: &str| {
        let mut command = tree.cargo();
        command.args(["test", "--profile", "crash", "--package", "postern-trusted", "--lib"]);
        command.arg(filter).args(["--", "--nocapture"]);
        command
    };
    if let Some(states) = options.record {
        return step("record and replay", || test::record(tree, states));
    }
    if !options.canaries {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        step("crash simulation", || {
            run(simulate("after_any_crash")
                .env("POSTERN_SIM_SEEDS", options.seeds.to_string())
                .env("POSTERN_SIM_FIRST", options.first.to_string())
                .env("POSTERN_SIM_THREADS", threads.to_string()))
        })?;
    }
    step("canaries", || run(&mut simulate("volume::tests::canaries")))
}
