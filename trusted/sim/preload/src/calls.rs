//! System calls by number: which ones can concern a protected file, and what answers them when the
//! C library makes them inside itself (fopen, opendir, tmpfile, its own signal calls).
//!
//! Holds: what is answered here is answered as the kernel does it, a value or a negative errno,
//! `errno` untouched; everything else is left to the kernel.

pub mod catch;
pub mod patch;

use core::ffi::{c_char, c_long};

use libc::AT_FDCWD;
use postern_sim::{
    directory::cwd,
    files::{self, Kind},
    inside, message, sys,
};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths, namespace,
    next::{answer, set_errno, signed},
    openat2, raw, state,
};

/// The six arguments of a system call.
pub type Arguments = [usize; 6];

/// Numbers below this are looked at.
pub const NUMBERS: usize = 512;

/// What the catcher does with a number, as bits of a byte; 0: the kernel's.
pub mod class {
    /// Ask [`super::answer_call`].
    pub const ASK: u8 = 1;
    /// But only if the first argument is a descriptor of ours.
    pub const DESCRIPTOR: u8 = 2;
    /// The launcher's filter stops it unless it carries the pass, which is its sixth argument.
    pub const PASS: u8 = 4;
    /// Answers a new descriptor.
    pub const OPENS: u8 = 8;
}

/// Calls whose first argument is a descriptor.
const DESCRIPTOR_CALLS: [c_long; 31] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_syncfs,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_flock,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_getdents64,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fsetxattr,
];

/// The path arguments of a call: each the place of its directory descriptor, if it has one, and
/// its own.
type Paths = &'static [(Option<usize>, usize)];

const FIRST: Paths = &[(None, 0)];
const BOTH: Paths = &[(None, 0), (None, 1)];
const AT: Paths = &[(Some(0), 1)];
const BOTH_AT: Paths = &[(Some(0), 1), (Some(2), 3)];

fn paths(number: c_long) -> Paths {
    match number {
        libc::SYS_open
        | libc::SYS_creat
        | libc::SYS_stat
        | libc::SYS_lstat
        | libc::SYS_access
        | libc::SYS_truncate
        | libc::SYS_unlink
        | libc::SYS_rmdir
        | libc::SYS_mkdir
        | libc::SYS_mknod
        | libc::SYS_chmod
        | libc::SYS_chown
        | libc::SYS_lchown
        | libc::SYS_readlink
        | libc::SYS_statfs
        | libc::SYS_chdir
        | libc::SYS_utime
        | libc::SYS_utimes
        | libc::SYS_setxattr
        | libc::SYS_lsetxattr
        | libc::SYS_getxattr
        | libc::SYS_lgetxattr
        | libc::SYS_listxattr
        | libc::SYS_llistxattr => FIRST,
        libc::SYS_rename | libc::SYS_link => BOTH,
        libc::SYS_symlink => &[(None, 1)],
        libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_mkdirat
        | libc::SYS_mknodat
        | libc::SYS_fchownat
        | libc::SYS_futimesat
        | libc::SYS_newfstatat
        | libc::SYS_unlinkat
        | libc::SYS_readlinkat
        | libc::SYS_fchmodat
        | libc::SYS_faccessat
        | libc::SYS_faccessat2
        | libc::SYS_utimensat
        | libc::SYS_statx => AT,
        libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_linkat => BOTH_AT,
        libc::SYS_symlinkat => &[(Some(1), 2)],
        _ => &[],
    }
}

/// Asked whatever their arguments are.
const ALWAYS: [c_long; 23] = [
    libc::SYS_io_setup,
    libc::SYS_io_destroy,
    libc::SYS_io_submit,
    libc::SYS_io_cancel,
    libc::SYS_io_getevents,
    raw::IO_PGETEVENTS,
    libc::SYS_rt_sigaction,
    libc::SYS_exit_group,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_pidfd_send_signal,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_close_range,
    libc::SYS_getcwd,
    libc::SYS_fchdir,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_mremap,
    libc::SYS_setrlimit,
    libc::SYS_prlimit64,
];

/// The class of a number.
pub fn class_of(number: usize) -> u8 {
    let Ok(number) = c_long::try_from(number) else { return 0 };
    let opens = match number {
        libc::SYS_open | libc::SYS_openat | libc::SYS_openat2 | libc::SYS_creat => class::OPENS,
        _ => 0,
    };
    let pass = if sys::FILTERED.contains(&number) { class::PASS } else { 0 };
    if DESCRIPTOR_CALLS.contains(&number) {
        class::ASK | class::DESCRIPTOR | pass
    } else if !paths(number).is_empty() {
        class::ASK | opens | pass
    } else if ALWAYS.contains(&number) {
        class::ASK
    } else {
        0
    }
}

fn int(word: usize) -> i32 {
    word as u32 as i32
}

/// Whether a path argument names a protected file, or something in a protected directory.
fn names_ours(number: c_long, arguments: &Arguments) -> bool {
    paths(number).iter().any(|&(directory, path)| {
        let directory = directory.map_or(AT_FDCWD, |at| int(arguments[at]));
        let path = arguments[path] as *const c_char;
        guest_paths::find(directory, path).is_some()
            || guest_paths::place(directory, path).is_some()
    })
}

/// Whether a directory descriptor among the arguments is a protected file's.
fn is_relative_to_ours(number: c_long, arguments: &Arguments) -> bool {
    let ours = |at: usize| files::kind(int(arguments[at])) == Kind::Protected;
    paths(number).iter().any(|(directory, _)| directory.is_some_and(ours))
}

