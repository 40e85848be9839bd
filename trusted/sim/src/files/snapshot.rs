//! A private mmap(2) of a protected file: a copy of what the file holds at that moment.
//!
//! The copy is a memory file of exactly the bytes between the offset and the end of the file, and
//! the kernel maps that with the guest's own flags: places, protections and the SIGBUS beyond the
//! last page are the kernel's.
//!
//! Does not hold: later writes to the file are not seen in a mapping, nor its growth.
#![allow(unsafe_code)]

use postern_trusted::errno::Errno;

use super::{OpenFile, placeholder};
use crate::{guest::GuestBuffer, sys};

/// Most bytes of the file that one mapping copies.
pub const MOST_BYTES: u64 = 64 << 20;

impl OpenFile {
    /// A descriptor of a read-only memory file with `length` bytes at `offset`, or what there is.
    ///
    /// # Errors
    /// `ENODEV`: more than [`MOST_BYTES`]. `ENOMEM`, `EMFILE`, `EIO`.
    pub fn snapshot(&self, offset: u64, length: u64) -> Result<i32, Errno> {
        self.volume.attend()?;
        let bytes = length.min(self.volume.size().saturating_sub(offset));
        if bytes > MOST_BYTES {
            return Err(Errno::ENODEV);
        }
        let file = sys::memfd(c"postern-mapping")?;
        let filled = self.fill(file, offset, usize::try_from(bytes).unwrap_or(0));
        let mut room = [0; 32];
        let reader = filled
            .and_then(|()| placeholder::own_path(file, &mut room))
            .and_then(|path| sys::open(path, libc::O_RDONLY | libc::O_CLOEXEC));
        let _ = sys::close(file);
        reader
    }

    fn fill(&self, file: i32, offset: u64, bytes: usize) -> Result<(), Errno> {
        if bytes == 0 {
            return Ok(());
        }
        sys::size_memory_file(file, bytes)?;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let shared = libc::MAP_SHARED as usize;
        // SAFETY: a new mapping where the kernel chooses.
        let at = sys::check(unsafe {
            sys::syscall6(libc::SYS_mmap, 0, bytes, protection, shared, file as usize, 0)
        })?;
        let read = self.read_whole(offset, at as u64, bytes as u64);
        // SAFETY: the mapping made above, which nobody else knows.
        unsafe { sys::syscall6(libc::SYS_munmap, at, bytes, 0, 0, 0, 0) };
        read
    }

    /// Reads until everything is there; a file cut off meanwhile leaves zeros.
    fn read_whole(&self, offset: u64, to: u64, bytes: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes {
            let buffer = GuestBuffer::single(to + done, bytes - done)?;
            match self.volume.read(offset + done, &buffer)? {
                0 => break,
                length => done += length as u64,
            }
        }
        Ok(())
    }
}
