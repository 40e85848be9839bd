//! Moving bytes between a protected file and the guest's memory, for every kind of call.
//!
//! Holds: a transfer ends where the guest's memory does, at whatever byte, and answers how much was
//! moved; `EFAULT` if that is nothing. With `O_DIRECT` what there was memory for is transferred, not
//! beyond the end of the file, and the answer is `EFAULT`. A file never becomes longer than what was
//! written to it, and memory behind a gap is left alone.
//!
//! Follows Linux mm/filemap.c (buffered) and fs/iomap/direct-io.c.

use postern_trusted::{
    aio::GuestVector,
    errno::Errno,
    platform::{self, Buffer},
    port::LaneFile,
    volume::Volume,
};

use super::{DIRECT_ALIGNMENT, OpenFile};
use crate::{
    family::standing::Held,
    guest::{Guest, GuestBuffer},
};

/// In a longer transfer there may be work under way behind the place where the buffer ends: that is
/// looked at first.
const LONG: usize = 64 << 10;

/// A buffer that can tell where the guest's memory ends.
pub trait Reach: Buffer + Sized {
    /// Guest addresses and lengths in bytes of its segments, in order.
    fn segments(&self) -> impl Iterator<Item = (u64, u64)> + Clone;

    /// The first `length` bytes of it.
    #[must_use]
    fn first(&self, length: usize) -> Self;

    /// For how many of the first `most` bytes there is memory; with `writable` that can be written.
    fn there(&self, writable: bool, most: usize) -> usize {
        let mut left = most as u64;
        let ranges = self.segments().map_while(move |(base, length)| {
            let length = length.min(left);
            left -= length;
            (length > 0 || left > 0).then_some((base, length))
        });
        usize::try_from(platform::reach(&Guest, ranges, writable)).unwrap_or(usize::MAX)
    }
}

impl Reach for GuestBuffer {
    fn segments(&self) -> impl Iterator<Item = (u64, u64)> + Clone {
        self.ranges()
    }

    fn first(&self, length: usize) -> Self {
        let mut first = self.clone();
        first.truncate(length);
        first
    }
}

impl Reach for GuestVector {
    fn segments(&self) -> impl Iterator<Item = (u64, u64)> + Clone {
        self.ranges()
    }

    fn first(&self, length: usize) -> Self {
        let mut first = self.clone();
        first.truncate(length as u64);
        first
    }
}

/// What is moved where.
#[derive(Clone, Copy, Debug)]
pub struct Moving {
    /// From the guest to the file.
    pub write: bool,
    /// In the file, in bytes; `None`: at its end.
    pub offset: Option<u64>,
    /// It is durable when it is answered.
    pub sync: bool,
}

impl OpenFile {
    /// Moves `buffer` in the file's volume, over the given disk; answers where in the file it began
    /// and how many bytes were moved.
    ///
    /// # Errors
    /// `EFAULT`, `ENOSPC`, `EROFS`, `EIO`.
    pub async fn transfer<B: Reach>(
        &self,
        (held, disk): (&Held, &LaneFile),
        moving: Moving,
        buffer: &B,
    ) -> Result<(u64, usize), Errno> {
        if moving.write {
            self.volume.touch(&held.volume);
        }
        let volume = &held.volume;
        let (asked, mut cut) = (buffer.len(), None);
        let touched = match moving.offset {
            Some(offset) if !moving.write => {
                let left = volume.size().saturating_sub(offset);
                asked.min(usize::try_from(left).unwrap_or(usize::MAX))
            }
            _ => asked,
        };
        // Nor can a write that made the file longer be taken back.
        let size = volume.size();
        let grows = moving.write && moving.offset.is_none_or(|at| at + asked as u64 > size);
        if touched > LONG || grows {
            let reach = self.whole(volume, buffer.there(!moving.write, touched), touched, moving);
            if reach == 0 && touched > 0 {
                return Err(Errno::EFAULT);
            }
            cut = (reach < touched).then(|| buffer.first(reach));
        }
        let mut again = false;
        let answer = loop {
            let now = cut.as_ref().unwrap_or(buffer);
            let answer = self.move_bytes((held, disk), moving, now).await;
            let ended_early = match answer {
                _ if again => false,
                Err(errno) => errno == Errno::EFAULT,
                Ok((_, moved)) if moving.write => moved < now.len() && moving.offset.is_some(),
                // Not the end of the file.
                Ok((at, moved)) => moved < now.len() && at + (moved as u64) < volume.size(),
            };
            if !ended_early {
                break answer;
            }
            let reach = now.there(!moving.write, now.len());
            if reach == now.len() {
                break answer;
            }
            let reach = self.whole(volume, reach, asked, moving);
            cut = Some(now.first(reach));
            if reach == 0 {
                break answer;
            }
            again = true;
        };
        let length = cut.as_ref().map_or(asked, B::len);
        let faulted = length < asked;
        if faulted && (self.direct() || length == 0) { Err(Errno::EFAULT) } else { answer }
    }

    /// What of `reach` bytes, where fewer than `asked`, is moved: with `O_DIRECT` whole sectors, and
    /// for a write none behind the end of the file.
    fn whole(&self, volume: &Volume, reach: usize, asked: usize, moving: Moving) -> usize {
        if !self.direct() || reach >= asked {
            return reach;
        }
        let reach = reach as u64;
        let left = match moving.offset {
            _ if !moving.write => reach,
            Some(offset) => volume.size().saturating_sub(offset).min(reach),
            None => 0,
        };
        usize::try_from(left - left % DIRECT_ALIGNMENT).unwrap_or(0)
    }

    async fn move_bytes(
        &self,
        (held, disk): (&Held, &LaneFile),
        moving: Moving,
        buffer: &impl Buffer,
    ) -> Result<(u64, usize), Errno> {
        let moved = match moving.offset {
            Some(offset) if !moving.write => {
                let moved = self.volume.load((held, disk), offset, buffer).await?;
                if self.direct() {
                    self.volume.unwritten.remove(offset, moved as u64);
                }
                return Ok((offset, self.end_read(offset, buffer, moved)?));
            }
            offset => self.volume.store((held, disk), offset, buffer).await?,
        };
        let (at, length) = (moved.0, moved.1 as u64);
        if moving.sync || self.direct() {
            self.volume.unwritten.remove(at, length);
        } else {
            self.volume.unwritten.add(at, length);
        }
        if moving.sync {
            self.volume.make_written_durable(held, disk).await?;
        }
        Ok(moved)
    }
}
