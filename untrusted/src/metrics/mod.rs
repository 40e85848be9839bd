//! What the daemon has counted, for Prometheus: OpenMetrics 1.0, the text format 0.0.4 for whoever does
//! not ask for that, or protobuf with native histograms for whoever does.
//!
//! Holds: labels are of bounded number (volumes, operations, stages, results, names of counters);
//! each classic bucket's bound is one of the histogram's own, so counts are exact, not interpolated; no
//! label or exemplar holds a key or a plaintext.

mod protobuf;
mod text;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use postern_edl::{CLAIMS, COUNTED_CLAIMS};

use crate::engine::now_ns;
use crate::histogram::Snapshot;
use crate::records::Record;
use crate::report::Source;
use crate::session::Sessions;
use crate::stats::{Merged, StatsHub};
use crate::volumes::{OPERATIONS, OUTCOMES, STAGES, Stage};
use protobuf::Protobuf;
use text::Text;

/// Bounds of the classic buckets: powers of two, less 1, nanoseconds: 1 µs to 17 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 10..=34;

/// A counter of the daemon, or several that differ by one label: family, help, label, and for each
/// its name in the report and the label's value.
type Counter = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const COUNTERS: &[Counter] = &[
    ("submissions", "Descriptors taken from the enclaves.", "", &[("submissions", "")]),
    ("completions", "Completions published to the enclaves.", "", &[("completions", "")]),
    ("batches", "Calls of io_submit that accepted something.", "", &[("batches", "")]),
    (
        "submit_retries",
        "Calls of io_submit that the kernel did not accept whole.",
        "",
        &[("submit_retries", "")],
    ),
    (
        "doorbells",
        "Wake-ups: received by the daemon, or rung for an enclave.",
        "direction",
        &[
            ("doorbells_received", "received"),
            ("doorbells_driver", "driver"),
            ("doorbells_service", "service"),
        ],
    ),
    (
        "spins",
        "Times that a lane spun, by whether work came.",
        "outcome",
        &[("spins_won", "won"), ("spins_lost", "lost")],
    ),
    ("sleeps", "Times that a lane went to sleep.", "", &[("sleeps", "")]),
    (
        "own_flushes",
        "Flushes that io_submit was not asked for, by where they were done.",
        "place",
        &[("flushes_on_thread", "thread"), ("flushes_here", "lane")],
    ),
    (
        "refused_descriptors",
        "Descriptors that were malformed or named no open file.",
        "",
        &[("refused_descriptors", "")],
    ),
    ("refused_connections", "Control connections refused.", "", &[("refused_connections", "")]),
    (
        "broken_rings",
        "Lanes ended because their enclave broke the ring.",
        "",
        &[("broken_rings", "")],
    ),
    (
        "claims_refused",
        "Times claimed by enclaves that were left out, by reason.",
        "reason",
        &[
            ("claims_missing", "missing"),
            ("claims_negative", "negative"),
            ("claims_undelivered", "undelivered"),
        ],
    ),
    (
        "unmatched_completions",
        "Completions by the kernel that belong to no request.",
        "",
        &[("unmatched_completions", "")],
    ),
    (
        "stage_overflows",
        "Times too long for a bucket of their own.",
        "",
        &[("stage_overflows", "")],
    ),
    ("records", "Records of single requests that were kept.", "", &[("records_kept", "")]),
    ("sessions_started", "Sessions started.", "", &[("sessions_started", "")]),
    ("lanes_attached", "Lanes attached.", "", &[("lanes_attached", "")]),
    (
        "leases",
        "What became of leases.",
        "event",
        &[
            ("leases_granted", "granted"),
            ("leases_asked", "asked"),
            ("leases_kept", "kept"),
            ("leases_taken", "taken"),
        ],
    ),
];

/// Which format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0, with units and exemplars.
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Plain,
    /// Prometheus' protobuf, with native histograms beside the classic ones.
    Protobuf,
}

impl Format {
    /// The format that an `Accept` header asks for.
    #[must_use]
    pub fn asked_for(accept: &str) -> Self {
        let mut offers = accept.split(',');
        let delimited = |offer: &str| {
            let words =
                ["application/vnd.google.protobuf", protobuf::MESSAGE, "encoding=delimited"];
            words.iter().all(|word| offer.contains(word))
        };
        if offers.any(delimited) {
            // Prometheus offers it only where it takes native histograms.
            Self::Protobuf
        } else if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Plain
        }
    }

    /// The `Content-Type` of the format.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
            Self::Protobuf => protobuf::CONTENT_TYPE,
        }
    }
}

