//! What is a context and what is not: every call against everything that may be taken for one.

use libc::{EINVAL, MAP_FIXED, PROT_NONE, PROT_READ, PROT_WRITE};

use super::Cases;
use crate::{
    aio::{self, Context, Iocb, op},
    sys::{self, PAGE, put_bytes},
    world::{KERNEL, NON_CANONICAL, World},
};

type Make = fn(&World) -> u64;
type Call = fn(&World, u64) -> i64;

/// A context with three events in its ring, to stand for one that is in use.
fn used(w: &World) -> Context {
    let context = w.context(8);
    let (fd, buffer) = (w.open(libc::O_RDONLY), w.memory(64));
    for data in 1..=3 {
        w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, 1, 0).data(data)]);
    }
    context
}

const NOT_CONTEXTS: [(&str, Make); 20] = [
    ("0", |_| 0),
    ("1", |_| 1),
    ("-1", |_| u64::MAX),
    ("the kernel's", |_| KERNEL),
    ("not canonical", |_| NON_CANONICAL),
    ("ring + 8", |w| used(w).0 + 8),
    ("ring + 1", |w| used(w).0 + 1),
    ("ring - 4", |w| used(w).0 - 4),
    ("the second page of a ring", |w| {
        let context = w.context(256);
        context.0 + PAGE
    }),
    ("a zero page", |w| {
        used(w);
        w.memory(PAGE)
    }),
    ("memory that is not there", |w| {
        used(w);
        w.page(PROT_NONE)
    }),
    ("destroyed", |w| {
        let context = used(w);
        w.see("io_destroy", aio::destroy(context.0));
        context.0
    }),
    ("unmapped", |w| {
        let context = used(w);
        w.see("munmap", sys::unmap(context.0, context.bytes()));
        context.0
    }),
    ("without access", |w| {
        let context = used(w);
        w.see("mprotect", sys::protect(context.0, PAGE, PROT_NONE));
        context.0
    }),
    ("id too large", |w| {
        let context = used(w);
        context.set_word(0, 1 << 20);
        context.0
    }),
    ("id -1", |w| {
        let context = used(w);
        context.set_word(0, u32::MAX);
        context.0
    }),
    ("id of an empty place", |w| {
        let context = used(w);
        context.set_word(0, 1);
        context.0
    }),
    ("id of another", |w| {
        let (context, other) = (used(w), w.context(1));
        context.set_word(0, other.id());
        context.0
    }),
    ("a copied header", |w| {
        let (context, page) = (used(w), w.memory(PAGE));
        put_bytes(page, &sys::bytes(context.0, 32));
        page
    }),
    ("a zero page in the ring's place", |w| {
        // Its id is 0: make the context one with another id.
        w.context(1);
        let context = used(w);
        replace(w, context);
        context.0
    }),
];

fn replace(w: &World, context: Context) {
    let protection = PROT_READ | PROT_WRITE;
    let at = sys::map(context.0, context.bytes(), protection, MAP_FIXED);
    w.say(format!("replaced {}", at.cast_unsigned() == context.0));
}

const CALLS: [(&str, Call); 8] = [
    ("io_submit of nothing", |_, context| aio::submit(context, 0, 0)),
    ("io_submit", |w, context| {
        let iocb = Iocb::new(op::PREAD, w.open(libc::O_RDONLY), w.memory(64), 1, 0);
        w.submit(Context(context), &[iocb])
    }),
    ("io_submit of a bad pointer", |_, context| aio::submit(context, 1, 0)),
    ("io_submit of -1", |_, context| aio::submit(context, -1, 0)),
    ("io_getevents", |w, context| aio::get(context, 0, 8, w.memory(256), w.time(0, 0))),
    ("io_pgetevents", |w, context| aio::get_masked(context, 0, 8, w.memory(256), w.time(0, 0), 0)),
    ("io_cancel", |w, context| aio::cancel(context, w.place(&Iocb::default()), w.memory(64))),
    ("io_destroy", |_, context| aio::destroy(context)),
];

pub fn add(cases: &mut Cases) {
    for (what, make) in NOT_CONTEXTS {
        for (name, call) in CALLS {
            cases.add(format!("lookup/{what}: {name}"), move |w| {
                let context = make(w);
                w.rule(name, call(w, context), -i64::from(EINVAL));
            });
        }
    }
    for (name, call) in CALLS {
        cases.add(format!("lookup/a read-only ring: {name}"), move |w| {
            let context = used(w);
            sys::protect(context.0, context.bytes(), PROT_READ);
            w.see(name, call(w, context.0));
            w.see("io_submit", aio::submit(context.0, 0, 0));
        });
        cases.add(format!("lookup/a copied header in the ring's place: {name}"), move |w| {
            let context = used(w);
            let header = sys::bytes(context.0, 32);
            replace(w, context);
            put_bytes(context.0, &header);
            w.see(name, call(w, context.0));
            if name != "io_destroy" {
                // The true ring is the kernel's; what is read here is the copy.
                w.say(format!("tail of the copy {}", context.tail()));
            }
        });
        cases.add(format!("lookup/changed header words are not believed: {name}"), move |w| {
            let context = used(w);
            for index in [1, 4, 5, 6, 7] {
                context.set_word(index, 0xdead_0000 + index as u32);
            }
            w.see(name, call(w, context.0));
        });
    }
}
