//! stat(2), access(2), statfs(2) and their kin.

use core::ffi::{c_char, c_int, c_uint};

use postern_sim::{
    directory::{self, Facts, Place},
    files::{self, attributes},
    guest,
    runtime::OpenVolume,
};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths::{self, Found},
    next::{answer, export},
};

/// A C struct that has only integers, as bytes.
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: 1. `value` is readable for its size. 2. Made from all zeros, padding included, and
    //    filled field by field (the callers' constructors).
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn put<T: Copy, U>(to: *mut U, value: &T) -> Result<c_int, Errno> {
    guest::write(to as u64, bytes_of(value)).map(|()| 0)
}

/// What kind of answer, and where it goes.
#[derive(Clone, Copy)]
enum Ask {
    Stat(*mut libc::stat),
    Statx(*mut libc::statx),
    StatFs(*mut libc::statfs),
    StatVfs(*mut libc::statvfs),
    Access(c_int),
}

/// The answer about what is in a protected directory.
fn reply_facts(facts: &Facts, ask: Ask) -> Result<c_int, Errno> {
    match ask {
        Ask::Stat(to) => put(to, &facts.stat()),
        Ask::Statx(to) => put(to, &facts.statx()),
        Ask::StatFs(to) => put(to, &facts.statfs()?),
        Ask::StatVfs(to) => put(to, &facts.statvfs()?),
        Ask::Access(_) => Ok(0),
    }
}

fn of_place(place: &Place, ask: Ask) -> c_int {
    answer(|| match ask {
        Ask::Access(mode) => directory::access(place, mode).map(|()| 0),
        _ => reply_facts(&directory::stat(place)?, ask),
    })
}

fn reply(volume: &OpenVolume, ask: Ask) -> Result<c_int, Errno> {
    volume.attend()?;
    match ask {
        Ask::Stat(to) => put(to, &volume.stat()),
        Ask::Statx(to) => put(to, &volume.statx()),
        Ask::StatFs(to) => put(to, &volume.statfs()),
        Ask::StatVfs(to) => put(to, &volume.statvfs()),
        Ask::Access(mode) if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 => {
            Err(Errno::EINVAL)
        }
        Ask::Access(mode) if mode & libc::X_OK != 0 => Err(Errno::EACCES),
        Ask::Access(_) => Ok(0),
    }
}

fn of_path(found: Found, ask: Ask) -> c_int {
    answer(|| match ask {
        _ if found.directory => Err(Errno::ENOTDIR),
        Ask::Access(mode) if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 => {
            Err(Errno::EINVAL)
        }
        _ => reply(&*attributes::hold(found.index)?, ask),
    })
}

fn path_or(directory: c_int, path: *const c_char, ask: Ask, next: impl FnOnce() -> c_int) -> c_int {
    if let Some(place) = guest_paths::place(directory, path) {
        return of_place(&place, ask);
    }
    match guest_paths::find(directory, path) {
        Some(found) => of_path(found, ask),
        None => next(),
    }
}

fn descriptor_or(fd: c_int, ask: Ask, next: impl FnOnce() -> c_int) -> c_int {
    match files::lookup(fd) {
        Some(file) => answer(|| match file.node() {
            Some((number, inode)) => {
                let holder = directory::number(number)?;
                reply_facts(&holder.facts(inode)?, ask)
            }
            None => reply(file.volume(), ask),
        }),
        None => next(),
    }
}

/// The *at calls: the path, or with AT_EMPTY_PATH and no path the descriptor itself.
fn at_or(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    ask: Ask,
    next: impl FnOnce() -> c_int,
) -> c_int {
    if files::kind(directory) == files::Kind::Protected
        && flags & libc::AT_EMPTY_PATH != 0
        && (path.is_null() || guest_paths::is_empty(path))
    {
        return descriptor_or(directory, ask, next);
    }
    path_or(directory, path, ask, next)
}

const HERE: c_int = libc::AT_FDCWD;

export! {
    fn [stat, stat64, lstat, lstat64](path: *const c_char, to: *mut libc::stat) -> c_int, next =>
        path_or(HERE, path, Ask::Stat(to), next);
    fn [fstat, fstat64](fd: c_int, to: *mut libc::stat) -> c_int, next =>
        descriptor_or(fd, Ask::Stat(to), next);
    fn [fstatat, fstatat64](
        directory: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int,
    ) -> c_int, next => at_or(directory, path, flags, Ask::Stat(to), next);
    // Programs linked before glibc 2.33. Version 1 and 3 are the same structure on x86-64.
    fn [__xstat, __xstat64, __lxstat, __lxstat64](
        version: c_int, path: *const c_char, to: *mut libc::stat,
    ) -> c_int, next => path_or(HERE, path, Ask::Stat(to), next);
    fn [__fxstat, __fxstat64](version: c_int, fd: c_int, to: *mut libc::stat) -> c_int, next =>
        descriptor_or(fd, Ask::Stat(to), next);
    fn [__fxstatat, __fxstatat64](
        version: c_int, directory: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int,
    ) -> c_int, next => at_or(directory, path, flags, Ask::Stat(to), next);
    fn [statx](
        directory: c_int, path: *const c_char, flags: c_int, mask: c_uint, to: *mut libc::statx,
    ) -> c_int, next => at_or(directory, path, flags, Ask::Statx(to), next);

    fn [access, euidaccess, eaccess](path: *const c_char, mode: c_int) -> c_int, next =>
        path_or(HERE, path, Ask::Access(mode), next);
    fn [faccessat](
        directory: c_int, path: *const c_char, mode: c_int, flags: c_int,
    ) -> c_int, next => at_or(directory, path, flags, Ask::Access(mode), next);

    fn [statfs, statfs64](path: *const c_char, to: *mut libc::statfs) -> c_int, next =>
        path_or(HERE, path, Ask::StatFs(to), next);
    fn [fstatfs, fstatfs64](fd: c_int, to: *mut libc::statfs) -> c_int, next =>
        descriptor_or(fd, Ask::StatFs(to), next);
    fn [statvfs, statvfs64](path: *const c_char, to: *mut libc::statvfs) -> c_int, next =>
        path_or(HERE, path, Ask::StatVfs(to), next);
    fn [fstatvfs, fstatvfs64](fd: c_int, to: *mut libc::statvfs) -> c_int, next =>
        descriptor_or(fd, Ask::StatVfs(to), next);
}
