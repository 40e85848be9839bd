//! `cargo xtask pause`: how long a program waits when its daemon is killed, or another one takes
//! its place.
//!
//! fio reads at depth 1; its slowest request is the pause. Beside it stand runs in which nothing
//! happens, and what a daemon takes by itself until it listens.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{
    bench::Spread,
    build, fio,
    shell::{Tree, answer, step},
};

/// Options of `cargo xtask pause`.
#[derive(Args, Debug)]
pub struct Options {
    /// Runs of each kind
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// With the eBPF probes, which each daemon loads
    #[arg(long)]
    probes: bool,
}

/// What happens in the middle of a run.
#[derive(Clone, Copy)]
enum Event {
    Nothing,
    Kill,
    Succeed,
}

struct Pause<'a> {
    tree: &'a Tree,
    options: &'a Options,
    directory: PathBuf,
}

/// Measures and reports.
///
/// # Errors
/// If a run fails.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    fio::need()?;
    build::all(tree)?;
    let pause = Pause { tree, options, directory: tree.fresh_directory("pause")? };
    let mut format = Command::new(tree.release().join("postern"));
    format.arg("format").arg(pause.directory.join("v")).args(["--size", "64M"]);
    answer(&mut format)?;
    let mut rows = vec![("a daemon starts, until it listens", pause.starts()?)];
    for (name, event) in [
        ("slowest request, nothing happens", Event::Nothing),
        ("slowest request, kill -9 and started again", Event::Kill),
        ("slowest request, --succeed", Event::Succeed),
    ] {
        rows.push((name, step(name, || pause.rounds(event))?));
    }
    println!("\n| milliseconds | median | quartiles | worst |\n|---|---|---|---|");
    for (name, ms) in rows {
        let Spread { lower, median, upper, max, .. } = ms;
        println!("| {name} | {median:.1} | {lower:.1}..{upper:.1} | {max:.1} |");
    }
    Ok(())
}

impl Pause<'_> {
    fn daemon(&self, socket: &Path, more: &[&str]) -> Result<Child> {
        let mut command = Command::new(self.tree.release().join("posternd"));
        command.arg("--socket").arg(socket).arg("--root").arg(&self.directory).args(more);
        if !self.options.probes {
            command.arg("--no-probes");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().context("no standard output")?)
            .read_line(&mut line)?;
        ensure!(line.starts_with("posternd: ready"), "the daemon did not start");
        Ok(child)
    }

    fn starts(&self) -> Result<Spread> {
        let socket = self.directory.join("start.sock");
        let mut all = Vec::new();
        for _ in 0..self.options.rounds {
            let begun = Instant::now();
            let mut child = self.daemon(&socket, &[])?;
            all.push(begun.elapsed().as_secs_f64() * 1e3);
            child.kill()?;
            child.wait()?;
        }
        Ok(Spread::of(all))
    }

    fn rounds(&self, event: Event) -> Result<Spread> {
        let rounds = 0..self.options.rounds;
        Ok(Spread::of(rounds.map(|_| self.round(event)).collect::<Result<_>>()?))
    }

    /// The slowest request of a run in milliseconds.
    fn round(&self, event: Event) -> Result<f64> {
        let socket = self.directory.join("d.sock");
        let own = match event {
            Event::Succeed => Some(self.daemon(&socket, &[])?),
            Event::Nothing | Event::Kill => None,
        };
        let mut command = Command::new(self.tree.release().join("postern"));
        let mut shown = OsString::from("/sealed/pause=");
        command.arg("run");
        if own.is_some() {
            shown.push("v");
            command.arg("--socket").arg(&socket).arg("--key-file");
            command.arg(self.directory.join("v.key"));
        } else {
            shown.push(self.directory.join("v"));
            if !self.options.probes {
                command.arg("--no-probes");
            }
        }
        let report = self.directory.join("fio.json");
        command.arg("--volume").arg(shown).args([
            "--",
            "fio",
            "--name=pause",
            "--filename=/sealed/pause",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randrw",
            "--bs=4k",
            "--size=64m",
            "--time_based",
            "--runtime=3",
            "--output-format=json",
        ]);
        command.arg(format!("--output={}", report.display()));
        let mut run = command.stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(1500));
        let next = match event {
            Event::Nothing => None,
            Event::Kill => {
                let daemon = child_of(run.id(), "posternd").context("no daemon runs")?;
                answer(Command::new("kill").arg("-9").arg(daemon.to_string()))?;
                None
            }
            Event::Succeed => Some(self.daemon(&socket, &["--succeed"])?),
        };
        let status = run.wait()?;
        for mut daemon in own.into_iter().chain(next) {
            // The one whose place was taken has ended.
            let _ = daemon.kill();
            daemon.wait()?;
        }
        ensure!(status.success(), "fio failed: {status}");
        let text = std::fs::read_to_string(&report)?;
        let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
        let slowest = ["read", "write"]
            .map(|way| json["jobs"][0][way]["clat_ns"]["max"].as_f64().unwrap_or(f64::NAN));
        Ok(slowest[0].max(slowest[1]) / 1e6)
    }
}

/// The child of a process that has this name.
fn child_of(process: u32, name: &str) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let mut children = children.ok()?.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    children.retain(|child| {
        std::fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm.trim() == name)
    });
    children.first()?.parse().ok()
}
