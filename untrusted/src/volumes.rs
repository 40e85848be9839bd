//! What lanes count for each volume: latency by stage and operation, results, bytes.
//!
//! A volume is a host file by the name that the operator allowed, or a protected directory with all
//! that is in it. Their number is bounded: the daemon tells [`MOST_VOLUMES`] apart, a lane
//! [`MOST_OF_LANE`]; what comes later counts under [`OTHERS`].
//!
//! Holds: one thread writes a [`VolumeStats`], without locks; it is made when a file is opened,
//! never for a request. Does not hold: that requests begun and ended, read while they go on, are of
//! one moment.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use zerocopy::FromZeros;

use crate::histogram::{Histogram, Snapshot, bump};
use crate::probes::kept::Ledger;

/// Most volumes with a name of their own in what the daemon tells.
pub const MOST_VOLUMES: usize = 64;
/// Most volumes that one lane tells apart.
pub const MOST_OF_LANE: usize = 8;
/// Name of all further volumes together. No file has it: names have no parentheses around them
/// unless the operator gave them some.
pub const OTHERS: &str = "(others)";

/// Names of the operations, by the port's number less 1.
pub const OPERATIONS: [&str; 4] = ["read", "write", "flush", "discard"];

/// A part of a request's way, by the daemon's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Published by the enclave (claimed) until taken from the ring.
    CrossingOut,
    /// Taken from the ring until io_submit returned.
    HostSubmit,
    /// io_submit returned until reaped.
    Device,
    /// Reaped until delivered in the enclave (claimed).
    CrossingIn,
    /// The whole way, where both claims are known: the sum of the stages before.
    EndToEnd,
}

/// Names of the stages, by [`Stage`].
pub const STAGES: [&str; 5] =
    ["crossing_out", "host_submit", "device", "crossing_in", "end_to_end"];

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All that was asked for.
    Done,
    /// Less than was asked for.
    Short,
    /// The host has no room: ENOSPC, EDQUOT, EFBIG.
    NoSpace,
    /// The device failed: EIO and its kin.
    Device,
    /// Another error.
    Failed,
}

/// Names of the outcomes, by [`Outcome`].
pub const OUTCOMES: [&str; 5] = ["ok", "short", "no_space", "device_error", "error"];

impl Outcome {
    /// The outcome of a request for `asked` bytes, `result` being bytes or a negative errno.
    #[inline]
    #[must_use]
    pub fn of(result: i64, asked: u64) -> Self {
        match u64::try_from(result) {
            Ok(bytes) if bytes >= asked => Self::Done,
            Ok(_) => Self::Short,
            Err(_) => Self::of_error(result.unsigned_abs()),
        }
    }

    #[cold]
    fn of_error(errno: u64) -> Self {
        match i32::try_from(errno).unwrap_or(0) {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EIO | libc::EREMOTEIO | libc::ENODATA | libc::EILSEQ | libc::ENODEV => {
                Self::Device
            }
            _ => Self::Failed,
        }
    }
}

/// Counts of one volume in one lane.
#[derive(Debug, FromZeros)]
pub struct VolumeStats {
    stages: [[Histogram; OPERATIONS.len()]; STAGES.len()],
    outcomes: [[AtomicU64; OUTCOMES.len()]; OPERATIONS.len()],
    bytes: [AtomicU64; OPERATIONS.len()],
    begun: AtomicU64,
}

impl VolumeStats {
    /// Counts `ns` nanoseconds in `stage` of port operation `op`; operations that the port does not
    /// have are ignored. Only the lane's thread may call this and what follows.
    #[inline]
    pub fn record(&self, stage: Stage, op: u64, ns: u64) {
        if let Some(histogram) = operation(op).and_then(|op| self.stages[stage as usize].get(op)) {
            histogram.record(ns);
        }
    }

    /// Counts a request as taken.
    #[inline]
    pub fn begin(&self) {
        bump(&self.begun, 1);
    }

    /// Counts a request of port operation `op` as ended: `result` is bytes or a negative errno,
    /// `asked` the bytes that it was for.
    #[inline]
    pub fn end(&self, op: u64, result: i64, asked: u64) {
        let Some(op) = operation(op) else { return };
        if let Some(outcome) = self.outcomes.get(op) {
            bump(&outcome[Outcome::of(result, asked) as usize], 1);
            bump(&self.bytes[op], u64::try_from(result).unwrap_or(0));
        }
    }

    /// Adds what this holds to `into`.
    pub fn add_to(&self, into: &mut VolumeTotals) {
        for (mine, theirs) in self.outcomes.iter().flatten().zip(into.outcomes.iter_mut().flatten())
        {
            *theirs += mine.load(Relaxed);
        }
        for (mine, theirs) in self.bytes.iter().zip(&mut into.bytes) {
            *theirs += mine.load(Relaxed);
        }
        into.begun += self.begun.load(Relaxed);
        for (mine, theirs) in self.stages.iter().flatten().zip(into.stages.iter_mut().flatten()) {
            mine.add_to(theirs);
        }
    }
}

#[inline]
fn operation(op: u64) -> Option<usize> {
    usize::try_from(op.wrapping_sub(1)).ok()
}

