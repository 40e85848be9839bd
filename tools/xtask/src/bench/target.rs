//! What is measured: the plain file, Postern in its variants, and other programs that seal data.
//!
//! A target is prepared once, in a directory of its own, and then run as often as one likes.
//! Programs that it starts are ended with it.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::case::Case;
use crate::{
    fio::Way,
    shell::{Tree, answer, on_path},
};

/// Path under which the guest sees the volume.
const GUEST_PATH: &str = "/sealed/bench";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Target {
    /// The plain file: the limit
    Raw,
    /// Postern as a user starts it, probes on where they load
    Postern,
    /// Postern without probes
    NoProbes,
    /// Postern with the io_uring engine
    IoUring,
    /// QEMU's LUKS over NBD, aio=native: no integrity, no asynchronous crypto
    QemuLuks,
    /// gocryptfs: through the page cache
    Gocryptfs,
}

impl Target {
    /// Its name on the command line and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Postern => "postern",
            Self::NoProbes => "no-probes",
            Self::IoUring => "io-uring",
            Self::QemuLuks => "qemu-luks",
            Self::Gocryptfs => "gocryptfs",
        }
    }

    /// What a reader of a comparison must know; empty for our own.
    pub const fn caveat(self) -> &'static str {
        match self {
            Self::QemuLuks => "no integrity: altered blocks are read as noise; by fio's NBD client",
            Self::Gocryptfs => "reads and writes through the page cache, so not what a disk does",
            _ => "",
        }
    }

    /// Whether it can do a load: fio's NBD client does not sync by itself.
    pub fn does(self, case: &Case) -> bool {
        self != Self::QemuLuks || !case.arguments.iter().any(|word| word.starts_with("--fdatasync"))
    }

    /// What is missing to run it; `None`: nothing.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::QemuLuks if !on_path("qemu-nbd") => Some("qemu-nbd (qemu-utils)"),
            Self::QemuLuks if !has_engine("nbd") => Some("fio's nbd engine"),
            Self::Gocryptfs if !on_path("gocryptfs") => Some("gocryptfs"),
            _ => None,
        }
    }
}

fn has_engine(name: &str) -> bool {
    let engines = answer(Command::new("fio").arg("--enghelp")).unwrap_or_default();
    engines.lines().any(|line| line.trim() == name)
}

/// A target that can be run.
pub struct Ready {
    /// Which one.
    pub target: Target,
    /// How fio reaches its file.
    pub way: Way,
    /// fio's arguments that name it.
    pub arguments: Vec<String>,
    server: Option<Server>,
}

impl Ready {
    /// Seconds of CPU that its server has used; that is no child that has been waited for.
    pub fn server_cpu(&self) -> f64 {
        let pid = self.server.as_ref().and_then(|server| Some(server.child.as_ref()?.id()));
        pid.and_then(cpu_of).unwrap_or(0.0)
    }
}

/// Seconds of CPU of a process that runs (proc_pid_stat(5), in hundredths).
fn cpu_of(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

/// A program that serves a target; ended when dropped.
struct Server {
    child: Option<Child>,
    mounted: Option<PathBuf>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mounted) = &self.mounted {
            let _ = Command::new("umount").arg(mounted).status();
        }
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Prepares a target of `size` in `directory`.
///
/// # Errors
/// If a part of it cannot be made.
pub fn prepare(tree: &Tree, target: Target, size: &str, directory: &Path) -> Result<Ready> {
    let place = directory.join(target.name());
    let direct = |path: &Path| vec![format!("--filename={}", path.display())];
    let libaio = |mut arguments: Vec<String>| {
        arguments.extend(["--ioengine=libaio".to_owned(), "--direct=1".to_owned()]);
        arguments
    };
    let (way, arguments, server) = match target {
        Target::Raw => (Way::Raw, libaio(direct(&place)), None),
        Target::Postern | Target::NoProbes | Target::IoUring => {
            let _ = std::fs::remove_file(&place);
            let mut format = Command::new(tree.release().join("postern"));
            answer(format.arg("format").arg(&place).args(["--size", &size.to_uppercase()]))?;
            let mut volume = OsString::from(GUEST_PATH);
            volume.push("=");
            volume.push(&place);
            let mut before = vec!["--volume".into(), volume];
            before.extend(match target {
                Target::NoProbes => vec![OsString::from("--no-probes")],
                Target::IoUring => vec!["--engine".into(), "io_uring".into()],
                _ => vec![],
            });
            (Way::Postern(before), libaio(direct(Path::new(GUEST_PATH))), None)
        }
        Target::QemuLuks => {
            let (arguments, server) = qemu(&place, size)?;
            (Way::Raw, arguments, Some(server))
        }
        Target::Gocryptfs => {
            let server = gocryptfs(&place)?;
            (Way::Raw, libaio(direct(&place.join("plain/file"))), Some(server))
        }
    };
    Ok(Ready { target, way, arguments, server })
}

fn qemu(place: &Path, size: &str) -> Result<(Vec<String>, Server)> {
    let _ = std::fs::remove_dir_all(place);
    std::fs::create_dir_all(place)?;
    let (image, socket) = (place.join("image"), place.join("socket"));
    let secret = "secret,id=key,data=bench";
    answer(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "luks", "--object", secret])
            .args(["-o", "key-secret=key,iter-time=10"])
            .arg(&image)
            .arg(size.to_uppercase()),
    )?;
    let options = format!(
        "driver=luks,key-secret=key,file.driver=file,file.aio=native,file.cache.direct=on,\
         file.filename={}",
        image.display()
    );
    let child = Command::new("qemu-nbd")
        .args(["--object", secret, "--persistent", "--shared=0", "--image-opts"])
        .arg(options)
        .arg("--socket")
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start qemu-nbd")?;
    let server = Server { child: Some(child), mounted: None };
    wait_for("qemu-nbd's socket", || socket.exists())?;
    let uri = format!("--uri=nbd+unix:///?socket={}", socket.display());
    Ok((vec!["--ioengine=nbd".to_owned(), uri], server))
}

fn gocryptfs(place: &Path) -> Result<Server> {
    let _ = std::fs::remove_dir_all(place);
    let (cipher, plain, password) = (place.join("cipher"), place.join("plain"), place.join("word"));
    std::fs::create_dir_all(&cipher)?;
    std::fs::create_dir_all(&plain)?;
    std::fs::write(&password, "bench\n")?;
    let gocryptfs = || {
        let mut command = Command::new("gocryptfs");
        command.arg("-q").arg("-passfile").arg(&password);
        command
    };
    answer(gocryptfs().args(["-init", "-scryptn", "10"]).arg(&cipher))?;
    let child = gocryptfs()
        .arg("-fg")
        .arg(&cipher)
        .arg(&plain)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start gocryptfs")?;
    let server = Server { child: Some(child), mounted: Some(plain.clone()) };
    wait_for("gocryptfs's file system", || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        mounts.lines().any(|line| line.split(' ').nth(1) == plain.to_str())
    })?;
    Ok(server)
}

fn wait_for(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let started = Instant::now();
    while !condition() {
        if started.elapsed() > Duration::from_secs(10) {
            bail!("{what} does not appear");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
