//! The image: pages, their permissions and what of them is measured; SGXS; MRENCLAVE.
//!
//! Holds: pages ascend, lie inside the enclave, and have a kind and permissions that EADD accepts;
//! a chunk occurs at most once; what is not in the file is zeros.

use core::fmt;

use rsa::sha2::{Digest as _, Sha256};

use crate::bytes::{array, u32_at, u64_at};

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Bytes in a chunk: what one EEXTEND measures.
pub const CHUNK: usize = 256;
/// The largest enclave that is handled, bytes of its address range.
pub const MAX_IMAGE_BYTES: u64 = 1 << 36;
/// The most pages an image may add: 16 GiB.
const MAX_PAGES: usize = 1 << 22;

/// SECINFO flag: the enclave may read the page.
pub const READ: u64 = 1;
/// SECINFO flag: the enclave may write the page.
pub const WRITE: u64 = 2;
/// SECINFO flag: the enclave may execute the page.
pub const EXECUTE: u64 = 4;
/// The three permissions.
pub const PERMISSIONS: u64 = READ | WRITE | EXECUTE;
/// SECINFO kind of page: a thread control structure, with no permissions.
pub const TCS: u64 = 1 << 8;
/// SECINFO kind of page: code and data.
pub const REGULAR: u64 = 2 << 8;

const TAG_CREATE: &[u8; 8] = b"ECREATE\0";
const TAG_ADD: &[u8; 8] = b"EADD\0\0\0\0";
const TAG_EXTEND: &[u8; 8] = b"EEXTEND\0";
/// Loaded and not measured.
const TAG_UNMEASURED: &[u8; 8] = b"UNMEASRD";
/// An image whose size is filled in later.
const TAG_UNSIZED: &[u8; 8] = b"UNSIZED\0";
const RECORD: usize = 64;
const CHUNKS: usize = PAGE / CHUNK;

/// What is wrong with an image. `record` counts the records of the file from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageError {
    /// The file is cut off inside this record.
    Truncated {
        /// Number of the record.
        record: u64,
    },
    /// The record has no known kind, comes twice or out of order.
    Record {
        /// Number of the record.
        record: u64,
    },
    /// The image has no size yet: it was made to be appended to.
    Unsized,
    /// The size is no power of two of at least two pages and at most [`MAX_IMAGE_BYTES`], or a
    /// frame of the state save area has no pages.
    Size {
        /// The size it names, bytes.
        bytes: u64,
    },
    /// A page does not follow the one before, or lies outside the enclave.
    Place {
        /// Offset in the enclave, bytes.
        offset: u64,
    },
    /// EADD would refuse the page's kind and permissions.
    Flags {
        /// Offset in the enclave, bytes.
        offset: u64,
        /// The SECINFO flags.
        flags: u64,
    },
    /// It has more pages than are handled.
    TooManyPages,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { record } => write!(f, "the image ends inside record {record}"),
            Self::Record { record } => {
                write!(f, "record {record} of the image is unknown or out of order")
            }
            Self::Unsized => f.write_str("the image has no size yet"),
            Self::Size { bytes } => write!(f, "{bytes} bytes are no size of an enclave"),
            Self::Place { offset } => {
                write!(f, "page {offset:#x} is out of order or outside the enclave")
            }
            Self::Flags { offset, flags } => {
                write!(f, "page {offset:#x} has flags {flags:#x}, which no CPU accepts")
            }
            Self::TooManyPages => f.write_str("the image has too many pages"),
        }
    }
}

impl core::error::Error for ImageError {}

/// One page of an enclave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    offset: u64,
    flags: u64,
    /// `None`: zeros.
    data: Option<Box<[u8; PAGE]>>,
    /// Bit for each chunk that the file has.
    present: u16,
    /// Bit for each chunk that is measured; a subset of `present`.
    measured: u16,
}

impl Page {
    /// Offset in the enclave, bytes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// SECINFO flags: kind and permissions.
    #[must_use]
    pub const fn flags(&self) -> u64 {
        self.flags
    }

    /// What it holds; `None` for zeros.
    #[must_use]
    pub fn data(&self) -> Option<&[u8; PAGE]> {
        self.data.as_deref()
    }

