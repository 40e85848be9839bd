//! What the daemon counts, and the report it makes of it.
//!
//! Every lane writes its own [`LaneStats`] without locks; a report merges the living lanes with
//! what ended lanes left behind. Stages whose start or end lies in the enclave (`crossing_out`,
//! `crossing_in`) rest on stamps that the enclave claims: a stamp that would make a stage negative
//! is counted in `claims_refused`, not in the stage.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use postern_ebpf_common::OPERATIONS;
use serde::{Deserialize, Serialize};

use crate::histogram::{Histogram, bump};
use crate::limits::SessionRow;

/// One stage of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRow {
    /// Name of the stage.
    pub stage: String,
    /// `read`, `write` or `flush`.
    pub operation: String,
    /// Number of requests seen.
    pub count: u64,
    /// Median, nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100 requests took no longer, nanoseconds.
    pub p99_ns: u64,
    /// 999 of 1000 requests took no longer, nanoseconds.
    pub p999_ns: u64,
    /// The longest, nanoseconds.
    pub max_ns: u64,
    /// All together, nanoseconds.
    pub sum_ns: u64,
}

impl StageRow {
    /// The row of a histogram; `None` while it holds nothing.
    #[must_use]
    pub fn of(stage: &str, operation: &str, histogram: &Histogram) -> Option<Self> {
        (histogram.count() > 0).then(|| Self {
            stage: stage.to_owned(),
            operation: operation.to_owned(),
            count: histogram.count(),
            p50_ns: histogram.quantile(500),
            p99_ns: histogram.quantile(990),
            p999_ns: histogram.quantile(999),
            max_ns: histogram.max(),
            sum_ns: histogram.sum(),
        })
    }
}

/// What `postern_stats` and `--stats-file` answer, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Where [`Self::stages`] comes from: `ebpf` or `daemon`.
    pub source: String,
    /// Why `source` is not `ebpf`, and what to do about it.
    pub source_note: Option<String>,
    /// Latency by stage and operation.
    pub stages: Vec<StageRow>,
    /// The daemon's own coarse stages; the same as [`Self::stages`] when `source` is `daemon`.
    pub daemon_stages: Vec<StageRow>,
    /// Events by name since the daemon started.
    pub counters: BTreeMap<String, u64>,
    /// Sessions now.
    pub sessions: u64,
    /// Lanes now.
    pub lanes: u64,
    /// What each session has and had, by number.
    #[serde(default)]
    pub each_session: Vec<SessionRow>,
}

/// The daemon's own stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Published by the enclave (claimed) until taken from the ring.
    CrossingOut,
    /// Taken from the ring until io_submit returned.
    HostSubmit,
    /// io_submit returned until reaped.
    Device,
    /// Reaped until delivered in the enclave (claimed).
    CrossingIn,
}

/// Names of the stages, by [`Stage`].
pub const STAGES: [&str; 4] = ["crossing_out", "host_submit", "device", "crossing_in"];

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one lane. Only the lane's thread writes them.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl Counters {
            fn absorb(&self, other: &Self) {
                $(bump(&self.$name, other.$name.load(Relaxed));)*
            }

            fn name_all(&self, into: &mut BTreeMap<String, u64>) {
                $(*into.entry(stringify!($name).to_owned()).or_default() +=
                    self.$name.load(Relaxed);)*
            }
        }
    };
}

counters! {
    /// Descriptors taken from submission rings.
    submissions,
    /// Completions published.
    completions,
    /// io_submit calls that accepted something.
    batches,
    /// io_submit calls that the kernel answered with EAGAIN, or accepted only in part.
    submit_retries,
    /// Wake-ups by the enclave's doorbell.
    doorbells_received,
    /// Doorbells rung for a driver thread of the enclave.
    doorbells_driver,
    /// Doorbells rung for the service thread of the enclave.
    doorbells_service,
    /// Times a lane spun, waiting for work.
    spins,
    /// Times work came while a lane spun.
    spins_won,
    /// Times a lane went to sleep.
    sleeps,
    /// Bytes that reads brought.
    bytes_read,
    /// Bytes that writes took.
    bytes_written,
    /// Flushes completed.
    flushes,
    /// Flushes by fdatasync on a thread, because the file has no asynchronous one.
    flushes_on_thread,
    /// Flushes by fdatasync in the lane itself, because they are short and nothing else was in
    /// flight. The probes see only those that io_submit was asked for.
    flushes_here,
    /// Ranges given back to the host's file system.
    discards,
    /// Descriptors refused: malformed, or for a file that is not open.
    refused_descriptors,
    /// Host requests that failed.
    errors,
    /// Claimed stamps left out because they contradict the daemon's clock.
    claims_refused,
    /// Lanes ended because their ring was broken.
    broken_rings,
}

/// Everything a lane counts.
#[derive(Debug, Default)]
pub struct LaneStats {
    stages: [[Histogram; OPERATIONS.len() - 1]; STAGES.len()],
    /// Event counters.
    pub counters: Counters,
}

