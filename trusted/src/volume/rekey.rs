//! Rekey: everything sealed anew under a new volume key, while nobody else has the volume open.
//!
//! The order of things, and why (each step waits for the one before):
//! 1. *Settle.* The volume is opened and closed under its old key, so that the journal is empty.
//! 2. *Begin.* The header gets a new master, a new volume key beside the old one, and the slots
//!    whose keys were given. From here on all sealing is done under the new key.
//! 3. *Rewrite.* Each block of the guest's file that was sealed under the old key is written to a
//!    fresh place, as the guest would write it; the map follows by checkpoints. Which key sealed
//!    what is known by the epoch in each pointer, so nothing else records how far it is.
//! 4. *Renew.* A checkpoint leaves the old epochs out of the epoch table and writes what is left of
//!    the space map anew. After it no durable pointer leads to anything of the old key.
//! 5. *End.* The header keeps the new volume key only.
//!
//! Holds: a crash at any point leaves a volume that opens with the same keys and reads the same,
//! and on which the rekey goes on; the old key opens nothing after step 5.
//! Does not hold: that ciphertext which the host kept, or has not overwritten, is unreadable under
//! the old key.

use alloc::{vec, vec::Vec};

use zeroize::Zeroize as _;

use super::{
    OpenOptions, SlotKey, Volume,
    core::{Found, Map},
    crypto::Secret,
    error::{Misuse, VolumeError},
    front::read_header,
    header::{self, FreshKeys, HeaderBytes},
    layout::{BLOCK_BYTES, FANOUT, Ptr, child},
    merge::Met,
    read::PIECE,
    slots::{SLOTS, write_header},
    tree::{Bad, Miss},
};
use crate::{
    disk::{Disk, HostError},
    errno::Errno,
    platform::Memory,
};

/// Passes over the map before a rekey is given up; the second finds nothing to do.
const PASSES: usize = 4;

/// What a rekey did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RekeyReport {
    /// It went on with one that had been begun before.
    pub resumed: bool,
    /// Blocks of 4096 bytes sealed anew in this run.
    pub rewritten: u64,
    /// Number of the volume key now.
    pub key_version: u16,
}

