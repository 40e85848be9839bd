//! A file system with two files, the volume and the program's log, that notes what reaches it.
//!
//! Holds: events are noted one at a time, in the order in which they are answered.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, KernelConfig, MountOption, ReplyAttr,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, consts,
};

use super::Event;
use crate::common::{World, is_root, skip};

const ROOT: u64 = fuser::FUSE_ROOT_ID;
const VOLUME: u64 = 2;
const LOG: u64 = 3;
const NAMES: [(&str, u64); 2] = [("volume", VOLUME), ("log", LOG)];
/// How long the kernel may believe names and attributes.
const LASTS: Duration = Duration::ZERO;

struct Recorder {
    volume: File,
    blocks: u64,
    log_bytes: u64,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Recorder {
    fn attributes(&self, inode: u64) -> FileAttr {
        let (kind, size) = match inode {
            ROOT => (FileType::Directory, 0),
            VOLUME => (FileType::RegularFile, self.blocks * 4096),
            _ => (FileType::RegularFile, self.log_bytes),
        };
        let perm = if inode == ROOT { 0o700 } else { 0o600 };
        let [atime, mtime, ctime, crtime] = [UNIX_EPOCH; 4];
        let (ino, blocks, blksize, nlink) = (inode, size / 512, 4096, 1);
        let (uid, gid, rdev, flags) = (0, 0, 0, 0);
        FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        }
    }

    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl Filesystem for Recorder {
    fn init(&mut self, _: &Request<'_>, config: &mut KernelConfig) -> Result<(), i32> {
        // So that a batch of requests is under way at once; an old kernel goes without.
        let _ = config.add_capabilities(consts::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&mut self, _: &Request<'_>, _: u64, name: &OsStr, reply: ReplyEntry) {
        match NAMES.iter().find(|(known, _)| name == *known) {
            Some((_, inode)) => reply.entry(&LASTS, &self.attributes(*inode), 0),
            None => reply.error(libc::ENOENT),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        reply.attr(&LASTS, &self.attributes(inode));
    }

    fn open(&mut self, _: &Request<'_>, inode: u64, _: i32, reply: ReplyOpen) {
        // The log past the page cache: each line arrives when it is written.
        reply.opened(0, if inode == LOG { consts::FOPEN_DIRECT_IO } else { 0 });
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        if inode != VOLUME {
            return reply.data(&[]);
        }
        let offset = u64::try_from(offset).unwrap();
        let end = (offset + u64::from(size)).min(self.blocks * 4096);
        let mut bytes = vec![0; usize::try_from(end.saturating_sub(offset)).unwrap()];
        match self.volume.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(libc::EIO),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        inode: u64,
        _: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        let offset = u64::try_from(offset).unwrap();
        if inode == VOLUME {
            if self.volume.write_all_at(data, offset).is_err() {
                return reply.error(libc::EIO);
            }
            self.note(Event::Write(offset, data.to_vec()));
        } else {
            self.log_bytes = self.log_bytes.max(offset + data.len() as u64);
            self.note(Event::Log(data.to_vec()));
        }
        reply.written(u32::try_from(data.len()).unwrap());
    }

    fn fsync(&mut self, _: &Request<'_>, inode: u64, _: u64, _: bool, reply: ReplyEmpty) {
        if inode == VOLUME {
            self.note(Event::Flush);
        }
        reply.ok();
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// The mounted file system; gone when dropped.
pub struct Stage {
    session: Option<BackgroundSession>,
    events: Arc<Mutex<Vec<Event>>>,
    at: PathBuf,
}

impl Stage {
    /// Shows the host file `volume`; `None`, said loudly, where no file system can be mounted.
    pub fn new(world: &World, volume: &Path) -> Option<Self> {
        if !is_root() || !Path::new("/dev/fuse").exists() {
            skip("mounting a file system of one's own needs root and /dev/fuse");
            return None;
        }
        let at = world.path("stage");
        std::fs::create_dir(&at).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(volume).unwrap();
        let blocks = file.metadata().unwrap().len() / 4096;
        let events = Arc::new(Mutex::new(Vec::new()));
        let recorder = Recorder { volume: file, blocks, log_bytes: 0, events: events.clone() };
        let options = [MountOption::FSName("postern-record".to_owned()), MountOption::NoAtime];
        match fuser::spawn_mount2(recorder, &at, &options) {
            Ok(session) => Some(Self { session: Some(session), events, at }),
            Err(error) => {
                skip(&format!("no file system of one's own can be mounted here: {error}"));
                None
            }
        }
    }

    /// The volume as the daemon gets it.
    pub fn volume(&self) -> PathBuf {
        self.at.join("volume")
    }

    /// The program's log.
    pub fn log(&self) -> PathBuf {
        self.at.join("log")
    }

    /// Looks at what was noted so far.
    pub fn look<T>(&self, look: impl FnOnce(&[Event]) -> T) -> T {
        look(&self.events.lock().unwrap())
    }

    /// Takes it down; all that was noted.
    pub fn strike(mut self) -> Vec<Event> {
        drop(self.session.take());
        std::mem::take(&mut *self.events.lock().unwrap())
    }
}
