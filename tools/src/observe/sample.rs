//! What a daemon had counted at one time, and what came between two of them.
//!
//! Holds: rates and percentiles are those of the interval alone; a daemon that took another's place
//! counts from nothing again, which shows as an interval of its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Daemon, OPERATIONS, Series, Volume};
use crate::error::Failure;

/// The stage that covers a request's whole way.
pub const WHOLE: &str = "end_to_end";
/// Stages in the order of a request's way, the daemon's and the probes'.
pub const ORDER: [&str; 6] =
    ["crossing_out", "host_submit", "device", "reap", "crossing_in", WHOLE];

/// What of the daemon's report is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Who times stages: `ebpf` or `daemon`.
    pub source: String,
    /// Events by name.
    pub counters: BTreeMap<String, u64>,
    /// What each session has and had.
    #[serde(default)]
    pub each_session: Vec<SessionRow>,
}

/// What one session has and had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Its number.
    pub session: u64,
    /// Process that started it.
    pub process: i32,
    /// Lanes now.
    pub lanes: u64,
    /// Open host files now.
    pub files: u64,
    /// Requests under way now.
    pub in_flight: u64,
    /// Requests so far.
    pub requests: u64,
    /// Bytes that they asked for.
    pub bytes: u64,
}

/// What a daemon had counted at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// When, nanoseconds since any time.
    pub at_ns: u64,
    /// Its report.
    pub report: Report,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Latency by volume, operation and stage.
    pub latency: Vec<Series>,
}

impl Sample {
    /// Asks the daemon.
    ///
    /// # Errors
    /// As [`Daemon`].
    pub fn take(daemon: &mut Daemon<'_>, at_ns: u64) -> Result<Self, Failure> {
        Ok(Self {
            at_ns,
            volumes: daemon.volumes()?,
            latency: daemon.latency()?,
            report: daemon.report()?,
        })
    }
}

/// A histogram: largest value of each bucket, nanoseconds, and the number of its values.
pub type Buckets = BTreeMap<u64, u64>;

/// The bucket top that `per_mille` of a thousand values do not exceed; 0 if there is no value.
pub fn quantile(buckets: &Buckets, per_mille: u64) -> u64 {
    let total: u64 = buckets.values().sum();
    let wanted = (u128::from(total) * u128::from(per_mille)).div_ceil(1000).max(1);
    let mut seen = 0;
    for (&top, &count) in buckets {
        seen += u128::from(count);
        if seen >= wanted {
            return top;
        }
    }
    0
}

/// What one volume did in an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VolumeRow {
    /// Its number.
    pub volume: u64,
    /// Its name.
    pub name: String,
    /// Requests under way at the end.
    pub in_flight: u64,
    /// Requests a second, by operation.
    pub per_second: BTreeMap<String, f64>,
    /// Bytes a second read, and written.
    pub read_bytes_per_second: f64,
    /// As before.
    pub written_bytes_per_second: f64,
    /// Requests that failed.
    pub errors: u64,
    /// Median of the whole way, nanoseconds, and the time that 99 of 100 requests did not exceed.
    pub p50_ns: u64,
    /// As before.
    pub p99_ns: u64,
    /// What its enclaves claim so far, by name.
    pub claimed: BTreeMap<String, u64>,
}

impl VolumeRow {
    /// A claim; 0 where there is none.
    pub fn claim(&self, name: &str) -> u64 {
        self.claimed.get(name).copied().unwrap_or(0)
    }

    /// Requests a second.
    pub fn rate(&self) -> f64 {
        self.per_second.values().sum()
    }

    /// Bytes a second.
    pub fn throughput(&self) -> f64 {
        self.read_bytes_per_second + self.written_bytes_per_second
    }
}

/// Latency of one stage in an interval, nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StageRow {
    /// Name of the stage.
    pub stage: String,
    /// Name of the operation.
    pub operation: String,
    /// Requests.
    pub count: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// 999 of 1000 took no longer.
    pub p999_ns: u64,
}

