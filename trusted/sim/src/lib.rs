//! The simulated enclave: what puts the trusted side under an unmodified Linux program.
//!
//! The library half: raw system calls, guest memory, the family arena, lanes to the daemon, waits,
//! open files. `trusted/sim/preload` exports it under libc's and libaio's names.

#[cfg(postern_unchecked)]
compile_error!(
    "a build without the port's checks is there to count instructions (cargo xtask port); for data \
     build without `--cfg postern_unchecked`"
);

pub mod arena;
pub mod config;
pub mod control;
pub mod counter;
pub mod death;
pub mod directory;
pub mod family;
pub mod files;
pub mod freshness;
pub mod guest;
pub mod host;
pub mod identity;
pub mod image;
pub mod inheritance;
pub mod inside;
pub mod kernel_aio;
pub mod limits;
pub mod link;
pub mod mapped;
pub mod message;
pub mod posix_aio;
pub mod process;
pub mod runtime;
pub mod service;
pub mod sites;
pub mod spin;
pub mod succession;
pub mod sys;
pub mod wait;
