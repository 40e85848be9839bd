//! The lease of a host file, as everybody on the host sees it: who may use the volume in it now.
//!
//! Two locks on the open file description that does the I/O, both known to the kernel alone, so
//! that nothing is left behind by whoever dies:
//!
//! - **flock(2) is the lease**: exclusive for one writer, shared for readers.
//! - **A mark is the wish**: a shared record lock (fcntl(2), `F_OFD_SETLK`) on a byte far behind
//!   any volume. Whoever waits for the lease has it; whoever holds the lease looks for it with
//!   `F_OFD_GETLK` and hands over when it can. Bytes of one range say that somebody wants to be
//!   alone, bytes of another that somebody wants to read; which byte it is says since when
//!   (microseconds of the host's monotonic clock). So the oldest wish is seen by all, and goes
//!   first.
//!
//! Holds: two that may not have a file at once never do, whatever the marks say: a mark is only a
//! wish. A mark goes with the descriptor that made it. Nobody who waits is passed twice by the same
//! one, if it looks as often as [`RETRY`] says: who had the lease and wants it again has the
//! younger wish then.
//! Does not hold: that a holder ever lets go; the order against one who has waited for
//! two seconds and no longer lets anybody go first (who is first may be stopped). On a file system
//! that makes flock(2) a record lock (NFS) marks cannot be set, so a holder is never asked, and
//! nobody goes first.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

/// Where the marks lie, in bytes: in the last quarter of what a file offset can say.
const MARKS: i64 = 3 << 61;
/// Bytes of one kind of marks: 35 years.
const KIND: i64 = 1 << 50;
/// How long one who waits lets older wishes go first.
const YIELDS: Duration = Duration::from_secs(2);
/// Wishes that are so much apart at least have an order, in microseconds: a try that is repeated on
/// another descriptor does not give way to itself.
const APART: i64 = 1000;
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
    /// First byte of its marks.
    const fn marks(self) -> i64 {
        match self {
            Self::Alone => MARKS,
            Self::Shared => MARKS + KIND,
        }
    }

    /// What one who has it keeps others from.
    const fn excludes(self) -> &'static [Self] {
        match self {
            Self::Alone => &[Self::Alone, Self::Shared],
            Self::Shared => &[Self::Alone],
        }
    }
}

/// When `since` was, as a mark says it.
fn time_of(since: Instant) -> i64 {
    let waited = i64::try_from(since.elapsed().as_micros()).unwrap_or(KIND);
    let now = clock_gettime(ClockId::Monotonic);
    let now = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
    now.saturating_sub(waited).clamp(0, KIND - 1)
}

