//! What all processes of one guest program share: the run's configuration, the session with the
//! daemon, the open volumes.
//!
//! A volume is opened by the first process that needs it and closed cleanly when its last user is
//! gone. Its core lives in the arena; every process reaches the host over a lane of its own.
//!
//! Volumes of the run file and the indexes of protected directories keep their number; a file of a
//! protected directory has one while it is open.
//!
//! Holds: a volume is open at most once per family; nobody opens it while it is being closed; a
//! process that dies while it opens, closes or works on a volume ends the family (the next open
//! recovers), instead of leaving others waiting for ever.

mod closing;
pub mod host_files;
mod keys;
mod leases;
mod opening;
mod removal;
pub mod standing;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

use postern_trusted::{directory::FileId, errno::Errno, sync::Lock};

use self::{
    host_files::HostFiles,
    keys::Keys,
    standing::{Core, Held, Standing},
};
use crate::{
    arena,
    config::{self, RunConfig, VolumeConfig},
    directory::{Directory, Member},
    files::{self, locks::Locks, unwritten::Unwritten},
    identity,
    inheritance::Inheritance,
    mapped, message,
    process::{self, Process},
    spin::Tickets,
    succession::Footing,
    sys, wait,
};

/// The family: one per guest program and its forked children.
pub struct Family {
    /// The run file.
    pub config: RunConfig,
    /// An eventfd inherited by every process: wakes sleepers of all of them.
    pub kick: i32,
    /// How it stands with the daemon.
    pub footing: Lock<Footing>,
    /// What is open at the daemon.
    pub host_files: HostFiles,
    /// Which threads may spin.
    pub tickets: Tickets,
    /// The protected directories.
    pub directories: Vec<Directory>,
    volumes: Lock<Vec<Option<Arc<Entry>>>>,
    /// Volumes that are being closed, until all that goes with it is done.
    closing: AtomicUsize,
    /// Locks on protected files.
    pub locks: Locks,
    /// What passphrases were stretched to.
    keys: Keys,
    /// What passes from program to program at exec.
    pub inheritance: Inheritance,
    /// `aio-nr`: what the AIO contexts of all processes of the family were made for.
    pub aio_nr: AtomicU64,
    /// What the files that are mapped shared have in common.
    pub mapped: mapped::Totals,
    processes: Lock<Vec<&'static Process>>,
}

/// Map nodes of a directory's file in memory, in bytes: a thousand files share the arena.
const FILE_CACHE: usize = 2 << 20;

struct Entry {
    source: Source,
    slot: Lock<Slot>,
}

/// A file of a protected directory that is to be opened.
#[derive(Clone)]
pub struct Wanted {
    /// The directory's number.
    pub directory: usize,
    /// Inode.
    pub inode: u64,
    /// Id of its volume.
    pub id: FileId,
    /// Its volume is to be made.
    pub fresh: bool,
    /// What messages call it.
    pub path: String,
}

/// Where a volume comes from.
enum Source {
    Volume(VolumeConfig),
    /// The index of the directory with this number.
    Index(usize),
    File(Wanted),
}

impl Source {
    fn is_file(&self, directory: usize, inode: u64) -> bool {
        matches!(self, Self::File(file) if file.directory == directory && file.inode == inode)
    }
}

enum State {
    /// A file's entry that was taken out of the list.
    Retired,
    Closed,
    /// Being opened or closed by this process.
    Busy(u32),
    Open(Arc<OpenVolume>),
}

struct Slot {
    state: State,
    /// Open files and requests in flight.
    users: usize,
    /// The guest removed it and nobody has created it anew.
    removed: bool,
}

/// A volume that the family has open, whether or not it is in memory now.
pub struct OpenVolume {
    /// Its number in the family while it is open.
    pub index: usize,
    /// For a file of a protected directory: which.
    pub member: Option<Member>,
    /// It was closed cleanly before.
    pub clean: bool,
    standing: Arc<Standing>,
    /// What Linux would still have to write.
    pub unwritten: Unwritten,
    /// Times that it was lost with what had not been published: see [`Self::losses`].
    losses: AtomicU32,
    /// What a mapping of it shows.
    pub(crate) mapped: mapped::Slot,
    failed: AtomicBool,
}

impl OpenVolume {
    fn new(index: usize, core: Core, member: Option<Member>, clean: bool) -> Self {
        Self {
            index,
            member,
            clean,
            standing: Standing::new(core),
            unwritten: Unwritten::default(),
            losses: AtomicU32::new(0),
            mapped: mapped::Slot::default(),
            failed: AtomicBool::new(false),
        }
    }

