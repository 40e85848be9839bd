//! The times of the guest's file, part of the sealed state.
//!
//! Holds: what a superblock says of them is what they were when it was made; a journal block says
//! when the content was last changed before it was sealed, so that a crash loses no more of them
//! than of the content. Does not hold: a time that was only set (utimensat(2)) is durable with the
//! next superblock.

use core::sync::atomic::{AtomicI64, Ordering};

use super::{
    Volume,
    layout::{get_array, put},
};
use crate::disk::Block;

/// Times of a file, in nanoseconds since 1970; 0 is one that nobody has told yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Last access.
    pub accessed: i64,
    /// Last change of the content.
    pub modified: i64,
    /// Last change of anything.
    pub changed: i64,
}

impl Times {
    /// Where they are in a superblock.
    const AT: usize = 464;

    pub(super) fn encode(&self, b: &mut Block) {
        for (n, time) in [self.accessed, self.modified, self.changed].into_iter().enumerate() {
            put(b, Self::AT + 8 * n, &time.to_le_bytes());
        }
    }

    pub(super) fn decode(b: &Block) -> Self {
        let [accessed, modified, changed] =
            [0, 8, 16].map(|n| i64::from_le_bytes(get_array(b, Self::AT + n)));
        Self { accessed, modified, changed }
    }

    /// With the last change of the content that a journal block tells of.
    pub(super) fn after(self, modified: Option<i64>) -> Self {
        match modified.filter(|modified| *modified != 0) {
            Some(modified) if modified != self.modified => {
                Self { modified, changed: self.changed.max(modified), ..self }
            }
            _ => self,
        }
    }
}

/// The times of an open volume.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    accessed: AtomicI64,
    modified: AtomicI64,
    changed: AtomicI64,
}

// Relaxed throughout: each time stands for itself.
impl Kept {
    pub(crate) fn new(times: Times) -> Self {
        let kept = Self::default();
        kept.set(times);
        kept
    }

    pub(crate) fn get(&self) -> Times {
        Times {
            accessed: self.accessed.load(Ordering::Relaxed),
            modified: self.modified(),
            changed: self.changed.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn modified(&self) -> i64 {
        self.modified.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, times: Times) {
        self.accessed.store(times.accessed, Ordering::Relaxed);
        self.modified.store(times.modified, Ordering::Relaxed);
        self.changed.store(times.changed, Ordering::Relaxed);
    }
}

impl Volume {
    /// The times of the guest's file.
    #[must_use]
    pub fn times(&self) -> Times {
        self.times.get()
    }

    /// Sets the times of the guest's file; they are durable with the next superblock.
    pub fn set_times(&self, times: Times) {
        self.times.set(times);
    }

    /// The guest changes the content at `now_ns` since 1970. Comes before the change itself, so
    /// that what makes the change durable finds it.
    pub fn touch(&self, now_ns: i64) {
        self.times.modified.store(now_ns, Ordering::Relaxed);
        self.times.changed.store(now_ns, Ordering::Relaxed);
    }
}
