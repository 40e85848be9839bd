//! Mappings: a copy for one that is not written to, a refusal for one that is shared and written.

use core::ffi::{c_int, c_void};

use postern_sim::{
    files::{self, OpenFile},
    host, sys,
};
use postern_trusted::errno::Errno;

use crate::{
    aio, guest_paths,
    next::{answer, export},
};

const PAGE: i64 = 4096;
const REFUSAL: &str = "a shared writable mapping (mmap) of a protected file is not possible";
const TOO_LARGE: &str = "a mapping (mmap) of more than 64 MiB of a protected file is not possible";

/// Whether an AIO ring lies at `at`.
fn is_ring(at: *mut c_void) -> bool {
    aio::is_used() && host::contexts().relocate(at as u64, at as u64)
}

/// mmap(2): in Linux's order of checks up to the point where the kernel does the rest.
fn map(
    file: &OpenFile,
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
    let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
    let writes = shared && protection & libc::PROT_WRITE != 0;
    if writes && !file.writable() || !file.readable() {
        return Err(Errno::EACCES);
    }
    if writes {
        guest_paths::refuse(file.index(), REFUSAL);
        return Err(Errno::ENODEV);
    }
    let copy = file.snapshot(from, length as u64).inspect_err(|&errno| {
        if errno == Errno::ENODEV {
            guest_paths::refuse(file.index(), TOO_LARGE);
        }
    })?;
    let [protection, flags, fd] = [protection, flags, copy].map(|n| n as isize as usize);
    // SAFETY: the guest's own wish for its address space, with a file of ours.
    let mapped = sys::check(unsafe {
        sys::syscall6(libc::SYS_mmap, at as usize, length, protection, flags, fd, 0)
    });
    let _ = sys::close(copy);
    mapped.map(|at| at as *mut c_void)
}

export! {
    // A ring that moves stays the context's; it cannot grow.
    fn [mremap](
        at: *mut c_void, length: usize, wanted: usize, flags: c_int, to: *mut c_void,
    ) -> *mut c_void, next => {
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
            None => next(),
        };
}
