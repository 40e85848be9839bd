//! One process's link to the daemon: the control connection, the port's memory, the doorbells.
//!
//! The memory is a sealed memfd (it cannot shrink under the daemon), left out of forked children:
//! a child makes a link of its own and joins the session.
//!
//! When the daemon ends, requests and control calls wait until the service thread has found another
//! one ([`crate::succession`]): it gets the same memory, with what is in flight.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use postern_edl::{
    CLAIMS,
    calls::{
        CallError, Enclave, PosternCloseRequest, PosternCreateRequest, PosternFile,
        PosternKeepRequest, PosternLease, PosternLeaseRequest, PosternListRequest,
        PosternOpenRequest, PosternRemoveRequest, PosternTellRequest,
    },
    port::Geometry,
};
use postern_trusted::{
    errno::Errno,
    port::{Doorbell, HostFault, Lane, SharedWords, Sleeper, Switchless},
    sync::Lock,
};

use crate::{
    control::Connection,
    family::{self, Family},
    files, inside, message, process, service,
    succession::{self, Joined, Missed},
    sys, wait,
};

/// Requests in flight per process.
const ENTRIES: usize = 512;
/// So many daemons in a row that completed nothing were ended by what we say to them.
const IN_VAIN: u32 = 20;
/// Transfer area per process; pages cost memory only once used.
const DATA_BYTES: usize = 16 << 20;
/// Refusals of an attach: the session has all the lanes, or all the memory, that it may have; the
/// daemon has; the machine has no native AIO requests left.
const NO_LANE: u32 = libc::EMFILE as u32;
const NO_MEMORY: u32 = libc::ENOBUFS as u32;
const DAEMON_FULL: u32 = libc::EUSERS as u32;
const NO_AIO: u32 = libc::EAGAIN as u32;
/// Another one: the daemon speaks another version of the protocol.
pub(crate) const OTHER_VERSION: u32 = libc::EPROTONOSUPPORT as u32;
/// To ask again is of no use.
pub(crate) const LIMITS: [u32; 5] = [NO_LANE, NO_MEMORY, DAEMON_FULL, NO_AIO, OTHER_VERSION];

/// What a process hands to the daemon: a lane's memory and doorbells.
pub struct Port {
    /// The memory file: kept, for the next daemon.
    pub memory: i32,
    /// Its length.
    pub bytes: usize,
    /// Rung for the daemon, a driver, the service thread.
    pub bells: [i32; 3],
    at: usize,
}

/// A process's link to the daemon.
pub struct Link {
    /// The port.
    pub lane: Lane,
    /// The daemon takes freed space back.
    pub discards: bool,
    /// The daemon takes claims.
    tells: AtomicBool,
    port: Port,
    control: Lock<Enclave<Connection>>,
    socket: i32,
    state: Lock<State>,
    /// The lane's fault was told.
    told: AtomicBool,
    /// So was that the daemon does not say what leases are asked for.
    told_of_leases: AtomicBool,
    /// The port's word of the leases as it was when they were asked about last.
    leases: AtomicU64,
}

/// Which daemon the link leads to.
struct State {
    /// The family's session.
    incarnation: u64,
    /// When it was found to have ended, CLOCK_MONOTONIC nanoseconds.
    lost_ns: Option<u64>,
    /// The thread that is at work on it, or 0.
    mending: u32,
    /// Completions when it last came over to another one, and how often it did with something in
    /// flight that none completed.
    completed: u64,
    in_vain: u32,
}

/// A port's eventfds, as [`Port::bells`].
struct Bells([i32; 3]);

impl Switchless for Bells {
    fn postern_wake(&self, _port: u64) -> Result<(), u32> {
        wait::ring(self.0[0]);
        Ok(())
    }

    fn postern_sleep(&self, _port: u64, sleeper: Sleeper, limit_ns: u64) -> Result<(), u32> {
        let [_, driver, service] = self.0;
        wait::for_ring(if sleeper == Sleeper::Driver { driver } else { service }, limit_ns);
        Ok(())
    }
}

impl Doorbell for Bells {
    fn now_ns(&self) -> u64 {
        wait::now_ns()
    }
}

