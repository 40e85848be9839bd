//! Sessions: the lanes of one enclave's processes, and the host files they share.
//!
//! Holds: files and leases are released only after every lane that could use them has drained, also
//! those that are taken away; a lane joins only with its session's token; an ended session can not
//! be joined. Numbers of lanes are the lowest free ones, because only the first few are traced.

mod leases;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use postern_edl::{COUNTED_CLAIMS, FEATURE_DISCARD, OPEN_ASK, OPEN_READ_ONLY};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use crate::claims::{Claim, Told};
use crate::engine::{Doorbells, Engine, Interface, MAX_FILES, slot_of};
use crate::files::{Catalog, HostFile, Opening};
use crate::lane::{self, Command, LaneHandle, LaneParts};
use crate::lease::{Lease, Terms};
use crate::limits::{Account, LaneShare, Limits, MAX_LANES, SessionRow};
use crate::problem::log;
use crate::region::Region;
use crate::stats::{LaneStats, LeaseCounts, StatsHub};
use crate::volumes::Names;

/// Most sessions at once.
pub const MAX_SESSIONS: usize = 64;
/// Most leases that a session waits for at once.
pub const MAX_WISHES: usize = 64;

/// All sessions of the daemon.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: Mutex<Registry>,
    hub: StatsHub,
    spin: Duration,
    terms: Terms,
    limits: Arc<Limits>,
    interface: Interface,
}

#[derive(Debug, Default)]
struct Registry {
    sessions: BTreeMap<u64, Arc<Session>>,
    last: u64,
    lanes: BTreeMap<u64, mpsc::UnboundedSender<Command>>,
    reserved: BTreeSet<u64>,
}

/// One session.
#[derive(Debug)]
pub struct Session {
    /// Its number.
    pub number: u64,
    /// The secret that lets a lane join.
    pub token: [u64; 2],
    /// What it has of what all share.
    pub account: Arc<Account>,
    /// Held across opening, closing, joining and leaving, so that every lane knows every file.
    state: tokio::sync::Mutex<State>,
    terms: Terms,
    leases: Arc<LeaseCounts>,
}

#[derive(Debug, Default)]
struct State {
    lanes: BTreeMap<u64, mpsc::UnboundedSender<Command>>,
    files: Vec<OpenFile>,
    wishes: Vec<Wish>,
    /// Of the last handle given out.
    serial: u32,
    /// Of the last handle that a daemon before gave out.
    former: u32,
    ended: bool,
}

#[derive(Debug)]
struct OpenFile {
    handle: u32,
    /// Opens not yet closed.
    opens: u32,
    /// `None`: its lease was taken away.
    file: Option<Arc<HostFile>>,
    lease: Lease,
    /// What its enclave claims of it, once it has.
    told: Option<Told>,
}

impl OpenFile {
    fn is_named(&self, name: &str) -> bool {
        self.file.as_ref().is_some_and(|file| file.name == name)
    }
}

/// A lease that the session waits for.
#[derive(Debug)]
struct Wish {
    /// Marked as waited for.
    file: HostFile,
    since: Instant,
    /// When the session last came for it.
    seen: Instant,
}

/// The session that an enclave attaches a lane to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Joins {
    /// Its number; 0: a new one.
    pub session: u64,
    /// That session's secret.
    pub token: [u64; 2],
    /// The highest handle that its enclave had of another daemon; a new session gives out higher
    /// ones only.
    pub handles: u32,
}

/// What an enclave hands over to attach a lane.
#[derive(Debug)]
pub struct Port {
    /// The mapped port.
    pub region: Arc<Region>,
    /// Features that both sides have.
    pub features: u64,
    /// The eventfd that wakes the daemon.
    pub doorbell: OwnedFd,
    /// The eventfds that wake the enclave.
    pub driver: OwnedFd,
    /// See [`Doorbells`].
    pub service: OwnedFd,
}

/// A lane that is attached, as its connection holds it.
#[derive(Debug)]
pub struct Attached {
    /// Its session.
    pub session: Arc<Session>,
    /// Its number.
    pub lane: u64,
    handle: LaneHandle,
    stats: Arc<LaneStats>,
    driver: OwnedFd,
    service: OwnedFd,
}

impl Attached {
    /// Resolves when the lane has ended by itself (a broken ring).
    pub async fn ended(&mut self) {
        self.handle.ended().await;
    }
}

impl Sessions {
    /// No sessions; lanes spin for `spin` at most and do their I/O by `interface`, leases are held on
    /// `terms`, each session has no more than `limits`; volumes are known by `names`.
    #[must_use]
    pub fn new(
        spin: Duration,
        terms: Terms,
        limits: Limits,
        interface: Interface,
        names: Names,
    ) -> Self {
        let (hub, limits) = (StatsHub::of(names), Arc::new(limits));
        Self { spin, terms, limits, interface, hub, ..Self::default() }
    }

