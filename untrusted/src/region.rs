//! The memory of a port, mapped into the daemon.
//!
//! The enclave can rewrite every word at any time, so words are atomics, each is loaded once and
//! decided on as a copy. The file behind the memory is a sealed memfd: it can not shrink, so a load
//! can not fault. The kernel reads and writes the transfer area on the daemon's behalf; whoever
//! submits keeps the [`Region`] alive until the kernel is done.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use postern_edl::port::{self, Geometry, header};
use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Largest transfer area of a lane, bytes.
pub const MAX_DATA_BYTES: usize = 256 << 20;

/// `f_type` of the file system behind memfds of ordinary pages (linux/magic.h). Memfds of huge
/// pages lie elsewhere: their pages can run out at a load, which would be SIGBUS.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Why a region was refused. The enclave's fault, except [`Self::System`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// Not a memfd of ordinary pages.
    NotMemfd,
    /// Not sealed against shrinking and growing.
    NotSealed,
    /// Size of the memfd and size in the request differ, or do not fit the header.
    Size,
    /// The header is not one of this protocol, or beyond the limits.
    Header,
    /// The host could not map it.
    System(Errno),
}

impl RegionError {
    /// What the enclave is told.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::System(errno) => errno,
            Self::NotSealed => Errno::PERM,
            Self::NotMemfd | Self::Size | Self::Header => Errno::INVAL,
        }
    }
}

impl std::fmt::Display for RegionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotMemfd => f.write_str("the port's memory is not a memfd of ordinary pages"),
            Self::NotSealed => f.write_str("the port's memfd lacks F_SEAL_SHRINK or F_SEAL_GROW"),
            Self::Size => f.write_str("the port's size does not fit its memfd or header"),
            Self::Header => f.write_str("the port's header is not one this daemon accepts"),
            Self::System(e) => write!(f, "the port's memory could not be mapped ({e})"),
        }
    }
}

/// A mapped port.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
    geometry: Geometry,
}

// SAFETY: 1. The mapping belongs to the process, not to a thread. 2. Every access goes through
//    atomics or through the kernel.
unsafe impl Send for Region {}
// SAFETY: as for Send.
unsafe impl Sync for Region {}

