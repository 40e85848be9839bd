//! Reads and writes of the file: lengths, offsets, alignment, memory, vectors, flags, modes.

use libc::{O_APPEND, O_DIRECT, O_DSYNC, O_RDONLY, O_RDWR, O_SYNC, O_WRONLY, PROT_READ};

use super::Cases;
use crate::{
    aio::{Iocb, op, rwf},
    sys,
    world::{DATA, KERNEL, SIZE, World},
};

/// One request: buffer offset in a page, length, file offset.
struct Shape {
    name: &'static str,
    shift: u64,
    len: u64,
    offset: u64,
}

const fn shape(name: &'static str, shift: u64, len: u64, offset: u64) -> Shape {
    Shape { name, shift, len, offset }
}

const SHAPES: [Shape; 22] = [
    shape("data", 0, 4096, 4096),
    shape("several blocks", 0, 16384, 8192),
    shape("a sector", 0, 512, 512),
    shape("half a block across a block", 0, 4096, 2048),
    shape("a hole", 0, 4096, 64 << 10),
    shape("the edge of data and hole", 0, 8192, DATA - 4096),
    shape("up to the end", 0, 4096, SIZE - 4096),
    shape("across the end", 0, 8192, SIZE - 4096),
    shape("at the end", 0, 4096, SIZE),
    shape("behind the end", 0, 4096, SIZE + 65536),
    shape("nothing", 0, 0, 0),
    shape("nothing at an odd place", 0, 0, 3),
    shape("nothing to an odd place", 3, 0, 0),
    shape("nothing behind the end", 0, 0, SIZE + 4096),
    shape("an odd length", 0, 4095, 4096),
    shape("an odd offset", 0, 4096, 4097),
    shape("an odd buffer", 1, 4096, 4096),
    shape("a buffer at a sector", 512, 4096, 4096),
    shape("a buffer at 4 bytes", 4, 4096, 4096),
    shape("all odd", 1, 777, 333),
    shape("one byte", 0, 1, 0),
    shape("256 bytes", 0, 256, 256),
];

/// Makes a place for data: its address.
type MakePlace = fn(&World) -> u64;

/// The four data operations; for vectors the buffer is split in two.
const OPS: [(&str, u16); 4] =
    [("read", op::PREAD), ("write", op::PWRITE), ("readv", op::PREADV), ("writev", op::PWRITEV)];
const MODES: [(&str, i32); 2] = [("cached", 0), ("direct", O_DIRECT)];

const fn is_read(opcode: u16) -> bool {
    matches!(opcode, op::PREAD | op::PREADV)
}

/// A request for plain memory, as a vector of two if the opcode wants one.
fn request(w: &World, opcode: u16, fd: i32, at: u64, len: u64, offset: u64) -> Iocb {
    let offset = offset.cast_signed();
    match opcode {
        op::PREADV | op::PWRITEV => {
            let half = len / 2 / 512 * 512;
            let vector = w.vector(&[(at, half), (at.wrapping_add(half), len - half)]);
            Iocb::new(opcode, fd, vector, 2, offset)
        }
        _ => Iocb::new(opcode, fd, at, len, offset),
    }
}

pub fn add(cases: &mut Cases) {
    for (kind, opcode) in OPS {
        for (mode, flags) in MODES {
            for shape in SHAPES {
                cases.add(format!("rw/{mode} {kind} {}", shape.name), move |w| {
                    transfer(w, opcode, flags, &shape);
                });
            }
        }
    }
    at_once(cases);
    memory(cases);
    offsets(cases);
    vectors(cases);
    flags(cases);
    modes(cases);
    limits(cases);
}

fn transfer(w: &World, opcode: u16, flags: i32, shape: &Shape) {
    let fd = w.open(O_RDWR | flags);
    let area = w.filled(shape.len + 4096, 0xa5);
    let at = area + shape.shift;
    w.one(request(w, opcode, fd, at, shape.len, shape.offset));
    // What lies behind the bytes that were read is nobody's promise.
    let promised = shape.len.min(SIZE.saturating_sub(shape.offset));
    w.see_memory("memory", area, shape.shift + promised);
    w.see_file();
}

