//! Volumes from outside: made, looked at, verified. All on a plain host file, without a daemon.
//!
//! Holds: nothing here writes to a volume that exists; a volume that could not be made is removed
//! again.

use std::{
    fs::OpenOptions as FileOptions,
    io::IsTerminal as _,
    path::Path,
    time::{Duration, Instant},
};

use postern_trusted::{
    disk::{BLOCK, Disk as _, HostError},
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{FormatOptions, Misuse, OpenOptions, OpenReport, SlotKey, Volume, VolumeError},
};
use serde_json::json;

use crate::{
    cli::{FormatArgs, VolumeArgs},
    directory_volume,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key,
    passphrase::Age,
    size,
};

/// Bytes read at once while verifying.
const STEP: usize = 1 << 20;
/// Shortest time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Makes a volume of `bytes` in the new (or empty) host file `path`.
///
/// # Errors
/// If the file has content, the host has no room or does no direct I/O. What was made is removed.
pub fn make(path: &Path, bytes: u64, key: &SlotKey, access: Access) -> Result<(), Failure> {
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
        });
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
fn is_vacant(path: &Path) -> Result<bool, Failure> {
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
pub fn check(path: &Path, key: &SlotKey, access: Access) -> Result<(), Failure> {
    let disk = FileDisk::open(path, access)?;
    let (_, report) = open_with(&disk, path, key)?;
    report.loss.map_or(Ok(()), |loss| Err(refused(path, &loss)))
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
    access: Access,
) -> Result<(FileDisk, Volume, OpenReport), Failure> {
    let disk = FileDisk::open(path, access)?;
    let (volume, report) = open_with(&disk, path, key)?;
    Ok((disk, volume, report))
}

fn open_with(disk: &FileDisk, path: &Path, key: &SlotKey) -> Result<(Volume, OpenReport), Failure> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    run_to_end(Volume::open(disk, key, &options)).map_err(|error| match error {
        VolumeError::Host { place, .. } if place >= disk.host_blocks() => Failure::new(
            Exit::Damaged,
            format_args!("the host file ends before block {place}, which every volume has"),
            path.display(),
            "it is no volume, or was cut off: restore it from a copy",
        ),
        error => refused(path, &error),
    })
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
        VolumeError::Misuse(_) => (Exit::Usage, "choose another size"),
        VolumeError::NotAVolume => {
            (Exit::Damaged, "check the path; if it was a volume, restore it from a copy")
        }
        VolumeError::UnsupportedVersion { .. } | VolumeError::UnsupportedFeatures { .. } => {
            (Exit::Damaged, "use the release of Postern that made it")
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
    let key_file = match args.passphrase.get(Age::New)? {
        Some(words) => {
            make(&args.host_file, args.size, &words, access)?;
            None
        }
        None => {
            let given = args.key_file.as_deref();
            Some(key::choose_and_make(given, &args.host_file, |key| {
                make(&args.host_file, args.size, &SlotKey::new(*key), access)
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

/// Runs `postern info`.
///
/// # Errors
/// As [`check`].
pub fn info(args: &VolumeArgs) -> Result<(), Failure> {
    if args.host_file.is_dir() {
        return directory_volume::info(args);
    }
    let (_disk, volume, report) = look(args)?;
    let info = volume.info();
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
            "free_bytes": bytes(info.free_blocks),
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
    Ok(())
}

/// Opens the volume of `info` and `verify`, for reading only.
fn look(args: &VolumeArgs) -> Result<(FileDisk, Volume, OpenReport), Failure> {
    let access = Access { write: false, allow_buffered: args.allow_buffered };
    let disk = FileDisk::open(&args.host_file, access)?;
    let key = key::present(args, &args.host_file)?;
    let (volume, report) = open_with(&disk, &args.host_file, &key)?;
    Ok((disk, volume, report))
}

/// Runs `postern verify`; answers whether the volume is whole.
///
/// # Errors
/// As [`check`], except that damage is no error here: a journal or superblock that is gone and
/// each range of data that cannot be read are reported on a line.
pub fn verify(args: &VolumeArgs) -> Result<bool, Failure> {
    if args.host_file.is_dir() {
        return directory_volume::verify(args);
    }
    let (disk, volume, report) = look(args)?;
    let mut progress = Progress::start(volume.size());
    let found = damaged_ranges(&disk, &volume, |done| progress.show(done));
    progress.end();
    let found = found.map_err(|errno| {
        Failure::new(
            Exit::Io,
            format_args!("reading failed with {errno}"),
            args.host_file.display(),
            "see the host's log for the cause",
        )
    })?;
    if args.json {
        let ranges: Vec<_> = found
            .iter()
            .map(|range| json!({ "offset": range.start, "length": range.end - range.start }))
            .collect();
        let loss = report.loss.as_ref().map(ToString::to_string);
        println!("{}", json!({ "size": volume.size(), "damaged": ranges, "loss": loss }));
    } else {
        if let Some(loss) = &report.loss {
            println!("damaged: {loss}");
        }
        for range in &found {
            println!("damaged: bytes {}..{} of the guest's file", range.start, range.end);
        }
        let damaged: u64 = found.iter().map(|range| range.end - range.start).sum();
        if found.is_empty() {
            println!("whole: {} read", size::show(volume.size()));
        } else {
            println!("{} of {} damaged", size::show(damaged), size::show(volume.size()));
        }
    }
    Ok(found.is_empty() && report.loss.is_none())
}

/// Reads the whole file of the guest; where a part fails, block by block. Answers the ranges of
/// bytes that cannot be read, joined where they touch.
///
/// # Errors
/// What reading says, other than `EIO`.
pub fn damaged_ranges(
    disk: &FileDisk,
    volume: &Volume,
    mut progress: impl FnMut(u64),
) -> Result<Vec<core::ops::Range<u64>>, Errno> {
    let size = volume.size();
    let mut found: Vec<core::ops::Range<u64>> = Vec::new();
    let part = Memory::new(vec![0; STEP]);
    let block = Memory::new(vec![0; BLOCK]);
    let mut at = 0;
    while at < size {
        let end = (at + STEP as u64).min(size);
        // A read that meets damage is short, or fails if the damage comes first.
        let whole = || run_to_end(volume.read(disk, at, &part)) == Ok((end - at) as usize);
        if !volume.is_hole(at, end - at) && !whole() {
            for place in (at..end).step_by(BLOCK) {
                match run_to_end(volume.read(disk, place, &block)) {
                    Ok(_) => {}
                    Err(Errno::EIO) => {
                        let bad = place..(place + BLOCK as u64).min(size);
                        match found.last_mut().filter(|last| last.end == bad.start) {
                            Some(last) => last.end = bad.end,
                            None => found.push(bad),
                        }
                    }
                    Err(errno) => return Err(errno),
                }
            }
        }
        at = end;
        progress(at);
    }
    Ok(found)
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
    /// Nothing of `total` bytes is done.
    pub fn start(total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { total, shown: terminal.then(Instant::now) }
    }

    /// So many bytes are done.
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
