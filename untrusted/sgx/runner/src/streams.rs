//! The streams of an enclave: standard ones and TCP, by number.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

/// A stream.
enum Stream {
    Input,
    Output,
    Error,
    Tcp(TcpStream),
    Listener(TcpListener),
}

/// All streams that are open.
pub struct Streams {
    table: Mutex<Table>,
}

struct Table {
    open: BTreeMap<u64, Arc<Stream>>,
    next: u64,
}

/// The most streams that may be open at once.
const MOST: usize = 4096;

impl Default for Streams {
    fn default() -> Self {
        let standard = [Stream::Input, Stream::Output, Stream::Error];
        let open = (0..).zip(standard.map(Arc::new)).collect();
        Self { table: Mutex::new(Table { open, next: 3 }) }
    }
}

impl Streams {
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

    /// Reads what there is, at most as much as `buffer` holds.
    pub fn read(&self, number: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match &*self.get(number)? {
            Stream::Input => io::stdin().read(buffer),
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Writes as much as goes at once.
    pub fn write(&self, number: u64, bytes: &[u8]) -> io::Result<usize> {
        match &*self.get(number)? {
            Stream::Output => io::stdout().write(bytes),
            Stream::Error => io::stderr().write(bytes),
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Hands on what is buffered on this side.
    pub fn flush(&self, number: u64) -> io::Result<()> {
        match &*self.get(number)? {
            Stream::Output => io::stdout().flush(),
            _ => Ok(()),
        }
    }

    /// Closes; a number that is not open is none of the caller's.
    pub fn close(&self, number: u64) {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&number);
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
        let stream = TcpStream::connect(address)?;
        let (local, peer) = (stream.local_addr()?.to_string(), stream.peer_addr()?.to_string());
        Ok((self.add(Stream::Tcp(stream))?, local, peer))
    }
}
