//! A daemon that misbehaves, as a process on a real socket. For tests alone: no part of a release.
//!
//! It speaks posternd's control calls and serves real host files, honestly or as a script and a
//! seed have it ([`script`]); what it does at the ring is `postern_hostile`'s.

mod files;
mod lane;
mod port;
mod script;
mod server;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::Ordering,
};

use clap::Parser as _;

use files::Names;
use script::{NAMES, Script};
use server::Daemon;

/// A daemon that misbehaves. For tests alone. Ends at the end of its standard input, and says how
/// much it did wrong.
#[derive(clap::Parser)]
struct Options {
    /// Path of the control socket.
    #[arg(long)]
    socket: PathBuf,
    /// What it does wrong.
    #[arg(long, value_parser = NAMES)]
    script: String,
    /// Decides when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A host file, NAME=PATH.
    #[arg(long = "file", value_parser = named)]
    files: Vec<(String, PathBuf)>,
    /// A directory of volumes, NAME=PATH.
    #[arg(long = "directory", value_parser = named)]
    directories: Vec<(String, PathBuf)>,
    /// While this file is there, long writes find no room (ENOSPC).
    #[arg(long)]
    full_while: Option<PathBuf>,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    Ok((name.to_owned(), Path::new(path).to_owned()))
}

fn main() -> ExitCode {
    let options = Options::parse();
    let Some(script) = Script::named(&options.script, options.seed) else {
        return ExitCode::from(2);
    };
    let names = Names {
        files: options.files.into_iter().collect(),
        directories: options.directories.into_iter().collect(),
    };
    // Whoever started it ends it by letting go of its input.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        println!("hostile: misdeeds={}", lane::MISDEEDS.load(Ordering::Relaxed));
        std::process::exit(0);
    });
    let daemon = Daemon::new(script, options.seed, names, options.full_while.as_deref());
    let served = daemon.serve(&options.socket, || {
        println!("hostile: ready");
        let _ = std::io::stdout().flush();
    });
    if let Err(errno) = served {
        eprintln!("hostile: {} ({errno})", options.socket.display());
    }
    ExitCode::FAILURE
}
