//! The volumes that targets start from, and what the guest wrote to them.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use std::sync::OnceLock;

use super::host::{Host, Image, wait};
use crate::{
    counter::Record,
    directory::{Attributes, ROOT, Table},
    disk::BLOCK,
    platform::Memory,
    volume::{
        OpenOptions, SlotKey, Volume, crypto,
        crypto::{Secret, VolumeKey},
        format::format,
        header::{self, HeaderBytes},
        layout::{BLOCK_BYTES, FANOUT, Geometry, HEADER_BLOCKS, RING_START, get_array, put},
        slots,
    },
};

/// Blocks of the guest's file.
pub(super) const BLOCKS: u64 = 130;
/// Versions that blocks were written in, and the one that targets write.
const VERSIONS: [u8; 4] = [1, 2, 3, 9];

pub(super) fn key() -> SlotKey {
    SlotKey::new([42; 32])
}

/// What version `version` of a block holds.
pub(super) fn plain(block: u64, version: u8) -> Vec<u8> {
    (0..BLOCK as u64).map(|i| (block * 31 + i * 7 + i / 251) as u8 ^ version << 4).collect()
}

/// Whether the guest ever wrote that, from the block's begin on. The guest also shortened the file
/// and punched in it, so that zeros may begin, or end, anywhere.
pub(super) fn is_known(block: u64, bytes: &[u8]) -> bool {
    static ALL: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        (0..BLOCKS).flat_map(|block| VERSIONS.map(|version| plain(block, version))).collect()
    });
    let first = block as usize * VERSIONS.len();
    let mine = &all[first..first + VERSIONS.len()];
    if bytes.iter().all(|byte| *byte == 0) || mine.iter().any(|known| known == bytes) {
        return true;
    }
    mine.iter().any(|known| {
        let is = |n: &usize| bytes[*n] == known[*n];
        let zero = |n: &usize| bytes[*n] == 0;
        let first = (0..bytes.len()).take_while(zero).count();
        let last = bytes.len() - (first..bytes.len()).rev().take_while(zero).count();
        (first..last).all(|n| is(&n))
    })
}

/// A volume as it lies on the host, with the keys to it.
#[derive(Clone)]
pub(super) struct Base {
    pub(super) image: Image,
    pub(super) blocks: u64,
}

/// A volume so small that journal, space and places are reused all the time.
pub(in crate::volume) const fn tiny() -> Geometry {
    let (ring_blocks, reserve_blocks) = (64, 8);
    let home_start = RING_START + ring_blocks + reserve_blocks;
    Geometry {
        capacity: BLOCKS,
        host_blocks: home_start + 2 * FANOUT + 48,
        ring_start: RING_START,
        ring_blocks,
        reserve_start: RING_START + ring_blocks,
        reserve_blocks,
        home_start,
        home_stride: FANOUT,
        slack: 8,
    }
}

/// Writes, in three sessions; the last one is closed or only synced.
fn made(closed: bool) -> Base {
    #[cfg(test)]
    crate::volume::tests::nonces::reset();
    let blocks = tiny().host_blocks;
    let host = Host::new(Image::new(), blocks, 1);
    let done = wait(async {
        format(&host, &key(), tiny(), BLOCKS * BLOCK_BYTES).await.map_err(|_| ())?;
        for version in VERSIONS.into_iter().take(3) {
            let options = OpenOptions::default();
            let (volume, _) = Volume::open(&host, &key(), &options).await.map_err(|_| ())?;
            for n in 0..12 {
                let block = n * u64::from(version) * 11 % BLOCKS;
                let bytes = Memory::new(plain(block, version));
                volume.write(&host, block * BLOCK_BYTES, &bytes).await.map_err(|_| ())?;
                if n % 3 == 2 {
                    volume.sync(&host).await.map_err(|_| ())?;
                }
            }
            volume.punch(&host, 60 * BLOCK_BYTES, 9000).await.map_err(|_| ())?;
            volume.sync(&host).await.map_err(|_| ())?;
            if closed || version != 3 {
                volume.close(&host).await.map_err(|_| ())?;
            }
        }
        Ok::<(), ()>(())
    });
    assert_eq!(done, Ok(()), "the base volume cannot be made");
    Base { image: host.image(), blocks }
}

impl Base {
    /// Closed cleanly: everything is in the map.
    pub(super) fn closed() -> Self {
        static MADE: OnceLock<Base> = OnceLock::new();
        let base = MADE.get_or_init(|| made(true)).clone();
        base.fresh()
    }

