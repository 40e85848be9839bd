//! Many contexts, many threads, and nothing left behind.

use libc::O_RDWR;

use super::{Cases, setup::charge_of};
use crate::{
    aio::{self, Context, Event, Iocb, op},
    sys::{self, PAGE, load64, store64},
};

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap_or_default().lines().count()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

pub fn add(cases: &mut Cases) {
    cases.add("scale/10000 contexts", |w| {
        let fd = w.open(O_RDWR);
        let places = w.memory(8 * 10_000);
        let (before, open) = (mappings(), descriptors());
        let made = (0..10_000).filter(|i| aio::setup(1, places + 8 * i) == 0).count();
        w.see("made", made as i64);
        let last = Context(load64(places + 8 * (made as u64 - 1)));
        w.say(format!("id of the last {}", last.id()));
        w.one_in(last, Iocb::new(op::PREAD, fd, w.memory(64), 8, 0));
        let threads: Vec<_> = (0..100_u64)
            .map(|thread| {
                std::thread::spawn(move || {
                    (0..100)
                        .filter(|i| aio::destroy(load64(places + 8 * (thread * 100 + i))) == 0)
                        .count()
                })
            })
            .collect();
        let gone: usize = threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum();
        w.see("destroyed", gone as i64);
        // Thread stacks and the allocator's own may stay.
        w.say(format!("mappings left {}", mappings().saturating_sub(before) > 300));
        w.say(format!("descriptors left {}", descriptors().saturating_sub(open)));
        w.say(format!("next id {}", w.context(1).id()));
    });
    cases.add("scale/100 threads that set up, submit and destroy", |w| {
        let fd = w.open(O_RDWR | libc::O_DIRECT);
        let warm = w.context(1);
        w.one_in(warm, Iocb::new(op::PREAD, fd, w.memory(PAGE), PAGE, 0));
        let round = || -> u32 {
            let threads: Vec<_> = (0..100_u64)
                .map(|thread| {
                    let (place, buffer, at) = (w.memory(8), w.memory(PAGE), w.memory(64));
                    let offset = (thread % 8 * PAGE) as i64;
                    let iocb = Iocb::new(op::PREAD, fd, buffer, PAGE, offset).data(thread);
                    let list = w.list(&[w.place(&iocb)]);
                    std::thread::spawn(move || {
                        let mut wrong = 0;
                        for _ in 0..5 {
                            store64(place, 0);
                            wrong += u32::from(aio::setup(4, place) != 0);
                            let context = load64(place);
                            wrong += u32::from(aio::submit(context, 1, list) != 1);
                            wrong += u32::from(aio::get(context, 1, 1, at, 0) != 1);
                            let event = Event::load(at);
                            wrong += u32::from(event.res != 4096 || event.data != thread);
                            wrong += u32::from(aio::destroy(context) != 0);
                        }
                        wrong
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(99)).sum()
        };
        w.see("wrong", round().into());
        let (before, open) = (mappings(), descriptors());
        w.see("wrong", round().into());
        w.say(format!("mappings left {}", mappings().saturating_sub(before) > 20));
        w.say(format!("descriptors left {}", descriptors().saturating_sub(open)));
    });
    cases.add("scale/aio-nr is back after 100 contexts", |w| {
        let places = w.memory(8 * 100);
        let change = charge_of(|| {
            let pid = sys::fork();
            if pid == 0 {
                let made = (0..100).filter(|i| aio::setup(7, places + 8 * i) == 0).count();
                sys::quit(i32::from(made != 100));
            }
            sys::wait_for(pid, 0);
            Box::new(|| {})
        });
        w.rule("charged", change, 0);
    });
    cases.add("scale/5000 requests through a context of 64", |w| {
        let (context, fd) = (w.context(64), w.open(O_RDWR | libc::O_DIRECT));
        let buffer = w.memory(64 * PAGE);
        let mut sum = 0_u64;
        for round in 0..80 {
            let iocbs: Vec<Iocb> = (0..64)
                .map(|i| {
                    let (to, from) = (buffer + i * PAGE, (i % 8 * PAGE) as i64);
                    Iocb::new(op::PREAD, fd, to, PAGE, from).data(round * 64 + i)
                })
                .collect();
            w.must("io_submit", w.submit(context, &iocbs));
            let (_, events) = w.take(context, 64);
            sum += events
                .iter()
                .filter(|event| event.res == 4096)
                .map(|event| event.data)
                .sum::<u64>();
        }
        w.say(format!("sum {sum} head {} tail {}", context.head(), context.tail()));
    });
    cases.add("scale/descriptors of a context", |w| {
        w.open(O_RDWR);
        let first = w.context(1);
        w.submit(first, &[Iocb::new(op::PREAD, w.open(O_RDWR), w.memory(64), 8, 0)]);
        let open = descriptors();
        let contexts: Vec<Context> = (0..20).map(|_| w.context(4)).collect();
        w.see("more", descriptors() as i64 - open as i64);
        contexts.iter().for_each(|context| {
            aio::destroy(context.0);
        });
        w.see("more", descriptors() as i64 - open as i64);
    });
}
