//! Finds the program and tells whether the enclave's library can be loaded into it.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::SeekFrom,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, access},
    process::{getegid, geteuid},
};

use crate::error::{Exit, Failure};

/// The search path of execvp(3) when `PATH` is not set.
const DEFAULT_PATH: &str = "/usr/local/bin:/bin:/usr/bin";

/// The file that `name` means, as a shell would find it: by path if it has a slash, else in `PATH`.
///
/// # Errors
/// [`Exit::NotFound`] if there is none, [`Exit::CannotExecute`] if it cannot run, or cannot run
/// with the enclave's library in it (static, set-user-ID, not x86-64).
pub fn find(name: &OsStr, path: Option<OsString>) -> Result<PathBuf, Failure> {
    let found = locate(name, path)?;
    check_image(&found)?;
    Ok(found)
}

fn locate(name: &OsStr, path: Option<OsString>) -> Result<PathBuf, Failure> {
    let shown = Path::new(name).display();
    let not_found = |advice: &str| Failure::new(Exit::NotFound, "no such program", shown, advice);
    if name.is_empty() {
        return Err(not_found("give the program after `--`"));
    }
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return match executable(&file) {
            Verdict::Runs => Ok(file),
            Verdict::Missing => Err(not_found("check the path")),
            Verdict::Refused => Err(refused(&file)),
        };
    }
    let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
    let mut denied = None;
    for directory in std::env::split_paths(&path) {
        // An empty entry means the current directory.
        let directory = if directory.as_os_str().is_empty() { ".".into() } else { directory };
        let file = directory.join(name);
        match executable(&file) {
            Verdict::Runs => return Ok(file),
            Verdict::Missing => {}
            Verdict::Refused => denied = denied.or(Some(file)),
        }
    }
    Err(denied.map_or_else(|| not_found("it is in no directory of PATH"), |file| refused(&file)))
}

enum Verdict {
    Runs,
    Missing,
    Refused,
}

fn executable(file: &Path) -> Verdict {
    match std::fs::metadata(file) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Verdict::Refused,
        Err(_) => Verdict::Missing,
        Ok(kind) if !kind.is_file() => Verdict::Refused,
        Ok(_) if access(file, Access::EXEC_OK).is_ok() => Verdict::Runs,
        Ok(_) => Verdict::Refused,
    }
}

fn refused(file: &Path) -> Failure {
    Failure::new(
        Exit::CannotExecute,
        "not executable",
        file.display(),
        "it must be a regular file that you may execute",
    )
}

