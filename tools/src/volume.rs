//! Volumes from outside: made, looked at, verified. All on a plain host file, without a daemon.
//!
//! Holds: nothing here writes to a volume that exists; a volume that could not be made is removed
//! again.

use std::{
    fs::OpenOptions as FileOptions,
    io::IsTerminal as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use postern_trusted::{
    directory::FileKeys,
    disk::{BLOCK, Disk as _, HostError},
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{
        CounterUse, Damage, FormatOptions, Freshness, Misuse, OpenOptions, OpenReport, SlotKey,
        SnapshotInfo, Volume, VolumeError,
    },
};
use serde_json::json;

use crate::{
    cli::{FormatArgs, VolumeArgs},
    counter::{self, Source},
    directory_volume,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key,
    passphrase::Age,
    size,
};

/// Shortest time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Makes a volume of `bytes` in the new (or empty) host file `path`.
///
/// # Errors
/// If the file has content, the host has no room or does no direct I/O. What was made is removed.
pub fn make(
    path: &Path,
    bytes: u64,
    key: &SlotKey,
    counter: Option<&Arc<Source>>,
    access: Access,
) -> Result<(), Failure> {
    let place = &path.display();
    let existed = is_vacant(path)?;
    let blocks = Volume::host_blocks(bytes);
    let made = FileOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .create_new(!existed)
        .open(path)
        .and_then(|file| file.set_len(blocks * BLOCK as u64))
        .map_err(|error| Failure::io("cannot make the volume", place, &error))
        .and_then(|()| FileDisk::open(path, access))
        .and_then(|disk| {
            run_to_end(Volume::format(&disk, key, &FormatOptions { size: bytes }))
                .map_err(|error| refused(path, &error))
        })
        .and_then(|()| counter.map_or(Ok(()), |counter| counter.bind_new(path, key, access)));
    if made.is_err() {
        // Ours to remove: it was not there, or had nothing in it.
        let _ = if existed {
            FileOptions::new().write(true).open(path).and_then(|file| file.set_len(0))
        } else {
            std::fs::remove_file(path)
        };
    }
    made
}

/// Whether `path` is an empty file (`true`) or nothing (`false`).
///
/// # Errors
/// [`Exit::Usage`] if it is anything else: nothing is formatted over it.
pub fn is_vacant(path: &Path) -> Result<bool, Failure> {
    let what = match std::fs::symlink_metadata(path) {
        Err(_) => return Ok(false),
        Ok(kind) if !kind.is_file() => "not a regular file",
        Ok(kind) if kind.len() > 0 => "the file is not empty",
        Ok(_) => return Ok(true),
    };
    Err(Failure::new(
        Exit::Usage,
        what,
        path.display(),
        "nothing is formatted over it; give a new name, or remove it first",
    ))
}

/// Checks that the host file can be worked with: it exists, may be written, does direct I/O, and
/// nobody has it open.
///
/// # Errors
/// As [`FileDisk::open`].
pub fn check_file(path: &Path, access: Access) -> Result<(), Failure> {
    FileDisk::open(path, access).map(drop)
}

/// Opens the volume without writing and closes it again: is the key right, is the root whole, and
/// would it open for writing?
///
/// # Errors
/// [`Exit::Key`], [`Exit::Damaged`] and the host's own.
pub fn check(
    path: &Path,
    key: &SlotKey,
    counter: Option<&Arc<Source>>,
    access: Access,
) -> Result<(), Failure> {
    let disk = FileDisk::open(path, access)?;
    let (_, report) = open_with(&disk, key, used(counter))
        .map_err(|error| refused_to_read(path, &disk, &error, counter))?;
    match (report.loss, report.freshness) {
        (Some(loss), _) => Err(refused_with(path, &loss, counter.map(|source| &**source))),
        (None, Freshness::Unchecked { sequence }) => {
            Err(counter::needed(path, &VolumeError::CounterNeeded { sequence }))
        }
        (None, _) => Ok(()),
    }
}

/// What the enclave is given for a passphrase: the work of Argon2id, done here, once.
///
/// # Errors
/// [`Exit::Key`] if it opens no slot.
pub fn stretch(path: &Path, passphrase: &SlotKey, access: Access) -> Result<key::Key, Failure> {
    let disk = FileDisk::open(path, access)?;
    let stretched = run_to_end(Volume::stretch(&disk, passphrase));
    stretched
        .and_then(|key| key.ok_or(VolumeError::WrongKey))
        .map_err(|error| refused(path, &error))
}

/// The volume in `path`, opened for reading only.
///
/// # Errors
/// As [`check`].
pub fn open_to_read(
    path: &Path,
    key: &SlotKey,
    counter: Option<&Arc<Source>>,
    access: Access,
) -> Result<(FileDisk, Volume, OpenReport), Failure> {
    let disk = FileDisk::open(path, access)?;
    let (volume, report) = open_with(&disk, key, used(counter))
        .map_err(|error| refused_to_read(path, &disk, &error, counter))?;
    Ok((disk, volume, report))
}

/// The volume of a file of a protected directory, opened for reading only; `recorded` is what the
/// index says of it.
///
/// # Errors
/// As [`check`].
pub fn open_file_to_read(
    path: &Path,
    keys: &FileKeys,
    recorded: CounterUse,
    access: Access,
) -> Result<(FileDisk, Volume, OpenReport), Failure> {
    let disk = FileDisk::open(path, access)?;
    let options =
        OpenOptions { read_only: true, counter: Some(recorded), ..OpenOptions::default() };
    let (volume, report) = run_to_end(keys.open(&disk, &options))
        .map_err(|error| refused_to_read(path, &disk, &error, None))?;
    Ok((disk, volume, report))
}

fn used(counter: Option<&Arc<Source>>) -> Option<CounterUse> {
    counter.map(|source| source.used(false))
}

fn open_with(
    disk: &FileDisk,
    key: &SlotKey,
    counter: Option<CounterUse>,
) -> Result<(Volume, OpenReport), VolumeError> {
    let options = OpenOptions { read_only: true, counter, ..OpenOptions::default() };
    run_to_end(Volume::open(disk, key, &options))
}

fn refused_to_read(
    path: &Path,
    disk: &FileDisk,
    error: &VolumeError,
    counter: Option<&Arc<Source>>,
) -> Failure {
    match error {
        VolumeError::Host { place, .. } if *place >= disk.host_blocks() => Failure::new(
            Exit::Damaged,
            format_args!("the host file ends before block {place}, which every volume has"),
            path.display(),
            "it is no volume, or was cut off: restore it from a copy",
        ),
        error => refused_with(path, error, counter.map(|source| &**source)),
    }
}

/// What a volume's refusal means to the operator, when it was opened with this counter.
pub fn refused_with(path: &Path, error: &VolumeError, source: Option<&Source>) -> Failure {
    if let VolumeError::CounterNeeded { .. } = error {
        return counter::needed(path, error);
    }
    let explained = source.and_then(|source| source.explain(path, error));
    explained.unwrap_or_else(|| refused(path, error))
}

/// What a volume's refusal means to the operator.
pub fn refused(path: &Path, error: &VolumeError) -> Failure {
    let (exit, advice) = match error {
        VolumeError::Misuse(Misuse::NoSlot) => {
            (Exit::Usage, "`postern key list` shows the slots; there are eight")
        }
        VolumeError::Misuse(Misuse::LastSlot) => (
            Exit::Usage,
            "add another key first; --destroy-volume makes the volume unreadable for ever",
        ),
        VolumeError::Misuse(Misuse::SnapshotName | Misuse::SnapshotExists) => {
            (Exit::Usage, "choose another name")
        }
        VolumeError::Misuse(Misuse::NoSnapshot) => {
            (Exit::Usage, "see `postern snapshot list` for those that are there")
        }
        VolumeError::Misuse(Misuse::TooManySnapshots | Misuse::HasSnapshots) => {
            (Exit::Usage, "delete snapshots first (`postern snapshot delete`)")
        }
        VolumeError::Misuse(Misuse::Rekeying) => {
            (Exit::Usage, "finish it first: `postern rekey` goes on")
        }
        VolumeError::Misuse(_) => (Exit::Usage, "choose another size"),
        VolumeError::NotAVolume => {
            (Exit::Damaged, "check the path; if it was a volume, restore it from a copy")
        }
        VolumeError::UnsupportedVersion { .. } | VolumeError::UnsupportedFeatures { .. } => {
            (Exit::Damaged, "use the release of Postern that made it")
        }
        VolumeError::DataInTheWay { .. } => {
            (Exit::Usage, "truncate the guest's file or punch what lies beyond, or give more room")
        }
        VolumeError::Damaged { .. } | VolumeError::NotWritable => {
            (Exit::Damaged, "see what is damaged with `postern verify`")
        }
        VolumeError::WrongKey => (Exit::Key, "give a key that has a slot in it"),
        VolumeError::Unreadable { .. } => (
            Exit::Damaged,
            "write that block, or punch a hole there, and run it again; `postern verify` names all",
        ),
        VolumeError::Host { error: HostError::Errno(libc::ENOSPC), .. } => {
            (Exit::NoSpace, "make room on the host")
        }
        VolumeError::Host { .. } | VolumeError::Flush(_) => {
            (Exit::Io, "see the host's log for the cause; do not go on with a failing disk")
        }
        VolumeError::NoEntropy => (Exit::Internal, "the system gives no randomness"),
        _ => (Exit::Damaged, "nothing was changed; restore the host file from a copy"),
    };
    Failure::new(exit, error, path.display(), advice)
}

/// Runs `postern format`.
///
/// # Errors
/// As [`make`]; [`Exit::Key`] for the key file.
pub fn format(args: &FormatArgs) -> Result<(), Failure> {
    let access = Access { write: true, allow_buffered: args.allow_buffered };
    // Before a key is made for it.
    is_vacant(&args.host_file)?;
    let counter = Source::one(&args.counter)?;
    let key_file = match args.passphrase.get(Age::New)? {
        Some(words) => {
            make(&args.host_file, args.size, &words, counter.as_ref(), access)?;
            None
        }
        None => {
            let given = args.key_file.as_deref();
            Some(key::choose_and_make(given, &args.host_file, |key| {
                let key = SlotKey::new(*key);
                make(&args.host_file, args.size, &key, counter.as_ref(), access)
            })?)
        }
    };
    let host_bytes = Volume::host_blocks(args.size) * BLOCK as u64;
    if args.json {
        let made = json!({
            "host_file": args.host_file.display().to_string(),
            "key_file": key_file.map(|path| path.display().to_string()),
            "size": args.size,
            "host_bytes": host_bytes,
        });
        println!("{made}");
    } else {
        println!(
            "{}: a volume of {}, {} on the host (sparse until written)",
            args.host_file.display(),
            size::show(args.size),
            size::show(host_bytes)
        );
    }
    Ok(())
}

/// Bytes of a mean number of blocks, rounded down.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
fn mean(blocks: f64) -> u64 {
    (blocks * BLOCK as f64) as u64
}

/// Runs `postern info`.
///
/// # Errors
/// As [`check`].
pub fn info(args: &VolumeArgs) -> Result<(), Failure> {
    if args.host_file.is_dir() {
        return directory_volume::info(args);
    }
    let (disk, volume, report) = look(args)?;
    let info = volume.info();
    let usage = run_to_end(volume.usage(&disk));
    let allocated = disk.allocated();
    let uuid: String = info.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let bytes = |blocks: u64| blocks * BLOCK as u64;
    if args.json {
        let info = json!({
            "host_file": args.host_file.display().to_string(),
            "uuid": uuid,
            "size": info.size,
            "capacity": info.capacity,
            "host_bytes": bytes(info.host_blocks),
            "used_bytes": bytes(info.used_blocks),
            "held_bytes": bytes(info.held_blocks),
            "free_bytes": bytes(info.free_blocks),
            "allocated_bytes": allocated,
            "used_runs": usage.used_runs,
            "mean_used_run_bytes": mean(usage.mean_used()),
            "free_runs": usage.free_runs,
            "mean_free_run_bytes": mean(usage.mean_free()),
            "longest_free_run_bytes": bytes(usage.longest_free),
            "unreadable_regions": usage.unreadable,
            "journal_bytes": bytes(info.journal_blocks),
            "map_levels": info.map_levels,
            "generation": info.generation,
            "sessions": info.session,
            "clean": report.clean,
            "key_version": info.key_version,
            "rekeying": info.rekeying,
            "replayed_journal_blocks": report.journal_blocks,
            "replayed_records": report.records_applied,
            "skipped_records": report.records_skipped,
            "loss": report.loss.map(|loss| loss.to_string()),
            "counter": info.counter,
            "freshness": freshness(&report),
        });
        println!("{info}");
        return Ok(());
    }
    println!("volume    {}", args.host_file.display());
    println!("uuid      {uuid}");
    println!("size      {} of {}", size::show(info.size), size::show(info.capacity));
    println!(
        "on host   {}: {} used, {} free for new versions of blocks, {} of journal",
        size::show(bytes(info.host_blocks)),
        size::show(bytes(info.used_blocks)),
        size::show(bytes(info.free_blocks)),
        size::show(bytes(info.journal_blocks))
    );
    if let Some(allocated) = allocated {
        println!("takes     {} of the host's file system", size::show(allocated));
    }
    println!(
        "pieces    {} used, {} long on average; {} free, {} on average, the longest {}",
        usage.used_runs,
        size::show(mean(usage.mean_used())),
        usage.free_runs,
        size::show(mean(usage.mean_free())),
        size::show(bytes(usage.longest_free))
    );
    if info.held_blocks > 0 {
        println!("snapshots hold {} of it", size::show(bytes(info.held_blocks)));
    }
    println!("opened    {} times for writing; superblock {}", info.session, info.generation);
    if info.rekeying {
        println!("rekey     on its way: `postern rekey` goes on");
    }
    if let Some(loss) = &report.loss {
        println!("state     damaged: {loss}");
    } else if report.clean {
        println!("state     closed cleanly");
    } else {
        println!(
            "state     not closed: the next open replays {} journal blocks ({} records, and skips \
             {} unsynced ones that did not reach the host)",
            report.journal_blocks, report.records_applied, report.records_skipped
        );
    }
    if let Some(sequence) = info.counter {
        println!("counter   bound, at {sequence}; {}", freshness(&report));
    }
    Ok(())
}

/// What a monotonic counter says about the state found.
fn freshness(report: &OpenReport) -> &'static str {
    match report.freshness {
        Freshness::Unbound => "unbound",
        Freshness::Unchecked { .. } => "unchecked",
        Freshness::Confirmed { .. } => "newest",
        _ => "refused",
    }
}

