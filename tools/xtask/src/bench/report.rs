//! What was measured, as Markdown tables and as JSON.

use std::{fmt::Write as _, path::Path, process::Command};

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    Measured, Options, Run, confidence,
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
pub fn machine(directory: &Path) -> Machine {
    let ask = |program: &str, arguments: &[&str]| {
        answer(Command::new(program).args(arguments)).unwrap_or_default().trim().to_owned()
    };
    let kernel = ask("uname", &["-r"]);
    let fio = ask("fio", &["--version"]);
    let place = directory.display().to_string();
    let system = ask("findmnt", &["-n", "-o", "FSTYPE,SOURCE", "-T", &place]);
    let system = system.split_whitespace().collect::<Vec<_>>().join(" on ");
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?.to_owned();
            line.split_once(": ").map(|(_, model)| model.to_owned())
        })
        .unwrap_or_default();
    Machine { words: format!("Linux {kernel}, {cpus} x {model}, {system}, {fio}") }
}

/// The tables for `docs/PERFORMANCE.md`.
pub fn markdown(
    machine: &Machine,
    measured: &[Measured],
    openings: &[Opening],
    options: &Options,
) -> String {
    let mut text = format!(
        "{}; files of {}, {} rounds of {} s per case and target, in turns. Ratio: requests per \
         second over those of {} within a round. CPU and context switches: all processes of a run, \
         per request; the CPU's ratio likewise. Written: bytes that reached the host for each that \
         was written.\n\n",
        machine.words,
        options.size,
        options.rounds,
        options.runtime,
        options.against.name(),
    );
    text.push_str(
        "| case | target | rate | ratio, median | 95 % | quartiles | min..max | CPU, us | ratio, median | 95 % | switches | written |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for case in measured {
        for (at, (target, runs)) in case.runs.iter().enumerate() {
            let of = |pick: fn(&Run) -> f64| median(&runs.iter().map(pick).collect::<Vec<_>>());
            let ratios = case.ratios(at);
            let speed = if case.case.large {
                format!("{:.0} MiB/s", of(|run| run.rate) / f64::from(1 << 20))
            } else {
                format!("{:.1} k/s", of(|run| run.iops) / 1e3)
            };
            let sure = |ratios: &[f64]| {
                let within = confidence(ratios).map(|(from, to)| format!("{from:.3}..{to:.3}"));
                format!("{:.3} | {}", median(ratios), within.unwrap_or_default())
            };
            let (mut compared, mut cpu) = ("| | | ".to_owned(), "| ".to_owned());
            if at > 0 {
                let Spread { min, lower, upper, max, .. } = Spread::of(ratios.clone());
                compared =
                    sure(&ratios) + &format!(" | {lower:.2}..{upper:.2} | {min:.2}..{max:.2}");
                cpu = sure(&case.cpu_ratios(at));
            }
            let written = of(|run| run.written);
            let written = if written.is_nan() { String::new() } else { format!("{written:.2}") };
            // Writing into a String cannot fail.
            let _ = writeln!(
                text,
                "| {} | {} | {speed} | {compared} | {:.1} | {cpu} | {:.2} | {written} |",
                case.case.words,
                target.name(),
                of(|run| run.cpu_us),
                of(|run| run.switches),
            );
        }
    }
    if let Some(first) = measured.first() {
        for (target, _) in first.runs.iter().filter(|(target, _)| !target.caveat().is_empty()) {
            let _ = writeln!(text, "\n{}: {}.", target.name(), target.caveat());
        }
    }
    if openings.is_empty() {
        return text;
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
        "against": options.against.name(),
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
    let run = |run: &Run| {
        json!({
            "iops": run.iops,
            "bytes_per_second": run.rate,
            "cpu_us_per_request": run.cpu_us,
            "context_switches_per_request": run.switches,
            "host_bytes_per_byte_written": (!run.written.is_nan()).then_some(run.written),
        })
    };
    let targets = measured.runs.iter().enumerate().map(|(at, (target, runs))| {
        let spread = Spread::of(measured.ratios(at));
        let Spread { min, lower, upper, max, .. } = spread;
        json!({
            "target": target.name(),
            "caveat": target.caveat(),
            "ratio": { "min": min, "lower": lower, "median": spread.median, "upper": upper, "max": max },
            "confidence_95": confidence(&measured.ratios(at)),
            "cpu_ratio": median(&measured.cpu_ratios(at)),
            "cpu_confidence_95": confidence(&measured.cpu_ratios(at)),
            "runs": runs.iter().map(run).collect::<Vec<_>>(),
        })
    });
    json!({
        "name": measured.case.name,
        "fio": measured.case.arguments,
        "targets": targets.collect::<Vec<_>>(),
    })
}
