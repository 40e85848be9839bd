//! `cargo xtask fuzz`: libFuzzer on everything that one side reads from the other, and on the parsers
//! of files: EDL, and what enclave images are made of.
//!
//! The targets are functions of the crates themselves (modules `fuzz`); plain `cargo test` runs the
//! same ones over the seeds. This needs rustup's nightly and cargo-fuzz.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::shell::{Tree, output, run, step};

/// Longest input: a first few bytes and 64 patches.
const MAX_LENGTH: u32 = 259;
/// Seconds of one input that are a hang; none takes a tenth of one.
const HANG: u32 = 60;

/// The target that is built with the whole daemon: minutes, which a short run does not spend.
const OF_DAEMON: &str = "descriptors";

const NO_CARGO_FUZZ: &str = "no cargo-fuzz (cargo install cargo-fuzz)";

/// Options of `cargo xtask fuzz`.
#[derive(Args, Debug)]
pub struct Options {
    /// Seconds for each target
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Only these targets; without any all of them
    target: Vec<String>,
}

/// Runs the targets; what is found stays below `fuzz` in the target directory.
///
/// # Errors
/// If a target finds something, or nightly or cargo-fuzz is missing.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    if let Some(missing) = missing() {
        bail!("cannot fuzz: {missing}");
    }
    targets(tree, options)
}

/// A short run of each target where that is possible; else says loudly that it is left out.
///
/// # Errors
/// If a target finds something.
pub fn short(tree: &Tree) -> Result<()> {
    step("fuzzing", || match missing().and_then(install) {
        Some(missing) => {
            eprintln!("    SKIPPED: {missing}; the tests ran the same targets over their seeds");
            Ok(())
        }
        None => {
            let mut target = names(tree)?;
            target.retain(|name| name != OF_DAEMON);
            eprintln!(
                "    SKIPPED: `{OF_DAEMON}`, which builds long; the tests ran it over its seeds"
            );
            targets(tree, &Options { seconds: 3, target })
        }
    })
}

fn missing() -> Option<&'static str> {
    let works = |words: &[&str]| {
        output(Command::new("rustup").args(["run", "nightly"]).args(words))
            .is_ok_and(|done| done.status.success())
    };
    if !works(&["rustc", "--version"]) {
        return Some("no nightly toolchain (rustup toolchain install nightly)");
    }
    (!works(&["cargo", "fuzz", "--version"])).then_some(NO_CARGO_FUZZ)
}

/// Installs cargo-fuzz if it is that; answers what is missing all the same.
fn install(missing_now: &'static str) -> Option<&'static str> {
    if missing_now != NO_CARGO_FUZZ {
        return Some(missing_now);
    }
    let done = run(Command::new("cargo").args(["install", "--quiet", "--locked", "cargo-fuzz"]));
    if let Err(error) = done {
        eprintln!("    {error:#}");
    }
    missing()
}

fn sources(tree: &Tree) -> PathBuf {
    tree.root.join("trusted/fuzz")
}

/// All targets: those that have seeds.
fn names(tree: &Tree) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(sources(tree).join("seeds"))? {
        let path = entry?.path();
        let name = path.file_stem().context("a seed file without a name")?;
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

fn targets(tree: &Tree, options: &Options) -> Result<()> {
    let (sources, names) = (sources(tree), names(tree)?);
    for name in &options.target {
        ensure!(names.contains(name), "no target `{name}`; there are: {}", names.join(", "));
    }
    let chosen = if options.target.is_empty() { &names } else { &options.target };
    for name in chosen {
        step(&format!("fuzzing {name}"), || target(tree, &sources, name, options.seconds))?;
    }
    Ok(())
}

fn target(tree: &Tree, sources: &Path, name: &str, seconds: u32) -> Result<()> {
    // What libFuzzer adds stays here from run to run.
    let work = tree.target.join("fuzz");
    let (corpus, found) = (work.join("corpus").join(name), work.join("found").join(name));
    std::fs::create_dir_all(&corpus)?;
    std::fs::create_dir_all(&found)?;
    let text = std::fs::read_to_string(sources.join("seeds").join(name).with_extension("hex"))?;
    for (number, seed) in seeds(&text)?.iter().enumerate() {
        std::fs::write(corpus.join(format!("seed-{number}")), seed)?;
    }
    let features: &[&str] = if name == OF_DAEMON { &["--features", "daemon"] } else { &[] };
    run(Command::new("rustup")
        .args(["run", "nightly", "cargo", "fuzz", "run", "--fuzz-dir"])
        .arg(sources)
        .args(features)
        .arg("--target-dir")
        .arg(work.join("target"))
        .arg(name)
        .arg(&corpus)
        .arg("--")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_LENGTH}"))
        .arg(format!("-timeout={HANG}"))
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", found.display()))
        .current_dir(&tree.root)
        // The stable cargo that runs this task must not be the one that builds.
        .env_remove("CARGO")
        .env_remove("RUSTC"))
}

/// The seeds in a file: a line of hexadecimal digits each; `#` begins a remark.
fn seeds(text: &str) -> Result<Vec<Vec<u8>>> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().split_whitespace().collect())
        .filter(|digits: &String| !digits.is_empty())
        .map(|digits| {
            digits
                .as_bytes()
                .chunks(2)
                .map(|pair| {
                    let pair = std::str::from_utf8(pair)?;
                    u8::from_str_radix(pair, 16).with_context(|| format!("not a byte: {pair}"))
                })
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_seeds_and_a_program() {
        let tree = Tree::find().unwrap();
        let names = names(&tree).unwrap();
        let programs = std::fs::read_dir(sources(&tree).join("targets")).unwrap().count();
        assert_eq!(names.len(), programs);
        for name in &names {
            assert!(sources(&tree).join("targets").join(name).with_extension("rs").is_file());
        }
        assert!(names.iter().any(|name| name == OF_DAEMON));
    }

    #[test]
    fn a_seed_is_a_line_of_digits_without_its_remark() {
        let text = "# what\n00 0aff # and why\n\n  7f\n";
        assert_eq!(seeds(text).unwrap(), [vec![0, 10, 255], vec![0x7f]]);
        assert!(seeds("0g").is_err());
    }
}
