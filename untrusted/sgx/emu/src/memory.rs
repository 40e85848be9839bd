//! The enclave's address range: reserved whole, filled page by page, protected as the image says.
//!
//! Holds: the range is naturally aligned; what the image does not add cannot be touched; no other
//! mapping ever lies inside while this value lives.

use std::io;

use sgx_image::{EXECUTE, Image, PAGE, READ, WRITE};

/// A mapped address range.
#[derive(Debug)]
pub struct Range {
    base: usize,
    size: usize,
    /// Whether the addresses stay taken for ever.
    keep: bool,
}

impl Range {
    /// Reserves `size` bytes, a power of two, aligned to it; `keep`: also after this value is gone.
    pub fn reserve(size: usize, keep: bool) -> io::Result<Self> {
        Ok(Self { base: reserve(size, libc::MAP_PRIVATE)?, size, keep })
    }

    /// First address.
    pub const fn base(&self) -> usize {
        self.base
    }

    /// Length in bytes.
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Whether `length` bytes from `address` lie inside.
    pub const fn contains(&self, address: u64, length: usize) -> bool {
        let base = self.base as u64;
        address >= base
            && address - base <= self.size as u64
            && self.size as u64 - (address - base) >= length as u64
    }

    /// Copies the image in; `patch` may change a page's bytes as it goes in. To be called once, before
    /// anything runs in the range.
    pub fn fill(&mut self, image: &Image, patch: impl Fn(&mut [u8])) -> io::Result<()> {
        let mut pages = image.pages().iter().peekable();
        while let Some(first) = pages.next() {
            let mut run = vec![first];
            let follows = |next: &&sgx_image::Page, run: &[&sgx_image::Page]| {
                next.flags() == first.flags()
                    && next.offset() == first.offset() + (run.len() * PAGE) as u64
            };
            while let Some(next) = pages.next_if(|next| follows(next, &run)) {
                run.push(next);
            }
            let (at, length) = (self.base + first.offset() as usize, run.len() * PAGE);
            self.protect(at, length, libc::PROT_READ | libc::PROT_WRITE)?;
            // SAFETY: the range is this value's own, was made writable above, holds any bytes, and
            // nothing else runs in it yet. An image's pages lie inside the image's size.
            let bytes = unsafe { core::slice::from_raw_parts_mut(at as *mut u8, length) };
            for (page, target) in run.iter().zip(bytes.as_chunks_mut::<PAGE>().0) {
                if let Some(data) = page.data() {
                    *target = *data;
                }
            }
            if first.flags() & EXECUTE != 0 {
                patch(bytes);
            }
            let rights = [(READ, libc::PROT_READ), (WRITE, libc::PROT_WRITE)]
                .into_iter()
                .chain([(EXECUTE, libc::PROT_EXEC)])
                .filter(|(flag, _)| first.flags() & flag != 0)
                .fold(libc::PROT_NONE, |rights, (_, right)| rights | right);
            self.protect(at, length, rights)?;
        }
        Ok(())
    }

    fn protect(&self, at: usize, length: usize, rights: libc::c_int) -> io::Result<()> {
        // SAFETY: the caller's range lies inside the reservation, which is this value's own.
        if unsafe { libc::mprotect(at as *mut libc::c_void, length, rights) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if self.keep {
            let _ = self.protect(self.base, self.size, libc::PROT_NONE);
        } else {
            // SAFETY: the range is this value's own; nobody is inside, since entering borrows the
            // enclave that owns it.
            unsafe { libc::munmap(self.base as *mut libc::c_void, self.size) };
        }
    }
}

/// Reserves `size` bytes of addresses, a power of two, aligned to it, without any rights; `sharing`:
/// `MAP_PRIVATE` or `MAP_SHARED`. The caller's from then on, to unmap.
///
/// # Errors
/// That of mmap(2).
pub fn reserve(size: usize, sharing: libc::c_int) -> io::Result<usize> {
    let whole = size.checked_mul(2).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe {
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(core::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = start as usize;
    let base = start.next_multiple_of(size);
    for (from, length) in [(start, base - start), (base + size, start + whole - base - size)] {
        if length > 0 {
            // SAFETY: both parts lie inside the mapping made above, which nobody uses yet.
            unsafe { libc::munmap(from as *mut libc::c_void, length) };
        }
    }
    Ok(base)
}