    /// What each session has and had, by number.
    #[must_use]
    pub fn rows(&self) -> Vec<SessionRow> {
        self.lock().sessions.values().map(|session| session.account.row()).collect()
    }

    /// The statistics of all lanes.
    #[must_use]
    pub const fn hub(&self) -> &StatsHub {
        &self.hub
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of sessions and lanes.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let registry = self.lock();
        (registry.sessions.len() as u64, registry.lanes.len() as u64)
    }

    /// Attaches a lane for `process`: to a new session, or to one that is there.
    ///
    /// # Errors
    /// `ESTALE` for a session that is not there, `EACCES` for another token, `EMFILE` or `ENOBUFS`
    /// at a limit of the session, `EUSERS` at one of the daemon, `EAGAIN` when the host has no
    /// native AIO requests left, else the host's. The log names what can be done.
    pub async fn attach(&self, joins: Joins, port: Port, process: i32) -> Result<Attached, Errno> {
        let (session, lane) = self.reserve(joins, process)?;
        let first = joins.session == 0;
        let attached = match session.account.enter(port.region.geometry().region_bytes() as u64) {
            Ok(share) => self.join(&session, lane, first, port, share).await,
            Err(refused) => Err(refused),
        };
        let mut registry = self.lock();
        registry.reserved.remove(&lane);
        match &attached {
            Ok(attached) => {
                registry.lanes.insert(lane, attached.handle.commands.clone());
            }
            Err(_) if first => {
                registry.sessions.remove(&session.number);
            }
            Err(_) => {}
        }
        attached
    }

    fn reserve(&self, joins: Joins, process: i32) -> Result<(Arc<Session>, u64), Errno> {
        let full = |what: std::fmt::Arguments<'_>| {
            let remedy = "end some programs, or give this one a daemon of its own";
            log(format_args!("{what} are attached, no more are given"), "this daemon", remedy);
            Errno::USERS
        };
        let Joins { session: number, token, handles } = joins;
        let mut registry = self.lock();
        let taken = |n: &u64| registry.lanes.contains_key(n) || registry.reserved.contains(n);
        let lane = (0..MAX_LANES as u64)
            .find(|n| !taken(n))
            .ok_or_else(|| full(format_args!("{MAX_LANES} lanes")))?;
        let session = if number == 0 {
            if registry.sessions.len() >= MAX_SESSIONS {
                return Err(full(format_args!("{MAX_SESSIONS} sessions")));
            }
            registry.last += 1;
            let session = Arc::new(Session {
                number: registry.last,
                token: random_token()?,
                account: Arc::new(Account::new(Arc::clone(&self.limits), registry.last, process)),
                state: tokio::sync::Mutex::new(State {
                    former: serial_of(handles),
                    serial: serial_of(handles),
                    ..State::default()
                }),
                terms: self.terms,
                leases: Arc::clone(&self.hub.leases),
            });
            registry.sessions.insert(session.number, Arc::clone(&session));
            session
        } else {
            let session = registry.sessions.get(&number).ok_or(Errno::STALE)?;
            let differs = (session.token[0] ^ token[0]) | (session.token[1] ^ token[1]);
            if differs != 0 {
                return Err(Errno::ACCESS);
            }
            Arc::clone(session)
        };
        registry.reserved.insert(lane);
        Ok((session, lane))
    }

    async fn join(
        &self,
        session: &Arc<Session>,
        lane: u64,
        first: bool,
        port: Port,
        share: LaneShare,
    ) -> Result<Attached, Errno> {
        let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let mut state = session.state.lock().await;
        if state.ended {
            return Err(Errno::ACCESS);
        }
        let driver = port.driver.try_clone().map_err(errno)?;
        let service = port.service.try_clone().map_err(errno)?;
        let doorbells = Doorbells { driver: port.driver, service: port.service };
        let stats = self.hub.lane(session.number, first);
        let started =
            Engine::new(port.region, lane, doorbells, Arc::clone(&stats), share, self.interface)
                .and_then(|mut engine| {
                    if port.features & FEATURE_DISCARD != 0 {
                        engine.serve_discards();
                    }
                    for open in &state.files {
                        if let Some(file) = &open.file {
                            engine.add_file(open.handle, Arc::clone(file));
                        }
                    }
                    lane::start(LaneParts {
                        engine,
                        doorbell: port.doorbell,
                        stats: Arc::clone(&stats),
                        spin: self.spin,
                        number: lane,
                    })
                    .map_err(errno)
                });
        let handle = match started {
            Ok(handle) => handle,
            Err(e) => {
                self.hub.retire(&stats);
                log(
                    format_args!("lane can not be started ({e})"),
                    format_args!("session {}", session.number),
                    "raise fs.aio-max-nr, the limit of open files or of threads",
                );
                return Err(e);
            }
        };
        state.lanes.insert(lane, handle.commands.clone());
        drop(state);
        let session = Arc::clone(session);
        Ok(Attached { session, lane, handle, stats, driver, service })
    }

    /// Ends a lane: drains it; with the last one, releases the session's files.
    pub async fn detach(&self, attached: Attached) {
        let Attached { session, lane, mut handle, stats, driver, service } = attached;
        // Fails if the lane has ended already.
        let _ = handle.commands.send(Command::Stop);
        while tokio::time::timeout(Duration::from_millis(200), handle.ended()).await.is_err() {
            // An enclave that filled a doorbell's counter can hold the lane in write(2): empty it.
            for doorbell in [&driver, &service] {
                let mut word = [0; 8];
                let mut parts = [std::io::IoSliceMut::new(&mut word)];
                let flags = rustix::io::ReadWriteFlags::NOWAIT;
                let _ = rustix::io::preadv2(doorbell, &mut parts, u64::MAX, flags);
            }
        }
        self.hub.retire(&stats);
        let mut state = session.state.lock().await;
        state.lanes.remove(&lane);
        if state.lanes.is_empty() {
            state.ended = true;
            let files = std::mem::take(&mut state.files);
            release((files, std::mem::take(&mut state.wishes))).await;
            self.lock().sessions.remove(&session.number);
        }
        drop(state);
        self.lock().lanes.remove(&lane);
    }

    /// Brings the statistics of every lane up to date, without waiting for a lane that hangs.
    pub async fn settle(&self) {
        let lanes: Vec<_> = self.lock().lanes.values().cloned().collect();
        let all = lanes.iter().filter_map(|lane| {
            let (done, settled) = oneshot::channel();
            lane.send(Command::Settle(done)).ok().map(|()| settled)
        });
        let all: Vec<_> = all.collect();
        let _ = tokio::time::timeout(Duration::from_millis(500), async {
            for settled in all {
                let _ = settled.await;
            }
        })
        .await;
    }
}

