//! `postern snapshot`: states of a volume that stay, and copies of them.
//!
//! Holds: the volume is locked, so nobody has it open meanwhile; a copy is made in a new or empty
//! file only, and removed again if it could not be finished.

use std::{
    fs::OpenOptions as FileOptions,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use postern_trusted::{
    disk::BLOCK,
    errno::Errno,
    exec::run_to_end,
    platform::Memory,
    volume::{Freshness, OpenOptions, SlotKey, Volume},
};
use serde_json::json;

use crate::{
    cli::{ExportArgs, SnapshotCommand, SnapshotName, VolumeArgs},
    counter::Source,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key, size,
    volume::{self, Progress, refused, refused_with},
};

/// Bytes copied at once.
const STEP: usize = 1 << 20;

/// Runs `postern snapshot`.
///
/// # Errors
/// [`Exit::Usage`] for a name that is taken or not there; those of opening a volume.
pub fn run(command: &SnapshotCommand) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create(args) => create(args),
        SnapshotCommand::List(args) => list(args),
        SnapshotCommand::Delete(args) => delete(args),
        SnapshotCommand::Export(args) => export(args),
    }
}

/// Opens the volume for writing, does `work`, and closes it.
fn change<T>(
    args: &VolumeArgs,
    work: impl FnOnce(&FileDisk, &Volume) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let path = &args.host_file;
    let disk = FileDisk::open(path, Access { write: true, allow_buffered: args.allow_buffered })?;
    let key = key::present(&args.passphrase, args.key_file.as_deref(), path)?;
    let source = Source::one(&args.counter)?;
    let counter = source.as_ref().map(|source| source.used(false));
    let options = OpenOptions { counter, ..OpenOptions::default() };
    let opened = run_to_end(Volume::open(&disk, &key, &options));
    let (volume, _) = opened.map_err(|error| refused_with(path, &error, source.as_deref()))?;
    let done = work(&disk, &volume);
    // Moves the counter, too.
    let closed = run_to_end(volume.close(&disk)).map_err(|errno| failed("closing", path, errno));
    done.and_then(|done| closed.map(|()| done))
}

fn failed(what: &str, path: &Path, errno: Errno) -> Failure {
    let exit = if errno == Errno::ENOSPC { Exit::NoSpace } else { Exit::Io };
    Failure::new(
        exit,
        format_args!("{what} failed with {errno}"),
        path.display(),
        "see the host's log for the cause",
    )
}

fn create(args: &SnapshotName) -> Result<(), Failure> {
    let path = &args.volume.host_file;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    change(&args.volume, |disk, volume| {
        run_to_end(volume.make_snapshot(disk, &args.name, now))
            .map_err(|error| refused(path, &error))
    })?;
    if args.volume.json {
        println!("{}", json!({ "name": args.name, "created": now }));
    } else {
        println!("{}: snapshot {}", path.display(), args.name);
    }
    Ok(())
}

fn list(args: &VolumeArgs) -> Result<(), Failure> {
    let (disk, volume, _) = volume::look(args)?;
    let found = run_to_end(volume.snapshots(&disk));
    let found = found.map_err(|error| refused(&args.host_file, &error))?;
    if args.json {
        let snapshots: Vec<_> = found
            .iter()
            .map(|s| {
                json!({ "name": s.name, "created": s.created, "size": s.size, "number": s.number })
            })
            .collect();
        let held = volume.info().held_blocks * BLOCK as u64;
        println!("{}", json!({ "snapshots": snapshots, "held_bytes": held }));
    } else {
        for snapshot in found {
            let (name, size) = (snapshot.name, size::show(snapshot.size));
            println!("{name}  {size}  made {} s after 1970", snapshot.created);
        }
    }
    Ok(())
}

fn delete(args: &SnapshotName) -> Result<(), Failure> {
    let path = &args.volume.host_file;
    let freed = change(&args.volume, |disk, volume| {
        run_to_end(volume.delete_snapshot(disk, &args.name)).map_err(|error| refused(path, &error))
    })?;
    let bytes = freed * BLOCK as u64;
    if args.volume.json {
        println!("{}", json!({ "name": args.name, "freed_bytes": bytes }));
    } else {
        println!("{}: {} free again", path.display(), size::show(bytes));
    }
    Ok(())
}

