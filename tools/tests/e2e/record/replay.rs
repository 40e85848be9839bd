//! Recorded host writes, played back up to any point, with any part of those that no flush covers.
//!
//! Shares no code with the volume: what a block may read as follows from the program's log alone.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use postern_trusted::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    exec::run_to_end,
    platform::{Memory, NoEntropy, Platform},
    volume::{OpenOptions, SlotKey, Volume},
};

use super::Event;

/// Content by place; what is missing is zeros.
pub type Image = BTreeMap<u64, Arc<Block>>;

/// What lies in a host file.
pub fn image_of(file: &std::path::Path) -> Image {
    let bytes = std::fs::read(file).unwrap();
    let blocks = bytes.as_chunks::<BLOCK>().0.iter().zip(0..);
    let written = blocks.filter(|(block, _)| block.iter().any(|byte| *byte != 0));
    written.map(|(block, place)| (place, Arc::new(*block))).collect()
}

/// A host file in memory: whatever is asked is done at once.
#[derive(Clone)]
struct Host {
    image: Arc<Mutex<Image>>,
    blocks: u64,
    drawn: Arc<Mutex<u64>>,
}

impl Platform for Host {
    fn now_ns(&self) -> u64 {
        1
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut state = self.drawn.lock().unwrap();
        out.iter_mut().for_each(|byte| *byte = draw(&mut state) as u8);
        Ok(())
    }
}

/// SplitMix64.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Blocks {
    host: Host,
    blocks: Vec<Block>,
}

impl Disk for Host {
    type Transfer = Blocks;
    const MAX_BLOCKS: usize = 32;

    async fn transfer(&self, blocks: usize) -> Result<Blocks, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Gone)
    }

    fn try_transfer(&self, blocks: usize) -> Option<Blocks> {
        Some(Blocks { host: self.clone(), blocks: vec![[0; BLOCK]; blocks] })
    }

    async fn flush(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn host_blocks(&self) -> u64 {
        self.blocks
    }
}

impl Transfer for Blocks {
    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn put(&mut self, index: usize, block: &Block) {
        self.blocks[index] = *block;
    }

    fn get(&self, index: usize, block: &mut Block) {
        *block = self.blocks[index];
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        let image = self.host.image.lock().unwrap();
        for (block, place) in self.blocks.iter_mut().zip(place..) {
            *block = image.get(&place).map_or([0; BLOCK], |block| **block);
        }
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let mut image = self.host.image.lock().unwrap();
        for (block, place) in self.blocks[..blocks].iter().zip(place..) {
            image.insert(place, Arc::new(*block));
        }
        Ok(())
    }
}

/// What the program's log says of one block: the last version that was confirmed, and the last
/// that was submitted.
#[derive(Clone, Copy, Default)]
struct Known {
    confirmed: u64,
    submitted: u64,
}

/// The play.
pub struct Replay {
    /// What is durable at the present point.
    durable: Image,
    /// Written since the last flush.
    pending: Vec<(u64, Vec<u8>)>,
    known: Vec<Known>,
    /// A line that is not whole yet.
    line: Vec<u8>,
    blocks: u64,
    key: [u8; 32],
    drawn: u64,
    forgets: bool,
}

impl Replay {
    /// From the host file as it was before, of so many blocks; the guest's file has `guest` blocks.
    pub fn new(base: Image, blocks: u64, key: [u8; 32], guest: u64) -> Self {
        let known = vec![Known::default(); usize::try_from(guest).unwrap()];
        let (pending, line) = (Vec::new(), Vec::new());
        Self { durable: base, pending, known, line, blocks, key, drawn: 9, forgets: false }
    }

    /// A host that takes flushes and does nothing.
    pub const fn forget_flushes(&mut self) {
        self.forgets = true;
    }

