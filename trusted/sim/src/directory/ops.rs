//! Changes of names and attributes, as Linux answers them on ext4.

use postern_trusted::{
    directory::{Attributes, Node, Rename, Table},
    errno::Errno,
};

use super::{Caller, Place, look, number, resolve_change};
use crate::{family, files::io::wall_ns, message};

/// renameat2(2)'s flags.
const NO_REPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

/// The permission bits of something new: `mode` without those of the process's umask.
pub(super) fn masked(mode: u32) -> u16 {
    let status = message::read_file(b"/proc/self/status", 8192).unwrap_or_default();
    let line = status.split(|&c| c == b'\n').find_map(|line| line.strip_prefix(b"Umask:"));
    let text = line.and_then(|line| core::str::from_utf8(line).ok()).unwrap_or("0022");
    let mask = u32::from_str_radix(text.trim(), 8).unwrap_or(0o022);
    u16::try_from(mode & !mask & 0o7777).unwrap_or(0)
}

/// mkdir(2).
///
/// # Errors
/// `EEXIST`, `ENOENT`, `ENOTDIR`, `EACCES`, `ENAMETOOLONG`, `ENOSPC`, `EIO`.
pub fn make_directory(place: &Place, mode: u32) -> Result<(), Errno> {
    let caller = Caller::now();
    let mode = masked(mode & 0o1777);
    let visit = number(place.directory)?.visit(true)?;
    visit.read(|table| exists_or_may(table, caller, place))??;
    visit.change(|table| {
        let (parent, name) = resolve_change(table, caller, &place.path, Errno::EEXIST)?;
        let attributes = Attributes::new(mode, caller.uid, caller.gid, wall_ns());
        table.create(parent, name, None, attributes).map(drop)
    })
}

/// `EEXIST` comes before `EACCES`, and neither is written down.
fn exists_or_may(table: &Table, caller: Caller, place: &Place) -> Result<(), Errno> {
    let parent = super::resolve_parent(table, caller, &place.path)?;
    let Some((parent, name)) = parent else { return Err(Errno::EEXIST) };
    match table.lookup(parent, name) {
        Ok(_) => Err(Errno::EEXIST),
        Err(Errno::ENOENT) => {
            let node = table.node(parent).ok_or(Errno::ENOENT)?;
            caller.may(&node.attributes, true, libc::W_OK)
        }
        Err(errno) => Err(errno),
    }
}

/// mknod(2), link(2), symlink(2) and the like make nothing here.
///
/// # Errors
/// Always: `EEXIST` and as [`make_directory`], else `EPERM`.
pub fn refuse_new(place: &Place) -> Result<(), Errno> {
    let visit = number(place.directory)?.visit(false)?;
    visit.read(|table| exists_or_may(table, Caller::now(), place))??;
    Err(Errno::EPERM)
}

/// Whether the sticky bit of a directory lets `caller` take `inode` out of it.
fn may_take(table: &Table, caller: Caller, parent: u64, inode: u64) -> Result<(), Errno> {
    let (Some(parent), Some(node)) = (table.node(parent), table.node(inode)) else {
        return Ok(());
    };
    let sticky = parent.attributes.mode & 0o1000 != 0;
    if sticky && caller.uid != parent.attributes.uid {
        return caller.owns(node.attributes.uid);
    }
    Ok(())
}

/// unlink(2), or rmdir(2).
///
/// # Errors
/// `EISDIR` or `ENOTDIR`, `EBUSY` for the protected directory itself, `ENOTEMPTY`, `ENOENT`,
/// `EACCES`, `EPERM`, `EIO`.
pub fn remove(place: &Place, directory: bool) -> Result<(), Errno> {
    let caller = Caller::now();
    let holder = number(place.directory)?;
    let visit = holder.visit(true)?;
    let at_root = if directory { Errno::EBUSY } else { Errno::EISDIR };
    let check = |table: &Table| {
        let (parent, name) = resolve_change(table, caller, &place.path, at_root)?;
        let inode = table.lookup(parent, name)?;
        may_take(table, caller, parent, inode)?;
        let is_directory = table.node(inode).is_some_and(Node::is_directory);
        if !directory && place.slash && !is_directory {
            return Err(Errno::ENOTDIR);
        }
        Ok((parent, name))
    };
    visit.read(|table| check(table).map(drop))??;
    let gone = visit.change(|table| {
        let (parent, name) = check(table)?;
        if directory {
            table.remove_directory(parent, name, wall_ns())
        } else {
            table.unlink(parent, name, wall_ns())
        }
    })?;
    if let Some(family) = family::family() {
        holder.reap(family, gone);
    }
    Ok(())
}