impl Port {
    /// A port of this geometry, and the enclave's end of it.
    ///
    /// # Errors
    /// What the kernel says: no memory, no descriptors.
    pub fn make(geometry: Geometry, keep: impl Fn(i32) -> i32) -> Result<(Self, Lane), Errno> {
        let bytes = geometry.region_bytes().next_multiple_of(4096);
        let memory = keep(memory_file(bytes)?);
        let mut bells = [-1; 3];
        let made = (|| {
            for bell in &mut bells {
                *bell = keep(wait::eventfd()?);
            }
            let (at, words) = map(memory, bytes)?;
            let lane = Lane::new(words, geometry, Bells(bells));
            lane.map(|lane| (at, lane)).map_err(|_| Errno::EINVAL)
        })();
        match made {
            Ok((at, lane)) => Ok((Self { memory, bytes, bells, at }, lane)),
            Err(errno) => {
                let all = bells.into_iter().chain([memory]).filter(|made| *made >= 0);
                all.for_each(files::close_internal);
                Err(errno)
            }
        }
    }

    /// Gives everything back; `lane` is the only one of it.
    pub fn discard(&self, lane: Lane) {
        drop(lane);
        unmap(self.at, self.bytes);
        self.bells.into_iter().chain([self.memory]).for_each(files::close_internal);
    }
}

impl Link {
    /// Connects to the daemon, hands it a port, and starts the family's session or joins it.
    ///
    /// # Errors
    /// An errno, with a message on stderr.
    pub fn attach(family: &'static Family, keep: impl Fn(i32) -> i32) -> Result<Self, Errno> {
        let geometry = Geometry::new(ENTRIES, DATA_BYTES).ok_or(Errno::EINVAL)?;
        let (port, lane) = Port::make(geometry, keep)?;
        // The first daemon is there or not; one that has ended may have a successor.
        let waits = family.incarnation() > 0;
        let until = wait::now_ns().saturating_add(family.config.daemon_wait_ms * 1_000_000);
        let joined = loop {
            let missed = match succession::join(family, &port) {
                Ok(joined) => break joined,
                Err(missed) => missed,
            };
            let over = !waits
                || !family.may_have_successor()
                || wait::now_ns() > until
                || matches!(missed, Missed::AtLimit(_));
            if over && missed != Missed::Later {
                say_missed(family, &missed);
                port.discard(lane);
                return Err(Errno::EIO);
            }
            sys::nap();
        };
        let Joined { control, attached, incarnation } = joined;
        let state = State { incarnation, lost_ns: None, mending: 0, completed: 0, in_vain: 0 };
        Ok(Self {
            lane,
            discards: attached.features & postern_edl::FEATURE_DISCARD != 0,
            tells: AtomicBool::new(attached.features & postern_edl::FEATURE_TELL != 0),
            port,
            socket: control.0.descriptor(),
            control: Lock::new(control),
            state: Lock::new(state),
            told: AtomicBool::new(false),
            told_of_leases: AtomicBool::new(false),
            leases: AtomicU64::new(0),
        })
    }

