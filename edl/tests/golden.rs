//! The generator's golden file, compiled and run: what `postern.edl` does not use works too.
#![allow(clippy::unwrap_used)]

extern crate alloc;

mod wire {
    pub use postern_edl::wire::*;
}

#[allow(dead_code, reason = "the test calls a part of the generated code")]
mod calls {
    include!("../gen/tests/golden/small.rs");
}

use calls::{
    CallError, Carrier, Enclave, Host, Malformed, Order, OrderCopyReply, OrderCopyRequest,
    OrderPlaceReply, OrderPlaceRequest, PingReply, PingRequest, Place, Request, Switchless,
    Urgency, dispatch,
};
use proptest::prelude::*;
use std::task::{Context, Poll, Waker};

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[derive(Clone, Debug, Default)]
struct Told {
    place: OrderPlaceReply,
    copy: OrderCopyReply,
    asked: Option<Request>,
    reply: Vec<u8>,
}

impl Host for Told {
    async fn ping(&mut self, request: PingRequest) -> Result<PingReply, u32> {
        self.asked = Some(Request::Ping(request));
        Ok(PingReply)
    }

    async fn order_place(&mut self, request: OrderPlaceRequest) -> Result<OrderPlaceReply, u32> {
        self.asked = Some(Request::OrderPlace(request));
        Ok(self.place.clone())
    }

    async fn order_copy(&mut self, request: OrderCopyRequest) -> Result<OrderCopyReply, u32> {
        self.asked = Some(Request::OrderCopy(request));
        Ok(self.copy.clone())
    }
}

impl Carrier for Told {
    type Error = Malformed;

    fn call(&mut self, request: &[u8], reply: &mut Vec<u8>) -> Result<(), Malformed> {
        let done = std::pin::pin!(dispatch(self, request, reply))
            .poll(&mut Context::from_waker(Waker::noop()));
        self.reply.clone_from(reply);
        match done {
            Poll::Ready(done) => done,
            Poll::Pending => panic!("the future waits"),
        }
    }
}

