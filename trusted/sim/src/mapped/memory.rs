//! The memory file behind a mapped file, by system calls: nothing of it is touched by instructions
//! of ours except while a piece is filled, so no truncation can fault here.
#![allow(unsafe_code)]

use core::ops::Range;

use postern_trusted::errno::Errno;

use crate::sys;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

fn place(offset: u64) -> Result<usize, Errno> {
    i64::try_from(offset).map(|offset| offset as usize).map_err(|_| Errno::EOVERFLOW)
}

/// Device and inode of a descriptor's file.
///
/// # Errors
/// What fstat(2) says.
pub fn node(fd: i32) -> Result<(u64, u64), Errno> {
    sys::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Reads at `offset`; beyond the end there are zeros.
///
/// # Errors
/// What pread(2) says.
pub fn read(fd: i32, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        let (to, at) = (rest.as_mut_ptr() as usize, place(offset + done as u64)?);
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`.
        let read = sys::check(unsafe {
            sys::syscall6(libc::SYS_pread64, fd as usize, to, rest.len(), at, 0, 0)
        });
        match read {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(length) => done += length,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes at `offset`.
///
/// # Errors
/// What pwrite(2) says.
pub fn write(fd: i32, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < data.len() {
        let rest = &data[done..];
        let (from, at) = (rest.as_ptr() as usize, place(offset + done as u64)?);
        // SAFETY: the kernel reads at most `rest.len()` bytes of `rest`.
        let written = sys::check(unsafe {
            sys::syscall6(libc::SYS_pwrite64, fd as usize, from, rest.len(), at, 0, 0)
        });
        match written {
            Ok(0) => return Err(Errno::ENOSPC),
            Ok(length) => done += length,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The first byte at or after `offset` that is not in a hole; `None`: there is none.
#[must_use]
pub fn data_after(fd: i32, offset: u64) -> Option<u64> {
    let (at, whence) = (place(offset).ok()?, libc::SEEK_DATA as usize);
    // SAFETY: takes numbers only.
    let found =
        sys::check(unsafe { sys::syscall6(libc::SYS_lseek, fd as usize, at, whence, 0, 0, 0) });
    found.ok().map(|found| found as u64)
}

/// Makes a range read as zeros; the size stays.
///
/// # Errors
/// What fallocate(2) says.
pub fn punch(fd: i32, range: &Range<u64>) -> Result<(), Errno> {
    let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as usize;
    let (at, length) = (place(range.start)?, place(range.end.saturating_sub(range.start))?);
    if length == 0 {
        return Ok(());
    }
    // SAFETY: takes numbers only.
    sys::check(unsafe { sys::syscall6(libc::SYS_fallocate, fd as usize, mode, at, length, 0, 0) })
        .map(drop)
}

/// A window on a part of the memory file, for filling it.
pub struct Window {
    at: usize,
    bytes: usize,
}

impl Window {
    /// Maps whole pages.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn new(fd: i32, range: &Range<u64>) -> Result<Self, Errno> {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let (from, bytes) = (place(range.start)?, place(range.end.saturating_sub(range.start))?);
        let shared = libc::MAP_SHARED as usize;
        // SAFETY: a new mapping where the kernel chooses.
        let at = sys::check(unsafe {
            sys::syscall6(libc::SYS_mmap, 0, bytes, protection, shared, fd as usize, from)
        })?;
        let window = Self { at, bytes };
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: advice about the mapping made above.
            unsafe { sys::syscall6(libc::SYS_madvise, at, bytes, advice as usize, 0, 0, 0) };
        }
        Ok(window)
    }

    /// Its address.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.at as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, which nobody else knows.
        unsafe { sys::syscall6(libc::SYS_munmap, self.at, self.bytes, 0, 0, 0, 0) };
    }
}
