//! Memory of the test as a guest has it: pages that can be protected and unmapped, iocbs, events.

use std::ptr::NonNull;

use postern_trusted::platform::Fault;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// NULL, the last address, the kernel's half, and what is no address at all.
pub const NOWHERE: [u64; 4] = [0, u64::MAX, 0xffff_8000_0000_0000, 0x8000_0000_0000_0000];

/// Pages of ordinary memory, unmapped when dropped.
pub struct Area {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the pages are reached through checked kernel copies only (`read`, `write`).
unsafe impl Send for Area {}
// SAFETY: as for Send.
unsafe impl Sync for Area {}

impl Area {
    pub fn new(pages: usize) -> Self {
        let bytes = pages * PAGE;
        Self { base: map(bytes, -1), bytes }
    }

    /// Guest address of byte `offset`.
    pub fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.bytes);
        self.base.as_ptr() as u64 + offset as u64
    }

    /// The word at byte `offset`.
    pub fn get(&self, offset: usize) -> u64 {
        peek(self.at(offset))
    }

    /// Stores a word at byte `offset`.
    pub fn put(&self, offset: usize, word: u64) -> u64 {
        poke(self.at(offset), word);
        self.at(offset)
    }

    /// Stores bytes at byte `offset` and answers their address.
    pub fn put_bytes(&self, offset: usize, bytes: &[u8]) -> u64 {
        write(self.at(offset), bytes).unwrap();
        self.at(offset)
    }

    /// Changes the protection of page `page` (PROT_*).
    pub fn protect(&self, page: usize, protection: i32) {
        protect(self.at(page * PAGE), PAGE, protection);
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        unmap(self.at(0), self.bytes);
    }
}

/// Maps `bytes` zeroed bytes: private ones, or those of a memory file.
pub fn map(bytes: usize, file: i32) -> NonNull<u8> {
    let flags = if file < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel chooses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0) };
    assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    NonNull::new(base.cast()).unwrap()
}

