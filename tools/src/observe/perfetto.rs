//! Records as a trace file in the JSON format of Chrome's tracing, which Perfetto opens: a slice for
//! each request, its stages nested in it.
//!
//! Holds: the file is readable at any moment; whoever ends the command early loses nothing of it
//! (the format lets the closing bracket be missing).

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use serde_json::{Value, json};

use super::{Record, STAGES};

/// A trace file being written.
pub struct Perfetto<W> {
    out: W,
    sessions: BTreeSet<u64>,
    first: bool,
}

impl<W: Write> Perfetto<W> {
    /// Begins the file.
    ///
    /// # Errors
    /// It can not be written.
    pub fn begin(mut out: W) -> io::Result<Self> {
        out.write_all(b"[\n")?;
        Ok(Self { out, sessions: BTreeSet::new(), first: true })
    }

    /// Adds a request of the volume `name`.
    ///
    /// # Errors
    /// It can not be written.
    pub fn write(&mut self, record: &Record, name: &str) -> io::Result<()> {
        let pid = record.session;
        if self.sessions.insert(pid) {
            let name = json!({ "name": format!("session {pid}") });
            self.event(&json!({ "ph": "M", "name": "process_name", "pid": pid, "args": name }))?;
        }
        let edge = |ph: &str, what: &str, at_ns: u64| {
            json!({
                "ph": ph, "cat": name, "name": what, "pid": pid, "tid": pid,
                "id": record.number, "ts": micros(at_ns),
            })
        };
        let mut begin = edge("b", record.operation_name(), record.begun_ns());
        begin["args"] = json!({
            "request": format!("{:012x}", record.id & 0xffff_ffff_ffff),
            "volume": name,
            "offset": record.offset,
            "length": record.length,
            "result": record.result,
        });
        self.event(&begin)?;
        for (stage, way) in STAGES.iter().zip(record.stages()) {
            if let Some((from, to)) = way {
                self.event(&edge("b", stage, from))?;
                self.event(&edge("e", stage, to))?;
            }
        }
        self.event(&edge("e", record.operation_name(), record.ended_ns()))?;
        self.out.flush()
    }

    /// Ends the file.
    ///
    /// # Errors
    /// It can not be written.
    pub fn end(&mut self) -> io::Result<()> {
        self.out.write_all(b"\n]\n")?;
        self.out.flush()
    }

    fn event(&mut self, event: &Value) -> io::Result<()> {
        let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
        write!(self.out, "{comma}{event}")
    }
}

/// Microseconds, as the format counts; its numbers are exact up to some hundred days.
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slice_that_begins_ends_and_stages_lie_within_their_request() {
        let mut perfetto = Perfetto::begin(Vec::new()).unwrap();
        for number in 1..4 {
            let record = Record {
                number,
                operation: 1,
                session: number % 2,
                enqueued_ns: if number == 2 { 0 } else { 1_000 * number },
                picked_ns: 1_000 * number + 500,
                submitted_ns: 1_000 * number + 600,
                reaped_ns: 1_000 * number + 700,
                delivered_ns: 1_000 * number + 900,
                ..Record::default()
            };
            perfetto.write(&record, "a \"b\"").unwrap();
        }
        let unfinished = String::from_utf8(perfetto.out.clone()).unwrap();
        assert!(serde_json::from_str::<Value>(&format!("{unfinished}]")).is_ok());
        perfetto.end().unwrap();
        let events: Vec<Value> = serde_json::from_slice(&perfetto.out).unwrap();
        let mut open: Vec<(u64, String, f64)> = Vec::new();
        let mut slices = 0;
        for event in &events {
            let (id, name) = (event["id"].as_u64(), event["name"].as_str().unwrap().to_owned());
            let at = event["ts"].as_f64();
            match event["ph"].as_str().unwrap() {
                "b" => {
                    if let Some((outer, _, begun)) = open.last() {
                        assert!(Some(*outer) == id && at.unwrap() >= *begun);
                    }
                    open.push((id.unwrap(), name, at.unwrap()));
                }
                "e" => {
                    let (begun_id, begun_name, begun) = open.pop().unwrap();
                    assert_eq!((Some(begun_id), begun_name), (id, name));
                    assert!(at.unwrap() >= begun);
                    slices += 1;
                }
                other => assert_eq!(other, "M"),
            }
        }
        assert!(open.is_empty());
        assert_eq!(slices, 5 + 4 + 5, "the second has no crossing_out");
    }
}
