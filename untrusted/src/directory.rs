//! Directories in which enclaves may make and remove files: the host side of a protected directory.
//!
//! Holds: a name is `index` or an id of 32 lower-case hexadecimal digits, so none leads out of the
//! directory or to anything else in it; symbolic links are not followed; only files with an id are
//! made and removed; a file that somebody has locked is not removed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::problem::Problem;

/// The one name that is not an id: it is opened, never made or removed.
const INDEX: &str = "index";
/// Digits of an id.
const ID_DIGITS: usize = 32;
/// Bytes of a block.
const BLOCK: u64 = 4096;

/// A directory that the operator allowed.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

fn is_id(name: &str) -> bool {
    name.len() == ID_DIGITS && name.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

impl Directory {
    /// Reads `NAME=DIR` and opens the directory.
    ///
    /// # Errors
    /// A malformed pair, a name with a slash, a directory that can not be opened.
    pub fn allow(pair: &OsString) -> Result<(String, Self), Problem> {
        let text = pair.to_string_lossy();
        let form = "write --directory NAME=DIR, NAME without a slash";
        let Some((name, path)) = pair.to_str().and_then(|p| p.split_once('=')) else {
            return Err(Problem::config("not NAME=DIR", text, form));
        };
        if name.is_empty() || name.contains('/') || path.is_empty() {
            return Err(Problem::config("not NAME=DIR", text, form));
        }
        // Not O_PATH: its entries are read.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
            Problem::config(
                format_args!("directory can not be opened ({e})"),
                path,
                "name a directory that exists and that this user may read and write",
            )
        })?;
        Ok((name.to_owned(), Self { path: PathBuf::from(path), fd }))
    }

    fn open(&self, file: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let beneath =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mode =
            if flags.contains(OFlags::CREATE) { Mode::RUSR | Mode::WUSR } else { Mode::empty() };
        let flags = flags | OFlags::CLOEXEC;
        // A rename elsewhere on the host makes BENEATH answer EAGAIN; openat2(2) says: retry.
        for _ in 0..16 {
            match rustix::fs::openat2(&self.fd, file, flags, mode, beneath) {
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// The place behind a name, without opening the file for I/O.
    ///
    /// # Errors
    /// `EACCES` for a name that is neither an id nor the index, else the host's.
    pub fn locate(&self, file: &str) -> Result<(OwnedFd, PathBuf), Errno> {
        if !is_id(file) && file != INDEX {
            return Err(Errno::ACCESS);
        }
        Ok((self.open(file, OFlags::PATH)?, self.path.join(file)))
    }

    /// Makes a sparse file of `blocks` blocks.
    ///
    /// # Errors
    /// `EACCES` for a name that is no id, `EEXIST`, `EFBIG`, else the host's; nothing is left.
    pub fn create(&self, file: &str, blocks: u64) -> Result<(), Errno> {
        if !is_id(file) {
            return Err(Errno::ACCESS);
        }
        let bytes = blocks.checked_mul(BLOCK).filter(|&b| i64::try_from(b).is_ok());
        let bytes = bytes.ok_or(Errno::FBIG)?;
        let fd = self.open(file, OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY)?;
        rustix::fs::ftruncate(&fd, bytes).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&self.fd, file, AtFlags::empty());
        })
    }

    /// Removes a file that nobody has locked.
    ///
    /// # Errors
    /// `EACCES` for a name that is no id, `EBUSY`, else the host's.
    pub fn remove(&self, file: &str) -> Result<(), Errno> {
        if !is_id(file) {
            return Err(Errno::ACCESS);
        }
        // Held until it is gone: whoever opens it now finds it locked.
        let fd = self.open(file, OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK)?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            Errno::WOULDBLOCK => Errno::BUSY,
            e => e,
        })?;
        rustix::fs::unlinkat(&self.fd, file, AtFlags::empty())
    }

    /// Ids above `after`, ascending, at most `most`.
    ///
    /// # Errors
    /// The host's.
    pub fn list(&self, after: &str, most: usize) -> Result<Vec<String>, Errno> {
        let mut found = BTreeSet::new();
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if is_id(name) && name > after {
                found.insert(name.to_owned());
                if found.len() > most {
                    found.pop_last();
                }
            }
        }
        Ok(found.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_32_lower_case_hexadecimal_digits_are_an_id() {
        assert!(is_id("0123456789abcdef0123456789abcdef"));
        for name in [
            "",
            "index",
            "0123456789ABCDEF0123456789abcdef",
            "0123456789abcdef0123456789abcde",
            "0123456789abcdef0123456789abcdef0",
            "../3456789abcdef0123456789abcdef",
            "0123456789abcdef/123456789abcdef",
            "0123456789abcdef\u{e9}23456789abcde",
        ] {
            assert!(!is_id(name), "{name}");
        }
    }
}
