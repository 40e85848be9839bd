//! Open protected files: descriptor numbers, open file descriptions, our own descriptors.
//!
//! The kernel holds a placeholder under each number ([`placeholder`]), so its own rules (lowest
//! number, dup, fork, close-on-exec) stay in force; this table says what the number means. The
//! open file itself lives in the family arena: dup and fork share position and flags, as Linux
//! does.
//!
//! Holds: a number in the table is open in the kernel (unless the guest closed it behind our back
//! with a raw system call); an open file counts once for each number of each process that leads to
//! it, and the volume is given back with the last.
//! Does not hold: a process that is killed gives nothing back; a fork that fails inside the C
//! library's own callers (forkpty, daemon) leaves one reference too many.
#![allow(unsafe_code)]

pub mod attributes;
pub mod direct;
pub mod io;
pub mod locks;
pub mod path;
pub mod placeholder;
pub mod snapshot;
pub mod table;
pub mod transfer;
pub mod unwritten;

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use postern_trusted::errno::Errno;

use crate::{
    directory::{self, Listing},
    family, identity,
    mapped::{
        self,
        areas::{self, Hold},
    },
    runtime::{self, OpenVolume},
    sys,
};
pub use direct::DIRECT_ALIGNMENT;
pub use placeholder::text;
pub use table::Kind;
use table::Table;

static TABLE: Table<OpenFile> = Table::new();

/// Status flags that F_SETFL can change.
const CHANGEABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
/// Flags that only matter to open(2) itself and are not reported afterwards.
const OPEN_ONLY: i32 =
    libc::O_CREAT | libc::O_EXCL | libc::O_NOCTTY | libc::O_TRUNC | libc::O_CLOEXEC;
/// What a 64-bit kernel adds to every open file's flags (O_LARGEFILE; libc calls it 0 there).
const LARGE_FILE: i32 = 0o100_000;

/// An open file description of a protected file.
pub struct OpenFile {
    volume: Arc<OpenVolume>,
    index: usize,
    /// O_* bits as F_GETFL reports them.
    flags: AtomicI32,
    /// Where read(2) and write(2) go on, in bytes.
    position: AtomicU64,
    /// Its number in the family: locks belong to it, and a placeholder leads to it after exec.
    number: u64,
    /// For a directory: its entries. The volume is then the index that they come from.
    listing: Option<Listing>,
    /// Losses of the volume that this open file has told of, or that came before it.
    told: AtomicU32,
}

impl OpenFile {
    /// The volume behind it.
    #[must_use]
    pub fn volume(&self) -> &OpenVolume {
        &self.volume
    }

    /// The entries of a directory; `None` for a file.
    #[must_use]
    pub fn listing(&self) -> Option<&Listing> {
        self.listing.as_ref()
    }

    /// A directory has no content: what reads and writes answer.
    ///
    /// # Errors
    /// `EISDIR`.
    pub fn content(&self) -> Result<(), Errno> {
        if self.listing.is_some() { Err(Errno::EISDIR) } else { Ok(()) }
    }

    /// Directory number and inode of what is in a protected directory.
    #[must_use]
    pub fn node(&self) -> Option<(usize, u64)> {
        let listed = self.listing.as_ref().map(|listing| (listing.directory, listing.inode));
        listed.or_else(|| self.volume.member.as_ref().map(|m| (m.directory, m.inode)))
    }

    /// The volume's index in the run file.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Flags as F_GETFL reports them.
    #[must_use]
    pub fn flags(&self) -> i32 {
        self.flags.load(Ordering::Relaxed)
    }

    fn has(&self, flag: i32) -> bool {
        self.flags() & flag == flag
    }

    /// Opened for reading.
    #[must_use]
    pub fn readable(&self) -> bool {
        let mode = self.flags() & libc::O_ACCMODE;
        !self.is_path() && (mode == libc::O_RDONLY || mode == libc::O_RDWR)
    }

    /// Opened for writing.
    #[must_use]
    pub fn writable(&self) -> bool {
        let mode = self.flags() & libc::O_ACCMODE;
        !self.is_path() && (mode == libc::O_WRONLY || mode == libc::O_RDWR)
    }

    /// Opened with `O_PATH`: only good for fstat and the like.
    #[must_use]
    pub fn is_path(&self) -> bool {
        self.has(libc::O_PATH)
    }

