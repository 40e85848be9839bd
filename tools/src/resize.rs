//! `postern resize`: a volume gets more room, or less; a program that runs on it lends it for that.
//!
//! Holds: the host file is lengthened before the volume grows and cut off after it has shrunk, so
//! that whatever happens in between leaves a whole volume in a file that is long enough.

use std::path::Path;

use postern_trusted::{
    disk::{BLOCK, Disk as _},
    exec::run_to_end,
    volume::{Freshness, OpenOptions, Resized, SlotKey, Volume, VolumeError},
};
use serde_json::json;

use crate::{
    cli::ResizeArgs,
    counter::Source,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key, size,
    volume::{Progress, refused_with},
};

/// Runs `postern resize`.
///
/// # Errors
/// [`Exit::Usage`] when data is in the way of a shrink or for a size that cannot be,
/// [`Exit::NoSpace`] when the host file cannot be that long, and those of opening a volume.
pub fn resize(args: &ResizeArgs) -> Result<(), Failure> {
    let path = &args.volume.host_file;
    if path.is_dir() {
        return Err(Failure::new(
            Exit::Usage,
            "a protected directory has no size of its own",
            path.display(),
            "its files grow as they are written, up to `--file-capacity` of `postern run`",
        ));
    }
    let access = Access { write: true, allow_buffered: args.volume.allow_buffered };
    let key = key::present(&args.volume.passphrase, args.volume.key_file.as_deref(), path)?;
    let source = Source::one(&args.volume.counter)?;
    let counter = source.as_ref().map(|source| source.used(false));
    let options = OpenOptions { counter, ..OpenOptions::default() };
    let refused = |error: VolumeError| refused_with(path, &error, source.as_deref());
    let mut disk = FileDisk::open(path, access)?;
    let needed = blocks_for(&disk, &key, &options, args.size).map_err(refused)?;
    if disk.host_blocks() < needed {
        set_blocks(&mut disk, needed, path)?;
    }
    let mut progress = None;
    let resized = run_to_end(Volume::resize(&disk, &key, &options, args.size, |done, all| {
        progress.get_or_insert_with(|| Progress::start(all)).show(done);
    }));
    if let Some(progress) = progress {
        progress.end();
    }
    // Also after a refusal the file may stay longer than needed: it does no harm.
    let resized = resized.map_err(refused)?;
    if disk.host_blocks() > resized.host_blocks {
        set_blocks(&mut disk, resized.host_blocks, path)?;
    }
    show(args, &resized);
    Ok(())
}

/// Refuses before anything is changed if the volume would not open for writing.
fn blocks_for(
    disk: &FileDisk,
    key: &SlotKey,
    options: &OpenOptions,
    size: u64,
) -> Result<u64, VolumeError> {
    let options = OpenOptions { read_only: true, ..options.clone() };
    let (volume, report) = run_to_end(Volume::open(disk, key, &options))?;
    match (report.loss, report.freshness) {
        (Some(loss), _) => return Err(loss),
        (None, Freshness::Unchecked { sequence }) => {
            return Err(VolumeError::CounterNeeded { sequence });
        }
        (None, _) => {}
    }
    volume.host_blocks_for(size)
}

fn set_blocks(disk: &mut FileDisk, blocks: u64, path: &Path) -> Result<(), Failure> {
    disk.set_blocks(blocks).map_err(|error| {
        let bytes = size::show(blocks * BLOCK as u64);
        Failure::io(&format!("cannot make the host file {bytes} long"), path.display(), &error)
    })
}

fn show(args: &ResizeArgs, resized: &Resized) {
    let bytes = |blocks: u64| blocks * BLOCK as u64;
    if args.volume.json {
        let answer = json!({
            "host_file": args.volume.host_file.display().to_string(),
            "capacity": resized.capacity,
            "size": resized.size,
            "host_bytes": bytes(resized.host_blocks),
            "moved_bytes": bytes(resized.moved),
        });
        println!("{answer}");
        return;
    }
    println!(
        "{}: a volume of {}, the guest's file has {}; {} on the host, {} moved",
        args.volume.host_file.display(),
        size::show(resized.capacity),
        size::show(resized.size),
        size::show(bytes(resized.host_blocks)),
        size::show(bytes(resized.moved)),
    );
}
