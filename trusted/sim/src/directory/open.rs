//! open(2) in a protected directory.

use std::sync::Arc;

use postern_trusted::{
    directory::{Attributes, Node, ROOT},
    errno::Errno,
};

use super::{
    Caller, HostFile, Listing, Place, Visit, fresh_id, number, ops::masked, resolve, resolve_parent,
};
use crate::{
    family::{self, OpenVolume},
    files::{self, io::wall_ns},
    process,
};

/// O_TMPFILE without the O_DIRECTORY in it.
const UNNAMED: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// What a path and flags lead to.
enum Found {
    Directory(u64),
    File(u64),
    /// Nothing, in this directory, under this name.
    New(u64),
}

/// open(2).
///
/// # Errors
/// As open(2) on ext4; `EBUSY` with a message while another program has the directory open;
/// `EIO` with a message for damage.
pub fn open(place: &Place, flags: i32, mode: u32) -> Result<i32, Errno> {
    let is_path = flags & libc::O_PATH != 0;
    // O_PATH ignores everything but these (open(2)).
    let flags = if is_path {
        flags & (libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
    } else {
        flags
    };
    let access = flags & libc::O_ACCMODE;
    let unnamed = flags & UNNAMED != 0;
    if unnamed && (flags & libc::O_DIRECTORY == 0 || access == libc::O_RDONLY) {
        return Err(Errno::EINVAL);
    }
    if !unnamed && flags & (libc::O_CREAT | libc::O_DIRECTORY) == libc::O_CREAT | libc::O_DIRECTORY
    {
        return Err(Errno::EINVAL);
    }
    let directory = number(place.directory)?;
    let visit = directory.visit(true)?;
    let caller = Caller::now();
    let (inode, volume) = match look(&visit, caller, place, flags)? {
        Found::Directory(inode) if unnamed => unnamed_file(&visit, caller, inode, mode)?,
        Found::Directory(inode) => return open_directory(&visit, caller, inode, flags),
        Found::File(_) if unnamed || place.slash || flags & libc::O_DIRECTORY != 0 => {
            return Err(Errno::ENOTDIR);
        }
        Found::File(inode) => {
            if !is_path {
                let read = if access == libc::O_WRONLY { 0 } else { libc::R_OK };
                let write = access != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
                let wanted = read | if write { libc::W_OK } else { 0 };
                visit.read(|table| {
                    let node = table.node(inode).ok_or(Errno::ENOENT)?;
                    caller.may(&node.attributes, false, wanted)
                })??;
            }
            let family = family::family().ok_or(Errno::EIO)?;
            (inode, family.acquire_file(&visit.wanted(inode, None)?)?)
        }
        Found::New(parent) => new_file(&visit, caller, parent, place, mode)?,
    };
    if let Err(errno) = process::current().link() {
        crate::runtime::close_volume(&volume);
        return Err(errno);
    }
    let opened = files::install(volume, None, flags & !UNNAMED);
    drop(visit);
    if opened.is_err()
        && let Some(family) = family::family()
    {
        directory.reap(family, inode);
    }
    opened
}

fn look(visit: &Visit, caller: Caller, place: &Place, flags: i32) -> Result<Found, Errno> {
    let create = flags & libc::O_CREAT != 0;
    visit.read(|table| {
        let found = match resolve_parent(table, caller, &place.path)? {
            None => Ok(ROOT),
            Some((parent, name)) => table.lookup(parent, name).map_err(|errno| (errno, parent)),
        };
        match found {
            Ok(_) if create && flags & libc::O_EXCL != 0 => Err(Errno::EEXIST),
            Ok(inode) if table.node(inode).is_some_and(Node::is_directory) => {
                if create {
                    return Err(Errno::EISDIR);
                }
                Ok(Found::Directory(inode))
            }
            Ok(_) if create && place.slash => Err(Errno::EISDIR),
            Ok(inode) => Ok(Found::File(inode)),
            Err((Errno::ENOENT, _)) if create && place.slash => Err(Errno::EISDIR),
            Err((Errno::ENOENT, parent)) if create => {
                let node = table.node(parent).ok_or(Errno::ENOENT)?;
                caller.may(&node.attributes, true, libc::W_OK | libc::X_OK)?;
                Ok(Found::New(parent))
            }
            Err((errno, _)) => Err(errno),
        }
    })?
}

fn open_directory(visit: &Visit, caller: Caller, inode: u64, flags: i32) -> Result<i32, Errno> {
    if flags & libc::O_PATH == 0 {
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            return Err(Errno::EISDIR);
        }
        visit.read(|table| {
            let node = table.node(inode).ok_or(Errno::ENOENT)?;
            caller.may(&node.attributes, true, libc::R_OK)
        })??;
        if flags & libc::O_DIRECT != 0 {
            return Err(Errno::EINVAL);
        }
    }
    // The index stands for the directory: no file call reaches it through this.
    let index = crate::runtime::open_volume(visit.directory.entry)?;
    files::install(index, Some(Listing::new(visit.directory.number, inode)), flags)
}

