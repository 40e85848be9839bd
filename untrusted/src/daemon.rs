//! The daemon as a whole: options, the accept loop, the graceful stop.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::activation::{self, Manager};
use crate::admission::{Admission, Peer};
use crate::confinement;
use crate::connection;
use crate::endpoint::{Endpoint, EndpointOptions};
use crate::engine::{self, Interface};
use crate::files::Catalog;
use crate::lease::Terms;
use crate::limits::Limits;
use crate::probes::kept::NAME;
use crate::problem::{Problem, log};
use crate::report::{Source, report};
use crate::session::Sessions;
use crate::socket::{Listener, may_connect};
use crate::volumes::Names;

/// Serves the host files of enclaves over shared-memory ports.
///
/// Exit codes: 0 after a clean stop, 2 for wrong usage, 3 for a problem with the socket, 4 for a
/// problem with a file or the configuration. SIGTERM and SIGINT drain what is in flight; a second
/// one does not wait.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "posternd", version)]
pub struct Options {
    /// Path of the control socket; made with mode 0600. Best in a directory of its own: the daemon
    /// keeps the right to remove files there. Where a service manager hands a listening socket over
    /// (LISTEN_FDS), that one is used, and the path only shown.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Takes the place of the daemon that listens on the socket: gets ready, takes over its
    /// socket, and has it end (SIGTERM) once it has completed what is in flight. Its enclaves come
    /// over by themselves; they notice a pause of some milliseconds. For upgrades: start it with
    /// the options of the one before.
    #[arg(long)]
    pub succeed: bool,
    /// Lets enclaves open HOST_FILE by NAME.
    #[arg(long = "file", value_name = "NAME=HOST_FILE")]
    pub files: Vec<OsString>,
    /// Lets enclaves open any file beneath DIR by its path relative to DIR; no symbolic links.
    #[arg(long = "root", value_name = "DIR")]
    pub roots: Vec<PathBuf>,
    /// Lets enclaves make, open and remove files in DIR under NAME: `index`, and names of 32
    /// hexadecimal digits. A protected directory.
    #[arg(long = "directory", value_name = "NAME=DIR")]
    pub directories: Vec<OsString>,
    /// Uses the page cache for files whose file system refuses O_DIRECT, instead of refusing them.
    #[arg(long)]
    pub allow_buffered: bool,
    /// Does not load the eBPF probes.
    #[arg(long)]
    pub no_probes: bool,
    /// Loads the probes from FILE instead of where they are installed.
    #[arg(long, value_name = "FILE", conflicts_with = "no_probes")]
    pub probe_object: Option<PathBuf>,
    /// Writes the statistics to FILE as JSON at the end.
    #[arg(long, value_name = "FILE")]
    pub stats_file: Option<PathBuf>,
    /// The kernel's interface for host I/O. Where the kernel does not let this process use it, it is
    /// libaio, and the log says so. With io_uring the calls to it are allowed to the daemon: they
    /// can do more than I/O on open files, so a daemon that an enclave took over could do more.
    #[arg(long, value_enum, default_value_t)]
    pub engine: Interface,
    /// Longest time a lane spins for work before it sleeps, microseconds; 0 never spins.
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub spin_us: u32,
    /// A program that somebody else waits for has a volume at least this long, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 200)]
    pub lease_hold_ms: u32,
    /// A program that is asked to hand a volume over and does not answer for this long loses it,
    /// milliseconds: its writes fail from then on.
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    pub lease_timeout_ms: u32,
    /// What one session may take of what all share.
    #[command(flatten)]
    pub limits: Limits,
    /// Where metrics and the page are served.
    #[command(flatten)]
    pub endpoint: EndpointOptions,
}

/// A daemon, from bound socket to last statistics.
#[derive(Debug)]
pub struct Daemon {
    /// Its sessions.
    pub sessions: Sessions,
    /// The names it may open.
    pub catalog: Arc<Catalog>,
    /// Where stage latencies come from.
    pub source: Source,
    /// Where metrics and the page are served.
    pub endpoints: Vec<Endpoint>,
    uid: u32,
    stats_file: Option<(PathBuf, File)>,
}

impl Daemon {
    /// Checks the options, loads the probes, binds the socket, and confines the calling thread and
    /// what it starts from now on. Needs a tokio runtime around it, without other threads.
    /// `manager` is who started this process.
    ///
    /// # Errors
    /// A [`Problem`] for the operator.
    pub fn start(options: &Options, manager: &Manager) -> Result<(Arc<Self>, Listener), Problem> {
        let catalog = Catalog::new(
            &options.files,
            &options.roots,
            &options.directories,
            options.allow_buffered,
        )?;
        let interface = usable(options.engine);
        let inherited = activation::inherited(&options.socket)?;
        let mut kept = inherited.kept;
        kept.extend(manager.given_back(NAME));
        // What takes its time comes before another daemon's place is taken.
        let source = options.succeed.then(|| {
            // That daemon uses what was kept.
            kept.clear();
            probes(options, interface, &Manager::default(), Vec::new())
        });
        let endpoints = Endpoint::bind(&options.endpoint, options.succeed)?;
        let (listener, before) = match inherited.listener {
            Some(fd) => (Listener::take(fd, &options.socket, options.succeed)?, None),
            None => Listener::bind(&options.socket, options.succeed)?,
        };
        let (source, names, unused) =
            source.unwrap_or_else(|| probes(options, interface, manager, kept));
        if let Some(before) = before {
            end_before(before);
        }
        raise_limits();
        let stats_file = options.stats_file.as_deref().map(stats_file).transpose()?;
        confinement::confine(options, interface);
        if !unused.is_empty() {
            // Closing the last descriptor of probes that nobody wanted takes its time.
            let _ = std::thread::Builder::new().spawn(move || drop(unused));
        }
        let daemon = Self {
            sessions: Sessions::new(
                Duration::from_micros(options.spin_us.into()),
                Terms {
                    hold: Duration::from_millis(options.lease_hold_ms.into()),
                    patience: Duration::from_millis(options.lease_timeout_ms.into()),
                },
                options.limits.clone(),
                interface,
                names,
            ),
            catalog: Arc::new(catalog),
            source,
            endpoints,
            uid: rustix::process::geteuid().as_raw(),
            stats_file,
        };
        Ok((Arc::new(daemon), listener))
    }

