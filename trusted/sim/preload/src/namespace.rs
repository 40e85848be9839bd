//! Calls that change names and attributes. A protected file is like a mount point: it cannot be
//! renamed (`EBUSY`), and nothing can be put in its place (`EEXIST`, `EXDEV`). Removing one that
//! nobody has open empties it.
//!
//! Mode and owner are fixed (0600, the caller); asking for what is there already succeeds,
//! everything else is `EPERM`. In a protected directory all of it is real;
//! links and special files cannot be made there (`EPERM`).

use core::ffi::{c_char, c_int, c_uint};

use postern_sim::{
    directory::{self, Change, Place},
    files, guest,
    runtime::OpenVolume,
    sys,
};
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

/// What `job` answers if the path is in a protected directory; else as [`refuse`].
fn place_or(
    directory: c_int,
    path: *const c_char,
    (job, errno): (impl FnOnce(&Place) -> Result<(), Errno>, Errno),
    next: impl FnOnce() -> c_int,
) -> c_int {
    match guest_paths::place(directory, path) {
        Some(place) => answer(|| job(&place).map(|()| 0)),
        None => refuse(directory, path, errno, next),
    }
}

/// unlink(2): `job` in a protected directory, else a volume.
fn unlink_or(
    directory: c_int,
    path: *const c_char,
    job: impl FnOnce(&Place) -> Result<(), Errno>,
    next: impl FnOnce() -> c_int,
) -> c_int {
    if let Some(place) = guest_paths::place(directory, path) {
        return answer(|| job(&place).map(|()| 0));
    }
    match guest_paths::find(directory, path) {
        Some(found) if found.directory => answer(|| Err(Errno::ENOTDIR)),
        Some(found) => answer(|| files::remove(found.index).map(|()| 0)),
        None => next(),
    }
}

/// A new name in a protected directory: refused. An old one that is to have a second: too.
fn link_or(
    (from_directory, from): (c_int, *const c_char),
    (to_directory, to): (c_int, *const c_char),
    next: impl FnOnce() -> c_int,
) -> c_int {
    let places = [(from_directory, from), (to_directory, to)]
        .map(|(directory, path)| guest_paths::place(directory, path));
    match places {
        [None, None] => {
            refuse_either((from_directory, from, Errno::EXDEV), (to_directory, to, EXISTS), next)
        }
        [Some(from), Some(to)] if from.directory == to.directory => answer(|| {
            directory::stat(&from)?;
            directory::refuse_new(&to).map(|()| 0)
        }),
        _ => answer(|| Err(Errno::EXDEV)),
    }
}

fn rename_or(
    (from_directory, from): (c_int, *const c_char),
    (to_directory, to): (c_int, *const c_char),
    flags: c_uint,
    next: impl FnOnce() -> c_int,
) -> c_int {
    let places = [(from_directory, from), (to_directory, to)]
        .map(|(directory, path)| guest_paths::place(directory, path));
    match places {
        [None, None] => refuse_either((from_directory, from, BUSY), (to_directory, to, BUSY), next),
        [Some(from), Some(to)] => answer(|| directory::rename(&from, &to, flags).map(|()| 0)),
        _ => answer(|| Err(Errno::EXDEV)),
    }
}

/// A change of attributes by path.
fn change_or(
    directory: c_int,
    path: *const c_char,
    (change, fixed): (Change, impl FnOnce() -> Result<c_int, Errno>),
    next: impl FnOnce() -> c_int,
) -> c_int {
    match guest_paths::place(directory, path) {
        Some(place) => answer(|| directory::change_at(&place, change).map(|()| 0)),
        None if at(directory, path) => answer(fixed),
        None => next(),
    }
}

/// A change of attributes by descriptor.
fn change_fd_or(
    fd: c_int,
    (change, fixed): (Change, impl FnOnce() -> Result<c_int, Errno>),
    next: impl FnOnce() -> c_int,
) -> c_int {
    let Some(file) = files::lookup(fd) else { return next() };
    answer(|| match file.node() {
        Some(_) if file.is_path() => Err(Errno::EBADF),
        Some((number, inode)) => directory::change(number, inode, change).map(|()| 0),
        None => fixed(),
    })
}

