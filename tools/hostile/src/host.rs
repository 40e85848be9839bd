//! The daemon's end of a port, played by a seed.
//!
//! Holds: [`Host::act`] does one thing and never blocks; whatever the enclave writes, the host
//! stays within its region and keeps a bounded number of descriptors.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use postern_edl::port::{
    Completion, Geometry, SQ_OFFSET, SQE_WORDS, Submission, cursor, header, op,
};

use crate::{BLOCK_WORDS, Rng, Store, Temper};

const BLOCK_BYTES: u64 = 4096;
/// Ids of the past that are kept, to be answered again.
const PAST: usize = 64;
/// Requests answered before they were done that are still kept, to be done later.
const OWED: usize = 64;
/// Short answers in a row that a request is owed no error for.
const SHORTS: u8 = 3;
/// How many acts a silence lasts at most.
const SILENCE: u64 = 300;

/// What a host has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    /// Requests done and answered as they should be.
    pub honest: u64,
    /// See [`Temper`].
    pub fidgets: u64,
    /// See [`Temper`].
    pub shorts: u64,
    /// See [`Temper`].
    pub refusals: u64,
    /// See [`Temper`].
    pub lies: u64,
    /// See [`Temper`].
    pub breaches: u64,
}

impl Deeds {
    /// Nothing has happened yet that a guest may see an error of.
    #[must_use]
    pub const fn harmless(&self) -> bool {
        self.refusals == 0 && self.lies == 0 && self.breaches == 0
    }
}

/// A host at its end of one port.
pub struct Host<S> {
    geometry: Geometry,
    rng: Rng,
    temper: Temper,
    store: S,
    /// Descriptors taken since attach.
    taken: u64,
    /// Completions written since attach.
    answered: u64,
    /// Taken and not answered.
    waiting: Vec<Submission>,
    /// Answered and not done.
    owed: Vec<Submission>,
    /// Ids that were answered.
    past: Vec<u64>,
    /// Ids that the daemon before was asked under and did not answer, or only just.
    left: Vec<u64>,
    /// Short answers in a row, by what was asked: operation and end of the buffer.
    short: BTreeMap<(u32, u64), u8>,
    /// Acts that a silence still lasts.
    silent: u64,
    deeds: Deeds,
}

impl<S: Store> Host<S> {
    /// A host of this temper, whose acts `seed` decides.
    pub fn new(geometry: Geometry, seed: u64, temper: Temper, store: S) -> Self {
        Self {
            geometry,
            rng: Rng::new(seed),
            temper,
            store,
            taken: 0,
            answered: 0,
            waiting: Vec::new(),
            owed: Vec::new(),
            past: Vec::new(),
            left: Vec::new(),
            short: BTreeMap::new(),
            silent: 0,
            deeds: Deeds::default(),
        }
    }

    /// What it has done.
    #[must_use]
    pub const fn deeds(&self) -> &Deeds {
        &self.deeds
    }

    /// Its files.
    pub const fn store(&mut self) -> &mut S {
        &mut self.store
    }

    /// Its files, when the host is gone.
    pub fn into_store(self) -> S {
        self.store
    }

    /// From now on it behaves like this.
    pub const fn set_temper(&mut self, temper: Temper) {
        self.temper = temper;
    }

    /// The daemon ends, and another one begins with the ring laid out anew: of what it had taken
    /// some is done. It remembers what ids the one before was asked under, and what that owes.
    pub fn succeed(&mut self, region: &[AtomicU64]) {
        // The last answers may not have been looked at.
        self.left = self.past.iter().rev().take(2).copied().collect();
        for asked in core::mem::take(&mut self.waiting) {
            if self.rng.chance(5000) {
                self.perform(region, &asked, asked.length);
            }
            self.remember(asked.id);
            self.left.push(asked.id);
        }
        (self.taken, self.answered, self.silent) = (0, 0, 0);
    }

    /// Answers, if it breaks the contract at all and now and then, what only the daemon before was
    /// asked.
    pub fn haunt(&mut self, region: &[AtomicU64]) {
        if self.temper.breaches > 0 && !self.past.is_empty() && self.rng.chance(5000) {
            self.deeds.breaches += 1;
            // What that one had answered, or what the next one has not been asked yet.
            let unanswered = !self.left.is_empty() && self.rng.chance(9000);
            let id = if unanswered {
                self.rng.one_of(&self.left)
            } else {
                let back = self.rng.index(self.past.len().min(8));
                self.past[self.past.len() - 1 - back]
            };
            let result = self.rng.one_of(&[0, 4096]);
            self.answer(region, id, result);
        }
    }

