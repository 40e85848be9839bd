//! `cargo xtask bench`: fio on a plain file against fio on a sealed volume and on what else seals
//! data, side by side.
//!
//! The disk drifts by tens of percent within minutes, so only neighbours are compared: each round
//! is one run of every target, in another order each time, and what is reported is the ratio to
//! one target (the plain file, unless told otherwise) within rounds, with its spread. All files lie on one file system and are written
//! in full before anything is measured.

mod case;
mod numbers;
mod opening;
mod plot;
mod report;
mod substrate;
mod target;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

pub use self::numbers::{Spread, median};
use self::{
    case::Case,
    numbers::{Usage, confidence},
    substrate::{Kind, Substrate, megabytes},
    target::{Ready, Target, prepare},
};
use crate::{
    build,
    fio::{self, Outcome},
    shell::{Tree, show, step},
};

/// Runs that tell what starting and stopping costs by itself.
const IDLE_RUNS: usize = 3;

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Rounds of runs for each case; from six on the report has confidence intervals
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of one run in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runtime: u32,
    /// Only cases whose names begin so; may be repeated. A wrong name lists all. Without it the usual
    /// ones
    #[arg(long)]
    case: Vec<String>,
    /// Every case there is
    #[arg(long, conflicts_with = "case")]
    all_cases: bool,
    /// What is measured; may be repeated
    #[arg(long, value_enum, default_values_t = [Target::Postern])]
    target: Vec<Target>,
    /// What it is compared with
    #[arg(long, value_enum, default_value_t = Target::Raw)]
    against: Target,
    /// Every target whose programs are installed
    #[arg(long, conflicts_with = "target")]
    all_targets: bool,
    /// What the files lie on
    #[arg(long, value_enum, default_value_t)]
    on: Kind,
    /// Size of each file, as fio writes it
    #[arg(long, default_value = "1g")]
    size: String,
    /// Where the files lie; without it target/bench
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Save every number as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Save the tables as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the ratios as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Requests per second.
    iops: f64,
    /// Bytes per second.
    rate: f64,
    /// Microseconds of CPU per request, of all processes of the run.
    cpu_us: f64,
    /// Context switches per request.
    switches: f64,
    /// Bytes written to the host per byte that fio wrote; NaN where it wrote none.
    written: f64,
}

/// A case, measured: for each target its runs, round by round. With the first one the others are
/// compared.
pub struct Measured {
    case: Case,
    runs: Vec<(Target, Vec<Run>)>,
}

impl Measured {
    /// A target's requests per second over the first one's, round by round.
    fn ratios(&self, target: usize) -> Vec<f64> {
        self.over_first(target, |run| run.iops)
    }

    /// The same of CPU per request.
    fn cpu_ratios(&self, target: usize) -> Vec<f64> {
        self.over_first(target, |run| run.cpu_us)
    }

    fn over_first(&self, target: usize, of: fn(&Run) -> f64) -> Vec<f64> {
        let first = &self.runs[0].1;
        self.runs[target].1.iter().zip(first).map(|(run, first)| of(run) / of(first)).collect()
    }
}

/// Measures and reports.
///
/// # Errors
/// If a run fails.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    let cases = case::choose(&options.case, options.all_cases)?;
    fio::need()?;
    let targets = targets(options)?;
    build::all(tree)?;
    let room = (megabytes(&options.size)? + 200) * 2 * targets.len() as u64;
    let on = Substrate::new(tree, options.on, options.directory.as_deref(), room)?;
    let bench = Bench { tree, options, directory: &on.directory };
    let ready = step("lay out the files", || {
        targets.into_iter().map(|target| bench.lay_out(target)).collect::<Result<Vec<_>>>()
    })?;
    let idle = step("cost of starting and stopping", || {
        ready.iter().map(|ready| bench.idle(ready)).collect::<Result<Vec<_>>>()
    })?;
    let mut measured = Vec::with_capacity(cases.len());
    for case in cases {
        let name = case.name.clone();
        measured.push(step(&name, || bench.measure(case, &ready, &idle))?);
    }
    drop(ready);
    let openings = if options.case.is_empty() {
        step("making and opening", || opening::measure(tree, &on.directory))?
    } else {
        Vec::new()
    };
    let machine = report::machine(&on.directory);
    let tables = report::markdown(&machine, &measured, &openings, options);
    print!("\n{tables}");
    if let Some(file) = &options.markdown {
        save(file, &tables)?;
    }
    if let Some(file) = &options.svg {
        save(file, &plot::ratios(&measured, options.against)?)?;
    }
    if let Some(file) = &options.json {
        save(file, &report::json(&machine, &measured, &openings, options)?)?;
    }
    Ok(())
}

fn save(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("    saved {}", show(file));
    Ok(())
}

