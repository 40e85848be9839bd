//! The link to a posternd: a lane, the control connection, one host file; and coming over to
//! another daemon when that one has ended.
//!
//! As in the simulated enclave (`trusted/sim`, `succession`), with one process and one host file: a
//! small lane of its own opens the file at the next daemon under the handle that it had and looks
//! whether the volume is still as it was left; then the port joins that session with what is in
//! flight.
//!
//! Holds: nothing that was in flight reaches a new daemon before the host file was looked at.

use core::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fortanix_sgx::usercalls::{self, raw::Fd},
    sync::Arc,
};

use postern_edl::{
    calls::{
        CallError, Carrier, Enclave, PosternAttachRequest, PosternAttached, PosternFile,
        PosternOpenRequest,
    },
    port::Geometry,
};
use postern_trusted::{
    disk::BLOCK,
    errno::Errno,
    port::{HostFault, Lane, LaneFile, MAX_TRANSFER_BLOCKS, Sleeper},
    sync::Lock,
    volume::Volume,
};

use crate::{host::Cpu, port::Port};

/// Requests in flight, and the transfer area.
const ENTRIES: usize = 512;
const DATA_BYTES: usize = 16 << 20;
/// Of the lane that looks.
const SCOUT_ENTRIES: usize = 16;
/// Largest answer to a control call.
const REPLY_BYTES: usize = 4096;
/// How long another daemon is waited for.
const PATIENCE_NS: u64 = 60_000_000_000;
/// How long it is asked again for a host file that somebody has: the kernel may be at work on the
/// end of the one before.
const RELEASED_WITHIN_NS: u64 = 2_000_000_000;
/// How long a volume is waited for that an enclave has which may just have ended.
const FREE_WITHIN_NS: u64 = 10_000_000_000;
const MOMENT_NS: u64 = 20_000_000;
const EBUSY: u32 = Errno::EBUSY.0.unsigned_abs();

/// A control connection: one message there, one back.
struct Connection(Fd);

impl Carrier for Connection {
    type Error = io::Error;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> io::Result<()> {
        if usercalls::write(self.0, &[IoSlice::new(request)])? != request.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        reply.clear();
        reply.resize(REPLY_BYTES, 0);
        let length = usercalls::read(self.0, &mut [IoSliceMut::new(reply)])?;
        reply.truncate(length);
        if length == 0 { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        usercalls::close(self.0);
    }
}

/// A lane at a daemon.
struct Attached {
    control: Enclave<Connection>,
    said: PosternAttached,
}

/// Attaches the port to a session of the daemon, or begins one.
fn attach(port: &Port, bytes: usize, wish: PosternAttachRequest) -> Result<Attached, String> {
    let refused = |what: &dyn core::fmt::Display| format!("attach: {what}");
    let (stream, ..) = usercalls::connect_stream(&format!("postern-daemon:{}", port.stream()))
        .map_err(|error| refused(&error))?;
    let mut control = Enclave(Connection(stream));
    let request =
        PosternAttachRequest { version: postern_edl::VERSION, port_bytes: bytes as u64, ..wish };
    match control.postern_attach(&request) {
        Ok(reply) if reply.attached.version == postern_edl::VERSION => {
            Ok(Attached { control, said: reply.attached })
        }
        Ok(_) => Err(refused(&"the daemon speaks another version of the protocol")),
        Err(error) => Err(refused(&error)),
    }
}

/// A host file that is open.
#[derive(Clone, Debug)]
struct Open {
    name: String,
    file: PosternFile,
}

/// The link of this enclave.
pub struct Link {
    /// Its lane.
    pub lane: Lane,
    /// Its port.
    pub port: Arc<Port>,
    bytes: usize,
    state: Lock<State>,
}

struct State {
    attached: Attached,
    open: Option<Open>,
    /// Daemons that took over.
    successors: u64,
}

impl Link {
    /// Attaches to the daemon.
    ///
    /// # Errors
    /// Why not.
    pub fn attach() -> Result<Self, String> {
        let geometry = Geometry::new(ENTRIES, DATA_BYTES).ok_or("a port has no such size")?;
        let (port, lane) = Port::make(geometry).map_err(|error| {
            format!("no port: {error}; is there a daemon (postern enclave run --daemon SOCKET)?")
        })?;
        let bytes = geometry.region_bytes().next_multiple_of(4096);
        let attached = attach(&port, bytes, PosternAttachRequest::default())?;
        let state = Lock::new(State { attached, open: None, successors: 0 });
        Ok(Self { lane, port, bytes, state })
    }

    /// Opens the host file of this name at the daemon, as a disk.
    ///
    /// # Errors
    /// Why not.
    pub fn open(&self, name: &str) -> Result<LaneFile, String> {
        let request = PosternOpenRequest { name: name.into(), flags: 0, handle: 0 };
        let until = self.port.now_ns().saturating_add(FREE_WITHIN_NS);
        let file = loop {
            let opened = self.state.lock().attached.control.postern_open(&request);
            match opened {
                Ok(reply) => break reply.file,
                Err(CallError::Refused(EBUSY)) if self.port.now_ns() < until => {
                    self.port.sleep(MOMENT_NS);
                }
                Err(error) => return Err(format!("{name}: {error}")),
            }
        };
        let disk = self.lane.file(file.handle, file.blocks, Arc::new(Cpu(self.port.clone())));
        self.state.lock().open = Some(Open { name: name.into(), file });
        Ok(disk)
    }

