//! `cargo xtask test`: everything, from a bare checkout.

use anyhow::Result;
use clap::Args;

use crate::{
    build, check, enclave, fuzz, setup,
    shell::{Tree, run, step},
};

/// Tells the end-to-end tests where the release parts lie; without it they skip.
const PARTS_VARIABLE: &str = "POSTERN_E2E_PARTS";

/// Sets up, builds, checks, and runs every test.
///
/// # Errors
/// At the first thing that fails.
pub fn all(tree: &Tree) -> Result<()> {
    setup::all(tree)?;
    build::all(tree)?;
    check::all(tree)?;
    step("tests", || {
        // The preload library's tests run the built parts; `cargo test` alone does not build them.
        run(tree.cargo().args(["build", "--workspace", "--quiet"]))?;
        run(tree.cargo().args(["test", "--workspace", "--quiet"]).env_remove(PARTS_VARIABLE))
    })?;
    fuzz::short(tree)?;
    end_to_end(tree)?;
    enclave::if_possible(tree)?;
    step("conformance tests", || conformance_tests(tree, &[]))
}

/// The end-to-end tests alone, against the parts that were built last.
///
/// # Errors
/// If one fails.
pub fn end_to_end(tree: &Tree) -> Result<()> {
    step("end-to-end tests", || {
        // What an interrupted run may have left.
        tree.fresh_directory("release/e2e")?;
        against_parts(tree, "postern", "e2e", &[])?;
        // Programs under a daemon that misbehaves.
        against_parts(tree, "postern-hostile-daemon", "process", &[])
    })
}

/// How much of the conformance tests to run.
#[derive(Args, Clone, Debug)]
pub struct Conformance {
    /// Random sequences of calls, beside all fixed cases
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of their seeds
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
}

/// The conformance tests alone, against the parts that were built last, with many random
/// sequences.
///
/// # Errors
/// If one fails.
pub fn conformance(tree: &Tree, options: &Conformance) -> Result<()> {
    let Conformance { seeds, first_seed } = options;
    step("conformance tests", || {
        conformance_tests(
            tree,
            &[
                ("POSTERN_CONFORMANCE_SEEDS", &seeds.to_string()),
                ("POSTERN_CONFORMANCE_SEED", &first_seed.to_string()),
            ],
        )
    })
}

/// Records the host writes of one long run, and opens this many states that a power cut may leave.
///
/// # Errors
/// If a state has lost something.
pub fn record(tree: &Tree, states: u64) -> Result<()> {
    tree.fresh_directory("release/e2e")?;
    run(tree
        .cargo()
        .args(["test", "--package", "postern", "--test", "e2e", "record::"])
        .args(["--", "--nocapture"])
        .env("POSTERN_RECORD_STATES", states.to_string())
        .env("POSTERN_RECORD_WRITES", (states / 4 + 100).to_string())
        .env(PARTS_VARIABLE, tree.release()))
}

fn conformance_tests(tree: &Tree, variables: &[(&str, &str)]) -> Result<()> {
    tree.fresh_directory("release/e2e")?;
    against_parts(tree, "postern-conformance", "conformance", variables)
}

fn against_parts(tree: &Tree, package: &str, test: &str, variables: &[(&str, &str)]) -> Result<()> {
    run(tree
        .cargo()
        .args(["test", "--package", package, "--test", test, "--"])
        .args(["--nocapture", "--test-threads", "2"])
        .envs(variables.iter().copied())
        .env(PARTS_VARIABLE, tree.release()))
}
