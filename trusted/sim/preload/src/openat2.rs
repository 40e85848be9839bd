//! openat2(2) on protected paths.
//!
//! Follows Linux's `build_open_flags` and the RESOLVE_* flags of path_lookup. A protected directory
//! counts as a file system of its own (RESOLVE_NO_XDEV); there are no links in it to be refused.

use core::ffi::{c_char, c_int};

use postern_sim::{directory, files, files::path::Normal, guest, runtime};
use postern_trusted::errno::Errno;

use crate::guest_paths;

/// Bytes of the first and only version of `struct open_how`.
const HOW_BYTES: u64 = 24;
/// Most bytes that the kernel looks at.
const MOST_HOW_BYTES: u64 = 4096;

const NO_XDEV: u64 = 0x01;
const BENEATH: u64 = 0x08;
const IN_ROOT: u64 = 0x10;
const CACHED: u64 = 0x20;
/// With NO_MAGICLINKS and NO_SYMLINKS, which find nothing to refuse.
const KNOWN: u64 = 0x3f;

/// O_LARGEFILE of a 64-bit kernel.
const LARGE_FILE: c_int = 0o100_000;
/// O_TMPFILE without the O_DIRECTORY in it.
const UNNAMED: c_int = libc::O_TMPFILE & !libc::O_DIRECTORY;
/// Flags that the kernel knows.
const VALID: c_int = libc::O_ACCMODE
    | libc::O_CREAT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_TRUNC
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_ASYNC
    | libc::O_DIRECT
    | LARGE_FILE
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_CLOEXEC
    | libc::O_PATH
    | libc::O_TMPFILE;
/// Those that O_PATH goes together with.
const WITH_PATH: c_int = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;

/// `struct open_how`, checked.
struct How {
    flags: c_int,
    mode: u32,
    resolve: u64,
}

impl How {
    fn read(at: u64, bytes: u64) -> Result<Self, Errno> {
        if bytes < HOW_BYTES {
            return Err(Errno::EINVAL);
        }
        if bytes > MOST_HOW_BYTES {
            return Err(Errno(libc::E2BIG));
        }
        let word = |n: u64| guest::read_u64(at.checked_add(8 * n).ok_or(Errno::EFAULT)?);
        for n in HOW_BYTES / 8..bytes / 8 {
            if word(n)? != 0 {
                return Err(Errno(libc::E2BIG));
            }
        }
        Self::check(word(0)?, word(1)?, word(2)?)
    }

    fn check(flags: u64, mode: u64, resolve: u64) -> Result<Self, Errno> {
        let flags = i32::try_from(flags).map_err(|_| Errno::EINVAL)?;
        let creates = flags & (libc::O_CREAT | UNNAMED) != 0;
        let allowed = if creates { 0o7777 } else { 0 };
        let unnamed = flags & UNNAMED != 0;
        let wrong = flags & !VALID != 0
            || resolve & !KNOWN != 0
            || resolve & BENEATH != 0 && resolve & IN_ROOT != 0
            || mode & !allowed != 0
            || flags & libc::O_CREAT != 0 && flags & libc::O_DIRECTORY != 0
            || unnamed && flags & libc::O_DIRECTORY == 0
            || unnamed && flags & libc::O_ACCMODE == libc::O_RDONLY
            || flags & libc::O_PATH != 0 && flags & !WITH_PATH != 0;
        if wrong {
            return Err(Errno::EINVAL);
        }
        if resolve & CACHED != 0 && (creates || flags & libc::O_TRUNC != 0) {
            return Err(Errno::EAGAIN);
        }
        Ok(Self { flags, mode: u32::try_from(mode).map_err(|_| Errno::EINVAL)?, resolve })
    }
}

/// What leads out of the directory that it has to stay beneath.
const OUT: Errno = Errno::EXDEV;

/// `path` from `base`, which it must not leave: BENEATH and IN_ROOT. `None` for what is too long to
/// be compared.
fn scoped(base: &[u8], path: &[u8], in_root: bool) -> Option<Result<Normal, Errno>> {
    if path.first() == Some(&b'/') && !in_root {
        return Some(Err(OUT));
    }
    let mut inner: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if inner.pop().is_none() && !in_root => return Some(Err(OUT)),
            b".." => {}
            name => inner.push(name),
        }
    }
    let last = path.rsplit(|&byte| byte == b'/').next()?;
    let slash: &[u8] = if matches!(last, b"" | b"." | b"..") { b"/." } else { b"" };
    let from_here = [b"./".as_slice(), &inner.join(&b'/'), slash].concat();
    Normal::new(base, &from_here).map(Ok)
}

