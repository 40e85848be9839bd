//! What one session may take of what all share, and what it has taken.
//!
//! Holds: a session at a limit of requests or bytes is slowed down, nothing of it is lost; at a
//! limit of lanes, memory or files the call is refused, what it has goes on. Every lane may have
//! one request under way whatever the others have, so none waits for another to let it go on.
//! Does not hold: fairness among programs of one user that open sessions on purpose; a limit is a
//! session's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::engine::MAX_FILES;
use crate::problem::log;

/// Most lanes of all sessions at once.
pub const MAX_LANES: usize = 1024;
/// Least that a lane's context asks of fs.aio-max-nr; the kernel makes room for 126 requests of it.
pub const LEAST_AIO: u32 = 8;
/// How far a session may run ahead of its rates, nanoseconds: what it did not use of them lately.
const BURST_NS: u64 = 100_000_000;

/// Limits of each session.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Limits of each session")]
pub struct Limits {
    /// Most lanes: a program's processes that are at work on protected files have one each. Costs a
    /// thread, ten descriptors and some 150 KiB of the daemon, and 50 KiB for each volume more. A
    /// further one is refused.
    #[arg(id = "session-lanes", long = "session-lanes", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=MAX_LANES as i64))]
    pub lanes: u32,
    /// Most memory of its ports together (K, M, G); a lane of `postern run` has 16 MiB, of which
    /// only what is used is there. A further lane is refused.
    #[arg(id = "session-memory", long = "session-memory", value_name = "SIZE", default_value = "8G", value_parser = size)]
    pub memory: u64,
    /// Most open host files; a further one is refused.
    #[arg(id = "session-files", long = "session-files", value_name = "N", default_value_t = MAX_FILES as u32, value_parser = clap::value_parser!(u32).range(1..=MAX_FILES as i64))]
    pub files: u32,
    /// Most requests under way; further ones wait in their lane's ring. Each lane may have one in
    /// any case.
    #[arg(id = "session-depth", long = "session-depth", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub depth: u32,
    /// Most bytes under way (K, M, G), so that what others ask for does not wait behind them in the
    /// device. Each lane may have one request in any case.
    #[arg(id = "session-inflight", long = "session-inflight", value_name = "SIZE", default_value = "16M", value_parser = size)]
    pub in_flight: u64,
    /// Most requests in a second; faster ones wait in their lane's ring. Without this option there
    /// is no such limit.
    #[arg(id = "session-iops", long = "session-iops", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests_per_second: Option<u64>,
    /// Most bytes in a second (K, M, G), read and written together; faster ones wait. Without this
    /// option there is no such limit.
    #[arg(id = "session-bandwidth", long = "session-bandwidth", value_name = "SIZE", value_parser = size)]
    pub bytes_per_second: Option<u64>,
}

/// A number of bytes: digits and at most one of K, M, G, T (powers of 1024); not 0.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("write digits and one of K, M, G, T".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "write digits and one of K, M, G, T")?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "it must lie between 1 and 16 EiB".to_owned())
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lanes: 256,
            memory: 8 << 30,
            files: MAX_FILES as u32,
            depth: 1024,
            in_flight: 16 << 20,
            requests_per_second: None,
            bytes_per_second: None,
        }
    }
}

/// What `postern_stats` tells of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Its number.
    pub session: u64,
    /// Process that started it; 0 if it is of another process-id namespace.
    pub process: i32,
    /// Lanes now.
    pub lanes: u64,
    /// Bytes of port memory now.
    pub memory_bytes: u64,
    /// Open host files now.
    pub files: u64,
    /// Requests under way now.
    pub in_flight: u64,
    /// Bytes of them.
    pub in_flight_bytes: u64,
    /// Requests so far.
    pub requests: u64,
    /// Bytes that they asked for.
    pub bytes: u64,
    /// Times a lane had to wait for `--session-depth` or `--session-inflight`.
    pub held_depth: u64,
    /// Times a lane had to wait for `--session-iops` or `--session-bandwidth`.
    pub held_rate: u64,
    /// Calls refused at `--session-lanes`, `--session-memory` or `--session-files`.
    pub refused: u64,
}

