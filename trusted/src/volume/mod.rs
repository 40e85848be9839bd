//! The sealed volume.

use alloc::string::String;

use crate::{
    disk::Disk,
    errno::Errno,
    platform::Buffer,
};

/// What a user who holds a key presents to open a slot.
pub struct SlotKey(/* zeroized 32 bytes */ pub(crate) [u8; 32]);

/// How a volume is made.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Bytes the guest may store: capacity and first size of the guest's file. Multiple of 4096.
    pub size: u64,
}

/// How a volume is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Never write to the host.
    pub read_only: bool,
    /// Go on although evidence says that the tail of the journal was lost or rolled back.
    pub accept_loss: bool,
}

/// What opening found and did.
#[derive(Clone, Debug, Default)]
pub struct OpenReport {
    /// The volume was closed cleanly.
    pub clean: bool,
    /// Journal blocks replayed.
    pub journal_blocks: u64,
    /// Block records applied from them.
    pub records_applied: u64,
    /// Unsynced records whose data had not reached the host.
    pub records_skipped: u64,
}

/// Why the volume refused. Grouped by who has to act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeError {
    /// placeholder
    Placeholder(String),
}

/// Background work that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chore {
    /// Publish records to the journal.
    Publish,
    /// Flush (internal, bounds what a power cut can take).
    Flush,
    /// Write a checkpoint.
    Checkpoint,
}

/// An open volume, shared by all processes and threads of one enclave.
pub struct Volume {}

#[allow(unused_variables, clippy::todo, clippy::unused_async, missing_docs, clippy::missing_errors_doc)]
impl Volume {
    /// Blocks the host file must have for a volume of `size` bytes.
    pub fn host_blocks(size: u64) -> u64 { todo!() }
    pub async fn format<D: Disk>(disk: &D, key: &SlotKey, options: &FormatOptions) -> Result<(), VolumeError> { todo!() }
    pub async fn open<D: Disk>(disk: &D, key: &SlotKey, options: &OpenOptions) -> Result<(Self, OpenReport), VolumeError> { todo!() }
    /// Reads up to `buffer.len()` bytes at `offset`; short at the end of the file.
    pub async fn read<D: Disk>(&self, disk: &D, offset: u64, buffer: &impl Buffer) -> Result<usize, Errno> { todo!() }
    pub async fn write<D: Disk>(&self, disk: &D, offset: u64, buffer: &impl Buffer) -> Result<usize, Errno> { todo!() }
    pub async fn append<D: Disk>(&self, disk: &D, buffer: &impl Buffer) -> Result<usize, Errno> { todo!() }
    /// fsync/fdatasync: everything completed before the call is durable when it returns Ok.
    pub async fn sync<D: Disk>(&self, disk: &D) -> Result<(), Errno> { todo!() }
    pub async fn truncate<D: Disk>(&self, disk: &D, size: u64) -> Result<(), Errno> { todo!() }
    pub async fn punch<D: Disk>(&self, disk: &D, offset: u64, length: u64) -> Result<(), Errno> { todo!() }
    pub async fn close<D: Disk>(&self, disk: &D) -> Result<(), Errno> { todo!() }
    pub fn due(&self, now_ns: u64) -> Option<Chore> { todo!() }
    pub async fn run_chore<D: Disk>(&self, disk: &D, chore: Chore) -> Result<(), Errno> { todo!() }
    pub fn size(&self) -> u64 { todo!() }
    pub fn capacity(&self) -> u64 { todo!() }
    pub fn is_hole(&self, offset: u64, length: u64) -> bool { todo!() }
}
