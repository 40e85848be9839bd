//! Records of single requests: the slowest of each interval, those that took at least as long as
//! somebody asked for, those that failed, and a sample.
//!
//! Each lane keeps its last [`RING`] records; a newer one takes the place of the oldest. Every
//! record of the daemon has a number, in the order in which they were kept: who reads them knows
//! from the gaps how many it missed.
//!
//! Holds: keeping a record takes no lock and no memory; a record is read whole or not at all; a
//! record has no key and no plaintext, only what the host sees anyway.
//! Does not hold: that the times which the enclave claims are true; they are left out where they
//! contradict the daemon's clock.

use std::sync::atomic::{AtomicU64, Ordering, Ordering::Relaxed, fence};

use serde::{Deserialize, Serialize};
use zerocopy::FromZeros;

use crate::histogram::zeroed;

/// Records that a lane keeps.
pub const RING: usize = 1024;
/// The slowest request of each interval of this length is kept, nanoseconds.
pub const INTERVAL_NS: u64 = 1_000_000_000;
/// One request in so many is kept without anybody asking for it.
pub const ONE_IN: u64 = 1024;

/// [`Record::why`]: it is of the sample.
pub const SAMPLED: u64 = 1;
/// [`Record::why`]: it took as long as was asked for.
pub const SLOW: u64 = 2;
/// [`Record::why`]: the slowest of its lane in its interval.
pub const SLOWEST: u64 = 4;
/// [`Record::why`]: it failed.
pub const FAILED: u64 = 8;

macro_rules! record {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// One request's way. Times are CLOCK_MONOTONIC nanoseconds; 0 is unknown.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Record {
            $($(#[$doc])* pub $name: $type,)*
        }

        const WORDS: usize = [$(stringify!($name)),*].len();

        impl Record {
            #[allow(clippy::cast_sign_loss, trivial_numeric_casts)]
            fn to_words(self) -> [u64; WORDS] {
                [$(self.$name as u64),*]
            }

            #[allow(clippy::cast_possible_wrap, trivial_numeric_casts)]
            fn of_words(words: [u64; WORDS]) -> Self {
                let [$($name),*] = words;
                Self { $($name: $name as $type,)* }
            }
        }
    };
}

record! {
    /// Its number among the daemon's records, from 1.
    number: u64,
    /// The request's `aio_data`: lane, index and generation, as the kernel's tracepoints show it.
    id: u64,
    /// Session.
    session: u64,
    /// Number of the volume.
    volume: u64,
    /// Port operation, 1 to 4.
    operation: u64,
    /// Why it was kept: bits of this module.
    why: u64,
    /// Byte offset in the host file.
    offset: u64,
    /// Bytes that were asked for.
    length: u64,
    /// Bytes, or a negative errno.
    result: i64,
    /// When the enclave published it (its claim).
    enqueued_ns: u64,
    /// When the daemon took it.
    picked_ns: u64,
    /// When io_submit had returned; for what a thread does, when it was taken.
    submitted_ns: u64,
    /// When it was reaped.
    reaped_ns: u64,
    /// When the enclave delivered it (its claim).
    delivered_ns: u64,
}

impl Record {
    /// The request's id without its tag, as all faces show it.
    #[must_use]
    pub fn request(&self) -> String {
        format!("{:012x}", self.id & 0xffff_ffff_ffff)
    }
}

/// What the daemon keeps records of; all its lanes share it.
#[derive(Debug)]
pub struct Terms {
    /// Requests that took so long are kept, nanoseconds.
    least_ns: AtomicU64,
    /// One request in so many is kept.
    one_in: AtomicU64,
    /// Number of the last record.
    last: AtomicU64,
    /// Until when the two above hold, CLOCK_MONOTONIC nanoseconds.
    until_ns: AtomicU64,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            least_ns: AtomicU64::new(u64::MAX),
            one_in: AtomicU64::new(ONE_IN),
            last: AtomicU64::new(0),
            until_ns: AtomicU64::new(0),
        }
    }
}

impl Terms {
    /// How long a wish holds, nanoseconds: who wants more has to come back before.
    pub const WISH_NS: u64 = 10_000_000_000;

