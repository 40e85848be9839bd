//! The table as bytes in the index volume.
//!
//! Two slots take turns; an image says its sequence number and carries a SHA-256 of itself. The
//! volume authenticates every block already: the digest tells a slot that was written whole from
//! one that a crash cut short, in which blocks of two images stand side by side.
//!
//! Holds: after a crash at any point one slot is whole, if each image is written to the slot that
//! the newest whole one is not in, and synced before the next. docs/FORMAT.md has the bytes.

use alloc::{boxed::Box, collections::BTreeMap, collections::BTreeSet, vec::Vec};
use core::fmt;

use super::{
    FileId,
    table::{Attributes, Kind, NAME_MAX, Node, ROOT, Table, check_name},
};
use crate::{counter::Record, volume::sha256};

/// Bytes of a slot.
pub const SLOT_BYTES: u64 = 16 << 20;
/// Bytes of the index volume.
pub const INDEX_BYTES: u64 = 2 * SLOT_BYTES;
/// An image is a multiple of this, in bytes.
pub const IMAGE_BLOCK: usize = 4096;

const MAGIC: [u8; 8] = *b"PSTNDIR1";
/// Magic, sequence, next inode, records, bytes of records; then the digest.
const DIGEST_AT: usize = 40;
const HEADER: usize = DIGEST_AT + 32;
/// Bytes of a record without its name.
const RECORD: usize = 8 + 8 + 16 + 4 + 4 + 8 + 8 + 8 + 2 + 1 + 1;
/// Bytes of records in an image at most.
pub(super) const MAX_BODY: usize = SLOT_BYTES as usize - HEADER;

const DIRECTORY: u8 = 1;
const FILE: u8 = 2;
/// A file whose record follows its name.
const RECORDED: u8 = 3;

/// Why bytes are no image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadImage {
    /// Nothing was ever written here.
    Empty,
    /// Cut short by a crash, or not an image at all.
    Torn,
    /// A whole image with a table in it that cannot be: made by something else than this format.
    Inconsistent {
        /// The record, from 0.
        record: u64,
    },
}

impl fmt::Display for BadImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("no name table was ever written"),
            Self::Torn => f.write_str("the name table is not whole"),
            Self::Inconsistent { record } => {
                write!(f, "record {record} of the name table contradicts the others")
            }
        }
    }
}

impl core::error::Error for BadImage {}

/// Where the image with number `sequence` begins in the index volume, in bytes.
#[must_use]
pub const fn slot_offset(sequence: u64) -> u64 {
    sequence % 2 * SLOT_BYTES
}

/// The newest table of two slots; `None` if there never was one.
///
/// # Errors
/// The refusal of a slot if neither is whole and not both are a beginning.
pub fn choose(
    slots: [Result<(Table, u64), BadImage>; 2],
) -> Result<Option<(Table, u64)>, BadImage> {
    match slots {
        [Ok(one), Ok(other)] => Ok(Some(if one.1 > other.1 { one } else { other })),
        // Never fall back behind an image that was whole when it was written.
        [Err(bad @ BadImage::Inconsistent { .. }), _]
        | [_, Err(bad @ BadImage::Inconsistent { .. })] => Err(bad),
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(Some(one)),
        [Err(BadImage::Torn), Err(BadImage::Torn)] => Err(BadImage::Torn),
        // The very first image did not get finished.
        _ => Ok(None),
    }
}

/// Bytes that a node takes at most: a file may get a record at any time.
pub(super) fn record_bytes(node: &Node) -> usize {
    RECORD + node.name.len() + if node.is_directory() { 0 } else { Record::BYTES }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Inode and node of the next record.
    fn record(&mut self) -> Option<(u64, Node)> {
        let (inode, parent) = (self.u64()?, self.u64()?);
        let id: FileId = self.array()?;
        let (uid, gid) = (self.u32()?, self.u32()?);
        let (accessed, modified, changed) = (self.i64()?, self.i64()?, self.i64()?);
        let mode = u16::from_le_bytes(self.array()?);
        let [kind, length] = self.array()?;
        let name: Box<[u8]> = self.take(length.into())?.into();
        let (kind, record) = match kind {
            DIRECTORY if id == [0; 16] => (Kind::Directory(BTreeMap::new()), None),
            FILE => (Kind::File(id), None),
            RECORDED => (Kind::File(id), Some(Record::decode(&self.array()?))),
            _ => return None,
        };
        if mode & !0o7777 != 0 {
            return None;
        }
        let attributes = Attributes { mode, uid, gid, accessed, modified, changed };
        Some((inode, Node { attributes, kind, parent, name, record }))
    }
}

