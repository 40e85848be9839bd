//! Opening a volume: its key, its host file, its recovery.
//!
//! Holds: a host file that was made for a volume that then could not be is removed again.

use core::sync::atomic::AtomicBool;
use std::sync::Arc;

use postern_edl::calls::PosternFile;
use postern_trusted::{
    counter::Moves,
    directory::{FileKeys, INDEX_NAME, file_keys, host_name},
    errno::Errno,
    volume::{CounterUse, OpenOptions, OpenReport, SlotKey, Volume, VolumeError},
};

use zeroize::Zeroizing;

use super::{FILE_CACHE, Family, OpenVolume, Source, Wanted, keys::wipe_stack};
use crate::{
    config,
    directory::{FileRecord, HostFile, Member},
    freshness::RunCounter,
    message, process, runtime,
};

impl Family {
    /// Name at the daemon of a volume.
    fn place_of(&self, source: &Source) -> String {
        let within =
            |number: usize, file: &str| format!("{}/{file}", self.directories[number].config.name);
        match source {
            Source::Volume(config) => config.name.clone(),
            Source::Index(number) => within(*number, INDEX_NAME),
            Source::File(file) => within(file.directory, &host_name(&file.id)),
        }
    }

    /// The key that the run file names for a volume or directory.
    fn key_of(&self, source: &Source) -> Result<SlotKey, Errno> {
        let path = self.path_of(source);
        let (key_file, memory) = match source {
            Source::Volume(config) => (&config.key_file, &config.key_memory),
            Source::Index(number) | Source::File(Wanted { directory: number, .. }) => {
                let config = &self.directories[*number].config;
                (&config.key_file, &config.key_memory)
            }
        };
        let Some(memory) = memory else { return read_key(&path, key_file) };
        self.keys.get(memory).ok_or_else(|| {
            message::say(&format!(
                "{path}: the key of its passphrase stayed behind at exec; use a key file"
            ));
            Errno::EIO
        })
    }

    /// The monotonic counter of a volume, if it has one.
    fn counter_of(&self, source: &Source) -> Option<CounterUse> {
        let config = match source {
            Source::Volume(config) => config.counter,
            Source::Index(number) => self.directories[*number].config.counter,
            Source::File(file) => return Some(recorded(file)),
        }?;
        let counter = Arc::new(RunCounter::new(config.index, self.path_of(source)));
        Some(CounterUse { counter, moves: config.moves.into(), adopt: false })
    }

    pub(super) fn open(&self, index: usize, source: &Source) -> Result<OpenVolume, Errno> {
        let opened = self.open_by(index, source);
        wipe_stack();
        opened
    }

    #[inline(never)]
    fn open_by(&self, index: usize, source: &Source) -> Result<OpenVolume, Errno> {
        let Source::File(file) = source else {
            let keys = FileKeys { now: self.key_of(source)?, former: None };
            return self.open_with(index, source, &keys, None, None);
        };
        let directory = &self.directories[file.directory];
        let names = self.acquire(directory.entry)?;
        let keys = file_keys(&names.volume, &file.id);
        let capacity = file.fresh.then_some(directory.config.file_capacity);
        let member = Member::new(file.directory, file.inode, names.clone());
        self.open_with(index, source, &keys, capacity, Some(member))
            .inspect_err(|_| runtime::close_volume(&names))
    }

    /// Opens a volume with its keys; makes it first if it is given a `capacity`.
    fn open_with(
        &self,
        index: usize,
        source: &Source,
        keys: &FileKeys,
        capacity: Option<u64>,
        member: Option<Member>,
    ) -> Result<OpenVolume, Errno> {
        let process = process::current();
        let path = &self.path_of(source);
        let name = &self.place_of(source);
        let host = match capacity {
            Some(capacity) => process.create_host_file(name, Volume::small_host_blocks(capacity)),
            None => self.host_file_of(source, name),
        };
        let file = host.map_err(|errno| {
            let hint = match errno {
                Errno::EBUSY => "another program has this volume open; wait until it ends",
                Errno::EINVAL => "the host's file system refuses O_DIRECT",
                Errno::ENOENT => "the host file is gone, or the daemon was not told of it",
                Errno::EMFILE | Errno::ENFILE => "too many files are open at the daemon",
                Errno::ENOSPC => "the host has no room",
                _ => "the daemon refused the host file; its own messages say more",
            };
            message::say(&format!("{path}: {name}: {errno}: {hint}"));
            // A name of ours that the host cannot resolve is damage, not a missing file.
            let damaged = errno == Errno::ENOENT && matches!(source, Source::File(_));
            if damaged { Errno::EIO } else { errno }
        })?;
        let disk = process.lane_file(file.handle, file.blocks);
        let opened = disk.and_then(|disk| {
            let opening = async {
                if let Some(capacity) = capacity {
                    let made = Volume::make_open(&disk, &keys.now, capacity).await?;
                    return Ok((made, OpenReport::default()));
                }
                let counter = self.counter_of(source);
                keys.open(&disk, &OpenOptions { counter, ..OpenOptions::default() }).await
            };
            process.block_on(opening).map_err(|error: VolumeError| {
                message::say(&format!("{path}: {error}"));
                Errno::EIO
            })
        });
        match opened {
            Ok((volume, report)) => {
                if !report.clean && report.journal_blocks > 0 && !self.rested(source, &member) {
                    message::say(&format!(
                        "{path}: recovered after a crash: {} journal blocks replayed, {} records \
                         applied, {} unsynced ones skipped",
                        report.journal_blocks, report.records_applied, report.records_skipped
                    ));
                }
                self.tune(source, &volume, process.linked().is_some_and(|link| link.discards));
                let opened = OpenVolume {
                    index,
                    volume,
                    member,
                    clean: report.clean,
                    handle: file.handle,
                    host_blocks: file.blocks,
                    failed: AtomicBool::new(false),
                };
                opened.begin_times();
                Ok(opened)
            }
            Err(errno) => {
                process.give_back(file.handle);
                if capacity.is_some() {
                    process.remove_host_file(name);
                }
                Err(errno)
            }
        }
    }

