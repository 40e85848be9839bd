//! The front of the host file: the copies of the header and of the superblocks, at fixed places.
//!
//! Holds: what is chosen among the copies does not depend on how they were read; a copy that cannot
//! be read is told from one that is not authentic.

use alloc::{boxed::Box, vec::Vec};

use super::{
    crypto::{VolumeKey, sha256},
    error::VolumeError,
    format::write_blocks,
    freshness::SuperblockId,
    header::{self, HeaderBytes},
    layout::{HEADER_BLOCKS, HEADERS, SUPERBLOCKS, put},
    superblock::Superblock,
};
use crate::disk::{BLOCK, Block, Disk, Transfer};

/// Places that are read at once, first to last: both headers and a superblock, then the other
/// superblocks. What lies between is at most as long as another request costs.
const NEAR: [(u64, u64); 2] =
    [(HEADERS[0], SUPERBLOCKS[0][0]), (SUPERBLOCKS[1][0], SUPERBLOCKS[1][1])];

/// The fixed places at the front of the host file, as they were read in one go; each is still read
/// by itself where that failed, so that one bad block does not hide its neighbours.
#[derive(Default)]
pub(crate) struct Front(Vec<(u64, Vec<Block>)>);

impl Front {
    /// Reads all of them.
    pub(crate) async fn read<D: Disk>(disk: &D) -> Self {
        let mut runs = Vec::new();
        for (first, last) in NEAR {
            let mut next = first;
            while next <= last {
                let count = (last + 1 - next).min(D::MAX_BLOCKS as u64);
                let mut blocks = alloc::vec![[0; BLOCK]; count as usize];
                if read_blocks(disk, next, &mut blocks).await.is_ok() {
                    runs.push((next, blocks));
                }
                next += count;
            }
        }
        Self(runs)
    }

    async fn get<D: Disk>(
        &self,
        disk: &D,
        place: u64,
        out: &mut [Block],
    ) -> Result<(), VolumeError> {
        let held = self.0.iter().find_map(|(first, blocks)| {
            let at = usize::try_from(place.checked_sub(*first)?).ok()?;
            blocks.get(at..at.checked_add(out.len())?)
        });
        match held {
            Some(blocks) => {
                out.copy_from_slice(blocks);
                Ok(())
            }
            None => read_blocks(disk, place, out).await,
        }
    }
}

async fn read_blocks<D: Disk>(disk: &D, place: u64, out: &mut [Block]) -> Result<(), VolumeError> {
    let failed = |error| VolumeError::Host { place, error };
    let mut transfer = disk.transfer(out.len()).await.map_err(failed)?;
    transfer.read(place).await.map_err(failed)?;
    out.iter_mut().enumerate().for_each(|(i, block)| transfer.get(i, block));
    Ok(())
}

/// A copy of the header that was accepted.
pub(crate) struct Header<T> {
    pub(crate) bytes: Box<HeaderBytes>,
    /// What it says.
    pub(crate) found: T,
    /// Which copy it is.
    pub(crate) copy: usize,
    /// The other copy is the same.
    pub(crate) twice: bool,
}

impl<T> Header<T> {
    pub(crate) fn split(self) -> (Header<()>, T) {
        let Self { bytes, found, copy, twice } = self;
        (Header { bytes, found: (), copy, twice }, found)
    }
}

impl Header<()> {
    /// Makes both copies the same: nothing is sealed under keys that one copy alone holds.
    pub(crate) async fn repair<D: Disk>(&self, disk: &D) -> Result<(), VolumeError> {
        if self.twice {
            return Ok(());
        }
        write_blocks(disk, HEADERS[1 - self.copy], self.bytes.as_chunks::<BLOCK>().0).await
    }
}

/// The newer of the header's copies that `decode` accepts.
///
/// A key that opens only the older of two intact copies is refused: a change of the keys that was
/// cut off has happened as soon as one copy carries it.
pub(crate) async fn read_header<D: Disk, T>(
    disk: &D,
    decode: impl Fn(&HeaderBytes) -> Result<T, VolumeError>,
    generation: impl Fn(&T) -> u64,
) -> Result<Header<T>, VolumeError> {
    read_header_in(&Front::default(), disk, decode, generation).await
}

