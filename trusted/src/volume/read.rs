//! Reading the guest's file.
//!
//! Holds: bytes reach the guest only after they were authenticated, in private memory, against
//! the pointer that the map or the delta holds; where that fails the answer is `EIO` (or a short
//! count before it), never another byte. Holes and bytes after a shrink read as zeros.

use alloc::{boxed::Box, sync::Arc, vec, vec::Vec};
use futures_util::{
    StreamExt,
    stream::{FuturesOrdered, FuturesUnordered},
};

use super::{
    Volume,
    crypto::{EpochKey, Kind, aad},
    layout::{BLOCK_BYTES, FANOUT, Order, Ptr},
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
/// Places between two wanted blocks that are rather read along than left out: as long as moving
/// them takes no longer than one more request.
const GAP: u64 = 8;
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
            let mut ptrs = [Ptr::NULL; PIECE];
            return outcome(self.read_window(disk, &mut ptrs[..blocks], span, buffer).await);
        }
        let (mut next, mut total) = (0, (0, None));
        let mut going = FuturesOrdered::new();
        loop {
            while next < blocks && going.len() < PIECES && total.1.is_none() {
                // A leaf's blocks lie near each other on the host.
                let in_leaf = (span.first() + next as u64) % FANOUT;
                let end = blocks.min(next + (FANOUT - in_leaf) as usize);
                let part = span.part(next, end);
                let mut ptrs = vec![Ptr::NULL; end - next];
                going.push_back(
                    async move { self.read_window(disk, &mut ptrs, part, buffer).await },
                );
                next = end;
            }
            // Every request that was begun is waited for, also after a failure.
            let Some(done) = going.next().await else { break };
            join(&mut total, done);
        }
        outcome(total)
    }

    /// Reads the blocks of a span into whose room for pointers they fit.
    async fn read_window<D: Disk>(
        &self,
        disk: &D,
        ptrs: &mut [Ptr],
        span: Span,
        buffer: &impl Buffer,
    ) -> Progress {
        let (mut found, mut limit, mut failure) = (0, ptrs.len(), None);
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
        let ptrs = &ptrs[..limit];
        if limit > 0 {
            let span = span.part(0, limit);
            total = match run_length(ptrs) {
                run if run < limit => self.read_scattered(disk, ptrs, span, buffer).await,
                _ if ptrs[0].is_null() => zero(span, buffer),
                run if run > PIECE => self.read_scattered(disk, ptrs, span, buffer).await,
                _ => match self.read_run(disk, ptrs, span, buffer).await {
                    None => (span.len, None),
                    Some(failed) => self.mend(disk, ptrs, span, buffer, &[failed]).await,
                },
            };
        }
        join(&mut total, (0, failure));
        total
    }

    /// Reads blocks that lie side by side on the host, at most [`PIECE`]. Answers the first that
    /// failed.
    async fn read_run<D: Disk>(
        &self,
        disk: &D,
        ptrs: &[Ptr],
        span: Span,
        buffer: &impl Buffer,
    ) -> Option<Failed> {
        let transfer = match self.fetch(disk, ptrs.iter(), ptrs[0].place(), ptrs.len()).await {
            Ok(transfer) => transfer,
            Err(bad) => {
                let why = if ptrs.len() > 1 { Why::Together } else { Why::Bad(bad) };
                return Some(Failed { from: 0, to: ptrs.len(), why });
            }
        };
        let mut keys = Keys { volume: self, last: None };
        for (i, ptr) in ptrs.iter().enumerate() {
            if let Err(why) = keys.open(&transfer, i, ptr, span.part(i, i + 1), buffer) {
                return Some(Failed { from: i, to: ptrs.len(), why });
            }
        }
        None
    }

    /// Reads blocks that lie here and there, some of them holes: in the order of their places,
    /// neighbours and near neighbours with one request.
    async fn read_scattered<D: Disk>(
        &self,
        disk: &D,
        ptrs: &[Ptr],
        span: Span,
        buffer: &impl Buffer,
    ) -> Progress {
        let mut failed = Vec::new();
        let mut order: Vec<usize> = Vec::with_capacity(ptrs.len());
        for (i, ptr) in ptrs.iter().enumerate() {
            if !ptr.is_null() {
                order.push(i);
            } else if zero(span.part(i, i + 1), buffer).1.is_some() {
                failed.push(Failed { from: i, to: i + 1, why: Why::Fault });
            }
        }
        order.sort_unstable_by_key(|&i| ptrs[i].place());
        let mut going = FuturesUnordered::new();
        let mut rest = &order[..];
        while !rest.is_empty() {
            let (group, after) = rest.split_at(group_length(ptrs, rest));
            going.push(self.read_group(disk, ptrs, group, span, buffer));
            rest = after;
        }
        while let Some(more) = going.next().await {
            failed.extend(more);
        }
        failed.sort_unstable_by_key(|failed| failed.from);
        self.mend(disk, ptrs, span, buffer, &failed).await
    }

    /// Reads the blocks `group` (indices in the order of their places) with one host request.
    async fn read_group<D: Disk>(
        &self,
        disk: &D,
        ptrs: &[Ptr],
        group: &[usize],
        span: Span,
        buffer: &impl Buffer,
    ) -> Vec<Failed> {
        let (first, last) = (ptrs[group[0]].place(), ptrs[group[group.len() - 1]].place());
        let wanted = group.iter().map(|&i| &ptrs[i]);
        let fetched = self.fetch(disk, wanted, first, (last - first) as usize + 1).await;
        let mut keys = Keys { volume: self, last: None };
        group
            .iter()
            .filter_map(|&i| {
                let read = match &fetched {
                    Ok(transfer) => {
                        let at = (ptrs[i].place() - first) as usize;
                        keys.open(transfer, at, &ptrs[i], span.part(i, i + 1), buffer)
                    }
                    Err(bad) if first == last => Err(Why::Bad(*bad)),
                    Err(_) => Err(Why::Together),
                };
                read.err().map(|why| Failed { from: i, to: i + 1, why })
            })
            .collect()
    }

    /// Reads what `failed` (in order) says once more, block by block: the map may have moved on.
    /// Answers how far the whole span came.
    async fn mend<D: Disk>(
        &self,
        disk: &D,
        ptrs: &[Ptr],
        span: Span,
        buffer: &impl Buffer,
        failed: &[Failed],
    ) -> Progress {
        for Failed { from, to, why } in failed {
            // Of several blocks only the first has been looked at.
            let mut before = match *why {
                Why::Fault => return (span.part(*from, *to).at - span.at, Some(Errno::EFAULT)),
                Why::Bad(bad) => Some((ptrs[*from], bad)),
                Why::Together => None,
            };
            for i in *from..*to {
                let part = span.part(i, i + 1);
                let read = self.read_again(disk, span.first() + i as u64, before.take()).await;
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
        }
        (span.len, None)
    }

    /// Brings `blocks` places from `first` on into a transfer buffer, and the keys of what `wanted`
    /// points to into memory.
    async fn fetch<'a, D: Disk>(
        &self,
        disk: &D,
        wanted: impl Iterator<Item = &'a Ptr>,
        first: u64,
        blocks: usize,
    ) -> Result<D::Transfer, Bad> {
        let mut epoch = None;
        for ptr in wanted {
            if epoch != Some(ptr.order.epoch()) {
                self.key_for(disk, ptr.order).await?;
                epoch = Some(ptr.order.epoch());
            }
        }
        if first + blocks as u64 > self.geometry.host_blocks {
            return Err(Bad::Forged);
        }
        let mut transfer = disk.transfer(blocks).await?;
        transfer.read(first).await?;
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

/// Indices from the front of `order` that one host request can read.
fn group_length(ptrs: &[Ptr], order: &[usize]) -> usize {
    let place = |n: usize| ptrs[order[n]].place();
    (1..order.len())
        .take_while(|&n| place(n) - place(n - 1) <= GAP + 1 && place(n) - place(0) < PIECE as u64)
        .count()
        + 1
}

/// Blocks of a window that could not be read at first.
struct Failed {
    from: usize,
    to: usize,
    why: Why,
}

#[derive(Clone, Copy)]
enum Why {
    /// The guest's buffer.
    Fault,
    /// The host, or what it gave.
    Bad(Bad),
    /// A request for several places failed: any of them may be to blame.
    Together,
}

/// The epoch keys of a run of blocks: mostly one.
struct Keys<'a> {
    volume: &'a Volume,
    last: Option<Arc<EpochKey>>,
}

impl Keys<'_> {
    /// Copies one block out of the transfer, opens it in private memory, and gives the part of it
    /// that was asked for to the guest.
    fn open<T: Transfer>(
        &mut self,
        transfer: &T,
        at: usize,
        ptr: &Ptr,
        part: Span,
        buffer: &impl Buffer,
    ) -> Result<(), Why> {
        if self.last.as_ref().is_none_or(|key| key.id != ptr.order.epoch()) {
            self.last = self.volume.keys.lock().get(&ptr.order.epoch()).cloned();
        }
        let key = self.last.as_ref().ok_or(Why::Bad(Bad::Forged))?;
        let mut block = [0; BLOCK];
        transfer.get(at, &mut block);
        #[cfg(test)]
        let sealed = block;
        open_data(key, ptr.order, ptr, part.first(), &mut block)
            .map_err(|_| Why::Bad(Bad::Forged))?;
        #[cfg(test)]
        super::tests::open_again(transfer, at, &sealed, &mut block);
        let start = (part.offset % BLOCK_BYTES) as usize;
        buffer.copy_out(part.at, &block[start..start + part.len]).map_err(|_| Why::Fault)
    }
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
