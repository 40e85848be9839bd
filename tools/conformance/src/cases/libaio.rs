//! libaio's functions: negative errnos, what they do without a system call.

use std::ptr;

use libaio_sys as lib;
use libc::{EINVAL, O_DIRECT, O_RDONLY, O_RDWR};

use super::Cases;
use crate::{
    aio::{Context, Event, Iocb, op},
    sys::{self, PAGE, load32, load64, store64},
    world::World,
};

fn setup(nr: i32, at: u64) -> i64 {
    // SAFETY: the kernel checks the place.
    unsafe { lib::io_setup(nr, at as *mut _) }.into()
}

fn submit(context: u64, nr: i64, list: u64) -> i64 {
    // SAFETY: the kernel checks what it is given.
    unsafe { lib::io_submit(context as *mut _, nr, list as *mut _) }.into()
}

fn get(context: u64, min: i64, nr: i64, events: u64, timeout: u64) -> i64 {
    // SAFETY: libaio reads the ring's header of the context, which is there; the kernel checks
    // the rest.
    unsafe { lib::io_getevents(context as *mut _, min, nr, events as *mut _, timeout as *mut _) }
        .into()
}

fn cancel(context: u64, iocb: u64, event: u64) -> i64 {
    // SAFETY: the kernel checks what it is given.
    unsafe { lib::io_cancel(context as *mut _, iocb as *mut _, event as *mut _) }.into()
}

fn destroy(context: u64) -> i64 {
    // SAFETY: the kernel checks what it is given.
    unsafe { lib::io_destroy(context as *mut _) }.into()
}

fn read(w: &World) -> u64 {
    w.place(&Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 16, 0).data(4))
}

pub fn add(cases: &mut Cases) {
    cases.add("libaio/a whole round", |w| {
        let at = w.memory(8);
        w.rule("io_setup", setup(8, at), 0);
        let context = load64(at);
        w.rule("io_submit", submit(context, 1, w.list(&[read(w)])), 1);
        let events = w.memory(64);
        w.rule("io_getevents", get(context, 1, 2, events, 0), 1);
        w.say(w.event(&Event::load(events)));
        w.rule("io_destroy", destroy(context), 0);
    });
    for (name, call) in [
        ("io_setup", (|w| setup(0, w.memory(8))) as fn(&World) -> i64),
        ("io_setup of -1", |w| setup(-1, w.memory(8))),
        ("io_setup to nowhere", |_| setup(1, 8)),
        ("io_submit", |_| submit(0, 1, 0)),
        ("io_submit of a bad list", |w| submit(w.context(1).0, 1, 8)),
        ("io_submit of -1", |w| submit(w.context(1).0, -1, 0)),
        ("io_getevents", |w| get(0, 1, 1, w.memory(64), 0)),
        ("io_getevents of bad counts", |w| get(w.context(1).0, 2, 1, w.memory(64), 0)),
        ("io_cancel", |w| cancel(w.context(1).0, read(w), 0)),
        ("io_cancel of nothing", |w| cancel(w.context(1).0, 8, 0)),
        ("io_destroy", |_| destroy(0)),
    ] {
        cases.add(
            format!("libaio/{name} answers a negative errno and leaves errno alone"),
            move |w| {
                sys::set_errno(12345);
                let answer = call(w);
                let errno = sys::errno();
                w.see(name, answer);
                w.say(format!("errno {errno}"));
            },
        );
    }
    cases.add("libaio/successful calls leave errno alone", |w| {
        let (at, events) = (w.memory(8), w.memory(64));
        let list = w.list(&[read(w)]);
        sys::set_errno(12345);
        setup(4, at);
        submit(load64(at), 1, list);
        get(load64(at), 1, 1, events, 0);
        destroy(load64(at));
        w.say(format!("errno {}", sys::errno()));
    });
    empty_rings(cases);
    queues(cases);
}

