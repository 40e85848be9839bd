//! Puts jumps in place of system call instructions, once, when the program starts.
//!
//! In the C library all instructions whose number concerns files, AIO or signal handlers; in the
//! program and its other libraries those that carry such a number and can be replaced. Code is
//! never writable and executable at once; while a library's code is writable nothing of it is
//! called.
//!
//! Holds: where anything is not as expected (another thread runs already, no room near by, the
//! host forbids it) the code stays as it is and the symbols and the launcher's filter are all
//! there is.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};

use postern_sim::{
    message,
    sites::{self, Around, STUB, Site},
    sys,
};

use super::{NUMBERS, catch, class_of};
use crate::next::Next;

/// What lies before the stubs of an image: the classes, the catcher's address.
const HEAD: usize = NUMBERS + 8;
const PAGE: usize = 4096;
/// Stubs lie at most this far from the code that jumps to them.
const NEAR: usize = 1 << 30;
/// Largest /proc/self/maps looked at.
const MAPS: usize = 4 << 20;
/// Instructions of `_exit` in the C library, in bytes: its exit_group comes first.
const EXIT_BYTES: usize = 64;

static CATCHES_EXIT: AtomicBool = AtomicBool::new(false);

/// Whether the C library's own exit_group(2) comes by here, at the very end of exit(3).
pub fn catches_exit() -> bool {
    CATCHES_EXIT.load(Ordering::Relaxed)
}

/// Executable bytes of a loaded image.
struct Text {
    from: usize,
    to: usize,
    is_libc: bool,
}

/// Replaces what can be replaced. Called once, before the guest's own code runs.
pub fn install() {
    let maps =
        if is_single_threaded() { message::read_file(b"/proc/self/maps", MAPS) } else { return };
    let Ok(maps) = maps else { return };
    catch::prepare();
    for text in texts(&maps) {
        patch(&text, &maps);
    }
}

fn is_single_threaded() -> bool {
    message::read_file(b"/proc/self/status", PAGE * 2)
        .is_ok_and(|status| status.split(|&byte| byte == b'\n').any(|line| line == b"Threads:\t1"))
}

/// One line of /proc/self/maps: range, permissions, path.
fn line(line: &[u8]) -> Option<(usize, usize, &[u8], &[u8])> {
    let text = core::str::from_utf8(line.get(..line.iter().position(|&b| b == b' ')?)?).ok()?;
    let (from, to) = text.split_once('-')?;
    let from = usize::from_str_radix(from, 16).ok()?;
    let to = usize::from_str_radix(to, 16).ok()?;
    let mut rest =
        line.get(text.len() + 1..)?.split(|&b| b == b' ').filter(|part| !part.is_empty());
    let permissions = rest.next()?;
    Some((from, to, permissions, rest.nth(3).unwrap_or_default()))
}

fn lines(maps: &[u8]) -> impl Iterator<Item = (usize, usize, &[u8], &[u8])> {
    maps.split(|&byte| byte == b'\n').filter_map(line)
}

/// The code of all images but this library's own, the loader's and the kernel's.
fn texts(maps: &[u8]) -> Vec<Text> {
    let own = catch::address();
    lines(maps)
        .filter(|&(from, to, permissions, path)| {
            let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
            permissions.starts_with(b"r-x")
                && path.starts_with(b"/")
                && !(from..to).contains(&own)
                && !name.starts_with(b"ld-linux")
                && !name.starts_with(b"ld.so")
                && !name.starts_with(b"ld-2")
        })
        .map(|(from, to, _, path)| Text { from, to, is_libc: path.ends_with(b"/libc.so.6") })
        .collect()
}

