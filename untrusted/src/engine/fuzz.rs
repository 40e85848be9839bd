//! A fuzz target: descriptors of any content in the submission ring of a real engine, against an
//! oracle in arithmetic that cannot overflow.
//!
//! Holds, or the target panics: a descriptor is taken, refused with its errno, or ends the lane,
//! exactly as the port's rules say; what goes to the kernel is what was asked, in the transfer area
//! and on the file of its handle; each that was taken is answered once. The kernel's part is played.
//!
//! An input: how many descriptors are published (from F0 on: how many the cursor is behind), which
//! of the first eight indexes are in flight, then patches of good descriptors: which word of which
//! descriptor, what, and two values.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postern_ebpf_common::aio_data;
use postern_edl::OPEN_READ_ONLY;
use postern_edl::port::{self, Completion, Geometry, SQE_WORDS, Submission, cursor, header, op};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::queue::{Entry, Interface, Queue};
use super::{Act, BrokenRing, Doorbells, Engine, MAX_FILES, Pace, Place};
use crate::files::{Catalog, Opening};
use crate::limits::LaneShare;
use crate::region::Region;

/// Ring entries.
const ENTRIES: u64 = 16;
/// Number of the lane.
const LANE: u64 = 5;
/// Generation of good ids.
const GENERATION: u64 = 7;
/// Handle of a file that may be written, and of one that is only read.
const WRITABLE: u32 = MAX_FILES as u32;
const READ_ONLY: u32 = 3 * MAX_FILES as u32 + 1;

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

/// What was pushed towards the kernel, in order; the kernel accepts none of it.
#[derive(Clone, Default)]
struct Pushed(Arc<Mutex<VecDeque<Entry>>>);

impl Pushed {
    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue for Pushed {
    fn is_pending(&self) -> bool {
        !self.entries().is_empty()
    }
    fn push(&mut self, entry: &Entry) {
        self.entries().push_back(*entry);
    }
    unsafe fn submit(&mut self) -> Result<&[usize], Errno> {
        Ok(&[])
    }
    fn drop_first(&mut self) -> Option<usize> {
        self.entries().pop_front().map(|entry| entry.index)
    }
    fn reap(&mut self) -> usize {
        0
    }
    fn event(&self, n: usize) -> (u64, i64) {
        panic!("event {n} of none")
    }
    fn has_events(&self) -> bool {
        false
    }
}

/// A fresh port, as the daemon has it and as the enclave has it, and its doorbells.
#[allow(clippy::unwrap_used, reason = "a fuzz target and tests fail by panicking")]
pub(super) fn fresh_port(entries: usize, data_bytes: usize) -> (Arc<Region>, Region, Doorbells) {
    let geometry = Geometry::new(entries, data_bytes).unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("port", flags).unwrap();
    let bytes = geometry.region_bytes() as u64;
    rustix::fs::ftruncate(&memory, bytes).unwrap();
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    for (word, value) in [
        (header::MAGIC, port::MAGIC),
        (header::VERSION, 1),
        (header::ENTRIES, entries as u64),
        (header::DATA_OFFSET, geometry.data_offset as u64),
        (header::DATA_BYTES, geometry.data_bytes as u64),
    ] {
        rustix::io::pwrite(&memory, &value.to_ne_bytes(), word as u64 * 8).unwrap();
    }
    let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let doorbells = Doorbells { driver: bell(), service: bell() };
    let map = || Region::map(&memory, bytes).unwrap();
    (Arc::new(map()), map(), doorbells)
}

/// An engine, and the enclave's view of its port.
struct Bench {
    engine: Engine,
    pushed: Pushed,
    enclave: Region,
    /// Host descriptors by handle.
    files: BTreeMap<u32, i32>,
}

/// What the rules make of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Taken,
    Refused(i64),
    Broken,
}