impl Session {
    /// Opens a file for the session under its lease. The same name again answers the same file. A
    /// `handle` that is not 0 is the one that the file had at a daemon before.
    ///
    /// # Errors
    /// As [`Catalog::open`]; `EAGAIN` while its holder is asked for the lease; `EMFILE` beyond
    /// the session's limit of files and [`MAX_WISHES`]; `EBUSY` for a name that is open for reading
    /// only and now wanted for writing; `EINVAL` for a handle that no daemon before gave out, or
    /// another file's.
    pub async fn open(
        &self,
        catalog: &Arc<Catalog>,
        name: String,
        flags: u32,
        handle: u32,
    ) -> Result<(u32, Arc<HostFile>), Errno> {
        let mut state = self.state.lock().await;
        if let Some(open) = state.files.iter_mut().find(|open| open.is_named(&name))
            && let Some(file) = &open.file
        {
            let other = handle != 0 && handle != open.handle;
            if flags & !(OPEN_READ_ONLY | OPEN_ASK) != 0 || other {
                return Err(Errno::INVAL);
            }
            if flags & OPEN_READ_ONLY == 0 && !file.writable {
                return Err(Errno::BUSY);
            }
            open.opens = open.opens.checked_add(1).ok_or(Errno::MFILE)?;
            return Ok((open.handle, Arc::clone(file)));
        }
        let handle = match handle {
            0 => None,
            _ => Some(state.former(handle)?),
        };
        let slot = state.free_slot(&self.account)?;
        let slot = handle.map_or(slot, slot_of);
        let now = Instant::now();
        let wish = state.wishes.iter().position(|wish| wish.file.name == name);
        if wish.is_none() && flags & OPEN_ASK != 0 && state.wishes.len() >= MAX_WISHES {
            return Err(Errno::MFILE);
        }
        // Kept until the next try has marked the file anew, so that its holder sees no gap.
        let wish = wish.map(|at| state.wishes.swap_remove(at));
        let since = wish.as_ref().map_or(now, |wish| wish.since);
        let catalog = Arc::clone(catalog);
        let opened = in_background(move || {
            let opened = catalog.open(&name, flags, since);
            drop(wish);
            opened
        });
        match opened.await?? {
            Opening::Leased(file) => {
                self.leases.granted.fetch_add(1, Relaxed);
                let handle = handle.unwrap_or_else(|| state.next_handle(slot));
                let entered = state.enter(handle, file, &self.terms).await;
                self.account.set_files(state.files.len());
                Ok(entered)
            }
            Opening::Asked(file) => {
                state.wishes.push(Wish { file, since, seen: now });
                Err(Errno::AGAIN)
            }
        }
    }

