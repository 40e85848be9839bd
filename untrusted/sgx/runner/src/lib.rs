//! Runs programs made for the target `x86_64-fortanix-unknown-sgx`, unmodified.
//!
//! [`Backend`] is what enters an enclave: the emulator or the CPU. [`run()`] serves what the
//! program's standard library asks of its host: standard streams, TCP, threads, waiting, time and
//! memory outside.
//!
//! Holds: an enclave is given only memory that was allocated for it, and what it names is used only
//! if it lies inside; an answer that it did not ask for is never made. It is a guest like any other:
//! a request of it that makes no sense is refused, and ends nobody but itself.
//! Follows: the usercalls of the Fortanix SGX ABI, version 0.6.

mod backend;
mod calls;
mod daemon;
mod events;
mod exits;
pub mod hw;
mod memory;
mod run;
mod streams;

pub use backend::{Backend, Emulated};
pub use exits::Exits;
pub use run::{End, Program, run};
