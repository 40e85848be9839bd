//! Slots: how many requests fit, and what frees them.

use libc::EAGAIN;

use super::Cases;
use crate::{
    aio::{self, Context, Iocb, op},
    sys::load32,
    world::World,
};

/// Submits one by one until a request is refused; answers how many were taken.
fn fill(w: &World, context: Context, from: u64) -> u64 {
    let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
    let at = w.memory(64);
    let list = w.list(&[at]);
    let mut taken = 0;
    loop {
        Iocb::new(op::PREAD, fd, buffer, 1, 0).data(from + taken).store(at);
        match aio::submit(context.0, 1, list) {
            1 => taken += 1,
            other => {
                w.rule("refused", other, -i64::from(EAGAIN));
                return taken;
            }
        }
    }
}

/// What is defined of how many fit.
fn see_taken(w: &World, context: Context, asked: u64, taken: u64) {
    let slots = u64::from(context.slots());
    w.say(format!("as many as asked: {}, fewer than slots: {}", taken >= asked, taken < slots));
    w.say(format!("all in the ring: {}", u64::from(context.ready()) == taken));
}

pub fn add(cases: &mut Cases) {
    for nr in [1, 4, 10, 31, 64, 100, 126, 127, 200, 500, 1000, 3000] {
        cases.add(format!("capacity/{nr} fit into a context of {nr}"), move |w| {
            let context = w.context(nr);
            let taken = fill(w, context, 0);
            see_taken(w, context, nr, taken);
            let (_, events) = w.take(context, taken as i64);
            let in_order = events.iter().zip(0..).all(|(event, data)| event.data == data);
            w.say(format!("in order {in_order}, all {}", events.len() as u64 == taken));
            let again = fill(w, context, 0);
            see_taken(w, context, nr, again);
        });
        cases.add(format!("capacity/one batch larger than a context of {nr}"), move |w| {
            let context = w.context(nr);
            let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
            let at = w.place(&Iocb::new(op::PREAD, fd, buffer, 1, 0));
            let list = w.list(&vec![at; 10_000]);
            let taken = aio::submit(context.0, 10_000, list);
            see_taken(w, context, nr, taken.max(0).cast_unsigned());
            w.rule("another", aio::submit(context.0, 1, list), -i64::from(EAGAIN));
        });
    }
    for count in [1_u64, 2, 50] {
        cases.add(format!("capacity/reaping {count} makes room for {count}"), move |w| {
            let context = w.context(64);
            let taken = fill(w, context, 0);
            w.must("io_getevents", w.take(context, count as i64).0);
            let again = fill(w, context, taken);
            w.say(format!("room for as many: {}", again >= count));
            w.say(format!(
                "head {} events {}",
                context.head(),
                u64::from(context.ready()) == taken - count + again
            ));
        });
        cases.add(
            format!("capacity/moving the head by {count} makes room for {count}"),
            move |w| {
                let context = w.context(64);
                let taken = fill(w, context, 0);
                context.set_word(2, context.head() + count as u32);
                let again = fill(w, context, taken);
                w.say(format!("room for as many: {}", again >= count));
                w.say(format!(
                    "head {} next {:?}",
                    context.head(),
                    context.event(context.head()).data
                ));
            },
        );
    }
    cases.add("capacity/a full context takes nothing, whatever it is asked", |w| {
        let context = w.context(8);
        fill(w, context, 0);
        let fd = w.open(libc::O_RDONLY);
        for (name, iocb) in [
            ("a bad opcode", Iocb::new(6, fd, 0, 0, 0)),
            ("a bad descriptor", Iocb::new(op::PREAD, -1, 0, 0, 0)),
            ("a read of nothing", Iocb::new(op::PREAD, fd, 0, 0, 0)),
            ("an fsync", Iocb::new(op::FSYNC, fd, 0, 0, 0)),
        ] {
            w.rule(name, w.submit(context, &[iocb]), -i64::from(EAGAIN));
        }
        let reserved = Iocb { reserved2: 1, ..Iocb::new(op::PREAD, fd, 0, 0, 0) };
        w.see("a reserved word", w.submit(context, &[reserved]));
    });
    cases.add("capacity/refused requests keep no slot", |w| {
        let context = w.context(8);
        for _ in 0..2000 {
            w.submit(context, &[Iocb::new(op::PREAD, -1, 0, 0, 0)]);
        }
        let taken = fill(w, context, 0);
        see_taken(w, context, 8, taken);
    });
    cases.add("capacity/a program that reaps by itself for many rounds", |w| {
        let context = w.context(16);
        let (fd, buffer) = (w.open(libc::O_RDWR | libc::O_DIRECT), w.memory(16 * 4096));
        let (mut sum, mut wrong) = (0, 0);
        for round in 0..40 {
            let iocbs: Vec<Iocb> = (0..16)
                .map(|i| {
                    let (to, from) = (buffer + i * 4096, (i % 8 * 4096) as i64);
                    Iocb::new(op::PREAD, fd, to, 4096, from).data(round * 16 + i)
                })
                .collect();
            w.must("io_submit", w.submit(context, &iocbs));
            let mut left = 16;
            while left > 0 {
                let (head, tail) = (context.head(), context.tail());
                if head == tail {
                    crate::sys::give_way();
                    continue;
                }
                let event = context.event(head);
                sum += event.data;
                wrong += u32::from(event.res != 4096);
                context.set_word(2, (head + 1) % context.slots());
                left -= 1;
            }
        }
        w.say(format!("sum of data {sum}, wrong {wrong}, tail {}", context.tail()));
    });
    cases.add("capacity/a head moved past the tail", |w| {
        let context = w.context(8);
        let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
        w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0); 3]);
        context.set_word(2, 10);
        let at = w.memory(4096 * 2);
        w.see("io_getevents", aio::get(context.0, 0, 200, at, w.time(0, 0)));
        w.say(format!("head {} tail {}", context.head(), context.tail()));
    });
    for head in [127, 128, 254, 1 << 31, u32::MAX] {
        cases.add(format!("capacity/a head of {head:#x}"), move |w| {
            let context = w.context(8);
            let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
            w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0); 3]);
            context.set_word(2, head);
            let at = w.memory(32 * 200);
            w.see("io_getevents", aio::get(context.0, 0, 200, at, w.time(0, 0)));
            w.say(format!("head {} tail {}", context.head(), load32(context.0 + 12)));
        });
    }
    for tail in [0, 1, 2, 126, 127, 300, u32::MAX] {
        cases.add(format!("capacity/a tail of {tail:#x}"), move |w| {
            let context = w.context(8);
            let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
            let iocb = Iocb::new(op::PREAD, fd, buffer, 1, 0);
            w.submit(context, &[iocb; 2]);
            context.set_word(3, tail);
            let at = w.memory(32 * 200);
            w.see("io_getevents", aio::get(context.0, 0, 200, at, w.time(0, 0)));
            w.say(format!("head {} tail {}", context.head(), context.tail()));
            w.see("io_submit", w.submit(context, &[iocb]));
            w.say(format!("head {} tail {}", context.head(), context.tail()));
        });
    }
}
