//! Standing with the daemon: the family's session, and its coming over to another daemon when that
//! one has ended.
//!
//! One process makes the session anew: it opens all host files under the handles that they had,
//! and looks whether each volume is still as the family left it, over a small lane of its own. A
//! host file that cannot be had again, or that somebody else has opened for writing meanwhile, is
//! lost as a lease is lost. The other processes then join, and each hands over what it has in
//! flight ([`Link::mend`](crate::link::Link::mend)).
//!
//! A hung-up connection means that the daemon's process has ended, or has drained the lane and
//! unmapped it: nothing of it can still be on its way to the host file. (The kernel drains a dying
//! process's native AIO, and its threads come back from what they wait for, before its sockets
//! close; the lock on a host file is free only when no request holds the file.) A daemon that hangs
//! up and goes on all the same is a hostile host like any other.
//!
//! Holds: at most one process makes the session; nothing that was in flight reaches a new daemon
//! before the host file was looked at; a handle never means another file than before.

use core::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    sync::Arc,
};

use postern_edl::{
    calls::{
        CallError, Enclave, PosternAttachRequest, PosternAttached, PosternCloseRequest,
        PosternOpenRequest,
    },
    port::Geometry,
};
use postern_trusted::{
    directory::INDEX_NAME,
    disk::BLOCK,
    errno::Errno,
    port::{Lane, MAX_TRANSFER_BLOCKS, Sleeper},
};

use crate::{
    config,
    control::Connection,
    family::{Family, host_files::HostFile, standing::Core},
    files, identity,
    link::{LIMITS, OTHER_VERSION, Port, reason},
    process::{SimPlatform, keep},
    sys, wait,
};

/// How long a new daemon is asked again for a host file that somebody has: the kernel may be at
/// work on the end of the one before.
const RELEASED_WITHIN_NS: u64 = 2_000_000_000;
/// Requests in flight of the lane that looks.
const SCOUT_ENTRIES: usize = 16;
/// How long a scout sleeps before it looks whether its daemon is there, nanoseconds.
const MOMENT_NS: u64 = 20_000_000;
/// A daemon's refusals of a session that it does not know, and of another family's.
const ESTALE: u32 = Errno::ESTALE.0.unsigned_abs();
const EACCES: u32 = Errno::EACCES.0.unsigned_abs();

/// How the family stands with the daemon.
#[derive(Clone, Copy, Debug, Default)]
pub struct Footing {
    /// Sessions that were made so far.
    pub incarnation: u64,
    session: Session,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Session {
    /// There is none.
    #[default]
    None,
    /// This one; a lane joins with the token.
    Known { number: u64, token: [u64; 2] },
    /// Being made by this process.
    Made(u32),
}

/// Why there is no lane. It may be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// No daemon answers.
    NoDaemon(Errno),
    /// Another process makes the session.
    Later,
    /// There is no room for a lane, or the daemon refuses: what and why.
    Refused(String),
    /// The same where the daemon will not answer otherwise soon: a limit, another version.
    AtLimit(String),
}

/// A lane that is attached.
pub struct Joined {
    /// The control connection.
    pub control: Enclave<Connection>,
    /// What the daemon said.
    pub attached: PosternAttached,
    /// The session's number among the family's.
    pub incarnation: u64,
}

/// A call that was not answered, or refused.
fn missed(error: &CallError<Errno>, call: &str) -> Missed {
    match error {
        CallError::Carrier(errno) => Missed::NoDaemon(*errno),
        CallError::Refused(errno) if LIMITS.contains(errno) => {
            Missed::AtLimit(format!("{call}: {}", reason(error)))
        }
        error => Missed::Refused(format!("{call}: {}", reason(error))),
    }
}

/// Attaches `port` to the family's session, which is made if there is none.
///
/// # Errors
/// [`Missed`].
pub fn join(family: &'static Family, port: &Port) -> Result<Joined, Missed> {
    let me = identity::process_id();
    loop {
        let Footing { incarnation, session } = *family.footing.lock();
        match session {
            Session::Known { number, token } => {
                match attach(family, port, (number, token)) {
                    // A daemon that does not know it: the one before has ended.
                    Err(CallError::Refused(ESTALE | EACCES)) => {}
                    Err(error) => return Err(missed(&error, "attach")),
                    Ok((control, attached)) => {
                        return Ok(Joined { control, attached, incarnation });
                    }
                }
            }
            Session::None => {}
            Session::Made(by) if by == me || !identity::is_alive(by) => {}
            Session::Made(_) => return Err(Missed::Later),
        }
        let mine = {
            let mut footing = family.footing.lock();
            let unchanged = footing.incarnation == incarnation && footing.session == session;
            if unchanged {
                footing.session = Session::Made(me);
            }
            unchanged
        };
        if !mine {
            continue;
        }
        let made = make(family, port, incarnation + 1);
        if made.is_err() {
            family.footing.lock().session = Session::None;
        }
        return made;
    }
}

