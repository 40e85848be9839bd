//! One control connection: at most one lane, and the calls of `postern.edl` that concern it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use postern_edl::calls::{
    self, Host, PosternAttachReply, PosternAttachRequest, PosternAttached, PosternCloseReply,
    PosternCloseRequest, PosternCreateReply, PosternCreateRequest, PosternFile, PosternKeepReply,
    PosternKeepRequest, PosternLease, PosternLeaseReply, PosternLeaseRequest, PosternListReply,
    PosternListRequest, PosternMeasuredReply, PosternMeasuredRequest, PosternOpenReply,
    PosternOpenRequest, PosternRemoveReply, PosternRemoveRequest, PosternStatsReply,
    PosternStatsRequest, PosternTellReply, PosternTellRequest,
};
use postern_edl::wire::Writer;
use postern_edl::{FEATURE_DISCARD, FEATURE_TELL, MEASURED_PROBES, MEASURED_RECORDS, VERSION};
use rustix::io::Errno;

use crate::admission::Place;
use crate::daemon::Daemon;
use crate::engine::now_ns;
use crate::files::HostFile;
use crate::measured;
use crate::problem::log;
use crate::region::Region;
use crate::report::report;
use crate::session::{Attached, Joins, Port};
use crate::socket::{Channel, MAX_REQUEST};

/// Longest statistics text in one answer, bytes: it has to fit one message.
const MAX_STATS: u64 = 128 << 10;
/// Most ids in one answer, for the same reason, and the digits of one.
const MAX_IDS: u64 = 4096;
const ID_DIGITS: u64 = 32;

/// Serves a connection until its peer, its lane or the daemon ends, then drains its lane. It has
/// `place` until it attaches a lane.
/// `stop` resolves when the daemon stops.
pub async fn serve(
    daemon: Arc<Daemon>,
    channel: Channel,
    peer: i32,
    place: Place,
    stop: impl Future<Output = ()>,
) {
    let place = Some(place);
    let mut caller = Caller { daemon, attached: None, place, descriptors: Vec::new(), peer };
    tokio::select! {
        () = stop => {}
        () = caller.converse(&channel) => {}
    }
    if let Some(attached) = caller.attached.take() {
        caller.daemon.sessions.detach(attached).await;
    }
    // Only now: who sees the connection closed may rely on everything being released.
    drop(channel);
}

struct Caller {
    daemon: Arc<Daemon>,
    attached: Option<Attached>,
    /// While there is no lane.
    place: Option<Place>,
    /// What came with the message at hand.
    descriptors: Vec<OwnedFd>,
    peer: i32,
}