impl Table {
    /// The image of the table, with the sequence number `sequence`; a multiple of
    /// [`IMAGE_BLOCK`] bytes. Orphans are left out.
    #[must_use]
    pub fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((HEADER + self.bytes).next_multiple_of(IMAGE_BLOCK));
        bytes.resize(HEADER, 0);
        let mut records = 0_u64;
        // Parents before what is in them.
        let mut open = Vec::from([ROOT]);
        while let Some(inode) = open.pop() {
            let Some(node) = self.nodes.get(&inode) else { continue };
            records += 1;
            bytes.extend_from_slice(&inode.to_le_bytes());
            bytes.extend_from_slice(&node.parent.to_le_bytes());
            bytes.extend_from_slice(node.file().unwrap_or(&[0; 16]));
            let Attributes { mode, uid, gid, accessed, modified, changed } = node.attributes;
            bytes.extend_from_slice(&uid.to_le_bytes());
            bytes.extend_from_slice(&gid.to_le_bytes());
            for time in [accessed, modified, changed] {
                bytes.extend_from_slice(&time.to_le_bytes());
            }
            bytes.extend_from_slice(&mode.to_le_bytes());
            bytes.push(match (&node.kind, &node.record) {
                (Kind::Directory(_), _) => DIRECTORY,
                (Kind::File(_), None) => FILE,
                (Kind::File(_), Some(_)) => RECORDED,
            });
            // Names have 255 bytes at most.
            bytes.push(u8::try_from(node.name.len()).unwrap_or(u8::MAX));
            bytes.extend_from_slice(&node.name);
            bytes.extend(node.record.iter().flat_map(Record::encode));
            open.extend(node.entries().into_iter().flat_map(|entries| entries.values()));
        }
        let body = (bytes.len() - HEADER) as u64;
        bytes[..8].copy_from_slice(&MAGIC);
        for (at, word) in [(8, sequence), (16, self.next), (24, records), (32, body)] {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let digest = sha256(&bytes);
        bytes[DIGEST_AT..HEADER].copy_from_slice(&digest);
        bytes.resize(bytes.len().next_multiple_of(IMAGE_BLOCK), 0);
        bytes
    }

    /// Bytes of the image that begins with `first`, its first [`IMAGE_BLOCK`] bytes.
    ///
    /// # Errors
    /// [`BadImage`] if none does.
    pub fn image_bytes(first: &[u8]) -> Result<usize, BadImage> {
        let header = first.get(..HEADER).ok_or(BadImage::Torn)?;
        if header.iter().all(|byte| *byte == 0) {
            return Err(BadImage::Empty);
        }
        let body = Reader(&header[32..]).u64().and_then(|body| usize::try_from(body).ok());
        match body.filter(|body| header[..8] == MAGIC && *body <= MAX_BODY) {
            Some(body) => Ok((HEADER + body).next_multiple_of(IMAGE_BLOCK)),
            None => Err(BadImage::Torn),
        }
    }

    /// The table in an image, and its sequence number.
    ///
    /// # Errors
    /// [`BadImage`].
    pub fn decode(image: &[u8]) -> Result<(Self, u64), BadImage> {
        let length = Self::image_bytes(image)?;
        let image = image.get(..length).ok_or(BadImage::Torn)?;
        let mut reader = Reader(&image[8..]);
        let words = [(); 4].map(|()| reader.u64().unwrap_or(0));
        let [sequence, next, records, body] = words;
        let end = usize::try_from(body).map_or(HEADER, |body| HEADER + body);
        let mut whole = Vec::from(&image[..end]);
        whole[DIGEST_AT..].iter_mut().take(32).for_each(|byte| *byte = 0);
        if sha256(&whole) != image[DIGEST_AT..HEADER] || image[end..].iter().any(|byte| *byte != 0)
        {
            return Err(BadImage::Torn);
        }
        let mut table = Self { nodes: BTreeMap::new(), next, bytes: 0 };
        let mut ids = BTreeSet::new();
        let mut reader = Reader(&image[HEADER..end]);
        for record in 0..records {
            let node = reader.record();
            node.and_then(|(inode, node)| table.restore(inode, node, &mut ids))
                .ok_or(BadImage::Inconsistent { record })?;
        }
        if !reader.0.is_empty() || table.nodes.is_empty() {
            return Err(BadImage::Inconsistent { record: records });
        }
        Ok((table, sequence))
    }

    /// Enters a record; its parent came before it.
    fn restore(&mut self, inode: u64, node: Node, ids: &mut BTreeSet<FileId>) -> Option<()> {
        if inode == 0 || inode >= self.next || self.nodes.contains_key(&inode) {
            return None;
        }
        if inode == ROOT {
            let first = self.nodes.is_empty() && node.parent == ROOT && node.name.is_empty();
            (first && node.is_directory()).then_some(())?;
        } else {
            check_name(&node.name).ok().filter(|()| node.name.len() <= NAME_MAX)?;
            let entries = self.entries_mut(node.parent).ok()?;
            if entries.insert(node.name.clone(), inode).is_some() {
                return None;
            }
        }
        if node.file().is_some_and(|id| !ids.insert(*id)) {
            return None;
        }
        self.bytes += record_bytes(&node);
        self.nodes.insert(inode, node);
        Some(())
    }
}