/// What has completed when io_submit returns.
fn at_once(cases: &mut Cases) {
    let cases_at_once: [(&str, u16, i32, u64); 10] = [
        ("cached read", op::PREAD, 0, 0),
        ("cached read of a hole", op::PREAD, 0, 64 << 10),
        ("cached write", op::PWRITE, 0, 0),
        ("cached write into a hole", op::PWRITE, 0, 64 << 10),
        ("cached write at the end", op::PWRITE, 0, SIZE),
        ("cached readv", op::PREADV, 0, 0),
        ("direct read of a hole", op::PREAD, O_DIRECT, 64 << 10),
        ("direct read at the end", op::PREAD, O_DIRECT, SIZE),
        ("direct write at the end", op::PWRITE, O_DIRECT, SIZE),
        ("direct write behind the end", op::PWRITE, O_DIRECT, SIZE + 65536),
    ];
    for (name, opcode, flags, offset) in cases_at_once {
        cases.add(format!("rw/{name} is complete when io_submit returns"), move |w| {
            let fd = w.open(O_RDWR | flags);
            let area = w.filled(8192, 1);
            w.one_at_once(request(w, opcode, fd, area, 4096, offset));
            w.see_size(fd);
        });
    }
    cases.add("rw/the size has grown when the event is there", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        let (context, area) = (w.context(8), w.filled(4096, 7));
        for i in 0..8 {
            w.submit(context, &[request(w, op::PWRITE, fd, area, 4096, SIZE + i * 4096)]);
            w.reap(context, 1);
            w.see_size(fd);
        }
    });
    cases.add("rw/what was written is read by the next request", |w| {
        let (cached, direct) = (w.open(O_RDWR), w.open(O_RDWR | O_DIRECT));
        let context = w.context(8);
        for (round, (to, from)) in
            [(cached, direct), (direct, cached), (cached, cached), (direct, direct)]
                .into_iter()
                .enumerate()
        {
            let (out, back) = (w.filled(4096, 0x40 + round as u8), w.memory(4096));
            w.one_in(context, Iocb::new(op::PWRITE, to, out, 4096, 12288));
            w.one_in(context, Iocb::new(op::PREAD, from, back, 4096, 12288));
            w.see_memory("back", back, 4096);
        }
    });
    cases.add("rw/the position is neither used nor moved", |w| {
        let fd = w.open(O_RDWR);
        sys::lseek(fd, 777, libc::SEEK_SET);
        w.one(Iocb::new(op::PREAD, fd, w.memory(64), 32, 64));
        w.see("position", sys::lseek(fd, 0, libc::SEEK_CUR));
        w.one(Iocb::new(op::PWRITE, fd, w.memory(64), 32, 64));
        w.see("position", sys::lseek(fd, 0, libc::SEEK_CUR));
    });
}

/// Memory that is not there, or half there.
fn memory(cases: &mut Cases) {
    let places: [(&str, MakePlace); 8] = [
        ("NULL", |_| 0),
        ("unmapped", |_| 0x10000),
        ("the kernel's", |_| KERNEL),
        ("-1", |_| u64::MAX),
        ("just below the kernel", |_| 0x7fff_ffff_e000),
        ("read-only", |w| {
            let at = w.filled(8192, 9);
            sys::protect(at, 8192, PROT_READ);
            at
        }),
        ("half there", |w| w.filled(4096, 9)),
        ("the second half of a page there", |w| w.filled(4096, 9) + 2048),
    ];
    for (name, make) in places {
        for (kind, opcode) in OPS {
            for (mode, flags) in MODES {
                cases.add(format!("rw/{mode} {kind}, memory {name}"), move |w| {
                    let fd = w.open(O_RDWR | flags);
                    let at = make(w);
                    w.one(request(w, opcode, fd, at, 8192, 4096));
                    w.see_file();
                });
            }
        }
    }
    for (mode, flags) in MODES {
        cases.add(format!("rw/{mode} read of a hole into missing memory"), move |w| {
            w.one(Iocb::new(op::PREAD, w.open(O_RDWR | flags), 0x10000, 4096, 64 << 10));
        });
        cases.add(format!("rw/{mode} read at the end into missing memory"), move |w| {
            w.one(Iocb::new(op::PREAD, w.open(O_RDWR | flags), 0x10000, 4096, SIZE as i64));
        });
        cases.add(format!("rw/{mode} of no bytes from missing memory"), move |w| {
            let fd = w.open(O_RDWR | flags);
            w.one(Iocb::new(op::PREAD, fd, 0x10000, 0, 0));
            w.one(Iocb::new(op::PWRITE, fd, 0x10000, 0, 0));
        });
    }
}