    /// Keeps requests that take at least `least_ns` and one in `one_in` (0: as few as usual) for
    /// [`Self::WISH_NS`]; what others wish at the same time counts as well.
    pub fn wish(&self, least_ns: u64, one_in: u64, now_ns: u64) {
        let one_in = if one_in == 0 { ONE_IN } else { one_in.min(ONE_IN) };
        self.forget(now_ns);
        self.least_ns.fetch_min(least_ns, Relaxed);
        self.one_in.fetch_min(one_in, Relaxed);
        self.until_ns.fetch_max(now_ns.saturating_add(Self::WISH_NS), Relaxed);
    }

    /// Takes wishes back whose time is over.
    pub fn forget(&self, now_ns: u64) {
        if self.until_ns.load(Relaxed) < now_ns {
            self.least_ns.store(u64::MAX, Relaxed);
            self.one_in.store(ONE_IN, Relaxed);
        }
    }

    /// Number of the last record.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last.load(Relaxed)
    }
}

/// A lane's last records: written by its thread, read by others.
#[derive(FromZeros)]
struct Words([[AtomicU64; WORDS]; RING]);

/// A lane's last records.
pub struct Ring {
    words: Box<Words>,
    /// Records kept so far.
    kept: AtomicU64,
}

impl Default for Ring {
    fn default() -> Self {
        Self { words: zeroed(), kept: AtomicU64::new(0) }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Ring {
    /// Keeps a record. Only the lane's thread may call this.
    fn keep(&self, record: Record) {
        let kept = self.kept.load(Relaxed);
        let place = &self.words.0[(kept % RING as u64) as usize];
        // The number comes first and is 0 while the others change.
        place[0].store(0, Relaxed);
        // Partner: the reader's Acquire fence. Who sees a new word sees that the number is gone.
        fence(Ordering::Release);
        for (word, value) in place.iter().zip(record.to_words()).skip(1) {
            word.store(value, Relaxed);
        }
        // Partner: the reader's Acquire load. Who sees the number sees all words.
        place[0].store(record.number, Ordering::Release);
        self.kept.store(kept.wrapping_add(1), Relaxed);
    }

    /// Adds the records with a number above `after` to `into`, in no order.
    pub fn read(&self, after: u64, into: &mut Vec<Record>) {
        let kept = self.kept.load(Relaxed).min(RING as u64);
        for place in &self.words.0[..kept as usize] {
            let number = place[0].load(Ordering::Acquire);
            if number <= after {
                continue;
            }
            let words = std::array::from_fn(|i| place[i].load(Relaxed));
            fence(Ordering::Acquire);
            if place[0].load(Relaxed) == number {
                into.push(Record { number, ..Record::of_words(words) });
            }
        }
    }
}

/// Decides which requests of a lane are kept. Only the lane's thread has it.
#[derive(Debug, Default)]
pub struct Chooser {
    /// Requests until the next one of the sample.
    countdown: u64,
    slowest: Option<Record>,
    slowest_ns: u64,
    /// When the interval ends.
    interval_ends_ns: u64,
}

impl Chooser {
    /// Looks at a request that has ended: how long it took, when it was reaped, whether it failed.
    /// `record` is asked for only if there is a use for it.
    #[inline]
    pub fn look(
        &mut self,
        (total_ns, reaped_ns, failed): (u64, u64, bool),
        record: impl Fn() -> Record,
        terms: &Terms,
        ring: &Ring,
    ) {
        let mut why = 0;
        if self.countdown == 0 {
            why |= SAMPLED;
            self.countdown = terms.one_in.load(Relaxed);
        }
        // A wish for more than the countdown has left takes hold at once.
        self.countdown = self.countdown.min(terms.one_in.load(Relaxed)).saturating_sub(1);
        if total_ns >= terms.least_ns.load(Relaxed) {
            why |= SLOW;
        }
        if failed {
            why |= FAILED;
        }
        if why != 0 {
            Self::keep(Record { why, ..record() }, terms, ring);
        }
        if reaped_ns >= self.interval_ends_ns {
            self.end_interval(reaped_ns, terms, ring);
        }
        // One that was kept need not be kept again.
        if total_ns > self.slowest_ns {
            self.slowest_ns = total_ns;
            self.slowest = (why == 0).then(&record);
        }
    }

    /// Keeps the slowest request of an interval that is over.
    #[cold]
    pub fn end_interval(&mut self, now_ns: u64, terms: &Terms, ring: &Ring) {
        if now_ns < self.interval_ends_ns {
            return;
        }
        self.interval_ends_ns = now_ns.saturating_add(INTERVAL_NS);
        self.slowest_ns = 0;
        if let Some(slowest) = self.slowest.take() {
            Self::keep(Record { why: SLOWEST, ..slowest }, terms, ring);
        }
    }

    fn keep(record: Record, terms: &Terms, ring: &Ring) {
        let number = terms.last.fetch_add(1, Relaxed) + 1;
        ring.keep(Record { number, ..record });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: u64, at_ns: u64, took_ns: u64) -> Record {
        let reaped_ns = at_ns + took_ns;
        Record { id, picked_ns: at_ns, submitted_ns: at_ns, reaped_ns, ..Record::default() }
    }

    fn look(chooser: &mut Chooser, record: Record, terms: &Terms, ring: &Ring) {
        let total_ns = record.reaped_ns - record.picked_ns;
        let seen = (total_ns, record.reaped_ns, record.result < 0);
        chooser.look(seen, || record, terms, ring);
    }

    fn read(ring: &Ring, after: u64) -> Vec<Record> {
        let mut all = Vec::new();
        ring.read(after, &mut all);
        all.sort_by_key(|record| record.number);
        all
    }

    #[test]
    fn the_sample_the_slowest_the_slow_and_the_failed_are_kept_and_no_others() {
        let (terms, ring, mut chooser) = (Terms::default(), Ring::default(), Chooser::default());
        terms.wish(500, 0, 1);
        let mut see = |record| look(&mut chooser, record, &terms, &ring);
        see(request(1, 10, 100));
        see(request(2, 20, 300));
        see(request(3, 30, 200));
        see(request(4, 40, 500));
        see(Record { result: -5, ..request(5, 50, 10) });
        see(request(6, 60, 400));
        // A second interval, in which one is slower than all that was not kept before.
        see(request(7, 10 + 2 * INTERVAL_NS, 100));
        see(request(8, 10 + 4 * INTERVAL_NS, 100));
        let kept: Vec<_> = read(&ring, 0).iter().map(|r| (r.number, r.id, r.why)).collect();
        assert_eq!(kept, [(1, 1, SAMPLED), (2, 4, SLOW), (3, 5, FAILED), (4, 7, SLOWEST)]);
        assert_eq!(read(&ring, 3).len(), 1);
    }

    #[test]
    fn a_wish_ends_unless_it_is_renewed() {
        let terms = Terms::default();
        terms.wish(1_000, 1, 5);
        terms.wish(9_000, 0, 6);
        let now = |terms: &Terms| (terms.least_ns.load(Relaxed), terms.one_in.load(Relaxed));
        terms.forget(6 + Terms::WISH_NS);
        assert_eq!(now(&terms), (1_000, 1), "the lower counts");
        terms.forget(7 + Terms::WISH_NS);
        assert_eq!(now(&terms), (u64::MAX, ONE_IN));
    }

    #[test]
    fn who_reads_too_late_knows_from_the_numbers_how_many_it_missed() {
        let (terms, ring, mut chooser) = (Terms::default(), Ring::default(), Chooser::default());
        terms.wish(0, 1, 1);
        for n in 0..RING as u64 + 10 {
            look(&mut chooser, request(n, n, 1), &terms, &ring);
        }
        let all = read(&ring, 0);
        assert_eq!(all.len(), RING);
        assert_eq!((all[0].number, terms.last()), (11, RING as u64 + 10));
        assert!(all.iter().all(|record| record.id + 1 == record.number));
    }

    #[test]
    fn a_record_read_while_others_are_written_is_of_one_piece() {
        let (terms, ring) = (Terms::default(), Ring::default());
        terms.wish(0, 1, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut chooser = Chooser::default();
                for n in 1..200_000u64 {
                    let record = Record { offset: n, length: n, ..request(n, n, 1) };
                    look(&mut chooser, record, &terms, &ring);
                }
            });
            let mut seen = 0;
            while seen < 199_999 {
                for record in read(&ring, seen) {
                    assert_eq!([record.id, record.offset, record.length], [record.number; 3]);
                    seen = record.number;
                }
            }
        });
    }
}
