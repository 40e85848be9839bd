//! Host files: which names the operator allows, and how they are opened.
//!
//! Holds: a name that was not allowed opens nothing; only regular files and block devices are
//! opened, and looked at before they are (an open can have effects); O_DIRECT unless the operator
//! allowed buffered I/O; the lease's lock sits on the same open file description that does the
//! I/O, so it lasts as long as requests can be under way.
//! What is made and removed lies in a directory allowed for that, under a name that cannot lead out
//! of it ([`crate::directory`]).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use postern_edl::{FILE_BUFFERED, OPEN_ASK, OPEN_READ_ONLY};
use postern_lease::Use;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, ResolveFlags, SeekFrom, StatxFlags,
};
use rustix::io::Errno;

use crate::directory::Directory;
use crate::problem::{Problem, log};

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// `f_type` of file systems that live in the page cache alone: newer kernels let O_DIRECT pass
/// there and mean nothing by it (linux/magic.h: tmpfs, ramfs).
const CACHE_ONLY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// The names the operator allows.
#[derive(Debug)]
pub struct Catalog {
    files: BTreeMap<String, PathBuf>,
    roots: Vec<(PathBuf, OwnedFd)>,
    directories: BTreeMap<String, Directory>,
    allow_buffered: bool,
}

impl Catalog {
    /// Reads `NAME=HOST_FILE` and `NAME=DIR` pairs and opens the directories.
    ///
    /// # Errors
    /// A malformed or doubled pair, a directory that can not be opened.
    pub fn new(
        files: &[OsString],
        roots: &[PathBuf],
        directories: &[OsString],
        allow_buffered: bool,
    ) -> Result<Self, Problem> {
        let mut named = BTreeMap::new();
        for pair in files {
            let text = pair.to_string_lossy();
            let Some((name, path)) = pair.to_str().and_then(|p| p.split_once('=')) else {
                return Err(Problem::config(
                    "not NAME=HOST_FILE",
                    text,
                    "write --file NAME=HOST_FILE",
                ));
            };
            if name.is_empty() || path.is_empty() {
                return Err(Problem::config(
                    "empty name or file",
                    text,
                    "write --file NAME=HOST_FILE",
                ));
            }
            if named.insert(name.to_owned(), PathBuf::from(path)).is_some() {
                return Err(Problem::config("name given twice", name, "give each name one file"));
            }
        }
        let mut opened = Vec::new();
        for root in roots {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| {
                Problem::config(
                    format_args!("root can not be opened ({e})"),
                    root.display(),
                    "name a directory that exists and that this user may search",
                )
            })?;
            opened.push((root.clone(), fd));
        }
        let mut writable = BTreeMap::new();
        for pair in directories {
            let (name, directory) = Directory::allow(pair)?;
            if named.contains_key(&name) || writable.insert(name.clone(), directory).is_some() {
                return Err(Problem::config("name given twice", name, "give each name one place"));
            }
        }
        Ok(Self { files: named, roots: opened, directories: writable, allow_buffered })
    }

    /// The directory that a name of the form `DIRECTORY/FILE` begins with, and the rest.
    fn in_directory<'a>(&self, name: &'a str) -> Option<(&Directory, &'a str)> {
        let (directory, file) = name.split_once('/')?;
        Some((self.directories.get(directory)?, file))
    }

    /// Under what name statistics count a file.
    fn volume_of(&self, name: &str) -> String {
        match name.split_once('/') {
            Some((directory, _)) if self.directories.contains_key(directory) => {
                format!("{directory}/")
            }
            _ => name.to_owned(),
        }
    }

    /// The place behind a name, without opening the file for I/O.
    fn locate(&self, name: &str) -> Result<(OwnedFd, PathBuf), Errno> {
        if let Some(path) = self.files.get(name) {
            let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            return Ok((fd, path.clone()));
        }
        if let Some((directory, file)) = self.in_directory(name) {
            return directory.locate(file);
        }
        let beneath =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut refusal = Errno::NOENT;
        for (root, directory) in &self.roots {
            // A rename elsewhere on the host makes BENEATH answer EAGAIN; openat2(2) says: retry.
            for _ in 0..16 {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                match rustix::fs::openat2(directory, name, flags, Mode::empty(), beneath) {
                    Ok(fd) => return Ok((fd, root.join(name))),
                    Err(Errno::AGAIN) => refusal = Errno::AGAIN,
                    Err(e) => {
                        refusal = e;
                        break;
                    }
                }
            }
            if refusal != Errno::NOENT {
                break;
            }
        }
        Err(refusal)
    }

    /// Opens the file behind `name` with `flags` of `postern_open` and takes its lease, for which
    /// the enclave has waited since `since`. Blocks on the host's file system: not for the control
    /// loop.
    ///
    /// # Errors
    /// The errno for the enclave: `ENOENT` for a name that leads nowhere, `EBUSY` for a lease that
    /// somebody has and is not asked for, `EINVAL` where O_DIRECT is refused or the flags are
    /// unknown, else the host's. What the operator can act on is logged.
    pub fn open(&self, name: &str, flags: u32, since: Instant) -> Result<Opening, Errno> {
        let known = OPEN_READ_ONLY | OPEN_ASK;
        if name.is_empty() || name.contains('\0') || flags & !known != 0 {
            return Err(Errno::INVAL);
        }
        let (place, path) = self.locate(name).inspect_err(|e| {
            log(
                format_args!("open refused ({e})"),
                format_args!("{name:?}"),
                "allow the name with --file NAME=HOST_FILE, or put the file under a --root",
            );
        })?;
        let volume = self.volume_of(name);
        let opened = HostFile::open(&place, &path, (name, volume), flags, self.allow_buffered)
            .and_then(|file| file.lease(flags & OPEN_ASK != 0, since));
        if let Err((errno, remedy)) = &opened {
            let shown = path.display();
            log(format_args!("open refused ({errno})"), format_args!("{name:?} = {shown}"), remedy);
        }
        opened.map_err(|(errno, _)| errno)
    }

    /// Makes the file `name` of `blocks` blocks of zeros and opens it. Blocks on the host's file
    /// system.
    ///
    /// # Errors
    /// `EACCES` outside the directories allowed for it or for a name that is not an id, `EEXIST`,
    /// `EFBIG`, else the host's; nothing is left behind.
    pub fn create(&self, name: &str, blocks: u64) -> Result<HostFile, Errno> {
        let (directory, file) = self.in_directory(name).ok_or(Errno::ACCESS)?;
        directory.create(file, blocks).inspect_err(|e| {
            log(
                format_args!("create refused ({e})"),
                format_args!("{name:?}"),
                "it needs --directory NAME=DIR, room in DIR, and the right to write there",
            );
        })?;
        let opened = match self.open(name, 0, Instant::now()) {
            Ok(Opening::Leased(opened)) => Ok(opened),
            Ok(Opening::Asked(_)) => Err(Errno::BUSY),
            Err(errno) => Err(errno),
        };
        opened.inspect_err(|_| {
            let _ = directory.remove(file);
        })
    }

    /// Removes the file `name`. Blocks on the host's file system.
    ///
    /// # Errors
    /// `EACCES` as for [`Self::create`], `EBUSY` while somebody has it open, else the host's.
    pub fn remove(&self, name: &str) -> Result<(), Errno> {
        let (directory, file) = self.in_directory(name).ok_or(Errno::ACCESS)?;
        directory.remove(file)
    }

    /// The ids in the directory `name` above `after`, ascending, at most `most` of them.
    ///
    /// # Errors
    /// `EACCES` for a directory that was not allowed, else the host's.
    pub fn list(&self, name: &str, after: &str, most: usize) -> Result<Vec<String>, Errno> {
        self.directories.get(name).ok_or(Errno::ACCESS)?.list(after, most)
    }
}