/// What a daemon did between two samples.
#[derive(Clone, Debug, Default)]
pub struct Interval {
    /// Its length, seconds.
    pub seconds: f64,
    /// The volumes at its end, in the order of their numbers.
    pub volumes: Vec<VolumeRow>,
    /// Requests a second of each session at its end.
    pub sessions: Vec<(SessionRow, f64)>,
    /// Histograms by volume, stage and operation.
    histograms: BTreeMap<(u64, String, String), Buckets>,
}

impl Interval {
    /// What happened between `before` and `after`.
    pub fn between(before: &Sample, after: &Sample) -> Self {
        let seconds = after.at_ns.saturating_sub(before.at_ns).max(1) as f64 / 1e9;
        let histograms = differences(before, after);
        let mut interval = Self { seconds, histograms, ..Self::default() };
        let nothing = Volume::default();
        for volume in &after.volumes {
            let was = before.volumes.iter().find(|was| was.volume == volume.volume);
            interval.volumes.push(interval.volume(was.unwrap_or(&nothing), volume));
        }
        for session in &after.report.each_session {
            let mut all = before.report.each_session.iter();
            let was = all.find(|was| was.session == session.session).map_or(0, |was| was.requests);
            let rate = session.requests.saturating_sub(was) as f64 / seconds;
            interval.sessions.push((session.clone(), rate));
        }
        interval
    }

    fn volume(&self, was: &Volume, is: &Volume) -> VolumeRow {
        let of = |volume: &Volume, operation: &str| {
            volume.operations.get(operation).cloned().unwrap_or_default()
        };
        let mut row = VolumeRow {
            volume: is.volume,
            name: is.name.clone(),
            in_flight: is.in_flight,
            claimed: is.claimed.clone(),
            ..VolumeRow::default()
        };
        for operation in OPERATIONS {
            let (was, is) = (of(was, operation), of(is, operation));
            let mut count = 0;
            for (outcome, now) in &is.outcomes {
                let more = now.saturating_sub(was.outcomes.get(outcome).copied().unwrap_or(0));
                count += more;
                if outcome != "ok" && outcome != "short" {
                    row.errors += more;
                }
            }
            row.per_second.insert(operation.to_owned(), count as f64 / self.seconds);
            let bytes = is.bytes.saturating_sub(was.bytes) as f64 / self.seconds;
            match operation {
                "read" => row.read_bytes_per_second = bytes,
                "write" => row.written_bytes_per_second = bytes,
                _ => {}
            }
        }
        let whole = self.merged(Some(is.volume), WHOLE, None);
        (row.p50_ns, row.p99_ns) = (quantile(&whole, 500), quantile(&whole, 990));
        row
    }

    /// The histogram of a stage, of one volume or of all, of one operation or of all.
    pub fn merged(&self, volume: Option<u64>, stage: &str, operation: Option<&str>) -> Buckets {
        let mut all = Buckets::new();
        for ((of, name, kind), buckets) in &self.histograms {
            let wanted = volume.is_none_or(|volume| volume == *of)
                && name == stage
                && operation.is_none_or(|operation| operation == kind);
            for (&top, &count) in buckets.iter().filter(|_| wanted) {
                *all.entry(top).or_default() += count;
            }
        }
        all
    }

    /// Latency by stage and operation, of one volume or of all.
    pub fn stages(&self, volume: Option<u64>) -> Vec<StageRow> {
        let mut rows = Vec::new();
        for operation in OPERATIONS {
            for stage in ORDER {
                let buckets = self.merged(volume, stage, Some(operation));
                let count: u64 = buckets.values().sum();
                if count > 0 {
                    rows.push(StageRow {
                        stage: stage.to_owned(),
                        operation: operation.to_owned(),
                        count,
                        p50_ns: quantile(&buckets, 500),
                        p99_ns: quantile(&buckets, 990),
                        p999_ns: quantile(&buckets, 999),
                    });
                }
            }
        }
        rows
    }
}

