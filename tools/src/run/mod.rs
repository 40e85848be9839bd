//! `postern run`: the launcher.
//!
//! The way: check everything, make or look at the volumes, start the daemon, start the program
//! with the enclave's library in it, pass signals on, hand its exit status back, stop the daemon.
//!
//! Holds: a program is started only after each volume has authenticated under its key; nothing is
//! left behind, no process and no file in a temporary place, whatever fails on the way.

mod daemon;
mod directory;
mod filter;
mod key_memory;
mod parts;
mod plan;
mod program;
mod seal;
mod signals;
mod store;
mod warden;

use std::{
    ffi::OsString,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::Arc,
};

use postern_sim::config::{
    CounterConfig, DirectoryConfig, MovesConfig, RUN_FILE, RUN_VARIABLE, RunConfig, VolumeConfig,
};
use postern_trusted::{counter::Moves, volume::SlotKey};
use rustix::process::{Pid, Signal, kill_process};

use self::{
    daemon::{Daemon, NotStarted, Orders},
    directory::RunDirectory,
    key_memory::KeyMemory,
    plan::{Plan, PlannedVolume},
    seal::{Reads, Seal},
    signals::{Arrived, Signals},
    warden::Warden,
};
use crate::{
    cli::{DiscardArg, EngineArg, RunArgs},
    counter::{Server, Source},
    directory_volume,
    disk::Access,
    error::{Exit, Failure},
    key::{self, KeySource},
    passphrase::Age,
    stats, volume,
};

/// Runs the program; answers the exit code of `postern`. Waits up to `wait` seconds for a volume
/// that another program has.
///
/// # Errors
/// Whatever kept the program from running, or (after its end) the daemon from stopping well.
pub fn run(args: &RunArgs, wait: u32) -> Result<u8, Failure> {
    let plan = Plan::make(args)?;
    let counters = Source::parse_all(&args.counter)?;
    let volumes = match &args.socket {
        Some(socket) => {
            stats::connect(socket)?;
            remote_volumes(args, &plan)?
        }
        None => local_volumes(args, &plan, &counters)?,
    };
    let signals = Signals::hold()
        .map_err(|error| Failure::io("cannot hold signals", "this process", &error))?;
    let directory = RunDirectory::make()?;
    let left_stats = directory.join("stats.json");
    let socket = match &args.socket {
        Some(socket) => absolute(socket)?,
        None => directory.join("daemon.sock"),
    };
    let mut daemon = None;
    if args.socket.is_none() {
        let orders = Orders {
            executable: plan.daemon.as_deref().unwrap_or(Path::new("posternd")),
            socket: &socket,
            files: places(&volumes, false),
            directories: places(&volumes, true),
            stats: &left_stats,
            log: args.daemon_log.clone().unwrap_or_else(|| directory.join("daemon.log")),
            allow_buffered: args.allow_buffered,
            io_uring: args.engine == EngineArg::Uring,
            no_probes: args.no_probes,
            limits: &args.limit,
            // Without this file nobody waits for a daemon any more.
            run_file: directory.join(RUN_FILE),
            restarts: args.daemon_wait > 0,
        };
        match Daemon::start(orders, &signals) {
            Ok(started) => daemon = Some(started),
            Err(NotStarted::Failed(failure)) => return Err(failure),
            Err(NotStarted::Interrupted(signal)) => return Ok(code_of_signal(signal)),
        }
    }
    let counter_socket = directory.join("counters.sock");
    let counted = (!counters.is_empty()).then(|| Counted {
        socket: &counter_socket,
        moves: Moves::from(args.counter_moves).into(),
    });
    if counted.is_some() {
        Server::start(&counter_socket, counters)
            .map_err(|error| Failure::io("cannot serve the counters of", "this run", &error))?;
    }
    let config = run_config(&socket, &volumes, &Settings::of(args, wait), counted.as_ref())?;
    let run_file = directory.write(RUN_FILE, &config)?;
    let mut guest = start(args, &plan, &volumes, &run_file, &signals)?;
    let status = attend(&mut guest, daemon.as_mut(), &signals)?;

    match (daemon, &args.socket) {
        (Some(daemon), _) => {
            // What was asked of the program is its status: a daemon that died was told of above.
            match daemon.stop() {
                Ok(()) => save_stats(args, &left_stats)?,
                Err(failure) => eprintln!("{failure}"),
            }
        }
        (None, Some(socket)) if args.stats.is_some() => {
            std::fs::write(&left_stats, stats::ask(socket)?)
                .map_err(|e| Failure::io("cannot write", left_stats.display(), &e))?;
            save_stats(args, &left_stats)?;
        }
        (None, _) => {}
    }
    Ok(code_of(status))
}

