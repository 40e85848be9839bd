//! What a lane may do with its region, by plain sets: no table, no generations. It sees every load
//! and store of the lane, so what the host wrote meanwhile does not matter to it.

use alloc::{collections::BTreeMap, rc::Rc, vec, vec::Vec};
use core::{cell::RefCell, sync::atomic::Ordering};
use std::sync::atomic::AtomicU64;

use postern_edl::port::{Geometry, SQ_OFFSET, SQE_WORDS, Submission, cursor, op};
use postern_hostile::Rng;

use crate::port::{HostFault, Lane, probe::Probe};

/// How often, in ten thousandths, what the host answers changes between two looks.
#[derive(Clone, Copy, Default)]
pub(super) struct Fickle {
    /// Cursors and completions.
    pub(super) words: u32,
    /// Buffers: right after a block of them was copied.
    pub(super) buffers: u32,
}

pub(super) struct Watch {
    geometry: Geometry,
    region: &'static [AtomicU64],
    handle: u32,
    rng: Rng,
    fickle: Fickle,
    /// The submission ring as the lane wrote it.
    ring: Vec<u64>,
    published: u64,
    /// Published and not completed, by id.
    open: BTreeMap<u64, Submission>,
    /// Asked of a daemon that ended, and not of the next one yet, by index.
    owed: BTreeMap<u64, Submission>,
    /// The ring is being laid out anew.
    renewing: bool,
    /// Submissions wait for the next daemon.
    withheld: bool,
    /// The last generation of each index.
    generations: BTreeMap<u64, u64>,
    taken: u64,
    /// The host's cursor at the last look, and the highest that completions were taken by.
    cursor: u64,
    highest: u64,
    /// The id of a completion whose result was not looked at yet.
    id: Option<u64>,
    /// Completions taken, and looks, since the call began.
    accepted: usize,
    looks: usize,
    broken: bool,
    /// The host's answers were changed on their way.
    pub(super) meddled: bool,
    /// The daemon was given up.
    pub(super) gone: bool,
}

impl Watch {
    pub(super) fn new(
        geometry: Geometry,
        region: &'static [AtomicU64],
        handle: u32,
        seed: u64,
        fickle: Fickle,
    ) -> Self {
        Self {
            geometry,
            region,
            handle,
            rng: Rng::new(seed),
            fickle,
            ring: vec![0; geometry.entries * SQE_WORDS],
            published: 0,
            open: BTreeMap::new(),
            owed: BTreeMap::new(),
            renewing: false,
            withheld: false,
            generations: BTreeMap::new(),
            taken: 0,
            cursor: 0,
            highest: 0,
            id: None,
            accepted: 0,
            looks: 0,
            broken: false,
            meddled: false,
            gone: false,
        }
    }

    pub(super) fn settle(&mut self) {
        self.fickle = Fickle::default();
    }

    /// Submissions wait from now on.
    pub(super) const fn withhold(&mut self) {
        self.withheld = true;
    }

    /// The ring is about to be laid out anew: nothing of what is open was asked of the next daemon.
    pub(super) fn begin_renewal(&mut self) {
        let open = core::mem::take(&mut self.open);
        self.owed.extend(open.into_values().map(|asked| (asked.id & 0xffff_ffff, asked)));
        (self.published, self.taken, self.cursor, self.highest) = (0, 0, 0, 0);
        self.renewing = true;
    }

    pub(super) const fn end_renewal(&mut self) {
        self.renewing = false;
    }

    /// The next daemon has been asked all that the one before had left, but for flushes that were
    /// `refused`.
    pub(super) fn release(&mut self, refused: bool) {
        let flush = |asked: &Submission| u64::from(asked.op) == op::FLUSH;
        let lost = self.owed.values().find(|asked| !refused || !flush(asked));
        assert_eq!(lost, None, "lost between two daemons");
        self.owed.clear();
        self.withheld = false;
    }

