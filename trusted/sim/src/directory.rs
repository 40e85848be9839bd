//! A protected directory: its name table, loaded from the index volume and written back.
//!
//! A change of a name or attribute is made in memory and written in a batch (`publish`); times
//! that only a file's content changed go along with the next batch, or when the index is closed. A
//! file's volume is made before its name is published, and removed after its name is gone and
//! nobody has it open. What a crash leaves without a name is removed when the directory is opened
//! next.
//!
//! Holds: one change at a time per family; the index is open (and locked on the host) while a file
//! of the directory is; after a failed write the table does not change any more.

pub mod cwd;
mod look;
mod open;
mod ops;
mod orderly;
mod publish;
mod records;

use core::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::{collections::BTreeMap, sync::Arc};

pub use look::{Entry, Facts, Listing, access, check_search, stat};
pub use open::{open, truncate};
pub use ops::{Change, change, change_at, make_directory, refuse_new, remove, rename};
use postern_trusted::{
    directory::{
        Attributes, BadImage, FileId, IMAGE_BLOCK, ROOT, Table, choose, host_name, slot_offset,
    },
    errno::Errno,
    platform::Memory,
    sync::Lock,
};
pub(crate) use publish::HostFile;
pub(crate) use records::FileRecord;

use self::{
    orderly::Orderly,
    publish::{Backlog, Publishing},
    records::Records,
};
use crate::{
    config::DirectoryConfig,
    family::{self, OpenVolume, Wanted},
    files::{attributes, io::wall_ns},
    identity, message,
    process::{self, SimPlatform},
    sys, wait,
};

/// A protected directory of the run.
pub struct Directory {
    /// From the run file.
    pub config: DirectoryConfig,
    /// Its place among the directories.
    pub number: usize,
    /// Number of its index volume in the family.
    pub entry: usize,
    /// The process that changes names now, or 0.
    turn: AtomicU32,
    publishing: Publishing,
    state: Lock<Option<Loaded>>,
}

struct Loaded {
    /// The opening of the index that this was read from.
    index: Arc<OpenVolume>,
    table: Table,
    sequence: u64,
    /// Times changed since the table was written.
    dirty: bool,
    /// The table could not be written.
    failed: bool,
    /// That the host has no room for it was said.
    told: bool,
    backlog: Backlog,
    /// Sizes of files that are not open, as far as known.
    sizes: BTreeMap<u64, u64>,
    /// Which records of files are not durable yet.
    records: Records,
    /// Which files were put away in order.
    orderly: Orderly,
}

/// What an open volume knows of the directory that its file is in.
pub struct Member {
    /// The directory's number.
    pub directory: usize,
    /// Inode.
    pub inode: u64,
    /// Kept open while the file is.
    pub index: Arc<OpenVolume>,
    /// When the guest last changed the content, wall-clock nanoseconds; 0 if it has not.
    written: AtomicI64,
}

impl Member {
    /// For a file that has just been opened; `index` counts a user for it.
    #[must_use]
    pub fn new(directory: usize, inode: u64, index: Arc<OpenVolume>) -> Self {
        Self { directory, inode, index, written: AtomicI64::new(0) }
    }

    /// Notes that the guest changes the content now.
    pub fn touch(&self) {
        self.written.store(wall_ns(), Ordering::Relaxed);
    }

    fn written(&self) -> Option<i64> {
        Some(self.written.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }
}

/// A path in a protected directory.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory's number.
    pub directory: usize,
    /// From the directory on, beginning with `/`; empty for the directory itself.
    pub path: Vec<u8>,
    /// The path can only name a directory: it ended in a slash or a dot.
    pub slash: bool,
}

