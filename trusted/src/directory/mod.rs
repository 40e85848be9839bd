//! The protected directory's names: one tree of directories and files, each file a sealed volume of
//! its own.
//!
//! Pure state without I/O: [`Table`] answers as Linux does on ext4, `image` is what it looks like
//! in the index volume, [`file_keys`] bind a file's volume to its id.
//!
//! Holds: every node but an orphan is reached from the root by one path; a name is 1 to 255 bytes
//! without `/` and NUL; no two files have one id; bytes of any content decode to a table of which
//! this holds, or to an error, without a panic.

mod image;
mod rename;
mod table;
// With proptest, which does not build for an enclave.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests;

pub use image::{BadImage, IMAGE_BLOCK, INDEX_BYTES, SLOT_BYTES, choose, slot_offset};
pub use rename::Rename;
pub use table::{Attributes, Kind, NAME_MAX, Node, ROOT, Table};

use crate::{
    disk::Disk,
    volume::{OpenOptions, OpenReport, SlotKey, Volume, VolumeError},
};

/// Random number that names a file's volume on the host.
pub type FileId = [u8; 16];

/// What the host calls the index volume of a directory.
pub const INDEX_NAME: &str = "index";

const FILE_KEY: &[u8] = b"postern/1 directory file";

/// What opens the volume of a file: a volume that the host puts under another file's name does not
/// open.
pub struct FileKeys {
    /// Its key.
    pub now: SlotKey,
    /// Its key before a rekey of the directory that is not finished: it opens files that the rekey
    /// has not come to.
    pub former: Option<SlotKey>,
}

/// The keys of the volume of file `id` in the directory whose index volume is `index`.
#[must_use]
pub fn file_keys(index: &Volume, id: &FileId) -> FileKeys {
    let (now, former) = (index.derive_key(id, FILE_KEY), index.derive_former_key(id, FILE_KEY));
    FileKeys { now, former }
}

impl FileKeys {
    /// Opens the file's volume.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub async fn open<D: Disk>(
        &self,
        disk: &D,
        options: &OpenOptions,
    ) -> Result<(Volume, OpenReport), VolumeError> {
        match (Volume::open(disk, &self.now, options).await, &self.former) {
            (Err(VolumeError::WrongKey), Some(former)) => Volume::open(disk, former, options).await,
            (opened, _) => opened,
        }
    }
}

/// What the host calls the volume of file `id`: 32 lower-case hexadecimal digits.
#[must_use]
pub fn host_name(id: &FileId) -> alloc::string::String {
    use core::fmt::Write as _;
    let mut name = alloc::string::String::with_capacity(32);
    for byte in id {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}
