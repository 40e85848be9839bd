//! Making a volume. The header goes last: a half-made volume is none.

use alloc::boxed::Box;

use super::{
    CounterUse, FormatOptions, SlotKey, Volume,
    crypto::{Secret, VolumeKey, sha256},
    error::VolumeError,
    freshness,
    header::{self, Fresh, HeaderBytes},
    layout::{
        BLOCK_BYTES, Geometry, HEADER_BLOCKS, HEADERS, Order, Ptr, REGION, RING_START, SPACE_SLOTS,
        SUPERBLOCKS, levels,
    },
    recovery::Opening,
    slots::{NewSlot, Stretch},
    snapshots::Held,
    superblock::{Bound, Epoch, Superblock},
    times::Times,
};
use crate::disk::{BLOCK, Block, Disk, HostError, Transfer};

/// Blocks of one host request while formatting.
const STEP: usize = 32;
/// Regions whose slots of the space map are written at once: 512 GiB of the host file.
const WARM_REGIONS: u64 = 4096;

/// Writes `count` blocks of zeros from `place` on.
async fn zeroes<D: Disk>(disk: &D, place: u64, count: u64) -> Result<(), VolumeError> {
    let step = STEP.min(D::MAX_BLOCKS);
    let failed = |place| move |error: HostError| VolumeError::Host { place, error };
    let mut transfer = disk.transfer(step).await.map_err(failed(place))?;
    (0..step).for_each(|i| transfer.put(i, &[0; BLOCK]));
    let mut done = 0;
    while done < count {
        let blocks = (count - done).min(step as u64);
        let at = place + done;
        transfer.write(at, blocks as usize).await.map_err(failed(at))?;
        done += blocks;
    }
    Ok(())
}

pub(crate) async fn write_blocks<D: Disk>(
    disk: &D,
    place: u64,
    blocks: &[Block],
) -> Result<(), VolumeError> {
    let failed = |error| VolumeError::Host { place, error };
    let mut transfer = disk.transfer(blocks.len()).await.map_err(failed)?;
    blocks.iter().enumerate().for_each(|(i, block)| transfer.put(i, block));
    transfer.write(place, blocks.len()).await.map_err(failed)
}

/// Writes the space map's slots of regions from `first` on, so that a full host cannot keep a
/// checkpoint from writing them: those of the first [`WARM_REGIONS`], not to take longer than the
/// journal does.
pub(crate) async fn warm_slots<D: Disk>(
    disk: &D,
    geometry: &Geometry,
    first: u64,
) -> Result<(), VolumeError> {
    for region in first..geometry.regions().min(WARM_REGIONS) {
        let start = region * REGION;
        zeroes(disk, start, SPACE_SLOTS.min(geometry.host_blocks - start)).await?;
    }
    Ok(())
}

/// Whether a volume of this geometry can lie on this disk.
fn check<D: Disk>(disk: &D, geometry: Geometry) -> Result<Geometry, VolumeError> {
    let geometry = geometry.check()?;
    let (needed, found) = (geometry.host_blocks, disk.host_blocks());
    if found < needed {
        return Err(VolumeError::HostFileShort { needed, found });
    }
    Ok(geometry)
}

/// Makes a volume of the given geometry.
pub(crate) async fn format<D: Disk>(
    disk: &D,
    key: &SlotKey,
    geometry: Geometry,
    size: u64,
) -> Result<(), VolumeError> {
    check(disk, geometry)?;
    // An older volume's header and superblocks go first, then the ring and the reserve are
    // written, so that they are warm and have their space on the host.
    zeroes(disk, 0, RING_START).await?;
    zeroes(disk, geometry.ring_start, geometry.ring_blocks + geometry.reserve_blocks).await?;
    warm_slots(disk, &geometry, 1).await?;
    let made = New::draw(disk, key, geometry, size)?;
    let mut salt = [0; 24];
    disk.random(&mut salt)?;
    let sealed = made.superblock.seal(&made.key, &salt, 0);
    for place in SUPERBLOCKS[0] {
        write_blocks(disk, place, &[sealed]).await?;
    }
    disk.flush().await.map_err(VolumeError::Flush)?;
    for place in HEADERS {
        write_blocks(disk, place, made.header.as_chunks::<BLOCK>().0).await?;
    }
    disk.flush().await.map_err(VolumeError::Flush)
}

/// What a new volume begins with.
struct New {
    header: Box<HeaderBytes>,
    key: VolumeKey,
    superblock: Superblock,
}