impl Caller {
    async fn converse(&mut self, channel: &Channel) {
        let mut reply = Vec::new();
        loop {
            let message = match &mut self.attached {
                None => channel.receive(MAX_REQUEST).await,
                Some(attached) => tokio::select! {
                    message = channel.receive(MAX_REQUEST) => message,
                    () = attached.ended() => return,
                },
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                    self.refuse("message too long or with too many descriptors");
                    return;
                }
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return,
                Err(e) => return self.refuse(format_args!("connection broke ({e})")),
            };
            self.descriptors = message.descriptors;
            reply.clear();
            if let Err(malformed) = calls::dispatch(self, &message.bytes, &mut reply).await {
                if let Some(version) = other_version(&message.bytes) {
                    self.descriptors.clear();
                    let errno = self.refuse_version(version);
                    Writer::refusal(&mut reply, positive(errno));
                    let _ = channel.send(&reply, &[]).await;
                    continue;
                }
                return self.refuse(format_args!("malformed request ({malformed})"));
            }
            self.descriptors.clear();
            // A peer that is gone shows at the next receive.
            let _ = channel.send(&reply, &[]).await;
        }
    }

    fn refuse(&self, what: impl std::fmt::Display) {
        let hub = self.daemon.sessions.hub();
        hub.refused_connections.fetch_add(1, Ordering::Relaxed);
        log(what, format_args!("process {}", self.peer), "it is disconnected; check its version");
    }

    /// No call but attach takes descriptors.
    fn no_descriptors(&mut self) -> Result<(), Errno> {
        if self.descriptors.is_empty() {
            return Ok(());
        }
        self.descriptors.clear();
        self.refuse_call("descriptors came with a call that takes none", Errno::INVAL)
    }

    fn refuse_call<T>(&self, what: impl std::fmt::Display, errno: Errno) -> Result<T, Errno> {
        log(what, format_args!("process {}", self.peer), "the call is refused");
        Err(errno)
    }

    fn refuse_version(&self, version: u64) -> Errno {
        log(
            format_args!("attach with version {version} of the protocol, not {VERSION}"),
            format_args!("process {}", self.peer),
            "the call is refused; use postern and posternd of one version",
        );
        Errno::PROTONOSUPPORT
    }

    async fn attach(&mut self, request: PosternAttachRequest) -> Result<PosternAttached, Errno> {
        let descriptors: Result<[OwnedFd; 4], _> = std::mem::take(&mut self.descriptors).try_into();
        let Ok([memory, doorbell, driver, service]) = descriptors else {
            return self.refuse_call("attach without its four descriptors", Errno::INVAL);
        };
        if request.version != VERSION {
            return Err(self.refuse_version(request.version.into()));
        }
        if self.attached.is_some() {
            return self.refuse_call("second attach on a connection", Errno::ALREADY);
        }
        for fd in [&doorbell, &driver, &service] {
            if let Err(errno) = check_doorbell(fd) {
                return self.refuse_call("a doorbell that is no eventfd", errno);
            }
        }
        let region = match Region::map(&memory, request.port_bytes) {
            Ok(region) => Arc::new(region),
            Err(refusal) => return self.refuse_call(refusal, refusal.errno()),
        };
        let features = request.features & (FEATURE_DISCARD | FEATURE_TELL);
        let port = Port { region, features, doorbell, driver, service };
        let sessions = &self.daemon.sessions;
        let joins =
            Joins { session: request.session, token: request.token, handles: request.handles };
        let attached = match sessions.attach(joins, port, self.peer).await {
            Ok(attached) => attached,
            // Of a daemon before, most likely: its enclave makes a new one.
            Err(Errno::STALE) => return Err(Errno::STALE),
            // Said already, with its limit.
            Err(errno @ (Errno::MFILE | Errno::NOBUFS | Errno::USERS)) => return Err(errno),
            Err(errno) => {
                let what = format_args!("attach to session {} ({errno})", request.session);
                return self.refuse_call(what, errno);
            }
        };
        let answer = PosternAttached {
            version: VERSION,
            // Below MAX_LANES.
            lane: u32::try_from(attached.lane).unwrap_or(u32::MAX),
            features,
            session: attached.session.number,
            token: attached.session.token,
        };
        self.attached = Some(attached);
        self.place = None;
        Ok(answer)
    }

    async fn open(&mut self, request: PosternOpenRequest) -> Result<PosternFile, Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let catalog = &self.daemon.catalog;
        let PosternOpenRequest { name, flags, handle } = request;
        let (handle, file) = attached.session.open(catalog, name, flags, handle).await?;
        Ok(shown(handle, &file))
    }

    async fn create(&mut self, request: PosternCreateRequest) -> Result<PosternFile, Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let catalog = &self.daemon.catalog;
        let made = attached.session.create(catalog, request.name, request.blocks);
        let (handle, file) = made.await?;
        Ok(shown(handle, &file))
    }

    async fn remove(&mut self, name: String) -> Result<(), Errno> {
        self.no_descriptors()?;
        self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let catalog = Arc::clone(&self.daemon.catalog);
        let removed = tokio::task::spawn_blocking(move || catalog.remove(&name));
        removed.await.map_err(|_| Errno::IO)?
    }

    async fn list(&mut self, request: PosternListRequest) -> Result<PosternListReply, Errno> {
        self.no_descriptors()?;
        self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let PosternListRequest { name, after, capacity } = request;
        let most =
            usize::try_from((capacity / ID_DIGITS).min(MAX_IDS)).map_err(|_| Errno::INVAL)?;
        let catalog = Arc::clone(&self.daemon.catalog);
        let listed = tokio::task::spawn_blocking(move || catalog.list(&name, &after, most));
        let ids = listed.await.map_err(|_| Errno::IO)??.concat().into_bytes();
        let length = ids.len() as u64;
        Ok(PosternListReply { ids, length })
    }

    async fn close(&mut self, handle: u32) -> Result<(), Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        attached.session.close(handle).await
    }

    async fn lease(&mut self, first: u64) -> Result<PosternLease, Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let (handle, state) = attached.session.lease(first).await?;
        Ok(PosternLease { handle, state })
    }

    async fn keep(&mut self, handle: u32) -> Result<(), Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        attached.session.keep(handle).await
    }

    async fn tell(&mut self, request: PosternTellRequest) -> Result<(), Errno> {
        self.no_descriptors()?;
        let attached = self.attached.as_ref().ok_or(Errno::NOTCONN)?;
        let hub = self.daemon.sessions.hub();
        attached.session.tell(request.handle, request.claims, hub).await
    }

    async fn stats(&mut self, capacity: u64) -> Result<PosternStatsReply, Errno> {
        self.no_descriptors()?;
        self.daemon.sessions.settle().await;
        let daemon = Arc::clone(&self.daemon);
        let text = tokio::task::spawn_blocking(move || {
            serde_json::to_vec(&report(&daemon.sessions, &daemon.source))
        });
        let text = text.await.map_err(|_| Errno::IO)?.map_err(|_| Errno::IO)?;
        let length = text.len() as u64;
        if length > capacity.min(MAX_STATS) {
            return Err(Errno::RANGE);
        }
        Ok(PosternStatsReply { text, length })
    }

    async fn measured(
        &mut self,
        request: PosternMeasuredRequest,
    ) -> Result<PosternMeasuredReply, Errno> {
        self.no_descriptors()?;
        let PosternMeasuredRequest { what, first, least_ns, one_in, capacity } = request;
        let sessions = &self.daemon.sessions;
        if what == MEASURED_RECORDS {
            sessions.hub().terms().wish(least_ns, one_in, now_ns());
        }
        if what == MEASURED_PROBES && least_ns <= 1 {
            self.daemon.source.switch(least_ns == 1).await;
        }
        sessions.settle().await;
        let most = usize::try_from(capacity.min(MAX_STATS)).map_err(|_| Errno::INVAL)?;
        let daemon = Arc::clone(&self.daemon);
        let text = tokio::task::spawn_blocking(move || {
            measured::page(daemon.sessions.hub(), &daemon.source, what, first, most)
        });
        let text = text.await.map_err(|_| Errno::IO)?.ok_or(Errno::INVAL)?;
        let length = text.len() as u64;
        if length > capacity {
            return Err(Errno::RANGE);
        }
        Ok(PosternMeasuredReply { text, length })
    }
}

