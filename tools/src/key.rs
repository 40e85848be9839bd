//! Key files: 32 bytes as they are, or 64 hexadecimal digits and an optional newline.
//!
//! Holds: a key is never printed, never put on a command line, and wiped from memory after use. A
//! development key is made only for a volume that is made in the same breath.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use postern_sim::config::parse_key;
use postern_trusted::volume::SlotKey;
use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

use crate::{
    cli::PassphraseArgs,
    disk::Access,
    error::{Exit, Failure},
    passphrase::Age,
    volume,
};

/// A volume key.
pub type Key = Zeroizing<[u8; 32]>;

/// Where the enclave gets the key of a volume from.
pub enum KeySource {
    /// A key file.
    File(PathBuf),
    /// What a passphrase was stretched to: handed over in memory.
    Stretched(Key),
}

impl KeySource {
    /// Does the work of a passphrase that opens the volume in `path`.
    ///
    /// # Errors
    /// As [`volume::stretch`].
    pub fn stretched(path: &Path, words: &SlotKey, access: Access) -> Result<Self, Failure> {
        volume::stretch(path, words, access).map(Self::Stretched)
    }
}

/// Where the development key of `volume` lies: `volume.key` beside it.
pub fn beside(volume: &Path) -> PathBuf {
    let mut name = volume.as_os_str().to_owned();
    name.push(".key");
    PathBuf::from(name)
}

/// Reads the key in `path`.
///
/// # Errors
/// [`Exit::Key`] if the file is missing, unreadable, or holds neither form of a key.
pub fn read(path: &Path) -> Result<Key, Failure> {
    let fail = |what: &str, advice: &str| Failure::new(Exit::Key, what, path.display(), advice);
    let mut file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            fail("no such key file", "check the path given with --key-file")
        }
        _ => fail(&format!("cannot read the key file: {error}"), "check its owner and mode"),
    })?;
    // One byte more than the longest form, so that a longer file is seen to be longer.
    let mut text = Zeroizing::new([0_u8; 66]);
    let mut length = 0;
    while length < text.len() {
        match file.read(&mut text[length..]) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(fail(
                    &format!("cannot read the key file: {error}"),
                    "it must be a regular file",
                ));
            }
        }
    }
    parse_key(&text[..length]).map(Zeroizing::new).map_err(|bad| {
        // A file that filled the whole buffer may be longer still.
        let found = match bad.length {
            66 => "this file is longer".to_owned(),
            length => format!("this file has {length} bytes"),
        };
        fail(
            "not a key",
            &format!(
                "a key file holds exactly 32 bytes, or 64 hexadecimal digits; {found}; \
                 make one with `head -c 32 /dev/urandom > FILE`"
            ),
        )
    })
}

/// Makes a fresh key in the new file `path`, readable by its owner only.
///
/// # Errors
/// If the file exists, cannot be written, or the system gives no randomness.
pub fn create(path: &Path) -> Result<(), Failure> {
    let io =
        |error: &std::io::Error| Failure::io("cannot make the key file", path.display(), error);
    let mut key = Zeroizing::new([0_u8; 32]);
    let mut filled = 0;
    while filled < key.len() {
        filled += getrandom(&mut key[filled..], GetRandomFlags::empty())
            .map_err(|errno| io(&errno.into()))?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| io(&error))?;
    file.write_all(&*key).and_then(|()| file.sync_all()).map_err(|error| {
        // A half-written key is worse than none.
        let _ = std::fs::remove_file(path);
        io(&error)
    })
}

/// Which key file a command works with: the one given, or the development key beside the volume.
/// Says on stderr that a development key is in use.
///
/// # Errors
/// [`Exit::Key`] if there is none.
pub fn choose(given: Option<&Path>, volume: &Path) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let path = beside(volume);
    if !path.exists() {
        return Err(Failure::new(
            Exit::Key,
            "no key for this volume",
            volume.display(),
            format_args!("give --key-file FILE (there is no {} either)", path.display()),
        ));
    }
    eprintln!("postern: using the development key {}", path.display());
    Ok(path)
}

/// The key that a command presents to `volume`: its passphrase, or a key file as [`choose`] has it.
///
/// # Errors
/// [`Exit::Key`] if there is none, or it is no key.
pub fn present(
    passphrase: &PassphraseArgs,
    key_file: Option<&Path>,
    volume: &Path,
) -> Result<SlotKey, Failure> {
    match passphrase.get(Age::Known)? {
        Some(words) => Ok(words),
        None => Ok(SlotKey::new(*read(&choose(key_file, volume)?)?)),
    }
}

/// As [`choose`], for a volume that `make` makes with the key: a development key that is missing
/// is made too, and removed again if the volume could not be made.
///
/// # Errors
/// Those of `make`; [`Exit::Key`] for a key file that is none.
pub fn choose_and_make(
    given: Option<&Path>,
    volume: &Path,
    make: impl FnOnce(&[u8; 32]) -> Result<(), Failure>,
) -> Result<PathBuf, Failure> {
    let path = beside(volume);
    if given.is_some() || path.exists() {
        let path = choose(given, volume)?;
        make(&*read(&path)?)?;
        return Ok(path);
    }
    create(&path)?;
    if let Err(failure) = read(&path).and_then(|key| make(&key)) {
        let _ = std::fs::remove_file(&path);
        return Err(failure);
    }
    eprintln!(
        "postern: made a development key {}; for real data keep the key elsewhere and give --key-file",
        path.display()
    );
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_of_another_length_is_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for length in [0, 31, 33, 63, 65, 66, 100_000] {
            std::fs::write(&path, vec![b'a'; length]).unwrap();
            assert_eq!(read(&path).unwrap_err().exit, Exit::Key, "{length}");
        }
        std::fs::write(&path, [b'a'; 64]).unwrap();
        assert_eq!(*read(&path).unwrap(), [0xaa; 32]);
    }

    #[test]
    fn a_key_made_for_a_volume_goes_if_the_volume_could_not_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v.img");
        let full = || Err(Failure::new(Exit::NoSpace, "full", "v.img", "make room"));
        let failure = choose_and_make(None, &volume, |_| full()).unwrap_err();
        assert_eq!((failure.exit, beside(&volume).exists()), (Exit::NoSpace, false));
        let mut used = [0; 32];
        let path = choose_and_make(None, &volume, |key| {
            used = *key;
            Ok(())
        });
        assert_eq!(*read(&path.unwrap()).unwrap(), used);
        // A key that was there stays, whatever happens to the volume.
        choose_and_make(None, &volume, |_| full()).unwrap_err();
        assert_eq!(*read(&choose(None, &volume).unwrap()).unwrap(), used);
    }

    #[test]
    fn a_made_key_is_private_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = beside(&dir.path().join("v.img"));
        create(&path).unwrap();
        let first = read(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(create(&path).is_err());
        assert_eq!(read(&path).unwrap(), first);
        assert_ne!(*first, [0; 32]);
    }
}
