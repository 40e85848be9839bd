//! What a run needs, checked before anything is started or made.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use postern_sim::config::MOST_VOLUMES;

use crate::{
    cli::RunArgs,
    error::{Exit, Failure},
    key,
    run::{parts, program},
};

/// One protected file.
#[derive(Debug, PartialEq, Eq)]
pub struct PlannedVolume {
    /// Absolute path under which the program sees it.
    pub guest_path: String,
    /// Host file as given; with a daemon of someone else's, that daemon's name for it.
    pub host_file: PathBuf,
    /// A directory of files, each a volume; the guest path was given with a slash at its end.
    pub directory: bool,
    /// The program can only read it.
    pub read_only: bool,
}

/// Everything that could be checked without touching a volume.
pub struct Plan {
    /// In the order given.
    pub volumes: Vec<PlannedVolume>,
    /// The program's file.
    pub program: PathBuf,
    /// `posternd`; `None` with `--socket`.
    pub daemon: Option<PathBuf>,
    /// The library for `LD_PRELOAD`.
    pub preload: PathBuf,
}

impl Plan {
    /// Checks the command line of `postern run` against the host.
    ///
    /// # Errors
    /// The first thing that will not do, with its exit code.
    pub fn make(args: &RunArgs) -> Result<Self, Failure> {
        let volumes = volumes(&args.volume, &args.volume_ro)?;
        let counters = args.counter.counter.len();
        if counters > 0 && counters != volumes.len() {
            return Err(Failure::new(
                Exit::Usage,
                "not as many counters as volumes",
                format_args!("{counters} for {}", volumes.len()),
                "give one --counter for each --volume and --volume-ro, in the same order, or none",
            ));
        }
        let name = args.program.first().map(OsString::as_os_str).unwrap_or_default();
        let program = program::find(name, std::env::var_os("PATH"))?;
        if let Some(file) = &args.key_file {
            key::read(file)?;
        }
        for file in [&args.stats, &args.daemon_log].into_iter().flatten() {
            let directory = file.parent().filter(|d| !d.as_os_str().is_empty());
            if file.is_dir() || !directory.unwrap_or(Path::new(".")).is_dir() {
                return Err(Failure::new(
                    Exit::Usage,
                    "no file can be made there",
                    file.display(),
                    "its directory must exist",
                ));
            }
        }
        let preload = parts::PRELOAD.find()?;
        if preload.as_os_str().as_bytes().iter().any(|b| b" :\t\n".contains(b)) {
            return Err(Failure::new(
                Exit::Internal,
                "the dynamic linker takes no library with a blank or colon in its path",
                preload.display(),
                "install Postern under a path without them",
            ));
        }
        let daemon = match args.socket {
            Some(_) => None,
            None => Some(parts::DAEMON.find()?),
        };
        Ok(Self { volumes, program, daemon, preload })
    }
}

impl PlannedVolume {
    /// Whether `other` lies beneath this one's path.
    fn has(&self, other: &Self) -> bool {
        let rest = other.guest_path.strip_prefix(&self.guest_path);
        rest.is_some_and(|rest| rest.starts_with('/'))
    }
}

/// Reads every `--volume`, then every `--volume-ro`.
fn volumes(given: &[OsString], read_only: &[OsString]) -> Result<Vec<PlannedVolume>, Failure> {
    let count = given.len() + read_only.len();
    if count > MOST_VOLUMES {
        return Err(Failure::new(
            Exit::Usage,
            "too many volumes",
            count,
            format_args!("a run takes at most {MOST_VOLUMES}"),
        ));
    }
    let read_only = read_only.iter().map(|given| {
        let volume = volume(given)?;
        if volume.directory {
            return Err(Failure::new(
                Exit::Usage,
                "a protected directory is not shared",
                format_args!("--volume-ro {}", given.to_string_lossy()),
                "give it with --volume",
            ));
        }
        Ok(PlannedVolume { read_only: true, ..volume })
    });
    let volumes: Vec<PlannedVolume> =
        given.iter().map(volume).chain(read_only).collect::<Result<_, _>>()?;
    let (mut guests, mut hosts) = (BTreeSet::new(), BTreeSet::new());
    for volume in &volumes {
        let twice = |what: &str, place: &dyn core::fmt::Display| {
            Failure::new(Exit::Usage, what, place, "give each --volume once")
        };
        if !guests.insert(volume.guest_path.clone()) {
            return Err(twice("two volumes under one path", &volume.guest_path));
        }
        if let Some(other) = volumes.iter().find(|other| other.directory && other.has(volume)) {
            return Err(Failure::new(
                Exit::Usage,
                "one protected path inside another",
                format_args!("{} in {}/", volume.guest_path, other.guest_path),
                "put them side by side",
            ));
        }
        let host = volume.host_file.canonicalize().unwrap_or_else(|_| volume.host_file.clone());
        if !hosts.insert(host) {
            return Err(twice("one volume under two paths", &volume.host_file.display()));
        }
    }
    Ok(volumes)
}

