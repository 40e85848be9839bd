//! Links the system's libaio, and says what to install where it is missing.

use std::{env, fs, path::PathBuf, process::Command, process::Stdio};

const PROBE: &str = "\
#include <libaio.h>
int main(void) { return io_pgetevents(0, 0, 0, 0, 0, 0); }
";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    println!("cargo::rustc-link-lib=dylib=aio");
    // The probe asks the host's compiler, which knows nothing of another target.
    if env::var_os("HOST") == env::var_os("TARGET") {
        probe();
    }
}

/// Compiles and links a program that uses the newest function of libaio. No compiler at all is no
/// failure here: the linker is the one to complain.
fn probe() {
    let directory = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_else(|| ".".into()));
    let source = directory.join("probe.c");
    if let Err(error) = fs::write(&source, PROBE) {
        println!("cargo::error={}: cannot be written ({error}); free space", source.display());
        return;
    }
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let run = |arguments: &[&str]| {
        Command::new(&compiler)
            .args(arguments)
            .arg(&source)
            .arg("-o")
            .arg(directory.join("probe"))
            .arg("-laio")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map(|status| status.success())
    };
    let missing = match (run(&["-E"]), run(&[])) {
        (Err(_), _) | (_, Err(_)) | (_, Ok(true)) => return,
        (Ok(false), _) => "the header libaio.h",
        (Ok(true), Ok(false)) => "the library libaio.so of version 0.3.111 or later",
    };
    println!(
        "cargo::error={missing} was not found; install it: `apt-get install libaio-dev` on Debian \
         and Ubuntu, `dnf install libaio-devel` on Fedora and its kin"
    );
}
