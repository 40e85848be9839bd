//! Opening a volume: its key, its host file, its recovery.
//!
//! Holds: a host file that was made for a volume that then could not be is removed again.

use core::sync::atomic::AtomicBool;
use std::sync::Arc;

use postern_trusted::{
    directory::{INDEX_NAME, file_key, host_name},
    errno::Errno,
    volume::{CounterUse, OpenOptions, SlotKey, Volume, VolumeError},
};

use zeroize::Zeroizing;

use super::{FILE_CACHE, Family, OpenVolume, Source, Wanted, keys::wipe_stack};
use crate::{config, directory::Member, freshness::RunCounter, message, process, runtime};

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
            Source::File(_) => None,
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
            let key = self.key_of(source)?;
            return self.open_with(index, source, &key, None, None);
        };
        let directory = &self.directories[file.directory];
        let names = self.acquire(directory.entry)?;
        let key = file_key(&names.volume, &file.id);
        let capacity = file.fresh.then_some(directory.config.file_capacity);
        let member = Member::new(file.directory, file.inode, names.clone());
        self.open_with(index, source, &key, capacity, Some(member))
            .inspect_err(|_| runtime::close_volume(&names))
    }

    /// Opens a volume with `key`; makes it first if it is given a `capacity`.
    fn open_with(
        &self,
        index: usize,
        source: &Source,
        key: &SlotKey,
        capacity: Option<u64>,
        member: Option<Member>,
    ) -> Result<OpenVolume, Errno> {
        let process = process::current();
        let path = &self.path_of(source);
        let name = &self.place_of(source);
        let host = match capacity {
            Some(capacity) => process.create_host_file(name, Volume::small_host_blocks(capacity)),
            None => process.open_host_file(name),
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
                    Volume::format_empty(&disk, key, capacity).await?;
                }
                let counter = self.counter_of(source);
                Volume::open(&disk, key, &OpenOptions { counter, ..OpenOptions::default() }).await
            };
            process.block_on(opening).map_err(|error: VolumeError| {
                message::say(&format!("{path}: {error}"));
                Errno::EIO
            })
        });
        match opened {
            Ok((volume, report)) => {
                if !report.clean && report.journal_blocks > 0 {
                    message::say(&format!(
                        "{path}: recovered after a crash: {} journal blocks replayed, {} records \
                         applied, {} unsynced ones skipped",
                        report.journal_blocks, report.records_applied, report.records_skipped
                    ));
                }
                if member.is_some() {
                    volume.limit_cache(FILE_CACHE);
                }
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
        let key = file_key(&names.volume, &wanted.id);
        runtime::close_volume(&names);
        let name = self.place_of(&Source::File(wanted));
        let failed = |what: &dyn core::fmt::Display| {
            message::say(&format!("{path}: {name}: {what}"));
            Errno::EIO
        };
        let file = process.open_host_file(&name).map_err(|errno| failed(&errno))?;
        let size = process.lane_file(file.handle, file.blocks).and_then(|disk| {
            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let opened = process.block_on(Volume::open(&disk, &key, &options));
            opened.map(|(volume, _)| volume.size()).map_err(|error| failed(&error))
        });
        process.give_back(file.handle);
        size
    }
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