/// The times of utimensat(2); null is now.
fn times_of(times: *const libc::timespec) -> Result<Change, Errno> {
    let now = files::io::wall_ns();
    if times.is_null() {
        return Ok(Change::Times([Some(now); 2], true));
    }
    let mut both = [None; 2];
    let mut touch = true;
    for (number, time) in both.iter_mut().enumerate() {
        let at = times as u64 + 16 * number as u64;
        let [seconds, nanoseconds] =
            [guest::read_u64(at)?, guest::read_u64(at + 8)?].map(u64::cast_signed);
        *time = match nanoseconds {
            libc::UTIME_NOW => Some(now),
            libc::UTIME_OMIT => None,
            0..1_000_000_000 => {
                touch = false;
                Some(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds))
            }
            _ => return Err(Errno::EINVAL),
        };
        touch &= time.is_some();
    }
    Ok(Change::Times(both, touch))
}

/// The times of utimes(3) and utime(3): pairs of seconds and microseconds, or seconds alone.
fn coarse_times_of(times: *const u8, microseconds: bool) -> Result<Change, Errno> {
    if times.is_null() {
        return times_of(core::ptr::null());
    }
    let mut both = [None; 2];
    for (number, time) in both.iter_mut().enumerate() {
        let at = times as u64 + if microseconds { 16 } else { 8 } * number as u64;
        let seconds = guest::read_u64(at)?.cast_signed();
        let rest = if microseconds { guest::read_u64(at + 8)?.cast_signed() } else { 0 };
        if !(0..1_000_000).contains(&rest) {
            return Err(Errno::EINVAL);
        }
        *time = Some(seconds.saturating_mul(1_000_000_000).saturating_add(rest * 1000));
    }
    Ok(Change::Times(both, false))
}

fn times_or(
    directory: c_int,
    path: *const c_char,
    times: impl FnOnce() -> Result<Change, Errno>,
    next: impl FnOnce() -> c_int,
) -> c_int {
    match guest_paths::place(directory, path) {
        Some(place) => answer(|| directory::change_at(&place, times()?).map(|()| 0)),
        None => match guest_paths::find(directory, path) {
            Some(found) => answer(|| set_times(&*files::attributes::hold(found.index)?, times()?)),
            None => next(),
        },
    }
}

/// utimensat(2) on a volume.
fn set_times(volume: &OpenVolume, times: Change) -> Result<c_int, Errno> {
    match times {
        Change::Times([None, None], _) => {}
        Change::Times(times, _) => volume.set_times(times)?,
        Change::Mode(_) | Change::Owner(..) => return Err(Errno::EINVAL),
    }
    Ok(0)
}

fn fd_times_or(
    fd: c_int,
    times: impl FnOnce() -> Result<Change, Errno>,
    next: impl FnOnce() -> c_int,
) -> c_int {
    let Some(file) = files::lookup(fd) else { return next() };
    answer(|| match file.node() {
        Some(_) if file.is_path() => Err(Errno::EBADF),
        Some((number, inode)) => directory::change(number, inode, times()?).map(|()| 0),
        None if file.is_path() => Err(Errno::EBADF),
        None => set_times(file.volume(), times()?),
    })
}

fn remove_file(place: &Place) -> Result<(), Errno> {
    directory::remove(place, false)
}

fn remove_directory(place: &Place) -> Result<(), Errno> {
    directory::remove(place, true)
}

/// remove(3): whatever it is.
fn remove_any(place: &Place) -> Result<(), Errno> {
    remove_file(place).or_else(|errno| match errno {
        Errno::EISDIR => remove_directory(place),
        other => Err(other),
    })
}

/// mknod(2) of a regular file makes one.
fn make_node(mode: c_uint) -> impl FnOnce(&Place) -> Result<(), Errno> {
    move |place| match mode & libc::S_IFMT {
        0 | libc::S_IFREG => {
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
            files::close(directory::open(place, flags, mode)?)
        }
        _ => directory::refuse_new(place),
    }
}

