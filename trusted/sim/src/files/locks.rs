//! Advisory locks on protected files: byte ranges (fcntl), open-file-description locks, flock.
//!
//! All programs that can reach a protected file are of one family, so its arena holds the locks. A
//! byte-range lock belongs to a process, the other two kinds to an open file, whichever processes
//! share it by fork or exec.
//!
//! Holds: a lock ends with what it belongs to. A signal handler runs while its thread waits, and ends
//! the wait or not as it does in Linux ([`inside::RESTART`]).
//! Does not hold: the locks of an open file whose last process the host killed stay until the family
//! ends; a deadlock is found among byte-range locks of processes alone, as in Linux.
//!
//! Follows Linux fs/locks.c.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU32, Ordering};
use std::collections::BTreeMap;

use postern_trusted::{
    errno::Errno,
    platform::{Fault, GuestMemory},
    sync::Lock,
};

use super::OpenFile;
use crate::{death, family::family, guest, identity, inside, service, sys};

/// Who waits looks this often whether the holder still lives: one that the host killed tells nobody.
const LOOK_NS: i64 = 250_000_000;
const NO_LOCKS: Errno = Errno(libc::ENOLCK);
const DEADLOCK: Errno = Errno(libc::EDEADLK);
/// Last byte that a lock can cover: OFFSET_MAX.
const LAST: u64 = i64::MAX as u64;

/// Whose lock it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// A process.
    Process(u32),
    /// An open file, by its number.
    Open(u64),
}

/// A locked range, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    write: bool,
    owner: Owner,
}

impl Range {
    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn touches(&self, other: &Self) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }
}

/// Locks of one file.
#[derive(Debug, Default)]
struct OfFile {
    ranges: Vec<Range>,
    /// Open files that hold the whole file, and whether alone.
    whole: Vec<(u64, bool)>,
}

impl OfFile {
    fn conflict(&self, wanted: &Range) -> Option<Range> {
        let hinders = |held: &&Range| {
            held.owner != wanted.owner && held.overlaps(wanted) && (held.write || wanted.write)
        };
        self.ranges.iter().filter(hinders).min_by_key(|held| held.start).copied()
    }

    /// Takes `range` out of its owner's locks.
    fn cut(&mut self, range: &Range) {
        let mut rest = Vec::with_capacity(self.ranges.len() + 2);
        for held in self.ranges.drain(..) {
            if held.owner != range.owner || !held.overlaps(range) {
                rest.push(held);
                continue;
            }
            if held.start < range.start {
                rest.push(Range { end: range.start - 1, ..held });
            }
            if held.end > range.end {
                rest.push(Range { start: range.end + 1, ..held });
            }
        }
        self.ranges = rest;
    }

    /// Gives `range` to its owner, in one piece with what it has beside it.
    fn put(&mut self, mut range: Range) {
        self.cut(&range);
        self.ranges.retain(|held| {
            let one =
                held.owner == range.owner && held.write == range.write && held.touches(&range);
            if one {
                range.start = range.start.min(held.start);
                range.end = range.end.max(held.end);
            }
            !one
        });
        self.ranges.push(range);
    }
}

/// All locks of a family.
pub struct Locks {
    files: Lock<BTreeMap<usize, OfFile>>,
    /// Processes that wait, each with the process that it waits for.
    waits: Lock<Vec<(u32, u32)>>,
    /// Changes whenever a lock ends: what waiters sleep on.
    changes: AtomicU32,
    sleepers: AtomicU32,
}

impl Default for Locks {
    fn default() -> Self {
        Self::new()
    }
}

