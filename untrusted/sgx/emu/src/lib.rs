//! Runs an SGX enclave image without SGX: the same bytes, in this process, at full speed.
//!
//! [`Enclave::load`] lays an image out at a naturally aligned range with the permissions it names;
//! [`Enclave::enter`] is EENTER up to EEXIT or a fault; EREPORT and EGETKEY answer under a
//! [`KeyRoot`] that anybody can have.
//!
//! Emulated: the address range and its permissions, thread control structures, GS, enter and exit,
//! faults as asynchronous exits with the registers in the state save area, reports and keys by the
//! architecture's rules. With [`Config::strict`] also that system calls and CPUID do not exist.
//!
//! Not emulated: that the enclave's memory is closed to its host, FS (it stays the host's),
//! limits of protected memory, dynamic memory (SGX2), interrupts, and that code outside of the
//! range cannot be run by an enclave. Nothing here protects a secret: this is for development.
//!
//! A process that enters an enclave gives its SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP and SIGSYS to
//! this crate, and must handle others on an alternate stack. It is x86-64 Linux with FSGSBASE.
//! Follows: Intel SDM volume 3D.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the emulator runs enclave code as it is: on x86-64 Linux alone");

mod cpu;
mod enclave;
mod enter;
mod keys;
mod memory;
mod strict;
mod trap;

pub use enclave::{
    Config, Counters, Counts, EXIT_KINDS, Enclave, EnterError, Exit, LoadError, Thread,
};
pub use enter::Registers;
pub use keys::{KeyRoot, REPORT_BYTES, Secs};
pub use memory::reserve;
pub use trap::{Fault, FaultKind};
