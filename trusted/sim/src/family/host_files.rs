//! The host files that the family has open at the daemon: what another daemon must open again when
//! this one has ended.
//!
//! Holds: a file is listed from before anything is read of it until before it is given back.

use std::sync::{Arc, Weak};

use postern_edl::{FILE_BUFFERED, OPEN_READ_ONLY, calls::PosternFile};
use postern_trusted::sync::Lock;

use super::standing::Core;

/// A host file that is open at the daemon.
#[derive(Clone)]
pub struct HostFile {
    /// Its name at the daemon.
    pub name: String,
    /// Its handle, at each daemon the same.
    pub handle: u32,
    /// Flags of `postern_open` by which it is opened again.
    pub flags: u32,
    /// How often it was opened.
    pub opens: u32,
    /// Its writes go through the host's page cache.
    pub buffered: bool,
    /// What was opened in it, if that is in memory.
    pub core: Weak<Core>,
}

#[derive(Default)]
struct Listed {
    files: Vec<HostFile>,
    /// The highest handle ever.
    highest: u32,
}

/// All of the family's.
#[derive(Default)]
pub struct HostFiles(Lock<Listed>);

impl HostFiles {
    /// The daemon has opened a file.
    pub fn opened(&self, name: &str, flags: u32, file: &PosternFile) {
        let mut listed = self.0.lock();
        listed.highest = listed.highest.max(file.handle);
        if let Some(known) = listed.files.iter_mut().find(|known| known.handle == file.handle) {
            known.opens += 1;
            // Whatever is in memory of it, it is read anew.
            known.core = Weak::new();
            return;
        }
        listed.files.push(HostFile {
            name: name.into(),
            handle: file.handle,
            flags: flags & OPEN_READ_ONLY,
            opens: 1,
            buffered: file.flags & FILE_BUFFERED != 0,
            core: Weak::new(),
        });
    }

    /// A volume is in memory that was opened in a file.
    pub fn holds(&self, core: &Arc<Core>) {
        let mut listed = self.0.lock();
        if let Some(known) = listed.files.iter_mut().find(|known| known.handle == core.handle) {
            known.core = Arc::downgrade(core);
        }
    }

    /// A file is about to be given back once.
    pub fn closing(&self, handle: u32) {
        let mut listed = self.0.lock();
        if let Some(at) = listed.files.iter().position(|known| known.handle == handle) {
            listed.files[at].opens -= 1;
            if listed.files[at].opens == 0 {
                listed.files.swap_remove(at);
            }
        }
    }

    /// A file is no longer the family's.
    pub fn lost(&self, handle: u32) {
        self.0.lock().files.retain(|known| known.handle != handle);
    }

    /// All that are open.
    #[must_use]
    pub fn all(&self) -> Vec<HostFile> {
        self.0.lock().files.clone()
    }

    /// The highest handle that was ever given out.
    #[must_use]
    pub fn highest(&self) -> u32 {
        self.0.lock().highest
    }

    /// Whether the writes of a file go through the host's page cache.
    #[must_use]
    pub fn is_buffered(&self, handle: u32) -> bool {
        self.0.lock().files.iter().any(|known| known.handle == handle && known.buffered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_listed_until_it_was_given_back_as_often_as_it_was_opened() {
        let files = HostFiles::default();
        let file = PosternFile { handle: 2049, flags: FILE_BUFFERED, ..PosternFile::default() };
        files.opened("v", OPEN_READ_ONLY | 2, &file);
        files.opened("v", OPEN_READ_ONLY, &file);
        let all = files.all();
        assert_eq!((all.len(), all[0].opens, all[0].flags), (1, 2, OPEN_READ_ONLY));
        assert!(files.is_buffered(2049));
        files.closing(2049);
        assert_eq!(files.all().len(), 1);
        files.closing(2049);
        assert!(files.all().is_empty());
        files.closing(2049);
        assert_eq!(files.highest(), 2049, "never given out again");
    }
}