/// A link there is none of.
fn read_link(place: &Place) -> Result<isize, Errno> {
    directory::stat(place).and(Err(Errno::EINVAL))
}

/// An extended attribute there is none of.
fn no_attribute(place: &Place) -> Result<isize, Errno> {
    directory::stat(place).and(Err(Errno(libc::ENODATA)))
}

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
    fn [unlink](path: *const c_char) -> c_int, next =>
        unlink_or(HERE, path, remove_file, next);
    fn [remove](path: *const c_char) -> c_int, next =>
        unlink_or(HERE, path, remove_any, next);
    fn [unlinkat](directory: c_int, path: *const c_char, flags: c_int) -> c_int, next => {
        let is_rmdir = flags & libc::AT_REMOVEDIR != 0;
        let job = |place: &Place| match flags & !libc::AT_REMOVEDIR {
            0 => directory::remove(place, is_rmdir),
            _ => Err(Errno::EINVAL),
        };
        if is_rmdir {
            place_or(directory, path, (job, Errno::ENOTDIR), next)
        } else {
            unlink_or(directory, path, job, next)
        }
    };
    fn [rmdir](path: *const c_char) -> c_int, next =>
        place_or(HERE, path, (remove_directory, Errno::ENOTDIR), next);
    fn [rename](from: *const c_char, to: *const c_char) -> c_int, next =>
        rename_or((HERE, from), (HERE, to), 0, next);
    fn [renameat](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
    ) -> c_int, next => rename_or((from_directory, from), (to_directory, to), 0, next);
    fn [renameat2](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
        flags: c_uint,
    ) -> c_int, next => rename_or((from_directory, from), (to_directory, to), flags, next);
    fn [link](from: *const c_char, to: *const c_char) -> c_int, next =>
        link_or((HERE, from), (HERE, to), next);
    fn [linkat](
        from_directory: c_int, from: *const c_char, to_directory: c_int, to: *const c_char,
        flags: c_int,
    ) -> c_int, next => link_or((from_directory, from), (to_directory, to), next);
    fn [symlink](target: *const c_char, path: *const c_char) -> c_int, next =>
        place_or(HERE, path, (directory::refuse_new, EXISTS), next);
    fn [symlinkat](target: *const c_char, directory: c_int, path: *const c_char) -> c_int, next =>
        place_or(directory, path, (directory::refuse_new, EXISTS), next);
    fn [mkdir](path: *const c_char, mode: c_uint) -> c_int, next =>
        place_or(HERE, path, (|place: &Place| directory::make_directory(place, mode), EXISTS), next);
    fn [mkdirat](directory: c_int, path: *const c_char, mode: c_uint) -> c_int, next => {
        let make = |place: &Place| directory::make_directory(place, mode);
        place_or(directory, path, (make, EXISTS), next)
    };
    fn [mkfifo](path: *const c_char, mode: c_uint) -> c_int, next =>
        place_or(HERE, path, (directory::refuse_new, EXISTS), next);
    fn [mkfifoat](directory: c_int, path: *const c_char, mode: c_uint) -> c_int, next =>
        place_or(directory, path, (directory::refuse_new, EXISTS), next);
    fn [mknod](path: *const c_char, mode: c_uint, device: u64) -> c_int, next =>
        place_or(HERE, path, (make_node(mode), EXISTS), next);
    fn [mknodat](
        directory: c_int, path: *const c_char, mode: c_uint, device: u64,
    ) -> c_int, next => place_or(directory, path, (make_node(mode), EXISTS), next);

    fn [readlink](path: *const c_char, to: *mut c_char, length: usize) -> isize, next =>
        match guest_paths::place(HERE, path) {
            Some(place) => answer(|| read_link(&place)),
            None if at(HERE, path) => answer(|| Err(Errno::EINVAL)),
            None => next(),
        };
    fn [readlinkat](
        directory: c_int, path: *const c_char, to: *mut c_char, length: usize,
    ) -> isize, next => match guest_paths::place(directory, path) {
        Some(place) => answer(|| read_link(&place)),
        None if at(directory, path) => answer(|| Err(Errno::EINVAL)),
        None => next(),
    };

    fn [chmod](path: *const c_char, mode: c_uint) -> c_int, next =>
        change_or(HERE, path, (Change::Mode(mode), || change_mode(mode)), next);
    fn [fchmod](fd: c_int, mode: c_uint) -> c_int, next =>
        change_fd_or(fd, (Change::Mode(mode), || change_mode(mode)), next);
    fn [fchmodat](
        directory: c_int, path: *const c_char, mode: c_uint, flags: c_int,
    ) -> c_int, next =>
        change_or(directory, path, (Change::Mode(mode), || change_mode(mode)), next);
    fn [chown, lchown](path: *const c_char, user: c_uint, group: c_uint) -> c_int, next =>
        change_or(HERE, path, (Change::Owner(user, group), || change_owner(user, group)), next);
    fn [fchown](fd: c_int, user: c_uint, group: c_uint) -> c_int, next =>
        change_fd_or(fd, (Change::Owner(user, group), || change_owner(user, group)), next);
    fn [fchownat](
        directory: c_int, path: *const c_char, user: c_uint, group: c_uint, flags: c_int,
    ) -> c_int, next => {
        let change = (Change::Owner(user, group), || change_owner(user, group));
        if flags & libc::AT_EMPTY_PATH != 0 && guest_paths::is_empty(path) {
            change_fd_or(directory, change, next)
        } else {
            change_or(directory, path, change, next)
        }
    };
    fn [futimens](fd: c_int, times: *const libc::timespec) -> c_int, next =>
        fd_times_or(fd, || times_of(times), next);
    fn [utimensat](
        directory: c_int, path: *const c_char, times: *const libc::timespec, flags: c_int,
    ) -> c_int, next =>
        if path.is_null() && is_protected(directory) {
            fd_times_or(directory, || times_of(times), next)
        } else {
            times_or(directory, path, || times_of(times), next)
        };
    fn [utimes, lutimes](path: *const c_char, times: *const u8) -> c_int, next =>
        times_or(HERE, path, || coarse_times_of(times, true), next);
    fn [utime](path: *const c_char, times: *const u8) -> c_int, next =>
        times_or(HERE, path, || coarse_times_of(times, false), next);
    fn [futimes](fd: c_int, times: *const u8) -> c_int, next =>
        fd_times_or(fd, || coarse_times_of(times, true), next);

    // Extended attributes: none, and none can be set.
    fn [fsetxattr](
        fd: c_int, name: *const c_char, value: *const u8, length: usize, flags: c_int,
    ) -> c_int, next => decide(is_protected(fd), Err(Errno::EOPNOTSUPP), next);
    fn [setxattr, lsetxattr](
        path: *const c_char, name: *const c_char, value: *const u8, length: usize, flags: c_int,
    ) -> c_int, next => {
        let protected = at(HERE, path) || guest_paths::place(HERE, path).is_some();
        decide(protected, Err(Errno::EOPNOTSUPP), next)
    };
    fn [fgetxattr](fd: c_int, name: *const c_char, to: *mut u8, length: usize) -> isize, next =>
        if is_protected(fd) { answer(|| Err(Errno(libc::ENODATA))) } else { next() };
    fn [getxattr, lgetxattr](
        path: *const c_char, name: *const c_char, to: *mut u8, length: usize,
    ) -> isize, next => match guest_paths::place(HERE, path) {
        Some(place) => answer(|| no_attribute(&place)),
        None if at(HERE, path) => answer(|| Err(Errno(libc::ENODATA))),
        None => next(),
    };
    fn [flistxattr](fd: c_int, to: *mut u8, length: usize) -> isize, next =>
        if is_protected(fd) { 0 } else { next() };
    fn [listxattr, llistxattr](path: *const c_char, to: *mut u8, length: usize) -> isize, next =>
        match guest_paths::place(HERE, path) {
            Some(place) => answer(|| directory::stat(&place).map(|_| 0)),
            None if at(HERE, path) => 0,
            None => next(),
        };
}
