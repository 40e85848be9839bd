//! A checked request, and the guest's buffer that it reads or fills.

use alloc::{boxed::Box, sync::Arc, vec::Vec};

use super::AioHost;
use crate::{
    errno::Errno,
    platform::{self, Buffer, Fault},
};

/// Most bytes that one request moves: `MAX_RW_COUNT`.
pub const MAX_RW_BYTES: u64 = 0x7fff_f000;
/// Most segments of a vector: `UIO_MAXIOV`.
const MAX_SEGMENTS: u32 = 1024;
/// Bytes of a `struct iovec`.
const IOVEC_BYTES: u64 = 16;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffer from the file (PREAD, PREADV).
    Read,
    /// Write the buffer to the file (PWRITE, PWRITEV).
    Write,
    /// fsync(2).
    Fsync,
    /// fdatasync(2).
    Fdatasync,
}

/// A request that has passed all of io_submit's checks.
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Byte offset in the file; 0 for the syncs. `offset + buffer.len()` fits in an `i64`. Of no
    /// meaning if `flags` append.
    pub offset: u64,
    /// The guest's buffer; empty for the syncs.
    pub buffer: GuestVector,
    /// How to do it.
    pub flags: RwFlags,
    /// When the guest's io_submit came in, in the clock of [`AioHost::now_ns`].
    pub submitted_ns: u64,
}

/// `RWF_*` bits of a request, with what the descriptor itself demands (`O_APPEND`, `O_DSYNC`,
/// `O_SYNC`) put in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RwFlags(u32);

impl RwFlags {
    pub(super) const HIPRI: u32 = 0x1;
    pub(super) const DSYNC: u32 = 0x2;
    pub(super) const SYNC: u32 = 0x4;
    pub(super) const NOWAIT: u32 = 0x8;
    pub(super) const APPEND: u32 = 0x10;
    pub(super) const NOAPPEND: u32 = 0x20;
    pub(super) const ATOMIC: u32 = 0x40;
    pub(super) const DONTCACHE: u32 = 0x80;
    pub(super) const NOSIGNAL: u32 = 0x100;
    /// What Linux 6.18 knows.
    pub(super) const KNOWN: u32 = 0x1ff;

    pub(super) const fn new(bits: u32) -> Self {
        Self(bits)
    }

    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// The data must be durable when a write completes.
    #[must_use]
    pub const fn dsync(self) -> bool {
        self.has(Self::DSYNC | Self::SYNC)
    }

    /// Data and all metadata must be durable when a write completes.
    #[must_use]
    pub const fn sync(self) -> bool {
        self.has(Self::SYNC)
    }

    /// Write at the end of the file, whatever the offset.
    #[must_use]
    pub const fn append(self) -> bool {
        self.has(Self::APPEND)
    }

    /// Answer `EAGAIN` where the request would have to wait before it can start.
    #[must_use]
    pub const fn nowait(self) -> bool {
        self.has(Self::NOWAIT)
    }

    /// A write is done whole or not at all.
    #[must_use]
    pub const fn atomic(self) -> bool {
        self.has(Self::ATOMIC)
    }

    /// Do not keep the data cached.
    #[must_use]
    pub const fn dontcache(self) -> bool {
        self.has(Self::DONTCACHE)
    }

    /// Do not raise `SIGPIPE`.
    #[must_use]
    pub const fn nosignal(self) -> bool {
        self.has(Self::NOSIGNAL)
    }
}

/// Where a request's bytes lie in the guest: one range, or the segments of a vector.
#[derive(Clone)]
pub struct GuestVector {
    host: Arc<dyn AioHost>,
    segments: Segments,
}

#[derive(Clone)]
enum Segments {
    One(Segment),
    Many(Box<[Segment]>),
}

#[derive(Clone, Copy)]
struct Segment {
    /// Bytes of the buffer before this segment.
    start: u64,
    /// Guest address.
    base: u64,
    /// Bytes.
    len: u64,
}

impl GuestVector {
    /// No bytes.
    pub(super) const fn empty(host: Arc<dyn AioHost>) -> Self {
        Self { host, segments: Segments::One(Segment { start: 0, base: 0, len: 0 }) }
    }

    /// One range: `import_ubuf`. The length is capped before the address is looked at.
    pub(super) fn range(host: Arc<dyn AioHost>, base: u64, len: u64) -> Result<Self, Errno> {
        let len = len.min(MAX_RW_BYTES);
        check_range(&*host, base, len)?;
        Ok(Self { host, segments: Segments::One(Segment { start: 0, base, len }) })
    }

