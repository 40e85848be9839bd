//! Sizes, allocation and durability.

use core::ffi::{c_char, c_int, c_uint};

use postern_sim::{
    directory,
    files::{self, attributes},
};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths,
    next::{answer, export, number},
};

/// The advice values of posix_fadvise(2): POSIX_FADV_NORMAL..=POSIX_FADV_NOREUSE.
const LAST_ADVICE: c_int = libc::POSIX_FADV_NOREUSE;
const SYNC_RANGE_FLAGS: c_uint = libc::SYNC_FILE_RANGE_WAIT_BEFORE
    | libc::SYNC_FILE_RANGE_WRITE
    | libc::SYNC_FILE_RANGE_WAIT_AFTER;

fn truncate_path(found: guest_paths::Found, length: i64) -> c_int {
    answer(|| {
        if found.directory {
            return Err(Errno::ENOTDIR);
        }
        let length = u64::try_from(length).map_err(|_| Errno::EINVAL)?;
        if length > files::io::MAX_BYTES {
            return Err(Errno::EFBIG);
        }
        attributes::hold(found.index)?.resize(length).map(|()| 0)
    })
}

fn truncate_place(place: &directory::Place, length: i64) -> c_int {
    answer(|| {
        let length = u64::try_from(length).map_err(|_| Errno::EINVAL)?;
        if length > files::io::MAX_BYTES {
            return Err(Errno::EFBIG);
        }
        directory::truncate(place, length).map(|()| 0)
    })
}

fn allocate(file: &files::OpenFile, mode: c_int, offset: i64, length: i64) -> Result<(), Errno> {
    file.allocate(mode, offset, length)
}

export! {
    fn [ftruncate, ftruncate64](fd: c_int, length: i64) -> c_int, next => match files::lookup(fd) {
        Some(file) => answer(|| file.truncate(length).map(|()| 0)),
        None => next(),
    };
    fn [truncate, truncate64](path: *const c_char, length: i64) -> c_int, next =>
        match (guest_paths::find_here(path), guest_paths::place(libc::AT_FDCWD, path)) {
            (Some(found), _) => truncate_path(found, length),
            (None, Some(place)) => truncate_place(&place, length),
            (None, None) => next(),
        };
    fn [fallocate, fallocate64](
        fd: c_int, mode: c_int, offset: i64, length: i64,
    ) -> c_int, next => match files::lookup(fd) {
        Some(file) => answer(|| allocate(&file, mode, offset, length).map(|()| 0)),
        None => next(),
    };
    fn [posix_fallocate, posix_fallocate64](
        fd: c_int, offset: i64, length: i64,
    ) -> c_int, next => match files::lookup(fd) {
        Some(file) => number(|| allocate(&file, 0, offset, length)),
        None => next(),
    };
    fn [fsync, fdatasync, syncfs](fd: c_int) -> c_int, next => match files::lookup(fd) {
        Some(file) => answer(|| file.flush().map(|()| 0)),
        None => next(),
    };
    // Promises nothing about a crash (its man page says so): the arguments are checked.
    fn [sync_file_range](
        fd: c_int, offset: i64, length: i64, flags: c_uint,
    ) -> c_int, next => match files::lookup(fd) {
        Some(file) => answer(|| {
            let bad = flags & !SYNC_RANGE_FLAGS != 0
                || offset < 0
                || length < 0
                || offset.checked_add(length).is_none();
            match () {
                () if file.is_path() => Err(Errno::EBADF),
                () if bad => Err(Errno::EINVAL),
                () => Ok(0),
            }
        }),
        None => next(),
    };
    // Advice: nothing is read ahead.
    fn [readahead](fd: c_int, offset: i64, length: usize) -> isize, next =>
        match files::lookup(fd) {
            Some(file) => answer(|| if file.readable() { Ok(0) } else { Err(Errno::EBADF) }),
            None => next(),
        };
    fn [posix_fadvise, posix_fadvise64](
        fd: c_int, offset: i64, length: i64, advice: c_int,
    ) -> c_int, next => match files::lookup(fd) {
        Some(file) => number(|| match () {
            () if file.is_path() => Err(Errno::EBADF),
            () if length < 0 || !(0..=LAST_ADVICE).contains(&advice) => Err(Errno::EINVAL),
            () => Ok(()),
        }),
        None => next(),
    };
}
