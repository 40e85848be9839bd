//! What a mapped file holds: a memory file of the same size, and what of it is the truth.
//!
//! The kernel maps the memory file into the guest, so all mappings of all processes, the SIGBUS
//! behind the end and the protections are the kernel's own. The ranges that were ever mapped are
//! *present*: there the memory file is the truth, and the volume follows; everywhere else it is the
//! volume. What calls write goes to both at once ([`Content::store`]); what the guest stores by
//! instructions is found by comparing with what the volume is known to hold
//! ([`Content::write_back`]).
//!
//! Holds, for whoever has the turn: where the memory file equals the shadow, the volume holds these
//! bytes. A write-back that fails leaves the shadow as it was: the bytes are tried again. What lies
//! behind the end of the file is never written to the volume and reads as zeros when the file grows.

use core::{
    ops::Range,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};
use std::collections::BTreeMap;

use postern_trusted::{
    errno::Errno,
    platform::{Buffer, Fault, Memory},
    port::LaneFile,
    sync::Lock,
    volume::Volume,
};

use super::{
    copying::{fill, let_others_run, write_runs},
    memory::{self, PAGE},
    ranges::Ranges,
    reach::{Lost, Reached, reach},
    turn::Turn,
};
use crate::{family::family, sys};

/// Present, compared and kept for comparison in pieces of so many bytes.
pub const PIECE: u64 = 64 << 10;
/// Most bytes of files that a run has present in all.
pub const MOST_BYTES: u64 = 1 << 30;
/// Moved at once between the volume and the memory file, in bytes.
pub(super) const STEP: u64 = 1 << 20;
/// A comparison lets others run after so many pieces.
const PIECES_AT_ONCE: usize = 16;

/// A file's content while it is mapped.
pub struct Content {
    /// No other content of the family has it.
    pub number: u64,
    /// Device and inode of the memory file.
    pub node: (u64, u64),
    /// Held by whoever changes the file, or compares it.
    pub turn: Turn,
    /// Mappings made and not ended.
    pub views: AtomicUsize,
    /// When it is to be compared next; `u64::MAX` while somebody does.
    pub due_ns: AtomicU64,
    inner: Lock<Inner>,
}

#[derive(Default)]
struct Inner {
    present: Ranges,
    /// Size of the memory file: that of the guest's file.
    size: u64,
    /// A mapping may be stored to: then there are shadows.
    stores: bool,
    /// What the volume holds of the pieces, by number; one that is missing holds zeros.
    shadows: BTreeMap<u64, Box<[u8]>>,
    /// Processes with a descriptor of the memory file, and its number there.
    holders: Vec<(u32, i32)>,
    /// What [`MOST_BYTES`] counts of it.
    counted: u64,
}

/// A part of another buffer.
struct Part<'a, B> {
    whole: &'a B,
    at: usize,
    length: usize,
}

impl<B: Buffer> Buffer for Part<'_, B> {
    fn len(&self) -> usize {
        self.length
    }

    fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        self.whole.copy_in(self.at + at, out)
    }

    fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), Fault> {
        self.whole.copy_out(self.at + at, data)
    }
}

const fn pieces_of(range: &Range<u64>) -> Range<u64> {
    range.start / PIECE..range.end.div_ceil(PIECE)
}

/// What a transfer answers that moved `done` bytes before it ended so.
fn outcome(done: usize, end: Result<(), Errno>) -> Result<usize, Errno> {
    if done > 0 { Ok(done) } else { end.map(|()| 0) }
}

impl Content {
    /// Of a memory file that is empty; process `holder` has it at `fd`.
    #[must_use]
    pub fn new(number: u64, node: (u64, u64), holder: u32, fd: i32) -> Self {
        let inner = Inner { holders: vec![(holder, fd)], ..Inner::default() };
        Self {
            number,
            node,
            turn: Turn::default(),
            views: AtomicUsize::new(0),
            due_ns: AtomicU64::new(0),
            inner: Lock::new(inner),
        }
    }

