//! A volume's store on a plain host file, for the offline tools.
//!
//! Every future completes on the spot: one `pread` or `pwrite` per transfer, `O_DIRECT` with
//! aligned buffers. The file is held under its lease, as the daemon holds it: alone to write, with
//! others to read. A program that has the volume is asked to hand it over, and takes it back
//! afterwards.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use postern_lease::Use;

use postern_trusted::{
    disk::{BLOCK, Block, Disk, HostError, Transfer},
    platform::{NoEntropy, Platform},
};
use rustix::{
    fs::{AtFlags, OFlags, StatxFlags, fdatasync, fstatfs, statx},
    io::{Errno, pread, pwrite},
    rand::{GetRandomFlags, getrandom},
};

use crate::error::{Exit, Failure};

/// Largest transfer in blocks: 1 MiB.
const MAX_BLOCKS: usize = 256;
/// Times a short write is continued before it counts as failed.
const CONTINUATIONS: u32 = 3;
/// File system types (statfs(2)) that accept `O_DIRECT` and go through memory all the same.
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Seconds that this command waits for a volume that somebody else has.
static PATIENCE: AtomicU64 = AtomicU64::new(0);

/// Sets how long the command waits for a volume that somebody else has, in seconds.
pub fn set_patience(seconds: u32) {
    PATIENCE.store(seconds.into(), Ordering::Relaxed);
}

/// How a host file is opened.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Open for writing too.
    pub write: bool,
    /// Go on through the page cache where the file system does no direct I/O.
    pub allow_buffered: bool,
}

/// An open, locked host file.
pub struct FileDisk {
    file: Arc<File>,
    /// Blocks at the time of opening.
    blocks: u64,
    started: Instant,
}

impl FileDisk {
    /// Opens the existing host file `path` and locks it.
    ///
    /// # Errors
    /// [`Exit::NoVolume`], [`Exit::NoDirect`], [`Exit::InUse`], [`Exit::Permission`] as named.
    pub fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        let place = &path.display();
        let kind = std::fs::metadata(path).map_err(|error| missing(path, &error))?;
        if kind.is_dir() {
            return Err(Failure::new(
                Exit::NoVolume,
                "a directory is not a volume",
                place,
                "name the host file of the volume",
            ));
        }
        let mut file = None;
        let mut options = OpenOptions::new();
        options.read(true).write(access.write);
        match options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path) {
            Ok(direct) if does_direct_io(&direct) => file = Some(direct),
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
            Err(error) => return Err(Failure::io("cannot open the volume", place, &error)),
        }
        let file = match file {
            Some(file) => file,
            None if access.allow_buffered => options
                .open(path)
                .map_err(|error| Failure::io("cannot open the volume", place, &error))?,
            None => {
                return Err(Failure::new(
                    Exit::NoDirect,
                    "the host file system does no direct I/O (O_DIRECT)",
                    place,
                    "keep the volume on ext4, xfs or btrfs, or give --allow-buffered and accept \
                     slower I/O through the page cache",
                ));
            }
        };
        let usage = if access.write { Use::Alone } else { Use::Shared };
        let patience = Duration::from_secs(PATIENCE.load(Ordering::Relaxed));
        let leased = postern_lease::wait(&file, usage, patience)
            .map_err(|errno| Failure::io("cannot lock the volume", place, &errno.into()))?;
        if !leased {
            return Err(Failure::new(
                Exit::InUse,
                "the volume is in use",
                place,
                "who has it keeps it: a program with a lock on the file (fcntl, flock), one that was \
                 started with --exclusive, or one that is stopped; wait for it (--wait) or end it \
                 (`fuser -v FILE` names its daemon)",
            ));
        }
        let length = length_of(&file)
            .map_err(|error| Failure::io("cannot tell the size of the volume", place, &error))?;
        let file = Arc::new(file);
        Ok(Self { file, blocks: length / BLOCK as u64, started: Instant::now() })
    }
}

impl FileDisk {
    /// Bytes that the host's file system has really given to the file; `None` for a device.
    #[must_use]
    pub fn allocated(&self) -> Option<u64> {
        let data = self.file.metadata().ok()?;
        // POSIX leaves the unit open; on Linux it is 512 bytes.
        data.file_type().is_file().then(|| data.blocks() * 512)
    }

    /// Makes the host file `blocks` long.
    ///
    /// # Errors
    /// What the file system says: `EFBIG` where it can have no file of this length.
    pub fn set_blocks(&mut self, blocks: u64) -> io::Result<()> {
        self.file.set_len(blocks * BLOCK as u64)?;
        self.blocks = blocks;
        Ok(())
    }
}

/// The failure for a host file that cannot be looked at.
fn missing(path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::NotFound {
        return Failure::new(
            Exit::NoVolume,
            "no such volume",
            path.display(),
            "check the path, or make one with --create SIZE or `postern format`",
        );
    }
    Failure::io("cannot open the volume", path.display(), error)
}

/// Length in bytes, of block devices too.
fn length_of(mut file: &File) -> io::Result<u64> {
    use std::io::Seek as _;
    file.seek(io::SeekFrom::End(0))
}

/// Whether a file opened with `O_DIRECT` really bypasses the page cache. The open alone does not
/// tell: tmpfs takes the flag since Linux 6.6.
fn does_direct_io(file: &File) -> bool {
    // A block device's node lies on a tmpfs; what counts there is the device.
    let is_file = file.metadata().is_ok_and(|data| data.is_file());
    let memory = is_file
        && fstatfs(file).is_ok_and(|fs| {
            u64::try_from(fs.f_type).is_ok_and(|t| MEMORY_FILE_SYSTEMS.contains(&t))
        });
    // A file system that reports its alignment (Linux 6.1) and names none does no direct I/O.
    let refuses = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).is_ok_and(|stat| {
        stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align == 0
    });
    !memory && !refuses
}

