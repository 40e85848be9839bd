//! Reads, writes, positions and sizes of an open protected file, with Linux's rules for a regular
//! file on ext4: what is checked in which order, what moves the position, what O_DIRECT asks.

use core::sync::atomic::Ordering;

use postern_trusted::{errno::Errno, platform::Buffer};

use super::{OpenFile, direct::Transfer, transfer::Moving};
use crate::{
    directory::{Entry, Listing},
    family,
    guest::GuestBuffer,
    limits::{self, TooBig},
    process, sys, wait,
};

/// Largest file and highest position: ext4 with 4 KiB blocks (s_maxbytes).
pub const MAX_BYTES: u64 = 0xffff_ffff << 12;

/// Data and holes are told apart in steps of this, in bytes: the volume's block.
const EXTENT: u64 = 4096;

/// RWF_* bits, from the kernel's uapi.
pub mod rwf {
    /// Poll for completion.
    pub const HIPRI: i32 = 0x1;
    /// As O_DSYNC, for one write.
    pub const DSYNC: i32 = 0x2;
    /// As O_SYNC, for one write.
    pub const SYNC: i32 = 0x4;
    /// Fail rather than wait.
    pub const NOWAIT: i32 = 0x8;
    /// Write at the end, whatever the offset.
    pub const APPEND: i32 = 0x10;
    /// Ignore O_APPEND.
    pub const NOAPPEND: i32 = 0x20;
    /// Keep nothing in the page cache: there is none.
    pub const DONTCACHE: i32 = 0x80;
    /// Raise no SIGPIPE.
    pub const NOSIGNAL: i32 = 0x100;
    /// Those that a protected file understands.
    pub const UNDERSTOOD: i32 =
        HIPRI | DSYNC | SYNC | NOWAIT | APPEND | NOAPPEND | DONTCACHE | NOSIGNAL;
}

/// Where a read or write happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// At the shared position, which moves.
    Position,
    /// At this offset; the position stays.
    Offset(u64),
}

impl At {
    /// The offset of pread(2) and its kin.
    ///
    /// # Errors
    /// `EINVAL` if it is negative.
    pub fn offset(offset: i64) -> Result<Self, Errno> {
        u64::try_from(offset).map(Self::Offset).map_err(|_| Errno::EINVAL)
    }
}

/// Linux's rw_verify_area: the range must end below 2^63.
fn check_range(offset: u64, length: usize) -> Result<(), Errno> {
    let end = offset.checked_add(length as u64).and_then(|end| i64::try_from(end).ok());
    end.map(drop).ok_or(Errno::EINVAL)
}

impl OpenFile {
    /// `O_DIRECT`'s rule for this transfer.
    async fn check_alignment(
        &self,
        write: bool,
        offset: u64,
        buffer: &GuestBuffer,
    ) -> Result<(), Errno> {
        let transfer = Transfer { write, offset, ranges: buffer.ranges() };
        if !self.direct() || transfer.is_aligned() {
            return Ok(());
        }
        let held = self.volume.hold_soon().await?;
        self.check_direct(&held, transfer).await
    }

    fn check_alignment_now(
        &self,
        write: bool,
        offset: u64,
        buffer: &GuestBuffer,
    ) -> Result<(), Errno> {
        if !self.direct() {
            return Ok(());
        }
        process::current().block_on(self.check_alignment(write, offset, buffer))
    }

    /// read(2), pread(2), readv(2), preadv2(2). `rwf` are RWF_* bits.
    ///
    /// # Errors
    /// `EBADF`: not open for reading. `EINVAL`: offset, alignment. `EOPNOTSUPP`: flags. `EFAULT`,
    /// `EIO`.
    pub fn read(&self, at: At, buffer: &GuestBuffer, rwf: i32) -> Result<usize, Errno> {
        if !self.readable() {
            return Err(Errno::EBADF);
        }
        self.content()?;
        if buffer.is_empty() {
            return Ok(0);
        }
        if rwf & !rwf::UNDERSTOOD != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        self.volume.attend()?;
        let nowait = self.direct() && rwf & rwf::NOWAIT != 0;
        let waits = |at| nowait && self.waits_for_writeback(at, buffer.len() as u64);
        match at {
            At::Offset(offset) if waits(offset) => Err(Errno::EAGAIN),
            At::Offset(offset) => self.read_at(offset, buffer),
            At::Position => {
                let (offset, length) = self.advance(|position| {
                    if waits(position) {
                        return Err(Errno::EAGAIN);
                    }
                    let size = self.volume.size();
                    let left = usize::try_from(size.saturating_sub(position)).unwrap_or(usize::MAX);
                    let length = buffer.len().min(left);
                    check_range(position, buffer.len())?;
                    if length > 0 {
                        self.check_alignment_now(false, position, buffer)?;
                    }
                    Ok((position, length))
                })?;
                let result = self.read_at(offset, buffer);
                self.correct(offset, length, result.unwrap_or(0));
                result
            }
        }
    }

