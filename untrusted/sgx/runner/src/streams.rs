//! The streams of an enclave: standard ones, TCP, those to a daemon, and what the enclave was left
//! for, by number.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    backend::Backend,
    daemon::{Connection, Daemon, Opened, Port},
    exits::Exits,
};

/// A stream.
enum Stream {
    Input,
    Output,
    Error,
    Tcp(TcpStream),
    Listener(TcpListener),
    Port(Arc<Port>),
    Daemon(Arc<Connection>),
    Exits(Arc<dyn Backend>),
}

/// The address of what the enclave was left for: each read tells all of it, as of now.
const EXITS: &str = "postern-exits";

/// All streams that are open.
pub struct Streams {
    daemon: Daemon,
    backend: Arc<dyn Backend>,
    table: Mutex<Table>,
}

struct Table {
    open: BTreeMap<u64, Arc<Stream>>,
    next: u64,
}

/// The most streams that may be open at once.
const MOST: usize = 4096;

impl Streams {
    /// The standard streams, those to `daemon`, and one about `backend`.
    pub fn new(daemon: Daemon, backend: Arc<dyn Backend>) -> Self {
        let standard = [Stream::Input, Stream::Output, Stream::Error];
        let open = (0..).zip(standard.map(Arc::new)).collect();
        Self { daemon, backend, table: Mutex::new(Table { open, next: 3 }) }
    }

    fn get(&self, number: u64) -> io::Result<Arc<Stream>> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.get(&number).cloned().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn add(&self, stream: Stream) -> io::Result<u64> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.open.len() >= MOST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let number = table.next;
        table.next += 1;
        table.open.insert(number, Arc::new(stream));
        Ok(number)
    }

    fn port(&self, number: u64) -> Option<Arc<Port>> {
        match &*self.get(number).ok()? {
            Stream::Port(port) => Some(port.clone()),
            _ => None,
        }
    }

    /// Reads what there is, at most as much as `buffer` holds.
    pub fn read(&self, number: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match &*self.get(number)? {
            Stream::Input => io::stdin().read(buffer),
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Daemon(connection) => connection.receive(buffer),
            Stream::Exits(backend) => {
                let text = Exits(&backend.counts()).to_string();
                let length = text.len().min(buffer.len());
                buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
                Ok(length)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Writes as much as goes at once.
    pub fn write(&self, number: u64, bytes: &[u8]) -> io::Result<usize> {
        match &*self.get(number)? {
            Stream::Output => io::stdout().write(bytes),
            Stream::Error => io::stderr().write(bytes),
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Daemon(connection) => connection.send(bytes),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Hands on what is buffered on this side; of a stream to a daemon, see there.
    pub fn flush(&self, number: u64) -> io::Result<()> {
        match &*self.get(number)? {
            Stream::Output => io::stdout().flush(),
            Stream::Port(port) => {
                port.ring();
                Ok(())
            }
            Stream::Daemon(connection) => connection.look(),
            _ => Ok(()),
        }
    }

    /// Closes; a number that is not open is none of the caller's.
    pub fn close(&self, number: u64) {
        let closed = self.table.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&number);
        if let Some(Stream::Daemon(connection)) = closed.as_deref() {
            connection.close();
        }
    }

    /// Listens; answers the number and the address.
    pub fn bind(&self, address: &str) -> io::Result<(u64, String)> {
        let listener = TcpListener::bind(address)?;
        let local = listener.local_addr()?.to_string();
        Ok((self.add(Stream::Listener(listener))?, local))
    }

    /// Accepts; answers the number and both addresses.
    pub fn accept(&self, number: u64) -> io::Result<(u64, String, String)> {
        match &*self.get(number)? {
            Stream::Listener(listener) => {
                let (stream, peer) = listener.accept()?;
                let local = stream.local_addr()?.to_string();
                Ok((self.add(Stream::Tcp(stream))?, local, peer.to_string()))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Connects; answers the number and both addresses.
    pub fn connect(&self, address: &str) -> io::Result<(u64, String, String)> {
        if let Some(opened) = self.daemon.open(address, |number| self.port(number)) {
            return match opened? {
                Opened::Port(port, local) => {
                    Ok((self.add(Stream::Port(port))?, local, String::new()))
                }
                Opened::Connection(connection) => {
                    let number = self.add(Stream::Daemon(connection))?;
                    Ok((number, String::new(), String::new()))
                }
            };
        }
        if address == EXITS {
            let number = self.add(Stream::Exits(self.backend.clone()))?;
            return Ok((number, String::new(), String::new()));
        }
        let stream = TcpStream::connect(address)?;
        let (local, peer) = (stream.local_addr()?.to_string(), stream.peer_addr()?.to_string());
        Ok((self.add(Stream::Tcp(stream))?, local, peer))
    }
}