impl Locks {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self {
            files: Lock::new(BTreeMap::new()),
            waits: Lock::new(Vec::new()),
            changes: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
        }
    }

    /// Runs `job` on the locks of file `index`.
    fn with<T>(&self, index: usize, job: impl FnOnce(&mut OfFile) -> T) -> T {
        job(self.files.lock().entry(index).or_default())
    }

    /// Some lock has ended.
    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex(&self.changes, libc::FUTEX_WAKE, u32::MAX >> 1).ok();
        }
    }

    /// Tries until `attempt` does not answer a hindrance, sleeping in between if `waits`.
    fn acquire(
        &self,
        waits: bool,
        mut attempt: impl FnMut() -> Option<Owner>,
    ) -> Result<(), Errno> {
        let me = identity::process_id();
        // A process that has locks gives them back also when a signal ends it.
        service::start();
        service::wait_for_start();
        loop {
            let seen = self.changes.load(Ordering::SeqCst);
            let Some(holder) = attempt() else { return Ok(()) };
            if let Owner::Process(holder) = holder
                && death::has_ended(holder)
            {
                self.reap();
                continue;
            }
            if !waits {
                return Err(Errno::EAGAIN);
            }
            if let Owner::Process(holder) = holder {
                self.note_wait(me, holder)?;
            }
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let slept = sleep(&self.changes, seen);
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            self.waits.lock().retain(|(waiter, _)| *waiter != me);
            if slept == Err(Errno::EINTR) {
                return Err(inside::interrupted());
            }
        }
    }

    /// Notes that `waiter` waits for `holder`, unless that waits for `waiter` in turn.
    fn note_wait(&self, waiter: u32, holder: u32) -> Result<(), Errno> {
        let mut waits = self.waits.lock();
        // One that was killed amid its wait does not wait any more.
        waits.retain(|(waiter, _)| identity::is_alive(*waiter));
        let mut at = holder;
        for _ in 0..=waits.len() {
            if at == waiter {
                return Err(DEADLOCK);
            }
            let Some((_, next)) = waits.iter().find(|(process, _)| *process == at) else { break };
            at = *next;
        }
        waits.push((waiter, holder));
        Ok(())
    }

    /// Whether anybody holds a lock on file `index`.
    #[must_use]
    pub fn has_any(&self, index: usize) -> bool {
        self.files
            .lock()
            .get(&index)
            .is_some_and(|file| !file.ranges.is_empty() || !file.whole.is_empty())
    }

    fn release(&self, index: usize, owner: Owner) {
        let everything = Range { start: 0, end: LAST, write: false, owner };
        let mut files = self.files.lock();
        let ended = files.get_mut(&index).is_some_and(|file| {
            let before = file.ranges.len() + file.whole.len();
            file.cut(&everything);
            file.whole.retain(|(open, _)| Owner::Open(*open) != owner);
            before != file.ranges.len() + file.whole.len()
        });
        drop(files);
        if ended {
            self.changed();
        }
    }

    /// Ends the locks of processes that have died.
    pub fn reap(&self) {
        let mut ended = false;
        for file in self.files.lock().values_mut() {
            file.ranges.retain(|held| {
                let dead = matches!(held.owner, Owner::Process(id) if death::has_ended(id));
                ended |= dead;
                !dead
            });
        }
        if ended {
            self.changed();
        }
    }
}

/// futex(2) without a timeout, between processes.
///
/// # Errors
/// `EAGAIN`: the word has changed; `EINTR`: a handler ran that does not restart calls.
pub(crate) fn futex(word: &AtomicU32, operation: i32, value: u32) -> Result<usize, Errno> {
    let at = core::ptr::from_ref(word) as usize;
    // SAFETY: a word that outlives the call; no timeout.
    sys::check(unsafe {
        sys::syscall6(libc::SYS_futex, at, operation as usize, value as usize, 0, 0, 0)
    })
}

/// Sleeps until `word` is no longer `seen`, somebody wakes its sleepers, or it is time to look again.
///
/// # Errors
/// `EINTR`: a signal came.
fn sleep(word: &AtomicU32, seen: u32) -> Result<(), Errno> {
    let time = libc::timespec { tv_sec: 0, tv_nsec: LOOK_NS };
    let (at, time) = (core::ptr::from_ref(word) as usize, (&raw const time) as usize);
    // SAFETY: a word that outlives the call, and a timeout that does.
    let slept = unsafe {
        let arguments = [at, libc::FUTEX_WAIT as usize, seen as usize, time, 0, 0];
        inside::interruptible(libc::SYS_futex, arguments, None)
    };
    if slept == Err(Errno::EINTR) { Err(Errno::EINTR) } else { Ok(()) }
}