/// libaio itself answers when it is asked to look and the ring is empty.
fn empty_rings(cases: &mut Cases) {
    for (name, min, nr, events) in [
        ("nothing to take", 0, 1, 0),
        ("bad counts", 5, 1, 0),
        ("a negative count", -1, -1, 0),
        ("a bad place", 1, 1, 8),
    ] {
        for ready in [false, true] {
            cases.add(format!("libaio/a look with {name}, ready {ready}"), move |w| {
                let context = w.context(4);
                if ready {
                    w.rule("io_submit", submit(context.0, 1, w.list(&[read(w)])), 1);
                }
                w.see("io_getevents", get(context.0, min, nr, events, w.time(0, 0)));
                w.say(format!("head {}", context.head()));
            });
        }
    }
    cases.add("libaio/a look at a ring with another magic", |w| {
        let context = w.context(4);
        context.set_word(4, 1);
        w.rule("io_getevents", get(context.0, 5, 1, 0, w.time(0, 0)), -i64::from(EINVAL));
    });
    cases.add("libaio/a look at a page that looks like an empty ring", |w| {
        let page = w.memory(PAGE);
        sys::put_bytes(page, &sys::bytes(w.context(1).0, 32));
        w.see("io_getevents", get(page, 1, 1, 0, w.time(0, 0)));
    });
    cases.add("libaio/looking again and again until a request completes", |w| {
        let (context, fd) = (w.context(4), w.open(O_RDWR | O_DIRECT));
        let iocb = Iocb::new(op::PREAD, fd, w.memory(PAGE), PAGE, 0);
        w.rule("io_submit", submit(context.0, 1, w.list(&[w.place(&iocb)])), 1);
        let (at, now) = (w.memory(64), w.time(0, 0));
        while get(context.0, 1, 1, at, now) == 0 {
            sys::give_way();
        }
        w.say(w.event(&Event::load(at)));
    });
    cases.add("libaio/io_pgetevents", |w| {
        let context = w.context(4);
        let (events, mask) = (w.memory(64), w.memory(128));
        let look = |min: i64, time: u64| -> i64 {
            // SAFETY: libaio reads the ring's header, which is there; the kernel checks the rest.
            unsafe {
                lib::io_pgetevents(
                    context.0 as *mut _,
                    min,
                    1,
                    events as *mut _,
                    time as *mut _,
                    mask as *mut _,
                )
            }
            .into()
        };
        w.see("empty", look(1, w.time(0, 0)));
        w.see("bad counts", look(9, w.time(0, 0)));
        w.see("after a while", look(1, w.time(0, 1_000_000)));
        submit(context.0, 1, w.list(&[read(w)]));
        w.see("ready", look(1, w.time(0, 0)));
    });
}

static CALLED: std::sync::Mutex<Vec<(u64, u64, i64, i64)>> = std::sync::Mutex::new(Vec::new());

unsafe extern "C" fn called(context: lib::io_context_t, iocb: *mut lib::iocb, res: i64, res2: i64) {
    if let Ok(mut list) = CALLED.lock() {
        list.push((context as u64, iocb as u64, res, res2));
    }
}

fn queues(cases: &mut Cases) {
    for nr in [0, -1, i32::MIN, 1, 64] {
        cases.add(format!("libaio/io_queue_init of {nr}"), move |w| {
            let at = w.memory(8);
            store64(at, 99);
            // SAFETY: the place is there.
            let answer = unsafe { lib::io_queue_init(nr, at as *mut _) };
            w.see("io_queue_init", answer.into());
            w.say(format!("a context {}, unchanged {}", load64(at) != 0, load64(at) == 99));
            if answer == 0 {
                // SAFETY: a context.
                let answer = unsafe { lib::io_queue_release(load64(at) as *mut _) };
                w.rule("io_queue_release", answer.into(), 0);
            }
        });
    }
    cases.add("libaio/io_queue_run calls back", |w| {
        let context = w.context(8);
        let iocb = Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 16, 0);
        let iocb = iocb.data(called as *const () as u64);
        let list = w.list(&[w.place(&iocb), w.place(&iocb)]);
        w.rule("io_submit", submit(context.0, 2, list), 2);
        // SAFETY: `data` is a callback of the right kind.
        w.see("io_queue_run", unsafe { lib::io_queue_run(context.0 as *mut _) }.into());
        let list = CALLED.lock().map(|list| list.clone()).unwrap_or_default();
        for (of, iocb, res, res2) in list {
            let number = usize::from(iocb != w.iocb(0));
            w.say(format!("called: context {}, iocb {number}, {res}, {res2}", of == context.0));
        }
        // SAFETY: nothing is ready.
        w.see("again", unsafe { lib::io_queue_run(context.0 as *mut _) }.into());
        w.say(format!("head {} tail {}", context.head(), load32(context.0 + 12)));
    });
    cases.add("libaio/destroying and looking no more", |w| {
        let context: Context = w.context(8);
        w.rule("io_destroy", destroy(context.0), 0);
        w.rule("io_submit", submit(context.0, 0, ptr::null::<u8>() as u64), -i64::from(EINVAL));
    });
}
