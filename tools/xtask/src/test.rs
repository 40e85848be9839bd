//! `cargo xtask test`: everything, from a bare checkout.

use anyhow::Result;

use crate::{
    build, check, fuzz, setup,
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
        run(tree.cargo().args(["test", "--workspace", "--quiet"]).env_remove(PARTS_VARIABLE))
    })?;
    fuzz::short(tree)?;
    end_to_end(tree)
}

/// The end-to-end tests alone, against the parts that were built last.
///
/// # Errors
/// If one fails.
pub fn end_to_end(tree: &Tree) -> Result<()> {
    step("end-to-end tests", || {
        // What an interrupted run may have left.
        tree.fresh_directory("release/e2e")?;
        against_parts(tree, "postern", "e2e")
    })
}

/// The conformance tests, against the parts that were built last. Not among `test` while some
/// cases differ: docs/COMPATIBILITY.md says which.
///
/// # Errors
/// If one fails.
pub fn conformance(tree: &Tree) -> Result<()> {
    step("conformance tests", || {
        tree.fresh_directory("release/e2e")?;
        against_parts(tree, "postern-conformance", "conformance")
    })
}

fn against_parts(tree: &Tree, package: &str, test: &str) -> Result<()> {
    run(tree
        .cargo()
        .args(["test", "--package", package, "--test", test, "--"])
        .args(["--nocapture", "--test-threads", "2"])
        .env(PARTS_VARIABLE, tree.release()))
}
