//! Shared mappings of protected files.
//!
//! A file that is mapped shared has a *content* while it is ([`content`]): memory that all its
//! mappings in all processes of the family show, and that reads and writes of the file go by, as
//! they go by Linux's page cache. What the guest stores through a mapping reaches the volume at
//! msync and fsync, when the last mapping goes, and a moment later in any case ([`tend`]).
//!
//! Holds: a change of the file is either over before its content comes into being, or done to
//! volume and content together, one at a time. A file that is not mapped pays two additions on one
//! word for a write, and a look at one for a read.
//! Does not hold: what was stored and not written back is lost with the last process that has the
//! memory, if the host kills it, or if it was only forked, has made no call on a protected file
//! itself, and dies of a signal.

pub mod areas;
pub mod content;
mod copying;
mod memory;
mod ranges;
mod reach;
mod turn;

use core::{
    future::poll_fn,
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    task::{Poll, Waker},
};
use std::sync::Arc;

use postern_trusted::{errno::Errno, platform::Buffer, port::LaneFile, sync::Lock};

use self::{
    content::Content,
    reach::{Lost, Reached, reach},
};
use crate::{
    family::{Family, OpenVolume, family, standing::Held},
    identity,
    process::{self, Process},
    runtime, sys, wait,
};

/// What the guest stores is written back at least so often, in nanoseconds.
pub const INTERVAL_NS: u64 = 1_000_000_000;
/// Looking for it takes at most one part in this many of the time.
const SHARE: u64 = 20;

/// What the family's mapped files have in common.
#[derive(Default)]
pub struct Totals {
    /// Contents made.
    numbers: AtomicU64,
    /// Contents that ended.
    ended: AtomicU64,
    /// Bytes present.
    bytes: AtomicU64,
}

/// An open volume's place for its content.
#[derive(Default)]
pub struct Slot {
    /// There is one. Written under the lock of `content`.
    on: AtomicBool,
    /// Changes of the volume under way that know of none.
    changes: AtomicUsize,
    content: Lock<Option<Arc<Content>>>,
    /// Waits until there are no such changes.
    waiter: Lock<Option<Waker>>,
}

/// A change of a volume without a content.
struct Plain<'a>(&'a Slot);

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        // SeqCst: partner of `Slot::settled`, which looks at `changes` after `on` was set.
        let last = self.0.changes.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.0.on.load(Ordering::SeqCst) {
            let waiter = self.0.waiter.lock().take();
            waiter.into_iter().for_each(Waker::wake);
        }
    }
}

/// How a change of a volume is made.
enum Change<'a> {
    /// Counted while it lives.
    Plain(Plain<'a>),
    /// With its content, for the holder of the turn.
    Mapped(Arc<Content>),
}

