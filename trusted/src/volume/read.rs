//! Reading the guest's file.
//!
//! Holds: bytes reach the guest only after they were authenticated, in private memory, against
//! the pointer that the map or the delta holds; where that fails the answer is `EIO` (or a short
//! count before it), never another byte. Holes and bytes after a shrink read as zeros.

use alloc::boxed::Box;
use futures_util::{StreamExt, stream::FuturesOrdered};

use super::{
    Volume,
    crypto::{EpochKey, Kind, aad},
    layout::{BLOCK_BYTES, Order, Ptr},
    tree::{self, Bad},
};
use crate::{
    disk::{BLOCK, Block, Disk, Transfer},
    errno::Errno,
    platform::Buffer,
};

/// Blocks that one host request moves at most.
pub(crate) const PIECE: usize = 32;
/// Host requests that one call keeps going.
pub(crate) const PIECES: usize = 16;
/// Times a block is read again when its pointer keeps changing.
const RETRIES: usize = 8;

static ZEROES: Block = [0; BLOCK];

/// The part of a call's bytes that lies in some blocks.
#[derive(Clone, Copy)]
struct Span {
    /// Byte of the file where the part begins.
    offset: u64,
    /// Byte of the buffer where it goes.
    at: usize,
    len: usize,
}

impl Span {
    fn first(&self) -> u64 {
        self.offset / BLOCK_BYTES
    }

    fn blocks(&self) -> usize {
        ((self.offset + self.len as u64).div_ceil(BLOCK_BYTES) - self.first()) as usize
    }

    /// The part that lies in blocks `from..to` of it.
    fn part(&self, from: usize, to: usize) -> Self {
        let base = self.first() * BLOCK_BYTES;
        let start = (base + from as u64 * BLOCK_BYTES).max(self.offset);
        let end = (base + to as u64 * BLOCK_BYTES).min(self.offset + self.len as u64);
        Self {
            offset: start,
            at: self.at + (start - self.offset) as usize,
            len: (end - start) as usize,
        }
    }
}

/// How far a part came: bytes done, and why it went no further.
type Progress = (usize, Option<Errno>);

/// Adds up parts that follow each other.
pub(crate) fn join(total: &mut Progress, next: Progress) {
    if total.1.is_none() {
        *total = (total.0 + next.0, next.1);
    }
}

/// What a system call returns for it.
pub(crate) fn outcome(progress: Progress) -> Result<usize, Errno> {
    match progress {
        (0, Some(errno)) => Err(errno),
        (done, _) => Ok(done),
    }
}

impl Volume {
    /// Reads up to `buffer.len()` bytes at byte `offset`; short at the end of the file.
    ///
    /// # Errors
    /// `EIO` if the first block cannot be read or does not authenticate, `EFAULT` if the buffer
    /// cannot be written at its start. Otherwise what came before the failure is returned.
    pub async fn read<D: Disk>(
        &self,
        disk: &D,
        offset: u64,
        buffer: &impl Buffer,
    ) -> Result<usize, Errno> {
        let size = self.core.lock().size;
        let len = size.saturating_sub(offset).min(buffer.len() as u64) as usize;
        if len == 0 {
            return Ok(0);
        }
        let span = Span { offset, at: 0, len };
        let blocks = span.blocks();
        if blocks <= PIECE {
            return outcome(self.read_window(disk, span, buffer).await);
        }
        let (mut next, mut total) = (0, (0, None));
        let mut going = FuturesOrdered::new();
        loop {
            while next < blocks && going.len() < PIECES && total.1.is_none() {
                let part = span.part(next, blocks.min(next + PIECE));
                going.push_back(self.read_window(disk, part, buffer));
                next += PIECE;
            }
            // Every request that was begun is waited for, also after a failure.
            let Some(done) = going.next().await else { break };
            join(&mut total, done);
        }
        outcome(total)
    }

    /// Reads a span of at most [`PIECE`] blocks.
    async fn read_window<D: Disk>(&self, disk: &D, span: Span, buffer: &impl Buffer) -> Progress {
        let blocks = span.blocks();
        let mut ptrs = [Ptr::NULL; PIECE];
        let (mut found, mut limit, mut failure) = (0, blocks, None);
        while found < limit {
            let miss = {
                let mut core = self.core.lock();
                loop {
                    match tree::look(&mut core, span.first() + found as u64) {
                        Ok(ptr) => ptrs[found] = ptr,
                        Err(_) => break true,
                    }
                    found += 1;
                    if found == limit {
                        break false;
                    }
                }
            };
            if miss {
                match self.resolve(disk, span.first() + found as u64).await {
                    Ok(ptr) => ptrs[found] = ptr,
                    Err(bad) => (limit, failure) = (found, Some(bad.errno())),
                }
                found += 1;
            }
        }
        let mut total = (0, None);
        let run = run_length(&ptrs[..limit]);
        if run == limit {
            if limit > 0 {
                total = self.read_run(disk, &ptrs[..limit], span.part(0, limit), buffer).await;
            }
        } else {
            let (mut from, mut going) = (0, FuturesOrdered::new());
            while from < limit {
                let to = from + run_length(&ptrs[from..limit]);
                going.push_back(self.read_run(disk, &ptrs[from..to], span.part(from, to), buffer));
                from = to;
            }
            while let Some(done) = going.next().await {
                join(&mut total, done);
            }
        }
        join(&mut total, (0, failure));
        total
    }

