//! Running fio and reading its JSON.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::shell::{Tree, line_of, on_path, output};

/// How fio reaches its file.
#[derive(Clone, Debug)]
pub enum Way {
    /// As it is, on the host.
    Raw,
    /// Through `postern run`, with these arguments before the `--`.
    Postern(Vec<OsString>),
}

/// A way through Postern: `guest_path` is the volume in `host_file`.
pub fn through(guest_path: &str, host_file: &Path) -> Way {
    let mut volume = OsString::from(guest_path);
    volume.push("=");
    volume.push(host_file);
    Way::Postern(vec!["--volume".into(), volume])
}

/// What one direction of one job did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Direction {
    /// Requests.
    pub ios: u64,
    /// Bytes.
    pub bytes: u64,
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub rate: f64,
}

/// What fio measured, all jobs together.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Reads.
    pub read: Direction,
    /// Writes.
    pub write: Direction,
    /// Requests that failed and were gone on from.
    pub errors: u64,
    /// errno of the first failure, 0 if none.
    pub error: i64,
}

impl Outcome {
    /// Requests per second of both directions.
    pub fn iops(&self) -> f64 {
        self.read.iops + self.write.iops
    }

    /// Bytes per second of both directions.
    pub fn rate(&self) -> f64 {
        self.read.rate + self.write.rate
    }

    /// Requests of both directions.
    pub fn ios(&self) -> u64 {
        self.read.ios + self.write.ios
    }

    /// Reads the text that `--output-format=json` gives.
    ///
    /// # Errors
    /// If it is no such text.
    pub fn parse(text: &str) -> Result<Self> {
        // Warnings may stand before the first brace.
        let start = text.find('{').context("fio printed no JSON")?;
        let json: Value = serde_json::from_str(&text[start..]).context("fio's JSON is broken")?;
        let jobs = json["jobs"].as_array().context("fio's JSON has no jobs")?;
        let mut outcome = Self::default();
        for job in jobs {
            for (name, into) in [("read", &mut outcome.read), ("write", &mut outcome.write)] {
                into.ios += job[name]["total_ios"].as_u64().unwrap_or(0);
                into.bytes += job[name]["io_bytes"].as_u64().unwrap_or(0);
                into.iops += job[name]["iops"].as_f64().unwrap_or(0.0);
                into.rate += job[name]["bw_bytes"].as_f64().unwrap_or(0.0);
            }
            outcome.errors += job["total_err"].as_u64().unwrap_or(0);
            if outcome.error == 0 {
                outcome.error = job["error"].as_i64().unwrap_or(0);
            }
        }
        Ok(outcome)
    }
}

/// The command that runs fio `way` with `arguments`.
pub fn command(tree: &Tree, way: &Way, arguments: &[String]) -> Command {
    let mut command = match way {
        Way::Raw => Command::new("fio"),
        Way::Postern(before) => {
            let mut command = Command::new(tree.release().join("postern"));
            command.arg("run").args(before).args(["--", "fio"]);
            command
        }
    };
    command.args(arguments);
    command
}

/// Runs fio and reads its JSON from `scratch`, whatever its exit status.
///
/// # Errors
/// If it does not run to the point where it reports.
pub fn measure(tree: &Tree, way: &Way, arguments: &[String], scratch: &Path) -> Result<Outcome> {
    need()?;
    let report: PathBuf = scratch.join("fio.json");
    let _ = std::fs::remove_file(&report);
    let mut arguments = arguments.to_vec();
    arguments.push("--output-format=json".to_owned());
    arguments.push(format!("--output={}", report.display()));
    let mut command = command(tree, way, &arguments);
    let line = line_of(&command);
    let done = output(&mut command)?;
    let said = String::from_utf8_lossy(&done.stderr);
    let text = std::fs::read_to_string(&report)
        .with_context(|| format!("{}: {line}\n{said}", done.status))?;
    let outcome =
        Outcome::parse(&text).with_context(|| format!("{}: {line}\n{said}", done.status))?;
    if !done.status.success() && outcome.errors == 0 && outcome.error == 0 {
        bail!("{}: {line}\n{said}", done.status);
    }
    Ok(outcome)
}

/// Says what to do where fio is missing.
///
/// # Errors
/// If it is.
pub fn need() -> Result<()> {
    if !on_path("fio") {
        bail!("fio is not installed: run `cargo xtask setup` as root, or install it by hand");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_add_up_and_text_before_the_brace_is_skipped() {
        let text = r#"note: both iodepth >= 1
        {"jobs":[
          {"error":0,"total_err":0,"read":{"total_ios":3,"io_bytes":12288,"iops":1.5,"bw_bytes":6144},
           "write":{"total_ios":1,"io_bytes":4096,"iops":0.5,"bw_bytes":2048}},
          {"error":5,"total_err":2,"read":{"total_ios":1,"io_bytes":4096,"iops":1,"bw_bytes":4096},
           "write":{}}]}"#;
        let outcome = Outcome::parse(text).unwrap();
        assert_eq!(outcome.ios(), 5);
        assert_eq!(outcome.read.bytes, 16384);
        assert_eq!((outcome.errors, outcome.error), (2, 5));
        assert!((outcome.iops() - 3.0).abs() < 1e-9);
        assert!(Outcome::parse("fio: broken").is_err());
    }
}
