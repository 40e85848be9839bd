//! Handing volumes over to other programs, and taking them back.
//!
//! Done by the service threads of the family's processes. A program that holds locks on a volume
//! keeps it: another one's locks cannot be seen from here, so the lease stands for them. So does one
//! that has it mapped, a protected directory, and a run that was told to keep its volumes.
//!
//! Holds: the daemon's word decides when to hand over, never what is in the volume; a lost lease is
//! told to every open file.

use std::sync::Arc;

use postern_edl::LEASE_LOST;
use postern_trusted::volume::Chore;

use super::{Family, OpenVolume, Source, standing::Leave};
use crate::{
    link::Link,
    mapped, message,
    process::{self, Process},
    runtime,
};

/// Most leases that are looked at in one round: as many files as a session can have open.
const MOST: usize = 1024;

/// Why a lease was taken away.
const UNANSWERED: &str = "another program has the volume, because this one did not answer in time";

impl Family {
    /// Answers what the daemon has to say of leases, and brings back what somebody waits for.
    /// Answers whether there was anything.
    pub fn mind_leases(&'static self, process: &'static Process) -> bool {
        let mut busy = self.hear_of_leases(process);
        for volume in self.open_volumes() {
            if volume.standing().come(process.id()) {
                busy = true;
                self.bring_back(&volume);
            }
        }
        busy
    }

    fn hear_of_leases(&'static self, process: &'static Process) -> bool {
        match process.linked() {
            Some(link) if link.has_news_of_leases() => {
                self.answer(process, link);
                true
            }
            _ => false,
        }
    }

    /// Asks the daemon of leases, news or not: what another thread has heard and not yet acted on
    /// is acted on when this returns.
    pub fn ask_of_leases(&'static self, process: &'static Process) {
        if let Some(link) = process.linked() {
            self.answer(process, link);
        }
    }

    fn answer(&'static self, process: &'static Process, link: &Link) {
        let mut first = 0;
        for _ in 0..MOST {
            let Ok(Some(lease)) = link.lease(first) else { return };
            first = u64::from(lease.handle) + 1;
            if lease.state == LEASE_LOST {
                self.has_lost(lease.handle, UNANSWERED);
                link.close(lease.handle);
                continue;
            }
            let found = self.open_volumes().find(|v| v.standing().has_handle(lease.handle));
            match found {
                Some(volume) if self.may_leave(&volume) => {
                    let stays = || volume.is_mapped();
                    match volume.standing().leave(process.id(), stays) {
                        // What is in flight and what is still to be written may take their time;
                        // who keeps a lease meanwhile is asked again.
                        Leave::Begins => {
                            link.keep(lease.handle);
                            self.hand_over(process, volume);
                        }
                        Leave::Closing => link.keep(lease.handle),
                        Leave::OnItsWay if link.lane.in_flight() > 0 => link.keep(lease.handle),
                        Leave::OnItsWay | Leave::NotHere => {}
                    }
                }
                // It is being opened or closed, or stays.
                _ => link.keep(lease.handle),
            }
        }
    }

    /// The host file behind `handle` is no longer the family's: `why` is for the user.
    pub fn has_lost(&self, handle: u32, why: &str) {
        self.host_files.lost(handle);
        match self.open_volumes().find(|volume| volume.standing().has_handle(handle)) {
            Some(volume) => self.lose(&volume, handle, why),
            // Let go of already, or a directory's file that rests.
            None => self.directories.iter().for_each(|directory| directory.lose(handle)),
        }
    }

    fn may_leave(&self, volume: &OpenVolume) -> bool {
        let Some(entry) = self.entry(volume.index) else { return false };
        matches!(&entry.source, Source::Volume(config) if !config.exclusive)
            && !self.locks.has_any(volume.index)
            && !volume.is_mapped()
    }

    fn hand_over(&'static self, process: &'static Process, volume: Arc<OpenVolume>) {
        process.executor.spawn(async move {
            let Some(core) = volume.standing().drained().await else { return };
            let closed = self.write_down(volume.index, &core).await;
            // A lease that is lost meanwhile is told of as such.
            let count = || {
                if closed.is_err() {
                    volume.count_loss();
                }
            };
            if volume.standing().gone_away(core.handle, count)
                && let Err(errno) = closed
            {
                volume.report(&self.guest_path(volume.index), "handing over failed", errno);
            }
        });
    }

    /// The lease was taken away.
    fn lose(&self, volume: &OpenVolume, handle: u32, why: &str) {
        if volume.standing().gone_away(handle, || volume.count_loss()) {
            let path = self.guest_path(volume.index);
            message::say(&format!(
                "{path}: {why}; what was written since the last sync may be lost, and the next \
                 fsync says so (EIO)"
            ));
        }
    }

    fn bring_back(&self, volume: &Arc<OpenVolume>) {
        let Some(entry) = self.entry(volume.index) else {
            return volume.standing().stays_away(true);
        };
        // What is in memory of a directory is no longer about what is on the host.
        if !matches!(entry.source, Source::Volume(_)) {
            return volume.standing().stays_away(true);
        }
        let before = self.incarnation();
        match self.reopen(&entry.source, volume.standing().progress()) {
            Ok(Some(core)) => volume.standing().came(core),
            Ok(None) => volume.standing().stays_away(false),
            // The daemon ended meanwhile: once more.
            Err(_) if self.incarnation() != before => volume.standing().stays_away(false),
            Err(_) => volume.standing().stays_away(true),
        }
    }

    /// Makes durable what is in memory of the volumes that are here.
    pub fn sync_all(&self) {
        for volume in self.open_volumes() {
            let Some(held) = volume.try_hold() else { continue };
            let synced = held
                .disk()
                .and_then(|disk| process::current().block_on(volume.make_durable(&held, &disk)));
            if let Err(errno) = synced {
                volume.report(&self.guest_path(volume.index), "sync before exec failed", errno);
            }
        }
    }
}

impl Process {
    /// Starts background work of the family's volumes that is due; answers whether there was any.
    pub(crate) fn chores(&'static self, family: &'static Family, now_ns: u64) -> bool {
        if self.linked().is_none() {
            return false;
        }
        let mut started = false;
        mapped::sweep(family);
        for directory in &family.directories {
            started |= directory.tend(self, family);
        }
        for volume in family.open_volumes() {
            started |= mapped::tend(self, family, &volume, now_ns);
            let Some(held) = volume.try_hold() else { continue };
            let Some(chore) = held.volume.due(now_ns) else { continue };
            // A volume that is about to be closed needs no chores; during one it must not be.
            if !family.retain(&volume) {
                held.volume.decline(chore);
                continue;
            }
            let Ok(disk) = held.disk() else {
                held.volume.decline(chore);
                runtime::close_volume(&volume);
                continue;
            };
            started = true;
            self.executor.spawn(async move {
                let done = held.volume.run_chore(&disk, chore).await;
                let lost = !volume.standing().has_handle(held.handle);
                drop(held);
                // A counter that does not move has said so itself, and so has a lost lease.
                if chore != Chore::Register
                    && !lost
                    && let Err(errno) = done
                {
                    let path = family.guest_path(volume.index);
                    volume.report(&path, "background write failed", errno);
                }
                runtime::close_volume(&volume);
            });
        }
        started
    }
}
