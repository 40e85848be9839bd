//! `postern rekey`: a whole volume sealed anew under a new volume key.
//!
//! Holds: cut off at any point it leaves a volume that opens as before, and goes on when it is run
//! again.

use std::path::Path;

use postern_trusted::{
    directory::INDEX_NAME,
    exec::run_to_end,
    volume::{OpenOptions, SlotKey, Volume},
};
use serde_json::json;

use crate::{
    cli::{RekeyArgs, VolumeArgs},
    counter::Source,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key, passphrase, rekey_directory, size,
    volume::{Progress, refused_with},
};

/// Blocks of a volume.
const BLOCK: u64 = 4096;

/// Runs `postern rekey`.
///
/// # Errors
/// Those of opening the volume with each key; [`Exit::Damaged`] for a block that cannot be read;
/// [`Exit::Usage`] for the index of a protected directory and for a volume with snapshots.
pub fn run(args: &RekeyArgs) -> Result<(), Failure> {
    let path = &args.volume.host_file;
    if path.is_dir() {
        return rekey_directory::run(args);
    }
    refuse_index(path)?;
    let access = Access { write: true, allow_buffered: args.volume.allow_buffered };
    let disk = FileDisk::open(path, access)?;
    let keys = keys(args)?;
    let keys: Vec<&SlotKey> = keys.iter().collect();
    let mut line: Option<Progress> = None;
    let mut told = 0;
    let counter = Source::one(&args.volume.counter)?;
    let used = counter.as_ref().map(|source| source.used(false));
    let options = OpenOptions { counter: used, ..OpenOptions::default() };
    let rekeyed = run_to_end(Volume::rekey(&disk, &keys, &options, |done, all| {
        if args.volume.json {
            // A line for each hundredth, however large the volume is.
            let part = (done * 100).checked_div(all).unwrap_or(100);
            if part > told {
                told = part;
                println!("{}", json!({ "done": done, "size": all }));
            }
        } else {
            line.get_or_insert_with(|| Progress::start(all)).show(done);
        }
    }));
    if let Some(line) = &line {
        line.end();
    }
    let report = rekeyed.map_err(|error| refused_with(path, &error, counter.as_deref()))?;
    let sealed = report.rewritten * BLOCK;
    if args.volume.json {
        let done = json!({
            "host_file": path.display().to_string(),
            "key_version": report.key_version,
            "resumed": report.resumed,
            "sealed_bytes": sealed,
        });
        println!("{done}");
    } else {
        let how = if report.resumed { "went on and sealed" } else { "sealed" };
        println!(
            "{}: {how} {} anew; volume key {} is in use, the one before opens nothing of it",
            path.display(),
            size::show(sealed),
            report.key_version
        );
    }
    Ok(())
}

/// The keys that open the volume afterwards; the first one opens it now.
///
/// # Errors
/// [`Exit::Key`] for one that cannot be read.
pub fn keys(args: &RekeyArgs) -> Result<Vec<SlotKey>, Failure> {
    let VolumeArgs { passphrase, key_file, host_file, .. } = &args.volume;
    let mut keys = vec![key::present(passphrase, key_file.as_deref(), host_file)?];
    for file in &args.keep_key_file {
        keys.push(SlotKey::new(*key::read(file)?));
    }
    for file in &args.keep_passphrase_file {
        keys.push(passphrase::read(file)?);
    }
    Ok(keys)
}

/// A directory's index gives the keys of its files: a new one alone would lock them all out.
fn refuse_index(path: &Path) -> Result<(), Failure> {
    if path.file_name().is_some_and(|name| name == INDEX_NAME) {
        return Err(Failure::new(
            Exit::Usage,
            "the index of a protected directory is rekeyed together with its files",
            path.display(),
            "give the directory",
        ));
    }
    Ok(())
}