/// What opening a file came to.
#[derive(Debug)]
pub enum Opening {
    /// It is open under its lease.
    Leased(HostFile),
    /// Somebody else has the lease and is asked for it as long as this is kept: no I/O on it.
    Asked(HostFile),
}

/// An open host file under its lease.
#[derive(Debug)]
pub struct HostFile {
    fd: OwnedFd,
    /// Name it was opened by.
    pub name: String,
    /// Name of its volume in statistics: its own, or that of the protected directory it lies in
    /// with a slash.
    pub volume: String,
    /// Flags for the enclave ([`FILE_BUFFERED`]).
    pub flags: u32,
    /// Size in whole blocks when the lease was taken.
    pub blocks: u64,
    /// O_DIRECT alignment of offset and length, bytes; 1 for buffered I/O.
    pub alignment: u64,
    /// Whether it may be written.
    pub writable: bool,
}

type OpenError = (Errno, &'static str);

impl HostFile {
    fn open(
        place: &OwnedFd,
        path: &Path,
        (name, volume): (&str, String),
        flags: u32,
        allow_buffered: bool,
    ) -> Result<Self, OpenError> {
        let host = |e: Errno| {
            (
                e,
                "see that this user may read and write it; if it was replaced, start posternd again",
            )
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(place).map_err(host)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err((Errno::INVAL, "name a regular file or a block device"));
        }
        let writable = flags & OPEN_READ_ONLY == 0;
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        // The very object just looked at, whatever its name leads to by now.
        let same = format!("/proc/self/fd/{}", place.as_raw_fd());
        let reopen = |extra| {
            rustix::fs::open(
                &same,
                access | extra | OFlags::CLOEXEC | OFlags::NOCTTY,
                Mode::empty(),
            )
        };
        let direct = match reopen(OFlags::DIRECT) {
            Ok(fd) => direct_alignment(&fd, kind).map_err(host)?.map(|a| (fd, a)),
            Err(Errno::INVAL) => None,
            Err(e) => return Err(host(e)),
        };
        let (fd, alignment, shown) = match direct {
            Some((fd, alignment)) => (fd, alignment, 0),
            None if allow_buffered => {
                log(
                    "buffered I/O, because O_DIRECT is refused",
                    format_args!("{name:?} = {}", path.display()),
                    "latency and durability are the page cache's; use another file system",
                );
                (reopen(OFlags::empty()).map_err(host)?, 1, FILE_BUFFERED)
            }
            None => {
                return Err((
                    Errno::INVAL,
                    "its file system refuses O_DIRECT: use another one, or start posternd with --allow-buffered",
                ));
            }
        };
        let name = name.to_owned();
        Ok(Self { fd, name, volume, flags: shown, blocks: 0, alignment, writable })
    }

    /// What the lease is for.
    const fn usage(&self) -> Use {
        if self.writable { Use::Alone } else { Use::Shared }
    }

    /// Takes the lease, or, if `ask`, marks the file as waited for.
    fn lease(mut self, ask: bool, since: Instant) -> Result<Opening, OpenError> {
        let host = |e: Errno| (e, "its file system must take locks (flock)");
        if postern_lease::take(&self.fd, self.usage(), since).map_err(host)? {
            // A device's size is not in its inode; seeking to the end tells it for both. Only now:
            // who had the lease may have changed it.
            self.blocks = rustix::fs::seek(&self.fd, SeekFrom::End(0)).map_err(host)? / BLOCK;
            return Ok(Opening::Leased(self));
        }
        if ask && postern_lease::ask(&self.fd, self.usage(), since).is_ok() {
            return Ok(Opening::Asked(self));
        }
        Err((Errno::BUSY, "another session, daemon or program holds its lock: end that first"))
    }

    /// Whether somebody waits for the lease.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        postern_lease::is_wanted(&self.fd, self.usage())
    }

    /// Number of the descriptor, for iocbs.
    #[must_use]
    pub fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Now, not when the kernel drops its last reference to the open file.
        let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
    }
}

/// The O_DIRECT alignment of an open file, bytes; `None` where O_DIRECT does not mean anything or
/// wants more than 4096.
fn direct_alignment(fd: &OwnedFd, kind: FileType) -> Result<Option<u64>, Errno> {
    let system = rustix::fs::fstatfs(fd)?.f_type;
    // A block device's node lies on a tmpfs; what counts there is the device.
    let cached = u64::try_from(system).is_ok_and(|s| CACHE_ONLY.contains(&s));
    if kind == FileType::RegularFile && cached {
        return Ok(None);
    }
    let asked = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    let told = match rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, asked) {
        Ok(s) if StatxFlags::from_bits_retain(s.stx_mask).contains(StatxFlags::DIOALIGN) => {
            Some((u64::from(s.stx_dio_mem_align), u64::from(s.stx_dio_offset_align)))
        }
        // Kernels before 6.1 and some file systems do not tell: O_DIRECT was accepted at open.
        Ok(_) | Err(Errno::NOSYS) => None,
        Err(e) => return Err(e),
    };
    Ok(match told {
        None => Some(BLOCK),
        Some((0, _) | (_, 0)) => None,
        Some((memory, offset)) => (memory <= BLOCK && offset <= BLOCK).then_some(offset),
    })
}
