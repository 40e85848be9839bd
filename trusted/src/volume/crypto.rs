//! All the cryptography of the volume: AES-256-GCM, HKDF-SHA256, HMAC-SHA256.
//!
//! Input and output of the cipher always lie in private memory: a kernel may read its output back
//! to compute the tag, and a host that could change it in between would have its own bytes
//! authenticated. Nothing here ever sees a transfer buffer.
//!
//! Holds: one (key, nonce) seals one plaintext. Either the nonce carries a counter that is used
//! once in the epoch, or the key is derived from a fresh random salt and used once.

use ring::{digest, hmac};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{cipher::Cipher, layout::Order};

/// Length of an authentication tag in bytes.
pub(crate) const TAG: usize = 16;
/// An authentication tag.
pub(crate) type Tag = [u8; TAG];
/// Random bytes that make a derived key single.
pub(crate) type Salt = [u8; 24];

/// Number of the one cipher of this format: AES-256-GCM.
pub(crate) const CIPHER: u32 = 1;

/// What a sealed message is; first byte of its nonce and of its associated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A block of the guest's file.
    Data = 1,
    /// A node of the map.
    Node = 2,
    /// A page or node of the space map.
    Space = 3,
    /// A journal block.
    Journal = 4,
}

/// A secret of 32 bytes, wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Secret(pub(crate) [u8; 32]);

/// The message does not authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forged;

/// HKDF-SHA256 (RFC 5869) with one block of output: 32 bytes.
pub(crate) fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> Secret {
    let mut out = Secret([0; 32]);
    derive_into(&mut out, secret, salt, info);
    wipe_stack();
    out
}

/// Bytes of stack that the functions above [`wipe_stack`] use.
const STACK: usize = 4 << 10;

/// Overwrites what the library has left on the stack: it wipes neither the states of HMAC, in which
/// the input lies as it is, nor its copies of a key.
#[inline(never)]
fn wipe_stack() {
    let mut room = [0_u8; STACK];
    room.zeroize();
    core::hint::black_box(&room);
}

#[inline(never)]
fn derive_into(out: &mut Secret, secret: &[u8], salt: &[u8], info: &[&[u8]]) {
    let extract = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), secret);
    let expand = hmac::Key::new(hmac::HMAC_SHA256, extract.as_ref());
    let mut context = hmac::Context::with_key(&expand);
    for part in info {
        context.update(part);
    }
    context.update(&[1]);
    out.0.copy_from_slice(context.sign().as_ref());
}

/// HMAC-SHA256 of `parts`.
pub(crate) fn mac(key: &Secret, parts: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &key.0));
    for part in parts {
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.sign().as_ref());
    out
}

/// Checks an HMAC-SHA256 of `data` in constant time.
pub(crate) fn mac_holds(key: &Secret, data: &[u8], expected: &[u8]) -> bool {
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key.0), data, expected).is_ok()
}

/// SHA-256.
pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    out
}

/// An expanded AES-256-GCM key, overwritten when dropped.
pub(crate) struct AeadKey(Cipher);

impl Drop for AeadKey {
    fn drop(&mut self) {
        // The library offers no wiping: the schedule of a key that is no secret takes its place.
        self.0 = Cipher::new(&[0; 32]);
        // Keeps the compiler from leaving that out as a store that nobody reads.
        core::hint::black_box(&self.0);
    }
}

impl AeadKey {
    pub(crate) fn new(secret: &Secret) -> Self {
        let key = Self(Cipher::new(&secret.0));
        wipe_stack();
        key
    }

    /// Seals `data` in place, in private memory.
    pub(crate) fn seal(&self, nonce: [u8; 12], aad: &[u8], data: &mut [u8]) -> Tag {
        self.0.seal(nonce, aad, data)
    }

