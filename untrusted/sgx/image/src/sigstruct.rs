//! SIGSTRUCT: who answers for a measurement.
//!
//! Holds: [`Sigstruct::verify`] passes only what EINIT would: both headers, an RSA signature with
//! exponent 3 over all signed bytes by the modulus it names, and the two quotients that go with it.
//! Nothing is secret here but the [`SigningKey`], which stays in the memory of the one who signs.

use core::fmt;

use rsa::{
    BigUint, Pkcs1v15Sign, RsaPrivateKey, RsaPublicKey,
    pkcs1::DecodeRsaPrivateKey as _,
    pkcs8::DecodePrivateKey as _,
    sha2::{Digest as _, Sha256},
    traits::PublicKeyParts as _,
};

use crate::bytes::{array, u16_at, u32_at, u64_at};

/// Bytes of the structure.
pub const SIGSTRUCT_BYTES: usize = 1808;
/// ATTRIBUTES: the enclave can be looked into by a debugger.
pub const ATTRIBUTE_DEBUG: u64 = 2;
/// ATTRIBUTES: the enclave runs in 64-bit mode.
pub const ATTRIBUTE_MODE64: u64 = 4;

const HEADER: [u8; 16] = [6, 0, 0, 0, 0xe1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];
const HEADER2: [u8; 16] = [1, 1, 0, 0, 0x60, 0, 0, 0, 0x60, 0, 0, 0, 1, 0, 0, 0];
/// Bytes of the modulus, the signature and each quotient.
const RSA: usize = 384;
const MODULUS: usize = 128;
const EXPONENT: usize = 512;
const SIGNATURE: usize = 516;
const BODY: usize = 900;
const BODY_END: usize = 1028;
const Q1: usize = 1040;
const Q2: usize = 1424;

/// What of an enclave a signer decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Product number.
    pub product: u16,
    /// Security version: an enclave gets the keys of lower ones, never of higher ones.
    pub version: u16,
    /// Day of the signature, as digits: 0x2026_1122 is the 22nd of November 2026.
    pub date: u32,
    /// Whether the enclave may be debugged: never for secrets that matter.
    pub debug: bool,
}

/// Why no signature can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SignError {
    /// The file holds no RSA private key in PEM (PKCS#1 or PKCS#8, without passphrase).
    Unreadable,
    /// The key has this many bits and this exponent fits or not; 3072 and 3 are wanted.
    Kind {
        /// Bits of the modulus.
        bits: usize,
        /// Whether the public exponent is 3.
        exponent_3: bool,
    },
    /// The key does not sign: its parts do not belong together.
    Broken,
}

impl fmt::Display for SignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable => f.write_str("this is no RSA private key in PEM"),
            Self::Kind { bits, exponent_3 } => write!(
                f,
                "the key has {bits} bits and {} exponent; an enclave needs 3072 and 3",
                if *exponent_3 { "the right" } else { "another" }
            ),
            Self::Broken => f.write_str("the parts of the key do not belong together"),
        }
    }
}

impl core::error::Error for SignError {}

/// What is wrong with a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SigstructError {
    /// The file has another length than [`SIGSTRUCT_BYTES`].
    Length,
    /// A fixed or reserved field has another value.
    Header,
    /// The signature is not by the key that the structure names, or of other contents.
    Signature,
    /// The quotients do not belong to the signature.
    Quotients,
}

impl fmt::Display for SigstructError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "a SIGSTRUCT has 1808 bytes",
            Self::Header => "the fixed fields are not those of a SIGSTRUCT",
            Self::Signature => "the signature is wrong",
            Self::Quotients => "the quotients q1 and q2 do not belong to the signature",
        })
    }
}

impl core::error::Error for SigstructError {}

/// An RSA key of 3072 bits with exponent 3.
pub struct SigningKey(RsaPrivateKey);