/// Changes the protection of mapped pages.
pub fn protect(base: u64, bytes: usize, protection: i32) {
    // SAFETY: pages of a mapping of the tests, which no Rust reference points into.
    let answer = unsafe { libc::mprotect(base as *mut _, bytes, protection) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
}

/// Unmaps pages.
pub fn unmap(base: u64, bytes: usize) {
    // SAFETY: pages of a mapping of the tests, which no Rust reference points into.
    assert_eq!(unsafe { libc::munmap(base as *mut _, bytes) }, 0);
}

/// Moves mapped pages to where the kernel chooses.
pub fn remap(base: u64, bytes: usize) -> u64 {
    let target = map(bytes, -1).as_ptr() as u64;
    remap_over(base, target, bytes);
    target
}

/// Moves mapped pages over others.
pub fn remap_over(base: u64, target: u64, bytes: usize) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: moves pages of a mapping of the tests over another; no references into either.
    let moved = unsafe { libc::mremap(base as *mut _, bytes, bytes, flags, target as *mut u8) };
    assert_ne!(moved, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
}

type Copy = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> libc::ssize_t;

/// Has the kernel copy between this process and itself, so that no address can crash it.
fn copy(by: Copy, local: *mut u8, remote: u64, len: usize) -> Result<(), Fault> {
    if len == 0 {
        return Ok(());
    }
    let local = libc::iovec { iov_base: local.cast(), iov_len: len };
    let remote = libc::iovec { iov_base: remote as *mut _, iov_len: len };
    // SAFETY: `local` is a slice of the caller's; the other address is checked by the kernel, and
    // is never one that a Rust reference points to.
    let copied = unsafe { by(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    if copied == len as isize { Ok(()) } else { Err(Fault) }
}

/// Reads guest memory.
pub fn read(from: u64, out: &mut [u8]) -> Result<(), Fault> {
    copy(libc::process_vm_readv, out.as_mut_ptr(), from, out.len())
}

/// Writes guest memory.
pub fn write(to: u64, data: &[u8]) -> Result<(), Fault> {
    copy(libc::process_vm_writev, data.as_ptr().cast_mut(), to, data.len())
}

/// The 8-byte word at `address`.
pub fn peek(address: u64) -> u64 {
    let mut bytes = [0; 8];
    read(address, &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

/// Stores an 8-byte word.
pub fn poke(address: u64, word: u64) {
    write(address, &word.to_ne_bytes()).unwrap();
}

/// The 4-byte word number `index` of the ring's header.
pub fn ring_word(ctx: u64, index: u64) -> u32 {
    let mut bytes = [0; 4];
    read(ctx + index * 4, &mut bytes).unwrap();
    u32::from_ne_bytes(bytes)
}

/// Stores a word of the ring's header.
pub fn set_ring_word(ctx: u64, index: u64, word: u32) {
    write(ctx + index * 4, &word.to_ne_bytes()).unwrap();
}

/// Header words of a ring.
pub const ID: u64 = 0;
pub const NR: u64 = 1;
pub const HEAD: u64 = 2;
pub const TAIL: u64 = 3;
pub const MAGIC: u64 = 4;

/// A `struct iocb`, field by field.
#[derive(Clone, Copy, Default)]
pub struct Iocb {
    pub data: u64,
    pub key: u32,
    pub rw_flags: u32,
    pub opcode: u16,
    pub reqprio: u16,
    pub fd: i32,
    pub buf: u64,
    pub nbytes: u64,
    pub offset: i64,
    pub reserved2: u64,
    pub flags: u32,
    pub resfd: i32,
}

pub const PREAD: u16 = 0;
pub const PWRITE: u16 = 1;
pub const FSYNC: u16 = 2;
pub const FDSYNC: u16 = 3;
pub const POLL: u16 = 5;
pub const NOOP: u16 = 6;
pub const PREADV: u16 = 7;
pub const PWRITEV: u16 = 8;

impl Iocb {
    /// As bytes, laid out as linux/aio_abi.h does on a little-endian machine.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.data.to_ne_bytes());
        bytes.extend(self.key.to_ne_bytes());
        bytes.extend(self.rw_flags.to_ne_bytes());
        bytes.extend(self.opcode.to_ne_bytes());
        bytes.extend(self.reqprio.to_ne_bytes());
        bytes.extend(self.fd.to_ne_bytes());
        bytes.extend(self.buf.to_ne_bytes());
        bytes.extend(self.nbytes.to_ne_bytes());
        bytes.extend(self.offset.to_ne_bytes());
        bytes.extend(self.reserved2.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(self.resfd.to_ne_bytes());
        assert_eq!(bytes.len(), 64);
        bytes
    }
}

/// iocbs in guest memory, with the array of their addresses and a data buffer behind each.
pub struct Batch {
    area: Area,
    count: usize,
}

impl Batch {
    /// Bytes of the buffer of each iocb.
    pub const BUFFER: usize = 512;

    /// Puts iocbs down. One with `buf` and `nbytes` 0 that reads or writes is given its buffer.
    pub fn new(iocbs: &[Iocb]) -> Self {
        let count = iocbs.len();
        let area = Area::new((count * (8 + 64 + Self::BUFFER)).div_ceil(PAGE).max(1));
        let batch = Self { area, count };
        for (index, iocb) in iocbs.iter().enumerate() {
            let mut iocb = *iocb;
            if iocb.opcode <= PWRITE && iocb.buf == 0 && iocb.nbytes == 0 {
                (iocb.buf, iocb.nbytes) = (batch.buffer(index), Self::BUFFER as u64);
            }
            write(batch.iocb(index), &iocb.bytes()).unwrap();
            batch.area.put(index * 8, batch.iocb(index));
        }
        batch
    }

    /// Address of the array of addresses.
    pub fn array(&self) -> u64 {
        self.area.at(0)
    }

    /// Address of iocb `index`.
    pub fn iocb(&self, index: usize) -> u64 {
        self.area.at(self.count * 8 + index * 64)
    }

    /// Address of the buffer of iocb `index`.
    pub fn buffer(&self, index: usize) -> u64 {
        self.area.at(self.count * (8 + 64) + index * Self::BUFFER)
    }

    /// How many.
    pub fn len(&self) -> i64 {
        self.count as i64
    }
}

/// Room for events.
pub struct Events(Area);

impl Events {
    pub fn new(count: usize) -> Self {
        Self(Area::new((count * 32).div_ceil(PAGE).max(1)))
    }

    pub fn at(&self) -> u64 {
        self.0.at(0)
    }

    /// data, obj, res, res2 of event `index`.
    pub fn get(&self, index: usize) -> [u64; 4] {
        std::array::from_fn(|word| self.0.get(index * 32 + word * 8))
    }

    pub fn data(&self, index: usize) -> u64 {
        self.get(index)[0]
    }

    pub fn res(&self, index: usize) -> i64 {
        self.get(index)[2].cast_signed()
    }
}

/// A `struct timespec` in guest memory.
pub struct Timespec(Area);

impl Timespec {
    pub fn new(seconds: i64, nanoseconds: i64) -> Self {
        let area = Area::new(1);
        area.put(0, seconds.cast_unsigned());
        area.put(8, nanoseconds.cast_unsigned());
        Self(area)
    }

    pub fn at(&self) -> u64 {
        self.0.at(0)
    }
}
