//! One process's link to the daemon: the control connection, the port's memory, the doorbells.
//!
//! The memory is a sealed memfd (it cannot shrink under the daemon), left out of forked children:
//! a child makes a link of its own and joins the session.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use postern_edl::{
    calls::{
        CallError, Enclave, PosternAttachRequest, PosternCloseRequest, PosternCreateRequest,
        PosternFile, PosternKeepRequest, PosternLease, PosternLeaseRequest, PosternListRequest,
        PosternOpenRequest, PosternRemoveRequest,
    },
    port::Geometry,
};
use postern_trusted::{
    errno::Errno,
    port::{Doorbell, HostFault, Lane, SharedWords},
    sync::Lock,
};

use crate::{
    control::Connection,
    family::{Family, Session},
    files, message, sys, wait,
};

/// Requests in flight per process.
const ENTRIES: usize = 512;
/// Transfer area per process; pages cost memory only once used.
const DATA_BYTES: usize = 16 << 20;
/// Refusals of an attach: the session has ended; it has all the lanes, or all the memory, that it
/// may have; the daemon has; the machine has no native AIO requests left; the daemon speaks another
/// version of the protocol.
const NO_SESSION: u32 = libc::EACCES as u32;
const NO_LANE: u32 = libc::EMFILE as u32;
const NO_MEMORY: u32 = libc::ENOBUFS as u32;
const DAEMON_FULL: u32 = libc::EUSERS as u32;
const NO_AIO: u32 = libc::EAGAIN as u32;
const OTHER_VERSION: u32 = libc::EPROTONOSUPPORT as u32;

/// A process's link to the daemon.
pub struct Link {
    /// The port.
    pub lane: Lane,
    /// The daemon takes freed space back.
    pub discards: bool,
    control: Lock<Enclave<Connection>>,
    socket: i32,
    bells: [i32; 3],
    /// The lane's fault was told.
    told: AtomicBool,
    /// The port's word of the leases as it was when they were asked about last.
    leases: AtomicU64,
}

struct DaemonBell(i32);

impl Doorbell for DaemonBell {
    fn ring(&self) {
        wait::ring(self.0);
    }
    fn now_ns(&self) -> u64 {
        wait::now_ns()
    }
}

impl Link {
    /// Connects to the daemon, hands it a port, and starts the family's session or joins it.
    ///
    /// # Errors
    /// An errno, with a message on stderr.
    pub fn attach(family: &Family, keep: impl Fn(i32) -> i32) -> Result<Self, Errno> {
        let session = *family.session.lock();
        match Self::attach_once(family, &keep) {
            // All processes of the family had left it; an exec lies between.
            Err(Errno::ESTALE) if session.is_some_and(|s| family.forget_session(s.number)) => {
                Self::attach_once(family, &keep)
            }
            other => other,
        }
        .map_err(|errno| if errno == Errno::ESTALE { Errno::EIO } else { errno })
    }

    fn attach_once(family: &Family, keep: &impl Fn(i32) -> i32) -> Result<Self, Errno> {
        let path = &family.config.socket;
        let mut connection = Connection::open(path.as_bytes()).map_err(|errno| {
            message::say(&format!("{path}: no daemon answers: {errno}; is posternd running?"));
            Errno::EIO
        })?;
        connection.move_descriptor(keep);
        let socket = connection.descriptor();
        let geometry = Geometry::new(ENTRIES, DATA_BYTES).ok_or(Errno::EINVAL)?;
        let bytes = geometry.region_bytes().next_multiple_of(4096);
        let memory = memory_file(bytes)?;
        let words = map(memory, bytes);
        let bells = [keep(wait::eventfd()?), keep(wait::eventfd()?), keep(wait::eventfd()?)];
        let lane = words.and_then(|words| {
            Lane::new(words, geometry, DaemonBell(bells[0])).map_err(|_| Errno::EINVAL)
        });
        let lane = match lane {
            Ok(lane) => lane,
            Err(errno) => {
                wait::close(memory);
                return Err(errno);
            }
        };
        // Held while the first lane makes the session, so that two processes cannot make two.
        let mut session = family.session.lock();
        connection.send_beside([memory, bells[0], bells[1], bells[2]]);
        let mut control = Enclave(connection);
        let attached = control.postern_attach(&PosternAttachRequest {
            version: postern_edl::VERSION,
            features: postern_edl::FEATURE_DISCARD,
            session: session.map_or(0, |s| s.number),
            token: session.map_or([0; 2], |s| s.token),
            port: 0,
            port_bytes: bytes as u64,
        });
        wait::close(memory);
        let attached = match attached {
            // EACCES: the daemon knows no such session.
            Err(CallError::Refused(NO_SESSION)) if session.is_some() => {
                [socket, bells[0], bells[1], bells[2]].into_iter().for_each(files::close_internal);
                return Err(Errno::ESTALE);
            }
            other => other.map_err(|error| refused(path, "attach", &error))?.attached,
        };
        if attached.version != postern_edl::VERSION {
            [socket, bells[0], bells[1], bells[2]].into_iter().for_each(files::close_internal);
            return Err(refused(path, "attach", &CallError::Refused(OTHER_VERSION)));
        }
        *session = Some(Session { number: attached.session, token: attached.token });
        drop(session);
        let discards = attached.features & postern_edl::FEATURE_DISCARD != 0;
        let (control, told) = (Lock::new(control), AtomicBool::new(false));
        let leases = AtomicU64::new(0);
        Ok(Self { lane, discards, control, socket, bells, told, leases })
    }

