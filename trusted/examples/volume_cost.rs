//! What the sealed volume asks of its host, counted: `cargo run --release -p postern-trusted
//! --example volume_cost -- WHAT [SIZE]`, SIZE in GiB.
//!
//! - `amplification`: host bytes per guest byte under uniform random overwrites of 4 KiB, until
//!   all is overwritten three times; the last number as for `miss`.
//! - `sync`: host bytes, requests and flushes of one write of 4 KiB and its sync.
//! - `read`: host requests and bytes of sequential reads, fresh and after three random overwrites.
//! - `miss`: host reads to find a block, at random; the last number is the MiB of map nodes in
//!   memory, 64 if it is left out.
//! - `open`: host reads, memory and time of opening a sparse volume, 1 GiB to 16 TiB.
//! - `seal`: nanoseconds to seal and to open 4 KiB.
//!
//! The host is memory that answers at once and counts. Guest data is not kept where it is not read
//! back, so that large volumes fit. Only `open` and `seal` depend on the machine and its load.

#![allow(clippy::unwrap_used, reason = "a measurement fails by panicking")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashMap,
    future::Future,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Instant,
};

use postern_trusted::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    platform::{Memory, NoEntropy, Platform},
    volume::{FormatOptions, OpenOptions, SlotKey, Volume},
};

const GIB: u64 = 1 << 30;
const MIB: f64 = 1_048_576.0;

/// Counts what the volume allocates, without what the host keeps.
struct Counting;

static LIVE: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);
static HOST: AtomicBool = AtomicBool::new(false);

// SAFETY: every call is the system allocator's own, with the caller's arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !HOST.load(Relaxed) {
            let live = LIVE.fetch_add(layout.size() as u64, Relaxed) + layout.size() as u64;
            PEAK.fetch_max(live, Relaxed);
        }
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if !HOST.load(Relaxed) {
            LIVE.fetch_sub(layout.size() as u64, Relaxed);
        }
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Clone, Copy, Default)]
struct Counts {
    reads: u64,
    read_blocks: u64,
    writes: u64,
    written_blocks: u64,
    flushes: u64,
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            reads: self.reads - before.reads,
            read_blocks: self.read_blocks - before.read_blocks,
            writes: self.writes - before.writes,
            written_blocks: self.written_blocks - before.written_blocks,
            flushes: self.flushes - before.flushes,
        }
    }
}

#[derive(Default)]
struct State {
    kept: HashMap<u64, Box<Block>>,
    counts: Counts,
    random: u64,
    now: u64,
    /// What is written now is guest data: counted, not kept.
    dropping: bool,
    /// Places below are kept always: journal, superblocks, reserve.
    fixed: u64,
}

#[derive(Clone)]
struct Host(Arc<Mutex<State>>, u64);

struct Slot(Host, Vec<Block>);

impl Platform for Host {
    fn now_ns(&self) -> u64 {
        self.0.lock().unwrap().now
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut state = self.0.lock().unwrap();
        for byte in out {
            state.random = mix(state.random);
            *byte = state.random as u8;
        }
        Ok(())
    }
}

impl Disk for Host {
    type Transfer = Slot;
    const MAX_BLOCKS: usize = 32;

    async fn transfer(&self, blocks: usize) -> Result<Slot, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Gone)
    }

    fn try_transfer(&self, blocks: usize) -> Option<Slot> {
        Some(Slot(self.clone(), vec![[0; BLOCK]; blocks]))
    }

    async fn flush(&self) -> Result<(), HostError> {
        self.0.lock().unwrap().counts.flushes += 1;
        Ok(())
    }

    async fn discard(&self, place: u64, blocks: u64) -> Result<(), HostError> {
        let mut state = self.0.lock().unwrap();
        HOST.store(true, Relaxed);
        (place..place + blocks).for_each(|place| drop(state.kept.remove(&place)));
        HOST.store(false, Relaxed);
        Ok(())
    }

    fn host_blocks(&self) -> u64 {
        self.1
    }
}

impl Transfer for Slot {
    fn blocks(&self) -> usize {
        self.1.len()
    }

    fn put(&mut self, index: usize, block: &Block) {
        self.1[index] = *block;
    }

