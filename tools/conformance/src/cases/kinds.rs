//! Every kind of descriptor with every operation.

use libc::{O_CLOEXEC, O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY};

use super::Cases;
use crate::{
    aio::{Context, Iocb, op, rwf},
    sys,
    world::{World, until_asleep, until_asleep_in_call},
};

type Open = fn(&World) -> i32;

/// A descriptor of one kind, ready or not as its name says. None blocks.
const KINDS: [(&str, Open); 34] = [
    ("directory", |w| sys::open(&w.scratch(""), O_RDONLY)),
    ("directory, O_PATH", |w| sys::open(&w.scratch(""), libc::O_PATH)),
    ("pipe with data", |w| {
        let (reader, writer) = w.pipe(O_NONBLOCK);
        w.write(writer, "some data");
        reader
    }),
    ("pipe without data", |w| w.pipe(O_NONBLOCK).0),
    ("pipe without writer", |w| {
        let (reader, writer) = w.pipe(O_NONBLOCK);
        sys::close(writer);
        reader
    }),
    ("pipe, writing end", |w| w.pipe(O_NONBLOCK).1),
    ("pipe, full", |w| {
        let (_, writer) = w.pipe(O_NONBLOCK);
        let chunk = "x".repeat(4096);
        while w.write(writer, &chunk) > 0 {}
        writer
    }),
    ("pipe without reader", |w| {
        sys::ignore_signal(libc::SIGPIPE);
        let (reader, writer) = w.pipe(O_NONBLOCK);
        sys::close(reader);
        writer
    }),
    ("packet pipe", |w| {
        let (reader, writer) = w.pipe(O_NONBLOCK | libc::O_DIRECT);
        w.write(writer, "a packet");
        reader
    }),
    ("stream socket with data", |w| {
        let (here, there) = w.sockets(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
        w.write(there, "some data");
        here
    }),
    ("stream socket without data", |w| w.sockets(libc::SOCK_STREAM | libc::SOCK_NONBLOCK).0),
    ("stream socket whose peer is gone", |w| {
        sys::ignore_signal(libc::SIGPIPE);
        let (here, there) = w.sockets(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
        sys::close(there);
        here
    }),
    ("datagram socket with data", |w| {
        let (here, there) = w.sockets(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK);
        w.write(there, "a datagram");
        here
    }),
    ("socket without connection", |_| socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("UDP socket", |_| socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("eventfd of 0", |w| w.eventfd(0, libc::EFD_NONBLOCK)),
    ("eventfd of 3", |w| w.eventfd(3, libc::EFD_NONBLOCK)),
    ("semaphore eventfd of 3", |w| w.eventfd(3, libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE)),
    ("epoll", |_| number(sys::call(libc::SYS_epoll_create1, &[0]))),
    ("timerfd", |_| {
        let flags = libc::TFD_NONBLOCK;
        number(sys::call(libc::SYS_timerfd_create, &[1, sys::word(flags)]))
    }),
    ("signalfd", |w| {
        let mask = w.memory(8);
        sys::store64(mask, sys::signal_bit(libc::SIGUSR2));
        let arguments = [u64::MAX, mask, 8, sys::word(O_NONBLOCK)];
        number(sys::call(libc::SYS_signalfd4, &arguments))
    }),
    ("inotify", |_| number(sys::call(libc::SYS_inotify_init1, &[sys::word(O_NONBLOCK)]))),
    ("pidfd", |_| number(sys::call(libc::SYS_pidfd_open, &[sys::word(sys::process()), 0]))),
    ("/dev/null", |_| sys::open(c"/dev/null", O_RDWR)),
    ("/dev/zero", |_| sys::open(c"/dev/zero", O_RDWR)),
    ("/dev/full", |_| sys::open(c"/dev/full", O_RDWR)),
    ("/dev/null, read-only", |_| sys::open(c"/dev/null", O_RDONLY)),
    ("/proc/sys/fs/nr_open", |_| sys::open(c"/proc/sys/fs/nr_open", O_RDONLY)),
    ("/proc/version", |_| sys::open(c"/proc/version", O_RDONLY)),
    ("/sys/kernel/mm", |_| sys::open(c"/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY)),
    ("memfd", |w| {
        let fd = number(sys::call(libc::SYS_memfd_create, &[c"x".as_ptr() as u64, 0]));
        w.write(fd, "data in memory");
        fd
    }),
    ("fifo", |w| {
        let fd = sys::open(&fifo(w), O_RDWR | O_NONBLOCK);
        w.write(fd, "through the fifo");
        fd
    }),
    ("ordinary file", |w| {
        let fd = sys::open(&w.scratch("ordinary"), O_RDWR | libc::O_CREAT | libc::O_TRUNC);
        w.write(fd, "ordinary data");
        fd
    }),
    ("ordinary file, appending", |w| {
        let flags = O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND;
        let fd = sys::open(&w.scratch("appended"), flags);
        w.write(fd, "ordinary data");
        fd
    }),
];

fn number(answer: i64) -> i32 {
    i32::try_from(answer).unwrap_or(-1)
}

fn socket(family: i32, kind: i32) -> i32 {
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    number(sys::call(libc::SYS_socket, &[sys::word(family), sys::word(kind), 0]))
}

fn fifo(w: &World) -> std::ffi::CString {
    let path = w.scratch("fifo");
    // SAFETY: the path ends in a zero byte.
    unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
    path
}

pub fn add(cases: &mut Cases) {
    for (kind, open) in KINDS {
        for (operation, opcode) in [("read", op::PREAD), ("write", op::PWRITE)] {
            for (place, offset) in [("0", 0), ("8", 8), ("-1", -1)] {
                cases.add(format!("kinds/{kind}: {operation} at {place}"), move |w| {
                    let fd = open(w);
                    let buffer = w.filled(64, b'b');
                    w.one(Iocb::new(opcode, fd, buffer, 8, offset));
                    if operation == "read" && !kind.starts_with('/') {
                        w.see_memory("memory", buffer, 64);
                    }
                });
            }
            cases.add(format!("kinds/{kind}: {operation} without waiting"), move |w| {
                let fd = open(w);
                w.one(Iocb::new(opcode, fd, w.filled(64, b'b'), 8, 0).rw(rwf::NOWAIT));
            });
            cases.add(format!("kinds/{kind}: {operation} of missing memory"), move |w| {
                w.one(Iocb::new(opcode, open(w), 0x10000, 8, 0));
            });
        }
        for (operation, opcode) in [("readv", op::PREADV), ("writev", op::PWRITEV)] {
            cases.add(format!("kinds/{kind}: {operation}"), move |w| {
                let (fd, buffer) = (open(w), w.filled(64, b'b'));
                let vector = w.vector(&[(buffer, 4), (buffer + 8, 4)]);
                w.one(Iocb::new(opcode, fd, vector, 2, 0));
            });
        }
        for (operation, opcode) in [("fsync", op::FSYNC), ("fdsync", op::FDSYNC)] {
            cases.add(format!("kinds/{kind}: {operation}"), move |w| {
                w.one(Iocb::new(opcode, open(w), 0, 0, 0));
            });
        }
        for (name, events) in [("in", libc::POLLIN), ("out", libc::POLLOUT)] {
            cases.add(format!("kinds/{kind}: poll {name}"), move |w| {
                let (context, fd) = (w.context(4), open(w));
                w.see("io_submit", w.submit(context, &[Iocb::poll(fd, events)]));
                let at = w.memory(32);
                let got = crate::aio::get(context.0, 0, 1, at, w.time(0, 0));
                w.see("io_getevents", got);
                if got == 1 {
                    w.say(w.event(&crate::aio::Event::load(at)));
                }
            });
        }
    }
    mixed(cases);
    pipes(cases);
}

fn mixed(cases: &mut Cases) {
    cases.add("kinds/the file and others in one batch", |w| {
        let context = w.context(16);
        let (reader, writer) = w.pipe(O_CLOEXEC);
        w.write(writer, "0123456789");
        let (file, buffer) = (w.open(O_RDWR), w.filled(4096, b'f'));
        let counter = w.eventfd(0, libc::EFD_NONBLOCK);
        let iocbs = [
            Iocb::new(op::PWRITE, file, buffer, 16, 0).data(1).signalling(counter),
            Iocb::new(op::PREAD, reader, buffer + 64, 4, 0).data(2).signalling(counter),
            Iocb::new(op::PREAD, file, buffer + 128, 16, 8).data(3).signalling(counter),
            Iocb::new(op::PREAD, reader, buffer + 192, 6, 0).data(4).signalling(counter),
            Iocb::new(op::PWRITE, writer, buffer, 5, 0).data(5).signalling(counter),
        ];
        w.see("io_submit", w.submit(context, &iocbs));
        w.see_counter(counter);
        w.see("in the ring", context.ready().into());
        w.reap(context, 5);
        w.see_memory("memory", buffer, 4096);
    });
    for bad in [0_usize, 1, 3] {
        cases.add(format!("kinds/a bad one at {bad} among files and pipes"), move |w| {
            let context = w.context(16);
            let (reader, writer) = w.pipe(O_NONBLOCK);
            w.write(writer, "0123456789");
            let (file, buffer) = (w.open(O_RDWR), w.filled(4096, b'f'));
            let mut iocbs: Vec<Iocb> = (0..5)
                .map(|i| if i % 2 == 0 { file } else { reader })
                .map(|fd| Iocb { key: 7, ..Iocb::new(op::PREAD, fd, buffer, 2, 0) })
                .collect();
            iocbs[bad].opcode = 6;
            let got = w.see("io_submit", w.submit(context, &iocbs));
            w.reap(context, got.max(0));
            (0..5).for_each(|number| w.see_key(number));
        });
    }
    cases.add("kinds/the same context after many kinds", |w| {
        let context = w.context(16);
        for (_, open) in KINDS {
            let fd = open(w);
            w.one_in(context, Iocb::new(op::PREAD, fd, w.memory(64), 4, 0));
            sys::close(fd);
        }
        w.one_in(context, Iocb::new(op::PREAD, w.open(O_RDONLY), w.memory(64), 4, 0));
    });
}

fn pipes(cases: &mut Cases) {
    for (how, prepare) in [
        ("deadly", (|| ()) as fn()),
        ("ignored", || sys::ignore_signal(libc::SIGPIPE)),
        ("handled", || sys::count_signal(libc::SIGPIPE, 0)),
        ("blocked", || sys::mask_signal(libc::SIG_BLOCK, libc::SIGPIPE)),
    ] {
        for (flags_name, flags) in [("", 0), (" with NOSIGNAL", rwf::NOSIGNAL)] {
            cases.add(format!("kinds/broken pipe, SIGPIPE {how}{flags_name}"), move |w| {
                let (reader, writer) = w.pipe(0);
                sys::close(reader);
                prepare();
                let buffer = w.filled(64, 1);
                w.one(Iocb::new(op::PWRITE, writer, buffer, 8, 0).rw(flags));
                w.say(format!("signals {}", sys::signals()));
                let pending = w.memory(8);
                sys::call(libc::SYS_rt_sigpending, &[pending, 8]);
                w.say(format!("pending {:#x}", sys::load64(pending)));
            });
        }
    }
    for (name, flags) in [("", 0), (" although SA_RESTART", libc::SA_RESTART)] {
        cases.add(format!("kinds/a signal ends a read of an empty pipe{name}"), move |w| {
            sys::count_signal(libc::SIGUSR1, flags);
            let (context, (reader, _writer)) = (w.context(4), w.pipe(0));
            let me = sys::thread();
            let sender = std::thread::spawn(move || {
                until_asleep_in_call(me, libc::SYS_io_submit);
                sys::signal_thread(me, libc::SIGUSR1);
            });
            w.one_in(context, Iocb::new(op::PREAD, reader, w.memory(64), 8, 0));
            w.say(format!("signals {}", sys::signals()));
            let _ = sender.join();
        });
    }
    interrupted(cases);
    cases.add("kinds/a read of an empty pipe blocks io_submit until there is data", |w| {
        let (context, (reader, writer)) = (w.context(4), w.pipe(0));
        let me = sys::thread();
        let sender = std::thread::spawn(move || {
            until_asleep(me);
            let text = *b"late";
            sys::call(libc::SYS_write, &[sys::word(writer), text.as_ptr() as u64, 4])
        });
        w.one_at_once_in(context, Iocb::new(op::PREAD, reader, w.memory(64), 8, 0));
        let _ = sender.join();
    });
    cases.add("kinds/another thread uses the context while one is blocked in io_submit", |w| {
        let (context, (reader, writer)) = (w.context(8), w.pipe(0));
        let (file, buffer) = (w.open(O_RDONLY), w.memory(4096));
        let iocb = w.place(&Iocb::new(op::PREAD, reader, buffer, 8, 0).data(1));
        let list = w.list(&[iocb]);
        let number = w.shared_word();
        let blocked = std::thread::spawn(move || {
            sys::store32(number, sys::thread().cast_unsigned());
            crate::aio::submit(context.0, 1, list)
        });
        while sys::load32(number) == 0 {
            sys::give_way();
        }
        until_asleep(sys::load32(number).cast_signed());
        w.one_in(context, Iocb::new(op::PREAD, file, buffer + 64, 8, 0).data(2));
        w.write(writer, "now");
        w.see("blocked io_submit", blocked.join().unwrap_or(-1));
        w.reap(context, 1);
    });
}

/// io_submit of requests of which one blocks: then a signal comes.
fn submit_and_be_signalled(w: &World, context: Context, iocbs: &[Iocb]) {
    let me = sys::thread();
    let sender = std::thread::spawn(move || {
        until_asleep_in_call(me, libc::SYS_io_submit);
        sys::signal_thread(me, libc::SIGUSR1);
    });
    w.see("io_submit", w.submit(context, iocbs));
    w.say(format!("signals {}", sys::signals()));
    w.see("in the ring", context.ready().into());
    w.reap(context, iocbs.len() as i64);
    let _ = sender.join();
}

/// A request that blocks io_submit on a descriptor that is not the file's.
fn interrupted(cases: &mut Cases) {
    type Make = fn(&World) -> Iocb;
    let blocking: [(&str, Make); 4] = [
        ("a read of an empty pipe", |w| Iocb::new(op::PREAD, w.pipe(0).0, w.memory(64), 8, 0)),
        ("a write to a full pipe", |w| {
            let (_, writer) = w.pipe(0);
            // SAFETY: plain numbers.
            let bytes = unsafe { libc::fcntl(writer, libc::F_GETPIPE_SZ) }.unsigned_abs().into();
            let area = w.filled(bytes, 1);
            w.see("fill", sys::call(libc::SYS_write, &[sys::word(writer), area, bytes]));
            Iocb::new(op::PWRITE, writer, area, 8, 0)
        }),
        ("a read of a silent socket", |w| {
            Iocb::new(op::PREAD, w.sockets(libc::SOCK_STREAM).0, w.memory(64), 8, 0)
        }),
        ("a read of an eventfd at 0", |w| {
            Iocb::new(op::PREAD, w.eventfd(0, 0), w.memory(64), 8, 0)
        }),
    ];
    for (name, make) in blocking {
        for (how, flags) in [("", 0), (", SA_RESTART", libc::SA_RESTART)] {
            cases.add(format!("kinds/a signal ends {name} between reads{how}"), move |w| {
                sys::count_signal(libc::SIGUSR1, flags);
                let (context, file) = (w.context(8), w.open(O_RDONLY));
                let read = |data| Iocb::new(op::PREAD, file, w.memory(64), 8, 0).data(data);
                let iocbs = [read(1), make(w).data(2), read(3)];
                submit_and_be_signalled(w, context, &iocbs);
            });
        }
    }
    for (how, flags) in [("", 0), (", SA_RESTART", libc::SA_RESTART)] {
        cases.add(
            format!("kinds/a signal ends all that would block after it too{how}"),
            move |w| {
                sys::count_signal(libc::SIGUSR1, flags);
                let (context, file, buffer) = (w.context(16), w.open(O_RDONLY), w.memory(64));
                let read = |fd, data| Iocb::new(op::PREAD, fd, buffer, 8, 0).data(data);
                let (full, ready) = (blocking[1].1(w), w.pipe(0));
                w.write(ready.1, "there");
                let iocbs = [
                    read(w.pipe(0).0, 1),
                    read(file, 2),
                    read(ready.0, 3),
                    full.data(4),
                    read(w.pipe(libc::O_NONBLOCK).0, 5),
                    read(w.pipe(0).0, 6).rw(rwf::NOWAIT),
                    read(w.sockets(libc::SOCK_STREAM).0, 7),
                    blocking[3].1(w).data(8),
                    read(ready.0, 9),
                    read(file, 10),
                ];
                submit_and_be_signalled(w, context, &iocbs);
            },
        );
    }
    cases.add("kinds/a signal before io_submit does not end what it reads", |w| {
        sys::count_signal(libc::SIGUSR1, 0);
        let (context, (reader, writer)) = (w.context(8), w.pipe(0));
        w.write(writer, "there");
        let me = sys::thread();
        sys::mask_signal(libc::SIG_BLOCK, libc::SIGUSR1);
        sys::signal_thread(me, libc::SIGUSR1);
        w.one_at_once_in(context, Iocb::new(op::PREAD, reader, w.memory(64), 8, 0));
        sys::mask_signal(libc::SIG_UNBLOCK, libc::SIGUSR1);
        w.say(format!("signals {}", sys::signals()));
    });
}