    /// Opens the host file of a volume, unless its directory has it open still.
    fn host_file_of(&self, source: &Source, name: &str) -> Result<PosternFile, Errno> {
        if let Source::File(file) = source
            && let Some(kept) = self.directories[file.directory].wake(file.inode)
        {
            let HostFile { handle, blocks } = kept;
            return Ok(PosternFile { handle, blocks, flags: 0, alignment: 0 });
        }
        process::current().open_host_file(name)
    }

    /// Whether a volume has a journal to replay because it rests, not because of a crash.
    fn rested(&self, source: &Source, member: &Option<Member>) -> bool {
        let clean = member.as_ref().is_some_and(|member| member.index.clean);
        clean || matches!(source, Source::File(f) if self.directories[f.directory].knows(f.inode))
    }

    /// Sets what the run file says about memory and space.
    fn tune(&self, source: &Source, volume: &Volume, discards: bool) {
        let volumes = self.config.volumes.len() + self.config.directories.len();
        let share = self.config.cache_bytes / volumes.max(1);
        let (cache, wanted) = match source {
            Source::Volume(config) => (share, config.discard),
            Source::Index(_) => (share, false),
            Source::File(file) => {
                (share.min(FILE_CACHE), self.directories[file.directory].config.discard)
            }
        };
        volume.limit_cache(cache);
        volume.discard_freed(wanted && discards);
    }

    /// Bytes in a file of a protected directory that is not open. Writes nothing.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn size_of_closed(&self, wanted: Wanted) -> Result<u64, Errno> {
        let size = self.look_at_size(wanted);
        wipe_stack();
        size
    }

    #[inline(never)]
    fn look_at_size(&self, wanted: Wanted) -> Result<u64, Errno> {
        let process = process::current();
        let path = wanted.path.clone();
        let names = self.acquire(self.directories[wanted.directory].entry)?;
        let keys = file_keys(&names.volume, &wanted.id);
        runtime::close_volume(&names);
        let counter = Some(recorded(&wanted));
        let name = self.place_of(&Source::File(wanted));
        let failed = |what: &dyn core::fmt::Display| {
            message::say(&format!("{path}: {name}: {what}"));
            Errno::EIO
        };
        let file = process.open_host_file(&name).map_err(|errno| failed(&errno))?;
        let size = process.lane_file(file.handle, file.blocks).and_then(|disk| {
            let options = OpenOptions { read_only: true, counter, ..OpenOptions::default() };
            let opened = process.block_on(keys.open(&disk, &options));
            match opened {
                Ok((_, OpenReport { loss: Some(loss), .. })) => Err(failed(&loss)),
                Ok((volume, _)) => Ok(volume.size()),
                Err(error) => Err(failed(&error)),
            }
        });
        process.give_back(file.handle);
        size
    }
}

/// What the index records of a file, in place of a counter.
fn recorded(file: &Wanted) -> CounterUse {
    let counter = Arc::new(FileRecord { directory: file.directory, inode: file.inode });
    CounterUse { counter, moves: Moves::Checkpoint, adopt: false }
}

/// Reads the key of the volume at `path`.
fn read_key(path: &str, key_file: &str) -> Result<SlotKey, Errno> {
    let refused = |what: &dyn core::fmt::Display| {
        message::say(&format!("{path}: key file {key_file}: {what}"));
        Errno::EIO
    };
    let content = message::read_file(key_file.as_bytes(), 4096).map_err(|errno| refused(&errno))?;
    let content = Zeroizing::new(content);
    config::parse_key(&content).map(SlotKey::new).map_err(|bad| refused(&bad))
}
