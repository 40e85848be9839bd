//! A test's directory, the built parts, and runs of one program natively and inside.
//!
//! Needs the built commands `postern` and `posternd` beside the test, compilers, libaio's header,
//! and a target directory on ext4; says loudly what is missing and skips.

// Helpers outside of test functions panic too: that is how a test fails.
#![allow(clippy::unwrap_used)]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Size of the sealed volume and of the native file.
const SIZE: &str = "16M";

/// A test's directory and the built parts.
pub struct Ground {
    postern: PathBuf,
    directory: PathBuf,
}

/// How a command ended.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    #[track_caller]
    pub fn expect_success(self) -> String {
        assert_eq!(self.code, Some(0), "\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }
}

fn end(command: &mut Command) -> Result<Ended, String> {
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Ended {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    })
}

/// Says why a test does not run, past the test harness, which would keep it for itself.
pub fn skip(why: &str) {
    let test = std::thread::current();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {why}", test.name().unwrap_or("test"));
}

impl Ground {
    /// `None`, said loudly, where something is missing.
    pub fn find(name: &str) -> Option<Self> {
        Self::look(name).inspect_err(|missing| skip(missing)).ok()
    }

    fn look(name: &str) -> Result<Self, String> {
        let test = std::env::current_exe().map_err(|error| error.to_string())?;
        let built = test.ancestors().nth(2).ok_or("no target directory")?;
        for part in ["postern", "posternd", "libpostern_preload.so"] {
            if !built.join(part).exists() {
                return Err(format!("{part} is not built (cargo build --workspace)"));
            }
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("ordinary")).map_err(|error| error.to_string())?;
        let kind = end(Command::new("stat").args(["-f", "-c%T"]).arg(&directory))?;
        if !kind.stdout.starts_with("ext2/ext3") {
            return Err("the target directory is not on ext4".into());
        }
        Ok(Self { postern: built.join("postern"), directory })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Where the guest sees the volume or the directory; there is nothing there on the host.
    pub fn guest(&self) -> PathBuf {
        self.path("vault")
    }

    /// Compiles a program of this directory; `None`, said loudly, if that cannot be done here.
    /// Without warnings: wrong arguments are what the programs are about.
    pub fn compile(&self, compiler: &str, source: &str, options: &[&str]) -> Option<PathBuf> {
        let program = self.path(&source.replace('.', "_"));
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
        let mut command = Command::new(compiler);
        command.args(["-w", "-O1", "-o"]).arg(&program).arg(from).args(options);
        match end(&mut command) {
            Ok(Ended { code: Some(0), .. }) => Some(program),
            Ok(failed) => {
                skip(&format!("{source}: {compiler}: {}", failed.stderr));
                None
            }
            Err(missing) => {
                skip(&format!("{source}: {missing}"));
                None
            }
        }
    }

    /// `program` with `arguments` on the sealed volume, which is made the first time.
    pub fn protected<A: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Ended {
        let volume = self.path("volume");
        if !volume.exists() {
            let mut format = Command::new(&self.postern);
            end(format.arg("format").arg(&volume).args(["--size", SIZE])).unwrap().expect_success();
        }
        let mut mapping = OsString::from(self.guest());
        mapping.push("=");
        mapping.push(&volume);
        self.run(&[], &mapping, program, arguments)
    }

    /// `program` with `arguments`, with a protected directory at [`Self::guest`].
    pub fn in_protected_directory<A: AsRef<OsStr>>(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Ended {
        let mut mapping = OsString::from(self.guest());
        mapping.push("/=");
        mapping.push(self.path("host"));
        self.run(&["--create", SIZE], &mapping, program, arguments)
    }

    fn run<A: AsRef<OsStr>>(
        &self,
        options: &[&str],
        mapping: &OsStr,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Ended {
        let mut run = Command::new(&self.postern);
        run.args(["run", "--no-probes"]).args(options).arg("--volume").arg(mapping).arg("--");
        let ended = end(run.arg(program).args(arguments)).unwrap();
        assert!(!self.guest().exists(), "a plain file came into being under the protected name");
        ended
    }

    /// A directory of ordinary files.
    pub fn ordinary(&self) -> PathBuf {
        self.path("ordinary")
    }

    /// With the path of a native file or of the volume as first argument, and `more`: the same
    /// lines.
    pub fn compare(&self, program: &Path, more: &[&OsStr]) {
        let [there, here] = self.run_both(program, more);
        same_lines(there, here);
    }

    /// With the path of a native file as first argument, and with that of the volume.
    pub fn run_both(&self, program: &Path, more: &[&OsStr]) -> [Ended; 2] {
        let native = self.path("native");
        if !native.exists() {
            end(Command::new("truncate").args(["-s", SIZE]).arg(&native)).unwrap().expect_success();
            end(Command::new("chmod").arg("600").arg(&native)).unwrap().expect_success();
        }
        let there = end(Command::new(program).arg(&native).args(more)).unwrap();
        let guest = self.guest();
        [there, self.protected(program, [guest.as_os_str()].iter().chain(more))]
    }

    /// In a native directory and in a protected one: the same lines.
    pub fn compare_in_directory(&self, program: &Path) {
        let native = self.path("native");
        fs::create_dir(&native).unwrap();
        let there = end(Command::new(program).arg(&native)).unwrap();
        same_lines(there, self.in_protected_directory(program, [self.guest()]));
    }
}

#[track_caller]
fn same_lines(there: Ended, here: Ended) {
    let errors = here.stderr.clone();
    let [there, here] = [there.expect_success(), here.expect_success()];
    let all = format!("{here}{errors}");
    assert!(there.ends_with("done\n"), "the native run broke off:\n{there}");
    for (number, (there, here)) in there.lines().zip(here.lines()).enumerate() {
        let line = number + 1;
        assert_eq!(there, here, "line {line} (left: ext4, right: protected) of:\n{all}");
    }
    assert_eq!(there.lines().count(), here.lines().count(), "{here}");
}
