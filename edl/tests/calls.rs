//! The control calls of `postern.edl`, from an enclave to a host and back.
//!
//! The bytes expected here are written down by hand from the rules in `wire`'s header.
#![allow(clippy::unwrap_used)]

use postern_edl::calls::{
    CallError, Carrier, Enclave, FINGERPRINT, Host, Malformed, PosternAttachReply,
    PosternAttachRequest, PosternAttached, PosternCloseReply, PosternCloseRequest,
    PosternCreateReply, PosternCreateRequest, PosternFile, PosternKeepReply, PosternKeepRequest,
    PosternLease, PosternLeaseReply, PosternLeaseRequest, PosternListReply, PosternListRequest,
    PosternMeasuredReply, PosternMeasuredRequest, PosternOpenReply, PosternOpenRequest,
    PosternRemoveReply, PosternRemoveRequest, PosternStatsReply, PosternStatsRequest,
    PosternTellReply, PosternTellRequest, Request, dispatch,
};
use proptest::prelude::*;
use std::task::{Context, Poll, Waker};

/// Runs a future that has nothing to wait for.
fn now<F: Future + Send>(future: F) -> F::Output {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("the future waits"),
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Answers every call as told and keeps what it was asked.
#[derive(Clone, Debug)]
struct Told<T> {
    answer: Result<T, u32>,
    asked: Option<Request>,
}

impl<T> Told<T> {
    fn new(answer: Result<T, u32>) -> Self {
        Self { answer, asked: None }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Any {
    Attach(PosternAttachReply),
    Open(PosternOpenReply),
    Close(PosternCloseReply),
    Stats(PosternStatsReply),
    Create(PosternCreateReply),
    Remove(PosternRemoveReply),
    List(PosternListReply),
    Lease(PosternLeaseReply),
    Keep(PosternKeepReply),
    Measured(PosternMeasuredReply),
    Tell(PosternTellReply),
}

macro_rules! told {
    ($($method:ident, $variant:ident, $request:ident, $reply:ident, $any:ident;)*) => {
        impl Host for Told<Any> {
            $(async fn $method(&mut self, request: $request) -> Result<$reply, u32> {
                self.asked = Some(Request::$variant(request));
                match self.answer.clone()? {
                    Any::$any(reply) => Ok(reply),
                    other => panic!("the script has {other:?}"),
                }
            })*
        }
    };
}

told! {
    postern_attach, PosternAttach, PosternAttachRequest, PosternAttachReply, Attach;
    postern_open, PosternOpen, PosternOpenRequest, PosternOpenReply, Open;
    postern_close, PosternClose, PosternCloseRequest, PosternCloseReply, Close;
    postern_stats, PosternStats, PosternStatsRequest, PosternStatsReply, Stats;
    postern_create, PosternCreate, PosternCreateRequest, PosternCreateReply, Create;
    postern_remove, PosternRemove, PosternRemoveRequest, PosternRemoveReply, Remove;
    postern_list, PosternList, PosternListRequest, PosternListReply, List;
    postern_lease, PosternLease, PosternLeaseRequest, PosternLeaseReply, Lease;
    postern_keep, PosternKeep, PosternKeepRequest, PosternKeepReply, Keep;
    postern_measured, PosternMeasured, PosternMeasuredRequest, PosternMeasuredReply, Measured;
    postern_tell, PosternTell, PosternTellRequest, PosternTellReply, Tell;
}

/// A carrier right into a host.
struct Direct<H>(H);

impl<H: Host + Send> Carrier for Direct<H> {
    type Error = Malformed;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Malformed> {
        now(dispatch(&mut self.0, request, reply))
    }
}

/// A carrier whose host answers any bytes.
struct Answers(Vec<u8>);

impl Carrier for Answers {
    type Error = core::convert::Infallible;

    fn call(&mut self, _: &[u8], reply: &mut Vec<u8>) -> Result<(), Self::Error> {
        reply.clone_from(&self.0);
        Ok(())
    }
}

fn attach() -> PosternAttachRequest {
    PosternAttachRequest {
        version: 1,
        features: 2,
        session: 3,
        token: [4, 5],
        handles: 8,
        port: 6,
        port_bytes: 7,
    }
}

#[test]
fn each_request_is_the_words_that_the_format_says() {
    let mut bytes = vec![9; 3];
    Request::PosternAttach(attach()).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[1, 1, 2, 3, 4, 5, 8, 6, 7]));

    let open = PosternOpenRequest { name: "/volumes/a".into(), flags: 1, handle: 9 };
    Request::PosternOpen(open).encode(&mut bytes).unwrap();
    let name = [u64::from_le_bytes(*b"/volumes"), u64::from_le_bytes(*b"/a\0\0\0\0\0\0")];
    assert_eq!(bytes, words(&[2, 10, name[0], name[1], 1, 9]));

    Request::PosternClose(PosternCloseRequest { handle: 8 }).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[3, 8]));

    Request::PosternStats(PosternStatsRequest { capacity: 9 }).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[4, 9]));

    let short = u64::from(u16::from_le_bytes(*b"d/"));
    let create = PosternCreateRequest { name: "d/".into(), blocks: 10 };
    Request::PosternCreate(create).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[5, 2, short, 10]));

    let remove = PosternRemoveRequest { name: "d/".into() };
    Request::PosternRemove(remove).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[6, 2, short]));

    let list = PosternListRequest { name: "d/".into(), after: String::new(), capacity: 32 };
    Request::PosternList(list).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[7, 2, short, 0, 32]));

    Request::PosternLease(PosternLeaseRequest { first: 11 }).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[8, 11]));

    Request::PosternKeep(PosternKeepRequest { handle: 12 }).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[9, 12]));

    let measured =
        PosternMeasuredRequest { what: 1, first: 2, least_ns: 3, one_in: 4, capacity: 5 };
    Request::PosternMeasured(measured).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[10, 1, 2, 3, 4, 5]));

    let tell = PosternTellRequest { handle: 6, claims: [1, 2, 3, 4, 5, 6, 7, 8, 9] };
    Request::PosternTell(tell).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[11, 6, 1, 2, 3, 4, 5, 6, 7, 8, 9]));
}

