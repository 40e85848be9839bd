//! The private directory of one run: the daemon's socket, the run file, the daemon's words.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Exit, Failure};

/// Longest path of the directory: a socket's path has at most 107 bytes (unix(7)).
const LONGEST: usize = 90;

/// Beginning of the directory's name; the number of its process and a random number follow.
const PREFIX: &str = "postern-";

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
        sweep(base);
        let mut number = [0_u8; 8];
        getrandom(&mut number, GetRandomFlags::empty())?;
        let name = format!("{PREFIX}{}-{:016x}", std::process::id(), u64::from_ne_bytes(number));
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

/// Removes what runs of this user left behind that were killed. A directory whose process number
/// is in use again stays for the next time.
fn sweep(base: &Path) {
    let Ok(entries) = base.read_dir() else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(process_of) else { continue };
        // Not followed: a link of that name is none of ours.
        let ours = entry
            .path()
            .symlink_metadata()
            .is_ok_and(|kind| kind.is_dir() && kind.uid() == rustix::process::geteuid().as_raw());
        if ours && !Path::new("/proc").join(pid.to_string()).exists() {
            // Another run may be sweeping too.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The process that a directory of this name belongs to.
fn process_of(name: &str) -> Option<u32> {
    let (pid, random) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let hex = random.len() == 16 && random.bytes().all(|digit| digit.is_ascii_hexdigit());
    pid.parse().ok().filter(|_| hex)
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
    fn what_a_killed_run_left_is_swept_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        // No process has this number: the kernel's limit is 2^22.
        let dead = "postern-4194305-0123456789abcdef";
        let living = format!("postern-{}-0123456789abcdef", std::process::id());
        let others =
            [&living, "postern-4194305-0123", "postern-x-0123456789abcdef", "postern-data"];
        for name in others.iter().copied().chain([dead]) {
            std::fs::create_dir(base.path().join(name)).unwrap();
            std::fs::write(base.path().join(name).join("run.json"), b"{}").unwrap();
        }
        drop(RunDirectory::make_in(base.path()).unwrap());
        assert!(!base.path().join(dead).exists());
        assert!(others.iter().all(|name| base.path().join(name).join("run.json").exists()));
    }

    #[test]
    fn a_base_too_long_for_a_socket_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("x".repeat(LONGEST));
        std::fs::create_dir(&deep).unwrap();
        assert!(RunDirectory::make_in(&deep).is_err());
    }
}
