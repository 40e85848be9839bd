//! Keys that the launcher hands over in memory: what passphrases were stretched to.
//!
//! Holds: a key handed over is on no disk and in no file that outlives the first program's start;
//! it is taken out of its memory file, which is closed and so gone, before the program runs.
//! Does not hold: a program after exec that begins a family of its own (one that cannot join this
//! one) finds no key, and its volumes do not open.
#![allow(unsafe_code)]

use postern_trusted::volume::SlotKey;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{config::RunConfig, inheritance, message, sys};

/// Keys by the name of their memory file.
pub(super) struct Keys(Vec<(String, Zeroizing<[u8; 32]>)>);

impl Keys {
    /// Reads and closes all memory files that the run file names.
    pub(super) fn take(config: &RunConfig) -> Self {
        let volumes = config.volumes.iter().map(|volume| &volume.key_memory);
        let directories = config.directories.iter().map(|directory| &directory.key_memory);
        let named = volumes.chain(directories).flatten();
        Self(named.filter_map(|name| Some((name.clone(), read(name)?))).collect())
    }

    /// The key of this name.
    pub(super) fn get(&self, name: &str) -> Option<SlotKey> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, key)| SlotKey::stretched(**key))
    }
}

fn read(name: &str) -> Option<Zeroizing<[u8; 32]>> {
    let file = inheritance::find_memory(name.as_bytes())?;
    let mut key = Zeroizing::new([0; 32]);
    let zeros = [0_u8; 32];
    let descriptor = usize::try_from(file).unwrap_or(usize::MAX);
    // SAFETY: the kernel writes at most the length of `key` to it, and reads that of `zeros`.
    let read = sys::check(unsafe {
        let at = key.as_mut_ptr() as usize;
        let read = sys::syscall6(libc::SYS_pread64, descriptor, at, key.len(), 0, 0, 0);
        // Gone from memory now, and not when the kernel gives the page out again.
        let at = zeros.as_ptr() as usize;
        sys::syscall6(libc::SYS_pwrite64, descriptor, at, zeros.len(), 0, 0, 0);
        read
    });
    let _ = sys::close(file);
    (read == Ok(key.len())).then_some(key)
}

/// Whether the machine swaps at all. proc_swaps(5): a line for each area, after a heading.
pub(super) fn swap_is_on() -> bool {
    message::read_file(b"/proc/swaps", 1 << 16)
        .is_ok_and(|text| memchr::memchr_iter(b'\n', &text).count() > 1)
}

/// Bytes of stack that are wiped after a volume was opened: as much as opening one has used, so
/// that a thread which could open has room to wipe.
const STACK: usize = 96 << 10;

/// Overwrites what calls before this one left on the stack: keys pass through there.
#[inline(never)]
pub(super) fn wipe_stack() {
    let mut room = [0_u8; STACK];
    room.zeroize();
    core::hint::black_box(&room);
}