fn place() -> Place {
    Place { row: -2, shelf: 255, r#type: Urgency::Now }
}

fn copy_request() -> OrderCopyRequest {
    OrderCopyRequest {
        source: vec![1, 2, 3],
        numbers: vec![7, u32::MAX],
        places: vec![place(), Place::default()],
        room: 2,
        r#match: 1,
        single: 9,
        r#where: u64::MAX,
    }
}

fn copy_reply() -> OrderCopyReply {
    OrderCopyReply {
        places: vec![place()],
        target: vec![4, 5],
        signed_numbers: vec![-1],
        grid: [1, -1, i8::MAX, i8::MIN],
        digest: [6; 16],
    }
}

#[test]
fn every_kind_of_field_is_the_words_that_the_format_says() {
    let mut bytes = Vec::new();
    Request::Ping(PingRequest).encode(&mut bytes).unwrap();
    assert_eq!(bytes, words(&[1]));
    Request::OrderCopy(copy_request()).encode(&mut bytes).unwrap();
    let minus_two = u64::MAX - 1;
    let expected = [
        &[3, 3, 0x03_02_01][..],          // source
        &[2, 7, 0xffff_ffff],             // numbers
        &[2, minus_two, 255, 5, 0, 0, 0], // places
        &[2, 1, 9, u64::MAX],             // room, match, single, where
    ];
    assert_eq!(bytes, words(&expected.concat()));
    let mut enclave = Enclave(Told { copy: copy_reply(), ..Told::default() });
    assert_eq!(enclave.order_copy(&copy_request()), Ok(copy_reply()));
    let expected = [
        &[0, 1, minus_two, 255, 5][..],      // errno, places
        &[2, 0x05_04],                       // target
        &[1, u64::MAX],                      // signed_numbers
        &[1, u64::MAX, 127, u64::MAX - 127], // grid
        &[6; 16],                            // digest
    ];
    assert_eq!(enclave.0.reply, words(&expected.concat()));
    assert_eq!(enclave.0.asked, Some(Request::OrderCopy(copy_request())));
}

#[test]
fn structs_by_value_by_pointer_and_enums_come_across() {
    let order = Order { places: [place(), place(), Place::default()], balance: -5, total: 3 };
    let request = OrderPlaceRequest {
        order: order.clone(),
        kept: Order::default(),
        self_name: "n\u{e9}".into(),
    };
    let reply = OrderPlaceReply { kept: order, urgency: Urgency::Soon };
    let mut enclave = Enclave(Told { place: reply.clone(), ..Told::default() });
    assert_eq!(enclave.order_place(&request), Ok(reply));
    assert_eq!(enclave.0.asked, Some(Request::OrderPlace(request)));
    assert_eq!(enclave.ping(&PingRequest), Ok(PingReply));
}

#[test]
fn a_buffer_is_bounded_by_its_length_parameter_in_both_directions() {
    const EOVERFLOW: u32 = 75;
    let too_long =
        |length, limit| Err(CallError::Malformed(Malformed::TooLong { word: 1, length, limit }));
    // In: `given` is a uint8_t.
    let mut enclave = Enclave(Told { copy: copy_reply(), ..Told::default() });
    let longest = OrderCopyRequest { source: vec![0; 255], ..copy_request() };
    assert_eq!(enclave.order_copy(&longest), Ok(copy_reply()));
    let longer = OrderCopyRequest { source: vec![0; 256], ..copy_request() };
    assert_eq!(enclave.order_copy(&longer), too_long(256, 255));
    // Out: no more than asked for; in and out: no more than went in.
    for reply in [
        OrderCopyReply { target: vec![0; 3], ..copy_reply() },
        OrderCopyReply { signed_numbers: vec![0; 2], ..copy_reply() },
        OrderCopyReply { places: vec![place(); 3], ..copy_reply() },
    ] {
        let mut enclave = Enclave(Told { copy: reply, ..Told::default() });
        let refused = Err(CallError::Refused(EOVERFLOW));
        assert_eq!(enclave.order_copy(&copy_request()), refused);
    }
}

#[test]
fn a_count_that_the_message_does_not_hold_is_refused_before_its_elements_are_read() {
    // An empty source, then three numbers in two words.
    let short = Err(Malformed::Short { word: 2 });
    assert_eq!(Request::decode(&words(&[3, 0, 3, 1, 1])), short);
    assert_eq!(Request::decode(&words(&[3, 0, u64::MAX, 1, 1])), short);
}

#[test]
fn a_number_that_is_no_enumerator_is_refused() {
    let mut bytes = Vec::new();
    let request = OrderPlaceRequest::default();
    Request::OrderPlace(request).encode(&mut bytes).unwrap();
    assert_eq!(bytes[24..32], words(&[0]));
    for (number, accepted) in [(0, true), (1, false), (4, true), (5, true), (6, false)] {
        bytes[24..32].copy_from_slice(&words(&[number]));
        let decoded = Request::decode(&bytes);
        assert_eq!(decoded.is_ok(), accepted, "{number}");
        if !accepted {
            assert_eq!(decoded, Err(Malformed::Range { word: 3 }));
        }
    }
}

/// Rings by itself, as what runs an enclave would.
#[derive(Default)]
struct Runtime(std::sync::Mutex<Vec<(Urgency, u64, i32)>>);

impl Switchless for Runtime {
    fn ring_bell(&self, urgency: Urgency, r#where: u64, r#type: i32) -> Result<(), u32> {
        self.0.lock().unwrap().push((urgency, r#where, r#type));
        Ok(())
    }

    fn doze(&self) -> Result<(), u32> {
        Err(4)
    }
}

#[test]
fn switchless_calls_are_plain_calls_of_a_trait_that_can_be_an_object() {
    let runtime = Runtime::default();
    let bell: &dyn Switchless = &runtime;
    assert_eq!(bell.ring_bell(Urgency::Soon, u64::MAX, -1), Ok(()));
    assert_eq!(bell.doze(), Err(4));
    assert_eq!(*runtime.0.lock().unwrap(), [(Urgency::Soon, u64::MAX, -1)]);
}

fn any_place() -> impl Strategy<Value = Place> {
    let urgency = prop::sample::select(&[Urgency::Calm, Urgency::Soon, Urgency::Now][..]);
    (any::<i16>(), any::<u8>(), urgency).prop_map(|(row, shelf, r#type)| Place {
        row,
        shelf,
        r#type,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn requests_and_replies_with_every_kind_of_buffer_come_across(
        source in prop::collection::vec(any::<u8>(), 0..40),
        numbers in prop::collection::vec(any::<u32>(), 0..9),
        places in prop::collection::vec(any_place(), 0..5),
        target in prop::collection::vec(any::<u8>(), 0..40),
        signed_numbers in prop::collection::vec(any::<i32>(), 0..9),
        grid in any::<[i8; 4]>(), digest in any::<[u8; 16]>(), single in any::<u64>(),
    ) {
        let request = OrderCopyRequest {
            source,
            numbers,
            places: places.clone(),
            room: 40,
            r#match: u64::MAX,
            single,
            r#where: single,
        };
        let reply = OrderCopyReply { places, target, signed_numbers, grid, digest };
        let mut enclave = Enclave(Told { copy: reply.clone(), ..Told::default() });
        prop_assert_eq!(enclave.order_copy(&request), Ok(reply));
        prop_assert_eq!(enclave.0.asked.take(), Some(Request::OrderCopy(request)));
    }

    #[test]
    fn what_is_accepted_has_one_encoding(
        call in 1..4_u64,
        rest in prop::collection::vec(prop_oneof![9 => 0..4_u64, 1 => any::<u64>()], 0..30),
    ) {
        let bytes = words(&[&[call][..], &rest].concat());
        if let Ok(request) = Request::decode(&bytes) {
            let mut again = Vec::new();
            prop_assert_eq!(request.encode(&mut again), Ok(()));
            prop_assert_eq!(again, bytes);
        }
    }
}
