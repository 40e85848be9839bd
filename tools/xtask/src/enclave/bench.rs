//! `cargo xtask enclave bench`: what the wall costs, what sealing costs behind it, and requests of
//! 4 KiB inside an enclave image against the simulated enclave and the plain file, in turns.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::demo::Demo;
use crate::{
    bench::{Spread, median},
    bpf, build,
    fio::{self, Way},
    shell::{Tree, answer, output, step},
};

/// Options of `cargo xtask enclave bench`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Rounds of each case: one run each of the plain file, the simulated enclave and the image
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of a run of fio in seconds
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    runtime: u32,
}

const SIZE_MIB: u64 = 256;
const GUEST_PATH: &str = "/sealed/bench";
/// Share of writes, depth, and requests of a run inside the image: about a second each.
const CASES: [(&str, u32, u32, u32); 4] = [
    ("randread", 0, 1, 15_000),
    ("randread", 0, 32, 60_000),
    ("randwrite", 100, 1, 15_000),
    ("randwrite", 100, 32, 60_000),
];

/// Measures and prints tables.
///
/// # Errors
/// If a run fails.
pub fn all(
    tree: &Tree,
    toolchain: &bpf::Toolchain,
    images: &Path,
    options: &Options,
) -> Result<()> {
    fio::need()?;
    build::all(tree)?;
    let soft = super::build_into(tree, toolchain, "enclave-without-lvi", Some(WITHOUT_LVI))?;
    step("the wall, and the cipher behind it", || wall(tree, images, &soft))?;
    step("requests of 4 KiB", || requests(tree, images, options))
}

/// The flags of `trusted/enclave/.cargo/config.toml`, and no hardening.
const WITHOUT_LVI: &str =
    "-Ctarget-feature=+aes,+pclmulqdq,+ssse3,+sse4.1,-lvi-cfi,-lvi-load-hardening";

fn wall(tree: &Tree, images: &Path, soft: &Path) -> Result<()> {
    let program = "examples/measure";
    for (what, image, options) in [
        ("fast", images.join(program), &[][..]),
        ("exact (--exact)", images.join(program), &["--exact"]),
        ("fast, without LVI hardening", soft.join(program), &[]),
    ] {
        let mut command = Command::new(tree.release().join("postern"));
        command.args(["enclave", "run", "--counts"]).args(options).arg(image);
        let done = output(&mut command)?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        println!("{what}:\n{}", String::from_utf8_lossy(&done.stdout));
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        println!("{}", said.lines().last().unwrap_or_default());
    }
    let mut outside = tree.cargo();
    outside.args(["run", "--quiet", "--release", "--package", "postern-trusted"]);
    println!("outside:\n{}", answer(outside.args(["--example", "aead"]))?);
    Ok(())
}

fn requests(tree: &Tree, images: &Path, options: &Options) -> Result<()> {
    let scratch = tree.fresh_directory("enclave-bench")?;
    let image = images.join("postern-enclave");
    let demo = Demo { tree, image: &image, scratch: scratch.clone() };
    let (raw, sealed) = (scratch.join("raw"), scratch.join("simulated.vol"));
    for (volume, key) in [(demo.volume(), Some(demo.key()?)), (sealed.clone(), None)] {
        let mut format = demo.postern(&["format"]);
        format.args(["--size", &format!("{SIZE_MIB}M")]).arg(volume);
        if let Some(key) = key {
            format.arg("--key-file").arg(key);
        }
        answer(&mut format)?;
    }
    let Way::Postern(mut before) = fio::through(GUEST_PATH, &sealed) else { return Ok(()) };
    before.push("--no-probes".into());
    let ways = [(Way::Raw, raw), (Way::Postern(before), PathBuf::from(GUEST_PATH))];
    let _daemon = demo.daemon_with(&["--no-probes"])?;
    for (way, file) in &ways {
        let whole = job(file, &["--rw=write", "--bs=1m", "--iodepth=8"]);
        fio::measure(tree, way, &whole, &scratch)?;
    }
    work(&demo, 100, 32, 100_000)?;

    println!("| case | raw | simulated enclave | its ratio | enclave image | its ratio |");
    println!("|---|---|---|---|---|---|");
    for (name, writes, depth, count) in CASES {
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..options.rounds {
            let time = format!("--runtime={}", options.runtime);
            let (rw, depth_word) = (format!("--rw={name}"), format!("--iodepth={depth}"));
            for ((way, file), rates) in ways.iter().zip(&mut rates) {
                let load = job(file, &[&rw, &depth_word, &time, "--time_based", "--bs=4k"]);
                rates.push(fio::measure(tree, way, &load, &scratch)?.iops());
            }
            rates[2].push(work(&demo, writes, depth, count)?);
        }
        let ratio = |at: usize| {
            let spread = Spread::of(rates[at].iter().zip(&rates[0]).map(|(a, b)| a / b).collect());
            format!("{:.2} ({:.2}..{:.2})", spread.median, spread.min, spread.max)
        };
        let kilo = |at: usize| format!("{:.1} k/s", median(&rates[at]) / 1000.0);
        println!(
            "| {name} 4k depth {depth} | {} | {} | {} | {} | {} |",
            kilo(0),
            kilo(1),
            ratio(1),
            kilo(2),
            ratio(2)
        );
    }
    Ok(())
}

fn job(file: &Path, more: &[&str]) -> Vec<String> {
    let fixed = ["--name=bench", "--ioengine=libaio", "--direct=1", "--eta=never", "--norandommap"];
    let mut job: Vec<String> = fixed.iter().chain(more).map(|word| (*word).to_owned()).collect();
    job.extend([format!("--filename={}", file.display()), format!("--size={SIZE_MIB}m")]);
    job
}

/// Requests a second inside the image.
fn work(demo: &Demo<'_>, writes: u32, depth: u32, count: u32) -> Result<f64> {
    let blocks = (SIZE_MIB << 8).to_string();
    let mut command = demo.postern(&["enclave", "run", "--daemon"]);
    command.arg(demo.socket()).arg(demo.image).args(["--", "work", "data", "--plain", "1"]);
    command.args(["--blocks", &blocks, "--writes", &writes.to_string()]);
    command.args(["--depth", &depth.to_string(), "--requests", &count.to_string()]);
    let said = answer(command.stdin(Stdio::from(demo.key_file()?)))?;
    let line = said.lines().find(|line| line.contains(" requests/s ")).context("no rate")?;
    line.split(' ').next().and_then(|rate| rate.parse().ok()).context("no rate")
}