    /// Requests taken and not answered.
    #[must_use]
    pub const fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes what is published; does one more thing. Answers whether it wrote a completion.
    pub fn act(&mut self, region: &[AtomicU64]) -> bool {
        self.take(region);
        if self.silent > 0 {
            self.silent -= 1;
            return false;
        }
        let Temper { fidgets, shorts, refusals, lies, breaches, silences } = self.temper;
        if self.rng.chance(silences) {
            self.silent = self.rng.below(SILENCE);
        } else if self.rng.chance(fidgets) {
            self.deeds.fidgets += 1;
            self.fidget(region);
        } else if self.rng.chance(breaches) {
            self.deeds.breaches += 1;
            return self.breach(region);
        } else if self.rng.chance(lies) {
            return self.lie(region);
        } else if self.rng.chance(refusals) {
            return self.refuse(region);
        } else if self.rng.chance(shorts) {
            return self.shorten(region);
        } else if let Some(asked) = self.pick() {
            self.deeds.honest += 1;
            self.short.remove(&end_of(&asked));
            let result = self.perform(region, &asked, asked.length);
            self.answer(region, asked.id, result);
            return true;
        }
        false
    }

    /// The descriptors published since the last time; nonsense is left alone.
    fn take(&mut self, region: &[AtomicU64]) {
        let published = get(region, cursor::SQ_PUBLISHED);
        if published.wrapping_sub(self.taken) > self.geometry.entries as u64 {
            return;
        }
        while self.taken != published {
            let at = self.geometry.sqe_word(self.taken);
            let mut words = [0; SQE_WORDS];
            words.iter_mut().enumerate().for_each(|(i, word)| *word = get(region, at + i));
            // Of an id that was answered by mistake there may be two.
            if self.waiting.len() < 4 * self.geometry.entries {
                self.waiting.push(Submission::from_words(words));
            }
            self.taken = self.taken.wrapping_add(1);
        }
        set(region, cursor::SQ_TAKEN, published);
    }

    /// One of the requests that wait, in any order.
    fn pick(&mut self) -> Option<Submission> {
        if self.waiting.is_empty() {
            return None;
        }
        let at = self.rng.index(self.waiting.len());
        Some(self.waiting.swap_remove(at))
    }

    /// Writes a completion and announces it.
    fn answer(&mut self, region: &[AtomicU64], id: u64, result: i64) {
        let (reaped_ns, published_ns) = (self.rng.any(), self.rng.any());
        let words = Completion { id, result, reaped_ns, published_ns }.to_words();
        let at = self.geometry.cqe_word(self.answered);
        for (i, word) in words.into_iter().enumerate() {
            set(region, at + i, word);
        }
        self.answered = self.answered.wrapping_add(1);
        set(region, cursor::CQ_PUBLISHED, self.answered);
        self.remember(id);
    }

    fn remember(&mut self, id: u64) {
        if self.past.len() == PAST {
            self.past.remove(0);
        }
        self.past.push(id);
    }