    /// Serves until `stop` resolves; then accepts nobody, drains what is in flight, and writes the
    /// statistics.
    ///
    /// # Errors
    /// The statistics file can not be written.
    pub async fn serve(
        self: Arc<Self>,
        listener: Listener,
        stop: impl Future<Output = ()>,
    ) -> Result<(), Problem> {
        let (stopping, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        let admission = Arc::<Admission>::default();
        let keeper = Arc::clone(&self);
        let keeper = tokio::spawn(async move { keeper.sessions.keep_leases().await });
        let mut servers = JoinSet::new();
        for at in 0..self.endpoints.len() {
            let server = Arc::clone(&self);
            servers.spawn(async move { server.endpoints[at].serve(Arc::clone(&server)).await });
        }
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((_, uid, pid)) if !may_connect(uid, self.uid) => {
                        self.refused();
                        let what = format_args!("connection refused to user {uid}");
                        let remedy = format_args!("run it as user {} or root", self.uid);
                        log(what, format_args!("process {pid}"), remedy);
                    }
                    Ok((channel, uid, pid)) => {
                        let place = match admission.enter(Peer { uid, pid }) {
                            Ok(place) => place,
                            Err(crowded) => {
                                self.refused();
                                let what = format_args!("connection refused: {crowded}");
                                let remedy = "end some programs that only connect";
                                log(what, format_args!("process {pid}"), remedy);
                                continue;
                            }
                        };
                        let mut stopped = stopped.clone();
                        let stop = async move {
                            // An error means that the daemon is gone, which is a stop as well.
                            let _ = stopped.wait_for(|stop| *stop).await;
                        };
                        let daemon = Arc::clone(&self);
                        connections.spawn(connection::serve(daemon, channel, pid, place, stop));
                    }
                    Err(e) => {
                        log(format_args!("accept failed ({e})"), "control socket", "it is tried again");
                        // Out of descriptors: some must be closed first.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        drop(listener);
        // Nobody listens any more only if there is no connection.
        let _ = stopping.send(true);
        while connections.join_next().await.is_some() {}
        keeper.abort();
        servers.abort_all();
        self.write_stats()
    }

    fn refused(&self) {
        self.sessions.hub().refused_connections.fetch_add(1, Ordering::Relaxed);
    }

    fn write_stats(&self) -> Result<(), Problem> {
        let Some((path, file)) = &self.stats_file else { return Ok(()) };
        let written = serde_json::to_vec_pretty(&report(&self.sessions, &self.source))
            .map_err(std::io::Error::from)
            .and_then(|mut text| {
                text.push(b'\n');
                (&*file).write_all(&text)
            });
        written.map_err(|e| no_stats(path, &e))
    }
}

fn probes(
    options: &Options,
    interface: Interface,
    manager: &Manager,
    kept: Vec<OwnedFd>,
) -> (Source, Names, Vec<OwnedFd>) {
    let object = options.probe_object.as_deref();
    Source::load(!options.no_probes, object, interface, manager, kept)
}

/// The interface that was asked for, or what takes its place where the kernel says no.
fn usable(wanted: Interface) -> Interface {
    match engine::probe(wanted) {
        Ok(()) => wanted,
        Err(e) => {
            log(
                format_args!("no io_uring ({e}): host I/O goes by libaio"),
                "this process",
                "set kernel.io_uring_disabled to 0, or start posternd with --engine libaio",
            );
            Interface::Libaio
        }
    }
}

/// Has the daemon end whose place was taken. Nobody else has its number: it held the socket a
/// moment ago, and sees its connections out first.
fn end_before(before: Pid) {
    if let Err(e) = kill_process(before, Signal::TERM) {
        log(
            format_args!("the daemon before can not be told to end ({e})"),
            format_args!("process {}", before.as_raw_nonzero()),
            "stop it by hand; its enclaves come over then",
        );
    }
}

/// Opened at the start: at the end the daemon may make no files.
fn stats_file(path: &Path) -> Result<(PathBuf, File), Problem> {
    let file = File::create(path).map_err(|e| no_stats(path, &e))?;
    Ok((path.to_owned(), file))
}

fn no_stats(path: &Path, error: &std::io::Error) -> Problem {
    Problem::config(
        format_args!("statistics can not be written ({error})"),
        path.display(),
        "name a file that this user may write with --stats-file",
    )
}

/// A lane takes about ten descriptors; the usual soft limit is 1024. A host file is larger than
/// the guest's, whose limit of file sizes a daemon of its own inherits.
fn raise_limits() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    for resource in [Resource::Nofile, Resource::Fsize] {
        let limit = getrlimit(resource);
        // What it was is enough for a few lanes and files; attach and open say so when it is not.
        let _ = setrlimit(resource, Rlimit { current: limit.maximum, ..limit });
    }
}
