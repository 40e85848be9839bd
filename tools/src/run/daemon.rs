//! The daemon of one run: started, watched until ready, started again when it dies, stopped.
//!
//! Holds: the daemon does not outlive the launcher (parent-death signal), sits in a process group
//! of its own so that Ctrl-C does not take it from under the program, and is never left behind.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal},
};

use crate::{
    error::{Exit, Failure},
    run::{signals::Signals, store::Store},
};

/// First words of the line that the daemon prints when it listens.
const READY: &str = "posternd: ready on ";
/// Loading and verifying the probes is the long part of a start.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// After so many in a row that died before they listened, another one is no use.
const UNREADY_MOST: u32 = 5;
/// A daemon told to stop lets what is in flight complete.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// What the daemon is started with.
pub struct Orders<'a> {
    /// Its executable.
    pub executable: &'a Path,
    /// Where it listens.
    pub socket: &'a Path,
    /// Name and absolute path of each host file.
    pub files: Vec<(&'a str, &'a Path)>,
    /// Name and absolute path of each directory of volumes.
    pub directories: Vec<(&'a str, &'a Path)>,
    /// Where it leaves its statistics when it stops.
    pub stats: &'a Path,
    /// Where its standard error goes.
    pub log: PathBuf,
    /// Take host files that refuse `O_DIRECT`.
    pub allow_buffered: bool,
    /// Have host I/O go by io_uring.
    pub io_uring: bool,
    /// Load no probes.
    pub no_probes: bool,
    /// Options for what the program may take, and their values.
    pub limits: &'a [(&'static str, String)],
    /// The run file: removed when no other daemon is to come.
    pub run_file: PathBuf,
    /// One that died is started again.
    pub restarts: bool,
}

/// Why no daemon is running.
pub enum NotStarted {
    /// It failed.
    Failed(Failure),
    /// A signal asked the launcher to end.
    Interrupted(i32),
}

/// A running daemon; killed when dropped before [`Daemon::stop`].
pub struct Daemon<'a> {
    orders: Orders<'a>,
    /// What it has kept for the one after it.
    store: Store,
    child: Child,
    /// Kept open so that the daemon can print at any time.
    stdout: Option<ChildStdout>,
    ended: Option<ExitStatus>,
    /// What it prints when it listens was read.
    waited_for: bool,
    /// Daemons in a row that died before they listened.
    unready: u32,
}

impl<'a> Daemon<'a> {
    /// Starts the daemon and waits until it listens.
    ///
    /// # Errors
    /// [`Exit::NoDaemon`] with its last words if it does not come up.
    pub fn start(orders: Orders<'a>, signals: &Signals) -> Result<Self, NotStarted> {
        let store =
            Store::new().map_err(|e| Failure::io("no socket to be had for", "posternd", &e));
        let mut store = store.map_err(NotStarted::Failed)?;
        let mut child = spawn(&orders, &mut store, signals, true).map_err(NotStarted::Failed)?;
        let stdout = child.stdout.take();
        let (ended, waited_for, unready) = (None, true, 0);
        let mut daemon = Self { orders, store, child, stdout, ended, waited_for, unready };
        daemon.wait_until_ready(signals)?;
        Ok(daemon)
    }

    fn wait_until_ready(&mut self, signals: &Signals) -> Result<(), NotStarted> {
        let Some(mut stdout) = self.stdout.take() else {
            return Err(NotStarted::Failed(self.failed_to_start("it has no standard output")));
        };
        let started = Instant::now();
        let mut said = Vec::new();
        loop {
            if let Some(number) = signals.wait(Some(Duration::ZERO)).and_then(|s| s.ends()) {
                return Err(NotStarted::Interrupted(number));
            }
            if started.elapsed() > READY_WITHIN {
                return Err(NotStarted::Failed(
                    self.failed_to_start("it did not get ready in time"),
                ));
            }
            let tick = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let mut wait = [PollFd::new(&stdout, PollFlags::IN)];
            match poll(&mut wait, Some(&tick)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => {
                    let why = io::Error::from(errno).to_string();
                    return Err(NotStarted::Failed(self.failed_to_start(&why)));
                }
            }
            let mut part = [0; 512];
            match stdout.read(&mut part) {
                Ok(0) | Err(_) => {
                    return Err(NotStarted::Failed(self.failed_to_start("it ended")));
                }
                Ok(n) => said.extend_from_slice(&part[..n]),
            }
            let text = String::from_utf8_lossy(&said);
            if text.lines().any(|line| line.starts_with(READY)) && text.contains('\n') {
                self.stdout = Some(stdout);
                return Ok(());
            }
        }
    }

    /// Its last words, or `otherwise` if it said nothing.
    fn failed_to_start(&mut self, otherwise: &str) -> Failure {
        self.kill();
        Failure::new(
            Exit::NoDaemon,
            "the daemon did not start",
            last_words(&self.orders.log).unwrap_or_else(|| otherwise.to_owned()),
            "mend what it names, or run posternd by hand to see more",
        )
    }

