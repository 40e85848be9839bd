//! `postern trace`: a line for each request that the daemon recorded.
//!
//! Holds: what was recorded and overwritten before it could be read is counted, and said.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufWriter, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};

use super::{Daemon, Record, STAGES, perfetto::Perfetto, printable};
use crate::{error::Failure, stats::micros};

/// How often the daemon is asked.
const ROUND: Duration = Duration::from_millis(100);
/// A gap of more records than this is lost at once; of a smaller one the records may yet come.
const MOST_PENDING: u64 = 4096;

/// `postern trace`.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Only requests of this volume, by its name in `postern top`
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// Only requests of this kind
    #[arg(long, value_enum, value_name = "KIND")]
    pub operation: Option<Kind>,
    /// Only requests that took at least so long (ns, us, ms, s); all of them are recorded
    #[arg(long, value_name = "TIME", value_parser = nanoseconds)]
    pub min_latency: Option<u64>,
    /// Only requests that ended so
    #[arg(long, value_enum, value_name = "RESULT")]
    pub result: Option<Ending>,
    /// Record one request in N instead of one in 1024; 1: all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub one_in: Option<u64>,
    /// Begin with what the daemon still has from before
    #[arg(long)]
    pub recent: bool,
    /// End after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<u64>,
    /// End after so many lines
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Print a JSON object for each request
    #[arg(long)]
    pub json: bool,
    /// Write FILE for ui.perfetto.dev or chrome://tracing instead of lines
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub perfetto: Option<PathBuf>,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[repr(u64)]
pub enum Kind {
    /// Reads
    Read = 1,
    /// Writes
    Write,
    /// Flushes
    Flush,
    /// Space given back
    Discard,
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ending {
    /// Without an error
    Ok,
    /// With an error
    Error,
}

/// A time: digits and one of ns, us, ms, s.
fn nanoseconds(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err("write digits and one of ns, us, ms, s".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "write digits and one of ns, us, ms, s")?;
    number.checked_mul(unit).ok_or_else(|| "that is too long".to_owned())
}

/// Runs `postern trace`.
///
/// # Errors
/// [`crate::error::Exit::NoDaemon`]; a file that can not be written.
pub fn run(args: &TraceArgs) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(&args.socket)?;
    let wish = (args.min_latency.unwrap_or(u64::MAX), args.one_in.unwrap_or(0));
    let mut reader = Reader::default();
    let (records, last) = daemon.records(if args.recent { 0 } else { u64::MAX }, wish)?;
    reader.next = if args.recent {
        let oldest = records.iter().map(|record| record.number).min();
        oldest.unwrap_or(last.saturating_add(1))
    } else {
        last.saturating_add(1)
    };
    let until = args.duration.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut output = Output::open(args)?;
    let mut names = BTreeMap::new();
    let mut printed = 0;
    loop {
        let over = until.is_some_and(|until| Instant::now() >= until);
        let (records, last) = daemon.records(reader.next, wish)?;
        let records = reader.take(records, last);
        if records.iter().any(|record| !names.contains_key(&record.volume)) {
            let volumes = daemon.volumes()?.into_iter();
            names = volumes.map(|volume| (volume.volume, volume.name)).collect();
        }
        for record in records {
            let name = names.get(&record.volume).map_or("?", String::as_str);
            if !wanted(args, &record, name) {
                continue;
            }
            if args.count.is_some_and(|most| printed >= most) {
                break;
            }
            printed += 1;
            output.write(&record, name)?;
        }
        output.flush()?;
        if over || output.gone || args.count.is_some_and(|most| printed >= most) {
            break;
        }
        std::thread::sleep(ROUND);
    }
    output.close()?;
    if reader.lost > 0 {
        eprintln!(
            "postern: {} records were overwritten before they could be read; ask for fewer",
            reader.lost
        );
    }
    Ok(())
}

fn wanted(args: &TraceArgs, record: &Record, name: &str) -> bool {
    args.volume.as_ref().is_none_or(|volume| volume == name)
        && args.operation.is_none_or(|kind| kind as u64 == record.operation)
        && args.min_latency.is_none_or(|least| record.total_ns() >= least)
        && args.result.is_none_or(|ending| (ending == Ending::Error) == (record.result < 0))
}

/// Takes each record once and counts those that never came.
#[derive(Debug, Default)]
struct Reader {
    /// Where the next question begins.
    next: u64,
    /// Highest number that was looked at.
    highest: u64,
    /// Numbers that were missing the last time.
    pending: BTreeSet<u64>,
    lost: u64,
}

