//! The working directory: chdir, getcwd, realpath.

use core::ffi::{c_char, c_int};

use postern_sim::{
    directory::{self, Place, cwd},
    files, guest,
};
use postern_trusted::errno::Errno;

use crate::{
    guest_paths,
    next::{Next, answer, export},
};

const HERE: c_int = libc::AT_FDCWD;

/// Absolute path of a place.
fn path_of(place: &Place) -> Result<Vec<u8>, Errno> {
    let holder = directory::number(place.directory)?;
    Ok([holder.config.guest_path.as_bytes(), &place.path].concat())
}

fn go(place: &Place) -> Result<c_int, Errno> {
    directory::check_search(place)?;
    cwd::enter(&path_of(place)?).map(|()| 0)
}

/// The kernel goes somewhere: a relative path counts from a protected working directory.
fn go_elsewhere(path: *const c_char, next: impl FnOnce() -> c_int) -> c_int {
    if !cwd::is_inside() {
        return next();
    }
    type Call = unsafe extern "C" fn(*const c_char) -> c_int;
    static NEXT: Next = Next::new(c"chdir");
    let outward = guest_paths::outward(HERE, path);
    let gone = match (outward, NEXT.find()) {
        // SAFETY: the C function of this name, with a C string that lives through the call.
        (Some(outward), Some(at)) => unsafe {
            let chdir: Call = core::mem::transmute(at);
            chdir(outward.as_ptr())
        },
        _ => next(),
    };
    if gone == 0 {
        cwd::leave();
    }
    gone
}

/// Puts `path` and a NUL to `to`, which has room for `room` bytes; in memory of libc's without one.
fn put_path(path: &[u8], to: *mut c_char, room: usize) -> Result<*mut c_char, Errno> {
    let needed = path.len() + 1;
    let to = if to.is_null() {
        let room = if room == 0 { needed } else { room };
        if room < needed {
            return Err(Errno::ERANGE);
        }
        // SAFETY: takes a number; the caller frees it.
        let made: *mut c_char = unsafe { libc::malloc(room) }.cast();
        if made.is_null() {
            return Err(Errno::ENOMEM);
        }
        made
    } else if room < needed {
        return Err(if room == 0 { Errno::EINVAL } else { Errno::ERANGE });
    } else {
        to
    };
    guest::write(to as u64, path)?;
    guest::write(to as u64 + path.len() as u64, &[0])?;
    Ok(to)
}

/// The working directory, if it is protected.
fn here() -> Option<Vec<u8>> {
    let mut room = [0; guest::PATH_ROOM];
    let length = cwd::get(&mut room)?;
    room.get(..length).map(<[u8]>::to_vec)
}

fn resolved(place: &Place, to: *mut c_char) -> Result<*mut c_char, Errno> {
    directory::stat(place)?;
    let path = path_of(place)?;
    put_path(&path, to, if to.is_null() { 0 } else { libc::PATH_MAX as usize })
}

