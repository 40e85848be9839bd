//! The trusted side of Postern: what runs inside the enclave.
//!
//! `no_std` with `alloc`: nothing here knows a libc, a clock, a socket or the daemon's code. The
//! platform ([`platform`]) supplies time, randomness, guest memory and waiting; the daemon is
//! reached through the port ([`port`]) only.
//!
//! Holds whatever the host does: no wrong byte is ever returned, no host answer panics, keys and
//! plaintext never leave private memory.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fuzzing"))]
extern crate std;
// What the linker asks for.
#[cfg(all(test, target_env = "sgx"))]
use postern_enclave_link as _;

/// Whether a check is left out on purpose, to see that a test notices.
#[cfg(test)]
macro_rules! left_out {
    ($canary:ident) => {
        $crate::volume::tests::canary() == $crate::volume::tests::Canary::$canary
    };
}
#[cfg(all(not(test), not(postern_unchecked)))]
macro_rules! left_out {
    ($canary:ident) => {
        false
    };
}
/// A build of `cargo xtask port` alone: the checks that the port makes of what the host wrote are
/// left out, to count what they cost.
#[cfg(all(not(test), postern_unchecked))]
macro_rules! left_out {
    (AfterPoison) => {
        true
    };
    (AnyCursor) => {
        true
    };
    (CursorBack) => {
        true
    };
    (AnyGeneration) => {
        true
    };
    (TwiceDone) => {
        true
    };
    (AnyResult) => {
        true
    };
    ($canary:ident) => {
        false
    };
}

pub mod aio;
pub mod counter;
pub mod directory;
pub mod disk;
pub mod errno;
pub mod exec;
pub mod platform;
pub mod port;
pub mod sync;
pub mod volume;
