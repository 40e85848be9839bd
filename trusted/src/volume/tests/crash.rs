//! Random work, crashes at any point (also inside recovery), and what must hold after each.

mod counted;
mod seeds;
mod snapshots;

use alloc::{collections::BTreeMap, string::String, sync::Arc, vec, vec::Vec};
use std::sync::Mutex;

use super::{
    Canary, audit,
    disk::{Faults, Image, Rng, SimDisk},
    model::{Model, SECTOR},
    nonces,
    recorded::SimIndex,
    run::Runner,
};
use crate::{
    counter::{Moves, Record},
    errno::Errno,
    platform::Memory,
    volume::{
        Chore, OpenOptions, OpenReport, SlotKey, Volume, VolumeError,
        core::Health,
        format,
        layout::{BLOCK_BYTES, Geometry},
    },
};

pub(super) use crate::volume::fuzz::tiny;
pub(super) use seeds::{check, crash_images, crash_images_with_snapshots};

const BLOCKS: u64 = tiny().capacity;
const PER_BLOCK: u64 = BLOCK_BYTES / SECTOR;

/// As [`tiny`], with the room that snapshots need.
pub(super) fn roomy() -> Geometry {
    Geometry { host_blocks: tiny().host_blocks + 4 * BLOCKS, ..tiny() }
}

pub(super) fn key() -> SlotKey {
    SlotKey::new([42; 32])
}

/// A freshly formatted host file.
pub(super) fn formatted(seed: u64, geometry: Geometry) -> Image {
    let mut runner = Runner::new(SimDisk::new(seed, geometry.host_blocks, Image::new()));
    let disk = runner.disk.clone();
    let made = runner.block_on(async move {
        format::format(&disk, &key(), geometry, geometry.capacity * BLOCK_BYTES).await
    });
    assert_eq!(made, Ok(()));
    runner.disk.image()
}

pub(super) async fn open(
    disk: SimDisk,
    options: OpenOptions,
) -> Result<(Arc<Volume>, OpenReport), VolumeError> {
    Volume::open(&disk, &key(), &options).await.map(|(volume, report)| (Arc::new(volume), report))
}

/// Reads the whole file.
pub(super) async fn read_all(disk: SimDisk, volume: Arc<Volume>) -> Result<Vec<u8>, Errno> {
    let mut out = Vec::new();
    let size = volume.size();
    while (out.len() as u64) < size {
        let buffer =
            Memory::new(vec![0xee; (32 * BLOCK_BYTES).min(size - out.len() as u64) as usize]);
        let done = volume.read(&disk, out.len() as u64, &buffer).await?;
        out.extend_from_slice(&buffer.into_inner()[..done]);
    }
    Ok(out)
}

/// Whether every completed write is in a journal block that the host has.
fn is_published(volume: &Volume) -> bool {
    let core = volume.core.lock();
    let journal = &core.journal;
    core.health == Health::Good
        && !journal.sealing
        && journal.pending.is_empty()
        && journal.writing.is_empty()
}

/// What one seed does.
struct Plan {
    depth: usize,
    /// Percent of steps that sync.
    syncs: f64,
    partial: f64,
    resize: f64,
    hot: u64,
    large: f64,
    /// Percent of crashes that are power cuts; the others kill the guest alone.
    power: f64,
    newest: f64,
    /// Percent of steps that make or delete a snapshot.
    snapshots: f64,
    /// No checkpoint is made before a writer needs one.
    lazy: bool,
    faults: Faults,
}

struct Sim {
    rng: Rng,
    plan: Plan,
    runner: Runner,
    model: Arc<Mutex<Model>>,
    host_blocks: u64,
    /// What each crash left on the host.
    left: Vec<Image>,
    /// With a monotonic counter: how often it moves, and how often it gives no answer.
    moves: Option<(Moves, f64)>,
    /// What the host has kept of the file, and the records that its superblock may name.
    aside: Vec<(Image, [Option<Record>; 2])>,
    /// What the host has kept of earlier openings, and what the counter held then.
    kept: Vec<(Image, Option<Record>)>,
    /// Snapshots by name: what they hold, and whether they are certainly there.
    snapshots: BTreeMap<String, (Vec<u8>, bool)>,
    /// Freed places are given back to the host.
    discards: bool,
    made: u32,
    /// A change of the snapshots was cut short: only a crash can follow.
    cut_short: bool,
    /// The file was closed, and nobody has died since.
    put_away: bool,
}