/// Makes a file's volume, then its name.
fn new_file(
    visit: &Visit,
    caller: Caller,
    parent: u64,
    place: &Place,
    mode: u32,
) -> Result<(u64, Arc<OpenVolume>), Errno> {
    let name = place.path.rsplit(|&c| c == b'/').next().unwrap_or_default();
    let attributes = Attributes::new(masked(mode), caller.uid, caller.gid, wall_ns());
    let id = fresh_id()?;
    // Tried on a copy of nothing but the name: what would refuse it must not cost a volume.
    let inode = visit.change_in_memory(|table| {
        let inode = table.create(parent, name, Some(id), attributes)?;
        table.unlink(parent, name, attributes.changed)?;
        Ok(inode)
    })?;
    let made = make_volume(visit, inode, id, &place.path)?;
    let published = visit.change(|table| {
        let record = table.node(inode).and_then(|node| node.record);
        table.forget(inode);
        table.create_as(inode, parent, name, id, attributes)?;
        // The name has left room for it.
        table.set_record(inode, record)
    });
    if let Err(errno) = published {
        crate::runtime::close_volume(&made);
        return Err(errno);
    }
    Ok((inode, made))
}

fn unnamed_file(
    visit: &Visit,
    caller: Caller,
    parent: u64,
    mode: u32,
) -> Result<(u64, Arc<OpenVolume>), Errno> {
    visit.read(|table| {
        let node = table.node(parent).ok_or(Errno::ENOENT)?;
        caller.may(&node.attributes, true, libc::W_OK | libc::X_OK)
    })??;
    let attributes = Attributes::new(masked(mode), caller.uid, caller.gid, wall_ns());
    let id = fresh_id()?;
    let inode = visit.change_in_memory(|table| Ok(table.create_orphan(id, attributes)))?;
    Ok((inode, make_volume(visit, inode, id, b"/ (a file without a name)")?))
}

fn make_volume(
    visit: &Visit,
    inode: u64,
    id: postern_trusted::directory::FileId,
    path: &[u8],
) -> Result<Arc<OpenVolume>, Errno> {
    let family = family::family().ok_or(Errno::EIO)?;
    let path = format!("{}{}", visit.directory.config.guest_path, String::from_utf8_lossy(path));
    let made = family.acquire_file(&visit.wanted(inode, Some((id, path)))?);
    let made = made.and_then(|volume| {
        // One that is lost by now is as good as not made.
        let Some(core) = volume.standing().core() else {
            crate::runtime::close_volume(&volume);
            return Err(Errno::EIO);
        };
        let file = HostFile { handle: core.handle, blocks: core.host_blocks };
        visit.directory.born(inode, file);
        Ok(volume)
    });
    if made.is_err() {
        // Nothing was made: only the orphan is to be forgotten.
        let _ = visit.change_in_memory(|table| {
            table.forget(inode);
            Ok(())
        });
    }
    made
}

/// truncate(2).
///
/// # Errors
/// As truncate(2) on ext4.
pub fn truncate(place: &Place, length: u64) -> Result<(), Errno> {
    let visit = number(place.directory)?.visit(true)?;
    let inode = visit.read(|table| {
        let inode = resolve(table, Caller::now(), &place.path)?;
        let node = table.node(inode).ok_or(Errno::ENOENT)?;
        if node.is_directory() {
            return Err(Errno::EISDIR);
        }
        if place.slash {
            return Err(Errno::ENOTDIR);
        }
        Caller::now().may(&node.attributes, false, libc::W_OK).map(|()| inode)
    })??;
    let family = family::family().ok_or(Errno::EIO)?;
    let volume = family.acquire_file(&visit.wanted(inode, None)?)?;
    let resized = volume.resize(length);
    crate::runtime::close_volume(&volume);
    crate::runtime::settle(volume.index);
    resized
}