impl Slot {
    fn plain(&self) -> Option<Plain<'_>> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let plain = Plain(self);
        (!self.on.load(Ordering::SeqCst)).then_some(plain)
    }

    fn get(&self) -> Option<Arc<Content>> {
        if !self.on.load(Ordering::Acquire) {
            return None;
        }
        self.content.lock().clone()
    }

    fn is(&self, content: &Arc<Content>) -> bool {
        self.content.lock().as_ref().is_some_and(|now| Arc::ptr_eq(now, content))
    }

    /// Waits until nothing changes the volume that began before there was a content.
    async fn settled(&self) {
        poll_fn(|context| {
            *self.waiter.lock() = Some(context.waker().clone());
            match self.changes.load(Ordering::SeqCst) {
                0 => Poll::Ready(()),
                _ => Poll::Pending,
            }
        })
        .await;
    }

    /// The content of this number has ended.
    fn clear(&self, content: &Arc<Content>) {
        let mut slot = self.content.lock();
        if slot.as_ref().is_some_and(|now| Arc::ptr_eq(now, content)) {
            let old = slot.take();
            self.on.store(false, Ordering::SeqCst);
            drop(slot);
            drop(old);
            content.end();
            if let Some(family) = family() {
                family.mapped.ended.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// The content, made if there is none; the volume is no longer changed past it.
    fn get_or_make(&self) -> Result<Arc<Content>, Errno> {
        if let Some(content) = self.get() {
            return Ok(content);
        }
        let family = family().ok_or(Errno::ENODEV)?;
        let number = family.mapped.numbers.fetch_add(1, Ordering::Relaxed) + 1;
        let file = sys::memfd(c"postern-mapping")?;
        let node = memory::node(file)?;
        let reached = reach::keep(number, file)?;
        let content = Arc::new(Content::new(number, node, identity::process_id(), reached.fd));
        let known = {
            let mut slot = self.content.lock();
            if slot.is_none() {
                *slot = Some(content.clone());
                self.on.store(true, Ordering::SeqCst);
            }
            slot.clone()
        };
        Ok(known.unwrap_or(content))
    }
}

impl OpenVolume {
    /// Whether the file is mapped shared.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.mapped.on.load(Ordering::Acquire)
    }

    /// The content of a file that is mapped.
    #[must_use]
    pub fn content(&self) -> Option<Arc<Content>> {
        self.mapped.get()
    }

    /// One more mapping of `range`; `stores`: it may be stored to. Ends with [`Self::unview`].
    ///
    /// # Errors
    /// `ENODEV`: too much is mapped. `EIO`, `ENOMEM`.
    async fn view(&self, range: &Range<u64>, stores: bool) -> Result<Arc<Content>, Errno> {
        loop {
            let content = self.mapped.get_or_make()?;
            let turn = content.turn.take().await;
            if !self.mapped.is(&content) || self.bury_if_lost(&content) {
                continue;
            }
            self.mapped.settled().await;
            // Not before: a volume that is mapped does not leave.
            let made = async {
                let held = self.hold_soon().await?;
                content.follow(held.volume.size())?;
                Box::pin(content.present((&held.volume, &held.disk()?), range, stores)).await
            };
            let made = made.await;
            if made.is_ok() {
                content.views.fetch_add(1, Ordering::AcqRel);
            }
            drop(turn);
            return match made {
                Ok(()) => Ok(content),
                Err(errno) => {
                    self.end_if_unused(&content).await;
                    Err(errno)
                }
            };
        }
    }

    /// More of a file that is mapped already.
    ///
    /// # Errors
    /// As [`Self::view`].
    async fn view_more(&self, content: &Content, range: &Range<u64>) -> Result<(), Errno> {
        let _turn = content.turn.take().await;
        let held = self.hold_soon().await?;
        Box::pin(content.present((&held.volume, &held.disk()?), range, false)).await
    }

    /// One mapping less.
    async fn unview(&self, content: &Arc<Content>) {
        if content.views.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end_if_unused(content).await;
        }
    }

    /// Ends the content of a file that nobody has mapped any more.
    async fn end_if_unused(&self, content: &Arc<Content>) {
        let _turn = content.turn.take().await;
        if content.views.load(Ordering::Acquire) != 0 || !self.mapped.is(content) {
            return;
        }
        let written = async {
            let held = self.hold_soon().await?;
            self.write_back_held(content, (&held, &held.disk()?), 0..u64::MAX).await
        };
        if let Err(errno) = written.await {
            self.tell_loss("what was stored in a mapping could not be written", errno);
        }
        self.mapped.clear(content);
    }

    /// Ends a content whose memory is gone with the processes that had it; answers whether it was.
    fn bury_if_lost(&self, content: &Arc<Content>) -> bool {
        let lost = matches!(reach(content), Err(Lost::Gone));
        if lost {
            self.mapped.clear(content);
        }
        lost
    }

    async fn change_mapped(&self) -> Change<'_> {
        loop {
            if let Some(plain) = self.mapped.plain() {
                return Change::Plain(plain);
            }
            if let Some(content) = self.mapped.get() {
                return Change::Mapped(content);
            }
        }
    }

    /// Reads at `offset` what the file holds, mapped or not.
    ///
    /// # Errors
    /// As [`postern_trusted::volume::Volume::read`].
    pub async fn load(
        &self,
        (held, disk): (&Held, &LaneFile),
        offset: u64,
        buffer: &impl Buffer,
    ) -> Result<usize, Errno> {
        while let Some(content) = self.mapped.get() {
            let Some(reached) = self.reach_or_bury(&content).await? else { continue };
            let loaded = content.load((&held.volume, disk), &reached, offset, buffer);
            return Box::pin(loaded).await;
        }
        held.volume.read(disk, offset, buffer).await
    }

    async fn reach_or_bury(&self, content: &Arc<Content>) -> Result<Option<Reached>, Errno> {
        match reach(content) {
            Ok(reached) => Ok(Some(reached)),
            Err(Lost::Refused) => Err(Errno::EIO),
            Err(Lost::Gone) => {
                let _turn = content.turn.take().await;
                self.bury_if_lost(content);
                Ok(None)
            }
        }
    }

    /// Writes at `offset`, or at the end, mapped or not. Answers where the data begins and how much
    /// of it was written.
    ///
    /// # Errors
    /// As [`postern_trusted::volume::Volume::write`].
    pub async fn store(
        &self,
        (held, disk): (&Held, &LaneFile),
        offset: Option<u64>,
        buffer: &impl Buffer,
    ) -> Result<(u64, usize), Errno> {
        loop {
            let content = match self.change_mapped().await {
                Change::Plain(_plain) => {
                    return match offset {
                        Some(at) => Ok((at, held.volume.write(disk, at, buffer).await?)),
                        None => held.volume.append_somewhere(disk, buffer).await,
                    };
                }
                Change::Mapped(content) => content,
            };
            let _turn = content.turn.take().await;
            if self.mapped.is(&content) && !self.bury_if_lost(&content) {
                return Box::pin(content.store((&held.volume, disk), offset, buffer)).await;
            }
        }
    }

    /// Makes the file `size` bytes long, mapped or not.
    ///
    /// # Errors
    /// As [`postern_trusted::volume::Volume::truncate`].
    pub async fn cut(&self, (held, disk): (&Held, &LaneFile), size: u64) -> Result<(), Errno> {
        loop {
            let content = match self.change_mapped().await {
                Change::Plain(_plain) => return held.volume.truncate(disk, size).await,
                Change::Mapped(content) => content,
            };
            let _turn = content.turn.take().await;
            if self.mapped.is(&content) && !self.bury_if_lost(&content) {
                held.volume.truncate(disk, size).await?;
                return content.follow(held.volume.size());
            }
        }
    }

    /// Makes a range read as zeros, mapped or not; the size stays.
    ///
    /// # Errors
    /// As [`postern_trusted::volume::Volume::punch`].
    pub async fn clear(
        &self,
        (held, disk): (&Held, &LaneFile),
        range: Range<u64>,
    ) -> Result<(), Errno> {
        let length = range.end - range.start;
        loop {
            let content = match self.change_mapped().await {
                Change::Plain(_plain) => return held.volume.punch(disk, range.start, length).await,
                Change::Mapped(content) => content,
            };
            let _turn = content.turn.take().await;
            if self.mapped.is(&content) && !self.bury_if_lost(&content) {
                held.volume.punch(disk, range.start, length).await?;
                let end = range.end.min(held.volume.size());
                return content.punch(&(range.start..end.max(range.start)));
            }
        }
    }

    /// Writes to the volume what the guest has stored in `range` through mappings.
    ///
    /// # Errors
    /// `ENOSPC`, `EIO`.
    pub async fn write_back(
        &self,
        (held, disk): (&Held, &LaneFile),
        range: Range<u64>,
    ) -> Result<(), Errno> {
        let Some(content) = self.mapped.get().filter(|content| content.stores()) else {
            return Ok(());
        };
        let _turn = content.turn.take().await;
        if self.mapped.is(&content) {
            self.write_back_held(&content, (held, disk), range).await?;
        }
        Ok(())
    }

    /// As [`Self::write_back`] of the whole file; waits for it. Nothing where it is not mapped.
    ///
    /// # Errors
    /// As [`Self::write_back`].
    pub fn write_back_now(&self) -> Result<(), Errno> {
        if !self.is_mapped() {
            return Ok(());
        }
        now(async {
            let held = self.hold_soon().await?;
            self.write_back((&held, &held.disk()?), 0..u64::MAX).await
        })
    }

    /// For the holder of the turn.
    async fn write_back_held(
        &self,
        content: &Content,
        (held, disk): (&Held, &LaneFile),
        range: Range<u64>,
    ) -> Result<(), Errno> {
        if Box::pin(content.write_back((&held.volume, disk), range)).await? {
            self.touch(&held.volume);
        }
        Ok(())
    }
}