impl LaneStats {
    /// Counts `ns` nanoseconds in `stage` of port operation `op` (1..=3; others are ignored).
    /// Only the lane's thread may call this.
    #[inline]
    pub fn record(&self, stage: Stage, op: u64, ns: u64) {
        if let Some(histogram) = usize::try_from(op.wrapping_sub(1))
            .ok()
            .and_then(|op| self.stages[stage as usize].get(op))
        {
            histogram.record(ns);
        }
    }

    /// Counts the time from `from_ns` to `to_ns`, one of which the enclave claims: left out where
    /// it runs backwards or has no start.
    #[inline]
    pub fn record_claimed(&self, stage: Stage, op: u64, from_ns: u64, to_ns: u64) {
        match to_ns.checked_sub(from_ns) {
            Some(ns) if from_ns != 0 => self.record(stage, op, ns),
            _ => self.add(|c| &c.claims_refused, 1),
        }
    }

    /// Adds to a counter. Only the lane's thread may call this.
    #[inline]
    pub fn add(&self, which: impl Fn(&Counters) -> &AtomicU64, by: u64) {
        bump(which(&self.counters), by);
    }

    fn absorb(&self, other: &Self) {
        for (mine, theirs) in self.stages.iter().flatten().zip(other.stages.iter().flatten()) {
            mine.absorb(theirs);
        }
        self.counters.absorb(&other.counters);
    }

    fn rows(&self) -> Vec<StageRow> {
        let mut rows = Vec::new();
        for (stage, operations) in STAGES.iter().zip(&self.stages) {
            for (name, histogram) in OPERATIONS[1..].iter().zip(operations) {
                rows.extend(StageRow::of(stage, name, histogram));
            }
        }
        rows
    }
}

/// The lanes that count, and what ended lanes counted.
#[derive(Debug, Default)]
pub struct StatsHub {
    inner: Mutex<Inner>,
    /// Connections refused before a lane was attached, by any reason.
    pub refused_connections: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    living: Vec<Arc<LaneStats>>,
    ended: LaneStats,
    lanes_attached: u64,
    sessions_started: u64,
}

impl StatsHub {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters for a new lane; `first` says that it starts a session.
    pub fn lane(&self, first: bool) -> Arc<LaneStats> {
        let stats = Arc::new(LaneStats::default());
        let mut inner = self.lock();
        inner.lanes_attached += 1;
        inner.sessions_started += u64::from(first);
        inner.living.push(Arc::clone(&stats));
        stats
    }

    /// Keeps what a lane counted; its thread must have ended.
    pub fn retire(&self, lane: &Arc<LaneStats>) {
        let mut inner = self.lock();
        let before = inner.living.len();
        inner.living.retain(|l| !Arc::ptr_eq(l, lane));
        if inner.living.len() < before {
            inner.ended.absorb(lane);
        }
    }

    /// The daemon's own stages and counters, merged.
    #[must_use]
    pub fn merged(&self) -> (Vec<StageRow>, BTreeMap<String, u64>) {
        let inner = self.lock();
        let total = LaneStats::default();
        total.absorb(&inner.ended);
        for lane in &inner.living {
            total.absorb(lane);
        }
        let mut counters = BTreeMap::new();
        total.counters.name_all(&mut counters);
        counters.insert("lanes_attached".to_owned(), inner.lanes_attached);
        counters.insert("sessions_started".to_owned(), inner.sessions_started);
        counters.insert("refused_connections".to_owned(), self.refused_connections.load(Relaxed));
        (total.rows(), counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_lane_still_counts_in_the_report() {
        let hub = StatsHub::default();
        let (one, two) = (hub.lane(true), hub.lane(false));
        one.record(Stage::Device, 1, 1_000);
        two.record(Stage::Device, 1, 3_000);
        two.add(|c| &c.submissions, 5);
        hub.retire(&two);
        hub.retire(&two);
        let (rows, counters) = hub.merged();
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].stage.as_str(), rows[0].operation.as_str()), ("device", "read"));
        assert_eq!((rows[0].count, rows[0].sum_ns, rows[0].max_ns), (2, 4_000, 3_000));
        assert_eq!((counters["submissions"], counters["lanes_attached"]), (5, 2));
    }

    #[test]
    fn a_stamp_that_runs_backwards_is_refused_and_counted() {
        let hub = StatsHub::default();
        let lane = hub.lane(true);
        lane.record_claimed(Stage::CrossingOut, 2, 500, 400);
        lane.record_claimed(Stage::CrossingOut, 2, 0, 400);
        lane.record_claimed(Stage::CrossingOut, 2, 100, 400);
        lane.record(Stage::Device, 77, 1);
        let (rows, counters) = hub.merged();
        assert_eq!(counters["claims_refused"], 2);
        assert_eq!((rows.len(), rows[0].count, rows[0].sum_ns), (1, 1, 300));
    }

    #[test]
    fn the_report_survives_its_own_json() {
        let report = StatsReport {
            source: "daemon".into(),
            source_note: Some("no CAP_BPF; run with more".into()),
            stages: vec![StageRow { stage: "device".into(), count: 3, ..StageRow::default() }],
            counters: BTreeMap::from([("errors".to_owned(), u64::MAX)]),
            ..StatsReport::default()
        };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<StatsReport>(&json).unwrap(), report);
    }
}