impl Bench {
    #[allow(clippy::unwrap_used, reason = "a fuzz target fails by panicking")]
    fn new() -> Self {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let (region, enclave, doorbells) = fresh_port(ENTRIES as usize, 4 << 20);
        let share = LaneShare::unlimited();
        let (stats, interface) = (Arc::default(), Interface::Libaio);
        let mut engine = Engine::new(region, LANE, doorbells, stats, share, interface).unwrap();
        let pushed = Pushed::default();
        engine.queue = Box::new(pushed.clone());
        engine.serve_discards();

        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("posternd-fuzz-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let catalog = Catalog::new(&[], std::slice::from_ref(&directory), &[], true).unwrap();
        let mut files = BTreeMap::new();
        for (name, handle, flags) in [("w", WRITABLE, 0), ("r", READ_ONLY, OPEN_READ_ONLY)] {
            std::fs::write(directory.join(name), [0; 4096]).unwrap();
            let opened = catalog.open(name, flags, std::time::Instant::now()).unwrap();
            let Opening::Leased(file) = opened else { panic!("somebody has our file's lease") };
            files.insert(handle, file.raw());
            engine.add_file(handle, Arc::new(file));
        }
        std::fs::remove_dir_all(&directory).unwrap();
        Self { engine, pushed, enclave, files }
    }

    /// Writes descriptors behind what the engine has taken, and a cursor.
    fn publish(&self, descriptors: &[[u64; SQE_WORDS]], published: u64) {
        for (n, words) in (self.engine.taken..).zip(descriptors) {
            let at = self.enclave.geometry().sqe_word(n);
            for (i, word) in words.iter().enumerate() {
                self.enclave.word(at + i).store(*word, Ordering::Relaxed);
            }
        }
        self.enclave.word(cursor::SQ_PUBLISHED).store(published, Ordering::Release);
    }

    /// A good descriptor: each operation in turn, each index once.
    fn good(&self, number: u64) -> [u64; SQE_WORDS] {
        let id = GENERATION << 32 | ((8 + number) % ENTRIES);
        let base = Submission { id, handle: WRITABLE, guest: number, ..Submission::default() };
        let data = self.enclave.geometry().data_offset as u64 + number * 4096;
        let (offset, length) = (number * 8192, 4096 << (number % 4));
        let submission = match number % 4 {
            0 => Submission { op: op::READ as u32, offset, length, data, ..base },
            1 => Submission { op: op::WRITE as u32, offset, length, data, ..base },
            2 => Submission { op: op::FLUSH as u32, ..base },
            _ => Submission { op: op::DISCARD as u32, offset, length, ..base },
        };
        submission.to_words()
    }

    /// What the port's rules say of a descriptor while these indexes are in flight.
    fn fate(&self, words: &[u64; SQE_WORDS], in_flight: &BTreeSet<u64>) -> Fate {
        let geometry = self.enclave.geometry();
        let [id, what, offset, length, data, ..] = *words;
        let index = id & 0xffff_ffff;
        if index >= ENTRIES || in_flight.contains(&index) {
            return Fate::Broken;
        }
        let end = |from: u64| i128::from(from) + i128::from(length);
        let whole = [offset, length, data].iter().all(|number| number % 4096 == 0);
        let in_file = end(offset) <= i128::from(i64::MAX);
        let (from, to) = (geometry.data_offset as i128, geometry.region_bytes() as i128);
        let in_area = i128::from(data) >= from && end(data) <= to;
        let (operation, handle) = (what & 0xffff_ffff, what >> 32);
        let good = match operation {
            1 | 2 => whole && in_file && in_area && (1..=1 << 20).contains(&length),
            3 => [offset, length, data] == [0; 3],
            4 => whole && in_file && data == 0 && (1..=128 << 20).contains(&length),
            _ => false,
        };
        match self.files.keys().find(|known| u64::from(**known) == handle) {
            _ if !good => Fate::Refused(-22),
            None => Fate::Refused(-9),
            Some(&READ_ONLY) if operation == 2 || operation == 4 => Fate::Refused(-9),
            Some(_) => Fate::Taken,
        }
    }

    /// Checks that what waits for the kernel and for threads is `taken` and nothing else.
    fn check_taken(&self, taken: &[[u64; SQE_WORDS]]) {
        let address = self.engine.region.address(0);
        let (mut asked, mut discards) = (Vec::new(), Vec::new());
        for words in taken {
            let [id, what, offset, length, data, ..] = *words;
            let index = id & 0xffff_ffff;
            let fd = i64::from(self.files[&((what >> 32) as u32)]);
            let tag = aio_data(LANE, index, id >> 32);
            match what & 0xffff_ffff {
                4 => discards.push((index, Place::Thread, Act::Discard { offset, length })),
                3 => asked.push((tag, index, 3, fd, [0, 0, 0])),
                op => asked.push((tag, index, op, fd, [address + data, length, offset])),
            }
        }
        let pushed: Vec<_> = (self.pushed.entries().iter())
            .map(|it| {
                let fd = i64::from(it.fd);
                (it.data, it.index as u64, it.op, fd, [it.address, it.length, it.offset])
            })
            .collect();
        assert_eq!(pushed, asked, "for the kernel");
        let work: Vec<_> = (self.engine.work.iter())
            .map(|work| (work.index as u64, work.place, work.act))
            .collect();
        assert_eq!(work, discards, "for threads");
    }

    /// Ends all that is under way, and takes the ids and results that are published for it.
    fn finish(&mut self, before: u64) -> Vec<(u64, i64)> {
        const CANCELED: i64 = -125;
        while let Some(index) = self.engine.queue.drop_first() {
            self.engine.complete(index, CANCELED, 1);
        }
        let work: Vec<_> = self.engine.take_work().map(|work| work.index).collect();
        work.into_iter().for_each(|index| self.engine.done(index, CANCELED));
        self.engine.publish();
        // No flush is short: they all go to the kernel.
        self.engine.flushes = Pace::default();
        let published = self.enclave.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire);
        (before..published)
            .map(|n| {
                let at = self.enclave.geometry().cqe_word(n);
                let word = |i| self.enclave.word(at + i).load(Ordering::Relaxed);
                let completion = Completion::from_words(std::array::from_fn(word));
                (completion.id, completion.result)
            })
            .collect()
    }
}