    /// Says once that a background job of the volume failed.
    pub fn report(&self, guest_path: &str, what: &str, errno: Errno) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            message::say(&format!(
                "{guest_path}: {what}: {errno}; data written since the last sync may be lost, \
                 open the volume again to recover"
            ));
        }
    }

    /// Says that acknowledged data was lost, and has each open file say so once ([`Self::losses`]).
    pub(crate) fn tell_loss(&self, what: &str, errno: Errno) {
        self.count_loss();
        let path = family().map_or_else(String::new, |family| family.guest_path(self.index));
        self.report(&path, what, errno);
    }

    /// Acknowledged data was lost: each open file says so once ([`Self::losses`]).
    fn count_loss(&self) {
        self.losses.fetch_add(1, Ordering::Release);
    }

    /// Holds the volume, waiting for it as for a lock while another program has it.
    ///
    /// # Errors
    /// As [`Standing::hold`].
    pub fn hold(&self) -> Result<Held, Errno> {
        self.standing.hold(self.index)
    }

    /// Holds the volume when it is here.
    ///
    /// # Errors
    /// As [`Standing::hold_soon`].
    pub async fn hold_soon(&self) -> Result<Held, Errno> {
        self.standing.hold_soon(self.index).await
    }

    /// Holds the volume if it is here.
    #[must_use]
    pub fn try_hold(&self) -> Option<Held> {
        self.standing.try_hold(self.index)
    }

    /// Waits, as for a lock, while another program has the volume: what is asked of it next is as
    /// that one left it.
    ///
    /// # Errors
    /// As [`Standing::attend`].
    pub fn attend(&self) -> Result<(), Errno> {
        self.standing.attend()
    }

    /// Where it stands.
    #[must_use]
    pub fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }

    /// Whether a range is known to be a hole; `false` while another program has the volume.
    #[must_use]
    pub fn is_hole(&self, offset: u64, length: u64) -> bool {
        self.standing.core().is_some_and(|core| core.volume.is_hole(offset, length))
    }

    /// How often writes were lost that had been acknowledged: each open file says so once, as Linux
    /// tells of errors of write-back.
    #[must_use]
    pub fn losses(&self) -> u32 {
        self.losses.load(Ordering::Acquire)
    }
}

/// Whether volume `index` of the run file is only read.
#[must_use]
pub fn is_read_only(index: usize) -> bool {
    family()
        .and_then(|family| family.config.volumes.get(index))
        .is_some_and(|volume| volume.read_only)
}

/// The family of the calling process, if `postern run` started it.
pub fn family() -> Option<&'static Family> {
    static INERT: AtomicBool = AtomicBool::new(false);
    if INERT.load(Ordering::Relaxed) {
        return None;
    }
    let Some(config) = read_config() else {
        INERT.store(true, Ordering::Relaxed);
        return None;
    };
    Some(config)
}

fn read_config() -> Option<&'static Family> {
    static CACHED: once_cell::race::OnceRef<'static, Family> = once_cell::race::OnceRef::new();
    if let Some(family) = CACHED.get() {
        return Some(family);
    }
    if let Some(family) = rejoin() {
        let _ = CACHED.set(family);
        return Some(family);
    }
    let path = std::env::var(config::RUN_VARIABLE).ok()?;
    let text = match message::read_file(path.as_bytes(), 1 << 20) {
        Ok(text) => text,
        Err(errno) => {
            message::say(&format!("{path}: cannot read the run file: {errno}"));
            return None;
        }
    };
    let config: RunConfig = match serde_json::from_slice(&text) {
        Ok(config) => config,
        Err(error) => {
            message::say(&format!("{path}: not a run file: {error}"));
            return None;
        }
    };
    let kick = process::keep(wait::eventfd().ok()?);
    // The next program after exec watches it too.
    let _ = sys::fcntl(kick, libc::F_SETFD, 0);
    if let Some(memory) = arena::descriptor() {
        files::mark_internal(memory);
    }
    if !arena::is_locked() && keys::swap_is_on() {
        message::say(
            "keys may be swapped out: memory could not be locked; raise the limit (ulimit -l), or \
             encrypt the swap",
        );
    }
    let family = arena::root(|| Family::new(config, kick))?;
    let _ = CACHED.set(family);
    Some(family)
}

/// The family that the program before exec belonged to.
fn rejoin() -> Option<&'static Family> {
    let family = arena::existing_root::<Family>()?;
    if let Err(errno) = sys::fcntl(family.kick, libc::F_GETFD, 0) {
        message::say(&format!("a descriptor of this library was closed before exec: {errno}"));
        process::abort();
    }
    arena::descriptor().into_iter().chain([family.kick]).for_each(files::mark_internal);
    Some(family)
}

