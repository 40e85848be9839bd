//! io_submit(2): the batch, partial success, fields that count and fields that do not.

use libc::{EBADF, EFAULT, EINVAL};

use super::Cases;
use crate::{
    aio::{self, Iocb, KEY, op},
    sys::{self, PAGE, load32, store32},
    world::{KERNEL, NON_CANONICAL, World},
};

/// A read that completes inside io_submit.
fn read(w: &World) -> Iocb {
    Iocb::new(op::PREAD, w.open(libc::O_RDONLY), w.memory(64), 16, 0)
}

type Spoil = fn(&World, &mut Iocb);

/// Ways to make an iocb fail.
const SPOILT: [(&str, Spoil); 5] = [
    ("descriptor", |_, iocb| iocb.fildes = -1),
    ("opcode", |_, iocb| iocb.opcode = 6),
    ("reserved word", |_, iocb| iocb.reserved2 = 1),
    ("offset", |_, iocb| iocb.offset = -1),
    ("flags", |_, iocb| iocb.rw_flags = 1 << 31),
];

pub fn add(cases: &mut Cases) {
    batches(cases);
    fields(cases);
    opcodes(cases);
    event_counters(cases);
}

fn batches(cases: &mut Cases) {
    for (name, nr) in [("-1", -1), ("the smallest number", i64::MIN)] {
        cases.add(format!("submit/nr {name}"), move |w| {
            w.rule("io_submit", aio::submit(w.context(1).0, nr, 0), -i64::from(EINVAL));
        });
    }
    for (name, at) in [("NULL", 0), ("-1", u64::MAX), ("the kernel's", KERNEL)] {
        cases.add(format!("submit/nothing from {name}"), move |w| {
            w.rule("io_submit", aio::submit(w.context(1).0, 0, at), 0);
        });
        for nr in [1, 2, 1000, i64::MAX] {
            cases.add(format!("submit/{nr} from {name}"), move |w| {
                w.rule("io_submit", aio::submit(w.context(1).0, nr, at), -i64::from(EFAULT));
            });
        }
    }
    for (name, at) in [
        ("NULL", 0),
        ("-1", u64::MAX),
        ("the kernel's", KERNEL),
        ("not canonical", NON_CANONICAL),
        ("64 bytes below the end", 0x7fff_ffff_efc0),
    ] {
        cases.add(format!("submit/iocb at {name}"), move |w| {
            let answer = aio::submit(w.context(1).0, 1, w.list(&[at]));
            w.rule("io_submit", answer, -i64::from(EFAULT));
        });
        cases.add(format!("submit/second iocb at {name}"), move |w| {
            let context = w.context(4);
            let list = w.list(&[w.place(&read(w)), at]);
            w.rule("io_submit", aio::submit(context.0, 2, list), 1);
            w.reap(context, 1);
        });
    }
    cases.add("submit/the list ends in an unreadable page", |w| {
        let context = w.context(4);
        let list = w.memory(PAGE) + PAGE - 16;
        sys::store64(list, w.place(&read(w)));
        sys::store64(list + 8, w.place(&read(w)));
        w.rule("io_submit", aio::submit(context.0, 3, list), 2);
        w.reap(context, 2);
        w.rule("io_submit", aio::submit(context.0, 1, list + 16), -i64::from(EFAULT));
        w.rule("io_submit", aio::submit(context.0, 1, list + 12), -i64::from(EFAULT));
    });
    cases.add("submit/an iocb across the end of readable memory", |w| {
        let at = w.memory(PAGE) + PAGE - 48;
        w.rule("io_submit", aio::submit(w.context(1).0, 1, w.list(&[at])), -i64::from(EFAULT));
    });
    cases.add("submit/an iocb unaligned at the end of a page", |w| {
        let context = w.context(1);
        let at = w.memory(2 * PAGE) + PAGE - 13;
        read(w).store(at);
        w.name_iocb(at);
        w.rule("io_submit", aio::submit(context.0, 1, w.list(&[at])), 1);
        w.reap(context, 1);
    });
    cases.add("submit/the largest nr takes what the list has", |w| {
        let context = w.context(4);
        let list = w.memory(PAGE) + PAGE - 8;
        sys::store64(list, w.place(&read(w)));
        w.rule("io_submit", aio::submit(context.0, i64::MAX, list), 1);
        w.reap(context, 1);
    });
    for bad in 0..4_usize {
        for (name, spoil) in SPOILT {
            cases.add(format!("submit/bad {name} at {bad} of 4"), move |w| {
                let context = w.context(8);
                let mut iocbs: Vec<Iocb> =
                    (0..4).map(|data| Iocb { key: 77, ..read(w) }.data(data)).collect();
                spoil(w, &mut iocbs[bad]);
                let got = w.see("io_submit", w.submit(context, &iocbs));
                w.see("in the ring", context.ready().into());
                w.reap(context, got.max(0));
                (0..4).for_each(|number| w.see_key(number));
            });
        }
    }
    cases.add("submit/the same iocb fifty times", |w| {
        let context = w.context(64);
        let at = w.place(&read(w).data(5));
        w.rule("io_submit", aio::submit(context.0, 50, w.list(&[at; 50])), 50);
        w.see("in the ring", context.ready().into());
        w.reap(context, 50);
    });
    cases.add("submit/the iocb is free when io_submit returns", |w| {
        let context = w.context(4);
        let fd = w.open(libc::O_RDWR | libc::O_DIRECT);
        let buffer = w.memory(PAGE);
        let at = w.place(&Iocb::new(op::PREAD, fd, buffer, PAGE, 0).data(9));
        w.rule("io_submit", aio::submit(context.0, 1, w.list(&[at])), 1);
        sys::put_bytes(at, &[0xff; 64]);
        w.reap(context, 1);
        w.see_memory("read", buffer, PAGE);
    });
    cases.add("submit/the segments are free when io_submit returns", |w| {
        let context = w.context(4);
        let fd = w.open(libc::O_RDWR | libc::O_DIRECT);
        let buffer = w.memory(2 * PAGE);
        let vector = w.vector(&[(buffer, PAGE), (buffer + PAGE, PAGE)]);
        let answer = w.submit(context, &[Iocb::new(op::PREADV, fd, vector, 2, 0)]);
        sys::put_bytes(vector, &[0; 32]);
        w.rule("io_submit", answer, 1);
        w.reap(context, 1);
        w.see_memory("read", buffer, 2 * PAGE);
    });
    cases.add("submit/close after io_submit is harmless", |w| {
        let context = w.context(64);
        let fd = w.open(libc::O_RDWR | libc::O_DIRECT);
        let buffer = w.memory(8 * PAGE);
        let iocbs: Vec<Iocb> = (0..8)
            .map(|i| Iocb::new(op::PREAD, fd, buffer + i * PAGE, PAGE, (i * PAGE) as i64).data(i))
            .collect();
        w.rule("io_submit", w.submit(context, &iocbs), 8);
        w.see("close", sys::close(fd));
        w.reap_any_order(context, 8);
        w.see_memory("read", buffer, 8 * PAGE);
        w.see("io_submit", w.submit(context, &iocbs[..1]));
    });
    cases.add("submit/events come in the order of requests, across wraps", |w| {
        let context = w.context(8);
        let mut data = 0;
        for _ in 0..12 {
            let iocbs: Vec<Iocb> = (0..60).map(|i| read(w).data(data + i)).collect();
            data += 60;
            w.must("io_submit", w.submit(context, &iocbs));
            let (got, events) = w.take(context, 60);
            let in_order = events.windows(2).all(|pair| pair[0].data + 1 == pair[1].data);
            w.say(format!("{got} in order {in_order} tail {}", context.tail()));
            iocbs.iter().for_each(|iocb| {
                sys::close(iocb.fildes);
            });
        }
    });
}

