//! The way to a posternd: ports, control connections and doorbells, over the usercalls of the
//! target's ABI, so that a program reaches them with its standard library unpatched.
//!
//! ```text
//! connect_stream("postern-port:BYTES")  a port of BYTES bytes: zeros in user memory, whose first
//!                                       address and that of a clock are the local address, in
//!                                       hexadecimal digits: "ADDRESS CLOCK"
//! connect_stream("postern-daemon:N")    a control connection. The first message on it hands over
//!                                       the port that is stream N: its memory and its doorbells
//! write, read                           one message of the protocol (postern.edl) each
//! flush                                 of a port: rings the daemon (postern_wake). Of a connection:
//!                                       an error if the daemon has hung up
//! wait                                  postern_sleep: event 2 (return queue not empty) when a
//!                                       doorbell rings, event 1 (usercall queue not full) when a
//!                                       daemon hangs up. Both are sent to all threads
//! close                                 gives back
//! ```
//!
//! A program that uses none of it sees nothing of it. Memory and doorbells outlive the connection:
//! a daemon that ends can have a successor, which is handed the same port.
//!
//! Holds: the daemon sees the same as of any other enclave: a sealed memfd, three eventfds and the
//! calls; of the enclave's own memory it sees nothing.

mod clock;
mod port;

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
        SocketAddrUnix, SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with,
    },
};

use crate::events::Inboxes;
use clock::Clock;
pub use port::Port;

/// The event of a doorbell.
const RUNG: u64 = 0b10;
/// The event of a daemon that has hung up.
const OVER: u64 = 0b01;

/// What a program reaches by the addresses of this module.
pub enum Opened {
    /// A port, and its local address.
    Port(Arc<Port>, String),
    /// A connection to the daemon.
    Connection(Arc<Connection>),
}

/// The daemon of an enclave.
pub struct Daemon {
    /// Its control socket.
    socket: Option<PathBuf>,
    /// The program may read the time stamp counter inside.
    counts_time: bool,
    inboxes: Arc<Inboxes>,
    clock: Mutex<Weak<Clock>>,
}

impl Daemon {
    /// The daemon that listens at `socket`, if there is to be one.
    pub fn new(socket: Option<PathBuf>, counts_time: bool, inboxes: Arc<Inboxes>) -> Self {
        Self { socket, counts_time, inboxes, clock: Mutex::default() }
    }

    /// What `address` names; `None` if it is an address of another kind. `port` finds a port by the
    /// number of its stream.
    ///
    /// # Errors
    /// `NotFound` without a daemon's socket, `ConnectionRefused` where none answers, `InvalidInput`
    /// for what makes no sense; the system's.
    pub fn open(
        &self,
        address: &str,
        port: impl FnOnce(u64) -> Option<Arc<Port>>,
    ) -> Option<io::Result<Opened>> {
        if let Some(bytes) = address.strip_prefix("postern-port:") {
            return Some(self.make_port(bytes));
        }
        let number = address.strip_prefix("postern-daemon:")?;
        let port = number.parse().ok().and_then(port);
        Some(match port {
            Some(port) => self.connect(&port).map(Opened::Connection),
            None => Err(io::ErrorKind::InvalidInput.into()),
        })
    }

    fn make_port(&self, bytes: &str) -> io::Result<Opened> {
        if self.socket.is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let bytes = bytes.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        let clock = {
            let mut known = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(clock) = known.upgrade() {
                clock
            } else {
                let made = Clock::start(self.counts_time)?;
                *known = Arc::downgrade(&made);
                made
            }
        };
        let port = Arc::new(Port::new(bytes, clock)?);
        let local = format!("{:x} {:x}", port.address(), port.clock().address());
        Ok(Opened::Port(port, local))
    }

    fn connect(&self, port: &Arc<Port>) -> io::Result<Arc<Connection>> {
        let path = self.socket.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let (port, greeted) = (port.clone(), AtomicBool::new(false));
        let closed = AtomicBool::new(false);
        let connection = Arc::new(Connection { socket, port, greeted, closed });
        let (watched, inboxes) = (connection.clone(), self.inboxes.clone());
        thread::Builder::new().name("doorbells".into()).spawn(move || watched.watch(&inboxes))?;
        Ok(connection)
    }
}

/// A control connection, with the port that it hands over.
pub struct Connection {
    socket: OwnedFd,
    port: Arc<Port>,
    /// The port was handed over.
    greeted: AtomicBool,
    /// The program has closed it.
    closed: AtomicBool,
}

impl Connection {
    /// Sends one message.
    ///
    /// # Errors
    /// The system's; `BrokenPipe` when the daemon has hung up.
    pub fn send(&self, message: &[u8]) -> io::Result<usize> {
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut beside = SendAncillaryBuffer::new(&mut room);
        let descriptors = self.port.descriptors();
        if !self.greeted.swap(true, Ordering::Relaxed)
            && !beside.push(SendAncillaryMessage::ScmRights(&descriptors))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = [io::IoSlice::new(message)];
        Ok(sendmsg(&self.socket, &parts, &mut beside, SendFlags::NOSIGNAL)?)
    }

