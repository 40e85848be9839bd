//! open(2) and its kin.

use core::ffi::{c_char, c_int, c_uint};

use postern_sim::{directory, files};
use postern_trusted::errno::Errno;

use crate::{
    aio,
    guest_paths::{self, Found},
    next::{answer, export},
};

fn open_found(found: Found, flags: c_int) -> c_int {
    answer(|| if found.directory { Err(Errno::ENOTDIR) } else { files::open(found.index, flags) })
}

/// The mode counts only where a file may be made.
fn open_or(
    from: c_int,
    path: *const c_char,
    (flags, mode): (c_int, c_uint),
    next: impl FnOnce() -> c_int,
) -> c_int {
    if let Some(place) = guest_paths::place(from, path) {
        return answer(|| directory::open(&place, flags, mode));
    }
    if let Some(found) = guest_paths::find(from, path) {
        return open_found(found, flags);
    }
    let fd = match aio::open_number(path, flags) {
        Some(number) => answer(|| number),
        None => next(),
    };
    files::is_ordinary(fd);
    fd
}

const CREATE: c_int = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;

export! {
    fn [open, open64](path: *const c_char, flags: c_int, mode: c_uint) -> c_int, next =>
        open_or(libc::AT_FDCWD, path, (flags, mode), next);
    fn [__open_2, __open64_2](path: *const c_char, flags: c_int) -> c_int, next =>
        open_or(libc::AT_FDCWD, path, (flags, 0), next);
    fn [openat, openat64](
        directory: c_int, path: *const c_char, flags: c_int, mode: c_uint,
    ) -> c_int, next => open_or(directory, path, (flags, mode), next);
    fn [__openat_2, __openat64_2](
        directory: c_int, path: *const c_char, flags: c_int,
    ) -> c_int, next => open_or(directory, path, (flags, 0), next);
    fn [creat, creat64](path: *const c_char, mode: c_uint) -> c_int, next =>
        open_or(libc::AT_FDCWD, path, (CREATE, mode), next);
}