    /// Opens `data` in place, in private memory.
    pub(crate) fn open(
        &self,
        nonce: [u8; 12],
        aad: &[u8],
        tag: &Tag,
        data: &mut [u8],
    ) -> Result<(), Forged> {
        self.0.open(nonce, aad, tag, data).or_else(|Forged| {
            data.zeroize();
            if left_out!(AnyTag) { Ok(()) } else { Err(Forged) }
        })
    }
}

/// Nonce of messages whose key is used for one message only.
pub(crate) const SINGLE: [u8; 12] = [0; 12];

/// Nonce of a message sealed under an epoch key: kind 8 bits, epoch 32, counter 56, little endian.
pub(crate) fn nonce(kind: Kind, order: Order) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[0] = kind as u8;
    nonce[1..5].copy_from_slice(&order.epoch().to_le_bytes());
    nonce[5..12].copy_from_slice(&order.counter().to_le_bytes()[..7]);
    nonce
}

/// Associated data of blocks and nodes: what it is and where in its tree it belongs.
pub(crate) fn aad(kind: Kind, level: u8, index: u64) -> [u8; 16] {
    let mut aad = [0; 16];
    aad[0] = kind as u8;
    aad[1] = level;
    aad[8..16].copy_from_slice(&index.to_le_bytes());
    aad
}

/// The key of one epoch: one opening of the volume, or a part of one.
pub(crate) struct EpochKey {
    /// Number of the epoch.
    pub(crate) id: u32,
    /// Number of the volume key it is derived from.
    pub(crate) version: u16,
    key: AeadKey,
    /// Every message sealed, for the invariant that no nonce repeats (tests only).
    #[cfg(test)]
    pub(crate) secret: [u8; 32],
}

impl EpochKey {
    /// Seals one message under `order`, which must be of this epoch and never used before.
    pub(crate) fn seal(&self, kind: Kind, order: Order, aad: &[u8], data: &mut [u8]) -> Tag {
        debug_assert_eq!(order.epoch(), self.id);
        #[cfg(test)]
        super::tests::nonces::record(&self.secret, nonce(kind, order), aad, data);
        self.key.seal(nonce(kind, order), aad, data)
    }

    /// Opens one message that was sealed under `order`.
    pub(crate) fn open(
        &self,
        kind: Kind,
        order: Order,
        aad: &[u8],
        tag: &Tag,
        data: &mut [u8],
    ) -> Result<(), Forged> {
        self.key.open(nonce(kind, order), aad, tag, data)
    }
}

/// A volume key and its number in the keyring.
struct Version {
    number: u16,
    secret: Secret,
}

/// The keys of one volume, and what binds them to it: one that seals, and while a rekey is on its
/// way the one before, which only opens what is not sealed anew yet.
pub(crate) struct VolumeKey {
    uuid: [u8; 16],
    current: Version,
    retiring: Option<Version>,
}

impl VolumeKey {
    /// The first key of a volume.
    pub(crate) const fn new(uuid: [u8; 16], secret: Secret) -> Self {
        Self { uuid, current: Version { number: 1, secret }, retiring: None }
    }

    /// The keys of a keyring, each with its number: the one that seals, and the one that it takes
    /// the place of.
    pub(crate) fn of_keyring(
        uuid: [u8; 16],
        current: (u16, Secret),
        retiring: Option<(u16, Secret)>,
    ) -> Self {
        let version = |(number, secret)| Version { number, secret };
        Self { uuid, current: version(current), retiring: retiring.map(version) }
    }

    /// The volume's identity.
    pub(crate) const fn uuid(&self) -> &[u8; 16] {
        &self.uuid
    }

    /// Number of the key that seals.
    pub(crate) const fn version(&self) -> u16 {
        self.current.number
    }

    /// Whether a rekey is on its way.
    pub(crate) const fn is_retiring(&self) -> bool {
        self.retiring.is_some()
    }

    fn versions(&self) -> impl Iterator<Item = &Version> {
        core::iter::once(&self.current).chain(&self.retiring)
    }

