//! The usercalls: numbers, arguments, answers.
//!
//! Holds: every number, argument and address is the enclave's claim; a call that makes no sense is
//! answered with an error, or ends the enclave where the interface has no error to give.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    backend::Backend,
    daemon::Daemon,
    events::{EVENTS, Inbox, Inboxes, NoEvent},
    memory::{Memory, NotYours},
    streams::Streams,
};

/// What a call answers: two registers.
pub type Answer = (u64, u64);

/// What becomes of a thread that made a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It goes on with this answer.
    Return(Answer),
    /// The program is over.
    Exit {
        /// Whether it panicked.
        panic: bool,
    },
    /// It made a call that there is not, or one that it may not make.
    Violation,
}

/// The most bytes moved by one call.
const MOST: usize = 1 << 20;

const INVALID_INPUT: u64 = 0x16;
const WOULD_BLOCK: u64 = 0x0b;
const TIMED_OUT: u64 = 0x6e;
const OTHER: u64 = 0x3fff_ffff;

/// What calls are served with.
pub struct Calls {
    /// Memory outside of the enclave.
    pub memory: Memory,
    streams: Streams,
    /// What was sent to each thread that is running.
    pub inboxes: Arc<Inboxes>,
}

impl Calls {
    /// Calls of a program that runs in `backend`, for which there is a posternd at `daemon`, if at
    /// all.
    pub fn new(daemon: Option<PathBuf>, backend: Arc<dyn Backend>) -> Self {
        let inboxes = Arc::<Inboxes>::default();
        let daemon = Daemon::new(daemon, backend.counts_time(), inboxes.clone());
        Self { memory: Memory::default(), streams: Streams::new(daemon, backend), inboxes }
    }

    /// Serves a call of a thread. `launch` starts another one: `false` if there is none left.
    pub fn serve(
        &self,
        inbox: &Inbox,
        number: u64,
        [p1, p2, p3, p4]: [u64; 4],
        launch: impl FnOnce() -> bool,
    ) -> Next {
        Next::Return(match number {
            1 => pair(self.read(p1, p2, p3).map(|length| length as u64)),
            2 => alone(self.read_alloc(p1, p2)),
            3 => pair(self.write(p1, p2, p3).map(|length| length as u64)),
            4 => alone(self.streams.flush(p1)),
            5 => {
                self.streams.close(p1);
                (0, 0)
            }
            6 => pair(self.bind(p1, p2, p3)),
            7 => pair(self.accept(p1, p2, p3)),
            8 => pair(self.connect(p1, p2, p3, p4)),
            9 => (if launch() { 0 } else { WOULD_BLOCK }, 0),
            10 => return Next::Exit { panic: p1 != 0 },
            11 => match inbox.wait(p1, p2) {
                Ok(events) => (0, events),
                Err(NoEvent::WouldBlock) => (WOULD_BLOCK, 0),
                Err(NoEvent::TimedOut) => (TIMED_OUT, 0),
                Err(NoEvent::Invalid) => (INVALID_INPUT, 0),
            },
            12 => alone(self.send(p1, p2)),
            13 => (now(), 0),
            14 => match (usize::try_from(p1), usize::try_from(p2)) {
                (Ok(size), Ok(alignment)) => {
                    pair(self.memory.allocate(size, alignment).map_err(|NotYours| no_memory()))
                }
                _ => (OTHER, 0),
            },
            15 => match self.memory.free(p1) {
                // There is no error to answer; memory of no bytes has no block to give back.
                Ok(()) => (0, 0),
                Err(NotYours) if p2 == 0 => (0, 0),
                Err(NotYours) => return Next::Violation,
            },
            16 => (INVALID_INPUT, 0), // Queues of calls: not served.
            _ => return Next::Violation,
        })
    }

    fn read(&self, stream: u64, address: u64, length: u64) -> io::Result<usize> {
        let length = limited(length);
        self.memory.check(address, length).map_err(not_yours)?;
        let mut bytes = vec![0; length];
        let got = self.streams.read(stream, &mut bytes)?;
        self.memory.write(address, &bytes[..got]).map_err(not_yours)?;
        Ok(got)
    }

    fn read_alloc(&self, stream: u64, descriptor: u64) -> io::Result<()> {
        const AT_ONCE: usize = 8192;
        self.memory.check(descriptor, 16).map_err(not_yours)?;
        let mut bytes = vec![0; AT_ONCE];
        let got = self.streams.read(stream, &mut bytes)?;
        self.memory.give(descriptor, &bytes[..got]).map_err(not_yours)
    }

    fn write(&self, stream: u64, address: u64, length: u64) -> io::Result<usize> {
        let bytes = self.memory.read(address, limited(length)).map_err(not_yours)?;
        self.streams.write(stream, &bytes)
    }