/// Takes the lease if it is free and nobody wants it longer; `since` is when the caller has tried
/// first. Takes the caller's mark away when it answers `true`.
///
/// # Errors
/// As flock(2), except `EWOULDBLOCK`, which is the answer `false`.
pub fn take(file: impl AsFd, usage: Use, since: Instant) -> Result<bool, Errno> {
    let operation = match usage {
        Use::Alone => FlockOperation::NonBlockingLockExclusive,
        Use::Shared => FlockOperation::NonBlockingLockShared,
    };
    let older = time_of(since) - APART;
    let yields = since.elapsed() < YIELDS;
    if yields && usage.excludes().iter().any(|other| is_marked(&file, *other, older)) {
        return Ok(false);
    }
    match flock(&file, operation) {
        Ok(()) => {
            // It goes with the descriptor at the latest.
            let _ = record_lock(&file, libc::F_OFD_SETLK, libc::F_UNLCK, MARKS, 2 * KIND);
            Ok(true)
        }
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Marks the file: the caller waits for the lease, since `since`. The mark stays until [`take`]
/// succeeds or the descriptor is closed.
///
/// # Errors
/// As fcntl(2): the file system takes no record locks, or its flock(2) is one.
pub fn ask(file: impl AsFd, usage: Use, since: Instant) -> Result<(), Errno> {
    let place = usage.marks() + time_of(since);
    record_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, place, 1).map(|_| ())
}

/// Whether somebody waits for what the caller holds for `usage`.
pub fn is_wanted(file: impl AsFd, usage: Use) -> bool {
    usage.excludes().iter().any(|other| is_marked(&file, *other, KIND))
}

/// Takes the lease, waiting for it up to `patience`: then `false`.
///
/// # Errors
/// As [`take`].
pub fn wait(file: impl AsFd, usage: Use, patience: Duration) -> Result<bool, Errno> {
    let begun = Instant::now();
    let mut asked = false;
    loop {
        let waited = begun.elapsed();
        if take(&file, usage, begun)? {
            return Ok(true);
        }
        if waited >= patience {
            return Ok(false);
        }
        if !asked {
            // Nobody is asked where there are no marks, but the lease may come free all the same.
            let _ = ask(&file, usage, begun);
            asked = true;
        }
        std::thread::sleep(RETRY);
    }
}

/// Whether another open file description has a mark of this kind that is older than `time`.
fn is_marked(file: impl AsFd, usage: Use, time: i64) -> bool {
    if time <= 0 {
        return false;
    }
    // A write lock there is what any mark is in the way of.
    let found = record_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, usage.marks(), time);
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

    fn three() -> (tempfile::TempDir, [File; 3]) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("volume");
        std::fs::write(&path, [0; 4096]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let files = [open(), open(), open()];
        (directory, files)
    }

    /// That long ago.
    fn ago(seconds: u64) -> Instant {
        Instant::now() - Duration::from_secs(seconds)
    }

    /// Longer than anybody gives way.
    fn long_ago() -> Instant {
        ago(20)
    }

    #[test]
    fn one_writer_or_many_readers_have_the_lease() {
        let (_directory, [a, b, c]) = three();
        assert_eq!(take(&a, Use::Shared, long_ago()), Ok(true));
        assert_eq!(take(&b, Use::Shared, long_ago()), Ok(true));
        assert_eq!(take(&c, Use::Alone, long_ago()), Ok(false));
        drop((a, b));
        assert_eq!(take(&c, Use::Alone, long_ago()), Ok(true));
    }

    #[test]
    fn a_holder_hears_of_those_whom_it_keeps_waiting_and_of_nobody_else() {
        let (_directory, [a, b, c]) = three();
        assert_eq!(take(&a, Use::Alone, long_ago()), Ok(true));
        assert!(!is_wanted(&a, Use::Alone));
        ask(&b, Use::Shared, Instant::now()).unwrap();
        assert!(is_wanted(&a, Use::Alone), "a reader waits for a writer");
        assert!(!is_wanted(&a, Use::Shared), "a reader does not wait for a reader");
        ask(&c, Use::Alone, Instant::now()).unwrap();
        assert!(is_wanted(&a, Use::Shared), "a writer waits for a reader");
        assert!(is_wanted(&b, Use::Alone), "one's own mark is not in the way of another's");
        drop((b, c));
        assert!(!is_wanted(&a, Use::Alone), "marks go with those who made them");
        ask(&a, Use::Alone, Instant::now()).unwrap();
        assert!(!is_wanted(&a, Use::Alone), "one's own mark does not count");
    }

    #[test]
    fn the_mark_goes_when_the_lease_comes() {
        let (_directory, [a, b, _]) = three();
        ask(&a, Use::Alone, ago(1)).unwrap();
        assert!(is_wanted(&b, Use::Alone));
        assert_eq!(take(&a, Use::Alone, long_ago()), Ok(true));
        assert!(!is_wanted(&b, Use::Alone));
    }

    #[test]
    fn the_oldest_wish_goes_first_whoever_looks_first() {
        for (first, second) in
            [(Use::Alone, Use::Alone), (Use::Alone, Use::Shared), (Use::Shared, Use::Alone)]
        {
            let (_directory, [a, b, _]) = three();
            // The ages lie far apart, so that it does not matter how long anything here takes; that
            // one gives way at all needs a wish of now.
            ask(&a, first, long_ago()).unwrap();
            let since = Instant::now();
            ask(&b, second, since).unwrap();
            let gives_way = take(&b, second, since) == Ok(false);
            assert!(gives_way || since.elapsed() >= YIELDS, "{second:?} passes {first:?}");
            if gives_way {
                assert_eq!(take(&a, first, long_ago()), Ok(true), "the older wish finds it free");
            }
            // Who has waited long enough gives way to nobody.
            let (_directory, [a, b, _]) = three();
            ask(&a, first, ago(40)).unwrap();
            assert_eq!(take(&b, second, long_ago()), Ok(true));
        }
    }

    #[test]
    fn readers_do_not_wait_for_readers_nor_anybody_for_a_younger_wish() {
        let (_directory, [a, b, _]) = three();
        ask(&a, Use::Shared, long_ago()).unwrap();
        assert_eq!(take(&b, Use::Shared, Instant::now()), Ok(true));
        let since = ago(1);
        let (_directory, [a, b, _]) = three();
        ask(&a, Use::Alone, Instant::now()).unwrap();
        assert_eq!(take(&b, Use::Alone, since), Ok(true));
    }

    #[test]
    fn a_try_that_is_repeated_on_another_descriptor_does_not_give_way_to_itself() {
        let (_directory, [a, b, _]) = three();
        // Its age is computed anew, from two clocks that are not read at once.
        let since = Instant::now();
        ask(&a, Use::Alone, since).unwrap();
        let taken = (0..100).any(|_| take(&b, Use::Alone, since) == Ok(true));
        assert!(taken);
    }

    #[test]
    fn a_wait_without_patience_is_one_try() {
        let (_directory, [a, b, _]) = three();
        assert_eq!(wait(&a, Use::Alone, Duration::ZERO), Ok(true));
        assert_eq!(wait(&b, Use::Alone, Duration::ZERO), Ok(false));
        assert!(!is_wanted(&a, Use::Alone));
    }
}
