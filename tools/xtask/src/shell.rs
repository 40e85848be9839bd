//! Running other programs, and saying how long each step took.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Where the sources and what is built from them lie.
pub struct Tree {
    /// Root of the sources.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

impl Tree {
    /// Finds the tree that this task was started in.
    ///
    /// # Errors
    /// If the sources have moved since xtask was built.
    pub fn find() -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest
            .ancestors()
            .nth(2)
            .filter(|root| root.join("Cargo.lock").is_file())
            .with_context(|| format!("no workspace above {}", manifest.display()))?
            .to_owned();
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
            || root.join("target"),
            |given| root.join(given), // An absolute path replaces the root.
        );
        Ok(Self { root, target })
    }

    /// Where the parts of a release build lie side by side.
    pub fn release(&self) -> PathBuf {
        self.target.join("release")
    }

    /// The cargo that runs this task, in the root.
    pub fn cargo(&self) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(&self.root);
        command
    }

    /// An empty directory of this name under the target directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn fresh_directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.target.join(name);
        if path.exists() {
            std::fs::remove_dir_all(&path)
                .with_context(|| format!("cannot clear {}", path.display()))?;
        }
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

/// Does one step and says how long it took.
///
/// # Errors
/// What the step answers, with its name.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let started = Instant::now();
    let done = work().with_context(|| format!("step failed: {name}"))?;
    eprintln!("    {name}: {}", elapsed(started.elapsed()));
    Ok(done)
}

/// A duration for people.
pub fn elapsed(time: Duration) -> String {
    let tenths = time.as_millis() / 100;
    let (seconds, tenth) = (tenths / 10, tenths % 10);
    if seconds < 60 {
        return format!("{seconds}.{tenth} s");
    }
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

/// The command line of `command`, for messages.
pub fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        // Writing into a String cannot fail.
        let _ = write!(line, " {}", argument.to_string_lossy());
    }
    line
}

/// Runs `command` with this task's own input and output.
///
/// # Errors
/// If it cannot be started or does not answer 0.
pub fn run(command: &mut Command) -> Result<()> {
    let line = line_of(command);
    let status = command.status().with_context(|| format!("cannot start: {line}"))?;
    if !status.success() {
        bail!("{status}: {line}");
    }
    Ok(())
}

/// Runs `command` and answers what it printed, whatever its exit status.
///
/// # Errors
/// If it cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    let line = line_of(command);
    command.output().with_context(|| format!("cannot start: {line}"))
}

/// Runs `command` and answers what it printed on standard output.
///
/// # Errors
/// If it cannot be started or does not answer 0; its standard error is part of the message.
pub fn answer(command: &mut Command) -> Result<String> {
    let done = output(command)?;
    if !done.status.success() {
        let line = line_of(command);
        bail!("{}: {line}\n{}", done.status, String::from_utf8_lossy(&done.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Whether `program` is found in `PATH`.
pub fn on_path(program: impl AsRef<OsStr>) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program.as_ref()).is_file())
}

/// Whether this process may do what root may.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    // The owner of /proc/self is the effective user.
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A path relative to the current directory where it lies below it, for messages.
pub fn show(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_a_clock() {
        assert_eq!(elapsed(Duration::from_millis(1_249)), "1.2 s");
        assert_eq!(elapsed(Duration::from_secs(65)), "1 min 05 s");
    }

    #[test]
    fn a_failing_command_is_named_with_its_status() {
        let error = run(Command::new("false").arg("x")).unwrap_err().to_string();
        assert!(error.contains("exit status: 1") && error.contains("false x"), "{error}");
        let error = answer(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[test]
    fn the_tree_is_found_from_the_manifest() {
        assert!(Tree::find().unwrap().root.join("edl/postern.edl").is_file());
    }
}
