//! Mappings, and calls that move data without read and write: a copy for a mapping that is not
//! written to, a buffer in between for sendfile, and for the rest a refusal in the way that makes
//! programs fall back.

use core::ffi::{c_int, c_uint, c_void};

use std::sync::Arc;

use postern_sim::{
    files::{self, Kind, OpenFile, io::At},
    guest::{self, GuestBuffer},
    host, sys,
};
use postern_trusted::errno::Errno;

use crate::{
    aio, data, guest_paths,
    next::{answer, export, signed},
};

/// sendfile's buffer, in bytes.
const STEP: usize = 64 << 10;
const PAGE: i64 = 4096;
const REFUSAL: &str = "a shared writable mapping (mmap) of a protected file is not possible";
const TOO_LARGE: &str = "a mapping (mmap) of more than 64 MiB of a protected file is not possible";

fn is_protected(fd: c_int) -> bool {
    files::kind(fd) == Kind::Protected
}

/// Whether an AIO ring lies at `at`.
fn is_ring(at: *mut c_void) -> bool {
    aio::is_used() && host::contexts().relocate(at as u64, at as u64)
}

/// mmap(2): in Linux's order of checks up to the point where the kernel does the rest.
fn map(
    file: &OpenFile,
    (at, length, protection, flags): (*mut c_void, usize, c_int, c_int),
    offset: i64,
) -> Result<*mut c_void, Errno> {
    match () {
        () if offset % PAGE != 0 => return Err(Errno::EINVAL),
        () if file.is_path() => return Err(Errno::EBADF),
        () if length == 0 => return Err(Errno::EINVAL),
        () => {}
    }
    let from = u64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
    let writes = shared && protection & libc::PROT_WRITE != 0;
    if writes && !file.writable() || !file.readable() {
        return Err(Errno::EACCES);
    }
    if writes {
        guest_paths::refuse(file.index(), REFUSAL);
        return Err(Errno::ENODEV);
    }
    let copy = file.snapshot(from, length as u64).inspect_err(|&errno| {
        if errno == Errno::ENODEV {
            guest_paths::refuse(file.index(), TOO_LARGE);
        }
    })?;
    let [protection, flags, fd] = [protection, flags, copy].map(|n| n as isize as usize);
    // SAFETY: the guest's own wish for its address space, with a file of ours.
    let mapped = sys::check(unsafe {
        sys::syscall6(libc::SYS_mmap, at as usize, length, protection, flags, fd, 0)
    });
    let _ = sys::close(copy);
    mapped.map(|at| at as *mut c_void)
}

/// sendfile(2) from a protected file: reads and writes through a buffer. What the target did not
/// take is not counted as read.
fn send(to: c_int, file: &Arc<OpenFile>, offset: *mut i64, length: usize) -> Result<isize, Errno> {
    if !file.readable() {
        return Err(Errno::EBADF);
    }
    let start = if offset.is_null() {
        file.seek(0, libc::SEEK_CUR)?.cast_signed()
    } else {
        guest::read_u64(offset as u64)?.cast_signed()
    };
    let At::Offset(start) = At::offset(start)? else { return Err(Errno::EINVAL) };
    // A target that appends is refused, as the kernel does; so is one that is closed.
    // SAFETY: takes numbers only.
    let flags = unsafe { libc::fcntl(to, libc::F_GETFL) };
    match flags & libc::O_ACCMODE {
        _ if flags < 0 => return Err(Errno::EBADF),
        libc::O_RDONLY => return Err(Errno::EBADF),
        _ if flags & libc::O_APPEND != 0 => return Err(Errno::EINVAL),
        _ => {}
    }
    let mut room = vec![0_u8; STEP.min(length)];
    let mut moved = 0;
    let failed = loop {
        let want = (length - moved).min(room.len());
        let buffer = GuestBuffer::single(room.as_mut_ptr() as u64, want as u64)?;
        let at = start + moved as u64;
        let read = match if want == 0 { Ok(0) } else { file.volume().read(at, &buffer) } {
            Ok(0) => break None,
            Ok(read) => read,
            Err(errno) => break Some(errno),
        };
        // SAFETY: `room` has `read` bytes.
        let written = unsafe { data::write(to, room.as_ptr().cast(), read) };
        let Ok(written) = usize::try_from(written) else {
            // SAFETY: the calling thread's own errno, which `write` has just set.
            break Some(Errno(unsafe { *libc::__errno_location() }));
        };
        moved += written;
        if written < read {
            break None;
        }
    };
    if let Some(errno) = failed
        && moved == 0
    {
        return Err(errno);
    }
    let end = (start + moved as u64).cast_signed();
    if offset.is_null() {
        file.seek(end, libc::SEEK_SET)?;
    } else {
        guest::write(offset as u64, &end.to_ne_bytes())?;
    }
    Ok(signed(moved))
}

export! {
    // A ring that moves stays the context's; it cannot grow.
    fn [mremap](
        at: *mut c_void, length: usize, wanted: usize, flags: c_int, to: *mut c_void,
    ) -> *mut c_void, next => {
        if !is_ring(at) {
            return next();
        }
        if wanted > length {
            return answer(|| Err(Errno::EFAULT));
        }
        let moved = next();
        if moved != libc::MAP_FAILED {
            host::contexts().relocate(at as u64, moved as u64);
        }
        moved
    };
    fn [mmap, mmap64](
        at: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64,
    ) -> *mut c_void, next =>
        match if flags & libc::MAP_ANONYMOUS == 0 { files::lookup(fd) } else { None } {
            Some(file) => answer(|| map(&file, (at, length, protection, flags), offset)),
            None => next(),
        };
    fn [sendfile, sendfile64](
        to: c_int, from: c_int, offset: *mut i64, length: usize,
    ) -> isize, next => match files::lookup(from) {
        Some(file) => answer(|| send(to, &file, offset, length)),
        None if is_protected(to) => answer(|| Err(Errno::EINVAL)),
        None => next(),
    };
    fn [copy_file_range](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EXDEV))
        } else {
            next()
        };
    fn [splice](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EINVAL))
        } else {
            next()
        };
    fn [tee](from: c_int, to: c_int, length: usize, flags: c_uint) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EINVAL))
        } else {
            next()
        };
}
