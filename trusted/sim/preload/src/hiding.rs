//! Leaves our own descriptors out of what a program reads in `/proc/self/fd` and
//! `/proc/self/fdinfo`: a program that counts its descriptors, or closes all of them, finds its
//! own.
//!
//! Does not hold: for reads that the C library makes for itself (scandir, glob, ftw), and for
//! another process's `/proc/PID/fd`.

use core::ffi::{c_int, c_void};

use postern_sim::{
    files::{self, placeholder},
    guest, identity, sys,
};
use postern_trusted::{
    errno::Errno,
    platform::{Fault, GuestMemory as _},
};

/// Where a record of getdents64(2) has its length, two bytes.
const LENGTH: usize = 16;
/// Where its name begins.
const NAME: usize = 19;

/// Whether `directory` lists the descriptors of this process.
fn lists_descriptors(directory: c_int) -> bool {
    let (mut room, mut target) = ([0; 32], [0; 64]);
    let read = placeholder::own_path(directory, &mut room)
        .and_then(|path| sys::readlink(path, &mut target));
    let Some(path) = read.ok().and_then(|length| target.get(..length)) else { return false };
    let own = format!("/proc/{}/", identity::process_id());
    path.starts_with(own.as_bytes()) && (path.ends_with(b"/fd") || path.ends_with(b"/fdinfo"))
}

/// Whether `name` is the number of a descriptor of our own.
fn is_own_number(name: &[u8]) -> bool {
    let number = core::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
    number.is_some_and(files::is_internal)
}

/// Whether the entry `name` of a stream on the directory that `descriptor` answers is to be left
/// out.
pub fn hides(name: &[u8], descriptor: impl FnOnce() -> c_int) -> bool {
    is_own_number(name) && lists_descriptors(descriptor())
}

/// Takes what is to be left out of the `length` bytes of records at `records`; answers how many
/// are left.
pub fn sift(directory: c_int, records: *mut c_void, length: usize) -> usize {
    if !lists_descriptors(directory) {
        return length;
    }
    let sifted = || -> Result<usize, Errno> {
        let mut bytes = vec![0; length];
        let at = records as u64;
        guest::Guest.read(at, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        let mut kept = Vec::with_capacity(length);
        let mut rest = bytes.as_slice();
        while let Some(size) = rest.get(LENGTH..LENGTH + 2) {
            let size = usize::from(u16::from_ne_bytes([size[0], size[1]]));
            let (Some(record), true) = (rest.get(..size), size > NAME) else { break };
            let name = record[NAME..].split(|&byte| byte == 0).next().unwrap_or_default();
            if !is_own_number(name) {
                kept.extend_from_slice(record);
            }
            rest = &rest[size..];
        }
        guest::write(at, &kept)?;
        Ok(kept.len())
    };
    // Memory that is gone again: the kernel's answer stands.
    sifted().unwrap_or(length)
}
