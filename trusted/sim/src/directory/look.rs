//! What is there: attributes and entries.

use postern_trusted::{
    directory::{Node, Table},
    errno::Errno,
    sync::Lock,
};

use super::{Caller, Directory, Loaded, Place, Visit, number, resolve};
use crate::family;

/// What stat(2) tells of a file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The directory's number.
    pub directory: usize,
    /// Inode.
    pub inode: u64,
    /// S_IFDIR or S_IFREG, and the permission bits.
    pub mode: u32,
    /// Names that lead to it.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Last access, change of content, change of anything: wall-clock nanoseconds.
    pub times: [i64; 3],
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Inode.
    pub inode: u64,
    /// DT_DIR or DT_REG.
    pub kind: u8,
    /// Name.
    pub name: Box<[u8]>,
}

/// An open directory: which, and its entries as they were when it was last read from the start.
pub struct Listing {
    /// The directory's number.
    pub directory: usize,
    /// Inode.
    pub inode: u64,
    entries: Lock<Option<Vec<Entry>>>,
}

impl Listing {
    /// Of directory `inode`.
    #[must_use]
    pub const fn new(directory: usize, inode: u64) -> Self {
        Self { directory, inode, entries: Lock::new(None) }
    }

    /// Absolute path of the directory as the guest sees it; `None` for a removed one.
    ///
    /// # Errors
    /// As opening the index.
    pub fn path(&self) -> Result<Option<Vec<u8>>, Errno> {
        number(self.directory)?.path_of(self.inode)
    }

    /// Forgets the entries: the next look takes new ones.
    pub fn rewind(&self) {
        *self.entries.lock() = None;
    }

    /// Entry number `at`; `None` at the end.
    ///
    /// # Errors
    /// As opening the index; `ENOENT` for a removed directory.
    pub fn entry(&self, at: usize) -> Result<Option<Entry>, Errno> {
        if at == 0 || self.entries.lock().is_none() {
            let taken = number(self.directory)?.entries(self.inode)?;
            *self.entries.lock() = Some(taken);
        }
        Ok(self.entries.lock().as_ref().and_then(|entries| entries.get(at).cloned()))
    }
}

impl Directory {
    fn entries(&'static self, inode: u64) -> Result<Vec<Entry>, Errno> {
        self.visit(false)?.read(|table| {
            let node = table.node(inode).filter(|node| node.parent != 0).ok_or(Errno::ENOENT)?;
            let kind_of = |at: u64| match table.node(at).is_some_and(Node::is_directory) {
                true => libc::DT_DIR,
                false => libc::DT_REG,
            };
            let dot = |inode, name: &[u8]| Entry { inode, kind: libc::DT_DIR, name: name.into() };
            let mut all = vec![dot(inode, b"."), dot(node.parent, b"..")];
            all.extend(node.entries().ok_or(Errno::ENOTDIR)?.iter().map(|(name, at)| Entry {
                inode: *at,
                kind: kind_of(*at),
                name: name.clone(),
            }));
            Ok(all)
        })?
    }

    /// What stat(2) tells of node `inode`.
    ///
    /// # Errors
    /// `ENOENT`; what opening the index or the file's volume says.
    pub fn facts(&'static self, inode: u64) -> Result<Facts, Errno> {
        let visit = self.visit(false)?;
        self.facts_in(&visit, inode)
    }

    fn facts_in(&'static self, visit: &Visit, inode: u64) -> Result<Facts, Errno> {
        let known = |loaded: &Loaded| {
            facts_of(self.number, &loaded.table, inode)
                .map(|f| (f, loaded.sizes.get(&inode).copied()))
        };
        let state = self.state.lock();
        let (mut facts, size) = state.as_ref().ok_or(Errno::EIO).and_then(known)?;
        drop(state);
        if facts.mode & libc::S_IFMT == libc::S_IFDIR {
            return Ok(facts);
        }
        let family = family::family().ok_or(Errno::EIO)?;
        facts.size = match (family.open_file(self.number, inode), size) {
            (Some(Some(volume)), _) => {
                if let Some(written) = volume.member.as_ref().and_then(super::Member::written) {
                    facts.times[1] = facts.times[1].max(written);
                    facts.times[2] = facts.times[2].max(written);
                }
                volume.size()
            }
            (None, Some(size)) => size,
            // Not known, or in motion: with the turn nothing of it is.
            _ if visit.turn.is_none() => return self.facts_in(&self.visit(true)?, inode),
            _ => {
                let size = family.size_of_closed(&visit.wanted(inode, None)?)?;
                if let Some(loaded) = self.state.lock().as_mut() {
                    loaded.sizes.insert(inode, size);
                }
                size
            }
        };
        Ok(facts)
    }
}

fn facts_of(directory: usize, table: &Table, inode: u64) -> Result<Facts, Errno> {
    let node = table.node(inode).ok_or(Errno::ENOENT)?;
    let attributes = &node.attributes;
    let (kind, links, size) = if node.is_directory() {
        let inner = u32::try_from(table.directories_in(inode)).unwrap_or(u32::MAX - 2);
        (libc::S_IFDIR, if node.parent == 0 { 0 } else { 2 + inner }, 4096)
    } else {
        (libc::S_IFREG, u32::from(node.parent != 0), 0)
    };
    Ok(Facts {
        directory,
        inode,
        mode: kind | u32::from(attributes.mode),
        links,
        uid: attributes.uid,
        gid: attributes.gid,
        size,
        times: [attributes.accessed, attributes.modified, attributes.changed],
    })
}

/// What stat(2) tells of a place.
///
/// # Errors
/// `ENOENT`, `ENOTDIR`, `EACCES`; what opening the index or the file's volume says.
pub fn stat(place: &Place) -> Result<Facts, Errno> {
    let directory = number(place.directory)?;
    let visit = directory.visit(false)?;
    let inode = visit.read(|table| find(table, place))??;
    directory.facts_in(&visit, inode)
}

/// The node that a place names; with a slash at the end it must be a directory.
pub(super) fn find(table: &Table, place: &Place) -> Result<u64, Errno> {
    let inode = resolve(table, Caller::now(), &place.path)?;
    if place.slash && !table.node(inode).is_some_and(Node::is_directory) {
        return Err(Errno::ENOTDIR);
    }
    Ok(inode)
}

/// access(2).
///
/// # Errors
/// `EACCES`, `EINVAL` for unknown bits, and as [`stat`].
pub fn access(place: &Place, mode: i32) -> Result<(), Errno> {
    if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
        return Err(Errno::EINVAL);
    }
    number(place.directory)?.visit(false)?.read(|table| {
        let node = table.node(find(table, place)?).ok_or(Errno::ENOENT)?;
        Caller::now().may(&node.attributes, node.is_directory(), mode)
    })?
}

/// Whether a place is a directory that may be searched: for chdir(2).
///
/// # Errors
/// `ENOTDIR`, `EACCES`, and as [`stat`].
pub fn check_search(place: &Place) -> Result<(), Errno> {
    number(place.directory)?.visit(false)?.read(|table| {
        let node = table.node(find(table, place)?).ok_or(Errno::ENOENT)?;
        if !node.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        Caller::now().may(&node.attributes, true, libc::X_OK)
    })?
}