    fn epoch_under(&self, version: &Version, id: u32, salt: &Salt) -> EpochKey {
        let secret = derive(
            &version.secret.0,
            salt,
            &[b"postern/1 epoch", &self.uuid, &id.to_le_bytes(), &CIPHER.to_le_bytes()],
        );
        EpochKey {
            id,
            version: version.number,
            key: AeadKey::new(&secret),
            #[cfg(test)]
            secret: secret.0,
        }
    }

    /// The key of a new epoch `id` whose salt is `salt`.
    pub(crate) fn epoch(&self, id: u32, salt: &Salt) -> EpochKey {
        self.epoch_under(&self.current, id, salt)
    }

    /// The key of an epoch of the volume key with this number; `None` if the keyring no longer has
    /// that one.
    pub(crate) fn epoch_of(&self, version: u16, id: u32, salt: &Salt) -> Option<EpochKey> {
        self.versions().find(|v| v.number == version).map(|v| self.epoch_under(v, id, salt))
    }

    /// What may be the key of an epoch whose volume key nothing names.
    pub(crate) fn epochs(&self, id: u32, salt: &Salt) -> impl Iterator<Item = EpochKey> {
        self.versions().map(move |version| self.epoch_under(version, id, salt))
    }

    fn single_under(&self, version: &Version, label: &[u8], salt: &Salt) -> AeadKey {
        let cipher = CIPHER.to_le_bytes();
        AeadKey::new(&derive(&version.secret.0, salt, &[label, &self.uuid, &cipher]))
    }

    /// The key to seal one message of its own salt with; `label` says what it is.
    pub(crate) fn single(&self, label: &[u8], salt: &Salt) -> AeadKey {
        self.single_under(&self.current, label, salt)
    }

    /// Opens a message that was sealed with [`Self::single`], before or during a rekey.
    pub(crate) fn open_single(
        &self,
        label: &[u8],
        salt: &Salt,
        aad: &[u8],
        tag: &Tag,
        data: &mut [u8],
    ) -> Result<(), Forged> {
        let Some(retiring) = &self.retiring else {
            return self.single(label, salt).open(SINGLE, aad, tag, data);
        };
        // A failed opening wipes what it worked on.
        let sealed = alloc::vec::Vec::from(&*data);
        self.single(label, salt).open(SINGLE, aad, tag, data).or_else(|Forged| {
            data.copy_from_slice(&sealed);
            self.single_under(retiring, label, salt).open(SINGLE, aad, tag, data)
        })
    }
}

