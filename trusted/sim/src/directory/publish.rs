//! When names reach the host: in batches.
//!
//! A change of names is made in memory and written a moment later, or when somebody asks for
//! durability (fsync of a file or directory), or when the index is closed: so a thousand new files
//! cost a few name tables. What a closed file has not flushed is flushed with the batch; its host
//! file stays open until then.
//!
//! Holds: one publication at a time; a name is written only after the host file it leads to was
//! flushed, so no crash shows a name without its volume; a host file is removed only after the
//! table without its name is durable, so no crash shows a name whose file is gone. What lies in
//! between is a host file without a name, which the next opening removes.

use core::{
    future::poll_fn,
    task::{Poll, Waker},
};
use std::{collections::BTreeMap, sync::Arc};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use postern_trusted::{
    directory::{FileId, host_name, slot_offset},
    disk::{Disk as _, HostError},
    errno::Errno,
    platform::{Buffer as _, Memory},
    port::LaneFile,
    sync::Lock,
};

use super::{Directory, Loaded};
use crate::{
    config::MovesConfig,
    family::{self, Family, OpenVolume, standing::Held},
    identity, message,
    process::{self, Process},
    runtime, wait,
};

/// A changed name waits at most this long, and the service thread's tick, in nanoseconds.
const NAMES_NS: u64 = 25_000_000;
/// Data of closed files waits at most this long for its flush, in nanoseconds.
const FLUSH_NS: u64 = 1_000_000_000;
/// Publications take at most one part in this many of the time.
const SHARE: u64 = 4;
/// Host files kept open for a batch.
const MOST: usize = 192;
/// Host files flushed side by side.
const ABREAST: usize = 32;

/// A host file in the session with the daemon.
#[derive(Clone, Copy)]
pub(crate) struct HostFile {
    /// Its handle.
    pub(crate) handle: u32,
    /// Its size.
    pub(crate) blocks: u64,
}

struct Resting {
    file: HostFile,
    /// Tells one rest from a later one of the same file.
    serial: u64,
}

/// What the host does not know yet.
#[derive(Default)]
pub(super) struct Backlog {
    /// When the first name changed that is not written.
    names_since: Option<u64>,
    /// When the first file closed that is not flushed.
    flush_since: Option<u64>,
    /// Files made since the last publication, by inode.
    unborn: BTreeMap<u64, HostFile>,
    /// Closed files that are not flushed, by inode.
    resting: BTreeMap<u64, Resting>,
    /// Files to be removed once no durable name leads to them.
    doomed: Vec<FileId>,
    /// A publication is being written.
    writing: bool,
    /// One in the background is on its way.
    claimed: bool,
    /// None in the background before.
    not_before: u64,
    serial: u64,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.names_since.is_none() && self.flush_since.is_none()
    }

    /// Names changed.
    pub(super) fn note(&mut self) {
        self.names_since.get_or_insert_with(wait::now_ns);
    }

    /// Whether a batch is large enough not to wait.
    pub(super) fn is_full(&self) -> bool {
        self.unborn.len().max(self.resting.len()).max(self.doomed.len()) >= MOST
    }

    fn is_due(&self, now: u64) -> bool {
        let past =
            |since: Option<u64>, time| since.is_some_and(|at| now.saturating_sub(at) >= time);
        now >= self.not_before
            && (past(self.names_since, NAMES_NS) || past(self.flush_since, FLUSH_NS))
    }
}

/// Whose turn it is to publish: a process, and who waits.
#[derive(Default)]
pub(super) struct Publishing(Lock<(u32, Vec<Waker>)>);

struct Turn<'a>(&'a Publishing);