    /// The `count` segments of the guest's iovec array at `array`: `__import_iovec`.
    pub(super) fn vector(host: Arc<dyn AioHost>, array: u64, count: u32) -> Result<Self, Errno> {
        if count == 1 {
            let (base, len) = read_iovec(&*host, array)?;
            return Self::range(host, base, len);
        }
        if count > MAX_SEGMENTS {
            return Err(Errno::EINVAL);
        }
        // All lengths are looked at before any address is.
        let mut segments = Vec::new();
        segments.try_reserve_exact(count as usize).map_err(|_| Errno::ENOMEM)?;
        for index in 0..u64::from(count) {
            let (base, len) = read_iovec(&*host, array.wrapping_add(index * IOVEC_BYTES))?;
            segments.push(Segment { start: 0, base, len });
        }
        let mut total = 0;
        for segment in &mut segments {
            check_range(&*host, segment.base, segment.len)?;
            segment.len = segment.len.min(MAX_RW_BYTES - total);
            segment.start = total;
            total += segment.len;
        }
        Ok(Self { host, segments: Segments::Many(segments.into_boxed_slice()) })
    }

    /// Guest addresses and lengths in bytes of the segments, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + Clone {
        self.segments().iter().map(|segment| (segment.base, segment.len))
    }

    /// How many bytes from the start on the guest has memory for ([`platform::reach`]).
    #[must_use]
    pub fn reach(&self, writable: bool) -> usize {
        let reach = platform::reach(&*self.host, self.ranges(), writable);
        usize::try_from(reach).unwrap_or(usize::MAX)
    }

    /// Cuts off what is beyond `len` bytes.
    pub fn truncate(&mut self, len: u64) {
        let segments = match &mut self.segments {
            Segments::One(segment) => core::slice::from_mut(segment),
            Segments::Many(segments) => segments,
        };
        for segment in segments {
            segment.start = segment.start.min(len);
            segment.len = segment.len.min(len - segment.start);
        }
    }

    fn segments(&self) -> &[Segment] {
        match &self.segments {
            Segments::One(segment) => core::slice::from_ref(segment),
            Segments::Many(segments) => segments,
        }
    }

    /// Calls `each` with guest addresses and lengths of the pieces that bytes `at..at + len`
    /// consist of. Bytes past the end are a fault.
    fn pieces(
        &self,
        at: usize,
        len: usize,
        mut each: impl FnMut(u64, core::ops::Range<usize>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let segments = self.segments();
        let mut done = 0;
        // The last segment that starts at or before `at`.
        let mut index = segments.partition_point(|s| s.start <= at as u64).saturating_sub(1);
        while done < len {
            let segment = segments.get(index).ok_or(Fault)?;
            let skip = (at + done) as u64 - segment.start;
            let piece = usize::try_from(segment.len.saturating_sub(skip))
                .map_or(len - done, |left| left.min(len - done));
            if piece > 0 {
                each(segment.base + skip, done..done + piece)?;
            }
            done += piece;
            index += 1;
        }
        Ok(())
    }
}

impl Buffer for GuestVector {
    fn len(&self) -> usize {
        let len = self.segments().last().map_or(0, |s| s.start + s.len);
        usize::try_from(len).unwrap_or(usize::MAX)
    }

    fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        self.pieces(at, out.len(), |base, range| self.host.read(base, &mut out[range]))
    }

    fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), Fault> {
        self.pieces(at, data.len(), |base, range| self.host.write(base, &data[range]))
    }
}

/// Whether a range is user memory, mapped or not: `access_ok`.
fn check_range(host: &dyn AioHost, base: u64, len: u64) -> Result<(), Errno> {
    match base.checked_add(len) {
        Some(end) if end <= host.user_end() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// Base and length of one segment; a length that is negative as an `ssize_t` is refused.
fn read_iovec(host: &dyn AioHost, address: u64) -> Result<(u64, u64), Errno> {
    let mut bytes = [0; 16];
    host.read(address, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
    let value = u128::from_ne_bytes(bytes);
    #[allow(clippy::cast_possible_truncation)]
    let (base, len) = (value as u64, (value >> 64) as u64);
    if len.cast_signed() < 0 {
        return Err(Errno::EINVAL);
    }
    Ok((base, len))
}
