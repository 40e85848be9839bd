//! Which process this is, cheaply, also right after a raw fork.
//!
//! A page with `MADV_WIPEONFORK` holds the process id, and the word of the library's gate: the child
//! of any kind of fork finds zeros there and asks the kernel once. (A vfork or CLONE_VM child shares its parent's memory and
//! therefore its identity: it *is* the same process as far as memory is concerned.)
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use postern_trusted::errno::Errno;

use crate::sys;

/// What is wiped.
struct Page {
    process: AtomicU32,
    gate: AtomicU32,
}

static PAGE: AtomicPtr<Page> = AtomicPtr::new(core::ptr::null_mut());

fn page() -> Option<&'static Page> {
    let mut at = PAGE.load(Ordering::Acquire);
    if at.is_null() {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        // SAFETY: a fresh mapping, and advice about it.
        let made = unsafe {
            let made = sys::syscall6(libc::SYS_mmap, 0, 4096, protection, flags, usize::MAX, 0);
            let made = sys::check(made).ok()?;
            let advice = libc::MADV_WIPEONFORK as usize;
            sys::check(sys::syscall6(libc::SYS_madvise, made, 4096, advice, 0, 0, 0)).ok()?;
            made as *mut Page
        };
        match PAGE.compare_exchange(at, made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => at = made,
            Err(other) => at = other,
        }
    }
    // SAFETY: mapped for the life of the process, aligned, zeros are a valid page of atomics.
    Some(unsafe { &*at })
}

/// The calling process's id; never 0.
#[must_use]
pub fn process_id() -> u32 {
    let Some(page) = page() else { return sys::getpid() };
    match page.process.load(Ordering::Relaxed) {
        0 => {
            let id = sys::getpid();
            page.process.store(id, Ordering::Relaxed);
            id
        }
        id => id,
    }
}

/// The word of [`crate::inside::gate`]; 0 in a process that has just been forked.
#[must_use]
#[inline]
pub fn gate() -> &'static AtomicU32 {
    /// Where no page can be had.
    static KEPT: AtomicU32 = AtomicU32::new(0);
    page().map_or(&KEPT, |page| &page.gate)
}

/// Whether process `id` still exists (a zombie counts as gone once reaped).
#[must_use]
pub fn is_alive(id: u32) -> bool {
    matches!(sys::kill(id, 0), Ok(()) | Err(Errno::EPERM))
}