    fn get(&self, index: usize, block: &mut Block) {
        *block = self.1[index];
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        let mut state = self.0.0.lock().unwrap();
        state.counts.reads += 1;
        state.counts.read_blocks += self.1.len() as u64;
        for (place, block) in (place..).zip(&mut self.1) {
            *block = state.kept.get(&place).map_or([0; BLOCK], |kept| **kept);
        }
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let mut state = self.0.0.lock().unwrap();
        state.counts.writes += 1;
        state.counts.written_blocks += blocks as u64;
        for (place, block) in (place..).zip(&self.1[..blocks]) {
            let zero = block.iter().all(|byte| *byte == 0) && !state.kept.contains_key(&place);
            HOST.store(true, Relaxed);
            if state.dropping && place >= state.fixed {
                state.kept.remove(&place);
            } else if !zero {
                **state.kept.entry(place).or_insert_with(|| Box::new([0; BLOCK])) = *block;
            }
            HOST.store(false, Relaxed);
        }
        Ok(())
    }
}

fn buffer(bytes: usize) -> Memory {
    Memory::new(vec![7; bytes])
}

/// A small deterministic generator (SplitMix64's output function).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
}

struct Bench {
    host: Host,
    volume: Volume,
    blocks: u64,
}

fn key() -> SlotKey {
    SlotKey::new([1; 32])
}

impl Bench {
    fn new(bytes: u64) -> Self {
        let host = Host(Arc::default(), Volume::host_blocks(bytes));
        wait(Volume::format(&host, &key(), &FormatOptions { size: bytes })).unwrap();
        let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
        // The largest journal and reserve end below.
        host.0.lock().unwrap().fixed = 512 + volume.info().journal_blocks + 8 + 1024;
        Self { host, volume, blocks: bytes / BLOCK as u64 }
    }

    fn counts(&self) -> Counts {
        self.host.0.lock().unwrap().counts
    }

    /// Writes, then does what is due, as the service thread would. A write takes 10 us.
    fn write(&self, block: u64, buffer: &Memory, drop_data: bool) {
        self.host.0.lock().unwrap().dropping = drop_data;
        wait(self.volume.write(&self.host, block * BLOCK as u64, buffer)).unwrap();
        let now = {
            let mut state = self.host.0.lock().unwrap();
            state.dropping = false;
            state.now += 10_000;
            state.now
        };
        while let Some(chore) = self.volume.due(now) {
            wait(self.volume.run_chore(&self.host, chore)).unwrap();
        }
    }

    fn fill(&self, drop_data: bool) {
        let buffer = buffer(32 * BLOCK);
        (0..self.blocks).step_by(32).for_each(|block| self.write(block, &buffer, drop_data));
    }

    /// Overwrites `count` blocks, drawn uniformly.
    fn overwrite(&self, from: u64, count: u64, drop_data: bool) {
        let buffer = buffer(BLOCK);
        (from..from + count).for_each(|n| self.write(mix(n) % self.blocks, &buffer, drop_data));
    }
}

fn amplification(gib: u64, cache_mib: usize) {
    let bench = Bench::new(gib * GIB);
    bench.volume.limit_cache(cache_mib << 20);
    // So that the host forgets what checkpoints free.
    bench.volume.discard_freed(true);
    bench.fill(true);
    println!("{gib} GiB; overwritten | host bytes per guest byte | flushes | host reads per write");
    let quarter = bench.blocks / 4;
    for step in 0..12 {
        let before = bench.counts();
        bench.overwrite(step * quarter, quarter, true);
        let counts = bench.counts().since(before);
        println!(
            "{:.2} | {:.3} | {} | {:.3}",
            (step + 1) as f64 / 4.0,
            counts.written_blocks as f64 / quarter as f64,
            counts.flushes,
            counts.reads as f64 / quarter as f64,
        );
    }
    println!("most memory of the volume at once: {:.1} MiB", PEAK.load(Relaxed) as f64 / MIB);
}

fn sync(gib: u64) {
    let bench = Bench::new(gib * GIB);
    let buffer = buffer(BLOCK);
    let mut before = bench.counts();
    for n in 0..2_000_u64 {
        if n == 1_000 {
            before = bench.counts();
        }
        bench.write(mix(n) % bench.blocks, &buffer, false);
        wait(bench.volume.sync(&bench.host)).unwrap();
    }
    let counts = bench.counts().since(before);
    let each = |count: u64| count as f64 / 1_000.0;
    println!(
        "{gib} GiB; a write of 4 KiB and its sync: {:.3} blocks in {:.3} writes, {:.3} flushes, \
         {:.3} reads",
        each(counts.written_blocks),
        each(counts.writes),
        each(counts.flushes),
        each(counts.reads),
    );
}

