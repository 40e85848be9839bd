//! What the kernel holds in place of a protected file's descriptor.
//!
//! A memfd, opened once more with access mode 3 (neither readable nor writable): the kernel's own
//! tables treat it as any descriptor (fork, dup, close-on-exec, SCM_RIGHTS), and raw I/O on it
//! fails with `EBADF` instead of finding plaintext or a wrong file. The number is the lowest one
//! free, as open(2) promises.

use core::ffi::CStr;

use postern_trusted::errno::Errno;

use crate::sys;

/// open(2)'s access mode that allows neither reading nor writing.
const NO_ACCESS: i32 = 3;

/// What a placeholder's name begins with; the number of its open file follows, as 16 digits.
const NAME: &[u8] = b"postern-file-";
const DIGITS: usize = 16;

fn name_of(number: u64, room: &mut [u8; 32]) -> &CStr {
    room[..NAME.len()].copy_from_slice(NAME);
    for (n, digit) in room[NAME.len()..NAME.len() + DIGITS].iter_mut().enumerate() {
        let nibble = number >> (60 - 4 * n) & 15;
        *digit = b"0123456789abcdef"[usize::try_from(nibble).unwrap_or(0)];
    }
    CStr::from_bytes_until_nul(room).unwrap_or(c"postern-file-")
}

/// The open file's number in a memory file's name; `None`: no placeholder's.
#[must_use]
pub fn number_in(name: &[u8]) -> Option<u64> {
    let digits = name.strip_prefix(NAME)?;
    let digits = core::str::from_utf8(digits.get(..DIGITS)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

/// A new placeholder for the open file of this `number`: its name carries it across exec.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `ENOENT` where /proc is not mounted.
pub fn make(number: u64, close_on_exec: bool) -> Result<i32, Errno> {
    let mut room = [0; 32];
    let memfd = sys::memfd(name_of(number, &mut room))?;
    seal_and_reopen(memfd, close_on_exec).inspect_err(|_| {
        let _ = sys::close(memfd);
    })
}

fn seal_and_reopen(memfd: i32, close_on_exec: bool) -> Result<i32, Errno> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    sys::fcntl(memfd, libc::F_ADD_SEALS, usize::try_from(seals).unwrap_or(0))?;
    let mut room = [0; 32];
    let opened = sys::open(own_path(memfd, &mut room)?, NO_ACCESS | libc::O_CLOEXEC)?;
    // The memory file took the lowest number; the placeholder replaces it there.
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    let placeholder = sys::dup3(opened, memfd, flags);
    let _ = sys::close(opened);
    placeholder
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
    fn a_name_leads_back_to_its_number() {
        for number in [0, 1, 0x0123_4567_89ab_cdef, u64::MAX] {
            let mut room = [0; 32];
            let mut link = name_of(number, &mut room).to_bytes().to_vec();
            link.extend(b" (deleted)");
            assert_eq!(number_in(&link), Some(number));
        }
        for other in [&b"postern-file-"[..], b"postern-file-12", b"postern-locks", b""] {
            assert_eq!(number_in(other), None);
        }
    }

    #[test]
    fn raw_io_on_a_placeholder_fails_and_the_kernels_own_tables_carry_it() {
        let fd = make(7, true).unwrap();
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
        let kept = make(8, false).unwrap();
        assert_eq!(sys::fcntl(kept, libc::F_GETFD, 0), Ok(0));
        sys::close(kept).unwrap();
    }
}
