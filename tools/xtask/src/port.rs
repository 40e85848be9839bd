//! `cargo xtask port`: what crossing the port costs, and what its checks do.
//!
//! Times need a quiet machine with two processors. Instructions do not: valgrind counts the same
//! program built as it is and with the enclave's checks of the port left out.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::shell::{Tree, answer, on_path, output, run, step};

/// The program that does it, an example of the trusted crate.
const EXAMPLE: &str = "port_times";
/// Requests of the shorter and the longer count: the difference leaves out what comes once.
const COUNTS: [u64; 2] = [2_000, 12_000];
/// Left-out checks; nothing else is built so, and the simulated enclave refuses to be.
const UNCHECKED: &str = "--cfg postern_unchecked";

/// Measures and prints.
///
/// # Errors
/// If something cannot be built or run.
pub fn all(tree: &Tree) -> Result<()> {
    let checked = step("building", || build(tree, true))?;
    print!("{}", step("times", || answer(&mut Command::new(&checked)))?);
    if !on_path("valgrind") {
        println!(
            "SKIPPED: no instructions counted, for want of valgrind (apt-get install valgrind)"
        );
        return Ok(());
    }
    let unchecked = step("building without checks", || build(tree, false))?;
    let [with, without] =
        step("counting instructions", || Ok([per_request(&checked)?, per_request(&unchecked)?]))?;
    println!("instructions of a request, host's part included: {with:.1}");
    println!("the same without the enclave's checks of the port: {without:.1}");
    Ok(())
}

/// Builds the example; one without checks in a directory of its own.
fn build(tree: &Tree, checked: bool) -> Result<PathBuf> {
    let mut command = tree.cargo();
    command.args(["build", "--release", "--quiet", "--package", "postern-trusted"]);
    command.args(["--example", EXAMPLE]);
    let mut target = tree.target.clone();
    if !checked {
        target.push("port-unchecked");
        command.arg("--target-dir").arg(&target).env("RUSTFLAGS", UNCHECKED);
    }
    run(&mut command)?;
    Ok(target.join("release/examples").join(EXAMPLE))
}

fn per_request(program: &Path) -> Result<f64> {
    let [few, many] = COUNTS;
    let more = instructions(program, many)? - instructions(program, few)?;
    Ok(more / (many - few) as f64)
}

/// Instructions of a whole run.
fn instructions(program: &Path, requests: u64) -> Result<f64> {
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["count", &requests.to_string()]);
    let said = output(&mut command)?.stderr;
    counted(&String::from_utf8_lossy(&said)).context("valgrind told no count of instructions")
}

/// The number in callgrind's line `Collected : N`.
fn counted(said: &str) -> Option<f64> {
    let line = said.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_number_behind_collected() {
        let said = "==7== \n==7== Events    : Ir\n==7== Collected : 2215017\n==7== \n";
        assert_eq!(counted(said), Some(2_215_017.0));
        assert_eq!(counted("==7== Events    : Ir\n"), None);
    }
}
