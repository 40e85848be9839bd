//! The sealed volume: one guest file in one host file that the host can neither read nor change
//! unnoticed.
//!
//! Copy-on-write blocks of 4 KiB under one radix tree that is map and Merkle tree at once, a
//! chained journal, two superblocks. docs/FORMAT.md has the bytes; the modules have the order of
//! things and why: `checkpoint` (the map becomes durable), `sync` (what one flush can do),
//! `recovery` (what is believed at open).
//!
//! Holds whatever the host does: no wrong byte is returned (`EIO` instead), except that a
//! consistent older state of the whole volume, or of its journal's tail, can be told from a power
//! cut only with a monotonic counter (`freshness`); no host answer panics.
//! Holds with an honest host, whatever crashes: each block reads as a version that is not older
//! than its last acknowledged sync, and what a recovery has answered stays.

#[cfg(test)]
macro_rules! canary {
    ($name:ident) => {
        $crate::volume::tests::Canary::$name
    };
}
#[cfg(not(test))]
macro_rules! canary {
    ($name:ident) => {
        ()
    };
}

mod cache;
mod capacity;
mod checkpoint;
mod chores;
mod cipher;
mod core;
mod crypto;
mod delta;
mod discard;
mod epochs;
mod error;
mod format;
mod freshness;
mod front;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod header;
mod jblock;
mod journal;
mod layout;
mod merge;
mod places;
mod ranges;
mod read;
mod records;
mod recovery;
mod rekey;
mod resize;
mod ring_scan;
mod slots;
mod snapshots;
mod space;
mod spacemap;
mod superblock;
mod sync;
#[cfg(test)]
pub(crate) mod tests;
mod times;
mod tree;
mod usage;
mod verify;
mod write;

use ::core::sync::atomic::AtomicBool;
use alloc::{collections::BTreeMap, sync::Arc};

use self::{
    core::Core,
    crypto::{EpochKey, VolumeKey},
    header::Derivation,
    layout::Geometry,
};
use crate::sync::Lock;

pub(crate) use self::crypto::sha256;
pub use self::{
    capacity::Resized,
    chores::{Info, Progress},
    core::Counters,
    error::{Misuse, VolumeError},
    freshness::{CounterUse, Freshness},
    rekey::RekeyReport,
    slots::{SealingPolicy, SealingRequest, SlotInfo, SlotKey, SlotKind, Stretch},
    snapshots::SnapshotInfo,
    times::Times,
    usage::Usage,
    verify::{Damage, SpaceReport, VerifyReport},
};

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
    /// The monotonic counter that tells an old state from the newest. A volume that is bound to
    /// one does not open for writing without it.
    pub counter: Option<CounterUse>,
    /// Bind the volume to no counter any more, whatever state it is in.
    pub unbind: bool,
    /// The caller knows that whoever had it open last put it away ([`Volume::close`],
    /// [`Volume::rest`]): with a batched counter that names what is found, the journal is not
    /// searched beyond its end. For files of a protected directory.
    pub put_away: bool,
    /// How far it had come when the caller had it last: an older state, or another volume, is
    /// refused before anything is written.
    pub after: Option<Progress>,
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
    /// What was durable and is gone: why opening for writing refuses, unless told to accept it.
    pub loss: Option<VolumeError>,
    /// What the monotonic counter says.
    pub freshness: Freshness,
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
    /// Move the monotonic counter.
    Register,
    /// Give freed places back to the host.
    Discard,
}

/// An open volume, shared by all processes and threads of one enclave.
pub struct Volume {
    geometry: Geometry,
    key: VolumeKey,
    /// What keys for other volumes are derived from.
    derivation: Derivation,
    keys: Lock<BTreeMap<u32, Arc<EpochKey>>>,
    core: Lock<Core>,
    times: Arc<times::Kept>,
    /// The guest syncs after each few writes: a hint for writers.
    expecting: AtomicBool,
}
