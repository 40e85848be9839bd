//! What every end-to-end test starts from: the parts, a directory of its own, commands with a
//! limit on their time.

use std::{
    ffi::{OsStr, OsString},
    io::Read as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Names the directory with `postern`, `posternd` and the library.
const PARTS_VARIABLE: &str = "POSTERN_E2E_PARTS";
/// A command that runs longer than this hangs. Far above what any of them takes.
const HANGS_AFTER: Duration = Duration::from_secs(240);

/// A test's surroundings; the directory goes when it is dropped.
pub struct World {
    parts: PathBuf,
    directory: tempfile::TempDir,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The exit code, or 128 + signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Panics with everything it said unless it ended with `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// Panics unless it ended with `code` and one line on stderr that has `words` in it.
    #[track_caller]
    pub fn expect_line(self, code: i32, words: &str) {
        let lines: Vec<&str> =
            self.stderr.lines().filter(|line| !line.starts_with("postern: using the ")).collect();
        assert_eq!(self.code(), code, "\nstdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert_eq!(lines.len(), 1, "one line on stderr: {}", self.stderr);
        let line = lines[0];
        assert!(line.starts_with("postern: ") && line.contains(words), "{words}: {line}");
        assert!(line.matches(": ").count() >= 3, "what, where, what to do: {line}");
    }
}

/// Says loudly that a test does not run, and why.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {}: {why}", std::thread::current().name().unwrap_or("test"));
}

impl World {
    /// The surroundings of one test; `None` (said loudly) where the parts are not built or fio is
    /// missing.
    pub fn new() -> Option<Self> {
        let Some(parts) = std::env::var_os(PARTS_VARIABLE).map(PathBuf::from) else {
            skip("run `cargo xtask test` or `cargo xtask e2e`");
            return None;
        };
        for part in ["postern", "posternd", "libpostern_preload.so"] {
            assert!(parts.join(part).is_file(), "{part} is not built in {}", parts.display());
        }
        if !on_path("fio") {
            skip("fio is not installed");
            return None;
        }
        // Beside the parts: the target directory lies on a real disk, other than /tmp at times.
        let base = parts.join("e2e");
        std::fs::create_dir_all(&base).unwrap();
        Some(Self { parts, directory: tempfile::tempdir_in(base).unwrap() })
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The test's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// `postern` with `arguments`, in the test's directory.
    pub fn postern<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command(self.parts.join("postern"));
        command.args(arguments);
        command
    }

    /// `program`, in the test's directory.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.directory()).env("LC_ALL", "C");
        // What a killed run leaves goes with the test's directory.
        command.env("XDG_RUNTIME_DIR", self.directory());
        command
    }

    /// A part's path.
    pub fn part(&self, name: &str) -> PathBuf {
        self.parts.join(name)
    }

    /// Makes the volume `name` of `size`, with a development key beside it.
    #[track_caller]
    pub fn format(&self, name: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        end(&mut self.postern([
            OsStr::new("format"),
            path.as_os_str(),
            "--size".as_ref(),
            size.as_ref(),
        ]))
        .expect(0);
        path
    }

    /// `postern run` of `program` with the volume under `/sealed/data`, without probes.
    pub fn run<A: AsRef<OsStr>>(
        &self,
        volume: &Path,
        program: impl IntoIterator<Item = A>,
    ) -> Command {
        self.run_with(volume, &["--no-probes"], program)
    }

    /// As [`Self::run`], with options of one's own.
    pub fn run_with<A: AsRef<OsStr>>(
        &self,
        volume: &Path,
        options: &[&str],
        program: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut shown = OsString::from("/sealed/data=");
        shown.push(volume);
        let mut command = self.postern(["run", "--volume"]);
        command.arg(shown).args(options).arg("--").args(program);
        command
    }

    /// fio on the volume, with a name, an engine and a report that fits on a line.
    pub fn fio(&self, volume: &Path, arguments: &[&str]) -> Ended {
        let fixed = fio_words("/sealed/data");
        let words = fixed.iter().map(String::as_str).chain(arguments.iter().copied());
        end(&mut self.run(volume, words))
    }

    /// fio on a plain file, as a control.
    pub fn plain_fio(&self, file: &Path, arguments: &[&str]) -> Ended {
        let fixed = fio_words(&file.display().to_string());
        let mut command = Command::new("fio");
        command.args(&fixed[1..]).args(arguments).current_dir(self.directory());
        end(&mut command)
    }

    /// Compiles the C program `guests/NAME.c` against libaio; `None` (said loudly) without a
    /// compiler.
    pub fn guest(&self, name: &str) -> Option<PathBuf> {
        if !on_path("cc") || !Path::new("/usr/include/libaio.h").is_file() {
            skip("no C compiler, or no libaio-dev");
            return None;
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/guests");
        let program = self.path(name);
        let mut command = Command::new("cc");
        command.args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program);
        command.arg(source.join(format!("{name}.c"))).arg("-laio");
        end(&mut command).expect(0);
        Some(program)
    }
}

/// fio and what all its runs here share. A wrong block ends the run (`verify_fatal`): without it
/// fio only looks at the last verified part of each request.
pub fn fio_words(file: &str) -> Vec<String> {
    [
        "fio",
        "--name=e2e",
        &format!("--filename={file}"),
        "--ioengine=libaio",
        "--direct=1",
        "--eta=never",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--minimal",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Whether `program` is in PATH.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Whether this is root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// A started command; killed when dropped.
pub struct Running {
    child: Child,
    readers: Vec<std::thread::JoinHandle<String>>,
}

/// Starts `command`, gathering what it says.
#[track_caller]
pub fn begin(command: &mut Command) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let readers = vec![
        std::thread::spawn(move || {
            let mut text = Vec::new();
            out.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        }),
        std::thread::spawn(move || {
            let mut text = Vec::new();
            err.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        }),
    ];
    Running { child, readers }
}

/// Runs `command` to its end.
#[track_caller]
pub fn end(command: &mut Command) -> Ended {
    begin(command).wait()
}

impl Running {
    /// The process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end; panics if it hangs.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < HANGS_AFTER, "hangs: process {}", self.child.id());
            std::thread::sleep(Duration::from_millis(1));
        };
        let mut said = self.readers.drain(..).map(|reader| reader.join().unwrap());
        let (stdout, stderr) = (said.next().unwrap(), said.next().unwrap());
        Ended { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.readers.is_empty() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits until `condition` gives something; panics if it never does.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(started.elapsed() < HANGS_AFTER, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends a signal with kill(1).
pub fn signal(name: &str, pid: u32) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// The children of a process, oldest first.
pub fn children(pid: u32) -> Vec<u32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// The short name of a process.
pub fn name_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}
