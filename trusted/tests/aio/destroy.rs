//! io_destroy, draining, and what a fork leaves behind.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
};

use postern_trusted::{
    aio::{AioContexts, FileTraits, WaitEnd},
    errno::Errno,
};

use crate::{
    Aio, EINVAL, Postern, agree,
    guest::{self, Area, Batch, Events, Iocb},
    submit::{reads, scratch},
};

#[test]
fn unread_events_are_discarded_and_the_id_is_unknown_from_then_on() {
    agree(&[2, 0, EINVAL, EINVAL], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        vec![
            aio.submit(ctx, &reads(&file, &[1, 2])),
            aio.io_destroy(ctx),
            aio.io_destroy(ctx),
            aio.io_submit(ctx, 0, 0),
        ]
    });
}

#[test]
fn destruction_waits_for_what_is_in_flight_and_has_returned_the_quota_before() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(10);
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }; 2]);
    assert_eq!(postern.submit(ctx, &batch), 2);
    let destroyer = thread::spawn({
        let postern = postern.clone();
        move || postern.io_destroy(ctx)
    });
    postern.process.until_asleep(1);
    assert_eq!(postern.process.nr.load(Ordering::Relaxed), 0);
    assert_eq!(postern.process.rings.load(Ordering::Relaxed), 1);
    assert_eq!(postern.io_destroy(ctx), EINVAL, "a second one");
    assert_eq!(postern.submit(ctx, &batch), EINVAL);
    file.complete(Ok(0));
    assert!(!destroyer.is_finished(), "one is still in flight");
    let (request, done) = file.take();
    drop(request);
    done.finish(Err(Errno::ENOSPC));
    assert_eq!(destroyer.join().unwrap(), 0);
    assert_eq!(postern.process.rings.load(Ordering::Relaxed), 0);
}

#[test]
fn a_completion_is_over_and_done_with_when_it_wakes_who_waits_for_the_last() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }; 2]);
    assert_eq!(postern.submit(ctx, &batch), 2);
    let (seen, saw) = std::sync::mpsc::channel();
    let of = Arc::downgrade(&postern);
    *postern.process.on_wake.lock().unwrap() = Some(Box::new(move || {
        let in_flight = of.upgrade().map(|postern| postern.contexts.in_flight());
        seen.send((in_flight, guest::ring_word(ctx, guest::TAIL))).unwrap();
    }));
    file.complete(Ok(0));
    file.complete(Ok(0));
    *postern.process.on_wake.lock().unwrap() = None;
    assert_eq!(saw.iter().collect::<Vec<_>>(), [(Some(1), 1), (Some(0), 2)]);
}

#[test]
fn a_submit_overtaken_by_destruction_keeps_what_it_has_and_takes_no_more() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    file.waits.store(true, Ordering::Relaxed);
    let ctx = postern.context(1);
    let (destroyed, is_destroyed) = std::sync::mpsc::channel();
    postern.process.script({
        let (postern, file) = (postern.clone(), file.clone());
        move || {
            let process = postern.process.clone();
            thread::spawn(move || destroyed.send(postern.io_destroy(ctx)));
            process.until_asleep(1);
            file.complete(Ok(0));
            WaitEnd::Ready
        }
    });
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }; 2]);
    assert_eq!(postern.submit(ctx, &batch), 1);
    assert_eq!(is_destroyed.recv().unwrap(), 0);
    assert_eq!(file.pending(), 0);
}

#[test]
fn a_table_that_is_dropped_gives_everything_back() {
    let postern = Postern::new();
    let process = postern.process.clone();
    postern.context(3);
    postern.context(4);
    drop(postern);
    assert_eq!(process.rings.load(Ordering::Relaxed), 0);
    assert_eq!(process.nr.load(Ordering::Relaxed), 0);
}

