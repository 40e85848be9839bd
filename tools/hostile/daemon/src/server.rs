//! The control connections: the calls of `postern.edl`, answered as the script wants.
//!
//! Serves one enclave: sessions are kept until the daemon ends, leases are nobody's.

use std::{
    collections::BTreeMap,
    future::Future,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use postern_edl::{
    LEASE_ASKED, VERSION,
    calls::{
        self, Host, PosternAttachReply, PosternAttachRequest, PosternAttached, PosternCloseReply,
        PosternCloseRequest, PosternCreateReply, PosternCreateRequest, PosternKeepReply,
        PosternKeepRequest, PosternLease, PosternLeaseReply, PosternLeaseRequest, PosternListReply,
        PosternListRequest, PosternMeasuredReply, PosternMeasuredRequest, PosternOpenReply,
        PosternOpenRequest, PosternRemoveReply, PosternRemoveRequest, PosternStatsReply,
        PosternStatsRequest, PosternTellReply, PosternTellRequest,
    },
};
use postern_hostile::{
    Rng,
    replies::{mangle, twist_attached, twist_file, twist_ids, twist_lease},
};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    },
};

use crate::{
    files::{Files, Names},
    lane::{Lane, Parts},
    port::Port,
    script::Script,
};

/// Most bytes of ids in an answer.
const MOST_IDS: u64 = 4096;
const DESCRIPTORS: usize = 4;

struct Session {
    token: [u64; 2],
    files: Files,
    /// The daemon's that made it.
    life: u64,
}

/// What all connections share.
pub struct Daemon {
    script: Script,
    seed: u64,
    names: Arc<Names>,
    full_while: Option<Arc<Path>>,
    sessions: Mutex<BTreeMap<u64, Session>>,
    connections: AtomicU64,
    /// A lane was attached.
    begun: AtomicBool,
    /// The daemon that it plays: those before have ended, with all their lanes and sessions.
    life: Arc<AtomicU64>,
}

impl Daemon {
    /// A daemon for these files.
    pub fn new(script: Script, seed: u64, names: Names, full_while: Option<&Path>) -> Arc<Self> {
        Arc::new(Self {
            script,
            seed,
            names: Arc::new(names),
            full_while: full_while.map(Arc::from),
            sessions: Mutex::default(),
            connections: AtomicU64::new(0),
            begun: AtomicBool::new(false),
            life: Arc::default(),
        })
    }

    /// Ends, and is another daemon from now on.
    fn die(&self) {
        self.life.fetch_add(1, Ordering::Release);
    }

    /// Serves connections to the socket at `path`, for ever.
    ///
    /// # Errors
    /// What the kernel says of the socket.
    pub fn serve(self: &Arc<Self>, path: &Path, ready: impl FnOnce()) -> Result<(), Errno> {
        let kind = SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 64)?;
        ready();
        loop {
            let connection = match rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
                Ok(connection) => connection,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(errno) => return Err(errno),
            };
            let daemon = Arc::clone(self);
            std::thread::spawn(move || Caller::new(daemon, connection).converse());
        }
    }
}

/// One connection.
struct Caller {
    daemon: Arc<Daemon>,
    rng: Rng,
    seed: u64,
    // Dropped in this order: who sees the connection closed may rely on the lane's end.
    lane: Option<Lane>,
    connection: OwnedFd,
    files: Option<Files>,
    /// What came with the message at hand.
    descriptors: Vec<OwnedFd>,
}

impl Caller {
    fn new(daemon: Arc<Daemon>, connection: OwnedFd) -> Self {
        let number = daemon.connections.fetch_add(1, Ordering::Relaxed);
        let seed = Rng::new(daemon.seed.wrapping_add(number << 32)).any();
        let rng = Rng::new(seed);
        Self { daemon, rng, seed, lane: None, connection, files: None, descriptors: Vec::new() }
    }

