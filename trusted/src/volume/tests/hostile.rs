//! A sealed volume on a lane, against a host that breaks every rule, by seed.
//!
//! Each step one side does one thing: the host, a task, a look at the completions, the guest. What
//! must hold after each: the lane did what [`watch::Watch`] allows, and no more than a bounded
//! amount of it; a guest's request has ended in the right result, or in an error where the host has
//! earned one; nobody panics, and nothing is left over once the host has answered.
//!
//! In some episodes the daemon ends time and again, and another one, no better, takes its place.
//!
//! `POSTERN_HOSTILE_STEPS` sets how many steps to do, `POSTERN_HOSTILE_SEED` the first seed,
//! `POSTERN_HOSTILE_THREADS` the threads; `cargo xtask hostile` sets them. A failure prints its seed.

mod canaries;
mod watch;

use alloc::{
    boxed::Box, collections::VecDeque, format, rc::Rc, string::String, sync::Arc, vec, vec::Vec,
};
use core::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Waker},
};
use std::{eprintln, panic, println, sync::Mutex, thread};

use postern_edl::port::Geometry;
use postern_hostile::{Deeds, Host, Memory as Files, Rng, Temper};

use self::watch::{Fickle, Probed, Watch};
use super::{
    CANARY, Canary,
    crash::{key, tiny},
    model::{Model, SECTOR, content},
    nonces, number, words_of,
};
use crate::{
    disk::{Disk, Transfer},
    errno::Errno,
    exec::Executor,
    platform::{Memory, NoEntropy, Platform},
    port::{Doorbell, HostFault, Lane, LaneFile, SharedWords, Sleeper, Switchless, probe},
    volume::{OpenOptions, Volume, VolumeError, format as formats, layout::BLOCK_BYTES},
};

/// Steps of a run that says nothing else.
const STEPS: u64 = 120_000;
/// In one of so many episodes the daemon ends now and then, and another one comes.
const MORTAL: u64 = 7;
/// The file's handle at the host.
const HANDLE: u32 = 7;
const SECTORS: u64 = tiny().capacity * BLOCK_BYTES / SECTOR;
/// Steps in which everything ends once the host answers all that it was asked.
const PATIENCE: u64 = 200_000;

std::thread_local! {
    /// The memory shared with the host, for whatever geometry; mapped for ever, as it must be.
    static REGION: &'static [AtomicU64] = Box::leak(
        (0..(1 << 20) / 8).map(|_| AtomicU64::new(0)).collect(),
    );
    /// A fresh volume.
    static FRESH: Files = fresh();
}

type Played = Arc<Mutex<Host<Files>>>;

/// The host's clock and doorbell. It acts from inside them, too.
struct Bell {
    host: Played,
    region: &'static [AtomicU64],
    state: Arc<Shown>,
}

/// What tasks, the bell and the scene tell each other.
#[derive(Default)]
struct Shown {
    /// The host has done what a guest may see an error of.
    harmed: AtomicBool,
    /// The volume's clock.
    now: AtomicU64,
    /// Drawn numbers for keys and salts.
    random: Mutex<u64>,
    /// The lane, once there is one.
    lane: Mutex<Option<Lane>>,
}

impl Bell {
    /// From inside a call of the enclave the host does whatever it does.
    fn nest(&self) {
        if let Ok(mut host) = self.host.try_lock() {
            host.act(self.region);
            self.state.note(host.deeds());
        }
    }
}

impl Shown {
    fn note(&self, deeds: &Deeds) {
        if !deeds.harmless() {
            self.harmed.store(true, Ordering::Relaxed);
        }
    }

    fn harmed(&self) -> bool {
        self.harmed.load(Ordering::Relaxed)
    }
}

impl Switchless for Bell {
    fn postern_wake(&self, _port: u64) -> Result<(), u32> {
        let lane = self.state.lane.lock().unwrap().clone();
        assert!(lane.is_none_or(|lane| !lane.is_locked()), "a doorbell under the lane's lock");
        self.nest();
        Ok(())
    }

