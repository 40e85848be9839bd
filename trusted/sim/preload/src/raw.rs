//! libc's `syscall`: the way in which libaio, its static copies and many programs call the kernel
//! by number.
//!
//! Numbers that can concern a protected file go to the function of the same name here, which
//! passes on what does not; all others go to the kernel unchanged.

use core::ffi::{c_char, c_int, c_long, c_uint, c_void};

use postern_sim::{
    death,
    files::{self, Kind},
    guest::fault::{self, Action},
};
use postern_trusted::errno::Errno;

use crate::{
    aio, attributes,
    calls::Arguments,
    data, descriptors, exec, limits, listing, mapping, namespace,
    next::{answer, export, signed},
    open, process, size, state, working,
};

/// io_pgetevents(2)'s number on x86-64.
pub const IO_PGETEVENTS: c_long = 333;

/// An `int` argument: the low half of its word.
fn int(word: usize) -> c_int {
    word as u32 as i32
}

fn uint(word: usize) -> c_uint {
    word as u32
}

fn long(word: usize) -> i64 {
    word as i64
}

fn aio_call(number: c_long, arguments: Arguments) -> Option<Result<usize, Errno>> {
    let [a, b, c, d, e, f] = arguments.map(|word| word as u64);
    Some(match number {
        libc::SYS_io_setup => aio::setup(a, b),
        libc::SYS_io_destroy => aio::destroy(a),
        libc::SYS_io_submit => aio::submit(a, b.cast_signed(), c),
        libc::SYS_io_cancel => aio::cancel(a, b),
        libc::SYS_io_getevents => aio::get_events(a, b.cast_signed(), c.cast_signed(), d, e),
        IO_PGETEVENTS => aio::get_events_masked(a, b.cast_signed(), c.cast_signed(), d, e, f),
        _ => return None,
    })
}

fn is_aio(number: c_long) -> bool {
    matches!(
        number,
        libc::SYS_io_setup
            | libc::SYS_io_destroy
            | libc::SYS_io_submit
            | libc::SYS_io_cancel
            | libc::SYS_io_getevents
            | IO_PGETEVENTS
    )
}

/// Calls whose first argument is a descriptor. `None`: not one of them.
///
/// # Safety
/// As the system call.
pub unsafe fn descriptor_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    let [a, b, c, d, e, _] = arguments;
    let fd = int(a);
    // SAFETY: the caller's arguments, passed to the function of the same meaning.
    unsafe {
        Some(match number {
            libc::SYS_read => data::read(fd, b as _, c) as c_long,
            libc::SYS_write => data::write(fd, b as _, c) as c_long,
            libc::SYS_pread64 => data::pread64(fd, b as _, c, long(d)) as c_long,
            libc::SYS_pwrite64 => data::pwrite64(fd, b as _, c, long(d)) as c_long,
            libc::SYS_readv => data::readv(fd, b as _, int(c)) as c_long,
            libc::SYS_writev => data::writev(fd, b as _, int(c)) as c_long,
            libc::SYS_preadv => data::preadv(fd, b as _, int(c), long(d)) as c_long,
            libc::SYS_pwritev => data::pwritev(fd, b as _, int(c), long(d)) as c_long,
            // The offset's upper half is an argument of its own, of no meaning on x86-64.
            libc::SYS_preadv2 => {
                data::preadv2(fd, b as _, int(c), long(d), int(arguments[5])) as c_long
            }
            libc::SYS_pwritev2 => {
                data::pwritev2(fd, b as _, int(c), long(d), int(arguments[5])) as c_long
            }
            libc::SYS_lseek => data::lseek(fd, long(b), int(c)),
            libc::SYS_fstat => attributes::fstat(fd, b as _).into(),
            libc::SYS_fstatfs => attributes::fstatfs(fd, b as _).into(),
            libc::SYS_ftruncate => size::ftruncate(fd, long(b)).into(),
            libc::SYS_fallocate => size::fallocate(fd, int(b), long(c), long(d)).into(),
            libc::SYS_fsync => size::fsync(fd).into(),
            libc::SYS_fdatasync => size::fdatasync(fd).into(),
            libc::SYS_syncfs => size::syncfs(fd).into(),
            libc::SYS_sync_file_range => {
                size::sync_file_range(fd, long(b), long(c), uint(d)).into()
            }
            libc::SYS_fadvise64 => negate(size::posix_fadvise(fd, long(b), long(c), int(d))),
            libc::SYS_fcntl => descriptors::fcntl(fd, int(b), c).into(),
            libc::SYS_ioctl => descriptors::ioctl(fd, b as u64, c as _).into(),
            libc::SYS_flock => descriptors::flock(fd, int(b)).into(),
            libc::SYS_close => descriptors::close(fd).into(),
            libc::SYS_dup => descriptors::dup(fd).into(),
            libc::SYS_fchmod => namespace::fchmod(fd, uint(b)).into(),
            libc::SYS_fchown => namespace::fchown(fd, uint(b), uint(c)).into(),
            libc::SYS_newfstatat => attributes::fstatat(fd, b as _, c as _, int(d)).into(),
            libc::SYS_statx => attributes::statx(fd, b as _, int(c), uint(d), e as _).into(),
            libc::SYS_getdents64 => listing::getdents64(fd, b as _, c) as c_long,
            libc::SYS_fchdir => working::fchdir(fd).into(),
            libc::SYS_fchownat => namespace::fchownat(fd, b as _, uint(c), uint(d), int(e)).into(),
            libc::SYS_utimensat => namespace::utimensat(fd, b as _, c as _, int(d)).into(),
            _ => return None,
        })
    }
}