    /// Starts it again if it has died, and says so; or says that it stays dead.
    pub fn check(&mut self, signals: &Signals) {
        if self.ended.is_some() {
            return;
        }
        let Ok(Some(status)) = self.child.try_wait() else { return };
        self.ended = Some(status);
        let words = last_words(&self.orders.log).unwrap_or_else(|| "it said nothing".to_owned());
        self.unready = if self.was_ready() { 0 } else { self.unready + 1 };
        if self.orders.restarts && self.unready < UNREADY_MOST {
            match spawn(&self.orders, &mut self.store, signals, false) {
                Ok(mut child) => {
                    self.stdout = child.stdout.take();
                    (self.child, self.ended) = (child, None);
                    let told = "the daemon died and is started again; requests go on";
                    eprintln!("{}", Failure::new(Exit::NoDaemon, told, status, words));
                    return;
                }
                Err(failure) => eprintln!("{failure}"),
            }
        }
        self.let_go();
        eprintln!(
            "{}",
            Failure::new(
                Exit::NoDaemon,
                format_args!("the daemon died ({status})"),
                words,
                "the program's I/O now fails with EIO; nothing unsealed was written"
            )
        );
    }

    /// Whether the one that ended had listened.
    fn was_ready(&mut self) -> bool {
        // The first was waited for.
        let Some(mut stdout) = self.stdout.take() else { return false };
        let mut said = String::new();
        // Its end is there: it has ended, and what it started had no part in this.
        let _ = stdout.read_to_string(&mut said);
        std::mem::take(&mut self.waited_for) || said.contains(READY)
    }

    /// Nobody waits for another daemon from now on.
    fn let_go(&self) {
        let _ = std::fs::remove_file(&self.orders.run_file);
    }

    /// Asks it to stop and waits until it has written its statistics and gone.
    ///
    /// # Errors
    /// [`Exit::NoDaemon`] if it had to be killed, or had died before.
    pub fn stop(mut self) -> Result<(), Failure> {
        if self.ended.is_some() {
            return Err(Failure::new(
                Exit::NoDaemon,
                "the daemon had died",
                "no statistics",
                "see the line above",
            ));
        }
        self.let_go();
        self.signal(Signal::TERM);
        let started = Instant::now();
        while started.elapsed() < STOP_WITHIN {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    self.ended = Some(status);
                    return Ok(());
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => break,
            }
        }
        self.kill();
        Err(Failure::new(
            Exit::NoDaemon,
            "the daemon did not stop and was killed",
            format_args!("after {} s", STOP_WITHIN.as_secs()),
            "unsynced writes recover at the next open",
        ))
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let (Some(pid), None) = (pid, self.ended) {
            // Not yet waited for, so the number still means this child.
            let _ = kill_process(pid, signal);
        }
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        self.let_go();
        self.kill();
    }
}

/// Starts a daemon; the `first` one begins a new log.
fn spawn(
    orders: &Orders<'_>,
    store: &mut Store,
    signals: &Signals,
    first: bool,
) -> Result<Child, Failure> {
    let log = File::options()
        .create(true)
        .write(true)
        .append(!first)
        .truncate(first)
        .open(&orders.log)
        .map_err(|e| Failure::io("cannot write the daemon's log", orders.log.display(), &e))?;
    let mut command = Command::new(orders.executable);
    command.arg("--socket").arg(orders.socket).arg("--stats-file").arg(orders.stats);
    let files = orders.files.iter().map(|place| ("--file", place));
    let directories = orders.directories.iter().map(|place| ("--directory", place));
    for (option, (name, path)) in files.chain(directories) {
        let mut place = OsString::from(name);
        place.push("=");
        place.push(path);
        command.arg(option).arg(place);
    }
    if orders.allow_buffered {
        command.arg("--allow-buffered");
    }
    if orders.io_uring {
        command.arg("--engine=io_uring");
    }
    if orders.no_probes {
        command.arg("--no-probes");
    }
    for (option, value) in orders.limits {
        command.arg(option).arg(value);
    }
    let input =
        store.input().map_err(|e| Failure::io("no socket to be had for", "posternd", &e))?;
    // It would speak to the manager of the launcher.
    command.env_remove("NOTIFY_SOCKET");
    command.stdin(input).stdout(Stdio::piped()).stderr(log).process_group(0);
    signals.restore_in(&mut command);
    let launcher = rustix::process::getpid();
    // SAFETY: 1. The closure runs between fork and exec: two system calls, nothing allocates.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::TERM))?;
            // The launcher may have died before the line above.
            if getppid() == Some(launcher) { Ok(()) } else { Err(Errno::SRCH.into()) }
        });
    }
    command.spawn().map_err(|error| {
        Failure::new(
            Exit::Internal,
            format_args!("cannot start the daemon: {error}"),
            orders.executable.display(),
            "it must be an executable file",
        )
    })
}

/// The last line of the log that says something.
fn last_words(log: &Path) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // Of wrong usage the last line only points to the help.
    let says = |line: &&str| !line.is_empty() && !line.starts_with("For more information");
    text.lines().rev().map(str::trim).find(says).map(str::to_owned)
}