/// Names and paths of the volumes, or of the directories of volumes.
fn places(volumes: &[ReadyVolume], directories: bool) -> Vec<(&str, &Path)> {
    let chosen = volumes.iter().filter(|volume| volume.directory == directories);
    chosen.map(|volume| (volume.name.as_str(), volume.host_file.as_path())).collect()
}

/// A volume of this run, ready.
struct ReadyVolume {
    guest_path: String,
    /// The daemon's name for it.
    name: String,
    /// Absolute; empty with a daemon of someone else's.
    host_file: PathBuf,
    /// A file's path is absolute.
    key: KeySource,
    /// A directory of volumes.
    directory: bool,
    /// The program can only read it.
    read_only: bool,
}

/// Makes what is to be made and looks at what exists: its key, its header, its newest state.
fn local_volumes(
    args: &RunArgs,
    plan: &Plan,
    counters: &[Arc<Source>],
) -> Result<Vec<ReadyVolume>, Failure> {
    let mut ready = Vec::with_capacity(plan.volumes.len());
    let is_new = |volume: &PlannedVolume| {
        !volume.read_only && std::fs::symlink_metadata(&volume.host_file).is_err()
    };
    let makes = args.create.is_some() && plan.volumes.iter().any(is_new);
    let words = args.passphrase.get(if makes { Age::New } else { Age::Known })?;
    for (number, planned) in plan.volumes.iter().enumerate() {
        let PlannedVolume { guest_path, host_file, directory, read_only } = planned;
        let access = Access { write: !read_only, allow_buffered: args.allow_buffered };
        let counter = counters.get(number);
        let exists = std::fs::symlink_metadata(host_file).is_ok();
        let key = match (exists, args.create) {
            (_, _) if *directory => {
                directory_volume::prepare(host_file, args, words.as_ref(), counter, access)?
            }
            (false, Some(size)) if !read_only => match &words {
                Some(words) => {
                    volume::make(host_file, size, words, counter, access)?;
                    KeySource::stretched(host_file, words, access)?
                }
                None => KeySource::File(key::choose_and_make(
                    args.key_file.as_deref(),
                    host_file,
                    |key| volume::make(host_file, size, &SlotKey::new(*key), counter, access),
                )?),
            },
            (false, _) => return Err(no_volume(host_file)),
            (true, _) => {
                // Before the key: a missing key of a file that is no volume is not the point.
                volume::check_file(host_file, access)?;
                match &words {
                    Some(words) => {
                        volume::check(host_file, words, counter, access)?;
                        KeySource::stretched(host_file, words, access)?
                    }
                    None => {
                        let key_file = key::choose(args.key_file.as_deref(), host_file)?;
                        let key = SlotKey::new(*key::read(&key_file)?);
                        volume::check(host_file, &key, counter, access)?;
                        KeySource::File(key_file)
                    }
                }
            }
        };
        let key = match key {
            KeySource::File(path) => KeySource::File(absolute(&path)?),
            stretched => stretched,
        };
        ready.push(ReadyVolume {
            guest_path: guest_path.clone(),
            name: format!("v{number}"),
            host_file: absolute(host_file)?,
            key,
            directory: *directory,
            read_only: *read_only,
        });
    }
    Ok(ready)
}

fn no_volume(host_file: &Path) -> Failure {
    Failure::new(
        Exit::NoVolume,
        "no such volume",
        host_file.display(),
        "give --create SIZE to make it, or correct the path",
    )
}

fn remote_volumes(args: &RunArgs, plan: &Plan) -> Result<Vec<ReadyVolume>, Failure> {
    // The command line requires a key file with --socket.
    let key_file = absolute(args.key_file.as_deref().unwrap_or(Path::new("")))?;
    Ok(plan
        .volumes
        .iter()
        .map(|planned| ReadyVolume {
            guest_path: planned.guest_path.clone(),
            name: planned.host_file.to_string_lossy().into_owned(),
            host_file: PathBuf::new(),
            key: KeySource::File(key_file.clone()),
            directory: planned.directory,
            read_only: planned.read_only,
        })
        .collect())
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    path.canonicalize().map_err(|error| Failure::io("cannot find", path.display(), &error))
}

