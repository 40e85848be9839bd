//! System calls by number, and memory by address.
//!
//! Everything here takes plain numbers: wrong arguments are what this program is about. AIO calls
//! go through libc's `syscall`, as programs do; calls on the file go through libc's functions.

use std::{
    ffi::CStr,
    sync::atomic::{AtomicU32, Ordering},
};

/// A page, bytes.
pub const PAGE: u64 = 4096;
/// io_pgetevents(2) on x86-64; libc does not name it.
pub const SYS_IO_PGETEVENTS: i64 = 333;

/// The call's answer, or a negative errno.
pub fn call(number: i64, arguments: &[u64]) -> i64 {
    let mut words = [0; 6];
    words[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = words;
    // SAFETY: the calls of this program reach memory through the kernel's checked copies, and write
    // only to areas that it has mapped for them or that are refused.
    answer(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

/// What a libc function returned, or a negative errno.
pub fn answer(returned: i64) -> i64 {
    if returned == -1 { -i64::from(errno()) } else { returned }
}

/// This thread's errno.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Sets this thread's errno.
pub fn set_errno(value: i32) {
    // SAFETY: the place is this thread's own.
    unsafe { *libc::__errno_location() = value }
}

/// open(2) with mode 0600.
pub fn open(path: &CStr, flags: i32) -> i32 {
    // SAFETY: the path ends in a zero byte.
    to_int(answer(unsafe { libc::open(path.as_ptr(), flags, 0o600) }.into()))
}

/// close(2).
pub fn close(fd: i32) -> i64 {
    // SAFETY: a descriptor of this program, not owned by any Rust object.
    answer(unsafe { libc::close(fd) }.into())
}

/// pread(2).
pub fn pread(fd: i32, to: u64, len: u64, offset: i64) -> i64 {
    // SAFETY: the kernel checks the address; it lies in an area of this program.
    answer(unsafe { libc::pread(fd, to as *mut _, to_len(len), offset) } as i64)
}

/// pwrite(2).
pub fn pwrite(fd: i32, from: u64, len: u64, offset: i64) -> i64 {
    // SAFETY: the kernel checks the address.
    answer(unsafe { libc::pwrite(fd, from as *const _, to_len(len), offset) } as i64)
}

/// ftruncate(2).
pub fn ftruncate(fd: i32, size: i64) -> i64 {
    // SAFETY: plain numbers.
    answer(unsafe { libc::ftruncate(fd, size) }.into())
}

/// fsync(2).
pub fn fsync(fd: i32) -> i64 {
    // SAFETY: plain numbers.
    answer(unsafe { libc::fsync(fd) }.into())
}

/// lseek(2).
pub fn lseek(fd: i32, offset: i64, whence: i32) -> i64 {
    // SAFETY: plain numbers.
    answer(unsafe { libc::lseek(fd, offset, whence) })
}

/// mmap(2) of memory without a file; a negative errno if it fails.
pub fn map(at: u64, len: u64, protection: i32, flags: i32) -> i64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: with MAP_FIXED only over areas of this program's own.
    answer(unsafe { libc::mmap(at as *mut _, to_len(len), protection, flags, -1, 0) } as i64)
}

/// munmap(2).
pub fn unmap(at: u64, len: u64) -> i64 {
    // SAFETY: an area of this program's own.
    answer(unsafe { libc::munmap(at as *mut _, to_len(len)) }.into())
}

/// mprotect(2).
pub fn protect(at: u64, len: u64, protection: i32) -> i64 {
    // SAFETY: an area of this program's own.
    answer(unsafe { libc::mprotect(at as *mut _, to_len(len), protection) }.into())
}

/// mremap(2).
pub fn remap(at: u64, old: u64, new: u64, flags: i32, to: u64) -> i64 {
    let (old, new) = (to_len(old), to_len(new));
    // SAFETY: areas of this program's own.
    answer(unsafe { libc::mremap(at as *mut _, old, new, flags, to as *mut libc::c_void) } as i64)
}

/// fork(2).
pub fn fork() -> i32 {
    // SAFETY: called with one thread only, or the child calls nothing that could need another's
    // lock.
    to_int(answer(unsafe { libc::fork() }.into()))
}

/// Ends the process at once.
pub fn quit(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// waitpid(2): the raw status, or a negative errno.
pub fn wait_for(pid: i32, options: i32) -> i64 {
    let mut status = 0;
    // SAFETY: the status is ours.
    let got = answer(unsafe { libc::waitpid(pid, &raw mut status, options) }.into());
    if got < 0 { got } else { status.into() }
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> i64 {
    // SAFETY: plain numbers; a process that this program started, or its group.
    answer(unsafe { libc::kill(pid, signal) }.into())
}

/// This thread's number.
pub fn thread() -> i32 {
    to_int(call(libc::SYS_gettid, &[]))
}

/// This process's number.
pub fn process() -> i32 {
    to_int(call(libc::SYS_getpid, &[]))
}

/// Sends `signal` to a thread of this process.
pub fn signal_thread(thread: i32, signal: i32) -> i64 {
    call(libc::SYS_tgkill, &[word(process()), word(thread), word(signal)])
}

/// Lets others run.
pub fn give_way() {
    std::thread::yield_now();
}

/// An `int` as a system call's argument.
pub fn word(number: i32) -> u64 {
    i64::from(number).cast_unsigned()
}

/// A 32-bit word of memory.
pub fn load32(at: u64) -> u32 {
    shared(at).load(Ordering::Acquire)
}

/// Stores a 32-bit word.
pub fn store32(at: u64, value: u32) {
    shared(at).store(value, Ordering::Release);
}

fn shared<'a>(at: u64) -> &'a AtomicU32 {
    // SAFETY: the addresses given here are aligned and lie in areas of this program or in a ring;
    // a mistake is a crash, which the case reports.
    unsafe { AtomicU32::from_ptr(at as *mut u32) }
}

/// A 64-bit word of memory.
pub fn load64(at: u64) -> u64 {
    // SAFETY: as in `shared`.
    unsafe { (at as *const u64).read_unaligned() }
}

/// Stores a 64-bit word.
pub fn store64(at: u64, value: u64) {
    // SAFETY: as in `shared`.
    unsafe { (at as *mut u64).write_unaligned(value) }
}

/// The bytes at an address.
pub fn bytes(at: u64, len: u64) -> Vec<u8> {
    // SAFETY: as in `shared`.
    (0..len).map(|i| unsafe { ((at + i) as *const u8).read_volatile() }).collect()
}

/// Sets the bytes at an address.
pub fn put_bytes(at: u64, data: &[u8]) {
    for (i, byte) in (0..).zip(data) {
        // SAFETY: as in `shared`.
        unsafe { ((at + i) as *mut u8).write_volatile(*byte) }
    }
}

/// Copies a plain value to an address.
pub fn put<T: Copy>(at: u64, value: &T) {
    // SAFETY: as in `shared`; the value is plain.
    unsafe { (at as *mut T).write_unaligned(*value) }
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// How often the counting handler has run.
pub fn signals() -> u32 {
    SIGNALS.load(Ordering::Relaxed)
}

/// Counts a signal when it comes; `flags` as of sigaction(2).
pub fn count_signal(signal: i32, flags: i32) {
    handle(signal, count as *const () as usize, flags);
}

/// Ignores a signal.
pub fn ignore_signal(signal: i32) {
    handle(signal, libc::SIG_IGN, 0);
}

fn handle(signal: i32, handler: usize, flags: i32) {
    // SAFETY: zero is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the handler only counts.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

/// Blocks or unblocks a signal in this thread.
pub fn mask_signal(how: i32, signal: i32) {
    let set = signal_bit(signal);
    let at = (&raw const set) as u64;
    call(libc::SYS_rt_sigprocmask, &[word(how), at, 0, 8]);
}

/// The signals that this thread blocks, one bit each.
pub fn signal_mask() -> u64 {
    let mut set = 0_u64;
    let at = (&raw mut set) as u64;
    call(libc::SYS_rt_sigprocmask, &[0, 0, at, 8]);
    set
}

/// A signal's bit in a mask.
pub const fn signal_bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn to_int(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MIN)
}

fn to_len(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// The name of an errno, for transcripts.
pub fn name(errno: i64) -> String {
    let known = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EEXIST, "EEXIST"),
        (libc::EISDIR, "EISDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::ESPIPE, "ESPIPE"),
        (libc::EPIPE, "EPIPE"),
        (libc::ENOTCONN, "ENOTCONN"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ECHILD, "ECHILD"),
        (libc::EINPROGRESS, "EINPROGRESS"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EOVERFLOW, "EOVERFLOW"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENXIO, "ENXIO"),
    ];
    known
        .iter()
        .find(|(number, _)| i64::from(*number) == errno)
        .map_or_else(|| format!("E{errno}"), |(_, name)| (*name).to_owned())
}

/// A number, or the name of a negative errno.
pub fn show(answer: i64) -> String {
    if (-4095..0).contains(&answer) { format!("-{}", name(-answer)) } else { answer.to_string() }
}