impl Sim {
    fn new(seed: u64, canary: Canary) -> Self {
        Self::on(seed, canary, tiny())
    }

    fn on(seed: u64, canary: Canary, geometry: Geometry) -> Self {
        nonces::reset();
        let mut rng = Rng(seed ^ 0x5eed);
        let faulty = rng.chance(35.0);
        let fault = |rng: &mut Rng| if faulty && rng.chance(60.0) { 1.5 } else { 0.0 };
        let plan = Plan {
            depth: [1, 1, 2, 4, 8][rng.below(5) as usize],
            syncs: [2.0, 15.0, 45.0][rng.below(3) as usize],
            partial: [0.0, 20.0][rng.below(2) as usize],
            resize: [0.0, 0.0, 4.0][rng.below(3) as usize],
            hot: [4, 12, BLOCKS][rng.below(3) as usize],
            large: [0.0, 10.0][rng.below(2) as usize],
            power: 70.0,
            newest: [0.0, 0.0, 70.0][rng.below(3) as usize],
            snapshots: 0.0,
            lazy: canary == Canary::None && seed % 7 == 3,
            faults: Faults {
                write: fault(&mut rng),
                read: if faulty && rng.chance(20.0) { 0.5 } else { 0.0 },
                flush: if faulty && rng.chance(20.0) { 1.0 } else { 0.0 },
            },
        };
        let plan = match canary {
            // Needs an eager write that fails twice.
            Canary::NoVoid => Plan {
                depth: 2,
                syncs: 45.0,
                faults: Faults { write: 12.0, ..Faults::default() },
                ..plan
            },
            // Needs writes of parts of one block at once.
            Canary::SharedPartial => Plan { depth: 8, partial: 70.0, hot: 4, resize: 0.0, ..plan },
            // Needs an eager write on its way during a whole checkpoint, and a death soon after.
            Canary::NoCarryWait => {
                Plan { depth: 3, syncs: 45.0, power: 0.0, newest: 90.0, large: 0.0, ..plan }
            }
            // Needs the ring to come around before a checkpoint.
            Canary::EarlyRing => Plan { syncs: 45.0, large: 0.0, hot: 4, lazy: true, ..plan },
            // Needs nodes that are read again after their places were reused.
            Canary::CacheByPlace => Plan { depth: 8, hot: BLOCKS, ..plan },
            // Needs a guest that dies with much on its way.
            Canary::LateWrites => Plan { depth: 8, syncs: 45.0, power: 10.0, newest: 70.0, ..plan },
            // Needs a write on its way during a whole checkpoint.
            Canary::InFlightSettled => Plan { depth: 8, newest: 90.0, ..plan },
            Canary::FlushAgain => {
                Plan { syncs: 45.0, faults: Faults { flush: 5.0, ..Faults::default() }, ..plan }
            }
            _ => plan,
        };
        let image = formatted(seed, geometry);
        let disk = SimDisk::new(seed.wrapping_mul(77), geometry.host_blocks, image);
        let model = Arc::new(Mutex::new(Model::new(BLOCKS * PER_BLOCK)));
        let moves = match canary {
            Canary::None if seed.is_multiple_of(2) => {
                let moves = [Moves::Open, Moves::Checkpoint, Moves::Sync][seed as usize / 2 % 3];
                Some((moves, [0.0, 5.0, 40.0][seed as usize / 6 % 3]))
            }
            Canary::NoAttempted => Some((Moves::Checkpoint, 40.0)),
            Canary::NoFence => Some((Moves::Sync, 30.0)),
            _ => None,
        };
        let in_directory = match canary {
            Canary::None => seed % 4 == 1,
            _ => canary == Canary::NoDurable,
        };
        let mut sim = Self {
            rng,
            plan,
            runner: Runner::new(disk),
            model,
            host_blocks: geometry.host_blocks,
            left: Vec::new(),
            moves,
            aside: Vec::new(),
            kept: Vec::new(),
            snapshots: BTreeMap::new(),
            discards: match canary {
                Canary::None => seed % 3 == 1,
                canary => matches!(canary, Canary::EarlyDiscard | Canary::DiscardUnheld),
            },
            made: 0,
            cut_short: false,
            put_away: false,
        };
        sim.runner.index = in_directory.then(|| match canary {
            Canary::None if seed % 8 == 5 => SimIndex::of_syncs(),
            _ => SimIndex::default(),
        });
        if moves.is_some() {
            sim.bind(seed);
        }
        sim
    }

