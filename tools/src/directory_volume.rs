//! Protected directories from outside: made, looked at, verified.
//!
//! Holds: nothing here writes to a directory that exists.

use std::{path::Path, sync::Arc};

use postern_trusted::{
    directory::{
        IMAGE_BLOCK, INDEX_BYTES, INDEX_NAME, ROOT, Table, choose, file_keys, host_name,
        slot_offset,
    },
    volume::{SlotKey, Volume},
};
use serde_json::json;

use crate::{
    cli::{RunArgs, VolumeArgs},
    counter::Source,
    directory_records::Recorded,
    disk::{Access, FileDisk},
    error::{Exit, Failure},
    key::{self, KeySource},
    size, volume,
};

/// Makes the directory if it is not there and `--create` was given, looks at it otherwise; answers
/// its key file, or with a passphrase what that was stretched to.
///
/// # Errors
/// If it cannot be made, is no protected directory, or its key does not open it.
pub fn prepare(
    directory: &Path,
    args: &RunArgs,
    words: Option<&SlotKey>,
    counter: Option<&Arc<Source>>,
    access: Access,
) -> Result<KeySource, Failure> {
    let index = directory.join(INDEX_NAME);
    if Volume::small_host_blocks(args.file_capacity) == 0 {
        return Err(Failure::new(
            Exit::Usage,
            "no volume can have this capacity",
            format_args!("--file-capacity {}", args.file_capacity),
            "give a multiple of 4096 bytes, at most 64T",
        ));
    }
    match std::fs::symlink_metadata(directory) {
        Ok(kind) if !kind.is_dir() => Err(Failure::new(
            Exit::Usage,
            "not a directory",
            directory.display(),
            "a guest path with a slash at its end needs a directory; leave the slash out for a volume",
        )),
        Ok(_) if index.exists() => {
            volume::check_file(&index, access)?;
            if let Some(words) = words {
                volume::check(&index, words, counter, access)?;
                return KeySource::stretched(&index, words, access);
            }
            let key_file = key::choose(args.key_file.as_deref(), directory)?;
            volume::check(&index, &SlotKey::new(*key::read(&key_file)?), counter, access)?;
            Ok(KeySource::File(key_file))
        }
        found => {
            let vacant = found.is_err()
                || std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
            if args.create.is_none() || !vacant {
                return Err(Failure::new(
                    Exit::NoVolume,
                    "no protected directory",
                    directory.display(),
                    "give --create SIZE to make one in a new or empty directory, or correct the path",
                ));
            }
            let made = found.is_err();
            if made {
                std::fs::create_dir(directory)
                    .map_err(|e| Failure::io("cannot make", directory.display(), &e))?;
            }
            let make = |key: &SlotKey| volume::make(&index, INDEX_BYTES, key, counter, access);
            match words {
                Some(words) => {
                    make(words).and_then(|()| KeySource::stretched(&index, words, access))
                }
                None => key::choose_and_make(args.key_file.as_deref(), directory, |key| {
                    make(&SlotKey::new(*key))
                })
                .map(KeySource::File),
            }
            .inspect_err(|_| {
                if made {
                    let _ = std::fs::remove_dir(directory);
                }
            })
        }
    }
}

/// The name table of a directory, and its key.
struct Looked {
    /// Holds the lock: nobody changes the directory meanwhile.
    _disk: FileDisk,
    index: Volume,
    table: Table,
    access: Access,
}

