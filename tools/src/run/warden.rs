//! The warden: answers for calls that the filter stops ([`super::filter`]).
//!
//! A call that concerns nothing protected goes on in the kernel. One that names a protected path,
//! or asks a placeholder descriptor for what would silently do nothing, came by an instruction that
//! the library did not catch (a statically linked program, a program without the library, inline
//! assembly): it is refused and said on stderr.
//!
//! Holds: no plain file comes into being under a protected name, and nothing is synced that is not;
//! the warden waits for nobody but the kernel.
//! Does not hold against the program itself: it may change a path while the warden reads it. The
//! warden is a net under the library, not a wall; the program is the owner of the data.

use std::{
    collections::HashSet,
    mem::zeroed,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use postern_sim::files::path::Normal;

/// ioctl(2) requests of a seccomp listener, linux/seccomp.h.
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const SET_FLAGS: libc::c_ulong = 0x4008_2104;
/// Wake the caller on this processor: it has nothing else to do meanwhile. Since Linux 6.6.
const SYNC_WAKE_UP: u64 = 1;
/// Longest path looked at, with its NUL.
const LONGEST: usize = 1024;
const PAGE: u64 = 4096;
/// AUDIT_ARCH_X86_64.
const X86_64: u32 = 0xc000_003e;
/// What the library calls its placeholders.
const PLACEHOLDER: &[u8] = b"/memfd:postern-file-";

/// Answers for one run's program and its children.
pub struct Warden {
    listener: OwnedFd,
    /// Absolute paths that are protected, with all beneath them.
    protected: Vec<Vec<u8>>,
    /// What has been said.
    said: HashSet<String>,
}

/// What a call's arguments mean.
enum Meaning {
    /// Paths: place of the directory descriptor, if it has one, and of the path.
    Paths(&'static [(Option<usize>, usize)]),
    /// The first argument is a descriptor.
    Descriptor,
}

fn meaning(architecture: u32, number: i64) -> Meaning {
    const FIRST: Meaning = Meaning::Paths(&[(None, 0)]);
    const AT: Meaning = Meaning::Paths(&[(Some(0), 1)]);
    if architecture != X86_64 {
        // openat and openat2 of i386; the others begin with the path.
        return if number == 295 || number == 437 { AT } else { FIRST };
    }
    match number {
        libc::SYS_open
        | libc::SYS_creat
        | libc::SYS_truncate
        | libc::SYS_mkdir
        | libc::SYS_mknod
        | libc::SYS_unlink
        | libc::SYS_rmdir => FIRST,
        libc::SYS_rename | libc::SYS_link => Meaning::Paths(&[(None, 0), (None, 1)]),
        libc::SYS_symlink => Meaning::Paths(&[(None, 1)]),
        libc::SYS_openat
        | libc::SYS_openat2
        | libc::SYS_mkdirat
        | libc::SYS_mknodat
        | libc::SYS_unlinkat
        | libc::SYS_utimensat => AT,
        libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_linkat => {
            Meaning::Paths(&[(Some(0), 1), (Some(2), 3)])
        }
        libc::SYS_symlinkat => Meaning::Paths(&[(Some(1), 2)]),
        _ => Meaning::Descriptor,
    }
}

impl Warden {
    /// A warden for the program behind `listener`.
    pub fn new<'a>(listener: OwnedFd, guest_paths: impl Iterator<Item = &'a str>) -> Self {
        let protected = guest_paths
            .filter_map(|path| Normal::new(b"/", path.as_bytes()))
            .map(|path| path.as_bytes().to_vec())
            .collect();
        Self { listener, protected, said: HashSet::new() }
    }

    /// Answers from a thread of its own until the last process under the filter has ended.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(self) -> std::io::Result<()> {
        let flags = SYNC_WAKE_UP;
        // SAFETY: the request takes a number. An older kernel refuses: calls are slower then.
        unsafe { libc::ioctl(self.listener.as_raw_fd(), SET_FLAGS, flags) };
        std::thread::Builder::new().name("warden".into()).spawn(move || self.serve()).map(drop)
    }

    fn serve(mut self) {
        loop {
            // SAFETY: all-zero is what the kernel asks for; it fills the structure.
            let (asked, call) = unsafe {
                let mut call: libc::seccomp_notif = zeroed();
                let at = &raw mut call;
                (libc::ioctl(self.listener.as_raw_fd(), RECEIVE, at), call)
            };
            if asked != 0 {
                // ENOENT: the caller is gone; or a signal.
                match std::io::Error::last_os_error().raw_os_error() {
                    Some(libc::ENOENT) if self.is_over() => return,
                    Some(libc::ENOENT | libc::EINTR) => continue,
                    _ => return,
                }
            }
            let error = self.judge(&call).map_or(0, |errno| -errno);
            let flags = if error == 0 { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 } else { 0 };
            let answer = libc::seccomp_notif_resp { id: call.id, val: 0, error, flags };
            // SAFETY: the structure lives through the call. A caller that is gone is no matter.
            unsafe { libc::ioctl(self.listener.as_raw_fd(), SEND, &raw const answer) };
        }
    }

    /// Whether no process is left under the filter.
    fn is_over(&self) -> bool {
        let mut poll =
            libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call, which does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) };
        poll.revents & libc::POLLHUP != 0
    }

    /// The errno to refuse a call with.
    fn judge(&mut self, call: &libc::seccomp_notif) -> Option<i32> {
        let (data, arguments) = (&call.data, &call.data.args);
        let pid = call.pid;
        let paths = match meaning(data.arch, data.nr.into()) {
            Meaning::Paths(paths) => paths,
            Meaning::Descriptor => {
                return is_placeholder(pid, arguments[0] as i32).then(|| {
                    self.say(pid, "a protected descriptor", "EBADF");
                    libc::EBADF
                });
            }
        };
        for &(directory, path) in paths {
            let directory = directory.map_or(libc::AT_FDCWD, |at| arguments[at] as i32);
            if arguments[path] == 0 {
                // utimensat without a path: the descriptor itself.
                if is_placeholder(pid, directory) {
                    self.say(pid, "a protected descriptor", "EBADF");
                    return Some(libc::EBADF);
                }
                continue;
            }
            let mut room = [0; LONGEST];
            let Some(path) = read_path(pid, arguments[path], &mut room) else { continue };
            if let Some(path) = self.protected_path(pid, directory, path) {
                self.say(pid, &path, "EACCES");
                return Some(libc::EACCES);
            }
        }
        None
    }

    /// The protected path that `path` names or lies beneath, from `directory`.
    fn protected_path(&self, pid: u32, directory: i32, path: &[u8]) -> Option<String> {
        let base = if path.first() == Some(&b'/') {
            None
        } else {
            let link = match directory {
                libc::AT_FDCWD => format!("/proc/{pid}/cwd"),
                number => format!("/proc/{pid}/fd/{number}"),
            };
            Some(std::fs::read_link(link).ok()?)
        };
        let base = base.as_deref().map_or(&b"/"[..], bytes_of);
        let normal = Normal::new(base, path)?;
        let path = normal.as_bytes();
        let covers = |protected: &Vec<u8>| {
            path.strip_prefix(protected.as_slice())
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        self.protected.iter().any(covers).then(|| String::from_utf8_lossy(path).into_owned())
    }

    /// Says once what has been refused.
    fn say(&mut self, pid: u32, what: &str, errno: &str) {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let line = format!(
            "postern: {what}: {} asked for it by a system call instruction of its own: refused \
             ({errno}); only calls by way of libc reach a sealed volume",
            name.trim()
        );
        if self.said.len() < 64 && self.said.insert(line.clone()) {
            eprintln!("{line}");
        }
    }
}

