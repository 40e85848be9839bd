//! Opening a volume: its key, its host file, its recovery.
//!
//! Holds: a host file that was made for a volume that then could not be is removed again.

use std::sync::Arc;

use postern_edl::{OPEN_ASK, OPEN_READ_ONLY, calls::PosternFile};

use postern_trusted::{
    counter::Moves,
    directory::{FileKeys, INDEX_NAME, file_keys, host_name},
    errno::Errno,
    volume::{CounterUse, OpenOptions, OpenReport, Progress, SlotKey, Volume, VolumeError},
};

use zeroize::Zeroizing;

use super::{FILE_CACHE, Family, OpenVolume, Source, Wanted, keys::wipe_stack, standing::Core};
use crate::{
    config,
    directory::{FileRecord, HostFile, Member},
    files::attributes,
    freshness::RunCounter,
    message,
    process::{self, Process},
    runtime, wait,
};

/// How a volume is opened.
#[derive(Default)]
struct Terms {
    /// It is made first, for so many bytes.
    capacity: Option<u64>,
    /// It must have come after this.
    left: Option<Progress>,
    /// It was closed without a checkpoint: that is not worth a word.
    rests: bool,
}

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
            Source::File(file) => return Some(self.recorded(file)),
        }?;
        let counter = Arc::new(RunCounter::new(config.index, self.path_of(source)));
        Some(CounterUse { counter, moves: config.moves.into(), adopt: false })
    }

    /// What the index records of a file, in place of a counter.
    fn recorded(&self, file: &Wanted) -> CounterUse {
        let counts_syncs = self.directories[file.directory].counts_syncs();
        let moves = if counts_syncs { Moves::Sync } else { Moves::Checkpoint };
        let counter = Arc::new(FileRecord { directory: file.directory, inode: file.inode });
        CounterUse { counter, moves, adopt: false }
    }

    /// The same for a file that is being made: it has no record before it is opened again, unless
    /// each sync is recorded.
    fn record_of_new(&self, source: &Source) -> Option<CounterUse> {
        match source {
            Source::File(file) if self.directories[file.directory].counts_syncs() => {
                Some(self.recorded(file))
            }
            _ => None,
        }
    }

    pub(super) fn open(&self, index: usize, source: &Source) -> Result<OpenVolume, Errno> {
        self.at_one_daemon(|| {
            let opened = self.open_by(index, source);
            wipe_stack();
            opened
        })
    }

    /// Opens something; once more if the daemon ended meanwhile: of what is only being opened its
    /// successor knows nothing.
    fn at_one_daemon<T>(&self, open: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            let before = self.incarnation();
            match open() {
                // Not the first session, which such an opening makes.
                Err(_) if before > 0 && self.incarnation() != before => {}
                opened => return opened,
            }
        }
    }

    #[inline(never)]
    fn open_by(&self, index: usize, source: &Source) -> Result<OpenVolume, Errno> {
        let Source::File(file) = source else {
            let keys = FileKeys { now: self.key_of(source)?, former: None };
            let host = self.wait_for_host_file(source)?;
            let (core, clean) = self.open_core(source, host, &keys, Terms::default())?;
            return Ok(OpenVolume::new(index, core, None, clean));
        };
        let names = self.acquire(self.directories[file.directory].entry)?;
        let opened = self.open_member(source, file, &names);
        let (core, clean) = opened.inspect_err(|_| runtime::close_volume(&names))?;
        let member = Member::new(file.directory, file.inode, names);
        Ok(OpenVolume::new(index, core, Some(member), clean))
    }

    fn open_member(
        &self,
        source: &Source,
        file: &Wanted,
        names: &OpenVolume,
    ) -> Result<(Core, bool), Errno> {
        let keys = file_keys(&names.hold_index()?.volume, &file.id);
        let directory = &self.directories[file.directory];
        let capacity = file.fresh.then_some(directory.config.file_capacity);
        let name = self.place_of(source);
        let host = match capacity {
            Some(capacity) => {
                let blocks = Volume::small_host_blocks(capacity);
                process::current().create_host_file(&name, blocks)
            }
            None => self.host_file_of(file, &name),
        };
        let host = host.map_err(|errno| self.no_host_file(source, errno))?;
        // A journal to replay is then none of a crash.
        let rests = names.clean || directory.knows(file.inode);
        self.open_core(source, host, &keys, Terms { capacity, left: None, rests })
    }

    /// Opens the volume again that another program had meanwhile; `None`: that one still has it.
    /// It must be `left`, or what others have made of that.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub(super) fn reopen(&self, source: &Source, left: Progress) -> Result<Option<Core>, Errno> {
        let opened = self.reopen_by(source, left);
        wipe_stack();
        opened
    }

    #[inline(never)]
    fn reopen_by(&self, source: &Source, left: Progress) -> Result<Option<Core>, Errno> {
        let flags = self.access_of(source) | OPEN_ASK;
        let host = match process::current().open_host_file(&self.place_of(source), flags) {
            Err(Errno::EAGAIN) => return Ok(None),
            host => host.map_err(|errno| self.no_host_file(source, errno))?,
        };
        let key = self.key_of(source).inspect_err(|_| process::current().give_back(host.handle))?;
        let keys = FileKeys { now: key, former: None };
        let terms = Terms { left: Some(left), ..Terms::default() };
        Ok(Some(self.open_core(source, host, &keys, terms)?.0))
    }

    /// Flags of `postern_open` for a volume of the run file.
    fn access_of(&self, source: &Source) -> u32 {
        match source {
            Source::Volume(config) if config.read_only => OPEN_READ_ONLY,
            _ => 0,
        }
    }

    /// Opens the host file of a volume; waits a while for a program that has it.
    fn wait_for_host_file(&self, source: &Source) -> Result<PosternFile, Errno> {
        let name = self.place_of(source);
        let shares = matches!(source, Source::Volume(config) if !config.exclusive);
        let flags = self.access_of(source) | if shares { OPEN_ASK } else { 0 };
        let until = wait::now_ns().saturating_add(self.config.lease_wait_ms * 1_000_000);
        loop {
            let errno = match process::current().open_host_file(&name, flags) {
                Err(Errno::EAGAIN) if wait::now_ns() >= until => Errno::EBUSY,
                Err(Errno::EAGAIN) => {
                    nap(process::current())?;
                    continue;
                }
                Err(errno) => errno,
                Ok(host) => return Ok(host),
            };
            return Err(self.no_host_file(source, errno));
        }
    }

    /// Says why there is no host file; answers the guest's errno.
    fn no_host_file(&self, source: &Source, errno: Errno) -> Errno {
        let hint = match errno {
            Errno::EBUSY => "another program has this volume open; wait until it ends",
            Errno::EINVAL => "the host's file system refuses O_DIRECT",
            Errno::ENOENT => "the host file is gone, or the daemon was not told of it",
            Errno::EMFILE | Errno::ENFILE => "too many files are open at the daemon",
            Errno::ENOSPC => "the host has no room",
            _ => "the daemon refused the host file; its own messages say more",
        };
        let (path, name) = (self.path_of(source), self.place_of(source));
        message::say(&format!("{path}: {name}: {errno}: {hint}"));
        // A name of ours that the host cannot resolve is damage, not a missing file.
        let damaged = errno == Errno::ENOENT && matches!(source, Source::File(_));
        if damaged { Errno::EIO } else { errno }
    }

    /// Opens the volume in an open host file with its keys. Answers whether it was closed cleanly.
    fn open_core(
        &self,
        source: &Source,
        file: PosternFile,
        keys: &FileKeys,
        terms: Terms,
    ) -> Result<(Core, bool), Errno> {
        let Terms { capacity, left, rests } = terms;
        let process = process::current();
        let path = &self.path_of(source);
        let before = self.incarnation();
        let disk = process.lane_file(file.handle, file.blocks);
        let opened = disk.and_then(|disk| {
            let opening = async {
                if let Some(capacity) = capacity {
                    let counter = self.record_of_new(source);
                    let made =
                        Volume::make_open(&disk, &keys.now, capacity, counter.as_ref()).await?;
                    return Ok((made, OpenReport::default()));
                }
                let counter = self.counter_of(source);
                let read_only = self.access_of(source) & OPEN_READ_ONLY != 0;
                let options =
                    OpenOptions { counter, read_only, after: left, ..OpenOptions::default() };
                keys.open(&disk, &options).await
            };
            process.block_on(opening).map_err(|error: VolumeError| {
                // Else it is opened once more.
                if self.incarnation() == before {
                    message::say(&format!("{path}: {error}"));
                }
                Errno::EIO
            })
        });
        match opened {
            Ok((volume, report)) => {
                if !report.clean && report.journal_blocks > 0 && !rests {
                    message::say(&format!(
                        "{path}: recovered after a crash: {} journal blocks replayed, {} records \
                         applied, {} unsynced ones skipped",
                        report.journal_blocks, report.records_applied, report.records_skipped
                    ));
                }
                self.tune(source, &volume, process.linked().is_some_and(|link| link.discards));
                attributes::begin_times(&volume);
                Ok((Core::new(volume, file.handle, file.blocks), report.clean))
            }
            Err(errno) => {
                process.give_back(file.handle);
                if capacity.is_some() {
                    process.remove_host_file(&self.place_of(source));
                }
                Err(errno)
            }
        }
    }

    /// Opens the host file of a directory's file, unless the directory has it open still.
    fn host_file_of(&self, file: &Wanted, name: &str) -> Result<PosternFile, Errno> {
        if let Some(kept) = self.directories[file.directory].wake(file.inode) {
            let HostFile { handle, blocks } = kept;
            return Ok(PosternFile { handle, blocks, flags: 0, alignment: 0 });
        }
        process::current().open_host_file(name, 0)
    }

    /// Sets what the run file says about memory and space.
    fn tune(&self, source: &Source, volume: &Volume, discards: bool) {
        let volumes = self.config.volumes.len() + self.config.directories.len();
        let share = self.config.cache_bytes / volumes.max(1);
        let (cache, wanted) = match source {
            Source::Volume(config) => (share, config.discard && !config.read_only),
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
    pub fn size_of_closed(&self, wanted: &Wanted) -> Result<u64, Errno> {
        self.at_one_daemon(|| {
            let size = self.look_at_size(wanted.clone());
            wipe_stack();
            size
        })
    }

    #[inline(never)]
    fn look_at_size(&self, wanted: Wanted) -> Result<u64, Errno> {
        let process = process::current();
        let path = wanted.path.clone();
        let names = self.acquire(self.directories[wanted.directory].entry)?;
        let keys = names.hold_index().map(|held| file_keys(&held.volume, &wanted.id));
        runtime::close_volume(&names);
        let keys = keys?;
        let counter = Some(self.recorded(&wanted));
        let name = self.place_of(&Source::File(wanted));
        let failed = |what: &dyn core::fmt::Display| {
            message::say(&format!("{path}: {name}: {what}"));
            Errno::EIO
        };
        let file = process.open_host_file(&name, 0).map_err(|errno| failed(&errno))?;
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

/// Lets a moment pass.
///
/// # Errors
/// `EINTR`: a signal handler ran.
fn nap(process: &Process) -> Result<(), Errno> {
    const MOMENT_NS: u64 = 5_000_000;
    let place = process.sleepers.enter(process::keep)?;
    match place.sleep(Some(MOMENT_NS), wait::Signals::AsTheyAre) {
        wait::WaitEnd::Interrupted => Err(Errno::EINTR),
        wait::WaitEnd::Woken | wait::WaitEnd::TimedOut => Ok(()),
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
