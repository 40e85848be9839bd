//! Where the library is loaded: at the same place in every process.
//!
//! A program that execs another one shares the family's arena with it. Objects there point into the
//! library's code and tables, so the next program must have them at the same addresses. The C
//! library's loader (glibc 2.36 and later) takes the place that the file asks for if it is free;
//! where it does not, the programs just do not share.

/// Just below the arena, where neither the kernel nor a loader puts anything by itself.
const BASE: &str = "0x6d0000000000";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,--image-base={BASE}");
    // Tells the programs that they have the same file.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--build-id=sha1");
}
