//! The operator's command: run a program on sealed volumes, make volumes, look at them.
//!
//! Holds: every failure is one line on stderr and an exit code of its own (see [`error`]); keys
//! never appear in an argument, a message or a file that was not asked for.

mod cli;
mod control;
mod counter;
mod directory_records;
mod directory_volume;
mod disk;
mod enclave;
mod error;
mod key;
mod key_slots;
mod observe;
mod passphrase;
mod rekey;
mod rekey_directory;
mod resize;
mod run;
mod size;
mod snapshot;
mod stats;
mod volume;

use std::process::ExitCode;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::{
    cli::Command,
    error::{Exit, Failure},
};

fn main() -> ExitCode {
    // Keys and passphrases pass through this process: no core dump, no debugger of the same user.
    // Where the system refuses there is nothing to be done.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    match dispatch() {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn dispatch() -> Result<u8, Failure> {
    let Some(cli) = cli::parse(std::env::args_os())? else { return Ok(0) };
    disk::set_patience(cli.wait);
    match cli.command {
        Command::Run(args) => run::run(&args, cli.wait),
        Command::Format(args) => volume::format(&args).map(|()| 0),
        Command::Info(args) => volume::info(&args).map(|()| 0),
        Command::Verify(args) => {
            let whole = volume::verify(&args)?;
            Ok(if whole { 0 } else { Exit::Damaged as u8 })
        }
        Command::Resize(args) => resize::resize(&args).map(|()| 0),
        Command::Snapshot(args) => snapshot::run(&args.command).map(|()| 0),
        Command::Key(command) => key_slots::run(&command).map(|()| 0),
        Command::Rekey(args) => rekey::run(&args).map(|()| 0),
        Command::Enclave { command } => enclave::run(&command),
        Command::Stats(args) => stats::show(&args).map(|()| 0),
        Command::Probes(args) => observe::probes::run(&args).map(|()| 0),
        Command::Top(args) => observe::top::run(&args).map(|()| 0),
        Command::Trace(args) => observe::trace::run(&args).map(|()| 0),
        Command::Report(args) => observe::report::run(&args).map(|()| 0),
        Command::Counter { command } => counter::command(&command).map(|()| 0),
    }
}
