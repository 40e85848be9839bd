//! `cargo xtask enclave`: the genuine enclave programs, built, shown and tested.

mod demo;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use crate::{
    bpf,
    shell::{Tree, run, step},
};

/// The target of enclave programs.
const TARGET: &str = "x86_64-fortanix-unknown-sgx";
/// Tells the tests where the programs lie; without it they skip.
const IMAGES_VARIABLE: &str = "POSTERN_ENCLAVE_IMAGES";
/// Tells them where posternd lies.
const PARTS_VARIABLE: &str = "POSTERN_E2E_PARTS";
/// Names the linker: GNU's, because a distribution's compiler brings none of its own.
const LINKER_VARIABLE: (&str, &str) = ("CARGO_TARGET_X86_64_FORTANIX_UNKNOWN_SGX_LINKER", "ld");

/// What to do with the enclave programs.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Task {
    /// Build them
    Build,
    /// Build them, and run their tests in the emulator
    Test,
    /// Build them; AIO, a daemon that is killed, and a store whose enclave is killed
    Demo,
    /// Build them; show the image of the one that keeps a volume, and run it
    Run,
}

/// Does it.
///
/// # Errors
/// If a program does not build, or a test fails.
pub fn all(tree: &Tree, task: Task) -> Result<()> {
    let toolchain = bpf::ensure_toolchain(|what| eprintln!("    {what}"))?;
    let images = build(tree, &toolchain)?;
    match task {
        Task::Build => {
            eprintln!("    {}", images.display());
            Ok(())
        }
        Task::Test => tests(tree, &images),
        Task::Demo => demo::all(tree, &images.join("postern-enclave")),
        Task::Run => {
            let image = images.join("postern-enclave");
            for command in ["inspect", "run"] {
                run(tree
                    .cargo()
                    .args(["run", "--quiet", "--release", "--package", "postern", "--"])
                    .args(["enclave", command])
                    .arg(&image)
                    .args((command == "run").then_some("--counts")))?;
            }
            Ok(())
        }
    }
}

/// Builds the programs and runs their tests; where no toolchain can, says so and goes on.
///
/// # Errors
/// If a program does not build, or a test fails.
pub fn if_possible(tree: &Tree) -> Result<()> {
    match bpf::ensure_toolchain(|what| eprintln!("    {what}")) {
        Ok(toolchain) => {
            let images = build(tree, &toolchain)?;
            tests(tree, &images)
        }
        Err(error) => {
            eprintln!("==> enclave programs");
            eprintln!("    SKIPPED: no toolchain that can build the library for SGX: {error:#}");
            Ok(())
        }
    }
}

/// Where the programs lie afterwards.
fn build(tree: &Tree, toolchain: &bpf::Toolchain) -> Result<PathBuf> {
    let target = tree.target.join("enclave");
    step("enclave programs", || {
        run(toolchain
            .cargo_from_source()
            .args(["build", "--quiet", "--locked", "--release", "--lib", "--bins", "--examples"])
            .args(["--target", TARGET, "-Zbuild-std=std,panic_abort", "-Zbuild-std-features="])
            .env(LINKER_VARIABLE.0, LINKER_VARIABLE.1)
            .arg("--target-dir")
            .arg(&target)
            .current_dir(tree.root.join("trusted/enclave")))
    })?;
    Ok(target.join(TARGET).join("release"))
}

fn tests(tree: &Tree, images: &std::path::Path) -> Result<()> {
    step("enclave tests", || {
        run(tree.cargo().args(["build", "--quiet", "--release", "--package", "posternd"]))?;
        run(tree
            .cargo()
            .args(["test", "--quiet", "--package", "postern", "--test", "enclave"])
            .env(IMAGES_VARIABLE, images)
            .env(PARTS_VARIABLE, tree.release()))
    })
}
