//! Calls that move data from one descriptor to another: sendfile, copy_file_range, splice. Where a
//! protected file is one of the two, a buffer in between.
//!
//! Holds: what the target did not take is not counted as read. What cannot be done so (splice into
//! a protected file, tee) is refused in the way that makes programs fall back.

use core::ffi::{c_int, c_uint};
use std::sync::Arc;

use postern_sim::{
    files::{self, Kind, OpenFile, io::At},
    guest::{self, GuestBuffer},
};
use postern_trusted::errno::Errno;

use crate::{
    data,
    next::{answer, export, signed},
};

/// The buffer, in bytes.
const STEP: usize = 64 << 10;
/// A process asks for no more at once (MAX_RW_COUNT).
const MOST: usize = 0x7fff_f000;
const SPLICE_FLAGS: c_uint =
    libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MORE | libc::SPLICE_F_GIFT;

fn is_protected(fd: c_int) -> bool {
    files::kind(fd) == Kind::Protected
}

/// The buffer of one call, aligned for O_DIRECT.
struct Room(Vec<u8>);

impl Room {
    fn new(length: usize) -> Self {
        Self(vec![0; STEP.min(length) + 512])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let skip = self.0.as_ptr().align_offset(512).min(512);
        let end = self.0.len() - 512 + skip;
        &mut self.0[skip..end]
    }
}

fn buffer(bytes: &mut [u8]) -> Result<GuestBuffer, Errno> {
    GuestBuffer::single(bytes.as_mut_ptr() as u64, bytes.len() as u64)
}

/// What a call of the C library that we export has just answered.
fn answered(result: isize) -> Result<usize, Errno> {
    // SAFETY: the calling thread's own errno, which the call has just set.
    usize::try_from(result).map_err(|_| Errno(unsafe { *libc::__errno_location() }))
}

/// Where a file is read or written: the caller's offset, or the position.
struct Place<'a> {
    file: &'a OpenFile,
    offset: *mut i64,
    start: i64,
}

impl<'a> Place<'a> {
    fn new(file: &'a OpenFile, offset: *mut i64) -> Result<Self, Errno> {
        let start = if offset.is_null() {
            file.seek(0, libc::SEEK_CUR)?
        } else {
            guest::read_u64(offset as u64)?
        };
        Ok(Self { file, offset, start: start.cast_signed() })
    }

    /// `EINVAL` for a negative offset.
    fn at(&self, moved: usize) -> Result<u64, Errno> {
        let start = u64::try_from(self.start).map_err(|_| Errno::EINVAL)?;
        start.checked_add(moved as u64).ok_or(Errno::EOVERFLOW)
    }

    /// `moved` bytes are done.
    fn advance(&self, moved: usize) -> Result<(), Errno> {
        let end = self.at(moved)?.cast_signed();
        if self.offset.is_null() {
            self.file.seek(end, libc::SEEK_SET).map(drop)
        } else {
            guest::write(self.offset as u64, &end.to_ne_bytes())
        }
    }
}

