//! How a process reaches the memory file of a mapped file: by a descriptor of its own.
//!
//! Who makes the memory file has its descriptor, and a forked child inherits it; any other process
//! of the family opens it through a process that has it (`/proc/PID/fd`). The table is private to
//! the process and copied by fork.
//!
//! Holds: a descriptor stays open while somebody uses it ([`Reached`]) and for as long as the file
//! is mapped by the family; what is found at another process is used only if it is the same file.
#![allow(unsafe_code)]

use std::io::Write as _;

use core::ffi::CStr;

use postern_trusted::{errno::Errno, sync::Lock};

use super::{content::Content, memory};
use crate::{family, files, identity, process, sys};

/// Most files that one process has mapped, or uses while others have.
const MOST: usize = 1024;

#[derive(Clone, Copy)]
struct Slot {
    /// The content's number; 0 is none.
    number: u64,
    fd: i32,
    /// [`Reached`]s.
    users: u32,
}

const EMPTY: Slot = Slot { number: 0, fd: -1, users: 0 };

static SLOTS: Lock<[Slot; MOST]> = Lock::new([EMPTY; MOST]);

/// A descriptor in use.
pub struct Reached {
    /// The descriptor.
    pub fd: i32,
    at: usize,
}

impl Drop for Reached {
    fn drop(&mut self) {
        let mut slots = SLOTS.lock();
        slots[self.at].users = slots[self.at].users.saturating_sub(1);
    }
}

/// Why a memory file is out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// No process has it any more: all that mapped the file were killed.
    Gone,
    /// The host does not let this process at it.
    Refused,
}

impl From<Lost> for Errno {
    fn from(_: Lost) -> Self {
        Self::EIO
    }
}

fn use_slot(number: u64) -> Option<Reached> {
    let mut slots = SLOTS.lock();
    let at = slots.iter().position(|slot| slot.number == number)?;
    slots[at].users += 1;
    Some(Reached { fd: slots[at].fd, at })
}

/// Whether this process has the memory file of this number.
#[must_use]
pub fn has(number: u64) -> bool {
    SLOTS.lock().iter().any(|slot| slot.number == number)
}

/// Keeps a descriptor of the memory file of this number.
///
/// # Errors
/// `ENOMEM`: the table is full; the descriptor is closed.
pub fn keep(number: u64, fd: i32) -> Result<Reached, Errno> {
    let fd = process::keep(fd);
    let kept = {
        let mut slots = SLOTS.lock();
        // Another thread may have been faster.
        let known = slots.iter().any(|slot| slot.number == number);
        let free = if known { None } else { slots.iter().position(|slot| slot.number == 0) };
        free.map(|at| {
            slots[at] = Slot { number, fd, users: 1 };
            Reached { fd, at }
        })
    };
    match kept {
        Some(reached) => Ok(reached),
        None => {
            files::close_internal(fd);
            use_slot(number).ok_or(Errno::ENOMEM)
        }
    }
}

/// The descriptor of a content's memory file.
///
/// # Errors
/// [`Lost`].
pub fn reach(content: &Content) -> Result<Reached, Lost> {
    if let Some(reached) = use_slot(content.number) {
        return Ok(reached);
    }
    let mut refused = false;
    for (holder, fd) in content.holders() {
        match open_at(holder, fd, content.node) {
            Ok(own) => {
                let reached = keep(content.number, own).map_err(|_| Lost::Refused)?;
                content.hold(identity::process_id(), reached.fd);
                return Ok(reached);
            }
            Err(errno) if errno == Errno::ENOENT || !identity::is_alive(holder) => {
                content.unhold(holder);
            }
            Err(_) => refused = true,
        }
    }
    Err(if refused { Lost::Refused } else { Lost::Gone })
}

/// Opens what process `holder` has at `fd`, if it is the file `node`.
fn open_at(holder: u32, fd: i32, node: (u64, u64)) -> Result<i32, Errno> {
    let mut path = [0; 64];
    let mut room = &mut path[..63];
    write!(room, "/proc/{holder}/fd/{fd}").map_err(|_| Errno::ENOENT)?;
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| Errno::ENOENT)?;
    // Not to wake a device or wait for a pipe that has the number by now.
    let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let looked = sys::open(path, libc::O_PATH | libc::O_CLOEXEC)?;
    let same = memory::node(looked) == Ok(node);
    let _ = sys::close(looked);
    if !same {
        return Err(Errno::ENOENT);
    }
    let opened = sys::open(path, flags)?;
    if memory::node(opened) == Ok(node) {
        return Ok(opened);
    }
    let _ = sys::close(opened);
    Err(Errno::ENOENT)
}

/// Closes descriptors that are in nobody's use and whose number is not among the `living`.
pub fn sweep(living: &[u64]) {
    loop {
        let found = {
            let mut slots = SLOTS.lock();
            let dead = |slot: &&mut Slot| {
                slot.number != 0 && slot.users == 0 && !living.contains(&slot.number)
            };
            slots.iter_mut().find(dead).map(|slot| core::mem::replace(slot, EMPTY).fd)
        };
        match found {
            Some(fd) => files::close_internal(fd),
            None => return,
        }
    }
}

/// Keeps the table still while the process forks.
pub fn fork_prepare() {
    core::mem::forget(SLOTS.lock());
}

/// The other end of [`fork_prepare`], in the parent.
pub fn fork_parent() {
    // SAFETY: locked by `fork_prepare` in this thread.
    unsafe { SLOTS.force_unlock() };
}

/// The other end of [`fork_prepare`], in the child: others find the memory files with it too.
pub fn fork_child() {
    // SAFETY: locked by `fork_prepare` in the thread that this one is a copy of.
    unsafe { SLOTS.force_unlock() };
    // Of threads that are the parent's.
    SLOTS.lock().iter_mut().for_each(|slot| slot.users = 0);
    offer();
}

/// Others find the memory files with this process.
pub fn offer() {
    for_each(|content, fd| content.hold(identity::process_id(), fd));
}

/// Others do not find the memory files with this process any more: it ends.
pub fn withdraw() {
    for_each(|content, _| content.unhold(identity::process_id()));
}

/// Whether another process has the memory file.
pub fn is_held_elsewhere(content: &Content) -> bool {
    let me = identity::process_id();
    content.holders().into_iter().filter(|(holder, _)| *holder != me).any(|(holder, fd)| {
        open_at(holder, fd, content.node).is_ok_and(|opened| sys::close(opened).is_ok())
    })
}

/// Calls `each` with the contents whose memory files this process has, and their descriptors.
fn for_each(each: impl Fn(&Content, i32)) {
    let mut from = 0;
    while let Some((at, slot)) = next_used(from) {
        from = at + 1;
        let Some(family) = family::family() else { return };
        let contents = family.open_volumes().filter_map(|volume| volume.content());
        for content in contents.filter(|content| content.number == slot.number) {
            each(&content, slot.fd);
        }
    }
}

fn next_used(from: usize) -> Option<(usize, Slot)> {
    let slots = SLOTS.lock();
    (from..MOST).find(|&at| slots[at].number != 0).map(|at| (at, slots[at]))
}