    /// Reads blocks that lie side by side on the host, or are all holes.
    async fn read_run<D: Disk>(
        &self,
        disk: &D,
        ptrs: &[Ptr],
        span: Span,
        buffer: &impl Buffer,
    ) -> Progress {
        if ptrs[0].is_null() {
            return zero(span, buffer);
        }
        let mut failed = match self.fetch(disk, ptrs).await {
            Ok(transfer) => {
                let mut key = None;
                let mut failed = None;
                for (i, ptr) in ptrs.iter().enumerate() {
                    if key
                        .as_ref()
                        .is_none_or(|k: &alloc::sync::Arc<EpochKey>| k.id != ptr.order.epoch())
                    {
                        key = self.keys.lock().get(&ptr.order.epoch()).cloned();
                    }
                    let part = span.part(i, i + 1);
                    let opened = match &key {
                        Some(key) => open(&transfer, i, key, ptr, part, buffer),
                        None => Err(Failure::Forged),
                    };
                    match opened {
                        Ok(()) => {}
                        Err(Failure::Fault) => return (part.at - span.at, Some(Errno::EFAULT)),
                        Err(Failure::Forged) => {
                            failed = Some((i, Bad::Forged));
                            break;
                        }
                    }
                }
                failed
            }
            Err(bad) => Some((0, bad)),
        };
        // From the first failure on, block by block.
        let Some((from, _)) = failed else { return (span.len, None) };
        for (i, ptr) in ptrs.iter().enumerate().skip(from) {
            let part = span.part(i, i + 1);
            let before = failed.take().map(|(_, bad)| (*ptr, bad));
            let read = self.read_again(disk, span.first() + i as u64, before).await;
            let done = match read {
                Ok(None) => zero(part, buffer),
                Ok(Some(block)) => {
                    let start = (part.offset % BLOCK_BYTES) as usize;
                    match buffer.copy_out(part.at, &block[start..start + part.len]) {
                        Ok(()) => (part.len, None),
                        Err(_) => (0, Some(Errno::EFAULT)),
                    }
                }
                Err(bad) => (0, Some(bad.errno())),
            };
            if done.1.is_some() {
                return (part.at - span.at + done.0, done.1);
            }
        }
        (span.len, None)
    }

    /// Brings the blocks into a transfer buffer, and their keys into memory.
    async fn fetch<D: Disk>(&self, disk: &D, ptrs: &[Ptr]) -> Result<D::Transfer, Bad> {
        let mut epoch = None;
        for ptr in ptrs {
            if epoch != Some(ptr.order.epoch()) {
                self.key_for(disk, ptr.order).await?;
                epoch = Some(ptr.order.epoch());
            }
        }
        let place = ptrs[0].place();
        if place + ptrs.len() as u64 > self.geometry.host_blocks {
            return Err(Bad::Forged);
        }
        let mut transfer = disk.transfer(ptrs.len()).await?;
        transfer.read(place).await?;
        Ok(transfer)
    }

    /// The plaintext of `block` as it is now, or `None` for a hole. `before` is what failed the
    /// last time: the same pointer is not tried again after a forgery.
    pub(crate) async fn read_again<D: Disk>(
        &self,
        disk: &D,
        block: u64,
        mut before: Option<(Ptr, Bad)>,
    ) -> Result<Option<Box<Block>>, Bad> {
        for _ in 0..RETRIES {
            let ptr = self.resolve(disk, block).await?;
            if ptr.is_null() {
                return Ok(None);
            }
            if let Some((tried, bad)) = before
                && tried == ptr
            {
                if bad == Bad::Forged {
                    self.core.lock().counters.integrity_failures += 1;
                }
                return Err(bad);
            }
            match self.read_sealed(disk, ptr.place(), &ptr, Kind::Data, 0, block).await {
                Ok(plain) => return Ok(Some(plain)),
                Err(bad) => before = Some((ptr, bad)),
            }
        }
        Err(before.map_or(Bad::Forged, |(_, bad)| bad))
    }
}

/// Pointers from the front that one host request can read, or that are all holes.
fn run_length(ptrs: &[Ptr]) -> usize {
    let Some(first) = ptrs.first() else { return 0 };
    ptrs.iter()
        .zip(0_u64..)
        .take_while(|(ptr, n)| {
            if first.is_null() {
                ptr.is_null()
            } else {
                !ptr.is_null() && ptr.place() == first.place() + n
            }
        })
        .count()
}

fn zero(span: Span, buffer: &impl Buffer) -> Progress {
    let mut done = 0;
    while done < span.len {
        let len = (span.len - done).min(BLOCK);
        if buffer.copy_out(span.at + done, &ZEROES[..len]).is_err() {
            return (done, Some(Errno::EFAULT));
        }
        done += len;
    }
    (done, None)
}

enum Failure {
    Forged,
    Fault,
}

/// Copies one block out of the transfer, opens it in private memory, and gives the part of it that
/// was asked for to the guest.
fn open<T: Transfer>(
    transfer: &T,
    index: usize,
    key: &EpochKey,
    ptr: &Ptr,
    part: Span,
    buffer: &impl Buffer,
) -> Result<(), Failure> {
    let mut block = [0; BLOCK];
    transfer.get(index, &mut block);
    open_data(key, ptr.order, ptr, part.first(), &mut block).map_err(|_| Failure::Forged)?;
    let start = (part.offset % BLOCK_BYTES) as usize;
    buffer.copy_out(part.at, &block[start..start + part.len]).map_err(|_| Failure::Fault)
}

/// Opens a block of the guest's file in place.
pub(crate) fn open_data(
    key: &EpochKey,
    order: Order,
    ptr: &Ptr,
    index: u64,
    block: &mut Block,
) -> Result<(), super::crypto::Forged> {
    key.open(Kind::Data, order, &aad(Kind::Data, 0, index), &ptr.tag, &mut block[..])
}