    /// Answers calls until either side hangs up.
    fn converse(mut self) {
        let mut message = vec![0; 64 << 10];
        let mut reply = Vec::new();
        while let Some(length) = self.receive(&mut message) {
            let begun = self.daemon.begun.load(Ordering::Relaxed);
            let quiet = self.daemon.script.spares_first && !begun;
            let manners = self.daemon.script.manners;
            let mut strikes = |often| !quiet && self.rng.chance(often);
            let (hangs_up, refuses, mangles) =
                (strikes(manners.hang_ups), strikes(manners.refusals), strikes(manners.nonsense));
            // Before it has done what was asked, or after.
            if hangs_up && self.rng.chance(5000) {
                return self.daemon.die();
            }
            reply.clear();
            if !ready(calls::dispatch(&mut self, &message[..length], &mut reply)) {
                return;
            }
            if hangs_up {
                return self.daemon.die();
            }
            if refuses {
                let errno = 1 + self.rng.below(4095);
                reply = errno.to_le_bytes().to_vec();
            }
            if mangles {
                mangle(&mut self.rng, &mut reply);
            }
            let mut none = SendAncillaryBuffer::new(&mut []);
            let parts = [IoSlice::new(&reply)];
            if rustix::net::sendmsg(&self.connection, &parts, &mut none, SendFlags::NOSIGNAL)
                .is_err()
            {
                return;
            }
        }
    }

    /// The length of the next message; `None` at the end.
    fn receive(&mut self, message: &mut [u8]) -> Option<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(message)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.connection, parts, &mut control, flags).ok()?;
        let descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        self.descriptors = descriptors.flatten().collect();
        (got.bytes > 0).then_some(got.bytes)
    }

    /// Whether this answer is a lie.
    fn lies(&mut self) -> bool {
        let begun = self.daemon.begun.load(Ordering::Relaxed);
        let quiet = self.daemon.script.spares_first && !begun;
        !quiet && self.rng.chance(self.daemon.script.manners.lies)
    }

    fn attach(&mut self, request: &PosternAttachRequest) -> Result<PosternAttached, Errno> {
        let all: Result<[OwnedFd; DESCRIPTORS], _> =
            std::mem::take(&mut self.descriptors).try_into();
        let Ok([memory, doorbell, driver, service]) = all else { return Err(Errno::INVAL) };
        let port = Arc::new(Port::map(&memory, request.port_bytes)?);
        let (number, token, files) = self.session(request)?;
        let socket = self.connection.try_clone().map_err(|_| Errno::MFILE)?;
        let bells = [doorbell, driver, service];
        let life = Arc::clone(&self.daemon.life);
        let parts = Parts { port, bells, files: files.clone(), socket, life };
        self.lane = Some(Lane::start(parts, self.daemon.script, self.seed));
        self.files = Some(files);
        let features =
            request.features & (postern_edl::FEATURE_DISCARD | postern_edl::FEATURE_TELL);
        let mut attached =
            PosternAttached { version: VERSION, lane: 0, features, session: number, token };
        if self.lies() {
            twist_attached(&mut self.rng, &mut attached);
        }
        self.daemon.begun.store(true, Ordering::Relaxed);
        Ok(attached)
    }

    fn session(&mut self, request: &PosternAttachRequest) -> Result<(u64, [u64; 2], Files), Errno> {
        let life = self.daemon.life.load(Ordering::Acquire);
        let mut sessions = self.daemon.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if request.session != 0 {
            let session = sessions.get(&request.session).filter(|session| session.life == life);
            let session = session.ok_or(Errno::STALE)?;
            if session.token != request.token {
                return Err(Errno::ACCESS);
            }
            return Ok((request.session, session.token, session.files.clone()));
        }
        let number = sessions.len() as u64 + 1;
        let token = [self.rng.any(), self.rng.any()];
        let full_while = self.daemon.full_while.clone();
        let files = Files::new(Arc::clone(&self.daemon.names), request.handles, full_while);
        sessions.insert(number, Session { token, files: files.clone(), life });
        Ok((number, token, files))
    }

    fn files(&self) -> Result<&Files, Errno> {
        self.files.as_ref().ok_or(Errno::NOTCONN)
    }
}