    /// Makes a file for the session and opens it.
    ///
    /// # Errors
    /// As [`Catalog::create`]; `EMFILE` beyond the session's limit of files.
    pub async fn create(
        &self,
        catalog: &Arc<Catalog>,
        name: String,
        blocks: u64,
    ) -> Result<(u32, Arc<HostFile>), Errno> {
        let mut state = self.state.lock().await;
        let slot = state.free_slot(&self.account)?;
        let catalog = Arc::clone(catalog);
        let file = in_background(move || catalog.create(&name, blocks)).await??;
        self.leases.granted.fetch_add(1, Relaxed);
        let handle = state.next_handle(slot);
        let entered = state.enter(handle, file, &self.terms).await;
        self.account.set_files(state.files.len());
        Ok(entered)
    }

    /// Takes what the enclave claims of a file that it has open. Of its space only a writer knows.
    ///
    /// # Errors
    /// `EBADF` for a handle that is not open.
    pub async fn tell(&self, handle: u32, mut claim: Claim, hub: &StatsHub) -> Result<(), Errno> {
        let mut state = self.state.lock().await;
        let open = state.files.iter_mut().find(|open| open.handle == handle);
        let open = open.ok_or(Errno::BADF)?;
        let file = open.file.as_ref().ok_or(Errno::BADF)?;
        if !file.writable {
            claim[COUNTED_CLAIMS..].fill(0);
        }
        open.told.get_or_insert_with(|| hub.told(&file.volume)).tell(claim);
        Ok(())
    }

    /// Closes a file once; the last close waits for what is in flight on it and releases it.
    ///
    /// # Errors
    /// `EBADF` for a handle that is not open.
    pub async fn close(&self, handle: u32) -> Result<(), Errno> {
        let mut state = self.state.lock().await;
        let at = state.files.iter().position(|open| open.handle == handle).ok_or(Errno::BADF)?;
        state.files[at].opens = state.files[at].opens.saturating_sub(1);
        if state.files[at].opens == 0 {
            state.tell(|done| Command::Close { handle, done }).await;
            let file = state.files.swap_remove(at);
            self.account.set_files(state.files.len());
            release(vec![file]).await;
        }
        Ok(())
    }
}

impl State {
    /// A slot of the lanes' file tables that no open file has.
    fn free_slot(&self, account: &Account) -> Result<usize, Errno> {
        account.admit_file(self.files.len())?;
        let mut used = [false; MAX_FILES];
        self.files.iter().for_each(|open| used[slot_of(open.handle)] = true);
        // At most MAX_FILES are admitted.
        used.iter().position(|used| !used).ok_or(Errno::MFILE)
    }

    /// A handle that was never given out, for a free slot.
    fn next_handle(&mut self, slot: usize) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial.wrapping_mul(MAX_FILES as u32) | slot as u32
    }

    /// A handle that a daemon before gave out, if its slot is free.
    fn former(&self, handle: u32) -> Result<u32, Errno> {
        let free = !self.files.iter().any(|open| slot_of(open.handle) == slot_of(handle));
        let given = (1..=self.former).contains(&serial_of(handle));
        if free && given { Ok(handle) } else { Err(Errno::INVAL) }
    }

    /// Makes a file known to every lane, under a handle whose slot is free.
    async fn enter(&mut self, handle: u32, file: HostFile, terms: &Terms) -> (u32, Arc<HostFile>) {
        let file = Arc::new(file);
        self.tell(|done| Command::Open { handle, file: Arc::clone(&file), done }).await;
        let lease = Lease::granted(Instant::now(), terms);
        let open = OpenFile { handle, opens: 1, file: Some(Arc::clone(&file)), lease, told: None };
        self.files.push(open);
        (handle, file)
    }

    /// Tells every lane and waits until all have answered or ended.
    async fn tell(&self, command: impl Fn(oneshot::Sender<()>) -> Command) {
        let mut answers = Vec::with_capacity(self.lanes.len());
        for lane in self.lanes.values() {
            let (done, answer) = oneshot::channel();
            if lane.send(command(done)).is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            let _ = answer.await;
        }
    }
}

/// The part of a handle that counts up.
const fn serial_of(handle: u32) -> u32 {
    handle / MAX_FILES as u32
}

/// Unlocks and closes files; the last close of a device may take its time.
async fn release(files: impl Send + 'static) {
    let _ = in_background(move || drop(files)).await;
}

async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Errno> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Errno::IO)
}

fn random_token() -> Result<[u64; 2], Errno> {
    let mut bytes = [0u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if got != bytes.len() {
        return Err(Errno::IO);
    }
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| half.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    Ok([word(low), word(high)])
}