/// What kind of metric a family is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Count(u64),
    /// Shown in seconds.
    Nanoseconds(u64),
}

type Labels<'a> = &'a [(&'a str, &'a str)];

/// Metrics being written. Names are without `postern_`, and without the `_total` of a counter.
trait Exposition {
    /// Begins a family. `unit` is the last part of its name, or empty.
    fn family(&mut self, name: &str, kind: Kind, unit: &str, help: &str);

    /// A counter or gauge of the family that was begun last.
    fn sample(&mut self, labels: Labels<'_>, value: Number);

    /// A histogram of the family that was begun last.
    fn histogram(&mut self, labels: Labels<'_>, histogram: &Snapshot, exemplar: Option<&Exemplar>);

    /// All of it.
    fn finish(self: Box<Self>) -> Vec<u8>;

    /// A family of one gauge.
    fn gauge(&mut self, name: &str, unit: &str, help: &str, value: u64) {
        self.family(name, Kind::Gauge, unit, help);
        self.sample(&[], Number::Count(value));
    }
}

/// A single request, beside the bucket that it is in.
struct Exemplar {
    request: String,
    ns: u64,
    /// Since 1970.
    at: Duration,
}

/// The metrics as of now.
#[must_use]
pub fn exposed(sessions: &Sessions, source: &Source, format: Format) -> Vec<u8> {
    let mut text: Box<dyn Exposition> = match format {
        Format::OpenMetrics => Box::new(Text::new(true)),
        Format::Plain => Box::new(Text::new(false)),
        Format::Protobuf => Box::<Protobuf>::default(),
    };
    let mut merged = sessions.hub().merged();
    let spins = merged.counters.get("spins").copied().unwrap_or(0);
    let won = merged.counters.get("spins_won").copied().unwrap_or(0);
    merged.counters.insert("spins_lost".to_owned(), spins.saturating_sub(won));

    let name = if matches!(source, Source::Probes(_)) { "ebpf" } else { "daemon" };
    text.family("build_info", Kind::Gauge, "", "Version of the daemon, and who times the stages.");
    let labels = [("version", env!("CARGO_PKG_VERSION")), ("source", name)];
    text.sample(&labels, Number::Count(1));
    let (number, lanes) = sessions.counts();
    text.gauge("sessions", "", "Sessions now.", number);
    text.gauge("lanes", "", "Lanes now.", lanes);
    let rows = sessions.rows();
    let sum = |of: fn(&crate::limits::SessionRow) -> u64| rows.iter().map(of).sum::<u64>();
    text.gauge("open_files", "", "Host files that sessions have open.", sum(|row| row.files));
    let help = "Memory of the ports of all sessions.";
    text.gauge("port_memory_bytes", "bytes", help, sum(|row| row.memory_bytes));
    let help = "Bytes of the requests under way.";
    text.gauge("in_flight_bytes", "bytes", help, sum(|row| row.in_flight_bytes));
    volumes(&mut *text, &merged);
    claims(&mut *text, &merged);
    latency(&mut *text, &merged, sessions.hub());
    for (family, help, label, members) in COUNTERS {
        text.family(family, Kind::Counter, "", help);
        for (counter, value) in *members {
            let count = merged.counters.get(*counter).copied().unwrap_or(0);
            let labels = [(*label, *value)];
            let labels = if label.is_empty() { &[] } else { &labels[..] };
            text.sample(labels, Number::Count(count));
        }
    }
    if let Source::Probes(running) = source {
        probes(&mut *text, running, sessions.hub());
    }
    text.finish()
}

fn volumes(text: &mut dyn Exposition, merged: &Merged) {
    text.family("requests", Kind::Counter, "", "Requests that ended, by result.");
    for (volume, totals) in &merged.volumes {
        for (operation, outcomes) in OPERATIONS.iter().zip(&totals.outcomes) {
            // `ok` also while it is 0: a rate needs a beginning.
            let seen = OUTCOMES.iter().zip(outcomes).enumerate();
            for (_, (result, count)) in seen.filter(|(at, (_, count))| *at == 0 || **count > 0) {
                let labels = [("volume", &**volume), ("operation", operation), ("result", result)];
                text.sample(&labels, Number::Count(*count));
            }
        }
    }
    text.family("moved_bytes", Kind::Counter, "bytes", "Bytes read and written.");
    for (volume, totals) in &merged.volumes {
        for (operation, bytes) in OPERATIONS.iter().zip(&totals.bytes).take(2) {
            let labels = [("volume", &**volume), ("operation", *operation)];
            text.sample(&labels, Number::Count(*bytes));
        }
    }
    text.family(
        "in_flight_requests",
        Kind::Gauge,
        "",
        "Requests that were taken and have not ended.",
    );
    for (volume, totals) in &merged.volumes {
        text.sample(&[("volume", volume)], Number::Count(totals.in_flight()));
    }
}

/// What enclaves claim, as such.
fn claims(text: &mut dyn Exposition, merged: &Merged) {
    let help = "What an enclave claims of its volume; blocks of 4096 bytes.";
    text.family("claimed_events", Kind::Counter, "", help);
    let each = || CLAIMS.iter().enumerate();
    for (volume, claim) in &merged.claims {
        for (at, event) in each().take(COUNTED_CLAIMS) {
            let labels = [("volume", &**volume), ("event", *event)];
            text.sample(&labels, Number::Count(claim[at]));
        }
    }
    let help = "Space in the volumes that are open, as their enclaves claim; blocks of 4096 bytes.";
    text.family("claimed_space_blocks", Kind::Gauge, "blocks", help);
    for (volume, claim) in &merged.claims {
        for (at, state) in each().skip(COUNTED_CLAIMS) {
            let state = state.trim_end_matches("_blocks");
            let labels = [("volume", &**volume), ("state", state)];
            text.sample(&labels, Number::Count(claim[at]));
        }
    }
}

fn latency(text: &mut dyn Exposition, merged: &Merged, hub: &StatsHub) {
    let records = hub.records(0);
    let help =
        "Time of a stage, by the daemon's own clock; crossings rest on the enclave's claims.";
    text.family("stage_seconds", Kind::Histogram, "seconds", help);
    for (volume, totals) in &merged.volumes {
        for (at, operation) in OPERATIONS.iter().enumerate() {
            let last = records.iter().rev().find(|record| {
                record.operation == at as u64 + 1 && hub.name(record.volume) == *volume
            });
            for (stage, name) in STAGES.iter().enumerate() {
                let histogram = &totals.stages[stage][at];
                if histogram.count() > 0 {
                    let labels =
                        [("volume", &**volume), ("operation", *operation), ("stage", *name)];
                    let exemplar = last.and_then(|record| exemplar(record, stage));
                    text.histogram(&labels, histogram, exemplar.as_ref());
                }
            }
        }
    }
}

fn probes(text: &mut dyn Exposition, probes: &crate::probes::Probes, hub: &StatsHub) {
    let help = "Time of a stage, by the probes in the kernel.";
    text.family("probe_stage_seconds", Kind::Histogram, "seconds", help);
    for (volume, stage, operation, histogram) in probes.latency() {
        let volume = hub.name(volume);
        let labels = [("volume", &*volume), ("operation", operation), ("stage", stage)];
        text.histogram(&labels, &histogram, None);
    }
    text.family("probe_events", Kind::Counter, "", "What the probes counted beside times.");
    let counters = probes.counters();
    for (event, count) in counters.iter().filter(|(event, _)| !event.starts_with("missed_")) {
        text.sample(&[("event", event)], Number::Count(*count));
    }
    let costs = probes.costs();
    let mut each = |name: &str, unit, help, value: &dyn Fn(usize) -> Number| {
        text.family(name, Kind::Counter, unit, help);
        for (at, cost) in costs.iter().enumerate() {
            text.sample(&[("program", &cost.name)], value(at));
        }
    };
    let help = "Runs of a probe; 0 unless the kernel counts them (kernel.bpf_stats_enabled).";
    each("probe_runs", "", help, &|at| Number::Count(costs[at].runs));
    let help = "Time in a probe; 0 unless the kernel counts it (kernel.bpf_stats_enabled).";
    each("probe_run_seconds", "seconds", help, &|at| Number::Nanoseconds(costs[at].run_ns));
    let help = "Runs of a probe that were left out because it was running on that processor.";
    each("probe_missed", "", help, &|at| Number::Count(costs[at].missed));
}

/// The stage of a record; `None` if it is not known.
fn exemplar(record: &Record, stage: usize) -> Option<Exemplar> {
    let Record { enqueued_ns, picked_ns, submitted_ns, reaped_ns, delivered_ns, .. } = *record;
    let (from, to) = [
        (enqueued_ns, picked_ns),
        (picked_ns, submitted_ns),
        (submitted_ns, reaped_ns),
        (reaped_ns, delivered_ns),
        (enqueued_ns, delivered_ns),
    ][stage];
    // What a thread does was not submitted.
    let known = stage != Stage::HostSubmit as usize || to > from;
    let ns = to.checked_sub(from).filter(|_| from != 0 && known)?;
    let ago = Duration::from_nanos(now_ns().saturating_sub(reaped_ns));
    let at = SystemTime::now().checked_sub(ago)?.duration_since(UNIX_EPOCH).ok()?;
    Some(Exemplar { request: record.request(), ns, at })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source::Daemon(String::new())
    }

    /// A lane of the volume `name` with reads of these device times.
    fn sessions(name: &str, times_ns: &[u64]) -> Sessions {
        let sessions = Sessions::default();
        let lane = sessions.hub().lane(1, true);
        let stats = lane.volume(lane.place_of(name)).unwrap();
        for &ns in times_ns {
            stats.begin();
            stats.record(Stage::Device, 1, ns);
            stats.end(1, 4096, 4096);
        }
        sessions
    }

    fn text(sessions: &Sessions, source: &Source, format: Format) -> String {
        String::from_utf8(exposed(sessions, source, format)).unwrap()
    }

    fn value(text: &str, sample: &str) -> Option<String> {
        let line = text.lines().find(|line| line.starts_with(&format!("{sample} ")))?;
        line.strip_prefix(sample)?.split_whitespace().next().map(str::to_owned)
    }

    #[test]
    fn a_bucket_counts_the_values_up_to_its_bound_and_no_others() {
        let times = [1_023, 1_024, 2_047, 2_048, 1_000_000, 1 << 50];
        let text = text(&sessions("v", &times), &source(), Format::Plain);
        let labels = r#"volume="v",operation="read",stage="device""#;
        let bucket = |bound: &str| {
            value(&text, &format!("postern_stage_seconds_bucket{{{labels},le=\"{bound}\"}}"))
        };
        for (bound, count) in [
            ("0.000001023", "1"),
            ("0.000002047", "3"),
            ("0.000004095", "4"),
            ("0.000524287", "4"),
            ("0.001048575", "5"),
            ("17.179869183", "5"),
            ("+Inf", "6"),
        ] {
            assert_eq!(bucket(bound).as_deref(), Some(count), "{bound}\n{text}");
        }
        let sum = value(&text, &format!("postern_stage_seconds_sum{{{labels}}}"));
        assert_eq!(sum.as_deref(), Some("1125899.907848766"));
        let count = value(&text, &format!("postern_stage_seconds_count{{{labels}}}"));
        assert_eq!(count.as_deref(), Some("6"));
    }

    /// The escapes are those of the two formats' specifications.
    #[test]
    fn a_volumes_name_cannot_leave_its_label() {
        let name = "a\"} 1\npostern_evil{x=\"\\";
        let text = text(&sessions(name, &[5]), &source(), Format::OpenMetrics);
        assert!(text.contains(r#"volume="a\"} 1\npostern_evil{x=\"\\","#), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("postern_evil")));
    }

    #[test]
    fn the_formats_name_counters_each_in_its_way_and_only_one_has_an_end() {
        let sessions = sessions("v", &[5]);
        let open = text(&sessions, &source(), Format::OpenMetrics);
        let plain = text(&sessions, &source(), Format::Plain);
        assert!(open.contains("# TYPE postern_requests counter\n") && open.ends_with("# EOF\n"));
        assert!(plain.contains("# TYPE postern_requests_total counter\n"));
        assert!(!plain.contains("# EOF") && !plain.contains("# UNIT"));
        let sample = r#"postern_requests_total{volume="v",operation="read",result="ok"}"#;
        assert_eq!(value(&open, sample), value(&plain, sample));
        assert_eq!(value(&open, sample).as_deref(), Some("1"));
        assert_eq!(Format::asked_for("text/plain;q=0.5,*/*"), Format::Plain);
        let accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
        assert_eq!(Format::asked_for(accept), Format::OpenMetrics);
        // As Prometheus 2.42 says it with native histograms switched on.
        let native = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;\
                      encoding=delimited,application/openmetrics-text;version=1.0.0;q=0.8,*/*;q=0.1";
        assert_eq!(Format::asked_for(native), Format::Protobuf);
        let other = "application/vnd.google.protobuf;encoding=text,text/plain";
        assert_eq!(Format::asked_for(other), Format::Plain);
    }
}
