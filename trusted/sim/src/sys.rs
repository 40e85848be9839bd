//! Raw system calls: the simulated enclave's own way to the kernel, past every interposed symbol.
#![allow(unsafe_code)]

use core::arch::asm;

use postern_trusted::errno::Errno;

/// The sixth argument of every system call of ours that the launcher's filter would stop and that
/// has fewer arguments: the filter lets calls with it pass. (A page of code at a fixed address would
/// serve as well, but no unwinder finds its way out of one: a thread cancelled in open(2) would
/// lose its destructors.)
pub const PASS: usize = 0x706f_7374_6572_6e21;

/// What the launcher's filter stops unless it carries [`PASS`]: calls that would make or change a
/// plain file under a protected name, and calls that would succeed on a placeholder and do nothing.
/// None has a sixth argument.
pub const FILTERED: [i64; 26] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_truncate,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rmdir,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fsetxattr,
    libc::SYS_utimensat,
];

/// System call `number` with six arguments. Answers the kernel's value: -4095..=-1 is an error.
///
/// # Safety
/// As the system call itself: pointers among the arguments must be valid for what it does.
#[inline]
pub unsafe fn syscall6(
    number: i64,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    let result: isize;
    // SAFETY: 1. Registers: the kernel clobbers rcx and r11 and returns in rax; nothing else
    //    changes. 2. Memory: the caller vouches for the arguments.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Splits a kernel answer into a value or a positive errno.
///
/// # Errors
/// The errno, if the kernel answered -4095..=-1.
#[inline]
pub fn check(result: isize) -> Result<usize, Errno> {
    if (-4095..0).contains(&result) {
        return Err(Errno(i32::try_from(-result).unwrap_or(5)));
    }
    Ok(result.cast_unsigned())
}

/// A system call whose answer is a descriptor.
///
/// # Safety
/// As [`syscall6`].
unsafe fn descriptor(number: i64, arguments: [usize; 4]) -> Result<i32, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: the caller vouches for the arguments.
    let made = check(unsafe { syscall6(number, a, b, c, d, 0, PASS) })?;
    i32::try_from(made).map_err(|_| Errno::EMFILE)
}

/// A system call that takes numbers only.
fn numbers(number: i64, a: usize, b: usize, c: usize) -> Result<usize, Errno> {
    // SAFETY: no pointers among the arguments of any call below.
    check(unsafe { syscall6(number, a, b, c, 0, 0, 0) })
}

/// A descriptor as the kernel takes it; a negative one stays invalid.
#[inline]
fn word(value: i32) -> usize {
    value as isize as usize
}

/// close(2).
///
/// # Errors
/// `EBADF`, or what the file's last close reports; the descriptor is gone either way.
pub fn close(fd: i32) -> Result<(), Errno> {
    numbers(libc::SYS_close, word(fd), 0, 0).map(drop)
}

/// close_range(2).
///
/// # Errors
/// `EINVAL` for an empty range or unknown flags.
pub fn close_range(first: u32, last: u32, flags: u32) -> Result<(), Errno> {
    let [first, last, flags] = [first, last, flags].map(|n| n as usize);
    numbers(libc::SYS_close_range, first, last, flags).map(drop)
}

/// fcntl(2) with a numeric argument.
///
/// # Errors
/// What the kernel says.
pub fn fcntl(fd: i32, command: i32, argument: usize) -> Result<usize, Errno> {
    numbers(libc::SYS_fcntl, word(fd), word(command), argument)
}

/// dup(2).
///
/// # Errors
/// What the kernel says.
pub fn dup(old: i32) -> Result<i32, Errno> {
    let new = numbers(libc::SYS_dup, word(old), 0, 0)?;
    i32::try_from(new).map_err(|_| Errno::EMFILE)
}

/// dup3(2).
///
/// # Errors
/// What the kernel says; `EINVAL` if both are the same.
pub fn dup3(old: i32, new: i32, flags: i32) -> Result<i32, Errno> {
    numbers(libc::SYS_dup3, word(old), word(new), word(flags)).map(|_| new)
}

