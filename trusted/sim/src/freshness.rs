//! The monotonic counters of a run as the enclave asks them: over a socket, from the launcher.
//!
//! The launcher holds the credentials and, for counters in the network, the TLS connection; like
//! the enclave's own processes it has the keys of the run. Real SGX has no such helper: there the
//! connection to the counter has to end inside the enclave.
//!
//! Requests and replies are single messages of a fixed form, little endian. A process sends
//! without waiting, and takes replies while it drives.
//!
//! Holds: a reply goes to the request that it names, once; when the launcher is gone every request
//! ends with an error.
#![allow(unsafe_code)]

use core::{
    future::poll_fn,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    task::{Poll, Waker},
};

use postern_trusted::{
    counter::{Answer, Counter, CounterError, Record, Swapped},
    errno::Errno,
    sync::Lock,
};

use crate::{control::Connection, message, process, sys};

/// What the enclave asks of one counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names the request within its connection.
    pub id: u64,
    /// Which counter of the run.
    pub index: u32,
    /// `None`: what does it hold? Else: change it from the first to the second.
    pub swap: Option<(Option<Record>, Record)>,
}

impl Request {
    /// Length of a message.
    pub const BYTES: usize = 16 + 2 * (8 + Record::BYTES);

    /// The message.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.index.to_le_bytes());
        if let Some((old, new)) = &self.swap {
            put_record(&mut bytes[16..], *old);
            put_record(&mut bytes[64..], Some(*new));
        }
        bytes
    }

    /// What a message says.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::BYTES {
            return None;
        }
        let mut index = [0; 4];
        index.copy_from_slice(&bytes[8..12]);
        let (old, new) = (get_record(&bytes[16..]), get_record(&bytes[64..]));
        Some(Self {
            id: number(bytes),
            index: u32::from_le_bytes(index),
            swap: new.map(|new| (old, new)),
        })
    }
}

/// What the launcher answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's.
    pub id: u64,
    /// What came out. A question of what is held is answered as a lost swap.
    pub result: Result<Swapped, CounterError>,
    /// For a failure: why, for people.
    pub text: String,
}

impl Reply {
    /// Longest message.
    pub const MOST_BYTES: usize = Self::FIXED + Self::TEXT;
    const FIXED: usize = 16 + 8 + Record::BYTES;
    const TEXT: usize = 400;

    /// The message; a long text is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::FIXED];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8] = match &self.result {
            Ok(Swapped::Done) => 0,
            Ok(Swapped::Lost(held)) => {
                put_record(&mut bytes[16..], *held);
                1
            }
            Err(CounterError::Unreachable) => 2,
            Err(CounterError::Refused) => 3,
            Err(CounterError::Malformed) => 4,
            Err(CounterError::Full) => 5,
        };
        bytes.extend(self.text.bytes().take(Self::TEXT));
        bytes
    }

    /// What a message says.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (fixed, text) = bytes.split_at_checked(Self::FIXED)?;
        let result = match fixed[8] {
            0 => Ok(Swapped::Done),
            1 => Ok(Swapped::Lost(get_record(&fixed[16..]))),
            2 => Err(CounterError::Unreachable),
            3 => Err(CounterError::Refused),
            5 => Err(CounterError::Full),
            _ => Err(CounterError::Malformed),
        };
        Some(Self { id: number(fixed), result, text: String::from_utf8_lossy(text).into_owned() })
    }
}

fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

/// A word that is 1, and the record; or zeros.
fn put_record(bytes: &mut [u8], record: Option<Record>) {
    if let Some(record) = record {
        bytes[0] = 1;
        bytes[8..8 + Record::BYTES].copy_from_slice(&record.encode());
    }
}

fn get_record(bytes: &[u8]) -> Option<Record> {
    let mut record = [0; Record::BYTES];
    record.copy_from_slice(bytes.get(8..8 + Record::BYTES)?);
    (bytes[0] == 1).then(|| Record::decode(&record))
}

