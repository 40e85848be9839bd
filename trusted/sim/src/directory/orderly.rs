//! Which files of a directory were put away in order: closed, or left with their journal alone, by
//! whoever had them last. Nobody has written to such a one since, so opening it need not search its
//! journal for what came after (`OpenOptions::put_away`).
//!
//! The index stands for the runs before: one that was closed cleanly says that all files were put
//! away. So it is not closed cleanly where one could not be.
//!
//! Holds: a file counts as put away only if the index was found cleanly closed and this run has not
//! opened it, or this run has put it away since.

use std::collections::BTreeMap;

use super::Directory;

/// What is known of the files.
pub(super) struct Orderly {
    /// All files were, before this run.
    before: bool,
    /// Those that this run has opened.
    since: BTreeMap<u64, bool>,
    /// One could not be put away.
    astray: bool,
}

impl Orderly {
    /// `before`: the index was found cleanly closed.
    pub(super) const fn new(before: bool) -> Self {
        Self { before, since: BTreeMap::new(), astray: false }
    }

    fn is_put_away(&self, inode: u64) -> bool {
        self.since.get(&inode).copied().unwrap_or(self.before)
    }

    /// A file was put away.
    pub(super) fn put_away(&mut self, inode: u64) {
        self.since.insert(inode, true);
    }

    /// A file was removed.
    pub(super) fn forget(&mut self, inode: u64) {
        self.since.remove(&inode);
    }
}

impl Directory {
    /// Whether a file was put away in order.
    pub(crate) fn is_put_away(&self, inode: u64) -> bool {
        self.state.lock().as_ref().is_some_and(|loaded| loaded.orderly.is_put_away(inode))
    }

    /// A file is about to be opened; answers whether it had been put away in order.
    pub(crate) fn take_out(&self, inode: u64) -> bool {
        let mut state = self.state.lock();
        let Some(loaded) = state.as_mut() else { return false };
        let was = loaded.orderly.is_put_away(inode);
        loaded.orderly.since.insert(inode, false);
        was
    }

    /// A file that was open could not be put away.
    pub(crate) fn lose_track(&self) {
        if let Some(loaded) = self.state.lock().as_mut() {
            loaded.orderly.astray = true;
        }
    }

    /// Whether all files that this run has opened could be put away again.
    pub(crate) fn is_orderly(&self) -> bool {
        self.state.lock().as_ref().is_none_or(|loaded| !loaded.orderly.astray)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_counts_as_put_away_only_if_nobody_can_have_left_it_otherwise() {
        for before in [false, true] {
            let mut orderly = Orderly::new(before);
            assert_eq!(orderly.is_put_away(2), before);
            orderly.since.insert(2, false);
            assert!(!orderly.is_put_away(2), "it is open, or was when its opener failed");
            orderly.put_away(2);
            assert!(orderly.is_put_away(2));
            assert_eq!(orderly.is_put_away(3), before);
        }
    }
}
