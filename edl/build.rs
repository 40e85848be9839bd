//! `postern.edl` to `$OUT_DIR/calls.rs`.

use std::{env, fs, path::Path};

fn main() {
    println!("cargo::rerun-if-changed=postern.edl");
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(message) = calls() {
        println!("cargo::error={message}");
    }
}

fn calls() -> Result<(), String> {
    let source = fs::read_to_string("postern.edl").map_err(|error| {
        format!("edl/postern.edl: cannot be read ({error}); restore it from the repository")
    })?;
    let code =
        postern_edl_gen::generate("edl/postern.edl", &source).map_err(|error| error.to_string())?;
    let directory =
        env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; build this crate with cargo")?;
    let target = Path::new(&directory).join("calls.rs");
    fs::write(&target, code).map_err(|error| {
        format!("{}: cannot be written ({error}); free space or fix its rights", target.display())
    })
}
