//! Nodes and names.

use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};

use super::{FileId, image};
use crate::{counter::Record, errno::Errno};

/// Inode number of the directory itself.
pub const ROOT: u64 = 1;
/// Longest name in bytes.
pub const NAME_MAX: usize = 255;

/// What chmod(2), chown(2) and utimensat(2) set. Times are wall-clock nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub accessed: i64,
    /// Last change of the content.
    pub modified: i64,
    /// Last change of content or attributes.
    pub changed: i64,
}

impl Attributes {
    /// Those of something made at `now`.
    #[must_use]
    pub const fn new(mode: u16, uid: u32, gid: u32, now: i64) -> Self {
        Self { mode: mode & 0o7777, uid, gid, accessed: now, modified: now, changed: now }
    }

    pub(super) const fn touch(&mut self, now: i64) {
        self.modified = now;
        self.changed = now;
    }
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory: names in byte order, and the inodes they lead to.
    Directory(BTreeMap<Box<[u8]>, u64>),
    /// A file: the id of its volume.
    File(FileId),
}

/// A directory or file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner, times.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
    /// The directory it is in; 0 for an orphan, [`ROOT`] for the root.
    pub parent: u64,
    /// Its name there; empty for an orphan and the root.
    pub name: Box<[u8]>,
    /// Of a file: the state of its volume that was recorded last; `None` before the first.
    pub record: Option<Record>,
}

impl Node {
    /// The entries of a directory.
    #[must_use]
    pub const fn entries(&self) -> Option<&BTreeMap<Box<[u8]>, u64>> {
        match &self.kind {
            Kind::Directory(entries) => Some(entries),
            Kind::File(_) => None,
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub const fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    /// The volume of a file.
    #[must_use]
    pub const fn file(&self) -> Option<&FileId> {
        match &self.kind {
            Kind::Directory(_) => None,
            Kind::File(id) => Some(id),
        }
    }
}

/// The tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub(super) nodes: BTreeMap<u64, Node>,
    /// No inode reaches this yet.
    pub(super) next: u64,
    /// Bytes that all named nodes take in an image.
    pub(super) bytes: usize,
}

/// Whether a name can be given.
///
/// # Errors
/// `ENAMETOOLONG`; `EINVAL` for what no path can have as its last part.
pub(super) fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let plain = !matches!(name, b"" | b"." | b"..") && !name.iter().any(|c| matches!(c, b'/' | 0));
    if plain { Ok(()) } else { Err(Errno::EINVAL) }
}

impl Table {
    /// A directory without entries.
    #[must_use]
    pub fn new(attributes: Attributes) -> Self {
        let kind = Kind::Directory(BTreeMap::new());
        let root = Node { attributes, kind, parent: ROOT, name: Box::default(), record: None };
        let bytes = image::record_bytes(&root);
        Self { nodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1, bytes }
    }

    /// The node with this inode.
    #[must_use]
    pub fn node(&self, inode: u64) -> Option<&Node> {
        self.nodes.get(&inode)
    }

    /// The attributes of a node, to be changed.
    pub fn attributes_mut(&mut self, inode: u64) -> Option<&mut Attributes> {
        self.nodes.get_mut(&inode).map(|node| &mut node.attributes)
    }

