//! What `O_DIRECT` asks of offsets, lengths and memory, over data, holes and the end of the file.
//!
//! Segments are never laid so that it would matter whether the pages under them lie side by side
//! in the machine's memory, and no sector boundary inside a hole coincides with a block's unless
//! that does not matter: how many extents fill a hole is for the disk to say.

use libc::{O_DIRECT, O_RDWR};

use super::Cases;
use crate::{
    aio::{Iocb, op, rwf},
    sys,
    world::{DATA, SIZE, World},
};

/// Segments: bytes behind a page's start, and length. Each begins in a page of its own unless it
/// goes on where the one before it ends.
const MEMORY: [(&str, &[(u64, u64)]); 17] = [
    ("a sector", &[(0, 512)]),
    ("a sector at an odd place", &[(1, 512)]),
    ("a sector at 4 bytes", &[(4, 512)]),
    ("a sector at 256 bytes", &[(256, 512)]),
    ("a sector across pages", &[(3840, 512)]),
    ("sectors up to a page's end", &[(512, 3584)]),
    ("a block at an odd place", &[(1, 4096)]),
    ("two blocks", &[(0, 8192)]),
    ("two sectors apart", &[(0, 512), (0, 512)]),
    ("two sectors apart, one odd", &[(0, 512), (1, 512)]),
    ("two halves apart", &[(0, 256), (0, 256)]),
    ("two odd parts side by side", &[(0, 100), (100, 412)]),
    ("three odd parts at an odd place", &[(7, 100), (107, 400), (507, 12)]),
    ("a sector behind nothing at an odd place", &[(1, 0), (0, 512)]),
    ("a sector before nothing at an odd place", &[(0, 512), (1, 0)]),
    ("a block in three parts", &[(0, 2048), (1024, 1024), (0, 1024)]),
    ("an odd sum", &[(0, 512), (0, 100)]),
];

const PLACES: [(&str, u64); 7] = [
    ("in data", 4096),
    ("before the hole", DATA - 512),
    ("before the hole, at an odd place", DATA - 100),
    ("in the hole", 64 << 10),
    ("in the hole, at an odd place", (64 << 10) + 7),
    ("before the end", SIZE - 1024),
    ("at the end", SIZE),
];

fn segments(w: &World, shape: &[(u64, u64)]) -> (u64, u64) {
    let mut end = (u64::MAX, 0);
    let laid: Vec<_> = shape
        .iter()
        .map(|&(shift, len)| {
            let goes_on = shift == end.0 && shift > 0;
            let base = if goes_on { end.1 } else { w.filled(16384, 0x5a) + shift };
            end = (shift + len, base + len);
            (base, len)
        })
        .collect();
    (w.vector(&laid), laid.len() as u64)
}

pub fn add(cases: &mut Cases) {
    for (memory, shape) in MEMORY {
        for (place, offset) in PLACES {
            for (kind, opcode) in [("read", op::PREADV), ("write", op::PWRITEV)] {
                cases.add(format!("direct/{kind} {place}: {memory}"), move |w| {
                    let fd = w.open(O_RDWR | O_DIRECT);
                    let (vector, count) = segments(w, shape);
                    w.one(Iocb::new(opcode, fd, vector, count, offset.cast_signed()));
                    w.see_size(fd);
                });
            }
        }
    }
    synchronous(cases);
    without_waiting(cases);
    behind_buffered_writes(cases);
    cases.add("direct/a read across the end clears the rest of its memory", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        w.see("ftruncate", sys::ftruncate(fd, 10_000));
        let at = w.filled(16384, 0x5a);
        w.one(Iocb::new(op::PREAD, fd, at, 8192, 8192));
        w.see_memory("memory", at, 16384);
        w.see("pread", sys::pread(fd, at + 8192, 4096, 8192));
        w.see_memory("memory", at, 16384);
    });
    cases.add("direct/a read of missing memory at an odd place", |w| {
        let fd = w.open(O_RDWR | O_DIRECT);
        for offset in [4096, 64 << 10] {
            w.one(Iocb::new(op::PREAD, fd, 0x10001, 8192, offset));
            w.one(Iocb::new(op::PREAD, fd, w.filled(4096, 1) + 1, 8192, offset));
            w.one(Iocb::new(op::PREAD, fd, w.filled(4096, 1) + 2048, 8192, offset));
        }
    });
}

/// The same rules hold for pread(2) and pwrite(2).
fn synchronous(cases: &mut Cases) {
    for (place, offset) in PLACES {
        cases.add(format!("direct/pread and pwrite {place}"), move |w| {
            let fd = w.open(O_RDWR | O_DIRECT);
            let offset = offset.cast_signed();
            for (shift, len) in [(0, 512), (1, 512), (0, 100), (0, 4096), (1, 4096), (512, 8192)] {
                let at = w.filled(16384, 0x5a) + shift;
                w.see("pread", sys::pread(fd, at, len, offset));
            }
            for (shift, len) in [(0, 100), (1, 4096), (256, 512)] {
                let at = w.filled(16384, 0x5a) + shift;
                w.see("pwrite", sys::pwrite(fd, at, len, offset));
            }
            w.see_size(fd);
        });
    }
}

/// The page cache may be written at any moment: what is asked a hundred times is whether it ever was
/// so.
fn behind_buffered_writes(cases: &mut Cases) {
    type Clean = fn(i32, u64) -> i64;
    let ways: [(&str, Clean, i64); 3] = [
        ("fsync", |fd, _| sys::fsync(fd), 0),
        ("a read past the cache", |fd, area| sys::pread(fd, area, 4096, 8192), 4096),
        ("a write past the cache", |fd, area| sys::pwrite(fd, area, 4096, 8192), 4096),
    ];
    for (name, clean, answer) in ways {
        cases.add(
            format!("direct/read without waiting, {name} behind a buffered write"),
            move |w| {
                let (buffered, fd) = (w.open(O_RDWR), w.open(O_RDWR | O_DIRECT));
                let (context, area) = (w.context(8), w.filled(8192, 3));
                let ask = || {
                    let read = Iocb::new(op::PREAD, fd, area, 4096, 8192).rw(rwf::NOWAIT);
                    w.submit(context, &[read]);
                    w.take(context, 1).1.first().map(|event| event.res)
                };
                let waits = (0..100).any(|_| {
                    sys::pwrite(buffered, area + 4096, 5, 8192 + 7);
                    ask() == Some(-i64::from(libc::EAGAIN))
                });
                w.say(format!("waits for what was written: {waits}"));
                w.rule(name, clean(fd, area), answer);
                w.say(format!("then it does not: {}", (0..100).any(|_| ask() == Some(4096))));
            },
        );
    }
}

/// Whether an overwrite finds what it needs at hand is the machine's luck, so there is none here.
fn without_waiting(cases: &mut Cases) {
    let requests: [(&str, u64, u64); 6] = [
        ("nothing", 0, 64 << 10),
        ("a hole", 4096, 64 << 10),
        ("data and a hole", 8192, DATA - 4096),
        ("a hole, an odd length", 100, 64 << 10),
        ("the end", 4096, SIZE),
        ("the end, at an odd place", 512, SIZE - 100),
    ];
    for (name, len, offset) in requests {
        cases.add(format!("direct/write without waiting: {name}"), move |w| {
            let fd = w.open(O_RDWR | O_DIRECT);
            let area = w.filled(8192, 3);
            w.one(Iocb::new(op::PWRITE, fd, area, len, offset.cast_signed()).rw(rwf::NOWAIT));
            w.see_file();
        });
    }
}