    /// Processes that may have the memory file, and its number there.
    #[must_use]
    pub fn holders(&self) -> Vec<(u32, i32)> {
        self.inner.lock().holders.clone()
    }

    /// Process `id` has it at `fd`.
    pub fn hold(&self, id: u32, fd: i32) {
        let mut inner = self.inner.lock();
        inner.holders.retain(|holder| holder.0 != id);
        inner.holders.push((id, fd));
    }

    /// Process `id` has it no more.
    pub fn unhold(&self, id: u32) {
        self.inner.lock().holders.retain(|holder| holder.0 != id);
    }

    /// Whether a mapping may be stored to.
    #[must_use]
    pub fn stores(&self) -> bool {
        self.inner.lock().stores
    }

    /// Makes `range` present, with the volume's bytes; `stores`: it may be stored to from now on.
    /// For the holder of the turn.
    ///
    /// # Errors
    /// `ENODEV`: more than [`MOST_BYTES`]. `EIO`, `ENOMEM`.
    pub async fn present(
        &self,
        (volume, disk): (&Volume, &LaneFile),
        range: &Range<u64>,
        stores: bool,
    ) -> Result<(), Errno> {
        let reached = reach(self)?;
        let fd = reached.fd;
        let size = volume.size();
        let pieces = pieces_of(range);
        let range = pieces.start * PIECE..pieces.end.saturating_mul(PIECE);
        let (missing, before) = {
            let inner = self.inner.lock();
            let missing: Vec<_> = inner.present.parts(range.clone(), false).collect();
            (missing, inner.present.bytes_below(size))
        };
        let more: u64 =
            missing.iter().map(|part| part.end.min(size).saturating_sub(part.start)).sum();
        self.count(before + more)?;
        for part in &missing {
            fill((volume, disk), fd, &(part.start..part.end.min(size))).await?;
        }
        let shadowed = {
            let mut inner = self.inner.lock();
            missing.iter().for_each(|part| inner.present.add(part.clone()));
            match (stores, inner.stores) {
                (true, false) => core::iter::once(0..u64::MAX / 2).collect(),
                (_, true) => missing,
                (false, false) => Vec::new(),
            }
        };
        for part in shadowed {
            self.shadow(fd, part)?;
        }
        if stores {
            self.inner.lock().stores = true;
        }
        Ok(())
    }

    /// Notes that so many bytes are present.
    fn count(&self, bytes: u64) -> Result<(), Errno> {
        let Some(family) = family() else { return Ok(()) };
        let counted = self.inner.lock().counted;
        let add = |all: u64| {
            let all = all.saturating_sub(counted) + bytes;
            (all <= MOST_BYTES || bytes <= counted).then_some(all)
        };
        let counts = family.mapped.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        counts.map_err(|_| Errno::ENODEV)?;
        self.inner.lock().counted = bytes;
        Ok(())
    }

    /// It is not the file's content any more.
    pub fn end(&self) {
        let inner = core::mem::take(&mut *self.inner.lock());
        if let Some(family) = family() {
            family.mapped.bytes.fetch_sub(inner.counted, Ordering::AcqRel);
        }
    }

    /// Keeps what the memory file holds in `range` as what the volume holds.
    fn shadow(&self, fd: i32, range: Range<u64>) -> Result<(), Errno> {
        let mut at = range.start;
        while let Some(data) = memory::data_after(fd, at).filter(|&data| data < range.end) {
            let piece = data / PIECE;
            let mut bytes = vec![0; PIECE as usize].into_boxed_slice();
            memory::read(fd, piece * PIECE, &mut bytes)?;
            self.put_shadow(piece, Some(bytes));
            at = (piece + 1) * PIECE;
        }
        Ok(())
    }

    fn take_shadow(&self, piece: u64) -> Option<Box<[u8]>> {
        self.inner.lock().shadows.remove(&piece)
    }

    fn put_shadow(&self, piece: u64, shadow: Option<Box<[u8]>>) {
        if let Some(shadow) = shadow.filter(|shadow| shadow.iter().any(|byte| *byte != 0)) {
            let old = self.inner.lock().shadows.insert(piece, shadow);
            drop(old);
        }
    }