    fn disk(&self) -> SimDisk {
        self.runner.disk.clone()
    }

    fn crash(&mut self) {
        self.put_away = false;
        self.runner.kill();
        let power = self.rng.chance(self.plan.power);
        if power {
            self.runner.disk.power_cut();
        } else {
            self.runner.disk.guest_kill();
        }
        if power || self.plan.faults.flush > 0.0 {
            self.model.lock().unwrap().power_lost();
        }
        if let Some(index) = &self.runner.index {
            index.crash(&mut self.rng);
        }
        self.left.push(self.runner.disk.image());
        self.check_durable_tree();
    }

    /// Whatever a recovery decides about the journal, the tree below it is whole.
    fn check_durable_tree(&self) {
        let disk = SimDisk::new(7, self.host_blocks, self.runner.disk.image());
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let mut runner = Runner::new(disk.clone());
        let (volume, _) = runner.block_on(open(disk.clone(), options)).expect("it can be read");
        let whole = runner.block_on(audit::durable_tree(disk, volume));
        whole.expect("the durable tree is whole after a crash");
    }

    /// Opens, at times crashing inside; checks that the file is one it may be.
    fn reopen(&mut self) -> Arc<Volume> {
        self.set_faults(false);
        loop {
            let limit = if self.rng.chance(30.0) { self.rng.below(160) } else { u64::MAX };
            let opened = self.runner.finish(open(self.disk(), self.options(false)), limit);
            match opened {
                Some(Ok((volume, _))) => {
                    self.put_away = false;
                    let task = read_all(self.disk(), volume.clone());
                    let bytes = self.runner.block_on(task);
                    let bytes = bytes.expect("everything reads after a recovery");
                    self.model.lock().unwrap().check_crash(volume.size(), &bytes);
                    if self.plan.snapshots > 0.0 {
                        self.check_snapshots(&volume);
                    }
                    if let Some(index) = self.runner.index.clone()
                        && self.is_recorded(&index, &volume)
                    {
                        self.aside.push((self.runner.disk.image(), index.pair()));
                    }
                    if self.moves.is_some() {
                        self.kept.push((self.runner.disk.image(), self.held()));
                    }
                    return volume;
                }
                // A move of the session before has just been served.
                Some(Err(VolumeError::CounterLost)) => {}
                Some(Err(error)) => panic!("the volume does not open after a crash: {error:?}"),
                None => self.crash(),
            }
        }
    }

    fn spawn_write(&mut self, volume: &Arc<Volume>) {
        let size = self.model.lock().unwrap().size() / SECTOR;
        let (first, count) = if self.rng.chance(self.plan.partial) {
            let first = self.rng.below(self.plan.hot * PER_BLOCK);
            (first, 1 + self.rng.below(20))
        } else if self.rng.chance(self.plan.large) {
            (self.rng.below(60) * PER_BLOCK, (1 + self.rng.below(70)) * PER_BLOCK)
        } else {
            (self.rng.below(self.plan.hot) * PER_BLOCK, (1 + self.rng.below(3)) * PER_BLOCK)
        };
        let count = count.min(size.saturating_sub(first));
        if count == 0 {
            return;
        }
        let faulty = self.plan.faults.write > 0.0
            || self.plan.faults.read > 0.0
            || self.plan.faults.flush > 0.0;
        let (disk, volume, model) = (self.disk(), volume.clone(), self.model.clone());
        self.runner.spawn(async move {
            let (op, bytes) = model.lock().unwrap().write(first, count);
            volume.touch(1 + first.cast_signed());
            let written = volume.write(&disk, first * SECTOR, &Memory::new(bytes)).await;
            assert!(faulty || written.is_ok(), "a write fails on a good disk: {written:?}");
            let mut model = model.lock().unwrap();
            model.end(&op, written.unwrap_or(0) as u64 / SECTOR);
            if is_published(&volume) {
                model.published();
            }
        });
    }

