//! Advisory locks on protected files: byte ranges (fcntl), open-file-description locks, flock.
//!
//! The kernel does the work, on a hidden memfd: one per volume and process family for byte ranges
//! (made by the first process that locks, inherited by its children), one more open of it per open
//! file for the other two kinds, which belong to the open file.
//!
//! Does not hold: a forked child cannot use its parent's OFD and flock locks through an inherited
//! descriptor (`ENOLCK`); processes that forked before the first lock do not see each other's.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use postern_trusted::{
    errno::Errno,
    platform::{Fault, GuestMemory},
};

use super::{OpenFile, placeholder};
use crate::{guest, identity, sys};

/// Volumes that can have locks.
const VOLUMES: usize = 64;
const NO_LOCKS: Errno = Errno(libc::ENOLCK);

/// The memfd of each volume; 0 is none. Inherited by fork with the same number.
static MEMFDS: [AtomicI32; VOLUMES] = [const { AtomicI32::new(0) }; VOLUMES];
/// Whether this process has ever asked for a byte-range lock of the volume.
static USED: [AtomicBool; VOLUMES] = [const { AtomicBool::new(false) }; VOLUMES];

/// What an open file remembers of its own locks: owner's process id << 32 | descriptor.
pub struct Description(AtomicU64);

impl Description {
    /// No locks yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Default for Description {
    fn default() -> Self {
        Self::new()
    }
}

fn volume_memfd(index: usize) -> Result<i32, Errno> {
    let slot = MEMFDS.get(index).ok_or(NO_LOCKS)?;
    let known = slot.load(Ordering::Acquire);
    if known != 0 {
        return Ok(known);
    }
    let made = super::protect_internal(sys::memfd(c"postern-locks")?);
    match slot.compare_exchange(0, made, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(made),
        Err(other) => {
            super::close_internal(made);
            Ok(other)
        }
    }
}

impl OpenFile {
    /// The descriptor that carries this open file's own locks.
    fn own_descriptor(&self) -> Result<i32, Errno> {
        let me = identity::process_id();
        let unpack = |word: u64| {
            let (owner, fd) = (word >> 32, word & 0xffff_ffff);
            if owner == u64::from(me) {
                i32::try_from(fd).map_err(|_| NO_LOCKS)
            } else {
                Err(NO_LOCKS)
            }
        };
        let known = self.locks.0.load(Ordering::Acquire);
        if known != 0 {
            return unpack(known);
        }
        let mut room = [0; 32];
        let path = placeholder::own_path(volume_memfd(self.index)?, &mut room)?;
        let made = super::protect_internal(sys::open(path, libc::O_RDWR | libc::O_CLOEXEC)?);
        let word = u64::from(me) << 32 | u64::from(made.unsigned_abs());
        match self.locks.0.compare_exchange(0, word, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(made),
            Err(other) => {
                super::close_internal(made);
                unpack(other)
            }
        }
    }

    /// flock(2).
    ///
    /// # Errors
    /// `EWOULDBLOCK`, `EINTR`, `EINVAL` as flock(2); `ENOLCK` in a forked child.
    pub fn flock(&self, operation: i32) -> Result<(), Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        let fd = usize::try_from(self.own_descriptor()?).map_err(|_| NO_LOCKS)?;
        let operation = operation as isize as usize;
        // SAFETY: takes no pointers.
        sys::check(unsafe { sys::syscall6(libc::SYS_flock, fd, operation, 0, 0, 0, 0) }).map(drop)
    }

    /// fcntl(2) with one of the lock commands; `argument` is the guest's `struct flock`.
    ///
    /// # Errors
    /// `EFAULT`; `EBADF`: the file is not open for that kind of lock; as fcntl(2).
    pub fn lock_command(&self, command: i32, argument: u64) -> Result<usize, Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        let mut bytes = [0; size_of::<libc::flock>()];
        guest::Guest.read(argument, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        // SAFETY: any bytes are a valid flock: it has only integers.
        let mut lock: libc::flock = unsafe { core::mem::transmute(bytes) };
        let sets = !matches!(command, libc::F_GETLK | libc::F_OFD_GETLK);
        let kind = i32::from(lock.l_type);
        if sets
            && (kind == libc::F_RDLCK && !self.readable()
                || kind == libc::F_WRLCK && !self.writable())
        {
            return Err(Errno::EBADF);
        }
        self.make_absolute(&mut lock)?;
        let fd = match command {
            libc::F_GETLK | libc::F_SETLK | libc::F_SETLKW => {
                if let Some(used) = USED.get(self.index) {
                    used.store(true, Ordering::Relaxed);
                }
                volume_memfd(self.index)?
            }
            _ => self.own_descriptor()?,
        };
        let answer = sys::fcntl(fd, command, (&raw mut lock) as usize)?;
        if !sets {
            // SAFETY: a flock has no padding that was not initialised: it came from bytes.
            let bytes: [u8; size_of::<libc::flock>()] = unsafe { core::mem::transmute(lock) };
            guest::write(argument, &bytes)?;
        }
        Ok(answer)
    }

    /// Places relative to the position or the end mean the protected file's, not the memfd's.
    fn make_absolute(&self, lock: &mut libc::flock) -> Result<(), Errno> {
        let from = match i32::from(lock.l_whence) {
            libc::SEEK_CUR => self.position.load(Ordering::Relaxed),
            libc::SEEK_END => self.volume.size(),
            _ => return Ok(()),
        };
        let start = from.checked_add_signed(lock.l_start).and_then(|at| i64::try_from(at).ok());
        lock.l_start = start.ok_or(Errno::EINVAL)?;
        lock.l_whence = 0; // SEEK_SET
        Ok(())
    }

    /// close(2) of one of its numbers in this process: drops the process's byte-range locks of the
    /// file, as POSIX has it, and its own locks if that was the `last` number.
    pub(super) fn release_locks(&self, last: bool) {
        let used = USED.get(self.index).is_some_and(|used| used.load(Ordering::Relaxed));
        if used && let Ok(fd) = volume_memfd(self.index) {
            // SAFETY: all-zero is a valid flock: from the start, without end.
            let mut lock: libc::flock = unsafe { core::mem::zeroed() };
            lock.l_type = i16::try_from(libc::F_UNLCK).unwrap_or(2);
            let _ = sys::fcntl(fd, libc::F_SETLK, (&raw mut lock) as usize);
        }
        let own = self.locks.0.load(Ordering::Acquire);
        if last && own >> 32 == u64::from(identity::process_id()) {
            self.locks.0.store(0, Ordering::Release);
            super::close_internal(i32::try_from(own & 0xffff_ffff).unwrap_or(-1));
        }
    }
}