    /// Plays the events and opens at least `states` states on the way, if there are as many;
    /// answers how many it were, or what one has lost.
    pub fn run(&mut self, events: &[Event], states: usize) -> Result<usize, String> {
        let mut opened = 0;
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Write(offset, bytes) => self.pending.push((*offset, bytes.clone())),
                Event::Flush if self.forgets => {}
                Event::Flush => {
                    for (offset, bytes) in std::mem::take(&mut self.pending) {
                        apply(&mut self.durable, offset, &bytes, |_| true);
                    }
                }
                Event::Log(text) => self.note(text),
            }
            // Spread over the whole row.
            if opened * events.len() < states * (at + 1) {
                opened += self.open_states(at)?;
            }
        }
        Ok(opened)
    }

    /// Takes lines of the log.
    fn note(&mut self, text: &[u8]) {
        self.line.extend_from_slice(text);
        while let Some(end) = self.line.iter().position(|c| *c == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let line = String::from_utf8(line).unwrap();
            let mut words = line.split_whitespace();
            let kind = words.next().unwrap();
            let mut number = || words.next().unwrap().parse::<u64>().unwrap();
            let (block, version) = (usize::try_from(number()).unwrap(), number());
            let known = &mut self.known[block];
            let of = if kind == "C" { &mut known.confirmed } else { &mut known.submitted };
            *of = version.max(*of);
        }
    }

    /// Opens the states that a power cut may leave at the present point.
    fn open_states(&mut self, at: usize) -> Result<usize, String> {
        if self.pending.is_empty() {
            self.open(&format!("event {at}, all durable"), |_, _| true)?;
            return Ok(1);
        }
        self.open(&format!("event {at}, all of the unflushed"), |_, _| true)?;
        self.open(&format!("event {at}, nothing of the unflushed"), |_, _| false)?;
        let seed = draw(&mut self.drawn);
        // Whole writes, or sectors of them.
        let torn = seed.is_multiple_of(2);
        self.open(&format!("event {at}, part {seed:#x} of the unflushed"), |write, sector| {
            let mut one = seed ^ (write << 32 | if torn { sector + 1 } else { 0 });
            draw(&mut one).is_multiple_of(2)
        })?;
        Ok(3)
    }

    fn open(&self, what: &str, keeps: impl Fn(u64, u64) -> bool) -> Result<(), String> {
        let mut image = self.durable.clone();
        for ((offset, bytes), write) in self.pending.iter().zip(0..) {
            apply(&mut image, *offset, bytes, |sector| keeps(write, sector));
        }
        let (image, drawn) = (Arc::new(Mutex::new(image)), Arc::new(Mutex::new(self.drawn)));
        let host = Host { image, blocks: self.blocks, drawn };
        let key = SlotKey::new(self.key);
        let opened = run_to_end(Volume::open(&host, &key, &OpenOptions::default()));
        let (volume, _) = opened.map_err(|error| format!("{what}: {error}"))?;
        let bytes = Memory::new(vec![0xee; self.known.len() * BLOCK]);
        match run_to_end(volume.read(&host, 0, &bytes)) {
            Ok(done) if done == self.known.len() * BLOCK => {}
            other => return Err(format!("{what}: the file reads as {other:?}")),
        }
        let bytes = bytes.into_inner();
        for ((block, number), known) in
            bytes.as_chunks::<BLOCK>().0.iter().zip(0..).zip(&self.known)
        {
            let version = version_of(block, number).ok_or_else(|| {
                format!("{what}: block {number} reads as bytes nobody wrote there")
            })?;
            let Known { confirmed, submitted } = *known;
            if !(confirmed..=submitted).contains(&version) {
                return Err(format!(
                    "{what}: block {number} reads as version {version}; {confirmed} was confirmed, \
                     {submitted} submitted"
                ));
            }
        }
        Ok(())
    }
}

/// Writes the sectors of `bytes` that `keeps` names.
fn apply(image: &mut Image, offset: u64, bytes: &[u8], keeps: impl Fn(u64) -> bool) {
    for (sector, at) in bytes.chunks(512).zip((offset / 512)..) {
        if keeps(at - offset / 512) {
            let block = image.entry(at / 8).or_insert_with(|| Arc::new([0; BLOCK]));
            let within = usize::try_from(at % 8).unwrap() * 512;
            Arc::make_mut(block)[within..within + sector.len()].copy_from_slice(sector);
        }
    }
}

/// The version that `synclog` made this block's content for; 0 for zeros.
fn version_of(block: &Block, number: u64) -> Option<u64> {
    let words: Vec<u64> =
        block.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    if words.iter().all(|word| *word == 0) {
        return Some(0);
    }
    let version = words[1];
    let rest = words.iter().enumerate().skip(2);
    let whole = words[0] == number
        && rest.into_iter().all(|(i, word)| {
            let seed = number.wrapping_mul(1_000_003).wrapping_add(version * 512 + i as u64);
            *word == mix(seed)
        });
    whole.then_some(version)
}

/// As in `guests/synclog.c`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
