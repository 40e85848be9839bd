// Generated from postern.edl by postern-edl-gen. Change that file, not this one.

use crate::wire::{Reader, Wire, Writer};
use alloc::{string::String, vec::Vec};

pub use crate::wire::{CallError, Carrier, Malformed};

/// FNV-1a of the interface's normal form. Equal on both sides if and only if (collisions
/// aside) they were built from the same interface; no protection against a forger.
pub const FINGERPRINT: u64 = 0xa146853381098f91;

/// What a daemon answers when an enclave attaches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternAttached {
    /// Protocol version the daemon speaks.
    pub version: u32,
    /// Number of this lane in the daemon.
    pub lane: u32,
    /// Bits both sides have.
    pub features: u64,
    /// Number of the session.
    pub session: u64,
    /// Secret that lets a further lane join the session.
    pub token: [u64; 2],
}

impl Wire for PosternAttached {
    fn put(&self, writer: &mut Writer<'_>) {
        self.version.put(writer);
        self.lane.put(writer);
        self.features.put(writer);
        self.session.put(writer);
        self.token.put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            version: Wire::get(reader)?,
            lane: Wire::get(reader)?,
            features: Wire::get(reader)?,
            session: Wire::get(reader)?,
            token: Wire::get(reader)?,
        })
    }
}

/// What a daemon says of an open host file. Claims: the enclave checks what it relies on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternFile {
    /// Names the file in descriptors of this session.
    pub handle: u32,
    /// `POSTERN_FILE_*`.
    pub flags: u32,
    /// Size in whole 4096-byte blocks.
    pub blocks: u64,
    /// O_DIRECT alignment of offset and length, bytes.
    pub alignment: u64,
}

impl Wire for PosternFile {
    fn put(&self, writer: &mut Writer<'_>) {
        self.handle.put(writer);
        self.flags.put(writer);
        self.blocks.put(writer);
        self.alignment.put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            handle: Wire::get(reader)?,
            flags: Wire::get(reader)?,
            blocks: Wire::get(reader)?,
            alignment: Wire::get(reader)?,
        })
    }
}

/// What a daemon says of the lease of an open host file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternLease {
    /// The file's; as long as it is valid, so is the lease.
    pub handle: u32,
    /// `POSTERN_LEASE_*`.
    pub state: u32,
}

impl Wire for PosternLease {
    fn put(&self, writer: &mut Writer<'_>) {
        self.handle.put(writer);
        self.state.put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            handle: Wire::get(reader)?,
            state: Wire::get(reader)?,
        })
    }
}

/// Which thread of the enclave sleeps; each has a doorbell of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum PosternSleeper {
    /// One that waits for completions itself: doorbell A.
    #[default]
    Driver = 0,
    /// The one that looks after the rest: doorbell B.
    Service = 1,
}

impl Wire for PosternSleeper {
    fn put(&self, writer: &mut Writer<'_>) {
        (*self as u32).put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let at = reader.position();
        match u32::get(reader)? {
            0 => Ok(Self::Driver),
            1 => Ok(Self::Service),
            _ => Err(Malformed::Range { word: at }),
        }
    }
}

/// What [`Host::postern_attach`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternAttachRequest {
    /// Protocol version the enclave speaks.
    pub version: u32,
    /// Bits the enclave has.
    pub features: u64,
    /// 0, or the session a lane is added to.
    pub session: u64,
    /// That session's, or zeros.
    pub token: [u64; 2],
    /// New session: those up to here are taken.
    pub handles: u32,
    /// Where the port begins.
    ///
    /// An address; the memory itself is not in the message.
    pub port: u64,
    /// Its length in bytes.
    pub port_bytes: u64,
}

/// What [`Host::postern_attach`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternAttachReply {
    /// `attached` of `postern_attach`.
    pub attached: PosternAttached,
}

/// What [`Host::postern_open`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternOpenRequest {
    /// Path as the operator allowed it.
    pub name: String,
    /// `POSTERN_OPEN_*`.
    pub flags: u32,
    /// The one it had, or 0.
    pub handle: u32,
}

