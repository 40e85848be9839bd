//! `postern stats`: asks a running daemon for its statistics and shows them as a table.

use std::{fmt::Write as _, path::Path};

use serde::Deserialize;

use crate::{
    cli::StatsArgs,
    control::Control,
    error::{Exit, Failure},
};

/// What of the daemon's report is shown; it may hold more.
#[derive(Debug, Default, Deserialize)]
struct Report {
    source: String,
    source_note: Option<String>,
    stages: Vec<Row>,
    #[serde(default)]
    counters: std::collections::BTreeMap<String, u64>,
    #[serde(default)]
    each_session: Vec<Session>,
}

/// What one session has and had.
#[derive(Debug, Default, Deserialize)]
struct Session {
    session: u64,
    process: i32,
    lanes: u64,
    files: u64,
    memory_bytes: u64,
    in_flight: u64,
    requests: u64,
    bytes: u64,
    held_depth: u64,
    held_rate: u64,
    refused: u64,
}

/// One stage of one operation; times in nanoseconds.
#[derive(Debug, Default, Deserialize)]
struct Row {
    stage: String,
    operation: String,
    count: u64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
}

/// Checks that a daemon listens on `socket`.
///
/// # Errors
/// [`Exit::NoDaemon`].
pub fn connect(socket: &Path) -> Result<(), Failure> {
    Control::connect(socket).map(drop)
}

/// The statistics of the daemon that listens on `socket`, as JSON text.
///
/// # Errors
/// [`Exit::NoDaemon`].
pub fn ask(socket: &Path) -> Result<Vec<u8>, Failure> {
    Control::connect(socket)?.stats()
}

/// Runs `postern stats`.
///
/// # Errors
/// [`Exit::NoDaemon`]; [`Exit::Internal`] if the answer is none.
pub fn show(args: &StatsArgs) -> Result<(), Failure> {
    let text = ask(&args.socket)?;
    if args.json {
        println!("{}", String::from_utf8_lossy(&text).trim_end());
        return Ok(());
    }
    let report: Report = serde_json::from_slice(&text).map_err(|error| {
        Failure::new(
            Exit::NoDaemon,
            format_args!("the daemon's answer is not understood ({error})"),
            args.socket.display(),
            "use a posternd of this version, or --json to see the answer",
        )
    })?;
    print!("{}", table(&report));
    Ok(())
}

const SESSION_HEAD: [&str; 11] = [
    "session",
    "process",
    "lanes",
    "files",
    "ports MB",
    "under way",
    "requests",
    "MB",
    "held depth",
    "held rate",
    "refused",
];

/// Adds a line of the sessions' table.
fn session_line(text: &mut String, cells: [String; SESSION_HEAD.len()]) {
    let [session, process, lanes, files, ports, under_way, requests, bytes, depth, rate, refused] =
        cells;
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "{session:<8} {process:>8} {lanes:>6} {files:>6} {ports:>9} {under_way:>9} {requests:>12} \
         {bytes:>10} {depth:>10} {rate:>9} {refused:>8}"
    );
}

/// The report as lines of text.
fn table(report: &Report) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(
        text,
        "{:<14} {:<6} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "stage", "op", "count", "p50 us", "p99 us", "p99.9 us", "max us"
    );
    for row in &report.stages {
        let _ = writeln!(
            text,
            "{:<14} {:<6} {:>10} {:>10} {:>10} {:>10} {:>10}",
            row.stage,
            row.operation,
            row.count,
            micros(row.p50_ns),
            micros(row.p99_ns),
            micros(row.p999_ns),
            micros(row.max_ns)
        );
    }
    if report.stages.is_empty() {
        text.push_str("(no request yet)\n");
    }
    if !report.each_session.is_empty() {
        session_line(&mut text, SESSION_HEAD.map(str::to_owned));
    }
    for row in &report.each_session {
        let numbers = [
            row.session,
            u64::try_from(row.process).unwrap_or_default(),
            row.lanes,
            row.files,
            row.memory_bytes >> 20,
            row.in_flight,
            row.requests,
            row.bytes >> 20,
            row.held_depth,
            row.held_rate,
            row.refused,
        ];
        session_line(&mut text, numbers.map(|number| number.to_string()));
    }
    let source = match report.source.as_str() {
        "ebpf" => "eBPF probes in the kernel",
        "daemon" => "the daemon's own clock",
        other => other,
    };
    let _ = write!(text, "source: {source}");
    if let Some(note) = &report.source_note {
        let _ = write!(text, " ({note})");
    }
    text.push('\n');
    let eventful = ["errors", "refused_descriptors", "broken_rings", "claims_refused"];
    for name in eventful {
        if let Some(count) = report.counters.get(name).filter(|&&count| count > 0) {
            let _ = writeln!(text, "{name}: {count}");
        }
    }
    text
}

/// Nanoseconds as microseconds with one decimal.
pub(crate) fn micros(ns: u64) -> String {
    let tenths = ns.saturating_add(50) / 100;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_a_table_with_its_source() {
        let json = r#"{"source":"daemon","source_note":"no CAP_BPF","stages":[
            {"stage":"device","operation":"read","count":12,"p50_ns":81234,"p99_ns":99950,
             "p999_ns":1000000,"max_ns":2000049,"sum_ns":1}],
            "daemon_stages":[],"counters":{"errors":3,"spins":9},"sessions":1,"lanes":1,
            "each_session":[{"session":7,"process":4711,"lanes":2,"memory_bytes":33554432,"files":3,
            "in_flight":4,"in_flight_bytes":1,"requests":12,"bytes":5242880,"held_depth":6,
            "held_rate":8,"refused":9}]}"#;
        let text = table(&serde_json::from_str(json).unwrap());
        let words: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words, ["device", "read", "12", "81.2", "100.0", "1000.0", "2000.0"]);
        let words: Vec<&str> = text.lines().nth(3).unwrap().split_whitespace().collect();
        assert_eq!(words, ["7", "4711", "2", "3", "32", "4", "12", "5", "6", "8", "9"]);
        assert!(text.contains("source: the daemon's own clock (no CAP_BPF)\n"));
        assert!(text.contains("errors: 3") && !text.contains("spins"));
    }

    #[test]
    fn nanoseconds_round_to_tenths_of_a_microsecond() {
        assert_eq!(micros(0), "0.0");
        assert_eq!(micros(49), "0.0");
        assert_eq!(micros(50), "0.1");
        assert_eq!(micros(1_049), "1.0");
        assert_eq!(micros(u64::MAX), "18446744073709551.6");
    }
}