/// The counters of a run.
struct Counted<'a> {
    socket: &'a Path,
    moves: MovesConfig,
}

/// What the command line says about all volumes.
struct Settings {
    file_capacity: u64,
    cache: u64,
    discard: Option<DiscardArg>,
    exclusive: bool,
    lease_wait_ms: u64,
    daemon_wait_ms: u64,
    /// The daemon is the run's own.
    own_daemon: bool,
}

impl Settings {
    fn of(args: &RunArgs, wait: u32) -> Self {
        Self {
            file_capacity: args.file_capacity,
            cache: args.cache,
            discard: args.discard,
            exclusive: args.exclusive,
            lease_wait_ms: u64::from(wait) * 1000,
            daemon_wait_ms: u64::from(args.daemon_wait) * 1000,
            own_daemon: args.socket.is_none(),
        }
    }
}

fn run_config(
    socket: &Path,
    volumes: &[ReadyVolume],
    settings: &Settings,
    counted: Option<&Counted<'_>>,
) -> Result<Vec<u8>, Failure> {
    let counter_of = |number: usize| {
        let index = u32::try_from(number).ok()?;
        counted.map(|counted| CounterConfig { index, moves: counted.moves })
    };
    let text = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            Failure::new(Exit::Usage, "a path is not UTF-8", path.display(), "use another path")
        })
    };
    let key_file = |volume: &ReadyVolume| match &volume.key {
        KeySource::File(path) => text(path),
        KeySource::Stretched(_) => Ok(String::new()),
    };
    let key_memory = |volume: &ReadyVolume| match &volume.key {
        KeySource::File(_) => None,
        KeySource::Stretched(_) => Some(KeyMemory::name(&volume.name)),
    };
    let config = RunConfig {
        socket: text(socket)?,
        cache_bytes: usize::try_from(settings.cache).unwrap_or(usize::MAX),
        lease_wait_ms: settings.lease_wait_ms,
        daemon_wait_ms: settings.daemon_wait_ms,
        launcher: settings.own_daemon.then(std::process::id),
        counter_socket: counted.map_or(Ok(String::new()), |counted| text(counted.socket))?,
        volumes: volumes
            .iter()
            .enumerate()
            .filter(|(_, volume)| !volume.directory)
            .map(|(number, volume)| {
                Ok(VolumeConfig {
                    guest_path: volume.guest_path.clone(),
                    name: volume.name.clone(),
                    key_file: key_file(volume)?,
                    key_memory: key_memory(volume),
                    discard: DiscardArg::applies(settings.discard, false),
                    counter: counter_of(number),
                    read_only: volume.read_only,
                    exclusive: settings.exclusive,
                })
            })
            .collect::<Result<_, Failure>>()?,
        directories: volumes
            .iter()
            .enumerate()
            .filter(|(_, volume)| volume.directory)
            .map(|(number, volume)| {
                Ok(DirectoryConfig {
                    guest_path: volume.guest_path.clone(),
                    name: volume.name.clone(),
                    key_file: key_file(volume)?,
                    key_memory: key_memory(volume),
                    file_capacity: settings.file_capacity,
                    discard: DiscardArg::applies(settings.discard, true),
                    counter: counter_of(number),
                })
            })
            .collect::<Result<_, Failure>>()?,
    };
    serde_json::to_vec(&config)
        .map_err(|error| Failure::new(Exit::Internal, error, "run file", "report this"))
}

