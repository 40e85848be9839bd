//! `cargo xtask setup`: what the build, the tests and the demo need from the system.
//!
//! Each step runs at most once and only for what is missing. Where this task may not install (no
//! root, another distribution) it says what is missing and goes on.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{
    bpf, build,
    shell::{Tree, is_root, on_path, run, step},
};

/// A Debian package and how to tell that it is there.
struct Package {
    name: &'static str,
    /// What it is for.
    purpose: &'static str,
    present: fn() -> bool,
}

const PACKAGES: [Package; 17] = [
    Package { name: "fio", purpose: "tests, demo, bench", present: || on_path("fio") },
    Package { name: "strace", purpose: "one test", present: || on_path("strace") },
    Package { name: "prometheus", purpose: "tests of metrics", present: || on_path("promtool") },
    Package { name: "bpftrace", purpose: "one test", present: || on_path("bpftrace") },
    Package { name: "etcd-server", purpose: "tests of counters", present: || on_path("etcd") },
    Package { name: "etcd-client", purpose: "one test", present: || on_path("etcdctl") },
    Package { name: "btrfs-progs", purpose: "one test", present: || on_path("mkfs.btrfs") },
    Package { name: "xfsprogs", purpose: "one test", present: || on_path("mkfs.xfs") },
    Package { name: "stress-ng", purpose: "one test", present: || on_path("stress-ng") },
    Package { name: "sysbench", purpose: "one test", present: || on_path("sysbench") },
    Package { name: "ioping", purpose: "one test", present: || on_path("ioping") },
    Package { name: "qemu-utils", purpose: "one test", present: || on_path("qemu-io") },
    Package { name: "chromium", purpose: "tests of the page", present: || on_path("chromium") },
    Package {
        name: "libaio-dev",
        purpose: "building posternd and test programs",
        present: || Path::new("/usr/include/libaio.h").is_file(),
    },
    Package { name: "libaio1", purpose: "running posternd and fio", present: has_libaio },
    Package {
        name: "python3-cryptography",
        purpose: "the second implementation of the format, in tests",
        present: || any_python_has("cryptography"),
    },
    Package {
        name: "python3-argon2",
        purpose: "the same, for passphrases",
        present: || any_python_has("argon2"),
    },
];

fn any_python_has(package: &str) -> bool {
    let import = format!("import {package}");
    ["python3", "/usr/bin/python3"].into_iter().any(|python| {
        let done = Command::new(python).args(["-c", &import]).output();
        done.is_ok_and(|done| done.status.success())
    })
}

/// Where distributions keep shared libraries.
const LIBRARY_PATHS: [&str; 5] =
    ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib"];

fn has_libaio() -> bool {
    LIBRARY_PATHS
        .iter()
        .flat_map(|path| ["libaio.so.1", "libaio.so.1t64"].map(|name| Path::new(path).join(name)))
        .any(|library| library.exists())
}

/// Installs what is missing, or says what is.
///
/// # Errors
/// Only if something that can be installed here fails to; what is missing and cannot be installed
/// is told and left to the steps that need it.
pub fn all(tree: &Tree) -> Result<()> {
    packages()?;
    if build::probes_are_fresh(tree) {
        return Ok(());
    }
    step("eBPF toolchain", || {
        match bpf::ensure_toolchain(|what| eprintln!("    {what}")) {
            Ok(toolchain) => eprintln!("    {toolchain}"),
            Err(error) => {
                eprintln!("    probes cannot be built here: {error:#}");
                eprintln!("    all else works without them; the daemon's own clock times stages");
            }
        }
        Ok(())
    })
}

fn packages() -> Result<()> {
    let missing: Vec<&Package> = PACKAGES.iter().filter(|package| !(package.present)()).collect();
    if missing.is_empty() {
        eprintln!("==> packages: nothing is missing");
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let list = names.join(" ");
    if !is_root() || !on_path("apt-get") {
        eprintln!("==> packages: missing, and not to be installed from here:");
        for package in &missing {
            eprintln!("    {:<12} for {}", package.name, package.purpose);
        }
        eprintln!("    on Debian or Ubuntu: sudo apt-get install {list}");
        return Ok(());
    }
    step(&format!("packages: {list}"), || {
        // Alone so that a stale list is no reason to fail when the packages can still be had.
        if let Err(error) = run(apt().arg("update")) {
            eprintln!("    {error:#}; trying with the lists that are there");
        }
        run(apt().args(["install", "-y", "--no-install-recommends"]).args(&names))
    })
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-q").env("DEBIAN_FRONTEND", "noninteractive");
    command
}
