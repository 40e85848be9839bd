//! Reading and writing.

use core::ffi::{c_int, c_void};
use std::sync::Arc;

use postern_sim::{
    files::{self, OpenFile, io::At},
    guest::GuestBuffer,
};
use postern_trusted::errno::Errno;

use crate::next::{answer, export, signed};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

fn transfer(
    file: &OpenFile,
    way: Way,
    at: Result<At, Errno>,
    buffer: impl FnOnce() -> Result<GuestBuffer, Errno>,
    flags: c_int,
) -> isize {
    answer(|| {
        let at = at?;
        // The mode comes before the buffer, as in the kernel.
        if !(if way == Way::Read { file.readable() } else { file.writable() }) {
            return Err(Errno::EBADF);
        }
        let buffer = buffer()?;
        let moved = match way {
            Way::Read => file.read(at, &buffer, flags),
            Way::Write => file.write(at, &buffer, flags),
        };
        moved.map(signed)
    })
}

fn one(buffer: *const c_void, length: usize) -> impl FnOnce() -> Result<GuestBuffer, Errno> {
    move || GuestBuffer::single(buffer as u64, length as u64)
}

fn many(vector: *const libc::iovec, count: c_int) -> impl FnOnce() -> Result<GuestBuffer, Errno> {
    move || GuestBuffer::import(vector as u64, i64::from(count).cast_unsigned())
}

/// The offset of preadv2(2): -1 is the position.
fn offset_or_position(offset: i64) -> Result<At, Errno> {
    if offset == -1 { Ok(At::Position) } else { At::offset(offset) }
}

fn file(fd: c_int) -> Option<Arc<OpenFile>> {
    files::lookup(fd)
}

export! {
    fn [read](fd: c_int, to: *mut c_void, length: usize) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Read, Ok(At::Position), one(to, length), 0),
        None => next(),
    };
    fn [write](fd: c_int, from: *const c_void, length: usize) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Write, Ok(At::Position), one(from, length), 0),
        None => next(),
    };
    fn [pread, pread64](
        fd: c_int, to: *mut c_void, length: usize, offset: i64,
    ) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Read, At::offset(offset), one(to, length), 0),
        None => next(),
    };
    fn [pwrite, pwrite64](
        fd: c_int, from: *const c_void, length: usize, offset: i64,
    ) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Write, At::offset(offset), one(from, length), 0),
        None => next(),
    };
    fn [readv](fd: c_int, vector: *const libc::iovec, count: c_int) -> isize, next =>
        match file(fd) {
            Some(file) => transfer(&file, Way::Read, Ok(At::Position), many(vector, count), 0),
            None => next(),
        };
    fn [writev](fd: c_int, vector: *const libc::iovec, count: c_int) -> isize, next =>
        match file(fd) {
            Some(file) => transfer(&file, Way::Write, Ok(At::Position), many(vector, count), 0),
            None => next(),
        };
    fn [preadv, preadv64](
        fd: c_int, vector: *const libc::iovec, count: c_int, offset: i64,
    ) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Read, At::offset(offset), many(vector, count), 0),
        None => next(),
    };
    fn [pwritev, pwritev64](
        fd: c_int, vector: *const libc::iovec, count: c_int, offset: i64,
    ) -> isize, next => match file(fd) {
        Some(file) => transfer(&file, Way::Write, At::offset(offset), many(vector, count), 0),
        None => next(),
    };
    fn [preadv2, preadv64v2](
        fd: c_int, vector: *const libc::iovec, count: c_int, offset: i64, flags: c_int,
    ) -> isize, next => match file(fd) {
        Some(file) => {
            transfer(&file, Way::Read, offset_or_position(offset), many(vector, count), flags)
        }
        None => next(),
    };
    fn [pwritev2, pwritev64v2](
        fd: c_int, vector: *const libc::iovec, count: c_int, offset: i64, flags: c_int,
    ) -> isize, next => match file(fd) {
        Some(file) => {
            transfer(&file, Way::Write, offset_or_position(offset), many(vector, count), flags)
        }
        None => next(),
    };
    // The checked forms abort when the buffer is too small: that is the C library's to do.
    fn [__read_chk](fd: c_int, to: *mut c_void, length: usize, room: usize) -> isize, next =>
        match file(fd) {
            Some(file) if length <= room => {
                transfer(&file, Way::Read, Ok(At::Position), one(to, length), 0)
            }
            _ => next(),
        };
    fn [__pread_chk, __pread64_chk](
        fd: c_int, to: *mut c_void, length: usize, offset: i64, room: usize,
    ) -> isize, next => match file(fd) {
        Some(file) if length <= room => {
            transfer(&file, Way::Read, At::offset(offset), one(to, length), 0)
        }
        _ => next(),
    };
    fn [lseek, lseek64](fd: c_int, offset: i64, whence: c_int) -> i64, next => match file(fd) {
        Some(file) => answer(|| {
            file.seek(offset, whence).and_then(|at| i64::try_from(at).map_err(|_| Errno::EOVERFLOW))
        }),
        None => next(),
    };
}