    /// Whether the daemon has ended and there is no other yet.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.state.lock().lost_ns.is_some()
    }

    /// The daemon of session `incarnation` has ended.
    fn lose(&self, incarnation: u64) {
        let mut state = self.state.lock();
        if state.incarnation != incarnation || state.lost_ns.is_some() {
            return;
        }
        state.lost_ns = Some(wait::now_ns());
        self.lane.withhold();
        drop(state);
        // Without a thread that brings another one there is none.
        if process::current().is_served() {
            process::current().service.kick();
        } else {
            self.lane.poison(HostFault::DaemonGone);
        }
    }

    /// While the link [`Self::is_lost`], for who is to see to it: tries to come over to another
    /// daemon, and hands over what is in flight. Gives up after the time that the run allows.
    pub fn mend(&self, family: &'static Family) {
        let lost_ns = {
            let mut state = self.state.lock();
            let Some(lost_ns) = state.lost_ns.filter(|_| state.mending == 0) else { return };
            state.mending = inside::thread_id();
            lost_ns
        };
        if self.lane.fault().is_none() {
            self.lane.renew();
            match succession::join(family, &self.port) {
                Ok(joined) => self.come_over(family, joined),
                Err(missed) => {
                    let waited = wait::now_ns().saturating_sub(lost_ns);
                    let over = waited > family.config.daemon_wait_ms.saturating_mul(1_000_000);
                    if over || !family.may_have_successor() {
                        if let Missed::Refused(_) | Missed::AtLimit(_) = missed {
                            say_missed(family, &missed);
                        }
                        self.lane.poison(HostFault::DaemonGone);
                    }
                }
            }
        }
        self.state.lock().mending = 0;
    }

    fn come_over(&self, family: &Family, joined: Joined) {
        let Joined { control: fresh, attached, incarnation } = joined;
        self.tells.store(attached.features & postern_edl::FEATURE_TELL != 0, Ordering::Relaxed);
        let replaced = {
            let control = self.control.lock();
            control.0.become_of(&fresh.0)
        };
        files::forget_internal(fresh.0.descriptor());
        drop(fresh);
        if replaced.is_err() {
            return self.lane.poison(HostFault::DaemonGone);
        }
        let process = process::current();
        process.sleepers.renew();
        process.service.renew();
        // Its successor has read no flush that the one before was at: where writes go through the
        // page cache, that one may have been told of an error that nobody is told of again.
        self.lane.release(|handle| family.host_files.is_buffered(handle));
        let completed = self.lane.stats().completed;
        let idle = self.lane.in_flight() == 0;
        let mut state = self.state.lock();
        let none = completed == state.completed && !idle;
        state.in_vain = if none { state.in_vain + 1 } else { 0 };
        (state.incarnation, state.lost_ns, state.completed) = (incarnation, None, completed);
        let in_vain = state.in_vain > IN_VAIN;
        drop(state);
        if in_vain {
            self.lane.poison(HostFault::DaemonGone);
        }
    }

    /// Makes a control call; when the daemon has ended, makes it again at its successor.
    fn ask<R>(
        &self,
        call: impl Fn(&mut Enclave<Connection>) -> Result<R, CallError<Errno>>,
    ) -> Result<R, CallError<Errno>> {
        loop {
            let incarnation = self.state.lock().incarnation;
            let answer = call(&mut self.control.lock());
            match answer {
                Err(CallError::Carrier(_)) if self.has_successor(incarnation) => {}
                other => return other,
            }
        }
    }

    /// The daemon of session `incarnation` has ended: waits for another one; `false`: there is none.
    fn has_successor(&self, incarnation: u64) -> bool {
        self.lose(incarnation);
        while self.lane.fault().is_none() {
            if !self.is_lost() {
                return true;
            }
            if let Some(family) = family::family().filter(|_| service::is_mine_to_mend()) {
                // A call that mending makes does not wait for it.
                if self.state.lock().mending == inside::thread_id() {
                    return false;
                }
                self.mend(family);
            }
            sys::nap();
        }
        false
    }

    /// Opens a host file by its name at the daemon, with flags of `postern_open`.
    ///
    /// # Errors
    /// The daemon's errno, or `EIO` if it broke the protocol.
    pub fn open(&self, name: &str, flags: u32) -> Result<PosternFile, Errno> {
        let request = PosternOpenRequest { name: name.into(), flags, handle: 0 };
        match self.ask(|control| control.postern_open(&request)) {
            Ok(reply) => Ok(reply.file),
            Err(CallError::Refused(errno)) => Err(Errno(i32::try_from(errno).unwrap_or(5))),
            Err(error) => Err(refused(name, "open", &error)),
        }
    }

    /// Makes a host file of `blocks` blocks in a directory of the daemon, and opens it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn create(&self, name: &str, blocks: u64) -> Result<PosternFile, Errno> {
        let request = PosternCreateRequest { name: name.into(), blocks };
        let before = self.state.lock().incarnation;
        match self.ask(|control| control.postern_create(&request)) {
            Ok(reply) => Ok(reply.file),
            // Made by a daemon that ended before it said so.
            Err(CallError::Refused(errno))
                if errno == Errno::EEXIST.0.unsigned_abs()
                    && self.state.lock().incarnation != before =>
            {
                self.open(name, 0)
            }
            Err(CallError::Refused(errno)) => Err(Errno(i32::try_from(errno).unwrap_or(5))),
            Err(error) => Err(refused(name, "create", &error)),
        }
    }

    /// Removes a host file from a directory of the daemon.
    pub fn remove(&self, name: &str) {
        // What cannot be removed stays: no name leads to it, and the next opening of the
        // directory tries again.
        let request = PosternRemoveRequest { name: name.into() };
        let _ = self.ask(|control| control.postern_remove(&request));
    }

    /// Ids of the host files in a directory of the daemon: a page of those above `after`, each of
    /// 32 hexadecimal digits; empty at the end.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn list(&self, name: &str, after: &str) -> Result<Vec<u8>, Errno> {
        const ROOM: u64 = 32 * 4096;
        let request = PosternListRequest { name: name.into(), after: after.into(), capacity: ROOM };
        match self.ask(|control| control.postern_list(&request)) {
            Ok(reply) => Ok(reply.ids),
            Err(CallError::Refused(errno)) => Err(Errno(i32::try_from(errno).unwrap_or(5))),
            Err(error) => Err(refused(name, "list", &error)),
        }
    }

    /// Gives a host file back.
    pub fn close(&self, handle: u32) {
        // A daemon that refuses or has gone: nothing is left to give back.
        let _ = self.ask(|control| control.postern_close(&PosternCloseRequest { handle }));
    }

    /// Whether the daemon has something to say of leases that was not asked about yet.
    pub fn has_news_of_leases(&self) -> bool {
        let now = self.lane.leases();
        self.leases.swap(now, Ordering::Relaxed) != now
    }

    /// The first lease with a handle of `first` or above that another program asks for, or that was
    /// taken away.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn lease(&self, first: u64) -> Result<Option<PosternLease>, Errno> {
        match self.ask(|control| control.postern_lease(&PosternLeaseRequest { first })) {
            Ok(reply) => Ok(Some(reply.lease)),
            Err(CallError::Refused(_)) => Ok(None),
            // Asked again and again, by each sync that fails.
            Err(_) if self.told_of_leases.swap(true, Ordering::Relaxed) => Err(Errno::EIO),
            Err(error) => Err(refused("the daemon", "lease", &error)),
        }
    }

    /// Keeps a lease that another program asks for.
    pub fn keep(&self, handle: u32) {
        // A daemon that refuses it takes the lease away, and says so.
        let _ = self.ask(|control| control.postern_keep(&PosternKeepRequest { handle }));
    }

    /// Tells what only the enclave knows of the volume behind `handle`, if the daemon wants it.
    pub fn tell(&self, handle: u32, claims: [u64; CLAIMS.len()]) {
        if self.tells.load(Ordering::Relaxed) {
            // Nothing depends on it.
            let request = PosternTellRequest { handle, claims };
            let _ = self.ask(|control| control.postern_tell(&request));
        }
    }

    /// Doorbells A (driver) and B (service) and the control socket: what sleepers watch.
    #[must_use]
    pub fn bells(&self) -> [i32; 3] {
        [self.port.bells[1], self.port.bells[2], self.socket]
    }

    /// The control connection.
    #[must_use]
    pub fn socket(&self) -> i32 {
        self.socket
    }

    /// All descriptors, to be closed by a forked child.
    #[must_use]
    pub fn descriptors(&self) -> [i32; 5] {
        let [daemon, driver, service] = self.port.bells;
        [daemon, driver, service, self.port.memory, self.socket]
    }

    /// Notices if the daemon has hung up, and says once why a lane is poisoned.
    pub fn check_daemon(&self) {
        let (incarnation, lost) = {
            let state = self.state.lock();
            (state.incarnation, state.lost_ns.is_some())
        };
        if !lost && wait::has_hung_up(self.socket) {
            self.lose(incarnation);
        }
        if let Some(fault) = self.lane.fault()
            && !self.told.swap(true, Ordering::Relaxed)
        {
            message::say(&format!("{fault}: requests end with EIO; start the program again"));
        }
    }
}

