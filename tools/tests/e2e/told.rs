//! What the daemon's statistics say of a run, and whether they add up.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

use crate::common::{World, end, fio_words, skip};

/// What may not happen to any request.
const TROUBLES: [&str; 9] = [
    "overwritten",
    "untagged",
    "lane_out_of_range",
    "batch_lost",
    "submit_fault",
    "reap_fault",
    "reap_unmatched",
    "negative_device",
    "negative_reap",
];

/// What a run's statistics say.
pub struct Said {
    pub report: Value,
    /// Requests recorded, by stage and operation.
    rows: BTreeMap<(String, String), u64>,
}

impl Said {
    /// What a report says; `None` (said loudly) where it is not the probes'.
    pub fn of(report: Value) -> Option<Self> {
        if report["source"] != "ebpf" {
            skip(&format!("no probes: {}", report["source_note"]));
            return None;
        }
        let rows = report["stages"].as_array().unwrap().iter().map(|row| {
            let text = |name: &str| row[name].as_str().unwrap().to_owned();
            ((text("stage"), text("operation")), row["count"].as_u64().unwrap())
        });
        let rows = rows.collect();
        Some(Self { report, rows })
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.report["counters"][name].as_u64().unwrap_or_else(|| panic!("{name}"))
    }

    pub fn row(&self, stage: &str, operation: &str) -> u64 {
        self.rows.get(&(stage.to_owned(), operation.to_owned())).copied().unwrap_or(0)
    }

    /// Requests of an operation of which it is known when the device was done, and all.
    pub fn known(&self, operation: &str) -> (u64, u64) {
        (self.row("reap", operation), self.row("device", operation))
    }

    /// Nothing is lost, nothing is counted twice, and what is not known is said.
    #[track_caller]
    pub fn adds_up(&self) {
        for name in TROUBLES {
            assert_eq!(self.counter(&format!("probe_{name}")), 0, "{name}: {}", self.report);
        }
        let all = ["read", "write", "flush"];
        let recorded: u64 = all.iter().map(|operation| self.row("host_submit", operation)).sum();
        let seen = self.counter("probe_requests_seen") - self.counter("probe_not_accepted");
        assert_eq!(recorded, seen, "{}", self.report);
        let elsewhere = ["flushes_here", "flushes_on_thread", "discards"];
        let elsewhere: u64 = elsewhere.iter().map(|name| self.counter(name)).sum();
        assert_eq!(recorded + elsewhere, self.counter("completions"), "{}", self.report);
        let unknown: u64 =
            all.iter().map(|op| self.known(op)).map(|(known, all)| all - known).sum();
        assert_eq!(self.counter("probe_device_end_unknown"), unknown, "{}", self.report);
        let (reads, writes) = (self.known("read"), self.known("write"));
        let complete = reads.0 == reads.1 && writes.0 == writes.1;
        assert_eq!(self.report["source_note"].is_null(), complete, "{}", self.report);
    }
}

/// fio on the volume in the host file `volume`: what the daemon's statistics say of it. `None` (said
/// loudly) where probes can not run.
pub fn measured(world: &World, volume: &Path, options: &[&str], load: &[&str]) -> Option<Said> {
    let file = world.path("stats.json");
    let options = [options, &["--key-file", "v.key", "--stats", file.to_str().unwrap()]].concat();
    let words: Vec<String> =
        fio_words("/sealed/data").into_iter().chain(load.iter().map(|w| (*w).to_owned())).collect();
    let mut shown = std::ffi::OsString::from("/sealed/data=");
    shown.push(volume);
    let mut command = world.postern(["run", "--volume"]);
    end(command.arg(shown).args(options).arg("--").args(words)).expect(0);
    Said::of(serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap())
}
