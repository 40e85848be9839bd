//! The control socket: Unix SOCK_SEQPACKET, one message = one request or one reply.
//!
//! Holds: only the daemon's own user and root get past [`may_connect`]; a living daemon's socket is
//! never replaced; descriptors that come with a message are closed unless the call takes them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::problem::Problem;

/// Descriptors that may come with one message.
pub const MAX_DESCRIPTORS: usize = 4;
/// Longest request, bytes.
pub const MAX_REQUEST: usize = 8192;

/// Whether a peer with this user id may use the socket.
#[must_use]
pub const fn may_connect(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == own_uid || peer_uid == 0
}

/// Has the tokio runtime around it watch a descriptor.
///
/// # Errors
/// The runtime has no room for it.
pub fn watch(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, with the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// The bound, listening socket. Its file goes when this is dropped, if it is still ours.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

fn seqpacket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    rustix::fs::lstat(path).ok().map(|s| (s.st_dev, s.st_ino))
}

impl Listener {
    /// Binds `path` with mode 0600; it is there from the moment on in which it answers. A socket
    /// file nobody listens on is replaced, without a moment in which there is none. Needs a tokio
    /// runtime around it.
    ///
    /// With `succeed` it takes the place of a daemon that listens there; answers the process that
    /// does.
    ///
    /// # Errors
    /// Somebody listens there, something else lies there, or the host refuses.
    pub fn bind(path: &Path, succeed: bool) -> Result<(Self, Option<Pid>), Problem> {
        let shown = path.display();
        let refused = |what: &str, e: Errno| {
            Problem::socket(
                format_args!("{what} ({e})"),
                path.display(),
                "name a path in a directory that exists and that this user may write",
            )
        };
        let address = SocketAddrUnix::new(path).map_err(|e| refused("not a socket path", e))?;
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        // Two daemons that start at once must not take each other's fresh socket for a stale one.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let guard = rustix::fs::open(parent, flags, Mode::empty())
            .map_err(|e| refused("socket directory can not be opened", e))?;
        rustix::fs::flock(&guard, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Problem::socket("another daemon starts in this directory", shown, "start again")
        })?;
        let mut flags = RenameFlags::NOREPLACE;
        let mut before = None;
        if let Ok(stat) = rustix::fs::lstat(path) {
            use rustix::fs::FileType;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
                return Err(Problem::socket(
                    "something that is no socket lies here",
                    path.display(),
                    "move it away or choose another --socket",
                ));
            }
            let probe = seqpacket().map_err(|e| refused("no socket to be had", e))?;
            match rustix::net::connect(&probe, &address) {
                Err(Errno::CONNREFUSED) => flags = RenameFlags::empty(),
                Err(Errno::NOENT) => {}
                Ok(()) if succeed => {
                    let peer = peer_credentials(&probe)
                        .map_err(|e| refused("who listens here can not be seen", e))?;
                    if !is_one_of_us(peer.pid) {
                        return Err(Problem::socket(
                            format_args!("process {} made this socket, no posternd", peer.pid),
                            path.display(),
                            "of a service manager's, restart the service instead",
                        ));
                    }
                    (flags, before) = (RenameFlags::empty(), Pid::from_raw(peer.pid));
                }
                // Connected, its queue is full, or it is of another kind: somebody is there.
                _ => {
                    return Err(Problem::socket(
                        "another program listens here",
                        path.display(),
                        "stop it, take its place with --succeed, or choose another --socket",
                    ));
                }
            }
        }
        let fd = seqpacket().map_err(|e| refused("no socket to be had", e))?;
        // Under a name of its own first: whoever sees `path` finds it listening. By way of the
        // directory's descriptor, for an address holds 108 bytes at most.
        let name = format!(".postern-{}", std::process::id());
        let _ = rustix::fs::unlinkat(&guard, &name, AtFlags::empty());
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", guard.as_raw_fd()))
            .map_err(|e| refused("not a socket path", e))?;
        rustix::net::bind(&fd, &address).map_err(|e| refused("socket can not be bound", e))?;
        let mode = Mode::RUSR | Mode::WUSR;
        let placed = rustix::fs::chmodat(&guard, &name, mode, AtFlags::empty())
            .map_err(|e| refused("socket's mode can not be set", e))
            .and_then(|()| {
                rustix::net::listen(&fd, 64).map_err(|e| refused("socket can not listen", e))
            })
            .and_then(|()| {
                rustix::fs::renameat_with(&guard, &name, CWD, path, flags)
                    .map_err(|e| refused("socket can not be put in place", e))
            });
        if let Err(problem) = placed {
            let _ = rustix::fs::unlinkat(&guard, &name, AtFlags::empty());
            return Err(problem);
        }
        let identity = identity(path);
        let fd = watch(fd, Interest::READABLE).map_err(|e| {
            Problem::socket(
                format_args!("socket can not be watched ({e})"),
                path.display(),
                "raise the limit of open files",
            )
        })?;
        Ok((Self { fd, path: path.to_owned(), identity }, before))
    }

    /// Listens on a socket that was handed over, and stays where it is when this is dropped: whoever
    /// connects meanwhile waits for the next daemon. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// `succeed` is not the way to take such a socket over; or the runtime can not watch it.
    pub fn take(fd: OwnedFd, path: &Path, succeed: bool) -> Result<Self, Problem> {
        if succeed {
            return Err(Problem::socket(
                "--succeed with a socket that the service manager holds",
                path.display(),
                "restart the service: its programs wait meanwhile",
            ));
        }
        let unfit = |e: std::io::Error| {
            Problem::socket(
                format_args!("socket can not be watched ({e})"),
                path.display(),
                "raise the limit of open files",
            )
        };
        rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(|e| unfit(e.into()))?;
        let fd = watch(fd, Interest::READABLE).map_err(unfit)?;
        Ok(Self { fd, path: path.to_owned(), identity: None })
    }

    /// Waits for the next connection and tells the peer's user and process id.
    ///
    /// # Errors
    /// As accept4(2); the caller may go on.
    pub async fn accept(&self) -> std::io::Result<(Channel, u32, i32)> {
        loop {
            let mut guard = self.fd.readable().await?;
            let accepted = guard.try_io(|fd| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                Ok(rustix::net::accept_with(fd.get_ref(), flags)?)
            });
            if let Ok(accepted) = accepted {
                let fd = accepted?;
                let peer = peer_credentials(&fd)?;
                return Ok((Channel::new(fd)?, peer.uid, peer.pid));
            }
        }
    }
}