impl Reader {
    /// Those of `records` that are new, in the order of their numbers; `last` had been given out
    /// when they were read.
    fn take(&mut self, mut records: Vec<Record>, last: u64) -> Vec<Record> {
        records.sort_unstable_by_key(|record| record.number);
        records.dedup_by_key(|record| record.number);
        let begin = self.highest.max(self.next.saturating_sub(1));
        let pending = std::mem::take(&mut self.pending);
        let arrived: BTreeSet<u64> = records.iter().map(|record| record.number).collect();
        self.lost += pending.difference(&arrived).count() as u64;
        records.retain(|record| record.number > begin || pending.contains(&record.number));
        // A record may be numbered and not yet written: it is waited for once.
        let newest = arrived.last().copied().unwrap_or(0).max(last).max(begin);
        let mut at = begin;
        for &number in arrived.range(begin.saturating_add(1)..).chain([&newest.saturating_add(1)]) {
            let gap = number.saturating_sub(at).saturating_sub(1);
            let kept = gap.min(MOST_PENDING.saturating_sub(self.pending.len() as u64));
            self.lost = self.lost.saturating_add(gap - kept);
            self.pending.extend(number - kept..number);
            at = number;
        }
        self.highest = newest;
        self.next = self.pending.first().copied().unwrap_or(newest.saturating_add(1));
        records
    }
}

/// Where requests are shown.
struct Output {
    to: To,
    /// Whoever read it reads no further.
    gone: bool,
}

enum To {
    Lines(io::Stdout),
    Json(io::Stdout),
    Perfetto(Perfetto<BufWriter<File>>, PathBuf),
}

impl Output {
    fn open(args: &TraceArgs) -> Result<Self, Failure> {
        let to = match &args.perfetto {
            Some(path) => {
                let failed = |error: io::Error| Failure::io("create", path.display(), &error);
                let file = BufWriter::new(File::create(path).map_err(failed)?);
                To::Perfetto(Perfetto::begin(file).map_err(failed)?, path.clone())
            }
            None if args.json => To::Json(io::stdout()),
            None => To::Lines(io::stdout()),
        };
        let mut output = Self { to, gone: false };
        if let To::Lines(out) = &mut output.to {
            let written = writeln!(out, "{}", heading());
            output.done(written)?;
        }
        Ok(output)
    }

    fn write(&mut self, record: &Record, name: &str) -> Result<(), Failure> {
        let written = match &mut self.to {
            _ if self.gone => Ok(()),
            To::Lines(out) => writeln!(out, "{}", line(record, name)),
            To::Json(out) => writeln!(out, "{}", json(record, name)),
            To::Perfetto(perfetto, _) => perfetto.write(record, name),
        };
        self.done(written)
    }

    fn flush(&mut self) -> Result<(), Failure> {
        let flushed = match &mut self.to {
            To::Lines(out) | To::Json(out) => out.flush(),
            To::Perfetto(..) => Ok(()),
        };
        self.done(flushed)
    }

    fn close(&mut self) -> Result<(), Failure> {
        let closed = match &mut self.to {
            To::Perfetto(perfetto, _) => perfetto.end(),
            _ => Ok(()),
        };
        self.done(closed)
    }

    fn done(&mut self, result: io::Result<()>) -> Result<(), Failure> {
        let place = match &self.to {
            To::Perfetto(_, path) => path.display().to_string(),
            _ => "standard output".to_owned(),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.gone = true,
            Err(error) => return Err(Failure::io("write", place, &error)),
            Ok(()) => {}
        }
        Ok(())
    }
}

fn heading() -> String {
    format!(
        "{:>14} {:<16} {:<7} {:>8} {:>14} {:>10} {:>9} {:>9} {:>9} {:>9} {:>8} {:<8} {}",
        "end s",
        "volume",
        "op",
        "bytes",
        "offset",
        "total us",
        "out us",
        "submit us",
        "device us",
        "in us",
        "result",
        "why",
        "request"
    )
}

/// Times that are not known are a dash.
fn line(record: &Record, name: &str) -> String {
    let end = record.ended_ns() / 1000;
    let stage = record.stages().map(|stage| {
        stage.map_or_else(|| "-".to_owned(), |(from, to)| micros(to.saturating_sub(from)))
    });
    format!(
        "{:>14} {:<16} {:<7} {:>8} {:>14} {:>10} {:>9} {:>9} {:>9} {:>9} {:>8} {:<8} {:012x}",
        format!("{}.{:06}", end / 1_000_000, end % 1_000_000),
        printable(name),
        record.operation_name(),
        record.length,
        record.offset,
        micros(record.total_ns()),
        stage[0],
        stage[1],
        stage[2],
        stage[3],
        record.result,
        why(record.why),
        record.id & 0xffff_ffff_ffff
    )
}