    /// Changes what the volume is known to hold in `range`, piece by piece: `change` is given the
    /// bytes, and where in the file they lie.
    fn change_shadow(&self, range: Range<u64>, mut change: impl FnMut(&mut [u8], u64)) {
        for piece in pieces_of(&range) {
            let start = piece * PIECE;
            let (from, to) = (range.start.max(start), range.end.min(start + PIECE));
            let shadow = self.take_shadow(piece);
            let mut shadow = shadow.unwrap_or_else(|| vec![0; PIECE as usize].into_boxed_slice());
            change(&mut shadow[(from - start) as usize..(to - start) as usize], from);
            self.put_shadow(piece, Some(shadow));
        }
    }

    /// The memory file becomes as long as the guest's file, which is `size` bytes long now. For the
    /// holder of the turn.
    ///
    /// # Errors
    /// `EFBIG`, `ENOMEM`.
    pub fn follow(&self, size: u64) -> Result<(), Errno> {
        let old = self.inner.lock().size;
        if old == size {
            return Ok(());
        }
        let reached = reach(self)?;
        let fd = reached.fd;
        if size > old && !old.is_multiple_of(PAGE) {
            // The guest may have stored behind the end, up to the end of the page.
            let end = old.next_multiple_of(PAGE).min(size);
            memory::write(fd, old, &[0; PAGE as usize][..(end - old) as usize])?;
        }
        sys::size_memory_file(fd, usize::try_from(size).map_err(|_| Errno::EFBIG)?)?;
        let cut = {
            let mut inner = self.inner.lock();
            inner.size = size;
            let cut = inner.shadows.split_off(&size.div_ceil(PIECE));
            (!cut.is_empty() || size < old).then_some(cut)
        };
        let boundary = size - size % PIECE;
        if cut.is_some() && size > boundary {
            self.change_shadow(size..boundary + PIECE, |bytes, _| bytes.fill(0));
        }
        Ok(())
    }

    /// A range has become zeros in the volume: here too. For the holder of the turn.
    ///
    /// # Errors
    /// `EIO`, `ENOMEM`.
    pub fn punch(&self, range: &Range<u64>) -> Result<(), Errno> {
        let reached = reach(self)?;
        memory::punch(reached.fd, range)?;
        let known: Vec<_> = {
            let inner = self.inner.lock();
            inner.shadows.range(pieces_of(range)).map(|(piece, _)| *piece).collect()
        };
        for piece in known {
            let (start, end) = (piece * PIECE, (piece + 1) * PIECE);
            let part = range.start.max(start)..range.end.min(end);
            self.change_shadow(part, |bytes, _| bytes.fill(0));
        }
        Ok(())
    }

    /// Reads at `offset`; short at the end of the file.
    ///
    /// # Errors
    /// As [`Volume::read`]; what came before a failure is returned.
    pub async fn load(
        &self,
        (volume, disk): (&Volume, &LaneFile),
        reached: &Reached,
        offset: u64,
        buffer: &impl Buffer,
    ) -> Result<usize, Errno> {
        let end = volume.size().min(offset.saturating_add(buffer.len() as u64));
        let (mut at, mut room) = (offset, Vec::new());
        let done = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
        while at < end {
            let (here, until) = self.inner.lock().present.run(at, end);
            let answer = if here {
                room.resize((until - at).min(PIECE) as usize, 0);
                memory::read(reached.fd, at, &mut room).and_then(|()| {
                    buffer.copy_out(done(at), &room).map_err(|Fault| Errno::EFAULT)?;
                    Ok(room.len())
                })
            } else {
                let part = Part { whole: buffer, at: done(at), length: (until - at) as usize };
                volume.read(disk, at, &part).await
            };
            match answer {
                Ok(0) => break,
                Ok(length) => at += length as u64,
                Err(errno) => return outcome(done(at), Err(errno)),
            }
        }
        Ok(done(at))
    }