#[test]
fn each_reply_is_the_words_that_the_format_says() {
    let attached = PosternAttached { version: 1, lane: 2, features: 3, session: 4, token: [5, 6] };
    let file = PosternFile { handle: 1, flags: 0, blocks: 77, alignment: 512 };
    let stats = PosternStatsReply { text: b"{}".to_vec(), length: 2 };
    for (answer, request, expected) in [
        (
            Any::Attach(PosternAttachReply { attached }),
            words(&[1, 1, 2, 3, 4, 5, 8, 6, 7]),
            words(&[0, 1, 2, 3, 4, 5, 6]),
        ),
        (Any::Open(PosternOpenReply { file }), words(&[2, 0, 1, 0]), words(&[0, 1, 0, 77, 512])),
        (Any::Close(PosternCloseReply), words(&[3, 8]), words(&[0])),
        (
            Any::Create(PosternCreateReply {
                file: PosternFile { handle: 1, ..Default::default() },
            }),
            words(&[5, 0, 9]),
            words(&[0, 1, 0, 0, 0]),
        ),
        (Any::Remove(PosternRemoveReply), words(&[6, 0]), words(&[0])),
        (
            Any::List(PosternListReply { ids: b"ab".to_vec(), length: 2 }),
            words(&[7, 0, 0, 32]),
            words(&[0, 2, u64::from(u16::from_le_bytes(*b"ab")), 2]),
        ),
        (
            Any::Lease(PosternLeaseReply { lease: PosternLease { handle: 3, state: 1 } }),
            words(&[8, 0]),
            words(&[0, 3, 1]),
        ),
        (Any::Keep(PosternKeepReply), words(&[9, 3]), words(&[0])),
        (Any::Tell(PosternTellReply), words(&[11, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9]), words(&[0])),
        (
            Any::Measured(PosternMeasuredReply { text: b"{}".to_vec(), length: 2 }),
            words(&[10, 1, 0, 0, 0, 2]),
            words(&[0, 2, u64::from(u16::from_le_bytes(*b"{}")), 2]),
        ),
        (
            Any::Stats(stats),
            words(&[4, 2]),
            words(&[0, 2, u64::from(u16::from_le_bytes(*b"{}")), 2]),
        ),
    ] {
        let mut reply = vec![1; 5];
        now(dispatch(&mut Told::new(Ok(answer)), &request, &mut reply)).unwrap();
        assert_eq!(reply, expected);
    }
}

