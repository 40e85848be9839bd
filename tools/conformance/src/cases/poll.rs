//! POLL: ready at once, woken later, and what an event says.

use libc::{EINVAL, O_NONBLOCK, O_RDWR, POLLIN, POLLOUT};

use super::Cases;
use crate::{
    aio::{self, Iocb, op},
    sys,
    world::{World, until_asleep},
};

pub fn add(cases: &mut Cases) {
    for (name, mask) in [
        ("0", 0_u64),
        ("in", 1),
        ("out", 4),
        ("in and out", 5),
        ("all", 0xffff),
        ("one more than 16 bits", 0x1_0000),
        ("in, with high bits", 0x1_0000_0001),
        ("-1", u64::MAX),
    ] {
        cases.add(format!("poll/the file for {name}"), move |w| {
            let fd = w.open(O_RDWR);
            w.one(Iocb::new(op::POLL, fd, mask, 0, 0));
        });
        cases.add(format!("poll/the writing end of a pipe for {name}"), move |w| {
            let (context, (_reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
            let answer = w.submit(context, &[Iocb::new(op::POLL, writer, mask, 0, 0)]);
            w.see("io_submit", answer);
            w.see("in the ring", context.ready().into());
        });
    }
    for (name, change) in [
        ("an offset", (|iocb| iocb.offset = 1) as fn(&mut Iocb)),
        ("an offset below 0", |iocb| iocb.offset = -1),
        ("a length", |iocb| iocb.nbytes = 1),
        ("flags", |iocb| iocb.rw_flags = 2),
        ("a mask of 17 bits", |iocb| iocb.buf = 1 << 16),
    ] {
        for of_file in [true, false] {
            let what = if of_file { "the file" } else { "a pipe" };
            cases.add(format!("poll/{what} with {name}"), move |w| {
                let fd = if of_file { w.open(O_RDWR) } else { w.pipe(O_NONBLOCK).1 };
                let mut iocb = Iocb::poll(fd, POLLOUT);
                change(&mut iocb);
                w.rule("it", w.one(iocb), -i64::from(EINVAL));
            });
        }
    }
    for (name, events) in [("in", POLLIN), ("in and out", POLLIN | POLLOUT), ("out", POLLOUT)] {
        cases.add(format!("poll/a pipe for {name}, written later"), move |w| {
            let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
            w.see("io_submit", w.submit(context, &[Iocb::poll(reader, events)]));
            w.see("in the ring", context.ready().into());
            w.write(writer, "x");
            if events != POLLOUT {
                w.reap(context, 1);
            }
            w.write(writer, "y");
            w.see("in the ring", context.ready().into());
        });
        cases.add(format!("poll/a pipe for {name}, its writer closed later"), move |w| {
            let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
            w.see("io_submit", w.submit(context, &[Iocb::poll(reader, events)]));
            sys::close(writer);
            w.reap(context, 1);
        });
        cases.add(format!("poll/a stream socket for {name}, written later"), move |w| {
            let (context, (here, there)) = (w.context(4), w.sockets(libc::SOCK_STREAM));
            w.see("io_submit", w.submit(context, &[Iocb::poll(here, events)]));
            w.write(there, "x");
            w.reap(context, 1);
        });
        cases.add(format!("poll/an eventfd for {name}, written later"), move |w| {
            let (context, fd) = (w.context(4), w.eventfd(0, 0));
            w.see("io_submit", w.submit(context, &[Iocb::poll(fd, events)]));
            let one = w.memory(8);
            sys::store64(one, 1);
            sys::call(libc::SYS_write, &[sys::word(fd), one, 8]);
            w.reap(context, 1);
        });
    }
    cases.add("poll/close does not end it", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN)]));
        sys::close(reader);
        w.see("in the ring", context.ready().into());
        w.write(writer, "x");
        w.reap(context, 1);
    });
    cases.add("poll/it is one shot", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        for round in 0..3 {
            w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN).data(round)]));
            w.write(writer, "x");
            w.reap(context, 1);
        }
    });
    cases.add("poll/two on one pipe", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        let two = [Iocb::poll(reader, POLLIN).data(1), Iocb::poll(reader, POLLIN).data(2)];
        w.see("io_submit", w.submit(context, &two));
        w.write(writer, "x");
        w.reap_any_order(context, 2);
    });
    cases.add("poll/an eventfd is signalled when it is woken", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        let counter = w.eventfd(0, 0);
        let iocb = Iocb::poll(reader, POLLIN).signalling(counter);
        w.see("io_submit", w.submit(context, &[iocb]));
        w.write(writer, "x");
        w.see_counter(counter);
        w.see("in the ring", context.ready().into());
    });
    cases.add("poll/a fifo opened for both and not ready", |w| {
        let path = w.scratch("poll-fifo");
        // SAFETY: the path ends in a zero byte.
        unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
        let fd = sys::open(&path, O_RDWR | O_NONBLOCK);
        w.one(Iocb::poll(fd, POLLOUT));
        w.see("io_submit", w.submit(w.context(4), &[Iocb::poll(fd, POLLIN)]));
    });
    cases.add("poll/it wakes a waiting io_getevents", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN)]));
        let me = sys::thread();
        let sender = std::thread::spawn(move || {
            until_asleep(me);
            let text = *b"late";
            sys::call(libc::SYS_write, &[sys::word(writer), text.as_ptr() as u64, 4])
        });
        w.reap(context, 1);
        let _ = sender.join();
    });
    cases.add("poll/pending ones use up slots", |w| {
        let (context, (reader, _writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        let mut taken = 0;
        let answer = loop {
            match w.submit(context, &[Iocb::poll(reader, POLLIN)]) {
                1 => taken += 1,
                other => break other,
            }
        };
        w.say(format!("at least what was asked for: {}", taken >= 4));
        w.see("io_submit", answer);
    });
    cases.add("poll/a file's request overtakes a pending one", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(O_NONBLOCK));
        let fd = w.open(O_RDWR);
        w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN).data(1)]));
        w.one_in(context, Iocb::new(op::PREAD, fd, w.memory(64), 8, 0).data(2));
        w.write(writer, "x");
        w.reap(context, 1);
    });
    cases.add("poll/exit with one pending", |w| {
        w.in_child("child", || {
            let (context, (reader, _writer)) = (w.context(4), w.pipe(O_NONBLOCK));
            w.see("io_submit", w.submit(context, &[Iocb::poll(reader, POLLIN)]));
        });
    });
    cases.add("poll/io_destroy with one pending", pending_destroyed);
}

fn pending_destroyed(w: &World) {
    let (context, (reader, _writer)) = (w.context(4), w.pipe(O_NONBLOCK));
    let counter = w.eventfd(0, O_NONBLOCK);
    let iocb = Iocb::poll(reader, POLLIN).signalling(counter);
    w.see("io_submit", w.submit(context, &[iocb]));
    w.see("io_destroy", aio::destroy(context.0));
    w.see_counter(counter);
}
