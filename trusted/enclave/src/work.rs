//! The program that does AIO: its memory, its one open file, and a load with verification.

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use std::sync::Arc;

use postern_trusted::{
    aio::{
        AioContexts, AioFile, AioHost, Completion, Descriptor, EventCounter, FileTraits,
        KernelContext, Op, Request, RingMapping, Wait, WaitEnd, WaitKey,
    },
    errno::Errno,
    exec::run_to_end,
    platform::{Buffer as _, Fault, GuestMemory, Platform as _},
    volume::Volume,
};

use crate::host::Outside;

/// An open volume.
pub struct Opened {
    /// The volume.
    pub volume: Volume,
    /// Where its blocks lie.
    pub outside: Outside,
}

impl AioFile for Opened {
    fn traits(&self) -> FileTraits {
        FileTraits::REGULAR
    }

    fn completes_in_submit(&self, _: &Request) -> bool {
        true
    }

    fn submit(self: Arc<Self>, request: Request, done: Completion) {
        let (volume, outside, at, buffer) =
            (&self.volume, &self.outside, request.offset, &request.buffer);
        done.finish(match request.op {
            Op::Read => run_to_end(volume.read(outside, at, buffer)),
            Op::Write => run_to_end(volume.write(outside, at, buffer)),
            Op::Fsync | Op::Fdatasync => run_to_end(volume.sync(outside)).map(|()| buffer.len()),
        });
    }
}

/// The program's memory, with addresses from 0, and its one descriptor.
pub struct Guest {
    words: &'static [AtomicU64],
    file: Arc<Opened>,
}

/// The descriptor of the volume.
const FILE: u64 = 3;
/// Where the ring of completions lies.
const RING: u64 = 4096;
/// Where the program keeps its iocbs, its pointers to them, its events and its buffers.
const IOCBS: u64 = 1 << 16;
const POINTERS: u64 = IOCBS + 64 * DEPTH;
const EVENTS: u64 = POINTERS + 8 * DEPTH;
const BUFFERS: u64 = 1 << 17;
const MEMORY: u64 = BUFFERS + DEPTH * BYTES;
/// Requests in flight at once.
pub const DEPTH: u64 = 32;
/// Bytes of a request.
pub const BYTES: u64 = 4096;

const PREAD: u64 = 0;
const PWRITE: u64 = 1;
const FSYNC: u64 = 2;

impl GuestMemory for Guest {
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        for (at, byte) in (from..).zip(out) {
            let word = self.words.get((at / 8) as usize).ok_or(Fault)?;
            *byte = word.load(Relaxed).to_le_bytes()[(at % 8) as usize];
        }
        Ok(())
    }

    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        for (at, byte) in (to..).zip(data) {
            let word = self.words.get((at / 8) as usize).ok_or(Fault)?;
            let mut bytes = word.load(Relaxed).to_le_bytes();
            bytes[(at % 8) as usize] = *byte;
            word.store(u64::from_le_bytes(bytes), Relaxed);
        }
        Ok(())
    }
}

impl AioHost for Guest {
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno> {
        let from = RING as usize / 8;
        let room = self.words.get(from..from + bytes.div_ceil(8)).ok_or(Errno::ENOMEM)?;
        // SAFETY: the memory has these bytes, lives for ever, and is atomics: nobody's alone.
        Ok(unsafe { RingMapping::new(RING, NonNull::from(room).cast(), bytes) })
    }

    fn unmap_ring(&self, _: RingMapping) {}

    fn file(&self, descriptor: i32) -> Result<Descriptor, Errno> {
        if u64::try_from(descriptor) == Ok(FILE) {
            Ok(Descriptor::Served(self.file.clone()))
        } else {
            Err(Errno::EBADF)
        }
    }

    fn kernel_context(&self, _: u32) -> Result<Arc<dyn KernelContext>, Errno> {
        Err(Errno::ENOSYS)
    }

    fn event_counter(&self, _: i32) -> Result<Arc<dyn EventCounter>, Errno> {
        Err(Errno::EBADF)
    }

    fn possible_cpus(&self) -> u32 {
        1
    }

    fn aio_max_nr(&self) -> u64 {
        65_536
    }

    fn charge(&self, _: u32) -> Result<(), Errno> {
        Ok(())
    }

    fn uncharge(&self, _: u32) {}

