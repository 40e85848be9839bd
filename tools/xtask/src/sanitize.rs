//! `cargo xtask sanitize`: the tests of the crates that have `unsafe`, under AddressSanitizer,
//! ThreadSanitizer and valgrind.
//!
//! A command of its own: it builds nearly everything three times. What is missing on a machine is
//! said loudly and left out. ThreadSanitizer must see the standard library's atomics, or each lock
//! and each channel looks like a race: it is built from source, and left out without `rust-src`.

use std::process::Command;

use anyhow::{Result, bail};
use clap::Args;

use crate::shell::{Tree, on_path, output, run, step};

/// Options of `cargo xtask sanitize`.
#[derive(Args, Debug)]
pub struct Options {
    /// Only these; without any all of them
    #[arg(value_enum)]
    tool: Vec<Tool>,
}

/// What watches the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tool {
    /// AddressSanitizer: bounds and lifetimes of memory
    Address,
    /// ThreadSanitizer: races
    Thread,
    /// valgrind's memcheck: memory that was never written, and what reaches the kernel of it
    Valgrind,
}

/// The one target that all three know.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Tests of one package: its name, which of its targets, which tests of them.
type Tests = (&'static str, &'static [&'static str], &'static [&'static str]);

/// Everything with `unsafe` that a sanitizer can follow. The tests that start whole programs (the
/// preload library's, the daemon's) run programs that are not instrumented, and prove nothing here.
const ADDRESS: [Tests; 6] = [
    ("libaio-sys", &["--tests"], &[]),
    ("postern-edl", &["--lib"], &[]),
    ("postern-trusted", &["--lib"], &["port::", "sync::"]),
    ("postern-trusted", &["--test", "port", "--test", "aio"], &[]),
    ("posternd", &["--lib"], &[]),
    ("postern-sim", &["--lib"], &[]),
];

/// What has threads of its own. The other side of a port and a kernel that writes memory are not
/// seen: nothing is claimed of them.
const THREAD: [Tests; 3] = [
    ("postern-trusted", &["--lib"], &["port::", "sync::"]),
    ("postern-trusted", &["--test", "port"], &[]),
    ("posternd", &["--lib"], &["limits::", "stats::", "histogram::"]),
];

/// Tests that valgrind cannot follow: one hands the kernel an address that leads nowhere, on purpose;
/// the other needs io_pgetevents(2), which valgrind 3.19 does not know.
const NO_VALGRIND: [&str; 4] = [
    "--skip",
    "what_fails_later_comes_back_as_a_negative_number_in_the_event",
    "--skip",
    "queue_run_calls_back_and_pgetevents_takes_a_mask",
];

/// What calls the kernel with memory, and needs no more than a minute of valgrind's slowness. Not what
/// looks at the clock by rustix (most of the daemon): it finds the kernel's vDSO, which valgrind has
/// taken away. Not the simulated enclave, whose tests handle faults of their own.
const VALGRIND: [Tests; 4] = [
    ("libaio-sys", &["--tests"], &NO_VALGRIND),
    ("postern-trusted", &["--lib"], &["port::", "sync::"]),
    (
        "postern-trusted",
        &["--test", "port"],
        &["flow::", "hostile::", "limits::", "short::", "succession::"],
    ),
    ("posternd", &["--lib"], &["region::", "histogram::", "volumes::", "records::", "kept::"]),
];

/// Runs the tools.
///
/// # Errors
/// If one finds something; if one was asked for by name and is missing.
pub fn all(tree: &Tree, options: &Options) -> Result<()> {
    let asked = !options.tool.is_empty();
    for tool in [Tool::Address, Tool::Thread, Tool::Valgrind] {
        if asked && !options.tool.contains(&tool) {
            continue;
        }
        match missing(tool) {
            Some(missing) if asked => bail!("cannot run {tool:?}: {missing}"),
            Some(missing) => eprintln!("==> {tool:?}\n    SKIPPED: {missing}"),
            None => {
                let all: &[Tests] = match tool {
                    Tool::Address => &ADDRESS,
                    Tool::Thread => &THREAD,
                    Tool::Valgrind => &VALGRIND,
                };
                for tests in all {
                    let (package, targets, _) = tests;
                    let name = format!("{tool:?} of {package} {}", targets.join(" "));
                    step(&name, || run(&mut command(tree, tool, tests)))?;
                }
            }
        }
    }
    Ok(())
}

fn missing(tool: Tool) -> Option<&'static str> {
    if tool == Tool::Valgrind {
        return (!on_path("valgrind")).then_some("no valgrind (apt-get install valgrind)");
    }
    let Ok(said) =
        output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))
    else {
        return Some("no rustup");
    };
    if !said.status.success() {
        return Some("no nightly toolchain (rustup toolchain install nightly)");
    }
    let sysroot = String::from_utf8_lossy(&said.stdout).trim().to_owned();
    let source = std::path::Path::new(&sysroot).join("lib/rustlib/src/rust/library/std");
    (tool == Tool::Thread && !source.is_dir()).then_some(
        "no sources of the standard library (rustup component add rust-src --toolchain nightly)",
    )
}

fn command(tree: &Tree, tool: Tool, (package, targets, filters): &Tests) -> Command {
    let mut command = match tool {
        Tool::Valgrind => tree.cargo(),
        Tool::Address | Tool::Thread => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]).current_dir(&tree.root);
            // The stable cargo that runs this task must not be the one that builds.
            command.env_remove("CARGO").env_remove("RUSTC");
            command
        }
    };
    command.args(["test", "--quiet", "--package", package]).args(*targets);
    // A target by name keeps build scripts and macros out of it.
    command.args(["--target", TARGET]);
    match tool {
        Tool::Address => {
            command.env("RUSTFLAGS", "-Zsanitizer=address").env("ASAN_OPTIONS", "detect_leaks=0");
        }
        Tool::Thread => {
            command.arg("-Zbuild-std").env("RUSTFLAGS", "-Zsanitizer=thread");
            command.env("TSAN_OPTIONS", "halt_on_error=1");
        }
        Tool::Valgrind => {
            let runner = format!("CARGO_TARGET_{}_RUNNER", TARGET.to_uppercase().replace('-', "_"));
            command.env(runner, "valgrind --quiet --error-exitcode=99 --fair-sched=yes");
        }
    }
    let directory = format!("sanitize/{}", format!("{tool:?}").to_lowercase());
    command.arg("--target-dir").arg(tree.target.join(directory));
    command.arg("--").args(*filters);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_package_that_is_watched_is_one_of_the_workspace() {
        let root = Tree::find().unwrap().root;
        for (package, _, _) in ADDRESS.iter().chain(&THREAD).chain(&VALGRIND) {
            let lock = std::fs::read_to_string(root.join("Cargo.lock")).unwrap();
            assert!(lock.contains(&format!("name = \"{package}\"\nversion = ")), "{package}");
        }
    }
}
