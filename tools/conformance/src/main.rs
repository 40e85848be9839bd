//! Native AIO, call by call: what an ordinary program sees of it.
//!
//! This program knows nothing of Postern. It does what any program may do with io_setup(2) and its
//! kin and prints what comes of it; run natively on ext4 and under `postern run` on a protected
//! path it must print the same. The kernel is the oracle: no expected value here comes from
//! Postern. Where a case is about a certain errno, it says so, and the native run must show it.

#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]

mod aio;
mod bench;
mod cases;
mod random;
mod run;
mod sys;
mod world;

use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::cases::Case;

/// Marks a transcript's line that contradicts the table of rules; the native run has none.
pub const BROKEN_RULE: &str = "BROKEN RULE";

/// What an ordinary program sees of native AIO.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

/// Where to work.
#[derive(Args, Debug)]
pub struct Ground {
    /// The file to work on; its content is lost
    #[arg(long)]
    file: PathBuf,
    /// An existing directory on an ordinary file system
    #[arg(long)]
    scratch: PathBuf,
}

impl Ground {
    fn paths(&self) -> (CString, CString) {
        let text = |path: &PathBuf| CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
        (text(&self.file), text(&self.scratch))
    }
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Print the names of the cases
    List,
    /// Run cases and print their transcripts, each as soon as it has ended
    Run {
        #[command(flatten)]
        ground: Ground,
        /// Only the cases of this part of all, from 0 on
        #[arg(long, default_value_t = 0)]
        part: usize,
        /// Into how many parts the cases are dealt
        #[arg(long, default_value_t = 1, value_parser = parse_parts)]
        parts: usize,
        /// Leave out so many of the first of them
        #[arg(long, default_value_t = 0)]
        skip: usize,
        /// Only cases that see, or only those that do not see, what others on the machine do
        #[arg(long)]
        alone: Option<bool>,
        /// Only cases whose name contains one of these
        only: Vec<String>,
    },
    /// Run random sequences of calls and print their transcripts
    Random {
        #[command(flatten)]
        ground: Ground,
        #[command(flatten)]
        choice: random::Choice,
    },
    /// Measure what an empty request costs
    Bench {
        #[command(flatten)]
        ground: Ground,
        #[command(flatten)]
        options: bench::Options,
    },
}

fn parse_parts(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|parts| *parts > 0).ok_or_else(|| "a number above 0".into())
}

fn main() {
    // A panic is part of a case's transcript.
    std::panic::set_hook(Box::new(|_| {}));
    match Cli::parse().task {
        Task::List => cases::all().iter().for_each(|case| println!("{}", case.name)),
        Task::Run { ground, part, parts, skip, alone, only } => {
            let (file, scratch) = ground.paths();
            run::hold(&file);
            let chosen = |case: &Case| {
                alone.is_none_or(|alone| alone == case.is_of_machine())
                    && (only.is_empty() || only.iter().any(|part| case.name.contains(part)))
            };
            let all = cases::all();
            let here = all.iter().filter(|case| chosen(case)).skip(part).step_by(parts);
            here.skip(skip).for_each(|case| run::one(case, &file, &scratch));
            println!("done");
        }
        Task::Random { ground, choice } => {
            let (file, scratch) = ground.paths();
            random::run(&choice, &file, &scratch);
            println!("done");
        }
        Task::Bench { ground, options } => bench::run(&options, &ground.paths().0),
    }
}