/// What the daemon's own histograms grew by; one that shrank is another daemon's, and counts whole.
fn differences(before: &Sample, after: &Sample) -> BTreeMap<(u64, String, String), Buckets> {
    let key = |series: &Series| {
        let volume = series.volume.filter(|_| series.source == "daemon")?;
        Some((volume, series.stage.clone(), series.operation.clone()))
    };
    let mut was: BTreeMap<_, Buckets> = before
        .latency
        .iter()
        .filter_map(|series| Some((key(series)?, series.buckets.iter().copied().collect())))
        .collect();
    let mut all = BTreeMap::new();
    for series in &after.latency {
        let Some(key) = key(series) else { continue };
        let is: Buckets = series.buckets.iter().copied().collect();
        let was = was.remove(&key).unwrap_or_default();
        let shrank = was.iter().any(|(top, count)| is.get(top).copied().unwrap_or(0) < *count);
        let more = is.into_iter().map(|(top, count)| {
            let before = if shrank { 0 } else { was.get(&top).copied().unwrap_or(0) };
            (top, count - before)
        });
        all.insert(key, more.filter(|(_, count)| *count > 0).collect());
    }
    all
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::observe::Operation;

    /// A daemon's state after `reads` reads of two volumes, the second at half the rate and ten
    /// times slower.
    pub fn recorded(at_ns: u64, reads: u64) -> Sample {
        let volume = |volume: u64, name: &str, reads: u64| Volume {
            volume,
            name: name.to_owned(),
            in_flight: volume,
            operations: BTreeMap::from([(
                "read".to_owned(),
                Operation {
                    bytes: reads * 4096,
                    outcomes: BTreeMap::from([
                        ("ok".to_owned(), reads),
                        ("device_error".to_owned(), reads / 100),
                    ]),
                },
            )]),
            claimed: BTreeMap::from([
                ("checkpoints".to_owned(), volume),
                ("free_blocks".to_owned(), 9),
                ("integrity_failures".to_owned(), 2),
            ]),
        };
        let series = |volume: u64, stage: &str, top: u64, count: u64| Series {
            source: "daemon".to_owned(),
            volume: Some(volume),
            stage: stage.to_owned(),
            operation: "read".to_owned(),
            buckets: vec![(top, count - count / 20), (top * 8, count / 20)],
            ..Series::default()
        };
        let session = SessionRow {
            session: 7,
            process: 4711,
            lanes: 2,
            requests: reads,
            ..SessionRow::default()
        };
        Sample {
            at_ns,
            report: Report {
                source: "daemon".to_owned(),
                counters: BTreeMap::new(),
                each_session: vec![session],
            },
            volumes: vec![volume(1, "fast", reads), volume(2, "slow", reads / 2)],
            latency: vec![
                series(1, "device", 16_000, reads),
                series(1, WHOLE, 20_000, reads),
                series(2, "device", 160_000, reads / 2),
                series(2, WHOLE, 200_000, reads / 2),
            ],
        }
    }

    #[test]
    fn an_interval_has_the_rates_and_percentiles_of_its_own() {
        let before = recorded(1_000_000_000, 10_000);
        let mut after = recorded(3_000_000_000, 30_000);
        // All that came in between took longer.
        after.latency[1].buckets = vec![(20_000, 9_500), (160_000, 500), (900_000, 20_000)];
        let interval = Interval::between(&before, &after);
        let rows = &interval.volumes;
        assert_eq!((rows[0].name.as_str(), rows[0].rate()), ("fast", 10_100.0));
        assert_eq!((rows[1].rate(), rows[0].errors), (5_050.0, 200));
        assert_eq!(rows[0].throughput(), 10_000.0 * 4096.0);
        assert_eq!((rows[0].p50_ns, rows[0].p99_ns), (900_000, 900_000));
        assert_eq!((rows[1].p50_ns, rows[1].p99_ns), (200_000, 1_600_000));
        assert_eq!(interval.sessions[0].1, 10_000.0);
        let stages = interval.stages(Some(2));
        assert_eq!((stages.len(), stages[0].stage.as_str()), (2, "device"));
        assert_eq!((stages[0].count, stages[0].p50_ns), (10_000, 160_000));
        assert_eq!(interval.stages(None)[0].count, 30_000);
    }

    #[test]
    fn a_daemon_that_took_anothers_place_is_counted_from_nothing() {
        let interval = Interval::between(&recorded(0, 50_000), &recorded(1_000_000_000, 1_000));
        assert_eq!(interval.stages(Some(1))[0].count, 1_000);
        assert_eq!(interval.volumes[0].rate(), 0.0);
    }
}