    /// How many daemons took over from one that had ended.
    pub fn successors(&self) -> u64 {
        self.state.lock().successors
    }

    /// Whether the daemon was said to have hung up, and has.
    pub fn is_lost(&self) -> bool {
        let connection = self.state.lock().attached.control.0.0;
        self.port.was_hung_up() && usercalls::flush(connection).is_err()
    }

    /// The daemon has ended: waits for another one and hands over what is in flight. Where none
    /// comes, or `volume` is not any more what it was, the lane is poisoned. Without a volume there
    /// is nothing to go on with.
    ///
    /// # Errors
    /// Why it is poisoned.
    pub fn come_over(&self, volume: Option<&Volume>) -> Result<(), String> {
        self.lane.withhold();
        let until = self.port.now_ns().saturating_add(PATIENCE_NS);
        let over = loop {
            let Some(volume) = volume else {
                break Err("while the volume was being opened".into());
            };
            self.lane.renew();
            match self.find_successor(volume) {
                Err(Missed::Later(_)) if self.port.now_ns() < until => self.port.sleep(MOMENT_NS),
                Err(Missed::Later(why) | Missed::Lost(why)) => break Err(why),
                Ok(attached) => {
                    let mut state = self.state.lock();
                    state.attached = attached;
                    state.successors += 1;
                    // One that writes through the page cache may have been told of an error that
                    // nobody is told of again.
                    let buffered = |open: &Open| open.file.flags & postern_edl::FILE_BUFFERED != 0;
                    let buffered = state.open.as_ref().is_some_and(buffered);
                    drop(state);
                    self.lane.release(|_| buffered);
                    break Ok(());
                }
            }
        };
        if over.is_err() {
            self.lane.poison(HostFault::DaemonGone);
        }
        over
    }

    fn find_successor(&self, volume: &Volume) -> Result<Attached, Missed> {
        let open = self.state.lock().open.clone();
        let open = open.ok_or_else(|| Missed::Lost("no host file is open".into()))?;
        let mut scout = Scout::attach(&open)?;
        scout.open(&open)?;
        let platform = Arc::new(Cpu(self.port.clone()));
        let disk = scout.lane.file(open.file.handle, open.file.blocks, platform);
        match scout.wait_on(volume.is_undisturbed(&disk))? {
            Ok(true) => {}
            Ok(false) => {
                let why = "somebody else had the volume while there was no daemon";
                return Err(Missed::Lost(why.into()));
            }
            Err(error) => return Err(Missed::Lost(error.to_string())),
        }
        let PosternAttached { session, token, .. } = scout.attached.said;
        let wish = PosternAttachRequest { session, token, ..PosternAttachRequest::default() };
        attach(&self.port, self.bytes, wish).map_err(Missed::Later)
    }
}

/// Why there is no other daemon.
enum Missed {
    /// It may be tried again.
    Later(String),
    /// That is of no use.
    Lost(String),
}

/// A small lane that looks at the host file before anything else reaches it.
struct Scout {
    port: Arc<Port>,
    lane: Lane,
    attached: Attached,
}

impl Scout {
    fn attach(open: &Open) -> Result<Self, Missed> {
        let geometry = Geometry::new(SCOUT_ENTRIES, MAX_TRANSFER_BLOCKS * BLOCK);
        let geometry = geometry.ok_or_else(|| Missed::Lost("a port has no such size".into()))?;
        let (port, lane) =
            Port::make(geometry).map_err(|error| Missed::Later(error.to_string()))?;
        let bytes = geometry.region_bytes().next_multiple_of(4096);
        let wish =
            PosternAttachRequest { handles: open.file.handle, ..PosternAttachRequest::default() };
        let attached = attach(&port, bytes, wish).map_err(Missed::Later)?;
        Ok(Self { port, lane, attached })
    }

    /// Opens the host file under the handle that it had.
    fn open(&mut self, open: &Open) -> Result<(), Missed> {
        let handle = open.file.handle;
        let request = PosternOpenRequest { name: open.name.clone(), flags: 0, handle };
        let until = self.port.now_ns().saturating_add(RELEASED_WITHIN_NS);
        loop {
            let lost = |what: &dyn core::fmt::Display| format!("{}: {what}", open.name);
            match self.attached.control.postern_open(&request) {
                Ok(reply) if reply.file.handle == handle => return Ok(()),
                Ok(_) => return Err(Missed::Lost(lost(&"it came back as another file"))),
                Err(CallError::Refused(EBUSY)) if self.port.now_ns() < until => {
                    self.port.sleep(MOMENT_NS);
                }
                Err(CallError::Carrier(error)) => return Err(Missed::Later(lost(&error))),
                Err(error) => return Err(Missed::Lost(lost(&error))),
            }
        }
    }

    /// Runs `future`, which waits for nothing but this lane.
    fn wait_on<F: Future>(&self, future: F) -> Result<F::Output, Missed> {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return Ok(output);
            }
            if self.lane.poll(SCOUT_ENTRIES) > 0 {
                continue;
            }
            self.lane.sleep(Sleeper::Driver, MOMENT_NS);
            let gone = usercalls::flush(self.attached.control.0.0).is_err();
            if gone && !self.lane.needs_drive() {
                return Err(Missed::Later("the daemon has hung up".into()));
            }
        }
    }
}
