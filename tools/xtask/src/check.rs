//! `cargo xtask check`: layout of the text, lints, documentation.

use anyhow::Result;

use crate::shell::{Tree, run, step};

/// Checks the whole workspace, the cheapest first.
///
/// # Errors
/// At the first check that fails.
pub fn all(tree: &Tree) -> Result<()> {
    step("format", || {
        run(tree.cargo().args(["fmt", "--all", "--", "--check"]))?;
        // The probes are a workspace of their own.
        run(tree.cargo().args(["fmt", "--manifest-path", "ebpf/Cargo.toml", "--", "--check"]))
    })?;
    step("clippy", || {
        run(tree
            .cargo()
            .args(["clippy", "--workspace", "--all-targets", "--quiet", "--"])
            .args(["--deny", "warnings"]))
    })?;
    step("documentation", || {
        run(tree
            .cargo()
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "--deny warnings"))
    })
}
