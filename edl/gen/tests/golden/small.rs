// Generated from small.edl by postern-edl-gen. Change that file, not this one.

use crate::wire::{Reader, Wire, Writer};
use alloc::{string::String, vec::Vec};

pub use crate::wire::{CallError, Carrier, Malformed};

/// FNV-1a of the interface's normal form. Equal on both sides if and only if (collisions
/// aside) they were built from the same interface; no protection against a forger.
pub const FINGERPRINT: u64 = 0x213d3d7a5babea30;

/// How urgent an order is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Urgency {
    /// It can wait.
    #[default]
    Calm = 0,
    /// Number 4.
    Soon = 4,
    /// Number 5.
    Now = 5,
}

impl Wire for Urgency {
    fn put(&self, writer: &mut Writer<'_>) {
        (*self as u32).put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let at = reader.position();
        match u32::get(reader)? {
            0 => Ok(Self::Calm),
            4 => Ok(Self::Soon),
            5 => Ok(Self::Now),
            _ => Err(Malformed::Range { word: at }),
        }
    }
}

/// A struct of the interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Below zero in the cellar.
    pub row: i16,
    /// `shelf` of `Place`.
    pub shelf: u8,
    /// `type` of `Place`.
    pub r#type: Urgency,
}

impl Wire for Place {
    fn put(&self, writer: &mut Writer<'_>) {
        self.row.put(writer);
        self.shelf.put(writer);
        self.r#type.put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            row: Wire::get(reader)?,
            shelf: Wire::get(reader)?,
            r#type: Wire::get(reader)?,
        })
    }
}

/// A list \<with\> \[brackets\] and \*stars\*.
/// Ordered by row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// `places` of `Order`.
    pub places: [Place; 3],
    /// `balance` of `Order`.
    pub balance: i64,
    /// `total` of `Order`.
    pub total: u64,
}

impl Wire for Order {
    fn put(&self, writer: &mut Writer<'_>) {
        self.places.put(writer);
        self.balance.put(writer);
        self.total.put(writer);
    }

    fn get(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            places: Wire::get(reader)?,
            balance: Wire::get(reader)?,
            total: Wire::get(reader)?,
        })
    }
}

/// What [`Host::ping`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PingRequest;

/// What [`Host::ping`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PingReply;

/// What [`Host::order_place`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrderPlaceRequest {
    /// `order` of `order_place`.
    pub order: Order,
    /// `kept` of `order_place`.
    pub kept: Order,
    /// `self_name` of `order_place`.
    pub self_name: String,
}

/// What [`Host::order_place`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrderPlaceReply {
    /// `kept` of `order_place`.
    pub kept: Order,
    /// `urgency` of `order_place`.
    pub urgency: Urgency,
}

/// What [`Host::order_copy`] is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrderCopyRequest {
    /// `source` of `order_copy`.
    pub source: Vec<u8>,
    /// `numbers` of `order_copy`.
    pub numbers: Vec<u32>,
    /// `places` of `order_copy`.
    pub places: Vec<Place>,
    /// `room` of `order_copy`.
    pub room: u32,
    /// `match` of `order_copy`.
    pub r#match: u64,
    /// `single` of `order_copy`.
    pub single: u64,
    /// `where` of `order_copy`.
    ///
    /// An address; the memory itself is not in the message.
    pub r#where: u64,
}

/// What [`Host::order_copy`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrderCopyReply {
    /// `places` of `order_copy`.
    ///
    /// At most as many elements as the request's `places` is long.
    pub places: Vec<Place>,
    /// `target` of `order_copy`.
    ///
    /// At most as many elements as the request's `room`.
    pub target: Vec<u8>,
    /// `signed_numbers` of `order_copy`.
    ///
    /// At most as many elements as the request's `r#match`.
    pub signed_numbers: Vec<i32>,
    /// `grid` of `order_copy`.
    pub grid: [i8; 4],
    /// `digest` of `order_copy`.
    pub digest: [u8; 16],
}

/// A request as it travels: its number, then its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Call 1, `ping`.
    Ping(PingRequest),
    /// Call 2, `order_place`.
    OrderPlace(OrderPlaceRequest),
    /// Call 3, `order_copy`.
    OrderCopy(OrderCopyRequest),
}

