//! What the index records of each file: which state of its volume is the newest.
//!
//! A record stands in for a monotonic counter of the file. It changes in memory, when the file makes
//! a checkpoint or is closed, and becomes durable with the name table. Until then a superblock of
//! the file names the durable record and the newest one, so that the file opens again whichever of
//! them a crash leaves. Where the index has a counter that moves with each sync, so do the records:
//! a sync of a file changes its record, and ends when the table with it is durable and counted.
//!
//! A table that was made before there were records may be too full for all of them: a file that gets
//! none keeps being one without, and what needs its record is refused.
//!
//! Holds: of one file no more than two records can be found after a crash, for none changes while
//! the table is being written, or after a table of which nobody knows whether it was.

use core::{
    future::{self, poll_fn},
    task::{Poll, Waker},
};
use std::collections::BTreeMap;

use postern_trusted::{
    counter::{Answer, Counter, CounterError, Lasting, Record, Swapped},
    directory::Table,
    errno::Errno,
};

use super::{Loaded, number};
use crate::message;

/// Records that are not durable yet.
#[derive(Default)]
pub(super) struct Records {
    /// What the durable table has in their place, by inode.
    durable: BTreeMap<u64, Option<Record>>,
    /// A table is being written.
    flying: bool,
    /// The last one written may be there or not.
    doubtful: bool,
    /// Changes that wait for the table being written.
    waiters: Vec<Waker>,
    /// That there is no room for more was said.
    told: bool,
}

fn newest(table: &Table, inode: u64) -> Option<Record> {
    table.node(inode).and_then(|node| node.record)
}

impl Records {
    /// The table is about to be written, as it is now.
    pub(super) fn take_off(&mut self) {
        self.flying = true;
    }

    /// It was written and synced, or nobody knows. Answers who is to be woken.
    pub(super) fn land(&mut self, written: bool) -> Vec<Waker> {
        (self.flying, self.doubtful) = (false, !written);
        if written {
            self.durable.clear();
        }
        core::mem::take(&mut self.waiters)
    }

    /// Whether the durable table lacks one.
    pub(super) fn is_behind(&self) -> bool {
        !self.durable.is_empty()
    }

    fn change(&mut self, table: &mut Table, inode: u64, record: Record) -> Result<(), Errno> {
        let before = newest(table, inode);
        table.set_record(inode, Some(record))?;
        self.durable.entry(inode).or_insert(before);
        Ok(())
    }

    fn lasting(&self, table: &Table, inode: u64) -> Lasting {
        let newest = newest(table, inode);
        Lasting { durable: self.durable.get(&inode).copied().unwrap_or(newest), newest }
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

    /// Says once that the table has no room for the record.
    fn tell_full(&self) {
        let told = self.with(|loaded| core::mem::replace(&mut loaded.records.told, true));
        if let (Ok(false), Ok(directory)) = (told, number(self.directory)) {
            message::say(&format!(
                "{}: the name table, made before it recorded the states of files, has no room for \
                 all of them: a file without a record opens, and can be set back to an older state; \
                 where a counter moves with each sync its fsync fails (ENOSPC); remove files",
                directory.config.guest_path
            ));
        }
    }

    fn try_swap(
        &self,
        loaded: &mut Loaded,
        (old, new): (Option<Record>, Record),
        waker: &Waker,
    ) -> Poll<Result<Swapped, CounterError>> {
        let held = newest(&loaded.table, self.inode);
        if held != old {
            return Poll::Ready(Ok(Swapped::Lost(held)));
        }
        if loaded.failed || loaded.records.doubtful {
            return Poll::Ready(Err(CounterError::Unreachable));
        }
        if loaded.records.flying {
            loaded.records.waiters.push(waker.clone());
            return Poll::Pending;
        }
        if loaded.records.change(&mut loaded.table, self.inode, new).is_err() {
            return Poll::Ready(Err(CounterError::Full));
        }
        loaded.dirty = true;
        Poll::Ready(Ok(Swapped::Done))
    }
}

impl Counter for FileRecord {
    fn load(&self) -> Answer<'_, Option<Record>> {
        let held = self.with(|loaded| newest(&loaded.table, self.inode));
        Box::pin(future::ready(held))
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        Box::pin(poll_fn(move |cx| {
            match self.with(|loaded| self.try_swap(loaded, (old, new), cx.waker())) {
                Ok(answer) => {
                    if answer == Poll::Ready(Err(CounterError::Full)) {
                        self.tell_full();
                    }
                    answer
                }
                Err(error) => Poll::Ready(Err(error)),
            }
        }))
    }

    fn lasting(&self) -> Option<Lasting> {
        let lasting = self.with(|loaded| loaded.records.lasting(&loaded.table, self.inode));
        Some(lasting.unwrap_or_default())
    }
}
