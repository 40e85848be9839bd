//! What the kernel holds in place of a protected file's descriptor.
//!
//! A memfd, opened once more with access mode 3 (neither readable nor writable): the kernel's own
//! tables treat it as any descriptor (fork, dup, close-on-exec, SCM_RIGHTS), and raw I/O on it
//! fails with `EBADF` instead of finding plaintext or a wrong file. The number is 512 or higher
//! where the limit allows.

use core::ffi::CStr;

use postern_trusted::errno::Errno;

use crate::sys;

/// Placeholders lie from this number on, so that a filter can tell them at a glance.
const WINDOW: usize = 512;
/// open(2)'s access mode that allows neither reading nor writing.
const NO_ACCESS: i32 = 3;

/// A new placeholder.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `ENOENT` where /proc is not mounted.
pub fn make(close_on_exec: bool) -> Result<i32, Errno> {
    let memfd = sys::memfd(c"postern")?;
    let placeholder = seal_and_reopen(memfd, close_on_exec);
    let _ = sys::close(memfd);
    placeholder
}

fn seal_and_reopen(memfd: i32, close_on_exec: bool) -> Result<i32, Errno> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    sys::fcntl(memfd, libc::F_ADD_SEALS, usize::try_from(seals).unwrap_or(0))?;
    let mut room = [0; 32];
    let opened = sys::open(own_path(memfd, &mut room)?, NO_ACCESS | libc::O_CLOEXEC)?;
    let command = if close_on_exec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
    let placeholder = match sys::fcntl(opened, command, WINDOW) {
        // The limit is below the window, or the window is full.
        Err(Errno::EINVAL | Errno::EMFILE) => sys::fcntl(opened, command, 0),
        other => other,
    };
    let _ = sys::close(opened);
    i32::try_from(placeholder?).map_err(|_| Errno::EMFILE)
}

/// A descriptor, opened for reading, of a file that holds `text` and nothing else. `flags` may have
/// `O_CLOEXEC`.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `ENOENT` where /proc is not mounted.
pub fn text(text: &str, flags: i32) -> Result<i32, Errno> {
    let memfd = sys::memfd(c"text")?;
    let opened = sys::write(memfd, text.as_bytes()).and_then(|_| {
        let mut room = [0; 32];
        sys::open(own_path(memfd, &mut room)?, libc::O_RDONLY | flags)
    });
    let _ = sys::close(memfd);
    opened
}

/// `/proc/self/fd/FD` as a C string in `room`.
///
/// # Errors
/// `EBADF` for a negative descriptor.
pub fn own_path(fd: i32, room: &mut [u8; 32]) -> Result<&CStr, Errno> {
    const PREFIX: &[u8] = b"/proc/self/fd/";
    let number = u32::try_from(fd).map_err(|_| Errno::EBADF)?;
    *room = [0; 32];
    room[..PREFIX.len()].copy_from_slice(PREFIX);
    let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = number;
    for digit in room[PREFIX.len()..PREFIX.len() + digits].iter_mut().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
    CStr::from_bytes_until_nul(room).map_err(|_| Errno::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_paths_name_the_descriptor() {
        let mut room = [0; 32];
        assert_eq!(own_path(0, &mut room), Ok(c"/proc/self/fd/0"));
        assert_eq!(own_path(1065, &mut room), Ok(c"/proc/self/fd/1065"));
        assert_eq!(own_path(i32::MAX, &mut room), Ok(c"/proc/self/fd/2147483647"));
        assert_eq!(own_path(-1, &mut room), Err(Errno::EBADF));
    }

    #[test]
    fn raw_io_on_a_placeholder_fails_and_the_kernels_own_tables_carry_it() {
        let fd = make(true).unwrap();
        let mut bytes = [0_u8; 8];
        let at = bytes.as_mut_ptr().cast();
        // SAFETY: `at` has eight bytes; a mapping that succeeded would be a failed test.
        unsafe {
            let errno = || *libc::__errno_location();
            assert_eq!((libc::read(fd, at, 8), errno()), (-1, libc::EBADF));
            assert_eq!((libc::write(fd, at, 8), errno()), (-1, libc::EBADF));
            assert_eq!((libc::pread(fd, at, 8, 0), errno()), (-1, libc::EBADF));
            assert_eq!((libc::fallocate(fd, 0, 0, 8), errno()), (-1, libc::EBADF));
            let null = core::ptr::null_mut();
            let map = libc::mmap(null, 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
            assert_eq!((map, errno()), (libc::MAP_FAILED, libc::EACCES));
            assert_eq!(libc::fcntl(fd, libc::F_GETFD), libc::FD_CLOEXEC);
            let twin = libc::dup(fd);
            assert_eq!(libc::lseek(twin, 5, libc::SEEK_SET), 5);
            assert_eq!(libc::lseek(fd, 0, libc::SEEK_CUR), 5);
            assert_eq!(libc::close(twin), 0);
        }
        sys::close(fd).unwrap();
        let kept = make(false).unwrap();
        assert_eq!(sys::fcntl(kept, libc::F_GETFD, 0), Ok(0));
        if sys::descriptor_limit() > 600 {
            assert!(kept >= 512, "{kept}");
        }
        sys::close(kept).unwrap();
    }
}