/// As [`read_header`], of what was read already.
pub(crate) async fn read_header_in<D: Disk, T>(
    front: &Front,
    disk: &D,
    decode: impl Fn(&HeaderBytes) -> Result<T, VolumeError>,
    generation: impl Fn(&T) -> u64,
) -> Result<Header<T>, VolumeError> {
    let mut best: Option<Header<T>> = None;
    let mut refusal: Option<VolumeError> = None;
    let mut locked = 0;
    for (copy, place) in HEADERS.into_iter().enumerate() {
        let mut blocks = Vec::from([[0; BLOCK]; HEADER_BLOCKS]);
        let read = front.get(disk, place, &mut blocks).await.and_then(|()| {
            let mut bytes: Box<HeaderBytes> = Box::new([0; header::BYTES]);
            blocks.iter().enumerate().for_each(|(i, block)| put(&mut bytes[..], i * BLOCK, block));
            match decode(&bytes) {
                Ok(found) => Ok(Header { bytes, found, copy, twice: false }),
                Err(error) => {
                    if error == VolumeError::WrongKey {
                        locked = locked.max(header::look(&bytes).unwrap_or(0));
                    }
                    Err(error)
                }
            }
        });
        match read {
            Ok(header) => match &mut best {
                Some(best) if generation(&best.found) >= generation(&header.found) => {
                    best.twice = best.bytes == header.bytes;
                }
                _ => best = Some(header),
            },
            // The copy that comes furthest tells most.
            Err(VolumeError::NotAVolume) => {
                refusal = refusal.or(Some(VolumeError::NotAVolume));
            }
            Err(VolumeError::DamagedHeader)
                if !matches!(refusal, None | Some(VolumeError::NotAVolume)) => {}
            Err(error) => refusal = Some(error),
        }
    }
    match best {
        Some(best) if generation(&best.found) < locked => Err(VolumeError::WrongKey),
        Some(best) => Ok(best),
        None => Err(refusal.unwrap_or(VolumeError::NotAVolume)),
    }
}

/// The superblock that was chosen.
pub(crate) struct Newest {
    pub(crate) superblock: Superblock,
    pub(crate) slot: usize,
    pub(crate) id: SuperblockId,
    /// Every copy in both slots is authentic, or was never written.
    pub(crate) whole: bool,
}

/// Step 2: the newest superblock and its slot.
pub(crate) async fn open_superblock<D: Disk>(
    front: &Front,
    disk: &D,
    key: &VolumeKey,
    read_only: bool,
) -> Result<Newest, VolumeError> {
    let mut whole = true;
    let mut best: Option<(Superblock, usize, SuperblockId)> = None;
    let mut refusal = None;
    for (slot, copies) in SUPERBLOCKS.into_iter().enumerate() {
        let mut failure = None;
        let mut found: Option<(Superblock, SuperblockId)> = None;
        for place in copies {
            let mut block = [[0; BLOCK]];
            match front.get(disk, place, &mut block).await {
                Ok(()) => match Superblock::open(&block[0], key, slot) {
                    // A commit that was cut off may be in one copy alone.
                    Ok(Some(superblock)) => {
                        if found.as_ref().is_none_or(|(f, _)| f.generation < superblock.generation)
                        {
                            found = Some((superblock, sha256(&block[0])));
                        }
                    }
                    Ok(None) => whole &= block[0] == [0; BLOCK],
                    // Perhaps the newest: going on from the other slot would lose what it says.
                    Err(
                        error @ (VolumeError::UnsupportedVersion { .. }
                        | VolumeError::UnsupportedFeatures { .. }),
                    ) => return Err(error),
                    Err(error) => refusal = Some(error),
                },
                Err(error) => failure = Some(error),
            }
        }
        match (found, failure) {
            (Some((superblock, id)), _) => {
                if best.as_ref().is_none_or(|(b, ..)| b.generation < superblock.generation) {
                    best = Some((superblock, slot, id));
                }
            }
            // An older superblock instead of one that could not be read would lose synced data.
            (None, Some(error)) if !read_only => return Err(error),
            (None, error) => refusal = refusal.or(error),
        }
    }
    let (superblock, slot, id) = best.ok_or(refusal.unwrap_or(VolumeError::DamagedSuperblock))?;
    Ok(Newest { superblock, slot, id, whole: whole && refusal.is_none() })
}