    /// The words of the buffer of block `n` of a request; `None` where there is none.
    fn buffer<'r>(
        &self,
        region: &'r [AtomicU64],
        asked: &Submission,
        n: u64,
    ) -> Option<&'r [AtomicU64]> {
        let at = asked.data.checked_add(n.checked_mul(BLOCK_BYTES)?)?;
        let first = usize::try_from(at / 8).ok()?;
        if at < self.geometry.data_offset as u64 || first < self.geometry.data_offset / 8 {
            return None;
        }
        region.get(first..first.checked_add(BLOCK_WORDS)?)
    }

    /// Moves the first `bytes` bytes of what is asked; the result.
    fn perform(&mut self, region: &[AtomicU64], asked: &Submission, bytes: u64) -> i64 {
        match u64::from(asked.op) {
            op::WRITE if !self.store.has_room(asked.length) => return -28,
            op::READ | op::WRITE => {}
            op::FLUSH => {
                self.store.flush(asked.handle);
                return 0;
            }
            _ => return 0,
        }
        for n in 0..bytes.min(asked.length).div_ceil(BLOCK_BYTES) {
            let Some(buffer) = self.buffer(region, asked, n) else { return -14 };
            let place = asked.offset / BLOCK_BYTES + n;
            if u64::from(asked.op) == op::WRITE {
                let mut content = [0; BLOCK_WORDS];
                content.iter_mut().zip(buffer).for_each(|(to, w)| *to = load(w));
                self.store.write(asked.handle, place, &content);
            } else {
                let content = self.store.read(asked.handle, place);
                buffer.iter().zip(content).for_each(|(w, from)| store(w, from));
            }
        }
        i64::try_from(bytes).unwrap_or(i64::MAX)
    }

    /// What must not matter: words that only the host itself reads.
    fn fidget(&mut self, region: &[AtomicU64]) {
        let value = match self.rng.below(4) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            _ => self.rng.any(),
        };
        let entries = self.geometry.entries as u64;
        let word = match self.rng.below(8) {
            // A flag of the host's own: doorbells ring always or never.
            0..=2 => cursor::DAEMON_SLEEPS,
            3 => self.rng.one_of(&[
                header::MAGIC,
                header::ENTRIES,
                header::DATA_OFFSET,
                header::DATA_BYTES,
                cursor::SQ_TAKEN,
                cursor::CQ_TAKEN,
                cursor::DRIVER_SLEEPS,
                cursor::SERVICE_SLEEPS,
                cursor::IN_FLIGHT,
                cursor::LEASES,
            ]),
            // A descriptor that was taken: all of them were.
            4 => self.geometry.sqe_word(self.rng.below(entries)) + self.rng.index(SQE_WORDS),
            // Of a completion, taken or not, what the enclave has no use for.
            5 => self.geometry.cqe_word(self.rng.below(entries)) + 2 + self.rng.index(2),
            6 => self.geometry.stamp_word(self.rng.index(self.geometry.entries)),
            _ => SQ_OFFSET / 8 - 1 - self.rng.index(100),
        };
        set(region, word, value);
    }

    /// Does a part of what is asked, and is asked for the rest.
    fn shorten(&mut self, region: &[AtomicU64]) -> bool {
        let Some(asked) = self.pick() else { return false };
        let before = self.short.get(&end_of(&asked)).copied().unwrap_or_default();
        let moves = matches!(u64::from(asked.op), op::READ | op::WRITE);
        let result = if moves && before < SHORTS {
            self.deeds.shorts += 1;
            self.short.insert(end_of(&asked), before + 1);
            let sectors = 1 + self.rng.below(asked.length / 512 - 1);
            self.perform(region, &asked, sectors * 512)
        } else {
            self.short.remove(&end_of(&asked));
            self.perform(region, &asked, asked.length)
        };
        self.answer(region, asked.id, result);
        true
    }

    /// What the contract allows: an errno, or less than was asked.
    fn refuse(&mut self, region: &[AtomicU64]) -> bool {
        let Some(asked) = self.pick() else { return false };
        self.deeds.refusals += 1;
        let moves = matches!(u64::from(asked.op), op::READ | op::WRITE);
        let result = if moves && self.rng.chance(5000) {
            let sectors = self.rng.below(asked.length / 512 + 1);
            self.perform(region, &asked, sectors * 512)
        } else {
            -1 - i64::try_from(self.rng.below(4095)).unwrap_or_default()
        };
        self.answer(region, asked.id, result);
        true
    }

    /// Answers as if it had done what was asked, which it has not, or not yet, or not there; or
    /// alters what lies around.
    fn lie(&mut self, region: &[AtomicU64]) -> bool {
        let kind = self.rng.below(8);
        if kind == 0 {
            // A buffer that changes while somebody works on it.
            self.deeds.lies += 1;
            let area = self.geometry.data_offset / 8..region.len();
            for _ in 0..=self.rng.below(64) {
                let word = area.start + self.rng.index(area.len());
                let bit = 1 << self.rng.below(64);
                set(region, word, get(region, word) ^ bit);
            }
            return false;
        }
        if kind == 1 {
            // Done long after it was answered: over whatever is there now.
            if self.owed.is_empty() {
                return false;
            }
            self.deeds.lies += 1;
            let at = self.rng.index(self.owed.len());
            let asked = self.owed.swap_remove(at);
            self.perform(region, &asked, asked.length);
            return false;
        }
        let Some(asked) = self.pick() else { return false };
        self.deeds.lies += 1;
        let moves = matches!(u64::from(asked.op), op::READ | op::WRITE);
        let mut result = i64::try_from(asked.length).unwrap_or_default();
        match kind {
            _ if !moves => result = 0,
            2 => {}
            3 => {
                if self.owed.len() < OWED {
                    self.owed.push(asked);
                }
            }
            4 => self.exchange(region, &asked),
            // Somewhere else; what is written there is lost.
            5 => {
                let blocks = asked.offset / BLOCK_BYTES;
                let place = self.rng.below(blocks.max(8) * 2);
                let moved = Submission { offset: place * BLOCK_BYTES, ..asked };
                self.perform(region, &moved, moved.length);
            }
            // As asked, and then a bit of it is another one.
            6 => {
                self.perform(region, &asked, asked.length);
                let n = self.rng.below(asked.length / BLOCK_BYTES);
                if let Some(buffer) = self.buffer(region, &asked, n) {
                    let word = &buffer[self.rng.index(buffer.len())];
                    store(word, load(word) ^ 1 << self.rng.below(64));
                }
            }
            _ => {
                let place = asked.offset / BLOCK_BYTES;
                let mut content = self.store.read(asked.handle, place);
                content[self.rng.index(BLOCK_WORDS)] ^= 1 << self.rng.below(64);
                self.store.write(asked.handle, place, &content);
                self.perform(region, &asked, asked.length);
            }
        }
        self.answer(region, asked.id, result);
        true
    }

    /// A read gets what lay there before; a write is done and undone.
    fn exchange(&mut self, region: &[AtomicU64], asked: &Submission) {
        self.perform(region, asked, asked.length);
        for n in 0..asked.length / BLOCK_BYTES {
            let place = asked.offset / BLOCK_BYTES + n;
            let which = self.rng.index(8);
            let Some(older) = self.store.older(asked.handle, place, which) else { continue };
            if u64::from(asked.op) == op::WRITE {
                self.store.write(asked.handle, place, &older);
            } else if let Some(buffer) = self.buffer(region, asked, n) {
                buffer.iter().zip(older).for_each(|(w, from)| store(w, from));
            }
        }
    }

    /// Breaks the contract of the rings.
    fn breach(&mut self, region: &[AtomicU64]) -> bool {
        let entries = self.geometry.entries as u64;
        let any_result = self.rng.one_of(&[0, -5, 4096, 512]);
        match self.rng.below(10) {
            // One that was answered: just now, or long ago.
            0 | 1 if !self.past.is_empty() => {
                let back = if self.rng.chance(5000) { 1 } else { self.past.len() };
                let id = self.past[self.past.len() - 1 - self.rng.index(back)];
                self.answer(region, id, any_result);
            }
            // The same twice at once.
            2 => {
                let Some(asked) = self.pick() else { return false };
                let result = self.perform(region, &asked, asked.length);
                self.answer(region, asked.id, result);
                self.answer(region, asked.id, result);
            }
            // One that never was: near a real one, the next of an index, or anything.
            3 => {
                let id = match (self.rng.below(3), self.waiting.last()) {
                    (0, Some(asked)) => asked.id ^ 1 << self.rng.below(64),
                    (1, Some(asked)) => asked.id.wrapping_add(1 << 32),
                    (2, _) => self.rng.any(),
                    _ => self.rng.below(4) << 32 | self.rng.below(2 * entries),
                };
                self.answer(region, id, any_result);
            }
            // A result that cannot be.
            4 | 5 => {
                let Some(asked) = self.pick() else { return false };
                let length = i64::try_from(asked.length).unwrap_or_default();
                let result = match self.rng.below(6) {
                    0 => length + 512,
                    1 => length + 4096,
                    2 => length - 1,
                    3 => i64::MIN,
                    4 => -4096 - i64::try_from(self.rng.below(1 << 40)).unwrap_or_default(),
                    _ => self.rng.any().cast_signed(),
                };
                self.answer(region, asked.id, result);
            }
            // Cursors: ahead, back, far away, around the end of all numbers.
            6 => {
                let to = self.answered.wrapping_add(1 + self.rng.below(entries));
                self.jump(region, to);
            }
            7 | 8 => {
                let to = self.answered.wrapping_sub(1 + self.rng.below(3));
                self.jump(region, to);
            }
            _ => {
                let far = [u64::MAX, 1 << 63, 1 << 32, self.answered.wrapping_add(entries + 1)];
                let to = self.rng.one_of(&far);
                self.jump(region, to);
            }
        }
        true
    }

    /// Announces other completions than there are; goes on from there or from where it was.
    fn jump(&mut self, region: &[AtomicU64], to: u64) {
        set(region, cursor::CQ_PUBLISHED, to);
        // Long enough that somebody looks.
        self.silent = self.rng.below(16);
        if self.rng.chance(3000) {
            self.answered = to;
        }
    }
}

/// What the rest of a request that was shortened has in common with it.
const fn end_of(asked: &Submission) -> (u32, u64) {
    (asked.op, asked.data.wrapping_add(asked.length))
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

fn store(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Release);
}

/// Beyond the region there is nothing.
fn get(region: &[AtomicU64], word: usize) -> u64 {
    region.get(word).map_or(0, load)
}

fn set(region: &[AtomicU64], word: usize, value: u64) {
    if let Some(word) = region.get(word) {
        store(word, value);
    }
}
