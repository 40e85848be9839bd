//! Random scripts against a model that knows two queues and a number of slots.

use std::{collections::VecDeque, sync::Arc};

use postern_trusted::aio::FileTraits;
use proptest::prelude::*;

use crate::{
    Aio, EAGAIN, Postern,
    guest::{self, Batch, Events, HEAD, Iocb, TAIL},
    process::{Controlled, Machine},
};

#[derive(Clone, Debug)]
enum Step {
    /// Submit so many.
    Submit(usize),
    /// Complete so many, picked by these numbers.
    Complete(Vec<usize>),
    /// Take up to so many with io_getevents.
    Reap(usize),
    /// Take up to so many out of the ring without a call.
    ReapInPlace(usize),
    /// Store into a header word.
    Scribble(u64, u32),
}

fn honest() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..60_usize).prop_map(Step::Submit),
        3 => prop::collection::vec(any::<usize>(), 1..60).prop_map(Step::Complete),
        2 => (0..80_usize).prop_map(Step::Reap),
        1 => (0..80_usize).prop_map(Step::ReapInPlace),
    ]
}

fn scribble() -> impl Strategy<Value = Step> {
    let word = prop_oneof![Just(HEAD), Just(TAIL), Just(guest::NR), Just(guest::MAGIC)];
    (word, prop_oneof![any::<u32>(), 0..300_u32])
        .prop_map(|(word, value)| Step::Scribble(word, value))
}

struct Subject {
    postern: Postern,
    file: Arc<Controlled>,
    ctx: u64,
    slots: u32,
    next: u64,
}

impl Subject {
    fn new() -> Self {
        let postern = Postern::on(Machine { cpus: 1, ..Machine::default() });
        let file = postern.process.open_controlled(FileTraits::REGULAR);
        let ctx = postern.context(1);
        let slots = guest::ring_word(ctx, guest::NR);
        Self { postern, file, ctx, slots, next: 0 }
    }

    /// Submits `count` requests with fresh data; answers how many were taken.
    fn submit(&mut self, count: usize) -> usize {
        let fd = self.file.fd();
        let iocbs: Vec<_> =
            (self.next..).take(count).map(|data| Iocb { data, fd, ..Iocb::default() }).collect();
        let taken = match self.postern.submit(self.ctx, &Batch::new(&iocbs)) {
            EAGAIN => 0,
            taken => usize::try_from(taken).unwrap(),
        };
        self.next += taken as u64;
        taken
    }

    fn complete(&self, pick: usize) -> usize {
        let index = pick % self.file.pending();
        self.file.take_nth(index).1.finish(Ok(0));
        index
    }

    fn reap(&self, count: usize) -> Vec<u64> {
        let events = Events::new(count);
        let got = self.postern.reap(self.ctx, count as i64, &events);
        (0..usize::try_from(got).unwrap()).map(|index| events.data(index)).collect()
    }

    /// As fio and QEMU do it.
    fn reap_in_place(&self, count: usize) -> Vec<u64> {
        let mut head = guest::ring_word(self.ctx, HEAD);
        let tail = guest::ring_word(self.ctx, TAIL);
        let mut taken = Vec::new();
        while taken.len() < count && head != tail {
            taken.push(guest::peek(self.ctx + 32 + u64::from(head) * 32));
            head = (head + 1) % self.slots;
            guest::set_ring_word(self.ctx, HEAD, head);
        }
        taken
    }

    fn finish(self) {
        while self.file.pending() > 0 {
            self.complete(0);
        }
        assert_eq!(self.postern.io_destroy(self.ctx), 0);
    }
}

proptest! {
    /// Slots are neither lost nor handed out twice, and events come out once, in order of
    /// completion, however they are taken.
    #[test]
    fn slots_and_events_are_those_of_the_model(script in prop::collection::vec(honest(), 0..60)) {
        let mut subject = Subject::new();
        let limit = subject.slots as usize - 1;
        let (mut in_flight, mut ring) = (VecDeque::new(), VecDeque::new());
        for step in script {
            match step {
                Step::Submit(count) => {
                    let from = subject.next;
                    let taken = subject.submit(count);
                    prop_assert_eq!(taken, count.min(limit - in_flight.len() - ring.len()));
                    in_flight.extend(from..from + taken as u64);
                }
                Step::Complete(picks) => for pick in picks {
                    if in_flight.is_empty() { break }
                    let index = subject.complete(pick);
                    ring.extend(in_flight.remove(index));
                },
                Step::Reap(count) => {
                    let expected: Vec<u64> = ring.drain(..count.min(ring.len())).collect();
                    prop_assert_eq!(subject.reap(count), expected);
                }
                Step::ReapInPlace(count) => {
                    let expected: Vec<u64> = ring.drain(..count.min(ring.len())).collect();
                    prop_assert_eq!(subject.reap_in_place(count), expected);
                }
                Step::Scribble(..) => unreachable!(),
            }
            prop_assert_eq!(subject.postern.contexts.in_flight(), in_flight.len());
        }
        subject.finish();
    }

    /// Whatever the guest stores into the ring, nothing outside it is touched, no more requests
    /// are accepted than there are slots, and the context can be destroyed.
    #[test]
    fn a_guest_that_scribbles_harms_itself_only(
        script in prop::collection::vec(prop_oneof![3 => honest(), 1 => scribble()], 0..80),
    ) {
        let mut subject = Subject::new();
        let limit = subject.slots as usize - 1;
        for step in script {
            match step {
                Step::Submit(count) => drop(subject.submit(count)),
                Step::Complete(picks) => for pick in picks {
                    if subject.file.pending() == 0 { break }
                    subject.complete(pick);
                },
                Step::Reap(count) => prop_assert!(subject.reap(count).len() <= limit.min(count)),
                Step::ReapInPlace(_) => {}
                Step::Scribble(word, value) => guest::set_ring_word(subject.ctx, word, value),
            }
            prop_assert!(subject.file.pending() <= limit);
            prop_assert_eq!(subject.postern.contexts.in_flight(), subject.file.pending());
        }
        subject.finish();
    }
}
