//! What all processes of one guest program share: the run's configuration, the session with the
//! daemon, the open volumes.
//!
//! A volume is opened by the first process that needs it and closed cleanly when its last user is
//! gone. Its core lives in the arena; every process reaches the host over a lane of its own.
//!
//! Holds: a volume is open at most once per family; nobody opens it while it is being closed; a
//! process that dies while it opens, closes or works on a volume ends the family (the next open
//! recovers), instead of leaving others waiting for ever.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use postern_trusted::{
    errno::Errno,
    sync::Lock,
    volume::{OpenOptions, SlotKey, Volume, VolumeError},
};

use crate::{
    arena,
    config::{self, RunConfig, VolumeConfig},
    identity, message,
    process::{self, Process},
    spin::Tickets,
    wait,
};

/// The family: one per guest program and its forked children.
pub struct Family {
    /// The run file.
    pub config: RunConfig,
    /// An eventfd inherited by every process: wakes sleepers of all of them.
    pub kick: i32,
    /// The daemon's session, once a lane is attached.
    pub session: Lock<Option<Session>>,
    /// Which threads may spin.
    pub tickets: Tickets,
    /// `aio-nr`: what the AIO contexts of all processes of the family were made for.
    pub aio_nr: AtomicU64,
    volumes: Vec<Entry>,
    processes: Lock<Vec<&'static Process>>,
}

/// What a further lane needs to join.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Number at the daemon.
    pub number: u64,
    /// Secret given at the first attach.
    pub token: [u64; 2],
}

struct Entry {
    config: VolumeConfig,
    slot: Lock<Slot>,
}

enum State {
    Closed,
    /// Being opened or closed by this process.
    Busy(u32),
    Open(Arc<OpenVolume>),
}

struct Slot {
    state: State,
    /// Open files and requests in flight.
    users: usize,
}

/// A volume that the family has open.
pub struct OpenVolume {
    /// Index in the run file.
    pub index: usize,
    /// The volume's core.
    pub volume: Volume,
    /// The host file's handle in the session.
    pub handle: u32,
    /// Size of the host file in blocks.
    pub host_blocks: u64,
    failed: AtomicBool,
}

impl OpenVolume {
    /// Says once that a background job of the volume failed.
    pub fn report(&self, guest_path: &str, what: &str, errno: Errno) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            message::say(&format!(
                "{guest_path}: {what}: {errno}; data written since the last sync may be lost, \
                 open the volume again to recover"
            ));
        }
    }
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
    let family = arena::root(|| Family::new(config, kick))?;
    let _ = CACHED.set(family);
    Some(family)
}

impl Family {
    fn new(config: RunConfig, kick: i32) -> Self {
        let volumes = config
            .volumes
            .iter()
            .map(|config| Entry {
                config: config.clone(),
                slot: Lock::new(Slot { state: State::Closed, users: 0 }),
            })
            .collect();
        Self {
            config,
            kick,
            session: Lock::new(None),
            tickets: Tickets::new(wait::processors()),
            aio_nr: AtomicU64::new(0),
            volumes,
            processes: Lock::new(Vec::with_capacity(64)),
        }
    }

    /// The volume that the guest sees at `path` (absolute, normalised).
    #[must_use]
    pub fn volume_of(&self, path: &[u8]) -> Option<usize> {
        self.volumes.iter().position(|entry| entry.config.guest_path.as_bytes() == path)
    }

    /// Path under which the guest sees volume `index`.
    #[must_use]
    pub fn guest_path(&self, index: usize) -> &str {
        &self.volumes[index].config.guest_path
    }