/// Why a record was kept, in a word.
fn why(bits: u64) -> &'static str {
    match bits {
        _ if bits & 8 != 0 => "failed",
        _ if bits & 2 != 0 => "slow",
        _ if bits & 4 != 0 => "slowest",
        _ => "sample",
    }
}

fn json(record: &Record, name: &str) -> serde_json::Value {
    let stages: serde_json::Map<_, _> = STAGES
        .iter()
        .zip(record.stages())
        .filter_map(|(stage, way)| {
            let (from, to) = way?;
            Some((format!("{stage}_ns"), to.saturating_sub(from).into()))
        })
        .collect();
    serde_json::json!({
        "number": record.number,
        "request": format!("{:012x}", record.id & 0xffff_ffff_ffff),
        "session": record.session,
        "volume": name,
        "operation": record.operation_name(),
        "offset": record.offset,
        "length": record.length,
        "result": record.result,
        "why": why(record.why),
        "begun_ns": record.begun_ns(),
        "total_ns": record.total_ns(),
        "stages": stages,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(numbers: &[u64]) -> Vec<Record> {
        numbers.iter().map(|&number| Record { number, ..Record::default() }).collect()
    }

    fn numbers(records: &[Record]) -> Vec<u64> {
        records.iter().map(|record| record.number).collect()
    }

    #[test]
    fn each_record_is_shown_once_and_one_that_comes_late_is_not_lost() {
        let mut reader = Reader { next: 5, ..Reader::default() };
        assert_eq!(numbers(&reader.take(records(&[5, 7]), 7)), [5, 7]);
        assert_eq!((reader.next, reader.lost), (6, 0));
        assert_eq!(numbers(&reader.take(records(&[6, 7, 8]), 9)), [6, 8]);
        assert_eq!((reader.next, reader.lost), (9, 0));
        assert_eq!(numbers(&reader.take(records(&[]), 9)), [0u64; 0]);
        assert_eq!((reader.next, reader.lost), (10, 1), "9 had its second chance");
        assert_eq!(numbers(&reader.take(records(&[9, 10]), 10)), [10]);
        assert_eq!(reader.lost, 1);
    }

    #[test]
    fn a_long_gap_is_lost_and_counted_to_the_last_one() {
        let mut reader = Reader { next: 1, ..Reader::default() };
        assert_eq!(numbers(&reader.take(records(&[1_000_000]), 1_000_000)), [1_000_000]);
        assert_eq!(reader.lost, 999_999 - MOST_PENDING);
        assert!(reader.take(records(&[]), 1_000_000).is_empty());
        assert_eq!(reader.lost, 999_999);
    }

    #[test]
    fn a_request_is_a_line_of_its_stages_and_what_is_unknown_a_dash() {
        let record = Record {
            number: 1,
            id: 0x9057_0010_0200_0003,
            operation: 2,
            why: 2,
            offset: 8192,
            length: 4096,
            result: -5,
            picked_ns: 1_000_000_000,
            submitted_ns: 1_000_002_000,
            reaped_ns: 1_000_102_000,
            delivered_ns: 1_000_103_500,
            ..Record::default()
        };
        let shown = line(&record, "da\x1bta");
        let words: Vec<&str> = shown.split_whitespace().collect();
        assert_eq!(
            words,
            [
                "1.000103",
                "da?ta",
                "write",
                "4096",
                "8192",
                "103.5",
                "-",
                "2.0",
                "100.0",
                "1.5",
                "-5",
                "slow",
                "001002000003"
            ]
        );
        let json = json(&record, "data");
        assert_eq!(
            (&json["total_ns"], &json["stages"]["device_ns"]),
            (&103_500.into(), &100_000.into())
        );
        assert!(json["stages"].get("crossing_out_ns").is_none());
        assert_eq!(heading().split_whitespace().next(), Some("end"));
    }

    #[test]
    fn a_time_has_a_unit() {
        assert_eq!(nanoseconds("15us"), Ok(15_000));
        assert_eq!(nanoseconds("2s"), Ok(2_000_000_000));
        for wrong in ["", "5", "us", "-1ms", "1.5ms", "99999999999s"] {
            assert!(nanoseconds(wrong).is_err(), "{wrong}");
        }
    }
}
