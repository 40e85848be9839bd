//! Looking at a running daemon: what it has measured, asked over its control socket.
//!
//! Holds: the daemon is not trusted; what it answers is only shown, never interpreted as anything
//! else, and control characters in names do not reach the terminal.

mod heat;
mod perfetto;
pub mod probes;
pub mod report;
mod sample;
pub mod top;
pub mod trace;
mod view;

use std::{collections::BTreeMap, path::Path};

use postern_edl::{MEASURED_LATENCY, MEASURED_PROBES, MEASURED_RECORDS, MEASURED_VOLUMES};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    control::Control,
    error::{Exit, Failure},
};

/// Most pages of one answer: a daemon that never comes to an end is none.
const MOST_PAGES: usize = 10_000;
/// Names of the operations, by the port's number less 1.
pub const OPERATIONS: [&str; 4] = ["read", "write", "flush", "discard"];

/// A page of the daemon's answer.
#[derive(Debug, Deserialize)]
struct Page<T> {
    last_record: u64,
    next: u64,
    items: Vec<T>,
}

/// A volume and its requests since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its number.
    pub volume: u64,
    /// Its name.
    pub name: String,
    /// Requests under way.
    pub in_flight: u64,
    /// By name.
    pub operations: BTreeMap<String, Operation>,
    /// What its enclaves claim, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub claimed: BTreeMap<String, u64>,
}

/// The requests of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Bytes moved.
    pub bytes: u64,
    /// How many ended how.
    pub outcomes: BTreeMap<String, u64>,
}

/// A histogram of one stage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// Who timed it: `daemon` or `ebpf`.
    pub source: String,
    /// Number of the volume; none: of all together.
    pub volume: Option<u64>,
    /// Name of the stage.
    pub stage: String,
    /// Name of the operation.
    pub operation: String,
    /// All values together, nanoseconds.
    pub sum_ns: u64,
    /// The largest, nanoseconds.
    pub max_ns: u64,
    /// Values beyond the last bucket.
    pub overflows: u64,
    /// Largest value of each bucket, nanoseconds, ascending, and the number of its values.
    pub buckets: Vec<(u64, u64)>,
}

/// A record of one request. Times are CLOCK_MONOTONIC nanoseconds; 0 is unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number among the daemon's records.
    pub number: u64,
    /// The request's `aio_data`.
    pub id: u64,
    /// Session.
    pub session: u64,
    /// Number of the volume.
    pub volume: u64,
    /// Port operation, 1 to 4.
    pub operation: u64,
    /// Why it was kept: 1 sample, 2 slow, 4 slowest of its second, 8 failed.
    pub why: u64,
    /// Byte offset in the host file.
    pub offset: u64,
    /// Bytes that were asked for.
    pub length: u64,
    /// Bytes, or a negative errno.
    pub result: i64,
    /// Published by the enclave (its claim).
    pub enqueued_ns: u64,
    /// Taken by the daemon.
    pub picked_ns: u64,
    /// io_submit had returned.
    pub submitted_ns: u64,
    /// Reaped.
    pub reaped_ns: u64,
    /// Delivered in the enclave (its claim).
    pub delivered_ns: u64,
}

/// Names of a record's stages, in the order of its way.
pub const STAGES: [&str; 4] = ["crossing_out", "host_submit", "device", "crossing_in"];

impl Record {
    /// Name of the operation.
    pub fn operation_name(&self) -> &'static str {
        let at = usize::try_from(self.operation.wrapping_sub(1));
        at.ok().and_then(|at| OPERATIONS.get(at)).copied().unwrap_or("?")
    }

    /// When it began, as far as is known.
    pub fn begun_ns(&self) -> u64 {
        if self.enqueued_ns == 0 { self.picked_ns } else { self.enqueued_ns }
    }

    /// When it ended, as far as is known.
    pub fn ended_ns(&self) -> u64 {
        if self.delivered_ns == 0 { self.reaped_ns } else { self.delivered_ns }
    }

    /// How long it took, as far as is known.
    pub fn total_ns(&self) -> u64 {
        self.ended_ns().saturating_sub(self.begun_ns())
    }

    /// Beginning and end of each stage; `None`: not known.
    pub fn stages(&self) -> [Option<(u64, u64)>; 4] {
        let ways = [
            (self.enqueued_ns, self.picked_ns),
            (self.picked_ns, self.submitted_ns),
            (self.submitted_ns, self.reaped_ns),
            (self.reaped_ns, self.delivered_ns),
        ];
        ways.map(|(from, to)| (from != 0 && to >= from).then_some((from, to)))
    }
}

/// A daemon that is asked.
pub struct Daemon<'a> {
    control: Control,
    socket: &'a Path,
}

impl<'a> Daemon<'a> {
    /// Connects to the daemon that listens on `socket`.
    ///
    /// # Errors
    /// [`Exit::NoDaemon`].
    pub fn connect(socket: &'a Path) -> Result<Self, Failure> {
        Ok(Self { control: Control::connect(socket)?, socket })
    }

    fn understand<T: DeserializeOwned>(&self, text: &[u8]) -> Result<T, Failure> {
        serde_json::from_slice(text).map_err(|error| self.nonsense(&error))
    }

    fn nonsense(&self, why: &dyn core::fmt::Display) -> Failure {
        Failure::new(
            Exit::NoDaemon,
            format_args!("the daemon's answer is not understood ({why})"),
            self.socket.display(),
            "use a posternd of this version",
        )
    }

    /// All items of `what` from number `first` on, and the number of the last record.
    fn items<T: DeserializeOwned>(
        &mut self,
        what: u32,
        mut first: u64,
        wish: (u64, u64),
    ) -> Result<(Vec<T>, u64), Failure> {
        let mut all = Vec::new();
        for _ in 0..MOST_PAGES {
            let text = self.control.measured(what, first, wish)?;
            let mut page: Page<T> = self.understand(&text)?;
            all.append(&mut page.items);
            if page.next <= first {
                return Ok((all, page.last_record));
            }
            first = page.next;
        }
        Err(self.nonsense(&"it has no end"))
    }

    /// The daemon's report.
    fn report<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let text = self.control.stats()?;
        self.understand(&text)
    }

    /// The volumes.
    fn volumes(&mut self) -> Result<Vec<Volume>, Failure> {
        Ok(self.items(MEASURED_VOLUMES, 0, (u64::MAX, 0))?.0)
    }

    /// Latency by volume, operation and stage.
    fn latency(&mut self) -> Result<Vec<Series>, Failure> {
        Ok(self.items(MEASURED_LATENCY, 0, (u64::MAX, 0))?.0)
    }

    /// The probes as a whole, then each program, as the daemon says it; switches them first if `switch`
    /// says to.
    fn probes(&mut self, switch: Option<bool>) -> Result<Vec<serde_json::Value>, Failure> {
        let wish = switch.map_or(u64::MAX, u64::from);
        Ok(self.items(MEASURED_PROBES, 0, (wish, 0))?.0)
    }

    /// The records from number `first` on, and the number of the last one; has the daemon keep more
    /// of them for a while: those that take `wish.0` nanoseconds, and one in `wish.1` (0: none).
    fn records(&mut self, first: u64, wish: (u64, u64)) -> Result<(Vec<Record>, u64), Failure> {
        self.items(MEASURED_RECORDS, first, wish)
    }
}

/// A name as a terminal may get it.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