/// memfd_create(2), close-on-exec.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn memfd(name: &core::ffi::CStr) -> Result<i32, Errno> {
    let flags = (libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as usize;
    // SAFETY: `name` is a C string that lives through the call.
    unsafe { descriptor(libc::SYS_memfd_create, [name.as_ptr() as usize, flags, 0, 0]) }
}

/// openat(2) from the working directory.
///
/// # Errors
/// What the kernel says.
pub fn open(path: &core::ffi::CStr, flags: i32) -> Result<i32, Errno> {
    let here = word(libc::AT_FDCWD);
    // SAFETY: `path` is a C string that lives through the call.
    unsafe { descriptor(libc::SYS_openat, [here, path.as_ptr() as usize, word(flags), 0]) }
}

/// Whether there is something at `path`.
#[must_use]
pub fn exists(path: &core::ffi::CStr) -> bool {
    open(path, libc::O_PATH | libc::O_CLOEXEC).map(close).is_ok()
}

/// write(2): how many bytes were taken.
///
/// # Errors
/// What the kernel says.
pub fn write(fd: i32, data: &[u8]) -> Result<usize, Errno> {
    let at = data.as_ptr() as usize;
    // SAFETY: the kernel reads at most `data.len()` bytes of `data`.
    check(unsafe { syscall6(libc::SYS_write, word(fd), at, data.len(), 0, 0, 0) })
}

/// readlink(2): the length of what was put into `out`.
///
/// # Errors
/// What the kernel says.
pub fn readlink(path: &core::ffi::CStr, out: &mut [u8]) -> Result<usize, Errno> {
    let at = path.as_ptr() as usize;
    // SAFETY: `path` is a C string; the kernel writes at most `out.len()` bytes to `out`.
    let raw = unsafe {
        let to = out.as_mut_ptr() as usize;
        syscall6(libc::SYS_readlink, at, to, out.len(), 0, 0, 0)
    };
    check(raw)
}

/// getcwd(2): the length of the path put into `out`, without its NUL. A directory outside the
/// root answers a path that does not begin with `/`.
///
/// # Errors
/// What the kernel says.
pub fn getcwd(out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    let raw =
        unsafe { syscall6(libc::SYS_getcwd, out.as_mut_ptr() as usize, out.len(), 0, 0, 0, 0) };
    check(raw).map(|length| length.saturating_sub(1))
}

/// chdir(2).
///
/// # Errors
/// What the kernel says.
pub fn chdir(path: &core::ffi::CStr) -> Result<(), Errno> {
    // SAFETY: `path` is a C string that lives through the call.
    let raw = unsafe { syscall6(libc::SYS_chdir, path.as_ptr() as usize, 0, 0, 0, 0, 0) };
    check(raw).map(drop)
}

/// getpid(2), asked of the kernel every time.
#[must_use]
pub fn getpid() -> u32 {
    let id = numbers(libc::SYS_getpid, 0, 0, 0).unwrap_or(0);
    u32::try_from(id).unwrap_or(0)
}

/// gettid(2).
#[must_use]
pub fn gettid() -> u32 {
    let id = numbers(libc::SYS_gettid, 0, 0, 0).unwrap_or(0);
    u32::try_from(id).unwrap_or(0)
}

/// getuid(2).
#[must_use]
pub fn user_id() -> u32 {
    let id = numbers(libc::SYS_getuid, 0, 0, 0).unwrap_or(0);
    u32::try_from(id).unwrap_or(0)
}

/// geteuid(2) and getegid(2).
#[must_use]
pub fn effective_ids() -> (u32, u32) {
    let [user, group] = [libc::SYS_geteuid, libc::SYS_getegid]
        .map(|call| u32::try_from(numbers(call, 0, 0, 0).unwrap_or(0)).unwrap_or(u32::MAX));
    (user, group)
}