impl New {
    fn draw<D: Disk>(
        disk: &D,
        key: &SlotKey,
        geometry: Geometry,
        size: u64,
    ) -> Result<Self, VolumeError> {
        let mut fresh = Fresh {
            uuid: [0; 16],
            master: Secret([0; 32]),
            key: Secret([0; 32]),
            keyring_salt: [0; 24],
        };
        let mut slot_salt = [0; 32];
        for out in [
            &mut fresh.uuid[..],
            &mut fresh.master.0,
            &mut fresh.key.0,
            &mut slot_salt,
            &mut fresh.keyring_salt,
        ] {
            disk.random(out)?;
        }
        let volume_key = VolumeKey::new(fresh.uuid, fresh.key.clone());
        let superblock = Superblock {
            generation: 1,
            clean: true,
            session: 0,
            size,
            size_order: Order(0),
            geometry,
            map_root: Ptr::NULL,
            map_levels: levels(geometry.capacity),
            cut: Order(0),
            space_root: Ptr::NULL,
            table_root: Ptr::NULL,
            table_levels: 0,
            replay_seq: 1,
            replay_prev: [0; 16],
            durable: 0,
            birth: 1,
            held: Held::default(),
            epochs: alloc::vec::Vec::new(),
            counter: None,
            times: Times::default(),
        };
        let mut header: Box<HeaderBytes> = Box::new([0; header::BYTES]);
        let first = NewSlot { key, stretch: Stretch::default(), salt: slot_salt };
        header::encode(&mut header, &fresh, &first, geometry.host_blocks)?;
        Ok(Self { header, key: volume_key, superblock })
    }
}

/// Makes the volume of one file among many and opens it, in one write and without a flush.
/// Nothing relies on the host file reading as zeros: what a host puts there instead does not
/// authenticate under keys made here.
async fn make_open<D: Disk>(
    disk: &D,
    key: &SlotKey,
    geometry: Geometry,
    counter: Option<&CounterUse>,
) -> Result<Volume, VolumeError> {
    let geometry = check(disk, geometry)?;
    let mut made = New::draw(disk, key, geometry, 0)?;
    let [mut superblock_salt, mut salt] = [[0; 24]; 2];
    disk.random(&mut superblock_salt)?;
    disk.random(&mut salt)?;
    let epoch = Epoch { id: 1, salt, key_version: made.key.version(), tabled: false };
    (made.superblock.clean, made.superblock.session) = (false, 1);
    made.superblock.epochs.push(epoch);
    made.superblock.counter = counter.map(|_| Bound::default());
    let sealed = made.superblock.seal(&made.key, &superblock_salt, 0);
    // Both headers and the first copy of the superblock lie side by side: one write. Its second
    // copy guards against a bad sector, which the journal and the data that follow do not have
    // either; from the first checkpoint on there are two.
    let [first, _] = SUPERBLOCKS[0];
    let mut front = alloc::vec![[0; BLOCK]; first as usize + 1];
    let header = made.header.as_chunks::<BLOCK>().0;
    for place in HEADERS {
        front[place as usize..place as usize + HEADER_BLOCKS].copy_from_slice(header);
    }
    front[first as usize] = sealed;
    write_blocks(disk, 0, &front).await?;
    let opened = header::decode(&made.header, key)?;
    let fresh =
        counter.map(|used| freshness::Fresh::of_new(used, &made.superblock, sha256(&sealed)));
    Ok(Opening::of_new(made.superblock, fresh).begin(opened, salt))
}

impl Volume {
    /// Blocks of 4096 bytes that the host file must have for a volume of `size` bytes (a sparse
    /// file will do); 0 for a size that no volume can have.
    #[must_use]
    pub fn host_blocks(size: u64) -> u64 {
        Geometry::for_size(size).map_or(0, |geometry| geometry.host_blocks)
    }

    /// Blocks of the host file for [`Self::make_open`]; 0 for a capacity that cannot be.
    #[must_use]
    pub fn small_host_blocks(capacity: u64) -> u64 {
        Geometry::for_small_file(capacity).map_or(0, |geometry| geometry.host_blocks)
    }

    /// Makes the volume of one file among many in the new, sparse host file behind `disk`, and
    /// opens it: without content at first, `capacity` bytes at most. Has a small journal and
    /// writes only 17 blocks, whatever the capacity; the host gives space for the rest when it is
    /// used.
    ///
    /// The volume is durable, as all that is written to it, with its first sync; before that a
    /// crash may leave a file that is no volume. The file must already have
    /// [`Self::small_host_blocks`] blocks. `counter`: the record in a directory's index, which has
    /// none of it yet, where each sync is to be recorded.
    ///
    /// # Errors
    /// As [`Self::format`].
    pub async fn make_open<D: Disk>(
        disk: &D,
        key: &SlotKey,
        capacity: u64,
        counter: Option<&CounterUse>,
    ) -> Result<Self, VolumeError> {
        let geometry = Geometry::for_small_file(capacity)?;
        // Keys pass through: on the heap, so that little of the stack has to be wiped.
        Box::pin(make_open(disk, key, geometry, counter)).await
    }

    /// Makes a volume in the host file behind `disk`, whatever is there: everything in it is lost.
    ///
    /// The file must already have [`Self::host_blocks`] blocks. Writes the fixed structures only;
    /// the time it takes does not depend on the size beyond a journal of at most 126 MiB and as much of
    /// the space map.
    ///
    /// # Errors
    /// [`VolumeError::Misuse`], [`VolumeError::HostFileShort`], [`VolumeError::Host`],
    /// [`VolumeError::Flush`], [`VolumeError::NoEntropy`].
    pub async fn format<D: Disk>(
        disk: &D,
        key: &SlotKey,
        options: &FormatOptions,
    ) -> Result<(), VolumeError> {
        let geometry = Geometry::for_size(options.size)?;
        format(disk, key, geometry, geometry.capacity * BLOCK_BYTES).await
    }
}