/// renameat2(2).
///
/// # Errors
/// `EXDEV` between directories of the run, `EBUSY` for the protected directory itself, `EINVAL`
/// for unknown flags, and as [`Table::rename`].
pub fn rename(from: &Place, to: &Place, flags: u32) -> Result<(), Errno> {
    let how = match flags {
        0 => Rename::Replace,
        NO_REPLACE => Rename::NoReplace,
        EXCHANGE => Rename::Exchange,
        _ => return Err(Errno::EINVAL),
    };
    if from.directory != to.directory {
        return Err(Errno::EXDEV);
    }
    let caller = Caller::now();
    let holder = number(from.directory)?;
    let visit = holder.visit(true)?;
    let places = |table: &Table| {
        let (source, name) =
            super::resolve_parent(table, caller, &from.path)?.ok_or(Errno::EBUSY)?;
        let (target, new) = super::resolve_parent(table, caller, &to.path)?.ok_or(Errno::EBUSY)?;
        let moved = table.lookup(source, name)?;
        let is_directory = table.node(moved).is_some_and(Node::is_directory);
        if !is_directory && (from.slash || to.slash && how != Rename::Exchange) {
            return Err(Errno::ENOTDIR);
        }
        for parent in [source, target] {
            if let Some(node) = table.node(parent) {
                caller.may(&node.attributes, true, libc::W_OK)?;
            }
        }
        may_take(table, caller, source, moved)?;
        if let Ok(replaced) = table.lookup(target, new) {
            may_take(table, caller, target, replaced)?;
        }
        Ok((source, name, target, new, table.lookup(target, new) == Ok(moved)))
    };
    // One name for both ends changes nothing.
    if visit.read(|table| places(table).map(|(.., same)| same))?? && how == Rename::Replace {
        return Ok(());
    }
    let gone = visit.change(|table| {
        let (source, name, target, new, _) = places(table)?;
        table.rename((source, name), (target, new), how, wall_ns())
    })?;
    if let (Some(family), Some(gone)) = (family::family(), gone) {
        holder.reap(family, gone);
    }
    Ok(())
}

/// A change of attributes.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// chmod(2).
    Mode(u32),
    /// chown(2); `u32::MAX` leaves as it is.
    Owner(u32, u32),
    /// utimensat(2): access and content, in nanoseconds or left as they are; whether both are
    /// just set to now.
    Times([Option<i64>; 2], bool),
}

/// Changes the attributes of node `inode`.
///
/// # Errors
/// `EPERM`, `EACCES`, `ENOENT`, `EIO`.
pub fn change(directory: usize, inode: u64, change: Change) -> Result<(), Errno> {
    let visit = number(directory)?.visit(true)?;
    let caller = Caller::now();
    let write = visit.read(|table| may_change(table, caller, inode, change))??;
    if !write {
        return Ok(());
    }
    let alter = |table: &mut Table| {
        let attributes = table.attributes_mut(inode).ok_or(Errno::ENOENT)?;
        apply(attributes, caller, change);
        Ok(())
    };
    // An orphan's attributes are written nowhere.
    if visit.read(|table| table.node(inode).is_some_and(|node| node.parent == 0))? {
        visit.change_in_memory(alter)
    } else {
        visit.change(alter)
    }
}

/// As [`change`], for the node that a place names.
///
/// # Errors
/// As [`change`], and those of the path.
pub fn change_at(place: &Place, what: Change) -> Result<(), Errno> {
    let inode = number(place.directory)?.visit(false)?.read(|table| look::find(table, place))??;
    change(place.directory, inode, what)
}

/// Whether the change is allowed, and changes anything.
fn may_change(table: &Table, caller: Caller, inode: u64, change: Change) -> Result<bool, Errno> {
    let node = table.node(inode).ok_or(Errno::ENOENT)?;
    let now = &node.attributes;
    match change {
        Change::Mode(_) => caller.owns(now.uid)?,
        Change::Owner(uid, gid) => {
            let same = (uid == u32::MAX || uid == now.uid)
                && (gid == u32::MAX || gid == now.gid || caller.is_in(gid));
            if caller.uid != 0 && !(same && caller.uid == now.uid) {
                return Err(Errno::EPERM);
            }
        }
        Change::Times([None, None], false) => return Ok(false),
        Change::Times(_, true) => {
            caller.owns(now.uid).or_else(|_| caller.may(now, node.is_directory(), libc::W_OK))?
        }
        Change::Times(..) => caller.owns(now.uid)?,
    }
    Ok(true)
}

fn apply(attributes: &mut Attributes, caller: Caller, change: Change) {
    attributes.changed = wall_ns();
    match change {
        Change::Mode(mode) => {
            // As the kernel does for whoever does not belong to the group.
            let foreign = caller.uid != 0 && !caller.is_in(attributes.gid);
            let mode = if foreign { mode & !0o2000 } else { mode };
            attributes.mode = u16::try_from(mode & 0o7777).unwrap_or(0);
        }
        Change::Owner(uid, gid) => {
            for (to, new) in [(&mut attributes.uid, uid), (&mut attributes.gid, gid)] {
                if new != u32::MAX {
                    *to = new;
                }
            }
            // As the kernel does for whoever is not privileged, and for files that execute.
            if caller.uid != 0 || attributes.mode & 0o111 != 0 {
                attributes.mode &= !0o6000;
            }
        }
        Change::Times(times, _) => {
            for (to, new) in
                [&mut attributes.accessed, &mut attributes.modified].into_iter().zip(times)
            {
                if let Some(new) = new {
                    *to = new;
                }
            }
        }
    }
}
