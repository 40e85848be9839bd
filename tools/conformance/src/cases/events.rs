//! io_getevents(2) and io_pgetevents(2): counts, timeouts, places for events.

use libc::{EFAULT, EINVAL, PROT_NONE, PROT_READ};

use super::Cases;
use crate::{
    aio::{self, Context, EVENT, Event, Iocb, op},
    sys::{self, PAGE, put},
    world::{KERNEL, NON_CANONICAL, World},
};

/// A context with `count` events in its ring.
fn with_events(w: &World, count: u64) -> Context {
    let context = w.context(16);
    let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
    let iocb = Iocb::new(op::PREAD, fd, buffer, 8, 0);
    let iocbs: Vec<Iocb> = (0..count).map(|data| iocb.data(data)).collect();
    w.must("io_submit", w.submit(context, &iocbs));
    context
}

fn get(w: &World, context: Context, min: i64, nr: i64, timeout: u64) {
    let at = w.memory(EVENT * 16);
    let got = w.see("io_getevents", aio::get(context.0, min, nr, at, timeout));
    for i in 0..got.max(0).cast_unsigned() {
        w.say(w.event(&Event::load(at + i * EVENT)));
    }
    w.say(format!("head {} tail {}", context.head(), context.tail()));
}

pub fn add(cases: &mut Cases) {
    for events in [0, 3] {
        for (min, nr) in [
            (0, 0),
            (0, 1),
            (0, 3),
            (0, 10),
            (1, 1),
            (1, 3),
            (1, 10),
            (3, 3),
            (3, 10),
            (4, 4),
            (4, 10),
            (2, 1),
            (1, 0),
            (-1, 0),
            (-1, 5),
            (0, -1),
            (-1, -1),
            (-5, -1),
            (0, i64::MAX),
            (1, i64::MAX),
            (i64::MAX, i64::MAX),
            (i64::MIN, 0),
            (0, i64::MIN),
            (i64::MIN, i64::MIN),
            (i64::MAX, 1),
            (5000, 6000),
        ] {
            cases.add(format!("events/{events} ready, min {min}, nr {nr}"), move |w| {
                get(w, with_events(w, events), min, nr, w.time(0, 0));
            });
        }
    }
    timeouts(cases);
    places(cases);
    masked(cases);
    cases.add("events/two reads of the ring take one after the other", |w| {
        let context = with_events(w, 6);
        for nr in [1, 2, 4] {
            get(w, context, 1, nr, w.time(0, 0));
        }
    });
    cases.add("events/the header of the ring after many rounds", |w| {
        let context = with_events(w, 0);
        let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
        for round in 1..=60 {
            w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0); 7]);
            w.take(context, 7);
            if round % 10 == 0 {
                w.say(format!("{:x?}", context.words()));
            }
        }
    });
    cases.add("events/what is left in the ring's memory", |w| {
        let context = with_events(w, 3);
        w.reap(context, 3);
        for slot in 0..4 {
            w.say(w.event(&context.event(slot)));
        }
    });
}

fn timeouts(cases: &mut Cases) {
    for (name, seconds, nanoseconds) in [
        ("1 ns", 0, 1),
        ("20 ms", 0, 20_000_000),
        ("1.1e9 ns", 0, 1_100_000_000),
        ("-1 s and enough ns", -1, 1_010_000_000),
    ] {
        for (min, nr) in [(1, 1), (4, 8)] {
            cases.add(format!("events/{min} of 3 after {name}"), move |w| {
                let context = with_events(w, if min == 1 { 0 } else { 3 });
                let time = w.time(seconds, nanoseconds);
                if seconds < 0 {
                    bounded(w);
                }
                get(w, context, min, nr, time);
                w.say(format!("not written back {:?}", (sys::load64(time), sys::load64(time + 8))));
            });
        }
    }
    // These wait for ever: a signal ends them. On a busy machine the next one comes before the end.
    for (name, seconds, nanoseconds) in [
        ("-1 s", -1, 0),
        ("-1 ns", 0, -1),
        ("1 s -2e9 ns", 1, -2_000_000_000),
        ("the longest", i64::MAX, 0),
        ("the longest of all", i64::MAX, 999_999_999),
        ("the shortest", i64::MIN, 0),
        ("the most ns", 0, i64::MAX),
        ("the fewest ns", 0, i64::MIN),
    ] {
        cases.add(format!("events/a timeout of {name}"), move |w| {
            bounded(w);
            get(w, with_events(w, 0), 1, 1, w.time(seconds, nanoseconds));
            w.say(format!("a signal came: {}", sys::signals() > 0));
        });
    }
    cases.add("events/no timeout waits for ever", |w| {
        bounded(w);
        get(w, with_events(w, 0), 1, 1, 0);
        w.say(format!("a signal came: {}", sys::signals() > 0));
    });
    for events in [0, 2] {
        cases.add(format!("events/no timeout, min 0, {events} ready"), move |w| {
            get(w, with_events(w, events), 0, 8, 0);
        });
    }
    for (name, at) in
        [("-1", u64::MAX), ("the kernel's", KERNEL), ("not canonical", NON_CANONICAL), ("8", 8)]
    {
        for context in [true, false] {
            cases.add(format!("events/timeout at {name}, context {context}"), move |w| {
                let id = if context { with_events(w, 1).0 } else { 0 };
                let answer = aio::get(id, 0, 1, w.memory(64), at);
                w.rule("io_getevents", answer, -i64::from(EFAULT));
                let answer = aio::get(id, -1, 1, w.memory(64), at);
                w.rule("io_getevents", answer, -i64::from(EFAULT));
            });
        }
    }
    cases.add("events/half a timeout", |w| {
        let at = w.memory(PAGE) + PAGE - 8;
        w.rule("io_getevents", aio::get(w.context(1).0, 0, 1, 0, at), -i64::from(EFAULT));
    });
    cases.add("events/a read-only timeout", |w| {
        let page = w.memory(PAGE);
        put(page, &[0_i64, 1000]);
        sys::protect(page, PAGE, PROT_READ);
        get(w, with_events(w, 0), 1, 1, page);
    });
}