impl Request {
    /// Reads a whole request; `bytes` must hold it and nothing else.
    ///
    /// # Errors
    /// [`Malformed`] for anything that [`Self::encode`] would not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes)?;
        let request = match u64::get(&mut reader)? {
            1 => Self::Ping(PingRequest),
            2 => Self::OrderPlace(OrderPlaceRequest {
                order: Wire::get(&mut reader)?,
                kept: Wire::get(&mut reader)?,
                self_name: reader.text()?,
            }),
            3 => Self::OrderCopy(OrderCopyRequest {
                source: reader.bytes(255)?,
                numbers: reader.values(u64::MAX)?,
                places: reader.values(65535)?,
                room: Wire::get(&mut reader)?,
                r#match: Wire::get(&mut reader)?,
                single: Wire::get(&mut reader)?,
                r#where: Wire::get(&mut reader)?,
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
            Self::Ping(_) => {
                1_u64.put(&mut writer);
            }
            Self::OrderPlace(request) => {
                2_u64.put(&mut writer);
                request.order.put(&mut writer);
                request.kept.put(&mut writer);
                writer.text(&request.self_name);
            }
            Self::OrderCopy(request) => {
                3_u64.put(&mut writer);
                writer.bytes(&request.source, 255);
                writer.values(&request.numbers, u64::MAX);
                writer.values(&request.places, 65535);
                request.room.put(&mut writer);
                request.r#match.put(&mut writer);
                request.single.put(&mut writer);
                request.r#where.put(&mut writer);
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
    /// Nothing in, nothing out.
    fn ping(
        &mut self,
        request: PingRequest,
    ) -> impl Future<Output = Result<PingReply, u32>> + Send;

    /// Call `order_place`.
    fn order_place(
        &mut self,
        request: OrderPlaceRequest,
    ) -> impl Future<Output = Result<OrderPlaceReply, u32>> + Send;

    /// Bytes and numbers of every length.
    fn order_copy(
        &mut self,
        request: OrderCopyRequest,
    ) -> impl Future<Output = Result<OrderCopyReply, u32>> + Send;
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
        Request::Ping(request) => {
            match host.ping(request).await {
                Ok(PingReply) => Writer::reply(reply).end_reply(),
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::OrderPlace(request) => {
            match host.order_place(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    answer.kept.put(&mut writer);
                    answer.urgency.put(&mut writer);
                    writer.end_reply();
                }
                Err(errno) => Writer::refusal(reply, errno),
            }
        }
        Request::OrderCopy(request) => {
            let limit_places = request.places.len() as u64;
            let limit_target = u64::from(request.room);
            let limit_signed_numbers = request.r#match;
            match host.order_copy(request).await {
                Ok(answer) => {
                    let mut writer = Writer::reply(reply);
                    writer.values(&answer.places, limit_places);
                    writer.bytes(&answer.target, limit_target);
                    writer.values(&answer.signed_numbers, limit_signed_numbers);
                    answer.grid.put(&mut writer);
                    answer.digest.put(&mut writer);
                    writer.end_reply();
                }
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
    /// Nothing in, nothing out.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn ping(
        &mut self,
        request: &PingRequest,
    ) -> Result<PingReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::Ping(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let reader = Reader::reply(&answer)?;
        reader.end()?;
        Ok(PingReply)
    }

    /// Call `order_place`.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn order_place(
        &mut self,
        request: &OrderPlaceRequest,
    ) -> Result<OrderPlaceReply, CallError<C::Error>> {
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::OrderPlace(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = OrderPlaceReply {
            kept: Wire::get(&mut reader)?,
            urgency: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }

    /// Bytes and numbers of every length.
    ///
    /// # Errors
    /// [`CallError`]: the carrier failed, the host refused, or the answer (or this request)
    /// is malformed.
    pub fn order_copy(
        &mut self,
        request: &OrderCopyRequest,
    ) -> Result<OrderCopyReply, CallError<C::Error>> {
        let limit_places = request.places.len() as u64;
        let limit_target = u64::from(request.room);
        let limit_signed_numbers = request.r#match;
        let (mut asked, mut answer) = (Vec::new(), Vec::new());
        Request::OrderCopy(request.clone()).encode(&mut asked)?;
        self.0.call(&asked, &mut answer).map_err(CallError::Carrier)?;
        let mut reader = Reader::reply(&answer)?;
        let reply = OrderCopyReply {
            places: reader.values(limit_places)?,
            target: reader.bytes(limit_target)?,
            signed_numbers: reader.values(limit_signed_numbers)?,
            grid: Wire::get(&mut reader)?,
            digest: Wire::get(&mut reader)?,
        };
        reader.end()?;
        Ok(reply)
    }
}

/// The calls with `transition_using_threads`. No message is made of them: what runs the
/// enclave serves them in its own process, without a transition where it has threads for it.
///
/// Holds for their callers: an answer is a claim, and each may return early.
pub trait Switchless {
    /// Rings for attention.
    ///
    /// `urgency`: How loud.
    ///
    /// # Errors
    /// A Linux errno, 1..=4095.
    fn ring_bell(
        &self,
        urgency: Urgency,
        r#where: u64,
        r#type: i32,
    ) -> Result<(), u32>;

    /// Call `doze`.
    ///
    /// # Errors
    /// A Linux errno, 1..=4095.
    fn doze(
        &self,
    ) -> Result<(), u32>;
}
