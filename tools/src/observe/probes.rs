//! `postern probes`: the eBPF probes of a running daemon, what each costs, and their switch.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::Value;

use super::{Daemon, printable};
use crate::{
    cli::{ProbesArgs, Switch},
    error::{Exit, Failure},
    stats::micros,
};

/// The probes as a whole.
#[derive(Debug, Default, Deserialize)]
struct Whole {
    on: bool,
    note: Option<String>,
    #[serde(default)]
    under_way: u64,
}

/// One program.
#[derive(Debug, Default, Deserialize)]
struct Program {
    program: String,
    verified_instructions: u64,
    runs: u64,
    run_ns: u64,
    missed: u64,
}

/// Runs `postern probes`.
///
/// # Errors
/// [`Exit::NoDaemon`], also where the daemon has no probes to switch on.
pub fn run(args: &ProbesArgs) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(&args.socket)?;
    let wanted = args.switch.map(|switch| switch == Switch::On);
    let items = daemon.probes(wanted)?;
    let understood = |error: &serde_json::Error| daemon.nonsense(error);
    let mut values = items.iter().cloned();
    let whole: Whole =
        serde_json::from_value(values.next().unwrap_or(Value::Null)).map_err(|e| understood(&e))?;
    let programs: Vec<Program> = values
        .map(serde_json::from_value)
        .collect::<Result<_, _>>()
        .map_err(|e: serde_json::Error| understood(&e))?;
    if args.json {
        println!("{}", Value::Array(items));
    } else {
        print!("{}", table(&whole, &programs));
    }
    if wanted == Some(true) && !whole.on {
        return Err(Failure::new(
            Exit::NoDaemon,
            "the daemon has no probes to switch on",
            args.socket.display(),
            printable(&whole.note.unwrap_or_default()),
        ));
    }
    Ok(())
}

/// The probes as lines of text.
fn table(whole: &Whole, programs: &[Program]) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "probes: {}, {} requests under way",
        if whole.on { "on" } else { "off" },
        whole.under_way
    );
    if let Some(note) = &whole.note {
        let _ = writeln!(text, "{}", printable(note));
    }
    if programs.is_empty() {
        return text;
    }
    let _ = writeln!(
        text,
        "{:<22} {:>21} {:>12} {:>12} {:>10}",
        "program", "verified instructions", "runs", "us per run", "missed"
    );
    for one in programs {
        let each = one.run_ns.checked_div(one.runs).map_or_else(|| "-".to_owned(), micros);
        let Program { program, verified_instructions, runs, missed, .. } = one;
        let program = printable(program);
        let _ = writeln!(
            text,
            "{program:<22} {verified_instructions:>21} {runs:>12} {each:>12} {missed:>10}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_never_ran_has_no_time_per_run() {
        let program = |runs, run_ns| Program {
            program: "enter_io_submit".to_owned(),
            verified_instructions: 8000,
            runs,
            run_ns,
            missed: 0,
        };
        let whole = Whole { on: true, ..Whole::default() };
        let text = table(&whole, &[program(0, 0), program(4, 1000)]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "probes: on, 0 requests under way");
        assert!(lines[2].contains("        -  "), "{text}");
        assert!(lines[3].contains(" 0.3 "), "{text}");
    }

    #[test]
    fn what_a_daemon_says_can_not_write_to_the_terminal() {
        let note = Some("a\u{1b}[2Jb".to_owned());
        assert!(!table(&Whole { note, ..Whole::default() }, &[]).contains('\u{1b}'));
    }
}