/// A signal comes in a while: nothing else ends a wait without end.
fn bounded(_: &World) {
    sys::count_signal(libc::SIGALRM, 0);
    let soon = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 200_000 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: 200_000 },
    };
    // SAFETY: a valid structure.
    unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const soon, 0_u64) };
}

fn places(cases: &mut Cases) {
    type Make = fn(&World) -> u64;
    let bad: [(&str, Make); 8] = [
        ("NULL", |_| 0),
        ("-1", |_| u64::MAX),
        ("the kernel's", |_| KERNEL),
        ("not canonical", |_| NON_CANONICAL),
        ("a read-only page", |w| w.page(PROT_READ)),
        ("a page without access", |w| w.page(PROT_NONE)),
        ("half an event", |w| w.memory(PAGE) + PAGE - 16),
        ("one and a half events", |w| w.memory(PAGE) + PAGE - 48),
    ];
    for (name, make) in bad {
        for nr in [1, 3] {
            cases.add(format!("events/{nr} events to {name}"), move |w| {
                let context = with_events(w, 3);
                let at = make(w);
                w.see("io_getevents", aio::get(context.0, 1, nr, at, w.time(0, 0)));
                w.say(format!("head {} tail {}", context.head(), context.tail()));
                w.reap(context, 1);
            });
        }
        cases.add(format!("events/no events to {name}"), move |w| {
            let (context, at) = (with_events(w, 0), make(w));
            w.rule("io_getevents", aio::get(context.0, 0, 1, at, w.time(0, 0)), 0);
            w.rule("io_getevents", aio::get(context.0, 1, 1, at, w.time(0, 1000)), 0);
        });
    }
    cases.add("events/more events than the place has, but few enough", |w| {
        let context = with_events(w, 2);
        let at = w.memory(PAGE) + PAGE - 2 * EVENT;
        w.rule("io_getevents", aio::get(context.0, 1, 100, at, w.time(0, 0)), 2);
    });
    cases.add("events/across the end of the ring to a place that ends", |w| {
        let context = with_events(w, 0);
        let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
        for _ in 0..31 {
            w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0); 4]);
            w.take(context, 4);
        }
        w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0); 8]);
        let at = w.memory(PAGE) + PAGE - 4 * EVENT;
        w.see("io_getevents", aio::get(context.0, 8, 8, at, w.time(0, 0)));
        w.say(format!("head {} tail {}", context.head(), context.tail()));
        get(w, context, 8, 8, w.time(0, 0));
    });
    cases.add("events/to a place that is not aligned", |w| {
        let context = with_events(w, 2);
        let at = w.memory(PAGE) + 13;
        w.rule("io_getevents", aio::get(context.0, 2, 2, at, w.time(0, 0)), 2);
        w.say(w.event(&Event::load(at + EVENT)));
    });
    cases.add("events/a bad context and bad counts", |w| {
        let at = w.memory(64);
        for (context, min, nr) in [(0, -1, 1), (0, 2, 1), (with_events(w, 1).0, 2, 1)] {
            let answer = aio::get(context, min, nr, at, w.time(0, 0));
            w.rule("io_getevents", answer, -i64::from(EINVAL));
        }
    });
}

/// io_pgetevents' last argument.
fn masked(cases: &mut Cases) {
    // Address of the mask, size; `None`: the argument itself is this address.
    type Make = fn(&World) -> u64;
    fn pair(w: &World, mask: u64, size: u64) -> u64 {
        let at = w.memory(16);
        put(at, &[mask, size]);
        at
    }
    let masks: [(&str, Make); 13] = [
        ("none", |_| 0),
        ("unreadable", |_| 8),
        ("the kernel's", |_| KERNEL),
        ("half readable", |w| w.memory(PAGE) + PAGE - 8),
        ("NULL of size 0", |w| pair(w, 0, 0)),
        ("NULL of size 8", |w| pair(w, 0, 8)),
        ("NULL of size 99", |w| pair(w, 0, 99)),
        ("a mask of size 8", |w| pair(w, w.memory(8), 8)),
        ("a mask of size 0", |w| pair(w, w.memory(8), 0)),
        ("a mask of size 4", |w| pair(w, w.memory(8), 4)),
        ("a mask of size 128", |w| pair(w, w.memory(128), 128)),
        ("an unreadable mask of size 8", |w| pair(w, 8, 8)),
        ("an unreadable mask of size 7", |w| pair(w, 8, 7)),
    ];
    for (name, make) in masks {
        for (what, events) in [("3 ready", 3), ("none ready", 0)] {
            cases.add(format!("events/signal mask: {name}, {what}"), move |w| {
                let context = with_events(w, events);
                let at = w.memory(EVENT * 4);
                let mask = make(w);
                let answer = aio::get_masked(context.0, 1, 4, at, w.time(0, 1000), mask);
                w.see("io_pgetevents", answer);
                w.say(format!("head {}", context.head()));
                w.see("of no context", aio::get_masked(0, 1, 4, at, w.time(0, 0), mask));
                let answer = aio::get_masked(context.0, 5, 4, at, w.time(0, 0), mask);
                w.see("with bad counts", answer);
                w.see("with a bad timeout", aio::get_masked(context.0, 0, 4, at, 8, mask));
                w.say(format!("signals blocked {:#x}", sys::signal_mask()));
            });
        }
    }
}
