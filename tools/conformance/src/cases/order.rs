//! The order of io_submit's checks: an iocb that breaks two rules shows which is looked at first.

use libc::PROT_READ;

use super::Cases;
use crate::{
    aio::{self, Context, Iocb, flag, op},
    sys::{self, PAGE},
    world::World,
};

/// A request being spoilt.
struct Draft {
    context: Context,
    iocb: Iocb,
    key_is_read_only: bool,
    list_is_bad: bool,
    iocb_is_bad: bool,
}

/// Makes an array of segments: its address and how many there are.
type MakeVector = fn(&World) -> (u64, u64);
type Spoil = fn(&World, &mut Draft);

/// What can be wrong, in the order in which the kernel looks.
const WRONG: [(&str, Spoil); 17] = [
    ("list", |_, draft| draft.list_is_bad = true),
    ("iocb", |_, draft| draft.iocb_is_bad = true),
    ("reserved word", |_, draft| draft.iocb.reserved2 = 1),
    ("length", |_, draft| draft.iocb.nbytes = 1 << 63),
    ("slots", |w, draft| fill(w, draft.context)),
    ("descriptor", |_, draft| draft.iocb.fildes = 100_000),
    ("closed eventfd", |_, draft| draft.iocb = draft.iocb.signalling(100_001)),
    ("no eventfd", |w, draft| draft.iocb = draft.iocb.signalling(w.open(libc::O_RDONLY))),
    ("read-only key", |_, draft| draft.key_is_read_only = true),
    ("opcode", |_, draft| draft.iocb.opcode = 9),
    ("priority", |_, draft| {
        draft.iocb.flags |= flag::IOPRIO;
        draft.iocb.reqprio = 7 << 13;
    }),
    ("flags", |_, draft| draft.iocb.rw_flags |= 1 << 20),
    ("contrary flags", |_, draft| draft.iocb.rw_flags |= 0x30),
    ("mode", |w, draft| draft.iocb.fildes = w.open(libc::O_WRONLY)),
    ("no data", |w, draft| {
        let path = w.scratch("");
        draft.iocb.fildes = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY);
    }),
    ("buffer", |_, draft| draft.iocb.buf = u64::MAX - 4096),
    ("offset", |_, draft| draft.iocb.offset = -1),
];

/// Takes all slots.
fn fill(w: &World, context: Context) {
    let iocb = Iocb::new(op::PREAD, w.open(libc::O_RDONLY), w.memory(64), 1, 0);
    let at = w.place(&iocb);
    let list = w.list(&[at; 64]);
    while aio::submit(context.0, 64, list) > 0 {}
}

fn try_out(w: &World, spoils: &[Spoil]) {
    let mut draft = Draft {
        context: w.context(1),
        iocb: Iocb::new(op::PREAD, w.open(libc::O_RDWR), w.memory(PAGE), 512, 0),
        key_is_read_only: false,
        list_is_bad: false,
        iocb_is_bad: false,
    };
    draft.iocb.key = 77;
    for spoil in spoils {
        spoil(w, &mut draft);
    }
    let page = w.memory(PAGE);
    draft.iocb.store(page);
    if draft.key_is_read_only {
        sys::protect(page, PAGE, PROT_READ);
    }
    let at = if draft.iocb_is_bad { 8 } else { page };
    let list = if draft.list_is_bad { 8 } else { w.list(&[at]) };
    let before = draft.context.ready();
    w.see("io_submit", aio::submit(draft.context.0, 1, list));
    w.say(format!("aio_key {}", sys::load32(page + aio::KEY)));
    w.say(format!("new events {}", draft.context.ready() - before));
}

pub fn add(cases: &mut Cases) {
    for (place, (first, spoil)) in WRONG.into_iter().enumerate() {
        cases.add(format!("order/{first}"), move |w| try_out(w, &[spoil]));
        for (second, other) in WRONG.into_iter().skip(place + 1) {
            // The one that sets the descriptor last decides what it is.
            cases.add(format!("order/{first} and {second}"), move |w| {
                try_out(w, &[other, spoil]);
            });
        }
    }
    vectors(cases);
    priorities(cases);
}

/// The same for what only vectors can have wrong.
fn vectors(cases: &mut Cases) {
    let wrong: [(&str, MakeVector); 6] = [
        ("too many", |w| (w.memory(64), 1025)),
        ("too many, unreadable", |_| (8, 1025)),
        ("unreadable", |_| (8, 2)),
        ("negative length", |w| (w.vector(&[(w.memory(64), 8), (w.memory(64), 1 << 63)]), 2)),
        ("kernel base", |w| (w.vector(&[(w.memory(64), 8), (u64::MAX - 99, 8)]), 2)),
        ("kernel base before negative length", |w| {
            (w.vector(&[(u64::MAX - 99, 8), (w.memory(64), 1 << 63)]), 2)
        }),
    ];
    for (name, make) in wrong {
        for (second, offset, mode) in [
            ("nothing", 0, libc::O_RDWR),
            ("offset", -1, libc::O_RDWR),
            ("mode", 0, libc::O_WRONLY),
        ] {
            cases.add(format!("order/vector {name} and {second}"), move |w| {
                let (vector, count) = make(w);
                w.one(Iocb::new(op::PREADV, w.open(mode), vector, count, offset));
            });
        }
    }
}

/// Priorities, as the program's user and without rights.
fn priorities(cases: &mut Cases) {
    for class in 0..8_u16 {
        for powerless in [false, true] {
            let who = if powerless { "nobody" } else { "user" };
            cases.add(format!("order/priority class {class} as {who}"), move |w| {
                let fd = w.open(libc::O_RDWR | libc::O_DIRECT);
                let buffer = w.memory(PAGE);
                if powerless {
                    give_up_rights(w);
                }
                for level in [0, 1, 4, 7, 8, 0x1ff8] {
                    let reqprio = class << 13 | level;
                    for opcode in [op::PREAD, op::PWRITE, op::FSYNC, op::POLL] {
                        let iocb = match opcode {
                            op::POLL => Iocb::poll(fd, libc::POLLIN),
                            op::FSYNC => Iocb::new(opcode, fd, 0, 0, 0),
                            _ => Iocb::new(opcode, fd, buffer, 512, 0),
                        };
                        w.say(format!("level {level:#x} opcode {opcode}"));
                        w.one(Iocb { flags: flag::IOPRIO, reqprio, ..iocb });
                    }
                }
            });
        }
    }
}

/// Drops every capability, if there are any.
fn give_up_rights(w: &World) {
    // _LINUX_CAPABILITY_VERSION_3 and no capability.
    let (header, none) = (w.memory(8), w.memory(24));
    sys::store32(header, 0x2008_0522);
    w.see("capset", sys::call(libc::SYS_capset, &[header, none]));
}