/// Whether two descriptors of this process lead to the same open file; `false` where the kernel
/// does not tell (kcmp(2) is optional).
#[must_use]
pub fn is_same_file(one: i32, other: i32) -> bool {
    const KCMP_FILE: usize = 0;
    let me = getpid() as usize;
    // SAFETY: takes numbers only.
    let raw = unsafe { syscall6(libc::SYS_kcmp, me, me, KCMP_FILE, word(one), word(other), 0) };
    raw == 0
}

/// Capabilities 0 to 31 that the calling thread has in effect (capget(2)), as a mask.
#[must_use]
pub fn effective_capabilities() -> u32 {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; then the same for capabilities from 32 on.
    let mut sets = [0_u32; 6];
    // SAFETY: the kernel reads eight bytes and writes 24.
    let raw = unsafe {
        let (from, to) = ((&raw const header) as usize, (&raw mut sets) as usize);
        syscall6(libc::SYS_capget, from, to, 0, 0, 0, 0)
    };
    if raw == 0 { sets[0] } else { 0 }
}

fn soft_limit(resource: usize) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let to = (&raw mut limit) as usize;
    // SAFETY: the kernel writes one rlimit64, which has this layout on x86-64, to `limit`.
    let raw = unsafe { syscall6(libc::SYS_prlimit64, 0, resource, 0, to, 0, 0) };
    (raw == 0).then_some(limit.rlim_cur)
}

/// Soft limit of descriptors (RLIMIT_NOFILE).
#[must_use]
pub fn descriptor_limit() -> u64 {
    soft_limit(libc::RLIMIT_NOFILE as usize).unwrap_or(256)
}

/// Soft limit of a file's size in bytes (RLIMIT_FSIZE).
#[must_use]
pub fn file_size_limit() -> u64 {
    soft_limit(libc::RLIMIT_FSIZE as usize).unwrap_or(u64::MAX)
}

/// ftruncate(2).
///
/// # Errors
/// What the kernel says.
pub fn ftruncate(fd: i32, bytes: usize) -> Result<(), Errno> {
    numbers(libc::SYS_ftruncate, word(fd), bytes, 0).map(drop)
}

/// Gives a memory file of ours its size, whatever the guest's RLIMIT_FSIZE: that is about its own
/// files, and must not end it with SIGXFSZ here. The soft limit is lifted for the moment of the
/// call; where the hard one is too small as well the call fails.
///
/// # Errors
/// `EFBIG`: beyond the hard limit. `ENOMEM`.
pub fn size_memory_file(fd: i32, bytes: usize) -> Result<(), Errno> {
    if file_size_limit() >= bytes as u64 {
        return ftruncate(fd, bytes);
    }
    without_signal(libc::SIGXFSZ, || {
        let resource = libc::RLIMIT_FSIZE as usize;
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let to = (&raw mut limit) as usize;
        // SAFETY: the kernel writes one rlimit64, which has this layout on x86-64, to `limit`.
        check(unsafe { syscall6(libc::SYS_prlimit64, 0, resource, 0, to, 0, 0) })?;
        let set = |limit: &libc::rlimit| {
            let from = core::ptr::from_ref(limit) as usize;
            // SAFETY: the kernel reads one rlimit64.
            check(unsafe { syscall6(libc::SYS_prlimit64, 0, resource, from, 0, 0, 0) })
        };
        let lifted = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        set(&lifted)?;
        let sized = ftruncate(fd, bytes);
        set(&limit)?;
        sized
    })
}