fn start(
    args: &RunArgs,
    plan: &Plan,
    volumes: &[ReadyVolume],
    run_file: &Path,
    signals: &Signals,
) -> Result<Child, Failure> {
    let mut preload = OsString::from(&plan.preload);
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    let mut command = Command::new(&plan.program);
    command
        .arg0(args.program.first().map(OsString::as_os_str).unwrap_or_default())
        .args(args.program.iter().skip(1))
        .env("LD_PRELOAD", preload)
        .env(RUN_VARIABLE, run_file);
    signals.restore_in(&mut command);
    let stretched = volumes.iter().filter_map(|volume| match &volume.key {
        KeySource::Stretched(key) => Some((volume.name.as_str(), key)),
        KeySource::File(_) => None,
    });
    // Until the program has been started.
    let _memory = KeyMemory::hand_to(&mut command, stretched)?;
    if args.no_host_writes || args.no_host_files {
        let reads = args.no_host_files.then(|| {
            let keys = volumes.iter().filter_map(|volume| match &volume.key {
                KeySource::File(path) => Some(path.clone()),
                KeySource::Stretched(_) => None,
            });
            let own = [&plan.program, &plan.preload, run_file];
            let needed = own.into_iter().map(Into::into).chain(keys).collect();
            Reads { needed, let_read: &args.let_read }
        });
        Seal::make(&args.allow_write, reads.as_ref())?.install_in(&mut command);
    }
    let channel = filter::install_in(&mut command)
        .map_err(|error| Failure::io("cannot make a channel to", "the program", &error))?;
    let mut guest = command.spawn().map_err(|error| {
        Failure::new(
            Exit::CannotExecute,
            format_args!("cannot run the program: {error}"),
            plan.program.display(),
            "run it without postern to see whether the host runs it",
        )
    })?;
    match channel.listener() {
        Ok(listener) => {
            let guest_paths = volumes.iter().map(|volume| volume.guest_path.as_str());
            if let Err(error) = Warden::new(listener, guest_paths).start() {
                let _ = guest.kill();
                let _ = guest.wait();
                return Err(Failure::io("cannot start the warden of", "the program", &error));
            }
        }
        Err(error) => eprintln!(
            "postern: raw system calls are not covered: seccomp: {error}; calls by way of libc are"
        ),
    }
    Ok(guest)
}

/// Waits for the program's end, passing signals on.
fn attend(
    guest: &mut Child,
    mut daemon: Option<&mut Daemon<'_>>,
    signals: &Signals,
) -> Result<ExitStatus, Failure> {
    loop {
        // SIGCHLD is held, so a child that ends after this look wakes the wait below.
        match guest.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => return Err(Failure::io("cannot wait for", "the program", &error)),
        }
        if let Some(daemon) = daemon.as_deref_mut() {
            daemon.check(signals);
        }
        if let Some(Arrived::Sent(number)) = signals.wait(None) {
            let pid = i32::try_from(guest.id()).ok().and_then(Pid::from_raw);
            if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(number)) {
                // Not waited for yet, so the number still means the program.
                let _ = kill_process(pid, signal);
            }
        }
    }
}

fn save_stats(args: &RunArgs, left: &Path) -> Result<(), Failure> {
    let Some(file) = &args.stats else { return Ok(()) };
    std::fs::copy(left, file)
        .map(|_| ())
        .map_err(|error| Failure::io("cannot save the statistics", file.display(), &error))
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn code_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_the_shells() {
        assert_eq!(code_of(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(code_of(ExitStatus::from_raw(0)), 0);
        assert_eq!(code_of(ExitStatus::from_raw(libc::SIGTERM)), 143);
        assert_eq!(code_of_signal(libc::SIGINT), 130);
    }

    #[test]
    fn the_run_file_says_what_the_enclave_reads() {
        let volume = |guest_path: &str, name: &str, directory| ReadyVolume {
            guest_path: guest_path.into(),
            name: name.into(),
            host_file: "/h/data.vol".into(),
            key: KeySource::File("/h/data.vol.key".into()),
            directory,
            read_only: false,
        };
        let volumes = [volume("/sealed/data", "v0", false), volume("/data", "v1", true)];
        let settings = Settings {
            file_capacity: 4096,
            cache: 1 << 20,
            discard: None,
            exclusive: false,
            lease_wait_ms: 10_000,
            daemon_wait_ms: 30_000,
            own_daemon: true,
        };
        let bytes = run_config(Path::new("/r/daemon.sock"), &volumes, &settings, None).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["socket"], "/r/daemon.sock");
        assert_eq!(json["daemon_wait_ms"], 30_000);
        assert_eq!(json["launcher"], std::process::id());
        assert_eq!(json["volumes"][0]["guest_path"], "/sealed/data");
        assert_eq!(json["volumes"][0]["name"], "v0");
        assert_eq!(json["volumes"][0]["key_file"], "/h/data.vol.key");
        assert_eq!(json["directories"][0]["guest_path"], "/data");
        assert_eq!(json["directories"][0]["name"], "v1");
        assert_eq!(json["directories"][0]["file_capacity"], 4096);
        assert_eq!(json["cache_bytes"], 1 << 20);
        // Without the option files of a directory give space back, a volume keeps it.
        assert_eq!(json["volumes"][0]["discard"], false);
        assert_eq!(json["directories"][0]["discard"], true);
    }
}
