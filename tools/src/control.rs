//! The control connection to a daemon: one request, one reply, over a Unix seqpacket socket.
//!
//! Used only to ask for statistics and measurements. The daemon is not trusted: a reply is bounded, and decoded
//! strictly by the generated code.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use postern_edl::{
    calls::{Enclave, PosternMeasuredRequest, PosternStatsRequest},
    wire::{CallError, Carrier},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
        recv, send, socket_with,
    },
};

use crate::error::{Exit, Failure};

/// Room for the statistics; a report has some ten kilobytes.
const STATS_BYTES: usize = 128 << 10;
/// Room for a reply: the statistics and the words around them.
const REPLY_BYTES: usize = STATS_BYTES + 4096;
/// Longest wait for a reply, seconds.
const PATIENCE: i64 = 10;

/// A connection to the daemon.
pub struct Control {
    enclave: Enclave<Connection>,
    path: PathBuf,
}

impl Control {
    /// Connects to the daemon that listens on `path`.
    ///
    /// # Errors
    /// [`Exit::NoDaemon`] if none does.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let open = || {
            let address = SocketAddrUnix::new(path)?;
            let kind = SocketType::SEQPACKET;
            let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
            connect(&socket, &address)?;
            Ok(Connection(socket))
        };
        let connection = open().map_err(|errno: Errno| {
            Failure::new(
                Exit::NoDaemon,
                format_args!("no daemon answers ({errno})"),
                path.display(),
                "start posternd with --socket there, or correct the path",
            )
        })?;
        Ok(Self { enclave: Enclave(connection), path: path.to_owned() })
    }

    /// The daemon's statistics as JSON text.
    ///
    /// # Errors
    /// [`Exit::NoDaemon`] if it does not answer, or not as posternd does.
    pub fn stats(&mut self) -> Result<Vec<u8>, Failure> {
        let request = PosternStatsRequest { capacity: STATS_BYTES as u64 };
        let reply = self.enclave.postern_stats(&request).map_err(|error| self.silent(error))?;
        self.whole(reply.text, reply.length)
    }

    /// A page of what the daemon has measured, as JSON text: `what` is one of `MEASURED_*`, the page
    /// begins with item `first`; `wish` is what further requests are to be recorded: nanoseconds
    /// that they took, and one in so many.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub fn measured(
        &mut self,
        what: u32,
        first: u64,
        wish: (u64, u64),
    ) -> Result<Vec<u8>, Failure> {
        let (least_ns, one_in) = wish;
        let capacity = STATS_BYTES as u64;
        let request = PosternMeasuredRequest { what, first, least_ns, one_in, capacity };
        let reply = self.enclave.postern_measured(&request).map_err(|error| self.silent(error))?;
        self.whole(reply.text, reply.length)
    }

    fn silent(&self, error: CallError<Errno>) -> Failure {
        match error {
            CallError::Refused(errno) => {
                self.failure(&io::Error::from_raw_os_error(errno.cast_signed()))
            }
            other => self.failure(&other),
        }
    }

    fn whole(&self, text: Vec<u8>, length: u64) -> Result<Vec<u8>, Failure> {
        if length > text.len() as u64 {
            return Err(self.failure(&format_args!("{length} bytes are too many")));
        }
        Ok(text)
    }

    fn failure(&self, why: &dyn core::fmt::Display) -> Failure {
        Failure::new(
            Exit::NoDaemon,
            format_args!("the daemon gave no statistics: {why}"),
            self.path.display(),
            "use a posternd of this version",
        )
    }
}

struct Connection(OwnedFd);

impl Carrier for Connection {
    type Error = Errno;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Errno> {
        retry(|| send(&self.0, request, SendFlags::NOSIGNAL))?;
        let limit = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        if retry(|| poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit)))? == 0 {
            return Err(Errno::TIMEDOUT);
        }
        reply.clear();
        reply.resize(REPLY_BYTES, 0);
        let (length, _) = retry(|| recv(&self.0, reply.as_mut_slice(), RecvFlags::empty()))?;
        reply.truncate(length);
        // Nothing: the daemon hung up.
        if length == 0 { Err(Errno::CONNRESET) } else { Ok(()) }
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{accept, bind, listen};

    #[test]
    fn a_path_without_a_listener_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let failure = Control::connect(&dir.path().join("none")).err().unwrap();
        assert_eq!(failure.exit, Exit::NoDaemon);
        let long = dir.path().join("x".repeat(200));
        assert_eq!(Control::connect(&long).err().unwrap().exit, Exit::NoDaemon);
    }

    #[test]
    fn a_daemon_that_answers_nonsense_or_hangs_up_is_none() {
        for answer in [&b"nonsense"[..], b""] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("sock");
            let kind = SocketType::SEQPACKET;
            let host = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
            bind(&host, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            listen(&host, 1).unwrap();
            let host = std::thread::spawn(move || {
                let peer = accept(&host).unwrap();
                let mut request = [0; 64];
                recv(&peer, &mut request, RecvFlags::empty()).unwrap();
                if !answer.is_empty() {
                    send(&peer, answer, SendFlags::empty()).unwrap();
                }
            });
            let failure = Control::connect(&path).ok().unwrap().stats().unwrap_err();
            assert_eq!(failure.exit, Exit::NoDaemon);
            host.join().unwrap();
        }
    }
}