struct Asked {
    id: u64,
    waker: Option<Waker>,
    reply: Option<Reply>,
}

/// One process's connection to the launcher.
pub struct CounterLink {
    socket: i32,
    /// Owns the socket.
    _connection: Connection,
    next: AtomicU64,
    asked: Lock<Vec<Asked>>,
    waiting: AtomicUsize,
    gone: AtomicBool,
}

impl CounterLink {
    /// Connects to the launcher's socket.
    ///
    /// # Errors
    /// What connect(2) says.
    pub fn connect(path: &str, keep: impl Fn(i32) -> i32) -> Result<Self, Errno> {
        let mut connection = Connection::open(path.as_bytes())?;
        connection.move_descriptor(keep);
        Ok(Self {
            socket: connection.descriptor(),
            _connection: connection,
            next: AtomicU64::new(1),
            asked: Lock::new(Vec::new()),
            waiting: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
        })
    }

    /// The socket: rings when a reply is there.
    #[must_use]
    pub fn descriptor(&self) -> i32 {
        self.socket
    }

    /// Takes the replies that are there; answers how many requests they end.
    pub fn poll(&self) -> usize {
        let mut ended = 0;
        while self.waiting.load(Ordering::Acquire) > 0 {
            let mut bytes = [0; Reply::MOST_BYTES];
            let (at, length) = (bytes.as_mut_ptr() as usize, bytes.len());
            let flags = libc::MSG_DONTWAIT as usize;
            // SAFETY: `bytes` is writable for its length during the call.
            let answer = sys::check(unsafe {
                let socket = self.socket as usize;
                sys::syscall6(libc::SYS_recvfrom, socket, at, length, flags, 0, 0)
            });
            let wakers: Vec<Waker> = match answer {
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Ok(length) if length > 0 => match Reply::decode(&bytes[..length]) {
                    Some(reply) => self.deliver(reply).into_iter().collect(),
                    None => self.fail_all(),
                },
                _ => self.fail_all(),
            };
            ended += wakers.len();
            wakers.into_iter().for_each(Waker::wake);
        }
        ended
    }

    fn deliver(&self, reply: Reply) -> Option<Waker> {
        let mut asked = self.asked.lock();
        let one = asked.iter_mut().find(|one| one.id == reply.id && one.reply.is_none())?;
        one.reply = Some(reply);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        one.waker.take()
    }

    /// The launcher is gone.
    fn fail_all(&self) -> Vec<Waker> {
        self.gone.store(true, Ordering::Release);
        let mut asked = self.asked.lock();
        let open = asked.iter_mut().filter(|one| one.reply.is_none());
        let wakers = open
            .filter_map(|one| {
                one.reply = Some(unreachable(one.id, "the launcher is gone"));
                self.waiting.fetch_sub(1, Ordering::AcqRel);
                one.waker.take()
            })
            .collect();
        drop(asked);
        wakers
    }

    async fn exchange(
        &self,
        index: u32,
        swap: Option<(Option<Record>, Record)>,
    ) -> Result<Reply, Errno> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        if self.gone.load(Ordering::Acquire) {
            return Ok(unreachable(id, "the launcher is gone"));
        }
        self.asked.lock().push(Asked { id, waker: None, reply: None });
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let message = Request { id, index, swap }.encode();
        let (at, length) = (message.as_ptr() as usize, message.len());
        let flags = libc::MSG_NOSIGNAL as usize;
        loop {
            // SAFETY: `message` is readable for its length during the call.
            let sent = sys::check(unsafe {
                let socket = self.socket as usize;
                sys::syscall6(libc::SYS_sendto, socket, at, length, flags, 0, 0)
            });
            match sent {
                Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(_) => {
                    self.fail_all().into_iter().for_each(Waker::wake);
                    break;
                }
            }
        }
        let reply = poll_fn(|cx| {
            let mut asked = self.asked.lock();
            let Some(at) = asked.iter().position(|one| one.id == id) else {
                return Poll::Ready(unreachable(id, "the request was lost"));
            };
            if asked[at].reply.is_none() {
                asked[at].waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let reply = asked.swap_remove(at).reply;
            Poll::Ready(reply.unwrap_or_else(|| unreachable(id, "the request was lost")))
        })
        .await;
        Ok(reply)
    }
}