fn fields(cases: &mut Cases) {
    for data in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef, KERNEL] {
        cases.add(format!("submit/data {data:#x} comes back"), move |w| {
            w.one_at_once(read(w).data(data));
        });
    }
    for bit in 1..32 {
        if bit == 1 {
            continue; // IOCB_FLAG_IOPRIO has cases of its own.
        }
        cases.add(format!("submit/aio_flags bit {bit} is ignored"), move |w| {
            w.one_at_once(Iocb { flags: 1 << bit, ..read(w) });
        });
    }
    cases.add("submit/a priority without its flag is ignored", |w| {
        w.one_at_once(Iocb { reqprio: 0xffff, ..read(w) });
    });
    cases.add("submit/an eventfd without its flag is ignored", |w| {
        w.one_at_once(Iocb { resfd: 12345, ..read(w) });
    });
    for key in [0, 1, 77, u32::MAX] {
        cases.add(format!("submit/key {key} is overwritten with 0"), move |w| {
            w.one_at_once(Iocb { key, ..read(w) });
            w.see_key(0);
        });
    }
    for (name, nbytes) in [
        ("0", 0),
        ("2^31", 1 << 31),
        ("2^31-4096", 0x7fff_f000),
        ("2^32+1", (1 << 32) + 1),
        ("2^62", 1 << 62),
        ("2^63-1", i64::MAX.cast_unsigned()),
        ("2^63", 1 << 63),
        ("-1", u64::MAX),
    ] {
        for (kind, opcode) in [("read", op::PREAD), ("write", op::PWRITE)] {
            cases.add(format!("submit/{kind} of {name} bytes"), move |w| {
                // Beyond the end there is nothing to read; a long write fails in its buffer.
                let fd = w.open(libc::O_RDWR);
                let (buffer, offset) = (w.filled(PAGE, 3), i64::from(opcode == op::PREAD) << 40);
                w.one(Iocb::new(opcode, fd, buffer, nbytes, offset));
                w.see_size(fd);
            });
        }
    }
    for bits in [1, 1 << 63, u64::MAX] {
        cases.add(format!("submit/reserved word {bits:#x}"), move |w| {
            let answer = w.one(Iocb { reserved2: bits, ..read(w) });
            w.rule("it", answer, -i64::from(EINVAL));
        });
    }
    cases.add("submit/a key that cannot be written", |w| {
        let context = w.context(1);
        let page = w.memory(PAGE);
        Iocb { key: 9, ..read(w) }.store(page);
        sys::protect(page, PAGE, libc::PROT_READ);
        let answer = aio::submit(context.0, 1, w.list(&[page]));
        w.rule("io_submit", answer, -i64::from(EFAULT));
        w.see("in the ring", context.ready().into());
    });
}

