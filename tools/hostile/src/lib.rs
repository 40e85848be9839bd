//! A host that breaks every rule of the boundary, by seed. For tests alone: no part of a release.
//!
//! [`Host`] plays the daemon's end of a port: it takes descriptors, keeps blocks in a [`Store`] and
//! answers, honestly or not, as its [`Temper`] and the seed decide. It knows the layout of the port
//! (`postern_edl::port`) and nothing of either side's code. [`replies`] are the lies for control calls.
//!
//! What it does wrong follows the taxonomy of Khandaker and others (COIN attacks, ASPLOS 2020):
//! concurrency (words and buffers that change while they are used), order (answers too early,
//! twice, again, never), inputs (ids, lengths, cursors, blocks that cannot be), nesting (acting from
//! inside the enclave's own calls to the host: its caller lets it, from the clock and the doorbell).

mod host;
pub mod inputs;
pub mod replies;
mod rng;
mod store;
mod temper;

pub use host::{Deeds, Host};
pub use rng::Rng;
pub use store::{BLOCK_WORDS, Block, Memory, Store};
pub use temper::Temper;
