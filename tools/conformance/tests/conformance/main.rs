//! The program of this crate, natively on ext4 and under `postern run` on a protected path: it
//! must print the same. The expected values are the kernel's; nothing is expected to differ.
//!
//! `POSTERN_CONFORMANCE_ONLY` limits the suite to the cases whose name contains it.
//! `POSTERN_CONFORMANCE_SEEDS` sets how many random sequences run (default
//! [`random::DEFAULT_SEEDS`]), `POSTERN_CONFORMANCE_SEED` with which seed they begin; alone it
//! replays one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod ground;
mod random;
mod shrink;
mod suite;
