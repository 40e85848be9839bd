//! The working directory, while it is in a protected directory.
//!
//! The kernel cannot be there: it is parked in a directory of /proc where nothing can be made and
//! hardly a name exists, so that a path that is resolved behind our back finds nothing instead of
//! making a plain file elsewhere. The word about it passes to a new program image in the
//! environment ([`VARIABLE`]), which counts only while the kernel is still parked.

use core::sync::atomic::{AtomicBool, Ordering};

use postern_trusted::{errno::Errno, sync::Lock};

use crate::{guest::PATH_ROOM, sys};

/// Environment variable that hands the working directory to a new program image.
pub const VARIABLE: &str = "POSTERN_CWD";
/// Where the kernel is parked; the second where the first is not to be had.
const PARKING: [&core::ffi::CStr; 2] = [c"/proc/self/map_files", c"/proc/self/fdinfo"];

struct Here {
    path: [u8; PATH_ROOM],
    length: usize,
}

/// Whether [`HERE`] holds a path. Private to the process, as is the path.
static INSIDE: AtomicBool = AtomicBool::new(false);
static HERE: Lock<Here> = Lock::new(Here { path: [0; PATH_ROOM], length: 0 });

/// The working directory, if it is in a protected directory: its length in `out`.
#[must_use]
pub fn get(out: &mut [u8]) -> Option<usize> {
    if !INSIDE.load(Ordering::Acquire) {
        return None;
    }
    let here = HERE.lock();
    out.get_mut(..here.length)?.copy_from_slice(&here.path[..here.length]);
    Some(here.length)
}

/// Goes to `path` (absolute, in a protected directory, looked up already).
///
/// # Errors
/// `ENAMETOOLONG`; what parking the kernel says.
pub fn enter(path: &[u8]) -> Result<(), Errno> {
    if path.len() >= PATH_ROOM {
        return Err(Errno::ENAMETOOLONG);
    }
    if !INSIDE.load(Ordering::Acquire) {
        PARKING.into_iter().map(sys::chdir).find(Result::is_ok).unwrap_or(Err(Errno::EACCES))?;
    }
    set(path);
    Ok(())
}

fn set(path: &[u8]) {
    let mut here = HERE.lock();
    here.path[..path.len()].copy_from_slice(path);
    here.length = path.len();
    INSIDE.store(true, Ordering::Release);
}

/// The kernel has gone to an ordinary directory.
pub fn leave() {
    INSIDE.store(false, Ordering::Release);
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
}

/// The other end of [`fork_prepare`], in both processes.
#[allow(unsafe_code)]
pub(crate) fn fork_done() {
    // SAFETY: locked by `fork_prepare` in this thread (or its copy).
    unsafe { HERE.force_unlock() };
}
