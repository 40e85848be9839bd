//! Closing a volume: cleanly, by who used it last.
//!
//! Holds: what a directory's file has not flushed is flushed with the directory's next batch, its
//! host file open until then; a host file is given back once; the index of a directory is marked as
//! cleanly closed only if all its files could be put away and all its names be published.

use core::sync::atomic::Ordering;

use postern_trusted::errno::Errno;

use super::{Family, OpenVolume, Source, State, standing::Core};
use crate::{
    directory::{HostFile, Member},
    identity, process,
};

impl Family {
    /// Closes volume `index` if nobody uses it.
    pub async fn close(&self, index: usize) {
        let Some(entry) = self.entry(index) else { return };
        let volume = {
            let mut slot = entry.slot.lock();
            match &slot.state {
                State::Open(volume) if slot.users == 0 => {
                    let volume = volume.clone();
                    slot.state = State::Busy(identity::process_id());
                    self.closing.fetch_add(1, Ordering::AcqRel);
                    volume
                }
                _ => return,
            }
        };
        let mut orderly = true;
        if let Source::Index(number) = entry.source {
            let astray = !self.directories[number].is_orderly();
            orderly = self.directories[number].publish_rest(&volume).await && !astray;
        }
        let closed = match volume.standing().retire().await {
            Some(core) if orderly => Some(self.put_away(&volume, &core).await),
            // Marked as in use still: the next run removes what has no name, and looks at each
            // file closely.
            Some(core) => {
                process::current().give_back(core.handle);
                Some(Ok(()))
            }
            // It was lost.
            None => None,
        };
        if let Some(Err(errno)) = closed {
            volume.report(&self.path_of(&entry.source), "closing failed", errno);
        }
        if let Some(member) = volume.member.as_ref().filter(|_| closed != Some(Ok(()))) {
            self.directories[member.directory].lose_track();
        }
        entry.slot.lock().state = State::Closed;
        self.retire(index, &entry);
        if let Some(member) = &volume.member {
            self.close_member(member).await;
        }
        self.closing.fetch_sub(1, Ordering::AcqRel);
    }

    /// What the directory has to do when a file of it is closed.
    async fn close_member(&self, member: &Member) {
        let directory = &self.directories[member.directory];
        directory.reap(self, member.inode);
        if directory.is_crowded()
            && let Ok(held) = member.index.hold_index()
            && let Ok(disk) = held.disk()
        {
            // Said by the directory itself.
            let _ = directory.publish(&member.index, (&held, &disk), false).await;
        }
        if self.release(&member.index) {
            // One level: an index is no member.
            Box::pin(self.close(member.index.index)).await;
        }
    }

    /// Closes a volume that nobody uses; its host file is given back, or left to the directory.
    async fn put_away(&self, volume: &OpenVolume, core: &Core) -> Result<(), Errno> {
        let Some(member) = &volume.member else { return self.write_down(volume.index, core).await };
        let directory = &self.directories[member.directory];
        let size = core.volume.size();
        let unflushed = async {
            let disk = process::current().disk(volume.index, core)?;
            if core.volume.may_rest() {
                return core.volume.rest(&disk).await;
            }
            core.volume.close(&disk).await.map(|()| false)
        };
        let unflushed = unflushed.await;
        process::current().tell(core);
        if unflushed.is_ok() {
            directory.remember(member, size);
        }
        if unflushed == Ok(true) {
            let file = HostFile { handle: core.handle, blocks: core.host_blocks };
            directory.lay_down(member.inode, file);
        } else {
            if unflushed.is_ok() {
                directory.closed(member.inode);
            }
            process::current().give_back(core.handle);
        }
        unflushed.map(drop)
    }

    /// Closes a volume in memory cleanly and gives its host file back.
    pub(super) async fn write_down(&self, index: usize, core: &Core) -> Result<(), Errno> {
        let process = process::current();
        let closed = match process.disk(index, core) {
            Ok(disk) => core.volume.close(&disk).await,
            Err(errno) => Err(errno),
        };
        process.tell(core);
        process.give_back(core.handle);
        closed
    }

    /// Waits until nothing is being closed any more, by whichever process.
    pub fn wait_for_closing(&self) {
        while self.closing.load(Ordering::Acquire) > 0 {
            process::pause();
        }
    }

    /// Waits while volume `index` is being opened or closed.
    pub fn wait_for_rest(&self, index: usize) {
        while let Some(entry) = self.entry(index) {
            let State::Busy(by) = entry.slot.lock().state else { return };
            entry.wait_for(by);
        }
    }
}
