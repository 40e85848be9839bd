//! Hands what passphrases were stretched to over to the program's enclave: in memory files that the
//! program inherits, one for each volume.
//!
//! Holds: nothing of it touches a disk, and the daemon never has such a descriptor: they are made
//! after it was started, and only the program's own start takes off their close-on-exec flag.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{error::Failure, key::Key};

/// Memory files, open until the program has been started. The enclave wipes them when it has read
/// them.
pub struct KeyMemory {
    _files: Vec<File>,
}

impl KeyMemory {
    /// Name of the memory file for the volume that the daemon calls `volume`.
    pub fn name(volume: &str) -> String {
        format!("postern-key-{volume}")
    }

    /// Makes one for each volume's key and lets the program inherit it.
    ///
    /// # Errors
    /// If the system has no memory or descriptors left.
    pub fn hand_to<'a>(
        command: &mut Command,
        keys: impl Iterator<Item = (&'a str, &'a Key)>,
    ) -> Result<Self, Failure> {
        let files: io::Result<Vec<File>> = keys
            .map(|(volume, key)| {
                let made = memfd_create(&*Self::name(volume), MemfdFlags::CLOEXEC)?;
                let mut file = File::from(made);
                file.write_all(&**key)?;
                Ok(file)
            })
            .collect();
        let files = files.map_err(|error| {
            Failure::io("cannot make a memory file for a key of", "the program", &error)
        })?;
        let descriptors: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        if !descriptors.is_empty() {
            // SAFETY: between fork and exec: system calls only, nothing allocates.
            unsafe {
                command.pre_exec(move || {
                    for descriptor in &descriptors {
                        if libc::fcntl(*descriptor, libc::F_SETFD, 0) < 0 {
                            return Err(io::Error::last_os_error());
                        }
                    }
                    Ok(())
                });
            }
        }
        Ok(Self { _files: files })
    }
}