    /// Opens volume `index`, or joins it if it is open, as one more user. Ends with
    /// [`Self::release`].
    ///
    /// # Errors
    /// `EIO` with a message on stderr that says why; `EBUSY` if another program has it.
    pub fn acquire(&self, index: usize) -> Result<Arc<OpenVolume>, Errno> {
        let entry = &self.volumes[index];
        loop {
            let mut slot = entry.slot.lock();
            match &slot.state {
                State::Open(volume) => {
                    let volume = volume.clone();
                    slot.users += 1;
                    return Ok(volume);
                }
                State::Closed => {
                    slot.state = State::Busy(identity::process_id());
                    drop(slot);
                    let opened = self.open(index, &entry.config);
                    let mut slot = entry.slot.lock();
                    return match opened {
                        Ok(volume) => {
                            let volume = Arc::new(volume);
                            slot.state = State::Open(volume.clone());
                            slot.users = 1;
                            Ok(volume)
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
                    wait_for(by);
                }
            }
        }
    }

    /// One more user of an open volume (a request in flight).
    pub fn retain(&self, volume: &OpenVolume) {
        self.volumes[volume.index].slot.lock().users += 1;
    }

    /// One user less; `true` if it was the last: the caller closes with [`Self::close`].
    #[must_use]
    pub fn release(&self, volume: &OpenVolume) -> bool {
        let mut slot = self.volumes[volume.index].slot.lock();
        slot.users = slot.users.saturating_sub(1);
        slot.users == 0
    }

    /// Closes volume `index` if nobody uses it.
    pub async fn close(&self, index: usize) {
        let entry = &self.volumes[index];
        let volume = {
            let mut slot = entry.slot.lock();
            match &slot.state {
                State::Open(volume) if slot.users == 0 => {
                    let volume = volume.clone();
                    slot.state = State::Busy(identity::process_id());
                    volume
                }
                _ => return,
            }
        };
        match process::current().disk(&volume) {
            Ok(disk) => {
                if let Err(errno) = volume.volume.close(&disk).await {
                    volume.report(&entry.config.guest_path, "closing failed", errno);
                }
                process::current().give_back(volume.handle);
            }
            Err(errno) => volume.report(&entry.config.guest_path, "closing failed", errno),
        }
        entry.slot.lock().state = State::Closed;
    }

    /// Volumes that are open now.
    pub fn open_volumes(&self) -> impl Iterator<Item = Arc<OpenVolume>> {
        self.volumes.iter().filter_map(|entry| match &entry.slot.lock().state {
            State::Open(volume) => Some(volume.clone()),
            _ => None,
        })
    }

    fn open(&self, index: usize, config: &VolumeConfig) -> Result<OpenVolume, Errno> {
        let process = process::current();
        let path = &config.guest_path;
        let key = message::read_file(config.key_file.as_bytes(), 4096).map_err(|errno| {
            message::say(&format!("{path}: cannot read key file {}: {errno}", config.key_file));
            Errno::EIO
        })?;
        let key = config::parse_key(&key).map_err(|bad| {
            message::say(&format!("{path}: key file {}: {bad}", config.key_file));
            Errno::EIO
        })?;
        let file = process.open_host_file(&config.name).inspect_err(|errno| {
            let hint = match *errno {
                Errno::EBUSY => "another program has this volume open; wait until it ends",
                Errno::EINVAL => "the host's file system refuses O_DIRECT",
                Errno::ENOENT => "the host file is gone, or the daemon was not told of it",
                _ => "the daemon refused the host file; its own messages say more",
            };
            message::say(&format!("{path}: {}: {errno}: {hint}", config.name));
        })?;
        let disk = process.lane_file(file.handle, file.blocks);
        let key = SlotKey::new(key);
        let opened = disk.and_then(|disk| {
            process.block_on(Volume::open(&disk, &key, &OpenOptions::default())).map_err(
                |error: VolumeError| {
                    message::say(&format!("{path}: {error}"));
                    Errno::EIO
                },
            )
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
                Ok(OpenVolume {
                    index,
                    volume,
                    handle: file.handle,
                    host_blocks: file.blocks,
                    failed: AtomicBool::new(false),
                })
            }
            Err(errno) => {
                process.give_back(file.handle);
                Err(errno)
            }
        }
    }

    /// Notes a process of the family.
    pub fn enrol(&self, process: &'static Process) {
        self.processes.lock().push(process);
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

/// Another process opens or closes the volume: waits a moment.
fn wait_for(other: u32) {
    if other != identity::process_id() && !identity::is_alive(other) {
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
