//! `cargo xtask bench`: fio on a plain file against fio on a sealed volume, side by side.
//!
//! The disk drifts by tens of percent within minutes, so only neighbours are compared: each pair
//! is one run of either way, in turns first, and what is reported is the ratio within pairs with
//! its spread. Both files lie in one directory and are written in full before anything is measured.

mod numbers;
mod opening;
mod report;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

pub use self::numbers::Spread;
use self::numbers::{cpu_of_children, median};
use crate::{
    build,
    fio::{self, Outcome, Way},
    shell::{Tree, answer, show, step},
};

/// Path under which the guest sees the volume.
const GUEST_PATH: &str = "/sealed/bench";
/// Runs that tell what starting and stopping costs by itself.
const IDLE_RUNS: usize = 3;

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Pairs of runs for each case
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Length of one run in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runtime: u32,
    /// Only these cases; may be repeated. Without it all: `--case list` names them
    #[arg(long)]
    case: Vec<String>,
    /// Size of both files, as fio writes it
    #[arg(long, default_value = "1g")]
    size: String,
    /// Where both files lie; without it target/bench
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Run the daemon without its eBPF probes
    #[arg(long)]
    no_probes: bool,
    /// Save every number as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Save the table as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// A load.
pub struct Case {
    name: &'static str,
    rw: &'static str,
    bs: &'static str,
    depth: u32,
    /// fdatasync after each write.
    sync: bool,
}

const CASES: [Case; 9] = [
    Case { name: "randread-1", rw: "randread", bs: "4k", depth: 1, sync: false },
    Case { name: "randread-32", rw: "randread", bs: "4k", depth: 32, sync: false },
    Case { name: "randread-128", rw: "randread", bs: "4k", depth: 128, sync: false },
    Case { name: "randwrite-1", rw: "randwrite", bs: "4k", depth: 1, sync: false },
    Case { name: "randwrite-32", rw: "randwrite", bs: "4k", depth: 32, sync: false },
    Case { name: "randwrite-128", rw: "randwrite", bs: "4k", depth: 128, sync: false },
    Case { name: "read-1m", rw: "read", bs: "1m", depth: 8, sync: false },
    Case { name: "write-1m", rw: "write", bs: "1m", depth: 8, sync: false },
    Case { name: "sync", rw: "randwrite", bs: "4k", depth: 1, sync: true },
];

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Requests per second.
    iops: f64,
    /// Bytes per second.
    rate: f64,
    /// Microseconds of CPU per request, of all processes of the run.
    cpu_us: f64,
}

/// A case, measured.
pub struct Measured {
    case: &'static Case,
    /// Raw and Postern, side by side.
    pairs: Vec<(Run, Run)>,
}

impl Measured {
    /// Postern's requests per second over raw's, pair by pair.
    fn ratios(&self) -> Spread {
        Spread::of(self.pairs.iter().map(|(raw, postern)| postern.iops / raw.iops).collect())
    }
}

/// Measures and reports.
///
/// # Errors
/// If a run fails.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    let cases = choose(&options.case)?;
    let Some(cases) = cases else { return Ok(()) };
    fio::need()?;
    build::all(tree)?;
    let directory = match &options.directory {
        Some(directory) => directory.clone(),
        None => tree.fresh_directory("bench")?,
    };
    let bench = Bench { tree, options, directory: &directory };
    bench.lay_out()?;
    let idle = bench.idle()?;
    let mut measured = Vec::with_capacity(cases.len());
    for case in cases {
        measured.push(step(case.name, || bench.measure(case, idle))?);
    }
    let openings = step("making and opening", || opening::measure(tree, &directory))?;
    let machine = report::machine(&directory, options.no_probes);
    let table = report::markdown(&machine, &measured, &openings, options);
    print!("\n{table}");
    if let Some(file) = &options.markdown {
        save(file, &table)?;
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

/// The cases named; `None` if only their names were wanted.
fn choose(names: &[String]) -> Result<Option<Vec<&'static Case>>> {
    if names.iter().any(|name| name == "list") {
        for case in &CASES {
            println!("{:<14} {} {} at depth {}", case.name, case.rw, case.bs, case.depth);
        }
        return Ok(None);
    }
    if names.is_empty() {
        return Ok(Some(CASES.iter().collect()));
    }
    names
        .iter()
        .map(|name| {
            CASES
                .iter()
                .find(|case| case.name == name)
                .with_context(|| format!("no case `{name}`: see --case list"))
        })
        .collect::<Result<_>>()
        .map(Some)
}

/// Seconds of CPU that a run of either way costs apart from its requests.
#[derive(Clone, Copy, Debug)]
struct Idle {
    raw: f64,
    postern: f64,
}

