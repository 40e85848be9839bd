//! The two places where the program runs, and what it printed there.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Names the directory with `postern`, `posternd` and the library.
const PARTS_VARIABLE: &str = "POSTERN_E2E_PARTS";
/// Size of each sealed volume.
const VOLUME_SIZE: &str = "64M";

/// A run that takes longer hangs. Cases that hang are ended by the program itself.
const HANGS_AFTER: Duration = Duration::from_secs(300);

/// What each case or sequence said, in order.
pub type Transcripts = BTreeMap<String, Vec<String>>;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a plain file.
    Native,
    /// Under `postern run`, on a protected path.
    Inside,
}

/// The surroundings of one test; others wait until it is dropped, because both look at counts of
/// the whole machine.
pub struct Ground {
    parts: PathBuf,
    directory: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Ground {
    /// The surroundings; `None` (said loudly) where something is missing.
    pub fn new() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let Some(parts) = std::env::var_os(PARTS_VARIABLE).map(PathBuf::from) else {
            skip("run `cargo xtask test` or `cargo xtask conformance`");
            return None;
        };
        for part in ["postern", "posternd", "libpostern_preload.so"] {
            assert!(parts.join(part).is_file(), "{part} is not built in {}", parts.display());
        }
        let base = parts.join("e2e");
        std::fs::create_dir_all(&base).unwrap();
        let directory = tempfile::tempdir_in(base).unwrap();
        let mut stat = Command::new("stat");
        let kind = stat.args(["-f", "-c%T"]).arg(directory.path()).output().unwrap();
        if !kind.stdout.starts_with(b"ext2/ext3") {
            skip("the target directory is not on ext4, which the protected file is compared with");
            return None;
        }
        if !takes_direct(&directory.path().join("direct")) {
            skip("the target directory's disk does not take O_DIRECT");
            return None;
        }
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Self { parts, directory, _alone })
    }

    /// What the program prints with these arguments. If it breaks off, that counts as said by the
    /// case that it did last, and the rest runs anew.
    pub fn once(&self, place: Place, number: usize, arguments: &[OsString]) -> Transcripts {
        let mut all = Transcripts::new();
        loop {
            let directory = tempfile::tempdir_in(self.directory.path()).unwrap();
            let mut command = self.program(place, directory.path());
            // The subcommand's name comes first.
            let file = match place {
                Place::Native => directory.path().join("file"),
                Place::Inside => PathBuf::from("/sealed/data"),
            };
            command.arg(&arguments[0]).arg("--file").arg(file);
            command.arg("--scratch").arg(directory.path());
            command.args(&arguments[1..]).args(["--skip", &all.len().to_string()]);
            let ended = run(&mut command, &directory.path().join("output"));
            let (mut said, last) = transcripts(&ended.stdout);
            if ended.stdout.ends_with("done\n") {
                all.extend(said);
                return all;
            }
            let broken = format!("{command:?} broke off: {}\n{}", ended.end, ended.stderr);
            assert!(!said.is_empty(), "{broken}");
            eprintln!("{place:?} {number}, after {last}: {broken}");
            said.entry(last).or_default().push("here the run broke off".into());
            all.extend(said);
        }
    }

    /// The same, dealt into parts that run at the same time in both places: native, inside.
    /// `deal` gives the arguments of a part, by its number and how many there are.
    pub fn both(&self, deal: &(dyn Fn(usize, usize) -> Vec<OsString> + Sync)) -> [Transcripts; 2] {
        // Natively most of the time goes by in waiting.
        const PARTS: [(Place, usize); 2] = [(Place::Native, 6), (Place::Inside, 2)];
        thread::scope(|scope| {
            let started = PARTS.map(|(place, parts)| {
                let one = |part| scope.spawn(move || self.once(place, part, &deal(part, parts)));
                (0..parts).map(one).collect::<Vec<_>>()
            });
            started.map(|parts| {
                let join = |part: thread::ScopedJoinHandle<'_, Transcripts>| match part.join() {
                    Ok(said) => said,
                    Err(panic) => std::panic::resume_unwind(panic),
                };
                parts.into_iter().flat_map(join).collect()
            })
        })
    }

    /// The program on a new file, in a directory of its own.
    fn program(&self, place: Place, directory: &Path) -> Command {
        match place {
            Place::Native => Command::new(env!("CARGO_BIN_EXE_postern-conformance")),
            Place::Inside => {
                let volume = directory.join("volume");
                let mut format = self.postern("format");
                format.arg(&volume).args(["--size", VOLUME_SIZE]);
                assert!(format.output().unwrap().status.success(), "{format:?}");
                let mut shown = OsString::from("/sealed/data=");
                shown.push(&volume);
                let mut command = self.postern("run");
                command.args(["--no-probes", "--volume"]).arg(shown).arg("--");
                command.arg(env!("CARGO_BIN_EXE_postern-conformance"));
                command
            }
        }
    }

    fn postern(&self, task: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(self.parts.join("postern"));
        command.arg(task).env("XDG_RUNTIME_DIR", self.directory.path());
        command
    }
}

/// Whether a file can be opened with `O_DIRECT` there.
fn takes_direct(path: &Path) -> bool {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

/// Says why a test does not run, past the test harness, which would keep it for itself.
fn skip(why: &str) {
    say(&format!("SKIPPED: {}: {why}", thread::current().name().unwrap_or("test")));
}

/// Says something past the test harness.
pub fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// How a command ended.
struct Ended {
    end: String,
    stdout: String,
    stderr: String,
}

/// Runs a command whose output goes to files: what it leaves running holds nobody up.
fn run(command: &mut Command, output: &Path) -> Ended {
    let place = |name: &str| output.with_extension(name);
    let file = |name: &str| std::fs::File::create(place(name)).unwrap();
    command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let started = Instant::now();
    let end = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.to_string();
        }
        if started.elapsed() > HANGS_AFTER {
            let _ = child.kill();
            let _ = child.wait();
            break format!("it took more than {HANGS_AFTER:?}");
        }
        // Not to wait for anything to happen, but to let others run.
        thread::sleep(Duration::from_millis(5));
    };
    let text = |name: &str| {
        String::from_utf8_lossy(&std::fs::read(place(name)).unwrap_or_default()).into_owned()
    };
    Ended { end, stdout: text("out"), stderr: text("err") }
}

/// What each case said, and the name of the last.
fn transcripts(printed: &str) -> (Transcripts, String) {
    let mut all = Transcripts::new();
    let mut name = String::new();
    for line in printed.trim_end_matches("done\n").lines() {
        if let Some(next) = line.strip_prefix("== ") {
            next.clone_into(&mut name);
            all.insert(name.clone(), Vec::new());
        } else if let Some(lines) = all.get_mut(&name) {
            lines.push(line.to_owned());
        }
    }
    (all, name)
}

/// The two transcripts side by side, from a little before the first difference on.
pub fn side_by_side(native: &[String], inside: &[String], most: usize) -> String {
    let nothing = String::from("(nothing)");
    let count = native.len().max(inside.len());
    let line = |lines: &[String], at: usize| lines.get(at).unwrap_or(&nothing).clone();
    let pairs: Vec<_> = (0..count).map(|at| (line(native, at), line(inside, at))).collect();
    let first = pairs.iter().position(|(native, inside)| native != inside).unwrap_or(count);
    let mut text = String::new();
    for (native, inside) in pairs.iter().skip(first.saturating_sub(4)).take(most) {
        if native == inside {
            text.push_str(&format!("      both   | {native}\n"));
        } else {
            text.push_str(&format!("      native | {native}\n      inside | {inside}\n"));
        }
    }
    text
}