/// Writes back what is due of a volume that is mapped, in the background, and lets go of what is
/// mapped no more. Answers whether there was anything.
pub fn tend(
    process: &'static Process,
    family: &'static Family,
    volume: &Arc<OpenVolume>,
    now_ns: u64,
) -> bool {
    let Some(content) = volume.content() else { return false };
    let due = content.due_ns.load(Ordering::Relaxed);
    if now_ns < due || !content.stores() || !reach::has(content.number) {
        return false;
    }
    let claimed =
        content.due_ns.compare_exchange(due, u64::MAX, Ordering::AcqRel, Ordering::Relaxed);
    if claimed.is_err() {
        return false;
    }
    if !family.retain(volume) {
        content.due_ns.store(now_ns + INTERVAL_NS, Ordering::Release);
        return false;
    }
    let volume = volume.clone();
    process.executor.spawn(async move {
        let written = async {
            let held = volume.hold_soon().await?;
            volume.write_back((&held, &held.disk()?), 0..u64::MAX).await
        };
        if let Err(errno) = written.await {
            volume.report(&family.guest_path(volume.index), "writing back a mapping failed", errno);
        }
        let now = wait::now_ns();
        let pause = INTERVAL_NS.max(now.saturating_sub(now_ns).saturating_mul(SHARE));
        content.due_ns.store(now + pause, Ordering::Release);
        runtime::close_volume(&volume);
    });
    true
}

/// Lets go of memory that was mapped and is no more.
pub fn sweep(family: &Family) {
    /// What this process has seen of [`Totals::ended`].
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let ended = family.mapped.ended.load(Ordering::Acquire);
    if SEEN.swap(ended, Ordering::Relaxed) != ended {
        let living: Vec<u64> = family
            .open_volumes()
            .filter_map(|volume| volume.content())
            .map(|content| content.number)
            .collect();
        reach::sweep(&living);
    }
}

/// Before a fork: references for the child's copy of the table of areas. All tables stand still
/// until [`fork_parent`] or [`fork_child`].
#[must_use]
pub fn fork_prepare() -> Vec<Arc<areas::Hold>> {
    reach::fork_prepare();
    areas::fork_prepare()
}

/// After a fork, in the parent.
pub fn fork_parent() {
    areas::fork_done();
    reach::fork_parent();
}

/// After a fork, in the child.
pub fn fork_child() {
    areas::fork_done();
    reach::fork_child();
}

/// Runs a job that waits, for a call of the guest, whose stack may be small.
fn now<T>(job: impl Future<Output = T>) -> T {
    process::current().block_on(Box::pin(job))
}