impl Publishing {
    async fn take(&self) -> Turn<'_> {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            match state.0 {
                0 => {
                    state.0 = identity::process_id();
                    Poll::Ready(Turn(self))
                }
                holder => {
                    if holder != identity::process_id() && !identity::is_alive(holder) {
                        family::end_torn(holder);
                    }
                    state.1.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.0.lock();
            state.0 = 0;
            core::mem::take(&mut state.1)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// One batch.
struct Batch {
    /// The table, and where it goes; `None` if no name changed.
    image: Option<(Memory, u64)>,
    flush: BTreeMap<u32, u64>,
    /// Inodes and serial numbers of closed files.
    rested: Vec<(u64, u64)>,
    unborn: BTreeMap<u64, HostFile>,
    doomed: Vec<FileId>,
}

impl Batch {
    /// Everything that waits; `None` if nothing does. `all`: times and records alone count, too.
    fn take(loaded: &mut Loaded, all: bool) -> Option<Self> {
        let named = loaded.backlog.names_since.is_some() || all && loaded.dirty;
        if loaded.backlog.is_empty() && !named {
            return None;
        }
        let image = named.then(|| {
            loaded.sequence += 1;
            loaded.dirty = false;
            loaded.records.take_off();
            let image = loaded.table.encode(loaded.sequence);
            (Memory::new(image), slot_offset(loaded.sequence))
        });
        let backlog = &mut loaded.backlog;
        (backlog.names_since, backlog.flush_since, backlog.writing) = (None, None, true);
        let unborn = core::mem::take(&mut backlog.unborn);
        let resting = backlog.resting.values().map(|rest| rest.file);
        let flush = unborn.values().copied().chain(resting);
        let flush = flush.map(|file| (file.handle, file.blocks)).collect();
        let rested = backlog.resting.iter().map(|(inode, rest)| (*inode, rest.serial)).collect();
        // Only a table without their names makes them removable.
        let doomed = if named { core::mem::take(&mut backlog.doomed) } else { Vec::new() };
        Some(Self { image, flush, rested, unborn, doomed })
    }

    async fn write(&self, (held, disk): (&Held, &LaneFile)) -> Result<(), Errno> {
        let process = process::current();
        let (mut files, mut going) = (self.flush.iter(), FuturesUnordered::new());
        loop {
            while going.len() < ABREAST
                && let Some((handle, blocks)) = files.next()
            {
                let file = process.lane_file(*handle, *blocks)?;
                going.push(async move { file.flush().await });
            }
            match going.next().await {
                None => break,
                // Given back meanwhile: it was flushed when it was closed or taken away, or
                // removed.
                Some(Ok(()) | Err(HostError::Errno(libc::EBADF))) => {}
                Some(Err(HostError::Errno(errno))) => return Err(Errno(errno)),
                Some(Err(HostError::Gone)) => return Err(Errno::EIO),
            }
        }
        let Some((image, offset)) = &self.image else { return Ok(()) };
        let length = image.len();
        match held.volume.write(disk, *offset, image).await {
            Ok(done) if done == length => held.volume.sync(disk).await,
            Ok(_) => Err(Errno::ENOSPC),
            Err(errno) => Err(errno),
        }
    }
}

impl Directory {
    /// Writes and flushes all that waits, over the index's disk. With `Ok`, every change made before
    /// the call is durable; without `all`, times and records alone wait for a change of a name.
    ///
    /// # Errors
    /// `ENOSPC` when the host has no room: tried again later. `EIO`: names do not change any more.
    pub(crate) async fn publish(
        &self,
        index: &Arc<OpenVolume>,
        disk: (&Held, &LaneFile),
        all: bool,
    ) -> Result<(), Errno> {
        let _turn = self.publishing.take().await;
        let began = wait::now_ns();
        let batch = {
            let mut state = self.state.lock();
            let loaded = state.as_mut().filter(|loaded| Arc::ptr_eq(&loaded.index, index));
            let Some(loaded) = loaded else { return Ok(()) };
            if loaded.failed {
                return Err(Errno::EIO);
            }
            match Batch::take(loaded, all) {
                Some(batch) => batch,
                None => return Ok(()),
            }
        };
        let written = batch.write(disk).await;
        let process = process::current();
        let done = self.settle(batch, written, began);
        done.wakers.into_iter().for_each(Waker::wake);
        done.handles.into_iter().for_each(|handle| process.give_back(handle));
        for id in done.doomed {
            process.remove_host_file(&format!("{}/{}", self.config.name, host_name(&id)));
        }
        written
    }

    fn settle(&self, batch: Batch, written: Result<(), Errno>, began: u64) -> Settled {
        let mut settled = Settled::default();
        let now = wait::now_ns();
        let mut state = self.state.lock();
        let Some(loaded) = state.as_mut() else { return settled };
        let backlog = &mut loaded.backlog;
        backlog.writing = false;
        if batch.image.is_some() {
            settled.wakers = loaded.records.land(written.is_ok());
        }
        backlog.not_before = now.saturating_add((now.saturating_sub(began)) * (SHARE - 1));
        let Err(errno) = written else {
            for (inode, serial) in batch.rested {
                if backlog.resting.get(&inode).is_some_and(|rest| rest.serial == serial) {
                    settled.handles.extend(backlog.resting.remove(&inode).map(|r| r.file.handle));
                }
            }
            settled.doomed = batch.doomed;
            return settled;
        };
        // As before; the table goes to the same slot again.
        loaded.sequence -= u64::from(batch.image.is_some());
        backlog.doomed.extend(batch.doomed);
        backlog.unborn.extend(batch.unborn);
        backlog.names_since = Some(now);
        backlog.not_before = now + FLUSH_NS;
        let told = core::mem::replace(&mut loaded.told, true);
        loaded.failed = errno != Errno::ENOSPC;
        let failed = loaded.failed;
        drop(state);
        let path = &self.config.guest_path;
        if failed {
            message::say(&format!(
                "{path}: the name table cannot be written: {errno}; names do not change any more"
            ));
        } else if !told {
            message::say(&format!(
                "{path}: the name table cannot be written yet: {errno}; make room on the host"
            ));
        }
        settled
    }

    /// A file was made whose name is about to be given: its host file.
    pub(super) fn born(&self, inode: u64, file: HostFile) {
        if let Some(loaded) = self.state.lock().as_mut() {
            loaded.backlog.unborn.insert(inode, file);
        }
    }

    /// A file was closed and is durable.
    pub(crate) fn closed(&self, inode: u64) {
        if let Some(loaded) = self.state.lock().as_mut() {
            loaded.backlog.unborn.remove(&inode);
        }
    }

    /// Whether so much waits that it is time to publish.
    pub(crate) fn is_crowded(&self) -> bool {
        self.state.lock().as_ref().is_some_and(|loaded| loaded.backlog.is_full())
    }

    /// A file was closed and is to be flushed: keeps its host file open until then.
    pub(crate) fn lay_down(&self, inode: u64, file: HostFile) {
        let mut state = self.state.lock();
        let Some(loaded) = state.as_mut() else { return };
        let backlog = &mut loaded.backlog;
        backlog.serial += 1;
        backlog.resting.insert(inode, Resting { file, serial: backlog.serial });
        backlog.flush_since.get_or_insert_with(wait::now_ns);
    }

    /// The host file of a file that is kept open, for who opens the file again.
    pub(crate) fn wake(&self, inode: u64) -> Option<HostFile> {
        let mut state = self.state.lock();
        state.as_mut()?.backlog.resting.remove(&inode).map(|rest| rest.file)
    }

    /// The host file of a file that rests was taken away; the daemon has flushed it.
    pub(crate) fn lose(&self, handle: u32) {
        if let Some(loaded) = self.state.lock().as_mut() {
            loaded.backlog.resting.retain(|_, rest| rest.file.handle != handle);
        }
    }

    /// Removes the volume of a file that has no name any more and that nobody has open: at once if
    /// the host was never told its name, else after it is told.
    pub(crate) fn reap(&self, family: &Family, inode: u64) {
        if family.open_file(self.number, inode).is_some() {
            return; // Whoever closes it does.
        }
        let (id, rested, unknown) = {
            let mut state = self.state.lock();
            let Some(loaded) = state.as_mut() else { return };
            let orphan = loaded.table.node(inode).filter(|node| node.parent == 0);
            let Some(id) = orphan.and_then(|node| node.file().copied()) else { return };
            loaded.table.forget(inode);
            loaded.sizes.remove(&inode);
            loaded.orderly.forget(inode);
            let backlog = &mut loaded.backlog;
            let unknown = backlog.unborn.remove(&inode).is_some();
            if !unknown {
                backlog.doomed.push(id);
                backlog.note();
            }
            (id, backlog.resting.remove(&inode), unknown)
        };
        let process = process::current();
        if let Some(rest) = rested {
            process.give_back(rest.file.handle);
        }
        if unknown {
            process.remove_host_file(&format!("{}/{}", self.config.name, host_name(&id)));
        }
    }

    /// Whether all names that were given are durable, and all records where each sync is recorded.
    fn is_published(&self) -> bool {
        self.state.lock().as_ref().is_none_or(|loaded| {
            let behind = self.counts_syncs() && loaded.records.is_behind();
            loaded.backlog.names_since.is_none()
                && !loaded.backlog.writing
                && !loaded.failed
                && !behind
        })
    }

    /// Whether each sync of a file is recorded: where a counter moves with each sync, a file cannot
    /// be set back to before one.
    pub(crate) fn counts_syncs(&self) -> bool {
        self.config.counter.is_some_and(|counter| matches!(counter.moves, MovesConfig::Sync))
    }

    /// Starts a publication in the background if one is due; answers whether.
    pub(crate) fn tend(&'static self, process: &'static Process, family: &Family) -> bool {
        let index = {
            let mut state = self.state.lock();
            let Some(loaded) = state.as_mut().filter(|loaded| !loaded.failed) else { return false };
            if loaded.backlog.claimed || !loaded.backlog.is_due(wait::now_ns()) {
                return false;
            }
            loaded.backlog.claimed = true;
            loaded.index.clone()
        };
        let held = index.hold_index().and_then(|held| held.disk().map(|disk| (held, disk)));
        let Some((held, disk)) = held.ok().filter(|_| family.retain(&index)) else {
            self.unclaim();
            return false;
        };
        process.executor.spawn(async move {
            // Said by `settle`.
            let _ = self.publish(&index, (&held, &disk), false).await;
            drop(held);
            self.unclaim();
            runtime::close_volume(&index);
        });
        true
    }

    fn unclaim(&self) {
        if let Some(loaded) = self.state.lock().as_mut() {
            loaded.backlog.claimed = false;
        }
    }

    /// Before the index is closed: all that waits, and the times that no change of a name took
    /// along. Nothing, if the index was lost. Answers whether all of it is durable: else the host
    /// keeps files that no name leads to, or names without their latest files.
    pub(crate) async fn publish_rest(&self, index: &Arc<OpenVolume>) -> bool {
        let mut published = false;
        if let Ok(held) = index.hold_index()
            && let Ok(disk) = held.disk()
        {
            // Said by `settle`.
            published = self.publish(index, (&held, &disk), true).await.is_ok();
        }
        let rest = self.state.lock().take();
        let resting = rest.into_iter().flat_map(|loaded| loaded.backlog.resting.into_values());
        // What could not be published.
        resting.for_each(|rest| process::current().give_back(rest.file.handle));
        published
    }
}

/// What a publication leaves to be done.
#[derive(Default)]
struct Settled {
    wakers: Vec<Waker>,
    handles: Vec<u32>,
    doomed: Vec<FileId>,
}

impl OpenVolume {
    /// Makes everything durable that was written before in this core of it, or stored in a mapping,
    /// and the name that leads to it.
    ///
    /// # Errors
    /// `EIO` if it cannot be; `ENOSPC` when there is no room for it.
    pub async fn make_durable(&self, held: &Held, disk: &LaneFile) -> Result<(), Errno> {
        self.write_back((held, disk), 0..u64::MAX).await?;
        self.unwritten.clear();
        self.make_written_durable(held, disk).await
    }

    /// The same, but for what was stored in a mapping and not written back.
    ///
    /// # Errors
    /// As [`Self::make_durable`].
    pub async fn make_written_durable(&self, held: &Held, disk: &LaneFile) -> Result<(), Errno> {
        held.volume.sync(disk).await?;
        let Some(family) = family::family() else { return Ok(()) };
        let mut directories = family.directories.iter();
        let directory = directories.find(|directory| match &self.member {
            Some(member) => member.directory == directory.number,
            None => directory.entry == self.index,
        });
        let Some(directory) = directory.filter(|directory| !directory.is_published()) else {
            return Ok(());
        };
        let index = directory.state.lock().as_ref().map(|loaded| loaded.index.clone());
        let Some(index) = index else { return Ok(()) };
        let held = index.hold_index()?;
        let all = directory.counts_syncs();
        directory.publish(&index, (&held, &held.disk()?), all).await
    }

    /// Holds the index of a directory. It is not handed over: who finds it away has lost it.
    ///
    /// # Errors
    /// `EIO`: it is lost.
    pub(crate) fn hold_index(&self) -> Result<Held, Errno> {
        self.try_hold().ok_or(Errno::EIO)
    }
}
