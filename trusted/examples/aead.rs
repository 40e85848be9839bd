//! What sealing 4 KiB costs: AES-256-GCM by RustCrypto, the cipher inside an enclave image, and by
//! ring, that of the simulated enclave. `trusted/enclave/examples/measure.rs` runs the first inside.
//!
//! ```text
//! cargo run --release -p postern-trusted --example aead
//! ```

use std::time::Instant;

use aes_gcm::{AeadInPlace as _, Aes256Gcm, KeyInit as _};

/// Blocks of one round, and rounds, of which the best counts.
const BLOCKS: u32 = 20_000;
const ROUNDS: usize = 5;

#[cfg(not(target_env = "sgx"))]
fn main() {
    println!("AES-256-GCM, 4 KiB, RustCrypto: {:.2} us", rust_crypto());
    println!("AES-256-GCM, 4 KiB, ring: {:.2} us", ring());
}

/// Microseconds for a block.
fn best(mut seal: impl FnMut(&mut [u8; 4096], [u8; 12])) -> f64 {
    let mut block = [7; 4096];
    let mut round = || {
        let began = Instant::now();
        for number in 0..BLOCKS {
            let mut nonce = [0; 12];
            nonce[..4].copy_from_slice(&number.to_le_bytes());
            seal(&mut block, nonce);
        }
        began.elapsed().as_secs_f64() * 1e6 / f64::from(BLOCKS)
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

/// Microseconds for a block by RustCrypto.
pub fn rust_crypto() -> f64 {
    let cipher = Aes256Gcm::new(&[9; 32].into());
    best(|block, nonce| {
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), &[1; 40], block);
        assert!(tag.is_ok(), "no tag");
    })
}

#[cfg(not(target_env = "sgx"))]
fn ring() -> f64 {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let Ok(key) = UnboundKey::new(&AES_256_GCM, &[9; 32]) else { return f64::NAN };
    let key = LessSafeKey::new(key);
    best(|block, nonce| {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from([1; 40]), block);
        assert!(tag.is_ok(), "no tag");
    })
}
