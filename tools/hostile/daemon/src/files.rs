//! The host's files, honestly read and written, and what lay in them before.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use postern_edl::{OPEN_READ_ONLY, calls::PosternFile};
use postern_hostile::{BLOCK_WORDS, Block, Store};
use rustix::io::Errno;

const BLOCK_BYTES: u64 = 4096;
/// Older contents that are kept, of all places together.
const KEPT: usize = 4096;
/// A host without room still has some for writes of so many bytes.
const SHORT: u64 = 4 * BLOCK_BYTES;

/// Names that the operator allowed.
#[derive(Debug, Default)]
pub struct Names {
    /// Host files by name.
    pub files: BTreeMap<String, PathBuf>,
    /// Directories of volumes by name.
    pub directories: BTreeMap<String, PathBuf>,
}

impl Names {
    /// The path behind a name: a file's, or one in a directory.
    fn path(&self, name: &str) -> Result<PathBuf, Errno> {
        if let Some(path) = self.files.get(name) {
            return Ok(path.clone());
        }
        let (directory, id) = name.split_once('/').ok_or(Errno::NOENT)?;
        let directory = self.directories.get(directory).ok_or(Errno::NOENT)?;
        // What the guest asks for is not in question here; the file system's answers are.
        if id.contains('/') || id.starts_with('.') {
            return Err(Errno::INVAL);
        }
        Ok(directory.join(id))
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> Result<(), Errno> {
        fs::remove_file(self.path(name)?).map_err(|error| errno(&error))
    }

    /// The ids above `after` in a directory, sorted.
    pub fn list(&self, name: &str, after: &str, most: usize) -> Result<Vec<u8>, Errno> {
        let directory = self.directories.get(name).ok_or(Errno::NOENT)?;
        let entries = fs::read_dir(directory).map_err(|error| errno(&error))?;
        let mut ids: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|id| id.len() == 32 && id.as_str() > after)
            .collect();
        ids.sort();
        ids.truncate(most);
        Ok(ids.concat().into_bytes())
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The open files of one session, by handle. Cheap to share.
#[derive(Clone, Debug)]
pub struct Files {
    names: Arc<Names>,
    open: Arc<Mutex<Open>>,
    /// Where only short writes find room, while that file is there.
    full_while: Option<Arc<Path>>,
}

#[derive(Debug, Default)]
struct Open {
    files: BTreeMap<u32, (Arc<File>, u32)>,
    last: u32,
    /// Older contents, the oldest first.
    before: VecDeque<(u32, u64, Box<Block>)>,
}

impl Files {
    /// No open files; handles above `taken` are given out.
    pub fn new(names: Arc<Names>, taken: u32, full_while: Option<Arc<Path>>) -> Self {
        let open = Open { last: taken, ..Open::default() };
        Self { names, open: Arc::new(Mutex::new(open)), full_while }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a file; under `handle`, if that is not 0.
    pub fn open(&self, name: &str, flags: u32, handle: u32) -> Result<PosternFile, Errno> {
        let path = self.names.path(name)?;
        let writes = flags & OPEN_READ_ONLY == 0;
        let file = File::options().read(true).write(writes).open(path);
        self.add(file.map_err(|error| errno(&error))?, handle)
    }

    /// Makes a file of `blocks` blocks and opens it.
    pub fn create(&self, name: &str, blocks: u64) -> Result<PosternFile, Errno> {
        let path = self.names.path(name)?;
        let file = File::options().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|error| errno(&error))?;
        let bytes = blocks.checked_mul(BLOCK_BYTES).ok_or(Errno::INVAL)?;
        file.set_len(bytes).map_err(|error| errno(&error))?;
        self.add(file, 0)
    }

    fn add(&self, file: File, handle: u32) -> Result<PosternFile, Errno> {
        let length = file.metadata().map_err(|error| errno(&error))?.len();
        let mut open = self.lock();
        let handle = if handle == 0 {
            open.last += 1;
            open.last
        } else {
            handle
        };
        let entry = open.files.entry(handle).or_insert((Arc::new(file), 0));
        entry.1 += 1;
        let blocks = length / BLOCK_BYTES;
        Ok(PosternFile { handle, flags: 0, blocks, alignment: BLOCK_BYTES })
    }

    /// Gives a file back.
    pub fn close(&self, handle: u32) -> Result<(), Errno> {
        let mut open = self.lock();
        let (_, opens) = open.files.get_mut(&handle).ok_or(Errno::BADF)?;
        *opens -= 1;
        if *opens == 0 {
            open.files.remove(&handle);
        }
        Ok(())
    }

    /// Any handle that is open, the `which`th.
    pub fn any(&self, which: usize) -> Option<u32> {
        let open = self.lock();
        open.files.keys().nth(which % open.files.len().max(1)).copied()
    }

    fn file(&self, handle: u32) -> Option<Arc<File>> {
        self.lock().files.get(&handle).map(|(file, _)| Arc::clone(file))
    }
}

impl Store for Files {
    fn read(&mut self, handle: u32, block: u64) -> Block {
        let mut bytes = [0; BLOCK_WORDS * 8];
        let at = block.checked_mul(BLOCK_BYTES);
        if let (Some(file), Some(at)) = (self.file(handle), at) {
            let mut done = 0;
            while let Ok(more @ 1..) = file.read_at(&mut bytes[done..], at + done as u64) {
                done += more;
            }
        }
        let mut words = [0; BLOCK_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
        }
        words
    }

    fn write(&mut self, handle: u32, block: u64, content: &Block) {
        let before = Box::new(self.read(handle, block));
        let Some(file) = self.file(handle) else { return };
        let bytes: Vec<u8> = content.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // As far as it goes: a file neither grows nor matters beyond its end.
        let length = file.metadata().map_or(0, |file| file.len());
        if block.checked_mul(BLOCK_BYTES).is_some_and(|at| at < length) {
            let _ = file.write_all_at(&bytes, block * BLOCK_BYTES);
        }
        let mut open = self.lock();
        if open.before.len() == KEPT {
            open.before.pop_front();
        }
        open.before.push_back((handle, block, before));
    }

    fn older(&mut self, handle: u32, block: u64, which: usize) -> Option<Block> {
        let open = self.lock();
        let all = open.before.iter().filter(|old| (old.0, old.1) == (handle, block));
        let all: Vec<&Block> = all.map(|(_, _, content)| &**content).collect();
        all.get(which % all.len().max(1)).map(|content| **content)
    }

    fn flush(&mut self, handle: u32) {
        if let Some(file) = self.file(handle) {
            let _ = file.sync_data();
        }
    }

    fn has_room(&self, bytes: u64) -> bool {
        bytes <= SHORT || self.full_while.as_ref().is_none_or(|path| !path.exists())
    }
}
