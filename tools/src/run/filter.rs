//! The filter in front of the program's own system call instructions: a seccomp program that lets
//! the warden look at the few calls that could make a plain file under a protected name, or seem to
//! succeed on a placeholder descriptor.
//!
//! Holds: a call whose number is not listed costs nothing measurable (the kernel keeps a bitmap of
//! numbers that pass whatever their arguments are); the library's own calls carry
//! [`PASS`] and are not stopped. Nobody can take the filter off; children and exec inherit it.

use std::{
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    os::unix::process::CommandExt as _,
    process::Command,
};

use postern_sim::sys::{FILTERED, PASS};

/// AUDIT_ARCH_X86_64 and AUDIT_ARCH_I386, linux/audit.h.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
/// Numbers from here on are x32's.
const X32: u32 = 0x4000_0000;
/// i386 numbers of open, creat, truncate, truncate64, openat and openat2.
const FILTERED_I386: [u32; 6] = [5, 8, 92, 193, 295, 437];
const IO_URING_SETUP: u32 = 425;

/// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const SIXTH_LOW: u32 = 16 + 8 * 5;
const SIXTH_HIGH: u32 = SIXTH_LOW + 4;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const ASK: u32 = libc::SECCOMP_RET_USER_NOTIF;
const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn load(offset: u32) -> libc::sock_filter {
    let code = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    libc::sock_filter { code, jt: 0, jf: 0, k: offset }
}

fn end(result: u32) -> libc::sock_filter {
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    libc::sock_filter { code, jt: 0, jf: 0, k: result }
}

/// Goes `then` instructions further if the loaded word is `value` (or with JGE, not below it),
/// `or_else` if not.
fn test(comparison: u32, value: u32, then: usize, or_else: usize) -> libc::sock_filter {
    let code = (libc::BPF_JMP | comparison | libc::BPF_K) as u16;
    let [jt, jf] = [then, or_else].map(|skip| u8::try_from(skip).unwrap_or(u8::MAX));
    libc::sock_filter { code, jt, jf, k: value }
}

/// The program.
fn program() -> Vec<libc::sock_filter> {
    let (low, high) = (PASS as u32, (PASS as u64 >> 32) as u32);
    let mut native = vec![
        load(NUMBER),
        test(libc::BPF_JGE, X32, 0, 1),
        end(NO_SUCH_CALL),
        test(libc::BPF_JEQ, IO_URING_SETUP, 0, 1),
        end(NO_SUCH_CALL),
    ];
    for (index, number) in FILTERED.iter().enumerate() {
        let to_check = FILTERED.len() - index;
        native.push(test(libc::BPF_JEQ, u32::try_from(*number).unwrap_or(u32::MAX), to_check, 0));
    }
    native.extend([
        end(ALLOW),
        load(SIXTH_LOW),
        test(libc::BPF_JEQ, low, 0, 3),
        load(SIXTH_HIGH),
        test(libc::BPF_JEQ, high, 0, 1),
        end(ALLOW),
        end(ASK),
    ]);
    let mut old = vec![load(NUMBER), test(libc::BPF_JEQ, IO_URING_SETUP, 0, 1), end(NO_SUCH_CALL)];
    for (index, number) in FILTERED_I386.iter().enumerate() {
        old.push(test(libc::BPF_JEQ, *number, FILTERED_I386.len() - index, 0));
    }
    old.extend([end(ALLOW), end(ASK)]);
    let mut all = vec![load(ARCHITECTURE), test(libc::BPF_JEQ, X86_64, 0, native.len())];
    all.extend(native);
    all.extend([test(libc::BPF_JEQ, I386, 1, 0), end(NO_SUCH_CALL)]);
    all.extend(old);
    all
}

/// Room for one control message with one descriptor.
#[repr(C, align(8))]
struct Rights {
    header: libc::cmsghdr,
    descriptor: RawFd,
}

/// The parent's end of the channel on which the started program hands out its listener.
pub struct Channel {
    ours: OwnedFd,
    /// Kept open until the child has been started.
    _theirs: OwnedFd,
}

/// Lets the program that `command` starts install the filter right before it becomes itself. If the
/// launcher dies the program is ended: nobody would answer for it any more.
///
/// # Errors
/// What socketpair(2) says.
pub fn install_in(command: &mut Command) -> io::Result<Channel> {
    let mut pair = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors, which the call fills when it answers 0.
    let (ours, theirs) = unsafe {
        if libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1]))
    };
    let to = theirs.as_raw_fd();
    let program = program();
    // SAFETY: 1. Between fork and exec: system calls only, nothing allocates. 2. `program` lives
    //    in the closure.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            hand_over(to, install(&program));
            Ok(())
        });
    }
    Ok(Channel { ours, _theirs: theirs })
}