#[cfg(test)]
mod known_answers {
    use super::*;
    use alloc::vec::Vec;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn derive_agrees_with_rfc_5869_test_case_1() {
        // The first 32 of the 42 bytes of output.
        let okm = derive(
            &hex("0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b"),
            &hex("000102030405060708090a0b0c"),
            &[&hex("f0f1f2f3f4"), &hex("f5f6f7f8f9")],
        );
        let expected = hex("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
        assert_eq!(okm.0.as_slice(), expected.as_slice());
    }

    #[test]
    fn derive_agrees_with_rfc_5869_test_case_3() {
        let okm = derive(&hex("0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b"), &[], &[]);
        let expected = hex("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d");
        assert_eq!(okm.0.as_slice(), expected.as_slice());
    }

    #[test]
    fn derive_agrees_with_rfc_5869_test_case_2_which_is_longer_than_a_block() {
        let bytes = |from: u8, to: u8| (from..=to).collect::<Vec<u8>>();
        let info = bytes(0xb0, 0xff);
        let okm = derive(&bytes(0x00, 0x4f), &bytes(0x60, 0xaf), &[&info[..1], &info[1..]]);
        let expected = hex("b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c");
        assert_eq!(okm.0.as_slice(), expected.as_slice());
    }

    #[test]
    fn sealing_agrees_with_gcm_specification_test_cases_13_14_and_15() {
        let seal = |key: &str, nonce: &str, plain: &str| {
            let mut secret = Secret([0; 32]);
            secret.0.copy_from_slice(&hex(key));
            let mut data = hex(plain);
            let tag = AeadKey::new(&secret).seal(hex(nonce).try_into().unwrap(), &[], &mut data);
            (data, Vec::from(tag))
        };
        let (zeros, nonce) = ("00".repeat(32), "00".repeat(12));
        assert_eq!(seal(&zeros, &nonce, ""), (Vec::new(), hex("530f8afbc74536b9a963b4f1c4cb738b")));
        assert_eq!(
            seal(&zeros, &nonce, &"00".repeat(16)),
            (hex("cea7403d4d606b6e074ec5d3baf39d18"), hex("d0d1c8a799996bf0265b98b5d48ab919"))
        );
        assert_eq!(
            seal(
                "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
                "cafebabefacedbaddecaf888",
                "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf\
                 0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
            ),
            (
                hex(
                    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3d\
                     a7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
                ),
                hex("b094dac5d93471bdec1a502270e3cc6c")
            )
        );
    }

    #[test]
    #[allow(unsafe_code)]
    fn a_dropped_key_leaves_nothing_of_its_schedule() {
        let secret = Secret(core::array::from_fn(|i| i as u8 ^ 0x5a));
        let mut key = core::mem::ManuallyDrop::new(AeadKey::new(&secret));
        let has_secret = |key: &core::mem::ManuallyDrop<AeadKey>| {
            let at = core::ptr::from_ref(key).cast::<u8>();
            // SAFETY: `len` bytes lie there and nothing changes them meanwhile; read one by one
            //    and volatile, padding as it is.
            let byte = |i: usize| unsafe { at.add(i).read_volatile() };
            let bytes: Vec<u8> = (0..size_of::<AeadKey>()).map(byte).collect();
            // The first two round keys of AES-256 are the key itself, in words of either order.
            let reversed: Vec<u8> =
                secret.0.chunks(4).flat_map(|word| word.iter().rev().copied()).collect();
            bytes.windows(32).any(|w| w == secret.0 || w == &reversed[..])
        };
        assert!(has_secret(&key), "the control");
        // SAFETY: dropped once, here; what stays are bytes.
        unsafe { core::mem::ManuallyDrop::drop(&mut key) };
        assert!(!has_secret(&key));
    }

    #[test]
    fn sealing_agrees_with_gcm_specification_test_case_16() {
        let mut key = Secret([0; 32]);
        key.0.copy_from_slice(&hex(
            "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
        ));
        let mut nonce = [0; 12];
        nonce.copy_from_slice(&hex("cafebabefacedbaddecaf888"));
        let aad = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let plain = hex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e24\
             49a6b525b16aedf5aa0de657ba637b39",
        );
        let mut data = plain.clone();
        let key = AeadKey::new(&key);
        let tag = key.seal(nonce, &aad, &mut data);
        assert_eq!(
            data,
            hex(
                "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b0\
                 8b1056828838c5f61e6393ba7a0abcc9f662"
            )
        );
        assert_eq!(tag.as_slice(), hex("76fc6ece0f4e1768cddf8853bb2d551b").as_slice());
        assert_eq!(key.open(nonce, &aad, &tag, &mut data), Ok(()));
        assert_eq!(data, plain);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused_and_leaves_no_plaintext() {
        let key = AeadKey::new(&Secret([7; 32]));
        let mut data = [5; 64];
        let tag = key.seal(SINGLE, b"where", &mut data);
        let mut wrong = data;
        wrong[63] ^= 1;
        assert_eq!(key.open(SINGLE, b"where", &tag, &mut wrong), Err(Forged));
        assert_eq!(wrong, [0; 64]);
        let mut moved = data;
        assert_eq!(key.open(SINGLE, b"there", &tag, &mut moved), Err(Forged));
    }
}