impl Platform for FileDisk {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut filled = 0;
        while filled < out.len() {
            match getrandom(&mut out[filled..], GetRandomFlags::empty()) {
                Ok(n) => filled += n,
                Err(Errno::INTR) => {}
                Err(_) => return Err(NoEntropy),
            }
        }
        Ok(())
    }
}

impl Disk for FileDisk {
    type Transfer = FileTransfer;
    const MAX_BLOCKS: usize = MAX_BLOCKS;

    async fn transfer(&self, blocks: usize) -> Result<FileTransfer, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Errno(libc::ENOMEM))
    }

    fn try_transfer(&self, blocks: usize) -> Option<FileTransfer> {
        debug_assert!((1..=MAX_BLOCKS).contains(&blocks));
        let memory = vec![0; (blocks + 1) * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Some(FileTransfer { file: self.file.clone(), memory, start, blocks })
    }

    async fn flush(&self) -> Result<(), HostError> {
        fdatasync(&self.file).map_err(host_error)
    }

    fn host_blocks(&self) -> u64 {
        self.blocks
    }
}

/// A buffer aligned for `O_DIRECT`.
pub struct FileTransfer {
    file: Arc<File>,
    /// One block longer than needed: the blocks begin at the first aligned byte.
    memory: Vec<u8>,
    start: usize,
    blocks: usize,
}

impl FileTransfer {
    fn range(&self, first: usize, blocks: usize) -> core::ops::Range<usize> {
        debug_assert!(first + blocks <= self.blocks);
        self.start + first * BLOCK..self.start + (first + blocks) * BLOCK
    }
}

impl Transfer for FileTransfer {
    fn blocks(&self) -> usize {
        self.blocks
    }

    fn put(&mut self, index: usize, block: &Block) {
        let range = self.range(index, 1);
        self.memory[range].copy_from_slice(block);
    }

    fn get(&self, index: usize, block: &mut Block) {
        block.copy_from_slice(&self.memory[self.range(index, 1)]);
    }

    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        let range = self.range(0, self.blocks);
        let mut done = 0;
        while done < range.len() {
            let into = &mut self.memory[range.start + done..range.end];
            match pread(&self.file, into, place * BLOCK as u64 + done as u64) {
                // The end of the file lies inside the range.
                Ok(0) => return Err(HostError::Errno(libc::EIO)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(host_error(errno)),
            }
        }
        Ok(())
    }

    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        let range = self.range(0, blocks);
        let (mut done, mut continued) = (0, 0);
        while done < range.len() {
            let from = &self.memory[range.start + done..range.end];
            match pwrite(&self.file, from, place * BLOCK as u64 + done as u64) {
                Ok(n) if n >= BLOCK => done += n / BLOCK * BLOCK,
                Ok(_) if continued < CONTINUATIONS => continued += 1,
                Ok(_) => return Err(HostError::Errno(libc::ENOSPC)),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(host_error(errno)),
            }
        }
        Ok(())
    }
}

fn host_error(errno: Errno) -> HostError {
    HostError::Errno(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use postern_trusted::exec::run_to_end;

    const ANY: Access = Access { write: true, allow_buffered: true };

    fn file_of(blocks: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(blocks * BLOCK as u64).unwrap();
        file
    }

    #[test]
    fn what_is_written_at_a_place_lies_in_the_file_at_that_place() {
        let file = file_of(8);
        let disk = FileDisk::open(file.path(), ANY).unwrap();
        assert_eq!(disk.host_blocks(), 8);
        let mut two = disk.try_transfer(2).unwrap();
        two.put(0, &[1; BLOCK]);
        two.put(1, &[2; BLOCK]);
        run_to_end(two.write(5, 2)).unwrap();
        run_to_end(disk.flush()).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.iter().position(|&b| b == 1), Some(5 * BLOCK));
        assert_eq!(bytes[6 * BLOCK..7 * BLOCK], [2; BLOCK]);

        let mut back = disk.try_transfer(3).unwrap();
        run_to_end(back.read(4)).unwrap();
        let mut block = [9; BLOCK];
        back.get(0, &mut block);
        assert_eq!(block, [0; BLOCK]);
        back.get(2, &mut block);
        assert_eq!(block, [2; BLOCK]);
    }

    #[test]
    fn reading_past_the_end_of_the_file_is_an_error() {
        let file = file_of(2);
        let disk = FileDisk::open(file.path(), ANY).unwrap();
        let mut blocks = disk.try_transfer(2).unwrap();
        assert_eq!(run_to_end(blocks.read(1)), Err(HostError::Errno(libc::EIO)));
    }

    #[test]
    fn a_volume_is_opened_by_one_at_a_time() {
        let file = file_of(2);
        let first = FileDisk::open(file.path(), ANY).unwrap();
        assert_eq!(FileDisk::open(file.path(), ANY).err().map(|f| f.exit), Some(Exit::InUse));
        drop(first);
        FileDisk::open(file.path(), ANY).unwrap();
    }

    #[test]
    fn a_directory_or_a_missing_file_is_no_volume() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("none")] {
            assert_eq!(FileDisk::open(&path, ANY).err().map(|f| f.exit), Some(Exit::NoVolume));
        }
    }
}
