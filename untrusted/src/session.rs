//! Sessions: the lanes of one enclave's processes, and the host files they share.
//!
//! Holds: files and locks are released only after every lane that could use them has drained; a
//! lane joins only with its session's token; an ended session can not be joined. Numbers of lanes
//! are the lowest free ones, because only the first few are traced.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use postern_edl::OPEN_READ_ONLY;
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use crate::engine::{Doorbells, Engine, MAX_FILES, slot_of};
use crate::files::{Catalog, HostFile};
use crate::lane::{self, Command, LaneHandle, LaneParts};
use crate::problem::log;
use crate::region::Region;
use crate::stats::{LaneStats, StatsHub};

/// Most sessions at once.
pub const MAX_SESSIONS: usize = 64;
/// Most lanes of all sessions at once.
pub const MAX_LANES: usize = 256;
/// Most lanes of a session at once.
pub const MAX_LANES_PER_SESSION: usize = 64;

/// All sessions of the daemon.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: Mutex<Registry>,
    hub: StatsHub,
    spin: Duration,
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
    /// Held across opening, closing, joining and leaving, so that every lane knows every file.
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    lanes: BTreeMap<u64, mpsc::UnboundedSender<Command>>,
    files: Vec<OpenFile>,
    serial: u32,
    ended: bool,
}

#[derive(Debug)]
struct OpenFile {
    handle: u32,
    /// Opens not yet closed.
    opens: u32,
    file: Arc<HostFile>,
}

/// What an enclave hands over to attach a lane.
#[derive(Debug)]
pub struct Port {
    /// The mapped port.
    pub region: Arc<Region>,
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
    /// No sessions; lanes spin for `spin` at most.
    #[must_use]
    pub fn new(spin: Duration) -> Self {
        Self { spin, ..Self::default() }
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

    /// Attaches a lane: to a new session if `number` is 0, else to that one.
    ///
    /// # Errors
    /// `EACCES` for a session that is not there or another token, `EMFILE` at a limit, `EAGAIN`
    /// when the host has no native AIO requests left, else the host's.
    pub async fn attach(
        &self,
        number: u64,
        token: [u64; 2],
        port: Port,
    ) -> Result<Attached, Errno> {
        let (session, lane) = self.reserve(number, token)?;
        let attached = self.join(&session, lane, number == 0, port).await;
        let mut registry = self.lock();
        registry.reserved.remove(&lane);
        match &attached {
            Ok(attached) => {
                registry.lanes.insert(lane, attached.handle.commands.clone());
            }
            Err(_) if number == 0 => {
                registry.sessions.remove(&session.number);
            }
            Err(_) => {}
        }
        attached
    }

    fn reserve(&self, number: u64, token: [u64; 2]) -> Result<(Arc<Session>, u64), Errno> {
        let mut registry = self.lock();
        let taken = |n: &u64| registry.lanes.contains_key(n) || registry.reserved.contains(n);
        let lane = (0..MAX_LANES as u64).find(|n| !taken(n)).ok_or(Errno::MFILE)?;
        let session = if number == 0 {
            if registry.sessions.len() >= MAX_SESSIONS {
                return Err(Errno::MFILE);
            }
            registry.last += 1;
            let session = Arc::new(Session {
                number: registry.last,
                token: random_token()?,
                state: tokio::sync::Mutex::default(),
            });
            registry.sessions.insert(session.number, Arc::clone(&session));
            session
        } else {
            let session = registry.sessions.get(&number).ok_or(Errno::ACCESS)?;
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
    ) -> Result<Attached, Errno> {
        let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let mut state = session.state.lock().await;
        if state.ended {
            return Err(Errno::ACCESS);
        }
        if state.lanes.len() >= MAX_LANES_PER_SESSION {
            return Err(Errno::MFILE);
        }
        let driver = port.driver.try_clone().map_err(errno)?;
        let service = port.service.try_clone().map_err(errno)?;
        let doorbells = Doorbells { driver: port.driver, service: port.service };
        let stats = self.hub.lane(first);
        let started =
            Engine::new(port.region, lane, doorbells, Arc::clone(&stats)).and_then(|mut engine| {
                for open in &state.files {
                    engine.add_file(open.handle, Arc::clone(&open.file));
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
            release(files).await;
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
    /// Opens a file for the session. The same name again answers the same file.
    ///
    /// # Errors
    /// As [`Catalog::open`]; `EMFILE` beyond [`MAX_FILES`]; `EBUSY` for a name that is open for
    /// reading only and now wanted for writing.
    pub async fn open(
        &self,
        catalog: &Arc<Catalog>,
        name: String,
        flags: u32,
    ) -> Result<(u32, Arc<HostFile>), Errno> {
        let mut state = self.state.lock().await;
        if let Some(open) = state.files.iter_mut().find(|open| open.file.name == name) {
            if flags & !OPEN_READ_ONLY != 0 {
                return Err(Errno::INVAL);
            }
            if flags & OPEN_READ_ONLY == 0 && !open.file.writable {
                return Err(Errno::BUSY);
            }
            open.opens = open.opens.checked_add(1).ok_or(Errno::MFILE)?;
            return Ok((open.handle, Arc::clone(&open.file)));
        }
        let catalog = Arc::clone(catalog);
        state.add(move || catalog.open(&name, flags)).await
    }

    /// Makes a file for the session and opens it.
    ///
    /// # Errors
    /// As [`Catalog::create`]; `EMFILE` beyond [`MAX_FILES`].
    pub async fn create(
        &self,
        catalog: &Arc<Catalog>,
        name: String,
        blocks: u64,
    ) -> Result<(u32, Arc<HostFile>), Errno> {
        let mut state = self.state.lock().await;
        let catalog = Arc::clone(catalog);
        state.add(move || catalog.create(&name, blocks)).await
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
            release(vec![file]).await;
        }
        Ok(())
    }
}

impl State {
    /// Opens a file with `open` in a free slot and tells every lane of it.
    async fn add(
        &mut self,
        open: impl FnOnce() -> Result<HostFile, Errno> + Send + 'static,
    ) -> Result<(u32, Arc<HostFile>), Errno> {
        let mut used = [false; MAX_FILES];
        self.files.iter().for_each(|open| used[slot_of(open.handle)] = true);
        let slot = used.iter().position(|used| !used).ok_or(Errno::MFILE).inspect_err(|e| {
            log(
                format_args!("open refused ({e}): {MAX_FILES} files are open"),
                "one session",
                "the program must close some first",
            );
        })?;
        let file = Arc::new(tokio::task::spawn_blocking(open).await.map_err(|_| Errno::IO)??);
        self.serial = self.serial.wrapping_add(1);
        let handle = self.serial.wrapping_mul(MAX_FILES as u32) | slot as u32;
        self.tell(|done| Command::Open { handle, file: Arc::clone(&file), done }).await;
        self.files.push(OpenFile { handle, opens: 1, file: Arc::clone(&file) });
        Ok((handle, file))
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

/// Unlocks and closes files; the last close of a device may take its time.
async fn release(files: Vec<OpenFile>) {
    let _ = tokio::task::spawn_blocking(move || drop(files)).await;
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