/// What is compared with, and what is wanted beside it.
fn targets(options: &Options) -> Result<Vec<Target>> {
    let wanted = if options.all_targets {
        clap::ValueEnum::value_variants().to_vec()
    } else {
        options.target.clone()
    };
    let mut targets = Vec::new();
    for target in std::iter::once(options.against).chain(wanted) {
        match target.missing() {
            Some(missing) if options.all_targets => {
                eprintln!("    left out: {}, {missing} is not installed", target.name());
            }
            Some(missing) => bail!("{} needs {missing}: install it", target.name()),
            None if targets.contains(&target) => {}
            None => targets.push(target),
        }
    }
    Ok(targets)
}

struct Bench<'a> {
    tree: &'a Tree,
    options: &'a Options,
    directory: &'a Path,
}

impl Bench<'_> {
    /// One run, with what all its processes used.
    fn once(&self, ready: &Ready, more: &[&str]) -> Result<(Outcome, Usage)> {
        let (before, server) = (Usage::of_children(), ready.server_cpu());
        let size = format!("--size={}", self.options.size);
        let fixed = ["--name=bench", &size, "--randrepeat=0", "--norandommap"];
        let arguments: Vec<String> = fixed
            .iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .chain(ready.arguments.iter().cloned())
            .collect();
        let outcome = fio::measure(self.tree, &ready.way, &arguments, self.directory)?;
        ensure!(
            outcome.error == 0 && outcome.errors == 0,
            "fio failed with errno {} on {}",
            outcome.error,
            ready.target.name()
        );
        // The launcher waits for the program and the daemon, fio for its jobs, and we for them.
        let mut usage = Usage::of_children().since(before);
        usage.cpu += ready.server_cpu() - server;
        Ok((outcome, usage))
    }

    /// Writes a target's file in full: first in order, then once more in pieces, so that the spare
    /// places of a volume are laid out on the host too.
    fn lay_out(&self, target: Target) -> Result<Ready> {
        let ready = prepare(self.tree, target, &self.options.size, self.directory)
            .with_context(|| format!("cannot prepare {}", target.name()))?;
        self.once(&ready, &["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"])?;
        self.once(&ready, &["--rw=randwrite", "--bs=64k", "--iodepth=32", "--end_fsync=1"])?;
        Ok(ready)
    }

    /// What a run uses apart from its requests.
    fn idle(&self, ready: &Ready) -> Result<Usage> {
        let few = ["--rw=read", "--bs=4k", "--number_ios=1"];
        let runs: Vec<Usage> = (0..IDLE_RUNS)
            .map(|_| self.once(ready, &few).map(|(_, usage)| usage))
            .collect::<Result<_>>()?;
        let of = |pick: fn(&Usage) -> f64| median(&runs.iter().map(pick).collect::<Vec<_>>());
        Ok(Usage { cpu: of(|u| u.cpu), switches: of(|u| u.switches), written: of(|u| u.written) })
    }

    fn measure(&self, case: Case, ready: &[Ready], idle: &[Usage]) -> Result<Measured> {
        let able = ready.iter().zip(idle).filter(|(ready, _)| ready.target.does(&case));
        let able: Vec<(&Ready, Usage)> = able.map(|(ready, idle)| (ready, *idle)).collect();
        let mut runs: Vec<(Target, Vec<Run>)> =
            able.iter().map(|(ready, _)| (ready.target, Vec::new())).collect();
        for round in 0..self.options.rounds as usize {
            let mut said = format!("    round {}:", round + 1);
            for turn in 0..able.len() {
                // Each target comes first as often as any other.
                let at = (turn + round) % able.len();
                let (ready, idle) = able[at];
                let run = self.run(&case, ready, idle)?;
                runs[at].1.push(run);
            }
            let first = runs[0].1[round].iops;
            for (target, runs) in &runs {
                let iops = runs[round].iops;
                said += &format!(" {} {iops:.0}/s ({:.3})", target.name(), iops / first);
            }
            eprintln!("{said}");
        }
        Ok(Measured { case, runs })
    }

    fn run(&self, case: &Case, ready: &Ready, idle: Usage) -> Result<Run> {
        let runtime = format!("--runtime={}", self.options.runtime);
        let mut arguments: Vec<&str> = case.arguments.iter().map(String::as_str).collect();
        arguments.extend(["--time_based", &runtime]);
        let (outcome, usage) = self.once(ready, &arguments)?;
        if outcome.ios() == 0 {
            bail!("fio made no request");
        }
        let usage = usage.since(idle);
        let ios = outcome.ios() as f64;
        Ok(Run {
            iops: outcome.iops(),
            rate: outcome.rate(),
            cpu_us: usage.cpu.max(0.0) * 1e6 / ios,
            switches: usage.switches.max(0.0) / ios,
            written: if outcome.write.bytes == 0 {
                f64::NAN
            } else {
                usage.written.max(0.0) / outcome.write.bytes as f64
            },
        })
    }
}