/// What [`Host::postern_open`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternOpenReply {
    /// `file` of `postern_open`.
    pub file: PosternFile,
}

/// What [`Host::postern_close`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternCloseRequest {
    /// From `postern_open`.
    pub handle: u32,
}

/// What [`Host::postern_close`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternCloseReply;

/// What [`Host::postern_stats`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternStatsRequest {
    /// Room for text in bytes, any number.
    pub capacity: u64,
}

/// What [`Host::postern_stats`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternStatsReply {
    /// UTF-8, no NUL at the end.
    ///
    /// At most as many elements as the request's `capacity`.
    pub text: Vec<u8>,
    /// Bytes of `text` that were written.
    pub length: u64,
}

/// What [`Host::postern_create`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternCreateRequest {
    /// DIRECTORY/ID, 32 hex digits.
    pub name: String,
    /// Size in 4096-byte blocks.
    pub blocks: u64,
}

/// What [`Host::postern_create`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternCreateReply {
    /// `file` of `postern_create`.
    pub file: PosternFile,
}

/// What [`Host::postern_remove`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternRemoveRequest {
    /// As for `postern_create`.
    pub name: String,
}

/// What [`Host::postern_remove`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternRemoveReply;

/// What [`Host::postern_list`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternListRequest {
    /// The directory's name.
    pub name: String,
    /// Only ids above this; or empty.
    pub after: String,
    /// Room for ids in bytes, any number.
    pub capacity: u64,
}

/// What [`Host::postern_list`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternListReply {
    /// Without separators.
    ///
    /// At most as many elements as the request's `capacity`.
    pub ids: Vec<u8>,
    /// Bytes of `ids` that were written.
    pub length: u64,
}

/// What [`Host::postern_lease`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternLeaseRequest {
    /// A handle; 0: from the beginning.
    pub first: u64,
}

/// What [`Host::postern_lease`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternLeaseReply {
    /// `lease` of `postern_lease`.
    pub lease: PosternLease,
}

/// What [`Host::postern_keep`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternKeepRequest {
    /// From `postern_open`.
    pub handle: u32,
}

/// What [`Host::postern_keep`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternKeepReply;

/// What [`Host::postern_measured`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternMeasuredRequest {
    /// `POSTERN_MEASURED_*`.
    pub what: u32,
    /// Number of the first item wanted.
    pub first: u64,
    /// Records: that slow; all ones: no wish.
    pub least_ns: u64,
    /// Records: a sample of that; 0: no wish.
    pub one_in: u64,
    /// Room for text in bytes, any number.
    pub capacity: u64,
}

/// What [`Host::postern_measured`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternMeasuredReply {
    /// UTF-8, no NUL.
    ///
    /// At most as many elements as the request's `capacity`.
    pub text: Vec<u8>,
    /// Bytes of `text` that were written.
    pub length: u64,
}

/// What [`Host::postern_tell`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternTellRequest {
    /// From `postern_open`.
    pub handle: u32,
    /// `POSTERN_CLAIM_*`.
    pub claims: [u64; 9],
}

/// What [`Host::postern_tell`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PosternTellReply;

/// A request as it travels: its number, then its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Call 1, `postern_attach`.
    PosternAttach(PosternAttachRequest),
    /// Call 2, `postern_open`.
    PosternOpen(PosternOpenRequest),
    /// Call 3, `postern_close`.
    PosternClose(PosternCloseRequest),
    /// Call 4, `postern_stats`.
    PosternStats(PosternStatsRequest),
    /// Call 5, `postern_create`.
    PosternCreate(PosternCreateRequest),
    /// Call 6, `postern_remove`.
    PosternRemove(PosternRemoveRequest),
    /// Call 7, `postern_list`.
    PosternList(PosternListRequest),
    /// Call 8, `postern_lease`.
    PosternLease(PosternLeaseRequest),
    /// Call 9, `postern_keep`.
    PosternKeep(PosternKeepRequest),
    /// Call 10, `postern_measured`.
    PosternMeasured(PosternMeasuredRequest),
    /// Call 11, `postern_tell`.
    PosternTell(PosternTellRequest),
}

