//! The interposition library: libc's and libaio's names in front of the trusted side.
//!
//! `postern run` puts it into the guest with LD_PRELOAD. A call on a protected path or descriptor
//! is answered here; everything else goes on to the next library unchanged, cancellation points
//! included.
//!
//! Holds: without `POSTERN_RUN` in the environment every symbol only passes on and nothing is
//! allocated; `errno` changes on failure alone; no panic leaves an exported function (it aborts).
//! The C library's calls inside itself (fopen, opendir, tmpfile) come by `calls`, as far as its
//! system call instructions can be replaced.
//! Does not hold: a program's own system call instructions do not all come by here. They cannot
//! reach a volume's data: its descriptor is a placeholder that the kernel refuses to read or write.
//!
//! Protected calls are no cancellation points.
#![allow(unsafe_code)]

mod aio;
mod attributes;
mod calls;
mod data;
mod descriptors;
mod exec;
mod guest_paths;
mod hiding;
mod limits;
mod listing;
mod mapping;
mod moving;
mod namespace;
mod next;
mod open;
mod openat2;
mod posix_aio;
mod process;
mod raw;
mod signals;
mod size;
mod state;
mod working;

/// Everything that the library allocates lies in memory that forked children share.
#[global_allocator]
static ARENA: postern_sim::arena::FamilyArena = postern_sim::arena::FamilyArena;
