//! The files a lane may do I/O on, and how many requests each has in flight.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::files::HostFile;

/// Most files a session has open at once.
pub const MAX_FILES: usize = 1024;

/// The slot a handle belongs to: its low bits. The rest is a serial number, so that a handle that
/// was given back never names a later file.
#[must_use]
pub const fn slot_of(handle: u32) -> usize {
    handle as usize % MAX_FILES
}

struct Entry {
    handle: u32,
    file: Arc<HostFile>,
    /// Place of its volume in the lane's statistics.
    volume: usize,
    in_flight: u64,
    closing: Option<oneshot::Sender<()>>,
}

/// Open files by handle.
pub struct FileTable {
    /// [`MAX_FILES`] of them.
    slots: Box<[Option<Entry>]>,
    closing: usize,
}

impl Default for FileTable {
    fn default() -> Self {
        Self { slots: (0..MAX_FILES).map(|_| None).collect(), closing: 0 }
    }
}

impl FileTable {
    /// Makes a file known. Its slot is free: the session gives a slot out again only after every
    /// lane answered the close.
    pub fn add(&mut self, handle: u32, file: Arc<HostFile>, volume: usize) {
        let entry = Entry { handle, file, volume, in_flight: 0, closing: None };
        self.slots[slot_of(handle)] = Some(entry);
    }

    /// The open file of a handle, its slot and the place of its volume; `None` if there is none or it is being closed.
    #[inline]
    pub fn get(&self, handle: u32) -> Option<(usize, &HostFile, usize)> {
        let slot = slot_of(handle);
        let entry = self.slots[slot].as_ref()?;
        (entry.handle == handle && entry.closing.is_none()).then_some((
            slot,
            &*entry.file,
            entry.volume,
        ))
    }

    /// The file in a slot.
    pub fn at(&self, slot: usize) -> Option<&Arc<HostFile>> {
        self.slots.get(slot)?.as_ref().map(|entry| &entry.file)
    }

    /// A request on the file in this slot starts.
    #[inline]
    pub fn begin(&mut self, slot: usize) {
        if let Some(entry) = &mut self.slots[slot] {
            entry.in_flight += 1;
        }
    }

    /// A request on the file in this slot ended.
    #[inline]
    pub fn end(&mut self, slot: usize) {
        if let Some(entry) = &mut self.slots[slot] {
            entry.in_flight -= 1;
        }
    }

    /// Closes a handle to new requests; `done` hears of the end in [`Self::answer_closed`].
    pub fn close(&mut self, handle: u32, done: oneshot::Sender<()>) {
        match &mut self.slots[slot_of(handle)] {
            Some(entry) if entry.handle == handle && entry.closing.is_none() => {
                entry.closing = Some(done);
                self.closing += 1;
            }
            // Not here: dropping `done` answers.
            _ => {}
        }
    }

    /// Lets files go that are closed and have nothing in flight.
    #[inline]
    pub fn answer_closed(&mut self) {
        if self.closing == 0 {
            return;
        }
        for slot in &mut self.slots {
            if let Some(Entry { in_flight: 0, closing, .. }) = slot
                && let Some(done) = closing.take()
            {
                *slot = None;
                self.closing -= 1;
                // The session may be gone; it does not need the answer then.
                let _ = done.send(());
            }
        }
    }
}
