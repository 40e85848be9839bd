//! io_destroy(2), and threads that share a context.

use std::sync::{
    Arc, Barrier,
    atomic::{AtomicU64, Ordering},
};

use libc::{EINVAL, O_DIRECT, O_RDONLY, O_RDWR};

use super::Cases;
use crate::{
    aio::{self, Context, Event, Iocb, op},
    sys::{self, PAGE, load64, store64},
    world::{LONG, World, until_asleep},
};

/// Rounds of each race.
const ROUNDS: u32 = 40;

pub fn add(cases: &mut Cases) {
    cases.add("destroy/twice", |w| {
        let context = w.context(4);
        w.rule("first", aio::destroy(context.0), 0);
        w.rule("second", aio::destroy(context.0), -i64::from(EINVAL));
    });
    cases.add("destroy/with events not reaped", |w| {
        let context = w.context(4);
        let iocb = Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 8, 0);
        w.see("io_submit", w.submit(context, &[iocb; 3]));
        w.rule("io_destroy", aio::destroy(context.0), 0);
        let other = w.context(4);
        w.say(format!("a new one has id {} and {} events", other.id(), other.ready()));
    });
    for (name, opcode) in [("reads", op::PREAD), ("writes", op::PWRITE)] {
        cases.add(format!("destroy/waits for {name} in flight"), move |w| {
            let (context, fd) = (w.context(16), w.open(O_RDWR | O_DIRECT));
            let counter = w.eventfd(0, libc::EFD_NONBLOCK);
            let buffer = w.filled(8 * PAGE, 0x61);
            let iocbs: Vec<Iocb> = (0..8)
                .map(|i| Iocb::new(opcode, fd, buffer + i * PAGE, PAGE, (i * PAGE) as i64))
                .map(|iocb| iocb.signalling(counter))
                .collect();
            w.see("io_submit", w.submit(context, &iocbs));
            w.rule("io_destroy", aio::destroy(context.0), 0);
            w.see_memory("memory", buffer, 8 * PAGE);
            w.see_counter(counter);
            w.see_file();
        });
    }
    cases.add("destroy/an empty one", |w| {
        w.rule("io_destroy", aio::destroy(w.context(1).0), 0);
    });
    for waiters in [1, 3] {
        for (name, limited) in [("for ever", false), ("for a while", true)] {
            cases.add(format!("destroy/wakes {waiters} that wait {name}"), move |w| {
                let context = w.context(4);
                let time = if limited { w.duration(LONG) } else { 0 };
                let threads = wait_in_threads(w, context, 1, time, waiters);
                w.rule("io_destroy", aio::destroy(context.0), 0);
                for thread in threads {
                    w.rule("io_getevents", thread.join().unwrap_or(-1), -i64::from(EINVAL));
                }
            });
        }
    }
    cases.add("destroy/a waiter that has some events", |w| {
        let context = w.context(8);
        let iocb = Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 8, 0);
        w.see("io_submit", w.submit(context, &[iocb; 2]));
        let threads = wait_in_threads(w, context, 5, 0, 1);
        w.rule("io_destroy", aio::destroy(context.0), 0);
        for thread in threads {
            w.see("io_getevents", thread.join().unwrap_or(-1));
        }
    });
    cases.add("destroy/wakes a waiter with a signal mask", |w| {
        let context = w.context(8);
        let (at, number) = (w.memory(64), w.shared_word());
        let (mask, pair) = (w.memory(8), w.memory(16));
        sys::put(pair, &[mask, 8]);
        let thread = std::thread::spawn(move || {
            sys::store32(number, sys::thread().cast_unsigned());
            aio::get_masked(context.0, 1, 1, at, 0, pair)
        });
        asleep(number);
        w.rule("io_destroy", aio::destroy(context.0), 0);
        w.rule("io_pgetevents", thread.join().unwrap_or(-1), -i64::from(EINVAL));
    });
    races(cases);
}

/// Waits until the thread whose number comes in a word sleeps.
fn asleep(number: u64) {
    while sys::load32(number) == 0 {
        sys::give_way();
    }
    until_asleep(sys::load32(number).cast_signed());
}

fn wait_in_threads(
    w: &World,
    context: Context,
    min: i64,
    time: u64,
    count: u32,
) -> Vec<std::thread::JoinHandle<i64>> {
    (0..count)
        .map(|_| {
            let (at, number) = (w.memory(512), w.shared_word());
            let thread = std::thread::spawn(move || {
                sys::store32(number, sys::thread().cast_unsigned());
                aio::get(context.0, min, 8, at, time)
            });
            asleep(number);
            thread
        })
        .collect()
}