fn export(args: &ExportArgs) -> Result<(), Failure> {
    let source = &args.snapshot.volume;
    let existed = volume::is_vacant(&args.output)?;
    let (disk, volume, report) = volume::look(source)?;
    if let (Freshness::Refused, Some(loss)) = (report.freshness, report.loss) {
        let counter = Source::one(&source.counter)?;
        return Err(refused_with(&source.host_file, &loss, counter.as_deref()));
    }
    let snapshot = run_to_end(volume.at_snapshot(&disk, &args.snapshot.name));
    let snapshot = snapshot.map_err(|error| refused(&source.host_file, &error))?;
    if args.plain {
        export_plain(&disk, &snapshot, args).inspect_err(|_| {
            let _ = if existed {
                FileOptions::new().write(true).open(&args.output).and_then(|file| file.set_len(0))
            } else {
                std::fs::remove_file(&args.output)
            };
        })?;
    } else {
        export_sealed(&disk, &snapshot, args)?;
    }
    let size = snapshot.size();
    if source.json {
        println!("{}", json!({ "output": args.output.display().to_string(), "size": size }));
    } else {
        println!("{}: {} copied", args.output.display(), size::show(size));
    }
    Ok(())
}

/// Calls `write` for each piece of the file that is not a hole.
fn copy(
    disk: &FileDisk,
    snapshot: &Volume,
    path: &Path,
    mut write: impl FnMut(u64, Vec<u8>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let size = snapshot.size();
    let mut progress = Progress::start(size);
    for at in (0..size).step_by(STEP) {
        let length = (size - at).min(STEP as u64);
        let bytes = volume::read(disk, snapshot, at, length as usize)
            .map_err(|errno| failed("reading the snapshot", path, errno))?;
        if bytes.len() as u64 != length {
            return Err(Failure::new(
                Exit::Damaged,
                format_args!("the snapshot is damaged near byte {}", at + bytes.len() as u64),
                path.display(),
                "see what is damaged with `postern verify`",
            ));
        }
        if bytes.iter().any(|byte| *byte != 0) {
            write(at, bytes)?;
        }
        progress.show(at + length);
    }
    progress.end();
    Ok(())
}

fn export_plain(disk: &FileDisk, snapshot: &Volume, args: &ExportArgs) -> Result<(), Failure> {
    let io =
        |error: std::io::Error| Failure::io("cannot write the copy", args.output.display(), &error);
    let mut options = FileOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&args.output);
    let file = file.map_err(io)?;
    file.set_len(snapshot.size()).map_err(io)?;
    copy(disk, snapshot, &args.snapshot.volume.host_file, |at, bytes| {
        file.write_all_at(&bytes, at).map_err(io)
    })?;
    file.sync_all().map_err(io)
}

fn export_sealed(disk: &FileDisk, snapshot: &Volume, args: &ExportArgs) -> Result<(), Failure> {
    let access = Access { write: true, allow_buffered: args.snapshot.volume.allow_buffered };
    let output = &args.output;
    key::choose_and_make(args.output_key_file.as_deref(), output, |key| {
        let key = SlotKey::new(*key);
        volume::make(output, snapshot.capacity(), &key, None, access)?;
        fill(disk, snapshot, args, &key, access).inspect_err(|_| {
            // Not whole: nobody shall take it for a copy.
            let _ = std::fs::remove_file(output);
        })
    })
    .map(drop)
}

fn fill(
    disk: &FileDisk,
    snapshot: &Volume,
    args: &ExportArgs,
    key: &SlotKey,
    access: Access,
) -> Result<(), Failure> {
    let output = &args.output;
    let to = FileDisk::open(output, access)?;
    let opened = run_to_end(Volume::open(&to, key, &OpenOptions::default()));
    let (copied, _) = opened.map_err(|error| refused(output, &error))?;
    let writing = |errno| failed("writing the copy", output, errno);
    copy(disk, snapshot, &args.snapshot.volume.host_file, |at, bytes| {
        let length = bytes.len();
        let done = run_to_end(copied.write(&to, at, &Memory::new(bytes))).map_err(writing)?;
        if done == length { Ok(()) } else { Err(writing(Errno::ENOSPC)) }
    })?;
    run_to_end(copied.truncate(&to, snapshot.size())).map_err(writing)?;
    run_to_end(copied.close(&to)).map_err(writing)
}
