//! An empty `libunwind.a` for the linker: a program that aborts on panic unwinds nothing, and the
//! target's own library comes only with rustup's build of it.

fn main() -> std::io::Result<()> {
    let out = std::env::var_os("OUT_DIR").unwrap_or_default();
    let out = std::path::Path::new(&out);
    std::fs::write(out.join("libunwind.a"), b"!<arch>\n")?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rerun-if-changed=build.rs");
    Ok(())
}
