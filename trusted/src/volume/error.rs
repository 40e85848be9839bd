//! Why a volume refused, grouped by who has to act.

use core::fmt;

use crate::{
    counter::CounterError,
    disk::{BLOCK, HostError},
    errno::Errno,
    platform::NoEntropy,
};

/// Why formatting, opening or verifying a volume was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeError {
    /// The caller asked for something a volume cannot be: choose another size.
    Misuse(Misuse),
    /// Neither copy of the static header is one of this format: not a volume, or its header is
    /// destroyed. Nothing is ever formatted in its place.
    NotAVolume,
    /// The volume was written by another version of the format.
    UnsupportedVersion {
        /// The version found in the header.
        found: u32,
    },
    /// The volume uses features that this build does not know.
    UnsupportedFeatures {
        /// The unknown incompatible feature bits.
        bits: u64,
    },
    /// No key slot opens with the key that was given.
    WrongKey,
    /// The header opens with the key, but a part of it was altered.
    DamagedHeader,
    /// Neither superblock is authentic: the volume cannot be opened.
    DamagedSuperblock,
    /// A number in an authentic structure is outside what the format allows.
    BadGeometry,
    /// The host file is shorter than the volume it holds.
    HostFileShort {
        /// Blocks of 4096 bytes the volume needs.
        needed: u64,
        /// Blocks the host file has.
        found: u64,
    },
    /// The journal ends before a block that was durable: it was damaged, cut off or rolled back.
    /// Open with `accept_loss` to go on with what is left, or read-only to look first.
    JournalLost {
        /// Last journal block that can still be followed.
        tip: u64,
        /// Journal block that is known to have been durable.
        durable: u64,
    },
    /// A newer superblock was durable than the one found: damage or a rollback.
    SuperblockLost {
        /// Generation found.
        found: u64,
        /// Generation known to have been durable.
        durable: u64,
    },
    /// A block of the guest's file, needed to go on, is not the one that was written.
    Unreadable {
        /// Where it begins in the guest's file, in bytes.
        offset: u64,
    },
    /// The volume is bound to a monotonic counter, and none was given: without it the newest state
    /// cannot be told from an old one.
    CounterNeeded {
        /// The counter's sequence number as far as the volume knows.
        sequence: u64,
    },
    /// A counter was given, and the volume is bound to none: a volume that never was, or a state of
    /// before it was. Bind it explicitly.
    NotBound,
    /// The counter holds nothing, but the volume knows it at this sequence number: it is another
    /// counter, or was lost. Adopt the volume explicitly if it is known to be the newest.
    CounterEmpty {
        /// The counter's sequence number as far as the volume knows.
        sequence: u64,
    },
    /// The counter knows another state than the one found: an old state of the volume was put in
    /// place of the newest, or somebody went on from a copy. Adopt it explicitly to accept that.
    RolledBack {
        /// The counter's sequence number as far as the volume knows.
        found: u64,
        /// The counter's sequence number.
        counter: u64,
    },
    /// The directory's index records another state of this file than the one found: an old state of
    /// the file was put in its place, or the index is an old one.
    NotAsRecorded {
        /// Number of the record as far as the file knows.
        found: u64,
        /// Number of the record in the index; 0 for none.
        recorded: u64,
    },
    /// Another writer moved the counter while this one was at work on the same volume or on a copy
    /// of it: the other goes on, this one ends.
    CounterLost,
    /// The counter gave no answer that could be used.
    Counter(CounterError),
    /// The host failed to read or write a block of 4096 bytes.
    Host {
        /// Place of the block in the host file.
        place: u64,
        /// What the host said.
        error: HostError,
    },
    /// The host's flush failed: nothing written since can be trusted to be durable.
    Flush(HostError),
    /// The platform gave no randomness.
    NoEntropy,
    /// A shrink would cut off data of the guest: remove it first. Nothing was changed.
    DataInTheWay {
        /// First byte of the guest's file, from the new size on, that holds data.
        offset: u64,
    },
    /// The work needs a whole volume, and this part of it does not authenticate.
    Damaged {
        /// Byte of the guest's file where it lies.
        offset: u64,
    },
    /// The table of snapshots does not authenticate, or holds numbers that it cannot.
    DamagedSnapshots,
    /// The work needs a volume that can be written and closed cleanly.
    NotWritable,
    /// It is another volume, or an older state, than the one that was given away.
    NotWhatWasLeft,
}