impl Request {
    /// Reads a whole request; `bytes` must hold it and nothing else.
    ///
    /// # Errors
    /// [`Malformed`] for anything that [`Self::encode`] would not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let request = match u64::get(&mut reader)? {
            1 => Self::PosternAttach(PosternAttachRequest {
                version: Wire::get(&mut reader)?,
                features: Wire::get(&mut reader)?,
                session: Wire::get(&mut reader)?,
                token: Wire::get(&mut reader)?,
                handles: Wire::get(&mut reader)?,
                port: Wire::get(&mut reader)?,
                port_bytes: Wire::get(&mut reader)?,
            }),
            2 => Self::PosternOpen(PosternOpenRequest {
                name: reader.text()?,
                flags: Wire::get(&mut reader)?,
                handle: Wire::get(&mut reader)?,
            }),
            3 => Self::PosternClose(PosternCloseRequest {
                handle: Wire::get(&mut reader)?,
            }),
            4 => Self::PosternStats(PosternStatsRequest {
                capacity: Wire::get(&mut reader)?,
            }),
            5 => Self::PosternCreate(PosternCreateRequest {
                name: reader.text()?,
                blocks: Wire::get(&mut reader)?,
            }),
            6 => Self::PosternRemove(PosternRemoveRequest {
                name: reader.text()?,
            }),
            7 => Self::PosternList(PosternListRequest {
                name: reader.text()?,
                after: reader.text()?,
                capacity: Wire::get(&mut reader)?,
            }),
            8 => Self::PosternLease(PosternLeaseRequest {
                first: Wire::get(&mut reader)?,
            }),
            9 => Self::PosternKeep(PosternKeepRequest {
                handle: Wire::get(&mut reader)?,
            }),
            10 => Self::PosternMeasured(PosternMeasuredRequest {
                what: Wire::get(&mut reader)?,
                first: Wire::get(&mut reader)?,
                least_ns: Wire::get(&mut reader)?,
                one_in: Wire::get(&mut reader)?,
                capacity: Wire::get(&mut reader)?,
            }),
            11 => Self::PosternTell(PosternTellRequest {
                handle: Wire::get(&mut reader)?,
                claims: Wire::get(&mut reader)?,
            }),
            call => return Err(Malformed::UnknownCall { call }),
        };
        reader.end()?;
        Ok(request)
    }

    /// Writes the request in place of what `bytes` held.
    ///
    /// # Errors
    /// [`Malformed`] for a text with a NUL inside or a buffer longer than its length
    /// parameter can say; `bytes` is then of no use.
    pub fn encode(&self, bytes: &mut Vec<u8>) -> Result<(), Malformed> {
        let mut writer = Writer::new(bytes);
        match self {
            Self::PosternAttach(request) => {
                1_u64.put(&mut writer);
                request.version.put(&mut writer);
                request.features.put(&mut writer);
                request.session.put(&mut writer);
                request.token.put(&mut writer);
                request.handles.put(&mut writer);
                request.port.put(&mut writer);
                request.port_bytes.put(&mut writer);
            }
            Self::PosternOpen(request) => {
                2_u64.put(&mut writer);
                writer.text(&request.name);
                request.flags.put(&mut writer);
                request.handle.put(&mut writer);
            }
            Self::PosternClose(request) => {
                3_u64.put(&mut writer);
                request.handle.put(&mut writer);
            }
            Self::PosternStats(request) => {
                4_u64.put(&mut writer);
                request.capacity.put(&mut writer);
            }
            Self::PosternCreate(request) => {
                5_u64.put(&mut writer);
                writer.text(&request.name);
                request.blocks.put(&mut writer);
            }
            Self::PosternRemove(request) => {
                6_u64.put(&mut writer);
                writer.text(&request.name);
            }
            Self::PosternList(request) => {
                7_u64.put(&mut writer);
                writer.text(&request.name);
                writer.text(&request.after);
                request.capacity.put(&mut writer);
            }
            Self::PosternLease(request) => {
                8_u64.put(&mut writer);
                request.first.put(&mut writer);
            }
            Self::PosternKeep(request) => {
                9_u64.put(&mut writer);
                request.handle.put(&mut writer);
            }
            Self::PosternMeasured(request) => {
                10_u64.put(&mut writer);
                request.what.put(&mut writer);
                request.first.put(&mut writer);
                request.least_ns.put(&mut writer);
                request.one_in.put(&mut writer);
                request.capacity.put(&mut writer);
            }
            Self::PosternTell(request) => {
                11_u64.put(&mut writer);
                request.handle.put(&mut writer);
                request.claims.put(&mut writer);
            }
        }
        writer.end()
    }
}

