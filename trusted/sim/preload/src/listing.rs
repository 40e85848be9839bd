//! Reading directories: getdents64 and the streams of opendir(3).
//!
//! The C library's own stream reads its descriptor without coming by here, so a stream on a
//! protected directory is one of ours. It lies in the process's own heap (fork copies it) and
//! begins with a mark that no stream of the C library has: that begins with its descriptor, which
//! is not negative.

use core::ffi::{CStr, c_char, c_int, c_long, c_void};

use postern_sim::{
    directory::Entry,
    files::{self, OpenFile},
    guest,
};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths, hiding,
    next::{answer, export, signed},
};

/// First bytes of our streams; as a descriptor it would be negative.
const MARK: u64 = 0x8d1e_51f7_a90c_b3e5;
/// Bytes of a record without its name.
const FIXED: usize = 19;

/// A stream of ours.
#[repr(C)]
struct Stream {
    mark: u64,
    fd: c_int,
    entry: libc::dirent64,
}

/// A record of getdents64(2).
fn record(entry: &Entry, next: u64) -> Vec<u8> {
    let length = (FIXED + entry.name.len() + 1).next_multiple_of(8);
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&entry.inode.to_ne_bytes());
    bytes.extend_from_slice(&next.to_ne_bytes());
    // 19 + 256 at most.
    bytes.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
    bytes.push(entry.kind);
    bytes.extend_from_slice(&entry.name);
    bytes.resize(length, 0);
    bytes
}

/// getdents64(2).
fn read_entries(file: &OpenFile, to: *mut c_void, room: usize) -> Result<usize, Errno> {
    let mut filled = 0;
    loop {
        let (mut outcome, mut met) = (Ok(0), false);
        let taken = file.next_entry(|entry, next| {
            met = true;
            let bytes = record(entry, next);
            if filled + bytes.len() > room {
                return false;
            }
            outcome = guest::write(to as u64 + filled as u64, &bytes).map(|()| bytes.len());
            outcome.is_ok()
        })?;
        filled += outcome.or_else(|errno| if filled > 0 { Ok(0) } else { Err(errno) })?;
        if !taken {
            return if met && filled == 0 { Err(Errno::EINVAL) } else { Ok(filled) };
        }
    }
}

/// Our stream behind `stream`, if it is one.
fn ours(stream: *mut c_void) -> Option<*mut Stream> {
    let stream: *mut Stream = stream.cast();
    // SAFETY: a stream of the C library or ours, as the C functions demand; both have eight bytes.
    (!stream.is_null() && unsafe { (*stream).mark } == MARK).then_some(stream)
}

fn stream_on(fd: c_int) -> Result<*mut c_void, Errno> {
    // SAFETY: takes a size; all-zero is a valid Stream.
    let stream: *mut Stream = unsafe { libc::calloc(1, size_of::<Stream>()) }.cast();
    if stream.is_null() {
        return Err(Errno::ENOMEM);
    }
    // SAFETY: made above, of this size, ours alone.
    unsafe { ((*stream).mark, (*stream).fd) = (MARK, fd) };
    Ok(stream.cast())
}

fn open_stream(place: &postern_sim::directory::Place) -> Result<*mut c_void, Errno> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = postern_sim::directory::open(place, flags, 0)?;
    stream_on(fd).inspect_err(|_| {
        let _ = files::close(fd);
    })
}

/// The next entry of a stream, in the stream; null at the end.
fn next_of(stream: *mut Stream) -> Result<*mut libc::dirent64, Errno> {
    // SAFETY: one of ours (`ours`), used by one thread at a time as readdir(3) demands.
    let stream = unsafe { &mut *stream };
    let file = files::lookup(stream.fd).ok_or(Errno::EBADF)?;
    let to = &mut stream.entry;
    let taken = file.next_entry(|entry, next| {
        (to.d_ino, to.d_off, to.d_type) = (entry.inode, next.cast_signed(), entry.kind);
        to.d_reclen = 280;
        to.d_name.fill(0);
        for (to, from) in to.d_name.iter_mut().zip(&entry.name) {
            *to = from.cast_signed();
        }
        true
    });
    match taken {
        Ok(true) => Ok(to),
        // The end, and a directory that was removed.
        Ok(false) | Err(Errno::ENOENT) => Ok(core::ptr::null_mut()),
        Err(errno) => Err(errno),
    }
}

fn close_stream(stream: *mut Stream) -> Result<c_int, Errno> {
    // SAFETY: one of ours, which its owner gives up.
    let fd = unsafe {
        let fd = (*stream).fd;
        (*stream).mark = 0;
        libc::free(stream.cast());
        fd
    };
    files::close(fd).map(|()| 0)
}