fn patch(text: &Text, maps: &[u8]) {
    // SAFETY: 1. Mapped readable for this range, from a file that the loader mapped; nobody
    //    unmaps a loaded image while the constructors run. 2. Nobody writes to it: the slice is
    //    gone before `put` does.
    let code = unsafe { core::slice::from_raw_parts(text.from as *const u8, text.to - text.from) };
    let wanted = |number: u32| class_of(number as usize) != 0;
    let found = sites::find(code, wanted, text.is_libc);
    if found.is_empty() {
        return;
    }
    let bytes = (HEAD + found.len() * STUB).next_multiple_of(PAGE);
    let Some(area) = map_near(text, bytes, maps) else { return };
    for number in 0..NUMBERS {
        // SAFETY: inside the new mapping.
        unsafe { ((area + number) as *mut u8).write_volatile(class_of(number)) };
    }
    // SAFETY: inside the new mapping, aligned.
    unsafe { ((area + NUMBERS) as *mut usize).write_volatile(catch::address()) };
    let mut jumps = Vec::with_capacity(found.len());
    for (index, &site) in found.iter().enumerate() {
        let stub = area + HEAD + index * STUB;
        let around =
            Around { classes: area, catcher: area + NUMBERS, site: text.from + site.at, stub };
        let old = &code[site.at..site.at + usize::from(site.length)];
        let made = sites::stub(site, old, around);
        let jump = sites::jump(site, around.site, stub);
        let (Some((made, length)), Some(jump)) = (made, jump) else { continue };
        for (at, byte) in made.iter().enumerate().take(length) {
            // SAFETY: inside the new mapping: STUB bytes for each site.
            unsafe { ((stub + at) as *mut u8).write_volatile(*byte) };
        }
        jumps.push((site, jump));
    }
    if protect(area, bytes, libc::PROT_READ | libc::PROT_EXEC) && put(text, &jumps) && text.is_libc
    {
        let exit = Next::new(c"_exit").find().map_or(0, |at| at as usize);
        let is_its =
            |(site, _): &(Site, _)| (exit..exit + EXIT_BYTES).contains(&(text.from + site.at));
        CATCHES_EXIT.store(jumps.iter().any(is_its), Ordering::Relaxed);
    }
}

/// Writes the jumps. From the first mprotect to the last nothing outside this library runs: the
/// code may be the C library's, memcpy included. Answers whether it could.
fn put(text: &Text, jumps: &[(Site, [u8; 16])]) -> bool {
    let length = text.to - text.from;
    if !protect(text.from, length, libc::PROT_READ | libc::PROT_WRITE) {
        return false;
    }
    for (site, jump) in jumps {
        let mut at = 0;
        while at < usize::from(site.length) {
            // SAFETY: inside the text, which is writable now and executed by nobody: the only
            //    thread is here.
            unsafe {
                let to = (text.from + site.at + at) as *mut u8;
                to.write_volatile(*jump.as_ptr().add(at));
            }
            at += 1;
        }
    }
    if !protect(text.from, length, libc::PROT_READ | libc::PROT_EXEC) {
        postern_sim::process::abort(); // Code that cannot be run any more.
    }
    true
}

fn protect(at: usize, length: usize, protection: i32) -> bool {
    let protection = usize::try_from(protection).unwrap_or(0);
    // SAFETY: whole pages of one mapping that this module knows.
    unsafe { sys::syscall6(libc::SYS_mprotect, at, length, protection, 0, 0, 0) == 0 }
}

/// New writable memory below or above `text`, where /proc/self/maps shows a gap.
fn map_near(text: &Text, bytes: usize, maps: &[u8]) -> Option<usize> {
    let mut below = None;
    let mut above = None;
    let mut end = 0;
    for (from, to, _, _) in lines(maps) {
        if from >= end + bytes && end != 0 {
            if from <= text.from {
                below = Some(from - bytes);
            } else if above.is_none() && end >= text.to {
                above = Some(end);
            }
        }
        end = to;
    }
    let near = |at: &usize| at.abs_diff(text.from).max(at.abs_diff(text.to)) < NEAR;
    [below, above].into_iter().flatten().filter(near).find_map(|at| map_at(at, bytes))
}

fn map_at(at: usize, bytes: usize) -> Option<usize> {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as usize;
    // SAFETY: a new mapping where nothing is (NOREPLACE).
    let made =
        unsafe { sys::syscall6(libc::SYS_mmap, at, bytes, protection, flags, usize::MAX, 0) };
    let made = sys::check(made).ok()?;
    if made != at {
        // A kernel without NOREPLACE took the address as a hint.
        // SAFETY: the mapping just made.
        unsafe { sys::syscall6(libc::SYS_munmap, made, bytes, 0, 0, 0, 0) };
        return None;
    }
    Some(at)
}