impl Region {
    /// Maps the memory of a port and checks its header.
    ///
    /// # Errors
    /// [`RegionError`]; nothing stays mapped.
    pub fn map(memfd: &OwnedFd, port_bytes: u64) -> Result<Self, RegionError> {
        let bytes = usize::try_from(port_bytes).map_err(|_| RegionError::Size)?;
        if !(port::SQ_OFFSET..=MAX_DATA_BYTES + (1 << 20)).contains(&bytes) {
            return Err(RegionError::Size);
        }
        let kind = rustix::fs::fstatfs(memfd).map_err(RegionError::System)?.f_type;
        if u64::try_from(kind) != Ok(TMPFS_MAGIC) {
            return Err(RegionError::NotMemfd);
        }
        let seals = rustix::fs::fcntl_get_seals(memfd).map_err(|_| RegionError::NotMemfd)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(RegionError::NotSealed);
        }
        // After the seals: the size can not change any more.
        let stat = rustix::fs::fstat(memfd).map_err(RegionError::System)?;
        if u64::try_from(stat.st_size) != Ok(port_bytes) {
            return Err(RegionError::Size);
        }
        // SAFETY: 1. A fresh mapping at an address of the kernel's choice: nothing else is there.
        //    2. The descriptor is a memfd of `bytes` bytes that can not shrink.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                memfd.as_fd(),
                0,
            )
        }
        .map_err(RegionError::System)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(RegionError::System(Errno::NOMEM))?;
        // Until the header is read nothing but header words may be touched; they lie below
        // SQ_OFFSET. Dropping this unmaps.
        let empty =
            Geometry { entries: 2, cq_offset: 0, stamps_offset: 0, data_offset: 0, data_bytes: 0 };
        let mut region = Self { base, bytes, geometry: empty };
        region.geometry = region.check_header()?;
        if region.geometry.region_bytes() != bytes {
            return Err(RegionError::Size);
        }
        Ok(region)
    }

    fn check_header(&self) -> Result<Geometry, RegionError> {
        let word = |index| self.word(index).load(Ordering::Relaxed);
        if word(header::MAGIC) != port::MAGIC || word(header::VERSION) != 1 {
            return Err(RegionError::Header);
        }
        let entries = usize::try_from(word(header::ENTRIES)).map_err(|_| RegionError::Header)?;
        let data_bytes =
            usize::try_from(word(header::DATA_BYTES)).map_err(|_| RegionError::Header)?;
        let geometry = Geometry::new(entries, data_bytes).ok_or(RegionError::Header)?;
        if data_bytes > MAX_DATA_BYTES || word(header::DATA_OFFSET) != geometry.data_offset as u64 {
            return Err(RegionError::Header);
        }
        Ok(geometry)
    }

    /// Where everything lies.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The word with this index (8-byte units from the start). Panics beyond the region, which
    /// indexes made by [`Geometry`] never are.
    #[inline]
    #[must_use]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes / 8);
        // SAFETY: 1. In bounds: asserted. 2. Aligned: the mapping starts on a page. 3. Race: the
        //    enclave's stores are to shared memory that is only accessed atomically here, and any
        //    bit pattern is a value. 4. Alive: the mapping lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().cast::<u64>().add(index)) }
    }

    /// Address of byte `offset` for the kernel to read or write; the caller has checked that the
    /// range lies in the transfer area.
    #[inline]
    #[must_use]
    pub fn address(&self, offset: u64) -> u64 {
        self.base.as_ptr() as u64 + offset
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: 1. This is the mapping made in `map`. 2. No reference into it outlives `self`.
        //    3. The kernel no longer uses it: submitters hold the region until io_destroy is done.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("port", flags).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        if !seals.is_empty() {
            rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        }
        fd
    }

    fn write_header(fd: &OwnedFd, words: &[(usize, u64)]) {
        for (index, value) in words {
            rustix::io::pwrite(fd, &value.to_ne_bytes(), *index as u64 * 8).unwrap();
        }
    }

    fn good(geometry: &Geometry) -> Vec<(usize, u64)> {
        vec![
            (header::MAGIC, port::MAGIC),
            (header::VERSION, 1),
            (header::ENTRIES, geometry.entries as u64),
            (header::DATA_OFFSET, geometry.data_offset as u64),
            (header::DATA_BYTES, geometry.data_bytes as u64),
        ]
    }

    const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

    #[test]
    fn a_sealed_memfd_with_a_good_header_is_mapped() {
        let geometry = Geometry::new(64, 1 << 20).unwrap();
        let fd = memfd(geometry.region_bytes() as u64, SEALS);
        write_header(&fd, &good(&geometry));
        let region = Region::map(&fd, geometry.region_bytes() as u64).unwrap();
        assert_eq!(region.geometry(), &geometry);
        region.word(port::cursor::SQ_TAKEN).store(7, Ordering::Relaxed);
        let mut word = [0; 8];
        rustix::io::pread(&fd, &mut word, port::cursor::SQ_TAKEN as u64 * 8).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 7);
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let geometry = Geometry::new(64, 1 << 20).unwrap();
        let bytes = geometry.region_bytes() as u64;
        for seals in [SealFlags::empty(), SealFlags::GROW, SealFlags::SHRINK] {
            let fd = memfd(bytes, seals);
            write_header(&fd, &good(&geometry));
            assert_eq!(Region::map(&fd, bytes).unwrap_err(), RegionError::NotSealed);
        }
        let file: OwnedFd = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap().into();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        assert_eq!(Region::map(&file, bytes).unwrap_err(), RegionError::NotMemfd);
    }

    #[test]
    fn each_wrong_header_word_is_refused() {
        let geometry = Geometry::new(64, 1 << 20).unwrap();
        let bytes = geometry.region_bytes() as u64;
        let wrong = [
            (header::MAGIC, 0),
            (header::VERSION, 2),
            (header::ENTRIES, 63),
            (header::ENTRIES, 0),
            (header::ENTRIES, 1 << 40),
            (header::ENTRIES, 32),
            (header::DATA_OFFSET, 0),
            (header::DATA_OFFSET, geometry.data_offset as u64 + 4096),
            (header::DATA_BYTES, 0),
            (header::DATA_BYTES, 4097),
            (header::DATA_BYTES, 2 << 20),
            (header::DATA_BYTES, u64::MAX - 4095),
        ];
        for word in wrong {
            let fd = memfd(bytes, SEALS);
            write_header(&fd, &good(&geometry));
            write_header(&fd, &[word]);
            let error = Region::map(&fd, bytes).unwrap_err();
            assert!(
                matches!(error, RegionError::Header | RegionError::Size),
                "{word:?}: {error:?}"
            );
        }
    }

    #[test]
    fn a_size_that_is_not_the_memfds_is_refused() {
        let geometry = Geometry::new(64, 1 << 20).unwrap();
        let bytes = geometry.region_bytes() as u64;
        let fd = memfd(bytes, SEALS);
        write_header(&fd, &good(&geometry));
        for claimed in [0, 4096, bytes - 4096, bytes + 4096, u64::MAX] {
            assert_eq!(Region::map(&fd, claimed).unwrap_err(), RegionError::Size, "{claimed}");
        }
    }
}
