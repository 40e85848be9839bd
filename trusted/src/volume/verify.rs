//! Reading everything once: what of the volume is damaged.

use alloc::vec::Vec;

use super::{Volume, crypto::Kind, layout::BLOCK_BYTES, tree::Bad};
use crate::disk::{Disk, HostError};

/// Blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Byte of the guest's file where it begins.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What the host said; `None`: the bytes are not those that were written.
    pub host: Option<HostError>,
}

/// What [`Volume::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Blocks of the guest's file that hold data and are intact.
    pub intact: u64,
    /// Blocks that were never written.
    pub holes: u64,
    /// What is not intact, ascending.
    pub damaged: Vec<Damage>,
}

impl Volume {
    /// Reads and authenticates every block of the guest's file, and the map above it.
    /// `progress(done, all)` is called in bytes of the file now and then.
    pub async fn verify<D: Disk>(
        &self,
        disk: &D,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> VerifyReport {
        let mut report = VerifyReport::default();
        let size = self.size();
        for block in 0..size.div_ceil(BLOCK_BYTES) {
            if block % 1024 == 0 {
                progress(block * BLOCK_BYTES, size);
            }
            let bad = match self.resolve(disk, block).await {
                Ok(ptr) if ptr.is_null() => {
                    report.holes += 1;
                    continue;
                }
                Ok(ptr) => {
                    self.read_sealed(disk, ptr.place(), &ptr, Kind::Data, 0, block).await.err()
                }
                Err(bad) => Some(bad),
            };
            let Some(bad) = bad else {
                report.intact += 1;
                continue;
            };
            let host = match bad {
                Bad::Host(error) => Some(error),
                Bad::Forged => None,
            };
            let offset = block * BLOCK_BYTES;
            match report.damaged.last_mut() {
                Some(last) if last.offset + last.length == offset && last.host == host => {
                    last.length += BLOCK_BYTES;
                }
                _ => report.damaged.push(Damage { offset, length: BLOCK_BYTES, host }),
            }
        }
        progress(size, size);
        report
    }
}