struct Bench<'a> {
    tree: &'a Tree,
    options: &'a Options,
    directory: &'a Path,
}

impl Bench<'_> {
    fn raw_file(&self) -> PathBuf {
        self.directory.join("raw")
    }

    fn volume(&self) -> PathBuf {
        self.directory.join("sealed.vol")
    }

    fn way(&self, postern: bool) -> Way {
        if !postern {
            return Way::Raw;
        }
        let mut way = fio::through(GUEST_PATH, &self.volume());
        if let (true, Way::Postern(before)) = (self.options.no_probes, &mut way) {
            before.push("--no-probes".into());
        }
        way
    }

    fn arguments(&self, postern: bool, more: &[&str]) -> Vec<String> {
        let file =
            if postern { GUEST_PATH.to_owned() } else { self.raw_file().display().to_string() };
        let filename = format!("--filename={file}");
        let size = format!("--size={}", self.options.size);
        let fixed = [
            "--name=bench",
            &filename,
            &size,
            "--ioengine=libaio",
            "--direct=1",
            "--randrepeat=0",
            "--norandommap",
        ];
        fixed.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }

    /// One run, with the CPU time of all its processes in seconds.
    fn once(&self, postern: bool, more: &[&str]) -> Result<(Outcome, f64)> {
        let before = cpu_of_children();
        let arguments = self.arguments(postern, more);
        let outcome = fio::measure(self.tree, &self.way(postern), &arguments, self.directory)?;
        ensure!(
            outcome.error == 0 && outcome.errors == 0,
            "fio failed with errno {}",
            outcome.error
        );
        // The launcher waits for the program and the daemon, fio for its jobs, and we for them.
        Ok((outcome, cpu_of_children() - before))
    }

    /// Writes both files in full: first in order, then once more in pieces, so that the volume's
    /// spare places are laid out on the host too.
    fn lay_out(&self) -> Result<()> {
        step("lay out both files", || {
            let mut format = Command::new(self.tree.release().join("postern"));
            let _ = std::fs::remove_file(self.volume());
            let size = self.options.size.to_uppercase();
            answer(format.arg("format").arg(self.volume()).args(["--size", &size]))?;
            for postern in [false, true] {
                self.once(postern, &["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"])?;
                self.once(
                    postern,
                    &["--rw=randwrite", "--bs=64k", "--iodepth=32", "--end_fsync=1"],
                )?;
            }
            Ok(())
        })
    }

    fn idle(&self) -> Result<Idle> {
        step("cost of starting and stopping", || {
            let of = |postern| -> Result<f64> {
                let few = ["--rw=read", "--bs=4k", "--number_ios=1"];
                let runs: Vec<f64> = (0..IDLE_RUNS)
                    .map(|_| self.once(postern, &few).map(|(_, cpu)| cpu))
                    .collect::<Result<_>>()?;
                Ok(median(&runs))
            };
            Ok(Idle { raw: of(false)?, postern: of(true)? })
        })
    }

    fn measure(&self, case: &'static Case, idle: Idle) -> Result<Measured> {
        let mut pairs = Vec::new();
        for pair in 0..self.options.pairs {
            let raw_first = pair % 2 == 0;
            let first = self.run(case, !raw_first, idle)?;
            let second = self.run(case, raw_first, idle)?;
            let (raw, postern) = if raw_first { (first, second) } else { (second, first) };
            eprintln!(
                "    pair {}: raw {:.0}/s, postern {:.0}/s, ratio {:.3}",
                pair + 1,
                raw.iops,
                postern.iops,
                postern.iops / raw.iops
            );
            pairs.push((raw, postern));
        }
        Ok(Measured { case, pairs })
    }

    fn run(&self, case: &Case, postern: bool, idle: Idle) -> Result<Run> {
        let runtime = format!("--runtime={}", self.options.runtime);
        let depth = format!("--iodepth={}", case.depth);
        let (rw, bs) = (format!("--rw={}", case.rw), format!("--bs={}", case.bs));
        let sync = if case.sync { "--fdatasync=1" } else { "--fdatasync=0" };
        let (outcome, cpu) =
            self.once(postern, &[&rw, &bs, &depth, "--time_based", &runtime, sync])?;
        if outcome.ios() == 0 {
            bail!("fio made no request");
        }
        let base = if postern { idle.postern } else { idle.raw };
        let ios = outcome.ios() as f64;
        Ok(Run {
            iops: outcome.iops(),
            rate: outcome.rate(),
            cpu_us: (cpu - base).max(0.0) * 1e6 / ios,
        })
    }
}
