//! The file size limit (RLIMIT_FSIZE) on protected files, which the kernel does not see being
//! written.
//!
//! The limit is read once and again whenever the guest changes it, not at every write: a limit that
//! another process sets (prlimit(2)) is not noticed. A forked child inherits it with its memory.
//!
//! Follows `generic_write_check_limits` and `inode_newsize_ok` of Linux.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use postern_trusted::errno::Errno;

use crate::sys;

/// RLIM_INFINITY.
const UNLIMITED: u64 = u64::MAX;

static FILE_SIZE: AtomicU64 = AtomicU64::new(UNLIMITED);

/// Reads the limit: at the start, and after the guest may have changed it.
pub fn refresh() {
    let mut limit = libc::rlimit { rlim_cur: UNLIMITED, rlim_max: UNLIMITED };
    let resource = libc::RLIMIT_FSIZE as usize;
    // SAFETY: the kernel writes one rlimit64, which has this layout on x86-64, to `limit`.
    let read = sys::check(unsafe {
        let to = (&raw mut limit) as usize;
        sys::syscall6(libc::SYS_prlimit64, 0, resource, 0, to, 0, 0)
    });
    if read.is_ok() {
        FILE_SIZE.store(limit.rlim_cur, Ordering::Relaxed);
    }
}

/// How many of `length` bytes (not 0) may be written at `offset` under the limit and the largest
/// file there can be (`most` bytes).
///
/// # Errors
/// None may: `EFBIG`. The caller reports it and then calls [`TooBig::signal`].
pub fn room(offset: u64, length: u64, most: u64) -> Result<u64, TooBig> {
    let limit = FILE_SIZE.load(Ordering::Relaxed);
    if offset >= limit {
        return Err(TooBig { limited: true });
    }
    if offset >= most {
        return Err(TooBig { limited: false });
    }
    Ok(length.min(limit.min(most) - offset))
}

/// Whether a file of `size` bytes may become `length` bytes long.
///
/// # Errors
/// It may not, as it would grow beyond the limit.
pub fn may_grow(size: u64, length: u64) -> Result<(), TooBig> {
    let limited = length > size && length > FILE_SIZE.load(Ordering::Relaxed);
    if limited { Err(TooBig { limited }) } else { Ok(()) }
}

/// A write that may not happen: `EFBIG`.
#[must_use = "the calling thread may have to be signalled"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// By RLIMIT_FSIZE.
    limited: bool,
}

impl TooBig {
    /// Sends SIGXFSZ to the calling thread where Linux does; answers `EFBIG`. The handler runs
    /// inside: call with nothing held.
    pub fn signal(self) -> Errno {
        if self.limited {
            let [process, thread] = [sys::getpid(), sys::gettid()].map(|id| id as usize);
            let signal = libc::SIGXFSZ as usize;
            // SAFETY: sends a signal to the calling thread; takes no pointers.
            unsafe { sys::syscall6(libc::SYS_tgkill, process, thread, signal, 0, 0, 0) };
        }
        Errno::EFBIG
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_cut_at_the_largest_file_and_refused_beyond_it() {
        assert_eq!(room(90, 20, 100), Ok(10));
        assert_eq!(room(99, 1, 100), Ok(1));
        assert_eq!(room(100, 1, 100), Err(TooBig { limited: false }));
        assert_eq!(room(0, 7, 100), Ok(7));
    }

    #[test]
    fn without_a_limit_a_file_may_grow_to_any_size() {
        assert_eq!(may_grow(0, u64::MAX), Ok(()));
    }
}
