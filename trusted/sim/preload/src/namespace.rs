//! Calls that change names and attributes. A protected path is like a mount point: it cannot be
//! removed or renamed (`EBUSY`), and nothing can be put in its place (`EEXIST`, `EXDEV`).
//!
//! Mode and owner are fixed (0600, the caller); times are the family's own. Asking for what is
//! there already succeeds, everything else is `EPERM`.

use core::ffi::{c_char, c_int, c_uint};

use postern_sim::{files, sys};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths,
    next::{answer, export},
};

const HERE: c_int = libc::AT_FDCWD;
const MODE: c_uint = 0o600;
const MODE_BITS: c_uint = 0o7777;
/// "Leave as it is" of chown(2).
const SAME: c_uint = c_uint::MAX;

/// `errno` if the path is protected.
fn refuse(
    directory: c_int,
    path: *const c_char,
    errno: Errno,
    next: impl FnOnce() -> c_int,
) -> c_int {
    if guest_paths::find(directory, path).is_some() { answer(|| Err(errno)) } else { next() }
}

/// Two paths: `first` if that one is protected, `second` if the other one is.
fn refuse_either(
    (from_directory, from, first): (c_int, *const c_char, Errno),
    (to_directory, to, second): (c_int, *const c_char, Errno),
    next: impl FnOnce() -> c_int,
) -> c_int {
    if guest_paths::find(from_directory, from).is_some() {
        return answer(|| Err(first));
    }
    refuse(to_directory, to, second, next)
}

fn change_mode(mode: c_uint) -> Result<c_int, Errno> {
    if mode & MODE_BITS == MODE { Ok(0) } else { Err(Errno::EPERM) }
}

fn change_owner(user: c_uint, group: c_uint) -> Result<c_int, Errno> {
    let (mine, my_group) = sys::effective_ids();
    let same = (user == SAME || user == mine) && (group == SAME || group == my_group);
    if same { Ok(0) } else { Err(Errno::EPERM) }
}

/// A call on a protected path or descriptor that is decided by its arguments alone.
fn decide(protected: bool, result: Result<c_int, Errno>, next: impl FnOnce() -> c_int) -> c_int {
    if protected { answer(|| result) } else { next() }
}

fn at(directory: c_int, path: *const c_char) -> bool {
    guest_paths::find(directory, path).is_some()
}

fn is_protected(fd: c_int) -> bool {
    files::kind(fd) == files::Kind::Protected
}

const BUSY: Errno = Errno::EBUSY;
const EXISTS: Errno = Errno::EEXIST;

