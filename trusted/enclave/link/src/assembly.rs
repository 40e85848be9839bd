//! What `ring` leaves to assembly on x86-64, for a target that it brings none for.
//!
//! One function of it is called here: SHA-256, given by another implementation. The others belong to
//! ciphers and curves that nothing here uses (the volume's cipher is not ring's inside an enclave);
//! their names are only there for the linker.
//!
//! Holds: one that were called all the same ends the program; it never answers a wrong byte.
//! The names carry ring's version, which `Cargo.lock` fixes: with another one the program does not
//! link.

use sha2::digest::{consts::U64, generic_array::GenericArray};

/// SHA-256, whatever ring believes the CPU to have: it goes by the features that the build names.
macro_rules! sha256 {
    ($($name:ident,)+) => {
        $(
            /// SHA-256 over `count` blocks of 64 bytes at `data`, into the state at `state`.
            ///
            /// # Safety
            /// As ring calls it: both point to that much memory, which nobody else uses meanwhile.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name(
                state: *mut [u32; 8],
                data: *const GenericArray<u8, U64>,
                count: usize,
            ) {
                // SAFETY: the caller's promise.
                let state = unsafe { &mut *state };
                // SAFETY: the caller's promise; a block is bytes, of any alignment.
                let blocks = unsafe { core::slice::from_raw_parts(data, count) };
                sha2::compress256(state, blocks);
            }
        )+
    };
}

sha256! {
    ring_core_0_17_14__sha256_block_data_order_avx,
    ring_core_0_17_14__sha256_block_data_order_hw,
    ring_core_0_17_14__sha256_block_data_order_nohw,
    ring_core_0_17_14__sha256_block_data_order_ssse3,
}

/// What the CPU can do, as far as ring is to know: nothing beyond what every CPU of this kind can.
/// Its own function asks CPUID, which no enclave can.
///
/// # Safety
/// As ring calls it: `features` points to four words, which nobody else uses meanwhile.
#[unsafe(no_mangle)]
unsafe extern "C" fn ring_core_0_17_14__OPENSSL_cpuid_setup(features: *mut [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe { *features = [0; 4] };
}

/// Functions that portable code takes the place of.
macro_rules! never_called {
    ($($name:ident,)+) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() {
                std::process::abort()
            }
        )+
    };
}

never_called! {
    ring_core_0_17_14__ChaCha20_ctr32_avx2,
    ring_core_0_17_14__ChaCha20_ctr32_nohw,
    ring_core_0_17_14__ChaCha20_ctr32_ssse3_4x,
    ring_core_0_17_14__aes_gcm_dec_update_vaes_avx2,
    ring_core_0_17_14__aes_gcm_enc_update_vaes_avx2,
    ring_core_0_17_14__aes_hw_ctr32_encrypt_blocks,
    ring_core_0_17_14__aes_hw_set_encrypt_key_alt,
    ring_core_0_17_14__aes_hw_set_encrypt_key_base,
    ring_core_0_17_14__aesni_gcm_decrypt,
    ring_core_0_17_14__aesni_gcm_encrypt,
    ring_core_0_17_14__bn_gather5,
    ring_core_0_17_14__bn_mul4x_mont,
    ring_core_0_17_14__bn_mul4x_mont_gather5,
    ring_core_0_17_14__bn_mul_mont_nohw,
    ring_core_0_17_14__bn_mulx4x_mont,
    ring_core_0_17_14__bn_mulx4x_mont_gather5,
    ring_core_0_17_14__bn_power5_nohw,
    ring_core_0_17_14__bn_powerx5,
    ring_core_0_17_14__bn_scatter5,
    ring_core_0_17_14__bn_sqr8x_mont,
    ring_core_0_17_14__chacha20_poly1305_open_avx2,
    ring_core_0_17_14__chacha20_poly1305_open_sse41,
    ring_core_0_17_14__chacha20_poly1305_seal_avx2,
    ring_core_0_17_14__chacha20_poly1305_seal_sse41,
    ring_core_0_17_14__ecp_nistz256_mul_mont_adx,
    ring_core_0_17_14__ecp_nistz256_mul_mont_nohw,
    ring_core_0_17_14__ecp_nistz256_neg,
    ring_core_0_17_14__ecp_nistz256_ord_mul_mont_adx,
    ring_core_0_17_14__ecp_nistz256_ord_mul_mont_nohw,
    ring_core_0_17_14__ecp_nistz256_ord_sqr_mont_adx,
    ring_core_0_17_14__ecp_nistz256_ord_sqr_mont_nohw,
    ring_core_0_17_14__ecp_nistz256_point_add_adx,
    ring_core_0_17_14__ecp_nistz256_point_add_affine_adx,
    ring_core_0_17_14__ecp_nistz256_point_add_affine_nohw,
    ring_core_0_17_14__ecp_nistz256_point_add_nohw,
    ring_core_0_17_14__ecp_nistz256_point_double_adx,
    ring_core_0_17_14__ecp_nistz256_point_double_nohw,
    ring_core_0_17_14__ecp_nistz256_select_w5_avx2,
    ring_core_0_17_14__ecp_nistz256_select_w5_nohw,
    ring_core_0_17_14__ecp_nistz256_select_w7_avx2,
    ring_core_0_17_14__ecp_nistz256_select_w7_nohw,
    ring_core_0_17_14__ecp_nistz256_sqr_mont_adx,
    ring_core_0_17_14__ecp_nistz256_sqr_mont_nohw,
    ring_core_0_17_14__gcm_ghash_avx,
    ring_core_0_17_14__gcm_ghash_clmul,
    ring_core_0_17_14__gcm_ghash_vpclmulqdq_avx2_1,
    ring_core_0_17_14__gcm_init_avx,
    ring_core_0_17_14__gcm_init_clmul,
    ring_core_0_17_14__gcm_init_vpclmulqdq_avx2,
    ring_core_0_17_14__sha512_block_data_order_avx,
    ring_core_0_17_14__sha512_block_data_order_nohw,
    ring_core_0_17_14__vpaes_ctr32_encrypt_blocks,
    ring_core_0_17_14__vpaes_set_encrypt_key,
}