/// Moves up to `length` bytes in steps, from `read` (buffer, bytes moved so far) to `write`, until
/// one of them does less than it was asked for. An error counts only if nothing was moved.
fn pump(
    length: usize,
    mut read: impl FnMut(&mut [u8], usize) -> Result<usize, Errno>,
    mut write: impl FnMut(&mut [u8], usize) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut room = Room::new(length);
    let room = room.bytes();
    let mut moved = 0;
    while moved < length {
        let want = (length - moved).min(room.len());
        let step = read(&mut room[..want], moved).and_then(|got| match got {
            0 => Ok((0, 0)),
            got => write(&mut room[..got], moved).map(|put| (got, put)),
        });
        match step {
            Ok((got, put)) => {
                moved += put;
                if put < want || got < want {
                    break;
                }
            }
            Err(errno) if moved == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(moved)
}

/// Whether `to` can be sendfile's target: one that appends is refused, as the kernel does; so is
/// one that is closed.
fn admit_target(to: c_int) -> Result<(), Errno> {
    // SAFETY: takes numbers only.
    let flags = unsafe { libc::fcntl(to, libc::F_GETFL) };
    match flags & libc::O_ACCMODE {
        _ if flags < 0 => Err(Errno::EBADF),
        libc::O_RDONLY => Err(Errno::EBADF),
        _ if flags & libc::O_APPEND != 0 => Err(Errno::EINVAL),
        _ => Ok(()),
    }
}

/// sendfile(2) from a protected file.
fn send(to: c_int, file: &Arc<OpenFile>, offset: *mut i64, length: usize) -> Result<isize, Errno> {
    if !file.readable() {
        return Err(Errno::EBADF);
    }
    let from = Place::new(file, offset)?;
    from.at(0)?;
    admit_target(to)?;
    let moved = pump(
        length.min(MOST),
        |room, moved| file.volume().read(from.at(moved)?, &buffer(room)?),
        // SAFETY: the slice is readable for its length.
        |bytes, _| answered(unsafe { data::write(to, bytes.as_ptr().cast(), bytes.len()) }),
    )?;
    from.advance(moved)?;
    Ok(signed(moved))
}

/// sendfile(2) from an ordinary file to a protected one.
fn receive(file: &OpenFile, from: c_int, offset: *mut i64, length: usize) -> Result<isize, Errno> {
    // SAFETY: all-zero is a valid stat: it has only integers.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    // SAFETY: takes a number; `stat` is writable.
    if unsafe { libc::fstat(from, &raw mut stat) } < 0 {
        return Err(Errno::EBADF);
    }
    if !matches!(stat.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFBLK) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: takes numbers only.
    let position = || unsafe { libc::lseek(from, 0, libc::SEEK_CUR) };
    let start =
        if offset.is_null() { position() } else { guest::read_u64(offset as u64)?.cast_signed() };
    if start < 0 {
        return Err(Errno::EINVAL);
    }
    if !file.writable() {
        return Err(Errno::EBADF);
    }
    if file.append() {
        return Err(Errno::EINVAL);
    }
    let moved = pump(
        length.min(MOST),
        |room, moved| {
            let at = start.checked_add(moved as i64).ok_or(Errno::EOVERFLOW)?;
            // SAFETY: the slice is writable for its length.
            answered(unsafe { libc::pread(from, room.as_mut_ptr().cast(), room.len(), at) })
        },
        |bytes, _| file.write(At::Position, &buffer(bytes)?, 0),
    )?;
    let end = start + moved as i64;
    if offset.is_null() {
        // SAFETY: takes numbers only.
        unsafe { libc::lseek(from, end, libc::SEEK_SET) };
    } else {
        guest::write(offset as u64, &end.to_ne_bytes())?;
    }
    Ok(signed(moved))
}

/// copy_file_range(2) between two protected files: of one directory, or of the run's volumes.
fn copy_range(
    (from, from_at): (c_int, *mut i64),
    (to, to_at): (c_int, *mut i64),
    length: usize,
    flags: c_uint,
) -> Result<isize, Errno> {
    let (Some(source), Some(target)) = (files::lookup(from), files::lookup(to)) else {
        return Err(Errno::EXDEV);
    };
    let (from, to) = (Place::new(&source, from_at)?, Place::new(&target, to_at)?);
    if flags != 0 {
        return Err(Errno::EINVAL);
    }
    source.content().and(target.content())?;
    if !source.readable() || !target.writable() || target.append() {
        return Err(Errno::EBADF);
    }
    if source.node().map(|node| node.0) != target.node().map(|node| node.0) {
        return Err(Errno::EXDEV);
    }
    let wraps =
        |place: &Place<'_>| place.start.cast_unsigned().checked_add(length as u64).is_none();
    if wraps(&from) || wraps(&to) {
        return Err(Errno::EOVERFLOW);
    }
    let (begin, to_begin) = (from.at(0)?, to.at(0)?);
    let length = length.min(MOST);
    let left = source.volume().size().saturating_sub(begin);
    let length = length.min(usize::try_from(left).unwrap_or(length));
    let same = source.index() == target.index();
    if same && begin < to.at(length)? && to_begin < from.at(length)? {
        return Err(Errno::EINVAL);
    }
    let moved = pump(
        length,
        |room, moved| source.volume().read(from.at(moved)?, &buffer(room)?),
        |bytes, moved| {
            let at = i64::try_from(to.at(moved)?).map_err(|_| Errno::EOVERFLOW)?;
            target.write(At::offset(at)?, &buffer(bytes)?, 0)
        },
    )?;
    from.advance(moved)?;
    to.advance(moved)?;
    Ok(signed(moved))
}

/// splice(2) from a protected file into a pipe: what fits now, after waiting for room.
fn splice_out(
    file: &OpenFile,
    from_at: *mut i64,
    (to, to_at): (c_int, *mut i64),
    length: usize,
    flags: c_uint,
) -> Result<isize, Errno> {
    if length == 0 {
        return Ok(0);
    }
    if flags & !SPLICE_FLAGS != 0 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: takes numbers only.
    let mode = unsafe { libc::fcntl(to, libc::F_GETFL) };
    if mode < 0 || mode & libc::O_ACCMODE == libc::O_RDONLY || !file.readable() {
        return Err(Errno::EBADF);
    }
    // SAFETY: takes numbers only.
    if unsafe { libc::fcntl(to, libc::F_GETPIPE_SZ) } < 0 {
        return Err(Errno::EINVAL);
    }
    if !to_at.is_null() {
        return Err(Errno::ESPIPE);
    }
    let from = Place::new(file, from_at)?;
    from.at(0)?;
    file.content().map_err(|_| Errno::EINVAL)?;
    let waits = flags & libc::SPLICE_F_NONBLOCK == 0 && mode & libc::O_NONBLOCK == 0;
    let moved = pump(
        length.min(STEP),
        |room, moved| {
            wait_for_room(to, waits)?;
            file.volume().read(from.at(moved)?, &buffer(room)?)
        },
        |bytes, _| loop {
            match put_in_pipe(to, bytes) {
                Err(Errno::EAGAIN) if waits => wait_for_room(to, true)?,
                done => return done,
            }
        },
    )?;
    from.advance(moved)?;
    Ok(signed(moved))
}

/// Until the pipe takes something, or its reader is gone.
fn wait_for_room(pipe: c_int, waits: bool) -> Result<(), Errno> {
    let mut poll = libc::pollfd { fd: pipe, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure of ours.
    match answered(unsafe { libc::poll(&raw mut poll, 1, if waits { -1 } else { 0 }) } as isize)? {
        0 => Err(Errno::EAGAIN),
        _ => Ok(()),
    }
}

/// As much as there is room for.
fn put_in_pipe(pipe: c_int, bytes: &[u8]) -> Result<usize, Errno> {
    let part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: one part, readable for its length.
    answered(unsafe { libc::pwritev2(pipe, &raw const part, 1, -1, libc::RWF_NOWAIT) })
}

export! {
    fn [sendfile, sendfile64](
        to: c_int, from: c_int, offset: *mut i64, length: usize,
    ) -> isize, next => match (files::lookup(from), files::lookup(to)) {
        (Some(file), _) => answer(|| send(to, &file, offset, length)),
        (None, Some(file)) => answer(|| receive(&file, from, offset, length)),
        (None, None) => next(),
    };
    fn [copy_file_range](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| copy_range((from, from_at), (to, to_at), length, flags))
        } else {
            next()
        };
    fn [splice](
        from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, length: usize, flags: c_uint,
    ) -> isize, next => match files::lookup(from) {
        Some(file) => answer(|| splice_out(&file, from_at, (to, to_at), length, flags)),
        None if is_protected(to) => answer(|| Err(Errno::EINVAL)),
        None => next(),
    };
    fn [tee](from: c_int, to: c_int, length: usize, flags: c_uint) -> isize, next =>
        if is_protected(to) || is_protected(from) {
            answer(|| Err(Errno::EINVAL))
        } else {
            next()
        };
}