    /// `O_DIRECT` is set.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.has(libc::O_DIRECT)
    }

    /// `O_APPEND` is set.
    #[must_use]
    pub fn append(&self) -> bool {
        self.has(libc::O_APPEND)
    }

    /// `O_DSYNC` or `O_SYNC` is set.
    #[must_use]
    pub fn dsync(&self) -> bool {
        self.has(libc::O_DSYNC)
    }

    /// `O_SYNC` is set.
    #[must_use]
    pub fn sync(&self) -> bool {
        self.has(libc::O_SYNC)
    }

    /// F_SETFL: only the bits that Linux lets it change.
    pub fn set_flags(&self, flags: i32) {
        let _ = self.flags.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            Some(now & !CHANGEABLE | flags & CHANGEABLE)
        });
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.end_locks();
        if let Some(family) = family::family() {
            family.inheritance.strike(self.number);
        }
        runtime::close_volume(&self.volume);
    }
}

/// The open file behind `fd`; `None` if it is not a protected one.
#[must_use]
pub fn lookup(fd: i32) -> Option<Arc<OpenFile>> {
    TABLE.get(fd)
}

/// What `fd` stands for. Cheap: one load.
#[must_use]
#[inline]
pub fn kind(fd: i32) -> Kind {
    TABLE.kind(fd)
}

/// The table's words, one for each of [`table::SLOTS`] numbers: 0 where nothing of ours is.
#[must_use]
pub fn words() -> *const core::sync::atomic::AtomicUsize {
    TABLE.words()
}

/// Whether `fd` is one of our own.
#[must_use]
pub fn is_internal(fd: i32) -> bool {
    kind(fd) == Kind::Internal
}

/// A vfork child, or a process made with CLONE_VM: it runs in its parent's memory with
/// descriptors of its own, so it must leave the parent's table alone.
fn is_guest_of_its_parents_memory() -> bool {
    identity::process_id() != sys::getpid()
}

/// open(2) of volume `index`: a file that exists, unless it was removed in this run.
///
/// # Errors
/// `EEXIST`, `ENOTDIR` for flags that do not fit a file that exists, `ENOENT` for a removed one;
/// `EACCES` in a vfork child; `EMFILE`, `ENFILE`, `ENOMEM`; what opening the volume says.
pub fn open(index: usize, flags: i32) -> Result<i32, Errno> {
    family::family().ok_or(Errno::ENOENT)?.admit(index, flags)?;
    if flags & libc::O_DIRECTORY != 0 {
        return Err(Errno::ENOTDIR);
    }
    if is_guest_of_its_parents_memory() {
        return Err(Errno::EACCES);
    }
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
    if writes && flags & libc::O_PATH == 0 && family::is_read_only(index) {
        return Err(Errno::EROFS);
    }
    let volume = runtime::open_volume(index)?;
    volume.attend().inspect_err(|_| runtime::close_volume(&volume))?;
    install(volume, None, flags)
}

/// unlink(2) of volume `index`.
///
/// # Errors
/// `EBUSY` while a process of the family has it open, or looks at it; `EACCES` in a vfork child;
/// `ENOENT`, `EIO`.
pub fn remove(index: usize) -> Result<(), Errno> {
    if is_guest_of_its_parents_memory() {
        return Err(Errno::EACCES);
    }
    attributes::let_go();
    family::family().ok_or(Errno::ENOENT)?.remove(index)
}

/// Gives an open volume a descriptor; with a `listing` it is a directory's. Its user passes to the
/// open file, or is given back on an error.
///
/// # Errors
/// `EACCES` in a vfork child; `EMFILE`, `ENFILE`, `ENOMEM`; what O_TRUNC says.
pub fn install(
    volume: Arc<OpenVolume>,
    listing: Option<Listing>,
    flags: i32,
) -> Result<i32, Errno> {
    let is_path = flags & libc::O_PATH != 0;
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    // O_PATH drops everything but these (open(2)).
    let kept = libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY;
    let kept = if is_path { flags & kept } else { flags & !OPEN_ONLY | LARGE_FILE };
    let inheritance = &family::family().ok_or(Errno::ENOENT)?.inheritance;
    let number = inheritance.number();
    let file = Arc::new(OpenFile {
        index: volume.index,
        told: AtomicU32::new(volume.losses()),
        volume,
        flags: AtomicI32::new(kept),
        position: AtomicU64::new(0),
        listing,
        number,
    });
    if is_guest_of_its_parents_memory() {
        return Err(Errno::EACCES);
    }
    inheritance.enter(number, &file);
    let fd = placeholder::make(number, close_on_exec)?;
    if !is_path
        && flags & libc::O_TRUNC != 0
        && let Err(errno) = file.truncate_to(0)
    {
        let _ = sys::close(fd);
        return Err(errno);
    }
    match TABLE.insert(fd, file) {
        Ok(stale) => drop(stale),
        Err(file) => {
            let _ = sys::close(fd);
            drop(file);
            return Err(Errno::EMFILE);
        }
    }
    Ok(fd)
}

