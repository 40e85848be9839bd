//! io_submit: the checks in their order, and what a request carries.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::fd::{AsRawFd, FromRawFd},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::atomic::Ordering,
};

use postern_trusted::{
    aio::{FileTraits, Op},
    platform::Buffer,
};

use crate::{
    Aio, EBADF, EFAULT, EINVAL, EOPNOTSUPP, EPERM, Postern, agree, agree_with_kernel,
    guest::{
        self, Area, Batch, Events, FDSYNC, FSYNC, Iocb, NOOP, NOWHERE, PAGE, POLL, PREAD, PREADV,
        PWRITE, PWRITEV,
    },
    process::Machine,
};

/// End of user addresses with four levels of page tables.
const USER_END: u64 = 0x7fff_ffff_f000;

fn scratch_path(options: &mut OpenOptions) -> File {
    let path = std::env::temp_dir().join(format!(
        "aio-test-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&path, [7; 4096]).unwrap();
    let file = options.open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file
}

/// A regular file of 4096 sevens, open for reading and writing.
pub fn scratch() -> File {
    scratch_path(OpenOptions::new().read(true).write(true))
}

fn read_only() -> File {
    scratch_path(OpenOptions::new().read(true))
}

fn write_only() -> File {
    scratch_path(OpenOptions::new().write(true))
}

fn directory() -> File {
    File::open("/").unwrap()
}

/// Reads of 512 bytes, with these data.
pub fn reads(file: &File, data: &[u64]) -> Batch {
    let fd = file.as_raw_fd();
    Batch::new(&data.iter().map(|&data| Iocb { data, fd, ..Iocb::default() }).collect::<Vec<_>>())
}

/// A fresh eventfd.
pub fn eventfd() -> File {
    // SAFETY: a new descriptor, owned here.
    unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
}

/// What io_submit says of one iocb; and if it accepts it, the event's `res` behind it.
fn answer(aio: &dyn Aio, iocb: Iocb) -> Vec<i64> {
    let ctx = aio.context(1);
    let submitted = aio.submit(ctx, &Batch::new(&[iocb]));
    let mut answers = vec![submitted];
    if submitted == 1 {
        let events = Events::new(1);
        assert_eq!(aio.io_getevents(ctx, 1, 1, events.at(), 0), 1);
        answers.push(events.res(0));
    }
    assert_eq!(aio.io_destroy(ctx), 0);
    answers
}

/// Each of `iocbs` alone.
fn answers(aio: &dyn Aio, iocbs: &[Iocb]) -> Vec<i64> {
    iocbs.iter().flat_map(|iocb| answer(aio, *iocb)).collect()
}

/// An iocb that reads `file`.
pub fn on(file: &impl AsRawFd) -> Iocb {
    Iocb { fd: file.as_raw_fd(), ..Iocb::default() }
}

#[test]
fn a_negative_count_is_refused_before_the_context_and_zero_after_it() {
    agree(&[EINVAL, EINVAL, EINVAL, 0, 0], |aio| {
        let ctx = aio.context(1);
        let answers = vec![
            aio.io_submit(ctx, -1, 0),
            aio.io_submit(ctx, i64::MIN, 0),
            aio.io_submit(0, 0, 0),
            aio.io_submit(ctx, 0, u64::MAX),
        ];
        let end = aio.io_destroy(ctx);
        answers.into_iter().chain([end]).collect()
    });
}

#[test]
fn an_array_that_ends_before_a_huge_count_gives_what_was_accepted_until_there() {
    agree(&[2], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let batch = reads(&file, &[1, 2]);
        let array = Area::new(2);
        array.protect(1, libc::PROT_NONE);
        array.put(PAGE - 16, batch.iocb(0));
        array.put(PAGE - 8, batch.iocb(1));
        let answer = aio.io_submit(ctx, i64::MAX, array.at(PAGE - 16));
        assert_eq!(aio.io_destroy(ctx), 0);
        vec![answer]
    });
}

#[test]
fn an_array_or_an_iocb_that_cannot_be_read_is_efault() {
    agree(&[EFAULT; 9], |aio| {
        let ctx = aio.context(1);
        let mut answers: Vec<i64> =
            NOWHERE.iter().map(|&array| aio.io_submit(ctx, 1, array)).collect();
        let array = Area::new(2);
        array.protect(1, libc::PROT_NONE);
        for iocb in NOWHERE.into_iter().chain([array.at(PAGE - 32)]) {
            array.put(0, iocb);
            answers.push(aio.io_submit(ctx, 1, array.at(0)));
        }
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn checks_of_the_iocb_come_in_the_kernel_s_order() {
    let wrong = Iocb { fd: -1, opcode: 99, flags: 1, resfd: -1, ..Iocb::default() };
    let expected = [EINVAL, EINVAL, EBADF, EBADF, EINVAL, EINVAL, EBADF];
    agree(&expected, |aio| {
        let (file, counter) = (scratch(), eventfd());
        let good = file.as_raw_fd();
        answers(
            aio,
            &[
                Iocb { reserved2: 1, ..wrong },
                Iocb { nbytes: 1 << 63, ..wrong },
                wrong,
                Iocb { fd: good, ..wrong },
                Iocb { fd: good, resfd: good, ..wrong },
                Iocb { fd: good, resfd: counter.as_raw_fd(), ..wrong },
                Iocb { resfd: counter.as_raw_fd(), ..wrong },
            ],
        )
    });
}

#[test]
fn a_descriptor_opened_as_a_path_counts_as_not_open() {
    agree(&[EBADF, EBADF], |aio| {
        let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open("/").unwrap();
        answers(aio, &[on(&path), Iocb { opcode: 99, ..on(&path) }])
    });
}

#[test]
fn the_key_is_zeroed_before_the_opcode_is_looked_at() {
    agree(&[EFAULT, EBADF, 1, 0], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let place = Area::new(1);
        let submit = |iocb: Iocb, protection| {
            place.protect(0, libc::PROT_READ | libc::PROT_WRITE);
            place.put_bytes(64, &iocb.bytes());
            place.put(0, place.at(64));
            place.protect(0, protection);
            aio.io_submit(ctx, 1, place.at(0))
        };
        let answers = [
            submit(Iocb { opcode: 99, ..on(&file) }, libc::PROT_READ),
            submit(Iocb { fd: -1, ..on(&file) }, libc::PROT_READ),
            submit(Iocb { key: 77, ..on(&file) }, libc::PROT_READ | libc::PROT_WRITE),
        ];
        let key = place.get(64 + 8);
        assert_eq!(aio.io_destroy(ctx), 0);
        answers.into_iter().chain([key as i64]).collect()
    });
}

#[test]
fn opcodes_that_linux_does_not_serve_are_einval_noop_among_them() {
    agree(&[EINVAL; 5], |aio| {
        let file = scratch();
        let opcodes = [4, NOOP, 9, 10, u16::MAX];
        answers(aio, &opcodes.map(|opcode| Iocb { opcode, ..on(&file) }))
    });
}

#[test]
fn reads_and_writes_move_the_bytes_and_say_how_many() {
    agree(&[2, 512, 100, 7, 9], |aio| {
        let file = scratch();
        let ctx = aio.context(1);
        let fd = file.as_raw_fd();
        let ink = Area::new(1);
        ink.put_bytes(0, &[9; 100]);
        let write =
            Iocb { opcode: PWRITE, buf: ink.at(0), nbytes: 100, offset: 8, fd, ..on(&file) };
        let batch = Batch::new(&[on(&file), write]);
        let mut answers = vec![aio.submit(ctx, &batch)];
        let events = Events::new(2);
        assert_eq!(aio.reap(ctx, 2, &events), 2);
        answers.extend([events.res(0), events.res(1)]);
        answers.push((guest::peek(batch.buffer(0)) & 0xff) as i64);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 107).unwrap();
        answers.push(i64::from(byte[0]));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn the_mode_of_the_descriptor_is_looked_at_after_priority_and_flags() {
    let unknown = 0x8000_0000;
    let expected = [EBADF, EBADF, EOPNOTSUPP, EOPNOTSUPP, EINVAL, EINVAL, EINVAL];
    agree(&expected, |aio| {
        let (reader, writer, directory) = (read_only(), write_only(), directory());
        let write = Iocb { opcode: PWRITE, ..on(&reader) };
        answers(
            aio,
            &[
                write,
                on(&writer),
                Iocb { rw_flags: unknown, ..write },
                Iocb { rw_flags: unknown, ..on(&writer) },
                Iocb { rw_flags: unknown, flags: 2, reqprio: 4 << 13, ..write },
                on(&directory),
                // Without the flag the priority is not looked at; the buffer after the file.
                Iocb { reqprio: 4 << 13, buf: u64::MAX, nbytes: 1, ..on(&directory) },
            ],
        )
    });
}

#[test]
fn priorities_are_checked_as_linux_does() {
    let with =
        |class: u16, level| Iocb { flags: 2, reqprio: class << 13 | level, ..Iocb::default() };
    let expected = [1, 512, EINVAL, 1, 512, 1, 512, EINVAL, EINVAL, EINVAL, EINVAL];
    agree(&expected, |aio| {
        let file = scratch();
        let tries = [(0, 0), (0, 3), (2, 7), (3, 7), (4, 0), (5, 0), (6, 0), (7, 7)];
        answers(
            aio,
            &tries.map(|(class, level)| Iocb { fd: file.as_raw_fd(), ..with(class, level) }),
        )
    });
    let file = scratch();
    for (realtime, expected) in [(true, vec![1, 512]), (false, vec![EPERM])] {
        let postern = Postern::on(Machine { realtime, ..Machine::default() });
        assert_eq!(answer(&postern, Iocb { fd: file.as_raw_fd(), ..with(1, 4) }), expected);
    }
}

#[test]
fn rw_flags_that_do_not_fit_are_refused_and_hints_are_taken() {
    const HIPRI: u32 = 1;
    const SYNCS: u32 = 2 | 4;
    const APPEND: u32 = 0x10;
    const NOAPPEND: u32 = 0x20;
    const ATOMIC: u32 = 0x40;
    agree(&[1, 512, 1, 512, EINVAL, EOPNOTSUPP], |aio| {
        let file = scratch();
        let write = Iocb { opcode: PWRITE, ..on(&file) };
        answers(
            aio,
            &[
                Iocb { rw_flags: HIPRI, ..on(&file) },
                Iocb { rw_flags: SYNCS | NOAPPEND, ..write },
                Iocb { rw_flags: APPEND | NOAPPEND, ..write },
                Iocb { rw_flags: ATOMIC, ..on(&file) },
            ],
        )
    });
}

#[test]
fn rw_flags_depend_on_what_the_file_can_do() {
    let plain = FileTraits { nowait: false, ..FileTraits::REGULAR };
    let able = FileTraits { nowait: true, atomic: true, dontcache: true, ..FileTraits::REGULAR };
    let appending = FileTraits { append: true, append_only: true, ..FileTraits::REGULAR };
    let cases = [
        (plain, PWRITE, 0x08, EOPNOTSUPP),
        (plain, PWRITE, 0x40, EOPNOTSUPP),
        (plain, PREAD, 0x80, EOPNOTSUPP),
        (plain, PREAD, 0x200, EOPNOTSUPP),
        (able, PREAD, 0x08, 1),
        (able, PWRITE, 0x40, 1),
        (able, PREAD, 0x40, EOPNOTSUPP),
        (able, PREAD, 0x80, 1),
        (able, PREAD, 0x100, 1),
        (appending, PWRITE, 0x20, EPERM),
        (appending, PREAD, 0x20, EPERM),
        (FileTraits { append_only: false, ..appending }, PWRITE, 0x20, 1),
    ];
    for (traits, opcode, rw_flags, expected) in cases {
        let postern = Postern::new();
        let file = postern.process.open_controlled(traits);
        let iocb = Iocb { opcode, rw_flags, fd: file.fd(), ..Iocb::default() };
        let ctx = postern.context(1);
        let answer = postern.submit(ctx, &Batch::new(&[iocb]));
        assert_eq!(answer, expected, "opcode {opcode}, flags {rw_flags:#x}");
        (0..file.pending()).for_each(|_| file.complete(Ok(0)));
    }
}

#[test]
fn a_request_carries_what_flags_and_descriptor_ask_for_together() {
    let bare = FileTraits::REGULAR;
    let seen = |traits: FileTraits, rw_flags: u32| {
        let postern = Postern::new();
        let file = postern.process.open_controlled(traits);
        let iocb = Iocb { opcode: PWRITE, rw_flags, fd: file.fd(), offset: 96, ..Iocb::default() };
        let ctx = postern.context(1);
        assert_eq!(postern.submit(ctx, &Batch::new(&[iocb])), 1);
        let (request, done) = file.take();
        done.finish(Ok(0));
        assert_eq!((request.op, request.offset, request.buffer.len()), (Op::Write, 96, 512));
        assert_eq!(request.submitted_ns, postern.process.clock.load(Ordering::Relaxed));
        let flags = request.flags;
        [flags.dsync(), flags.sync(), flags.append(), flags.nowait(), flags.nosignal()]
    };
    assert_eq!(seen(bare, 0x1), [false; 5]);
    assert_eq!(seen(bare, 0x2), [true, false, false, false, false]);
    assert_eq!(seen(bare, 0x4), [true, true, false, false, false]);
    assert_eq!(seen(bare, 0x118), [false, false, true, true, true]);
    assert_eq!(seen(FileTraits { append: true, ..bare }, 0), [false, false, true, false, false]);
    assert_eq!(seen(FileTraits { append: true, ..bare }, 0x20), [false; 5]);
    assert_eq!(seen(FileTraits { dsync: true, ..bare }, 0), [true, false, false, false, false]);
    assert_eq!(seen(FileTraits { sync: true, ..bare }, 0), [true, true, false, false, false]);
}

#[test]
fn a_buffer_beyond_user_addresses_is_refused_and_one_that_is_merely_unmapped_is_an_event() {
    let expected = [EFAULT, EFAULT, EFAULT, EFAULT, 1, EFAULT, 1, EFAULT, 1, 0];
    agree(&expected, |aio| {
        let file = scratch();
        let read = |buf, nbytes| Iocb { buf, nbytes, ..on(&file) };
        answers(
            aio,
            &[
                read(u64::MAX, 1),
                read(1 << 63, 1),
                read(USER_END - 511, 512),
                read(USER_END + 1, 0),
                read(USER_END - 512, 512),
                // The length is capped before the range is looked at.
                read(0, i64::MAX as u64),
                read(USER_END, 0),
            ],
        )
    });
}

#[test]
fn an_offset_that_is_negative_or_overflows_is_einval_after_the_buffer() {
    agree(&[EINVAL, EINVAL, EFAULT, 1, 0], |aio| {
        let file = scratch();
        answers(
            aio,
            &[
                Iocb { offset: -1, ..on(&file) },
                Iocb { offset: i64::MAX - 511, ..on(&file) },
                Iocb { offset: -1, buf: u64::MAX, nbytes: 1, ..on(&file) },
                Iocb { offset: i64::MAX - 512, ..on(&file) },
            ],
        )
    });
}

#[test]
fn a_vector_is_imported_as_linux_does() {
    let expected = [
        1, 0, // No segments.
        1, 300,    // The count is 32 bits wide.
        EINVAL, // Too many segments.
        1, 300, // 1024 of them.
        EFAULT, EFAULT, // No such array.
        EINVAL, // A negative length, found before the array's end.
        EFAULT, // The array's end, found before a bad base.
        EINVAL, // A negative length, found before a bad base.
        EFAULT, // A bad base.
        EFAULT, // A length is not capped before its own base is looked at, if there are two.
        1, EFAULT, // It is if it is alone.
    ];
    agree(&expected, |aio| {
        let file = scratch();
        let data = Area::new(1);
        let array = Area::new(6);
        array.protect(5, libc::PROT_NONE);
        let at_end = |segments: &[(u64, u64)]| {
            let start = 5 * PAGE - segments.len() * 16;
            for (index, (base, len)) in segments.iter().enumerate() {
                array.put(start + index * 16, *base);
                array.put(start + index * 16 + 8, *len);
            }
            array.at(start)
        };
        let read = |buf, nbytes| Iocb { opcode: PREADV, buf, nbytes, ..on(&file) };
        let negative = 1 << 63;
        let mut many = vec![(data.at(0), 0); 1024];
        (many[3].1, many[1023]) = (200, (data.at(200), 100));
        [
            answer(aio, read(0, 0)),
            answer(aio, read(at_end(&[(data.at(0), 300)]), (1 << 32) + 1)),
            answer(aio, read(at_end(&many), 1025)),
            answer(aio, read(at_end(&many), 1024)),
            answer(aio, read(0, 1)),
            answer(aio, read(u64::MAX, 2)),
            answer(aio, read(at_end(&[(data.at(0), negative)]), 2)),
            answer(aio, read(at_end(&[(u64::MAX, 5)]), 2)),
            answer(aio, read(at_end(&[(u64::MAX, 5), (0, negative)]), 2)),
            answer(aio, read(at_end(&[(data.at(0), 5), (u64::MAX, 5)]), 2)),
            answer(aio, read(at_end(&[(0, i64::MAX as u64), (0, 0)]), 2)),
            answer(aio, read(at_end(&[(0, i64::MAX as u64)]), 1)),
        ]
        .concat()
    });
}

#[test]
fn vectors_scatter_and_gather_the_bytes_in_order() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let data = Area::new(1);
    let array = Area::new(1);
    for (index, (offset, len)) in [(100, 3), (0, 0), (50, 1), (7, 4)].into_iter().enumerate() {
        array.put(index * 16, data.at(offset));
        array.put(index * 16 + 8, len);
    }
    let iocb =
        |opcode| Iocb { opcode, fd: file.fd(), buf: array.at(0), nbytes: 4, ..Iocb::default() };
    let ctx = postern.context(1);
    assert_eq!(postern.submit(ctx, &Batch::new(&[iocb(PREADV), iocb(PWRITEV)])), 2);
    let (read, done) = file.take();
    assert_eq!((read.op, read.buffer.len()), (Op::Read, 8));
    read.buffer.copy_out(0, b"ab").unwrap();
    read.buffer.copy_out(2, b"cdefgh").unwrap();
    assert!(read.buffer.copy_out(8, b"x").is_err(), "beyond the end");
    assert!(read.buffer.copy_out(8, b"").is_ok());
    assert!(read.buffer.copy_in(7, &mut [0; 2]).is_err(), "across the end");
    done.finish(Ok(8));
    let at = |offset| data.get(offset).to_ne_bytes();
    assert_eq!((&at(100)[..3], &at(50)[..1], &at(7)[..4]), (&b"abc"[..], &b"d"[..], &b"efgh"[..]));
    let (write, done) = file.take();
    for start in 0..8 {
        let mut bytes = vec![0; 8 - start];
        write.buffer.copy_in(start, &mut bytes).unwrap();
        assert_eq!(bytes, b"abcdefgh"[start..]);
    }
    let ranges = [(100, 3), (0, 0), (50, 1), (7, 4)].map(|(offset, len)| (data.at(offset), len));
    assert!(write.buffer.ranges().eq(ranges));
    assert_eq!(write.buffer.reach(true), 8);
    done.finish(Ok(8));
}

#[test]
fn syncs_take_nothing_but_a_file_that_can_be_synced() {
    let expected = [1, 0, 1, 0, 1, 0, EINVAL, EINVAL, EINVAL, EINVAL, EINVAL, 1, 0];
    agree(&expected, |aio| {
        let (file, reader, directory) = (scratch(), read_only(), directory());
        let (pipe, _other) = std::io::pipe().unwrap();
        let sync = Iocb { opcode: FSYNC, ..on(&file) };
        answers(
            aio,
            &[
                sync,
                Iocb { opcode: FDSYNC, ..on(&reader) },
                Iocb { opcode: FSYNC, ..on(&directory) },
                Iocb { buf: 1, ..sync },
                Iocb { nbytes: 1, ..sync },
                Iocb { offset: 1, ..sync },
                Iocb { rw_flags: 1, ..sync },
                Iocb { opcode: FDSYNC, ..on(&pipe) },
                // The priority is not looked at.
                Iocb { flags: 2, reqprio: 7 << 13, ..sync },
            ],
        )
    });
}

#[test]
fn a_poll_of_a_regular_file_is_ready_at_once_or_einval() {
    let expected = [1, 1, 1, 5, 1, 0x145, EINVAL, EINVAL, EINVAL, EINVAL, EINVAL, EINVAL];
    agree(&expected, |aio| {
        let file = scratch();
        let poll = |events| Iocb { opcode: POLL, buf: events, ..on(&file) };
        answers(
            aio,
            &[
                poll(0x1),
                poll(0x5),
                poll(0xffff),
                poll(0x2),
                poll(0),
                poll(0x1_0001),
                Iocb { offset: 1, ..poll(1) },
                Iocb { nbytes: 1, ..poll(1) },
                Iocb { rw_flags: 1, ..poll(1) },
            ],
        )
    });
}

#[test]
fn a_poll_always_asks_for_errors_and_hang_ups() {
    for (ready, asked, expected) in [(0x10, 0x1, 0x10), (0x59, 0x1, 0x19), (0x8, 0, 0x8)] {
        let postern = Postern::new();
        let file = postern.process.open_controlled(FileTraits { ready, ..FileTraits::REGULAR });
        let poll = Iocb { opcode: POLL, buf: asked, fd: file.fd(), ..Iocb::default() };
        assert_eq!(answer(&postern, poll), [1, expected]);
    }
}

#[test]
fn o_append_writes_ignore_the_offset_unless_told_otherwise() {
    agree_with_kernel(|aio| {
        let file = scratch_path(OpenOptions::new().read(true).append(true));
        let answers = answers(aio, &[Iocb { opcode: PWRITE, offset: -1, ..on(&file) }]);
        (&file).flush().unwrap();
        (answers, file.metadata().unwrap().len())
    });
}
