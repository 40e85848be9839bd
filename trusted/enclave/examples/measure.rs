//! What things cost inside: leaving and coming back, and sealing a block.
#![feature(sgx_platform)]

#[path = "../../examples/aead.rs"]
mod aead;

use std::{os::fortanix_sgx::usercalls, time::Instant};

use postern_enclave as _; // What the linker asks for.

/// Calls of one round, and rounds, of which the best counts.
const CALLS: u32 = 50_000;
const ROUNDS: usize = 5;

fn main() {
    let round = || {
        let began = Instant::now();
        for _ in 0..CALLS {
            // The host reads its clock; the rest is the way out and back.
            let _ = usercalls::insecure_time();
        }
        began.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS)
    };
    let best = (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min);
    println!("usercall: {best:.2} us");
    println!("AES-256-GCM, 4 KiB, RustCrypto, inside: {:.2} us", aead::rust_crypto());
}
