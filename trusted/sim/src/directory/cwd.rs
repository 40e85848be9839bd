//! The working directory, while it is in a protected directory.
//!
//! The kernel cannot be there: it is parked in a directory of /proc where nothing can be made and
//! hardly a name exists, so that a path that is resolved behind our back finds nothing instead of
//! making a plain file elsewhere. The word about it passes to a new program image in the
//! environment ([`VARIABLE`]), which counts only while the kernel is still parked.
//!
//! Holds: where a vfork child goes does not move its parent, in whose memory it is. Does not hold:
//! of two such children at once only the one that went last is known.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use postern_trusted::{errno::Errno, sync::Lock};

use crate::{guest::PATH_ROOM, identity, sys};

/// Environment variable that hands the working directory to a new program image.
pub const VARIABLE: &str = "POSTERN_CWD";
/// Where the kernel is parked; the second where the first is not to be had.
const PARKING: [&core::ffi::CStr; 2] = [c"/proc/self/map_files", c"/proc/self/fdinfo"];

struct Here {
    path: [u8; PATH_ROOM],
    length: usize,
}

impl Here {
    const fn new() -> Self {
        Self { path: [0; PATH_ROOM], length: 0 }
    }
}

/// Whether [`HERE`] holds a path. Private to the process, as is the path.
static INSIDE: AtomicBool = AtomicBool::new(false);
static HERE: Lock<Here> = Lock::new(Here::new());

/// The vfork child that went somewhere, or 0; where it is, an empty path outside.
static CHILD: AtomicU32 = AtomicU32::new(0);
static CHILDS: Lock<Here> = Lock::new(Here::new());

/// The working directory, if it is in a protected directory: its length in `out`.
#[must_use]
pub fn get(out: &mut [u8]) -> Option<usize> {
    let (inside, child) = (INSIDE.load(Ordering::Acquire), CHILD.load(Ordering::Acquire));
    if !inside && child == 0 {
        return None;
    }
    let here = if child != 0 && child == sys::getpid() {
        &CHILDS
    } else if inside {
        &HERE
    } else {
        return None;
    };
    let here = here.lock();
    out.get_mut(..here.length)?.copy_from_slice(&here.path[..here.length]);
    Some(here.length).filter(|length| *length > 0)
}

/// Whether the working directory is in a protected directory.
#[must_use]
pub fn is_inside() -> bool {
    let mut room = [0; PATH_ROOM];
    get(&mut room).is_some()
}

/// Goes to `path` (absolute, in a protected directory, looked up already).
///
/// # Errors
/// `ENAMETOOLONG`; what parking the kernel says.
pub fn enter(path: &[u8]) -> Result<(), Errno> {
    if path.len() >= PATH_ROOM {
        return Err(Errno::ENAMETOOLONG);
    }
    if !is_inside() {
        PARKING.into_iter().map(sys::chdir).find(Result::is_ok).unwrap_or(Err(Errno::EACCES))?;
    }
    set(path);
    Ok(())
}

/// The calling process, if it is a vfork child.
fn child() -> Option<u32> {
    let me = sys::getpid();
    (me != identity::process_id()).then_some(me)
}

fn set(path: &[u8]) {
    let child = child();
    let mut here = if child.is_some() { CHILDS.lock() } else { HERE.lock() };
    here.path[..path.len()].copy_from_slice(path);
    here.length = path.len();
    match child {
        Some(child) => CHILD.store(child, Ordering::Release),
        None => INSIDE.store(true, Ordering::Release),
    }
}

/// The kernel has gone to an ordinary directory.
pub fn leave() {
    match child() {
        Some(child) => {
            CHILDS.lock().length = 0;
            CHILD.store(child, Ordering::Release);
        }
        None => INSIDE.store(false, Ordering::Release),
    }
}

/// At the start of a program image: takes over what [`VARIABLE`] says, if the kernel is parked.
pub fn inherit(path: &[u8]) {
    let mut room = [0; PATH_ROOM];
    let kernel = sys::getcwd(&mut room).ok().and_then(|length| room.get(..length));
    let parked = kernel.is_some_and(|kernel| {
        kernel.starts_with(b"/proc/")
            && (kernel.ends_with(b"/map_files") || kernel.ends_with(b"/fdinfo"))
    });
    if parked && path.len() < PATH_ROOM && super::find(path, true).is_some() {
        set(path);
    }
}

/// Keeps the path still while the process forks.
pub(crate) fn fork_prepare() {
    core::mem::forget(HERE.lock());
    core::mem::forget(CHILDS.lock());
}

/// The other end of [`fork_prepare`], in both processes.
#[allow(unsafe_code)]
pub(crate) fn fork_done() {
    // SAFETY: locked by `fork_prepare` in this thread (or its copy).
    unsafe { HERE.force_unlock() };
    // SAFETY: as above.
    unsafe { CHILDS.force_unlock() };
    // A vfork child of the parent's had this number before.
    let _ = CHILD.compare_exchange(sys::getpid(), 0, Ordering::AcqRel, Ordering::Relaxed);
}