/// close(2) of a descriptor whose [`kind`] is not [`Kind::Other`].
///
/// # Errors
/// `EBADF` for one of our own, and for one the kernel no longer knows.
pub fn close(fd: i32) -> Result<(), Errno> {
    match kind(fd) {
        Kind::Internal => Err(Errno::EBADF),
        Kind::Other => sys::close(fd),
        Kind::Protected if is_guest_of_its_parents_memory() => sys::close(fd),
        Kind::Protected => {
            let file = TABLE.remove(fd);
            let closed = sys::close(fd);
            if let Some(file) = file {
                forget(fd, file);
            }
            closed
        }
    }
}

static EXECUTING: AtomicBool = AtomicBool::new(false);

/// Whether this process is about to exec: numbers that survive it keep the process's locks.
pub fn set_executing(executing: bool) {
    EXECUTING.store(executing, Ordering::Relaxed);
}

fn survives_exec(fd: i32) -> bool {
    let close = libc::FD_CLOEXEC as usize;
    sys::fcntl(fd, libc::F_GETFD, 0).is_ok_and(|flags| flags & close == 0)
}

/// One number less leads to `file`; with the last one of the family the volume is closed.
fn forget(fd: i32, file: Arc<OpenFile>) {
    if !(EXECUTING.load(Ordering::Relaxed) && survives_exec(fd)) {
        file.release_locks();
    }
    give_back(file);
}

/// One reference less to `file`; with the last one of the family the volume is closed.
pub(crate) fn give_back(file: Arc<OpenFile>) {
    let index = file.index;
    if Arc::into_inner(file).is_some() {
        runtime::settle(index);
    }
}

/// The kernel has duplicated `old` to `new` (dup, dup2, dup3, F_DUPFD): the table follows. What
/// `new` led to before was closed by that.
///
/// # Errors
/// `EMFILE` if `new` is a number that the table cannot hold; `new` is closed again.
pub fn duplicated(old: i32, new: i32) -> Result<i32, Errno> {
    if kind(old) == Kind::Other && kind(new) == Kind::Other || is_guest_of_its_parents_memory() {
        return Ok(new);
    }
    let replaced = match TABLE.get(old) {
        _ if old == new => None,
        Some(file) => match TABLE.insert(new, file) {
            Ok(replaced) => replaced,
            Err(_) => {
                let _ = sys::close(new);
                return Err(Errno::EMFILE);
            }
        },
        None => TABLE.remove(new),
    };
    if let Some(file) = replaced {
        forget(new, file);
    }
    Ok(new)
}

/// The kernel has given `fd` to something that is not ours: an entry there is stale (the guest
/// closed our descriptor by a raw system call).
pub fn is_ordinary(fd: i32) {
    if kind(fd) == Kind::Protected
        && !is_guest_of_its_parents_memory()
        && let Some(file) = TABLE.remove(fd)
    {
        forget(fd, file);
    }
}

/// close_range(2) around our own descriptors.
///
/// # Errors
/// `EINVAL` for an empty range or unknown flags.
pub fn close_range(first: u32, last: u32, flags: u32) -> Result<(), Errno> {
    if first > last {
        return Err(Errno::EINVAL);
    }
    let mut from = first;
    loop {
        let kept = TABLE.first(Kind::Internal, from, last);
        let kept = kept.and_then(|fd| u32::try_from(fd).ok());
        let end = kept.map_or(Some(last), |fd| fd.checked_sub(1));
        if let Some(end) = end
            && from <= end
        {
            forget_range(from, end, flags);
            sys::close_range(from, end, flags)?;
        }
        match kept {
            Some(fd) if fd < last => from = fd + 1,
            _ => return Ok(()),
        }
    }
}

