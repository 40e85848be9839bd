//! Calls that move data without read and write: what a protected file refuses, in the way that
//! makes programs fall back.

use core::ffi::{c_int, c_uint, c_void};

use postern_sim::files::{self, Kind};
use postern_trusted::errno::Errno;

use crate::next::{answer, export};

fn is_protected(fd: c_int) -> bool {
    files::kind(fd) == Kind::Protected
}

export! {
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
