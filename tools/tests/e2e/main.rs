//! End to end: the built release parts, real fio, real signals, real damage.
//!
//! `cargo xtask test` (or `cargo xtask e2e`) names the parts' directory in `POSTERN_E2E_PARTS`.
//! Without it every test here says that it skips, so that a plain `cargo test` stays green.

// Helpers outside of test functions panic too: that is how a test fails.
#![allow(clippy::unwrap_used)]

mod activation;
mod blame;
mod browser;
mod claims;
mod common;
mod counter;
mod death;
mod devices;
mod directory;
mod filesystems;
mod full;
mod handshake;
mod keys;
mod kill;
mod launcher;
mod lease;
mod limits;
mod matrix;
mod memory;
mod observe;
mod page;
mod programs;
mod reader;
mod record;
mod refusals;
mod seal;
mod selfcheck;
mod sight;
mod succession;
mod switch;
mod tamper;
mod told;
mod usdt;