    /// Receives one message; 0 bytes when the daemon has hung up.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                answer => return Ok(answer?.0),
            }
        }
    }

    /// Looks whether the daemon is there.
    ///
    /// # Errors
    /// `ConnectionReset` if it has hung up.
    pub fn look(&self) -> io::Result<()> {
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        poll(&mut polled, Some(&rustix::time::Timespec::default()))?;
        let hung_up = PollFlags::HUP | PollFlags::ERR;
        if polled[0].revents().intersects(hung_up) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }

    /// Ends it for the program.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // One that is not connected any more is shut down already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Hands on what rings, until the daemon hangs up or the program closes the connection.
    fn watch(&self, inboxes: &Inboxes) {
        loop {
            let [driver, service] = self.port.bells();
            let mut polled = [
                PollFd::new(driver, PollFlags::IN),
                PollFd::new(service, PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                Err(_) => break,
                Ok(_) => {}
            }
            let rings = |bell: &PollFd<'_>| bell.revents().contains(PollFlags::IN);
            let [rung_driver, rung_service] = [rings(&polled[0]), rings(&polled[1])];
            let over = polled[2].revents().intersects(PollFlags::HUP | PollFlags::ERR);
            for bell in [(driver, rung_driver), (service, rung_service)] {
                if bell.1 {
                    // Somebody else has read it: then that one hands it on.
                    let _ = { bell.0 }.read(&mut [0; 8]);
                }
            }
            if rung_driver || rung_service {
                inboxes.send_to_all(RUNG);
            }
            if over {
                break;
            }
        }
        if !self.closed.load(Ordering::Acquire) {
            inboxes.send_to_all(OVER);
        }
    }
}

/// The eventfd of a doorbell.
type Bell = File;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, bind, listen, recvmsg};

    fn port_of(opened: io::Result<Opened>) -> (Arc<Port>, String) {
        match opened.unwrap() {
            Opened::Port(port, local) => (port, local),
            Opened::Connection(_) => panic!("a connection"),
        }
    }

    #[test]
    fn addresses_of_another_kind_are_left_to_others_and_without_a_daemon_there_is_no_port() {
        let daemon = Daemon::new(None, true, Arc::default());
        assert!(daemon.open("localhost:1", |_| None).is_none());
        let refused = daemon.open("postern-port:4096", |_| None).unwrap();
        assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn ports_of_no_size_or_too_large_and_connections_without_a_port_are_refused() {
        let daemon = Daemon::new(Some("/nowhere".into()), true, Arc::default());
        for address in ["postern-port:", "postern-port:0", "postern-port:7", "postern-port:-1"] {
            assert!(daemon.open(address, |_| None).unwrap().is_err(), "{address}");
        }
        let most = format!("postern-port:{}", u64::MAX);
        assert!(daemon.open(&most, |_| None).unwrap().is_err());
        for address in ["postern-daemon:", "postern-daemon:x", "postern-daemon:99"] {
            assert!(daemon.open(address, |_| None).unwrap().is_err(), "{address}");
        }
    }

    #[test]
    fn the_first_message_hands_over_the_port_and_what_rings_and_ends_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();

        let inboxes = Arc::<Inboxes>::default();
        let inbox = inboxes.begin(0x1000);
        let daemon = Daemon::new(Some(path), true, inboxes);
        let (port, local) = port_of(daemon.open("postern-port:8192", |_| None).unwrap());
        let first = format!("{:x} ", port.address());
        assert!(local.starts_with(&first), "{local}");
        let opened = daemon.open("postern-daemon:7", |n| (n == 7).then(|| port.clone()));
        let Ok(Opened::Connection(connection)) = opened.unwrap() else { panic!("no connection") };
        let served = rustix::net::accept(&listener).unwrap();

        assert_eq!(connection.send(b"attach").unwrap(), 6);
        assert_eq!(connection.send(b"more").unwrap(), 4);
        let mut bytes = [0; 64];
        let mut got = Vec::new();
        for _ in 0..2 {
            let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut beside = RecvAncillaryBuffer::new(&mut room);
            let mut parts = [io::IoSliceMut::new(&mut bytes)];
            recvmsg(&served, &mut parts, &mut beside, RecvFlags::empty()).unwrap();
            let descriptors = beside.drain().map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(all) => all.collect::<Vec<_>>(),
                _ => Vec::new(),
            });
            got.push(descriptors.flatten().collect::<Vec<_>>());
        }
        assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), [4, 0]);
        assert_eq!(rustix::fs::fstat(&got[0][0]).unwrap().st_size, 8192);

        // The enclave rings the daemon, the daemon a driver.
        port.ring();
        assert_eq!(rustix::io::read(&got[0][1], &mut bytes).unwrap(), 8);
        rustix::io::write(&got[0][2], &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(inbox.wait(RUNG | OVER, u64::MAX), Ok(RUNG));
        connection.look().unwrap();
        drop(served);
        assert_eq!(inbox.wait(RUNG | OVER, u64::MAX), Ok(OVER));
        assert_eq!(connection.look().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