/// What the caller has to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misuse {
    /// The size is zero or not a multiple of 4096 bytes.
    SizeNotWholeBlocks,
    /// The size is above what the format can address (64 TiB).
    TooLarge,
    /// There is no such key slot, or none is free.
    NoSlot,
    /// It is the last key slot: without one nobody could open the volume.
    LastSlot,
    /// A snapshot's name has 1 to 48 printable ASCII characters and no blank.
    SnapshotName,
    /// There is a snapshot of this name already.
    SnapshotExists,
    /// There is no snapshot of this name.
    NoSnapshot,
    /// There are as many snapshots as there can be.
    TooManySnapshots,
    /// A volume with snapshots cannot shrink, nor be sealed anew: delete them first.
    HasSnapshots,
    /// No snapshot is made while a rekey is on its way: finish it first.
    Rekeying,
    /// Work for a passphrase outside what [`super::Stretch`] allows, or more memory than there is.
    Stretch,
}

impl VolumeError {
    /// The errno a guest sees for it.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Misuse(_) => Errno::EINVAL,
            Self::WrongKey => Errno::EKEYREJECTED,
            Self::Host { error: HostError::Errno(number), .. }
            | Self::Flush(HostError::Errno(number)) => Errno(*number),
            _ => Errno::EIO,
        }
    }
}

