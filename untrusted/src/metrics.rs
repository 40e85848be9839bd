//! What the daemon has counted, as text for Prometheus: OpenMetrics 1.0, or, for whoever does not
//! ask for that, the text format 0.0.4.
//!
//! Holds: labels are of bounded number (volumes, operations, stages, results, names of counters);
//! each bucket's bound is one of the histogram's own, so counts are exact, not interpolated; no
//! label or exemplar holds a key or a plaintext.

use std::fmt::{Display, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::engine::now_ns;
use crate::histogram::Snapshot;
use crate::records::Record;
use crate::report::Source;
use crate::session::Sessions;
use crate::stats::{Merged, StatsHub};
use crate::volumes::{OPERATIONS, OUTCOMES, STAGES, Stage};

/// Bounds of the buckets: powers of two, less 1, nanoseconds: 1 µs to 17 s.
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

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0, with units and exemplars.
    OpenMetrics,
    /// Prometheus text 0.0.4.
    Plain,
}

impl Format {
    /// The format that an `Accept` header asks for.
    #[must_use]
    pub fn asked_for(accept: &str) -> Self {
        let open = accept.contains("application/openmetrics-text");
        if open { Self::OpenMetrics } else { Self::Plain }
    }

    /// The `Content-Type` of the format.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The metrics as of now.
#[must_use]
pub fn text(sessions: &Sessions, source: &Source, format: Format) -> String {
    let mut text = Text { out: String::with_capacity(64 << 10), format };
    let mut merged = sessions.hub().merged();
    let spins = merged.counters.get("spins").copied().unwrap_or(0);
    let won = merged.counters.get("spins_won").copied().unwrap_or(0);
    merged.counters.insert("spins_lost".to_owned(), spins.saturating_sub(won));

    let name = if matches!(source, Source::Probes(_)) { "ebpf" } else { "daemon" };
    text.family("build_info", "gauge", "", "Version of the daemon, and who times the stages.");
    let labels = [("version", env!("CARGO_PKG_VERSION")), ("source", name)];
    text.sample("build_info", &labels, 1);
    let (number, lanes) = sessions.counts();
    text.gauge("sessions", "Sessions now.", number);
    text.gauge("lanes", "Lanes now.", lanes);
    let rows = sessions.rows();
    let sum = |of: fn(&crate::limits::SessionRow) -> u64| rows.iter().map(of).sum::<u64>();
    text.gauge("open_files", "Host files that sessions have open.", sum(|row| row.files));
    text.family("port_memory_bytes", "gauge", "bytes", "Memory of the ports of all sessions.");
    text.sample("port_memory_bytes", &[], sum(|row| row.memory_bytes));
    text.family("in_flight_bytes", "gauge", "bytes", "Bytes of the requests under way.");
    text.sample("in_flight_bytes", &[], sum(|row| row.in_flight_bytes));
    volumes(&mut text, &merged);
    latency(&mut text, &merged, sessions.hub());
    for (family, help, label, members) in COUNTERS {
        text.family(family, "counter", "", help);
        for (counter, value) in *members {
            let count = merged.counters.get(*counter).copied().unwrap_or(0);
            let labels = [(*label, *value)];
            let labels = if label.is_empty() { &[] } else { &labels[..] };
            text.sample(&format!("{family}_total"), labels, count);
        }
    }
    if let Source::Probes(running) = source {
        probes(&mut text, running, sessions.hub());
    }
    if format == Format::OpenMetrics {
        text.out.push_str("# EOF\n");
    }
    text.out
}

fn volumes(text: &mut Text, merged: &Merged) {
    text.family("requests", "counter", "", "Requests that ended, by result.");
    for (volume, totals) in &merged.volumes {
        for (operation, outcomes) in OPERATIONS.iter().zip(&totals.outcomes) {
            // `ok` also while it is 0: a rate needs a beginning.
            let seen = OUTCOMES.iter().zip(outcomes).enumerate();
            for (_, (result, count)) in seen.filter(|(at, (_, count))| *at == 0 || **count > 0) {
                let labels = [("volume", &**volume), ("operation", operation), ("result", result)];
                text.sample("requests_total", &labels, count);
            }
        }
    }
    text.family("moved_bytes", "counter", "bytes", "Bytes read and written.");
    for (volume, totals) in &merged.volumes {
        for (operation, bytes) in OPERATIONS.iter().zip(&totals.bytes).take(2) {
            let labels = [("volume", &**volume), ("operation", *operation)];
            text.sample("moved_bytes_total", &labels, bytes);
        }
    }
    text.family("in_flight_requests", "gauge", "", "Requests that were taken and have not ended.");
    for (volume, totals) in &merged.volumes {
        text.sample("in_flight_requests", &[("volume", volume)], totals.in_flight());
    }
}

fn latency(text: &mut Text, merged: &Merged, hub: &StatsHub) {
    let records = hub.records(0);
    let help =
        "Time of a stage, by the daemon's own clock; crossings rest on the enclave's claims.";
    text.family("stage_seconds", "histogram", "seconds", help);
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
                    text.histogram("stage_seconds", &labels, histogram, exemplar.as_ref());
                }
            }
        }
    }
}