/// What was counted for one volume, at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeTotals {
    /// Latency by [`Stage`] and operation.
    pub stages: [[Snapshot; OPERATIONS.len()]; STAGES.len()],
    /// Requests that ended, by operation and [`Outcome`].
    pub outcomes: [[u64; OUTCOMES.len()]; OPERATIONS.len()],
    /// Bytes moved, by operation.
    pub bytes: [u64; OPERATIONS.len()],
    /// Requests taken.
    pub begun: u64,
}

impl VolumeTotals {
    /// Adds what `other` holds.
    pub fn absorb(&mut self, other: &Self) {
        for (mine, theirs) in self.stages.iter_mut().flatten().zip(other.stages.iter().flatten()) {
            mine.absorb(theirs);
        }
        for (mine, theirs) in
            self.outcomes.iter_mut().flatten().zip(other.outcomes.iter().flatten())
        {
            *mine += theirs;
        }
        for (mine, theirs) in self.bytes.iter_mut().zip(&other.bytes) {
            *mine += theirs;
        }
        self.begun += other.begun;
    }

    /// Requests that were taken and have not ended.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.begun.saturating_sub(self.outcomes.iter().flatten().sum())
    }

    /// Requests of an operation (an index of [`OPERATIONS`]) that ended without an error.
    #[must_use]
    pub fn succeeded(&self, operation: usize) -> u64 {
        let of = &self.outcomes[operation];
        of[Outcome::Done as usize] + of[Outcome::Short as usize]
    }

    /// Requests that ended with an error.
    #[must_use]
    pub fn failed(&self) -> u64 {
        let all: u64 = self.outcomes.iter().flatten().sum();
        all - (0..OPERATIONS.len()).map(|operation| self.succeeded(operation)).sum::<u64>()
    }
}

/// The volumes that are told apart, by number: the order in which they were first opened. 0 is
/// [`OTHERS`].
#[derive(Debug, Default)]
pub struct Names(Mutex<Vec<String>>, Option<Ledger>);

impl Names {
    /// The names that stand in `ledger`; further ones are noted there.
    #[must_use]
    pub fn noted(names: Vec<String>, ledger: Ledger) -> Self {
        Self(Mutex::new(names), Some(ledger))
    }

    /// The number of a volume; a new one for a new name as long as there are some.
    pub fn number(&self, name: &str) -> u64 {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = names.iter().position(|known| known == name);
        let at = known.or_else(|| {
            (names.len() < MOST_VOLUMES && name != OTHERS).then(|| {
                names.push(name.to_owned());
                self.1.iter().for_each(|ledger| ledger.append(name));
                names.len() - 1
            })
        });
        at.map_or(0, |at| at as u64 + 1)
    }

    /// The highest number that was given.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// The name of a number that [`Self::number`] gave.
    #[must_use]
    pub fn name(&self, number: u64) -> String {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
        at.and_then(|at| names.get(at)).map_or(OTHERS, String::as_str).to_owned()
    }
}

/// Totals by number of the volume.
pub type ByVolume = BTreeMap<u64, VolumeTotals>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::zeroed;

    #[test]
    fn volumes_beyond_the_most_share_one_name() {
        let names = Names::default();
        for n in 0..MOST_VOLUMES as u64 {
            assert_eq!(names.number(&format!("v{n}")), n + 1);
        }
        assert_eq!((names.number("one more"), names.number("v3")), (0, 4));
        assert_eq!((names.name(4), names.name(0)), ("v3".to_owned(), OTHERS.to_owned()));
        assert_eq!(names.name(u64::MAX), OTHERS);
    }

    #[test]
    fn an_outcome_is_what_errno_3_and_the_length_say() {
        for (result, asked, outcome) in [
            (4096, 4096, Outcome::Done),
            (0, 0, Outcome::Done),
            (512, 4096, Outcome::Short),
            (-28, 4096, Outcome::NoSpace),
            (-122, 0, Outcome::NoSpace),
            (-5, 0, Outcome::Device),
            (-22, 0, Outcome::Failed),
            (i64::MIN, 0, Outcome::Failed),
        ] {
            assert_eq!(Outcome::of(result, asked), outcome, "{result}");
        }
    }

    #[test]
    fn what_was_taken_and_did_not_end_is_in_flight() {
        let stats = zeroed::<VolumeStats>();
        for _ in 0..5 {
            stats.begin();
        }
        stats.end(1, 4096, 4096);
        stats.end(2, -5, 4096);
        stats.end(3, 0, 0);
        stats.end(99, 0, 0);
        let mut totals = VolumeTotals::default();
        stats.add_to(&mut totals);
        assert_eq!((totals.in_flight(), totals.failed(), totals.bytes[0]), (2, 1, 4096));
        assert_eq!([totals.succeeded(0), totals.succeeded(1), totals.succeeded(2)], [1, 0, 1]);
        let mut twice = totals.clone();
        twice.absorb(&totals);
        assert_eq!((twice.in_flight(), twice.failed(), twice.bytes[0]), (4, 2, 8192));
    }
}