fn opcodes(cases: &mut Cases) {
    for opcode in (0..=16).chain([0x7fff, 0x8000, 0xffff]) {
        cases.add(format!("submit/opcode {opcode}"), move |w| {
            let iocb = Iocb { opcode, key: 5, nbytes: 0, buf: 0, ..read(w) };
            w.one(iocb);
            w.see_key(0);
        });
    }
}

fn event_counters(cases: &mut Cases) {
    cases.add("submit/an eventfd counts each completion", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_NONBLOCK));
        let iocbs: Vec<Iocb> = (0..7).map(|data| read(w).data(data).signalling(counter)).collect();
        w.rule("io_submit", w.submit(context, &iocbs), 7);
        w.see_counter(counter);
        w.see_counter(counter);
        w.reap(context, 7);
        w.see_counter(counter);
    });
    cases.add("submit/an eventfd counts late completions", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, 0));
        let (fd, buffer) = (w.open(libc::O_RDWR | libc::O_DIRECT), w.memory(PAGE));
        w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, PAGE, 0).signalling(counter)]);
        // Nobody reaps: it must count all the same.
        w.see_counter(counter);
        w.see("in the ring", context.ready().into());
        w.reap(context, 1);
    });
    cases.add("submit/an eventfd counts late completions one by one", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_SEMAPHORE));
        let (fd, buffer) = (w.open(libc::O_RDWR | libc::O_DIRECT), w.memory(8 * PAGE));
        let iocbs: Vec<Iocb> = (0..8)
            .map(|i| Iocb::new(op::PREAD, fd, buffer + i * PAGE, PAGE, (i * PAGE) as i64))
            .map(|iocb| iocb.signalling(counter))
            .collect();
        w.rule("io_submit", w.submit(context, &iocbs), 8);
        (0..8).for_each(|_| w.see_counter(counter));
        w.see("in the ring", context.ready().into());
    });
    cases.add("submit/a refused iocb signals nobody", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_NONBLOCK));
        let bad = Iocb { offset: -1, ..read(w) }.signalling(counter);
        w.rule("io_submit", w.submit(context, &[bad]), -i64::from(EINVAL));
        w.see_counter(counter);
    });
    cases.add("submit/a failed read signals", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_NONBLOCK));
        w.one_in(context, Iocb { buf: 0, ..read(w) }.signalling(counter));
        w.see_counter(counter);
    });
    cases.add("submit/a closed eventfd", |w| {
        let (iocb, counter) = (read(w), w.eventfd(0, libc::EFD_NONBLOCK));
        sys::close(counter);
        w.rule("it", w.one(iocb.signalling(counter)), -i64::from(EBADF));
    });
    cases.add("submit/an eventfd closed after io_submit", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, 0));
        let second = sys::call(libc::SYS_dup, &[sys::word(counter)]) as i32;
        let (fd, buffer) = (w.open(libc::O_RDWR | libc::O_DIRECT), w.memory(PAGE));
        w.submit(context, &[Iocb::new(op::PREAD, fd, buffer, PAGE, 0).signalling(counter)]);
        sys::close(counter);
        w.see_counter(second);
        w.reap(context, 1);
    });
    cases.add("submit/an eventfd that is none", |w| {
        let fd = w.open(libc::O_RDONLY);
        w.rule("the file", w.one(read(w).signalling(fd)), -i64::from(EINVAL));
        let (pipe, _) = w.pipe(0);
        w.rule("a pipe", w.one(read(w).signalling(pipe)), -i64::from(EINVAL));
        w.rule("nothing", w.one(read(w).signalling(-1)), -i64::from(EBADF));
    });
    cases.add("submit/an eventfd at its limit", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_NONBLOCK));
        let at = w.memory(8);
        sys::store64(at, u64::MAX - 1);
        w.see("write", sys::call(libc::SYS_write, &[sys::word(counter), at, 8]));
        w.one_in(context, read(w).signalling(counter));
        w.see_counter(counter);
    });
    cases.add("submit/a request on the eventfd it signals", |w| {
        let (context, counter) = (w.context(16), w.eventfd(0, libc::EFD_NONBLOCK));
        let buffer = w.memory(8);
        w.one_in(context, Iocb::new(op::PREAD, counter, buffer, 8, 0).signalling(counter));
        w.see_counter(counter);
        store32(buffer, 0);
        w.say(format!("key stays {}", load32(w.iocb(0) + KEY)));
    });
}
