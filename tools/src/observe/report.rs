//! `postern report`: what a daemon does for a while, as one HTML file with the page's pictures.
//!
//! Holds: the file shows without a network and without a daemon; nothing that the daemon answers is
//! read as markup in it; a file that is there is replaced only when the report is complete.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use postern_edl::{MEASURED_LATENCY, MEASURED_VOLUMES};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::{
    Daemon, Record, Series,
    sample::Buckets,
    trace::{Reader, nanoseconds},
};
use crate::error::{Exit, Failure};

/// How often the daemon is asked for records: those of a lane are overwritten in time.
const ROUND: Duration = Duration::from_secs(1);
/// Most intervals in a report: longer ones take their place.
const MOST_INTERVALS: u32 = 60;
/// Most requests in a report: the slowest.
const MOST_RECORDS: usize = 256;
/// Longest report, nanoseconds.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// `postern report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// How long the daemon is watched: 1s to 3600s
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub duration: Duration,
    /// The file to write
    #[arg(long, value_name = "FILE", default_value = "postern-report.html")]
    pub output: PathBuf,
}

fn duration(text: &str) -> Result<Duration, String> {
    let ns = nanoseconds(text)?;
    if !(1_000_000_000..=LONGEST_NS).contains(&ns) {
        return Err("it is at least 1s and at most 3600s".to_owned());
    }
    Ok(Duration::from_nanos(ns))
}

/// Runs `postern report`.
///
/// # Errors
/// [`Exit::NoDaemon`]; a file that can not be written.
pub fn run(args: &ReportArgs) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(&args.socket)?;
    let failed = |error: std::io::Error| Failure::io("write", args.output.display(), &error);
    // Before the time is spent.
    let options = File::options().write(true).create(true).truncate(false).open(&args.output);
    drop(options.map_err(failed)?);
    let report = gather(&mut daemon, args.duration)?;
    let page = postern_page::document(&report.to_string(), &nonce()?);
    std::fs::write(&args.output, page).map_err(failed)?;
    eprintln!("postern: the report is in {}", args.output.display());
    Ok(())
}

/// Watches the daemon; what the page shows.
fn gather(daemon: &mut Daemon<'_>, length: Duration) -> Result<Value, Failure> {
    let begun = Instant::now();
    let seconds = u32::try_from(length.as_secs()).unwrap_or(u32::MAX);
    let intervals = seconds.clamp(1, MOST_INTERVALS);
    let wish = (u64::MAX, 0);
    let (_, last) = daemon.records(u64::MAX, wish)?;
    let mut reader = Reader::from(last.saturating_add(1));
    let (mut records, mut snapshots) = (Vec::new(), Vec::new());
    let mut fold = Fold::default();
    for number in 0..=intervals {
        let until = begun + length * number / intervals;
        loop {
            let (new, last) = daemon.records(reader.next(), wish)?;
            records.append(&mut reader.take(new, last));
            keep_slowest(&mut records);
            let left = until.saturating_duration_since(Instant::now());
            progress(begun.elapsed(), length);
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(ROUND));
        }
        snapshots.push(snapshot(daemon, &mut fold)?);
    }
    progress_ends();
    let mut report: Value = daemon.report()?;
    report["counters"]["records_lost"] = reader.lost().into();
    if let Some(last) = snapshots.last_mut() {
        last["report"] = report;
    }
    let records: Vec<Value> = records.iter().map(told).collect();
    Ok(json!({ "snapshots": snapshots, "records": records }))
}

fn snapshot(daemon: &mut Daemon<'_>, fold: &mut Fold) -> Result<Value, Failure> {
    let wish = (u64::MAX, 0);
    let (volumes, _) = daemon.items::<Value>(MEASURED_VOLUMES, 0, wish)?;
    let (latency, _) = daemon.items::<Series>(MEASURED_LATENCY, 0, wish)?;
    let now = clock_gettime(ClockId::Monotonic);
    let now_ns = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now_ns": u64::try_from(now_ns.as_nanos()).unwrap_or(u64::MAX),
        "at": u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
        "volumes": volumes,
        "latency": fold.changed(latency),
        "left_out": 0,
    }))
}

