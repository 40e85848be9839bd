//! What io_submit accepts and what comes of it: slots, events, eventfds, completion in the call.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::Ordering,
};

use postern_trusted::{
    aio::{FileTraits, Signals, WaitEnd},
    errno::Errno,
};

use crate::{
    Aio, EAGAIN, EBADF, EINVAL, EIO, Postern, agree,
    guest::{self, Area, Batch, Events, HEAD, Iocb, NOOP, NR, TAIL},
    process::PROBE,
    submit::{eventfd, on, reads, scratch},
};

/// What the eventfd has counted.
fn count(counter: &File) -> i64 {
    let mut bytes = [0; 8];
    match (&mut &*counter).read_exact(&mut bytes) {
        Ok(()) => i64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

#[test]
fn the_first_refusal_ends_the_call_and_nothing_behind_it_is_touched() {
    agree(&[2, EBADF, 2, 0, 77], |aio| {
        let file = scratch();
        let key = |key| Iocb { key, ..on(&file) };
        let batch = Batch::new(&[key(1), key(2), Iocb { fd: -1, ..key(77) }, key(77)]);
        let ctx = aio.context(1);
        let events = Events::new(8);
        let key_of = |index| (guest::peek(batch.iocb(index) + 8) & 0xffff_ffff) as i64;
        let answers = vec![
            aio.submit(ctx, &batch),
            aio.io_submit(ctx, 2, batch.array() + 16),
            aio.reap(ctx, 8, &events),
            key_of(1),
            key_of(3),
        ];
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn one_iocb_may_be_there_many_times_and_each_gives_an_event() {
    agree(&[5, 5, 5, 0], |aio| {
        let file = scratch();
        let batch = reads(&file, &[9]);
        let array = Area::new(1);
        for index in 0..5 {
            array.put(index * 8, batch.iocb(0));
        }
        let ctx = aio.context(1);
        let events = Events::new(8);
        let mut answers = vec![aio.io_submit(ctx, 5, array.at(0)), aio.reap(ctx, 8, &events)];
        let whole = |index: &usize| events.get(*index) == [9, batch.iocb(0), 512, 0];
        answers.push((0..5).filter(whole).count() as i64);
        answers.push(aio.io_destroy(ctx));
        answers
    });
}

/// Submits reads one at a time until one is refused; answers how many were taken and the refusal.
fn fill(aio: &dyn Aio, ctx: u64, file: &File) -> (i64, i64) {
    let batch = reads(file, &[0]);
    let mut taken = 0;
    loop {
        match aio.submit(ctx, &batch) {
            1 => taken += 1,
            refusal => return (taken, refusal),
        }
    }
}

#[test]
fn unread_events_hold_their_slots_and_a_full_ring_is_eagain_before_the_descriptor() {
    agree(&[EAGAIN, EAGAIN, EINVAL, 1, 1, EAGAIN], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let (taken, refusal) = fill(aio, ctx, &file);
        assert!((64..=126).contains(&taken), "{taken}");
        let wrong = Batch::new(&[Iocb { fd: -1, ..Iocb::default() }]);
        let worse = Batch::new(&[Iocb { fd: -1, reserved2: 1, ..Iocb::default() }]);
        let mut answers = vec![refusal, aio.submit(ctx, &wrong), aio.submit(ctx, &worse)];
        let events = Events::new(1);
        answers.push(aio.reap(ctx, 1, &events));
        let (taken, refusal) = fill(aio, ctx, &file);
        answers.extend([taken.min(1), refusal]);
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn a_head_moved_by_the_guest_frees_the_slots_behind_it() {
    agree(&[EAGAIN, 40, 40], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let (taken, refusal) = fill(aio, ctx, &file);
        guest::set_ring_word(ctx, HEAD, 40);
        let more = reads(&file, &[1; 40]);
        let again = aio.submit(ctx, &more);
        let events = Events::new(126);
        let left = taken - aio.reap(ctx, 126, &events) + again;
        assert_eq!(aio.io_destroy(ctx), 0);
        vec![refusal, again, left]
    });
}

#[test]
fn every_slot_but_one_of_the_ring_can_be_used() {
    for nr in [1, 100, 1000] {
        let postern = Postern::new();
        let file = postern.process.open_controlled(FileTraits::REGULAR);
        let ctx = postern.context(nr);
        let slots = i64::from(guest::ring_word(ctx, NR));
        let iocb = Iocb { fd: file.fd(), ..Iocb::default() };
        let batch = Batch::new(&vec![iocb; slots as usize]);
        assert_eq!(postern.submit(ctx, &batch), slots - 1);
        assert_eq!(postern.submit(ctx, &batch), EAGAIN, "in flight");
        file.complete(Ok(0));
        assert_eq!(postern.submit(ctx, &batch), EAGAIN, "completed and not reaped");
        assert_eq!(postern.reap(ctx, 1, &Events::new(1)), 1);
        assert_eq!(postern.submit(ctx, &batch), 1);
        (0..slots - 1).for_each(|_| file.complete(Ok(0)));
        assert_eq!(postern.submit(ctx, &batch), EAGAIN, "a full ring");
        assert_eq!(postern.io_destroy(ctx), 0);
    }
}

#[test]
fn a_refused_iocb_gives_its_slot_back() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let refused = Batch::new(&[Iocb { opcode: NOOP, fd: file.fd(), ..Iocb::default() }]);
    for _ in 0..1000 {
        assert_eq!(postern.submit(ctx, &refused), EINVAL);
    }
    let good = Batch::new(&vec![Iocb { fd: file.fd(), ..Iocb::default() }; 126]);
    assert_eq!(postern.submit(ctx, &good), 126);
    assert_eq!(postern.contexts.in_flight(), 126);
    (0..126).for_each(|_| file.complete(Ok(0)));
    assert_eq!(postern.contexts.in_flight(), 0);
}

#[test]
fn events_carry_data_iocb_and_result_in_order_of_completion() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let iocb = |data| Iocb { data, fd: file.fd(), ..Iocb::default() };
    let batch = Batch::new(&[iocb(1), iocb(u64::MAX), iocb(3)]);
    assert_eq!(postern.submit(ctx, &batch), 3);
    let (_, last) = file.take_nth(2);
    last.finish(Err(Errno::ENOSPC));
    file.complete(Ok(512));
    drop(file.take());
    let events = Events::new(3);
    assert_eq!(postern.reap(ctx, 3, &events), 3);
    assert_eq!(events.get(0), [3, batch.iocb(2), (-28_i64).cast_unsigned(), 0]);
    assert_eq!(events.get(1), [1, batch.iocb(0), 512, 0]);
    let dropped = [u64::MAX, batch.iocb(1), EIO.cast_unsigned(), 0];
    assert_eq!(events.get(2), dropped, "a dropped completion is an event with EIO");
}

#[test]
fn the_eventfd_counts_completions_and_no_refusals() {
    agree(&[3, 3, 0, EINVAL, 0], |aio| {
        let (file, counter) = (scratch(), eventfd());
        let iocb = Iocb { flags: 1, resfd: counter.as_raw_fd(), ..on(&file) };
        let ctx = aio.context(1);
        let mut answers = vec![aio.submit(ctx, &Batch::new(&[iocb; 3]))];
        answers.extend([count(&counter), count(&counter)]);
        answers.push(aio.submit(ctx, &Batch::new(&[Iocb { opcode: NOOP, ..iocb }])));
        answers.push(count(&counter));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn the_eventfd_is_signalled_after_the_tail_moved_though_its_descriptor_was_closed() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    postern.process.probed_ring.store(ctx, Ordering::Relaxed);
    let counter = eventfd();
    let closed: OwnedFd = counter.try_clone().unwrap().into();
    let iocb = |resfd| Iocb { flags: 1, resfd, fd: file.fd(), ..Iocb::default() };
    let batch = Batch::new(&[iocb(PROBE), iocb(closed.as_raw_fd()), iocb(PROBE)]);
    assert_eq!(postern.submit(ctx, &batch), 3);
    drop(closed);
    assert_eq!(count(&counter), 0);
    (0..3).for_each(|_| file.complete(Ok(0)));
    assert_eq!(*postern.process.tails_at_signal.lock().unwrap(), [1, 3]);
    assert_eq!(count(&counter), 1);
}

#[test]
fn a_request_that_must_complete_in_the_call_is_in_the_ring_before_the_next_begins() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    file.waits.store(true, Ordering::Relaxed);
    let ctx = postern.context(1);
    for expected_tail in 0..3 {
        let (spurious, last) = (file.clone(), file.clone());
        postern.process.script(move || {
            assert_eq!((spurious.pending(), guest::ring_word(ctx, TAIL)), (1, expected_tail));
            WaitEnd::Ready
        });
        postern.process.script(move || {
            last.complete(Ok(0));
            WaitEnd::Ready
        });
    }
    let iocb = Iocb { fd: file.fd(), ..Iocb::default() };
    assert_eq!(postern.submit(ctx, &Batch::new(&[iocb; 3])), 3);
    assert_eq!(guest::ring_word(ctx, TAIL), 3);
    assert!(postern.process.waited().iter().all(|wait| wait.signals == Signals::Held));
}

#[test]
fn a_ring_reaped_without_calls_is_noticed_at_the_next_submit() {
    let postern = Postern::new();
    let file = scratch();
    let ctx = postern.context(1);
    let batch = reads(&file, &[1, 2]);
    let noticed = || postern.process.reaps_seen.load(Ordering::Relaxed);
    assert_eq!(postern.submit(ctx, &batch), 2);
    assert_eq!(postern.reap(ctx, 1, &Events::new(1)), 1);
    assert_eq!(postern.submit(ctx, &batch), 2);
    assert_eq!(noticed(), 0, "io_getevents moved the head");
    guest::set_ring_word(ctx, HEAD, 2);
    assert_eq!(postern.submit(ctx, &batch), 2);
    assert_eq!(noticed(), 1);
}