/// What a session has of what all share. Its lanes count here, without locks.
#[derive(Debug)]
pub struct Account {
    limits: Arc<Limits>,
    number: u64,
    process: i32,
    lanes: AtomicU64,
    memory: AtomicU64,
    files: AtomicU64,
    in_flight: AtomicU64,
    in_flight_bytes: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
    held_depth: AtomicU64,
    held_rate: AtomicU64,
    refused: AtomicU64,
    /// When the requests (bytes) taken so far have been paid for at their rate, CLOCK_MONOTONIC
    /// nanoseconds.
    requests_paid_ns: AtomicU64,
    bytes_paid_ns: AtomicU64,
}

/// How many requests a lane may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// So many requests, at least one, and no further one once they ask for so many bytes.
    Take {
        /// Requests.
        requests: u64,
        /// Bytes.
        bytes: u64,
    },
    /// None before something of the lane's own has completed.
    Full,
    /// None before this time, CLOCK_MONOTONIC nanoseconds.
    Until(u64),
}

impl Account {
    /// The account of session `number`, which `process` started.
    #[must_use]
    pub fn new(limits: Arc<Limits>, number: u64, process: i32) -> Self {
        let zero = AtomicU64::default;
        Self {
            limits,
            number,
            process,
            lanes: zero(),
            memory: zero(),
            files: zero(),
            in_flight: zero(),
            in_flight_bytes: zero(),
            requests: zero(),
            bytes: zero(),
            held_depth: zero(),
            held_rate: zero(),
            refused: zero(),
            requests_paid_ns: zero(),
            bytes_paid_ns: zero(),
        }
    }

    /// Counts a lane with a port of `bytes`.
    ///
    /// # Errors
    /// `EMFILE` at the limit of lanes, `ENOBUFS` at that of memory; the log names limit and option.
    pub fn enter(self: &Arc<Self>, bytes: u64) -> Result<LaneShare, Errno> {
        let limits = &self.limits;
        if !add_within(&self.lanes, 1, limits.lanes.into()) {
            let what = format_args!("{} lanes", limits.lanes);
            return Err(self.refuse(what, "--session-lanes", Errno::MFILE));
        }
        if !add_within(&self.memory, bytes, limits.memory) {
            self.lanes.fetch_sub(1, Relaxed);
            let what = format_args!("{} bytes of ports", limits.memory);
            return Err(self.refuse(what, "--session-memory", Errno::NOBUFS));
        }
        Ok(LaneShare { account: Arc::clone(self), memory: bytes, requests: 0, bytes: 0 })
    }

    /// Whether `open` files leave room for a further one.
    ///
    /// # Errors
    /// `EMFILE`; the log names limit and option.
    pub fn admit_file(&self, open: usize) -> Result<(), Errno> {
        self.set_files(open);
        if open as u64 >= u64::from(self.limits.files) {
            let what = format_args!("{} open files", self.limits.files);
            return Err(self.refuse(what, "--session-files", Errno::MFILE));
        }
        Ok(())
    }

    /// Tells how many files are open.
    pub fn set_files(&self, open: usize) {
        self.files.store(open as u64, Relaxed);
    }

    fn refuse(&self, what: std::fmt::Arguments<'_>, option: &str, errno: Errno) -> Errno {
        self.refused.fetch_add(1, Relaxed);
        log(
            format_args!("session {} has its {what}, no more are given ({errno})", self.number),
            format_args!("process {}", self.process),
            format_args!("end some of its processes, or start posternd with a higher {option}"),
        );
        errno
    }

    /// What is told of it.
    #[must_use]
    pub fn row(&self) -> SessionRow {
        let now = |word: &AtomicU64| word.load(Relaxed);
        SessionRow {
            session: self.number,
            process: self.process,
            lanes: now(&self.lanes),
            memory_bytes: now(&self.memory),
            files: now(&self.files),
            in_flight: now(&self.in_flight),
            in_flight_bytes: now(&self.in_flight_bytes),
            requests: now(&self.requests),
            bytes: now(&self.bytes),
            held_depth: now(&self.held_depth),
            held_rate: now(&self.held_rate),
            refused: now(&self.refused),
        }
    }

    /// Until when the rates allow nothing, if they do not now.
    fn held_until(&self, now_ns: u64) -> Option<u64> {
        let limits = &self.limits;
        let held = |limit: Option<u64>, paid: &AtomicU64| {
            limit.map(|_| paid.load(Relaxed)).filter(|paid| *paid > now_ns)
        };
        held(limits.requests_per_second, &self.requests_paid_ns)
            .max(held(limits.bytes_per_second, &self.bytes_paid_ns))
    }
}

