//! The same C program, natively on ext4 and under `postern run` on a protected path: it must print
//! the same lines. The expected values are the kernel's.
//!
//! Needs the built commands `postern` and `posternd` beside this library, a C compiler, and ext4
//! with O_DIRECT under the target directory; says loudly what is missing and skips.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Size of the sealed volume and of the native file.
const SIZE: &str = "16M";

/// Where things are, or what is missing.
struct Ground {
    postern: PathBuf,
    program: PathBuf,
    directory: PathBuf,
}

impl Ground {
    fn find(name: &str) -> Result<Self, String> {
        let test = std::env::current_exe().map_err(|error| error.to_string())?;
        let built = test.ancestors().nth(2).ok_or("no target directory")?;
        for part in ["postern", "posternd", "libpostern_preload.so"] {
            if !built.join(part).exists() {
                return Err(format!("{part} is not built (cargo build --workspace)"));
            }
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
        let kind = run("stat", ["-f".as_ref(), "-c%T".as_ref(), directory.as_os_str()])?;
        if !kind.stdout.starts_with(b"ext2/ext3") {
            return Err("the target directory is not on ext4".into());
        }
        let program = directory.join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name);
        let source = source.with_extension("c");
        // Without warnings: wrong arguments are what the program is about.
        run(
            "cc",
            [
                "-w".as_ref(),
                "-O1".as_ref(),
                "-o".as_ref(),
                program.as_os_str(),
                source.as_os_str(),
                "-laio".as_ref(),
            ],
        )?;
        Ok(Self { postern: built.join("postern"), program, directory })
    }

    fn native(&self) -> Result<Output, String> {
        let file = self.directory.join("native");
        run("truncate", ["-s".as_ref(), SIZE.as_ref(), file.as_os_str()])?;
        run("chmod", ["600".as_ref(), file.as_os_str()])?;
        run(&self.program, [file])
    }

    fn native_directory(&self) -> Result<Output, String> {
        let directory = self.directory.join("native");
        fs::create_dir(&directory).map_err(|error| error.to_string())?;
        run(&self.program, [directory])
    }

    fn protected_directory(&self) -> Result<Output, String> {
        let guest = self.directory.join("vault");
        let mut mapping = guest.clone().into_os_string();
        mapping.push("/=");
        mapping.push(self.directory.join("host"));
        run(
            &self.postern,
            [
                "run".as_ref(),
                "--no-probes".as_ref(),
                "--create".as_ref(),
                SIZE.as_ref(),
                "--volume".as_ref(),
                mapping.as_os_str(),
                "--".as_ref(),
                self.program.as_os_str(),
                guest.as_os_str(),
            ],
        )
    }

    fn protected(&self) -> Result<Output, String> {
        let volume = self.directory.join("volume");
        let guest = self.directory.join("vault");
        run(
            &self.postern,
            ["format".as_ref(), volume.as_os_str(), "--size".as_ref(), SIZE.as_ref()],
        )?;
        let mut mapping = guest.clone().into_os_string();
        mapping.push("=");
        mapping.push(&volume);
        run(
            &self.postern,
            [
                "run".as_ref(),
                "--no-probes".as_ref(),
                "--volume".as_ref(),
                mapping.as_os_str(),
                "--".as_ref(),
                self.program.as_os_str(),
                guest.as_os_str(),
            ],
        )
    }
}

fn run<A: AsRef<OsStr>>(
    command: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, String> {
    let command = command.as_ref();
    let output = Command::new(command)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", command.display()))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!(
        "{} ended with {}\n{}{}",
        command.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn compare(name: &str, what: &str) {
    compare_in(name, what, Ground::native, Ground::protected);
}

fn compare_in(
    name: &str,
    what: &str,
    native: impl FnOnce(&Ground) -> Result<Output, String>,
    protected: impl FnOnce(&Ground) -> Result<Output, String>,
) {
    let ground = match Ground::find(name) {
        Ok(ground) => ground,
        Err(missing) => {
            eprintln!("SKIPPED: {what} on ext4 and under Postern were not compared: {missing}");
            return;
        }
    };
    let native = native(&ground).unwrap_or_else(|why| panic!("{why}"));
    let protected = protected(&ground).unwrap_or_else(|why| panic!("{why}"));
    let [native, protected] =
        [&native, &protected].map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    assert!(native.ends_with("done\n"), "the native run broke off:\n{native}");
    for (number, (there, here)) in native.lines().zip(protected.lines()).enumerate() {
        assert_eq!(there, here, "line {} (left: ext4, right: protected)", number + 1);
    }
    assert_eq!(native.lines().count(), protected.lines().count(), "{protected}");
}

#[test]
fn file_calls_answer_on_a_protected_path_what_they_answer_on_ext4() {
    compare("files", "file calls");
}

#[test]
fn children_threads_and_moved_rings_behave_on_a_protected_path_as_on_ext4() {
    compare("processes", "children and rings");
}

#[test]
fn names_attributes_and_listings_of_a_protected_directory_are_what_ext4_has() {
    compare_in(
        "directory",
        "directory calls",
        Ground::native_directory,
        Ground::protected_directory,
    );
}

#[test]
fn mappings_and_sendfile_on_a_protected_path_behave_as_on_ext4() {
    compare("moving", "mappings and sendfile");
}

#[test]
fn locks_on_a_protected_path_behave_as_on_ext4() {
    compare("locking", "locks");
}

#[test]
fn descriptors_of_a_protected_file_pass_through_exec_as_on_ext4() {
    compare("inheriting", "descriptors after exec");
}

#[test]
fn posix_aio_on_a_protected_path_behaves_as_on_ext4() {
    compare("posixaio", "POSIX AIO");
}
