//! A port's memory, mapped.
//!
//! Holds: all access is by atomic words. Nothing the enclave writes there is believed but what its
//! header says at the beginning, within the length that was mapped.
#![allow(unsafe_code)]

use std::{
    os::fd::{AsFd as _, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use postern_edl::port::{Geometry, header};
use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};

/// Largest port that is mapped, bytes.
const MOST: u64 = 1 << 30;

/// The memory of one lane.
pub struct Port {
    base: NonNull<u64>,
    words: usize,
    geometry: Geometry,
}

// SAFETY: the mapping belongs to the process, and all access to it is atomic.
unsafe impl Send for Port {}
// SAFETY: as for Send.
unsafe impl Sync for Port {}

impl Port {
    /// Maps the memory behind `memory`.
    ///
    /// # Errors
    /// `EINVAL` for what is no port; what mmap(2) says.
    pub fn map(memory: &OwnedFd, bytes: u64) -> Result<Self, Errno> {
        let length = rustix::fs::fstat(memory)?.st_size.cast_unsigned();
        if !(8192..=MOST).contains(&bytes) || length != bytes {
            return Err(Errno::INVAL);
        }
        let words = usize::try_from(bytes / 8).map_err(|_| Errno::INVAL)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            let none = std::ptr::null_mut();
            rustix::mm::mmap(none, words * 8, access, MapFlags::SHARED, memory.as_fd(), 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        let empty = Geometry::new(2, 4096).ok_or(Errno::INVAL)?;
        let mut port = Self { base, words, geometry: empty };
        let word = |index: usize| {
            let word = port.words()[index].load(Ordering::Relaxed);
            usize::try_from(word).map_err(|_| Errno::INVAL)
        };
        let geometry = Geometry::new(word(header::ENTRIES)?, word(header::DATA_BYTES)?);
        port.geometry =
            geometry.filter(|g| g.region_bytes() as u64 <= bytes).ok_or(Errno::INVAL)?;
        Ok(port)
    }

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: 1. Mapped, aligned to pages, as long as `self` lives. 2. Whoever else has the
        //    memory changes it as they like, which is what atomics are for. 3. It is a memory file
        //    of this length; should its owner cut it off, this process dies, as it would of any
        //    other mistake of the test.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.words) }
    }

    /// Where everything lies.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody has a reference into it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.words * 8) };
    }
}