impl OpenFile {
    /// flock(2).
    ///
    /// # Errors
    /// `EWOULDBLOCK`, `EINTR`, `EINVAL` as flock(2); [`inside::RESTART`].
    pub fn flock(&self, operation: i32) -> Result<(), Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        let locks = &family().ok_or(NO_LOCKS)?.locks;
        let alone = match operation & !libc::LOCK_NB {
            libc::LOCK_UN => {
                let mut ended = false;
                locks.with(self.index, |file| {
                    file.whole.retain(|(open, _)| {
                        ended |= *open == self.number;
                        *open != self.number
                    });
                });
                if ended {
                    locks.changed();
                }
                return Ok(());
            }
            libc::LOCK_SH => false,
            libc::LOCK_EX => true,
            _ => return Err(Errno::EINVAL),
        };
        // Another kind is given up first, and stays so if the new one cannot be had.
        let given_up = locks.with(self.index, |file| {
            let before = file.whole.len();
            file.whole.retain(|held| held.0 != self.number || held.1 == alone);
            before != file.whole.len()
        });
        if given_up {
            locks.changed();
        }
        locks.acquire(operation & libc::LOCK_NB == 0, || {
            locks.with(self.index, |file| {
                let mine = (self.number, alone);
                if file.whole.contains(&mine) {
                    return None;
                }
                let other = file.whole.iter().find(|(_, held_alone)| alone || *held_alone);
                if let Some((open, _)) = other {
                    return Some(Owner::Open(*open));
                }
                file.whole.push(mine);
                None
            })
        })
    }

    /// fcntl(2) with one of the lock commands; `argument` is the guest's `struct flock`.
    ///
    /// # Errors
    /// `EFAULT`; `EBADF`: the file is not open for that kind of lock; as fcntl(2);
    /// [`inside::RESTART`].
    pub fn lock_command(&self, command: i32, argument: u64) -> Result<usize, Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        let mut bytes = [0; size_of::<libc::flock>()];
        guest::Guest.read(argument, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        // SAFETY: any bytes are a valid flock: it has only integers.
        let mut lock: libc::flock = unsafe { core::mem::transmute(bytes) };
        let asks = matches!(command, libc::F_GETLK | libc::F_OFD_GETLK);
        let kind = i32::from(lock.l_type);
        let of_open = matches!(command, libc::F_OFD_GETLK | libc::F_OFD_SETLK | libc::F_OFD_SETLKW);
        let (start, end) = self.place(&lock)?;
        match kind {
            libc::F_UNLCK if asks => return Err(Errno::EINVAL),
            libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK => {}
            _ => return Err(Errno::EINVAL),
        }
        if !asks
            && (kind == libc::F_RDLCK && !self.readable()
                || kind == libc::F_WRLCK && !self.writable())
        {
            return Err(Errno::EBADF);
        }
        if of_open && lock.l_pid != 0 {
            return Err(Errno::EINVAL);
        }
        let owner =
            if of_open { Owner::Open(self.number) } else { Owner::Process(identity::process_id()) };
        let locks = &family().ok_or(NO_LOCKS)?.locks;
        let wanted = Range { start, end, write: kind == libc::F_WRLCK, owner };
        if asks {
            locks.reap();
            tell(&mut lock, locks.with(self.index, |file| file.conflict(&wanted)));
            // SAFETY: a flock has no padding that was not initialised: it came from bytes.
            let bytes: [u8; size_of::<libc::flock>()] = unsafe { core::mem::transmute(lock) };
            return guest::write(argument, &bytes).map(|()| 0);
        }
        if kind == libc::F_UNLCK {
            locks.with(self.index, |file| file.cut(&wanted));
            locks.changed();
            return Ok(0);
        }
        let waits = matches!(command, libc::F_SETLKW | libc::F_OFD_SETLKW);
        locks.acquire(waits, || {
            locks.with(self.index, |file| match file.conflict(&wanted) {
                Some(held) => Some(held.owner),
                None => {
                    file.put(wanted);
                    None
                }
            })
        })?;
        // What was a write lock may admit others now.
        if !wanted.write {
            locks.changed();
        }
        Ok(0)
    }

    /// First and last byte of what `lock` describes.
    fn place(&self, lock: &libc::flock) -> Result<(u64, u64), Errno> {
        let from = match i32::from(lock.l_whence) {
            libc::SEEK_SET => 0,
            libc::SEEK_CUR => self.position.load(Ordering::Relaxed),
            libc::SEEK_END => self.volume.size(),
            _ => return Err(Errno::EINVAL),
        };
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        let start = from.checked_add(lock.l_start).ok_or(Errno::EOVERFLOW)?;
        let start = u64::try_from(start).map_err(|_| Errno::EINVAL)?;
        match lock.l_len {
            0 => Ok((start, LAST)),
            1.. => {
                let end = start + (lock.l_len.unsigned_abs() - 1);
                if end > LAST { Err(Errno::EOVERFLOW) } else { Ok((start, end)) }
            }
            _ => {
                let first = start.checked_sub(lock.l_len.unsigned_abs()).ok_or(Errno::EINVAL)?;
                Ok((first, start - 1))
            }
        }
    }

    /// close(2) of one of its numbers in this process: drops the process's byte-range locks of the
    /// file, as POSIX has it.
    pub(super) fn release_locks(&self) {
        if let Some(family) = family() {
            family.locks.release(self.index, Owner::Process(identity::process_id()));
        }
    }

    /// The open file ends, and its own locks with it.
    pub(super) fn end_locks(&self) {
        if let Some(family) = family() {
            family.locks.release(self.index, Owner::Open(self.number));
        }
    }
}

