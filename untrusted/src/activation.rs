//! Started by a service manager that holds the listening socket, as systemd does: programs connect
//! to it whether the daemon is there or not, and none is refused while it starts again.
//!
//! Follows sd_listen_fds(3) and sd_notify(3).

use std::ffi::OsStr;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::problem::Problem;

/// The first descriptor that is handed over.
const FIRST: i32 = 3;

/// It was taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The listening socket that this process was started with; `None` if with none. Once: from then on
/// it is the caller's.
///
/// # Errors
/// It is not the one socket that posternd listens on.
pub fn inherited(shown: &Path) -> Result<Option<OwnedFd>, Problem> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let count = number("LISTEN_FDS").unwrap_or_default();
    // Of a parent, which has taken them.
    if number("LISTEN_PID") != Some(std::process::id()) || count == 0 {
        return Ok(None);
    }
    let wrong = |what: &str| {
        let remedy =
            "hand over one socket: ListenSequentialPacket=PATH, of the unit posternd.socket";
        Problem::socket(format_args!("started with {what}"), shown.display(), remedy)
    };
    if count != 1 {
        return Err(wrong("more than one socket"));
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(wrong("a socket that is in use"));
    }
    // SAFETY: 1. Whoever set LISTEN_PID for this process passed descriptor 3 for it to own. 2. It is
    //    taken once. If it is not open, the checks fail, and closing it fails unnoticed.
    let fd = unsafe {
        if libc::fcntl(FIRST, libc::F_GETFD) < 0 {
            return Err(wrong("no descriptor 3, though LISTEN_FDS says so"));
        }
        OwnedFd::from_raw_fd(FIRST)
    };
    let listens = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&fd) == Ok(SocketType::SEQPACKET)
        && sockopt::socket_acceptconn(&fd) == Ok(true);
    if !listens {
        return Err(wrong("something else than a listening SOCK_SEQPACKET socket"));
    }
    fcntl_getfd(&fd)
        .and_then(|flags| fcntl_setfd(&fd, flags | FdFlags::CLOEXEC))
        .map_err(|e| wrong(&format!("a socket that can not be kept from other programs ({e})")))?;
    Ok(Some(fd))
}

/// Where the service manager wants to hear that the daemon is ready, if anywhere. Connected, for
/// later the daemon makes no connection.
#[derive(Debug)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Whoever `NOTIFY_SOCKET` names.
    #[must_use]
    pub fn connect() -> Self {
        Self(std::env::var_os("NOTIFY_SOCKET").and_then(|name| connect(&name).ok()))
    }

    /// Says that the daemon serves.
    pub fn ready(&self) {
        if let Some(socket) = &self.0 {
            // A manager that does not listen learns it otherwise, or ends the daemon.
            let _ = socket.send(b"READY=1");
        }
    }
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
