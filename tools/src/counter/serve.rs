//! The counters of a run, served to the enclave's processes over a socket of the run's directory.
//!
//! Holds: a process is answered in the order of its requests; a slow counter holds up only those
//! who wait for it; what is no request ends the connection.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::Arc,
};

use postern_sim::freshness::{Reply, Request};
use postern_trusted::counter::{CounterError, Swapped};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
        bind, listen, recv, send, socket_with,
    },
};

use super::{Source, Trouble};

/// Connections that may wait to be taken.
const BACKLOG: i32 = 64;

/// Serves until the launcher ends.
pub struct Server;

impl Server {
    /// Begins to serve `sources` on the new socket `path`.
    ///
    /// # Errors
    /// What socket(2), bind(2) and starting a thread say.
    pub fn start(path: &Path, sources: Vec<Arc<Source>>) -> std::io::Result<()> {
        let kind = SocketType::SEQPACKET;
        let listener = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        bind(&listener, &SocketAddrUnix::new(path)?)?;
        listen(&listener, BACKLOG)?;
        let sources: Arc<[Arc<Source>]> = sources.into();
        std::thread::Builder::new().name("counters".into()).spawn(move || {
            loop {
                match accept_with(listener.as_fd(), SocketFlags::CLOEXEC) {
                    Ok(connection) => {
                        let sources = sources.clone();
                        // Without a thread the connection closes: the enclave is told.
                        let _ = std::thread::Builder::new()
                            .name("counter".into())
                            .spawn(move || serve(&connection, &sources));
                    }
                    // Of the one who connects, or of the moment.
                    Err(Errno::INTR | Errno::CONNABORTED | Errno::MFILE | Errno::NFILE) => {
                        std::thread::yield_now();
                    }
                    Err(_) => return,
                }
            }
        })?;
        Ok(())
    }
}

fn serve(connection: &OwnedFd, sources: &[Arc<Source>]) {
    // One byte more than a request has, so that a longer message is seen to be longer.
    let mut bytes = [0; Request::BYTES + 1];
    loop {
        let length = match recv(connection, &mut bytes, RecvFlags::empty()) {
            Ok((0, _)) => return,
            Ok((length, _)) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        let Some(request) = Request::decode(&bytes[..length]) else { return };
        let reply = answer(&request, sources).encode();
        if send(connection, &reply, SendFlags::NOSIGNAL) != Ok(reply.len()) {
            return;
        }
    }
}

fn answer(request: &Request, sources: &[Arc<Source>]) -> Reply {
    let source = usize::try_from(request.index).ok().and_then(|index| sources.get(index));
    let result = match (source, request.swap) {
        (None, _) => Err(Trouble::new(CounterError::Refused, "no such counter in this run")),
        (Some(source), None) => source.provider.load().map(Swapped::Lost),
        (Some(source), Some((old, new))) => source.provider.swap(old, new),
    };
    match result {
        Ok(swapped) => Reply { id: request.id, result: Ok(swapped), text: String::new() },
        Err(Trouble { error, text }) => Reply { id: request.id, result: Err(error), text },
    }
}
