//! What stat(2) says of a protected file: a regular file, mode 0600, of the caller. Its times are
//! part of the sealed volume.
#![allow(unsafe_code)]

use std::sync::Arc;

use postern_trusted::{
    errno::Errno,
    sync::Lock,
    volume::{Times, Volume},
};

use super::io::wall_ns;
use crate::{
    config::MOST_VOLUMES,
    directory::Facts,
    family, identity,
    runtime::{self, OpenVolume},
    sys,
};

/// Files that a name table holds, with short names.
const FILES: u64 = 1 << 17;
/// Preferred size of reads and writes, in bytes.
const BLOCK: i64 = 4096;
/// Device number of all protected files: no device of the host has major 1872.
const DEVICE_MAJOR: u32 = 1872;

/// A volume that has never been used has no times yet: it begins now.
pub(crate) fn begin_times(volume: &Volume) {
    if volume.times() == Times::default() {
        let now = wall_ns();
        volume.set_times(Times { accessed: now, modified: now, changed: now });
    }
}

impl OpenVolume {
    /// Notes that the guest changes the file now, of which this is the core.
    pub(crate) fn touch(&self, volume: &Volume) {
        if let Some(member) = &self.member {
            return member.touch();
        }
        volume.touch(wall_ns());
    }

    /// Last access, change of content, change of anything.
    fn times(&self) -> [i64; 3] {
        let Times { accessed, modified, changed } = self.standing().times();
        [accessed, modified, changed]
    }

    /// utimensat(2): access and content, in nanoseconds or left as they are.
    ///
    /// # Errors
    /// `EROFS`: the volume is only read. As [`Self::hold`].
    pub fn set_times(&self, times: [Option<i64>; 2]) -> Result<(), Errno> {
        if family::is_read_only(self.index) {
            return Err(Errno::EROFS);
        }
        let held = self.hold()?;
        let now = held.volume.times();
        held.volume.set_times(Times {
            accessed: times[0].unwrap_or(now.accessed),
            modified: times[1].unwrap_or(now.modified),
            changed: wall_ns(),
        });
        Ok(())
    }

    /// Units of 512 bytes.
    fn sectors(&self) -> u64 {
        self.size().next_multiple_of(4096) / 512
    }

    fn inode(&self) -> u64 {
        self.index as u64 + 2
    }

    /// What stat(2) answers.
    #[must_use]
    pub fn stat(&self) -> libc::stat {
        // SAFETY: all-zero is a valid stat: it has only integers.
        let mut stat: libc::stat = unsafe { core::mem::zeroed() };
        let (user, group) = sys::effective_ids();
        let [accessed, modified, changed] = self.times().map(split);
        stat.st_dev = libc::makedev(DEVICE_MAJOR, 0);
        stat.st_ino = self.inode();
        stat.st_mode = libc::S_IFREG | 0o600;
        stat.st_nlink = 1;
        (stat.st_uid, stat.st_gid) = (user, group);
        stat.st_size = i64::try_from(self.size()).unwrap_or(i64::MAX);
        stat.st_blksize = BLOCK;
        stat.st_blocks = i64::try_from(self.sectors()).unwrap_or(i64::MAX);
        (stat.st_atime, stat.st_atime_nsec) = accessed;
        (stat.st_mtime, stat.st_mtime_nsec) = modified;
        (stat.st_ctime, stat.st_ctime_nsec) = changed;
        stat
    }

    /// What statx(2) answers, with the basic fields.
    #[must_use]
    pub fn statx(&self) -> libc::statx {
        // SAFETY: all-zero is a valid statx: it has only integers.
        let mut statx: libc::statx = unsafe { core::mem::zeroed() };
        let (user, group) = sys::effective_ids();
        statx.stx_mask = libc::STATX_BASIC_STATS;
        statx.stx_blksize = u32::try_from(BLOCK).unwrap_or(4096);
        statx.stx_nlink = 1;
        (statx.stx_uid, statx.stx_gid) = (user, group);
        statx.stx_mode = u16::try_from(libc::S_IFREG | 0o600).unwrap_or(0);
        statx.stx_ino = self.inode();
        statx.stx_size = self.size();
        statx.stx_blocks = self.sectors();
        [statx.stx_atime, statx.stx_mtime, statx.stx_ctime] = self.times().map(timestamp);
        statx.stx_dev_major = DEVICE_MAJOR;
        statx
    }
}