    /// Records the state of a file's volume; nothing, for what is no file.
    ///
    /// # Errors
    /// `ENOSPC`: the file has no record yet, and the table is too full for one. A name leaves room
    /// for it, but not in a table that was made before there were records.
    pub fn set_record(&mut self, inode: u64, record: Option<Record>) -> Result<(), Errno> {
        let Some(node) = self.nodes.get(&inode).filter(|node| !node.is_directory()) else {
            return Ok(());
        };
        let new = node.record.is_none() && record.is_some();
        if new && node.parent != 0 && !self.has_room_for_record() {
            return Err(Errno::ENOSPC);
        }
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.record = record;
        }
        Ok(())
    }

    /// Whether one more file can have a record.
    fn has_room_for_record(&self) -> bool {
        if self.bytes <= image::MAX_BODY {
            return true;
        }
        let without =
            |node: &&Node| node.parent != 0 && !node.is_directory() && node.record.is_none();
        let unused = Record::BYTES * self.nodes.values().filter(without).count();
        self.bytes - unused + Record::BYTES <= image::MAX_BODY
    }

    /// All nodes, orphans included.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(inode, node)| (*inode, node))
    }

    /// The entries of directory `inode`.
    ///
    /// # Errors
    /// `ENOTDIR`; `ENOENT` for an inode that is not there.
    pub fn entries(&self, inode: u64) -> Result<&BTreeMap<Box<[u8]>, u64>, Errno> {
        self.nodes.get(&inode).ok_or(Errno::ENOENT)?.entries().ok_or(Errno::ENOTDIR)
    }

    pub(super) fn entries_mut(
        &mut self,
        inode: u64,
    ) -> Result<&mut BTreeMap<Box<[u8]>, u64>, Errno> {
        match &mut self.nodes.get_mut(&inode).ok_or(Errno::ENOENT)?.kind {
            Kind::Directory(entries) => Ok(entries),
            Kind::File(_) => Err(Errno::ENOTDIR),
        }
    }

    /// The inode of `name` in directory `parent`.
    ///
    /// # Errors
    /// `ENOTDIR`, `ENAMETOOLONG`, `ENOENT`.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let entries = self.entries(parent)?;
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        entries.get(name).copied().ok_or(Errno::ENOENT)
    }

    /// The path from the root to a node, beginning with `/`; empty for the root, `None` for an
    /// orphan and what is beneath one.
    #[must_use]
    pub fn path(&self, inode: u64) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = inode;
        while at != ROOT {
            let node = self.nodes.get(&at).filter(|node| node.parent != 0)?;
            names.push(&node.name);
            at = node.parent;
        }
        let mut path = Vec::new();
        for name in names.into_iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        Some(path)
    }

    /// Number of directories directly in directory `inode`.
    #[must_use]
    pub fn directories_in(&self, inode: u64) -> usize {
        let entries = self.nodes.get(&inode).and_then(Node::entries);
        entries.map_or(0, |entries| {
            entries.values().filter(|at| self.nodes.get(at).is_some_and(Node::is_directory)).count()
        })
    }

    /// Number of named nodes, the root included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.values().filter(|node| node.parent != 0).count()
    }

    /// Whether there is nothing but the root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    fn admit(&mut self, node: Node) -> u64 {
        let inode = self.next;
        self.next += 1;
        if node.parent != 0 {
            self.bytes += image::record_bytes(&node);
        }
        self.nodes.insert(inode, node);
        inode
    }

    /// Puts a new file or directory under `name` into directory `parent`.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`: no such directory. `EEXIST`, `ENAMETOOLONG`, `EINVAL`: the name.
    /// `ENOSPC`: the table is full.
    pub fn create(
        &mut self,
        parent: u64,
        name: &[u8],
        file: Option<FileId>,
        attributes: Attributes,
    ) -> Result<u64, Errno> {
        match self.lookup(parent, name) {
            Ok(_) => return Err(Errno::EEXIST),
            Err(Errno::ENOENT) if self.is_linked(parent) => {}
            Err(errno) => return Err(errno),
        }
        check_name(name)?;
        let kind = file.map_or_else(|| Kind::Directory(BTreeMap::new()), Kind::File);
        let node = Node { attributes, kind, parent, name: name.into(), record: None };
        if self.bytes + image::record_bytes(&node) > image::MAX_BODY {
            return Err(Errno::ENOSPC);
        }
        let inode = self.admit(node);
        self.entries_mut(parent)?.insert(name.into(), inode);
        self.touch(parent, attributes.changed);
        Ok(inode)
    }

    /// As [`Self::create`] of a file, with an inode that was given out before and forgotten since.
    ///
    /// # Errors
    /// As [`Self::create`]; `EEXIST` too for an inode that is in use, `EINVAL` for one that never
    /// was.
    pub fn create_as(
        &mut self,
        inode: u64,
        parent: u64,
        name: &[u8],
        file: FileId,
        attributes: Attributes,
    ) -> Result<(), Errno> {
        if inode >= self.next {
            return Err(Errno::EINVAL);
        }
        if self.nodes.contains_key(&inode) {
            return Err(Errno::EEXIST);
        }
        let next = core::mem::replace(&mut self.next, inode);
        let made = self.create(parent, name, Some(file), attributes);
        self.next = next;
        made.map(drop)
    }

    /// A file without a name (O_TMPFILE).
    pub fn create_orphan(&mut self, file: FileId, attributes: Attributes) -> u64 {
        let (kind, name) = (Kind::File(file), Box::default());
        self.admit(Node { attributes, kind, parent: 0, name, record: None })
    }

    /// Whether a directory is not a removed one.
    fn is_linked(&self, inode: u64) -> bool {
        self.nodes.get(&inode).is_some_and(|node| node.parent != 0)
    }

    pub(super) fn touch(&mut self, inode: u64, now: i64) {
        if let Some(attributes) = self.attributes_mut(inode) {
            attributes.touch(now);
        }
    }

    /// Takes the name of a file away and answers its inode: it stays as an orphan until
    /// [`Self::forget`].
    ///
    /// # Errors
    /// As [`Self::lookup`]; `EISDIR` for a directory.
    pub fn unlink(&mut self, parent: u64, name: &[u8], now: i64) -> Result<u64, Errno> {
        let inode = self.lookup(parent, name)?;
        if self.nodes.get(&inode).is_some_and(Node::is_directory) {
            return Err(Errno::EISDIR);
        }
        self.cut_off(inode, now);
        Ok(inode)
    }

    /// Removes an empty directory; it stays as an orphan until [`Self::forget`].
    ///
    /// # Errors
    /// As [`Self::lookup`]; `ENOTDIR` for a file, `ENOTEMPTY`.
    pub fn remove_directory(&mut self, parent: u64, name: &[u8], now: i64) -> Result<u64, Errno> {
        let inode = self.lookup(parent, name)?;
        if !self.entries(inode)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.cut_off(inode, now);
        Ok(inode)
    }

    /// Makes a node an orphan.
    pub(super) fn cut_off(&mut self, inode: u64, now: i64) {
        let Some(node) = self.nodes.get_mut(&inode).filter(|node| node.parent != 0) else { return };
        let bytes = image::record_bytes(node);
        let (parent, name) = (node.parent, core::mem::take(&mut node.name));
        node.parent = 0;
        node.attributes.changed = now;
        self.bytes -= bytes;
        if let Ok(entries) = self.entries_mut(parent) {
            entries.remove(&name);
        }
        self.touch(parent, now);
    }

    /// Lets an orphan go: nobody has it open any more.
    pub fn forget(&mut self, inode: u64) {
        if self.nodes.get(&inode).is_some_and(|node| node.parent == 0) {
            self.nodes.remove(&inode);
        }
    }
}