/// posix_fadvise answers the errno; the system call sets it.
fn negate(errno: c_int) -> c_long {
    answer(|| if errno == 0 { Ok(0) } else { Err(Errno(errno)) })
}

/// Calls on paths, and those on two descriptors.
///
/// # Safety
/// As the system call.
pub unsafe fn other_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    let [a, b, c, d, e, _] = arguments;
    let path = a as *const c_char;
    // SAFETY: the caller's arguments, passed to the function of the same meaning.
    let result: c_int = unsafe {
        match number {
            libc::SYS_open => open::open(path, int(b), uint(c)),
            libc::SYS_openat => open::openat(int(a), b as _, int(c), uint(d)),
            libc::SYS_creat => open::creat(path, uint(b)),
            libc::SYS_stat => attributes::stat(path, b as _),
            libc::SYS_lstat => attributes::lstat(path, b as _),
            libc::SYS_newfstatat => attributes::fstatat(int(a), b as _, c as _, int(d)),
            libc::SYS_statx => attributes::statx(int(a), b as _, int(c), uint(d), e as _),
            libc::SYS_statfs => attributes::statfs(path, b as _),
            libc::SYS_access => attributes::access(path, int(b)),
            libc::SYS_faccessat => attributes::faccessat(int(a), b as _, int(c), 0),
            libc::SYS_truncate => size::truncate(path, long(b)),
            libc::SYS_faccessat2 => attributes::faccessat(int(a), b as _, int(c), int(d)),
            libc::SYS_chdir => working::chdir(path),
            libc::SYS_fchdir => working::fchdir(int(a)),
            libc::SYS_mkdir => namespace::mkdir(path, uint(b)),
            libc::SYS_mkdirat => namespace::mkdirat(int(a), b as _, uint(c)),
            libc::SYS_rmdir => namespace::rmdir(path),
            libc::SYS_mknod => namespace::mknod(path, uint(b), c as u64),
            libc::SYS_mknodat => namespace::mknodat(int(a), b as _, uint(c), d as u64),
            libc::SYS_link => namespace::link(path, b as _),
            libc::SYS_linkat => namespace::linkat(int(a), b as _, int(c), d as _, int(e)),
            libc::SYS_symlink => namespace::symlink(path, b as _),
            libc::SYS_symlinkat => namespace::symlinkat(path, int(b), c as _),
            libc::SYS_renameat => namespace::renameat(int(a), b as _, int(c), d as _),
            libc::SYS_chmod => namespace::chmod(path, uint(b)),
            libc::SYS_fchmodat => namespace::fchmodat(int(a), b as _, uint(c), 0),
            libc::SYS_chown => namespace::chown(path, uint(b), uint(c)),
            libc::SYS_lchown => namespace::lchown(path, uint(b), uint(c)),
            libc::SYS_fchownat => namespace::fchownat(int(a), b as _, uint(c), uint(d), int(e)),
            libc::SYS_utime => namespace::utime(path, b as _),
            libc::SYS_utimes => namespace::utimes(path, b as _),
            libc::SYS_utimensat => namespace::utimensat(int(a), b as _, c as _, int(d)),
            libc::SYS_unlink => namespace::unlink(path),
            libc::SYS_unlinkat => namespace::unlinkat(int(a), b as _, int(c)),
            libc::SYS_rename => namespace::rename(path, b as _),
            libc::SYS_renameat2 => namespace::renameat2(int(a), b as _, int(c), d as _, uint(e)),
            libc::SYS_dup2 => descriptors::dup2(int(a), int(b)),
            libc::SYS_dup3 => descriptors::dup3(int(a), int(b), int(c)),
            libc::SYS_close_range => descriptors::close_range(uint(a), uint(b), int(c)),
            libc::SYS_fork => crate::process::fork(),
            _ => return None,
        }
    };
    Some(result.into())
}

