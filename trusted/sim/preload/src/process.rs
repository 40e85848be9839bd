//! fork and exit.

use core::{
    cell::Cell,
    ffi::{c_char, c_int, c_long},
};

use postern_sim::{
    files::{self, Transit},
    guest, inside,
};

use crate::{calls::Arguments, next::export, state, working};

std::thread_local! {
    /// What the child of the fork under way will own; null outside of one.
    static TRANSIT: Cell<*mut Transit> = const { Cell::new(core::ptr::null_mut()) };
    /// The exported fork() is on this thread's stack and will see whether the fork came about.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// Registers for the forks that the C library makes inside itself (forkpty, daemon) and for those
/// of [`fork`]. Registered first, so ours is the last handler before and the first after.
pub fn watch_forks() {
    // SAFETY: three functions of this library that take and return nothing.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

unsafe extern "C" fn before() {
    let_go();
    // The table stands still: a handler that wants to change it waits until it may.
    inside::hold();
    TRANSIT.set(Box::into_raw(Box::new(files::fork_prepare())));
}

unsafe extern "C" fn in_parent() {
    files::fork_parent();
    if !WATCHED.get() {
        // Nobody tells whether the fork came about: rather one reference too many.
        if let Some(transit) = take_transit() {
            transit.arrived();
        }
    }
    inside::release();
}

unsafe extern "C" fn in_child() {
    files::fork_child();
    // The list is the parent's to free.
    TRANSIT.set(core::ptr::null_mut());
    inside::release();
}

/// What this process keeps open only because it looked at it is closed: the child may become
/// another program, which opens it for itself.
pub fn let_go() {
    if state::active() {
        files::attributes::let_go();
    }
}

fn take_transit() -> Option<Transit> {
    let at = TRANSIT.replace(core::ptr::null_mut());
    // SAFETY: null, or the box that `before` made in this thread; taken out once.
    (!at.is_null()).then(|| unsafe { *Box::from_raw(at) })
}

/// In the parent: what the child was to own, and whether there is one.
fn settle(transit: Option<Transit>, child: i64) {
    match transit {
        Some(transit) if child >= 0 => transit.arrived(),
        other => drop(other),
    }
}

export! {
    fn [fork]() -> c_int, next => {
        let outer = WATCHED.replace(true);
        let child = next();
        WATCHED.set(outer);
        if child != 0 {
            settle(take_transit(), child.into());
        }
        child
    };

    // Runs no handlers (it is made for signal handlers): all is done here.
    fn [_Fork]() -> c_int, next => {
        if !state::active() {
            return next();
        }
        counted(next)
    };
}

/// Whether a system call forks: clone(2) or clone3(2) without shared memory or another stack.
pub fn forks(number: c_long, arguments: Arguments) -> bool {
    let [a, b, ..] = arguments.map(|word| word as u64);
    let (flags, stack) = match number {
        libc::SYS_clone => (Ok(a), Ok(b)),
        // struct clone_args: flags first, the stack's address sixth.
        libc::SYS_clone3 => (guest::read_u64(a), guest::read_u64(a.saturating_add(40))),
        _ => return false,
    };
    let shares = |flags: u64| flags & libc::CLONE_VM as u64 != 0;
    flags.is_ok_and(|flags| !shares(flags)) && stack == Ok(0)
}

/// Runs `fork`, which runs no handlers of pthread_atfork: the child owns what it has open.
pub fn counted<T: Copy + Into<i64>>(fork: impl FnOnce() -> T) -> T {
    let_go();
    inside::hold();
    let transit = files::fork_prepare();
    let child = fork();
    if child.into() == 0 {
        files::fork_child();
        core::mem::forget(transit);
    } else {
        files::fork_parent();
        settle(Some(transit), child.into());
    }
    inside::release();
    child
}

export! {
    fn [system](command: *const c_char) -> c_int, next => {
        let_go();
        working::announce();
        next()
    };
    fn [popen](command: *const c_char, kind: *const c_char) -> *mut libc::FILE, next => {
        let_go();
        working::announce();
        next()
    };
}

/// A function of the C library that ends the process.
macro_rules! export_exit {
    ($($name:ident)+) => { $(
        /// Drains, then ends the process as the C function of this name does.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(status: c_int) -> ! {
            state::drain();
            static NEXT: crate::next::Next = crate::next::Next::new(
                match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => c"",
                },
            );
            if let Some(at) = NEXT.find() {
                // SAFETY: the C function of this name.
                let next: extern "C" fn(c_int) -> ! = unsafe { core::mem::transmute(at) };
                next(status);
            }
            leave(status)
        }
    )+ };
}

export_exit! { _exit _Exit quick_exit }

/// exit_group(2) itself.
pub fn leave(status: c_int) -> ! {
    loop {
        let status = usize::try_from(status).unwrap_or(1);
        // SAFETY: ends the process; takes no pointers.
        unsafe { postern_sim::sys::syscall6(libc::SYS_exit_group, status, 0, 0, 0, 0, 0) };
    }
}
