//! Streams. The C library reads and writes a stream's descriptor without coming by here, so a
//! stream on a protected file would only see `EBADF`: it is refused with a message instead.

use core::ffi::{c_char, c_int};

use libc::FILE;
use postern_sim::files::{self, Kind};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths,
    next::{answer, export},
};

const REFUSAL: &str = "fopen and streams are not supported on a protected file; use open(2)";

fn open_or(path: *const c_char, next: impl FnOnce() -> *mut FILE) -> *mut FILE {
    if let Some(place) = guest_paths::place(libc::AT_FDCWD, path) {
        let path = String::from_utf8_lossy(&place.path).into_owned();
        postern_sim::message::say(&format!("{path}: {REFUSAL}"));
        return answer(|| Err(Errno::EACCES));
    }
    match guest_paths::find_here(path) {
        Some(found) => {
            guest_paths::refuse(found.index, REFUSAL);
            answer(|| Err(Errno::EACCES))
        }
        None => next(),
    }
}

export! {
    fn [fopen, fopen64](path: *const c_char, mode: *const c_char) -> *mut FILE, next =>
        open_or(path, next);
    fn [freopen, freopen64](
        path: *const c_char, mode: *const c_char, stream: *mut FILE,
    ) -> *mut FILE, next => open_or(path, next);
    fn [fdopen](fd: c_int, mode: *const c_char) -> *mut FILE, next => match files::lookup(fd) {
        Some(file) => {
            guest_paths::refuse(file.index(), REFUSAL);
            answer(|| Err(Errno::EACCES))
        }
        None if files::kind(fd) == Kind::Internal => answer(|| Err(Errno::EBADF)),
        None => next(),
    };
}
