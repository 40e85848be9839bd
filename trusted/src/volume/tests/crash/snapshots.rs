//! Snapshots made and deleted in the middle of the work, each cut short at times.

use alloc::{string::String, sync::Arc, vec::Vec};
use std::format;

use super::{
    super::{Canary, disk::Faults, recorded::SimIndex},
    SECTOR, Sim, key, read_all, roomy,
};
use crate::volume::{OpenOptions, Volume};

impl Sim {
    /// With snapshots, and the room that they need; on a host and with a counter that do not fail.
    pub(super) fn with_snapshots(seed: u64, plan: Canary) -> Self {
        let mut sim = Self::on(seed, plan, roomy());
        sim.plan.snapshots = 4.0;
        sim.plan.faults = Faults::default();
        sim.moves = sim.moves.map(|(moves, _)| (moves, 0.0));
        // An index whose table fails at times would fail syncs.
        sim.runner.index = sim.runner.index.map(|_| SimIndex::default());
        sim
    }

    /// Makes or deletes a snapshot, at times cut short.
    pub(super) fn change_snapshots(&mut self, volume: &Arc<Volume>) {
        self.runner.drain();
        let limit = if self.rng.chance(30.0) { self.rng.below(120) } else { u64::MAX };
        let (disk, volume) = (self.disk(), volume.clone());
        let names: Vec<String> = self.snapshots.keys().cloned().collect();
        let old = names.get(self.rng.below(5) as usize).cloned();
        let Some(name) = old else {
            if names.len() >= 4 {
                return;
            }
            // What the model allows is one content now, and reading checks that it is that.
            let read = read_all(self.disk(), volume.clone());
            let bytes = self.runner.block_on(read).expect("everything reads");
            let began = self.model.lock().unwrap().now();
            let whole = bytes.len() - bytes.len() % SECTOR as usize;
            self.model.lock().unwrap().check_read(began, 0, &bytes[..whole]);
            self.made += 1;
            let name = format!("s{}", self.made);
            self.snapshots.insert(name.clone(), (bytes, false));
            let making = {
                let name = name.clone();
                async move { volume.make_snapshot(&disk, &name, 7).await }
            };
            match self.runner.finish(making, limit) {
                Some(made) => {
                    assert_eq!(made, Ok(()));
                    self.snapshots.entry(name).and_modify(|(_, certain)| *certain = true);
                }
                None => self.cut_short = true,
            }
            return;
        };
        self.snapshots.entry(name.clone()).and_modify(|(_, certain)| *certain = false);
        let deleting = {
            let name = name.clone();
            async move { volume.delete_snapshot(&disk, &name).await }
        };
        match self.runner.finish(deleting, limit) {
            Some(deleted) => {
                assert!(deleted.is_ok(), "{deleted:?}");
                self.snapshots.remove(&name);
            }
            None => self.cut_short = true,
        }
    }

    /// All that must be there is there, nothing else, and each reads as when it was made.
    pub(super) fn check_snapshots(&mut self, volume: &Arc<Volume>) {
        let (disk, volume) = (self.disk(), volume.clone());
        let found = self.runner.block_on(async move { volume.snapshots(&disk).await });
        let found: Vec<String> = found.unwrap().into_iter().map(|found| found.name).collect();
        self.snapshots.retain(|name, (_, certain)| {
            let there = found.contains(name);
            assert!(there || !*certain, "the snapshot {name} is gone");
            *certain = true;
            there
        });
        assert_eq!(found.len(), self.snapshots.len(), "a snapshot that was deleted is back");
        for (name, (bytes, _)) in &self.snapshots {
            let (disk, name) = (self.disk(), name.clone());
            let read = self.runner.block_on(async move {
                let options = OpenOptions { read_only: true, ..OpenOptions::default() };
                let (volume, _) = Volume::open(&disk, &key(), &options).await.unwrap();
                let then = volume.at_snapshot(&disk, &name).await.unwrap();
                read_all(disk, Arc::new(then)).await
            });
            assert!(read.as_ref() == Ok(bytes), "a snapshot reads as something else");
        }
    }
}