/// Runs `job` without a `signal` that it raises itself reaching anybody: held back meanwhile, and
/// taken away if it is pending afterwards and was not before.
fn without_signal<T>(signal: i32, job: impl FnOnce() -> T) -> T {
    const SET_BYTES: usize = 8;
    let only = 1_u64 << (signal - 1);
    let (mut before, mut pending) = (0_u64, 0_u64);
    let (block, restore) = (libc::SIG_BLOCK as usize, libc::SIG_SETMASK as usize);
    let set = (&raw const only) as usize;
    // SAFETY: the kernel reads and writes sets of eight bytes.
    unsafe {
        let old = (&raw mut before) as usize;
        syscall6(libc::SYS_rt_sigprocmask, block, set, old, SET_BYTES, 0, 0);
        let to = (&raw mut pending) as usize;
        syscall6(libc::SYS_rt_sigpending, to, SET_BYTES, 0, 0, 0, 0);
    }
    let result = job();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above; nothing is waited for.
    unsafe {
        if pending & only == 0 {
            let time = (&raw const now) as usize;
            syscall6(libc::SYS_rt_sigtimedwait, set, 0, time, SET_BYTES, 0, 0);
        }
        let old = (&raw const before) as usize;
        syscall6(libc::SYS_rt_sigprocmask, restore, old, 0, SET_BYTES, 0, 0);
    }
    result
}

/// Whether `group` is among the caller's supplementary groups.
#[must_use]
pub fn is_in_group(group: u32) -> bool {
    let count = numbers(libc::SYS_getgroups, 0, 0, 0).unwrap_or(0);
    let mut groups = vec![0_u32; count];
    let to = groups.as_mut_ptr() as usize;
    // SAFETY: the kernel writes at most `count` numbers.
    let found = check(unsafe { syscall6(libc::SYS_getgroups, count, to, 0, 0, 0, 0) }).unwrap_or(0);
    count > 0 && groups.get(..found).is_some_and(|groups| groups.contains(&group))
}

/// fstat(2).
///
/// # Errors
/// What the kernel answers.
pub fn fstat(fd: i32) -> Result<libc::stat, Errno> {
    // SAFETY: all-zero is a valid stat: it has only integers.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    let to = (&raw mut stat) as usize;
    // SAFETY: the kernel writes one stat to `stat`.
    check(unsafe { syscall6(libc::SYS_fstat, word(fd), to, 0, 0, 0, 0) })?;
    Ok(stat)
}

/// The size of the file behind `fd`, in bytes.
///
/// # Errors
/// What fstat(2) says.
pub fn file_size(fd: i32) -> Result<u64, Errno> {
    fstat(fd).map(|stat| stat.st_size.cast_unsigned())
}

/// getdents64(2): the length of what was put into `out`, 0 at the end.
///
/// # Errors
/// What the kernel says.
pub fn entries(directory: i32, out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    check(unsafe {
        let to = out.as_mut_ptr() as usize;
        syscall6(libc::SYS_getdents64, word(directory), to, out.len(), 0, 0, 0)
    })
}

/// kill(2).
///
/// # Errors
/// `EPERM`, `ESRCH`, `EINVAL`.
pub fn kill(process: u32, signal: i32) -> Result<(), Errno> {
    numbers(libc::SYS_kill, process as usize, word(signal), 0).map(drop)
}

/// getpgid(2); 0 is the calling process. `None` where there is no such process.
#[must_use]
pub fn process_group(process: u32) -> Option<u32> {
    let group = numbers(libc::SYS_getpgid, process as usize, 0, 0).ok()?;
    u32::try_from(group).ok()
}

/// Lets other threads run.
pub fn yield_now() {
    let _ = numbers(libc::SYS_sched_yield, 0, 0, 0);
}

/// Sleeps for a millisecond, or until a signal comes: for waits that nobody can end by a ring.
pub fn nap() {
    let moment = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    // SAFETY: `moment` lives through the call; what is left is not asked for.
    unsafe { syscall6(libc::SYS_nanosleep, (&raw const moment) as usize, 0, 0, 0, 0, 0) };
}

/// Wall-clock time (CLOCK_REALTIME) as seconds and nanoseconds.
#[must_use]
pub fn wall_clock() -> (i64, i64) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable. clock_gettime is async-signal-safe and not interposed.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
    (now.tv_sec, now.tv_nsec)
}