    /// Whether it is a thread control structure.
    #[must_use]
    pub const fn is_tcs(&self) -> bool {
        self.flags & 0xff00 == TCS
    }

    /// Bit for each of the 16 chunks that is part of the measurement.
    #[must_use]
    pub const fn measured(&self) -> u16 {
        self.measured
    }

    fn chunk(&self, index: usize) -> [u8; CHUNK] {
        let data = self.data.as_ref();
        data.and_then(|data| array(&data[..], index * CHUNK)).unwrap_or([0; CHUNK])
    }
}

/// An enclave as it is before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    size: u64,
    ssa_frame_pages: u32,
    pages: Vec<Page>,
}

impl Image {
    /// An enclave of `size` bytes without a page.
    ///
    /// # Errors
    /// [`ImageError::Size`].
    pub fn new(size: u64, ssa_frame_pages: u32) -> Result<Self, ImageError> {
        let fits = size.is_power_of_two() && (2 * PAGE as u64..=MAX_IMAGE_BYTES).contains(&size);
        if !fits || ssa_frame_pages == 0 || u64::from(ssa_frame_pages) > size / PAGE as u64 {
            return Err(ImageError::Size { bytes: size });
        }
        Ok(Self { size, ssa_frame_pages, pages: Vec::new() })
    }

    /// Adds a page: `data` is measured in full; `None` is zeros of which only the place and the
    /// flags are measured.
    ///
    /// # Errors
    /// [`ImageError::Place`], [`ImageError::Flags`], [`ImageError::TooManyPages`].
    pub fn add(
        &mut self,
        offset: u64,
        flags: u64,
        data: Option<&[u8; PAGE]>,
    ) -> Result<(), ImageError> {
        self.add_bare(offset, flags)?;
        if let (Some(data), Some(page)) = (data, self.pages.last_mut()) {
            page.data = data.iter().any(|byte| *byte != 0).then(|| Box::new(*data));
            (page.present, page.measured) = (u16::MAX, u16::MAX);
        }
        Ok(())
    }

    fn add_bare(&mut self, offset: u64, flags: u64) -> Result<(), ImageError> {
        let follows = self.pages.last().is_none_or(|last| last.offset < offset);
        if !follows || !offset.is_multiple_of(PAGE as u64) || offset >= self.size {
            return Err(ImageError::Place { offset });
        }
        let permissions = flags & PERMISSIONS;
        let valid = match flags & !PERMISSIONS {
            TCS => permissions == 0,
            REGULAR => permissions & WRITE == 0 || permissions & READ != 0,
            _ => false,
        };
        if !valid {
            return Err(ImageError::Flags { offset, flags });
        }
        if self.pages.len() == MAX_PAGES {
            return Err(ImageError::TooManyPages);
        }
        self.pages.push(Page { offset, flags, data: None, present: 0, measured: 0 });
        Ok(())
    }

    /// Size of the address range, bytes; a power of two.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Pages in one frame of the state save area.
    #[must_use]
    pub const fn ssa_frame_pages(&self) -> u32 {
        self.ssa_frame_pages
    }