/// Only what holds whoever comes first is said.
fn races(cases: &mut Cases) {
    cases.add("destroy/two at once: one wins", |w| {
        let mut wrong = 0;
        for _ in 0..ROUNDS {
            let context = w.context(4);
            let start = Arc::new(Barrier::new(2));
            let other = std::thread::spawn({
                let start = start.clone();
                move || {
                    start.wait();
                    aio::destroy(context.0)
                }
            });
            start.wait();
            let mut both = [aio::destroy(context.0), other.join().unwrap_or(-1)];
            both.sort_unstable();
            wrong += u32::from(both != [-i64::from(EINVAL), 0]);
        }
        w.say(format!("wrong {wrong}"));
    });
    cases.add("destroy/against io_getevents", |w| {
        let mut wrong = 0;
        for _ in 0..ROUNDS {
            let (context, at) = (w.context(4), w.memory(64));
            let start = Arc::new(Barrier::new(2));
            let other = std::thread::spawn({
                let start = start.clone();
                move || {
                    start.wait();
                    aio::get(context.0, 1, 1, at, 0)
                }
            });
            start.wait();
            wrong += u32::from(aio::destroy(context.0) != 0);
            wrong += u32::from(other.join().unwrap_or(-1) != -i64::from(EINVAL));
        }
        w.say(format!("wrong {wrong}"));
    });
    for (name, flags) in [("cached", 0), ("direct", O_DIRECT)] {
        cases.add(format!("destroy/against io_submit, {name}"), move |w| {
            let (mut wrong, fd) = (0, w.open(O_RDWR | flags));
            for _ in 0..ROUNDS {
                let (context, buffer) = (w.context(32), w.memory(PAGE));
                let list = w.list(&[w.place(&Iocb::new(op::PREAD, fd, buffer, PAGE, 0))]);
                let start = Arc::new(Barrier::new(2));
                let other = std::thread::spawn({
                    let start = start.clone();
                    move || {
                        start.wait();
                        let answers = (0..20).map(|_| aio::submit(context.0, 1, list));
                        answers.skip_while(|answer| *answer == 1).collect::<Vec<_>>()
                    }
                });
                start.wait();
                wrong += u32::from(aio::destroy(context.0) != 0);
                let refused = other.join().unwrap_or_default();
                let all = refused.iter().all(|answer| *answer == -i64::from(EINVAL));
                wrong += u32::from(!all);
            }
            w.say(format!("wrong {wrong}"));
        });
        for reapers in [2_u32, 4] {
            cases.add(format!("destroy/{reapers} threads share {name} events"), move |w| {
                share(w, w.open(O_RDWR | flags), reapers);
            });
        }
    }
    cases.add("destroy/threads that submit and reap one context", |w| {
        let (context, fd) = (w.context(64), w.open(O_RDWR | O_DIRECT));
        let total = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..4_u64)
            .map(|thread| {
                let (buffer, at, total) = (w.memory(PAGE), w.memory(64), total.clone());
                let iocb = Iocb::new(op::PREAD, fd, buffer, PAGE, (thread * PAGE) as i64);
                let list = w.list(&[w.place(&iocb.data(1 << (8 * thread)))]);
                std::thread::spawn(move || {
                    let mut wrong = 0;
                    for _ in 0..100 {
                        wrong += u32::from(aio::submit(context.0, 1, list) != 1);
                        wrong += u32::from(aio::get(context.0, 1, 1, at, 0) != 1);
                        total.fetch_add(load64(at), Ordering::Relaxed);
                    }
                    wrong
                })
            })
            .collect();
        let wrong: u32 = threads.into_iter().map(|thread| thread.join().unwrap_or(99)).sum();
        w.say(format!("wrong {wrong}, sum {:#x}", total.load(Ordering::Relaxed)));
    });
}

/// Every event reaches one of the threads, once.
fn share(w: &World, fd: i32, reapers: u32) {
    const EVENTS: u64 = 2000;
    let context = w.context(64);
    let (seen, left) = (w.memory(8 * EVENTS), Arc::new(AtomicU64::new(EVENTS)));
    let threads: Vec<_> = (0..reapers)
        .map(|_| {
            let (at, left, soon) = (w.memory(32 * 8), left.clone(), w.time(0, 5_000_000));
            std::thread::spawn(move || {
                let mut wrong = 0;
                while left.load(Ordering::Relaxed) > 0 {
                    let got = aio::get(context.0, 1, 8, at, soon);
                    wrong += u32::from(got < 0);
                    for i in 0..got.max(0).cast_unsigned() {
                        let event = Event::load(at + 32 * i);
                        wrong += u32::from(event.res != PAGE as i64 || event.data >= EVENTS);
                        let place = seen + 8 * (event.data % EVENTS);
                        store64(place, load64(place) + 1);
                        left.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                wrong
            })
        })
        .collect();
    let (buffer, at) = (w.memory(16 * PAGE), w.memory(64));
    let list = w.list(&[at]);
    let mut data = 0;
    while data < EVENTS {
        let to = buffer + data % 16 * PAGE;
        Iocb::new(op::PREAD, fd, to, PAGE, (data % 8 * PAGE) as i64).data(data).store(at);
        match aio::submit(context.0, 1, list) {
            1 => data += 1,
            _ => sys::give_way(),
        }
    }
    let wrong: u32 = threads.into_iter().map(|thread| thread.join().unwrap_or(99)).sum();
    let once = (0..EVENTS).filter(|i| load64(seen + 8 * i) == 1).count();
    w.say(format!("wrong {wrong}, seen once {once}, in the ring {}", context.ready()));
}
