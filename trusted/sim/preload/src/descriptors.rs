//! close, dup, fcntl, ioctl, locks.

use core::ffi::{c_int, c_uint, c_ulong, c_void};

use postern_sim::{
    files::{self, Kind, OpenFile},
    guest, inside, sys,
};
use postern_trusted::errno::Errno;

use crate::next::{answer, export};

/// ioctl(2) requests that Linux answers for every regular file.
const FIONREAD: c_ulong = 0x541b;
const FIGETBSZ: c_ulong = 2;
/// And those that concern the descriptor alone: FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC.
const DESCRIPTOR_REQUESTS: [c_ulong; 4] = [0x5451, 0x5450, 0x5421, 0x5452];

/// dup2 takes no flags and allows both numbers to be the same.
const SAME_AS_DUP2: c_int = c_int::MIN;

fn is_ours(fd: c_int) -> bool {
    files::kind(fd) != Kind::Other
}

/// After the next library has duplicated `old`.
fn duplicated(old: c_int, new: c_int) -> c_int {
    if new < 0 { new } else { answer(|| files::duplicated(old, new)) }
}

/// dup2 and dup3: a descriptor of our own is neither source nor target.
fn duplicate_to(old: c_int, new: c_int, flags: c_int, next: impl FnOnce() -> c_int) -> c_int {
    if files::is_internal(old) || files::is_internal(new) {
        return answer(|| Err(Errno::EBADF));
    }
    // Not by the next library: its call would come back here.
    if is_ours(old) || is_ours(new) {
        return answer(|| {
            let new = if flags == SAME_AS_DUP2 && old == new {
                sys::fcntl(old, libc::F_GETFD, 0).map(|_| new)
            } else {
                sys::dup3(old, new, flags & !SAME_AS_DUP2)
            }?;
            files::duplicated(old, new)
        });
    }
    next()
}

fn control(file: &OpenFile, fd: c_int, command: c_int, argument: usize) -> Result<c_int, Errno> {
    let int = |n: usize| c_int::try_from(n).unwrap_or(c_int::MAX);
    match command {
        libc::F_GETFL => Ok(file.flags()),
        libc::F_SETFL if file.is_path() => Err(Errno::EBADF),
        libc::F_SETFL => {
            // The upper half of the word is no part of the C argument.
            file.set_flags(argument as u32 as i32);
            Ok(0)
        }
        libc::F_GETLK
        | libc::F_SETLK
        | libc::F_SETLKW
        | libc::F_OFD_GETLK
        | libc::F_OFD_SETLK
        | libc::F_OFD_SETLKW => file.lock_command(command, argument as u64).map(int),
        // Leases, seals, pipe sizes: what a regular file on ext4 has none of.
        libc::F_ADD_SEALS | libc::F_GET_SEALS => Err(Errno::EINVAL),
        libc::F_SETLEASE | libc::F_NOTIFY => Err(Errno::EINVAL),
        libc::F_GETLEASE => Ok(libc::F_UNLCK),
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
            let new = int(sys::fcntl(fd, command, argument)?);
            files::duplicated(fd, new)
        }
        // F_GETFD, F_SETFD, F_GETOWN and the like: the placeholder's own.
        _ => sys::fcntl(fd, command, argument).map(int),
    }
}

fn request(file: &OpenFile, fd: c_int, request: c_ulong, to: *mut c_void) -> Result<c_int, Errno> {
    match request {
        _ if file.is_path() => Err(Errno::EBADF),
        FIONREAD => {
            let unread = i32::try_from(file.unread()).unwrap_or(i32::MAX);
            guest::write(to as u64, &unread.to_ne_bytes()).map(|()| 0)
        }
        FIGETBSZ => guest::write(to as u64, &4096_i32.to_ne_bytes()).map(|()| 0),
        number if DESCRIPTOR_REQUESTS.contains(&number) => {
            let [fd, number] = [fd as isize as usize, usize::try_from(number).unwrap_or(0)];
            // SAFETY: the kernel checks the guest's address itself.
            sys::check(unsafe { sys::syscall6(libc::SYS_ioctl, fd, number, to as usize, 0, 0, 0) })
                .map(|_| 0)
        }
        _ => Err(Errno::ENOTTY),
    }
}