/// A record as the page takes it.
fn told(record: &Record) -> Value {
    let mut value = serde_json::to_value(record).unwrap_or_default();
    value["request"] = format!("{:012x}", record.id & 0xffff_ffff_ffff).into();
    value
}

fn keep_slowest(records: &mut Vec<Record>) {
    records.sort_by_key(|record| std::cmp::Reverse(record.total_ns()));
    records.truncate(MOST_RECORDS);
}

/// Leaves out of each snapshot's histograms what the one before has the same.
#[derive(Debug, Default)]
struct Fold(BTreeMap<(String, Option<u64>, String, String), Buckets>);

impl Fold {
    /// The series with buckets that changed, and only those buckets; all of them, marked `fresh`,
    /// where counting began anew.
    fn changed(&mut self, latency: Vec<Series>) -> Vec<Value> {
        let mut all = Vec::new();
        for mut series in latency {
            let key = (
                series.source.clone(),
                series.volume,
                series.stage.clone(),
                series.operation.clone(),
            );
            let now: Buckets = series.buckets.iter().copied().collect();
            let was = self.0.insert(key, now.clone()).unwrap_or_default();
            let fresh = was.iter().any(|(top, n)| now.get(top).is_none_or(|now| now < n));
            series.buckets.retain(|(top, n)| fresh || was.get(top) != Some(n));
            if fresh || !series.buckets.is_empty() || was.is_empty() {
                let mut value = serde_json::to_value(series).unwrap_or_default();
                value["fresh"] = fresh.into();
                all.push(value);
            }
        }
        all
    }
}

/// Marks in the file what may run; nobody who made a name on the host could foresee it.
fn nonce() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    if got != Ok(bytes.len()) {
        let advice = "use a kernel that has getrandom(2)";
        return Err(Failure::new(Exit::Internal, "no random bytes", "this system", advice));
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Says on a terminal how far it is.
fn progress(gone: Duration, length: Duration) {
    let mut err = std::io::stderr();
    if err.is_terminal() {
        let gone = gone.min(length).as_secs();
        let _ = write!(err, "\rpostern: watching the daemon: {gone} of {} s", length.as_secs());
    }
}

fn progress_ends() {
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(operation: &str, buckets: &[(u64, u64)]) -> Series {
        Series {
            source: "daemon".to_owned(),
            operation: operation.to_owned(),
            buckets: buckets.to_vec(),
            ..Series::default()
        }
    }

    #[test]
    fn a_snapshot_has_the_buckets_that_changed_and_all_where_counting_began_anew() {
        let mut fold = Fold::default();
        let mut next = |all: &[Series]| {
            let changed = fold.changed(all.to_vec());
            let told =
                |v: &Value| (v["operation"].clone(), v["buckets"].clone(), v["fresh"].clone());
            changed.iter().map(told).collect::<Vec<_>>()
        };
        let all = |buckets: Value, fresh: bool| ("read".into(), buckets, Value::from(fresh));
        let first = next(&[series("read", &[(10, 1), (20, 5)])]);
        assert_eq!(first, [all(json!([[10, 1], [20, 5]]), false)]);
        let second = next(&[series("read", &[(10, 1), (20, 6), (30, 1)])]);
        assert_eq!(second, [all(json!([[20, 6], [30, 1]]), false)]);
        assert!(next(&[series("read", &[(10, 1), (20, 6), (30, 1)])]).is_empty());
        let anew = next(&[series("read", &[(10, 1), (20, 2)])]);
        assert_eq!(anew, [all(json!([[10, 1], [20, 2]]), true)]);
    }

    #[test]
    fn a_report_takes_a_second_to_an_hour_and_each_has_a_nonce_of_its_own() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        for wrong in ["999ms", "3601s", "30", "0s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        let (one, other) = (nonce().unwrap(), nonce().unwrap());
        assert!(one.len() == 32 && one != other && one.bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn the_slowest_requests_are_kept() {
        let record =
            |took: u64| Record { picked_ns: 100, reaped_ns: 100 + took, ..Record::default() };
        let mut records: Vec<Record> = (0..1000).map(record).collect();
        keep_slowest(&mut records);
        assert_eq!(
            (records.len(), records[0].total_ns(), records[255].total_ns()),
            (256, 999, 744)
        );
    }
}