fn unreachable(id: u64, text: &str) -> Reply {
    Reply { id, result: Err(CounterError::Unreachable), text: text.into() }
}

/// The counter of one volume of the run.
pub struct RunCounter {
    index: u32,
    /// What messages call the volume.
    path: String,
    /// The present trouble was told.
    told: AtomicBool,
}

impl RunCounter {
    /// Counter `index` of the run file, for the volume that the guest sees at `path`.
    #[must_use]
    pub fn new(index: u32, path: String) -> Self {
        Self { index, path, told: AtomicBool::new(false) }
    }

    async fn ask(&self, swap: Option<(Option<Record>, Record)>) -> Result<Swapped, CounterError> {
        let failed = |text: &str| self.tell(text);
        let link = process::current().counter_link().map_err(|errno| {
            failed(&format!("no launcher answers: {errno}"));
            CounterError::Unreachable
        })?;
        let reply = link.exchange(self.index, swap).await.map_err(|errno| {
            failed(&errno.to_string());
            CounterError::Unreachable
        })?;
        match reply.result {
            Ok(_) => self.told.store(false, Ordering::Relaxed),
            Err(_) => failed(&reply.text),
        }
        reply.result
    }

    fn tell(&self, text: &str) {
        if !self.told.swap(true, Ordering::Relaxed) {
            message::say(&format!(
                "{}: the monotonic counter gives no answer: {text}; what is written is safe \
                 against a crash, and not known to the counter",
                self.path
            ));
        }
    }
}

impl Counter for RunCounter {
    fn load(&self) -> Answer<'_, Option<Record>> {
        Box::pin(async move {
            match self.ask(None).await? {
                Swapped::Lost(held) => Ok(held),
                Swapped::Done => Err(CounterError::Malformed),
            }
        })
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        Box::pin(async move {
            let answer = self.ask(Some((old, new))).await;
            if let Ok(Swapped::Lost(held)) = answer
                && held != Some(new)
            {
                message::say(&format!(
                    "{}: another writer has moved the monotonic counter: the volume or a copy of \
                     it is in use elsewhere; this program's writes fail from now on",
                    self.path
                ));
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn record(n: u8) -> Record {
        Record { sequence: n as u64, digest: [n; 32] }
    }

    #[test]
    fn a_request_says_on_the_other_side_what_it_said_here() {
        for swap in [None, Some((None, record(3))), Some((Some(record(3)), record(4)))] {
            let request = Request { id: 1 << 60, index: 7, swap };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&[0; Request::BYTES - 1]), None);
        assert_eq!(Request::decode(&[0; Request::BYTES + 1]), None);
    }

    #[test]
    fn a_reply_says_on_the_other_side_what_it_said_here() {
        for (result, text) in [
            (Ok(Swapped::Done), ""),
            (Ok(Swapped::Lost(None)), ""),
            (Ok(Swapped::Lost(Some(record(9)))), ""),
            (Err(CounterError::Unreachable), "no route"),
            (Err(CounterError::Refused), "no"),
            (Err(CounterError::Malformed), "what?"),
            (Err(CounterError::Full), "no room"),
        ] {
            let reply = Reply { id: 5, result, text: text.into() };
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
        assert_eq!(Reply::decode(&[0; 3]), None);
        let long = unreachable(1, &"x".repeat(10_000)).encode();
        assert_eq!(long.len(), Reply::MOST_BYTES);
    }
}