/// Opens the volume of `info` and `verify`, for reading only.
///
/// # Errors
/// As [`check`].
pub fn look(args: &VolumeArgs) -> Result<(FileDisk, Volume, OpenReport), Failure> {
    let access = Access { write: false, allow_buffered: args.allow_buffered };
    let disk = FileDisk::open(&args.host_file, access)?;
    let key = key::present(&args.passphrase, args.key_file.as_deref(), &args.host_file)?;
    let counter = Source::one(&args.counter)?;
    let (volume, report) = open_with(&disk, &key, used(counter.as_ref()))
        .map_err(|error| refused_to_read(&args.host_file, &disk, &error, counter.as_ref()))?;
    Ok((disk, volume, report))
}

/// Runs `postern verify`; answers whether the volume is whole.
///
/// # Errors
/// As [`check`], except that damage is no error here: a journal or superblock that is gone, each
/// range of data that cannot be read, in the file and in the snapshots, and a space map that is
/// not exact are reported on a line.
pub fn verify(args: &VolumeArgs) -> Result<bool, Failure> {
    if args.host_file.is_dir() {
        return directory_volume::verify(args);
    }
    let (disk, volume, report) = look(args)?;
    let (loss, size) = (report.loss.as_ref().map(ToString::to_string), volume.size());
    let found = read_everything(&disk, &volume);
    let space = run_to_end(volume.verify_space(&disk));
    let (mut snapshots, mut table, mut view) = (Vec::new(), None, volume);
    match run_to_end(view.snapshots(&disk)) {
        Ok(list) => {
            for SnapshotInfo { name, .. } in list {
                view = run_to_end(view.at_snapshot(&disk, &name))
                    .map_err(|error| refused(&args.host_file, &error))?;
                snapshots.push((name, read_everything(&disk, &view)));
            }
        }
        Err(error) => table = Some(error.to_string()),
    }
    let whole = loss.is_none()
        && table.is_none()
        && found.is_empty()
        && snapshots.iter().all(|(_, found)| found.is_empty())
        && space.is_exact();
    if args.json {
        let ranges = |found: &[Damage]| -> Vec<_> {
            let range = |bad: &Damage| json!({ "offset": bad.offset, "length": bad.length });
            found.iter().map(range).collect()
        };
        let snapshots: Vec<_> = snapshots
            .iter()
            .map(|(name, found)| json!({ "name": name, "damaged": ranges(found) }))
            .collect();
        let answer = json!({
            "size": size,
            "damaged": ranges(&found),
            "loss": loss,
            "snapshots": snapshots,
            "snapshot_table": table,
            "unprotected_blocks": space.unprotected,
            "twice_used_blocks": space.twice,
            "leaked_blocks": space.leaked,
            "unreadable_nodes": space.unreadable,
        });
        println!("{answer}");
        return Ok(whole);
    }
    for what in loss.iter().chain(&table) {
        println!("damaged: {what}");
    }
    for bad in &found {
        println!("damaged: bytes {}..{} of the guest's file", bad.offset, bad.offset + bad.length);
    }
    for (name, bad) in
        snapshots.iter().flat_map(|(name, found)| found.iter().map(move |b| (name, b)))
    {
        println!("damaged: bytes {}..{} of snapshot {name}", bad.offset, bad.offset + bad.length);
    }
    if !space.is_exact() {
        println!(
            "damaged: the space map: {} blocks called free that hold something, {} used twice, {} \
             lost, {} nodes unreadable",
            space.unprotected, space.twice, space.leaked, space.unreadable
        );
    }
    let damaged: u64 = found.iter().map(|bad| bad.length).sum();
    if whole {
        println!("whole: {} read", size::show(size));
    } else {
        println!("{} of {} damaged", size::show(damaged), size::show(size));
    }
    Ok(whole)
}