    fn text(&self, address: u64, length: u64) -> io::Result<String> {
        const LONGEST: u64 = 4096;
        if length > LONGEST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = self.memory.read(address, limited(length)).map_err(not_yours)?;
        String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    /// Writes a text to the descriptor that the enclave gave for it, if it gave one.
    fn answer(&self, descriptor: u64, text: &str) -> io::Result<()> {
        if descriptor == 0 {
            return Ok(());
        }
        self.memory.give(descriptor, text.as_bytes()).map_err(not_yours)
    }

    fn bind(&self, address: u64, length: u64, local_to: u64) -> io::Result<u64> {
        let (number, local) = self.streams.bind(&self.text(address, length)?)?;
        self.answer(local_to, &local)?;
        Ok(number)
    }

    fn accept(&self, stream: u64, local_to: u64, peer_to: u64) -> io::Result<u64> {
        let (number, local, peer) = self.streams.accept(stream)?;
        self.answer(local_to, &local)?;
        self.answer(peer_to, &peer)?;
        Ok(number)
    }

    fn connect(&self, address: u64, length: u64, local_to: u64, peer_to: u64) -> io::Result<u64> {
        let (number, local, peer) = self.streams.connect(&self.text(address, length)?)?;
        self.answer(local_to, &local)?;
        self.answer(peer_to, &peer)?;
        Ok(number)
    }

    /// Sends events to the thread of this control structure, or to all.
    fn send(&self, events: u64, tcs: u64) -> io::Result<()> {
        if events & !EVENTS != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = match tcs {
            0 => {
                self.inboxes.send_to_all(events);
                true
            }
            one => self.inboxes.send(events, one),
        };
        if sent { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

fn limited(length: u64) -> usize {
    usize::try_from(length).unwrap_or(MOST).min(MOST)
}

fn not_yours(_: NotYours) -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

fn no_memory() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}

/// Nanoseconds since 1970, by the host's clock.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn pair(result: io::Result<u64>) -> Answer {
    match result {
        Ok(value) => (0, value),
        Err(error) => (code(&error), 0),
    }
}

fn alone(result: io::Result<()>) -> Answer {
    (result.map_or_else(|error| code(&error), |()| 0), 0)
}

/// The interface's number for an error; those of Linux where it has them.
fn code(error: &io::Error) -> u64 {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::PermissionDenied => 0x01,
        Kind::NotFound => 0x02,
        Kind::Interrupted => 0x04,
        Kind::WouldBlock => WOULD_BLOCK,
        Kind::AlreadyExists => 0x11,
        Kind::InvalidInput => INVALID_INPUT,
        Kind::BrokenPipe => 0x20,
        Kind::AddrInUse => 0x62,
        Kind::AddrNotAvailable => 0x63,
        Kind::ConnectionAborted => 0x67,
        Kind::ConnectionReset => 0x68,
        Kind::NotConnected => 0x6b,
        Kind::TimedOut => TIMED_OUT,
        Kind::ConnectionRefused => 0x6f,
        Kind::InvalidData => 0x2000_0000,
        Kind::WriteZero => 0x2000_0001,
        Kind::UnexpectedEof => 0x2000_0002,
        _ => OTHER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sgx_emu::{Counts, EnterError, Exit, Registers};

    /// An enclave that nobody enters, and that was left twice to wait.
    struct Nothing;

    impl Backend for Nothing {
        fn name(&self) -> &'static str {
            "nothing"
        }

        fn base(&self) -> u64 {
            0
        }

        fn size(&self) -> u64 {
            0
        }

        fn threads(&self) -> Vec<u64> {
            Vec::new()
        }

        fn enter(&self, _: usize, _: Registers) -> Result<Exit, EnterError> {
            Err(EnterError::NoThread)
        }

        fn counts(&self) -> Counts {
            let mut counts = Counts::default();
            counts.exits[11] = 2;
            counts
        }
    }

    fn calls() -> Calls {
        Calls::new(None, Arc::new(Nothing))
    }

    #[test]
    fn a_stream_tells_what_the_enclave_was_left_for() {
        let calls = calls();
        let (stream, ..) = calls.streams.connect("postern-exits").unwrap();
        let mut bytes = [0; 64];
        let length = calls.streams.read(stream, &mut bytes).unwrap();
        assert_eq!(bytes[..length], *b"wait 2");
    }

    fn call(calls: &Calls, number: u64, parameters: [u64; 4]) -> Next {
        calls.serve(&Inbox::default(), number, parameters, || false)
    }

    #[test]
    fn addresses_that_were_not_allocated_are_refused_by_every_call() {
        let calls = calls();
        let here = 0x1000;
        for (number, parameters) in [
            (1, [0, here, 16, 0]),
            (2, [0, here, 0, 0]),
            (3, [1, here, 16, 0]),
            (3, [1, here, u64::MAX, 0]),
            (6, [here, 9, 0, 0]),
            (8, [here, u64::MAX, 0, 0]),
            (12, [1 << 40, 0, 0, 0]),
            (12, [4, here, 0, 0]),
        ] {
            assert_eq!(
                call(&calls, number, parameters),
                Next::Return((INVALID_INPUT, 0)),
                "{number}"
            );
        }
        assert_eq!(call(&calls, 15, [here, 1, 1, 0]), Next::Violation);
    }

    #[test]
    fn unknown_calls_end_the_enclave() {
        for number in [0, 17, u64::MAX] {
            assert_eq!(call(&calls(), number, [0; 4]), Next::Violation);
        }
    }

    #[test]
    fn a_call_that_finds_no_thread_left_says_so() {
        assert_eq!(call(&calls(), 9, [0; 4]), Next::Return((WOULD_BLOCK, 0)));
    }

    #[test]
    fn allocated_memory_is_aligned_and_given_back_once() {
        let calls = calls();
        let Next::Return((0, address)) = call(&calls, 14, [100, 4096, 0, 0]) else {
            panic!("no memory")
        };
        assert_eq!(address % 4096, 0);
        assert_eq!(call(&calls, 15, [address, 100, 4096, 0]), Next::Return((0, 0)));
        assert_eq!(call(&calls, 15, [address, 100, 4096, 0]), Next::Violation);
    }
}