#[test]
fn what_the_enclave_asks_arrives_and_what_the_host_answers_comes_back() {
    let attached = PosternAttached { version: 1, lane: 2, features: 3, session: 4, token: [5, 6] };
    let reply = PosternAttachReply { attached };
    let mut enclave = Enclave(Direct(Told::new(Ok(Any::Attach(reply.clone())))));
    assert_eq!(enclave.postern_attach(&attach()), Ok(reply));
    assert_eq!(enclave.0.0.asked, Some(Request::PosternAttach(attach())));

    let mut enclave = Enclave(Direct(Told::new(Ok(Any::Close(PosternCloseReply)))));
    assert_eq!(enclave.postern_close(&PosternCloseRequest { handle: 3 }), Ok(PosternCloseReply));

    // A text as long as the room, one that is shorter, and none.
    for length in [16, 9, 8, 1, 0] {
        let stats = PosternStatsReply { text: vec![b'x'; length], length: length as u64 };
        let mut enclave = Enclave(Direct(Told::new(Ok(Any::Stats(stats.clone())))));
        assert_eq!(enclave.postern_stats(&PosternStatsRequest { capacity: 16 }), Ok(stats));
    }
}

#[test]
fn a_refusal_carries_its_errno_and_an_impossible_one_is_eio() {
    for (errno, seen) in [(1, 1), (13, 13), (4095, 4095), (0, 5), (4096, 5), (u32::MAX, 5)] {
        let mut enclave = Enclave(Direct(Told::<Any>::new(Err(errno))));
        let open = PosternOpenRequest { name: "/a".into(), flags: 0, handle: 0 };
        assert_eq!(enclave.postern_open(&open), Err(CallError::Refused(seen)));
        let close = PosternCloseRequest { handle: 1 };
        assert_eq!(enclave.postern_close(&close), Err(CallError::Refused(seen)));
    }
}

#[test]
fn a_host_that_writes_past_the_room_gives_eoverflow_and_no_byte() {
    const EOVERFLOW: u32 = 75;
    let stats = PosternStatsReply { text: vec![0x55; 17], length: 17 };
    let mut host = Told::new(Ok(Any::Stats(stats)));
    let mut reply = Vec::new();
    now(dispatch(&mut host, &words(&[4, 16]), &mut reply)).unwrap();
    assert_eq!(reply, words(&[u64::from(EOVERFLOW)]));
}

#[test]
fn the_enclave_refuses_every_reply_that_is_not_one() {
    let stats = |answer: Vec<u8>| {
        Enclave(Answers(answer)).postern_stats(&PosternStatsRequest { capacity: 8 })
    };
    let malformed = |fault| Err(CallError::Malformed(fault));
    let (x, xy) = (u64::from(b'x'), u64::from(u16::from_le_bytes(*b"xy")));
    assert_eq!(stats(words(&[0, 1, x, 1])).unwrap().text, b"x");
    assert_eq!(stats(vec![]), malformed(Malformed::Short { word: 0 }));
    assert_eq!(stats(vec![0; 7]), malformed(Malformed::Ragged { bytes: 7 }));
    assert_eq!(stats(words(&[0])), malformed(Malformed::Short { word: 1 }));
    assert_eq!(stats(words(&[0, 1])), malformed(Malformed::Short { word: 1 }));
    assert_eq!(stats(words(&[0, 1, x])), malformed(Malformed::Short { word: 3 }));
    assert_eq!(stats(words(&[0, 1, x, 1, 0])), malformed(Malformed::Long { word: 4 }));
    assert_eq!(stats(words(&[0, 1, xy, 1])), malformed(Malformed::Padding { word: 1 }));
    let long = Malformed::TooLong { word: 1, length: 9, limit: 8 };
    assert_eq!(stats(words(&[0, 9, x, x, 9])), malformed(long));
    let long = Malformed::TooLong { word: 1, length: u64::MAX, limit: 8 };
    assert_eq!(stats(words(&[0, u64::MAX, x, 9])), malformed(long));
    assert_eq!(stats(words(&[4096])), malformed(Malformed::Range { word: 0 }));
    assert_eq!(stats(words(&[1 << 32])), malformed(Malformed::Range { word: 0 }));
    assert_eq!(stats(words(&[5, 0])), malformed(Malformed::Long { word: 1 }));

    // Any room: the length is bounded by the answer, not by what was asked for.
    let mut enclave = Enclave(Answers(words(&[0, u64::MAX, 0])));
    let all = PosternStatsRequest { capacity: u64::MAX };
    assert_eq!(enclave.postern_stats(&all), malformed(Malformed::Short { word: 1 }));
}