/// Patches a word of a descriptor.
fn patch(words: &mut [[u64; SQE_WORDS]], geometry: &Geometry, [place, what, a, b]: [u8; 4]) {
    let at = usize::from(place / 8) % words.len();
    let word = &mut words[at][usize::from(place % 8)];
    let (a, b) = (u64::from(a), u64::from(b));
    let borders = [
        geometry.data_offset as u64,
        geometry.region_bytes() as u64,
        i64::MAX as u64 + 1,
        port::MAX_REQUEST_BYTES,
        port::MAX_DISCARD_BYTES,
        u64::from(READ_ONLY) << 32,
        u64::from(WRITABLE) << 32,
        0,
    ];
    *word = match what % 8 {
        0 => a | b << 8,
        1 => u64::MAX - (a | b << 8),
        2 => (1 << (a % 64)) + b,
        3 => (1_u64 << (a % 64)).wrapping_sub(b),
        4 => word.wrapping_add(a << (b % 64)),
        5 => *word ^ a << (b % 64),
        6 => borders[a as usize % 8].wrapping_add(b * 4096),
        _ => borders[a as usize % 8].wrapping_sub(b * 4096).wrapping_add(u64::from(what / 8)),
    };
}

/// Descriptors of any content. The module's header says what an input is.
///
/// # Panics
/// If something does not hold.
pub fn descriptors(data: &[u8]) {
    BENCH.with_borrow_mut(|bench| {
        let Some(([number, flying], rest)) = data.split_first_chunk() else { return };
        let before = bench.engine.published;
        // Those in flight: good reads, taken already.
        let flying: Vec<u64> = (0..8).filter(|index| flying & 1 << index != 0).collect();
        let reads: Vec<[u64; SQE_WORDS]> = (flying.iter())
            .map(|index| {
                let id = GENERATION << 32 | index;
                Submission { id, ..Submission::from_words(bench.good(0)) }.to_words()
            })
            .collect();
        bench.publish(&reads, bench.engine.taken + reads.len() as u64);
        assert_eq!(bench.engine.take(), Ok(!reads.is_empty()));

        let taken = bench.engine.taken;
        let (count, published) = match number {
            0xf0.. => (0, taken.wrapping_sub(u64::from(number - 0xef))),
            _ => (u64::from(number % 20), taken + u64::from(number % 20)),
        };
        let mut words: Vec<_> = (0..count.min(ENTRIES)).map(|n| bench.good(n)).collect();
        if !words.is_empty() {
            let geometry = *bench.enclave.geometry();
            rest.as_chunks::<4>().0.iter().take(64).for_each(|p| patch(&mut words, &geometry, *p));
        }
        bench.publish(&words, published);

        let mut in_flight: BTreeSet<u64> = flying.iter().copied().collect();
        let (mut all, mut refused, mut end) = (reads, Vec::new(), taken);
        let mut expected = Ok(count > 0);
        if count > ENTRIES || published < taken {
            expected = Err(BrokenRing::Cursor { published, taken });
        } else {
            for descriptor in &words {
                end += 1;
                match bench.fate(descriptor, &in_flight) {
                    Fate::Taken => {
                        in_flight.insert(descriptor[0] & 0xffff_ffff);
                        all.push(*descriptor);
                    }
                    Fate::Refused(errno) => refused.push((descriptor[0], errno)),
                    Fate::Broken => {
                        expected = Err(BrokenRing::Id { id: descriptor[0] });
                        break;
                    }
                }
            }
        }
        assert_eq!(bench.engine.take(), expected, "{words:x?}");
        assert_eq!(bench.engine.taken, end);
        assert_eq!(bench.enclave.word(cursor::SQ_TAKEN).load(Ordering::Acquire), end);
        let staged: Vec<_> =
            bench.engine.staged.iter().map(|(id, result, _)| (*id, *result)).collect();
        assert_eq!(staged, refused);
        bench.check_taken(&all);

        let mut answered = bench.finish(before);
        assert!(bench.engine.is_drained() && bench.engine.slots.iter().all(|slot| !slot.in_flight));
        let canceled = all.iter().map(|words| (words[0], -125));
        let mut asked: Vec<_> = refused.into_iter().chain(canceled).collect();
        answered.sort_unstable();
        asked.sort_unstable();
        assert_eq!(answered, asked, "each is answered once");
        bench.publish(&[], bench.engine.taken);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_any_content_is_taken_or_refused_as_the_ports_rules_say() {
        postern_hostile::inputs::run("descriptors", descriptors, Some(2000));
    }

    /// The control: the good ones are good, so patches of them can be.
    #[test]
    fn good_descriptors_are_taken_and_the_oracle_tells_the_rest() {
        let bench = Bench::new();
        let none = BTreeSet::new();
        for number in 0..ENTRIES {
            let words = bench.good(number);
            assert_eq!(bench.fate(&words, &none), Fate::Taken);
            assert_eq!(bench.fate(&words, &BTreeSet::from([words[0] & 15])), Fate::Broken);
            let mut beside = [words];
            patch(&mut beside, bench.enclave.geometry(), [2, 4, 1, 0]);
            assert_eq!(bench.fate(&beside[0], &none), Fate::Refused(-22));
            patch(&mut beside, bench.enclave.geometry(), [2, 5, 1, 0]);
            assert_eq!(beside[0], words);
        }
        let mut write = [bench.good(1)];
        patch(&mut write, bench.enclave.geometry(), [1, 7 | 2 << 3, 5, 0]);
        assert_eq!(write[0][1], u64::from(READ_ONLY) << 32 | 2);
        assert_eq!(bench.fate(&write[0], &none), Fate::Refused(-9));
    }
}