/// Runs a future that waits for nothing; answers whether it ended well.
fn ready<T, E>(future: impl Future<Output = Result<T, E>>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    matches!(pin!(future).poll(&mut context), Poll::Ready(Ok(_)))
}

fn positive(errno: Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

impl Host for Caller {
    async fn postern_attach(
        &mut self,
        request: PosternAttachRequest,
    ) -> Result<PosternAttachReply, u32> {
        let attached = self.attach(&request).map_err(positive)?;
        Ok(PosternAttachReply { attached })
    }

    async fn postern_open(&mut self, request: PosternOpenRequest) -> Result<PosternOpenReply, u32> {
        let PosternOpenRequest { name, flags, handle } = request;
        let opened = self.files().and_then(|files| files.open(&name, flags, handle));
        let mut file = opened.map_err(positive)?;
        if self.lies() {
            twist_file(&mut self.rng, &mut file);
            // That of another file, at times.
            let which = self.rng.index(8);
            if self.rng.chance(2000)
                && let Some(other) = self.files().ok().and_then(|files| files.any(which))
            {
                file.handle = other;
            }
        }
        Ok(PosternOpenReply { file })
    }

    async fn postern_close(
        &mut self,
        request: PosternCloseRequest,
    ) -> Result<PosternCloseReply, u32> {
        let closed = self.files().and_then(|files| files.close(request.handle));
        if !self.daemon.script.forgetful {
            closed.map_err(positive)?;
        }
        Ok(PosternCloseReply)
    }

    async fn postern_stats(&mut self, _: PosternStatsRequest) -> Result<PosternStatsReply, u32> {
        Ok(PosternStatsReply { text: b"{}".to_vec(), length: 2 })
    }

    async fn postern_measured(
        &mut self,
        _: PosternMeasuredRequest,
    ) -> Result<PosternMeasuredReply, u32> {
        // An enclave does not ask for it.
        Err(positive(Errno::NOSYS))
    }

    async fn postern_create(
        &mut self,
        request: PosternCreateRequest,
    ) -> Result<PosternCreateReply, u32> {
        let made = self.files().and_then(|files| files.create(&request.name, request.blocks));
        let mut file = made.map_err(positive)?;
        if self.lies() {
            twist_file(&mut self.rng, &mut file);
        }
        Ok(PosternCreateReply { file })
    }

    async fn postern_remove(
        &mut self,
        request: PosternRemoveRequest,
    ) -> Result<PosternRemoveReply, u32> {
        // What a lie leaves there comes back later.
        if !self.lies() {
            self.daemon.names.remove(&request.name).map_err(positive)?;
        }
        Ok(PosternRemoveReply)
    }

    async fn postern_list(&mut self, request: PosternListRequest) -> Result<PosternListReply, u32> {
        let PosternListRequest { name, after, capacity } = request;
        let most = usize::try_from((capacity / 32).min(MOST_IDS)).unwrap_or_default();
        let listed = self.daemon.names.list(&name, &after, most);
        let mut ids = listed.map_err(positive)?;
        let mut length = ids.len() as u64;
        if self.lies() {
            length = twist_ids(&mut self.rng, &mut ids);
        }
        Ok(PosternListReply { ids, length })
    }

    async fn postern_lease(
        &mut self,
        request: PosternLeaseRequest,
    ) -> Result<PosternLeaseReply, u32> {
        let which = self.rng.index(8);
        let any = self.files().ok().and_then(|files| files.any(which));
        // Nobody asks for anything, unless that is a lie.
        let handle = any.filter(|handle| u64::from(*handle) >= request.first && self.lies());
        let handle = handle.ok_or(positive(Errno::NOENT))?;
        let mut lease = PosternLease { handle, state: LEASE_ASKED };
        twist_lease(&mut self.rng, &mut lease);
        Ok(PosternLeaseReply { lease })
    }

    async fn postern_tell(&mut self, _: PosternTellRequest) -> Result<PosternTellReply, u32> {
        Ok(PosternTellReply)
    }

    async fn postern_keep(&mut self, _: PosternKeepRequest) -> Result<PosternKeepReply, u32> {
        Ok(PosternKeepReply)
    }
}
