//! The lease of a host file, as everybody on the host sees it: who may use the volume in it now.
//!
//! Two locks on the open file description that does the I/O, both known to the kernel alone, so
//! that nothing is left behind by whoever dies:
//!
//! - **flock(2) is the lease**: exclusive for one writer, shared for readers.
//! - **A mark is the wish**: a shared record lock (fcntl(2), `F_OFD_SETLK`) on a byte far behind
//!   any volume. Whoever waits for the lease has it; whoever holds the lease looks for it with
//!   `F_OFD_GETLK` and hands over when it can. One byte says that somebody wants to be alone, the
//!   next that somebody wants to read.
//!
//! Holds: two that may not have a file at once never do, whatever the marks say: a mark is only a
//! wish. A mark goes with the descriptor that made it.
//! Does not hold: an order among those who wait; that a holder ever lets go. On a file system that
//! makes flock(2) a record lock (NFS) marks cannot be set, so a holder is never asked.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Where the marks lie, in bytes: near the end of what a file offset can say.
const MARKS: i64 = i64::MAX - 4095;
/// How long a reader lets a waiting writer go first.
const READER_YIELDS: Duration = Duration::from_millis(500);
/// How often one who waits tries again.
pub const RETRY: Duration = Duration::from_millis(5);

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To write: nobody else has it.
    Alone,
    /// To read, with others who read.
    Shared,
}

impl Use {
    const fn mark(self) -> i64 {
        match self {
            Self::Alone => MARKS,
            Self::Shared => MARKS + 1,
        }
    }
}

/// Takes the lease if it is free; `waited` is how long the caller has tried. Takes the caller's
/// mark away when it answers `true`.
///
/// # Errors
/// As flock(2), except `EWOULDBLOCK`, which is the answer `false`.
pub fn take(file: impl AsFd, usage: Use, waited: Duration) -> Result<bool, Errno> {
    let operation = match usage {
        Use::Alone => FlockOperation::NonBlockingLockExclusive,
        Use::Shared => FlockOperation::NonBlockingLockShared,
    };
    if usage == Use::Shared && waited < READER_YIELDS && is_marked(&file, Use::Alone) {
        return Ok(false);
    }
    match flock(&file, operation) {
        Ok(()) => {
            // It goes with the descriptor at the latest.
            let _ = record_lock(&file, libc::F_OFD_SETLK, libc::F_UNLCK, MARKS, 2);
            Ok(true)
        }
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Marks the file: the caller waits for the lease. The mark stays until [`take`] succeeds or the
/// descriptor is closed.
///
/// # Errors
/// As fcntl(2): the file system takes no record locks, or its flock(2) is one.
pub fn ask(file: impl AsFd, usage: Use) -> Result<(), Errno> {
    record_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, usage.mark(), 1).map(|_| ())
}

/// Whether somebody waits for what the caller holds for `usage`.
pub fn is_wanted(file: impl AsFd, usage: Use) -> bool {
    is_marked(&file, Use::Alone) || usage == Use::Alone && is_marked(&file, Use::Shared)
}

/// Takes the lease, waiting for it up to `patience`: then `false`.
///
/// # Errors
/// As [`take`].
pub fn wait(file: impl AsFd, usage: Use, patience: Duration) -> Result<bool, Errno> {
    let begun = Instant::now();
    loop {
        let waited = begun.elapsed();
        if take(&file, usage, waited)? {
            return Ok(true);
        }
        if waited >= patience {
            return Ok(false);
        }
        // Nobody is asked where there are no marks, but the lease may come free all the same.
        let _ = ask(&file, usage);
        std::thread::sleep(RETRY);
    }
}

/// Whether another open file description has this mark.
fn is_marked(file: impl AsFd, usage: Use) -> bool {
    // A write lock there is what any mark is in the way of.
    let found = record_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, usage.mark(), 1);
    // Where there are no marks, nobody asks.
    found.is_ok_and(|kind| kind != libc::F_UNLCK)
}

/// fcntl(2) with a record lock; answers the kind that the kernel wrote.
fn record_lock(
    file: impl AsFd,
    command: i32,
    kind: i32,
    start: i64,
    length: i64,
) -> Result<i32, Errno> {
    // SAFETY: all-zero is a valid flock: it has only integers, and l_pid must be 0.
    let mut lock: libc::flock = unsafe { core::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(|_| Errno::INVAL)?;
    lock.l_whence = 0; // SEEK_SET
    (lock.l_start, lock.l_len) = (start, length);
    // SAFETY: `lock` lives through the call, which writes nothing else.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(lock.l_type.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    const LONG: Duration = Duration::from_secs(3600);

    fn three() -> (tempfile::TempDir, [File; 3]) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("volume");
        std::fs::write(&path, [0; 4096]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let files = [open(), open(), open()];
        (directory, files)
    }

    #[test]
    fn one_writer_or_many_readers_have_the_lease() {
        let (_directory, [a, b, c]) = three();
        assert_eq!(take(&a, Use::Shared, LONG), Ok(true));
        assert_eq!(take(&b, Use::Shared, LONG), Ok(true));
        assert_eq!(take(&c, Use::Alone, LONG), Ok(false));
        drop((a, b));
        assert_eq!(take(&c, Use::Alone, LONG), Ok(true));
    }

    #[test]
    fn a_holder_hears_of_those_whom_it_keeps_waiting_and_of_nobody_else() {
        let (_directory, [a, b, c]) = three();
        assert_eq!(take(&a, Use::Alone, LONG), Ok(true));
        assert!(!is_wanted(&a, Use::Alone));
        ask(&b, Use::Shared).unwrap();
        assert!(is_wanted(&a, Use::Alone), "a reader waits for a writer");
        assert!(!is_wanted(&a, Use::Shared), "a reader does not wait for a reader");
        ask(&c, Use::Alone).unwrap();
        assert!(is_wanted(&a, Use::Shared), "a writer waits for a reader");
        assert!(is_wanted(&b, Use::Alone), "one's own mark is not in the way of another's");
        drop((b, c));
        assert!(!is_wanted(&a, Use::Alone), "marks go with those who made them");
        ask(&a, Use::Alone).unwrap();
        assert!(!is_wanted(&a, Use::Alone), "one's own mark does not count");
    }

    #[test]
    fn the_mark_goes_when_the_lease_comes() {
        let (_directory, [a, b, _c]) = three();
        ask(&a, Use::Alone).unwrap();
        assert!(is_wanted(&b, Use::Alone));
        assert_eq!(take(&a, Use::Alone, LONG), Ok(true));
        assert!(!is_wanted(&b, Use::Alone));
    }

    #[test]
    fn a_reader_lets_a_waiting_writer_go_first_for_a_while() {
        let (_directory, [a, b, c]) = three();
        assert_eq!(take(&a, Use::Shared, LONG), Ok(true));
        ask(&b, Use::Alone).unwrap();
        assert_eq!(take(&c, Use::Shared, Duration::ZERO), Ok(false));
        assert_eq!(take(&c, Use::Shared, READER_YIELDS), Ok(true));
    }

    #[test]
    fn a_wait_without_patience_is_one_try() {
        let (_directory, [a, b, _c]) = three();
        assert_eq!(wait(&a, Use::Alone, Duration::ZERO), Ok(true));
        assert_eq!(wait(&b, Use::Alone, Duration::ZERO), Ok(false));
        assert!(!is_wanted(&a, Use::Alone));
    }
}