    /// Ends at once, and the host has acted.
    fn postern_sleep(&self, port: u64, _: Sleeper, _: u64) -> Result<(), u32> {
        self.postern_wake(port)
    }
}

impl Doorbell for Bell {
    /// Any number: nothing is decided on it.
    fn now_ns(&self) -> u64 {
        self.nest();
        self.state.now.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Randomness by a seed, and the volume's clock.
struct Drawn(Arc<Shown>);

impl Platform for Drawn {
    fn now_ns(&self) -> u64 {
        self.0.now.load(Ordering::Relaxed)
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut seed = self.0.random.lock().unwrap();
        for byte in out {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            *byte = (*seed >> 33) as u8;
        }
        Ok(())
    }
}

type Raw = Pin<Box<dyn Future<Output = ()>>>;
type Opened = Arc<Mutex<Option<Result<Arc<Volume>, VolumeError>>>>;

/// A lane, its host, and a guest.
struct Scene {
    rng: Rng,
    host: Played,
    region: &'static [AtomicU64],
    state: Arc<Shown>,
    watch: Rc<RefCell<Watch>>,
    lane: Lane,
    disk: LaneFile,
    executor: Executor,
    model: Arc<Mutex<Model>>,
    depth: usize,
    /// Reads of the host file that are dropped on their way at times.
    raw: VecDeque<Raw>,
    sleepers: Vec<Sleeper>,
    steps: u64,
    /// Draws when the daemon ends; none: it never does.
    deaths: Option<Rng>,
}

impl Scene {
    fn new(seed: u64, temper: Temper, files: Files, model: Arc<Mutex<Model>>) -> Self {
        let mut rng = Rng::new(seed);
        let entries = rng.one_of(&[2, 4, 16, 64]);
        let geometry = Geometry::new(entries, rng.one_of(&[128, 192, 512]) << 10).unwrap();
        let region = &REGION.with(|region| *region)[..geometry.region_bytes() / 8];
        let fickle =
            Fickle { words: temper.breaches / 2, buffers: if temper.lies > 0 { 500 } else { 0 } };
        let state = Arc::new(Shown { random: Mutex::new(seed), ..Shown::default() });
        let host = Arc::new(Mutex::new(Host::new(geometry, rng.any(), temper, files)));
        let base = region.as_ptr().cast_mut().cast::<u8>();
        #[allow(unsafe_code)]
        // SAFETY: 1. The region is leaked: mapped for ever. 2. Only 8-byte atomics refer to it.
        let words = unsafe { SharedWords::new(base, region.len() * 8, |_, _| true) }.unwrap();
        let bell = Bell { host: host.clone(), region, state: state.clone() };
        let lane = Lane::new(words, geometry, bell).unwrap();
        *state.lane.lock().unwrap() = Some(lane.clone());
        let watch = Watch::new(geometry, region, HANDLE, rng.any(), fickle);
        let watch = Rc::new(RefCell::new(watch));
        probe::set(Some(Box::new(Probed(watch.clone()))));
        let drawn = Arc::new(Drawn(state.clone()));
        let disk = lane.file(HANDLE, tiny().host_blocks, drawn);
        Self {
            depth: rng.one_of(&[1, 4, 16]),
            rng,
            host,
            region,
            state,
            watch,
            lane,
            disk,
            executor: Executor::new(|| ()),
            model,
            raw: VecDeque::new(),
            sleepers: Vec::new(),
            steps: 0,
            deaths: None,
        }
    }

    fn host_acts(&mut self) -> bool {
        let mut host = self.host.lock().unwrap();
        let answered = host.act(self.region);
        self.state.note(host.deeds());
        answered
    }

    fn poll(&mut self, limit: usize) -> usize {
        self.watch.borrow_mut().begin();
        let taken = self.lane.poll(limit);
        let mut watch = self.watch.borrow_mut();
        watch.end(taken, limit, &self.lane);
        if watch.meddled {
            self.state.harmed.store(true, Ordering::Relaxed);
        }
        taken
    }

    fn run(&mut self, limit: usize) -> usize {
        self.executor.run(limit)
    }

    fn spawn_write(&mut self, volume: &Arc<Volume>) {
        let first = self.rng.below(SECTORS);
        let (first, count) = match self.rng.below(4) {
            0 => (first, 1 + self.rng.below(20)),
            1 => (first / 8 * 8, 8 * (1 + self.rng.below(70))),
            _ => (first / 8 * 8, 8 * (1 + self.rng.below(2))),
        };
        let count = count.min(SECTORS - first);
        let (disk, volume, model) = (self.disk.clone(), volume.clone(), self.model.clone());
        let state = self.state.clone();
        self.executor.spawn(async move {
            let (op, bytes) = model.lock().unwrap().write(first, count);
            let written = volume.write(&disk, first * SECTOR, &Memory::new(bytes)).await;
            state.accept("a write", written.map(|_| ()));
            model.lock().unwrap().end(&op, written.unwrap_or(0) as u64 / SECTOR);
        });
    }

    fn spawn_read(&mut self, volume: &Arc<Volume>) {
        let first = self.rng.below(SECTORS);
        let count = (1 + self.rng.below(60)).min(SECTORS - first);
        let (disk, volume, model) = (self.disk.clone(), volume.clone(), self.model.clone());
        let state = self.state.clone();
        self.executor.spawn(async move {
            let began = model.lock().unwrap().now();
            let buffer = Memory::new(vec![0xdd; (count * SECTOR) as usize]);
            let read = volume.read(&disk, first * SECTOR, &buffer).await;
            state.accept("a read", read.map(|_| ()));
            if let Ok(done) = read {
                let whole = done - done % SECTOR as usize;
                assert!(state.harmed() || whole as u64 == count * SECTOR, "a short read");
                model.lock().unwrap().check_read(began, first, &buffer.into_inner()[..whole]);
            }
        });
    }

    fn spawn_other(&mut self, volume: &Arc<Volume>) {
        let (disk, volume, model) = (self.disk.clone(), volume.clone(), self.model.clone());
        let state = self.state.clone();
        let (first, count) = (self.rng.below(SECTORS), self.rng.below(100));
        let count = count.min(SECTORS - first);
        if self.rng.below(3) == 0 {
            self.executor.spawn(async move {
                let op = model.lock().unwrap().zero(first, count);
                let done = volume.punch(&disk, first * SECTOR, count * SECTOR).await;
                state.accept("a punch", done);
                model.lock().unwrap().end(&op, if done.is_ok() { count } else { 0 });
            });
        } else {
            self.executor.spawn(async move {
                let (at, sizes) = model.lock().unwrap().sync_point();
                let synced = volume.sync(&disk).await;
                state.accept("a sync", synced);
                if synced.is_ok() {
                    model.lock().unwrap().synced(at, sizes);
                }
            });
        }
    }

    fn spawn_chore(&self, volume: &Arc<Volume>) {
        let now = self.state.now.fetch_add(40_000_000, Ordering::Relaxed);
        if let Some(chore) = volume.due(now) {
            let (disk, volume, state) = (self.disk.clone(), volume.clone(), self.state.clone());
            self.executor.spawn(async move {
                state.accept("a chore", volume.run_chore(&disk, chore).await);
            });
        }
    }

    /// A read of the host file by nobody who waits for it long.
    fn raw_read(&mut self) {
        if self.raw.len() > 3 {
            self.raw.pop_front();
            return;
        }
        let (disk, place) = (self.disk.clone(), self.rng.below(tiny().host_blocks - 32));
        let blocks = 1 + self.rng.index(8);
        let mut read: Raw = Box::pin(async move {
            if let Ok(mut transfer) = disk.transfer(blocks).await {
                let _ = transfer.read(place).await;
            }
        });
        if read.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.raw.push_back(read);
        }
    }

    /// A thread goes to sleep and wakes; what the lane says of it is right.
    fn sleep(&mut self) {
        match self.sleepers.pop() {
            Some(sleeper) if self.rng.below(2) == 0 => self.lane.cancel_sleep(sleeper),
            popped => {
                self.sleepers.extend(popped);
                if self.sleepers.len() < 4 {
                    let sleeper = self.rng.one_of(&[Sleeper::Driver, Sleeper::Service]);
                    let _ = self.lane.prepare_sleep(sleeper);
                    self.sleepers.push(sleeper);
                }
            }
        }
    }

    /// The daemon ends and another one comes, with all sides at work in between.
    fn succeed(&mut self) {
        self.lane.withhold();
        self.watch.borrow_mut().withhold();
        // At times there is much that it has not answered.
        if self.rng.below(2) == 0 {
            self.pass_time();
        }
        self.watch.borrow_mut().begin_renewal();
        self.lane.renew();
        self.watch.borrow_mut().end_renewal();
        {
            let mut host = self.host.lock().unwrap();
            host.succeed(self.region);
            host.haunt(self.region);
            self.state.note(host.deeds());
        }
        self.pass_time();
        if self.lane.fault().is_some() {
            return;
        }
        // Where writes go through the host's page cache: an error of that host's.
        let refused = self.state.harmed() && self.rng.below(4) == 0;
        self.lane.release(|_| refused);
        self.watch.borrow_mut().release(refused);
    }

    fn pass_time(&mut self) {
        for _ in 0..self.rng.below(30) {
            self.steps += 1;
            match self.rng.below(4) {
                0 => drop(self.host_acts()),
                1 => drop(self.poll(8)),
                2 => self.sleep(),
                _ => drop(self.run(2)),
            }
        }
    }

    fn step(&mut self, volume: Option<&Arc<Volume>>) {
        self.steps += 1;
        let ends = self.deaths.as_mut().is_some_and(|deaths| deaths.chance(40));
        if ends && self.lane.fault().is_none() {
            self.succeed();
        }
        match self.rng.below(100) {
            0..45 => {
                self.host_acts();
            }
            45..60 => {
                let limit = self.rng.one_of(&[1, 1, 2, 8, 17, usize::MAX]);
                self.poll(limit);
            }
            60..80 => {
                let limit = 1 + self.rng.index(4);
                if self.rng.below(4) == 0 {
                    let lane = self.lane.clone();
                    let _plug = lane.plug();
                    self.run(limit);
                } else {
                    self.run(limit);
                }
            }
            80..83 => self.raw_read(),
            83..84 => self.sleep(),
            _ => {
                let Some(volume) = volume else { return };
                if self.executor.live() >= self.depth {
                    return;
                }
                match self.rng.below(100) {
                    0..35 => self.spawn_read(volume),
                    35..80 => self.spawn_write(volume),
                    80..95 => self.spawn_other(volume),
                    _ => self.spawn_chore(volume),
                }
            }
        }
    }

    /// Everything that was asked is answered: all tasks come to their end.
    fn drain(&mut self) {
        self.host.lock().unwrap().set_temper(Temper::HONEST);
        self.watch.borrow_mut().settle();
        self.raw.clear();
        for idle in 0..PATIENCE {
            self.steps += 1;
            let moved = self.run(8) + self.poll(usize::MAX) + usize::from(self.host_acts());
            if self.executor.live() == 0 {
                return;
            }
            // A silence may still last.
            if moved == 0 && idle > 2000 && self.host.lock().unwrap().waiting() == 0 {
                break;
            }
        }
        // Answers that the host wrote over before they were taken never come. It is as if it said
        // no more: the guest goes on when the daemon is given up.
        assert!(self.state.harmed(), "{} tasks wait for ever", self.executor.live());
        self.give_up();
    }

    fn give_up(&mut self) {
        self.watch.borrow_mut().gone = true;
        self.lane.poison(HostFault::DaemonGone);
        for _ in 0..PATIENCE {
            if self.executor.live() == 0 {
                return;
            }
            assert!(self.run(64) > 0, "{} tasks of a poisoned lane wait", self.executor.live());
        }
        panic!("tasks of a poisoned lane go on for ever");
    }

    /// Opens the volume. `None` if that failed, which the host has earned.
    fn open(&mut self) -> Option<Arc<Volume>> {
        let (disk, opened) = (self.disk.clone(), Opened::default());
        let answer = opened.clone();
        self.executor.spawn(async move {
            let volume = Volume::open(&disk, &key(), &OpenOptions::default()).await;
            *answer.lock().unwrap() = Some(volume.map(|(volume, _)| Arc::new(volume)));
        });
        for _ in 0..PATIENCE {
            self.step(None);
            if let Some(result) = opened.lock().unwrap().take() {
                assert!(self.state.harmed() || result.is_ok(), "{:?}", result.err());
                return result.ok();
            }
        }
        self.drain();
        let result = opened.lock().unwrap().take().unwrap();
        assert!(self.state.harmed() || result.is_ok(), "{:?}", result.err());
        result.ok()
    }

    /// Reads everything: what may be read as that, or an error that the host has earned.
    fn read_all(&mut self, volume: &Arc<Volume>) {
        for first in (0..SECTORS).step_by(8) {
            let (disk, volume, model) = (self.disk.clone(), volume.clone(), self.model.clone());
            let state = self.state.clone();
            self.executor.spawn(async move {
                let began = model.lock().unwrap().now();
                let buffer = Memory::new(vec![0xdd; BLOCK_BYTES as usize]);
                let read = volume.read(&disk, first * SECTOR, &buffer).await;
                state.accept("a last read", read.map(|_| ()));
                if let Ok(done) = read {
                    model.lock().unwrap().check_read(began, first, &buffer.into_inner()[..done]);
                }
            });
        }
        self.drain();
    }
}

impl Shown {
    /// A guest's request has ended: well, or in an error that the host has earned.
    fn accept(&self, what: &str, end: Result<(), Errno>) {
        if let Err(errno) = end {
            assert!(self.harmed(), "{what} fails with {errno:?} and the host did no wrong");
            assert!(matches!(errno, Errno::EIO | Errno::ENOSPC), "{what} ends with {errno:?}");
        }
    }
}

/// A freshly formatted volume.
fn fresh() -> Files {
    let model = Arc::new(Mutex::new(Model::new(SECTORS)));
    let mut scene = Scene::new(1, Temper::HONEST, Files::default(), model);
    let disk = scene.disk.clone();
    scene.executor.spawn(async move {
        let size = tiny().capacity * BLOCK_BYTES;
        formats::format(&disk, &key(), tiny(), size).await.unwrap();
    });
    scene.drain();
    end(scene)
}

/// Takes the scene down; the host's files.
fn end(mut scene: Scene) -> Files {
    scene.give_up();
    probe::set(None);
    *scene.state.lane.lock().unwrap() = None;
    let host = scene.host.clone();
    drop(scene);
    let mut host = host.lock().unwrap();
    core::mem::take(host.store())
}

/// What one seed does: works on a volume, then opens what the host has made of it. The steps.
fn episode(seed: u64) -> u64 {
    nonces::reset();
    let files = FRESH.with(Clone::clone);
    nonces::reset();
    let mut rng = Rng::new(seed ^ 0x0051_ab1e);
    let temper = Temper::drawn(&mut rng);
    let model = Arc::new(Mutex::new(Model::new(SECTORS)));
    let mut scene = Scene::new(rng.any(), temper, files, model.clone());
    scene.deaths = (seed % MORTAL == MORTAL - 1).then(|| Rng::new(seed ^ 0x0dea_d0de));
    let length = 200 + rng.below(4000);
    if let Some(volume) = scene.open() {
        while scene.steps < length && !scene.watch.borrow().is_broken() {
            scene.step(Some(&volume));
        }
        scene.drain();
        scene.read_all(&volume);
        if !scene.state.harmed() {
            scene.spawn_other(&volume);
            scene.drain();
        }
    }
    let harmed = scene.state.harmed();
    let steps = scene.steps;
    let files = end(scene);
    steps + reopen(rng.any(), files, &model, harmed)
}

/// Opens what a host has kept. Of an honest one nothing is lost that was synced; any other may show
/// older states, but nothing that was never written there.
fn reopen(seed: u64, files: Files, model: &Arc<Mutex<Model>>, harmed: bool) -> u64 {
    let mut scene = Scene::new(seed, Temper::HONEST, files, model.clone());
    if harmed {
        scene.state.harmed.store(true, Ordering::Relaxed);
    }
    let Some(volume) = scene.open() else {
        let steps = scene.steps;
        end(scene);
        return steps;
    };
    for first in (0..SECTORS).step_by(8) {
        let (disk, volume, state) = (scene.disk.clone(), volume.clone(), scene.state.clone());
        scene.executor.spawn(async move {
            let buffer = Memory::new(vec![0xdd; BLOCK_BYTES as usize]);
            let read = volume.read(&disk, first * SECTOR, &buffer).await;
            state.accept("a read of a volume opened again", read.map(|_| ()));
            let Ok(done) = read else { return };
            let bytes = buffer.into_inner();
            for (index, sector) in (first..).zip(bytes[..done].chunks_exact(SECTOR as usize)) {
                let mut id = [0; 4];
                id.copy_from_slice(&sector[..4]);
                let written = sector == content(u32::from_le_bytes(id), index);
                assert!(written, "sector {index} reads as bytes nobody wrote");
            }
        });
    }
    scene.drain();
    if !harmed {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (disk, volume, all) = (scene.disk.clone(), volume.clone(), bytes.clone());
        let size = volume.size();
        scene.executor.spawn(async move {
            let buffer = Memory::new(vec![0xdd; (SECTORS * SECTOR) as usize]);
            let done = volume.read(&disk, 0, &buffer).await.unwrap();
            all.lock().unwrap().extend_from_slice(&buffer.into_inner()[..done]);
        });
        scene.drain();
        model.lock().unwrap().check_crash(size, &bytes.lock().unwrap());
    }
    let steps = scene.steps;
    end(scene);
    steps
}

/// Runs one seed with `canary` left out: its steps, or the panic's message.
fn check(seed: u64, canary: Canary) -> Result<u64, String> {
    // Made before anything is left out.
    FRESH.with(|_| ());
    CANARY.set(canary);
    let result = panic::catch_unwind(|| episode(seed));
    CANARY.set(Canary::None);
    probe::set(None);
    result.map_err(words_of)
}

#[test]
fn no_hostile_host_causes_a_wrong_byte_a_panic_or_endless_work() {
    let steps = number("POSTERN_HOSTILE_STEPS").unwrap_or(STEPS);
    let first = number("POSTERN_HOSTILE_SEED").unwrap_or(1);
    let threads = number("POSTERN_HOSTILE_THREADS").unwrap_or(1).max(1);
    let work = |thread: u64| {
        let (mut done, mut seed) = (0, first + thread);
        while done < steps / threads {
            match check(seed, Canary::None) {
                Ok(steps) => done += steps,
                Err(why) => {
                    let replay = format!("POSTERN_HOSTILE_SEED={seed} POSTERN_HOSTILE_STEPS=1");
                    eprintln!("seed {seed}: {why}; again: {replay}");
                    panic!("seed {seed}: {why}");
                }
            }
            seed += threads;
        }
        (done, (seed - first).div_ceil(threads))
    };
    let totals: Vec<(u64, u64)> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (steps, episodes) = totals.iter().fold((0, 0), |sum, n| (sum.0 + n.0, sum.1 + n.1));
    println!("{steps} steps in {episodes} episodes, seeds from {first}");
}