impl From<NoEntropy> for VolumeError {
    fn from(_: NoEntropy) -> Self {
        Self::NoEntropy
    }
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misuse(Misuse::SizeNotWholeBlocks) => {
                write!(f, "the volume's size must be a non-zero multiple of {BLOCK} bytes")
            }
            Self::Misuse(Misuse::TooLarge) => {
                f.write_str("the volume's size is above what the format can address (64 TiB)")
            }
            Self::Misuse(Misuse::NoSlot) => f.write_str("there is no such key slot"),
            Self::Misuse(Misuse::LastSlot) => {
                f.write_str("the last key slot must stay: nobody could open the volume without it")
            }
            Self::Misuse(Misuse::SnapshotName) => {
                f.write_str("a snapshot's name has 1 to 48 printable ASCII characters, no blanks")
            }
            Self::Misuse(Misuse::SnapshotExists) => {
                f.write_str("there is a snapshot of this name already")
            }
            Self::Misuse(Misuse::NoSnapshot) => f.write_str("there is no snapshot of this name"),
            Self::Misuse(Misuse::TooManySnapshots) => {
                f.write_str("there are as many snapshots as there can be")
            }
            Self::Misuse(Misuse::HasSnapshots) => {
                f.write_str("a volume with snapshots can neither shrink nor be rekeyed")
            }
            Self::Misuse(Misuse::Rekeying) => {
                f.write_str("a rekey of the volume is on its way; no snapshot is made meanwhile")
            }
            Self::Misuse(Misuse::Stretch) => {
                f.write_str("the work for the passphrase is out of bounds or needs too much memory")
            }
            Self::NotAVolume => f.write_str(
                "not a Postern volume: neither copy of the header is recognised (nothing was \
                 changed; format it explicitly if it should become one)",
            ),
            Self::UnsupportedVersion { found } => {
                write!(
                    f,
                    "the volume has format version {found}, which this build does not read; use a \
                     newer build"
                )
            }
            Self::UnsupportedFeatures { bits } => write!(
                f,
                "the volume uses features unknown to this build (incompatible bits {bits:#x}); \
                 use a newer build"
            ),
            Self::WrongKey => f.write_str("no key slot of the volume opens with this key"),
            Self::DamagedHeader => f.write_str(
                "the header opens with this key, but both copies were altered after they were \
                 written",
            ),
            Self::DamagedSuperblock => {
                f.write_str("no superblock is authentic: the volume's root is damaged or lost")
            }
            Self::BadGeometry => {
                f.write_str("an authentic structure holds numbers outside the format's bounds")
            }
            Self::HostFileShort { needed, found } => write!(
                f,
                "the host file is too short: the volume needs {needed} blocks of {BLOCK} bytes, \
                 the file has {found}"
            ),
            Self::JournalLost { tip, durable } => write!(
                f,
                "the journal ends at block {tip}, but block {durable} was durable: {} journal \
                 blocks are damaged, cut off or rolled back (accept the loss explicitly, or open \
                 read-only)",
                durable.saturating_sub(*tip)
            ),
            Self::SuperblockLost { found, durable } => write!(
                f,
                "the superblock has generation {found}, but generation {durable} was durable: \
                 damage or a rollback (accept the loss explicitly, or open read-only)"
            ),
            Self::Unreadable { offset } => {
                write!(f, "the guest's file is damaged at byte {offset}")
            }
            Self::CounterNeeded { sequence } => write!(
                f,
                "the volume is bound to a monotonic counter (at {sequence}) and none was given"
            ),
            Self::NotBound => f.write_str(
                "the volume is not bound to a monotonic counter: it never was, or this is a state \
                 of before it was",
            ),
            Self::CounterEmpty { sequence } => write!(
                f,
                "the counter holds nothing, but the volume has known it at {sequence}: it is \
                 another counter, or was lost"
            ),
            Self::RolledBack { found, counter } => write!(
                f,
                "this is not the newest state of the volume: the counter is at {counter}, the \
                 volume has known it at {found}; an old copy was put in its place, or somebody \
                 went on from a copy"
            ),
            Self::NotAsRecorded { found, recorded } => write!(
                f,
                "this is not the state of the file that the directory's index records (record \
                 {recorded}; the file has known record {found}): an old copy of the file or of the \
                 index was put in its place"
            ),
            Self::CounterLost => f.write_str(
                "another writer has moved the counter: the same volume or a copy of it is in use \
                 elsewhere, and this one must end",
            ),
            Self::Counter(error) => write!(f, "{error}; the volume's freshness cannot be told"),
            Self::Host { place, error } => {
                write!(f, "the host failed on block {place} of the file: ")?;
                host(*error, f)
            }
            Self::Flush(error) => {
                f.write_str("the host failed to flush the file: ")?;
                host(*error, f)
            }
            Self::NoEntropy => f.write_str("the platform gave no randomness; nothing was sealed"),
            Self::DataInTheWay { offset } => {
                write!(f, "the guest's file holds data at byte {offset}, beyond the new size")
            }
            Self::Damaged { offset } => {
                write!(f, "the guest's file is damaged at byte {offset}, where it has to be moved")
            }
            Self::DamagedSnapshots => f.write_str("the table of snapshots is damaged"),
            Self::NotWritable => {
                f.write_str("the volume can only be read, or could not be closed cleanly")
            }
            Self::NotWhatWasLeft => f.write_str(
                "the volume came back in an older state than it was handed over in, or another \
                 volume came in its place: the host has exchanged it",
            ),
        }
    }
}

fn host(error: HostError, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match error {
        HostError::Errno(number) => write!(f, "{}", Errno(number)),
        HostError::Gone => f.write_str("the host is gone"),
    }
}

impl core::error::Error for VolumeError {}

/// What the host's answer means to the guest.
pub(crate) fn guest_errno(error: HostError) -> Errno {
    match error {
        HostError::Errno(28) => Errno::ENOSPC,
        HostError::Errno(_) | HostError::Gone => Errno::EIO,
    }
}