impl Family {
    fn new(config: RunConfig, kick: i32) -> Self {
        let volumes = config.volumes.iter().cloned().map(Source::Volume);
        let first_index = config.volumes.len();
        let directories: Vec<Directory> = config
            .directories
            .iter()
            .enumerate()
            .map(|(number, config)| Directory::new(number, first_index + number, config.clone()))
            .collect();
        let volumes = volumes.chain((0..directories.len()).map(Source::Index));
        let volumes = volumes.map(|source| Some(Arc::new(Entry::new(source)))).collect();
        Self {
            keys: Keys::take(&config),
            config,
            kick,
            footing: Lock::new(Footing::default()),
            host_files: HostFiles::default(),
            tickets: Tickets::new(wait::processors()),
            directories,
            volumes: Lock::new(volumes),
            closing: AtomicUsize::new(0),
            locks: Locks::new(),
            inheritance: Inheritance::new(),
            aio_nr: AtomicU64::new(0),
            mapped: mapped::Totals::default(),
            processes: Lock::new(Vec::with_capacity(64)),
        }
    }

    /// The volume that the guest sees at `path` (absolute, normalised).
    #[must_use]
    pub fn volume_of(&self, path: &[u8]) -> Option<usize> {
        self.config.volumes.iter().position(|volume| volume.guest_path.as_bytes() == path)
    }

    /// Path under which the guest sees volume `index`, as it was when the volume was opened.
    #[must_use]
    pub fn guest_path(&self, index: usize) -> String {
        self.entry(index).map_or_else(String::new, |entry| self.path_of(&entry.source))
    }

    fn path_of(&self, source: &Source) -> String {
        match source {
            Source::Volume(config) => config.guest_path.clone(),
            Source::Index(number) => self.directories[*number].config.guest_path.clone(),
            Source::File(file) => file.path.clone(),
        }
    }

    fn entry(&self, index: usize) -> Option<Arc<Entry>> {
        self.volumes.lock().get(index)?.clone()
    }

    /// Opens volume `index`, or joins it if it is open, as one more user. Ends with
    /// [`Self::release`].
    ///
    /// # Errors
    /// `EIO` with a message on stderr that says why; `EBUSY` if another program has it.
    pub fn acquire(&self, index: usize) -> Result<Arc<OpenVolume>, Errno> {
        let entry = self.entry(index).ok_or(Errno::EIO)?;
        self.join(index, &entry)?.ok_or(Errno::EIO)
    }

