//! What the daemon has measured, in pages of JSON text: what `postern_measured` answers.
//!
//! Holds: a page is never longer than asked for; with the number that a page names next, the pages
//! go over everything once. Does not hold: that pages are of one moment.

use postern_edl::{CLAIMS, MEASURED_LATENCY, MEASURED_PROBES, MEASURED_RECORDS, MEASURED_VOLUMES};
use serde::Serialize;
use serde_json::Value;

use crate::engine::now_ns;
use crate::histogram::Snapshot;
use crate::records::Record;
use crate::report::{Source, report};
use crate::session::Sessions;
use crate::stats::StatsHub;
use crate::volumes::{OPERATIONS, OUTCOMES, STAGES, VolumeTotals};

/// Room that a page's own members may take, bytes.
const FRAME: usize = 256;
/// First number of the probes' histograms.
const OF_PROBES: u64 = 1 << 32;

/// One page.
#[derive(Debug, Serialize)]
struct Page {
    /// CLOCK_MONOTONIC nanoseconds.
    now_ns: u64,
    /// Number of the last record so far.
    last_record: u64,
    /// Number of the first item that is not on this page; 0: there is none.
    next: u64,
    items: Vec<Value>,
}

/// The page of `what` that begins with item `first`, at most `most` bytes; `None` if there is no
/// such thing, or not one item fits.
#[must_use]
pub fn page(
    hub: &StatsHub,
    source: &Source,
    what: u32,
    first: u64,
    most: usize,
) -> Option<Vec<u8>> {
    let last_record = hub.terms().last();
    let items: Box<dyn Iterator<Item = (u64, Value)>> = match what {
        MEASURED_VOLUMES => Box::new(volumes(hub).into_iter()),
        MEASURED_LATENCY => Box::new(latency(hub, source).into_iter()),
        MEASURED_RECORDS => {
            let records = hub.records(first.saturating_sub(1)).into_iter();
            Box::new(records.map(|record| (record.number, told(&record))))
        }
        MEASURED_PROBES => Box::new((1..).zip(programs(source))),
        _ => return None,
    };
    let mut page = Page { now_ns: now_ns(), last_record, next: 0, items: Vec::new() };
    let mut length = FRAME;
    for (number, item) in items.filter(|(number, _)| *number >= first) {
        length += item.to_string().len() + 1;
        if length > most {
            if page.items.is_empty() {
                return None;
            }
            page.next = number;
            break;
        }
        page.items.push(item);
    }
    serde_json::to_vec(&page).ok()
}

/// A record, with its id as other faces show it: a script's numbers do not hold all of one.
fn told(record: &Record) -> Value {
    let mut value = serde_json::to_value(record).unwrap_or_default();
    value["request"] = record.request().into();
    value
}

/// All that was measured but records, with the daemon's report: what the page shows. Of latency at
/// most `most` bytes, as far as that goes; the number of what is left out is in it.
#[must_use]
pub fn snapshot(sessions: &Sessions, source: &Source, most: usize) -> String {
    let (mut length, mut left_out) = (0, 0);
    let mut kept = Vec::new();
    for (_, item) in latency(sessions.hub(), source) {
        length += item.to_string().len() + 1;
        if length <= most {
            kept.push(item);
        } else {
            left_out += 1;
        }
    }
    let volumes: Vec<Value> = volumes(sessions.hub()).into_iter().map(|(_, item)| item).collect();
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now_ns": now_ns(),
        "report": report(sessions, source),
        "volumes": volumes,
        "latency": kept,
        "left_out": left_out,
    })
    .to_string()
}

fn volumes(hub: &StatsHub) -> Vec<(u64, Value)> {
    let claims = hub.claims.all();
    let operation = |totals: &VolumeTotals, at: usize| {
        let outcomes = OUTCOMES.iter().zip(totals.outcomes[at]);
        let outcomes = outcomes.map(|(name, count)| ((*name).to_owned(), count.into()));
        let outcomes: serde_json::Map<_, _> = outcomes.collect();
        serde_json::json!({ "bytes": totals.bytes[at], "outcomes": outcomes })
    };
    let volume = |volume: u64, totals: &VolumeTotals| {
        let operations = (0..).zip(OPERATIONS);
        let operations: serde_json::Map<_, _> =
            operations.map(|(at, name)| (name.to_owned(), operation(totals, at))).collect();
        let mut told = serde_json::json!({
            "volume": volume,
            "name": hub.name(volume),
            "in_flight": totals.in_flight(),
            "operations": operations,
        });
        if let Some(claim) = claims.get(&volume) {
            let claim = CLAIMS.iter().zip(claim);
            let claim = claim.map(|(name, value)| ((*name).to_owned(), (*value).into()));
            told["claimed"] = Value::Object(claim.collect());
        }
        told
    };
    hub.by_volume().iter().map(|(&number, totals)| (number + 1, volume(number, totals))).collect()
}

