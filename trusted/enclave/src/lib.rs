//! What the programs of this crate share: the trusted side's platform inside an enclave.
//!
//! Holds: randomness is the CPU's (RDRAND) or none; time is the host's word; sealed blocks lie in
//! user memory, and what is read from there is copied before it is looked at.
#![feature(sgx_platform)]

use postern_enclave_link as _; // What the linker asks for.

pub mod exits;
pub mod guest;
pub mod host;
pub mod link;
pub mod port;
pub mod process;
pub mod sealing;
pub mod store;
pub mod work;
