//! A counter in a file of the same host: for trying things out.
//!
//! Protects against nothing that the host does: whoever can put an old volume back can put an old
//! counter back with it. It does tell a mix-up of copies, and two runs on one volume.
//!
//! Holds, on a host that does not cheat: one swap at a time (a lock beside the file), and after a
//! crash the file holds the old record or the new one, whole.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Once,
};

use postern_trusted::counter::{CounterError, Record, Swapped};
use rustix::fs::{FlockOperation, flock};

use super::{Provider, Trouble, record_of, text_of};

/// Longest content of a counter file in bytes.
const LONGEST: u64 = 200;

pub struct FileCounter {
    path: PathBuf,
    told: Once,
}

impl FileCounter {
    pub const fn new(path: PathBuf) -> Self {
        Self { path, told: Once::new() }
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(ending);
        PathBuf::from(name)
    }

    fn warn(&self) {
        self.told.call_once(|| {
            eprintln!(
                "postern: using the development counter {}: it protects against no host, which \
                 can put it back together with the volume",
                self.path.display()
            );
        });
    }

    /// Until it is dropped nobody else swaps.
    fn lock(&self) -> Result<File, Trouble> {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.beside(".lock"))
            .map_err(trouble)?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|errno| trouble(errno.into()))?;
        Ok(lock)
    }

    fn read(&self) -> Result<Option<Record>, Trouble> {
        let mut text = String::new();
        match File::open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file
                .and_then(|file| file.take(LONGEST).read_to_string(&mut text))
                .map_err(trouble)?,
        };
        record_of(&text)
            .map(Some)
            .ok_or_else(|| Trouble::new(CounterError::Malformed, "the file holds no record"))
    }

    fn write(&self, record: &Record) -> std::io::Result<()> {
        let new = self.beside(".new");
        let mut file = File::create(&new)?;
        file.write_all(format!("{}\n", text_of(record)).as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)?;
        let directory = self.path.parent().filter(|d| !d.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}

fn trouble(error: std::io::Error) -> Trouble {
    let kind = match error.kind() {
        ErrorKind::PermissionDenied => CounterError::Refused,
        _ => CounterError::Unreachable,
    };
    Trouble::new(kind, error)
}

impl Provider for FileCounter {
    fn load(&self) -> Result<Option<Record>, Trouble> {
        self.warn();
        self.read()
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Result<Swapped, Trouble> {
        self.warn();
        let _lock = self.lock()?;
        let held = self.read()?;
        if held != old {
            return Ok(Swapped::Lost(held));
        }
        self.write(&new).map_err(trouble)?;
        Ok(Swapped::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn record(sequence: u64) -> Record {
        Record { sequence, digest: [sequence as u8; 32] }
    }

    #[test]
    fn a_swap_happens_only_from_what_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let counter = || FileCounter::new(directory.path().join("c"));
        assert_eq!(counter().load().unwrap(), None);
        assert_eq!(counter().swap(Some(record(1)), record(2)).unwrap(), Swapped::Lost(None));
        assert_eq!(counter().swap(None, record(1)).unwrap(), Swapped::Done);
        assert_eq!(counter().swap(None, record(2)).unwrap(), Swapped::Lost(Some(record(1))));
        assert_eq!(counter().swap(Some(record(1)), record(2)).unwrap(), Swapped::Done);
        assert_eq!(counter().load().unwrap(), Some(record(2)));
    }

    #[test]
    fn of_many_swaps_from_one_record_one_happens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c");
        let counter = FileCounter::new(path.clone());
        counter.swap(None, record(1)).unwrap();
        let done: Vec<bool> = std::thread::scope(|scope| {
            let tries: Vec<_> = (2..10)
                .map(|n| {
                    let path = path.clone();
                    scope.spawn(move || {
                        let swapped = FileCounter::new(path).swap(Some(record(1)), record(n));
                        swapped.unwrap() == Swapped::Done
                    })
                })
                .collect();
            tries.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(done.iter().filter(|done| **done).count(), 1);
    }

    #[test]
    fn a_file_of_something_else_is_no_counter_and_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c");
        std::fs::write(&path, "something else").unwrap();
        let counter = FileCounter::new(path.clone());
        assert_eq!(counter.load().unwrap_err().error, CounterError::Malformed);
        assert_eq!(counter.swap(None, record(1)).unwrap_err().error, CounterError::Malformed);
        assert_eq!(std::fs::read(&path).unwrap(), b"something else");
    }
}