    /// Writes at `offset`, or at the end. For the holder of the turn. Answers where the data begins
    /// and how much of it was written.
    ///
    /// # Errors
    /// As [`Volume::write`]; what came before a failure is returned.
    pub async fn store(
        &self,
        (volume, disk): (&Volume, &LaneFile),
        offset: Option<u64>,
        buffer: &impl Buffer,
    ) -> Result<(u64, usize), Errno> {
        let reached = reach(self)?;
        let start = offset.unwrap_or_else(|| volume.size());
        let mut done = 0;
        while done < buffer.len() {
            // Copied once: the same bytes must reach both sides.
            let mut bytes = vec![0; (buffer.len() - done).min(STEP as usize)];
            let asked = bytes.len();
            if buffer.copy_in(done, &mut bytes).is_err() {
                return outcome(done, Err(Errno::EFAULT)).map(|done| (start, done));
            }
            let (at, bytes) = (start + done as u64, Memory::new(bytes));
            let written = match volume.write(disk, at, &bytes).await {
                Ok(written) => written,
                Err(errno) => return outcome(done, Err(errno)).map(|done| (start, done)),
            };
            self.follow(volume.size())?;
            self.put(&reached, at, &bytes.into_inner()[..written])?;
            done += written;
            if written < asked {
                break;
            }
        }
        Ok((start, done))
    }

    /// Puts bytes that the volume holds now where they are present.
    fn put(&self, reached: &Reached, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let range = at..at + bytes.len() as u64;
        let (parts, stores) = {
            let inner = self.inner.lock();
            (inner.present.parts(range, true).collect::<Vec<_>>(), inner.stores)
        };
        let of = |from: u64, to: u64| &bytes[(from - at) as usize..(to - at) as usize];
        for part in parts {
            memory::write(reached.fd, part.start, of(part.start, part.end))?;
            if stores {
                self.change_shadow(part, |shadow, from| {
                    shadow.copy_from_slice(of(from, from + shadow.len() as u64));
                });
            }
        }
        Ok(())
    }

    /// Writes to the volume what the guest has stored in `range`. For the holder of the turn.
    /// Answers whether there was anything.
    ///
    /// # Errors
    /// The first failure: `ENOSPC`, `EIO`. The rest is written all the same.
    pub async fn write_back(
        &self,
        (volume, disk): (&Volume, &LaneFile),
        range: Range<u64>,
    ) -> Result<bool, Errno> {
        if !self.stores() {
            return Ok(false);
        }
        let reached = match reach(self) {
            Ok(reached) => reached,
            // With the processes that could store.
            Err(Lost::Gone) => return Ok(false),
            Err(Lost::Refused) => return Err(Errno::EIO),
        };
        let end = range.end.min(volume.size());
        let mut room = vec![0; PIECE as usize];
        let (mut looked, mut changed, mut failure) = (0, false, Ok(()));
        let mut at = range.start - range.start % PIECE;
        while let Some(piece) = self.next(&reached, at, end) {
            memory::read(reached.fd, piece * PIECE, &mut room)?;
            let length = (end - piece * PIECE).min(PIECE) as usize;
            let mut shadow = self.take_shadow(piece);
            let written = write_runs((volume, disk), piece, &room[..length], &mut shadow).await;
            self.put_shadow(piece, shadow);
            match written {
                Ok(any) => changed |= any,
                Err(errno) => failure = failure.and(Err(errno)),
            }
            at = (piece + 1) * PIECE;
            looked += 1;
            if looked % PIECES_AT_ONCE == 0 {
                let_others_run().await;
            }
        }
        failure.map(|()| changed)
    }

    /// The next piece from `at` on that is not zeros in the memory file or in the volume.
    fn next(&self, reached: &Reached, at: u64, end: u64) -> Option<u64> {
        if at >= end {
            return None;
        }
        let stored = memory::data_after(reached.fd, at).map(|data| data / PIECE);
        let known = self.inner.lock().shadows.range(at / PIECE..).next().map(|(piece, _)| *piece);
        let next = stored.into_iter().chain(known).min();
        next.filter(|piece| piece * PIECE < end)
    }
}
