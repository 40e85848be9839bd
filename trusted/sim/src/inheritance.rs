//! What a program leaves to the next one at exec: the family's arena, and open protected files.
//!
//! A placeholder descriptor that stays open across exec carries the number of its open file in its
//! name; the new program looks through its descriptors and finds the open files in the arena, with
//! position, flags and locks as they are. In between no descriptor table counts them: a `Lease`
//! of the process that execs keeps them alive, and the daemon's session with them.
//!
//! Holds: an open file is found by a number that is never used twice, so a stale placeholder leads
//! nowhere, never to another file.
//! Does not hold: a program that does not take the library (static, or with LD_PRELOAD taken out of
//! its environment) gets descriptors that answer `EBADF`; one that is executed by a raw system call
//! leaves a reference behind until the family ends.

use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use postern_trusted::{errno::Errno, sync::Lock};

use crate::{
    family::family,
    files::{self, OpenFile, placeholder},
    identity,
    mapped::areas::{self, Hold},
    message, process, sys,
};

/// The family's open files by number, and what is on its way through an exec.
pub struct Inheritance {
    next: AtomicU64,
    files: Lock<BTreeMap<u64, Weak<OpenFile>>>,
    leases: Lock<Vec<Lease>>,
}

/// References of a process that is becoming another program.
struct Lease {
    process: u32,
    files: Vec<Arc<OpenFile>>,
    /// Of its mappings, which end with the exec.
    holds: Vec<Arc<Hold>>,
    /// The connection to the daemon that keeps the session until the new program has one, or -1.
    connection: i32,
}

impl Drop for Lease {
    fn drop(&mut self) {
        core::mem::take(&mut self.holds).into_iter().for_each(areas::release);
        // What closes a volume comes last.
        drop(core::mem::take(&mut self.files));
    }
}

/// A connection that this program was left, until it has one of its own; -1 is none.
static LEFT: AtomicI32 = AtomicI32::new(-1);

impl Default for Inheritance {
    fn default() -> Self {
        Self::new()
    }
}

impl Inheritance {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            next: AtomicU64::new(1),
            files: Lock::new(BTreeMap::new()),
            leases: Lock::new(Vec::new()),
        }
    }

    /// A number for a new open file.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes an open file under its number.
    pub fn enter(&self, number: u64, file: &Arc<OpenFile>) {
        self.files.lock().insert(number, Arc::downgrade(file));
    }

    /// The open file of this number is gone.
    pub fn strike(&self, number: u64) {
        let gone = self.files.lock().remove(&number);
        drop(gone);
    }

    fn find(&self, number: u64) -> Option<Arc<OpenFile>> {
        self.files.lock().get(&number).and_then(Weak::upgrade)
    }

    /// Takes out the leases of `process` and of all processes that have died.
    fn take(&self, process: u32) -> Vec<Lease> {
        let ends = |lease: &Lease| lease.process == process || !identity::is_alive(lease.process);
        let mut leases = self.leases.lock();
        let (taken, kept) = core::mem::take(&mut *leases).into_iter().partition(ends);
        *leases = kept;
        taken
    }
}

/// Calls `each` with every descriptor of the process that is a memory file, and the file's name.
/// Allocates nothing.
fn for_each_memory_file(mut each: impl FnMut(i32, &[u8])) -> Result<(), Errno> {
    const PREFIX: &[u8] = b"/memfd:";
    message::for_each_name(c"/proc/self/fd", |name| {
        let mut visit = || {
            let fd = core::str::from_utf8(name).ok()?.parse::<i32>().ok()?;
            let (mut link, mut target) = ([0; 32], [0; 128]);
            let path = placeholder::own_path(fd, &mut link).ok()?;
            let length = sys::readlink(path, &mut target).ok()?;
            each(fd, target.get(..length)?.strip_prefix(PREFIX)?);
            Some(())
        };
        visit();
    })
}

/// The descriptor of a memory file called `name` that this program was left.
#[must_use]
pub fn find_memory(name: &[u8]) -> Option<i32> {
    let mut found = None;
    let seen = for_each_memory_file(|fd, file| {
        if file.strip_prefix(name).is_some_and(|rest| rest == b" (deleted)") {
            found = Some(fd);
        }
    });
    seen.ok().and(found)
}

/// Takes over what the program before exec left: called once, before anything else is opened.
pub fn adopt() {
    let Some(family) = family() else { return };
    let inheritance = &family.inheritance;
    // A directory that cannot be read leaves the placeholders as they are: EBADF.
    let _ = for_each_memory_file(|fd, name| {
        if let Some(file) = placeholder::number_in(name).and_then(|n| inheritance.find(n)) {
            files::adopt(fd, file);
        }
    });
    for lease in inheritance.take(identity::process_id()) {
        let connection = lease.connection;
        if connection >= 0 {
            let _ = sys::fcntl(connection, libc::F_SETFD, libc::FD_CLOEXEC as usize);
            files::mark_internal(connection);
            LEFT.store(connection, Ordering::Relaxed);
        }
        // Last: giving a file back may close its volume, over that connection.
        drop(lease);
    }
}

/// This program has a connection of its own.
pub fn connected() {
    let left = LEFT.swap(-1, Ordering::Relaxed);
    if left >= 0 {
        files::close_internal(left);
    }
}

/// Just before exec, also in a vfork child: keeps `files` alive for the next program, and the
/// session with the daemon. Nothing may make a connection afterwards.
pub fn hand_over(files: Vec<Arc<OpenFile>>, holds: Vec<Arc<Hold>>) {
    let Some(family) = family() else { return };
    if files.is_empty() && holds.is_empty() {
        return;
    }
    let own = process::known().and_then(process::Process::linked).map(|link| link.socket());
    let connection = own.unwrap_or_else(|| LEFT.load(Ordering::Relaxed));
    if connection >= 0 {
        let _ = sys::fcntl(connection, libc::F_SETFD, 0);
    }
    let lease = Lease { process: sys::getpid(), files, holds, connection };
    family.inheritance.leases.lock().push(lease);
}

/// After an exec that failed, in the process itself or its vfork child.
pub fn after_failed_exec() {
    let Some(family) = family() else { return };
    let me = sys::getpid();
    if me == identity::process_id() {
        let _ = for_each_memory_file(|fd, name| {
            if let Some(number) = placeholder::number_in(name)
                && files::kind(fd) == files::Kind::Other
                && let Some(file) = family.inheritance.find(number)
            {
                files::adopt(fd, file);
            }
        });
    }
    for mut lease in family.inheritance.take(me) {
        if lease.process == me && me == identity::process_id() {
            areas::take_back(core::mem::take(&mut lease.holds));
        }
        if lease.connection >= 0 {
            let _ = sys::fcntl(lease.connection, libc::F_SETFD, libc::FD_CLOEXEC as usize);
        }
    }
}

/// References for a child that the C library makes and starts by itself (posix_spawn), until
/// [`Spawn::made`].
pub struct Spawn(Vec<Arc<OpenFile>>);

impl Spawn {
    /// Before the call: all open files, as file actions may let any of them through.
    #[must_use]
    pub fn begin() -> Self {
        Self(files::all())
    }

    /// The child runs: it has the references from now on.
    pub fn made(self, child: u32) {
        if let Some(family) = family()
            && !self.0.is_empty()
        {
            let lease = Lease { process: child, files: self.0, holds: Vec::new(), connection: -1 };
            family.inheritance.leases.lock().push(lease);
        }
    }
}

/// At exit: what was meant for this process, or for one that has died, is given back.
pub fn settle() {
    if let Some(family) = family() {
        drop(family.inheritance.take(identity::process_id()));
    }
}