/// Installs the filter in the calling process; answers the listener, or a negative errno.
fn install(program: &[libc::sock_filter]) -> i32 {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_ptr().cast_mut(),
    };
    let wait = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE_RECV;
    let call = || {
        // SAFETY: the filter lives through the call.
        let answer = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, wait, &raw const filter)
        };
        // SAFETY: the calling thread's errno.
        if answer >= 0 { answer as i32 } else { -unsafe { *libc::__errno_location() } }
    };
    match call() {
        // Without CAP_SYS_ADMIN a filter needs a process that cannot gain privileges.
        answer if answer == -libc::EACCES => {
            // SAFETY: takes numbers only.
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            call()
        }
        answer => answer,
    }
}

/// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, since Linux 5.19.
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// Sends the listener, or the errno that stands in its place. In the child, before exec.
fn hand_over(to: RawFd, listener: i32) {
    let mut word = listener.to_ne_bytes();
    let mut part = libc::iovec { iov_base: word.as_mut_ptr().cast(), iov_len: word.len() };
    // SAFETY: all-zero is a valid cmsghdr and msghdr; both live through the call.
    unsafe {
        let (mut rights, mut message): (Rights, libc::msghdr) = (zeroed(), zeroed());
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        if listener >= 0 {
            rights.header.cmsg_len = size_of::<libc::cmsghdr>() + size_of::<RawFd>();
            rights.header.cmsg_level = libc::SOL_SOCKET;
            rights.header.cmsg_type = libc::SCM_RIGHTS;
            rights.descriptor = listener;
            message.msg_control = (&raw mut rights).cast();
            message.msg_controllen = size_of::<Rights>();
        }
        libc::sendmsg(to, &raw const message, 0);
        if listener >= 0 {
            libc::close(listener);
        }
    }
}

impl Channel {
    /// The listener of the program that has been started.
    ///
    /// # Errors
    /// Why it has none: the errno of seccomp(2).
    pub fn listener(&self) -> io::Result<OwnedFd> {
        let mut word = [0; 4];
        let mut part = libc::iovec { iov_base: word.as_mut_ptr().cast(), iov_len: word.len() };
        // SAFETY: all-zero is a valid cmsghdr and msghdr; all live through the call; the
        //    descriptor is new and ours if a control message came.
        unsafe {
            let (mut rights, mut message): (Rights, libc::msghdr) = (zeroed(), zeroed());
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = (&raw mut rights).cast();
            message.msg_controllen = size_of::<Rights>();
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            if libc::recvmsg(self.ours.as_raw_fd(), &raw mut message, flags) < 0 {
                return Err(io::Error::last_os_error());
            }
            if message.msg_controllen >= size_of::<libc::cmsghdr>() + size_of::<RawFd>()
                && rights.header.cmsg_type == libc::SCM_RIGHTS
            {
                return Ok(OwnedFd::from_raw_fd(rights.descriptor));
            }
        }
        Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(word)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers, by an interpreter of the four instructions it uses.
    fn answer(architecture: u32, number: u32, sixth: u64) -> u32 {
        let words = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => architecture,
            SIXTH_LOW => sixth as u32,
            SIXTH_HIGH => (sixth >> 32) as u32,
            other => panic!("loads {other}"),
        };
        let (program, mut at, mut loaded) = (program(), 0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) {
                0x20 => loaded = words(step.k),
                0x15 => at += usize::from(if loaded == step.k { step.jt } else { step.jf }),
                0x35 => at += usize::from(if loaded >= step.k { step.jt } else { step.jf }),
                0x06 => return step.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn only_listed_calls_without_the_pass_are_asked_about() {
        let pass = PASS as u64;
        for number in 0..600 {
            let listed = FILTERED.contains(&i64::from(number));
            let expected = match number {
                IO_URING_SETUP => NO_SUCH_CALL,
                _ if listed => ASK,
                _ => ALLOW,
            };
            for sixth in [0, pass ^ 1, pass ^ 1 << 40, u64::MAX] {
                assert_eq!(answer(X86_64, number, sixth), expected, "{number}");
            }
            if listed {
                assert_eq!(answer(X86_64, number, pass), ALLOW, "{number}");
            }
        }
        assert_eq!(answer(X86_64, X32 | 257, 0), NO_SUCH_CALL);
    }

    #[test]
    fn a_32_bit_program_is_asked_when_it_opens_and_others_do_not_run() {
        for number in FILTERED_I386 {
            assert_eq!(answer(I386, number, PASS as u64), ASK, "{number}");
        }
        assert_eq!(answer(I386, 4, 0), ALLOW);
        assert_eq!(answer(I386, IO_URING_SETUP, 0), NO_SUCH_CALL);
        assert_eq!(answer(0xc000_00b7, 56, 0), NO_SUCH_CALL);
    }
}
