//! renameat2(2).

use alloc::boxed::Box;

use super::{
    image,
    table::{Node, ROOT, Table, check_name},
};
use crate::errno::Errno;

/// What renameat2(2) does with a name that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rename {
    /// Its node gives way.
    Replace,
    /// Refuses (RENAME_NOREPLACE).
    NoReplace,
    /// Both nodes change places (RENAME_EXCHANGE).
    Exchange,
}

impl Table {
    /// Whether `inode` is `of` or above it.
    fn is_above(&self, inode: u64, of: u64) -> bool {
        let mut at = of;
        while at != inode {
            match self.nodes.get(&at) {
                Some(node) if at != ROOT && node.parent != 0 => at = node.parent,
                _ => return false,
            }
        }
        true
    }

    /// Gives the node `from` (directory and name) the name `to`; answers the inode that gave way:
    /// an orphan until [`Self::forget`].
    ///
    /// # Errors
    /// In Linux's order: `ENOENT`, `ENOTDIR` (a directory that is none), `EEXIST`, `EINVAL` (into
    /// itself), `ENOTEMPTY`, `ENOTDIR` and `EISDIR` (what gives way is of another kind), `ENOSPC`.
    pub fn rename(
        &mut self,
        from: (u64, &[u8]),
        to: (u64, &[u8]),
        how: Rename,
        now: i64,
    ) -> Result<Option<u64>, Errno> {
        self.entries(from.0)?;
        self.entries(to.0)?;
        let moved = self.lookup(from.0, from.1)?;
        let target = match self.lookup(to.0, to.1) {
            Ok(inode) => Some(inode),
            Err(Errno::ENOENT) => None,
            Err(errno) => return Err(errno),
        };
        match (how, target) {
            (Rename::NoReplace, Some(_)) => return Err(Errno::EEXIST),
            (Rename::Exchange, None) => return Err(Errno::ENOENT),
            _ => {}
        }
        let is_directory = |inode| self.nodes.get(&inode).is_some_and(Node::is_directory);
        if is_directory(moved) && self.is_above(moved, to.0) {
            return Err(Errno::EINVAL);
        }
        if let Some(target) = target
            && is_directory(target)
            && self.is_above(target, from.0)
        {
            let exchange = how == Rename::Exchange;
            return Err(if exchange { Errno::EINVAL } else { Errno::ENOTEMPTY });
        }
        if target == Some(moved) {
            return Ok(None);
        }
        if let (Rename::Exchange, Some(target)) = (how, target) {
            self.exchange(moved, target, now);
            return Ok(None);
        }
        if let Some(target) = target {
            match (is_directory(moved), self.entries(target)) {
                (true, Err(_)) => return Err(Errno::ENOTDIR),
                (true, Ok(entries)) if !entries.is_empty() => return Err(Errno::ENOTEMPTY),
                (false, Ok(_)) => return Err(Errno::EISDIR),
                _ => {}
            }
        } else {
            check_name(to.1)?;
            if self.nodes.get(&to.0).is_none_or(|node| node.parent == 0) {
                return Err(Errno::ENOENT); // A removed directory.
            }
            if self.bytes + to.1.len() > image::MAX_BODY + from.1.len() {
                return Err(Errno::ENOSPC);
            }
        }
        if let Some(target) = target {
            self.cut_off(target, now);
        }
        self.place(moved, to.0, to.1.into(), now);
        Ok(target)
    }

    /// Moves a named node to a free name.
    fn place(&mut self, inode: u64, parent: u64, name: Box<[u8]>, now: i64) {
        let Some(node) = self.nodes.get_mut(&inode) else { return };
        let length = name.len();
        let old_name = core::mem::replace(&mut node.name, name.clone());
        let old_parent = core::mem::replace(&mut node.parent, parent);
        node.attributes.changed = now;
        self.bytes = self.bytes + length - old_name.len();
        for (at, entry) in [(old_parent, None), (parent, Some(name))] {
            if let Ok(entries) = self.entries_mut(at) {
                match entry {
                    None => entries.remove(&old_name),
                    Some(name) => entries.insert(name, inode),
                };
            }
            self.touch(at, now);
        }
    }

    fn exchange(&mut self, one: u64, other: u64, now: i64) {
        let place = |table: &Self, inode| {
            table.nodes.get(&inode).map(|node| (node.parent, node.name.clone()))
        };
        let (Some(first), Some(second)) = (place(self, one), place(self, other)) else { return };
        for (inode, (parent, name)) in [(one, second), (other, first)] {
            if let Some(node) = self.nodes.get_mut(&inode) {
                (node.parent, node.name) = (parent, name.clone());
                node.attributes.changed = now;
            }
            if let Ok(entries) = self.entries_mut(parent) {
                entries.insert(name, inode);
            }
            self.touch(parent, now);
        }
    }
}
