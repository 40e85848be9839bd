//! What the linker asks of a program of the target `x86_64-fortanix-unknown-sgx` that never unwinds:
//! the names of an unwinder, and what `ring` leaves to assembly. A program says `use
//! postern_enclave_link as _;`.

mod assembly;
mod unwind;

// A dependency, so that the linker meets the names of `assembly` before ring's own.
use ring as _;
