//! io_getevents and io_pgetevents.

use std::sync::Arc;

use postern_trusted::aio::{FileTraits, Signals, WaitEnd};

use crate::{
    Aio, EFAULT, EINTR, EINVAL, Postern, agree,
    guest::{self, Area, Batch, Events, HEAD, Iocb, NOWHERE, PAGE, Timespec},
    process::{Controlled, Waited},
    submit::{reads, scratch},
};

/// A context with `count` reads in flight whose data count up from 0.
fn in_flight(count: u64) -> (Arc<Postern>, Arc<Controlled>, u64) {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let iocbs: Vec<_> =
        (0..count).map(|data| Iocb { data, fd: file.fd(), ..Iocb::default() }).collect();
    assert_eq!(postern.submit(ctx, &Batch::new(&iocbs)), count as i64);
    postern.process.waited();
    (postern, file, ctx)
}

#[test]
fn the_timeout_is_read_before_the_context_and_the_counts_are_checked_after_it() {
    let expected = [EFAULT, EFAULT, EFAULT, EINVAL, EINVAL, EINVAL, EINVAL, EINVAL, 0, 0, 0];
    agree(&expected, |aio| {
        let ctx = aio.context(1);
        let events = Events::new(1);
        let get = |ctx, min, nr, timeout| aio.io_getevents(ctx, min, nr, events.at(), timeout);
        let zero = Timespec::new(0, 0);
        let answers = vec![
            get(0, 0, 1, u64::MAX),
            get(ctx, 0, 1, 1 << 63),
            get(ctx, -1, 1, 8),
            get(0, 0, 1, zero.at()),
            get(ctx, -1, 1, 0),
            get(ctx, 2, 1, 0),
            get(ctx, 0, -1, 0),
            get(ctx, i64::MIN, i64::MIN, 0),
            get(ctx, 0, 0, 0),
            get(ctx, 0, i64::MAX, 0),
            get(ctx, 1, 1, zero.at()),
        ];
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn events_come_in_order_and_no_more_than_asked_for() {
    agree(&[3, 2, 1, 2, 1, 3, 0], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let mut answers = vec![aio.submit(ctx, &reads(&file, &[1, 2, 3]))];
        let events = Events::new(4);
        answers.push(aio.io_getevents(ctx, 1, 2, events.at(), 0));
        answers.extend([events.data(0) as i64, events.data(1) as i64]);
        answers.push(aio.io_getevents(ctx, 1, i64::MAX, events.at(), 0));
        answers.push(events.data(0) as i64);
        answers.push(aio.reap(ctx, 4, &events));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn events_stay_in_order_across_many_turns_of_the_ring() {
    agree(&[0], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let events = Events::new(60);
        let mut wrong = 0;
        for turn in 0..20_u64 {
            let data: Vec<u64> = (turn * 50..turn * 50 + 50).collect();
            assert_eq!(aio.submit(ctx, &reads(&file, &data)), 50);
            assert_eq!(aio.reap(ctx, 60, &events), 50);
            wrong += (0..50).filter(|&index| events.data(index) != data[index]).count() as i64;
        }
        assert_eq!(aio.io_destroy(ctx), 0);
        vec![wrong]
    });
}

#[test]
fn an_unwritable_place_for_events_consumes_nothing() {
    agree(&[60, EFAULT, EFAULT, EFAULT, EFAULT, EFAULT, EFAULT, 0, 60], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let mut answers = vec![aio.submit(ctx, &reads(&file, &[5; 60]))];
        let place = Area::new(2);
        place.protect(1, libc::PROT_READ);
        // Behind the second address there is room for 50 of them.
        let places = [place.at(PAGE), place.at(PAGE - 50 * 32)];
        for place in NOWHERE.into_iter().chain(places) {
            answers.push(aio.io_getevents(ctx, 0, 60, place, 0));
        }
        answers.push(i64::from(guest::ring_word(ctx, HEAD)));
        answers.push(aio.reap(ctx, 60, &Events::new(60)));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn a_minimum_of_zero_never_waits() {
    let (postern, file, ctx) = in_flight(1);
    assert_eq!(postern.reap(ctx, 1, &Events::new(1)), 0);
    assert_eq!(postern.process.waited(), []);
    file.complete(Ok(0));
}

#[test]
fn the_time_is_taken_as_it_is_and_a_negative_one_is_for_ever() {
    let second = 1_000_000_000;
    let open = |for_ns| Waited { at_least: 1, for_ns, signals: Signals::Open };
    let cases = [
        ((0, 1), Some(1)),
        ((0, 1_200_000_000), Some(1_200_000_000)),
        ((2, 3), Some(2 * second + 3)),
        ((-1, 1_500_000_000), Some(second / 2)),
        ((0, -1), None),
        ((-1, 0), None),
        ((i64::MAX, 0), None),
        ((9_223_372_036, 0), None),
    ];
    for ((seconds, nanoseconds), expected) in cases {
        let (postern, file, ctx) = in_flight(1);
        if expected.is_none() {
            postern.process.script(|| WaitEnd::Interrupted);
        }
        let timeout = Timespec::new(seconds, nanoseconds);
        let answer = postern.io_getevents(ctx, 1, 1, Events::new(1).at(), timeout.at());
        assert_eq!(answer, if expected.is_some() { 0 } else { EINTR });
        let case = format!("{{{seconds}, {nanoseconds}}}");
        assert_eq!(postern.process.waited(), [open(expected)], "{case}");
        file.complete(Ok(0));
    }
    // A sum of zero is a poll, however it comes about.
    for (seconds, nanoseconds) in [(0, 0), (-1, 1_000_000_000), (i64::MIN, 0)] {
        let (postern, file, ctx) = in_flight(1);
        let timeout = Timespec::new(seconds, nanoseconds);
        assert_eq!(postern.io_getevents(ctx, 1, 1, Events::new(1).at(), timeout.at()), 0);
        assert_eq!(postern.process.waited(), []);
        file.complete(Ok(0));
    }
}

#[test]
fn what_is_there_is_taken_and_the_rest_of_the_minimum_awaited_until_the_same_deadline() {
    let (postern, file, ctx) = in_flight(5);
    file.complete(Ok(0));
    let two = file.clone();
    postern.process.script(move || {
        two.complete(Ok(0));
        two.complete(Ok(0));
        // One too few: the wait goes on, and nothing is taken meanwhile.
        assert_eq!(guest::ring_word(ctx, HEAD), 1);
        WaitEnd::Ready
    });
    let timeout = Timespec::new(1, 0);
    let events = Events::new(8);
    assert_eq!(postern.io_getevents(ctx, 4, 8, events.at(), timeout.at()), 3);
    assert_eq!([0, 1, 2].map(|index| events.data(index)), [0, 1, 2]);
    let wait = Waited { at_least: 3, for_ns: Some(1_000_000_000), signals: Signals::Open };
    assert_eq!(postern.process.waited(), [wait, wait]);
    file.complete(Ok(0));
    file.complete(Ok(0));
}

#[test]
fn a_signal_is_eintr_if_nothing_was_got_and_the_count_otherwise() {
    let (postern, file, ctx) = in_flight(3);
    postern.process.script(|| WaitEnd::Interrupted);
    let events = Events::new(8);
    assert_eq!(postern.io_getevents(ctx, 1, 8, events.at(), 0), EINTR);
    file.complete(Ok(0));
    postern.process.script(|| WaitEnd::Interrupted);
    assert_eq!(postern.io_getevents(ctx, 2, 8, events.at(), 0), 1);
    let late = file.clone();
    postern.process.script(move || {
        late.complete(Ok(0));
        WaitEnd::Interrupted
    });
    assert_eq!(postern.io_getevents(ctx, 2, 8, events.at(), 0), 1, "what came with the signal");
    file.complete(Ok(0));
}

#[test]
fn a_fault_after_some_events_were_got_gives_their_number_and_loses_none() {
    let (postern, file, ctx) = in_flight(2);
    let place = Area::new(2);
    place.protect(1, libc::PROT_READ);
    file.complete(Ok(0));
    let late = file.clone();
    postern.process.script(move || {
        late.complete(Ok(0));
        WaitEnd::Ready
    });
    assert_eq!(postern.io_getevents(ctx, 2, 2, place.at(PAGE - 32), 0), 1);
    let events = Events::new(1);
    assert_eq!(postern.reap(ctx, 1, &events), 1);
    assert_eq!(events.data(0), 1);
}

#[test]
fn a_context_destroyed_during_the_wait_is_einval_or_the_count() {
    for (already, expected) in [(0, EINVAL), (2, 2)] {
        let (postern, file, ctx) = in_flight(2);
        (0..already).for_each(|_| file.complete(Ok(0)));
        let other = postern.clone();
        postern.process.script(move || {
            (0..2 - already).for_each(|_| file.complete(Ok(0)));
            assert_eq!(other.io_destroy(ctx), 0);
            WaitEnd::Ready
        });
        let events = Events::new(8);
        assert_eq!(postern.io_getevents(ctx, 3, 8, events.at(), 0), expected);
    }
}

#[test]
fn a_reader_overtaken_while_it_copies_gets_what_the_other_left() {
    let (postern, file, ctx) = in_flight(3);
    (0..3).for_each(|_| file.complete(Ok(0)));
    let other = postern.clone();
    *postern.process.on_write.lock().unwrap() = Some(Box::new(move || {
        let events = Events::new(2);
        assert_eq!(other.reap(ctx, 2, &events), 2);
        assert_eq!([events.data(0), events.data(1)], [0, 1]);
    }));
    let events = Events::new(8);
    assert_eq!(postern.reap(ctx, 8, &events), 1);
    assert_eq!(events.data(0), 2);
}

/// `{ mask, size }` in guest memory.
fn usig(mask: u64, size: u64) -> Area {
    let area = Area::new(1);
    area.put(0, mask);
    area.put(8, size);
    area
}

#[test]
fn io_pgetevents_checks_timeout_then_mask_then_context() {
    let expected = [EFAULT, EFAULT, EINVAL, EFAULT, EINVAL, 0, 0, 0];
    agree(&expected, |aio| {
        let ctx = aio.context(1);
        let events = Events::new(1);
        let mask = Area::new(1);
        let get = |ctx, timeout, usig| aio.io_pgetevents(ctx, 0, 1, events.at(), timeout, usig);
        let answers = vec![
            get(0, u64::MAX, usig(mask.at(0), 4).at(0)),
            get(0, 0, u64::MAX),
            get(0, 0, usig(u64::MAX, 4).at(0)),
            get(0, 0, usig(u64::MAX, 8).at(0)),
            get(0, 0, usig(mask.at(0), 8).at(0)),
            get(ctx, 0, usig(mask.at(0), 8).at(0)),
            // Without a mask its size is not looked at.
            get(ctx, 0, usig(0, 77).at(0)),
            get(ctx, 0, 0),
        ];
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn the_mask_is_in_place_for_the_wait_and_once_even_without_one() {
    let mask = Area::new(1);
    mask.put(0, 0x2002);
    let usig = usig(mask.at(0), 8);
    let masked = Signals::Masked(0x2002);
    let (postern, file, ctx) = in_flight(1);
    let events = Events::new(1);
    let get = |min, timeout| postern.io_pgetevents(ctx, min, 1, events.at(), timeout, usig.at(0));

    assert_eq!(get(1, Timespec::new(0, 5).at()), 0);
    let wait = Waited { at_least: 1, for_ns: Some(5), signals: masked };
    assert_eq!(postern.process.waited(), [wait]);

    // A pending signal ends a poll that finds nothing, and not one that finds something.
    let glance = Waited { at_least: 0, for_ns: None, signals: masked };
    postern.process.script(|| WaitEnd::Interrupted);
    assert_eq!(get(0, 0), EINTR);
    assert_eq!(postern.process.waited(), [glance]);
    file.complete(Ok(0));
    postern.process.script(|| WaitEnd::Interrupted);
    assert_eq!(get(1, 0), 1);
    assert_eq!(postern.process.waited(), [glance]);
}
