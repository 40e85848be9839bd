//! exec and posix_spawn: the process, or a child, becomes another program.
//!
//! What Linux does with AIO at exec happens before it here: requests in flight are waited for. Open
//! protected files whose descriptors stay open pass to the new program, which joins the family.
//!
//! Does not hold: an exec that fails although the file is there and executable (not a program, too
//! many arguments) closes the protected descriptors that are marked close-on-exec.

use core::{
    cell::Cell,
    ffi::{c_char, c_int, c_long, c_void},
};

use postern_sim::{
    inheritance::Spawn,
    inside::{self, Scope},
};

use crate::{
    calls::Arguments,
    guest_paths,
    next::{Next, answer, export},
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

std::thread_local! {
    /// The process that prepared itself for an exec that is under way; a vfork child leaves its own
    /// number to its parent, whom it does not concern.
    static UNDER_WAY: Cell<u32> = const { Cell::new(0) };
}

/// execve(2) and execveat(2) as system calls of the program's own, or of the C library's inside
/// itself (system, popen). `None`: not one of them, or prepared for already.
///
/// # Safety
/// As the system call.
pub unsafe fn by_number(number: c_long, arguments: Arguments) -> Option<c_long> {
    let [a, b, c, d, e, _] = arguments;
    if !matches!(number, libc::SYS_execve | libc::SYS_execveat)
        || UNDER_WAY.get() == postern_sim::sys::getpid()
    {
        return None;
    }
    // What is asked from here on is asked anew: a vfork child does not come back to end it.
    inside::answered();
    // SAFETY: the caller's arguments, passed to the function of the same meaning.
    let failed = unsafe {
        if number == libc::SYS_execve {
            execve(a as _, b as _, c as _)
        } else {
            execveat(a as u32 as c_int, b as _, c as _, d as _, e as u32 as c_int)
        }
    };
    Some(failed.into())
}

/// Runs `next`, and keeps the errno that it fails with over what is mended afterwards.
fn attempt(promising: bool, next: impl FnOnce() -> c_int) -> c_int {
    let before = UNDER_WAY.replace(postern_sim::sys::getpid());
    let failed = prepared(promising, next);
    UNDER_WAY.set(before);
    failed
}

fn prepared(promising: bool, next: impl FnOnce() -> c_int) -> c_int {
    if !promising {
        return next();
    }
    // A vfork child acts for its parent here, in whose memory it is.
    process::let_go();
    // SAFETY: the calling thread's own errno.
    let (failed, errno) = state::around_exec(|| (next(), unsafe { *libc::__errno_location() }));
    let _ = answer::<c_int>(|| Err(postern_trusted::errno::Errno(errno)));
    failed
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
            // Outside: a vfork child never comes back, and its parent goes on with this memory.
            // SAFETY: 1. A C function of this signature. 2. The caller's path and arguments; the
            //    environment lives through the call.
            inside::outside(|| unsafe {
                let call: Call = core::mem::transmute(at);
                call(path, arguments, environment.as_ptr())
            })
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

/// A path, which may be a bare name that is `searched` for, becomes this process's program.
fn replace(
    (path, searched): (*const c_char, bool),
    (name, arguments, environment): (&'static Next, Strings, Strings),
    next: impl FnOnce() -> c_int,
) -> c_int {
    // In a protected working directory `next` is not called, so this is the path that counts.
    let outward = guest_paths::outward(libc::AT_FDCWD, path);
    let path = outward.as_ref().map_or(path, |outward| outward.as_ptr());
    let promising =
        state::active() && (searched && !has_slash(path) || is_executable(libc::AT_FDCWD, path, 0));
    attempt(promising, || with_directory(name, path, arguments, environment, next))
}

fn spawn(child: *mut libc::pid_t, next: impl FnOnce(*mut libc::pid_t) -> c_int) -> c_int {
    if !state::active() {
        return next(child);
    }
    let _inside = Scope::new();
    let spawn = Spawn::begin();
    let mut own = 0;
    // The caller may not want to know the number; we do.
    let failed = inside::outside(|| next(&raw mut own));
    if failed == 0 {
        if !child.is_null() {
            // SAFETY: the caller's room for it.
            unsafe { *child = own };
        }
        spawn.made(own.unsigned_abs());
    }
    failed
}

type SpawnCall = unsafe extern "C" fn(
    *mut libc::pid_t,
    *const c_char,
    *const c_void,
    *const c_void,
    Strings,
    Strings,
) -> c_int;

/// A posix_spawn function.
macro_rules! export_spawn {
    ($($name:ident)+) => { $(
        /// The C function of this name, with open protected files kept for the child, and the working
         /// directory in its environment if that is a protected one.
        ///
        /// # Safety
        /// As the C function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            child: *mut libc::pid_t,
            path: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            arguments: Strings,
            environment: Strings,
        ) -> c_int {
            process::let_go();
            static NEXT: Next = Next::new(
                match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => c"",
                },
            );
            let Some(at) = NEXT.find() else { return libc::ENOSYS };
            let changed = working::environment(environment);
            let environment = changed.as_ref().map_or(environment, |changed| changed.as_ptr());
            spawn(child, |child| {
                // SAFETY: the C function of this name; the arguments are the caller's own but for
                // the room for the child's number, which is ours.
                unsafe {
                    let next: SpawnCall = core::mem::transmute(at);
                    next(child, path, actions, attributes, arguments, environment)
                }
            })
        }
    )+ };
}

export_spawn! { posix_spawn posix_spawnp }

export! {
    fn [execve](path: *const c_char, arguments: Strings, environment: Strings) -> c_int, next =>
        replace((path, false), (&EXECVE, arguments, environment), next);
    fn [execv](path: *const c_char, arguments: Strings) -> c_int, next =>
        replace((path, false), (&EXECVE, arguments, inherited()), next);
    fn [execvp](path: *const c_char, arguments: Strings) -> c_int, next =>
        replace((path, true), (&EXECVPE, arguments, inherited()), next);
    fn [execvpe](path: *const c_char, arguments: Strings, environment: Strings) -> c_int, next =>
        replace((path, true), (&EXECVPE, arguments, environment), next);
    fn [fexecve](fd: c_int, arguments: Strings, environment: Strings) -> c_int, next => {
        let empty = c"".as_ptr();
        attempt(state::active() && is_executable(fd, empty, libc::AT_EMPTY_PATH), next)
    };
    fn [execveat](
        directory: c_int, path: *const c_char, arguments: Strings, environment: Strings,
        flags: c_int,
    ) -> c_int, next => {
        let promising =
            state::active() && is_executable(directory, path, flags & libc::AT_EMPTY_PATH);
        attempt(promising, next)
    };
}

/// A function that takes its arguments one by one. The first six words of a call lie in registers,
/// the rest on the stack above the return address: with that taken off and the registers pushed,
/// all arguments but the first lie in a row, which is the array that `$takes_array` takes. The
/// return address is pushed again below them, which also aligns the stack for the call.
macro_rules! export_in_a_row {
    ($($name:ident => $takes_array:ident)+) => { $(
        /// The C function of this name, with open protected files kept for the next program.
        ///
        /// # Safety
        /// As the C function of this name.
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() -> c_int {
            core::arch::naked_asm!(
                "pop rax",
                "push r9",
                "push r8",
                "push rcx",
                "push rdx",
                "push rsi",
                "mov rsi, rsp",
                "push rax",
                "call {takes_array}",
                "pop rdx",
                "add rsp, 40",
                "push rdx",
                "ret",
                takes_array = sym $takes_array,
            )
        }
    )+ };
}

export_in_a_row! { execl => execl_array execlp => execlp_array execle => execle_array }

unsafe extern "C" fn execl_array(path: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: the caller's arguments, ended by a null pointer as execl(3) demands.
    unsafe { execv(path, arguments) }
}

unsafe extern "C" fn execlp_array(path: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: as in `execl_array`.
    unsafe { execvp(path, arguments) }
}

unsafe extern "C" fn execle_array(path: *const c_char, arguments: Strings) -> c_int {
    let mut end = arguments;
    // SAFETY: the array goes on to a null pointer, and the environment follows it, as execle(3)
    // demands.
    unsafe {
        while !(*end).is_null() {
            end = end.add(1);
        }
        execve(path, arguments, (*end.add(1)).cast())
    }
}
