//! Fuzz targets: control messages of any content, as the daemon reads requests and as the enclave
//! reads replies, against an oracle that knows postern.edl and none of the code ([`schema`]).
//!
//! Holds, or a target panics: exactly the messages that the interface describes are accepted; each
//! has one encoding; a host is called once for a good request and never for another one; what it
//! answers arrives unchanged, or as a refusal.
//!
//! An input says which call, then patches a plain message of it: place (2 bytes, taken modulo the
//! length), what (1), value (1).

mod schema;

use alloc::vec::Vec;
use core::pin::pin;
use core::task::{Context, Poll, Waker};

use self::schema::{Answer, Schema};
use crate::calls::{
    CallError, Carrier, Enclave, Host, PosternAttachReply, PosternAttachRequest, PosternCloseReply,
    PosternCloseRequest, PosternCreateReply, PosternCreateRequest, PosternKeepReply,
    PosternKeepRequest, PosternLeaseReply, PosternLeaseRequest, PosternListReply,
    PosternListRequest, PosternMeasuredReply, PosternMeasuredRequest, PosternOpenReply,
    PosternOpenRequest, PosternRemoveReply, PosternRemoveRequest, PosternStatsReply,
    PosternStatsRequest, PosternTellReply, PosternTellRequest, Request, dispatch,
};

std::thread_local! {
    static SCHEMA: Schema = Schema::new();
}

/// A host that keeps what it was asked and answers as told.
#[derive(Default)]
struct Told {
    answer: Option<Any>,
    asked: Vec<Request>,
}

/// The errno of a host that was told nothing.
const TOLD_NOTHING: u32 = 38;

macro_rules! calls {
    ($($method:ident, $variant:ident, $request:ident, $reply:ident;)*) => {
        /// A reply of any call.
        #[derive(Clone, Debug)]
        #[allow(clippy::enum_variant_names, reason = "the names are those of postern.edl")]
        enum Any {
            $($variant($reply),)*
        }

        impl Host for Told {
            $(async fn $method(&mut self, request: $request) -> Result<$reply, u32> {
                self.asked.push(Request::$variant(request));
                match self.answer.take() {
                    Some(Any::$variant(reply)) => Ok(reply),
                    _ => Err(TOLD_NOTHING),
                }
            })*
        }

        /// Has the enclave make the call.
        fn call<C: Carrier>(enclave: &mut Enclave<C>, request: &Request)
            -> Result<Any, CallError<C::Error>> {
            match request {
                $(Request::$variant(request) => enclave.$method(request).map(Any::$variant),)*
            }
        }
    };
}

calls! {
    postern_attach, PosternAttach, PosternAttachRequest, PosternAttachReply;
    postern_open, PosternOpen, PosternOpenRequest, PosternOpenReply;
    postern_close, PosternClose, PosternCloseRequest, PosternCloseReply;
    postern_stats, PosternStats, PosternStatsRequest, PosternStatsReply;
    postern_create, PosternCreate, PosternCreateRequest, PosternCreateReply;
    postern_remove, PosternRemove, PosternRemoveRequest, PosternRemoveReply;
    postern_list, PosternList, PosternListRequest, PosternListReply;
    postern_lease, PosternLease, PosternLeaseRequest, PosternLeaseReply;
    postern_keep, PosternKeep, PosternKeepRequest, PosternKeepReply;
    postern_measured, PosternMeasured, PosternMeasuredRequest, PosternMeasuredReply;
    postern_tell, PosternTell, PosternTellRequest, PosternTellReply;
}

/// Runs a future that has nothing to wait for.
fn now<F: Future + Send>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("a call waits, and there is nothing to wait for"),
    }
}

