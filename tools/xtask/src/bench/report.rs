//! What was measured, as a Markdown table and as JSON.

use std::{fmt::Write as _, path::Path, process::Command};

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Measured, Options, Run,
    numbers::{Spread, median},
    opening::Opening,
};
use crate::shell::answer;

/// What it was measured on.
pub struct Machine {
    /// Words for a reader.
    pub words: String,
}

/// The machine as a reader wants to know it.
pub fn machine(directory: &Path, no_probes: bool) -> Machine {
    let ask = |program: &str, arguments: &[&str]| {
        answer(Command::new(program).args(arguments)).unwrap_or_default().trim().to_owned()
    };
    let kernel = ask("uname", &["-r"]);
    let fio = ask("fio", &["--version"]);
    let system = ask("findmnt", &["-n", "-o", "FSTYPE", "-T", &directory.display().to_string()]);
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?.to_owned();
            line.split_once(": ").map(|(_, model)| model.to_owned())
        })
        .unwrap_or_default();
    let probes = if no_probes { "probes off" } else { "probes on where they load" };
    Machine { words: format!("Linux {kernel}, {cpus} x {model}, {system}, {fio}, {probes}") }
}

/// The table for `docs/PERFORMANCE.md`.
pub fn markdown(
    machine: &Machine,
    measured: &[Measured],
    openings: &[Opening],
    options: &Options,
) -> String {
    let mut text = format!(
        "{}; files of {}, {} pairs of {} s per case, raw and Postern in turns. Ratio: Postern's \
         requests per second over raw's within a pair. CPU: all processes of a run.\n\n",
        machine.words, options.size, options.pairs, options.runtime
    );
    text.push_str(
        "| case | raw | Postern | ratio, median | quartiles | min..max | raw CPU us/request | Postern CPU us/request |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for case in measured {
        let of =
            |pick: fn(&(Run, Run)) -> f64| median(&case.pairs.iter().map(pick).collect::<Vec<_>>());
        let ratio = case.ratios();
        let speed = |iops: f64, rate: f64| {
            if case.case.bs == "1m" {
                format!("{:.0} MiB/s", rate / f64::from(1 << 20))
            } else {
                format!("{:.1} k/s", iops / 1e3)
            }
        };
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "| {} {} depth {}{} | {} | {} | {:.2} | {:.2}..{:.2} | {:.2}..{:.2} | {:.1} | {:.1} |",
            case.case.rw,
            case.case.bs,
            case.case.depth,
            if case.case.sync { ", fdatasync after each" } else { "" },
            speed(of(|(raw, _)| raw.iops), of(|(raw, _)| raw.rate)),
            speed(of(|(_, postern)| postern.iops), of(|(_, postern)| postern.rate)),
            ratio.median,
            ratio.lower,
            ratio.upper,
            ratio.min,
            ratio.max,
            of(|(raw, _)| raw.cpu_us),
            of(|(_, postern)| postern.cpu_us),
        );
    }
    text.push_str(
        "\nMilliseconds, process start included:\n\n\
         | volume | `postern format` | `postern info` | `postern run -- true`, no probes |\n\
         |---|---|---|---|\n",
    );
    for opening in openings {
        let _ = writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.0} |",
            opening.size, opening.format_ms, opening.info_ms, opening.run_ms
        );
    }
    text
}

/// Every number.
///
/// # Errors
/// If a number is none (JSON knows no NaN).
pub fn json(
    machine: &Machine,
    measured: &[Measured],
    openings: &[Opening],
    options: &Options,
) -> Result<String> {
    let cases: Vec<Value> = measured.iter().map(case_json).collect();
    let all = json!({
        "machine": machine.words,
        "size": options.size,
        "runtime_seconds": options.runtime,
        "cases": cases,
        "opening": openings.iter().map(|opening| json!({
            "size": opening.size,
            "format_ms": opening.format_ms,
            "info_ms": opening.info_ms,
            "run_ms": opening.run_ms,
        })).collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&all)? + "\n")
}

fn case_json(measured: &Measured) -> Value {
    let run = |run: &Run| json!({ "iops": run.iops, "bytes_per_second": run.rate, "cpu_us_per_request": run.cpu_us });
    let Spread { min, lower, median, upper, max } = measured.ratios();
    json!({
        "name": measured.case.name,
        "rw": measured.case.rw,
        "bs": measured.case.bs,
        "iodepth": measured.case.depth,
        "fdatasync": measured.case.sync,
        "ratio": { "min": min, "lower": lower, "median": median, "upper": upper, "max": max },
        "pairs": measured.pairs.iter()
            .map(|(raw, postern)| json!({ "raw": run(raw), "postern": run(postern) }))
            .collect::<Vec<_>>(),
    })
}