    /// The pages by offset.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// Reads an SGXS file.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(file: &[u8]) -> Result<Self, ImageError> {
        let (mut at, mut record) = (0_usize, 0_u64);
        let mut image: Option<Self> = None;
        while at < file.len() {
            let head: [u8; RECORD] = array(file, at).ok_or(ImageError::Truncated { record })?;
            at += RECORD;
            let wrong = ImageError::Record { record };
            let tag: &[u8; 8] = head.first_chunk().ok_or(wrong)?;
            let number = u64_at(&head, 8).ok_or(wrong)?;
            let reserved_from = match (tag, &mut image) {
                (TAG_UNSIZED, None) => return Err(ImageError::Unsized),
                (TAG_CREATE, None) => {
                    let frame = u32_at(&head, 8).ok_or(wrong)?;
                    image = Some(Self::new(u64_at(&head, 12).ok_or(wrong)?, frame)?);
                    20
                }
                (TAG_ADD, Some(image)) => {
                    image.add_bare(number, u64_at(&head, 16).ok_or(wrong)?)?;
                    24
                }
                (TAG_EXTEND | TAG_UNMEASURED, Some(image)) => {
                    let data: [u8; CHUNK] =
                        array(file, at).ok_or(ImageError::Truncated { record })?;
                    at += CHUNK;
                    let page = image.pages.last_mut().ok_or(wrong)?;
                    page.take(number, &data, tag == TAG_EXTEND).ok_or(wrong)?;
                    16
                }
                _ => return Err(wrong),
            };
            if head.iter().skip(reserved_from).any(|byte| *byte != 0) {
                return Err(wrong);
            }
            record += 1;
        }
        image.ok_or(ImageError::Truncated { record })
    }

    /// The SGXS file of it.
    #[must_use]
    pub fn to_sgxs(&self) -> Vec<u8> {
        let mut file = Vec::new();
        self.records(|bytes, _| file.extend_from_slice(bytes));
        file
    }

    /// MRENCLAVE: SHA-256 of the measured records.
    #[must_use]
    pub fn mrenclave(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        self.records(|bytes, measured| {
            if measured {
                hash.update(bytes);
            }
        });
        hash.finalize().into()
    }

    /// Hands out the bytes of the file in order, and of each whether it is measured.
    fn records(&self, mut out: impl FnMut(&[u8], bool)) {
        let mut head = [0_u8; RECORD];
        head[..8].copy_from_slice(TAG_CREATE);
        head[8..12].copy_from_slice(&self.ssa_frame_pages.to_le_bytes());
        head[12..20].copy_from_slice(&self.size.to_le_bytes());
        out(&head, true);
        for page in &self.pages {
            let mut head = [0_u8; RECORD];
            head[..8].copy_from_slice(TAG_ADD);
            head[8..16].copy_from_slice(&page.offset.to_le_bytes());
            head[16..24].copy_from_slice(&page.flags.to_le_bytes());
            out(&head, true);
            for index in (0..CHUNKS).filter(|index| page.present >> index & 1 == 1) {
                let measured = page.measured >> index & 1 == 1;
                let mut head = [0_u8; RECORD];
                head[..8].copy_from_slice(if measured { TAG_EXTEND } else { TAG_UNMEASURED });
                let offset = page.offset + (index * CHUNK) as u64;
                head[8..16].copy_from_slice(&offset.to_le_bytes());
                out(&head, measured);
                out(&page.chunk(index), measured);
            }
        }
    }

    /// `length` bytes from `offset` as they lie in the enclave; holes read as zeros.
    #[must_use]
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let end = offset.saturating_add(length as u64);
        let first = self.pages.partition_point(|page| page.offset + PAGE as u64 <= offset);
        for page in self.pages.iter().skip(first).take_while(|page| page.offset < end) {
            let Some(data) = page.data() else { continue };
            let (from, to) = (page.offset.max(offset), (page.offset + PAGE as u64).min(end));
            // All four lie inside their arrays, which fit the address space.
            let target = (from - offset) as usize..(to - offset) as usize;
            let source = (from - page.offset) as usize..(to - page.offset) as usize;
            bytes[target].copy_from_slice(&data[source]);
        }
        bytes
    }
}

impl Page {
    /// Takes a chunk at `offset` of the enclave; `None` if it is not one of this page, or is there
    /// already.
    fn take(&mut self, offset: u64, bytes: &[u8; CHUNK], measured: bool) -> Option<()> {
        let within = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        let index = within / CHUNK;
        let bit = 1_u16.checked_shl(u32::try_from(index).ok()?)?;
        if !within.is_multiple_of(CHUNK) || self.present & bit != 0 {
            return None;
        }
        // Chunks in order, so that a file is a function of its image.
        if self.present >> index != 0 {
            return None;
        }
        self.present |= bit;
        self.measured |= if measured { bit } else { 0 };
        if bytes.iter().any(|byte| *byte != 0) {
            let data = self.data.get_or_insert_with(|| Box::new([0; PAGE]));
            data.get_mut(within..within + CHUNK)?.copy_from_slice(bytes);
        }
        Some(())
    }
}
