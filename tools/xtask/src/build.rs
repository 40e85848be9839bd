//! `cargo xtask build`: the release parts, side by side.

use anyhow::Result;

use crate::{
    bpf,
    shell::{Tree, run, show, step},
};

/// The parts that `postern` looks for beside itself, and the probes that `posternd` does.
const PACKAGES: [&str; 3] = ["postern", "posternd", "postern-preload"];

/// The probes' object, where `posternd` looks for it.
const PROBES: &str = "postern-probes.o";

/// Builds everything that a run needs.
///
/// # Errors
/// If a part does not compile. Probes that cannot be built are told of and left out.
pub fn all(tree: &Tree) -> Result<()> {
    step("build (release)", || {
        let mut cargo = tree.cargo();
        cargo.args(["build", "--release"]);
        for package in PACKAGES {
            cargo.args(["--package", package]);
        }
        // The library half of a package has nothing that a run needs beyond these.
        run(&mut cargo)
    })?;
    step("build probes", || {
        let object = tree.release().join(PROBES);
        let built = bpf::ensure_toolchain(|what| eprintln!("    {what}"))
            .and_then(|toolchain| bpf::build(&toolchain, &object));
        if let Err(error) = built {
            eprintln!("    left out: {error:#}");
        }
        Ok(())
    })?;
    eprintln!("    parts: {}", show(&tree.release()));
    Ok(())
}