fn offsets(cases: &mut Cases) {
    let offsets: [(&str, i64); 8] = [
        ("-1", -1),
        ("-4096", -4096),
        ("the smallest", i64::MIN),
        ("the largest", i64::MAX),
        ("the largest that fits", i64::MAX - 4096),
        ("one more than fits", i64::MAX - 4095),
        ("2^44 - 4096", (1 << 44) - 4096),
        ("2^44", 1 << 44),
    ];
    for (name, offset) in offsets {
        for (kind, opcode) in OPS {
            for (mode, flags) in MODES {
                cases.add(format!("rw/{mode} {kind} at {name}"), move |w| {
                    let fd = w.open(O_RDWR | flags);
                    let area = w.filled(8192, 1);
                    w.one(request(w, opcode, fd, area, 4096, offset.cast_unsigned()));
                    w.see_size(fd);
                });
            }
        }
    }
    for (name, offset) in [("-1", -1), ("the largest", i64::MAX)] {
        cases.add(format!("rw/no bytes at {name}"), move |w| {
            let fd = w.open(O_RDWR);
            w.one(Iocb::new(op::PREAD, fd, w.memory(64), 0, offset));
            w.one(Iocb::new(op::PWRITE, fd, w.memory(64), 0, offset));
        });
    }
}

fn vectors(cases: &mut Cases) {
    type Make = fn(&World) -> (u64, u64);
    let vectors: [(&str, Make); 18] = [
        ("none", |_| (0, 0)),
        ("none at a bad place", |_| (u64::MAX, 0)),
        ("2^32", |_| (8, 1 << 32)),
        ("2^32+1", |w| (w.vector(&[(w.filled(4096, 2), 4096)]), (1 << 32) + 1)),
        ("one", |w| (w.vector(&[(w.filled(4096, 2), 4096)]), 1)),
        ("one, empty", |w| (w.vector(&[(w.filled(4096, 2), 0)]), 1)),
        ("empty ones around data", |w| {
            let at = w.filled(4096, 2);
            (w.vector(&[(0, 0), (at, 512), (at, 0), (at + 512, 512), (0, 0)]), 5)
        }),
        ("1024", |w| (w.vector(&[(w.filled(4096, 2), 512); 1024]), 1024)),
        ("1025", |w| (w.vector(&[(w.filled(4096, 2), 512); 1025]), 1025)),
        ("-1", |w| (w.vector(&[(w.filled(4096, 2), 512); 2]), u64::MAX >> 1)),
        ("array half there", |w| {
            let at = w.memory(4096) + 4096 - 16;
            sys::store64(at, w.filled(4096, 2));
            sys::store64(at + 8, 512);
            (at, 2)
        }),
        ("a length below 0", |w| (w.vector(&[(w.filled(4096, 2), 512), (0, 1 << 63)]), 2)),
        ("a base of the kernel's", |w| (w.vector(&[(w.filled(4096, 2), 512), (KERNEL, 512)]), 2)),
        ("an empty one of the kernel's", |w| {
            (w.vector(&[(w.filled(4096, 2), 512), (KERNEL, 0)]), 2)
        }),
        ("the second missing", |w| (w.vector(&[(w.filled(4096, 2), 512), (0, 512)]), 2)),
        ("the first missing", |w| (w.vector(&[(0, 512), (w.filled(4096, 2), 512)]), 2)),
        ("odd parts of an even sum", |w| {
            let at = w.filled(4096, 2);
            (w.vector(&[(at, 100), (at + 100, 412)]), 2)
        }),
        ("overlapping", |w| {
            let at = w.filled(4096, 2);
            (w.vector(&[(at, 1024), (at + 512, 1024), (at, 512)]), 3)
        }),
    ];
    for (name, make) in vectors {
        for (kind, opcode) in [("readv", op::PREADV), ("writev", op::PWRITEV)] {
            for (mode, flags) in MODES {
                cases.add(format!("rw/{mode} {kind}, segments: {name}"), move |w| {
                    let fd = w.open(O_RDWR | flags);
                    let (vector, count) = make(w);
                    w.one(Iocb::new(opcode, fd, vector, count, 4096));
                    w.see_file();
                });
            }
        }
    }
    cases.add("rw/segments of more than 2 GiB are cut", |w| {
        let fd = w.open(O_RDWR);
        let at = w.memory(4096);
        // At the end of the file: nothing is moved, whatever the length.
        let vector = w.vector(&[(at, 0x7fff_f000), (at, 0x7fff_f000)]);
        w.one(Iocb::new(op::PREADV, fd, vector, 2, SIZE as i64));
    });
}

