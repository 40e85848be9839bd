//! Whether an open volume is here: the family has its lease and its core in memory.
//!
//! Another program may ask for the lease. What is in flight then ends, the volume is closed
//! cleanly, its host file is given back, and whoever wants something of it waits until it is opened
//! anew; open files know nothing of it. A lease that was taken away leaves nothing to close: the
//! volume is opened anew from what had been published, and the next fsync of each open file says
//! `EIO` once.
//!
//! Holds: a core is used only under a [`Held`], counted under the lock that decides that it leaves,
//! so nothing is started on a core that is being closed; nobody waits for a core who holds it. A
//! core that was lost is only let go of: requests that still hold it fail at the daemon, which knows
//! its handle no more.
#![allow(unsafe_code)]

use core::{
    future::poll_fn,
    ops::Deref,
    sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    task::{Context, Poll, Waker},
};
use std::sync::Arc;

use postern_edl::CLAIMS;
use postern_trusted::{
    errno::Errno,
    port::LaneFile,
    sync::Lock,
    volume::{Progress, Times, Volume},
};

use super::family;
use crate::{files::locks, identity, inside, process};

/// A volume in memory, under its lease.
pub struct Core {
    /// The volume.
    pub volume: Volume,
    /// The host file's handle in the session: valid as long as the lease is.
    pub handle: u32,
    /// Size of the host file in blocks.
    pub host_blocks: u64,
    /// [`Held`]s.
    users: AtomicUsize,
    /// Somebody waits for the last of them.
    leaving: AtomicBool,
    /// What the daemon was told last.
    told: Lock<[u64; CLAIMS.len()]>,
}

impl Core {
    /// A volume that was opened in the host file behind `handle`.
    #[must_use]
    pub fn new(volume: Volume, handle: u32, host_blocks: u64) -> Self {
        let (users, leaving) = (AtomicUsize::new(0), AtomicBool::new(false));
        let told = Lock::new([0; CLAIMS.len()]);
        Self { volume, handle, host_blocks, users, leaving, told }
    }

    /// What there is to tell the daemon, in the order of [`CLAIMS`]: numbers that say nothing of what
    /// is in the volume. `None`: nothing new.
    #[must_use]
    pub fn news(&self) -> Option<[u64; CLAIMS.len()]> {
        let (counters, info) = (self.volume.counters(), self.volume.info());
        let now = [
            counters.integrity_failures,
            counters.checkpoints,
            counters.flushes,
            counters.journal_blocks,
            counters.map_blocks,
            counters.data_blocks,
            counters.discarded_blocks,
            info.used_blocks,
            info.free_blocks,
        ];
        let before = core::mem::replace(&mut *self.told.lock(), now);
        (before != now).then_some(now)
    }
}

enum Place {
    Here(Arc<Core>),
    /// On its way out; by this process. `closing`: nothing is in flight any more.
    Leaving {
        core: Arc<Core>,
        by: u32,
        closing: bool,
    },
    Away,
    /// Being opened anew by this process.
    Coming(u32),
    /// The family is done with it.
    Gone,
}

/// A volume as it was left.
#[derive(Clone, Copy)]
struct Last {
    size: u64,
    capacity: u64,
    times: Times,
    progress: Progress,
}

impl Last {
    fn of(volume: &Volume) -> Self {
        let (size, capacity) = (volume.size(), volume.capacity());
        Self { size, capacity, times: volume.times(), progress: volume.progress() }
    }
}

struct Inner {
    place: Place,
    /// What it was when it was here last.
    last: Last,
    /// Somebody waits for it to come back.
    wanted: bool,
    /// Tries to bring it back that failed for good: whoever waited for one fails with it.
    failures: u32,
    waiters: Vec<Waker>,
    /// Waits for the last user of what leaves.
    leaver: Option<Waker>,
}

/// Where an open volume stands.
pub struct Standing {
    inner: Lock<Inner>,
    /// Counts changes of place; sleepers wait on it.
    changes: AtomicU32,
}

