//! Started by a service manager that holds the listening socket, as systemd does: programs connect
//! to it whether the daemon is there or not, and none is refused while it starts again. It may also
//! keep descriptors from one process to the next.
//!
//! Follows sd_listen_fds(3), sd_notify(3) and sd_pid_notify_with_fds(3).

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, RecvFlags, SocketType, sockopt};

use crate::passing;
use crate::probes::kept::NAME;
use crate::problem::Problem;

/// The first descriptor that is handed over.
const FIRST: i32 = 3;

/// Longest wait for a manager to hear.
const PATIENCE: Duration = Duration::from_secs(2);

/// It was taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// What a service manager started this process with.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The listening socket.
    pub listener: Option<OwnedFd>,
    /// What the process before had it keep ([`Manager::keep`]) under [`NAME`].
    pub kept: Vec<OwnedFd>,
}

/// What this process was started with. Once: from then on it is the caller's.
///
/// # Errors
/// Beside what was kept it is not the one socket that posternd listens on.
pub fn inherited(shown: &Path) -> Result<Inherited, Problem> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let count = number("LISTEN_FDS").unwrap_or_default();
    // Of a parent, which has taken them.
    if number("LISTEN_PID") != Some(std::process::id()) || count == 0 {
        return Ok(Inherited::default());
    }
    let wrong = |what: &str| {
        let remedy =
            "hand over one socket: ListenSequentialPacket=PATH, of the unit posternd.socket";
        Problem::socket(format_args!("started with {what}"), shown.display(), remedy)
    };
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let all: Vec<_> =
        (FIRST..).zip(0..count).map(|(fd, _)| (fd, names.next() == Some(NAME))).collect();
    if all.iter().filter(|(_, kept)| !kept).count() > 1 {
        return Err(wrong("more than one socket"));
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(wrong("a socket that is in use"));
    }
    let mut inherited = Inherited::default();
    for (fd, kept) in all {
        // SAFETY: 1. Whoever set LISTEN_PID for this process passed this descriptor for it to own.
        //    2. It is taken once. If it is not open, the checks fail, and closing it fails unnoticed.
        let fd = unsafe {
            if libc::fcntl(fd, libc::F_GETFD) < 0 {
                return Err(wrong(&format!("no descriptor {fd}, though LISTEN_FDS says so")));
            }
            OwnedFd::from_raw_fd(fd)
        };
        fcntl_getfd(&fd).and_then(|flags| fcntl_setfd(&fd, flags | FdFlags::CLOEXEC)).map_err(
            |e| wrong(&format!("a socket that can not be kept from other programs ({e})")),
        )?;
        if kept {
            inherited.kept.push(fd);
        } else if listens(&fd) {
            inherited.listener = Some(fd);
        } else {
            return Err(wrong("something else than a listening SOCK_SEQPACKET socket"));
        }
    }
    Ok(inherited)
}

fn listens(fd: &OwnedFd) -> bool {
    sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_acceptconn(fd) == Ok(true)
}

/// Who started the daemon and wants to hear of it, if anybody. Connected, for later the daemon makes
/// no connection.
#[derive(Debug, Default)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Whoever `NOTIFY_SOCKET` names; else the other end of standard input, if that is a datagram
    /// socket: `postern run`, which hears the same and gives back what it kept over that socket.
    #[must_use]
    pub fn connect() -> Self {
        let socket = match std::env::var_os("NOTIFY_SOCKET") {
            Some(name) => connect(&name),
            None => launcher(),
        };
        let socket = socket.ok().filter(|socket| {
            // One that does not read must not keep the daemon from serving.
            socket.set_write_timeout(Some(PATIENCE)).is_ok()
        });
        Self(socket)
    }

    /// Whether there is one.
    #[must_use]
    pub const fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// Says that the daemon serves.
    pub fn ready(&self) {
        if let Some(socket) = &self.0 {
            // A manager that does not listen learns it otherwise, or ends the daemon.
            let _ = socket.send(b"READY=1");
        }
    }

    /// Has the manager keep these open under `name`, for the process that it starts next.
    ///
    /// # Errors
    /// As sendmsg(2). That a manager keeps none is not told.
    pub fn keep(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let Some(socket) = &self.0 else { return Ok(()) };
        // It shall not look at them: to poll(2) a map is always broken.
        let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        passing::send(socket, text.as_bytes(), descriptors)
    }

    /// Has the manager close what it keeps under `name`.
    pub fn forget(&self, name: &str) {
        if let Some(socket) = &self.0 {
            let _ = socket.send(format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes());
        }
    }

    /// What `postern run` kept under `name` of the daemon before.
    #[must_use]
    pub fn given_back(&self, name: &str) -> Vec<OwnedFd> {
        let Some(socket) = &self.0 else { return Vec::new() };
        match passing::receive(socket, RecvFlags::DONTWAIT) {
            Ok((text, descriptors)) if text == format!("FDNAME={name}").as_bytes() => descriptors,
            _ => Vec::new(),
        }
    }
}

fn launcher() -> std::io::Result<UnixDatagram> {
    let input = rustix::stdio::stdin();
    if sockopt::socket_domain(input)? != AddressFamily::UNIX
        || sockopt::socket_type(input)? != SocketType::DGRAM
    {
        return Err(std::io::ErrorKind::NotConnected.into());
    }
    Ok(input.try_clone_to_owned()?.into())
}

fn connect(name: &OsStr) -> std::io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