    /// Synced and left: the last session is in the journal.
    pub(super) fn synced() -> Self {
        static MADE: OnceLock<Base> = OnceLock::new();
        let base = MADE.get_or_init(|| made(false)).clone();
        base.fresh()
    }

    /// Closed cleanly, with two snapshots; between them and after them something was written.
    pub(super) fn kept() -> Self {
        static MADE: OnceLock<Base> = OnceLock::new();
        let base = MADE.get_or_init(|| {
            let base = Self::closed();
            let host = Host::new(base.image, base.blocks, 3);
            let done = wait(async {
                let options = OpenOptions::default();
                let (volume, _) = Volume::open(&host, &key(), &options).await.map_err(|_| ())?;
                for (name, first) in [("before", 5), ("after", 40)] {
                    volume.make_snapshot(&host, name, 7).await.map_err(|_| ())?;
                    for block in first..first + 6 {
                        let bytes = Memory::new(plain(block, 9));
                        volume.write(&host, block * BLOCK_BYTES, &bytes).await.map_err(|_| ())?;
                    }
                }
                volume.close(&host).await.map_err(|_| ())
            });
            assert_eq!(done, Ok(()), "the base volume gets no snapshots");
            Self { image: host.image(), blocks: base.blocks }
        });
        base.clone().fresh()
    }

    /// Each run seals anew what an earlier one sealed; the tests' table of nonces must forget.
    fn fresh(self) -> Self {
        #[cfg(test)]
        crate::volume::tests::nonces::reset();
        super::FORGED.set(false);
        self
    }

    /// Copy A of the header.
    pub(super) fn header(&self) -> Box<HeaderBytes> {
        let mut bytes: Box<HeaderBytes> = Box::new([0; header::BYTES]);
        for (n, place) in (0..HEADER_BLOCKS as u64).enumerate() {
            if let Some(block) = self.image.get(&place) {
                put(&mut bytes[..], n * BLOCK, &block[..]);
            }
        }
        bytes
    }

    fn master(&self) -> Secret {
        let bytes = self.header();
        let uuid = get_array(&bytes[..], 48);
        match slots::open(header::slot(&bytes, 0), &key(), &uuid) {
            Some(master) => master,
            None => panic!("the base volume's key does not open it"),
        }
    }

    pub(super) fn volume_key(&self) -> VolumeKey {
        match header::decode(&self.header(), &key()) {
            Ok(opened) => opened.key,
            Err(error) => panic!("the base volume's header does not open: {error}"),
        }
    }

    /// Sum and MAC of an altered header.
    pub(super) fn finish_header(&self, bytes: &mut HeaderBytes) {
        let (sum, mac) = (header::BYTES - 64, header::BYTES - 32);
        let digest = crypto::sha256(&bytes[..sum]);
        put(bytes, sum, &digest);
        let uuid: [u8; 16] = get_array(bytes, 48);
        let under = crypto::derive(&self.master().0, &[], &[b"postern/1 header", &uuid]);
        let code = crypto::mac(&under, &[&bytes[..mac]]);
        put(bytes, mac, &code);
    }

    pub(super) fn block(&self, place: u64) -> [u8; BLOCK] {
        self.image.get(&place).map_or([0; BLOCK], |block| **block)
    }

    pub(super) fn set(&mut self, place: u64, block: [u8; BLOCK]) {
        self.image.insert(place, Arc::new(block));
    }
}

/// A name table with a little of everything.
pub(super) fn table() -> Table {
    let attributes = Attributes::new(0o755, 3, 4, 5);
    let mut table = Table::new(attributes);
    let mut made = || {
        let inner = table.create(ROOT, b"a", None, attributes)?;
        let file = table.create(inner, b"b", Some([1; 16]), attributes)?;
        table.set_record(file, Some(Record { sequence: 3, digest: [8; 32] }))?;
        table.create(ROOT, b"a long name", Some([2; 16]), attributes)?;
        table.create(inner, b"empty", None, attributes)
    };
    assert!(made().is_ok(), "the base table cannot be made");
    table
}

/// The digest of an altered image of a table.
pub(super) fn finish_table(image: &mut [u8]) {
    let body = usize::try_from(crate::volume::layout::get64(image, 32)).unwrap_or(usize::MAX);
    let Some(end) = body.checked_add(72).filter(|end| *end <= image.len()) else { return };
    image[40..72].fill(0);
    let digest = crypto::sha256(&image[..end]);
    image[40..72].copy_from_slice(&digest);
}