impl SigningKey {
    /// Reads a key from PEM text.
    ///
    /// # Errors
    /// [`SignError::Unreadable`], [`SignError::Kind`].
    pub fn from_pem(text: &str) -> Result<Self, SignError> {
        let key = RsaPrivateKey::from_pkcs8_pem(text)
            .or_else(|_| RsaPrivateKey::from_pkcs1_pem(text))
            .map_err(|_| SignError::Unreadable)?;
        let (bits, exponent_3) = (key.n().bits(), *key.e() == BigUint::from(3_u8));
        if bits != 3072 || !exponent_3 {
            return Err(SignError::Kind { bits, exponent_3 });
        }
        Ok(Self(key))
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

/// A signature over a measurement, verified or not.
#[derive(Clone, PartialEq, Eq)]
pub struct Sigstruct(Box<[u8; SIGSTRUCT_BYTES]>);

impl Sigstruct {
    /// Signs `mrenclave`.
    ///
    /// Any state of the CPU's extended registers beyond x87 and SSE may be on or off.
    ///
    /// # Errors
    /// [`SignError::Broken`].
    pub fn sign(
        mrenclave: &[u8; 32],
        identity: &Identity,
        key: &SigningKey,
    ) -> Result<Self, SignError> {
        let mut all = Box::new([0; SIGSTRUCT_BYTES]);
        let mut put = |at: usize, bytes: &[u8]| all[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &HEADER);
        put(20, &identity.date.to_le_bytes());
        put(24, &HEADER2);
        put(EXPONENT, &3_u32.to_le_bytes());
        let debug = if identity.debug { ATTRIBUTE_DEBUG } else { 0 };
        put(904, &u32::MAX.to_le_bytes());
        put(928, &(ATTRIBUTE_MODE64 | debug).to_le_bytes());
        put(936, &3_u64.to_le_bytes());
        // An enclave signed for debugging may run without; not the other way round.
        let free = if identity.debug { ATTRIBUTE_DEBUG } else { 0 };
        put(944, &(!free).to_le_bytes());
        put(952, &3_u64.to_le_bytes());
        put(960, mrenclave);
        put(1024, &identity.product.to_le_bytes());
        put(1026, &identity.version.to_le_bytes());
        let mut made = Self(all);
        let signature = key
            .0
            .sign(Pkcs1v15Sign::new::<Sha256>(), &made.digest())
            .map_err(|_| SignError::Broken)?;
        let (modulus, signature) = (key.0.n().clone(), BigUint::from_bytes_be(&signature));
        let (q1, q2) = quotients(&signature, &modulus);
        for (at, number) in [(MODULUS, modulus), (SIGNATURE, signature), (Q1, q1), (Q2, q2)] {
            let bytes = number.to_bytes_le();
            let room = made.0.get_mut(at..at + RSA).and_then(|room| room.get_mut(..bytes.len()));
            room.ok_or(SignError::Broken)?.copy_from_slice(&bytes);
        }
        Ok(made)
    }

    /// Takes the bytes of a signature; nothing is verified.
    ///
    /// # Errors
    /// [`SigstructError::Length`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SigstructError> {
        let bytes: [u8; SIGSTRUCT_BYTES] = bytes.try_into().map_err(|_| SigstructError::Length)?;
        Ok(Self(Box::new(bytes)))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; SIGSTRUCT_BYTES] {
        &self.0
    }

    /// Verifies the structure and its signature as EINIT does. Who may sign is for the caller to
    /// say, by [`Self::mrsigner`].
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify(&self) -> Result<(), SigstructError> {
        let all = &self.0[..];
        let zeros = |from: usize, to: usize| all[from..to].iter().all(|byte| *byte == 0);
        let fixed = all[..16] == HEADER && all[24..40] == HEADER2;
        let reserved = zeros(44, 128) && zeros(910, 912) && zeros(992, 1008) && zeros(1028, 1040);
        if !fixed || !reserved || u32_at(all, EXPONENT) != Some(3) {
            return Err(SigstructError::Header);
        }
        let number = |at: usize| BigUint::from_bytes_le(&all[at..at + RSA]);
        let (modulus, signature) = (number(MODULUS), number(SIGNATURE));
        if modulus.bits() != 3072 || signature >= modulus {
            return Err(SigstructError::Signature);
        }
        let mut big_endian: [u8; RSA] = array(all, SIGNATURE).ok_or(SigstructError::Length)?;
        big_endian.reverse();
        let key = RsaPublicKey::new(modulus.clone(), BigUint::from(3_u8))
            .map_err(|_| SigstructError::Signature)?;
        key.verify(Pkcs1v15Sign::new::<Sha256>(), &self.digest(), &big_endian)
            .map_err(|_| SigstructError::Signature)?;
        if quotients(&signature, &modulus) == (number(Q1), number(Q2)) {
            Ok(())
        } else {
            Err(SigstructError::Quotients)
        }
    }

    /// SHA-256 of what is signed.
    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(&self.0[..MODULUS]);
        hash.update(&self.0[BODY..BODY_END]);
        hash.finalize().into()
    }

    /// SHA-256 of the signer's modulus: who signed.
    #[must_use]
    pub fn mrsigner(&self) -> [u8; 32] {
        Sha256::digest(&self.0[MODULUS..MODULUS + RSA]).into()
    }

    /// The measurement that is answered for.
    #[must_use]
    pub fn mrenclave(&self) -> [u8; 32] {
        array(&self.0[..], 960).unwrap_or_default()
    }

    /// What the signer decided.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let all = &self.0[..];
        Identity {
            product: u16_at(all, 1024).unwrap_or_default(),
            version: u16_at(all, 1026).unwrap_or_default(),
            date: u32_at(all, 20).unwrap_or_default(),
            debug: self.attributes().0 & ATTRIBUTE_DEBUG != 0,
        }
    }

    /// ATTRIBUTES the signer asks for: flags, and extended features (XFRM).
    #[must_use]
    pub fn attributes(&self) -> (u64, u64) {
        (u64_at(&self.0[..], 928).unwrap_or_default(), u64_at(&self.0[..], 936).unwrap_or_default())
    }

    /// Which bits of them must be as asked.
    #[must_use]
    pub fn attribute_mask(&self) -> (u64, u64) {
        (u64_at(&self.0[..], 944).unwrap_or_default(), u64_at(&self.0[..], 952).unwrap_or_default())
    }
}

impl fmt::Debug for Sigstruct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sigstruct").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

/// What spares the CPU a division: s² / n, and s · (s² mod n) / n.
fn quotients(signature: &BigUint, modulus: &BigUint) -> (BigUint, BigUint) {
    let square = signature * signature;
    let q1 = &square / modulus;
    let q2 = (&square % modulus) * signature / modulus;
    (q1, q2)
}
