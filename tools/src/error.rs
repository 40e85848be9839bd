//! How the command ends: one line for the person, one exit code for the script.
//!
//! Every failure prints `postern: what: where: what to do` on stderr and leaves with its own code.
//! Codes 64 to 78 follow sysexits(3) where a meaning fits; 126 and 127 are the shell's own.

use core::fmt;

/// Exit codes. `docs/OPERATIONS.md` and `--help` list the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command line is wrong.
    Usage = 64,
    /// The volume is damaged: what the host stores does not authenticate or is too short.
    Damaged = 65,
    /// The volume file does not exist or is not a file.
    NoVolume = 66,
    /// The key is missing, has a wrong length, or is not the key of this volume.
    Key = 67,
    /// The host file system does no direct I/O.
    NoDirect = 68,
    /// The daemon is not there or does not answer.
    NoDaemon = 69,
    /// A fault of Postern itself or of its installation.
    Internal = 70,
    /// The host has no room for the volume.
    NoSpace = 72,
    /// Another process has the volume open.
    InUse = 73,
    /// The host failed to read or write.
    Io = 74,
    /// The monotonic counter gives no answer.
    NoCounter = 75,
    /// The volume is not in the newest state that its counter knows.
    RolledBack = 76,
    /// The host refuses access.
    Permission = 77,
    /// The program exists and cannot be run inside the enclave.
    CannotExecute = 126,
    /// There is no such program.
    NotFound = 127,
}

/// Why the command stops.
#[derive(Debug)]
pub struct Failure {
    /// Leaves the process with this code.
    pub exit: Exit,
    what: String,
    place: String,
    advice: String,
}

impl Failure {
    /// `what` went wrong, at which `place`, and the `advice` what to do about it.
    pub fn new(
        exit: Exit,
        what: impl fmt::Display,
        place: impl fmt::Display,
        advice: impl fmt::Display,
    ) -> Self {
        Self { exit, what: what.to_string(), place: place.to_string(), advice: advice.to_string() }
    }

    /// A failed system call on a host path; `doing` says what was tried.
    pub fn io(doing: &str, place: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let (exit, advice) = match error.kind() {
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
                (Exit::Permission, "check the owner and mode of the file and its directory")
            }
            Kind::FileTooLarge => (
                Exit::NoSpace,
                "the host file system can have no file of this length (ext4 ends one at 16 TiB - 4 \
                 KiB): use XFS, or a smaller size",
            ),
            Kind::StorageFull | Kind::QuotaExceeded => {
                (Exit::NoSpace, "make room on the host, or use another file system")
            }
            Kind::NotFound => (Exit::NoVolume, "check the path"),
            _ => (Exit::Io, "see the host's log for the cause"),
        };
        Self::new(exit, format_args!("{doing}: {}", plain(error)), place, advice)
    }
}

/// The system's words for an error, without the number that std appends.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let cut = text.find(" (os error").unwrap_or(text.len());
    let mut words = text[..cut].to_owned();
    if let Some(first) = words.get(..1).map(str::to_lowercase) {
        words.replace_range(..1, &first);
    }
    words
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line whatever a path or a system message contains.
        let line = format!("postern: {}: {}: {}", self.what, self.place, self.advice);
        f.write_str(&line.replace(['\n', '\r'], " "))
    }
}

impl core::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_of_three_parts() {
        let failure = Failure::new(Exit::NoVolume, "no such\nvolume", "/a/b", "create it");
        assert_eq!(failure.to_string(), "postern: no such volume: /a/b: create it");
    }

    #[test]
    fn host_errors_sort_by_who_has_to_act() {
        let of = |errno| {
            Failure::io("cannot write", "f", &std::io::Error::from_raw_os_error(errno)).exit
        };
        assert_eq!(of(libc::ENOSPC), Exit::NoSpace);
        assert_eq!(of(libc::EDQUOT), Exit::NoSpace);
        assert_eq!(of(libc::EFBIG), Exit::NoSpace);
        assert_eq!(of(libc::EACCES), Exit::Permission);
        assert_eq!(of(libc::EROFS), Exit::Permission);
        assert_eq!(of(libc::EIO), Exit::Io);
    }

    #[test]
    fn the_number_of_a_system_error_is_left_out() {
        let failure =
            Failure::io("cannot open", "f", &std::io::Error::from_raw_os_error(libc::EIO));
        let line = failure.to_string();
        assert!(line.starts_with("postern: cannot open: input/output error: f: "), "{line}");
    }
}