fn flags(cases: &mut Cases) {
    for bit in 0..12 {
        for (kind, opcode) in OPS {
            for (mode, flags) in MODES {
                // Whether NOWAIT finds what it needs at hand is the machine's luck, but for
                // cached writes.
                if 1 << bit == rwf::NOWAIT && (is_read(opcode) || flags != 0) {
                    continue;
                }
                cases.add(format!("rw/{mode} {kind} with RWF bit {bit}"), move |w| {
                    let fd = w.open(O_RDWR | flags);
                    let area = w.filled(4096, 0x77);
                    w.one(request(w, opcode, fd, area, 4096, 4096).rw(1 << bit));
                    w.see_file();
                });
            }
        }
    }
    for bit in [12, 20, 31] {
        cases.add(format!("rw/unknown RWF bit {bit}"), move |w| {
            let fd = w.open(O_RDWR);
            for (_, opcode) in OPS {
                let iocb = request(w, opcode, fd, w.filled(4096, 1), 4096, 0).rw(1 << bit);
                w.rule("it", w.one(iocb), -i64::from(libc::EOPNOTSUPP));
            }
        });
    }
    let mixes = [
        ("APPEND and NOAPPEND", rwf::APPEND | rwf::NOAPPEND),
        ("DSYNC and SYNC", rwf::DSYNC | rwf::SYNC),
        ("APPEND and DSYNC", rwf::APPEND | rwf::DSYNC),
        ("NOAPPEND and NOSIGNAL", rwf::NOAPPEND | rwf::NOSIGNAL),
        ("unknown, APPEND and NOAPPEND", 1 << 31 | rwf::APPEND | rwf::NOAPPEND),
    ];
    for (name, bits) in mixes {
        for (mode, flags) in [("", 0), ("direct ", O_DIRECT), ("appending ", O_APPEND)] {
            cases.add(format!("rw/{mode}write with {name}"), move |w| {
                let fd = w.open(O_RDWR | flags);
                let area = w.filled(4096, 0x33);
                w.one(Iocb::new(op::PWRITE, fd, area, 4096, 8192).rw(bits));
                w.see_file();
            });
        }
    }
}