/// Says why there is no lane.
fn say_missed(family: &Family, missed: &Missed) {
    let path = &family.config.socket;
    match missed {
        Missed::Later => {}
        Missed::NoDaemon(errno) => {
            message::say(&format!("{path}: no daemon answers: {errno}; is posternd running?"));
        }
        Missed::Refused(what) | Missed::AtLimit(what) => message::say(&format!("{path}: {what}")),
    }
}

/// Says that the daemon did not do what it was asked; answers `EIO`.
fn refused(what: &str, call: &str, error: &CallError<Errno>) -> Errno {
    message::say(&format!("{what}: {call}: {}", reason(error)));
    Errno::EIO
}

/// Why the daemon did not do what it was asked.
pub(crate) fn reason(error: &CallError<Errno>) -> String {
    match error {
        CallError::Refused(NO_LANE) => "more processes of this run are at work on protected files \
            than the daemon's --session-lanes allows: run fewer at a time, or raise it \
            (postern run --limit lanes=N)"
            .into(),
        CallError::Refused(NO_MEMORY) => "the processes of this run have all the port memory that \
            the daemon's --session-memory allows: run fewer at a time, or raise it \
            (postern run --limit memory=SIZE)"
            .into(),
        CallError::Refused(DAEMON_FULL) => "the daemon has all the programs and processes that it \
            serves at once: end some, or give this one a daemon of its own"
            .into(),
        CallError::Refused(OTHER_VERSION) => "the daemon speaks another version of the protocol: \
            use postern and posternd of one version"
            .into(),
        CallError::Refused(NO_AIO) => "the machine has no native AIO requests left: raise \
            fs.aio-max-nr (sysctl), or end what uses them (fs.aio-nr)"
            .into(),
        CallError::Refused(errno) => {
            format!("the daemon refused: {}", Errno(i32::try_from(*errno).unwrap_or(5)))
        }
        CallError::Carrier(errno) => format!("the daemon did not answer: {errno}"),
        CallError::Malformed(_) => {
            "the daemon's answer makes no sense; is it of this version?".into()
        }
    }
}

