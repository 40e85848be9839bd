//! Calls that no symbol sees: the C library's inside itself, a program's own instructions, a
//! signal handler's in the middle of another call. C and C++ programs run natively on ext4 and
//! under `postern run`, and must print the same lines; where the answer is Postern's own (a call it
//! refuses) the test names the errno.
//!
//! Needs the built commands `postern` and `posternd` beside this library, compilers, libaio's
//! header, and a target directory on ext4; says loudly what is missing and skips.

// Helpers outside of test functions panic too: that is how a test fails.
#![allow(clippy::unwrap_used)]

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const SIZE: &str = "16M";

/// A test's directory and the built parts.
struct Ground {
    postern: PathBuf,
    directory: PathBuf,
}

/// How a command ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    #[track_caller]
    fn expect_success(self) -> String {
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

impl Ground {
    /// `None`, said loudly, where something is missing.
    fn find(name: &str) -> Option<Self> {
        Self::look(name)
            .inspect_err(|missing| eprintln!("SKIPPED: {name} under Postern: {missing}"))
            .ok()
    }

    fn look(name: &str) -> Result<Self, String> {
        let test = std::env::current_exe().map_err(|error| error.to_string())?;
        let built = test.ancestors().nth(2).ok_or("no target directory")?;
        for part in ["postern", "posternd", "libpostern_preload.so"] {
            if !built.join(part).exists() {
                return Err(format!("{part} is not built (cargo build --workspace)"));
            }
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("raw-{name}"));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("ordinary")).map_err(|error| error.to_string())?;
        let kind = end(Command::new("stat").args(["-f", "-c%T"]).arg(&directory))?;
        if !kind.stdout.starts_with("ext2/ext3") {
            return Err("the target directory is not on ext4".into());
        }
        Ok(Self { postern: built.join("postern"), directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Where the guest sees the volume; there is no such file on the host.
    fn guest(&self) -> PathBuf {
        self.path("vault")
    }

    /// Compiles a program of this directory; `None`, said loudly, if that cannot be done here.
    fn compile(&self, compiler: &str, source: &str, options: &[&str]) -> Option<PathBuf> {
        let program = self.path(&source.replace('.', "_"));
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
        let mut command = Command::new(compiler);
        command.args(["-w", "-O1", "-o"]).arg(&program).arg(from).args(options);
        match end(&mut command) {
            Ok(Ended { code: Some(0), .. }) => Some(program),
            Ok(failed) => {
                eprintln!("SKIPPED: {source}: {compiler}: {}", failed.stderr);
                None
            }
            Err(missing) => {
                eprintln!("SKIPPED: {source}: {missing}");
                None
            }
        }
    }

    /// `program` with `arguments` on the sealed volume, which is made the first time.
    fn protected<A: AsRef<OsStr>>(
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
        let mut run = Command::new(&self.postern);
        run.args(["run", "--no-probes", "--volume"]).arg(mapping).arg("--");
        let ended = end(run.arg(program).args(arguments)).unwrap();
        assert!(!self.guest().exists(), "a plain file came into being under the protected name");
        ended
    }

    /// Natively and inside: the same lines.
    fn compare(&self, program: &Path, last: Option<&str>) {
        let native = self.path("native");
        end(Command::new("truncate").args(["-s", SIZE]).arg(&native)).unwrap().expect_success();
        end(Command::new("chmod").arg("600").arg(&native)).unwrap().expect_success();
        let ordinary = self.path("ordinary");
        let last = last.map_or(ordinary.as_os_str(), OsStr::new);
        let there = end(Command::new(program).arg(&native).arg(last)).unwrap().expect_success();
        let here = self.protected(program, [self.guest().as_os_str(), last]).expect_success();
        assert!(there.ends_with("done\n"), "the native run broke off:\n{there}");
        for (number, (there, here)) in there.lines().zip(here.lines()).enumerate() {
            assert_eq!(there, here, "line {} (left: ext4, right: protected)", number + 1);
        }
        assert_eq!(there.lines().count(), here.lines().count(), "{here}");
    }
}

#[test]
fn streams_and_temporary_files_behave_on_a_protected_path_as_on_ext4() {
    let Some(ground) = Ground::find("streams") else { return };
    let Some(program) = ground.compile("cc", "streams.c", &[]) else { return };
    ground.compare(&program, None);
}

#[test]
fn cpp_streams_and_cancelled_threads_behave_on_a_protected_path_as_on_ext4() {
    let Some(ground) = Ground::find("cpp") else { return };
    let Some(program) = ground.compile("c++", "streams.cc", &["-pthread"]) else { return };
    ground.compare(&program, None);
}

#[test]
fn children_and_masks_that_a_trapping_filter_kills_work_under_ours() {
    let Some(ground) = Ground::find("started") else { return };
    let Some(program) = ground.compile("cc", "started.c", &["-pthread"]) else { return };
    ground.compare(&program, None);
}

#[test]
fn after_ten_thousand_handlers_that_call_in_or_jump_out_everything_still_works() {
    let Some(ground) = Ground::find("handlers") else { return };
    let Some(program) = ground.compile("cc", "handlers.c", &["-laio"]) else { return };
    ground.compare(&program, Some("10000"));
}

#[test]
fn calls_by_instructions_of_the_programs_own_are_refused_and_leave_no_plain_file() {
    let Some(ground) = Ground::find("instructions") else { return };
    let Some(program) = ground.compile("cc", "instructions.c", &[]) else { return };
    let ordinary = ground.path("plain");
    let ended = ground.protected(&program, [ground.guest(), ordinary]);
    let said = ended.stderr.clone();
    if said.contains("raw system calls are not covered") {
        eprintln!("SKIPPED: instructions: this host gives no seccomp listener: {said}");
        return;
    }
    let [access, bad] = [libc::EACCES, libc::EBADF].map(|errno| -errno);
    let none = -libc::ENOSYS;
    let expected = format!(
        "openat: {access}\ncreat: {access}\nrename onto it: {access}\nmkdir: {access}\n\
         io_uring_setup: {none}\nan ordinary file: 1 5 0\nopen: 1\nwrite, read: {bad} {bad}\n\
         fsync, fdatasync, fchmod: {bad} {bad} {bad}\ndone\n"
    );
    assert_eq!(ended.expect_success(), expected);
    let vault = ground.guest().display().to_string();
    assert!(
        said.lines().any(|line| line.starts_with("postern: ") && line.contains(&vault)),
        "{said}"
    );
}

#[test]
fn a_static_program_is_refused_the_protected_path_and_leaves_no_plain_file() {
    let Some(ground) = Ground::find("static") else { return };
    let Some(program) = ground.compile("cc", "instructions.c", &["-static"]) else { return };
    let line = format!(
        "{} {} {}",
        program.display(),
        ground.guest().display(),
        ground.path("plain").display()
    );
    let ended = ground.protected("sh", ["-c", &line]);
    if ended.stderr.contains("raw system calls are not covered") {
        eprintln!("SKIPPED: static: this host gives no seccomp listener: {}", ended.stderr);
        return;
    }
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("open: 0\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("an ordinary file: 1 5 0\n"), "{}", ended.stdout);
    assert!(ended.stderr.contains("refused (EACCES)"), "{}", ended.stderr);
}

#[test]
fn a_shells_redirections_append_one_after_the_other() {
    let Some(ground) = Ground::find("shell") else { return };
    let vault = ground.guest().display().to_string();
    let script = format!(
        "echo one > {vault}; echo two >> {vault}; (echo three >> {vault}); \
         for n in 1 2 3 4; do (i=0; while [ $i -lt 25 ]; do echo $n >> {vault}; i=$((i+1)); done) & \
         done; wait; while read -r line; do echo $line; done < {vault}"
    );
    let said = ground.protected("sh", ["-c", &script]).expect_success();
    let mut lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.drain(..3).collect::<Vec<_>>(), ["one", "two", "three"]);
    lines.sort_unstable();
    let expected: Vec<&str> = ["1", "2", "3", "4"].into_iter().flat_map(|n| [n; 25]).collect();
    assert_eq!(lines, expected);
}
