//! A small key-value store: a map in memory, and a write-ahead log on AIO with fdatasync.
//!
//! ```text
//! file     two logs of the same length, each of blocks of 4096 bytes
//! block    magic 8 | generation 8 | index 8 | bytes of entries 8 | link 32 | entries
//! entry    length of the key 2 | length of the value + 1 2 (0: the key is removed) | key | value
//! ```
//!
//! A log begins with all that the store held, then has what was written since; `link` is the SHA-256
//! of the block before, in the first block that of nothing. When a log is full, what there is goes to
//! the other one under the next generation. A block says how many blocks of the beginning there are
//! in all (`index` of the first holds their number).
//!
//! Holds: what [`Store::commit`] has answered is there after any crash, and nothing is there that
//! was not put: a log ends at its first block that does not follow from the one before, so that what
//! was never acknowledged does not come back behind something else; a log counts only if its
//! beginning is whole, and the one before it is not touched until then.
//! The volume beneath sees to it that a block is whole, and this volume's.

use std::{collections::BTreeMap, sync::Arc};

use postern_trusted::errno::Errno;
use sha2::{Digest as _, Sha256};

use crate::guest::{Call, Requests, Runtime};

/// Keys and their values.
type Map = BTreeMap<Vec<u8>, Vec<u8>>;

const BLOCK: usize = 4096;
const HEADER: usize = 64;
const MAGIC: u64 = 0x676f_6c2d_7674_6f70;
/// Log blocks on their way at once.
const DEPTH: usize = 32;
/// Bytes of a key, and of a value, at most.
pub const MOST: usize = 1024;

/// SHA-256 of a block.
type Link = [u8; 32];

/// Where the next block of the log goes, and what it follows.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    generation: u64,
    /// Blocks of the log.
    index: u64,
    link: Link,
}

/// The store, open.
pub struct Store {
    file: Requests,
    /// Blocks of each log.
    length: u64,
    map: Map,
    end: End,
    /// Entries since the last commit.
    pending: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl Store {
    /// Opens the store in the first `blocks` blocks of the file; a file without one has an empty one.
    ///
    /// # Errors
    /// What reading answers; `ENOSPC` if there is no room for two logs.
    pub fn open(runtime: Arc<dyn Runtime>, blocks: u64) -> Result<Self, Errno> {
        let length = blocks / 2;
        if length < 2 {
            return Err(Errno::ENOSPC);
        }
        let file = Requests::new(runtime, DEPTH, BLOCK)?;
        let empty = (BTreeMap::new(), End::default());
        let mut store = Self { file, length, map: empty.0, end: empty.1, pending: Vec::new() };
        for log in 0..2 {
            if let Some((map, end)) = store.replay(log)?
                && end.generation > store.end.generation
            {
                (store.map, store.end) = (map, end);
            }
        }
        Ok(store)
    }

    /// What there is.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.map.get(key).map(Vec::as_slice)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Changes a key, or removes it. It is durable after the next [`Self::commit`].
    ///
    /// # Errors
    /// `EINVAL` for a key or value of more than [`MOST`] bytes.
    pub fn put(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), Errno> {
        if key.len() > MOST || value.is_some_and(|value| value.len() > MOST) {
            return Err(Errno::EINVAL);
        }
        apply(&mut self.map, key.to_vec(), value.map(<[u8]>::to_vec));
        self.pending.push((key.to_vec(), value.map(<[u8]>::to_vec)));
        Ok(())
    }

    /// Makes all changes durable.
    ///
    /// # Errors
    /// `EIO`: they may be durable or not. `ENOSPC`: a log does not hold what there is.
    pub fn commit(&mut self) -> Result<(), Errno> {
        let pending = core::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        // A log whose beginning was never written is none yet.
        if self.end.generation > 0 {
            let entries = pending.iter().map(|(key, value)| (&key[..], value.as_deref()));
            let (blocks, end) = blocks(self.end, 0, entries);
            if end.index <= self.length {
                self.write(self.end, &blocks)?;
                self.end = end;
                return Ok(());
            }
        }
        self.begin_log()
    }

    /// Writes all there is to the other log.
    fn begin_log(&mut self) -> Result<(), Errno> {
        let start = End { generation: self.end.generation + 1, ..End::default() };
        let entries = || self.map.iter().map(|(key, value)| (&key[..], Some(&value[..])));
        // How many there are is known once they are made.
        let count = blocks(start, 0, entries()).0.len() as u64;
        let (made, end) = blocks(start, count, entries());
        // Room for something more, or every commit would begin another one.
        if end.index >= self.length {
            return Err(Errno::ENOSPC);
        }
        self.write(start, &made)?;
        self.end = end;
        Ok(())
    }

    fn place(&self, at: End) -> u64 {
        at.generation % 2 * self.length + at.index
    }

    /// Writes blocks of a log from `at` on, and makes them durable.
    fn write(&self, at: End, blocks: &[[u8; BLOCK]]) -> Result<(), Errno> {
        let first = self.place(at);
        let mut failed = false;
        for (round, part) in (0..).zip(blocks.chunks(DEPTH)) {
            let from = first + round * DEPTH as u64;
            let mut calls = Vec::with_capacity(part.len());
            for (slot, block) in part.iter().enumerate() {
                self.file.put(slot, block)?;
                calls.push((slot, Call::Write, from + slot as u64));
            }
            self.file.submit(&calls)?;
            let whole = |_, result| failed |= result != BLOCK as i64;
            self.file.reap(part.len(), whole)?;
        }
        if failed {
            return Err(Errno::EIO);
        }
        self.file.sync()
    }

    /// Reads a log; `None` if it has no whole beginning.
    fn replay(&self, log: u64) -> Result<Option<(Map, End)>, Errno> {
        let (mut map, mut end, mut beginning) = (BTreeMap::new(), End::default(), 0);
        let mut block = [0; BLOCK];
        'log: while end.index < self.length {
            let count = DEPTH.min((self.length - end.index) as usize);
            let first = log * self.length + end.index;
            let calls: Vec<_> =
                (0..count).map(|slot| (slot, Call::Read, first + slot as u64)).collect();
            self.file.submit(&calls)?;
            let mut failed = false;
            self.file.reap(count, |_, result| failed |= result != BLOCK as i64)?;
            if failed {
                return Err(Errno::EIO);
            }
            for slot in 0..count {
                self.file.get(slot, &mut block)?;
                let Some((next, number, entries)) = follow(&block, &end) else { break 'log };
                if end.index == 0 {
                    beginning = number;
                }
                for (key, value) in entries {
                    apply(&mut map, key, value);
                }
                end = next;
            }
        }
        let whole = beginning > 0 && end.index >= beginning && end.generation % 2 == log;
        Ok(whole.then_some((map, end)))
    }
}

fn apply(map: &mut Map, key: Vec<u8>, value: Option<Vec<u8>>) {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    };
}

