//! A monotonic counter outside the host's reach, which tells an old state of a volume from its
//! newest one.
//!
//! A counter holds one [`Record`] and changes it by compare-and-swap alone. A bare number would not
//! do: counted before the volume is written, an honest crash looks like a rollback; counted after
//! it, two different states can have the same number. The digest says which state the number means.
//!
//! What an implementation promises: [`Counter::swap`] that answered [`Swapped::Done`] is durable
//! and seen by every later call of anyone; a swap happens wholly or not at all, and only if the
//! counter holds what the caller expects at that moment. After an error it may have happened,
//! or happen later. A seam for hardware: an NV index, a ledger or a network of enclaves fits if it
//! can hold 40 bytes and compare them.
//!
//! Does not hold: anything, if the host can write the counter or answer in its name. Who runs the
//! counter is trusted for the freshness of volumes, not with any content.

use alloc::boxed::Box;
use core::{fmt, future::Future, pin::Pin};

/// What a counter holds: which state of a volume is the newest that was registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Counts the moves, from 1.
    pub sequence: u64,
    /// Names the state: a hash of authentic bytes of the volume, no secret.
    pub digest: [u8; 32],
}

impl Record {
    /// Bytes of a record.
    pub const BYTES: usize = 40;

    /// The sequence number, little endian, and the digest.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest);
        bytes
    }

    /// What [`Self::encode`] made; every 40 bytes are a record.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let (mut sequence, mut digest) = ([0; 8], [0; 32]);
        sequence.copy_from_slice(&bytes[..8]);
        digest.copy_from_slice(&bytes[8..]);
        Self { sequence: u64::from_le_bytes(sequence), digest }
    }
}

/// How a swap ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// The counter holds the new record.
    Done,
    /// The counter did not hold what was expected, but this; nothing was changed.
    Lost(Option<Record>),
}

/// Why a counter gave no answer. A swap may have happened all the same, or still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CounterError {
    /// It did not answer in time.
    Unreachable,
    /// It refuses the caller: credentials, certificate, permission.
    Refused,
    /// What it holds or says is no record.
    Malformed,
    /// It has no room for a first record; it holds what it held.
    Full,
}

impl fmt::Display for CounterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "the counter does not answer",
            Self::Refused => "the counter refuses access",
            Self::Malformed => "the counter holds something that is no record",
            Self::Full => "there is no room for the record",
        })
    }
}

impl core::error::Error for CounterError {}

/// An answer that takes its time.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, CounterError>> + Send + 'a>>;

/// The counter of one volume.
pub trait Counter: Send + Sync {
    /// What it holds now; `None` if it never held anything. Linearizable: no cached or lagging
    /// copy may answer.
    fn load(&self) -> Answer<'_, Option<Record>>;

    /// Changes it from `old` (`None`: from nothing) to `new`, or not at all.
    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped>;

    /// Of a *batched* counter: a record inside the same enclave, whose moves become durable later,
    /// many at a time. Nobody else can move such a one. No swap ends while a batch is being
    /// written, so that no third record can be found after a power cut.
    fn lasting(&self) -> Option<Lasting> {
        None
    }
}

/// What a batched counter may hold after a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lasting {
    /// The durable record.
    pub durable: Option<Record>,
    /// The newest one; the same if it is durable.
    pub newest: Option<Record>,
}

/// How often the counter moves: what a rollback can take back unnoticed, against what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moves {
    /// At each opening for writing and each clean close. Unnoticed: what was written since the
    /// volume was opened last.
    Open,
    /// At each checkpoint too, in the background. Unnoticed: what was written since the last one.
    #[default]
    Checkpoint,
    /// Before each sync is acknowledged too: no acknowledged sync is taken back unnoticed.
    Sync,
}
