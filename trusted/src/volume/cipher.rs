//! AES-256-GCM: `ring`'s, and inside an enclave image RustCrypto's.
//!
//! `ring` chooses among its assembly by CPUID, which no enclave can execute, and has none for that
//! target. RustCrypto's takes AES-NI and PCLMULQDQ if the build says that the CPU has them
//! (`-C target-feature=+aes,+pclmulqdq,+ssse3,+sse4.1`), and asks nobody; without, it is portable
//! code in constant time.
//!
//! Holds: both answer the same bytes.

#[cfg(target_env = "sgx")]
pub(super) use inside::Cipher;
#[cfg(not(target_env = "sgx"))]
pub(super) use outside::Cipher;

#[cfg(not(target_env = "sgx"))]
mod outside {
    use ring::aead;

    use crate::volume::crypto::{Forged, TAG, Tag};

    /// An expanded key.
    pub(crate) struct Cipher(aead::LessSafeKey);

    impl Cipher {
        #[inline(never)]
        pub(crate) fn new(secret: &[u8; 32]) -> Self {
            let key = aead::UnboundKey::new(&aead::AES_256_GCM, secret);
            // The only error of `new` is a key of another length.
            Self(aead::LessSafeKey::new(key.expect("an AES-256 key has 32 bytes")))
        }

        pub(crate) fn seal(&self, nonce: [u8; 12], aad: &[u8], data: &mut [u8]) -> Tag {
            let nonce = aead::Nonce::assume_unique_for_key(nonce);
            let sealed = self.0.seal_in_place_separate_tag(nonce, aead::Aad::from(aad), data);
            let mut tag = [0; TAG];
            // The only error of sealing is a message of more than 2^36 bytes.
            tag.copy_from_slice(sealed.expect("messages are shorter than GCM's limit").as_ref());
            tag
        }

        /// On an error `data` is anything.
        pub(crate) fn open(
            &self,
            nonce: [u8; 12],
            aad: &[u8],
            tag: &Tag,
            data: &mut [u8],
        ) -> Result<(), Forged> {
            let nonce = aead::Nonce::assume_unique_for_key(nonce);
            let aad = aead::Aad::from(aad);
            let opened = self.0.open_in_place_separate_tag(nonce, aad, (*tag).into(), data, 0..);
            opened.map(|_| ()).map_err(|_| Forged)
        }
    }
}

#[cfg(any(target_env = "sgx", test))]
mod inside {
    use aes_gcm::{AeadInPlace as _, Aes256Gcm, KeyInit as _};

    use crate::volume::crypto::{Forged, Tag};

    /// An expanded key.
    pub(crate) struct Cipher(Aes256Gcm);

    impl Cipher {
        #[inline(never)]
        pub(crate) fn new(secret: &[u8; 32]) -> Self {
            Self(Aes256Gcm::new(secret.into()))
        }

        pub(crate) fn seal(&self, nonce: [u8; 12], aad: &[u8], data: &mut [u8]) -> Tag {
            let sealed = self.0.encrypt_in_place_detached(&nonce.into(), aad, data);
            // The only error of sealing is a message of more than 2^36 bytes.
            sealed.expect("messages are shorter than GCM's limit").into()
        }

        /// On an error `data` is anything.
        pub(crate) fn open(
            &self,
            nonce: [u8; 12],
            aad: &[u8],
            tag: &Tag,
            data: &mut [u8],
        ) -> Result<(), Forged> {
            let opened = self.0.decrypt_in_place_detached(&nonce.into(), aad, data, tag.into());
            opened.map_err(|_| Forged)
        }
    }
}

// Between the two ciphers, of which an enclave has one.
#[cfg(test)]
#[cfg(not(target_env = "sgx"))]
mod tests {
    use super::{inside, outside};
    use crate::volume::crypto::Forged;
    use alloc::vec::Vec;

    /// Lengths around those at which implementations change their ways.
    const LENGTHS: [usize; 14] =
        [0, 1, 15, 16, 17, 63, 64, 127, 128, 129, 255, 1024, 4096, 4 * 4096 + 3];

    #[test]
    fn both_ciphers_seal_to_the_same_bytes_and_open_each_others() {
        for (n, length) in (0_u8..).zip(LENGTHS) {
            let secret = core::array::from_fn(|i| (i as u8).wrapping_mul(37) ^ n);
            let (one, other) = (outside::Cipher::new(&secret), inside::Cipher::new(&secret));
            let nonce = core::array::from_fn(|i| i as u8 ^ n.rotate_left(3));
            let aad: Vec<u8> = (0..usize::from(n) * 5).map(|i| i as u8).collect();
            let plain: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
            let (mut first, mut second) = (plain.clone(), plain.clone());
            let tag = one.seal(nonce, &aad, &mut first);
            assert_eq!(other.seal(nonce, &aad, &mut second), tag, "{length}");
            assert_eq!(first, second, "{length}");
            assert_eq!(one.open(nonce, &aad, &tag, &mut second), Ok(()));
            assert_eq!(other.open(nonce, &aad, &tag, &mut first), Ok(()));
            assert_eq!((&first, &second), (&plain, &plain));
        }
    }

    #[test]
    fn the_cipher_of_enclave_images_agrees_with_gcm_specification_test_case_16() {
        let hex = |text: &str| -> Vec<u8> {
            let digits = text.as_bytes().chunks(2);
            digits
                .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).unwrap())
                .collect()
        };
        let half = "feffe9928665731c6d6a8f9467308308";
        let secret = hex(&[half, half].concat()).try_into().unwrap();
        let nonce = hex("cafebabefacedbaddecaf888").try_into().unwrap();
        let aad = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let plain = "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809\
                     532fcf0e2449a6b525b16aedf5aa0de657ba637b39";
        let sealed = "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590db\
                      b3da7b08b1056828838c5f61e6393ba7a0abcc9f662";
        let mut data = hex(plain);
        let cipher = inside::Cipher::new(&secret);
        let tag = cipher.seal(nonce, &aad, &mut data);
        assert_eq!(data, hex(sealed));
        assert_eq!(tag.as_slice(), hex("76fc6ece0f4e1768cddf8853bb2d551b"));
        data[0] ^= 1;
        assert_eq!(cipher.open(nonce, &aad, &tag, &mut data), Err(Forged));
    }
}
