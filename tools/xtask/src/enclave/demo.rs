//! `cargo xtask enclave demo`: a load inside a genuine enclave image through a real daemon, which
//! is killed in between; then a store whose enclave is killed.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build, setup,
    shell::{Tree, answer, elapsed, line_of, run, show},
    stages,
};

const SIZE: &str = "256M";
/// Of the load, at depth 32; half of them write.
const REQUESTS: &str = "100000";
const BLOCKS: &str = "16384";
/// How long each side looks for work before it sleeps: while both have work, neither does.
const SPIN_US: &str = "10000";
/// Puts that are acknowledged before the enclave is killed.
const PUTS: u64 = 2000;

/// Shows it.
///
/// # Errors
/// If a station does not hold what it promises.
pub fn all(tree: &Tree, image: &Path) -> Result<()> {
    setup::all(tree)?;
    build::all(tree)?;
    let started = Instant::now();
    let scratch = tree.fresh_directory("enclave-demo")?;
    let demo = Demo { tree, image, scratch };

    title("the image");
    let shown = answer(demo.postern(&["enclave", "inspect"]).arg(image))?;
    println!("{}", shown.lines().next().unwrap_or_default());

    title("a volume, and a daemon: O_DIRECT, io_submit, eBPF");
    run(demo
        .postern(&["format", "--size", SIZE, "--key-file"])
        .arg(demo.key()?)
        .arg(demo.volume()))?;
    let daemon = demo.daemon()?;

    title("AIO inside the enclave: depth 32, half writes, every block verified");
    let load = ["work", "data", "--seal", "mrenclave", "--depth", "32", "--writes", "50"];
    let mut enclave = demo.enclave(&load, |work| {
        work.args(["--requests", REQUESTS, "--blocks", BLOCKS, "--daemons", "1"]);
        work.args(["--spin-us", SPIN_US]);
    })?;
    let mut said = lines(&mut enclave)?;
    until(&mut said, "at work")?;
    println!("kill -9 {} (posternd), and another one", daemon.0.id());
    drop(daemon);
    let daemon = demo.daemon()?;
    end(enclave, said)?;

    title("latency per stage of the requests at the second daemon");
    daemon.stop()?;
    // From here on the volume opens by what the CPU, here the emulator, derives for this enclave.
    std::fs::remove_file(demo.scratch.join("data.key"))?;
    stages::print(&demo.statistics())?;

    title("a key-value store with a write-ahead log, its enclave killed");
    let _daemon = demo.daemon()?;
    let mut enclave = demo.enclave(&["store", "data", "--seal", "mrenclave"], |_| ())?;
    let mut acknowledged = 0;
    for line in lines(&mut enclave)? {
        let line = line?;
        if let Some(number) = line.strip_prefix("acknowledged ") {
            acknowledged = number.parse().with_context(|| line.clone())?;
        }
        if acknowledged >= PUTS {
            break;
        }
    }
    ensure!(acknowledged >= PUTS, "the store ended by itself");
    println!("put {acknowledged} is acknowledged: kill -9 {}", enclave.id());
    enclave.kill()?;
    enclave.wait()?;
    let least = acknowledged.to_string();
    let mut enclave =
        demo.enclave(&["check", "data", "--seal", "mrenclave", "--least", &least], |_| ())?;
    let said = lines(&mut enclave)?;
    end(enclave, said)?;

    println!("\nenclave demo: {}, files in {}", elapsed(started.elapsed()), show(&demo.scratch));
    Ok(())
}

/// The lines of a program.
type Said = Lines<BufReader<ChildStdout>>;

/// A volume, a daemon and an image.
pub struct Demo<'a> {
    /// The tree.
    pub tree: &'a Tree,
    /// The image.
    pub image: &'a Path,
    /// Where the files lie.
    pub scratch: PathBuf,
}

impl Demo<'_> {
    /// The host file of the volume.
    pub fn volume(&self) -> PathBuf {
        self.scratch.join("data.vol")
    }

    fn statistics(&self) -> PathBuf {
        self.scratch.join("stages.json")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.scratch.join("posternd.sock")
    }

    /// The file of the volume's key, which is made.
    pub fn key(&self) -> Result<PathBuf> {
        let path = self.scratch.join("data.key");
        let mut key = [0; 32];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut key)?;
        std::fs::write(&path, key)?;
        Ok(path)
    }

    /// The command with these arguments.
    pub fn postern(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.tree.release().join("postern"));
        command.args(words);
        command
    }

    /// Starts the program in its image. It is handed the volume's key until it has a slot of its own.
    fn enclave(&self, words: &[&str], more: impl FnOnce(&mut Command)) -> Result<Child> {
        let mut command = self.postern(&["enclave", "run", "--strict", "--counts", "--daemon"]);
        command.arg(self.socket()).arg(self.image).arg("--").args(words);
        more(&mut command);
        let release = self.tree.release().display().to_string();
        println!("$ {}", line_of(&command).replace(&format!("{release}/"), ""));
        // Gone once the enclave has a slot of its own: then it is handed nothing.
        let key = match self.key_file() {
            Ok(key) => Stdio::from(key),
            Err(_) => Stdio::null(),
        };
        let line = line_of(&command);
        command.stdin(key).stdout(Stdio::piped()).spawn().with_context(|| line)
    }

    /// The key, to be read.
    pub fn key_file(&self) -> Result<File> {
        Ok(File::open(self.scratch.join("data.key"))?)
    }

    fn daemon(&self) -> Result<Daemon> {
        self.daemon_with(&["--spin-us", SPIN_US])
    }

    /// A daemon with these options.
    pub fn daemon_with(&self, options: &[&str]) -> Result<Daemon> {
        let mut command = Command::new(self.tree.release().join("posternd"));
        let mut file = std::ffi::OsString::from("data=");
        file.push(self.volume());
        command.arg("--socket").arg(self.socket()).arg("--file").arg(file);
        command.args(options).stdout(Stdio::piped());
        command.arg("--stats-file").arg(self.statistics());
        let line = line_of(&command);
        let mut daemon = Daemon(command.spawn().with_context(|| line)?);
        until(&mut lines(&mut daemon.0)?, "posternd: ready")?;
        Ok(daemon)
    }
}

/// A running daemon: killed when it is dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Ends it in order.
    fn stop(mut self) -> Result<()> {
        run(Command::new("kill").args(["-TERM", &self.0.id().to_string()]))?;
        ensure!(self.0.wait()?.success(), "the daemon did not end in order");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines(child: &mut Child) -> Result<Said> {
    let stdout = child.stdout.take().context("no standard output")?;
    Ok(BufReader::new(stdout).lines())
}

/// Prints what a program says until a line begins as the one that is waited for.
fn until(said: &mut Said, wanted: &str) -> Result<()> {
    for line in said {
        let line = line?;
        println!("{line}");
        if line.starts_with(wanted) {
            return Ok(());
        }
    }
    bail!("the program ended before it said: {wanted}")
}

/// Prints what a program says until it ends, and sees that it ends well.
fn end(mut enclave: Child, said: Said) -> Result<()> {
    for line in said {
        println!("{}", line?);
    }
    ensure!(enclave.wait()?.success(), "the program in the enclave failed");
    Ok(())
}

fn title(text: &str) {
    println!("\n== {text}\n");
}