/// Refuses what the dynamic linker would start without our library: the program would find no
/// volume under its paths and work on ordinary files, unsealed.
fn check_image(file: &Path) -> Result<(), Failure> {
    let refuse = |what: &str, advice: &str| {
        Err(Failure::new(Exit::CannotExecute, what, file.display(), advice))
    };
    let Ok(mut image) = File::open(file) else {
        // Executable and not readable: the kernel will run it, nothing can be told beforehand.
        return Ok(());
    };
    if let Ok(kind) = image.metadata() {
        let other_user = kind.mode() & 0o4000 != 0 && kind.uid() != geteuid().as_raw();
        let other_group = kind.mode() & 0o2010 == 0o2010 && kind.gid() != getegid().as_raw();
        if other_user || other_group {
            return refuse(
                "a set-user-ID program",
                "the dynamic linker loads no library of ours into it; run a copy without that bit",
            );
        }
    }
    match kind_of(&mut image) {
        Image::Dynamic | Image::Other => Ok(()),
        Image::Static => refuse(
            "statically linked",
            "the enclave's library cannot be loaded into it; use a dynamically linked build",
        ),
        Image::Foreign => refuse("not an x86-64 Linux program", "use an x86-64 build"),
        Image::Script(interpreter) => {
            let Ok(mut image) = File::open(&interpreter) else { return Ok(()) };
            match kind_of(&mut image) {
                Image::Static | Image::Foreign => refuse(
                    &format!("its interpreter {} takes no library", interpreter.display()),
                    "use a dynamically linked x86-64 interpreter",
                ),
                _ => Ok(()),
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Image {
    /// An x86-64 program with an interpreter (the dynamic linker).
    Dynamic,
    Static,
    Foreign,
    Script(PathBuf),
    /// Nothing known; the kernel decides.
    Other,
}

/// elf(5): the header's machine, and whether a PT_INTERP entry exists.
fn kind_of(image: &mut (impl std::io::Read + std::io::Seek)) -> Image {
    const MACHINE_X86_64: u16 = 62;
    const PT_INTERP: [u8; 4] = 3_u32.to_le_bytes();
    const MAX_HEADERS: u64 = 4096;
    let mut head = [0_u8; 256];
    let mut length = 0;
    while let Ok(n) = image.read(&mut head[length..]) {
        if n == 0 {
            break;
        }
        length += n;
    }
    if head.starts_with(b"#!") {
        let line = head[2..length].split(|&b| b == b'\n').next().unwrap_or_default();
        let line = line.trim_ascii();
        let word = line.split(|b| b.is_ascii_whitespace()).next().unwrap_or_default();
        return Image::Script(PathBuf::from(OsStr::from_bytes(word)));
    }
    if length < 64 || !head.starts_with(b"\x7fELF") {
        return Image::Other;
    }
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    // Class 2 is 64-bit, data encoding 1 little endian.
    if head[4] != 2 || head[5] != 1 || half(18) != MACHINE_X86_64 {
        return Image::Foreign;
    }
    let mut word = [0; 8];
    word.copy_from_slice(&head[32..40]);
    let (start, entry, count) = (u64::from_le_bytes(word), half(54), half(56));
    for n in 0..u64::from(count).min(MAX_HEADERS) {
        let mut kind = [0; 4];
        let at = start.saturating_add(n * u64::from(entry));
        if image.seek(SeekFrom::Start(at)).and_then(|_| image.read_exact(&mut kind)).is_err() {
            return Image::Other;
        }
        if kind == PT_INTERP {
            return Image::Dynamic;
        }
    }
    Image::Static
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Cursor, os::unix::fs::PermissionsExt};

    fn exit_of(name: &str, path: Option<&str>) -> Exit {
        find(OsStr::new(name), path.map(OsString::from)).unwrap_err().exit
    }

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        for at in [&first, &second] {
            std::fs::create_dir(at).unwrap();
            std::fs::write(at.join("tool"), "#!/bin/sh\n").unwrap();
        }
        let search = std::env::join_paths([&first, &second]).unwrap();
        // Not executable in the first directory: the search goes on.
        std::fs::set_permissions(second.join("tool"), PermissionsExt::from_mode(0o755)).unwrap();
        let found = find(OsStr::new("tool"), Some(search)).unwrap();
        assert_eq!(found, second.join("tool"));
        assert_eq!(exit_of("tool", first.to_str()), Exit::CannotExecute);
        assert_eq!(exit_of("tool", Some("/nonexistent")), Exit::NotFound);
        assert_eq!(exit_of("/nonexistent/tool", None), Exit::NotFound);
        assert_eq!(exit_of("/tmp", None), Exit::CannotExecute);
        assert_eq!(exit_of("", None), Exit::NotFound);
    }

    /// A 64-bit ELF header with the given machine and program header types.
    fn elf(machine: u16, headers: &[u32]) -> Cursor<Vec<u8>> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(headers.len()).unwrap();
        for kind in headers {
            let mut entry = [0; 56];
            entry[..4].copy_from_slice(&kind.to_le_bytes());
            bytes.extend(entry);
        }
        Cursor::new(bytes)
    }

    #[test]
    fn only_an_x86_64_image_with_an_interpreter_takes_a_library() {
        assert_eq!(kind_of(&mut elf(62, &[6, 3, 1])), Image::Dynamic);
        assert_eq!(kind_of(&mut elf(62, &[1, 1, 2])), Image::Static);
        assert_eq!(kind_of(&mut elf(183, &[6, 3, 1])), Image::Foreign);
        assert_eq!(kind_of(&mut Cursor::new(b"#! /bin/sh -e\n")), Image::Script("/bin/sh".into()));
        assert_eq!(kind_of(&mut Cursor::new(b"")), Image::Other);
        let this = std::env::current_exe().unwrap();
        assert_eq!(kind_of(&mut File::open(this).unwrap()), Image::Dynamic);
    }
}
