//! Mappings, and calls that move data without read and write: what a protected file refuses, in the
//! way that makes programs fall back.

use core::ffi::{c_int, c_uint, c_void};

use postern_sim::{
    files::{self, Kind},
    host,
};
use postern_trusted::errno::Errno;

use crate::{
    aio,
    next::{answer, export},
};

fn is_protected(fd: c_int) -> bool {
    files::kind(fd) == Kind::Protected
}

/// Whether an AIO ring lies at `at`.
fn is_ring(at: *mut c_void) -> bool {
    aio::is_used() && host::contexts().relocate(at as u64, at as u64)
}

export! {
    // A ring that moves stays the context's; it cannot grow.
    fn [mremap](
        at: *mut c_void, length: usize, wanted: usize, flags: c_int, to: *mut c_void,
    ) -> *mut c_void, next => {
        if !is_ring(at) {
            return next();
        }
        if wanted > length {
            return answer(|| Err(Errno::EFAULT));
        }
        let moved = next();
        if moved != libc::MAP_FAILED {
            host::contexts().relocate(at as u64, moved as u64);
        }
        moved
    };
    // A file system without mmap answers ENODEV.
    fn [mmap, mmap64](
        at: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64,
    ) -> *mut c_void, next =>
        if flags & libc::MAP_ANONYMOUS == 0 && is_protected(fd) {
            answer(|| Err(Errno::ENODEV))
        } else {
            next()
        };
    fn [sendfile, sendfile64](
        to: c_int, from: c_int, offset: *mut i64, length: usize,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EINVAL))
        } else {
            next()
        };
    fn [copy_file_range](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EXDEV))
        } else {
            next()
        };
    fn [splice](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EINVAL))
        } else {
            next()
        };
}
