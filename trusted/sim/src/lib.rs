//! The simulated enclave: what puts the trusted side under an unmodified Linux program.
//!
//! The library half: raw system calls, guest memory, the family arena, lanes to the daemon, waits,
//! open files. `trusted/sim/preload` exports it under libc's and libaio's names.

pub mod sys;