#[test]
fn the_host_is_not_called_for_a_request_that_is_not_one() {
    let ab = u64::from(u16::from_le_bytes(*b"ab"));
    for (request, fault) in [
        (vec![], Malformed::Short { word: 0 }),
        (vec![0; 9], Malformed::Ragged { bytes: 9 }),
        (words(&[0]), Malformed::UnknownCall { call: 0 }),
        (words(&[12, 0]), Malformed::UnknownCall { call: 12 }),
        (words(&[u64::MAX]), Malformed::UnknownCall { call: u64::MAX }),
        (words(&[3]), Malformed::Short { word: 1 }),
        (words(&[3, 1, 1]), Malformed::Long { word: 2 }),
        (words(&[3, 1 << 32]), Malformed::Range { word: 1 }),
        (words(&[2, 2, ab]), Malformed::Short { word: 3 }),
        (words(&[2, 1, ab, 0]), Malformed::Padding { word: 1 }),
        (words(&[2, 3, ab, 0]), Malformed::Text { word: 1 }),
        (words(&[2, 1, 0xff, 0]), Malformed::Text { word: 1 }),
        (words(&[2, 17, ab, ab]), Malformed::Short { word: 1 }),
        (words(&[2, u64::MAX, ab, ab]), Malformed::Short { word: 1 }),
    ] {
        let (mut host, mut reply) = (Told::<Any>::new(Err(1)), vec![1]);
        assert_eq!(now(dispatch(&mut host, &request, &mut reply)), Err(fault), "{request:?}");
        assert_eq!((host.asked, reply.len()), (None, 0), "{request:?}");
    }
}

#[test]
fn a_name_with_a_nul_does_not_leave_the_enclave() {
    let mut enclave = Enclave(Direct(Told::<Any>::new(Err(1))));
    let open = PosternOpenRequest { name: "/a\0b".into(), flags: 0, handle: 0 };
    let fault = CallError::Malformed(Malformed::Text { word: 1 });
    assert_eq!(enclave.postern_open(&open), Err(fault));
    assert_eq!(enclave.0.0.asked, None);
}

#[test]
fn the_fingerprint_is_that_of_the_file() {
    let file = postern_edl_gen::parse("postern.edl", include_str!("../postern.edl")).unwrap();
    assert_eq!(FINGERPRINT, postern_edl_gen::fingerprint(&file));
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        (any::<[u32; 2]>(), any::<[u64; 5]>()).prop_map(|([version, handles], w)| {
            Request::PosternAttach(PosternAttachRequest {
                version,
                features: w[0],
                session: w[1],
                token: [w[2], w[3]],
                handles,
                port: w[4],
                port_bytes: !w[4],
            })
        }),
        ("[a-z/]{0,40}", any::<[u32; 2]>()).prop_map(|(name, [flags, handle])| {
            Request::PosternOpen(PosternOpenRequest { name, flags, handle })
        }),
        any::<u32>().prop_map(|handle| Request::PosternClose(PosternCloseRequest { handle })),
        any::<u64>().prop_map(|capacity| Request::PosternStats(PosternStatsRequest { capacity })),
        ("[a-z/]{0,20}", any::<u64>()).prop_map(|(name, blocks)| {
            Request::PosternCreate(PosternCreateRequest { name, blocks })
        }),
        "[a-z/]{0,20}".prop_map(|name| Request::PosternRemove(PosternRemoveRequest { name })),
        ("[a-z/]{0,20}", "[a-z/]{0,20}", any::<u64>()).prop_map(|(name, after, capacity)| {
            Request::PosternList(PosternListRequest { name, after, capacity })
        }),
    ]
}

/// Words near what the format uses, so that decoding gets past the first.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![4 => 0..20_u64, 1 => any::<u64>(), 1 => Just(u64::from(b'x'))];
    prop_oneof![
        3 => prop::collection::vec(word, 0..12).prop_map(|w| words(&w)),
        1 => prop::collection::vec(any::<u8>(), 0..100),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_request_decodes_to_what_was_encoded(request in request()) {
        let mut bytes = Vec::new();
        prop_assert_eq!(request.encode(&mut bytes), Ok(()));
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic_and_what_it_accepts_has_one_encoding(bytes in message()) {
        if let Ok(request) = Request::decode(&bytes) {
            let mut again = Vec::new();
            prop_assert_eq!(request.encode(&mut again), Ok(()));
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn a_request_with_one_bit_turned_is_refused_or_another_request(
        request in request(), place in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert_ne!(Request::decode(&bytes), Ok(request));
    }

    #[test]
    fn no_answer_makes_the_enclave_panic_or_take_more_than_it_asked_for(
        answer in message(), capacity in 0..20_u64,
    ) {
        let mut enclave = Enclave(Answers(answer));
        let _ = enclave.postern_attach(&attach());
        let _ = enclave.postern_open(&PosternOpenRequest::default());
        let _ = enclave.postern_close(&PosternCloseRequest::default());
        if let Ok(reply) = enclave.postern_stats(&PosternStatsRequest { capacity }) {
            prop_assert!(reply.text.len() as u64 <= capacity);
        }
    }
}