fn modes(cases: &mut Cases) {
    let opened: [(&str, i32); 12] = [
        ("O_RDONLY", O_RDONLY),
        ("O_WRONLY", O_WRONLY),
        ("O_RDONLY|O_DIRECT", O_RDONLY | O_DIRECT),
        ("O_WRONLY|O_DIRECT", O_WRONLY | O_DIRECT),
        ("O_PATH", libc::O_PATH),
        ("O_APPEND", O_RDWR | O_APPEND),
        ("O_APPEND|O_DIRECT", O_RDWR | O_APPEND | O_DIRECT),
        ("O_SYNC", O_RDWR | O_SYNC),
        ("O_DSYNC|O_DIRECT", O_RDWR | O_DSYNC | O_DIRECT),
        ("O_NONBLOCK", O_RDWR | libc::O_NONBLOCK),
        ("O_NOATIME", O_RDWR | libc::O_NOATIME),
        ("mode 3", 3),
    ];
    for (name, flags) in opened {
        for (kind, opcode) in OPS {
            cases.add(format!("rw/{kind} of a file opened {name}"), move |w| {
                let fd = w.open(flags);
                let area = w.filled(4096, 0x11);
                w.one(request(w, opcode, fd, area, 4096, 4096));
                w.see_file();
            });
        }
    }
    for (name, first, second) in
        [("on", O_RDWR, O_RDWR | O_APPEND), ("off", O_RDWR | O_APPEND, O_RDWR)]
    {
        cases.add(format!("rw/O_APPEND turned {name} by fcntl"), move |w| {
            let fd = w.open(first);
            w.see("fcntl", set_flags(fd, second));
            w.one(Iocb::new(op::PWRITE, fd, w.filled(512, 8), 512, 0));
            w.see_file();
        });
    }
    cases.add("rw/O_DIRECT turned on by fcntl", |w| {
        let fd = w.open(O_RDWR);
        w.one(Iocb::new(op::PREAD, fd, w.memory(4096) + 1, 100, 1));
        w.see("fcntl", set_flags(fd, O_RDWR | O_DIRECT));
        w.one(Iocb::new(op::PREAD, fd, w.memory(4096) + 1, 100, 1));
    });
    cases.add("rw/descriptors that are none", |w| {
        let context = w.context(4);
        for fd in [-1, i32::MIN, i32::MAX, 1 << 20, 999] {
            let answer = w.one_in(context, Iocb::new(op::PREAD, fd, w.memory(64), 8, 0));
            w.rule("it", answer, -i64::from(libc::EBADF));
        }
    });
    cases.add("rw/a descriptor after close", |w| {
        let fd = w.open(O_RDWR);
        sys::close(fd);
        let answer = w.one(Iocb::new(op::PREAD, fd, w.memory(64), 8, 0));
        w.rule("it", answer, -i64::from(libc::EBADF));
    });
    cases.add("rw/a duplicate reads and writes the same", |w| {
        let fd = w.open(O_RDWR);
        let second = sys::call(libc::SYS_dup, &[sys::word(fd)]) as i32;
        sys::close(fd);
        w.one(Iocb::new(op::PWRITE, second, w.filled(64, 5), 64, 64));
        w.see_file();
    });
    cases.add("rw/a duplicate with a number of one's own", |w| {
        let fd = w.open(O_RDWR);
        // SAFETY: plain numbers.
        w.see("dup2", sys::answer(unsafe { libc::dup2(fd, 300) }.into()));
        w.one(Iocb::new(op::PWRITE, 300, w.filled(64, 5), 64, 64));
        w.see_file();
    });
}

fn set_flags(fd: i32, flags: i32) -> i64 {
    // SAFETY: plain numbers.
    sys::answer(unsafe { libc::fcntl(fd, libc::F_SETFL, flags) }.into())
}

fn limits(cases: &mut Cases) {
    for (mode, flags) in MODES {
        for (how, prepare) in [
            ("handled", (|| sys::count_signal(libc::SIGXFSZ, 0)) as fn()),
            ("ignored", || sys::ignore_signal(libc::SIGXFSZ)),
            ("deadly", || ()),
        ] {
            cases.add(format!("rw/{mode} write across RLIMIT_FSIZE, SIGXFSZ {how}"), move |w| {
                let fd = w.open(O_RDWR | flags);
                let (context, area) = (w.context(4), w.filled(8192, 4));
                prepare();
                limit_file_size(SIZE + 4096);
                w.one_in(context, Iocb::new(op::PWRITE, fd, area, 8192, SIZE as i64));
                w.say(format!("signals {}", sys::signals()));
                w.one_in(context, Iocb::new(op::PWRITE, fd, area, 8192, SIZE as i64 + 4096));
                w.say(format!("signals {}", sys::signals()));
                w.one_in(context, Iocb::new(op::PWRITE, fd, area, 4096, 0));
                w.see_size(fd);
            });
        }
    }
}

fn limit_file_size(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure.
    unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
}