/// The untrusted side: what a daemon does for an enclave.
///
/// An error is a Linux errno, 1..=4095. Requests are well-formed and otherwise unchecked:
/// a length asked for can be any number, a handle or an address anything.
pub trait Host {
    /// Hands a port to the daemon and starts a session (session 0), or adds a lane to one.
    /// The port's memory and its three doorbells travel beside the request. A session that goes on
    /// after another daemon ended says up to which number that one gave out handles.
    fn postern_attach(
        &mut self,
        request: PosternAttachRequest,
    ) -> impl Future<Output = Result<PosternAttachReply, u32>> + Send;

    /// Opens a host file that the operator has allowed, O_DIRECT, and takes its lease: alone for
    /// writing, shared for reading. A lease that somebody else has is `EBUSY`; with
    /// `POSTERN_OPEN_ASK` it is asked for, which is `EAGAIN`: call again soon, or the wish ends.
    /// With a handle below the session's first own one the file gets that handle back which it had
    /// at a daemon that ended.
    fn postern_open(
        &mut self,
        request: PosternOpenRequest,
    ) -> impl Future<Output = Result<PosternOpenReply, u32>> + Send;

    /// Gives a host file back; what is in flight on it completes first.
    fn postern_close(
        &mut self,
        request: PosternCloseRequest,
    ) -> impl Future<Output = Result<PosternCloseReply, u32>> + Send;

    /// The daemon's statistics as JSON text.
    fn postern_stats(
        &mut self,
        request: PosternStatsRequest,
    ) -> impl Future<Output = Result<PosternStatsReply, u32>> + Send;

    /// Makes a file in a directory that the operator has allowed, as zeros, and opens it.
    fn postern_create(
        &mut self,
        request: PosternCreateRequest,
    ) -> impl Future<Output = Result<PosternCreateReply, u32>> + Send;

    /// Removes a file that nobody has open from a directory that the operator has allowed.
    fn postern_remove(
        &mut self,
        request: PosternRemoveRequest,
    ) -> impl Future<Output = Result<PosternRemoveReply, u32>> + Send;

    /// The ids of the files in such a directory, in ascending order, 32 hex digits each.
    fn postern_list(
        &mut self,
        request: PosternListRequest,
    ) -> impl Future<Output = Result<PosternListReply, u32>> + Send;

    /// The first lease with a handle of `first` or above that somebody else asks for, or that was
    /// taken away; `ENOENT` if there is none. Look when the port's word LEASES changes.
    fn postern_lease(
        &mut self,
        request: PosternLeaseRequest,
    ) -> impl Future<Output = Result<PosternLeaseReply, u32>> + Send;

    /// Keeps a lease that somebody asks for. It is not asked for again for a second.
    fn postern_keep(
        &mut self,
        request: PosternKeepRequest,
    ) -> impl Future<Output = Result<PosternKeepReply, u32>> + Send;

    /// A part of what the daemon has measured, as JSON text: items from number `first` on as far
    /// as they fit, and the number of the one after them (0: none). With records, for some seconds
    /// more requests than usual are recorded: those that take at least so long, and one in so many.
    /// With the probes, 0 and 1 in place of that time switch them off and on.
    fn postern_measured(
        &mut self,
        request: PosternMeasuredRequest,
    ) -> impl Future<Output = Result<PosternMeasuredReply, u32>> + Send;