    /// Opens a host file by its name at the daemon, with flags of `postern_open`.
    ///
    /// # Errors
    /// The daemon's errno, or `EIO` if it broke the protocol.
    pub fn open(&self, name: &str, flags: u32) -> Result<PosternFile, Errno> {
        let request = PosternOpenRequest { name: name.into(), flags };
        match self.control.lock().postern_open(&request) {
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
        match self.control.lock().postern_create(&request) {
            Ok(reply) => Ok(reply.file),
            Err(CallError::Refused(errno)) => Err(Errno(i32::try_from(errno).unwrap_or(5))),
            Err(error) => Err(refused(name, "create", &error)),
        }
    }

    /// Removes a host file from a directory of the daemon.
    pub fn remove(&self, name: &str) {
        // What cannot be removed stays: no name leads to it, and the next opening of the
        // directory tries again.
        let _ = self.control.lock().postern_remove(&PosternRemoveRequest { name: name.into() });
    }

    /// Ids of the host files in a directory of the daemon: a page of those above `after`, each of
    /// 32 hexadecimal digits; empty at the end.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn list(&self, name: &str, after: &str) -> Result<Vec<u8>, Errno> {
        const ROOM: u64 = 32 * 4096;
        let request = PosternListRequest { name: name.into(), after: after.into(), capacity: ROOM };
        match self.control.lock().postern_list(&request) {
            Ok(reply) => Ok(reply.ids),
            Err(CallError::Refused(errno)) => Err(Errno(i32::try_from(errno).unwrap_or(5))),
            Err(error) => Err(refused(name, "list", &error)),
        }
    }

    /// Gives a host file back.
    pub fn close(&self, handle: u32) {
        // A daemon that refuses or has gone: nothing is left to give back.
        let _ = self.control.lock().postern_close(&PosternCloseRequest { handle });
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
        match self.control.lock().postern_lease(&PosternLeaseRequest { first }) {
            Ok(reply) => Ok(Some(reply.lease)),
            Err(CallError::Refused(_)) => Ok(None),
            Err(error) => Err(refused("the daemon", "lease", &error)),
        }
    }

    /// Keeps a lease that another program asks for.
    pub fn keep(&self, handle: u32) {
        // A daemon that refuses it takes the lease away, and says so.
        let _ = self.control.lock().postern_keep(&PosternKeepRequest { handle });
    }

    /// Doorbells A (driver) and B (service) and the control socket: what sleepers watch.
    #[must_use]
    pub fn bells(&self) -> [i32; 3] {
        [self.bells[1], self.bells[2], self.socket]
    }

    /// The control connection.
    #[must_use]
    pub fn socket(&self) -> i32 {
        self.socket
    }

    /// All descriptors, to be closed by a forked child.
    #[must_use]
    pub fn descriptors(&self) -> [i32; 4] {
        [self.bells[0], self.bells[1], self.bells[2], self.socket]
    }

    /// Ends all requests if the daemon has hung up, and says once why a lane is poisoned.
    pub fn check_daemon(&self) {
        let mut poll = libc::pollfd { fd: self.socket, events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: one pollfd that lives through the call; a zero timeout does not wait.
        let answer = unsafe {
            let at = (&raw mut poll) as usize;
            sys::syscall6(libc::SYS_poll, at, 1, 0, 0, 0, 0)
        };
        let gone = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        if answer > 0 && poll.revents & gone != 0 {
            self.lane.poison(HostFault::DaemonGone);
        }
        if let Some(fault) = self.lane.fault()
            && !self.told.swap(true, Ordering::Relaxed)
        {
            message::say(&format!("{fault}: requests end with EIO; start the program again"));
        }
    }
}

fn refused(what: &str, call: &str, error: &CallError<Errno>) -> Errno {
    let why = match error {
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
    };
    message::say(&format!("{what}: {call}: {why}"));
    Errno::EIO
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

fn map(memory: i32, bytes: usize) -> Result<SharedWords, Errno> {
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
    // SAFETY: 1. Mapped read-write above, never unmapped while the process lives, and the file is
    //    sealed against shrinking. 2. Nobody else holds a reference into it.
    unsafe { SharedWords::new(base as *mut u8, bytes, |_, _| true) }.map_err(|_| Errno::EINVAL)
}