export! {
    fn [chdir](path: *const c_char) -> c_int, next => match guest_paths::place(HERE, path) {
        Some(place) => answer(|| go(&place)),
        None if guest_paths::find_here(path).is_some() => answer(|| Err(Errno::ENOTDIR)),
        None => go_elsewhere(path, next),
    };
    fn [fchdir](fd: c_int) -> c_int, next => match files::lookup(fd) {
        Some(file) => answer(|| {
            let path = file.listing().ok_or(Errno::ENOTDIR)?.path()?.ok_or(Errno::ENOENT)?;
            go(&directory::find(&path, true).ok_or(Errno::ENOENT)?)
        }),
        None => {
            let gone = next();
            if gone == 0 {
                cwd::leave();
            }
            gone
        }
    };
    fn [getcwd](to: *mut c_char, room: usize) -> *mut c_char, next => match here() {
        Some(path) => answer(|| put_path(&path, to, room)),
        None => next(),
    };
    fn [__getcwd_chk](to: *mut c_char, room: usize, have: usize) -> *mut c_char, next =>
        match here() {
            Some(path) => answer(|| put_path(&path, to, room.min(have))),
            None => next(),
        };
    fn [getwd](to: *mut c_char) -> *mut c_char, next => match here() {
        Some(path) => answer(|| put_path(&path, to, libc::PATH_MAX as usize)),
        None => next(),
    };
    fn [get_current_dir_name]() -> *mut c_char, next => match here() {
        Some(path) => answer(|| put_path(&path, core::ptr::null_mut(), 0)),
        None => next(),
    };
    fn [realpath](path: *const c_char, to: *mut c_char) -> *mut c_char, next =>
        match guest_paths::place(HERE, path) {
            Some(place) => answer(|| resolved(&place, to)),
            None => next(),
        };
    fn [__realpath_chk](path: *const c_char, to: *mut c_char, have: usize) -> *mut c_char, next =>
        match guest_paths::place(HERE, path) {
            Some(place) => answer(|| resolved(&place, to)),
            None => next(),
        };
    fn [canonicalize_file_name](path: *const c_char) -> *mut c_char, next =>
        match guest_paths::place(HERE, path) {
            Some(place) => answer(|| resolved(&place, core::ptr::null_mut())),
            None => next(),
        };
}

/// An environment for a new program image.
pub struct Environment {
    pointers: Vec<*const c_char>,
    /// What the last of them points to.
    _text: std::ffi::CString,
}

impl Environment {
    /// As exec takes it.
    pub fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

/// `given` with the working directory in it; `None` if that is not a protected one, or where
/// `given` cannot be read.
pub fn environment(given: *const *const c_char) -> Option<Environment> {
    const MOST: u64 = 1 << 20;
    let path = here()?;
    let text = [cwd::VARIABLE.as_bytes(), b"=", &path].concat();
    let text = std::ffi::CString::new(text).ok()?;
    let prefix = [cwd::VARIABLE.as_bytes(), b"="].concat();
    let mut pointers = Vec::new();
    for at in 0..MOST {
        if given.is_null() {
            break;
        }
        let entry = guest::read_u64(given as u64 + 8 * at).ok()?;
        if entry == 0 {
            break;
        }
        let mut room = [0; guest::PATH_ROOM];
        // Longer than the room: not ours, which fits.
        let ours = guest::read_path(entry, &mut room).is_ok_and(|text| text.starts_with(&prefix));
        if !ours {
            pointers.push(entry as *const c_char);
        }
    }
    pointers.extend([text.as_ptr(), core::ptr::null()]);
    Some(Environment { pointers, _text: text })
}

/// Puts the working directory into the process's own environment, for children that the C library
/// makes inside itself.
pub fn announce() {
    let Some(path) = here() else { return };
    let text = |bytes: &[u8]| std::ffi::CString::new(bytes).ok();
    if let (Some(name), Some(path)) = (text(cwd::VARIABLE.as_bytes()), text(&path)) {
        // SAFETY: two C strings, which setenv copies; who reads the environment meanwhile races
        // with it as with any setenv.
        unsafe { libc::setenv(name.as_ptr(), path.as_ptr(), 1) };
    }
}

/// At the start of a program image: the working directory that the one before left.
pub fn inherit() {
    let mut name = [0_u8; 32];
    name[..cwd::VARIABLE.len()].copy_from_slice(cwd::VARIABLE.as_bytes());
    // SAFETY: a C string; nobody changes the environment this early.
    let found = unsafe { libc::getenv(name.as_ptr().cast()) };
    if found.is_null() {
        return;
    }
    let mut room = [0; guest::PATH_ROOM];
    if let Ok(path) = guest::read_path(found as u64, &mut room) {
        cwd::inherit(path);
    }
}

/// getcwd(2) itself: the length with the NUL; `None` where the working directory is the kernel's.
pub fn getcwd_raw(to: *mut c_char, room: usize) -> Option<Result<usize, Errno>> {
    let path = here()?;
    Some(if room <= path.len() {
        Err(Errno::ERANGE)
    } else {
        put_path(&path, to, room).map(|_| path.len() + 1)
    })
}