/// Entries as blocks of a log from `end` on, and where it ends then. There is one block at least;
/// the first says the `number` of a beginning.
fn blocks<'a>(
    mut end: End,
    number: u64,
    entries: impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)>,
) -> (Vec<[u8; BLOCK]>, End) {
    let mut made = Vec::new();
    let mut part = Vec::with_capacity(BLOCK);
    let mut close = |part: &mut Vec<u8>, end: &mut End| {
        let index = if end.index == 0 { number } else { end.index };
        let mut block = [0; BLOCK];
        let words = [MAGIC, end.generation, index, part.len() as u64].map(u64::to_le_bytes);
        block[..32].copy_from_slice(words.as_flattened());
        block[32..HEADER].copy_from_slice(&end.link);
        block[HEADER..HEADER + part.len()].copy_from_slice(part);
        end.link = Sha256::digest(block).into();
        end.index += 1;
        made.push(block);
        part.clear();
    };
    for (key, value) in entries {
        let room = 4 + key.len() + value.map_or(0, <[u8]>::len);
        if part.len() + room > BLOCK - HEADER {
            close(&mut part, &mut end);
        }
        part.extend_from_slice(&(key.len() as u16).to_le_bytes());
        part.extend_from_slice(&value.map_or(0, |value| value.len() as u16 + 1).to_le_bytes());
        part.extend_from_slice(key);
        part.extend_from_slice(value.unwrap_or_default());
    }
    close(&mut part, &mut end);
    (made, end)
}

/// An entry of a block.
type Entry = (Vec<u8>, Option<Vec<u8>>);

/// What a block says if it follows from `end`: where the log ends then, the number of blocks of the
/// beginning (of the first block), and the entries.
fn follow(block: &[u8; BLOCK], end: &End) -> Option<(End, u64, Vec<Entry>)> {
    let word = |n: usize| block[8 * n..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    let (generation, index) = (word(1), word(2));
    let follows = word(0) == MAGIC
        && generation > 0
        && block[32..HEADER] == end.link
        && (end.index == 0 || generation == end.generation && index == end.index);
    if !follows {
        return None;
    }
    let bytes = usize::try_from(word(3)).ok()?;
    let mut rest = block.get(HEADER..)?.get(..bytes)?;
    let mut entries = Vec::new();
    while let Some((lengths, after)) = rest.split_first_chunk::<4>() {
        let key = usize::from(u16::from_le_bytes([lengths[0], lengths[1]]));
        let value = usize::from(u16::from_le_bytes([lengths[2], lengths[3]]));
        let (key, after) = after.split_at_checked(key)?;
        let (text, after) = after.split_at_checked(value.saturating_sub(1))?;
        entries.push((key.to_vec(), (value > 0).then(|| text.to_vec())));
        rest = after;
    }
    let link = Sha256::digest(block).into();
    rest.is_empty().then(|| (End { generation, index: end.index + 1, link }, index, entries))
}
