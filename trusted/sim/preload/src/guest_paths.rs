//! Which volume, or place in a protected directory, a path argument names.

use core::ffi::{c_char, c_int};
use std::ffi::CString;

use postern_sim::{
    directory::{self, Place, cwd},
    files::{
        self, Kind,
        path::{self, Normal},
        placeholder,
    },
    guest, message, runtime, sys,
};

use crate::state;

/// A path argument that names a protected file.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The volume's index in the run file.
    pub index: usize,
    /// The path ended in a slash: on Linux it could only name a directory.
    pub directory: bool,
}

/// The protected file that `path`, relative to `directory`, names. `None`: the kernel's business,
/// also where the path cannot be read.
pub fn find(directory: c_int, path: *const c_char) -> Option<Found> {
    let normal = absolute(directory, path)?;
    let index = runtime::volume_of(normal.as_bytes())?;
    Some(Found { index, directory: normal.directory })
}

/// The place in a protected directory that `path`, relative to `directory`, names.
pub fn place(directory: c_int, path: *const c_char) -> Option<Place> {
    if !has_directories() {
        return None;
    }
    let normal = absolute(directory, path)?;
    directory::find(normal.as_bytes(), normal.directory)
}

fn has_directories() -> bool {
    state::active()
        && postern_sim::family::family().is_some_and(|family| !family.directories.is_empty())
}

/// `path`, relative to `directory`, made absolute.
pub fn absolute(directory: c_int, path: *const c_char) -> Option<Normal> {
    if path.is_null() || !state::active() {
        return None;
    }
    let mut room = [0; guest::PATH_ROOM];
    let path = guest::read_path(path as u64, &mut room).ok()?;
    let mut base = [0; guest::PATH_ROOM];
    let base = if path.first() == Some(&b'/') { &[][..] } else { base_of(directory, &mut base)? };
    Normal::new(base, path)
}

/// A path that leads out of a protected directory, from where it comes out: for the kernel, which
/// knows nothing of that. What it goes through outside is left as it is.
pub fn outward(directory: c_int, path: *const c_char) -> Option<CString> {
    if path.is_null() || !has_directories() {
        return None;
    }
    let mut room = [0; guest::PATH_ROOM];
    let path = guest::read_path(path as u64, &mut room).ok()?;
    if !path.windows(2).any(|pair| pair == b"..") {
        return None;
    }
    let mut base = [0; guest::PATH_ROOM];
    let base = if path.first() == Some(&b'/') { &[][..] } else { base_of(directory, &mut base)? };
    let is_root = |path: &[u8]| directory::find(path, true).is_some_and(|at| at.path.is_empty());
    CString::new(path::outward(base, path, is_root)?).ok()
}

/// As [`find`], from the working directory.
pub fn find_here(path: *const c_char) -> Option<Found> {
    find(libc::AT_FDCWD, path)
}

/// The directory that a relative path counts from, put into `room`.
pub fn base_of(directory: c_int, room: &mut [u8]) -> Option<&[u8]> {
    let length = if directory == libc::AT_FDCWD {
        match cwd::get(room) {
            Some(length) => length,
            None => sys::getcwd(room).ok()?,
        }
    } else {
        if files::kind(directory) != Kind::Other {
            let path = files::lookup(directory)?.listing()?.path().ok()??;
            room.get_mut(..path.len())?.copy_from_slice(&path);
            return room.get(..path.len());
        }
        let mut link = [0; 32];
        let length = sys::readlink(placeholder::own_path(directory, &mut link).ok()?, room).ok()?;
        if length == room.len() {
            return None; // Cut off: longer than any path we protect.
        }
        length
    };
    room.get(..length)
}

/// Whether `path` is the empty string.
pub fn is_empty(path: *const c_char) -> bool {
    let mut room = [0; guest::PATH_ROOM];
    guest::read_path(path as u64, &mut room) == Ok(&[])
}

/// Says on stderr that the program asked for something that a protected file does not offer.
pub fn refuse(index: usize, what: &str) {
    if let Some(family) = postern_sim::family::family() {
        message::say(&format!("{}: {what}", family.guest_path(index)));
    }
}
