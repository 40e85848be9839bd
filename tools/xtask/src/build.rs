//! `cargo xtask build`: the release parts, side by side.

use std::{path::Path, time::SystemTime};

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
    if probes_are_fresh(tree) {
        eprintln!("==> probes: nothing has changed");
    } else {
        step("build probes", || {
            let built = bpf::ensure_toolchain(|what| eprintln!("    {what}"))
                .and_then(|toolchain| bpf::build(&toolchain, &tree.release().join(PROBES)));
            if let Err(error) = built {
                eprintln!("    left out: {error:#}");
            }
            Ok(())
        })?;
    }
    eprintln!("    parts: {}", show(&tree.release()));
    Ok(())
}

/// Whether the probes' object is newer than everything it is made of: then no toolchain for it is
/// needed either.
pub fn probes_are_fresh(tree: &Tree) -> bool {
    let Ok(built) = tree.release().join(PROBES).metadata().and_then(|object| object.modified())
    else {
        return false;
    };
    newest(&tree.root.join("ebpf")).is_some_and(|changed| changed < built)
}

/// When the newest file below `directory` was changed; what is built there does not count. `None`
/// if a part of it cannot be read.
fn newest(directory: &Path) -> Option<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in directory.read_dir().ok()? {
        let entry = entry.ok()?;
        let kind = entry.file_type().ok()?;
        let changed = if kind.is_dir() && entry.file_name() != "target" {
            self::newest(&entry.path())?
        } else if kind.is_file() {
            entry.metadata().ok()?.modified().ok()?
        } else {
            continue;
        };
        newest = newest.max(changed);
    }
    Some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_below_counts_and_what_is_built_there_does_not() {
        let base = std::env::temp_dir().join(format!("xtask-{}-newest", std::process::id()));
        let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let make = |name: &str, age: u64| {
            let path = base.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let file = std::fs::File::create(path).unwrap();
            file.set_modified(old + std::time::Duration::from_secs(age)).unwrap();
        };
        make("a", 1);
        make("src/deep/b", 7);
        make("target/c", 99);
        let found = newest(&base);
        std::fs::remove_dir_all(&base).unwrap();
        assert_eq!(found, Some(old + std::time::Duration::from_secs(7)));
        assert_eq!(newest(&base), None);
    }
}
