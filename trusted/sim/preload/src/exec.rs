//! exec: the process becomes another program.
//!
//! What Linux does with AIO at exec happens before it here: requests in flight are waited for. The
//! references to open protected files are given back too, as no code of ours runs afterwards;
//! descriptors that the new program inherits answer `EBADF` there.
//!
//! Does not hold: an exec that fails although the file is there and executable (not a program, too
//! many arguments) leaves the process without its protected files. execl, execlp and execle do not
//! come by here.

use core::ffi::{c_char, c_int};

use crate::{
    next::{Next, export},
    process, state, working,
};

type Strings = *const *const c_char;

/// Whether exec has a chance: the next library's faccessat says so. A bare name is searched for in
/// PATH and not looked at here.
fn is_executable(directory: c_int, path: *const c_char, flags: c_int) -> bool {
    type Call = unsafe extern "C" fn(c_int, *const c_char, c_int, c_int) -> c_int;
    static NEXT: Next = Next::new(c"faccessat");
    let Some(at) = NEXT.find() else { return true };
    // SAFETY: 1. The C function of this name. 2. `path` is the caller's C string; the kernel
    //    answers EFAULT for one that is none.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let next: Call = core::mem::transmute(at);
        let answer = next(directory, path, libc::X_OK, libc::AT_EACCESS | flags);
        *errno = before;
        answer == 0
    }
}

fn has_slash(path: *const c_char) -> bool {
    let mut room = [0; postern_sim::guest::PATH_ROOM];
    // Longer than the room: certainly with a slash.
    postern_sim::guest::read_path(path as u64, &mut room).map_or(true, |path| path.contains(&b'/'))
}

fn replace(path: *const c_char, searched: bool, next: impl FnOnce() -> c_int) -> c_int {
    if state::active() && (searched && !has_slash(path) || is_executable(libc::AT_FDCWD, path, 0)) {
        // A vfork child acts for its parent here, in whose memory it is.
        process::let_go();
        state::drain();
    }
    next()
}

unsafe extern "C" {
    /// The process's environment.
    static environ: Strings;
}

/// Calls `name` (execve or execvpe) of the next library with the working directory in the
/// environment, if it is a protected one; `next` otherwise.
fn with_directory(
    name: &'static Next,
    path: *const c_char,
    arguments: Strings,
    environment: Strings,
    next: impl FnOnce() -> c_int,
) -> c_int {
    type Call = unsafe extern "C" fn(*const c_char, Strings, Strings) -> c_int;
    match (working::environment(environment), name.find()) {
        (Some(environment), Some(at)) => {
            // SAFETY: 1. A C function of this signature. 2. The caller's path and arguments; the
            //    environment lives through the call.
            unsafe {
                let call: Call = core::mem::transmute(at);
                call(path, arguments, environment.as_ptr())
            }
        }
        _ => next(),
    }
}

static EXECVE: Next = Next::new(c"execve");
static EXECVPE: Next = Next::new(c"execvpe");

/// The environment of those that are not given one.
fn inherited() -> Strings {
    // SAFETY: a pointer that libc keeps; who changes it meanwhile races with libc itself.
    unsafe { environ }
}

export! {
    fn [execve](path: *const c_char, arguments: Strings, environment: Strings) -> c_int, next =>
        replace(path, false, || with_directory(&EXECVE, path, arguments, environment, next));
    fn [execv](path: *const c_char, arguments: Strings) -> c_int, next =>
        replace(path, false, || with_directory(&EXECVE, path, arguments, inherited(), next));
    fn [execvp](path: *const c_char, arguments: Strings) -> c_int, next =>
        replace(path, true, || with_directory(&EXECVPE, path, arguments, inherited(), next));
    fn [execvpe](path: *const c_char, arguments: Strings, environment: Strings) -> c_int, next =>
        replace(path, true, || with_directory(&EXECVPE, path, arguments, environment, next));
    fn [fexecve](fd: c_int, arguments: Strings, environment: Strings) -> c_int, next => {
        if state::active() && is_executable(fd, c"".as_ptr(), libc::AT_EMPTY_PATH) {
            state::drain();
        }
        next()
    };
    fn [execveat](
        directory: c_int, path: *const c_char, arguments: Strings, environment: Strings,
        flags: c_int,
    ) -> c_int, next => {
        if state::active() && is_executable(directory, path, flags & libc::AT_EMPTY_PATH) {
            state::drain();
        }
        next()
    };
}
