//! Prometheus' protobuf format, delimited: messages of io.prometheus.client, of which only what is used
//! here is written down (metrics.proto of github.com/prometheus/client_model).
//!
//! A histogram goes out as both kinds: with classic buckets as in the text formats, and as a native
//! one. A native bucket's bound is a power of 2^(1/64). A bucket of ours is counted in the native one
//! that its largest value lies in, so a time read from a native histogram is at most 2.7 % above the
//! true one (1/64 for ours, 2^(1/64) for the native one). Count and sum are exact.

use prost::Message;

use super::text::cumulative;
use super::{Exemplar, Exposition, Kind, Labels, Number};
use crate::histogram::{LIMIT_NS, Snapshot};

/// The message, as an `Accept` header names it.
pub(super) const MESSAGE: &str = "proto=io.prometheus.client.MetricFamily";
pub(super) const CONTENT_TYPE: &str = "application/vnd.google.protobuf; \
    proto=io.prometheus.client.MetricFamily; encoding=delimited";

/// Native buckets per power of two: 2^SCHEMA.
const SCHEMA: i32 = 6;
/// Values up to this, seconds, are zero: half of the smallest that can be measured.
const ZERO: f64 = 0.5e-9;

/// Messages being written.
#[derive(Default)]
pub(super) struct Protobuf {
    done: Vec<u8>,
    family: MetricFamily,
}

impl Protobuf {
    fn end_family(&mut self) {
        let family = std::mem::take(&mut self.family);
        if !family.name.is_empty() {
            // A vector grows as it must.
            let _ = family.encode_length_delimited(&mut self.done);
        }
    }

    fn add(&mut self, labels: Labels<'_>, metric: Metric) {
        let label = labels.iter().map(|(name, value)| label(name, value)).collect();
        self.family.metric.push(Metric { label, ..metric });
    }
}

impl Exposition for Protobuf {
    fn family(&mut self, name: &str, kind: Kind, _unit: &str, help: &str) {
        self.end_family();
        let (suffix, kind) = match kind {
            // Counters have the name of their samples here.
            Kind::Counter => ("_total", MetricType::Counter),
            Kind::Gauge => ("", MetricType::Gauge),
            Kind::Histogram => ("", MetricType::Histogram),
        };
        self.family = MetricFamily {
            name: format!("postern_{name}{suffix}"),
            help: help.to_owned(),
            kind: kind.into(),
            metric: Vec::new(),
        };
    }

    fn sample(&mut self, labels: Labels<'_>, value: Number) {
        let value = match value {
            Number::Count(count) => count as f64,
            Number::Nanoseconds(ns) => seconds(ns),
        };
        let value = Some(Value { value });
        self.add(
            labels,
            if self.family.kind() == MetricType::Counter {
                Metric { counter: value, ..Metric::default() }
            } else {
                Metric { gauge: value, ..Metric::default() }
            },
        );
    }

    fn histogram(&mut self, labels: Labels<'_>, histogram: &Snapshot, exemplar: Option<&Exemplar>) {
        let mut histogram = message(histogram);
        if let Some(Exemplar { request, ns, at }) = exemplar {
            let bucket = histogram.bucket.iter_mut().find(|b| seconds(*ns) <= b.upper_bound);
            let timestamp = prost_types::Timestamp {
                seconds: at.as_secs().cast_signed(),
                nanos: at.subsec_nanos().cast_signed(),
            };
            if let Some(bucket) = bucket {
                bucket.exemplar = Some(ExemplarMessage {
                    label: vec![label("request", request)],
                    value: seconds(*ns),
                    timestamp: Some(timestamp),
                });
            }
        }
        self.add(labels, Metric { histogram: Some(histogram), ..Metric::default() });
    }

    fn finish(mut self: Box<Self>) -> Vec<u8> {
        self.end_family();
        self.done
    }
}