/// The core of a volume in use: it does not leave meanwhile.
pub struct Held {
    /// The volume's number in the family.
    pub index: usize,
    core: Arc<Core>,
    standing: Arc<Standing>,
}

impl Deref for Held {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.core
    }
}

impl Held {
    /// The host file over the calling process's lane.
    ///
    /// # Errors
    /// As [`process::Process::link`].
    pub fn disk(&self) -> Result<LaneFile, Errno> {
        process::current().disk(self.index, &self.core)
    }

    /// The same for one request of the guest, which carries its claims.
    ///
    /// # Errors
    /// As [`process::Process::link`].
    pub fn disk_for_guest(&self, submitted_ns: u64) -> Result<LaneFile, Errno> {
        process::current().disk_for_guest(self.index, &self.core, submitted_ns)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let last = self.core.users.fetch_sub(1, Ordering::SeqCst) == 1;
        // Partner: `Standing::drained` stores `leaving`, then looks at `users`.
        if last && self.core.leaving.load(Ordering::SeqCst) {
            let leaver = self.standing.inner.lock().leaver.take();
            leaver.into_iter().for_each(Waker::wake);
        }
    }
}

/// What a volume answers that is asked to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// It leaves from now on: the caller sees to it with [`Standing::drained`].
    Begins,
    /// It is on its way out.
    OnItsWay,
    /// It is on its way out and the calling process writes down what there is.
    Closing,
    /// It is not here.
    NotHere,
}

/// A core, known as what its host file holds.
fn listed(core: Core) -> Arc<Core> {
    let core = Arc::new(core);
    if let Some(family) = family() {
        family.host_files.holds(&core);
    }
    core
}

/// Sleeps while `word` is `seen`, until a handler of the guest is to run.
fn wait_for_change(word: &AtomicU32, seen: u32) -> Result<usize, Errno> {
    let at = core::ptr::from_ref(word) as usize;
    let arguments = [at, libc::FUTEX_WAIT as usize, seen as usize, 0, 0, 0];
    // SAFETY: a word that outlives the call; no timeout.
    unsafe { inside::interruptible(libc::SYS_futex, arguments, None) }
}

impl Standing {
    /// Here.
    #[must_use]
    pub fn new(core: Core) -> Arc<Self> {
        let last = Last::of(&core.volume);
        let place = Place::Here(listed(core));
        let inner =
            Inner { place, last, wanted: false, failures: 0, waiters: Vec::new(), leaver: None };
        Arc::new(Self { inner: Lock::new(inner), changes: AtomicU32::new(0) })
    }

    /// The core, if it is in memory: to look at, not for I/O.
    #[must_use]
    pub fn core(&self) -> Option<Arc<Core>> {
        match &self.inner.lock().place {
            Place::Here(core) | Place::Leaving { core, .. } => Some(core.clone()),
            Place::Away | Place::Coming(_) | Place::Gone => None,
        }
    }

    /// Size and capacity of the guest's file in bytes, as they are or were last.
    #[must_use]
    pub fn extent(&self) -> (u64, u64) {
        let inner = self.inner.lock();
        match &inner.place {
            Place::Here(core) => (core.volume.size(), core.volume.capacity()),
            _ => (inner.last.size, inner.last.capacity),
        }
    }

    /// Times of the guest's file, as they are or were last.
    #[must_use]
    pub fn times(&self) -> Times {
        let inner = self.inner.lock();
        match &inner.place {
            Place::Here(core) => core.volume.times(),
            _ => inner.last.times,
        }
    }