/// lockf(3) in terms of fcntl(2), as POSIX describes it.
fn lockf_on(file: &OpenFile, command: c_int, length: i64) -> Result<c_int, Errno> {
    // SAFETY: all-zero is a valid flock: it has only integers.
    let mut lock: libc::flock = unsafe { core::mem::zeroed() };
    let (kind, how) = match command {
        libc::F_ULOCK => (libc::F_UNLCK, libc::F_SETLK),
        libc::F_LOCK => (libc::F_WRLCK, libc::F_SETLKW),
        libc::F_TLOCK => (libc::F_WRLCK, libc::F_SETLK),
        libc::F_TEST => (libc::F_RDLCK, libc::F_GETLK),
        _ => return Err(Errno::EINVAL),
    };
    let short = |n: c_int| i16::try_from(n).unwrap_or(0);
    (lock.l_type, lock.l_whence, lock.l_len) = (short(kind), short(libc::SEEK_CUR), length);
    file.lock_command(how, (&raw mut lock) as u64)?;
    if command == libc::F_TEST && lock.l_type != short(libc::F_UNLCK) {
        return Err(Errno::EACCES);
    }
    Ok(0)
}

/// Runs `job` on the protected file that `fd` is open for, again after each handler that restarts
/// calls; passes the call on where it is none.
fn restarting(
    fd: c_int,
    next: impl FnOnce() -> c_int,
    job: impl Fn(&OpenFile) -> Result<c_int, Errno>,
) -> c_int {
    loop {
        let Some(file) = files::lookup(fd) else { return next() };
        let mut again = false;
        let result = answer(|| match job(&file) {
            Err(inside::RESTART) => {
                again = true;
                Ok(0)
            }
            other => other,
        });
        // The handler may jump away.
        drop(file);
        if !again {
            return result;
        }
        inside::outside(|| ());
    }
}

export! {
    fn [close](fd: c_int) -> c_int, next =>
        if is_ours(fd) { answer(|| files::close(fd).map(|()| 0)) } else { next() };
    fn [close_range](first: c_uint, last: c_uint, flags: c_int) -> c_int, next =>
        if crate::state::active() {
            answer(|| files::close_range(first, last, flags.cast_unsigned()).map(|()| 0))
        } else {
            next()
        };
    fn [dup](old: c_int) -> c_int, next =>
        match files::kind(old) {
            Kind::Internal => answer(|| Err(Errno::EBADF)),
            Kind::Protected => answer(|| {
                // Not by the next library: its call would come back here.
                let new = sys::dup(old)?;
                files::duplicated(old, new)
            }),
            Kind::Other => duplicated(old, next()),
        };
    fn [dup2, __dup2](old: c_int, new: c_int) -> c_int, next =>
        duplicate_to(old, new, SAME_AS_DUP2, next);
    fn [dup3](old: c_int, new: c_int, flags: c_int) -> c_int, next =>
        duplicate_to(old, new, flags, next);
    fn [fcntl, fcntl64](fd: c_int, command: c_int, argument: usize) -> c_int, next =>
        {
            let pass_on = || {
                let result = next();
                if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                    files::is_ordinary(result);
                }
                result
            };
            restarting(fd, pass_on, |file| control(file, fd, command, argument))
        };
    fn [ioctl](fd: c_int, number: c_ulong, argument: *mut c_void) -> c_int, next =>
        match files::lookup(fd) {
            // Request numbers are 32 bits wide.
            Some(file) => answer(|| request(&file, fd, number & 0xffff_ffff, argument)),
            None => next(),
        };
    fn [flock](fd: c_int, operation: c_int) -> c_int, next =>
        restarting(fd, next, |file| file.flock(operation).map(|()| 0));
    fn [lockf, lockf64](fd: c_int, command: c_int, length: i64) -> c_int, next =>
        restarting(fd, next, |file| lockf_on(file, command, length));
}

/// closefrom(3) closes every descriptor from `first` on.
///
/// # Safety
/// As the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    let first = first.max(0).unsigned_abs();
    // It returns nothing; a range up to the highest number is never empty.
    let _ = answer(|| files::close_range(first, c_uint::MAX, 0).map(|()| 0));
}