/// Patches `message`: single bytes, words at the ends of their range, its length.
fn patch(data: &[u8], message: &mut Vec<u8>) {
    for [low, high, what, value] in data.as_chunks::<4>().0.iter().take(64) {
        if message.is_empty() {
            message.push(0);
        }
        let at = usize::from(u16::from_le_bytes([*low, *high])) % message.len();
        let wide = u64::from(*value);
        let number = match what % 12 {
            0 => {
                message[at] = *value;
                continue;
            }
            1 => {
                message[at] ^= value;
                continue;
            }
            2 => {
                message.truncate(at);
                continue;
            }
            3 => {
                message.resize(message.len() + usize::from(*value), what / 12);
                continue;
            }
            4 => {
                let tail = message.split_off(at / 8 * 8);
                message.extend_from_slice(&wide.to_le_bytes());
                message.extend_from_slice(&tail);
                continue;
            }
            5 => wide,
            6 => u64::MAX - wide,
            7 => 1 << (value % 64),
            8 => (1 << (value % 64)) - 1,
            9 => 1_u64.rotate_right(1) + wide,
            10 => u64::MAX << (value % 64),
            _ => wide << 8,
        };
        if let Some(word) = message.get_mut(at / 8 * 8..at / 8 * 8 + 8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
    }
}

/// A request of any content: decoding, and dispatch to a host. First byte: the call; 80h: the rest
/// is the whole message.
pub fn request(data: &[u8]) {
    SCHEMA.with(|schema| {
        let Some((first, rest)) = data.split_first() else { return };
        let message = if first & 0x80 != 0 {
            rest.to_vec()
        } else {
            let mut message = schema.plain_request(usize::from(*first) % schema.calls());
            patch(rest, &mut message);
            message
        };
        let is = schema.request(&message);
        let decoded = Request::decode(&message);
        assert_eq!(decoded.is_ok(), is.is_some(), "{decoded:?} of {message:x?}");
        let mut host = Told::default();
        let mut reply = alloc::vec![0xee; 5];
        let dispatched = now(dispatch(&mut host, &message, &mut reply));
        match decoded {
            Ok(request) => {
                assert_eq!(dispatched, Ok(()));
                assert_eq!(reply, u64::from(TOLD_NOTHING).to_le_bytes());
                let mut again = Vec::new();
                assert_eq!(request.encode(&mut again), Ok(()));
                assert_eq!(again, message, "another encoding");
                assert_eq!(host.asked, [request]);
            }
            Err(malformed) => {
                assert_eq!(dispatched, Err(malformed));
                assert!(
                    host.asked.is_empty() && reply.is_empty(),
                    "a host was asked: {message:x?}"
                );
            }
        }
    });
}

/// A host that answers any bytes.
struct Answers(Vec<u8>);

impl Carrier for Answers {
    type Error = core::convert::Infallible;

    fn call(&mut self, _: &[u8], reply: &mut Vec<u8>) -> Result<(), Self::Error> {
        reply.clone_from(&self.0);
        Ok(())
    }
}

/// A reply of any content to a good request. First byte: the call; second: how many patches are
/// the request's.
pub fn reply(data: &[u8]) {
    SCHEMA.with(|schema| {
        let Some(([first, patches], rest)) = data.split_first_chunk() else { return };
        let number = usize::from(*first) % schema.calls();
        let (asked, answered) = rest.split_at(rest.len().min(usize::from(patches % 8) * 4));
        let mut message = schema.plain_request(number);
        patch(asked, &mut message);
        if schema.request(&message) != Some(number) {
            message = schema.plain_request(number);
        }
        let request = Request::decode(&message)
            .unwrap_or_else(|error| panic!("a good request is refused, {error}: {message:x?}"));
        let mut answer = schema.plain_reply(number);
        patch(answered, &mut answer);
        let is = schema.reply(number, &message, &answer);
        match call(&mut Enclave(Answers(answer.clone())), &request) {
            Ok(values) => {
                assert_eq!(is, Answer::Good, "accepted: {answer:x?}");
                let mut host = Told { answer: Some(values), ..Told::default() };
                let mut again = Vec::new();
                assert_eq!(now(dispatch(&mut host, &message, &mut again)), Ok(()));
                assert_eq!(again, answer, "another encoding");
            }
            Err(CallError::Refused(errno)) => {
                assert_eq!(is, Answer::Refused(errno), "refused: {answer:x?}");
            }
            Err(CallError::Malformed(why)) => {
                assert_eq!(is, Answer::None, "not understood, {why}: {answer:x?}");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use postern_hostile::inputs;

    #[test]
    fn what_is_a_message_is_what_postern_edl_says_and_nothing_else() {
        inputs::run("request", request, Some(2000));
        inputs::run("reply", reply, Some(2000));
    }

    /// The control: plain messages are good, so patches of them can be.
    #[test]
    fn a_plain_message_of_each_call_is_good() {
        let schema = Schema::new();
        for number in 0..schema.calls() {
            let (asked, answer) = (schema.plain_request(number), schema.plain_reply(number));
            assert_eq!(schema.request(&asked), Some(number));
            assert_eq!(schema.reply(number, &asked, &answer), Answer::Good, "call {number}");
            request(&[number as u8]);
            reply(&[number as u8, 0]);
        }
        let mut message = Vec::from([1; 8]);
        patch(&[1, 0, 2, 0, 0, 0, 3, 2, 0, 0, 1, 2], &mut message);
        assert_eq!(message, [3, 0, 0]);
        patch(&[0, 0, 3, 5, 3, 0, 7, 9, 9, 0, 4, 6], &mut message);
        assert_eq!(message, [6_u64.to_le_bytes(), 512_u64.to_le_bytes()].concat());
    }
}
