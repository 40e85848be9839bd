//! Developer tasks: the same commands for a person and for continuous integration.

mod bench;
mod bpf;
mod build;
mod check;
mod crash;
mod demo;
mod enclave;
mod fio;
mod fuzz;
mod hostile;
mod pause;
mod port;
mod proofs;
mod sanitize;
mod setup;
mod shell;
mod stages;
mod test;
#[cfg(test)]
mod threats;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::shell::Tree;

/// Tasks of this repository. The first two to know: `demo` shows it, `test` proves it.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run fio on a sealed volume; show latency per stage; prove sealing and integrity
    Demo,
    /// Set up, build, check, and run every test
    Test,
    /// Run the end-to-end tests alone, on the parts that were built last
    E2e,
    /// Native AIO inside against the kernel's, case by case; run `build` first
    Conformance(test::Conformance),
    /// Measure against raw I/O, in interleaved pairs
    Bench(bench::Options),
    /// How long a program waits when its daemon is killed, or another one takes its place
    Pause(pause::Options),
    /// What crossing the port costs, and its checks; wants a quiet machine with two processors
    Port,
    /// Crash the simulated volume at tens of thousands of points; break each rule on purpose
    Crash(crash::Options),
    /// A sealed volume against a host that breaks every rule, for millions of steps
    Hostile(hostile::Options),
    /// Fuzz every parser of what the other side says (nightly, cargo-fuzz)
    Fuzz(fuzz::Options),
    /// Programs inside a genuine SGX enclave image: build, run, test
    #[command(subcommand)]
    Enclave(enclave::Task),
    /// Run the tests of what has `unsafe` under sanitizers and valgrind
    Sanitize(sanitize::Options),
    /// Build the release parts side by side in target/release
    Build,
    /// Check format, lints and documentation
    Check,
    /// Install what is missing: fio, strace, libaio, the eBPF toolchain
    Setup,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = Tree::find().and_then(|tree| match cli.task {
        Task::Demo => demo::all(&tree),
        Task::Test => test::all(&tree),
        Task::E2e => test::end_to_end(&tree),
        Task::Conformance(options) => test::conformance(&tree, &options),
        Task::Bench(options) => bench::all(&tree, &options),
        Task::Pause(options) => pause::all(&tree, &options),
        Task::Port => port::all(&tree),
        Task::Crash(options) => crash::all(&tree, &options),
        Task::Hostile(options) => hostile::all(&tree, &options),
        Task::Fuzz(options) => fuzz::all(&tree, &options),
        Task::Enclave(task) => enclave::all(&tree, task),
        Task::Sanitize(options) => sanitize::all(&tree, &options),
        Task::Build => build::all(&tree),
        Task::Check => check::all(&tree),
        Task::Setup => setup::all(&tree),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