    /// Whether Linux would have to write pages before a transfer with `O_DIRECT`.
    pub(crate) fn waits_for_writeback(&self, offset: u64, length: u64) -> bool {
        offset < self.volume.size() && self.volume.unwritten.has(offset, length)
    }

    fn read_at(&self, offset: u64, buffer: &GuestBuffer) -> Result<usize, Errno> {
        let admitted = if self.direct() {
            process::current().block_on(self.admits_read(offset, buffer))
        } else {
            self.has_something(offset, buffer)
        };
        if !admitted? {
            return Ok(0);
        }
        process::current().block_on(self.read_by_itself(offset, buffer))
    }

    /// pread(2) where [`Self::admits_read`] says yes.
    ///
    /// # Errors
    /// `EFAULT`, `EIO`.
    pub async fn read_by_itself(&self, offset: u64, buffer: &GuestBuffer) -> Result<usize, Errno> {
        let held = self.volume.hold_soon().await?;
        let disk = held.disk_for_guest(wait::now_ns())?;
        let moving = Moving { write: false, offset: Some(offset), sync: false };
        self.transfer((&held, &disk), moving, buffer).await.map(|(_, length)| length)
    }

    fn has_something(&self, offset: u64, buffer: &GuestBuffer) -> Result<bool, Errno> {
        check_range(offset, buffer.len())?;
        Ok(!buffer.is_empty() && offset < self.volume.size())
    }

    /// Whether there is anything to read at `offset`.
    ///
    /// # Errors
    /// `EINVAL`: a range beyond 2^63, or misaligned for O_DIRECT. `EIO`.
    pub async fn admits_read(&self, offset: u64, buffer: &GuestBuffer) -> Result<bool, Errno> {
        let something = self.has_something(offset, buffer)?;
        if something {
            self.check_alignment(false, offset, buffer).await?;
        }
        Ok(something)
    }

    /// write(2), pwrite(2), writev(2), pwritev2(2). `rwf` are RWF_* bits.
    ///
    /// # Errors
    /// `EBADF`: not open for writing. `EINVAL`: offset, alignment, APPEND with NOAPPEND.
    /// `EOPNOTSUPP`: flags. `EFBIG`, `ENOSPC`, `EFAULT`, `EIO`.
    pub fn write(&self, at: At, buffer: &GuestBuffer, rwf: i32) -> Result<usize, Errno> {
        if !self.writable() {
            return Err(Errno::EBADF);
        }
        if buffer.is_empty() {
            return Ok(0);
        }
        if rwf & !rwf::UNDERSTOOD != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if rwf & rwf::APPEND != 0 && rwf & rwf::NOAPPEND != 0 {
            return Err(Errno::EINVAL);
        }
        self.volume.attend()?;
        let sync = self.dsync() || rwf & (rwf::DSYNC | rwf::SYNC) != 0;
        let append = rwf & rwf::APPEND != 0 || self.append() && rwf & rwf::NOAPPEND == 0;
        let asked = match at {
            At::Offset(offset) => offset,
            At::Position => self.position.load(Ordering::Relaxed),
        };
        check_range(asked, buffer.len())?;
        let start = if append { self.volume.size() } else { asked };
        let room = limits::room(start, buffer.len() as u64, MAX_BYTES).map_err(TooBig::signal)?;
        let mut short = GuestBuffer::default();
        let buffer = match usize::try_from(room) {
            Ok(room) if room < buffer.len() => {
                short.clone_from(buffer);
                short.truncate(room);
                &short
            }
            _ => buffer,
        };
        let written = match at {
            _ if append => {
                if let At::Offset(offset) = at {
                    check_range(offset, buffer.len())?;
                }
                // Read, appended to and moved on by others too: the end of these bytes it is.
                let (start, length) = self.put_now(None, buffer, sync)?;
                if at == At::Position {
                    self.position.store(start + length as u64, Ordering::Relaxed);
                }
                return Ok(length);
            }
            At::Offset(offset) => self.put_now(Some(offset), buffer, sync),
            At::Position => {
                let (offset, length) = self.advance(|position| {
                    check_range(position, buffer.len())?;
                    self.check_alignment_now(true, position, buffer)?;
                    Ok((position, buffer.len()))
                })?;
                let written = self.put_now(Some(offset), buffer, sync);
                self.correct(offset, length, written.map_or(0, |(_, length)| length));
                written
            }
        };
        written.map(|(_, length)| length)
    }