/// Whether a process is this program: who made a socket need not be who listens on it now.
fn is_one_of_us(pid: i32) -> bool {
    let name = |pid: &str| std::fs::read(format!("/proc/{pid}/comm")).ok();
    name("self").is_some() && name("self") == name(&pid.to_string())
}

/// SO_PEERCRED. Its process id is 0 for a peer in another namespace, which rustix's type for it can
/// not hold.
fn peer_credentials(fd: &OwnedFd) -> Result<libc::ucred, Errno> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = libc::socklen_t::try_from(size_of_val(&peer)).map_err(|_| Errno::INVAL)?;
    // SAFETY: 1. `peer` has `length` bytes, all of them integers. 2. The kernel does not keep the
    //    pointers.
    let result = unsafe {
        let place = (&raw mut peer).cast();
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            place,
            &raw mut length,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(peer)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Whoever starts next replaces it otherwise.
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// A request and the descriptors that came with it.
#[derive(Debug)]
pub struct Message {
    /// The request.
    pub bytes: Vec<u8>,
    /// Its descriptors, in order.
    pub descriptors: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    fd: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Takes a connected, nonblocking SOCK_SEQPACKET socket. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// The runtime can not watch it.
    pub fn new(fd: OwnedFd) -> std::io::Result<Self> {
        Ok(Self { fd: watch(fd, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// As connect(2).
    pub fn connect(path: &Path) -> std::io::Result<Self> {
        let fd = seqpacket()?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Self::new(fd)
    }

    /// The next message; `None` when the peer has closed. Cancelling it loses nothing.
    ///
    /// # Errors
    /// As recvmsg(2); `InvalidData` for a message longer than `most` bytes or with too many
    /// descriptors.
    pub async fn receive(&self, most: usize) -> std::io::Result<Option<Message>> {
        let mut bytes = vec![0; most];
        loop {
            let mut guard = self.fd.readable().await?;
            let received = guard.try_io(|fd| Ok(receive_now(fd.get_ref(), &mut bytes)?));
            if let Ok(received) = received {
                let Some((length, descriptors)) = received? else {
                    return Err(std::io::ErrorKind::InvalidData.into());
                };
                if length == 0 {
                    return Ok(None);
                }
                bytes.truncate(length);
                return Ok(Some(Message { bytes, descriptors }));
            }
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub async fn send(
        &self,
        bytes: &[u8],
        descriptors: &[std::os::fd::BorrowedFd<'_>],
    ) -> std::io::Result<()> {
        loop {
            let mut guard = self.fd.writable().await?;
            let sent = guard.try_io(|fd| {
                let mut space =
                    [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty()
                    && !control.push(rustix::net::SendAncillaryMessage::ScmRights(descriptors))
                {
                    return Err(std::io::ErrorKind::InvalidInput.into());
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(rustix::net::sendmsg(fd.get_ref(), &[IoSlice::new(bytes)], &mut control, flags)?)
            });
            if let Ok(sent) = sent {
                return sent.map(|_| ());
            }
        }
    }
}

/// `None`: too long, or too many descriptors (all that came are closed).
fn receive_now(fd: &OwnedFd, bytes: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(fd, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Ok(None);
    }
    Ok(Some((message.bytes, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_credentials_are_the_kernels() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = peer_credentials(&one.into()).unwrap();
        assert_eq!(u32::try_from(peer.pid), Ok(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn only_the_daemons_user_and_root_may_connect() {
        assert!(may_connect(1000, 1000));
        assert!(may_connect(0, 1000));
        assert!(!may_connect(1001, 1000));
        assert!(!may_connect(1000, 0));
        assert!(!may_connect(u32::MAX, 1000));
    }
}
