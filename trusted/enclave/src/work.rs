//! A load of requests with verification: depth, block size, share of writes.
//!
//! Holds: no two requests of one place are in flight at once, so each read has one right answer;
//! what a block holds names its place and how often it was written, so an older content, another
//! block's and none are all told apart.

use std::sync::Arc;

use postern_trusted::{
    aio::{AioFile, Completion, FileTraits, Op, Request},
    errno::Errno,
    exec::run_to_end,
    platform::{Buffer as _, Platform as _},
    volume::Volume,
};

use crate::{
    guest::{Call, Requests, Runtime},
    host::Outside,
};

/// A volume in memory outside, open: every request completes on the spot.
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

/// A program with such a volume.
pub struct InMemory(pub Arc<Opened>);

impl Runtime for InMemory {
    fn file(&self) -> Result<Arc<dyn AioFile>, Errno> {
        Ok(self.0.clone())
    }

    fn now_ns(&self) -> u64 {
        self.0.outside.now_ns()
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests at once.
    pub depth: usize,
    /// Bytes of a request.
    pub bytes: usize,
    /// Of a hundred requests, those that write.
    pub writes: u64,
    /// Blocks of the file that are used.
    pub blocks: u64,
    /// Decides which blocks, in which order.
    pub seed: u64,
    /// Writes whatever is there and compares nothing: for measurements of all but the load itself.
    pub plain: bool,
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

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    call: Call,
    place: u64,
}

/// A load under way.
pub struct Run<'a> {
    load: &'a Load,
    program: Requests,
    random: Random,
    /// How often each block was written.
    versions: Vec<u32>,
    busy: Vec<bool>,
    flights: Vec<Option<Flight>>,
    tally: Tally,
    block: Vec<u8>,
    expected: Vec<u8>,
}

impl Load {
    /// Begins it: no request yet.
    ///
    /// # Errors
    /// What io_setup says.
    pub fn begin(&self, runtime: Arc<dyn Runtime>) -> Result<Run<'_>, Errno> {
        let program = Requests::new(runtime, self.depth, self.bytes)?;
        let blocks = self.blocks as usize;
        Ok(Run {
            load: self,
            random: Random(self.seed),
            versions: vec![0; blocks],
            busy: vec![false; blocks],
            flights: vec![None; program.depth()],
            program,
            tally: Tally::default(),
            block: vec![0; self.bytes],
            expected: vec![0; self.bytes],
        })
    }
}

impl Run<'_> {
    /// Makes so many requests, and waits for all of them. A volume may hold anything: blocks are
    /// compared once this load has written them.
    ///
    /// # Errors
    /// What a call itself answers.
    pub fn requests(&mut self, count: u64) -> Result<(), Errno> {
        self.play(count, &mut |run| {
            let writes = run.random.below(100) < run.load.writes;
            let place = run.random.below(run.load.blocks);
            // The next one that is not in flight.
            let free = (place..run.load.blocks).chain(0..place).find(|p| !run.busy[*p as usize]);
            let call = if writes { Call::Write } else { Call::Read };
            Flight { call, place: free.unwrap_or(place) }
        })
    }

    /// What it has seen until now.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Ends it by a sync and a look at every block that may be used.
    ///
    /// # Errors
    /// What a call itself answers.
    pub fn finish(mut self) -> Result<Tally, Errno> {
        self.program.sync()?;
        self.tally.requests += 1;
        let mut places = 0..self.load.blocks;
        let mut next =
            |_: &mut Run<'_>| Flight { call: Call::Read, place: places.next().unwrap_or_default() };
        self.play(self.load.blocks, &mut next)?;
        Ok(self.tally)
    }

    /// Makes `count` requests as `next` says.
    fn play(
        &mut self,
        count: u64,
        next: &mut dyn FnMut(&mut Run<'_>) -> Flight,
    ) -> Result<(), Errno> {
        let (mut made, mut ended) = (0, 0);
        let mut calls = Vec::with_capacity(self.flights.len());
        while ended < count {
            calls.clear();
            for slot in 0..self.flights.len() {
                if made == count {
                    break;
                }
                if self.flights[slot].is_none() {
                    let flight = next(self);
                    self.begin(slot, flight)?;
                    calls.push((slot, flight.call, flight.place));
                    made += 1;
                }
            }
            if !calls.is_empty() {
                self.program.submit(&calls)?;
            }
            ended += self.reap()?;
        }
        Ok(())
    }

    fn begin(&mut self, slot: usize, flight: Flight) -> Result<(), Errno> {
        let place = flight.place as usize;
        self.busy[place] = true;
        self.flights[slot] = Some(flight);
        if flight.call == Call::Write {
            if self.load.plain {
                return Ok(());
            }
            self.versions[place] += 1;
            fill(&mut self.block, flight.place, self.versions[place]);
            self.program.put(slot, &self.block)?;
        }
        Ok(())
    }

    fn reap(&mut self) -> Result<u64, Errno> {
        let (mut ended, mut faults) = (0, 0);
        let Self { program, flights, busy, versions, tally, block, expected, load, .. } = self;
        program.reap(1, |slot, result| {
            let Some(Flight { call, place }) = flights.get_mut(slot).and_then(Option::take) else {
                faults += 1;
                return;
            };
            busy[place as usize] = false;
            ended += 1;
            if result != load.bytes as i64 {
                tally.errors += 1;
            } else if call == Call::Read && versions[place as usize] > 0 {
                fill(expected, place, versions[place as usize]);
                let read = program.get(slot, block).is_ok() && block == expected;
                tally.wrong += u64::from(!read);
            }
        })?;
        tally.requests += ended;
        if faults > 0 { Err(Errno::EIO) } else { Ok(ended) }
    }
}

/// What the block at `place` holds after `version` writes of it.
fn fill(block: &mut [u8], place: u64, version: u32) {
    let mut random = Random(place << 32 | u64::from(version));
    let text = format!("postern {place:08} {version:08} ");
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let text = &text.as_bytes()[..text.len().min(block.len())];
    block[..text.len()].copy_from_slice(text);
}

/// SplitMix64: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}
