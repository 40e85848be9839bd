//! The static header: what the volume is, and its key slots. Two copies, written alternately.
//!
//! Holds: nothing of the header is believed before its version and features are known; a slot
//! opens only with a key whose commitment it carries; once a slot is open, the whole header is
//! checked under the master key.

use super::{
    crypto::{self, AeadKey, CIPHER, SINGLE, Secret, TAG},
    error::VolumeError,
    layout::{BLOCK_BYTES, HEADER_BLOCKS, get_array, get32, get64, put, put32, put64},
};
use crate::disk::BLOCK;

pub(crate) const BYTES: usize = HEADER_BLOCKS * BLOCK;
/// A copy of the header in private memory.
pub(crate) type HeaderBytes = [u8; BYTES];

const MAGIC: &[u8; 8] = b"POSTERNV";
const VERSION: u32 = 1;
const INCOMPAT_KNOWN: u64 = 0;
const RO_COMPAT_KNOWN: u64 = 0;

const SLOTS_AT: usize = BLOCK;
const SLOT_BYTES: usize = 512;
const SLOTS: usize = 8;
const KEYRING_AT: usize = 2 * BLOCK;
const KEYRING_BODY: usize = 64;
const SHA_AT: usize = BYTES - 64;
const MAC_AT: usize = BYTES - 32;

/// Slot holds a wrapped master.
const SLOT_USED: u8 = 1;
/// The secret is 32 bytes of a key file.
const KIND_KEY_FILE: u8 = 1;
const WRAPPED_AT: usize = 64;
const COMMITMENT_AT: usize = WRAPPED_AT + 32 + TAG;

/// What an open header gives.
pub(crate) struct Opened {
    pub(crate) uuid: [u8; 16],
    /// Number of this writing of the header.
    pub(crate) generation: u64,
    /// The newest volume key.
    pub(crate) key: Secret,
    /// Its version in the keyring.
    pub(crate) key_version: u32,
    /// Unknown features that forbid writing.
    pub(crate) read_only: bool,
}

/// Fresh randomness for a new header.
pub(crate) struct Fresh {
    pub(crate) uuid: [u8; 16],
    pub(crate) master: Secret,
    pub(crate) key: Secret,
    pub(crate) slot_salt: [u8; 32],
    pub(crate) keyring_salt: [u8; 24],
}

fn slot_keys(secret: &Secret, salt: &[u8], uuid: &[u8; 16]) -> (AeadKey, Secret) {
    let wrap = crypto::derive(&secret.0, salt, &[b"postern/1 slot kek", uuid]);
    (AeadKey::new(&wrap), crypto::derive(&secret.0, salt, &[b"postern/1 slot commitment", uuid]))
}

fn keyring_key(master: &Secret, salt: &[u8], uuid: &[u8; 16]) -> AeadKey {
    AeadKey::new(&crypto::derive(&master.0, salt, &[b"postern/1 keyring", uuid]))
}

fn header_key(master: &Secret, uuid: &[u8; 16]) -> Secret {
    crypto::derive(&master.0, &[], &[b"postern/1 header", uuid])
}

fn slot_aad(slot: &[u8], uuid: &[u8; 16]) -> [u8; 80] {
    let mut aad = [0; 80];
    aad[..64].copy_from_slice(&slot[..64]);
    aad[64..].copy_from_slice(uuid);
    aad
}

/// Writes a new header with one key-file slot into `out` (all zeros).
pub(crate) fn encode(out: &mut HeaderBytes, fresh: &Fresh, secret: &Secret, host_blocks: u64) {
    put(out, 0, MAGIC);
    put32(out, 8, VERSION);
    put64(out, 16, 1);
    put(out, 48, &fresh.uuid);
    put32(out, 64, CIPHER);
    put32(out, 68, BLOCK_BYTES as u32);
    put32(out, 72, 1);
    put32(out, 76, SLOTS as u32);
    put64(out, 88, host_blocks);

    let slot = &mut out[SLOTS_AT..SLOTS_AT + SLOT_BYTES];
    slot[0] = SLOT_USED;
    slot[1] = KIND_KEY_FILE;
    put(slot, 32, &fresh.slot_salt);
    let (wrap, commitment) = slot_keys(secret, &fresh.slot_salt, &fresh.uuid);
    let aad = slot_aad(slot, &fresh.uuid);
    let mut wrapped = fresh.master.clone();
    let tag = wrap.seal(SINGLE, &aad, &mut wrapped.0);
    put(slot, WRAPPED_AT, &wrapped.0);
    put(slot, WRAPPED_AT + 32, &tag);
    let committed = crypto::mac(&commitment, &[&slot[..COMMITMENT_AT]]);
    put(slot, COMMITMENT_AT, &committed);

    let ring = &mut out[KEYRING_AT..KEYRING_AT + BLOCK];
    put(ring, 0, &fresh.keyring_salt);
    let body = &mut ring[KEYRING_BODY..];
    put32(body, 0, 1);
    put32(body, 4, 1);
    put32(body, 64, 1);
    put(body, 64 + 8, &fresh.key.0);
    let tag = keyring_key(&fresh.master, &fresh.keyring_salt, &fresh.uuid).seal(
        SINGLE,
        &fresh.uuid,
        body,
    );
    put(ring, 24, &tag);

    let sum = crypto::sha256(&out[..SHA_AT]);
    put(out, SHA_AT, &sum);
    let mac = crypto::mac(&header_key(&fresh.master, &fresh.uuid), &[&out[..MAC_AT]]);
    put(out, MAC_AT, &mac);
}