fn latency(hub: &StatsHub, source: &Source) -> Vec<(u64, Value)> {
    let mut all = Vec::new();
    for (volume, totals) in hub.by_volume() {
        for (stage, of_stage) in totals.stages.iter().enumerate() {
            for (operation, histogram) in of_stage.iter().enumerate() {
                if histogram.count() > 0 {
                    let number = 1 + (volume << 8 | (stage << 4 | operation) as u64);
                    let value =
                        series("daemon", volume, STAGES[stage], OPERATIONS[operation], histogram);
                    all.push((number, value));
                }
            }
        }
    }
    if let Source::Probes(probes) = source {
        let of_probes = (OF_PROBES..).zip(probes.latency());
        for (number, (volume, stage, operation, histogram)) in of_probes {
            all.push((number, series("ebpf", volume, stage, operation, &histogram)));
        }
    }
    all
}

/// The probes as a whole, then each program.
fn programs(source: &Source) -> Vec<Value> {
    let probes = match source {
        Source::Probes(probes) => probes,
        Source::Daemon(why) => return vec![serde_json::json!({ "on": false, "note": why })],
    };
    let note = probes.notes().join("; ");
    let whole = serde_json::json!({
        "on": probes.is_on(),
        "note": Some(note).filter(|note| !note.is_empty()),
        "under_way": probes.under_way(),
        "volumes": probes.volumes(),
    });
    let each = probes.costs().into_iter().map(|cost| {
        serde_json::json!({
            "program": cost.name,
            "verified_instructions": cost.verified_instructions,
            "runs": cost.runs,
            "run_ns": cost.run_ns,
            "missed": cost.missed,
        })
    });
    std::iter::once(whole).chain(each).collect()
}

fn series(source: &str, volume: u64, stage: &str, operation: &str, histogram: &Snapshot) -> Value {
    serde_json::json!({
        "source": source,
        "volume": volume,
        "stage": stage,
        "operation": operation,
        "count": histogram.count(),
        "overflows": histogram.overflows,
        "sum_ns": histogram.sum_ns,
        "max_ns": histogram.max_ns,
        "buckets": histogram.buckets().collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Stage;

    fn pages(hub: &StatsHub, what: u32, most: usize) -> Vec<Value> {
        let (mut all, mut first) = (Vec::new(), 0);
        loop {
            let source = Source::Daemon(String::new());
            let text = page(hub, &source, what, first, most).unwrap();
            assert!(text.len() <= most, "{} bytes", text.len());
            let page: Value = serde_json::from_slice(&text).unwrap();
            all.extend(page["items"].as_array().unwrap().iter().cloned());
            let next = page["next"].as_u64().unwrap();
            if next == 0 {
                return all;
            }
            assert!(next > first, "it goes on");
            first = next;
        }
    }

    #[test]
    fn small_pages_together_say_what_a_large_one_says() {
        let hub = StatsHub::default();
        let lane = hub.lane(1, true);
        for name in ["a", "b\"\n", "c"] {
            let stats = lane.volume(lane.place_of(name)).unwrap();
            for n in 1..50 {
                stats.begin();
                stats.record(Stage::Device, 1 + n % 4, n * 1_000);
                stats.end(1 + n % 4, 0, 0);
            }
        }
        for what in [MEASURED_VOLUMES, MEASURED_LATENCY] {
            let whole = pages(&hub, what, 1 << 17);
            assert_eq!(whole.len(), if what == MEASURED_VOLUMES { 3 } else { 12 });
            assert_eq!(pages(&hub, what, 1_200), whole);
        }
        let volumes = pages(&hub, MEASURED_VOLUMES, 1 << 17);
        assert_eq!(volumes[1]["name"], "b\"\n");
        assert_eq!(volumes[1]["operations"]["read"]["outcomes"]["ok"], 12);
        let source = Source::Daemon(String::new());
        assert!(page(&hub, &source, 0, 0, 1 << 17).is_none());
    }

    #[test]
    fn a_snapshot_says_what_the_pages_say_and_how_much_it_leaves_out() {
        let sessions = Sessions::default();
        let lane = sessions.hub().lane(1, true);
        let stats = lane.volume(lane.place_of("a")).unwrap();
        for n in 1..50 {
            stats.begin();
            stats.record(Stage::Device, 1 + n % 4, n * 1_000);
            stats.end(1 + n % 4, 0, 0);
        }
        let source = Source::Daemon("no probes".to_owned());
        let of = |most| serde_json::from_str::<Value>(&snapshot(&sessions, &source, most)).unwrap();
        let whole = of(1 << 20);
        for (name, what) in [("volumes", MEASURED_VOLUMES), ("latency", MEASURED_LATENCY)] {
            let items = Value::Array(pages(sessions.hub(), what, 1 << 17));
            assert_eq!(whole[name], items, "{name}");
        }
        assert_eq!(whole["left_out"], 0);
        assert_eq!(whole["report"]["source_note"], "no probes");
        let part = of(whole["latency"][0].to_string().len() + 1);
        assert_eq!((part["latency"].as_array().unwrap().len(), &part["left_out"]), (1, &3.into()));
    }

    #[test]
    fn a_record_names_its_request_as_text() {
        let id = 0x9057_0010_0200_0003;
        let told = told(&Record { id, ..Record::default() });
        assert_eq!((&told["request"], &told["id"]), (&"001002000003".into(), &id.into()));
    }
}