    /// What only the enclave knows of a volume that it has open, counted since it opened it: claims
    /// for whoever watches. Nothing is decided on them. Made only if both sides have
    /// `POSTERN_FEATURE_TELL`.
    fn postern_tell(
        &mut self,
        request: PosternTellRequest,
    ) -> impl Future<Output = Result<PosternTellReply, u32>> + Send;
}

/// Decodes a request, calls the host, and writes the answer in place of what `reply` held.
///
/// A host that answers more than was asked for, or an errno out of range, is a fault of
/// the host's: the enclave is told EOVERFLOW or EIO.
///
/// # Errors
/// [`Malformed`] if `request` is none: the host was not called and `reply` is empty.
pub async fn dispatch<H: Host + Send>(
    host: &mut H,
    request: &[u8],
    reply: &mut Vec<u8>,
) -> Result<(), Malformed> {
    reply.clear();
    match Request::decode(request)? {
        Request::PosternAttach(request) => {
            match host.postern_attach(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    answer.attached.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternOpen(request) => {
            match host.postern_open(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    answer.file.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternClose(request) => {
            match host.postern_close(request).await {
                Ok(PosternCloseReply) => Writer::reply(reply).end_reply(),
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternStats(request) => {
            let limit_text = request.capacity;
            match host.postern_stats(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    writer.bytes(&answer.text, limit_text);
                    answer.length.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternCreate(request) => {
            match host.postern_create(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    answer.file.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternRemove(request) => {
            match host.postern_remove(request).await {
                Ok(PosternRemoveReply) => Writer::reply(reply).end_reply(),
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternList(request) => {
            let limit_ids = request.capacity;
            match host.postern_list(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    writer.bytes(&answer.ids, limit_ids);
                    answer.length.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternLease(request) => {
            match host.postern_lease(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    answer.lease.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternKeep(request) => {
            match host.postern_keep(request).await {
                Ok(PosternKeepReply) => Writer::reply(reply).end_reply(),
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternMeasured(request) => {
            let limit_text = request.capacity;
            match host.postern_measured(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    writer.bytes(&answer.text, limit_text);
                    answer.length.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::PosternTell(request) => {
            match host.postern_tell(request).await {
                Ok(PosternTellReply) => Writer::reply(reply).end_reply(),
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
    }
    Ok(())
}

/// The trusted side: the calls, over any carrier.
///
/// Holds whatever the host answers: no panic, no more memory than the answer is long, and
/// no buffer longer than was asked for. Values are claims of the host.
#[derive(Clone, Debug)]
pub struct Enclave<C>(pub C);

impl<C: Carrier> Enclave<C> {
    /// Hands a port to the daemon and starts a session (session 0), or adds a lane to one.
    /// The port's memory and its three doorbells travel beside the request. A session that goes on
    /// after another daemon ended says up to which number that one gave out handles.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_attach(
        &mut self,
        request: &PosternAttachRequest,
    ) -> Result<PosternAttachReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternAttach(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternAttachReply {
            attached: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Opens a host file that the operator has allowed, O_DIRECT, and takes its lease: alone for
    /// writing, shared for reading. A lease that somebody else has is `EBUSY`; with
    /// `POSTERN_OPEN_ASK` it is asked for, which is `EAGAIN`: call again soon, or the wish ends.
    /// With a handle below the session's first own one the file gets that handle back which it had
    /// at a daemon that ended.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_open(
        &mut self,
        request: &PosternOpenRequest,
    ) -> Result<PosternOpenReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternOpen(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternOpenReply {
            file: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Gives a host file back; what is in flight on it completes first.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_close(
        &mut self,
        request: &PosternCloseRequest,
    ) -> Result<PosternCloseReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternClose(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let reader = Reader::reply(&answer)?;
        reader.end()?;
        Ok(PosternCloseReply)
    }

    /// The daemon's statistics as JSON text.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_stats(
        &mut self,
        request: &PosternStatsRequest,
    ) -> Result<PosternStatsReply, CallError<C::Error>> {
        let limit_text = request.capacity;
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternStats(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternStatsReply {
            text: reader.bytes(limit_text)?,
            length: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Makes a file in a directory that the operator has allowed, as zeros, and opens it.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_create(
        &mut self,
        request: &PosternCreateRequest,
    ) -> Result<PosternCreateReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternCreate(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternCreateReply {
            file: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Removes a file that nobody has open from a directory that the operator has allowed.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_remove(
        &mut self,
        request: &PosternRemoveRequest,
    ) -> Result<PosternRemoveReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternRemove(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let reader = Reader::reply(&answer)?;
        reader.end()?;
        Ok(PosternRemoveReply)
    }

    /// The ids of the files in such a directory, in ascending order, 32 hex digits each.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_list(
        &mut self,
        request: &PosternListRequest,
    ) -> Result<PosternListReply, CallError<C::Error>> {
        let limit_ids = request.capacity;
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternList(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternListReply {
            ids: reader.bytes(limit_ids)?,
            length: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// The first lease with a handle of `first` or above that somebody else asks for, or that was
    /// taken away; `ENOENT` if there is none. Look when the port's word LEASES changes.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_lease(
        &mut self,
        request: &PosternLeaseRequest,
    ) -> Result<PosternLeaseReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternLease(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternLeaseReply {
            lease: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Keeps a lease that somebody asks for. It is not asked for again for a second.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_keep(
        &mut self,
        request: &PosternKeepRequest,
    ) -> Result<PosternKeepReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternKeep(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let reader = Reader::reply(&answer)?;
        reader.end()?;
        Ok(PosternKeepReply)
    }

    /// A part of what the daemon has measured, as JSON text: items from number `first` on as far
    /// as they fit, and the number of the one after them (0: none). With records, for some seconds
    /// more requests than usual are recorded: those that take at least so long, and one in so many.
    /// With the probes, 0 and 1 in place of that time switch them off and on.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_measured(
        &mut self,
        request: &PosternMeasuredRequest,
    ) -> Result<PosternMeasuredReply, CallError<C::Error>> {
        let limit_text = request.capacity;
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternMeasured(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = PosternMeasuredReply {
            text: reader.bytes(limit_text)?,
            length: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// What only the enclave knows of a volume that it has open, counted since it opened it: claims
    /// for whoever watches. Nothing is decided on them. Made only if both sides have
    /// `POSTERN_FEATURE_TELL`.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn postern_tell(
        &mut self,
        request: &PosternTellRequest,
    ) -> Result<PosternTellReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::PosternTell(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let reader = Reader::reply(&answer)?;
        reader.end()?;
        Ok(PosternTellReply)
    }
}

/// The calls with `transition_using_threads`. No message is made of them: what runs the
/// enclave serves them in its own process, without a transition where it has threads for it.
///
/// Holds for their callers: an answer is a claim, and each may return early.
pub trait Switchless {
    /// The doorbells. They reach no daemon's call: what runs the enclave signals an eventfd, or
    /// waits for one.
    ///
    /// Wakes the daemon. Made only after publishing, and only if the port says that it sleeps.
    ///
    /// `port`: Whose daemon: where the port begins.
    ///
    /// # Errors
    /// A Linux errno, 1..=4095.
    fn postern_wake(
        &self,
        port: u64,
    ) -> Result<(), u32>;

    /// Sleeps until the daemon has rung since the last such sleep, or longer than the limit. Made
    /// only after the port says who sleeps, and only if nothing was published then.
    ///
    /// `port`: Whose doorbell: where the port begins.
    ///
    /// `sleeper`: Who sleeps.
    ///
    /// `limit_ns`: Nanoseconds at most.
    ///
    /// # Errors
    /// A Linux errno, 1..=4095.
    fn postern_sleep(
        &self,
        port: u64,
        sleeper: PosternSleeper,
        limit_ns: u64,
    ) -> Result<(), u32>;
}
