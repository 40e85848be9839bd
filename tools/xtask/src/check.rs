//! `cargo xtask check`: layout of the text, lints, documentation.

use anyhow::Result;

use crate::{
    bpf, enclave,
    shell::{Tree, run, step},
};

/// The target of enclave images.
const ENCLAVE_TARGET: &str = "x86_64-fortanix-unknown-sgx";

/// Checks the whole workspace, the cheapest first.
///
/// # Errors
/// At the first check that fails.
pub fn all(tree: &Tree) -> Result<()> {
    step("format", || {
        run(tree.cargo().args(["fmt", "--all", "--", "--check"]))?;
        // The probes, the fuzz targets and the enclave programs are workspaces of their own.
        for other in ["ebpf/Cargo.toml", "trusted/fuzz/Cargo.toml", "trusted/enclave/Cargo.toml"] {
            run(tree.cargo().args(["fmt", "--manifest-path", other, "--", "--check"]))?;
        }
        Ok(())
    })?;
    step("clippy", || {
        run(tree
            .cargo()
            .args(["clippy", "--workspace", "--all-targets", "--quiet", "--"])
            .args(["--deny", "warnings"]))?;
        // A workspace of its own; its targets link nothing here, and so need no sanitizer.
        run(tree
            .cargo()
            .args(["clippy", "--manifest-path", "trusted/fuzz/Cargo.toml", "--quiet"])
            .arg("--target-dir")
            .arg(tree.target.join("fuzz/clippy"))
            .args(["--", "--deny", "warnings"]))
    })?;
    step("documentation", || {
        run(tree
            .cargo()
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "--deny warnings"))
    })?;
    step("trusted side for SGX", || match bpf::ensure_toolchain(|what| eprintln!("    {what}")) {
        Ok(toolchain) => {
            run(toolchain
                .cargo_from_source()
                .args(["check", "--quiet", "--package", "postern-trusted"])
                .args(["--target", ENCLAVE_TARGET, "-Zbuild-std=core,alloc"])
                .arg("--target-dir")
                .arg(tree.target.join("enclave"))
                .current_dir(&tree.root))?;
            enclave::clippy(tree, &toolchain)
        }
        Err(error) => {
            eprintln!("    SKIPPED: no toolchain that can build `core`: {error:#}");
            Ok(())
        }
    })
}