/// Number of the file system of directory `number`: the first is that of the volumes.
const fn minor(directory: usize) -> u32 {
    // At most 64 directories.
    1 + directory as u32
}

impl Facts {
    /// What stat(2) answers.
    #[must_use]
    pub fn stat(&self) -> libc::stat {
        // SAFETY: all-zero is a valid stat: it has only integers.
        let mut stat: libc::stat = unsafe { core::mem::zeroed() };
        stat.st_dev = libc::makedev(DEVICE_MAJOR, minor(self.directory));
        stat.st_ino = self.inode;
        stat.st_mode = self.mode;
        stat.st_nlink = self.links.into();
        (stat.st_uid, stat.st_gid) = (self.uid, self.gid);
        stat.st_size = i64::try_from(self.size).unwrap_or(i64::MAX);
        stat.st_blksize = BLOCK;
        stat.st_blocks = i64::try_from(self.size.next_multiple_of(4096) / 512).unwrap_or(i64::MAX);
        let [accessed, modified, changed] = self.times.map(split);
        (stat.st_atime, stat.st_atime_nsec) = accessed;
        (stat.st_mtime, stat.st_mtime_nsec) = modified;
        (stat.st_ctime, stat.st_ctime_nsec) = changed;
        stat
    }

    /// What statx(2) answers, with the basic fields.
    #[must_use]
    pub fn statx(&self) -> libc::statx {
        // SAFETY: all-zero is a valid statx: it has only integers.
        let mut statx: libc::statx = unsafe { core::mem::zeroed() };
        statx.stx_mask = libc::STATX_BASIC_STATS;
        statx.stx_blksize = u32::try_from(BLOCK).unwrap_or(4096);
        statx.stx_nlink = self.links;
        (statx.stx_uid, statx.stx_gid) = (self.uid, self.gid);
        statx.stx_mode = u16::try_from(self.mode).unwrap_or(0);
        statx.stx_ino = self.inode;
        statx.stx_size = self.size;
        statx.stx_blocks = self.size.next_multiple_of(4096) / 512;
        [statx.stx_atime, statx.stx_mtime, statx.stx_ctime] = self.times.map(timestamp);
        (statx.stx_dev_major, statx.stx_dev_minor) = (DEVICE_MAJOR, minor(self.directory));
        statx
    }

    /// What statfs(2) answers: room for one more file of the largest size.
    ///
    /// # Errors
    /// `EIO` if there is no such directory.
    pub fn statfs(&self) -> Result<libc::statfs, Errno> {
        // SAFETY: all-zero is a valid statfs: it has only integers.
        let mut statfs: libc::statfs = unsafe { core::mem::zeroed() };
        let blocks = self.room()?;
        statfs.f_type = libc::EXT4_SUPER_MAGIC;
        (statfs.f_bsize, statfs.f_frsize) = (BLOCK, BLOCK);
        (statfs.f_blocks, statfs.f_bfree, statfs.f_bavail) = (blocks, blocks, blocks);
        (statfs.f_files, statfs.f_ffree, statfs.f_namelen) = (FILES, FILES, 255);
        Ok(statfs)
    }

    /// The same as statvfs(3) answers it.
    ///
    /// # Errors
    /// As [`Self::statfs`].
    pub fn statvfs(&self) -> Result<libc::statvfs, Errno> {
        // SAFETY: all-zero is a valid statvfs: it has only integers.
        let mut statvfs: libc::statvfs = unsafe { core::mem::zeroed() };
        let blocks = self.room()?;
        (statvfs.f_bsize, statvfs.f_frsize) = (BLOCK.unsigned_abs(), BLOCK.unsigned_abs());
        (statvfs.f_blocks, statvfs.f_bfree, statvfs.f_bavail) = (blocks, blocks, blocks);
        (statvfs.f_files, statvfs.f_ffree, statvfs.f_favail) = (FILES, FILES, FILES);
        statvfs.f_namemax = 255;
        Ok(statvfs)
    }

    fn room(&self) -> Result<u64, Errno> {
        Ok(crate::directory::number(self.directory)?.config.file_capacity / 4096)
    }
}

/// Nanoseconds since the epoch as seconds and the rest.
const fn split(time: i64) -> (i64, i64) {
    (time.div_euclid(1_000_000_000), time.rem_euclid(1_000_000_000))
}

fn timestamp(time: i64) -> libc::statx_timestamp {
    let (seconds, nanoseconds) = split(time);
    // SAFETY: all-zero is a valid timestamp: it has only integers.
    let mut time: libc::statx_timestamp = unsafe { core::mem::zeroed() };
    time.tv_sec = seconds;
    time.tv_nsec = u32::try_from(nanoseconds).unwrap_or(0);
    time
}