/// The version that an attach of another version of the protocol names. Its fields may be others;
/// that it is the first call, and the version its first field, stays.
fn other_version(message: &[u8]) -> Option<u64> {
    const ATTACH: u64 = 1;
    let mut words = message.chunks_exact(8).map(|w| w.try_into().map_or(0, u64::from_le_bytes));
    let (call, version) = (words.next()?, words.next()?);
    (call == ATTACH && version != u64::from(VERSION)).then_some(version)
}

/// What the enclave is told of an open file.
fn shown(handle: u32, file: &HostFile) -> PosternFile {
    PosternFile { handle, flags: file.flags, blocks: file.blocks, alignment: file.alignment }
}

/// A doorbell must be an eventfd: writing to anything else could block or do worse.
fn check_doorbell(fd: &OwnedFd) -> Result<(), Errno> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = rustix::fs::readlink(link, Vec::new())?;
    if target.as_bytes() != b"anon_inode:[eventfd]" {
        return Err(Errno::INVAL);
    }
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
}

fn positive(errno: Errno) -> u32 {
    errno.raw_os_error().unsigned_abs()
}

impl Host for Caller {
    async fn postern_attach(
        &mut self,
        request: PosternAttachRequest,
    ) -> Result<PosternAttachReply, u32> {
        let attached = self.attach(request).await.map_err(positive)?;
        Ok(PosternAttachReply { attached })
    }

    async fn postern_open(&mut self, request: PosternOpenRequest) -> Result<PosternOpenReply, u32> {
        let file = self.open(request).await.map_err(positive)?;
        Ok(PosternOpenReply { file })
    }

    async fn postern_close(
        &mut self,
        request: PosternCloseRequest,
    ) -> Result<PosternCloseReply, u32> {
        self.close(request.handle).await.map_err(positive)?;
        Ok(PosternCloseReply)
    }

    async fn postern_stats(
        &mut self,
        request: PosternStatsRequest,
    ) -> Result<PosternStatsReply, u32> {
        self.stats(request.capacity).await.map_err(positive)
    }

    async fn postern_create(
        &mut self,
        request: PosternCreateRequest,
    ) -> Result<PosternCreateReply, u32> {
        let file = self.create(request).await.map_err(positive)?;
        Ok(PosternCreateReply { file })
    }

    async fn postern_remove(
        &mut self,
        request: PosternRemoveRequest,
    ) -> Result<PosternRemoveReply, u32> {
        self.remove(request.name).await.map_err(positive)?;
        Ok(PosternRemoveReply)
    }

    async fn postern_list(&mut self, request: PosternListRequest) -> Result<PosternListReply, u32> {
        self.list(request).await.map_err(positive)
    }

    async fn postern_lease(
        &mut self,
        request: PosternLeaseRequest,
    ) -> Result<PosternLeaseReply, u32> {
        let lease = self.lease(request.first).await.map_err(positive)?;
        Ok(PosternLeaseReply { lease })
    }

    async fn postern_measured(
        &mut self,
        request: PosternMeasuredRequest,
    ) -> Result<PosternMeasuredReply, u32> {
        self.measured(request).await.map_err(positive)
    }

    async fn postern_tell(&mut self, request: PosternTellRequest) -> Result<PosternTellReply, u32> {
        self.tell(request).await.map_err(positive)?;
        Ok(PosternTellReply)
    }

    async fn postern_keep(&mut self, request: PosternKeepRequest) -> Result<PosternKeepReply, u32> {
        self.keep(request.handle).await.map_err(positive)?;
        Ok(PosternKeepReply)
    }
}