fn bytes_of(path: &Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt as _;
    path.as_os_str().as_bytes()
}

/// Whether descriptor `fd` of `pid` is one of the library's placeholders.
fn is_placeholder(pid: u32, fd: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
        .is_ok_and(|target| bytes_of(&target).starts_with(PLACEHOLDER))
}

/// The C string at `at` in `pid`, without its NUL.
fn read_path(pid: u32, at: u64, room: &mut [u8; LONGEST]) -> Option<&[u8]> {
    let mut length = 0;
    while length < LONGEST {
        let from = at.checked_add(length as u64)?;
        // Not past the page that the string may end in.
        let step = (PAGE - from % PAGE).min((LONGEST - length) as u64);
        let part = room.get_mut(length..length + usize::try_from(step).ok()?)?;
        let to = libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() };
        let theirs = libc::iovec {
            iov_base: core::ptr::without_provenance_mut(usize::try_from(from).ok()?),
            iov_len: part.len(),
        };
        let pid = libc::pid_t::try_from(pid).ok()?;
        // SAFETY: `to` is writable for its length; the kernel checks the other process's range.
        let read =
            unsafe { libc::process_vm_readv(pid, &raw const to, 1, &raw const theirs, 1, 0) };
        let read = usize::try_from(read).ok().filter(|&n| n > 0)?;
        if let Some(end) = part[..read].iter().position(|&byte| byte == 0) {
            return Some(&room[..length + end]);
        }
        length += read;
    }
    None
}