impl OpenVolume {
    /// truncate(2): the size changes, and the times.
    ///
    /// # Errors
    /// `EFBIG`, `ENOSPC`, `EIO`.
    pub fn resize(&self, size: u64) -> Result<(), Errno> {
        self.truncate(size)
    }

    /// Blocks of 4096 bytes: all, and those behind the end of the file.
    fn room(&self) -> (u64, u64) {
        let all = self.capacity() / 4096;
        (all, all.saturating_sub(self.size().div_ceil(4096)))
    }

    /// What statfs(2) answers: a file system of the volume's capacity with one file in it.
    #[must_use]
    pub fn statfs(&self) -> libc::statfs {
        // SAFETY: all-zero is a valid statfs: it has only integers.
        let mut statfs: libc::statfs = unsafe { core::mem::zeroed() };
        let (all, free) = self.room();
        statfs.f_type = libc::EXT4_SUPER_MAGIC;
        (statfs.f_bsize, statfs.f_frsize) = (BLOCK, BLOCK);
        (statfs.f_blocks, statfs.f_bfree, statfs.f_bavail) = (all, free, free);
        (statfs.f_files, statfs.f_namelen) = (1, 255);
        statfs
    }

    /// The same as statvfs(3) answers it.
    #[must_use]
    pub fn statvfs(&self) -> libc::statvfs {
        // SAFETY: all-zero is a valid statvfs: it has only integers.
        let mut statvfs: libc::statvfs = unsafe { core::mem::zeroed() };
        let (all, free) = self.room();
        (statvfs.f_bsize, statvfs.f_frsize) = (BLOCK.unsigned_abs(), BLOCK.unsigned_abs());
        (statvfs.f_blocks, statvfs.f_bfree, statvfs.f_bavail) = (all, free, free);
        (statvfs.f_files, statvfs.f_namemax) = (1, 255);
        statvfs
    }
}

/// Volumes that this process looked at by path alone, kept open until it ends: opening and closing
/// one for every stat(2) would unlock and recover it each time.
type Held = [Option<(u32, Arc<OpenVolume>)>; MOST_VOLUMES];
static HELD: Lock<Held> = Lock::new([const { None }; MOST_VOLUMES]);

/// Volume `index`, kept open by this process from now on.
///
/// # Errors
/// What opening it says.
pub fn hold(index: usize) -> Result<Arc<OpenVolume>, Errno> {
    family::family().ok_or(Errno::ENOENT)?.admit(index, 0)?;
    let me = identity::process_id();
    if let Some(Some((owner, volume))) = HELD.lock().get(index)
        && *owner == me
    {
        return Ok(volume.clone());
    }
    let opened = runtime::open_volume(index)?;
    let mut held = HELD.lock();
    let Some(slot) = held.get_mut(index) else { return Ok(opened) };
    match slot {
        Some((owner, volume)) if *owner == me => {
            let volume = volume.clone();
            drop(held);
            runtime::close_volume(&opened);
            Ok(volume)
        }
        _ => {
            // The parent's entry, copied by fork: it is the parent's reference.
            core::mem::forget(slot.replace((me, opened.clone())));
            Ok(opened)
        }
    }
}

/// Gives back what [`hold`] keeps, and waits until it is closed: another program may be about to
/// open it.
pub fn let_go() {
    let held = release_held();
    held.iter().copied().for_each(runtime::settle);
    if !held.is_empty()
        && let Some(family) = family::family()
    {
        family.wait_for_closing();
    }
}

/// Gives back what [`hold`] keeps; answers what it was.
pub(super) fn release_held() -> Vec<usize> {
    let me = identity::process_id();
    let mut given_back = Vec::new();
    for index in 0..MOST_VOLUMES {
        let taken = HELD.lock()[index].take_if(|(owner, _)| *owner == me);
        if let Some((_, volume)) = taken {
            runtime::close_volume(&volume);
            given_back.push(index);
        }
    }
    given_back
}

/// Keeps [`HELD`] still while the process forks.
pub(super) fn fork_prepare() {
    core::mem::forget(HELD.lock());
}

/// The other end of [`fork_prepare`], in both processes.
pub(super) fn fork_done() {
    // SAFETY: locked by `fork_prepare` in this thread (or its copy).
    unsafe { HELD.force_unlock() };
}