/// Makes a session, with all that the family had open in the one before.
fn make(family: &'static Family, port: &Port, incarnation: u64) -> Result<Joined, Missed> {
    let handles = family.host_files.highest();
    let known = |attached: &PosternAttached| Footing {
        incarnation,
        session: Session::Known { number: attached.session, token: attached.token },
    };
    let not_attached = |error| missed(&error, "attach");
    if family.host_files.all().is_empty() {
        let (control, attached) = attach_new(family, port, handles).map_err(not_attached)?;
        *family.footing.lock() = known(&attached);
        return Ok(Joined { control, attached, incarnation });
    }
    let mut scout = Scout::attach(family, handles)?;
    // What was being opened when the first look began may be in memory when it ends.
    while scout.take_back(family)? {}
    let session = (scout.attached.session, scout.attached.token);
    let (control, attached) = attach(family, port, session).map_err(not_attached)?;
    *family.footing.lock() = known(&scout.attached);
    // From here on who opens something sees that the daemon is another one.
    scout.take_back(family)?;
    let kept: BTreeSet<u32> = family.host_files.all().iter().map(|file| file.handle).collect();
    for handle in core::mem::take(&mut scout.opened).difference(&kept) {
        scout.close(*handle);
    }
    for &handle in &scout.lost {
        family.has_lost(handle, "somebody else had the volume while there was no daemon");
    }
    Ok(Joined { control, attached, incarnation })
}

/// A lane at the daemon; a daemon that is not there is a carrier that fails.
type Attempt = Result<(Enclave<Connection>, PosternAttached), CallError<Errno>>;

fn attach(family: &Family, port: &Port, (session, token): (u64, [u64; 2])) -> Attempt {
    attach_by(family, port, PosternAttachRequest { session, token, ..request(port) })
}

fn attach_new(family: &Family, port: &Port, handles: u32) -> Attempt {
    attach_by(family, port, PosternAttachRequest { handles, ..request(port) })
}

fn request(port: &Port) -> PosternAttachRequest {
    PosternAttachRequest {
        version: postern_edl::VERSION,
        features: postern_edl::FEATURE_DISCARD | postern_edl::FEATURE_TELL,
        port_bytes: port.bytes as u64,
        ..PosternAttachRequest::default()
    }
}

fn attach_by(family: &Family, port: &Port, request: PosternAttachRequest) -> Attempt {
    let path = family.config.socket.as_bytes();
    let mut connection = Connection::open(path).map_err(CallError::Carrier)?;
    connection.move_descriptor(keep);
    let [bell, driver, service] = port.bells;
    connection.send_beside([port.memory, bell, driver, service]);
    let mut control = Enclave(connection);
    let attached = match control.postern_attach(&request) {
        Ok(reply) if reply.attached.version != postern_edl::VERSION => {
            Err(CallError::Refused(OTHER_VERSION))
        }
        other => other,
    };
    match attached {
        Ok(reply) => Ok((control, reply.attached)),
        Err(error) => {
            files::forget_internal(control.0.descriptor());
            Err(error)
        }
    }
}

/// A small lane that looks at host files before anything else reaches them. Its descriptors and its
/// memory go with it.
struct Scout {
    port: Port,
    /// Until it is dropped.
    lane: Option<Lane>,
    control: Enclave<Connection>,
    attached: PosternAttached,
    /// Handles that the daemon has opened again.
    opened: BTreeSet<u32>,
    /// How often it was told to, by handle.
    opens: BTreeMap<u32, u32>,
    /// Those that could not be had, or were changed.
    lost: BTreeSet<u32>,
    /// Directories whose index is as the family left it.
    indexes: BTreeSet<usize>,
    until_ns: u64,
}

impl Scout {
    fn attach(family: &Family, handles: u32) -> Result<Self, Missed> {
        let least = MAX_TRANSFER_BLOCKS * BLOCK;
        let made = Geometry::new(SCOUT_ENTRIES, least)
            .ok_or(Errno::EINVAL)
            .and_then(|geometry| Port::make(geometry, keep));
        let (port, lane) = made.map_err(|errno| Missed::Refused(format!("no lane: {errno}")))?;
        match attach_new(family, &port, handles) {
            Ok((control, attached)) => Ok(Self {
                port,
                lane: Some(lane),
                control,
                attached,
                opened: BTreeSet::new(),
                opens: BTreeMap::new(),
                lost: BTreeSet::new(),
                indexes: BTreeSet::new(),
                until_ns: wait::now_ns() + RELEASED_WITHIN_NS,
            }),
            Err(error) => {
                port.discard(lane);
                Err(missed(&error, "attach"))
            }
        }
    }