#[test]
fn a_fork_s_child_touches_nothing_of_its_parent_and_does_not_know_its_contexts() {
    let parent = Postern::new();
    let process = parent.process.clone();
    let ctx = parent.context(3);
    parent.contexts.abandon();
    assert_eq!(process.rings.load(Ordering::Relaxed), 1);
    assert_eq!(process.nr.load(Ordering::Relaxed), 3);
    assert_eq!(guest::ring_word(ctx, guest::ID), 0);

    let child = Postern { contexts: AioContexts::new(process.clone()), process };
    assert_eq!(child.io_submit(ctx, 0, 0), EINVAL);
    let own = child.context(1);
    assert_eq!(child.io_submit(own, 0, 0), 0);
    assert_eq!(child.io_submit(ctx, 0, 0), EINVAL, "the same place in the table, another ring");
    assert_eq!(child.io_destroy(ctx), EINVAL);
}

#[test]
fn a_ring_moved_to_a_new_address_is_unmapped_there() {
    let postern = Postern::new();
    let ctx = postern.context(1);
    let moved = guest::remap(ctx, guest::PAGE);
    assert!(!postern.contexts.relocate(moved, ctx), "no ring is known there yet");
    assert!(postern.contexts.relocate(ctx, moved));
    assert_eq!(postern.io_destroy(ctx), EINVAL);
    assert_eq!(postern.io_destroy(moved), 0);
    assert_eq!(*postern.process.unmapped.lock().unwrap(), [moved]);
}

#[test]
fn draining_waits_for_what_is_in_flight_and_holds_up_what_comes() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let idle = postern.context(1);
    let batch = Arc::new(Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }]));
    assert_eq!(postern.submit(ctx, &batch), 1);

    let (drained, is_drained) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let drainer = thread::spawn({
        let postern = postern.clone();
        move || {
            let guard = postern.contexts.drain();
            drained.send(postern.contexts.in_flight()).unwrap();
            may_go_on.recv().unwrap();
            drop(guard);
        }
    });
    postern.process.until_asleep(1);
    let submitters = [ctx, idle].map(|ctx| {
        let (postern, batch) = (postern.clone(), batch.clone());
        thread::spawn(move || postern.submit(ctx, &batch))
    });
    postern.process.until_asleep(3);
    assert!(is_drained.try_recv().is_err());
    file.complete(Ok(0));
    assert_eq!(is_drained.recv().unwrap(), 0);
    assert_eq!(file.pending(), 0, "submissions are held up");
    assert_eq!(postern.reap(ctx, 1, &Events::new(1)), 1, "events can still be read");
    go_on.send(()).unwrap();
    drainer.join().unwrap();
    assert_eq!(submitters.map(|it| it.join().unwrap()), [1, 1]);
    assert_eq!(file.pending(), 2);
    file.complete(Ok(0));
    file.complete(Ok(0));
}

#[test]
fn draining_waits_for_a_context_that_is_being_destroyed_too() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }]);
    assert_eq!(postern.submit(ctx, &batch), 1);
    let destroyer = thread::spawn({
        let postern = postern.clone();
        move || postern.io_destroy(ctx)
    });
    postern.process.until_asleep(1);
    let drainer = thread::spawn({
        let postern = postern.clone();
        move || drop(postern.contexts.drain())
    });
    postern.process.until_asleep(2);
    assert_eq!(postern.contexts.in_flight(), 1);
    file.complete(Ok(0));
    drainer.join().unwrap();
    assert_eq!(destroyer.join().unwrap(), 0);
}

#[test]
fn a_context_that_no_ring_can_be_had_for_leaves_nothing_behind() {
    let postern = Postern::new();
    postern.process.rings_left.store(1, Ordering::Relaxed);
    let ctx = postern.context(5);
    let place = Area::new(1);
    assert_eq!(postern.io_setup(5, place.at(0)), crate::ENOMEM);
    assert_eq!((place.get(0), postern.process.nr.load(Ordering::Relaxed)), (0, 5));
    assert_eq!(postern.io_destroy(ctx), 0);
}