export! {
    fn [unlink, remove](path: *const c_char) -> c_int, next => refuse(HERE, path, BUSY, next);
    fn [unlinkat](directory: c_int, path: *const c_char, flags: c_int) -> c_int, next => {
        let is_rmdir = flags & libc::AT_REMOVEDIR != 0;
        refuse(directory, path, if is_rmdir { Errno::ENOTDIR } else { BUSY }, next)
    };
    fn [rmdir](path: *const c_char) -> c_int, next => refuse(HERE, path, Errno::ENOTDIR, next);
    fn [rename](from: *const c_char, to: *const c_char) -> c_int, next =>
        refuse_either((HERE, from, BUSY), (HERE, to, BUSY), next);
    fn [renameat](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
    ) -> c_int, next =>
        refuse_either((from_directory, from, BUSY), (to_directory, to, BUSY), next);
    fn [renameat2](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
        flags: c_uint,
    ) -> c_int, next =>
        refuse_either((from_directory, from, BUSY), (to_directory, to, BUSY), next);
    fn [link](from: *const c_char, to: *const c_char) -> c_int, next =>
        refuse_either((HERE, from, Errno::EXDEV), (HERE, to, EXISTS), next);
    fn [linkat](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
        flags: c_int,
    ) -> c_int, next =>
        refuse_either((from_directory, from, Errno::EXDEV), (to_directory, to, EXISTS), next);
    fn [symlink](target: *const c_char, path: *const c_char) -> c_int, next =>
        refuse(HERE, path, EXISTS, next);
    fn [symlinkat](target: *const c_char, directory: c_int, path: *const c_char) -> c_int, next =>
        refuse(directory, path, EXISTS, next);
    fn [mkdir, mkfifo](path: *const c_char, mode: c_uint) -> c_int, next =>
        refuse(HERE, path, EXISTS, next);
    fn [mkdirat, mkfifoat](
        directory: c_int, path: *const c_char, mode: c_uint,
    ) -> c_int, next => refuse(directory, path, EXISTS, next);
    fn [mknod](path: *const c_char, mode: c_uint, device: u64) -> c_int, next =>
        refuse(HERE, path, EXISTS, next);
    fn [mknodat](
        directory: c_int, path: *const c_char, mode: c_uint, device: u64,
    ) -> c_int, next => refuse(directory, path, EXISTS, next);
    fn [chdir](path: *const c_char) -> c_int, next => refuse(HERE, path, Errno::ENOTDIR, next);
    fn [fchdir](fd: c_int) -> c_int, next => decide(is_protected(fd), Err(Errno::ENOTDIR), next);

    fn [readlink](path: *const c_char, to: *mut c_char, length: usize) -> isize, next =>
        if at(HERE, path) { answer(|| Err(Errno::EINVAL)) } else { next() };
    fn [readlinkat](
        directory: c_int, path: *const c_char, to: *mut c_char, length: usize,
    ) -> isize, next => if at(directory, path) { answer(|| Err(Errno::EINVAL)) } else { next() };

    fn [chmod](path: *const c_char, mode: c_uint) -> c_int, next =>
        decide(at(HERE, path), change_mode(mode), next);
    fn [fchmod](fd: c_int, mode: c_uint) -> c_int, next =>
        decide(is_protected(fd), change_mode(mode), next);
    fn [fchmodat](
        directory: c_int, path: *const c_char, mode: c_uint, flags: c_int,
    ) -> c_int, next => decide(at(directory, path), change_mode(mode), next);
    fn [chown, lchown](path: *const c_char, user: c_uint, group: c_uint) -> c_int, next =>
        decide(at(HERE, path), change_owner(user, group), next);
    fn [fchown](fd: c_int, user: c_uint, group: c_uint) -> c_int, next =>
        decide(is_protected(fd), change_owner(user, group), next);
    fn [fchownat](
        directory: c_int, path: *const c_char, user: c_uint, group: c_uint, flags: c_int,
    ) -> c_int, next => decide(at(directory, path), change_owner(user, group), next);
    fn [futimens](fd: c_int, times: *const libc::timespec) -> c_int, next =>
        decide(is_protected(fd), Err(Errno::EPERM), next);
    fn [utimensat](
        directory: c_int, path: *const c_char, times: *const libc::timespec, flags: c_int,
    ) -> c_int, next =>
        decide(
            at(directory, path) || path.is_null() && is_protected(directory),
            Err(Errno::EPERM),
            next,
        );
    fn [utimes, utime, lutimes](path: *const c_char, times: *const u8) -> c_int, next =>
        decide(at(HERE, path), Err(Errno::EPERM), next);
    fn [futimes](fd: c_int, times: *const libc::timeval) -> c_int, next =>
        decide(is_protected(fd), Err(Errno::EPERM), next);

    // Extended attributes: none, and none can be set.
    fn [fsetxattr](
        fd: c_int, name: *const c_char, value: *const u8, length: usize, flags: c_int,
    ) -> c_int, next => decide(is_protected(fd), Err(Errno::EOPNOTSUPP), next);
    fn [setxattr, lsetxattr](
        path: *const c_char, name: *const c_char, value: *const u8, length: usize, flags: c_int,
    ) -> c_int, next => decide(at(HERE, path), Err(Errno::EOPNOTSUPP), next);
    fn [fgetxattr](fd: c_int, name: *const c_char, to: *mut u8, length: usize) -> isize, next =>
        if is_protected(fd) { answer(|| Err(Errno(libc::ENODATA))) } else { next() };
    fn [getxattr, lgetxattr](
        path: *const c_char, name: *const c_char, to: *mut u8, length: usize,
    ) -> isize, next => if at(HERE, path) { answer(|| Err(Errno(libc::ENODATA))) } else { next() };
    fn [flistxattr](fd: c_int, to: *mut u8, length: usize) -> isize, next =>
        if is_protected(fd) { 0 } else { next() };
    fn [listxattr, llistxattr](path: *const c_char, to: *mut u8, length: usize) -> isize, next =>
        if at(HERE, path) { 0 } else { next() };
}