/// Adds `more` to `word` unless that makes it larger than `most`.
fn add_within(word: &AtomicU64, more: u64, most: u64) -> bool {
    let sum = |now: u64| now.checked_add(more).filter(|sum| *sum <= most);
    word.fetch_update(Relaxed, Relaxed, sum).is_ok()
}

/// Pays for `amount` at `rate` a second.
fn pay(paid_ns: &AtomicU64, rate: Option<u64>, amount: u64, now_ns: u64) {
    let Some(rate) = rate else { return };
    let cost = u128::from(amount) * 1_000_000_000 / u128::from(rate.max(1));
    let cost = u64::try_from(cost).unwrap_or(u64::MAX);
    let next = |paid: u64| Some(paid.max(now_ns.saturating_sub(BURST_NS)).saturating_add(cost));
    let _ = paid_ns.fetch_update(Relaxed, Relaxed, next);
}

/// A lane's part of its session's account; what it has is given back when it is dropped.
#[derive(Debug)]
pub struct LaneShare {
    account: Arc<Account>,
    memory: u64,
    /// Under way.
    requests: u64,
    bytes: u64,
}

impl LaneShare {
    /// The share of a lane without limits, for tests.
    #[cfg(any(test, feature = "fuzzing"))]
    #[must_use]
    pub fn unlimited() -> Self {
        let limits = Limits { depth: u32::MAX, in_flight: u64::MAX, ..Limits::default() };
        let account = Arc::new(Account::new(Arc::new(limits), 0, 0));
        Self { account, memory: 0, requests: 0, bytes: 0 }
    }

    /// How many of `wanted` requests the lane may take now. The answer holds for this lane alone:
    /// lanes that ask at the same time may together take a batch each too much.
    #[inline]
    pub fn ask(&self, wanted: u64, now_ns: u64) -> Leave {
        let account = &*self.account;
        let limits = &*account.limits;
        if let Some(until) = account.held_until(now_ns) {
            account.held_rate.fetch_add(1, Relaxed);
            return Leave::Until(until);
        }
        let requests = u64::from(limits.depth).saturating_sub(account.in_flight.load(Relaxed));
        let bytes = limits.in_flight.saturating_sub(account.in_flight_bytes.load(Relaxed));
        match (requests == 0 || bytes == 0, self.requests) {
            (false, _) => Leave::Take { requests: wanted.min(requests), bytes },
            (true, 0) => Leave::Take { requests: 1, bytes: 1 },
            (true, _) => {
                account.held_depth.fetch_add(1, Relaxed);
                Leave::Full
            }
        }
    }

    /// What a context for `entries` requests of this lane asks of the machine's fs.aio-max-nr: the
    /// first lanes of a session what they can use, further ones less, so that a session of 256 lanes
    /// has some 9,000 in all. The kernel keeps at least twice as many requests as it is asked for.
    #[must_use]
    pub fn aio_requests(&self, entries: u32) -> u32 {
        let lanes = u32::try_from(self.account.lanes.load(Relaxed)).unwrap_or(u32::MAX);
        (2048 / lanes.max(1)).min(entries.div_ceil(2)).max(LEAST_AIO)
    }

    /// Counts requests that were taken, and the bytes they ask for.
    #[inline]
    pub fn begin(&mut self, requests: u64, bytes: u64, now_ns: u64) {
        self.requests += requests;
        self.bytes += bytes;
        let account = &*self.account;
        account.in_flight.fetch_add(requests, Relaxed);
        account.in_flight_bytes.fetch_add(bytes, Relaxed);
        account.requests.fetch_add(requests, Relaxed);
        account.bytes.fetch_add(bytes, Relaxed);
        pay(&account.requests_paid_ns, account.limits.requests_per_second, requests, now_ns);
        pay(&account.bytes_paid_ns, account.limits.bytes_per_second, bytes, now_ns);
    }

    /// Gives back what ended.
    #[inline]
    pub fn end(&mut self, requests: u64, bytes: u64) {
        self.requests -= requests;
        self.bytes -= bytes;
        self.account.in_flight.fetch_sub(requests, Relaxed);
        self.account.in_flight_bytes.fetch_sub(bytes, Relaxed);
    }
}