/// Opens what the path names, if that is protected; `None`: the kernel's.
pub fn open(
    directory: c_int,
    path: *const c_char,
    how: u64,
    bytes: u64,
) -> Option<Result<c_int, Errno>> {
    let mut room = [0; guest::PATH_ROOM];
    let text = guest::read_path(path as u64, &mut room).ok().filter(|text| !text.is_empty())?;
    let resolve = guest::read_u64(how.checked_add(16)?).ok()?;
    let mut base = [0; guest::PATH_ROOM];
    let base = guest_paths::base_of(directory, &mut base);
    let from_ours = base.is_some_and(|base| directory::find(base, true).is_some());
    let way = match resolve & (BENEATH | IN_ROOT) {
        0 => Ok(guest_paths::absolute(directory, path)?),
        one => scoped(base?, text, one == IN_ROOT)?,
    };
    let ours = |path: &Normal| {
        directory::find(path.as_bytes(), path.directory).is_some()
            || runtime::volume_of(path.as_bytes()).is_some()
    };
    let to_ours = way.as_ref().is_ok_and(ours);
    if !from_ours && !to_ours {
        return None;
    }
    let crosses = from_ours != to_ours || text.first() == Some(&b'/');
    let how = match How::read(how, bytes) {
        Ok(how) => how,
        Err(errno) => return Some(Err(errno)),
    };
    match way {
        Err(out) => Some(Err(out)),
        Ok(_) if crosses && how.resolve & NO_XDEV != 0 => Some(Err(Errno::EXDEV)),
        Ok(_) if !to_ours => None,
        Ok(path) => Some(open_there(&path, &how)),
    }
}

fn open_there(path: &Normal, how: &How) -> Result<c_int, Errno> {
    if let Some(place) = directory::find(path.as_bytes(), path.directory) {
        return directory::open(&place, how.flags, how.mode);
    }
    if path.directory {
        return Err(Errno::ENOTDIR);
    }
    files::open(runtime::volume_of(path.as_bytes()).ok_or(Errno::ENOENT)?, how.flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_open_would_ignore_are_refused_as_linux_refuses_them() {
        let check = |flags: i32, mode, resolve| {
            How::check(u64::from(flags.cast_unsigned()), mode, resolve).map(|how| how.mode)
        };
        assert_eq!(
            check(libc::O_RDWR | libc::O_CREAT, 0o600, KNOWN & !IN_ROOT & !CACHED),
            Ok(0o600)
        );
        for (flags, mode, resolve) in [
            (libc::O_RDWR, 0o600, 0),
            (libc::O_CREAT | libc::O_DIRECTORY, 0, 0),
            (libc::O_CREAT, 0o10000, 0),
            (libc::O_TMPFILE, 0o600, 0),
            (libc::O_PATH | libc::O_RDWR, 0, 0),
            (0x0800_0000, 0, 0),
            (0, 0, 0x40),
            (0, 0, BENEATH | IN_ROOT),
        ] {
            assert_eq!(check(flags, mode, resolve), Err(Errno::EINVAL), "{flags:o} {resolve:x}");
        }
        assert_eq!(check(libc::O_TRUNC | libc::O_RDWR, 0, CACHED), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_scoped_path_stays_in_its_directory() {
        let to = |path: &str, in_root| match scoped(b"/srv/vault", path.as_bytes(), in_root) {
            Some(Ok(path)) => String::from_utf8_lossy(path.as_bytes()).into_owned(),
            Some(Err(_)) => "out".to_owned(),
            None => "nothing".to_owned(),
        };
        assert_eq!(to("a/../b", false), "/srv/vault/b");
        assert_eq!(to("a/../../b", false), "out");
        assert_eq!(to("/a", false), "out");
        assert_eq!(to("a/../../../b", true), "/srv/vault/b");
        assert_eq!(to("/", true), "/srv/vault");
        assert_eq!(to("..", true), "/srv/vault");
    }
}
