//! Builds the probes: finds (or installs) a toolchain that can compile `core` for the BPF target,
//! and calls it.
//!
//! Two kinds of toolchain do it: a rustup nightly with its `rust-src` component, or any other rustc
//! that has the library's sources in its sysroot (Debian: rustc-web, cargo-web and rust-web-src),
//! which is told by RUSTC_BOOTSTRAP to accept unstable options. Both link with bpf-linker, which
//! borrows the LLVM library of a rustup toolchain.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// The version of bpf-linker the probes are built and verified with.
const LINKER_VERSION: &str = "0.10.0";
const DEBIAN_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const TARGET: &str = "bpfel-unknown-none";

/// A compiler, a cargo and a linker that fit together.
#[derive(Clone, Debug)]
pub struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    linker: PathBuf,
    /// Directory with the libLLVM that the linker loads.
    llvm: PathBuf,
}

impl Toolchain {
    /// A cargo that can build `core` and `alloc` for targets that rustup has no library for.
    pub fn cargo_from_source(&self) -> Command {
        let mut cargo = clean(&self.cargo);
        cargo.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        cargo
    }
}

impl Toolchain {
    /// The same with clippy, for a toolchain that has it.
    pub fn clippy_from_source(&self) -> Option<Command> {
        let program = self.cargo.with_file_name("cargo-clippy");
        let mut clippy = program.is_file().then(|| clean(&program))?;
        clippy.arg("clippy").env("CARGO", &self.cargo);
        clippy.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        Some(clippy)
    }
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with {}", self.rustc.display(), self.linker.display())
    }
}

/// Finds a toolchain for the probes, installing what is missing where that is possible.
/// `progress` is told, in one line each, what takes long.
///
/// # Errors
/// What is missing and how to install it.
pub fn ensure_toolchain(mut progress: impl FnMut(&str)) -> Result<Toolchain> {
    let (rustc, cargo) = match find_compiler() {
        Some(found) => found,
        None => {
            install_sources(&mut progress)?;
            find_compiler()
                .context("the library's sources were installed, but no rustc has them")?
        }
    };
    let linker = match find_linker() {
        Some(found) => found,
        None => {
            progress("installing bpf-linker (about two minutes)");
            run(Command::new("cargo").args([
                "install",
                "--locked",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
            ]))?;
            find_linker()
                .context("bpf-linker was installed, but is neither on PATH nor in ~/.cargo/bin")?
        }
    };
    let llvm = find_llvm(&rustc).context(
        "no libLLVM for bpf-linker: rustup's toolchains carry one; install any by \
         `rustup toolchain install stable`",
    )?;
    Ok(Toolchain { rustc, cargo, linker, llvm })
}

/// Compiles the probes (the crate `ebpf/`) and puts the object at `out`; answers its path.
/// Intermediate files go to a directory beside it.
///
/// # Errors
/// The compiler's or linker's failure; what they said is on stderr.
pub fn build(toolchain: &Toolchain, out: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ebpf");
    let parent = out.parent().context("the object needs a directory")?;
    std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let out = parent.canonicalize()?.join(out.file_name().context("the object needs a file name")?);
    let target_dir = out.with_extension("build");

    let mut library_path = vec![toolchain.llvm.clone()];
    library_path.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let linker = toolchain.linker.to_str().context("the path of bpf-linker is not UTF-8")?;
    let flags = ["-Cdebuginfo=2", "-Clink-arg=--btf", &format!("-Clinker={linker}")].join("\u{1f}");
    let mut cargo = clean(&toolchain.cargo);
    cargo
        .current_dir(&source)
        .args(["build", "--quiet", "--locked", "--release", "-Zbuild-std=core"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("LD_LIBRARY_PATH", std::env::join_paths(library_path)?)
        .env("CARGO_ENCODED_RUSTFLAGS", flags);
    run(&mut cargo)?;
    let built = target_dir.join(TARGET).join("release/postern-probes");
    // Written beside and renamed: a daemon that starts meanwhile sees the old or the new object.
    let fresh = out.with_extension("new");
    std::fs::copy(&built, &fresh).with_context(|| format!("copying {}", built.display()))?;
    std::fs::rename(&fresh, &out).with_context(|| format!("writing {}", out.display()))?;
    Ok(out)
}

/// A command without what an outer cargo or rustup put into the environment.
fn clean(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let kept = matches!(&*text, "CARGO_HOME" | "CARGO_NET_OFFLINE" | "CARGO_HTTP_PROXY");
        let outer = ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN", "RUSTDOC"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if outer && !kept {
            command.env_remove(&name);
        }
    }
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// First line of what a command prints; `None` if it fails.
fn ask(program: &Path, args: &[&str]) -> Option<OsString> {
    let output = clean(program).args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.lines().next()?.into())
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    ask(rustc, &["--print", "sysroot"]).map(PathBuf::from)
}

/// A rustc that has the library's sources, and the cargo of the same version.
fn find_compiler() -> Option<(PathBuf, PathBuf)> {
    candidates().into_iter().find(|(rustc, cargo)| {
        cargo.exists()
            && sysroot(rustc)
                .is_some_and(|root| root.join("lib/rustlib/src/rust/library/core").is_dir())
    })
}

/// Compilers to try, best first: rustup's nightly, rustup's default, then each rustc on PATH.
fn candidates() -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for toolchain in ["+nightly", "+stable"] {
        let root = ask(Path::new("rustc"), &[toolchain, "--print", "sysroot"]);
        found.extend(root.map(|root| PathBuf::from(root).join("bin")));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    found.extend(std::env::split_paths(&path));
    found.extend(["/usr/bin", "/usr/local/bin"].map(PathBuf::from));
    found
        .into_iter()
        .map(|bin| (bin.join("rustc"), bin.join("cargo")))
        .filter(|(rustc, _)| rustc.is_file())
        .collect()
}

fn find_linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let default = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    std::env::split_paths(&path)
        .chain(home.or(default).map(|cargo| cargo.join("bin")))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
}

/// The library directory of a toolchain that has a libLLVM: that of the compiler itself, else that
/// of rustup's default. bpf-linker must not be older than the compiler, and loads the first it finds.
fn find_llvm(rustc: &Path) -> Option<PathBuf> {
    let own = sysroot(rustc);
    let rustup = ["+nightly", "+stable"].map(|toolchain| {
        ask(Path::new("rustc"), &[toolchain, "--print", "sysroot"]).map(PathBuf::from)
    });
    let default = sysroot(Path::new("rustc"));
    [own, default].into_iter().chain(rustup).flatten().map(|root| root.join("lib")).find(|lib| {
        std::fs::read_dir(lib).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("libLLVM"))
            })
        })
    })
}

/// Installs the library's sources by rustup or, failing that, a compiler with them from Debian.
fn install_sources(progress: &mut impl FnMut(&str)) -> Result<()> {
    progress("adding rust-src to rustup's nightly");
    let rustup = Command::new("rustup")
        .args(["component", "add", "rust-src", "--toolchain", "nightly"])
        .output();
    if rustup.is_ok_and(|o| o.status.success()) {
        return Ok(());
    }
    let remedy = format!(
        "the probes need a compiler with the library's sources: \
         `rustup toolchain install nightly --component rust-src`, or on Debian \
         `apt-get install {}`",
        DEBIAN_PACKAGES.join(" ")
    );
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(remedy);
    }
    progress("installing a compiler with the library's sources from Debian");
    run(Command::new("/usr/bin/apt-get")
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(DEBIAN_PACKAGES))
    .context(remedy)
}
