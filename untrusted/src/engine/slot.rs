//! What the engine knows of a request index, and what it makes of a request that is over.

use postern_edl::port::{Submission, op};

use crate::records::{Chooser, Record};
use crate::stats::{LaneStats, Stage};

/// A request index of the lane.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    pub in_flight: bool,
    /// It has ended, and its delivery was not recorded yet.
    pub undelivered: bool,
    pub id: u64,
    pub op: u64,
    /// Slot of the file table.
    pub file: usize,
    /// Place of the file's volume in the lane's statistics.
    pub volume: usize,
    pub offset: u64,
    pub length: u64,
    pub result: i64,
    /// When the enclave published it, if its claim holds; else 0.
    pub enqueued_ns: u64,
    pub picked_ns: u64,
    /// When the kernel accepted it.
    pub submitted_ns: u64,
    pub reaped_ns: u64,
    /// When the last request of this index was delivered (claimed), if that is known; else 0.
    pub delivered_ns: u64,
}

impl Slot {
    /// A request that is taken now. Counts the claim of its publication.
    #[inline]
    pub fn begin(
        submission: &Submission,
        (file, volume): (usize, usize),
        picked_ns: u64,
        stats: &LaneStats,
    ) -> Self {
        let op = u64::from(submission.op);
        let claimed = submission.enqueued_ns;
        if claimed == 0 {
            stats.add(|c| &c.claims_missing, 1);
        } else if claimed > picked_ns {
            stats.add(|c| &c.claims_negative, 1);
        }
        let enqueued_ns = if claimed > picked_ns { 0 } else { claimed };
        if let Some(stats) = stats.volume(volume) {
            stats.begin();
            if enqueued_ns != 0 {
                stats.record(Stage::CrossingOut, op, picked_ns - enqueued_ns);
            }
        }
        Self {
            in_flight: true,
            id: submission.id,
            op,
            file,
            volume,
            offset: submission.offset,
            length: submission.length,
            enqueued_ns,
            picked_ns,
            submitted_ns: picked_ns,
            ..Self::default()
        }
    }

    /// Bytes that count as under way.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        if matches!(self.op, op::READ | op::WRITE) { self.length } else { 0 }
    }

    /// It was accepted by the kernel.
    #[inline]
    pub fn submitted(&mut self, submitted_ns: u64, stats: &LaneStats) {
        self.submitted_ns = submitted_ns;
        if let Some(stats) = stats.volume(self.volume) {
            let spent = submitted_ns.saturating_sub(self.picked_ns);
            stats.record(Stage::HostSubmit, self.op, spent);
        }
    }

    /// It has ended.
    #[inline]
    pub fn end(&mut self, result: i64, reaped_ns: u64, stats: &LaneStats) {
        (self.in_flight, self.undelivered) = (false, true);
        (self.result, self.reaped_ns) = (result, reaped_ns);
        if let Some(stats) = stats.volume(self.volume) {
            let spent = reaped_ns.saturating_sub(self.submitted_ns);
            stats.record(Stage::Device, self.op, spent);
            stats.end(self.op, result, self.bytes());
        }
    }

    /// Records the delivery of a request that has ended, if the enclave's stamp says it and lies
    /// between its end and now; answers whether it does.
    #[inline]
    pub fn deliver(&mut self, stamp: u64, now_ns: u64, keeper: Keeper<'_>) -> bool {
        if stamp < self.reaped_ns || stamp > now_ns {
            return false;
        }
        (self.undelivered, self.delivered_ns) = (false, stamp);
        if let Some(stats) = keeper.stats.volume(self.volume) {
            stats.record(Stage::CrossingIn, self.op, stamp - self.reaped_ns);
            if self.enqueued_ns != 0 {
                stats.record(Stage::EndToEnd, self.op, stamp - self.enqueued_ns);
            }
        }
        self.keep(keeper);
        true
    }

    /// Gives a request up whose delivery was never told.
    #[cold]
    pub fn give_up(&mut self, keeper: Keeper<'_>) {
        self.undelivered = false;
        keeper.stats.add(|c| &c.claims_undelivered, 1);
        self.keep(keeper);
    }

    #[inline]
    fn keep(&self, keeper: Keeper<'_>) {
        let Keeper { stats, chooser, lane, index } = keeper;
        let record = || Record {
            number: 0,
            id: postern_ebpf_common::aio_data(lane, index as u64, self.id >> 32),
            session: stats.session(),
            volume: stats.number_at(self.volume),
            operation: self.op,
            why: 0,
            offset: self.offset,
            length: self.length,
            result: self.result,
            enqueued_ns: self.enqueued_ns,
            picked_ns: self.picked_ns,
            submitted_ns: self.submitted_ns,
            reaped_ns: self.reaped_ns,
            delivered_ns: self.delivered_ns,
        };
        let seen = (self.total_ns(), self.reaped_ns, self.result < 0);
        chooser.look(seen, record, stats.terms(), &stats.records);
    }

    /// How long it took, as far as that is known, nanoseconds.
    #[inline]
    const fn total_ns(&self) -> u64 {
        let from = if self.enqueued_ns == 0 { self.picked_ns } else { self.enqueued_ns };
        let to = if self.delivered_ns == 0 { self.reaped_ns } else { self.delivered_ns };
        to.saturating_sub(from)
    }
}

/// What it takes to keep a record of a request.
pub struct Keeper<'a> {
    pub stats: &'a LaneStats,
    pub chooser: &'a mut Chooser,
    pub lane: u64,
    /// The request's index.
    pub index: usize,
}