/// The name table in the open index volume, and the sequence number of its image; 0 before the
/// first.
///
/// # Errors
/// [`Exit::Damaged`].
pub fn read_table(disk: &FileDisk, volume: &Volume, index: &Path) -> Result<(Table, u64), Failure> {
    let damaged = |what: &dyn core::fmt::Display| {
        Failure::new(Exit::Damaged, what, index.display(), "restore the directory from a copy")
    };
    let slot = |sequence| {
        let read = |length| {
            volume::read(disk, volume, slot_offset(sequence), length).map_err(|e| damaged(&e))
        };
        match Table::image_bytes(&read(IMAGE_BLOCK)?) {
            Ok(length) => read(length).map(|image| Table::decode(&image)),
            Err(bad) => Ok(Err(bad)),
        }
    };
    let found = choose([slot(0)?, slot(1)?]).map_err(|bad| damaged(&bad))?;
    Ok(found.unwrap_or_else(|| (Table::new(Default::default()), 0)))
}

fn look(args: &VolumeArgs) -> Result<Looked, Failure> {
    let access = Access { write: false, allow_buffered: args.allow_buffered };
    let index = args.host_file.join(INDEX_NAME);
    let key = key::present(&args.passphrase, args.key_file.as_deref(), &args.host_file)?;
    let counter = Source::one(&args.counter)?;
    let (disk, volume, report) = volume::open_to_read(&index, &key, counter.as_ref(), access)?;
    if let (Some(loss), Some(source)) = (report.loss, &counter)
        && let Some(failure) = source.explain(&index, &loss)
    {
        return Err(failure);
    }
    let (table, _) = read_table(&disk, &volume, &index)?;
    Ok(Looked { _disk: disk, index: volume, table, access })
}

/// Runs `postern info` on a directory.
///
/// # Errors
/// As [`volume::check`] of its index; [`Exit::Damaged`] for a name table that cannot be read.
pub fn info(args: &VolumeArgs) -> Result<(), Failure> {
    let looked = look(args)?;
    let files = looked.table.nodes().filter(|(_, node)| !node.is_directory()).count();
    let directories = looked.table.nodes().count() - files;
    if args.json {
        let host = args.host_file.display().to_string();
        println!(
            "{}",
            json!({ "host_directory": host, "files": files, "directories": directories })
        );
    } else {
        println!("directory {}", args.host_file.display());
        println!("names     {files} files, {directories} directories with itself");
    }
    Ok(())
}

/// Runs `postern verify` on a directory; answers whether every file is whole.
///
/// # Errors
/// As [`info`]. A file that cannot be opened or read is no error here: it is told of on a line.
pub fn verify(args: &VolumeArgs) -> Result<bool, Failure> {
    let looked = look(args)?;
    let (mut files, mut bytes, mut damage) = (0_u64, 0, Vec::new());
    for (inode, node) in looked.table.nodes().filter(|(inode, _)| *inode != ROOT) {
        let Some(id) = node.file() else { continue };
        let path = looked.table.path(inode).unwrap_or_default();
        let path = String::from_utf8_lossy(&path).into_owned();
        files += 1;
        let host_file = args.host_file.join(host_name(id));
        let keys = file_keys(&looked.index, id);
        let recorded = Recorded::new(node.record).used();
        match volume::open_file_to_read(&host_file, &keys, recorded, looked.access) {
            Err(failure) if failure.exit == Exit::InUse => return Err(failure),
            Err(failure) => damage.push((path, failure.to_string())),
            Ok((disk, volume, report)) => {
                bytes += volume.size();
                damage.extend(report.loss.map(|loss| (path.clone(), loss.to_string())));
                let found = volume::read_everything(&disk, &volume);
                damage.extend(found.into_iter().map(|bad| {
                    (path.clone(), format!("bytes {}..{}", bad.offset, bad.offset + bad.length))
                }));
            }
        }
    }
    if args.json {
        let damaged: Vec<_> =
            damage.iter().map(|(path, what)| json!({ "path": path, "what": what })).collect();
        println!("{}", json!({ "files": files, "size": bytes, "damaged": damaged }));
    } else {
        for (path, what) in &damage {
            println!("damaged: {path}: {what}");
        }
        if damage.is_empty() {
            println!("whole: {files} files, {} read", size::show(bytes));
        }
    }
    Ok(damage.is_empty())
}