/// The place that an absolute, normalised path names, if it is in a protected directory.
#[must_use]
pub fn find(path: &[u8], slash: bool) -> Option<Place> {
    let family = family::family()?;
    family.directories.iter().find_map(|directory| {
        let rest = path.strip_prefix(directory.config.guest_path.as_bytes())?;
        let inside = rest.is_empty() || rest[0] == b'/';
        inside.then(|| Place { directory: directory.number, path: rest.to_vec(), slash })
    })
}

/// The directory with this number.
///
/// # Errors
/// `EIO` if there is none.
pub fn number(number: usize) -> Result<&'static Directory, Errno> {
    family::family().and_then(|family| family.directories.get(number)).ok_or(Errno::EIO)
}

/// The exclusive turn to change names.
struct Turn<'a>(&'a AtomicU32);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

/// A directory whose index is open and whose table is loaded, while this lives.
pub(crate) struct Visit {
    directory: &'static Directory,
    index: Arc<OpenVolume>,
    /// Held by visits that change names, or open files.
    turn: Option<Turn<'static>>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.turn = None;
        crate::runtime::close_volume(&self.index);
    }
}

impl Directory {
    /// Directory `number`, whose index volume has number `entry` in the family.
    #[must_use]
    pub fn new(number: usize, entry: usize, config: DirectoryConfig) -> Self {
        let state = Lock::new(None);
        let (turn, publishing) = (AtomicU32::new(0), Publishing::default());
        Self { config, number, entry, turn, publishing, state }
    }

    fn take_turn(&'static self) -> Turn<'static> {
        let me = identity::process_id();
        loop {
            match self.turn.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Turn(&self.turn),
                Err(holder) => {
                    family::wait_for(holder, || self.turn.load(Ordering::Relaxed) == holder);
                }
            }
        }
    }

    /// Opens the index if need be and loads the table.
    fn visit(&'static self, turn: bool) -> Result<Visit, Errno> {
        // Kept open by the process from now on, so that the next call finds it open.
        drop(attributes::hold(self.entry)?);
        let index = crate::runtime::open_volume(self.entry)?;
        let mut visit = Visit { directory: self, index, turn: None };
        let fresh = || {
            let state = self.state.lock();
            state.as_ref().is_none_or(|loaded| !Arc::ptr_eq(&loaded.index, &visit.index))
        };
        if turn || fresh() {
            let taken = self.take_turn();
            if fresh() {
                self.load(&visit.index)?;
            }
            visit.turn = turn.then_some(taken);
        }
        Ok(visit)
    }

    fn load(&self, index: &Arc<OpenVolume>) -> Result<(), Errno> {
        let path = &self.config.guest_path;
        let slots = [self.read_slot(index, 0)?, self.read_slot(index, 1)?];
        let found = choose(slots).map_err(|bad| {
            message::say(&format!("{path}: {bad}; restore the directory from a copy"));
            Errno::EIO
        })?;
        let (table, sequence) = found.unwrap_or_else(|| {
            let (uid, gid) = sys::effective_ids();
            (Table::new(Attributes::new(0o755, uid, gid, wall_ns())), 0)
        });
        if !index.clean {
            self.remove_leftovers(&table);
        }
        *self.state.lock() = Some(Loaded {
            index: index.clone(),
            table,
            sequence,
            dirty: false,
            failed: false,
            told: false,
            backlog: Backlog::default(),
            sizes: BTreeMap::new(),
            records: Records::default(),
            orderly: Orderly::new(index.clean),
        });
        Ok(())
    }

    fn read_slot(
        &self,
        index: &OpenVolume,
        sequence: u64,
    ) -> Result<Result<(Table, u64), BadImage>, Errno> {
        let read = |length: usize| {
            let bytes = Memory::new(vec![0; length]);
            let done = index.read(slot_offset(sequence), &bytes)?;
            let mut bytes = bytes.into_inner();
            bytes.truncate(done);
            Ok::<_, Errno>(bytes)
        };
        let first = read(IMAGE_BLOCK)?;
        let length = match Table::image_bytes(&first) {
            Ok(length) => length,
            Err(bad) => return Ok(Err(bad)),
        };
        Ok(Table::decode(&read(length)?))
    }