/// F_GETLK's answer: the lock that is in the way, or that there is none.
fn tell(lock: &mut libc::flock, held: Option<Range>) {
    let short = |kind: i32| i16::try_from(kind).unwrap_or(0);
    let Some(held) = held else {
        lock.l_type = short(libc::F_UNLCK);
        return;
    };
    lock.l_type = short(if held.write { libc::F_WRLCK } else { libc::F_RDLCK });
    lock.l_whence = short(libc::SEEK_SET);
    lock.l_start = held.start.cast_signed();
    let length = if held.end == LAST { 0 } else { held.end - held.start + 1 };
    lock.l_len = length.cast_signed();
    lock.l_pid = match held.owner {
        Owner::Process(id) => id.cast_signed(),
        Owner::Open(_) => -1,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Owner = Owner::Process(1);
    const OTHER: Owner = Owner::Open(2);

    fn range(start: u64, end: u64, write: bool, owner: Owner) -> Range {
        Range { start, end, write, owner }
    }

    /// The owner and kind of each of the first bytes, as a model without ranges keeps them.
    fn bytes(file: &OfFile, owner: Owner) -> Vec<Option<bool>> {
        let kind = |at| {
            let mut kinds = file.ranges.iter().filter(|r| r.owner == owner);
            kinds.find(|r| r.start <= at && at <= r.end).map(|r| r.write)
        };
        (0..20).map(kind).collect()
    }

    #[test]
    fn an_owners_locks_are_what_a_byte_by_byte_account_says() {
        let mut file = OfFile::default();
        let mut model = vec![None; 20];
        let mut seed = 7_u64;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (a, b, what) = (seed >> 33 & 15, seed >> 40 & 3, seed >> 50 & 3);
            let (start, end) = (a, a + b);
            let wanted = range(start, end, what == 1, ME);
            let kind = match what {
                0 | 3 => None,
                _ => Some(what == 1),
            };
            if kind.is_some() {
                file.put(wanted)
            } else {
                file.cut(&wanted)
            }
            for at in start..=end {
                model[usize::try_from(at).unwrap()] = kind;
            }
            assert_eq!(bytes(&file, ME), model);
            for pair in file.ranges.iter().enumerate() {
                let joins = |other: &Range| other.write == pair.1.write && other.touches(pair.1);
                let others = file.ranges.iter().enumerate().filter(|(n, _)| *n != pair.0);
                assert!(!others.into_iter().any(|(_, other)| joins(other)), "not in one piece");
            }
        }
    }

    #[test]
    fn only_another_owners_overlapping_lock_is_in_the_way_and_only_if_one_of_both_writes() {
        let mut file = OfFile::default();
        file.put(range(10, 19, false, OTHER));
        file.put(range(30, LAST, true, OTHER));
        assert_eq!(file.conflict(&range(0, 9, true, ME)), None);
        assert_eq!(file.conflict(&range(0, 10, false, ME)), None);
        assert_eq!(file.conflict(&range(0, 10, true, ME)), Some(range(10, 19, false, OTHER)));
        assert_eq!(file.conflict(&range(20, 29, true, ME)), None);
        assert_eq!(file.conflict(&range(0, 40, false, ME)), Some(range(30, LAST, true, OTHER)));
        assert_eq!(file.conflict(&range(0, 40, true, OTHER)), None);
    }

    #[test]
    fn a_circle_of_waits_is_a_deadlock() {
        let locks = Locks::new();
        assert_eq!(locks.note_wait(1, 2), Ok(()));
        assert_eq!(locks.note_wait(2, 3), Ok(()));
        assert_eq!(locks.note_wait(3, 1), Err(DEADLOCK));
        assert_eq!(locks.note_wait(3, 4), Ok(()));
    }
}
