//! The control connection to the daemon: one request, one reply, over a seqpacket socket.
//!
//! Carries the calls of `postern.edl`. The daemon is not trusted: replies are bounded and decoded
//! strictly by the generated code. A connection that breaks stays broken until it becomes one to
//! another daemon.
#![allow(unsafe_code)]

use core::mem::{size_of, zeroed};

use postern_edl::calls::Carrier;
use postern_trusted::errno::Errno;

use crate::sys;

/// Largest reply taken.
const REPLY_BYTES: usize = 256 << 10;
/// Most descriptors sent beside a request.
const DESCRIPTORS: usize = 4;

/// A connection to the daemon.
pub struct Connection {
    socket: i32,
    /// Sent with the next request, then forgotten (the caller still owns them).
    beside: Option<[i32; DESCRIPTORS]>,
}

impl Connection {
    /// Connects to the daemon's socket at `path`.
    ///
    /// # Errors
    /// What socket(2) or connect(2) say; `ENAMETOOLONG` for a path that no socket can have.
    pub fn open(path: &[u8]) -> Result<Self, Errno> {
        // SAFETY: all-zero is a valid sockaddr_un.
        let mut address: libc::sockaddr_un = unsafe { zeroed() };
        address.sun_family = libc::AF_UNIX as u16;
        if path.len() >= address.sun_path.len() {
            return Err(Errno::ENAMETOOLONG);
        }
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = from.cast_signed();
        }
        let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as usize;
        // SAFETY: socket takes no pointers.
        let socket = sys::check(unsafe {
            sys::syscall6(libc::SYS_socket, libc::AF_UNIX as usize, kind, 0, 0, 0, 0)
        })?;
        let length = size_of::<libc::sa_family_t>() + path.len() + 1;
        let at = (&raw const address) as usize;
        // SAFETY: `address` is valid for `length` bytes during the call.
        let answer =
            sys::check(unsafe { sys::syscall6(libc::SYS_connect, socket, at, length, 0, 0, 0) });
        let connection =
            Self { socket: i32::try_from(socket).map_err(|_| Errno::EMFILE)?, beside: None };
        answer?;
        Ok(connection)
    }

    /// The socket's descriptor, for [`crate::files::protect_internal`]; replaced by `replacement`.
    pub fn move_descriptor(&mut self, replace: impl FnOnce(i32) -> i32) {
        self.socket = replace(self.socket);
    }

    /// The socket's descriptor.
    #[must_use]
    pub fn descriptor(&self) -> i32 {
        self.socket
    }

    /// Is connected to what `other` is from now on, under the descriptor that it has.
    ///
    /// # Errors
    /// What dup3(2) says.
    pub fn become_of(&self, other: &Self) -> Result<(), Errno> {
        sys::dup3(other.socket, self.socket, libc::O_CLOEXEC).map(drop)
    }

    /// Sends `descriptors` beside the next request.
    pub fn send_beside(&mut self, descriptors: [i32; DESCRIPTORS]) {
        self.beside = Some(descriptors);
    }
}

impl Carrier for Connection {
    type Error = Errno;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        send(self.socket, request, self.beside.take())?;
        reply.clear();
        reply.resize(REPLY_BYTES, 0);
        let length = loop {
            let flags = 0;
            // SAFETY: `reply` is valid for its length during the call.
            let answer = sys::check(unsafe {
                sys::syscall6(
                    libc::SYS_recvfrom,
                    self.socket as usize,
                    reply.as_mut_ptr() as usize,
                    REPLY_BYTES,
                    flags,
                    0,
                    0,
                )
            });
            match answer {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        reply.truncate(length);
        // Zero bytes: the daemon hung up.
        if length == 0 { Err(Errno::ECONNRESET) } else { Ok(()) }
    }
}

/// Room for one SCM_RIGHTS message of `DESCRIPTORS` descriptors.
#[repr(C, align(8))]
struct Rights {
    header: libc::cmsghdr,
    descriptors: [i32; DESCRIPTORS],
}

fn send(socket: i32, request: &[u8], beside: Option<[i32; DESCRIPTORS]>) -> Result<(), Errno> {
    // SAFETY: all-zero is a valid cmsghdr and msghdr.
    let (mut rights, mut message): (Rights, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
    let mut part =
        libc::iovec { iov_base: request.as_ptr().cast_mut().cast(), iov_len: request.len() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(descriptors) = beside {
        rights.header.cmsg_len = size_of::<Rights>();
        rights.header.cmsg_level = libc::SOL_SOCKET;
        rights.header.cmsg_type = libc::SCM_RIGHTS;
        rights.descriptors = descriptors;
        message.msg_control = (&raw mut rights).cast();
        message.msg_controllen = size_of::<Rights>();
    }
    let at = (&raw const message) as usize;
    loop {
        // SAFETY: `message` and all it points to live through the call.
        let answer = sys::check(unsafe {
            let flags = libc::MSG_NOSIGNAL as usize;
            sys::syscall6(libc::SYS_sendmsg, socket as usize, at, flags, 0, 0, 0)
        });
        match answer {
            Err(Errno::EINTR) => {}
            Ok(sent) if sent == request.len() => return Ok(()),
            Ok(_) => return Err(Errno::EIO),
            Err(errno) => return Err(errno),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: our own descriptor, not used again.
        unsafe { sys::syscall6(libc::SYS_close, self.socket as usize, 0, 0, 0, 0, 0) };
    }
}
