//! The trusted end of the port against a host played by the tests, honest and hostile.
//!
//! The host sees what a daemon sees: the region as words, and the two doorbells. It shares no code
//! with the lane beyond the layout in `postern_edl::port`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod flow;
mod host;
mod hostile;
mod limits;
mod litmus;
mod short;
mod succession;
mod threads;