fn position(stream: *mut Stream, offset: i64, whence: c_int) -> Result<u64, Errno> {
    // SAFETY: one of ours.
    let fd = unsafe { (*stream).fd };
    files::lookup(fd).ok_or(Errno::EBADF)?.seek(offset, whence)
}

fn read_reentrant(
    stream: *mut Stream,
    entry: *mut libc::dirent64,
    result: *mut *mut libc::dirent64,
) -> c_int {
    crate::next::number(|| {
        let next = next_of(stream)?;
        let found = if next.is_null() {
            core::ptr::null_mut()
        } else {
            // SAFETY: `next` is the stream's own entry; `entry` is the caller's room for one.
            unsafe { entry.write(*next) };
            entry
        };
        // SAFETY: the caller's room for a pointer.
        unsafe { result.write(found) };
        Ok(())
    })
}

/// Whether an entry that the C library read from a stream of its own is to be left out.
fn is_left_out(stream: *mut c_void, entry: *const libc::dirent64) -> bool {
    // SAFETY: null, or what readdir(3) answered: its name ends in a zero byte.
    let name = unsafe {
        let Some(entry) = entry.as_ref() else { return false };
        CStr::from_ptr(entry.d_name.as_ptr())
    };
    // SAFETY: the stream that the entry came from.
    hiding::hides(name.to_bytes(), || unsafe { libc::dirfd(stream.cast()) })
}

export! {
    fn [getdents64](fd: c_int, to: *mut c_void, room: usize) -> isize, next =>
        match files::lookup(fd) {
            Some(file) => answer(|| read_entries(&file, to, room).map(signed)),
            None => loop {
                let read = next();
                let Ok(length @ 1..) = usize::try_from(read) else { break read };
                let left = hiding::sift(fd, to, length);
                // Nothing left is no end: there may be more.
                if left > 0 {
                    break signed(left);
                }
            },
        };
    fn [opendir](path: *const c_char) -> *mut libc::DIR, next =>
        match guest_paths::place(libc::AT_FDCWD, path) {
            Some(place) => answer(|| open_stream(&place).map(<*mut c_void>::cast)),
            None => next(),
        };
    fn [fdopendir](fd: c_int) -> *mut libc::DIR, next => match files::lookup(fd) {
        Some(file) => answer(|| {
            if file.is_path() {
                return Err(Errno::EBADF);
            }
            file.listing().ok_or(Errno::ENOTDIR)?;
            stream_on(fd).map(<*mut c_void>::cast)
        }),
        None => next(),
    };
    fn [readdir, readdir64](stream: *mut c_void) -> *mut libc::dirent64, next =>
        match ours(stream) {
            Some(stream) => answer(|| next_of(stream)),
            None => loop {
                let entry = next();
                if !is_left_out(stream, entry) {
                    break entry;
                }
            },
        };
    fn [readdir_r, readdir64_r](
        stream: *mut c_void, entry: *mut libc::dirent64, result: *mut *mut libc::dirent64,
    ) -> c_int, next => match ours(stream) {
        Some(stream) => read_reentrant(stream, entry, result),
        None => loop {
            let answer = next();
            // SAFETY: the caller's room for a pointer, which the C library has filled.
            if answer != 0 || !is_left_out(stream, unsafe { *result }) {
                break answer;
            }
        },
    };
    fn [closedir](stream: *mut c_void) -> c_int, next => match ours(stream) {
        Some(stream) => answer(|| close_stream(stream)),
        None => next(),
    };
    fn [dirfd](stream: *mut c_void) -> c_int, next => match ours(stream) {
        // SAFETY: one of ours.
        Some(stream) => unsafe { (*stream).fd },
        None => next(),
    };
    fn [telldir](stream: *mut c_void) -> c_long, next => match ours(stream) {
        Some(stream) => answer(|| position(stream, 0, libc::SEEK_CUR).map(u64::cast_signed)),
        None => next(),
    };
    // These two return nothing in C; a value nobody looks at does no harm.
    fn [rewinddir](stream: *mut c_void) -> c_long, next => match ours(stream) {
        Some(stream) => answer(|| position(stream, 0, libc::SEEK_SET).map(u64::cast_signed)),
        None => next(),
    };
    fn [seekdir](stream: *mut c_void, place: c_long) -> c_long, next => match ours(stream) {
        Some(stream) => answer(|| position(stream, place, libc::SEEK_SET).map(u64::cast_signed)),
        None => next(),
    };
}
