//! `postern rekey` of a protected directory: its index and every file.
//!
//! The order of things, and why (each step waits for the one before):
//! 1. *Begin* with the index: its header gets a new master. The keys of files are derived from it;
//!    what they were derived from before stays in the header until the end.
//! 2. *Each file* gets a slot for its new key, and is then rekeyed as any volume; only the new key
//!    keeps its slot. A file that is under way opens with the one or the other.
//! 3. *The table* is written, with the state that each file has now.
//! 4. *End* with the index: it is sealed anew, and the former keys are gone.
//!
//! Holds: cut off at any point it leaves a directory that runs as before, and goes on when it is
//! run again.

use std::{collections::BTreeSet, path::Path};

use postern_trusted::{
    directory::{FileKeys, INDEX_NAME, Table, file_keys, host_name, slot_offset},
    errno::Errno,
    exec::run_to_end,
    platform::{Buffer as _, Memory},
    volume::{OpenOptions, SlotKey, Stretch, Volume, VolumeError},
};
use serde_json::json;

use crate::{
    cli::RekeyArgs,
    counter::Source,
    directory_records::Recorded,
    directory_volume::read_table,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    rekey, size,
    volume::{refused, refused_with},
};

/// Runs `postern rekey` on a directory.
///
/// # Errors
/// As for a volume; those of a file name its path in the directory.
pub fn run(args: &RekeyArgs) -> Result<(), Failure> {
    let directory = &args.volume.host_file;
    let path = directory.join(INDEX_NAME);
    let access = Access { write: true, allow_buffered: args.volume.allow_buffered };
    let disk = FileDisk::open(&path, access)?;
    let keys = rekey::keys(args)?;
    let keys: Vec<&SlotKey> = keys.iter().collect();
    let counter = Source::one(&args.volume.counter)?;
    let options = || {
        let counter = counter.as_ref().map(|source| source.used(false));
        OpenOptions { counter, ..OpenOptions::default() }
    };
    let failed = |error: VolumeError| refused_with(&path, &error, counter.as_deref());
    let key = keys[0];
    remove_leftovers(&disk, key, &options(), directory, &failed)?;
    let begun = run_to_end(Volume::rekey_begin(&disk, &keys, &options())).map_err(failed)?;
    let (index, _) = run_to_end(Volume::open(&disk, key, &options())).map_err(failed)?;
    let mut work = Work { directory, access, sealed: 0, json: args.volume.json };
    let done = work.files(&disk, &index, &path);
    // Not closed cleanly after a failure: a file may be in any state then.
    let files = done?;
    let closed = run_to_end(index.close(&disk));
    closed.map_err(|errno| {
        Failure::new(Exit::Io, errno, path.display(), "run it again: it goes on")
    })?;
    let report = run_to_end(Volume::rekey_rewrite(&disk, key, &options(), |_, _| ()));
    let report = report.map_err(failed)?;
    run_to_end(Volume::rekey_end(&disk, key)).map_err(failed)?;
    let sealed = work.sealed + report.rewritten * BLOCK;
    if args.volume.json {
        let done = json!({
            "host_directory": directory.display().to_string(),
            "key_version": report.key_version,
            "resumed": !begun,
            "files": files,
            "sealed_bytes": sealed,
        });
        println!("{done}");
    } else {
        let how = if begun { "sealed" } else { "went on and sealed" };
        println!(
            "{}: {how} {files} files and the names anew, {}; the keys before open nothing of it",
            directory.display(),
            size::show(sealed),
        );
    }
    Ok(())
}

/// Blocks of a volume.
const BLOCK: u64 = 4096;

/// What a crash left without a name goes first: the index is closed cleanly from here on, and
/// nobody looks for it any more.
fn remove_leftovers(
    disk: &FileDisk,
    key: &SlotKey,
    options: &OpenOptions,
    directory: &Path,
    failed: &impl Fn(VolumeError) -> Failure,
) -> Result<(), Failure> {
    let options = OpenOptions { read_only: true, ..options.clone() };
    let (volume, report) = run_to_end(Volume::open(disk, key, &options)).map_err(failed)?;
    if let Some(loss) = report.loss {
        return Err(failed(loss));
    }
    if report.clean {
        return Ok(());
    }
    let (table, _) = read_table(disk, &volume, directory)?;
    let known: BTreeSet<String> =
        table.nodes().filter_map(|(_, node)| node.file().map(host_name)).collect();
    let trouble = |error: std::io::Error| Failure::io("cannot tidy", directory.display(), &error);
    for entry in std::fs::read_dir(directory).map_err(trouble)? {
        let entry = entry.map_err(trouble)?;
        let name = entry.file_name().into_string().unwrap_or_default();
        let digits = name.bytes().filter(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')).count();
        if name.len() == 32 && digits == 32 && !known.contains(&name) {
            std::fs::remove_file(entry.path()).map_err(trouble)?;
        }
    }
    Ok(())
}

/// The files on the way.
struct Work<'a> {
    directory: &'a Path,
    access: Access,
    /// Bytes sealed anew.
    sealed: u64,
    json: bool,
}

