//! io_cancel(2).

use libc::{EFAULT, EINPROGRESS, EINVAL, O_NONBLOCK, O_RDWR, POLLIN, PROT_NONE};

use super::Cases;
use crate::{
    aio::{self, Context, Iocb, op},
    sys::{self, PAGE},
    world::{KERNEL, NON_CANONICAL, World},
};

type Make = fn(&World) -> u64;

pub fn add(cases: &mut Cases) {
    let bad: [(&str, Make); 5] = [
        ("NULL", |_| 0),
        ("-1", |_| u64::MAX),
        ("the kernel's", |_| KERNEL),
        ("not canonical", |_| NON_CANONICAL),
        ("a page without access", |w| w.page(PROT_NONE)),
    ];
    for (name, make) in bad {
        for context in [true, false] {
            cases.add(format!("cancel/iocb at {name}, context {context}"), move |w| {
                let id = if context { w.context(1).0 } else { 0 };
                w.rule("io_cancel", aio::cancel(id, make(w), w.memory(64)), -i64::from(EFAULT));
            });
        }
    }
    for key in [1, 77, u32::MAX] {
        cases.add(format!("cancel/key {key}"), move |w| {
            let at = w.place(&Iocb { key, ..Iocb::default() });
            w.rule("io_cancel", aio::cancel(w.context(1).0, at, 0), -i64::from(EINVAL));
            w.rule("of none", aio::cancel(0, at, 0), -i64::from(EINVAL));
        });
    }
    cases.add("cancel/never submitted", |w| {
        let at = w.place(&Iocb::default());
        w.rule("io_cancel", aio::cancel(w.context(1).0, at, w.memory(64)), -i64::from(EINVAL));
    });
    cases.add("cancel/only the key is readable", |w| {
        let page = w.memory(PAGE) + PAGE - 12;
        w.rule("io_cancel", aio::cancel(w.context(1).0, page, 0), -i64::from(EINVAL));
    });
    cases.add("cancel/not even the key is readable", |w| {
        let page = w.memory(PAGE) + PAGE - 11;
        w.rule("io_cancel", aio::cancel(w.context(1).0, page, 0), -i64::from(EFAULT));
    });
    for (name, opcode, flags) in [
        ("a cached read", op::PREAD, 0),
        ("a direct read", op::PREAD, libc::O_DIRECT),
        ("a direct write", op::PWRITE, libc::O_DIRECT),
        ("an fsync", op::FSYNC, 0),
    ] {
        cases.add(format!("cancel/{name}"), move |w| {
            let (context, fd) = (w.context(4), w.open(O_RDWR | flags));
            let (buffer, len) = if opcode == op::FSYNC { (0, 0) } else { (w.memory(PAGE), PAGE) };
            w.see("io_submit", w.submit(context, &[Iocb::new(opcode, fd, buffer, len, 0)]));
            let answer = aio::cancel(context.0, w.iocb(0), w.memory(64));
            w.rule("io_cancel", answer, -i64::from(EINVAL));
            w.reap(context, 1);
            let answer = aio::cancel(context.0, w.iocb(0), w.memory(64));
            w.rule("io_cancel", answer, -i64::from(EINVAL));
        });
    }
    polls(cases);
}

/// A context with a POLL that nothing will wake.
fn pending(w: &World) -> Context {
    let (context, (reader, _)) = (w.context(8), w.pipe(O_NONBLOCK));
    w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN).data(3)]));
    context
}

fn polls(cases: &mut Cases) {
    let results: [(&str, Make); 4] = [
        ("memory", |w| w.filled(64, 0xee)),
        ("NULL", |_| 0),
        ("-1", |_| u64::MAX),
        ("a page without access", |w| w.page(PROT_NONE)),
    ];
    for (name, make) in results {
        cases.add(format!("cancel/a POLL, result at {name}"), move |w| {
            let context = pending(w);
            let result = make(w);
            let answer = aio::cancel(context.0, w.iocb(0), result);
            w.rule("io_cancel", answer, -i64::from(EINPROGRESS));
            w.reap(context, 1);
            if name == "memory" {
                w.see_memory("result", result, 64);
            }
        });
    }
    cases.add("cancel/a POLL twice", |w| {
        let context = pending(w);
        w.rule("first", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
        w.rule("second", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINVAL));
        w.reap(context, 1);
        w.rule("third", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINVAL));
    });
    cases.add("cancel/a POLL in another context", |w| {
        let (context, other) = (pending(w), w.context(4));
        w.rule("other", aio::cancel(other.0, w.iocb(0), 0), -i64::from(EINVAL));
        w.rule("own", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
        w.reap(context, 1);
    });
    cases.add("cancel/a POLL by a copy of its iocb", |w| {
        let context = pending(w);
        let copy = w.memory(64);
        sys::put_bytes(copy, &sys::bytes(w.iocb(0), 64));
        w.rule("copy", aio::cancel(context.0, copy, 0), -i64::from(EINVAL));
        w.rule("own", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
        w.reap(context, 1);
    });
    cases.add("cancel/a POLL whose iocb was overwritten", |w| {
        let context = pending(w);
        sys::put_bytes(w.iocb(0), &[0; 64]);
        w.rule("io_cancel", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
        w.reap(context, 1);
    });
    cases.add("cancel/a POLL whose key was changed", |w| {
        let context = pending(w);
        sys::store32(w.iocb(0) + aio::KEY, 5);
        w.rule("io_cancel", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINVAL));
        sys::store32(w.iocb(0) + aio::KEY, 0);
        w.rule("io_cancel", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
    });
    cases.add("cancel/one iocb submitted twice", |w| {
        let (context, (reader, _writer)) = (w.context(8), w.pipe(O_NONBLOCK));
        let at = w.place(&Iocb::poll(reader, POLLIN));
        w.see("io_submit", aio::submit(context.0, 2, w.list(&[at, at])));
        for _ in 0..3 {
            w.see("io_cancel", aio::cancel(context.0, at, 0));
        }
        w.reap(context, 2);
    });
    cases.add("cancel/a POLL that has been woken", |w| {
        let (context, (reader, writer)) = (w.context(8), w.pipe(O_NONBLOCK));
        w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN)]));
        w.write(writer, "x");
        w.reap(context, 1);
        w.rule("io_cancel", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINVAL));
    });
    cases.add("cancel/a POLL signals its eventfd", |w| {
        let (context, (reader, _writer)) = (w.context(8), w.pipe(O_NONBLOCK));
        let counter = w.eventfd(0, 0);
        let iocb = Iocb::poll(reader, POLLIN).signalling(counter);
        w.see("io_submit", w.submit(context, &[iocb]));
        w.rule("io_cancel", aio::cancel(context.0, w.iocb(0), 0), -i64::from(EINPROGRESS));
        w.see_counter(counter);
    });
    cases.add("cancel/the slot is free again", |w| {
        let (context, (reader, _writer)) = (w.context(1), w.pipe(O_NONBLOCK));
        let at = w.place(&Iocb::poll(reader, POLLIN));
        let list = w.list(&[at]);
        let mut wrong = 0;
        for _ in 0..1000 {
            wrong += u32::from(aio::submit(context.0, 1, list) != 1);
            wrong += u32::from(aio::cancel(context.0, at, 0) != -i64::from(EINPROGRESS));
            wrong += u32::from(w.take(context, 1).0 != 1);
        }
        w.say(format!("wrong {wrong}"));
    });
}