impl Volume {
    /// Seals the whole volume anew under a new volume key and a new master, or goes on with a
    /// rekey that was cut off. The volume must not be open elsewhere.
    ///
    /// `keys` are those that open the volume afterwards: the first one opens it now, and the slots
    /// of all of them stay. All other slots are emptied when a rekey is begun; one that goes on
    /// changes no slot. `options` are for opening it: its counter. `progress(done, all)` is called
    /// in bytes of the file now and then.
    ///
    /// # Errors
    /// Those of opening the volume with each of `keys`; [`Misuse::HasSnapshots`];
    /// [`VolumeError::Unreadable`] for a block that is damaged: write it, or punch a hole there,
    /// and call again. After any error the volume opens as before and the next call goes on.
    pub async fn rekey<D: Disk>(
        disk: &D,
        keys: &[&SlotKey],
        options: &OpenOptions,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<RekeyReport, VolumeError> {
        let begun = Self::rekey_begin(disk, keys, options).await?;
        let key = *keys.first().ok_or(VolumeError::WrongKey)?;
        let mut report = Self::rekey_rewrite(disk, key, options, &mut progress).await?;
        Self::rekey_end(disk, key).await?;
        report.resumed = !begun;
        Ok(report)
    }

    /// Steps 1 and 2 of [`Self::rekey`]. `false`: they were done before.
    ///
    /// # Errors
    /// As [`Self::rekey`].
    pub async fn rekey_begin<D: Disk>(
        disk: &D,
        keys: &[&SlotKey],
        options: &OpenOptions,
    ) -> Result<bool, VolumeError> {
        let key = *keys.first().ok_or(VolumeError::WrongKey)?;
        let (volume, _) = Self::open(disk, key, options).await?;
        volume.close(disk).await.map_err(host)?;
        volume.refuse_snapshots()?;
        if volume.key.is_retiring() {
            return Ok(false);
        }
        let mut fresh = FreshKeys {
            master: Secret([0; 32]),
            key: Secret([0; 32]),
            keyring_salt: [0; 24],
            slot_salts: [[0; 32]; SLOTS],
        };
        disk.random(&mut fresh.master.0)?;
        disk.random(&mut fresh.key.0)?;
        disk.random(&mut fresh.keyring_salt)?;
        for salt in &mut fresh.slot_salts {
            disk.random(salt)?;
        }
        let decode = |bytes: &HeaderBytes| header::decode(bytes, key);
        let mut header = read_header(disk, decode, |opened| opened.generation).await?;
        let begun = header::begin_rekey(&mut header.bytes, keys, &fresh)?;
        if begun {
            write_header(disk, &header.bytes, header.copy).await?;
        }
        Ok(begun)
    }

    /// Steps 3 and 4 of [`Self::rekey`].
    ///
    /// # Errors
    /// As [`Self::rekey`].
    pub async fn rekey_rewrite<D: Disk>(
        disk: &D,
        key: &SlotKey,
        options: &OpenOptions,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<RekeyReport, VolumeError> {
        let (volume, _) = Self::open(disk, key, options).await?;
        let mut report =
            RekeyReport { key_version: volume.key.version(), ..RekeyReport::default() };
        if !volume.key.is_retiring() {
            volume.close(disk).await.map_err(host)?;
            return Ok(report);
        }
        volume.refuse_snapshots()?;
        let mut left = 1;
        for _ in 0..PASSES {
            // What recovery has put into the delta goes into the map, which alone is walked.
            volume.checkpoint(disk, false, false).await.map_err(host)?;
            left = volume.rewrite_old(disk, &mut progress).await?;
            report.rewritten += left;
            if left == 0 {
                break;
            }
        }
        if left > 0 {
            return Err(host(Errno::EIO));
        }
        volume.core.lock().renewing = true;
        let renewed = volume.checkpoint(disk, false, false).await;
        volume.core.lock().renewing = false;
        renewed.map_err(host)?;
        volume.close(disk).await.map_err(host)?;
        Ok(report)
    }

    /// Step 5 of [`Self::rekey`]. Everything must have been sealed anew.
    ///
    /// # Errors
    /// As [`Self::rekey`].
    pub async fn rekey_end<D: Disk>(disk: &D, key: &SlotKey) -> Result<(), VolumeError> {
        let mut salt = [0; 24];
        disk.random(&mut salt)?;
        let decode = |bytes: &HeaderBytes| header::decode(bytes, key);
        let mut header = read_header(disk, decode, |opened| opened.generation).await?;
        header::end_rekey(&mut header.bytes, key, &salt)?;
        write_header(disk, &header.bytes, header.copy).await
    }

    /// What only snapshots reach would stay sealed under the old key, and be lost with it.
    fn refuse_snapshots(&self) -> Result<(), VolumeError> {
        if self.has_snapshots() {
            return Err(VolumeError::Misuse(Misuse::HasSnapshots));
        }
        Ok(())
    }

    /// Whether what `ptr` points to is sealed under a volume key that is on its way out.
    pub(crate) async fn is_old<D: Disk>(&self, disk: &D, ptr: &Ptr) -> Result<bool, Bad> {
        Ok(self.key_for(disk, ptr.order).await?.version != self.key.version())
    }

    /// One pass over the map: writes anew what is sealed under the old key. Answers how many
    /// blocks that were.
    async fn rewrite_old<D: Disk>(
        &self,
        disk: &D,
        progress: &mut (impl FnMut(u64, u64) + Send),
    ) -> Result<u64, VolumeError> {
        let size = self.size();
        let leaves = self.geometry.capacity.div_ceil(FANOUT);
        let (mut next, mut rewritten) = (0, 0);
        while next < leaves {
            let map = self.core.lock().map;
            let leaf = match self.existing_leaf(disk, &map, next, leaves - 1).await {
                Met::Nothing => break,
                // Said to be damaged below, when it is read.
                Met::Leaf(leaf) | Met::Unreadable(leaf, _) => leaf,
            };
            next = leaf + 1;
            let base = leaf * FANOUT;
            progress((base * BLOCK_BYTES).min(size), size);
            let at = |bad: Bad, block: u64| match bad {
                Bad::Forged => VolumeError::Unreadable { offset: block * BLOCK_BYTES },
                Bad::Host(error) => VolumeError::Host { place: 0, error },
            };
            let mut run: Option<(u64, u64)> = None;
            let old = self.old_blocks(disk, &map, leaf).await.map_err(|bad| at(bad, base))?;
            for block in old {
                run = match run {
                    Some((first, count)) if first + count == block && count < PIECE as u64 => {
                        Some((first, count + 1))
                    }
                    ended => {
                        if let Some((first, count)) = ended {
                            self.rewrite_run(disk, first, count).await?;
                        }
                        Some((block, 1))
                    }
                };
                rewritten += 1;
            }
            if let Some((first, count)) = run {
                self.rewrite_run(disk, first, count).await?;
            }
            if let Some(chore) = self.due(disk.now_ns()) {
                self.run_chore(disk, chore).await.map_err(host)?;
            }
        }
        progress(size, size);
        Ok(rewritten)
    }

    /// Blocks of a leaf that are sealed under the old key and not written since.
    async fn old_blocks<D: Disk>(&self, disk: &D, map: &Map, leaf: u64) -> Result<Vec<u64>, Bad> {
        let ptr = self.descend(disk, map.root, map.levels, 0, leaf).await?;
        if ptr.is_null() {
            return Ok(Vec::new());
        }
        let node = self.node(disk, &Miss { ptr, level: 0, index: leaf }).await?;
        let mut old = Vec::new();
        for slot in 0..FANOUT {
            let (block, data) = (leaf * FANOUT + slot, child(&node, slot as usize));
            let newer = matches!(self.core.lock().find(block), Found::Here(_));
            if data.is_null() || newer {
                continue;
            }
            match self.is_old(disk, &data).await {
                Ok(false) => {}
                // An epoch that is nowhere: reading the block will name it.
                Ok(true) | Err(Bad::Forged) => old.push(block),
                Err(bad) => return Err(bad),
            }
        }
        Ok(old)
    }

    /// Writes blocks anew that have not changed since they were looked at. At most [`PIECE`].
    async fn rewrite_run<D: Disk>(
        &self,
        disk: &D,
        first: u64,
        count: u64,
    ) -> Result<(), VolumeError> {
        // The end of the last block lies beyond the file's and is zeros.
        let plain = Memory::new(vec![0; (count * BLOCK_BYTES) as usize]);
        let written = self.rewrite_through(disk, first, count, &plain).await;
        plain.into_inner().zeroize();
        written
    }

    async fn rewrite_through<D: Disk>(
        &self,
        disk: &D,
        first: u64,
        count: u64,
        plain: &Memory,
    ) -> Result<(), VolumeError> {
        let (offset, length) = (first * BLOCK_BYTES, count * BLOCK_BYTES);
        let wanted = self.size().saturating_sub(offset).min(length);
        let done = match self.read(disk, offset, plain).await {
            Ok(done) => done as u64,
            Err(Errno::EIO) => 0,
            Err(errno) => return Err(host(errno)),
        };
        if done < wanted {
            let offset = (offset + done) / BLOCK_BYTES * BLOCK_BYTES;
            return Err(VolumeError::Unreadable { offset });
        }
        self.write_again(disk, first, count, plain).await.map_err(host)
    }
}

fn host(errno: Errno) -> VolumeError {
    VolumeError::Host { place: 0, error: HostError::Errno(errno.0) }
}