/// Runs what answers with -1 and `errno`; gives the kernel's form, `errno` as it was.
fn in_kernel_form(call: impl FnOnce() -> Option<c_long>) -> Option<isize> {
    // SAFETY: the calling thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let result = call();
    // SAFETY: as above.
    let now = unsafe { *errno };
    set_errno(Errno(before));
    result.map(|result| if result == -1 { -(now as isize) } else { result as isize })
}

/// Answers a system call of the guest, or leaves it to the kernel (`None`).
///
/// # Safety
/// As the system call.
pub unsafe fn answer_call(number: c_long, arguments: Arguments) -> Option<isize> {
    if !state::active() || !inside::ask() {
        return None;
    }
    // SAFETY: as the caller's.
    let answer = in_kernel_form(|| unsafe { answer_asked(number, arguments) });
    inside::answered();
    answer
}

/// # Safety
/// As the system call.
unsafe fn answer_asked(number: c_long, arguments: Arguments) -> Option<c_long> {
    // SAFETY: as the caller's.
    if let Some(result) = unsafe { raw::process_call(number, arguments) } {
        return Some(result);
    }
    if matches!(number, libc::SYS_execve | libc::SYS_execveat) {
        return None;
    }
    let fd = int(arguments[0]);
    let by_descriptor = match number {
        libc::SYS_dup2 | libc::SYS_dup3 => {
            files::kind(fd) != Kind::Other || files::kind(int(arguments[1])) != Kind::Other
        }
        libc::SYS_close_range => true,
        libc::SYS_fchdir => files::kind(fd) != Kind::Other || cwd::is_inside(),
        libc::SYS_chdir => cwd::is_inside(),
        // SAFETY: as the caller's.
        libc::SYS_getcwd => return unsafe { raw::text_call(number, arguments) },
        _ => class_of(usize::try_from(number).unwrap_or(0)) & class::DESCRIPTOR != 0,
    };
    if by_descriptor && files::is_internal(fd) {
        set_errno(Errno::EBADF);
        return Some(-1);
    }
    if number == libc::SYS_openat2 {
        let [directory, path, how, bytes, ..] = arguments;
        let path = path as *const c_char;
        if let Some(opened) = openat2::open(int(directory), path, how as u64, bytes as u64) {
            return Some(answer(|| opened).into());
        }
    }
    // Where openat2 did not find it protected, it is not: its path may count from elsewhere.
    let named = !by_descriptor && number != libc::SYS_openat2 && names_ours(number, &arguments);
    if !by_descriptor && !named {
        // SAFETY: as the caller's.
        if let Some(result) = unsafe { outward_call(number, arguments) } {
            return Some(result);
        }
        if !is_relative_to_ours(number, &arguments) {
            return None;
        }
    }
    // SAFETY: as the caller's.
    unsafe {
        let known = raw::descriptor_call(number, arguments)
            .or_else(|| raw::other_call(number, arguments))
            .or_else(|| raw::text_call(number, arguments))
            .or_else(|| attribute_call(number, arguments));
        if known.is_none() && named {
            // Never on to the kernel: it would make a plain file under the protected name.
            message::say(&format!("system call {number} is not supported on a protected path"));
            set_errno(Errno::EACCES);
            return Some(-1);
        }
        known
    }
}

/// A call of the kernel's on a path that leads out of a protected directory; the kernel is not in
/// there, so it is given the path from the root.
///
/// # Safety
/// As the system call.
unsafe fn outward_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    let mut changed = arguments;
    let mut held = [None, None];
    for (&(directory, path), held) in paths(number).iter().zip(&mut held) {
        let directory = directory.map_or(AT_FDCWD, |at| int(arguments[at]));
        if let Some(outward) = guest_paths::outward(directory, arguments[path] as *const c_char) {
            changed[path] = held.insert(outward).as_ptr() as usize;
        }
    }
    if held[0].is_none() && held[1].is_none() {
        return None;
    }
    let class = class_of(usize::try_from(number).unwrap_or(0));
    let [a, b, c, d, e, f] = changed;
    let last = if class & class::PASS != 0 { sys::PASS } else { f };
    // SAFETY: the caller's arguments, but for paths of ours that live through the call.
    let result = sys::check(unsafe { sys::syscall6(number, a, b, c, d, e, last) });
    if let (Ok(fd), true) = (result, class & class::OPENS != 0) {
        files::is_ordinary(i32::try_from(fd).unwrap_or(-1));
    }
    Some(answer(|| result.map(signed)) as c_long)
}

/// Extended attributes.
///
/// # Safety
/// As the system call.
unsafe fn attribute_call(number: c_long, arguments: Arguments) -> Option<c_long> {
    let [a, b, c, d, e, _] = arguments;
    let (path, second) = (a as *const c_char, b as *const c_char);
    // SAFETY: the caller's arguments, passed to the function of the same meaning.
    Some(unsafe {
        match number {
            libc::SYS_fsetxattr => namespace::fsetxattr(int(a), second, c as _, d, int(e)).into(),
            libc::SYS_setxattr => namespace::setxattr(path, second, c as _, d, int(e)).into(),
            libc::SYS_lsetxattr => namespace::lsetxattr(path, second, c as _, d, int(e)).into(),
            libc::SYS_getxattr => namespace::getxattr(path, second, c as _, d) as c_long,
            libc::SYS_lgetxattr => namespace::lgetxattr(path, second, c as _, d) as c_long,
            libc::SYS_fgetxattr => namespace::fgetxattr(int(a), second, c as _, d) as c_long,
            libc::SYS_listxattr => namespace::listxattr(path, b as _, c) as c_long,
            libc::SYS_llistxattr => namespace::llistxattr(path, b as _, c) as c_long,
            libc::SYS_flistxattr => namespace::flistxattr(int(a), b as _, c) as c_long,
            _ => return None,
        }
    })
}
