//! FSYNC and FDSYNC.

use libc::EINVAL;

use super::Cases;
use crate::{
    aio::{Iocb, flag, op},
    sys,
    world::World,
};

type Change = fn(&mut Iocb);
type Open = fn(&World) -> i32;

const CHANGES: [(&str, Change, bool); 11] = [
    ("as it should be", |_| (), true),
    ("with a buffer", |iocb| iocb.buf = 1, false),
    ("with a length", |iocb| iocb.nbytes = 1, false),
    ("with an offset", |iocb| iocb.offset = 1, false),
    ("with an offset below 0", |iocb| iocb.offset = -1, false),
    ("with flags", |iocb| iocb.rw_flags = 2, false),
    ("with unknown flags", |iocb| iocb.rw_flags = 1 << 31, false),
    ("with a bad priority", |iocb| (iocb.flags, iocb.reqprio) = (flag::IOPRIO, 7 << 13), true),
    ("with a priority that is not asked for", |iocb| iocb.reqprio = 7 << 13, true),
    ("with a key", |iocb| iocb.key = 9, true),
    ("with data", |iocb| iocb.data = 99, true),
];

const FILES: [(&str, Open); 9] = [
    ("the file", |w| w.open(libc::O_RDWR)),
    ("the file, read-only", |w| w.open(libc::O_RDONLY)),
    ("the file, write-only", |w| w.open(libc::O_WRONLY)),
    ("the file, direct", |w| w.open(libc::O_RDWR | libc::O_DIRECT)),
    ("the file, O_PATH", |w| w.open(libc::O_PATH)),
    ("a directory", |w| sys::open(&w.scratch(""), libc::O_RDONLY | libc::O_DIRECTORY)),
    ("a pipe", |w| w.pipe(0).1),
    ("an eventfd", |w| w.eventfd(0, 0)),
    ("a socket", |w| w.sockets(libc::SOCK_STREAM).0),
];

pub fn add(cases: &mut Cases) {
    for (kind, opcode) in [("fsync", op::FSYNC), ("fdsync", op::FDSYNC)] {
        for (name, change, accepted) in CHANGES {
            cases.add(format!("sync/{kind} {name}"), move |w| {
                let mut iocb = Iocb::new(opcode, w.open(libc::O_RDWR), 0, 0, 0);
                change(&mut iocb);
                let rule = if accepted { 1 } else { -i64::from(EINVAL) };
                w.rule("it", w.one(iocb), rule);
            });
        }
        for (name, open) in FILES {
            cases.add(format!("sync/{kind} of {name}"), move |w| {
                w.one(Iocb::new(opcode, open(w), 0, 0, 0));
            });
        }
        cases.add(format!("sync/{kind} after writes in one batch"), move |w| {
            let (context, fd) = (w.context(16), w.open(libc::O_RDWR));
            let buffer = w.filled(4096, 0x5c);
            let mut iocbs: Vec<Iocb> = (0..8)
                .map(|i| Iocb::new(op::PWRITE, fd, buffer, 4096, i * 4096).data(i as u64))
                .collect();
            iocbs.push(Iocb::new(opcode, fd, 0, 0, 0).data(100));
            w.see("io_submit", w.submit(context, &iocbs));
            w.reap_any_order(context, 9);
            w.see_file();
        });
        cases.add(format!("sync/{kind} signals an eventfd"), move |w| {
            let (context, counter) = (w.context(4), w.eventfd(0, 0));
            let iocb = Iocb::new(opcode, w.open(libc::O_RDWR), 0, 0, 0).signalling(counter);
            w.see("io_submit", w.submit(context, &[iocb]));
            w.see_counter(counter);
            w.see("in the ring", context.ready().into());
        });
        cases.add(format!("sync/{kind}, the descriptor closed at once"), move |w| {
            let (context, fd) = (w.context(4), w.open(libc::O_RDWR));
            w.see("io_submit", w.submit(context, &[Iocb::new(opcode, fd, 0, 0, 0)]));
            sys::close(fd);
            w.reap(context, 1);
        });
    }
}
