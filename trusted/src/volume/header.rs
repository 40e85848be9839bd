//! The static header: what the volume is, and its key slots. Two copies, written alternately.
//!
//! Holds: nothing of the header is believed before its version and features are known; a slot
//! opens only with a key whose commitment it carries; once a slot is open, the whole header is
//! checked under the master key.

use super::{
    SlotKey,
    crypto::{self, AeadKey, CIPHER, SINGLE, Secret},
    error::VolumeError,
    layout::{BLOCK_BYTES, HEADER_BLOCKS, get_array, get32, get64, put, put32, put64},
    slots::{self, NewSlot, SLOT_BYTES, SLOTS},
};
use crate::disk::BLOCK;

pub(crate) const BYTES: usize = HEADER_BLOCKS * BLOCK;
/// A copy of the header in private memory.
pub(crate) type HeaderBytes = [u8; BYTES];

const MAGIC: &[u8; 8] = b"POSTERNV";
const VERSION: u32 = 1;
const INCOMPAT_KNOWN: u64 = 0;
const RO_COMPAT_KNOWN: u64 = 0;

const GENERATION_AT: usize = 16;
const UUID_AT: usize = 48;
const SLOTS_AT: usize = BLOCK;
const KEYRING_AT: usize = 2 * BLOCK;
const KEYRING_BODY: usize = 64;
const SHA_AT: usize = BYTES - 64;
const MAC_AT: usize = BYTES - 32;

/// What an open header gives.
pub(crate) struct Opened {
    pub(crate) uuid: [u8; 16],
    /// Number of this writing of the header.
    pub(crate) generation: u64,
    /// The newest volume key.
    pub(crate) key: Secret,
    /// Its version in the keyring.
    pub(crate) key_version: u32,
    /// What keys for other volumes are derived from.
    pub(crate) derivation: Secret,
    /// Unknown features that forbid writing.
    pub(crate) read_only: bool,
}

/// Fresh randomness for a new header.
pub(crate) struct Fresh {
    pub(crate) uuid: [u8; 16],
    pub(crate) master: Secret,
    pub(crate) key: Secret,
    pub(crate) keyring_salt: [u8; 24],
}

fn keyring_key(master: &Secret, salt: &[u8], uuid: &[u8; 16]) -> AeadKey {
    AeadKey::new(&crypto::derive(&master.0, salt, &[b"postern/1 keyring", uuid]))
}

fn header_key(master: &Secret, uuid: &[u8; 16]) -> Secret {
    crypto::derive(&master.0, &[], &[b"postern/1 header", uuid])
}

/// A slot's bytes.
pub(crate) fn slot(bytes: &HeaderBytes, number: usize) -> &[u8] {
    &bytes[SLOTS_AT + number * SLOT_BYTES..][..SLOT_BYTES]
}

/// Sum and MAC over all that lies before them.
fn finish(out: &mut HeaderBytes, master: &Secret, uuid: &[u8; 16]) {
    let sum = crypto::sha256(&out[..SHA_AT]);
    put(out, SHA_AT, &sum);
    let mac = crypto::mac(&header_key(master, uuid), &[&out[..MAC_AT]]);
    put(out, MAC_AT, &mac);
}

/// Writes a new header with one key slot into `out` (all zeros).
///
/// # Errors
/// As [`NewSlot::write`].
pub(crate) fn encode(
    out: &mut HeaderBytes,
    fresh: &Fresh,
    first: &NewSlot<'_>,
    host_blocks: u64,
) -> Result<(), VolumeError> {
    put(out, 0, MAGIC);
    put32(out, 8, VERSION);
    put64(out, GENERATION_AT, 1);
    put(out, UUID_AT, &fresh.uuid);
    put32(out, 64, CIPHER);
    put32(out, 68, BLOCK_BYTES as u32);
    put32(out, 72, 1);
    put32(out, 76, SLOTS as u32);
    put64(out, 88, host_blocks);

    first.write(&mut out[SLOTS_AT..SLOTS_AT + SLOT_BYTES], &fresh.master, &fresh.uuid)?;

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

    finish(out, &fresh.master, &fresh.uuid);
    Ok(())
}

/// What a change does to a slot.
pub(crate) enum Change<'a> {
    /// Puts a key there, in place of whatever is there.
    Put(NewSlot<'a>),
    /// Empties it.
    Clear,
}

/// Changes a key slot of an intact header that `key` opens, and counts its generation up.
///
/// # Errors
/// As [`decode`], and as [`NewSlot::write`].
pub(crate) fn change_slot(
    bytes: &mut HeaderBytes,
    key: &SlotKey,
    number: usize,
    change: &Change<'_>,
) -> Result<(), VolumeError> {
    let (opened, master) = unlock(bytes, key)?;
    let slot = &mut bytes[SLOTS_AT + number * SLOT_BYTES..][..SLOT_BYTES];
    slot.fill(0);
    if let Change::Put(new) = change {
        new.write(slot, &master, &opened.uuid)?;
    }
    put64(bytes, GENERATION_AT, opened.generation + 1);
    finish(bytes, &master, &opened.uuid);
    Ok(())
}

/// Checks what can be checked of one copy of the header without a key.
///
/// # Errors
/// [`VolumeError::NotAVolume`], [`VolumeError::UnsupportedVersion`],
/// [`VolumeError::UnsupportedFeatures`], [`VolumeError::DamagedHeader`],
/// [`VolumeError::BadGeometry`].
pub(crate) fn look(bytes: &HeaderBytes) -> Result<u64, VolumeError> {
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
    Ok(get64(bytes, GENERATION_AT))
}

/// Opens one copy of the header with `key`.
///
/// # Errors
/// As [`look`], and [`VolumeError::WrongKey`].
pub(crate) fn decode(bytes: &HeaderBytes, key: &SlotKey) -> Result<Opened, VolumeError> {
    unlock(bytes, key).map(|(opened, _)| opened)
}

/// As [`decode`], with the master.
fn unlock(bytes: &HeaderBytes, key: &SlotKey) -> Result<(Opened, Secret), VolumeError> {
    let generation = look(bytes)?;
    let uuid = get_array(bytes, UUID_AT);
    let master = (0..SLOTS)
        .find_map(|number| slots::open(slot(bytes, number), key, &uuid))
        .ok_or(VolumeError::WrongKey)?;
    if !crypto::mac_holds(&header_key(&master, &uuid), &bytes[..MAC_AT], &bytes[MAC_AT..]) {
        return Err(VolumeError::DamagedHeader);
    }
    let (key, key_version) = open_keyring(bytes, &master, &uuid)?;
    let read_only = get64(bytes, 32) & !RO_COMPAT_KNOWN != 0;
    let derivation = crypto::derive(&master.0, &[], &[b"postern/1 derivation", &uuid]);
    Ok((Opened { uuid, generation, key, key_version, derivation, read_only }, master))
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