    /// pwrite(2) as a task of its own, for POSIX AIO: O_APPEND and O_DSYNC count.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_by_itself(&self, offset: u64, buffer: &GuestBuffer) -> Result<usize, Errno> {
        if buffer.is_empty() {
            return Ok(0);
        }
        check_range(offset, buffer.len())?;
        let offset = (!self.append()).then_some(offset);
        self.put(offset, buffer, self.dsync()).await.map(|(_, length)| length)
    }

    fn put_now(
        &self,
        offset: Option<u64>,
        buffer: &GuestBuffer,
        sync: bool,
    ) -> Result<(u64, usize), Errno> {
        process::current().block_on(self.put(offset, buffer, sync))
    }

    /// Writes at `offset`, or at the end; with `sync` until it is durable. Answers where the data
    /// begins and how much of it was written.
    async fn put(
        &self,
        offset: Option<u64>,
        buffer: &GuestBuffer,
        sync: bool,
    ) -> Result<(u64, usize), Errno> {
        let start = offset.unwrap_or_else(|| self.volume.size());
        check_range(start, buffer.len())?;
        if start >= MAX_BYTES {
            return Err(Errno::EFBIG);
        }
        self.check_alignment(true, start, buffer).await?;
        let held = self.volume.hold_soon().await?;
        let disk = held.disk_for_guest(wait::now_ns())?;
        let moving = Moving { write: true, offset, sync };
        self.transfer((&held, &disk), moving, buffer).await
    }

    /// Moves the position past what `plan` wants to transfer there, in one step against others
    /// that share it, so that no two transfers get the same bytes.
    fn advance(
        &self,
        plan: impl Fn(u64) -> Result<(u64, usize), Errno>,
    ) -> Result<(u64, usize), Errno> {
        loop {
            let position = self.position.load(Ordering::Relaxed);
            let (offset, length) = plan(position)?;
            let moved = self.position.compare_exchange(
                position,
                offset + length as u64,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            if moved.is_ok() {
                return Ok((offset, length));
            }
        }
    }

    /// `done` instead of `planned` bytes were moved at `offset`: the position follows, unless
    /// somebody else has moved it on.
    fn correct(&self, offset: u64, planned: usize, done: usize) {
        if planned != done {
            let _ = self.position.compare_exchange(
                offset + planned as u64,
                offset + done as u64,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
    }

    /// lseek(2).
    ///
    /// # Errors
    /// `EINVAL`: unknown `whence`, or a place before 0 or beyond the largest file. `ENXIO`: data
    /// or hole asked for beyond the end. `EBADF` for `O_PATH`.
    pub fn seek(&self, offset: i64, whence: i32) -> Result<u64, Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        if let Some(listing) = self.listing() {
            return self.seek_entry(listing, offset, whence);
        }
        if !matches!(whence, libc::SEEK_SET | libc::SEEK_CUR) {
            self.volume.attend()?;
        }
        let from = match whence {
            libc::SEEK_SET => 0,
            libc::SEEK_CUR => self.position.load(Ordering::Relaxed),
            libc::SEEK_END => self.volume.size(),
            libc::SEEK_DATA | libc::SEEK_HOLE => {
                let place = self.seek_extent(offset, whence == libc::SEEK_DATA)?;
                self.position.store(place, Ordering::Relaxed);
                return Ok(place);
            }
            _ => return Err(Errno::EINVAL),
        };
        let place = from.checked_add_signed(offset).filter(|&place| place <= MAX_BYTES);
        let place = place.ok_or(Errno::EINVAL)?;
        if whence != libc::SEEK_CUR || offset != 0 {
            self.position.store(place, Ordering::Relaxed);
        }
        Ok(place)
    }

    /// lseek(2) of a directory: the position is the number of the next entry.
    fn seek_entry(&self, listing: &Listing, offset: i64, whence: i32) -> Result<u64, Errno> {
        let from = match whence {
            libc::SEEK_SET => 0,
            libc::SEEK_CUR => self.position.load(Ordering::Relaxed),
            _ => return Err(Errno::EINVAL),
        };
        let place = from.checked_add_signed(offset).ok_or(Errno::EINVAL)?;
        if place == 0 {
            listing.rewind();
        }
        self.position.store(place, Ordering::Relaxed);
        Ok(place)
    }

    /// The next entry of a directory, if `fits` takes it.
    ///
    /// # Errors
    /// `EBADF` for `O_PATH`, `ENOTDIR` for a file, `ENOENT` for a removed directory, `EIO`.
    pub fn next_entry(&self, fits: impl FnOnce(&Entry, u64) -> bool) -> Result<bool, Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        let listing = self.listing().ok_or(Errno::ENOTDIR)?;
        let at = self.position.load(Ordering::Relaxed);
        let place = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        let Some(entry) = listing.entry(place)? else { return Ok(false) };
        let taken = fits(&entry, at + 1);
        if taken {
            self.position.store(at + 1, Ordering::Relaxed);
        }
        Ok(taken)
    }

    /// The first data or hole at or after `offset`, in steps of the volume's blocks.
    fn seek_extent(&self, offset: i64, data: bool) -> Result<u64, Errno> {
        const NO_SUCH_PLACE: Errno = Errno(libc::ENXIO);
        // What was stored in a mapping makes data of a hole.
        self.volume.write_back_now()?;
        let size = self.volume.size();
        let start =
            u64::try_from(offset).ok().filter(|&start| start < size).ok_or(NO_SUCH_PLACE)?;
        let mut at = start;
        while at < size {
            let end = (at - at % EXTENT).saturating_add(EXTENT).min(size);
            if self.volume.is_hole(at, end - at) != data {
                return Ok(at);
            }
            at = end;
        }
        // The end of the file counts as a hole.
        if data { Err(NO_SUCH_PLACE) } else { Ok(size) }
    }

    /// ftruncate(2).
    ///
    /// # Errors
    /// `EINVAL`: not open for writing, or a negative length. `EFBIG`, `ENOSPC`, `EIO`.
    pub fn truncate(&self, length: i64) -> Result<(), Errno> {
        let length = u64::try_from(length).map_err(|_| Errno::EINVAL)?;
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        if !self.writable() {
            return Err(Errno::EINVAL);
        }
        self.volume.attend()?;
        limits::may_grow(self.volume.size(), length).map_err(TooBig::signal)?;
        self.truncate_to(length)
    }

    /// Truncates whatever the file was opened for: truncate(2), O_TRUNC.
    ///
    /// # Errors
    /// `EFBIG`, `ENOSPC`, `EIO`.
    pub fn truncate_to(&self, length: u64) -> Result<(), Errno> {
        if length > MAX_BYTES {
            return Err(Errno::EFBIG);
        }
        self.volume.resize(length)
    }

    /// fallocate(2): extending, punching and zeroing. Nothing is reserved: a volume's capacity is
    /// its own from the start.
    ///
    /// # Errors
    /// `EBADF`: not open for writing. `EINVAL`: an empty or negative range. `EOPNOTSUPP`: other
    /// modes. `EFBIG`, `ENOSPC`: beyond what the volume can hold. `EIO`.
    pub fn allocate(&self, mode: i32, offset: i64, length: i64) -> Result<(), Errno> {
        let (Ok(start), Ok(length)) = (u64::try_from(offset), u64::try_from(length)) else {
            return Err(Errno::EINVAL);
        };
        if length == 0 {
            return Err(Errno::EINVAL);
        }
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let zero = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => false,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => true,
            libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        if !self.writable() {
            return Err(Errno::EBADF);
        }
        let end = start.checked_add(length).filter(|&end| end <= MAX_BYTES);
        let end = end.ok_or(Errno::EFBIG)?;
        self.volume.attend()?;
        let punch = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
        if !punch && end > self.volume.capacity() {
            return Err(Errno::ENOSPC);
        }
        let size = self.volume.size();
        // Also where nothing else changes.
        self.volume.change(async |_, _| Ok(()))?;
        if zero && start < size {
            self.volume.punch(start, length.min(size - start))?;
        }
        if !keep_size && end > size {
            self.volume.truncate(end)?;
        }
        Ok(())
    }

    /// fsync(2) and fdatasync(2).
    ///
    /// # Errors
    /// `EBADF` for `O_PATH`; `EIO` if it cannot be made durable.
    pub fn flush(&self) -> Result<(), Errno> {
        if self.is_path() {
            return Err(Errno::EBADF);
        }
        self.after_sync(self.volume.sync())
    }

    /// What a sync answers that the volume `answered`: once for each time that acknowledged writes
    /// were lost with the volume's lease, `EIO`.
    ///
    /// # Errors
    /// `EIO`, and those of the volume.
    pub fn after_sync(&self, answered: Result<(), Errno>) -> Result<(), Errno> {
        if answered.is_err()
            && let Some(family) = family::family()
        {
            // It may be for a lost lease: then this answer tells of it.
            family.ask_of_leases(process::current());
        }
        let lost = self.volume.losses();
        let told = self.told.swap(lost, Ordering::AcqRel) == lost;
        answered.and(if told { Ok(()) } else { Err(Errno::EIO) })
    }

    /// Bytes between the position and the end: FIONREAD.
    #[must_use]
    pub fn unread(&self) -> i64 {
        let left =
            i128::from(self.volume.size()) - i128::from(self.position.load(Ordering::Relaxed));
        i64::try_from(left).unwrap_or(i64::MAX)
    }
}

/// Wall-clock nanoseconds since the epoch, for a file's times.
#[must_use]
pub fn wall_ns() -> i64 {
    let (seconds, nanoseconds) = sys::wall_clock();
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
