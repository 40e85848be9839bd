//! Threads of one process on one context.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use postern_trusted::aio::FileTraits;

use crate::{
    Aio, EAGAIN, EINVAL, Postern,
    guest::{self, Batch, Events, Iocb, Timespec},
};

fn getter(postern: &Arc<Postern>, ctx: u64, min: i64) -> thread::JoinHandle<(i64, Vec<u64>)> {
    let postern = postern.clone();
    thread::spawn(move || {
        let events = Events::new(8);
        let got = postern.io_getevents(ctx, min, 8, events.at(), 0);
        (got, (0..got.max(0) as usize).map(|index| events.data(index)).collect())
    })
}

#[test]
fn destruction_wakes_every_waiter_with_einval() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }]);
    assert_eq!(postern.submit(ctx, &batch), 1);
    let waiters = [1, 3].map(|min| getter(&postern, ctx, min));
    postern.process.until_asleep(2);
    let destroyer = thread::spawn({
        let postern = postern.clone();
        move || postern.io_destroy(ctx)
    });
    for waiter in waiters {
        assert_eq!(waiter.join().unwrap().0, EINVAL);
    }
    postern.process.until_asleep(1);
    file.complete(Ok(0));
    assert_eq!(destroyer.join().unwrap(), 0);
}

#[test]
fn a_waiter_for_one_event_overtakes_an_earlier_one_for_three() {
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let iocbs = [0, 1, 2, 3].map(|data| Iocb { data, fd: file.fd(), ..Iocb::default() });
    assert_eq!(postern.submit(ctx, &Batch::new(&iocbs)), 4);
    let three = getter(&postern, ctx, 3);
    postern.process.until_asleep(1);
    let one = getter(&postern, ctx, 1);
    postern.process.until_asleep(2);
    file.complete(Ok(0));
    assert_eq!(one.join().unwrap(), (1, vec![0]));
    (0..3).for_each(|_| file.complete(Ok(0)));
    assert_eq!(three.join().unwrap(), (3, vec![1, 2, 3]));
}

#[test]
fn competing_readers_and_writers_see_every_event_exactly_once() {
    const SUBMITTERS: u64 = 2;
    const EACH: u64 = 3000;
    let postern = Arc::new(Postern::new());
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicU64::new(0));

    let completers = [0, 1].map(|_| {
        let (file, stop) = (file.clone(), stop.clone());
        thread::spawn(move || {
            while let Some((_, done)) = file.take_next(&stop) {
                done.finish(Ok(1));
            }
        })
    });
    let readers = [0, 1, 2].map(|_| {
        let (postern, seen) = (postern.clone(), seen.clone());
        thread::spawn(move || {
            let events = Events::new(64);
            let patience = Timespec::new(0, 1);
            let mut mine = Vec::new();
            while seen.load(Ordering::Relaxed) < SUBMITTERS * EACH {
                let got = postern.io_getevents(ctx, 1, 64, events.at(), patience.at());
                assert!((0..=64).contains(&got), "{got}");
                mine.extend((0..got as usize).map(|index| events.data(index)));
                seen.fetch_add(got.cast_unsigned(), Ordering::Relaxed);
                thread::yield_now();
            }
            mine
        })
    });
    let submitters: Vec<_> = (0..SUBMITTERS)
        .map(|number| {
            let (postern, fd, seen) = (postern.clone(), file.fd(), seen.clone());
            thread::spawn(move || {
                let mut next = number * EACH;
                let end = next + EACH;
                while next < end {
                    let iocbs: Vec<_> = (next..end.min(next + 40))
                        .map(|data| Iocb { data, fd, ..Iocb::default() })
                        .collect();
                    match postern.submit(ctx, &Batch::new(&iocbs)) {
                        EAGAIN => {
                            let seen = seen.load(Ordering::Relaxed);
                            assert!(seen < SUBMITTERS * EACH, "events were handed out twice");
                            thread::yield_now();
                        }
                        accepted => {
                            assert!(accepted > 0, "{accepted}");
                            next += accepted.cast_unsigned();
                        }
                    }
                }
            })
        })
        .collect();

    submitters.into_iter().for_each(|it| it.join().unwrap());
    let all: Vec<u64> = readers.into_iter().flat_map(|it| it.join().unwrap()).collect();
    stop.store(true, Ordering::Relaxed);
    file.nudge();
    completers.into_iter().for_each(|it| it.join().unwrap());
    let distinct: HashSet<u64> = all.iter().copied().collect();
    assert_eq!((all.len() as u64, distinct.len() as u64), (SUBMITTERS * EACH, SUBMITTERS * EACH));
    assert_eq!(postern.contexts.in_flight(), 0);
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn contexts_made_and_destroyed_by_many_threads_never_meet() {
    let postern = Arc::new(Postern::new());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let postern = postern.clone();
            thread::spawn(move || {
                for _ in 0..100 {
                    let ctx = postern.context(1);
                    assert_eq!(guest::ring_word(ctx, guest::TAIL), 0);
                    assert_eq!(postern.io_submit(ctx, 0, 0), 0);
                    assert_eq!(postern.io_destroy(ctx), 0);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|it| it.join().unwrap());
    assert_eq!(postern.process.rings.load(Ordering::Relaxed), 0);
    assert_eq!(postern.process.nr.load(Ordering::Relaxed), 0);
}
