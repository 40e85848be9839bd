//! A monotonic counter beside the work: bound, asked, and held against old states.

use alloc::sync::Arc;

use super::{
    super::{
        counter::{SimCounter, counted},
        disk::Faults,
        recorded::SimIndex,
    },
    Runner, Sim, SimDisk, open,
};
use crate::{
    counter::Record,
    volume::{OpenOptions, Volume, VolumeError},
};

impl Sim {
    /// Binds the new volume to a counter.
    pub(super) fn bind(&mut self, seed: u64) {
        self.runner.counter = Some(SimCounter::new(seed ^ 0xc0));
        let (disk, options) = (self.disk(), self.options(true));
        self.runner.block_on(async move {
            let (volume, _) = open(disk.clone(), options).await.expect("it opens");
            volume.close(&disk).await.expect("it closes");
        });
    }

    pub(super) fn options(&self, adopt: bool) -> OpenOptions {
        match (&self.runner.counter, self.moves, &self.runner.index) {
            (Some(counter), Some((moves, _)), _) => counted(counter, moves, adopt),
            (_, _, Some(index)) => OpenOptions { put_away: self.put_away, ..index.options() },
            _ => OpenOptions::default(),
        }
    }

    pub(super) fn set_faults(&mut self, faults: bool) {
        let plan = if faults { self.plan.faults } else { Faults::default() };
        self.runner.disk.state().faults = plan;
        if let (Some(counter), Some((_, percent))) = (&self.runner.counter, self.moves) {
            counter.set_faults(if faults { percent } else { 0.0 });
        }
    }

    pub(super) fn held(&self) -> Option<Record> {
        self.runner.counter.as_ref().and_then(SimCounter::held)
    }

    /// Whether a sync may fail.
    pub(super) fn syncs_may_fail(&self) -> bool {
        let moves = self.moves.is_some_and(|(_, percent)| percent > 0.0);
        // While nobody knows which records of a directory are durable none changes.
        let recorded = self.runner.index.as_ref().is_some_and(SimIndex::counts_syncs);
        self.plan.faults.flush > 0.0 || self.plan.faults.write > 0.0 || moves || recorded
    }

    /// Where each sync is recorded, a sync that changes nothing may record the state just opened:
    /// it is recorded now. `false`: it cannot be.
    pub(super) fn is_recorded(&mut self, index: &SimIndex, volume: &Arc<Volume>) -> bool {
        let (disk, volume) = (self.disk(), volume.clone());
        !index.counts_syncs()
            || self.runner.block_on(async move { volume.sync(&disk).await }).is_ok()
    }

    /// States of a directory's file that the index has left behind are refused.
    pub(super) fn try_unrecorded_states(&mut self) {
        let Some(index) = self.runner.index.clone() else { return };
        for (n, (image, then)) in core::mem::take(&mut self.aside).into_iter().enumerate() {
            if then.contains(&index.newest()) {
                continue;
            }
            let disk = SimDisk::new(n as u64 * 7919, self.host_blocks, image);
            // Whatever the index believes of it.
            let options = OpenOptions { put_away: n % 2 == 0, ..index.options() };
            let opened = Runner::new(disk.clone()).block_on(open(disk, options));
            let why =
                opened.map(|_| ()).expect_err("an old state of a file is taken for its newest");
            assert!(matches!(why, VolumeError::NotAsRecorded { .. }), "{why}");
        }
    }

    /// States that the counter has left behind are refused.
    pub(super) fn try_old_states(&mut self) {
        let held = self.held();
        for (n, (image, then)) in core::mem::take(&mut self.kept).into_iter().enumerate() {
            if then == held {
                continue;
            }
            let disk = SimDisk::new(n as u64 * 7919, self.host_blocks, image);
            let mut runner = Runner::new(disk.clone());
            runner.counter = self.runner.counter.clone();
            let opened = runner.block_on(open(disk, self.options(false)));
            let why = opened.map(|_| ()).expect_err("an old state is taken for the newest");
            assert!(matches!(why, VolumeError::RolledBack { .. }), "{why}");
        }
    }
}
