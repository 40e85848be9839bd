//! Layout of the port: the memory that an enclave lane and the daemon share.
//!
//! ```text
//! byte 0      header   64 words, written by the enclave before attach, then constant
//! 4096        cursors  one 64-byte line for each word that moves
//! 8192        submission ring   entries x 64 bytes
//!             completion ring   entries x 32 bytes
//!             delivered stamps  entries x  8 bytes
//! data_offset transfer area, 4096-aligned
//! ```
//!
//! Only aligned 8-byte words: a narrower enclave store to host memory would need VERW and fences
//! (INTEL-SA-00615), reads must be 8-byte aligned (INTEL-SA-00657). Both sides keep private copies
//! of the cursors they own, load each shared word once and decide on the copy.
//!
//! Request ids are `generation << 32 | index` with `index < entries`. An index is in flight at most
//! once, so neither ring can overflow: in flight <= entries.

/// First header word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"POSTERN1");

/// Word index (8-byte units from the start of the region) of each header field.
pub mod header {
    /// [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// Layout version, 1.
    pub const VERSION: usize = 1;
    /// Ring entries, a power of two, 2..=4096; the same for both rings.
    pub const ENTRIES: usize = 2;
    /// Byte offset of the transfer area, a multiple of 4096.
    pub const DATA_OFFSET: usize = 3;
    /// Length of the transfer area in bytes, a multiple of 4096.
    pub const DATA_BYTES: usize = 4;
}

/// Word index of each moving word; every one on a 64-byte line of its own.
pub mod cursor {
    /// Submissions published since attach. Writer: enclave (Release).
    pub const SQ_PUBLISHED: usize = 512;
    /// Submissions taken since attach. Writer: daemon (Release).
    pub const SQ_TAKEN: usize = 520;
    /// Completions published since attach. Writer: daemon (Release).
    pub const CQ_PUBLISHED: usize = 528;
    /// Completions taken since attach. Writer: enclave (Release).
    pub const CQ_TAKEN: usize = 536;
    /// Non-zero while the daemon sleeps: ring its doorbell after publishing. Writer: daemon.
    /// Both sides: store own word, SeqCst fence, re-read the other's.
    pub const DAEMON_SLEEPS: usize = 544;
    /// Non-zero while a driver thread of the enclave sleeps: ring doorbell A. Writer: enclave.
    pub const DRIVER_SLEEPS: usize = 552;
    /// Non-zero while only the service thread of the enclave wants waking: ring doorbell B when
    /// `DRIVER_SLEEPS` is zero. Writer: enclave.
    pub const SERVICE_SLEEPS: usize = 560;
    /// Requests the daemon has taken and not published the completion of. Writer: daemon.
    pub const IN_FLIGHT: usize = 568;
    /// Changes when a lease of the session is asked for or lost: ask with `postern_lease`.
    /// Writer: daemon.
    pub const LEASES: usize = 576;
}

/// Byte offset of the submission ring.
pub const SQ_OFFSET: usize = 8192;
/// Words in a submission descriptor.
pub const SQE_WORDS: usize = 8;
/// Words in a completion.
pub const CQE_WORDS: usize = 4;
/// Largest number of ring entries.
pub const MAX_ENTRIES: usize = 4096;
/// Largest length of one request in bytes.
pub const MAX_REQUEST_BYTES: u64 = 1 << 20;

/// Largest length of one [`op::DISCARD`] in bytes.
pub const MAX_DISCARD_BYTES: u64 = 128 << 20;

/// Operations of a descriptor.
pub mod op {
    /// Read `length` bytes of the host file into the transfer area.
    pub const READ: u64 = 1;
    /// Write `length` bytes of the transfer area to the host file.
    pub const WRITE: u64 = 2;
    /// fdatasync of the host file. Offset, length and data are zero.
    pub const FLUSH: u64 = 3;
    /// Gives the space of `length` bytes of the host file back to the host: what is read there
    /// afterwards is anything. Data is zero. Only with [`crate::FEATURE_DISCARD`].
    pub const DISCARD: u64 = 4;
}

/// A submission: what the enclave asks of the host.
///
/// Words: 0 `id`; 1 `op | handle << 32`; 2 `offset`; 3 `length`; 4 `data`; 5 `submitted_ns`;
/// 6 `enqueued_ns`; 7 `guest` (a number that ties the host requests of one guest request together).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submission {
    /// Request id.
    pub id: u64,
    /// One of [`op`].
    pub op: u32,
    /// Host file, from `postern_open`.
    pub handle: u32,
    /// Byte offset in the host file, a multiple of 4096.
    pub offset: u64,
    /// Length in bytes, a multiple of 4096, at most [`MAX_REQUEST_BYTES`]; of a discard at most
    /// [`MAX_DISCARD_BYTES`].
    pub length: u64,
    /// Byte offset of the data from the start of the region, a multiple of 4096.
    pub data: u64,
    /// Claimed: when the guest's call came in, CLOCK_MONOTONIC nanoseconds; 0 if the volume asks
    /// for itself (journal, map).
    pub submitted_ns: u64,
    /// Claimed: when the descriptor was published.
    pub enqueued_ns: u64,
    /// Claimed: number of the guest request this belongs to; 0 for the volume's own.
    pub guest: u64,
}

impl Submission {
    /// As ring words.
    #[must_use]
    pub const fn to_words(self) -> [u64; SQE_WORDS] {
        [
            self.id,
            self.op as u64 | (self.handle as u64) << 32,
            self.offset,
            self.length,
            self.data,
            self.submitted_ns,
            self.enqueued_ns,
            self.guest,
        ]
    }