    /// Removes the host files that no name leads to: a crash came between the volume and its name.
    fn remove_leftovers(&self, table: &Table) {
        let Ok(link) = process::current().link() else { return };
        let known: std::collections::BTreeSet<String> =
            table.nodes().filter_map(|(_, node)| node.file().map(host_name)).collect();
        let mut after = String::new();
        while let Ok(page) = link.list(&self.config.name, &after) {
            // The host's word: read no further than it goes up.
            let ids: Vec<&str> = page
                .chunks_exact(32)
                .filter_map(|id| core::str::from_utf8(id).ok())
                .filter(|id| *id > after.as_str())
                .collect();
            for id in ids.iter().filter(|id| !known.contains(**id)) {
                link.remove(&format!("{}/{id}", self.config.name));
            }
            match ids.last() {
                Some(last) => after = (*last).to_owned(),
                None => return,
            }
        }
    }

    /// A file of the directory was closed in order: its size, and when its content changed.
    pub(crate) fn remember(&self, member: &Member, size: u64) {
        let mut state = self.state.lock();
        let Some(loaded) = state.as_mut() else { return };
        loaded.sizes.insert(member.inode, size);
        loaded.orderly.put_away(member.inode);
        if let Some(written) = member.written()
            && let Some(attributes) = loaded.table.attributes_mut(member.inode)
        {
            attributes.modified = attributes.modified.max(written);
            attributes.changed = attributes.changed.max(written);
            loaded.dirty = true;
        }
    }

    /// Whether a file was closed since the index was opened.
    pub(crate) fn knows(&self, inode: u64) -> bool {
        self.state.lock().as_ref().is_some_and(|loaded| loaded.sizes.contains_key(&inode))
    }

    /// What messages call a node.
    fn shown(&self, table: &Table, inode: u64) -> String {
        let path = table.path(inode).unwrap_or_else(|| b" (a removed file)".to_vec());
        format!("{}{}", self.config.guest_path, String::from_utf8_lossy(&path))
    }

    /// Absolute path of directory `inode` as the guest sees it; `None` for a removed one.
    ///
    /// # Errors
    /// As opening the index.
    pub fn path_of(&'static self, inode: u64) -> Result<Option<Vec<u8>>, Errno> {
        self.visit(false)?.read(|table| {
            let path = table.path(inode)?;
            Some([self.config.guest_path.as_bytes(), &path].concat())
        })
    }
}

impl Visit {
    /// Looks at the table.
    fn read<T>(&self, look: impl FnOnce(&Table) -> T) -> Result<T, Errno> {
        let state = self.directory.state.lock();
        state.as_ref().map(|loaded| look(&loaded.table)).ok_or(Errno::EIO)
    }

    /// Changes the table; the change is durable a moment later.
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> Result<T, Errno>) -> Result<T, Errno> {
        let held = self.index.hold_index()?;
        let (changed, full) = {
            let mut state = self.directory.state.lock();
            let loaded = state.as_mut().filter(|loaded| !loaded.failed).ok_or(Errno::EIO)?;
            let changed = change(&mut loaded.table)?;
            loaded.backlog.note();
            (changed, loaded.backlog.is_full())
        };
        if full {
            let disk = held.disk_for_guest(wait::now_ns())?;
            let publishing = self.directory.publish(&self.index, (&held, &disk), false);
            // What it says is for a sync to tell; the change is made.
            let _ = process::current().block_on(publishing);
        }
        Ok(changed)
    }

    /// Changes what is not written down: orphans.
    fn change_in_memory<T>(
        &self,
        change: impl FnOnce(&mut Table) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut state = self.directory.state.lock();
        let loaded = state.as_mut().filter(|loaded| !loaded.failed).ok_or(Errno::EIO)?;
        change(&mut loaded.table)
    }

    /// What is needed to open the volume of a file.
    fn wanted(&self, inode: u64, fresh: Option<(FileId, String)>) -> Result<Wanted, Errno> {
        let directory = self.directory.number;
        if let Some((id, path)) = fresh {
            return Ok(Wanted { directory, inode, id, fresh: true, path });
        }
        self.read(|table| {
            let id = table.node(inode).and_then(|node| node.file().copied())?;
            let path = self.directory.shown(table, inode);
            Some(Wanted { directory, inode, id, fresh: false, path })
        })?
        .ok_or(Errno::ENOENT)
    }
}

