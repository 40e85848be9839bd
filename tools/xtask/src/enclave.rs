//! `cargo xtask enclave`: the genuine enclave programs, built, shown and tested.

mod bench;
mod demo;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
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
/// The compiler's flags for their target.
const FLAGS_VARIABLE: &str = "CARGO_TARGET_X86_64_FORTANIX_UNKNOWN_SGX_RUSTFLAGS";
/// What runs its programs.
const RUNNER_VARIABLE: &str = "CARGO_TARGET_X86_64_FORTANIX_UNKNOWN_SGX_RUNNER";

/// What to do with the enclave programs.
#[derive(Clone, Debug, Subcommand)]
pub enum Task {
    /// Build them
    Build,
    /// Build them, and run their tests in the emulator
    Test,
    /// Build them; AIO, a daemon that is killed, and a store whose enclave is killed
    Demo,
    /// Build them; what the wall costs, and requests against the simulated enclave and the plain file
    Bench(bench::Options),
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
        Task::Test => tests(tree, &toolchain, &images),
        Task::Bench(options) => bench::all(tree, &toolchain, &images, &options),
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
            tests(tree, &toolchain, &images)
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
    build_into(tree, toolchain, "enclave", None)
}

/// Builds into the directory of this name, with these flags in place of the usual ones.
fn build_into(
    tree: &Tree,
    toolchain: &bpf::Toolchain,
    name: &str,
    flags: Option<&str>,
) -> Result<PathBuf> {
    let target = tree.target.join(name);
    step("enclave programs", || {
        let mut cargo = toolchain.cargo_from_source();
        cargo.envs(flags.map(|flags| (FLAGS_VARIABLE, flags)));
        run(cargo
            .args(["build", "--quiet", "--locked", "--release", "--lib", "--bins", "--examples"])
            .args(["--target", TARGET, "-Zbuild-std=std,panic_abort", "-Zbuild-std-features="])
            .env(LINKER_VARIABLE.0, LINKER_VARIABLE.1)
            .arg("--target-dir")
            .arg(&target)
            .current_dir(tree.root.join("trusted/enclave")))
    })?;
    Ok(target.join(TARGET).join("release"))
}

/// Lints the programs, with a toolchain that has clippy.
///
/// # Errors
/// If there is a warning.
pub fn clippy(tree: &Tree, toolchain: &bpf::Toolchain) -> Result<()> {
    let Some(mut clippy) = toolchain.clippy_from_source() else {
        eprintln!("    SKIPPED: clippy of the enclave programs: {toolchain} has none");
        return Ok(());
    };
    run(clippy
        .args(["--quiet", "--locked", "--lib", "--bins", "--examples"])
        .args(["--target", TARGET, "-Zbuild-std=std,panic_abort", "-Zbuild-std-features="])
        .arg("--target-dir")
        .arg(tree.target.join("enclave"))
        .args(["--", "--deny", "warnings"])
        .current_dir(tree.root.join("trusted/enclave")))
}

fn tests(tree: &Tree, toolchain: &bpf::Toolchain, images: &Path) -> Result<()> {
    step("enclave tests", || {
        run(tree.cargo().args(["build", "--quiet", "--release", "--package", "posternd"]))?;
        let programs = |package: &str, test: &[&str]| {
            run(tree
                .cargo()
                .args(["test", "--quiet", "--package", package, "--test"])
                .args(test)
                .env(IMAGES_VARIABLE, images)
                .env(PARTS_VARIABLE, tree.release()))
        };
        programs("postern", &["enclave"])?;
        // A daemon that misbehaves. It takes the parts of a release.
        run(tree.cargo().args(["build", "--quiet", "--release", "--package", "postern"]))?;
        programs("postern-hostile-daemon", &["process", "image::"])
    })?;
    step("the trusted side's tests inside an enclave", || inside(tree, toolchain))
}

/// Tests that cannot run inside: a panic there cannot be caught, and there are no files.
const OUTSIDE_ALONE: [&str; 3] = ["canaries", "is_caught", "volume::fuzz::"];
/// Tests that are left out there because they take long.
const LONG: [&str; 10] = [
    "capacity::a_crash",
    "capacity::a_volume_keeps",
    "counted_space::",
    "crash::seeds::",
    "recorded::",
    "rekey::",
    "space::a_full_host",
    "space::sixteen",
    "tamper::no_flipped",
    "usage::a_tebibyte",
];

/// `cargo test` of the trusted crate for the target, by way of the runner.
fn inside(tree: &Tree, toolchain: &bpf::Toolchain) -> Result<()> {
    let postern = tree.release().join("postern");
    let runner = format!(
        "{} enclave run --strict --heap 512M --stack 4M --threads 8",
        postern.to_str().context("the target directory's path is not UTF-8")?
    );
    run(toolchain
        .cargo_from_source()
        .args(["test", "--quiet", "--locked", "--profile", "crash", "--lib"])
        .args(["--manifest-path", "../Cargo.toml", "--target", TARGET])
        .args(["-Zbuild-std=std,panic_unwind,test", "-Zbuild-std-features="])
        .arg("--target-dir")
        .arg(tree.target.join("enclave"))
        // The first pair of hyphens is cargo's, the second the runner's.
        .args(["--", "--", "--test-threads", "2"])
        .args(OUTSIDE_ALONE.iter().chain(&LONG).flat_map(|name| ["--skip", name]))
        .env(LINKER_VARIABLE.0, LINKER_VARIABLE.1)
        .env(RUNNER_VARIABLE, runner)
        // Where the compiler's flags for the target stand.
        .current_dir(tree.root.join("trusted/enclave")))
}
