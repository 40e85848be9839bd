//! The private directory of one run: the daemon's socket, the run file, the daemon's words.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Exit, Failure};

/// Longest path of the directory: a socket's path has at most 107 bytes (unix(7)).
const LONGEST: usize = 90;

/// A directory that only its owner can enter; removed with all it holds when dropped.
pub struct RunDirectory(PathBuf);

impl RunDirectory {
    /// Makes one under `$XDG_RUNTIME_DIR`, else under the directory for temporary files.
    ///
    /// # Errors
    /// If neither can be written to.
    pub fn make() -> Result<Self, Failure> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let bases = runtime
            .into_iter()
            .filter(|base| base.is_absolute() && base.is_dir())
            .chain([std::env::temp_dir(), PathBuf::from("/tmp")]);
        let mut last = None;
        for base in bases {
            match Self::make_in(&base) {
                Ok(directory) => return Ok(directory),
                Err(error) => last = Some((base, error)),
            }
        }
        let (base, error) = last.unwrap_or_else(|| {
            (PathBuf::from("/tmp"), std::io::Error::from(std::io::ErrorKind::NotFound))
        });
        Err(Failure::io("cannot make a directory for this run", base.display(), &error))
    }

    fn make_in(base: &Path) -> std::io::Result<Self> {
        let mut number = [0_u8; 8];
        getrandom(&mut number, GetRandomFlags::empty())?;
        let name = format!("postern-{}-{:016x}", std::process::id(), u64::from_ne_bytes(number));
        let path = base.join(name);
        if path.as_os_str().len() > LONGEST {
            return Err(std::io::Error::from(std::io::ErrorKind::InvalidFilename));
        }
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// The path of `name` in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes the new file `name`, readable by its owner only.
    ///
    /// # Errors
    /// If the host has no room.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, Failure> {
        let path = self.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(content))
            .map_err(|error| Failure::io("cannot write", path.display(), &error))?;
        Ok(path)
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            let left =
                Failure::new(Exit::Internal, error, self.0.display(), "remove this directory");
            eprintln!("{left}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_directory_is_private_and_leaves_nothing_behind() {
        let base = tempfile::tempdir().unwrap();
        let directory = RunDirectory::make_in(base.path()).unwrap();
        let mode = std::fs::metadata(&directory.0).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        let file = directory.write("run.json", b"{}").unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(directory.write("run.json", b"{}").is_err(), "never over an existing file");
        drop(directory);
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_base_too_long_for_a_socket_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("x".repeat(LONGEST));
        std::fs::create_dir(&deep).unwrap();
        assert!(RunDirectory::make_in(&deep).is_err());
    }
}