/// A new file's id.
fn fresh_id() -> Result<FileId, Errno> {
    use postern_trusted::platform::Platform as _;
    let mut id = [0; 16];
    SimPlatform.random(&mut id).map_err(|_| Errno::EIO)?;
    Ok(id)
}

/// Who asks, and what its new files may be.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    uid: u32,
    gid: u32,
}

impl Caller {
    fn now() -> Self {
        let (uid, gid) = sys::effective_ids();
        Self { uid, gid }
    }

    /// Whether it may do `wanted` (R_OK, W_OK, X_OK bits), as Linux decides it without ACLs.
    fn may(self, attributes: &Attributes, is_directory: bool, wanted: i32) -> Result<(), Errno> {
        let mode = i32::from(attributes.mode);
        let granted = match () {
            () if self.uid == 0 => {
                let execute = is_directory || mode & 0o111 != 0;
                libc::R_OK | libc::W_OK | if execute { libc::X_OK } else { 0 }
            }
            () if self.uid == attributes.uid => mode >> 6 & 7,
            () if self.is_in(attributes.gid) => mode >> 3 & 7,
            () => mode & 7,
        };
        if wanted & !granted == 0 { Ok(()) } else { Err(Errno::EACCES) }
    }

    fn is_in(self, group: u32) -> bool {
        self.gid == group || sys::is_in_group(group)
    }

    /// Whether it may change what belongs to `uid` alone.
    fn owns(self, uid: u32) -> Result<(), Errno> {
        if self.uid == 0 || self.uid == uid { Ok(()) } else { Err(Errno::EPERM) }
    }
}

/// Walks to the node that `path` names.
fn resolve(table: &Table, caller: Caller, path: &[u8]) -> Result<u64, Errno> {
    path.split(|&c| c == b'/').filter(|part| !part.is_empty()).try_fold(ROOT, |at, part| {
        let node = table.node(at).ok_or(Errno::ENOENT)?;
        if !node.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        caller.may(&node.attributes, true, libc::X_OK)?;
        table.lookup(at, part)
    })
}

/// Walks to the directory that the last part of `path` is in; answers it and that part. `None` for
/// the protected directory itself.
fn resolve_parent<'a>(
    table: &Table,
    caller: Caller,
    path: &'a [u8],
) -> Result<Option<(u64, &'a [u8])>, Errno> {
    let Some(cut) = path.iter().rposition(|&c| c == b'/') else { return Ok(None) };
    let (parent, name) = (resolve(table, caller, &path[..cut])?, &path[cut + 1..]);
    let node = table.node(parent).ok_or(Errno::ENOENT)?;
    if !node.is_directory() {
        return Err(Errno::ENOTDIR);
    }
    caller.may(&node.attributes, true, libc::X_OK)?;
    Ok(Some((parent, name)))
}

/// As [`resolve_parent`], for a change of the names there.
fn resolve_change<'a>(
    table: &Table,
    caller: Caller,
    path: &'a [u8],
    at_root: Errno,
) -> Result<(u64, &'a [u8]), Errno> {
    let (parent, name) = resolve_parent(table, caller, path)?.ok_or(at_root)?;
    if let Some(node) = table.node(parent) {
        caller.may(&node.attributes, true, libc::W_OK)?;
    }
    Ok((parent, name))
}