fn probes(text: &mut Text, probes: &crate::probes::Probes, hub: &StatsHub) {
    let help = "Time of a stage, by the probes in the kernel.";
    text.family("probe_stage_seconds", "histogram", "seconds", help);
    for (volume, stage, operation, histogram) in probes.latency() {
        let volume = hub.name(volume);
        let labels = [("volume", &*volume), ("operation", operation), ("stage", stage)];
        text.histogram("probe_stage_seconds", &labels, &histogram, None);
    }
    text.family("probe_events", "counter", "", "What the probes counted beside times.");
    let counters = probes.counters();
    for (event, count) in counters.iter().filter(|(event, _)| !event.starts_with("missed_")) {
        text.sample("probe_events_total", &[("event", event)], count);
    }
    let costs = probes.costs();
    let mut each = |name: &str, unit, help, value: &dyn Fn(usize) -> String| {
        text.family(name, "counter", unit, help);
        for (at, cost) in costs.iter().enumerate() {
            text.sample(&format!("{name}_total"), &[("program", &cost.name)], value(at));
        }
    };
    let help = "Runs of a probe; 0 unless the kernel counts them (kernel.bpf_stats_enabled).";
    each("probe_runs", "", help, &|at| costs[at].runs.to_string());
    let help = "Time in a probe; 0 unless the kernel counts it (kernel.bpf_stats_enabled).";
    each("probe_run_seconds", "seconds", help, &|at| seconds(costs[at].run_ns));
    let help = "Runs of a probe that were left out because it was running on that processor.";
    each("probe_missed", "", help, &|at| costs[at].missed.to_string());
}

/// A single request, beside the bucket that it is in.
struct Exemplar {
    request: String,
    ns: u64,
    /// Seconds since 1970.
    at: String,
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
    let at = format!("{}.{:03}", at.as_secs(), at.subsec_millis());
    Some(Exemplar { request: record.request(), ns, at })
}

struct Text {
    out: String,
    format: Format,
}

impl Text {
    /// Begins a family. `unit` is the last part of its name, or empty.
    fn family(&mut self, name: &str, kind: &str, unit: &str, help: &str) {
        let Self { out, format } = self;
        // The older format has counters under the name of their samples.
        let suffix = if *format == Format::Plain && kind == "counter" { "_total" } else { "" };
        let _ = writeln!(out, "# HELP postern_{name}{suffix} {help}");
        let _ = writeln!(out, "# TYPE postern_{name}{suffix} {kind}");
        if *format == Format::OpenMetrics && !unit.is_empty() {
            let _ = writeln!(out, "# UNIT postern_{name} {unit}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", "", help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.name(name, labels, None);
        let _ = writeln!(self.out, " {value}");
    }

    fn name(&mut self, name: &str, labels: &[(&str, &str)], bound: Option<&str>) {
        let _ = write!(self.out, "postern_{name}");
        let bound = bound.map(|bound| ("le", bound));
        for (n, (label, value)) in labels.iter().copied().chain(bound).enumerate() {
            let _ = write!(self.out, "{}{label}=\"", if n == 0 { '{' } else { ',' });
            for c in value.chars() {
                match c {
                    '\\' => self.out.push_str("\\\\"),
                    '"' => self.out.push_str("\\\""),
                    '\n' => self.out.push_str("\\n"),
                    c => self.out.push(c),
                }
            }
            self.out.push('"');
        }
        if !labels.is_empty() || bound.is_some() {
            self.out.push('}');
        }
    }

    fn histogram(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        histogram: &Snapshot,
        mut exemplar: Option<&Exemplar>,
    ) {
        if self.format == Format::Plain {
            exemplar = None;
        }
        let mut buckets = histogram.buckets().peekable();
        let mut count = 0;
        let bounds = BOUNDS.map(|bit| Some((1u64 << bit) - 1)).chain([None]);
        for bound_ns in bounds {
            while let Some((_, n)) =
                buckets.next_if(|(top, _)| bound_ns.is_none_or(|bound| *top <= bound))
            {
                count += n;
            }
            let bound = bound_ns.map_or_else(|| "+Inf".to_owned(), seconds);
            let count = if bound_ns.is_none() { histogram.count() } else { count };
            self.name(&format!("{name}_bucket"), labels, Some(&bound));
            let _ = write!(self.out, " {count}");
            let within = |one: &&Exemplar| bound_ns.is_none_or(|bound| one.ns <= bound);
            if let Some(Exemplar { request, ns, at }) = exemplar.filter(within) {
                let _ = write!(self.out, " # {{request=\"{request}\"}} {} {at}", seconds(*ns));
                exemplar = None;
            }
            self.out.push('\n');
        }
        self.sample(&format!("{name}_sum"), labels, seconds(histogram.sum_ns));
        self.sample(&format!("{name}_count"), labels, histogram.count());
    }
}

/// Nanoseconds as seconds, exactly.
fn seconds(ns: u64) -> String {
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    let text = text.trim_end_matches('0');
    text.strip_suffix('.').map_or_else(|| text.to_owned(), |whole| format!("{whole}.0"))
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
    }

    #[test]
    fn seconds_are_exact() {
        for (ns, text) in
            [(0, "0.0"), (1, "0.000000001"), (1_500_000_000, "1.5"), (7_000_000_000, "7.0")]
        {
            assert_eq!(seconds(ns), text);
        }
    }
}