    /// From ring words. Any bit pattern is a value; nothing is checked here.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn from_words(words: [u64; SQE_WORDS]) -> Self {
        Self {
            id: words[0],
            op: words[1] as u32,
            handle: (words[1] >> 32) as u32,
            offset: words[2],
            length: words[3],
            data: words[4],
            submitted_ns: words[5],
            enqueued_ns: words[6],
            guest: words[7],
        }
    }
}

/// A completion: what the host claims to have done.
///
/// Words: 0 `id`; 1 `result` as a two's complement number; 2 `reaped_ns`; 3 `published_ns`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Request id.
    pub id: u64,
    /// Bytes done, or a negative errno (-4095..=-1).
    pub result: i64,
    /// When the daemon reaped the completion, CLOCK_MONOTONIC nanoseconds.
    pub reaped_ns: u64,
    /// When the daemon published it.
    pub published_ns: u64,
}

impl Completion {
    /// As ring words.
    #[must_use]
    pub const fn to_words(self) -> [u64; CQE_WORDS] {
        [self.id, self.result.cast_unsigned(), self.reaped_ns, self.published_ns]
    }

    /// From ring words. Any bit pattern is a value; nothing is checked here.
    #[must_use]
    pub const fn from_words(words: [u64; CQE_WORDS]) -> Self {
        Self {
            id: words[0],
            result: words[1].cast_signed(),
            reaped_ns: words[2],
            published_ns: words[3],
        }
    }
}

/// Where everything lies for a number of entries and a length of the transfer area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Ring entries.
    pub entries: usize,
    /// Byte offset of the completion ring.
    pub cq_offset: usize,
    /// Byte offset of the delivered stamps.
    pub stamps_offset: usize,
    /// Byte offset of the transfer area.
    pub data_offset: usize,
    /// Length of the transfer area in bytes.
    pub data_bytes: usize,
}

impl Geometry {
    /// The layout for `entries` ring entries (a power of two, 2..=[`MAX_ENTRIES`]) and
    /// `data_bytes` (a multiple of 4096, below 2^40) of transfer area; `None` if out of range.
    #[must_use]
    pub const fn new(entries: usize, data_bytes: usize) -> Option<Self> {
        if !entries.is_power_of_two() || entries < 2 || entries > MAX_ENTRIES {
            return None;
        }
        if data_bytes == 0 || !data_bytes.is_multiple_of(4096) || data_bytes >= 1 << 40 {
            return None;
        }
        let cq_offset = SQ_OFFSET + entries * SQE_WORDS * 8;
        let stamps_offset = cq_offset + entries * CQE_WORDS * 8;
        let data_offset = (stamps_offset + entries * 8).next_multiple_of(4096);
        Some(Self { entries, cq_offset, stamps_offset, data_offset, data_bytes })
    }

    /// Length of the whole region in bytes.
    #[must_use]
    pub const fn region_bytes(&self) -> usize {
        self.data_offset + self.data_bytes
    }

    /// Word index of submission descriptor number `n` (counted since attach).
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn sqe_word(&self, n: u64) -> usize {
        SQ_OFFSET / 8 + (n as usize & (self.entries - 1)) * SQE_WORDS
    }

    /// Word index of completion number `n` (counted since attach).
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn cqe_word(&self, n: u64) -> usize {
        self.cq_offset / 8 + (n as usize & (self.entries - 1)) * CQE_WORDS
    }

    /// Word index of the delivered stamp of request index `index`: the enclave's claim of when it
    /// took the completion of the last request with this index. Final for the daemon once it has
    /// seen `CQ_TAKEN` pass that completion; overwritten by the next use of the index.
    #[must_use]
    pub const fn stamp_word(&self, index: usize) -> usize {
        self.stamps_offset / 8 + (index & (self.entries - 1))
    }
}

const _: () = assert!(core::mem::size_of::<[u64; SQE_WORDS]>() == 64);
const _: () = assert!(core::mem::size_of::<[u64; CQE_WORDS]>() == 32);
const _: () = assert!(cursor::SQ_PUBLISHED * 8 == 4096 && cursor::LEASES * 8 + 64 <= SQ_OFFSET);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_stamps_and_data_do_not_overlap() {
        for entries in [2, 64, 512, 4096] {
            let g = Geometry::new(entries, 1 << 20).unwrap();
            assert_eq!(g.sqe_word(entries as u64), g.sqe_word(0));
            assert_eq!(g.sqe_word(entries as u64 - 1) + SQE_WORDS, g.cq_offset / 8);
            assert_eq!(g.cqe_word(entries as u64 - 1) + CQE_WORDS, g.stamps_offset / 8);
            assert!(g.stamp_word(entries - 1) * 8 + 8 <= g.data_offset);
            assert_eq!(g.data_offset % 4096, 0);
        }
        assert!(Geometry::new(3, 4096).is_none());
        assert!(Geometry::new(8192, 4096).is_none());
        assert!(Geometry::new(64, 100).is_none());
    }

    #[test]
    fn words_and_structs_are_two_views_of_the_same() {
        let s = Submission {
            id: 1 << 32 | 7,
            op: 2,
            handle: 9,
            offset: 4096,
            length: 8192,
            data: 65536,
            submitted_ns: 5,
            enqueued_ns: 6,
            guest: 77,
        };
        assert_eq!(s.to_words()[1], 2 | 9 << 32);
        assert_eq!(Submission::from_words(s.to_words()), s);
        let c = Completion { id: 3, result: -5, reaped_ns: 1, published_ns: 2 };
        assert_eq!(c.to_words()[1], u64::MAX - 4);
        assert_eq!(Completion::from_words(c.to_words()), c);
    }
}