    /// How far it had come when it was here last.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.inner.lock().last.progress
    }

    /// Whether it is here.
    #[must_use]
    pub fn is_here(&self) -> bool {
        matches!(self.inner.lock().place, Place::Here(_))
    }

    /// Whether its file at the daemon has this handle.
    #[must_use]
    pub fn has_handle(&self, handle: u32) -> bool {
        self.core().is_some_and(|core| core.handle == handle)
    }

    /// Holds it if it is here.
    pub fn try_hold(self: &Arc<Self>, index: usize) -> Option<Held> {
        let core = match &self.inner.lock().place {
            Place::Here(core) => {
                // Under the lock, so that who decides that it leaves counts it.
                core.users.fetch_add(1, Ordering::SeqCst);
                core.clone()
            }
            _ => return None,
        };
        Some(Held { index, core, standing: self.clone() })
    }

    /// Holds it when it is here.
    ///
    /// # Errors
    /// `EIO`: it cannot be opened anew.
    pub async fn hold_soon(self: &Arc<Self>, index: usize) -> Result<Held, Errno> {
        let mut known = None;
        poll_fn(|context| self.poll_hold(index, &mut known, context)).await
    }

    fn poll_hold(
        self: &Arc<Self>,
        index: usize,
        known: &mut Option<u32>,
        context: &Context<'_>,
    ) -> Poll<Result<Held, Errno>> {
        if let Some(held) = self.try_hold(index) {
            return Poll::Ready(Ok(held));
        }
        let mut inner = self.inner.lock();
        match inner.place {
            // Came back between the two looks.
            Place::Here(_) => context.waker().wake_by_ref(),
            Place::Gone => return Poll::Ready(Err(Errno::EIO)),
            _ if *known.get_or_insert(inner.failures) != inner.failures => {
                return Poll::Ready(Err(Errno::EIO));
            }
            _ => {
                if !inner.waiters.iter().any(|waiter| waiter.will_wake(context.waker())) {
                    inner.waiters.push(context.waker().clone());
                }
                self.want(&mut inner);
            }
        }
        Poll::Pending
    }

    /// Holds it; waits for it as for a lock if it is not here.
    ///
    /// # Errors
    /// `EINTR`: a signal handler ran while it waited. `EIO`: it cannot be opened anew.
    pub fn hold(self: &Arc<Self>, index: usize) -> Result<Held, Errno> {
        loop {
            if let Some(held) = self.try_hold(index) {
                return Ok(held);
            }
            self.attend()?;
        }
    }

    /// Waits until it is here, as for a lock.
    ///
    /// # Errors
    /// As [`Self::hold`].
    pub fn attend(&self) -> Result<(), Errno> {
        let mut known = None;
        loop {
            let seen = self.changes.load(Ordering::SeqCst);
            {
                let mut inner = self.inner.lock();
                match inner.place {
                    Place::Here(_) => return Ok(()),
                    Place::Gone => return Err(Errno::EIO),
                    _ if *known.get_or_insert(inner.failures) != inner.failures => {
                        return Err(Errno::EIO);
                    }
                    _ => self.want(&mut inner),
                }
            }
            // A forked child may have neither lane nor service thread yet.
            process::current().link()?;
            // Else it has changed already, or woke up without a reason.
            if wait_for_change(&self.changes, seen) == Err(Errno::EINTR) {
                return Err(Errno::EINTR);
            }
        }
    }

    /// Has the service thread bring it back.
    fn want(&self, inner: &mut Inner) {
        if !inner.wanted {
            inner.wanted = true;
            process::current().service.kick();
        }
    }

    /// It has moved: wakes everybody who waits for that.
    fn moved(&self, inner: &mut Inner) -> Vec<Waker> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        core::mem::take(&mut inner.waiters)
    }

    fn tell(&self, waiters: Vec<Waker>) {
        let _ = locks::futex(&self.changes, libc::FUTEX_WAKE, u32::MAX >> 1);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Process `me` is asked to have it leave; it does not if it `stays`, asked when nobody can begin
    /// to hold it.
    pub fn leave(&self, me: u32, stays: impl FnOnce() -> bool) -> Leave {
        let mut inner = self.inner.lock();
        match &inner.place {
            Place::Here(_) if stays() => Leave::NotHere,
            Place::Here(core) => {
                let core = core.clone();
                inner.last = Last::of(&core.volume);
                inner.place = Place::Leaving { core, by: me, closing: false };
                Leave::Begins
            }
            Place::Leaving { by, closing: true, .. } if *by == me => Leave::Closing,
            Place::Leaving { .. } => Leave::OnItsWay,
            Place::Away | Place::Coming(_) | Place::Gone => Leave::NotHere,
        }
    }

    /// What is leaving, when nothing is in flight on it any more; `None` if it was lost meanwhile.
    pub async fn drained(&self) -> Option<Arc<Core>> {
        poll_fn(|context| {
            let mut inner = self.inner.lock();
            let inner = &mut *inner;
            let Place::Leaving { core, closing, .. } = &mut inner.place else {
                return Poll::Ready(None);
            };
            inner.leaver = Some(context.waker().clone());
            // Partner: the drop of a `Held`.
            core.leaving.store(true, Ordering::SeqCst);
            if core.users.load(Ordering::SeqCst) > 0 {
                return Poll::Pending;
            }
            *closing = true;
            Poll::Ready(Some(core.clone()))
        })
        .await
    }

    /// The core with this handle has left, or was lost; `false` if it is another one that is here, or
    /// somebody else has said so. `count` runs before anybody can find it away: who syncs the volume
    /// then hears of what was lost, once.
    pub fn gone_away(&self, handle: u32, count: impl FnOnce()) -> bool {
        let waiters = {
            let mut inner = self.inner.lock();
            let last = match &inner.place {
                Place::Here(core) | Place::Leaving { core, .. } if core.handle == handle => {
                    Last::of(&core.volume)
                }
                _ => return false,
            };
            count();
            inner.last = last;
            inner.place = Place::Away;
            let leaver = inner.leaver.take();
            let mut waiters = self.moved(&mut inner);
            waiters.extend(leaver);
            waiters
        };
        self.tell(waiters);
        true
    }

    /// Process `me` brings it back, with [`Self::came`] or [`Self::stays_away`], if it is away and
    /// somebody wants it. Ends the process if another one was killed while it did.
    #[must_use]
    pub fn come(&self, me: u32) -> bool {
        let by = {
            let mut inner = self.inner.lock();
            match inner.place {
                Place::Away if inner.wanted => {
                    inner.place = Place::Coming(me);
                    return true;
                }
                Place::Coming(by) => by,
                _ => return false,
            }
        };
        let still = || matches!(self.inner.lock().place, Place::Coming(now) if now == by);
        if by != me && !identity::is_alive(by) && still() {
            super::end_torn(by);
        }
        false
    }

    /// It is here again.
    pub fn came(&self, core: Core) {
        let core = listed(core);
        let waiters = {
            let mut inner = self.inner.lock();
            inner.place = Place::Here(core);
            inner.wanted = false;
            self.moved(&mut inner)
        };
        self.tell(waiters);
    }

    /// It cannot be had now; `for_good`: whoever waits for it fails.
    pub fn stays_away(&self, for_good: bool) {
        let waiters = {
            let mut inner = self.inner.lock();
            inner.place = Place::Away;
            if for_good {
                inner.failures = inner.failures.wrapping_add(1);
                inner.wanted = false;
            }
            self.moved(&mut inner)
        };
        self.tell(waiters);
    }

    /// The family is done with it: answers its core if it was here, when it has come to rest.
    pub async fn retire(&self) -> Option<Arc<Core>> {
        poll_fn(|context| {
            let mut inner = self.inner.lock();
            match &inner.place {
                Place::Leaving { .. } | Place::Coming(_) => {
                    inner.waiters.push(context.waker().clone());
                    Poll::Pending
                }
                Place::Here(core) => {
                    let core = core.clone();
                    inner.place = Place::Gone;
                    Poll::Ready(Some(core))
                }
                Place::Away | Place::Gone => {
                    inner.place = Place::Gone;
                    Poll::Ready(None)
                }
            }
        })
        .await
    }
}
