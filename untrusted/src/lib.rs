//! posternd, the untrusted side: owns host files, real native AIO and the probes.
//!
//! Knows no key and no plaintext. Distrusts the enclave as much as the enclave distrusts it: every
//! descriptor is copied once and checked before anything is done with it.
//!
//! [`socket`] and [`connection`] carry the calls of `postern.edl`, for those whom [`admission`] lets
//! in, on a socket that is made here or is there already ([`activation`]); [`session`] and [`files`]
//! own what a call opens, [`mod@lease`] says for how long, [`limits`] how much of it; [`region`],
//! [`lane`] and [`engine`] are the data path; [`stats`], [`volumes`], [`claims`], [`records`], [`report`],
//! [`measured`], [`metrics`], [`web`] and [`endpoint`] tell what happened; [`confinement`] is the cage around
//! all of it.

pub mod activation;
pub mod admission;
pub mod claims;
pub mod confinement;
pub mod connection;
pub mod daemon;
pub mod directory;
pub mod endpoint;
pub mod engine;
pub mod files;
pub mod histogram;
pub mod lane;
pub mod lease;
pub mod limits;
pub mod measured;
pub mod metrics;
pub mod passing;
pub mod probes;
pub mod problem;
pub mod records;
pub mod region;
pub mod report;
pub mod session;
pub mod socket;
pub mod stats;
pub mod volumes;
pub mod web;