/// Calls that put text: a link's target, the working directory. `None`: not one of them, or the
/// kernel's business.
///
/// # Safety
/// As the system call.
pub unsafe fn text_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    let [a, b, c, d, ..] = arguments;
    // SAFETY: the caller's arguments, passed to the function of the same meaning.
    unsafe {
        Some(match number {
            libc::SYS_readlink => namespace::readlink(a as _, b as _, c) as c_long,
            libc::SYS_readlinkat => namespace::readlinkat(int(a), b as _, c as _, d) as c_long,
            libc::SYS_getcwd => {
                let path = working::getcwd_raw(a as _, b)?;
                answer(|| path.map(signed)) as c_long
            }
            _ => return None,
        })
    }
}

/// Calls that concern the process: AIO, dispositions of signals, its end. `None`: not one of them,
/// or the kernel's after all.
///
/// # Safety
/// As the system call.
pub unsafe fn process_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    if is_aio(number) {
        let result =
            answer(|| aio_call(number, arguments).unwrap_or(Err(Errno::ENOSYS)).map(signed));
        return Some(result as c_long);
    }
    let [a, b, c, d, e, _] = arguments;
    match number {
        libc::SYS_exit_group => {
            state::drain();
            None
        }
        libc::SYS_kill
        | libc::SYS_tkill
        | libc::SYS_tgkill
        | libc::SYS_rt_sigqueueinfo
        | libc::SYS_pidfd_send_signal => {
            let signal = if number == libc::SYS_tgkill { c } else { b };
            if int(signal) == libc::SIGKILL {
                let by_descriptor = number == libc::SYS_pidfd_send_signal;
                let target = if by_descriptor { death::process_of(int(a)) } else { Ok(int(a)) };
                let _ = target.map(death::kill);
            }
            None
        }
        // SAFETY: the caller's arguments.
        libc::SYS_execve | libc::SYS_execveat => unsafe { exec::by_number(number, arguments) },
        libc::SYS_mmap
            if files::kind(int(e)) == Kind::Protected || int(d) & libc::MAP_FIXED != 0 =>
        {
            let [.., offset] = arguments;
            // SAFETY: as above.
            let at = unsafe { mapping::mmap(a as _, b, int(c), int(d), int(e), long(offset)) };
            Some(at as c_long)
        }
        // SAFETY: as above.
        libc::SYS_munmap => Some(unsafe { mapping::munmap(a as _, b) }.into()),
        // SAFETY: as above.
        libc::SYS_msync => Some(unsafe { mapping::msync(a as _, b, int(c)) }.into()),
        libc::SYS_mremap => {
            // SAFETY: the caller's arguments, passed to the function of the same meaning.
            Some(unsafe { mapping::mremap(a as _, b, c, int(d), e as _) } as c_long)
        }
        // SAFETY: as above.
        libc::SYS_setrlimit => Some(unsafe { limits::setrlimit(int(a), b as _) }.into()),
        libc::SYS_prlimit64 => {
            // SAFETY: as above.
            Some(unsafe { limits::prlimit(int(a), int(b), c as _, d as _) }.into())
        }
        libc::SYS_rt_sigaction if fault::installed() && d == 8 => {
            Some(signal_action(int(a), b as _, c as _))
        }
        _ => None,
    }
}

/// rt_sigaction(2) with the kernel's structure and its eight bytes of mask.
fn signal_action(signal: c_int, new: *const c_void, old: *mut c_void) -> c_long {
    answer(|| {
        // SAFETY: null or the kernel's structure, as the system call demands.
        let new = unsafe { new.cast::<Action>().as_ref() }.copied();
        let before = fault::sigaction(signal, new.as_ref())?;
        // SAFETY: null or room for one, as the system call demands.
        if let Some(old) = unsafe { old.cast::<Action>().as_mut() } {
            *old = before;
        }
        Ok(0)
    })
}

export! {
    fn [syscall](
        number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize,
    ) -> c_long, next => {
        if !state::active() {
            return next();
        }
        let arguments = [a, b, c, d, e, f];
        // SAFETY: the caller's arguments.
        if let Some(result) = unsafe { process_call(number, arguments) } {
            return result;
        }
        if process::forks(number, arguments) {
            return process::counted(next);
        }
        let concerns = files::kind(int(a)) != Kind::Other;
        // SAFETY: the caller's arguments.
        let handled = unsafe {
            if let Some(result) = text_call(number, arguments) {
                return result;
            }
            match if concerns { descriptor_call(number, arguments) } else { None } {
                Some(result) => Some(result),
                None => other_call(number, arguments),
            }
        };
        handled.unwrap_or_else(next)
    };
}
