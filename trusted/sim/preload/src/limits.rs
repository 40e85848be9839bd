//! Changes of the file size limit, which the simulated enclave keeps to on protected files.

use core::ffi::{c_int, c_void};

use postern_sim::limits;

use crate::{next::export, state};

/// RLIMIT_FSIZE as the C functions take it.
const FILE_SIZE: c_int = libc::RLIMIT_FSIZE as c_int;

fn changed(resource: c_int, result: c_int) -> c_int {
    if resource == FILE_SIZE && result == 0 && state::active() {
        limits::refresh();
    }
    result
}

export! {
    fn [setrlimit, setrlimit64](resource: c_int, limit: *const c_void) -> c_int, next =>
        changed(resource, next());
    fn [prlimit, prlimit64](
        process: c_int, resource: c_int, new: *const c_void, old: *mut c_void,
    ) -> c_int, next => changed(resource, next());
}
