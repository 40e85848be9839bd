//! Runs cases, each in a process of its own: a crash or a hang is a result like any other.

use std::{
    ffi::CStr,
    fs::File,
    io::{Read as _, Seek as _},
};

use crate::{
    cases::Case,
    sys,
    world::{World, how_it_ended, nameless_file},
};

/// A case that takes longer hangs, seconds.
const HANGS_AFTER: i32 = 60;

/// Opens the file for as long as cases run: its first opening and last closing are no part of
/// them.
pub fn hold(path: &CStr) -> i32 {
    let fd = sys::open(path, libc::O_RDWR | libc::O_CREAT);
    assert!(fd >= 0, "{}: {}", path.to_string_lossy(), sys::show(fd.into()));
    fd
}

/// Runs one case and prints what it said, behind a line with its name.
pub fn one(case: &Case, path: &CStr, scratch: &CStr) {
    print!("== {}\n{}", case.name, transcript(path, scratch, &case.run));
}

/// What `work` says in a process of its own, and how that ends.
pub fn transcript(path: &CStr, scratch: &CStr, work: &dyn Fn(&World)) -> String {
    let mut log = File::from(nameless_file());
    let pid = sys::fork();
    assert!(pid >= 0, "fork: {}", sys::show(pid.into()));
    if pid == 0 {
        child(path, scratch, &log, work);
    }
    let status = wait(pid);
    // What the case left behind.
    sys::kill(-pid, libc::SIGKILL);
    let mut text = Vec::new();
    let _ = log.rewind();
    let _ = log.read_to_end(&mut text);
    let mut text = String::from_utf8_lossy(&text).into_owned();
    text.push_str(&status);
    text.push('\n');
    text
}

fn child(path: &CStr, scratch: &CStr, log: &File, work: &dyn Fn(&World)) -> ! {
    // SAFETY: plain numbers.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    let Ok(log) = log.try_clone() else { sys::quit(99) };
    let world = World::new(path, scratch, log);
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&world)));
    if let Err(panic) = done {
        let words = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|&words| words.to_owned()));
        world.say(format!("broke off: {}", words.unwrap_or_default()));
        sys::quit(98);
    }
    sys::quit(0);
}

/// Waits for a case's end, and puts one to it if need be.
fn wait(pid: i32) -> String {
    let handle = sys::call(libc::SYS_pidfd_open, &[sys::word(pid), 0]);
    let handle = i32::try_from(handle).unwrap_or(-1);
    let mut poll = libc::pollfd { fd: handle, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, ours.
    let ended = unsafe { libc::poll(&raw mut poll, 1, HANGS_AFTER * 1000) };
    if ended != 1 {
        sys::kill(pid, libc::SIGKILL);
        sys::kill(-pid, libc::SIGKILL);
    }
    let status = sys::wait_for(pid, 0);
    sys::close(handle);
    if ended == 1 { how_it_ended(status) } else { "hangs".into() }
}