fn label(name: &str, value: &str) -> LabelPair {
    LabelPair { name: name.to_owned(), value: value.to_owned() }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// The number of the native bucket of a value above 0: its bound, 2^(number / 2^SCHEMA) seconds, is not
/// below the value, that of the one before is.
fn native(ns: u64) -> i32 {
    // Between -2000 and 4000 for any word.
    #[allow(clippy::cast_possible_truncation)]
    let number = (seconds(ns).log2() * f64::from(1 << SCHEMA)).ceil() as i32;
    number
}

/// Both kinds of a histogram.
fn message(histogram: &Snapshot) -> Histogram {
    let mut message = Histogram {
        sample_count: histogram.count(),
        sample_sum: seconds(histogram.sum_ns),
        schema: SCHEMA,
        zero_threshold: ZERO,
        ..Histogram::default()
    };
    for (bound, count) in cumulative(histogram) {
        let upper_bound = bound.map_or(f64::INFINITY, seconds);
        message.bucket.push(Bucket { cumulative_count: count, upper_bound, exemplar: None });
    }
    let (mut last, mut before) = (None, 0);
    // What was too long for a bucket of ours lies in one above all of them.
    let beyond = (histogram.overflows > 0).then_some((2 * LIMIT_NS, histogram.overflows));
    for (top_ns, count) in histogram.buckets().chain(beyond) {
        let count = count.cast_signed();
        if top_ns == 0 {
            message.zero_count = count.cast_unsigned();
            continue;
        }
        let number = native(top_ns);
        match last {
            Some(last) if last == number => {
                if let Some(delta) = message.positive_delta.last_mut() {
                    *delta += count;
                    before += count;
                }
                continue;
            }
            Some(last) if last + 1 == number => {
                if let Some(span) = message.positive_span.last_mut() {
                    span.length += 1;
                }
            }
            _ => {
                // The first from 0, others from the end of the span before.
                let offset = last.map_or(number, |last| number - last - 1);
                message.positive_span.push(BucketSpan { offset, length: 1 });
            }
        }
        message.positive_delta.push(count - before);
        (last, before) = (Some(number), count);
    }
    message
}

#[derive(Clone, PartialEq, Message)]
struct LabelPair {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum MetricType {
    Counter = 0,
    Gauge = 1,
    Histogram = 4,
}

/// A `Counter` or a `Gauge`.
#[derive(Clone, Copy, PartialEq, Message)]
struct Value {
    #[prost(double, tag = "1")]
    value: f64,
}

#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(uint64, tag = "1")]
    sample_count: u64,
    #[prost(double, tag = "2")]
    sample_sum: f64,
    #[prost(message, repeated, tag = "3")]
    bucket: Vec<Bucket>,
    #[prost(sint32, tag = "5")]
    schema: i32,
    #[prost(double, tag = "6")]
    zero_threshold: f64,
    #[prost(uint64, tag = "7")]
    zero_count: u64,
    #[prost(message, repeated, tag = "12")]
    positive_span: Vec<BucketSpan>,
    #[prost(sint64, repeated, tag = "13")]
    positive_delta: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Bucket {
    #[prost(uint64, tag = "1")]
    cumulative_count: u64,
    #[prost(double, tag = "2")]
    upper_bound: f64,
    #[prost(message, optional, tag = "3")]
    exemplar: Option<ExemplarMessage>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct BucketSpan {
    #[prost(sint32, tag = "1")]
    offset: i32,
    #[prost(uint32, tag = "2")]
    length: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ExemplarMessage {
    #[prost(message, repeated, tag = "1")]
    label: Vec<LabelPair>,
    #[prost(double, tag = "2")]
    value: f64,
    #[prost(message, optional, tag = "3")]
    timestamp: Option<prost_types::Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
struct Metric {
    #[prost(message, repeated, tag = "1")]
    label: Vec<LabelPair>,
    #[prost(message, optional, tag = "2")]
    gauge: Option<Value>,
    #[prost(message, optional, tag = "3")]
    counter: Option<Value>,
    #[prost(message, optional, tag = "7")]
    histogram: Option<Histogram>,
}

#[derive(Clone, PartialEq, Message)]
struct MetricFamily {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    help: String,
    #[prost(enumeration = "MetricType", tag = "3")]
    kind: i32,
    #[prost(message, repeated, tag = "4")]
    metric: Vec<Metric>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Histogram as Counted;

    /// The values of a native histogram as Prometheus reads one: number of the bucket, count.
    fn read(histogram: &Histogram) -> Vec<(i32, i64)> {
        let (mut all, mut number, mut count) = (Vec::new(), 0, 0);
        let mut deltas = histogram.positive_delta.iter();
        for span in &histogram.positive_span {
            number += span.offset;
            for _ in 0..span.length {
                count += deltas.next().unwrap();
                all.push((number, count));
                number += 1;
            }
        }
        assert!(deltas.next().is_none());
        all
    }

    #[test]
    fn each_value_is_in_the_native_bucket_that_its_size_says_or_at_most_two_above() {
        let counted = Counted::new();
        let mut values: Vec<u64> = (0..2_000).map(|n| 1 + n * n * 37).collect();
        values.extend([1, 1, 2, 3, 1_000_000_000, LIMIT_NS]);
        values.iter().for_each(|ns| counted.record(*ns));
        [0, 0, LIMIT_NS + 1].iter().for_each(|ns| counted.record(*ns));
        let message = message(&counted.snapshot());
        assert_eq!(message.sample_count, values.len() as u64 + 3);
        assert_eq!((message.zero_count, message.schema), (2, 6));
        let mut read = read(&message);
        assert!(read.is_sorted_by(|a, b| a.0 < b.0) && read.iter().all(|(_, count)| *count > 0));
        let (last, overflows) = read.pop().unwrap();
        assert_eq!(overflows, 1, "what is beyond all buckets of ours has one of its own");
        let bound = |number: i32| 2f64.powf(f64::from(number) / 64.0);
        assert!(bound(last) > LIMIT_NS as f64 / 1e9);
        values.sort_unstable();
        let mut rest = values.iter();
        for (number, count) in read {
            for _ in 0..count {
                let value = *rest.next().unwrap() as f64 / 1e9;
                assert!(value <= bound(number) * 1.000_001, "{value} above {}", bound(number));
                assert!(bound(number) <= value * 1.027, "{value} far below {}", bound(number));
            }
        }
        assert!(rest.next().is_none());
    }

    /// By hand from the encoding's specification (protobuf.dev/programming-guides/encoding) and the
    /// numbers of metrics.proto.
    #[test]
    fn a_family_is_encoded_as_the_format_says() {
        let mut protobuf = Box::<Protobuf>::default();
        protobuf.family("a", Kind::Counter, "", "h");
        protobuf.sample(&[("k", "v")], Number::Count(2));
        let wanted = [
            &[0x28][..],
            &[0x0a, 15],
            b"postern_a_total",
            &[0x12, 1, b'h'],
            // COUNTER is 0, which is left out.
            &[0x22, 19, 0x0a, 6, 0x0a, 1, b'k', 0x12, 1, b'v'],
            &[0x1a, 9, 0x09, 0, 0, 0, 0, 0, 0, 0, 0x40],
        ];
        let bytes = protobuf.finish();
        let mut wanted = wanted.concat();
        wanted[0] = u8::try_from(wanted.len() - 1).unwrap();
        assert_eq!(bytes, wanted);
    }
}
