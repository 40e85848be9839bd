//! The latency table: what `posternd` counted, stage by stage.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Prints the table of the statistics that a run saved in `file`.
///
/// # Errors
/// If the file is not there or is no report.
pub fn print(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("no statistics in {}", file.display()))?;
    let report: Value = serde_json::from_str(&text).context("the statistics are no JSON")?;
    let rows = report["stages"].as_array().context("the statistics have no stages")?;
    println!(
        "{:<14} {:<6} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "stage", "op", "count", "p50 us", "p99 us", "p99.9 us", "max us"
    );
    for row in rows {
        let time = |name: &str| micros(row[name].as_u64().unwrap_or(0));
        println!(
            "{:<14} {:<6} {:>10} {:>10} {:>10} {:>10} {:>10}",
            row["stage"].as_str().unwrap_or("?"),
            row["operation"].as_str().unwrap_or("?"),
            row["count"].as_u64().unwrap_or(0),
            time("p50_ns"),
            time("p99_ns"),
            time("p999_ns"),
            time("max_ns"),
        );
    }
    let note = report["source_note"].as_str().unwrap_or_default();
    match report["source"].as_str() {
        Some("ebpf") => println!("source: eBPF probes in the kernel {note}"),
        Some("daemon") => println!("source: the daemon's own clock; no eBPF: {note}"),
        other => println!("source: {} {note}", other.unwrap_or("unknown")),
    }
    Ok(())
}

fn micros(ns: u64) -> String {
    let tenths = ns.saturating_add(50) / 100;
    format!("{}.{}", tenths / 10, tenths % 10)
}