    fn spawn_read(&mut self, volume: &Arc<Volume>) {
        let size = self.model.lock().unwrap().size() / SECTOR;
        let first = self.rng.below(self.plan.hot * PER_BLOCK);
        let count = (1 + self.rng.below(60)).min(size.saturating_sub(first));
        if count == 0 {
            return;
        }
        let faulty = self.plan.faults.read > 0.0;
        let (disk, volume, model) = (self.disk(), volume.clone(), self.model.clone());
        self.runner.spawn(async move {
            let began = model.lock().unwrap().now();
            let buffer = Memory::new(vec![0xdd; (count * SECTOR) as usize]);
            let read = volume.read(&disk, first * SECTOR, &buffer).await;
            assert!(faulty || read.is_ok(), "a read fails on a good disk: {read:?}");
            if let Ok(done) = read {
                assert!(faulty || done as u64 == count * SECTOR, "a short read: {done}");
                let whole = done - done % SECTOR as usize;
                model.lock().unwrap().check_read(began, first, &buffer.into_inner()[..whole]);
            }
        });
    }

    fn spawn_sync(&mut self, volume: &Arc<Volume>) {
        let (disk, volume, model) = (self.disk(), volume.clone(), self.model.clone());
        let faulty = self.syncs_may_fail();
        self.runner.spawn(async move {
            let (at, sizes) = model.lock().unwrap().sync_point();
            let synced = volume.sync(&disk).await;
            assert!(faulty || synced.is_ok(), "a sync fails on a good disk: {synced:?}");
            if synced.is_ok() {
                model.lock().unwrap().synced(at, sizes);
            }
        });
    }

    /// Truncate, punch and append run alone.
    fn spawn_resize(&mut self, volume: &Arc<Volume>) {
        self.runner.drain();
        let all = self.model.lock().unwrap().sectors();
        let size = self.model.lock().unwrap().size() / SECTOR;
        let (disk, volume, model) = (self.disk(), volume.clone(), self.model.clone());
        match self.rng.below(3) {
            0 => {
                let to = self.rng.below(all + 1);
                self.runner.spawn(async move {
                    let op = {
                        let mut model = model.lock().unwrap();
                        model.resizing(to * SECTOR);
                        model.zero(to.min(size), size.saturating_sub(to))
                    };
                    let done = volume.truncate(&disk, to * SECTOR).await;
                    let mut model = model.lock().unwrap();
                    model.end(&op, if done.is_ok() { op.count } else { 0 });
                    if done.is_ok() {
                        model.resized(to * SECTOR);
                    }
                });
            }
            1 => {
                let first = self.rng.below(size.max(1));
                let count = self.rng.below(100).min(size - first.min(size));
                self.runner.spawn(async move {
                    let op = model.lock().unwrap().zero(first, count);
                    let done = volume.punch(&disk, first * SECTOR, count * SECTOR).await;
                    model.lock().unwrap().end(&op, if done.is_ok() { count } else { 0 });
                });
            }
            _ => {
                let count = (1 + self.rng.below(30)).min(all - size);
                if count == 0 {
                    return;
                }
                self.runner.spawn(async move {
                    let (op, bytes) = {
                        let mut model = model.lock().unwrap();
                        let base = size;
                        (0..=count).for_each(|n| model.resizing((base + n) * SECTOR));
                        model.write(size, count)
                    };
                    let done = volume.append(&disk, &Memory::new(bytes)).await;
                    let mut model = model.lock().unwrap();
                    let done = done.unwrap_or(0) as u64 / SECTOR;
                    model.end(&op, done);
                    if done > 0 {
                        model.resized((size + done) * SECTOR);
                    }
                });
            }
        }
        self.runner.drain();
    }

