//! What the preload library builds on: protected paths, open volumes, AIO contexts, exit.

use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use postern_trusted::{errno::Errno, platform::Buffer, port::LaneFile};

pub use crate::family::OpenVolume;
use crate::{
    family::{family, standing::Held},
    files, host, identity, inheritance,
    inside::gate,
    mapped::areas,
    process, service, sys, wait,
};

/// Whether `postern run` started this program: otherwise every symbol just passes on.
#[must_use]
pub fn active() -> bool {
    family().is_some()
}

/// The volume behind an absolute, normalised path.
#[must_use]
pub fn volume_of(path: &[u8]) -> Option<usize> {
    family()?.volume_of(path)
}

/// Opens volume `index` for one more open file; the first of the family attaches to the daemon,
/// unlocks and recovers. Every success is followed by one [`close_volume`].
///
/// # Errors
/// `EBUSY`: another program has it. `EIO`, with a message on stderr: anything else.
pub fn open_volume(index: usize) -> Result<Arc<OpenVolume>, Errno> {
    let family = family().ok_or(Errno::ENOENT)?;
    family.acquire(index)
}

/// Gives back one [`open_volume`]. The last one of the family starts the volume's clean closing;
/// [`settle`] waits for it.
pub fn close_volume(volume: &OpenVolume) {
    let Some(family) = family() else { return };
    let index = volume.index;
    if family.release(volume) {
        process::current().executor.spawn(async move { family.close(index).await });
    }
}

/// Runs what [`close_volume`] started to its end, so that close(2) returns with the volume closed.
pub fn settle(index: usize) {
    if let Some(family) = family() {
        process::current().block_on(family.close(index));
        // Another thread may have begun to close it.
        family.wait_for_rest(index);
    }
}

impl OpenVolume {
    /// Reads at `offset`; waits for it.
    ///
    /// # Errors
    /// `EIO` for damage or a broken host; `EFAULT` for the buffer.
    pub fn read(&self, offset: u64, buffer: &impl Buffer) -> Result<usize, Errno> {
        self.run(async |held, disk| self.load((held, disk), offset, buffer).await)
    }

    /// fsync(2).
    ///
    /// # Errors
    /// `EIO` if it cannot be made durable.
    pub fn sync(&self) -> Result<(), Errno> {
        let held = self.hold()?;
        let disk = held.disk_for_guest(wait::now_ns())?;
        process::current().block_on(self.make_durable(&held, &disk))
    }

    /// ftruncate(2).
    ///
    /// # Errors
    /// `EFBIG` beyond the capacity, `EIO`.
    pub fn truncate(&self, size: u64) -> Result<(), Errno> {
        self.unwritten.remove(size, u64::MAX);
        self.change(async |held, disk| self.cut((held, disk), size).await)
    }

    /// Makes a range read as zeros; the size stays.
    ///
    /// # Errors
    /// `EIO`, `ENOSPC`.
    pub fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.unwritten.remove(offset, length);
        let end = offset.saturating_add(length);
        self.change(async |held, disk| self.clear((held, disk), offset..end).await)
    }

    /// Bytes in the guest's file; while another program has the volume, as they were last.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.standing().extent().0
    }

    /// Most bytes it can have.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.standing().extent().1
    }

    /// A change of the guest's file, which moves its times.
    pub(crate) fn change<T>(
        &self,
        job: impl AsyncFnOnce(&Held, &LaneFile) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.run(async |held, disk| {
            self.touch(&held.volume);
            job(held, disk).await
        })
    }

    fn run<T>(
        &self,
        job: impl AsyncFnOnce(&Held, &LaneFile) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let held = self.hold()?;
        let disk = held.disk_for_guest(wait::now_ns())?;
        process::current().block_on(job(&held, &disk))
    }
}

/// What Linux does when a process exits: waits for its AIO, closes its files. Volumes that nobody
/// else of the family uses are closed cleanly. The last that the process does.
pub fn exit_drain() {
    gate::shut();
    // From here on nobody starts background work that would not be finished.
    service::park();
    close_down();
}

/// The same for the service thread, which has shut the gate: the process dies of a signal.
pub fn close_down() {
    inheritance::settle();
    await_others();
    leave();
    strike_out();
}

/// The process is none of the family's any more.
fn strike_out() {
    if let Some(family) = family() {
        family.leave(identity::process_id());
    }
}

/// Waits until the other threads have come out of the shut gate. One that stays inside although
/// nothing is under way cannot be waited for.
fn await_others() {
    const PATIENCE_NS: u64 = 10_000_000_000;
    let mut since = wait::now_ns();
    while !gate::all_are_out() && wait::now_ns() - since < PATIENCE_NS {
        match process::known() {
            Some(process) => {
                process::pause();
                if process.executor.live() > 0 {
                    since = wait::now_ns();
                }
            }
            None => sys::nap(),
        }
    }
}

/// Before exec: as [`exit_drain`], but what the next program inherits stays open. A failure of the
/// exec is followed by [`stay`].
pub fn exec_drain() {
    gate::shut();
    service::park();
    await_others();
    let Some(family) = family() else { return };
    let files = files::inheritable();
    let linked = process::known().is_some_and(|process| process.linked().is_some());
    if !files.is_empty() && linked && family.is_alone() {
        // The next program may not come to take it over: what was written is made durable.
        family.sync_all();
    }
    files::set_executing(true);
    let holds = areas::lend();
    leave();
    inheritance::hand_over(files, holds);
    strike_out();
}

/// After an exec that failed: goes on as before it, with the descriptors that would have survived.
pub fn stay() {
    files::set_executing(false);
    if let Some(family) = family() {
        family.enrol(process::current());
        inheritance::after_failed_exec();
    }
    service::unpark();
    gate::open();
}

fn leave() {
    /// The process that is leaving; a handler that runs meanwhile must not start again.
    static LEAVING: AtomicU32 = AtomicU32::new(0);
    let me = identity::process_id();
    if family().is_none() {
        return;
    }
    if LEAVING.swap(me, Ordering::Relaxed) == me {
        return;
    }
    host::drain();
    files::close_all();
    if let Some(process) = process::known() {
        while process.executor.live() > 0 {
            process::pause();
        }
    }
    LEAVING.store(0, Ordering::Relaxed);
}