    /// As [`Self::acquire`] for a file of a protected directory, whose index the caller has open.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn acquire_file(&self, wanted: &Wanted) -> Result<Arc<OpenVolume>, Errno> {
        loop {
            let (index, entry) = self.enter(wanted);
            match self.join(index, &entry) {
                Ok(Some(volume)) => return Ok(volume),
                Ok(None) => {} // Retired meanwhile.
                Err(errno) => {
                    self.retire(index, &entry);
                    return Err(errno);
                }
            }
        }
    }

    /// The entry of a file, made if there is none.
    fn enter(&self, wanted: &Wanted) -> (usize, Arc<Entry>) {
        let mut volumes = self.volumes.lock();
        let found = volumes.iter().enumerate().find_map(|(index, entry)| {
            let entry = entry.as_ref()?;
            entry.source.is_file(wanted.directory, wanted.inode).then(|| (index, entry.clone()))
        });
        if let Some(found) = found {
            return found;
        }
        let entry = Arc::new(Entry::new(Source::File(wanted.clone())));
        let free = volumes.iter().position(Option::is_none);
        let index = free.unwrap_or(volumes.len());
        match free {
            Some(index) => volumes[index] = Some(entry.clone()),
            None => volumes.push(Some(entry.clone())),
        }
        (index, entry)
    }

    /// Takes the entry of a file that is closed out of the list.
    fn retire(&self, index: usize, entry: &Arc<Entry>) {
        if !matches!(entry.source, Source::File(_)) {
            return;
        }
        let mut volumes = self.volumes.lock();
        let mut slot = entry.slot.lock();
        if matches!(slot.state, State::Closed)
            && volumes[index].as_ref().is_some_and(|listed| Arc::ptr_eq(listed, entry))
        {
            slot.state = State::Retired;
            volumes[index] = None;
        }
    }

    /// The open volume of a file of a protected directory, if it is open now, without a user more;
    /// `Some(None)` while it is being opened or closed.
    pub fn open_file(&self, directory: usize, inode: u64) -> Option<Option<Arc<OpenVolume>>> {
        let volumes = self.volumes.lock();
        let mut entries = volumes.iter().flatten();
        let entry = entries.find(|entry| entry.source.is_file(directory, inode))?;
        match &entry.slot.lock().state {
            State::Open(volume) => Some(Some(volume.clone())),
            State::Busy(_) => Some(None),
            State::Closed | State::Retired => None,
        }
    }

    /// `None`: the entry is no longer in the list.
    fn join(&self, index: usize, entry: &Entry) -> Result<Option<Arc<OpenVolume>>, Errno> {
        // First of all: who uses a volume does not die of a signal before it has given it back.
        process::current().link()?;
        loop {
            let mut slot = entry.slot.lock();
            match &slot.state {
                State::Retired => return Ok(None),
                State::Open(volume) => {
                    let volume = volume.clone();
                    slot.users += 1;
                    return Ok(Some(volume));
                }
                State::Closed => {
                    slot.state = State::Busy(identity::process_id());
                    drop(slot);
                    let opened = self.open(index, &entry.source);
                    let mut slot = entry.slot.lock();
                    return match opened {
                        Ok(volume) => {
                            let volume = Arc::new(volume);
                            slot.state = State::Open(volume.clone());
                            slot.users = 1;
                            Ok(Some(volume))
                        }
                        Err(errno) => {
                            slot.state = State::Closed;
                            Err(errno)
                        }
                    };
                }
                State::Busy(by) => {
                    let by = *by;
                    drop(slot);
                    entry.wait_for(by);
                }
            }
        }
    }

    /// One more user of a volume, for a job in the background; `false` if it is not open, or about
    /// to be closed because nobody uses it. Ends with [`Self::release`].
    #[must_use]
    pub fn retain(&self, volume: &OpenVolume) -> bool {
        let Some(entry) = self.entry(volume.index) else { return false };
        let mut slot = entry.slot.lock();
        let in_use = slot.users > 0
            && matches!(&slot.state, State::Open(open) if core::ptr::eq(&raw const **open, volume));
        slot.users += usize::from(in_use);
        in_use
    }

    /// One user less; `true` if it was the last: the caller closes with [`Self::close`].
    #[must_use]
    pub fn release(&self, volume: &OpenVolume) -> bool {
        let Some(entry) = self.entry(volume.index) else { return false };
        let mut slot = entry.slot.lock();
        slot.users = slot.users.saturating_sub(1);
        slot.users == 0
    }

    /// Volumes that are open now.
    pub fn open_volumes(&self) -> impl Iterator<Item = Arc<OpenVolume>> {
        let length = self.volumes.lock().len();
        (0..length).filter_map(|index| match &self.entry(index)?.slot.lock().state {
            State::Open(volume) => Some(volume.clone()),
            _ => None,
        })
    }

    /// Notes a process of the family. One of the same number was the same process before exec.
    pub fn enrol(&self, process: &'static Process) {
        let mut processes = self.processes.lock();
        processes.retain(|other| other.id() != process.id());
        processes.push(process);
    }

    /// Whether no other process of the family is known.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let me = identity::process_id();
        self.processes.lock().iter().all(|process| process.id() == me)
    }

    /// Strikes a process out: it has drained and will not come back.
    pub fn leave(&self, id: u32) {
        self.processes.lock().retain(|process| {
            let stays = process.id() != id;
            if !stays {
                self.forgive(process);
            }
            stays
        });
    }

    /// Ends the calling process if another one of the family died with work unfinished: what it
    /// held of the volume will never complete.
    pub fn check_the_dead(&self) {
        self.locks.reap();
        let me = identity::process_id();
        let dead = {
            let mut processes = self.processes.lock();
            let found = processes
                .iter()
                .position(|process| process.id() != me && !identity::is_alive(process.id()));
            found.map(|at| processes.swap_remove(at))
        };
        let Some(dead) = dead else { return };
        self.forgive(dead);
        if dead.executor.live() > 0 {
            end_torn(dead.id());
        }
    }

    /// Gives back what `aio-nr` holds for a process that has ended.
    fn forgive(&self, process: &Process) {
        let charged = process.aio_charged.swap(0, Ordering::Relaxed);
        self.aio_nr.fetch_sub(charged, Ordering::Relaxed);
    }
}

impl Entry {
    fn new(source: Source) -> Self {
        Self { source, slot: Lock::new(Slot { state: State::Closed, users: 0, removed: false }) }
    }

    /// Process `by` opens or closes the volume: waits a moment.
    fn wait_for(&self, by: u32) {
        wait_for(by, || matches!(self.slot.lock().state, State::Busy(now) if now == by));
    }
}

/// Another process is at work on what this one needs: waits a moment. Ends this process if the
/// other one is dead and `still` at it; one that died after it had finished left nothing torn.
pub(crate) fn wait_for(other: u32, still: impl Fn() -> bool) {
    if other != identity::process_id() && !identity::is_alive(other) && still() {
        end_torn(other);
    }
    process::pause();
}

/// Ends this process: `dead`, of the same family, was killed with shared state half changed.
pub fn end_torn(dead: u32) -> ! {
    message::say(&format!(
        "process {dead} of this program was killed while it worked on a sealed volume; this \
         process ends too so that the next open can recover the volume"
    ));
    process::abort()
}