    fn meddle(&mut self, value: u64) -> u64 {
        if !self.rng.chance(self.fickle.words) {
            return value;
        }
        self.meddled = true;
        match self.rng.below(4) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => self.rng.any(),
            _ => value ^ 1 << self.rng.below(64),
        }
    }

    /// A result was looked at: what must become of it.
    fn judge(&mut self, id: u64, result: i64) {
        let ahead = self.cursor.wrapping_sub(self.taken);
        let announced = (1..=self.geometry.entries as u64).contains(&ahead);
        assert!(announced, "a completion is taken that is not announced: {ahead} ahead");
        assert!(self.cursor >= self.highest, "the cursor went back and nobody minded");
        self.highest = self.cursor;
        let possible = |asked: &Submission| {
            let limit = match u64::from(asked.op) {
                op::READ | op::WRITE => i64::try_from(asked.length).unwrap(),
                _ => 0,
            };
            (-4095..0).contains(&result) || (0..=limit).contains(&result) && result % 512 == 0
        };
        if self.open.get(&id).is_some_and(possible) {
            self.open.remove(&id);
            self.taken += 1;
            self.accepted += 1;
        } else {
            self.broken = true;
        }
    }

    /// A descriptor was published: it is one that may be.
    fn publish(&mut self, value: u64) {
        assert_eq!(value, self.published + 1, "descriptors are published one by one");
        let at = self.geometry.sqe_word(self.published) - SQ_OFFSET / 8;
        self.published = value;
        let mut words = [0; SQE_WORDS];
        words.copy_from_slice(&self.ring[at..at + SQE_WORDS]);
        let asked = Submission::from_words(words);
        let (index, generation) = (asked.id & 0xffff_ffff, asked.id >> 32);
        assert!(index < self.geometry.entries as u64, "an index beyond the ring");
        assert!(self.open.keys().all(|id| id & 0xffff_ffff != index), "an index is used twice");
        let before = self.generations.insert(index, generation).unwrap_or_default();
        assert!(generation > before, "an id is used again");
        assert_eq!(asked.handle, self.handle);
        if let Some(before) = self.owed.remove(&index) {
            assert_eq!(Submission { id: asked.id, ..before }, asked, "changed between two daemons");
        }
        if asked.length > 0 && asked.data > 0 {
            let area = self.geometry.data_offset as u64..=self.geometry.region_bytes() as u64;
            let end = |asked: &Submission| asked.data + asked.length;
            assert!(area.contains(&asked.data) && area.contains(&end(&asked)), "{asked:?}");
            let apart = |o: &Submission| o.data >= end(&asked) || asked.data >= end(o);
            let others = self.open.values().chain(self.owed.values());
            assert!(others.into_iter().all(apart), "a buffer is used twice at once");
        }
        self.open.insert(asked.id, asked);
        assert!(self.open.len() <= self.geometry.entries, "more in flight than the ring holds");
    }

    /// A call of `poll` begins.
    pub(super) fn begin(&mut self) {
        (self.accepted, self.looks, self.id) = (0, 0, None);
    }

    /// It has ended: what it answered, how much it did, and what became of the lane.
    pub(super) fn end(&mut self, answered: usize, limit: usize, lane: &Lane) {
        assert_eq!(answered, self.accepted, "completions taken");
        assert!(answered <= limit, "{answered} completions taken, the limit is {limit}");
        // Two looks at the cursor for each batch, two at each completion.
        let most = 4 * (answered + 2);
        assert!(self.looks <= most, "{} looks for {answered} completions", self.looks);
        match lane.fault() {
            None => assert!(!self.broken, "a breach that nobody minded"),
            Some(_) if self.broken => {}
            Some(HostFault::CursorOutOfRange { published, taken }) => {
                assert_eq!((published, taken), (self.cursor, self.taken));
                let ahead = published.wrapping_sub(taken);
                assert!(ahead > self.geometry.entries as u64, "{ahead} ahead is in range");
                self.broken = true;
            }
            Some(HostFault::CursorWentBack { published, .. }) => {
                // Also one that was looked at while nothing was taken counts.
                assert_eq!(published, self.cursor);
                self.broken = true;
            }
            Some(HostFault::DaemonGone) if self.gone => {}
            Some(fault) => panic!("the host is blamed for nothing: {fault}"),
        }
        let ended = self.broken || self.gone;
        // What nobody waited for any more stays open, and keeps its buffer.
        let open = lane.in_flight();
        let known = self.open.len() + self.owed.len();
        let more = self.withheld && open >= known;
        assert!(open == known || more || ended && open < known, "{open} in flight");
    }

    pub(super) const fn is_broken(&self) -> bool {
        self.broken
    }
}

/// The probe of a lane.
pub(super) struct Probed(pub(super) Rc<RefCell<Watch>>);

impl Probe for Probed {
    fn loaded(&mut self, index: usize, value: u64) -> u64 {
        let mut watch = self.0.borrow_mut();
        watch.looks += 1;
        if index >= watch.geometry.data_offset / 8 {
            return value;
        }
        let turn = watch.geometry.cqe_word(watch.taken);
        let value = watch.meddle(value);
        match index {
            cursor::CQ_PUBLISHED => watch.cursor = value,
            cursor::DAEMON_SLEEPS => watch.looks -= 1,
            index if index == turn && watch.id.is_none() => {
                assert!(!watch.broken, "a completion is looked at after a breach");
                watch.id = Some(value);
            }
            index if index == turn + 1 && watch.id.is_some() => {
                let id = watch.id.take().unwrap();
                watch.judge(id, value.cast_signed());
            }
            _ => panic!("the lane looks at word {index} once more, or at one of its own"),
        }
        value
    }

    fn stored(&mut self, index: usize, value: u64) {
        let mut watch = self.0.borrow_mut();
        let geometry = watch.geometry;
        let ring = SQ_OFFSET / 8..geometry.cq_offset / 8;
        if watch.renewing {
            assert!(index < geometry.data_offset / 8, "a buffer is changed between two daemons");
            if ring.contains(&index) {
                watch.ring[index - ring.start] = value;
            }
            return;
        }
        let stamps = geometry.stamps_offset / 8..geometry.data_offset / 8;
        match index {
            cursor::SQ_PUBLISHED => watch.publish(value),
            cursor::CQ_TAKEN => assert_eq!(value, watch.taken, "completions said to be taken"),
            cursor::DRIVER_SLEEPS | cursor::SERVICE_SLEEPS => assert!(value <= 1),
            index if ring.contains(&index) => watch.ring[index - ring.start] = value,
            index if stamps.contains(&index) || index >= geometry.data_offset / 8 => {}
            _ => panic!("the lane stores to word {index}, which is the host's"),
        }
    }

    fn copied(&mut self, index: usize) {
        let watch = &mut *self.0.borrow_mut();
        if watch.rng.chance(watch.fickle.buffers) {
            watch.meddled = true;
            let word = &watch.region[index + watch.rng.index(512)];
            word.fetch_xor(1 << watch.rng.below(64), Ordering::Relaxed);
        }
    }
}