    /// Opens what the family has open and is neither opened nor lost yet, volumes before the files
    /// of directories, and looks at it. Answers whether there was anything.
    fn take_back(&mut self, family: &Family) -> Result<bool, Missed> {
        let directory_of = |file: &HostFile| {
            let mut all = family.directories.iter();
            all.position(|directory| {
                let rest = file.name.strip_prefix(directory.config.name.as_str());
                rest.is_some_and(|rest| rest.starts_with('/'))
            })
        };
        let is_index = |file: &HostFile| file.name.ends_with(&format!("/{INDEX_NAME}"));
        let mut all = family.host_files.all();
        all.retain(|file| ![&self.opened, &self.lost].iter().any(|s| s.contains(&file.handle)));
        let (members, volumes): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|file| directory_of(file).is_some() && !is_index(file));
        let mut any = !members.is_empty();
        for file in volumes {
            // One that is only being opened: who does begins anew when its requests fail.
            let Some(core) = file.core.upgrade() else { continue };
            any = true;
            let kept = self.open(&file)? && self.look_at(&core)?;
            self.note(file.handle, kept);
            if let Some(directory) = directory_of(&file).filter(|_| kept) {
                self.indexes.insert(directory);
            }
        }
        for file in members {
            // Nobody opens a directory's file who does not have its index.
            let index = directory_of(&file).is_some_and(|number| self.indexes.contains(&number));
            let kept = index && self.open(&file)?;
            self.note(file.handle, kept);
        }
        Ok(any)
    }

    /// Whether a volume is still as the family left it.
    fn look_at(&self, core: &Core) -> Result<bool, Missed> {
        let Some(lane) = &self.lane else { return Ok(false) };
        let file = lane.file(core.handle, core.host_blocks, Arc::new(SimPlatform));
        Ok(matches!(self.wait_on(lane, core.volume.is_undisturbed(&file))?, Ok(true)))
    }

    fn note(&mut self, handle: u32, kept: bool) {
        if kept {
            self.opened.insert(handle);
        } else {
            self.close(handle);
            self.lost.insert(handle);
        }
    }

    /// Opens a host file under its handle; `false` if it cannot be had.
    fn open(&mut self, file: &HostFile) -> Result<bool, Missed> {
        let HostFile { name, handle, flags, .. } = file;
        let request = PosternOpenRequest { name: name.clone(), flags: *flags, handle: *handle };
        let mut opens = 0;
        while opens < file.opens {
            match self.control.postern_open(&request) {
                Ok(reply) if reply.file.handle == *handle => {
                    opens += 1;
                    *self.opens.entry(*handle).or_default() += 1;
                }
                Ok(_) => return Ok(false),
                Err(CallError::Refused(errno))
                    if errno == Errno::EBUSY.0.unsigned_abs() && wait::now_ns() < self.until_ns =>
                {
                    sys::nap();
                }
                Err(CallError::Refused(_)) => return Ok(false),
                Err(error) => return Err(missed(&error, "open")),
            }
        }
        Ok(true)
    }

    fn close(&mut self, handle: u32) {
        // As often as it was opened, whatever the daemon says; one that has gone has closed it.
        for _ in 0..self.opens.remove(&handle).unwrap_or_default() {
            let _ = self.control.postern_close(&PosternCloseRequest { handle });
        }
    }

    /// Runs `future`, which waits for nothing but this lane.
    fn wait_on<F: Future>(&self, lane: &Lane, future: F) -> Result<F::Output, Missed> {
        let mut future = pin!(future);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return Ok(output);
            }
            if lane.poll(SCOUT_ENTRIES) > 0 {
                continue;
            }
            lane.sleep(Sleeper::Driver, MOMENT_NS);
            if wait::has_hung_up(self.control.0.descriptor()) && !lane.needs_drive() {
                return Err(Missed::NoDaemon(Errno::ECONNRESET));
            }
        }
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            self.port.discard(lane);
        }
        // Its own drop closes it.
        files::forget_internal(self.control.0.descriptor());
    }
}

impl Family {
    /// Sessions that were made so far: changes when the family has come over to another daemon.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.footing.lock().incarnation
    }

    /// Whether another daemon may come when one has ended.
    #[must_use]
    pub fn may_have_successor(&self) -> bool {
        let Some(launcher) = self.config.launcher else { return true };
        let beside = self.config.socket.rsplit_once('/').map_or("", |(directory, _)| directory);
        let run_file = CString::new(format!("{beside}/{}", config::RUN_FILE));
        identity::is_alive(launcher) && run_file.is_ok_and(|path| sys::exists(&path))
    }
}