/// What of the guest's file cannot be read.
pub fn read_everything(disk: &FileDisk, volume: &Volume) -> Vec<Damage> {
    let mut progress = Progress::start(volume.size());
    let report = run_to_end(volume.verify(disk, |done, _| progress.show(done)));
    progress.end();
    report.damaged
}

/// Reads up to `length` bytes at `offset`.
///
/// # Errors
/// `EIO` for damage.
pub fn read(
    disk: &FileDisk,
    volume: &Volume,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, Errno> {
    let part = Memory::new(vec![0; length]);
    let done = run_to_end(volume.read(disk, offset, &part))?;
    let mut bytes = part.into_inner();
    bytes.truncate(done);
    Ok(bytes)
}

/// A line on the terminal that says how far it is; nothing where there is no terminal.
pub struct Progress {
    total: u64,
    shown: Option<Instant>,
}

impl Progress {
    /// For work on `total` bytes.
    pub fn start(total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { total, shown: terminal.then(Instant::now) }
    }

    /// `done` bytes are done.
    pub fn show(&mut self, done: u64) {
        if self.shown.is_some_and(|shown| shown.elapsed() >= PROGRESS_EVERY) {
            self.shown = Some(Instant::now());
            eprint!("\r{} of {} ", size::show(done), size::show(self.total));
        }
    }

    /// Takes the line away.
    pub fn end(&self) {
        if self.shown.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}