    fn live(&mut self, volume: &Arc<Volume>) {
        if self.discards {
            volume.discard_at_once();
        }
        self.set_faults(true);
        self.runner.disk.state().newest = self.plan.newest;
        for _ in 0..5 + self.rng.below(250) {
            if self.rng.chance(3.0) {
                self.runner.disk.state().now += 40_000_000;
            }
            if self.rng.chance(0.5) {
                self.runner.disk.state().now += 31_000_000_000;
            }
            if let Some(index) = self.runner.index.as_ref().filter(|_| self.rng.chance(10.0)) {
                index.step();
            }
            let now = self.runner.disk.state().now;
            let due = volume.due(now);
            if due == Some(Chore::Checkpoint) && self.plan.lazy {
                volume.decline(Chore::Checkpoint);
            } else if let Some(chore) = due {
                let (disk, volume) = (self.disk(), volume.clone());
                // A record that cannot change now does so later.
                let waits = chore == Chore::Register && self.runner.index.is_some();
                let faulty = waits || self.syncs_may_fail() || self.plan.faults.read > 0.0;
                self.runner.spawn(async move {
                    let done = volume.run_chore(&disk, chore).await;
                    assert!(faulty || done.is_ok(), "{chore:?} fails on a good disk: {done:?}");
                });
            }
            if self.plan.snapshots > 0.0 && self.rng.chance(self.plan.snapshots) {
                self.change_snapshots(volume);
                if self.cut_short {
                    return;
                }
            } else if self.rng.chance(self.plan.resize) {
                if self.plan.faults.write == 0.0 && self.plan.faults.flush == 0.0 {
                    self.spawn_resize(volume);
                }
            } else if self.runner.live() < self.plan.depth {
                if self.rng.chance(self.plan.syncs) {
                    self.spawn_sync(volume);
                } else if self.rng.chance(25.0) {
                    self.spawn_read(volume);
                } else {
                    self.spawn_write(volume);
                }
            }
            for _ in 0..self.rng.below(12) {
                self.runner.step();
            }
        }
    }

    fn run(&mut self) {
        for _ in 0..1 + self.rng.below(4) {
            let volume = self.reopen();
            self.live(&volume);
            if !core::mem::take(&mut self.cut_short) && self.rng.chance(20.0) {
                self.set_faults(false);
                self.runner.drain();
                self.close_cleanly(&volume);
            } else {
                self.crash();
            }
        }
        let volume = self.reopen();
        self.close_cleanly(&volume);
        self.try_old_states();
        self.try_unrecorded_states();
    }

    fn close_cleanly(&mut self, volume: &Arc<Volume>) {
        let (disk, volume) = (self.disk(), volume.clone());
        // After a superblock write of unknown outcome only the next opening can go on.
        let failed = volume.read_only() || volume.core.lock().checkpoints.wedged;
        let closed = self.runner.block_on(async move { volume.close(&disk).await });
        assert!(failed || closed.is_ok(), "closing fails on a good disk: {closed:?}");
        if closed.is_ok() && !failed {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let opened = self.runner.block_on(open(self.disk(), options));
            let (volume, report) = opened.expect("a closed volume opens");
            assert!(report.clean, "a closed volume is clean: {report:?}");
            let (disk, checked) = (self.disk(), volume.clone());
            let space = self.runner.block_on(async move { checked.verify_space(&disk).await });
            assert!(space.is_exact(), "verify finds the space map not exact: {space:?}");
            let audited = self.runner.block_on(audit::audit(self.disk(), volume));
            audited.expect("the space map names what the tree reaches, once");
        }
        if failed {
            // The next process finds what is on the medium, not what a cache still shows.
            self.runner.disk.guest_kill();
            self.model.lock().unwrap().power_lost();
        }
        // It was synced by closing; the next opening checks that.
        let mut model = self.model.lock().unwrap();
        if closed.is_ok() && !failed {
            let (at, sizes) = model.sync_point();
            model.synced(at, sizes);
        }
        self.put_away = closed.is_ok() && !failed;
    }
}