impl Work<'_> {
    /// Rekeys every file that is not yet, and writes down the states they have then; answers how
    /// many files there are.
    fn files(&mut self, disk: &FileDisk, index: &Volume, path: &Path) -> Result<usize, Failure> {
        let (mut table, sequence) = read_table(disk, index, path)?;
        let files: Vec<u64> = table
            .nodes()
            .filter(|(_, node)| !node.is_directory())
            .map(|(inode, _)| inode)
            .collect();
        let mut outcome = Ok(files.len());
        for (done, inode) in files.iter().enumerate() {
            if let Err(failure) = self.file(index, &mut table, *inode) {
                outcome = Err(failure);
                break;
            }
            if self.json {
                println!("{}", json!({ "done": done + 1, "files": files.len() }));
            }
        }
        // Also after a failure: the files before it have new states.
        let written = write_table(disk, index, &table, sequence + 1);
        written.map_err(|errno| {
            Failure::new(
                Exit::Io,
                format_args!("the name table cannot be written: {errno}"),
                path.display(),
                "run it again: it goes on",
            )
        })?;
        outcome
    }

    fn file(&mut self, index: &Volume, table: &mut Table, inode: u64) -> Result<(), Failure> {
        let Some(node) = table.node(inode) else { return Ok(()) };
        let Some(id) = node.file() else { return Ok(()) };
        let recorded = Recorded::new(node.record);
        let host_file = self.directory.join(host_name(id));
        let named = table.path(inode).unwrap_or_default();
        let label = format!("{} ({})", host_file.display(), String::from_utf8_lossy(&named));
        let failed = |error: VolumeError| refused(Path::new(&label), &error);
        let disk = FileDisk::open(&host_file, self.access)?;
        let keys = file_keys(index, id);
        let options = OpenOptions { counter: Some(recorded.used()), ..OpenOptions::default() };
        let rewritten = run_to_end(rekey_file(&disk, &keys, &options)).map_err(failed)?;
        self.sealed += rewritten * BLOCK;
        // A file without a record, in a table too full for one, opens without.
        let _ = table.set_record(inode, recorded.newest());
        Ok(())
    }
}

/// Rekeys the volume of one file, or goes on with it; answers how many blocks were sealed anew.
async fn rekey_file(
    disk: &FileDisk,
    keys: &FileKeys,
    options: &OpenOptions,
) -> Result<u64, VolumeError> {
    if let Some(former) = &keys.former {
        match Volume::slot_of(disk, &keys.now).await {
            Err(VolumeError::WrongKey) => {
                Volume::put_slot(disk, former, &keys.now, Stretch::default(), None).await?;
            }
            opens => drop(opens?),
        }
        // The former key keeps its slot until the rekey of the file has begun.
        let begins = match Volume::slot_of(disk, former).await {
            Ok(_) => true,
            Err(VolumeError::WrongKey) => false,
            Err(error) => return Err(error),
        };
        let under_way = begins || {
            let options = OpenOptions { read_only: true, ..options.clone() };
            Volume::open(disk, &keys.now, &options).await?.0.info().rekeying
        };
        if under_way {
            let report = Volume::rekey(disk, &[&keys.now], options, |_, _| ()).await?;
            return Ok(report.rewritten);
        }
    }
    Ok(0)
}

fn write_table(disk: &FileDisk, index: &Volume, table: &Table, sequence: u64) -> Result<(), Errno> {
    let image = Memory::new(table.encode(sequence));
    let length = image.len();
    run_to_end(async {
        if index.write(disk, slot_offset(sequence), &image).await? != length {
            return Err(Errno::EIO);
        }
        index.sync(disk).await
    })
}
