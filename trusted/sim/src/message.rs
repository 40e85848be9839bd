//! Messages to the user and small files, past every interposed symbol.
#![allow(unsafe_code)]

use std::ffi::CStr;

use postern_trusted::errno::Errno;

use crate::sys;

/// One line on stderr: `postern: TEXT`.
pub fn say(text: &str) {
    let line = format!("postern: {text}\n");
    // SAFETY: `line` is readable for its length. Whether stderr takes it is not our concern.
    unsafe { sys::syscall6(libc::SYS_write, 2, line.as_ptr() as usize, line.len(), 0, 0, 0) };
}

/// One line on stderr, without allocating: for what is wrong with the library itself.
pub fn say_fault(what: &'static str) {
    for part in ["postern: fault in Postern itself: ", what, "\n"] {
        // SAFETY: `part` is readable for its length.
        unsafe { sys::syscall6(libc::SYS_write, 2, part.as_ptr() as usize, part.len(), 0, 0, 0) };
    }
}

/// Calls `each` with the names in a directory, until it can be read no further.
///
/// # Errors
/// What open(2) says.
pub fn for_each_name(directory: &CStr, mut each: impl FnMut(&[u8])) -> Result<(), Errno> {
    const ENTRY_HEAD: usize = 19;
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let directory = sys::open(directory, flags)?;
    let mut room = [0; 2048];
    while let Ok(length @ 1..) = sys::entries(directory, &mut room) {
        let mut rest = &room[..length];
        // linux_dirent64: inode, offset, length of the entry, type, name.
        while let Some(&[low, high]) = rest.get(16..18) {
            let step = usize::from(u16::from_ne_bytes([low, high])).max(ENTRY_HEAD);
            let Some(entry) = rest.get(..step) else { break };
            if let Some(name) = entry[ENTRY_HEAD..].split(|&byte| byte == 0).next() {
                each(name);
            }
            rest = &rest[step..];
        }
    }
    sys::close(directory)
}

/// Room for the first read of a file; doubled as needed.
const FIRST_BYTES: usize = 8192;

/// Reads a whole ordinary file of at most `limit` bytes.
///
/// # Errors
/// What open(2) and read(2) say; `EFBIG` beyond the limit; `EINVAL` for a path with a NUL.
pub fn read_file(path: &[u8], limit: usize) -> Result<Vec<u8>, Errno> {
    let path = std::ffi::CString::new(path).map_err(|_| Errno::EINVAL)?;
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as usize;
    let here = libc::AT_FDCWD as usize;
    // SAFETY: `path` is a C string that lives through the call.
    let file = sys::check(unsafe {
        sys::syscall6(libc::SYS_openat, here, path.as_ptr() as usize, flags, 0, 0, sys::PASS)
    })?;
    // Most files read here are short, and memory once touched stays with the family.
    let mut content = vec![0; (limit + 1).min(FIRST_BYTES)];
    let mut length = 0;
    let outcome = loop {
        let room = content.len() - length;
        // SAFETY: writes at most `room` bytes behind `length`.
        let answer = sys::check(unsafe {
            let at = content.as_mut_ptr().add(length) as usize;
            sys::syscall6(libc::SYS_read, file, at, room, 0, 0, 0)
        });
        match answer {
            Ok(0) => break Ok(()),
            Ok(n) => length += n,
            Err(Errno::EINTR) => {}
            Err(errno) => break Err(errno),
        }
        if length > limit {
            break Err(Errno::EFBIG);
        }
        if length == content.len() {
            content.resize((2 * length).min(limit + 1), 0);
        }
    };
    // SAFETY: our own descriptor.
    unsafe { sys::syscall6(libc::SYS_close, file, 0, 0, 0, 0, 0) };
    outcome?;
    content.truncate(length);
    Ok(content)
}