fn forget_range(first: u32, last: u32, flags: u32) {
    if flags & libc::CLOSE_RANGE_CLOEXEC != 0 || is_guest_of_its_parents_memory() {
        return;
    }
    while let Some(fd) = TABLE.first(Kind::Protected, first, last) {
        if let Some(file) = TABLE.remove(fd) {
            forget(fd, file);
        }
    }
}

/// Every number and mapping in this process stops leading to a file: the process ends.
pub fn close_all() {
    areas::release_all();
    forget_range(0, u32::MAX, 0);
    attributes::release_held();
}

/// Moves a descriptor of our own to a high number that the guest's closing leaves alone, and
/// answers that number. The old number is closed. Where no higher one is free it stays.
#[must_use]
pub fn protect_internal(fd: i32) -> i32 {
    if fd < 0 {
        return fd;
    }
    // High enough to be out of the way, low enough that the kernel's table stays small.
    let limit = sys::descriptor_limit().min(4096);
    let from = usize::try_from(limit - limit / 16).unwrap_or(0);
    let moved = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, from);
    let fd = match moved.map(i32::try_from) {
        Ok(Ok(high)) => {
            let _ = sys::close(fd);
            high
        }
        _ => fd,
    };
    TABLE.mark_internal(fd);
    fd
}

/// Marks a descriptor that this program was left as one of our own.
pub fn mark_internal(fd: i32) {
    TABLE.mark_internal(fd);
}

/// A descriptor of our own is about to be closed by whoever has it.
pub fn forget_internal(fd: i32) {
    TABLE.unmark_internal(fd);
}

/// Enters an open file under a placeholder that this program was left.
pub fn adopt(fd: i32, file: Arc<OpenFile>) {
    // A number outside the table answers EBADF, as after open.
    drop(TABLE.insert(fd, file));
}

/// The open files behind the numbers in use, one for each number.
#[must_use]
pub fn all() -> Vec<Arc<OpenFile>> {
    collect(|_| true)
}

/// Those whose numbers stay open across exec.
#[must_use]
pub fn inheritable() -> Vec<Arc<OpenFile>> {
    collect(survives_exec)
}

fn collect(wanted: impl Fn(i32) -> bool) -> Vec<Arc<OpenFile>> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(fd) = TABLE.first(Kind::Protected, from, u32::MAX) {
        if wanted(fd) {
            found.extend(TABLE.get(fd));
        }
        from = fd.unsigned_abs() + 1;
    }
    found
}

/// Closes a descriptor that [`protect_internal`] answered.
pub fn close_internal(fd: i32) {
    TABLE.unmark_internal(fd);
    let _ = sys::close(fd);
}

/// The references that a child's copy of the table stands for, while a fork is under way. Dropping
/// it gives them back.
#[must_use]
pub struct Transit {
    files: Vec<Arc<OpenFile>>,
    holds: Vec<Arc<Hold>>,
}

impl Transit {
    /// The fork came about: the references are the child's now.
    pub fn arrived(mut self) {
        core::mem::take(&mut self.files).into_iter().for_each(core::mem::forget);
        core::mem::take(&mut self.holds).into_iter().for_each(core::mem::forget);
    }
}

impl Drop for Transit {
    fn drop(&mut self) {
        core::mem::take(&mut self.holds).into_iter().for_each(areas::release);
    }
}

/// Before a fork: counts every entry once more, for the child, and keeps the table still until
/// [`fork_parent`] or [`fork_child`].
pub fn fork_prepare() -> Transit {
    attributes::fork_prepare();
    directory::cwd::fork_prepare();
    let holds = mapped::fork_prepare();
    Transit { files: TABLE.fork_prepare(), holds }
}

/// After a fork, in the parent, whether it came about or not.
pub fn fork_parent() {
    TABLE.fork_parent();
    mapped::fork_parent();
    directory::cwd::fork_done();
    attributes::fork_done();
}

/// After a fork, in the child.
pub fn fork_child() {
    TABLE.fork_child();
    mapped::fork_child();
    directory::cwd::fork_done();
    attributes::fork_done();
}

#[cfg(test)]
mod tests;
