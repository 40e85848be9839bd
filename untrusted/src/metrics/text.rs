//! The two text formats: OpenMetrics 1.0 and Prometheus text 0.0.4.

use std::fmt::Write as _;

use super::{BOUNDS, Exemplar, Exposition, Kind, Labels, Number};
use crate::histogram::Snapshot;

/// A text being written.
pub(super) struct Text {
    out: String,
    /// OpenMetrics.
    open: bool,
    /// What samples of the family are called.
    name: String,
}

impl Text {
    /// Nothing yet; `open`: OpenMetrics.
    pub(super) fn new(open: bool) -> Self {
        Self { out: String::with_capacity(64 << 10), open, name: String::new() }
    }

    fn name(&mut self, suffix: &str, labels: Labels<'_>, bound: Option<&str>) {
        let Self { out, name, .. } = self;
        let _ = write!(out, "postern_{name}{suffix}");
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
}

impl Exposition for Text {
    fn family(&mut self, name: &str, kind: Kind, unit: &str, help: &str) {
        let Self { out, open, .. } = self;
        let total = if kind == Kind::Counter { "_total" } else { "" };
        // The older format has counters under the name of their samples.
        let suffix = if *open { "" } else { total };
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(out, "# HELP postern_{name}{suffix} {help}");
        let _ = writeln!(out, "# TYPE postern_{name}{suffix} {kind}");
        if *open && !unit.is_empty() {
            let _ = writeln!(out, "# UNIT postern_{name} {unit}");
        }
        self.name = format!("{name}{total}");
    }

    fn sample(&mut self, labels: Labels<'_>, value: Number) {
        self.name("", labels, None);
        let _ = match value {
            Number::Count(count) => writeln!(self.out, " {count}"),
            Number::Nanoseconds(ns) => writeln!(self.out, " {}", seconds(ns)),
        };
    }

    fn histogram(&mut self, labels: Labels<'_>, histogram: &Snapshot, exemplar: Option<&Exemplar>) {
        let mut exemplar = exemplar.filter(|_| self.open);
        for (bound_ns, count) in cumulative(histogram) {
            let bound = bound_ns.map_or_else(|| "+Inf".to_owned(), seconds);
            self.name("_bucket", labels, Some(&bound));
            let _ = write!(self.out, " {count}");
            let within = |one: &&Exemplar| bound_ns.is_none_or(|bound| one.ns <= bound);
            if let Some(Exemplar { request, ns, at }) = exemplar.filter(within) {
                let at = format!("{}.{:03}", at.as_secs(), at.subsec_millis());
                let _ = write!(self.out, " # {{request=\"{request}\"}} {} {at}", seconds(*ns));
                exemplar = None;
            }
            self.out.push('\n');
        }
        self.name("_sum", labels, None);
        let _ = writeln!(self.out, " {}", seconds(histogram.sum_ns));
        self.name("_count", labels, None);
        let _ = writeln!(self.out, " {}", histogram.count());
    }

    fn finish(self: Box<Self>) -> Vec<u8> {
        let mut out = self.out;
        if self.open {
            out.push_str("# EOF\n");
        }
        out.into_bytes()
    }
}

/// The classic buckets: bound (`None`: none) and how many values do not exceed it.
pub(super) fn cumulative(histogram: &Snapshot) -> Vec<(Option<u64>, u64)> {
    let mut buckets = histogram.buckets().peekable();
    let mut count = 0;
    let bounds = BOUNDS.map(|bit| (1u64 << bit) - 1);
    let mut all: Vec<(Option<u64>, u64)> = bounds
        .map(|bound| {
            while let Some((_, n)) = buckets.next_if(|(top, _)| *top <= bound) {
                count += n;
            }
            (Some(bound), count)
        })
        .collect();
    all.push((None, histogram.count()));
    all
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

    #[test]
    fn seconds_are_exact() {
        for (ns, text) in
            [(0, "0.0"), (1, "0.000000001"), (1_500_000_000, "1.5"), (7_000_000_000, "7.0")]
        {
            assert_eq!(seconds(ns), text);
        }
    }
}