    fn may_use_realtime_io(&self) -> bool {
        false
    }

    fn now_ns(&self) -> u64 {
        self.file.outside.now_ns()
    }

    fn drive(&self) {}

    fn wait(&self, _: Wait<'_>) -> WaitEnd {
        WaitEnd::TimedOut
    }

    fn wake(&self, _: WaitKey, _: u32) {}

    fn reaps_in_user_space(&self) {}
}

/// What a load has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that completed.
    pub requests: u64,
    /// Of them, those that answered an error.
    pub errors: u64,
    /// Blocks read that were not what had been written last.
    pub wrong: u64,
}

/// The program: contexts over its memory, and what it does with them.
pub struct Work {
    guest: Arc<Guest>,
    aio: AioContexts,
}

impl Work {
    /// A program with this volume open.
    pub fn new(file: Arc<Opened>) -> Self {
        let words = Vec::leak((0..MEMORY / 8).map(|_| AtomicU64::new(0)).collect());
        let guest = Arc::new(Guest { words, file });
        let aio = AioContexts::new(guest.clone());
        Self { guest, aio }
    }

    /// Writes `blocks` blocks at random places of the volume, then reads each of its blocks and
    /// compares, `DEPTH` at a time. `None` if a call itself is refused.
    pub fn write_and_verify(&self, blocks: u64, rounds: u64) -> Option<Tally> {
        let mut tally = Tally::default();
        self.aio.io_setup(DEPTH as u32, 0).ok()?;
        let mut versions = vec![0_u64; blocks as usize];
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 1..=rounds {
            let mut places = Vec::new();
            while places.len() < DEPTH as usize {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                if !places.contains(&(seed % blocks)) {
                    places.push(seed % blocks);
                }
            }
            for (slot, place) in (0..).zip(&places) {
                versions[*place as usize] = round;
                self.guest.write(buffer(slot), &contents(*place, round)).ok()?;
            }
            self.batch(PWRITE, &places, &mut tally)?;
        }
        self.batch(FSYNC, &[0], &mut tally)?;
        let all: Vec<u64> = (0..blocks).collect();
        for places in all.chunks(DEPTH as usize) {
            self.batch(PREAD, places, &mut tally)?;
            for (slot, place) in (0..).zip(places) {
                let mut read = vec![0; BYTES as usize];
                self.guest.read(buffer(slot), &mut read).ok()?;
                let expected = contents(*place, versions[*place as usize]);
                tally.wrong += u64::from(read != expected);
            }
        }
        self.aio.io_destroy(RING).ok()?;
        Some(tally)
    }

    /// Submits one request for each place and reaps all of them.
    fn batch(&self, opcode: u64, places: &[u64], tally: &mut Tally) -> Option<()> {
        for (slot, place) in (0..).zip(places) {
            // struct iocb: data; key and flags; opcode, priority, descriptor; buffer; bytes; offset.
            let iocb = IOCBS + 64 * slot;
            let (to, bytes, at) = match opcode {
                FSYNC => (0, 0, 0),
                _ => (buffer(slot), BYTES, place * BYTES),
            };
            let words = [slot, 0, opcode | FILE << 32, to, bytes, at, 0, 0];
            self.guest.write(iocb, &words.map(u64::to_le_bytes).concat()).ok()?;
            self.guest.write(POINTERS + 8 * slot, &iocb.to_le_bytes()).ok()?;
        }
        let count = places.len() as i64;
        if self.aio.io_submit(RING, count, POINTERS) != Ok(places.len()) {
            return None;
        }
        if self.aio.io_getevents(RING, count, count, EVENTS, 0) != Ok(places.len()) {
            return None;
        }
        for slot in 0..places.len() as u64 {
            let mut result = [0; 8];
            self.guest.read(EVENTS + 32 * slot + 16, &mut result).ok()?;
            let wanted = if opcode == FSYNC { 0 } else { BYTES as i64 };
            tally.errors += u64::from(i64::from_le_bytes(result) != wanted);
            tally.requests += 1;
        }
        Some(())
    }
}

const fn buffer(slot: u64) -> u64 {
    BUFFERS + slot * BYTES
}

/// What the block at `place` holds after `version` writes of it; zeros if there was none.
fn contents(place: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BYTES as usize];
    }
    let text = format!("postern {place:08} {version:08} ");
    text.bytes().cycle().take(BYTES as usize).collect()
}