/// Opens one copy of the header with `secret`.
///
/// # Errors
/// [`VolumeError::NotAVolume`], [`VolumeError::UnsupportedVersion`],
/// [`VolumeError::UnsupportedFeatures`], [`VolumeError::WrongKey`],
/// [`VolumeError::DamagedHeader`].
pub(crate) fn decode(bytes: &HeaderBytes, secret: &Secret) -> Result<Opened, VolumeError> {
    if &bytes[..8] != MAGIC {
        return Err(VolumeError::NotAVolume);
    }
    let version = get32(bytes, 8);
    if version != VERSION {
        return Err(VolumeError::UnsupportedVersion { found: version });
    }
    let unknown = get64(bytes, 40) & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(VolumeError::UnsupportedFeatures { bits: unknown });
    }
    let sum_holds = crypto::sha256(&bytes[..SHA_AT])[..] == bytes[SHA_AT..MAC_AT];
    if !sum_holds {
        return Err(VolumeError::DamagedHeader);
    }
    if get32(bytes, 64) != CIPHER || get32(bytes, 68) as usize != BLOCK || get32(bytes, 72) != 1 {
        return Err(VolumeError::BadGeometry);
    }
    let uuid = get_array(bytes, 48);
    let master = (0..SLOTS)
        .map(|i| &bytes[SLOTS_AT + i * SLOT_BYTES..][..SLOT_BYTES])
        .find_map(|slot| open_slot(slot, secret, &uuid))
        .ok_or(VolumeError::WrongKey)?;
    if !crypto::mac_holds(&header_key(&master, &uuid), &bytes[..MAC_AT], &bytes[MAC_AT..]) {
        return Err(VolumeError::DamagedHeader);
    }
    let (key, key_version) = open_keyring(bytes, &master, &uuid)?;
    Ok(Opened {
        uuid,
        generation: get64(bytes, 16),
        key,
        key_version,
        read_only: get64(bytes, 32) & !RO_COMPAT_KNOWN != 0,
    })
}

fn open_slot(slot: &[u8], secret: &Secret, uuid: &[u8; 16]) -> Option<Secret> {
    if slot[0] != SLOT_USED || slot[1] != KIND_KEY_FILE {
        return None;
    }
    let (wrap, commitment) = slot_keys(secret, &slot[32..64], uuid);
    let committed = &slot[COMMITMENT_AT..COMMITMENT_AT + 32];
    if !crypto::mac_holds(&commitment, &slot[..COMMITMENT_AT], committed) {
        return None;
    }
    let mut master = Secret(get_array(slot, WRAPPED_AT));
    let tag = get_array(slot, WRAPPED_AT + 32);
    wrap.open(SINGLE, &slot_aad(slot, uuid), &tag, &mut master.0).ok()?;
    Some(master)
}

fn open_keyring(
    bytes: &HeaderBytes,
    master: &Secret,
    uuid: &[u8; 16],
) -> Result<(Secret, u32), VolumeError> {
    let ring = &bytes[KEYRING_AT..KEYRING_AT + BLOCK];
    let mut body =
        zeroize::Zeroizing::new(get_array::<{ BLOCK - KEYRING_BODY }>(ring, KEYRING_BODY));
    keyring_key(master, &ring[..24], uuid)
        .open(SINGLE, uuid, &get_array(ring, 24), &mut body[..])
        .map_err(|_| VolumeError::DamagedHeader)?;
    let count = get32(&body[..], 0) as usize;
    let current = get32(&body[..], 4);
    (0..count.min((BLOCK - KEYRING_BODY) / 64 - 1))
        .map(|i| 64 + i * 64)
        .find(|&at| get32(&body[..], at) == current)
        .map(|at| (Secret(get_array(&body[..], at + 8)), current))
        .ok_or(VolumeError::DamagedHeader)
}
