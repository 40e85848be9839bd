//! Mappings: shared ones show the file, private ones a copy of it.

use core::ffi::{c_int, c_void};
use std::sync::Arc;

use postern_sim::{
    files::{self, OpenFile, io::MAX_BYTES},
    guest, host,
    mapped::areas::{self, Wish},
    sys,
};
use postern_trusted::errno::Errno;

use crate::{
    aio, guest_paths,
    next::{answer, export},
    state,
};

const PAGE: i64 = 4096;
const TOO_MUCH: &str = "shared mappings (mmap) of more than 1 GiB of protected files at once are \
                        not possible";
const TOO_LARGE: &str =
    "a private mapping (mmap) of more than 64 MiB of a protected file is not possible";

/// Whether an AIO ring lies at `at`.
fn is_ring(at: *mut c_void) -> bool {
    aio::is_used() && host::contexts().relocate(at as u64, at as u64)
}

/// mmap(2): in Linux's order of checks up to the point where the kernel does the rest.
fn map(
    file: &Arc<OpenFile>,
    (at, length, protection, flags): (*mut c_void, usize, c_int, c_int),
    offset: i64,
) -> Result<*mut c_void, Errno> {
    match () {
        () if offset % PAGE != 0 => return Err(Errno::EINVAL),
        () if file.is_path() => return Err(Errno::EBADF),
        () if length == 0 => return Err(Errno::EINVAL),
        () => {}
    }
    let from = u64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    let kind = flags & libc::MAP_TYPE;
    let shared = matches!(kind, libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE);
    let writes = shared && protection & libc::PROT_WRITE != 0;
    if writes && !file.writable() || !file.readable() {
        return Err(Errno::EACCES);
    }
    file.content().map_err(|_| Errno::ENODEV)?;
    if shared && from.checked_add(length as u64).is_none_or(|end| end > MAX_BYTES) {
        let too_long = length as u64 > guest::USER_END;
        return Err(if too_long { Errno::ENOMEM } else { Errno::EOVERFLOW });
    }
    let (limit, mapped) = if shared {
        let wish = Wish { at: at as usize, length, protection, flags, offset: from };
        (TOO_MUCH, areas::map(file, wish))
    } else {
        (TOO_LARGE, copy(file, (at, length, protection, flags), from))
    };
    if mapped == Err(Errno::ENODEV) {
        guest_paths::refuse(file.index(), limit);
    }
    mapped.map(|at| at as *mut c_void)
}

fn copy(
    file: &OpenFile,
    (at, length, protection, flags): (*mut c_void, usize, c_int, c_int),
    from: u64,
) -> Result<usize, Errno> {
    let copy = file.snapshot(from, length as u64)?;
    let [protection, bits, fd] = [protection, flags, copy].map(|n| n as isize as usize);
    // SAFETY: the guest's own wish for its address space, with a file of ours.
    let mapped = sys::check(unsafe {
        sys::syscall6(libc::SYS_mmap, at as usize, length, protection, bits, fd, 0)
    });
    let _ = sys::close(copy);
    if let (Ok(at), true) = (mapped, flags & libc::MAP_FIXED != 0) {
        areas::replaced(at, length);
    }
    mapped
}

export! {
    // A ring that moves stays the context's; it cannot grow.
    fn [mremap](
        at: *mut c_void, length: usize, wanted: usize, flags: c_int, to: *mut c_void,
    ) -> *mut c_void, next => {
        if state::active()
            && let Some(moved) = areas::remap((at as usize, length), wanted, flags, to as usize)
        {
            return answer(|| moved.map(|at| at as *mut c_void));
        }
        if !is_ring(at) {
            return next();
        }
        if wanted > length {
            return answer(|| Err(Errno::EFAULT));
        }
        let moved = next();
        if moved != libc::MAP_FAILED {
            host::contexts().relocate(at as u64, moved as u64);
        }
        moved
    };
    fn [mmap, mmap64](
        at: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64,
    ) -> *mut c_void, next =>
        match if flags & libc::MAP_ANONYMOUS == 0 { files::lookup(fd) } else { None } {
            Some(file) => answer(|| map(&file, (at, length, protection, flags), offset)),
            None => {
                let mapped = next();
                if flags & libc::MAP_FIXED != 0 && mapped != libc::MAP_FAILED {
                    areas::replaced(mapped as usize, length);
                }
                mapped
            }
        };
    fn [munmap](at: *mut c_void, length: usize) -> c_int, next =>
        match areas::unmap(at as usize, length) {
            Some(unmapped) => answer(|| unmapped.map(|()| 0)),
            None => next(),
        };
    fn [msync](at: *mut c_void, length: usize, flags: c_int) -> c_int, next => {
        let checked = next();
        let durable = flags & libc::MS_SYNC != 0;
        if checked != 0 || flags & (libc::MS_SYNC | libc::MS_ASYNC) == 0 {
            return checked;
        }
        answer(|| areas::sync(at as usize, length, durable).map(|()| 0))
    };
}