fn read(gib: u64) {
    let bench = Bench::new(gib * GIB);
    bench.fill(false);
    let show = |name: &str| {
        for kib in [64_u64, 1024] {
            let buffer = buffer(kib as usize * 1024);
            let before = bench.counts();
            let times = bench.blocks * 4 / kib;
            for n in 0..times {
                wait(bench.volume.read(&bench.host, n * kib * 1024, &buffer)).unwrap();
            }
            let counts = bench.counts().since(before);
            println!(
                "{gib} GiB, {name}; {kib} KiB: {:.2} host reads, {:.3} host bytes per byte",
                counts.reads as f64 / times as f64,
                counts.read_blocks as f64 / bench.blocks as f64,
            );
        }
    };
    show("written in order");
    bench.overwrite(0, 3 * bench.blocks, false);
    show("after three random overwrites");
}

fn miss(gib: u64, cache_mib: usize) {
    let bench = Bench::new(gib * GIB);
    bench.volume.limit_cache(cache_mib << 20);
    let buffer = buffer(BLOCK);
    // Every leaf exists, and has holes: reading one takes the way through the map and no data.
    (0..bench.blocks).step_by(128).for_each(|block| bench.write(block, &buffer, true));
    wait(bench.volume.close(&bench.host)).unwrap();
    let (reads, mut before) = (200_000, bench.counts());
    for n in 0..2 * reads {
        if n == reads {
            before = bench.counts();
        }
        let block = (mix(n) % bench.blocks) | 1;
        wait(bench.volume.read(&bench.host, block * BLOCK as u64, &buffer)).unwrap();
    }
    let counts = bench.counts().since(before);
    println!(
        "{gib} GiB, {cache_mib} MiB of nodes; host reads to find a block: {:.3}",
        counts.reads as f64 / reads as f64
    );
}

fn open() {
    println!("size | host reads | blocks | blocks written | memory, MiB | ms");
    for (name, bytes) in [("1 GiB", GIB), ("1 TiB", GIB << 10), ("16 TiB", GIB << 14)] {
        let host = Host(Arc::default(), Volume::host_blocks(bytes));
        wait(Volume::format(&host, &key(), &FormatOptions { size: bytes })).unwrap();
        let (before, live) = (host.0.lock().unwrap().counts, LIVE.load(Relaxed));
        PEAK.store(live, Relaxed);
        let started = Instant::now();
        let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
        let took = started.elapsed();
        let counts = host.0.lock().unwrap().counts.since(before);
        println!(
            "{name} | {} | {} | {} | {:.1} | {:.1}",
            counts.reads,
            counts.read_blocks,
            counts.written_blocks,
            (PEAK.load(Relaxed) - live) as f64 / MIB,
            took.as_secs_f64() * 1e3,
        );
        drop(volume);
    }
}

fn seal() {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    const TIMES: u32 = 100_000;
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[3; 32]).unwrap());
    let mut data = [5; BLOCK];
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let best = |work: &mut dyn FnMut()| {
        (0..7)
            .map(|_| {
                let started = Instant::now();
                (0..TIMES).for_each(|_| work());
                started.elapsed().as_secs_f64() * 1e9 / f64::from(TIMES)
            })
            .fold(f64::INFINITY, f64::min)
    };
    let sealing = best(&mut || {
        let tag = key.seal_in_place_separate_tag(nonce(), Aad::from([0; 16]), &mut data);
        let _ = std::hint::black_box(tag.unwrap());
    });
    let mut sealed = data;
    let tag = key.seal_in_place_separate_tag(nonce(), Aad::from([0; 16]), &mut sealed).unwrap();
    let opening = best(&mut || {
        data = sealed;
        key.open_in_place_separate_tag(nonce(), Aad::from([0; 16]), tag, &mut data, 0..).unwrap();
    });
    println!("4 KiB, best of 7: seal {sealing:.0} ns, copy and open {opening:.0} ns");
}

fn main() {
    let mut words = std::env::args().skip(1);
    let what = words.next().unwrap_or_default();
    let gib = words.next().map_or(1, |word| word.parse().expect("SIZE is a number of GiB"));
    let cache_mib = words.next().map_or(64, |word| word.parse().expect("CACHE is a number of MiB"));
    match &*what {
        "amplification" => amplification(gib, cache_mib),
        "sync" => sync(gib),
        "read" => read(gib),
        "miss" => miss(gib, cache_mib),
        "open" => open(),
        "seal" => seal(),
        _ => {
            eprintln!("volume_cost amplification|sync|read|miss|open|seal [GiB [MiB]]");
            std::process::exit(64);
        }
    }
}