/// Reads one `GUEST_PATH=HOST_FILE`.
fn volume(given: &OsString) -> Result<PlannedVolume, Failure> {
    let bad = |what: &str, advice: &str| {
        Failure::new(
            Exit::Usage,
            what,
            format_args!("--volume {}", given.to_string_lossy()),
            advice,
        )
    };
    let bytes = given.as_bytes();
    let Some(split) = bytes.iter().position(|&b| b == b'=') else {
        return Err(bad("no `=` in the volume", "write GUEST_PATH=HOST_FILE"));
    };
    let (guest, host) = (&bytes[..split], &bytes[split + 1..]);
    let Ok(guest_path) = str::from_utf8(guest) else {
        return Err(bad("the guest path is not UTF-8", "use another path"));
    };
    let (guest_path, directory) = match guest_path.strip_suffix('/') {
        Some(path) if !path.is_empty() => (path, true),
        _ => (guest_path, false),
    };
    if !guest_path.starts_with('/') {
        return Err(bad("the guest path is not absolute", "write it from the root, /like/this"));
    }
    let plain =
        guest_path[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain || guest_path.len() > 4095 {
        return Err(bad(
            "the guest path is not a plain file path",
            "leave out `.`, `..` and empty parts; a slash at the end makes it a directory",
        ));
    }
    if host.is_empty() {
        return Err(bad("no host file in the volume", "write GUEST_PATH=HOST_FILE"));
    }
    let host_file = PathBuf::from(OsString::from_vec(host.to_vec()));
    if host_file.to_str().is_none() {
        return Err(bad("the host file's path is not UTF-8", "use another path"));
    }
    Ok(PlannedVolume { guest_path: guest_path.to_owned(), host_file, directory, read_only: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_equals_sign_parts_guest_path_and_host_file() {
        let made = volume(&"/sealed/data=some=file".into()).unwrap();
        assert_eq!(made.guest_path, "/sealed/data");
        assert_eq!(made.host_file, PathBuf::from("some=file"));
    }

    #[test]
    fn a_malformed_volume_is_refused_and_shown() {
        for text in [
            "",
            "x",
            "/x",
            "=",
            "=h",
            "/x=",
            "x=h",
            "./x=h",
            "/=h",
            "//x=h",
            "/x//=h",
            "/x/../y=h",
            "/./x=h",
        ] {
            let failure = volume(&text.into()).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{text}");
            assert!(failure.to_string().contains(text), "{failure}");
        }
    }

    #[test]
    fn a_slash_at_the_end_makes_a_directory_that_nothing_else_lies_in() {
        let made = volume(&"/data/=host".into()).unwrap();
        assert_eq!((made.guest_path.as_str(), made.directory), ("/data", true));
        let of = |list: &[&str]| volumes(&list.iter().map(OsString::from).collect::<Vec<_>>(), &[]);
        assert!(of(&["/data/=x", "/data2=y", "/other/=z"]).is_ok());
        assert!(of(&["/data/=x", "/data/file=y"]).is_err());
        assert!(of(&["/data/=x", "/data=y"]).is_err());
    }

    #[test]
    fn neither_a_guest_path_nor_a_host_file_is_taken_twice() {
        let of = |list: &[&str]| volumes(&list.iter().map(OsString::from).collect::<Vec<_>>(), &[]);
        assert!(of(&["/a=x", "/b=y"]).is_ok());
        assert!(of(&["/a=x", "/a=y"]).is_err());
        assert!(of(&["/a=x", "/b=x"]).is_err());
        assert!(of(&["/a=/dev/null", "/b=/dev/../dev/null"]).is_err());
        assert!(volumes(&["/a=x".into()], &["/b=x".into()]).is_err());
    }

    #[test]
    fn a_file_can_be_read_only_and_a_directory_can_not() {
        let made = volumes(&["/a=x".into()], &["/b=y".into()]).unwrap();
        assert_eq!(made.iter().map(|volume| volume.read_only).collect::<Vec<_>>(), [false, true]);
        assert!(volumes(&[], &["/b/=y".into()]).is_err());
    }
}