/// A memfd of `bytes` zero bytes that can neither shrink nor grow.
fn memory_file(bytes: usize) -> Result<i32, Errno> {
    let name = c"postern-port";
    let flags = (libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as usize;
    // SAFETY: `name` is a C string; the others take numbers.
    unsafe {
        let at = name.as_ptr() as usize;
        let file = sys::check(sys::syscall6(libc::SYS_memfd_create, at, flags, 0, 0, 0, 0))?;
        let seals = (libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL) as usize;
        let add = libc::F_ADD_SEALS as usize;
        let file = i32::try_from(file).map_err(|_| Errno::EMFILE)?;
        let sized = sys::size_memory_file(file, bytes).and_then(|()| {
            sys::check(sys::syscall6(libc::SYS_fcntl, file as usize, add, seals, 0, 0, 0))
        });
        if let Err(errno) = sized {
            wait::close(file);
            return Err(errno);
        }
        Ok(file)
    }
}

fn map(memory: i32, bytes: usize) -> Result<(usize, SharedWords), Errno> {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let shared = libc::MAP_SHARED as usize;
    // SAFETY: a new mapping where the kernel chooses, and advice about it.
    let base = unsafe {
        let file = memory as usize;
        let base =
            sys::check(sys::syscall6(libc::SYS_mmap, 0, bytes, protection, shared, file, 0))?;
        let advice = libc::MADV_DONTFORK as usize;
        sys::check(sys::syscall6(libc::SYS_madvise, base, bytes, advice, 0, 0, 0))?;
        base
    };
    // SAFETY: 1. Mapped read-write above, unmapped only after its lane (`Port::discard`), and the
    //    file is sealed against shrinking. 2. Nobody else holds a reference into it.
    let words = unsafe { SharedWords::new(base as *mut u8, bytes, |_, _| true) };
    words.map(|words| (base, words)).map_err(|_| Errno::EINVAL)
}

fn unmap(at: usize, bytes: usize) {
    // SAFETY: what `map` has mapped; its lane is gone.
    unsafe { sys::syscall6(libc::SYS_munmap, at, bytes, 0, 0, 0, 0) };
}