impl Drop for LaneShare {
    fn drop(&mut self) {
        self.end(self.requests, self.bytes);
        self.account.memory.fetch_sub(self.memory, Relaxed);
        self.account.lanes.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn account(limits: Limits) -> Arc<Account> {
        Arc::new(Account::new(Arc::new(limits), 1, 0))
    }

    fn take(requests: u64) -> Leave {
        Leave::Take { requests, bytes: 16 << 20 }
    }

    #[test]
    fn lanes_share_a_depth_and_each_has_one_request_in_any_case() {
        let account = account(Limits { depth: 40, ..Limits::default() });
        let (mut one, mut two) = (account.enter(0).unwrap(), account.enter(0).unwrap());
        assert_eq!(one.ask(32, 1), take(32));
        one.begin(32, 0, 1);
        assert_eq!(one.ask(32, 1), take(8));
        one.begin(8, 0, 1);
        assert_eq!(one.ask(32, 1), Leave::Full);
        assert_eq!(two.ask(32, 1), Leave::Take { requests: 1, bytes: 1 });
        two.begin(1, 0, 1);
        assert_eq!(two.ask(32, 1), Leave::Full);
        one.end(40, 0);
        assert_eq!(two.ask(32, 1), take(32));
        drop(two);
        let row = account.row();
        assert_eq!((row.in_flight, row.lanes, row.held_depth, row.held_rate), (0, 1, 2, 0));
    }

    #[test]
    fn bytes_under_way_are_bounded_and_come_back() {
        let account = account(Limits { in_flight: 1 << 20, ..Limits::default() });
        let mut lane = account.enter(0).unwrap();
        lane.begin(3, 1 << 19, 1);
        assert_eq!(lane.ask(32, 1), Leave::Take { requests: 32, bytes: 1 << 19 });
        lane.begin(1, 1 << 20, 1);
        assert_eq!(lane.ask(1, 1), Leave::Full);
        lane.end(1, 1 << 20);
        assert_eq!(lane.ask(1, 1), Leave::Take { requests: 1, bytes: 1 << 19 });
    }

    /// By hand: what is taken at 100 requests a second costs 10 ms each; a tenth of a second may
    /// be run ahead.
    #[test]
    fn a_rate_is_kept_in_the_long_run_and_unused_time_is_not_saved_up() {
        let account = account(Limits { requests_per_second: Some(100), ..Limits::default() });
        let mut lane = account.enter(0).unwrap();
        let mut now = 5 * SECOND;
        assert_eq!(lane.ask(32, now), take(32));
        lane.begin(32, 0, now);
        lane.end(32, 0);
        assert_eq!(lane.ask(32, now), Leave::Until(now - SECOND / 10 + 32 * SECOND / 100));
        assert_eq!((account.row().held_depth, account.row().held_rate), (0, 1));
        let mut taken = 0;
        while now < 15 * SECOND {
            match lane.ask(8, now) {
                Leave::Until(then) => now = then,
                Leave::Take { requests, .. } => {
                    lane.begin(requests, 0, now);
                    lane.end(requests, 0);
                    taken += requests;
                }
                Leave::Full => panic!("nothing is under way"),
            }
        }
        assert!((970..=1010).contains(&taken), "{taken} in 10 s");
        now += 1000 * SECOND;
        lane.begin(11, 0, now);
        assert!(matches!(lane.ask(1, now), Leave::Until(_)), "a tenth of a second, not 1000 s");
    }

    #[test]
    fn any_rate_and_any_amount_of_time_and_bytes_overflow_nothing() {
        let account = account(Limits { bytes_per_second: Some(1), ..Limits::default() });
        let mut lane = account.enter(0).unwrap();
        lane.begin(u64::MAX, u64::MAX, u64::MAX);
        assert_eq!(lane.ask(1, u64::MAX - 1), Leave::Until(u64::MAX));
    }

    /// 65536 is what Linux allows the machine unless told otherwise (fs/aio.c, `aio_max_nr`).
    #[test]
    fn three_sessions_with_all_their_lanes_leave_half_of_the_machines_requests_to_others() {
        let account = account(Limits::default());
        let mut lanes = Vec::new();
        let mut requests = 0;
        while let Ok(lane) = account.enter(0) {
            requests += lane.aio_requests(512);
            lanes.push(lane);
        }
        assert_eq!(lanes.len(), 256);
        assert!(requests * 3 <= 65536 / 2, "{requests}");
        assert_eq!(lanes.remove(0).aio_requests(4), LEAST_AIO);
    }

    #[test]
    fn sizes_are_digits_and_one_letter() {
        assert_eq!(size("12"), Ok(12));
        assert_eq!(size("3K"), Ok(3072));
        assert_eq!(size("1T"), Ok(1 << 40));
        for wrong in ["", "K", "0", "1KK", "1.5G", "-1", "1 G", "99999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
