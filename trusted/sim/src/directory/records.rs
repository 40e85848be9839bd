//! What the index records of each file: which state of its volume is the newest.
//!
//! A record stands in for a monotonic counter of the file. It changes in memory at once, when the
//! file makes a checkpoint or is closed, and becomes durable with the name table. Until then a
//! superblock of the file names the durable record and the newest one, so that the file opens
//! again whichever of them a crash leaves.
//!
//! Holds: of one file no more than two records can be found after a crash when one of its
//! superblocks is written; a record that will never be written is not the newest one any more.

use core::{
    future,
    task::{Context, Poll, Waker},
};
use std::collections::BTreeMap;

use postern_trusted::{
    counter::{Answer, Counter, CounterError, Lasting, Record, Swapped},
    directory::Table,
};

use super::{Loaded, number};

/// Records that are not durable yet, by inode.
#[derive(Default)]
pub(super) struct Records {
    /// What the durable table has in their place.
    durable: BTreeMap<u64, Option<Record>>,
    /// What the table that is being written has.
    flying: Option<BTreeMap<u64, Option<Record>>>,
    /// Superblocks that wait for the table being written.
    waiters: Vec<Waker>,
}

fn newest(table: &Table, inode: u64) -> Option<Record> {
    table.node(inode).and_then(|node| node.record)
}

impl Records {
    /// The table is about to be written.
    pub(super) fn take_off(&mut self, table: &Table) {
        let now = |inode: &u64| (*inode, newest(table, *inode));
        self.flying = Some(self.durable.keys().map(now).collect());
    }

    /// It was written, or will never be. Answers who is to be woken.
    pub(super) fn land(&mut self, table: &mut Table, written: bool) -> Vec<Waker> {
        for (inode, record) in self.flying.take().unwrap_or_default() {
            if !written {
                // Either may be found; nothing newer ever will.
                table.set_record(inode, record);
            } else if newest(table, inode) == record {
                self.durable.remove(&inode);
            } else {
                self.durable.insert(inode, record);
            }
        }
        core::mem::take(&mut self.waiters)
    }

    fn change(&mut self, table: &mut Table, inode: u64, record: Record) {
        self.durable.entry(inode).or_insert_with(|| newest(table, inode));
        table.set_record(inode, Some(record));
    }

    fn lasting(&mut self, table: &Table, inode: u64, cx: &Context<'_>) -> Poll<Lasting> {
        let newest = newest(table, inode);
        let durable = self.durable.get(&inode).copied().unwrap_or(newest);
        let flying = self.flying.as_ref().and_then(|flying| flying.get(&inode));
        if flying.is_some_and(|flying| *flying != newest && *flying != durable) {
            self.waiters.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Lasting { durable, newest })
    }
}

/// The record of one file that is open, or about to be.
pub(crate) struct FileRecord {
    /// The directory's number.
    pub(crate) directory: usize,
    /// The file's inode.
    pub(crate) inode: u64,
}

impl FileRecord {
    /// Looks at the table, which is there as long as the file is open.
    fn with<T>(&self, look: impl FnOnce(&mut Loaded) -> T) -> Result<T, CounterError> {
        let directory = number(self.directory).map_err(|_| CounterError::Unreachable)?;
        directory.state.lock().as_mut().map(look).ok_or(CounterError::Unreachable)
    }
}

impl Counter for FileRecord {
    fn load(&self) -> Answer<'_, Option<Record>> {
        let held = self.with(|loaded| newest(&loaded.table, self.inode));
        Box::pin(future::ready(held))
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        let swapped = self.with(|loaded| {
            let held = newest(&loaded.table, self.inode);
            if held != old {
                return Ok(Swapped::Lost(held));
            }
            if loaded.failed {
                return Err(CounterError::Unreachable);
            }
            loaded.records.change(&mut loaded.table, self.inode, new);
            loaded.dirty = true;
            Ok(Swapped::Done)
        });
        Box::pin(future::ready(swapped.and_then(|swapped| swapped)))
    }

    fn is_batched(&self) -> bool {
        true
    }

    fn lasting(&self, cx: &mut Context<'_>) -> Poll<Option<Lasting>> {
        let lasting = self.with(|loaded| loaded.records.lasting(&loaded.table, self.inode, cx));
        lasting.map_or(Poll::Ready(None), |lasting| lasting.map(Some))
    }
}
