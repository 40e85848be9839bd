//! Removing a volume that the guest sees as one file.
//!
//! The host file stays, emptied: a volume is a name of the run, not of a directory. The name is
//! gone until somebody of the family creates it anew; the next run sees an empty file.
//!
//! Holds: a volume that somebody of the family has open is not removed, so nobody loses what they
//! still read; nobody opens one while it is being emptied.

use postern_trusted::errno::Errno;

use super::{Family, OpenVolume, State};
use crate::{identity, process};

impl Family {
    /// unlink(2) of volume `index`.
    ///
    /// # Errors
    /// `EBUSY` while the family has it open; `ENOENT` if it is removed already; what opening and
    /// emptying it says: it then stays as it is.
    pub fn remove(&self, index: usize) -> Result<(), Errno> {
        let entry = self.entry(index).ok_or(Errno::ENOENT)?;
        loop {
            let mut slot = entry.slot.lock();
            match &slot.state {
                State::Retired => return Err(Errno::ENOENT),
                State::Closed if slot.removed => return Err(Errno::ENOENT),
                State::Closed => {
                    slot.state = State::Busy(identity::process_id());
                    break;
                }
                State::Open(_) if slot.users > 0 => return Err(Errno::EBUSY),
                State::Open(_) => {
                    drop(slot);
                    process::current().block_on(self.close(index));
                }
                State::Busy(by) => {
                    let by = *by;
                    drop(slot);
                    entry.wait_for(by);
                }
            }
        }
        let emptied = self.open(index, &entry.source).and_then(|volume| empty(&volume));
        let mut slot = entry.slot.lock();
        slot.state = State::Closed;
        slot.removed = emptied.is_ok();
        emptied
    }

    /// Whether open(2) of volume `index` may go on. One that was removed is created anew by
    /// `O_CREAT`.
    ///
    /// # Errors
    /// `EEXIST` and `ENOENT`, as open(2) says them.
    pub fn admit(&self, index: usize, flags: i32) -> Result<(), Errno> {
        let entry = self.entry(index).ok_or(Errno::ENOENT)?;
        let mut slot = entry.slot.lock();
        let creates = flags & (libc::O_CREAT | libc::O_PATH) == libc::O_CREAT;
        match (slot.removed, creates) {
            (true, false) => Err(Errno::ENOENT),
            (false, true) if flags & libc::O_EXCL != 0 => Err(Errno::EEXIST),
            _ => {
                slot.removed = false;
                Ok(())
            }
        }
    }
}

fn empty(volume: &OpenVolume) -> Result<(), Errno> {
    let process = process::current();
    let held = volume.hold()?;
    let emptied = held.disk().and_then(|disk| {
        process.block_on(async {
            let truncated = held.volume.truncate(&disk, 0).await;
            held.volume.close(&disk).await?;
            truncated
        })
    });
    process.give_back(held.handle);
    emptied
}
