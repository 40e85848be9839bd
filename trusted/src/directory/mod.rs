//! The protected directory's names: one tree of directories and files, each file a sealed volume of
//! its own.
//!
//! Pure state without I/O: [`Table`] answers as Linux does on ext4, `image` is what it looks like
//! in the index volume, [`file_key`] binds a file's volume to its id.
//!
//! Holds: every node but an orphan is reached from the root by one path; a name is 1 to 255 bytes
//! without `/` and NUL; no two files have one id; bytes of any content decode to a table of which
//! this holds, or to an error, without a panic.

mod image;
mod rename;
mod table;
#[cfg(test)]
mod tests;

pub use image::{BadImage, IMAGE_BLOCK, INDEX_BYTES, SLOT_BYTES, choose, slot_offset};
pub use rename::Rename;
pub use table::{Attributes, Kind, NAME_MAX, Node, ROOT, Table};

use crate::volume::{SlotKey, Volume};

/// Random number that names a file's volume on the host.
pub type FileId = [u8; 16];

/// What the host calls the index volume of a directory.
pub const INDEX_NAME: &str = "index";

/// The key of the volume of file `id` in the directory whose index volume is `index`: a volume
/// that the host puts under another file's name does not open.
#[must_use]
pub fn file_key(index: &Volume, id: &FileId) -> SlotKey {
    index.derive_key(id, b"postern/1 directory file")
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
