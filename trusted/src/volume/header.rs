//! The static header: what the volume is, and its key slots. Two copies, written alternately.
//!
//! Holds: nothing of the header is believed before its version and features are known; a slot
//! opens only with a key whose commitment it carries; once a slot is open, the whole header is
//! checked under the master key.

use alloc::vec::Vec;

use super::{
    SlotKey,
    crypto::{self, AeadKey, CIPHER, SINGLE, Secret, VolumeKey},
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
/// Incompatible feature: a rekey is on its way, two volume keys are in use.
const INCOMPAT_REKEY: u64 = 1 << 8;
const INCOMPAT_KNOWN: u64 = INCOMPAT_REKEY;
const RO_COMPAT_KNOWN: u64 = 0;

const GENERATION_AT: usize = 16;
const INCOMPAT_AT: usize = 40;
const UUID_AT: usize = 48;
const SLOTS_AT: usize = BLOCK;
const KEYRING_AT: usize = 2 * BLOCK;
const KEYRING_BODY: usize = 64;
const ENTRY_BYTES: usize = 64;
/// Most entries of a keyring.
const ENTRIES: usize = (BLOCK - KEYRING_BODY) / ENTRY_BYTES - 1;
/// State of a keyring's entry: the volume key that seals.
const ENTRY_KEY: u32 = 0;
/// A volume key that only opens, until the rekey is finished.
const ENTRY_RETIRING: u32 = 1;
/// No volume key: what keys for other volumes were derived from, until the rekey is finished.
const ENTRY_DERIVATION: u32 = 2;
const SHA_AT: usize = BYTES - 64;
const MAC_AT: usize = BYTES - 32;

/// What an open header gives.
pub(crate) struct Opened {
    pub(crate) uuid: [u8; 16],
    /// Number of this writing of the header.
    pub(crate) generation: u64,
    /// The volume keys.
    pub(crate) key: VolumeKey,
    /// What keys for other volumes are derived from.
    pub(crate) derivation: Derivation,
    /// Unknown features that forbid writing.
    pub(crate) read_only: bool,
}

/// What keys for other volumes are derived from.
pub(crate) struct Derivation {
    pub(crate) now: Secret,
    /// What it was before a rekey that is not finished.
    pub(crate) former: Option<Secret>,
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

/// Identity of the volume, unchecked.
pub(crate) fn uuid(bytes: &HeaderBytes) -> [u8; 16] {
    get_array(bytes, UUID_AT)
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

    seal_keyring(
        out,
        &fresh.master,
        &fresh.keyring_salt,
        &fresh.uuid,
        &[(1, ENTRY_KEY, &fresh.key)],
    );
    finish(out, &fresh.master, &fresh.uuid);
    Ok(())
}

/// Writes the keyring: entries of number, state and secret, the one that seals first.
fn seal_keyring(
    out: &mut HeaderBytes,
    master: &Secret,
    salt: &[u8; 24],
    uuid: &[u8; 16],
    entries: &[(u16, u32, &Secret)],
) {
    let ring = &mut out[KEYRING_AT..KEYRING_AT + BLOCK];
    ring.fill(0);
    put(ring, 0, salt);
    let body = &mut ring[KEYRING_BODY..];
    put32(body, 0, entries.len() as u32);
    put32(body, 4, entries.first().map_or(0, |(number, ..)| u32::from(*number)));
    for (i, (number, state, secret)) in entries.iter().enumerate() {
        let at = ENTRY_BYTES * (1 + i);
        put32(body, at, u32::from(*number));
        put32(body, at + 4, *state);
        put(body, at + 8, &secret.0);
    }
    let tag = keyring_key(master, salt, uuid).seal(SINGLE, uuid, body);
    put(ring, 24, &tag);
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
    let unknown = get64(bytes, INCOMPAT_AT) & !INCOMPAT_KNOWN;
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
    let (key, former) = open_keyring(bytes, &master, &uuid)?;
    let read_only = get64(bytes, 32) & !RO_COMPAT_KNOWN != 0;
    let derivation = Derivation { now: derivation(&master, &uuid), former };
    let opened = Opened { uuid, generation, key, derivation, read_only };
    Ok((opened, master))
}

fn derivation(master: &Secret, uuid: &[u8; 16]) -> Secret {
    crypto::derive(&master.0, &[], &[b"postern/1 derivation", uuid])
}

/// An entry of the keyring.
struct Entry {
    number: u16,
    state: u32,
    secret: Secret,
}

fn keyring_entries(
    bytes: &HeaderBytes,
    master: &Secret,
    uuid: &[u8; 16],
) -> Result<(u32, Vec<Entry>), VolumeError> {
    let ring = &bytes[KEYRING_AT..KEYRING_AT + BLOCK];
    let mut body =
        zeroize::Zeroizing::new(get_array::<{ BLOCK - KEYRING_BODY }>(ring, KEYRING_BODY));
    keyring_key(master, &ring[..24], uuid)
        .open(SINGLE, uuid, &get_array(ring, 24), &mut body[..])
        .map_err(|_| VolumeError::DamagedHeader)?;
    let count = (get32(&body[..], 0) as usize).min(ENTRIES);
    let entries = (1..=count).map(|i| i * ENTRY_BYTES).map(|at| {
        Some(Entry {
            number: u16::try_from(get32(&body[..], at)).ok()?,
            state: get32(&body[..], at + 4),
            secret: Secret(get_array(&body[..], at + 8)),
        })
    });
    let entries: Option<Vec<Entry>> = entries.collect();
    Ok((get32(&body[..], 4), entries.ok_or(VolumeError::DamagedHeader)?))
}

fn open_keyring(
    bytes: &HeaderBytes,
    master: &Secret,
    uuid: &[u8; 16],
) -> Result<(VolumeKey, Option<Secret>), VolumeError> {
    let (current, entries) = keyring_entries(bytes, master, uuid)?;
    let of = |state| entries.iter().find(move |entry| entry.state == state);
    let version = |entry: &Entry| (entry.number, entry.secret.clone());
    let current = of(ENTRY_KEY)
        .filter(|entry| u32::from(entry.number) == current)
        .ok_or(VolumeError::DamagedHeader)?;
    let retiring = of(ENTRY_RETIRING).map(version);
    let former = of(ENTRY_DERIVATION).map(|entry| entry.secret.clone());
    Ok((VolumeKey::of_keyring(*uuid, version(current), retiring), former))
}

/// Fresh randomness for a rekey.
pub(crate) struct FreshKeys {
    pub(crate) master: Secret,
    pub(crate) key: Secret,
    pub(crate) keyring_salt: [u8; 24],
    pub(crate) slot_salts: [[u8; 32]; SLOTS],
}

/// Begins a rekey in an intact header that the first of `keys` opens: a new master, a new volume
/// key beside the old one, and only the slots that one of `keys` opens, under the new master.
/// `false`: one was begun before; nothing was changed.
///
/// # Errors
/// As [`decode`], for each of `keys`; [`VolumeError::BadGeometry`] when the numbers of keys are
/// used up.
pub(crate) fn begin_rekey(
    bytes: &mut HeaderBytes,
    keys: &[&SlotKey],
    fresh: &FreshKeys,
) -> Result<bool, VolumeError> {
    let first = keys.first().ok_or(VolumeError::WrongKey)?;
    let (opened, master) = unlock(bytes, first)?;
    if opened.key.is_retiring() {
        return Ok(false);
    }
    let (_, entries) = keyring_entries(bytes, &master, &opened.uuid)?;
    let old = entries.iter().find(|entry| entry.state == ENTRY_KEY);
    let old = old.ok_or(VolumeError::DamagedHeader)?;
    let number = old.number.checked_add(1).ok_or(VolumeError::BadGeometry)?;
    let mut slots = Vec::with_capacity(keys.len());
    for key in keys {
        let opens = |n: &usize| slots::open(slot(bytes, *n), key, &opened.uuid).is_some();
        slots.push(((0..SLOTS).find(opens).ok_or(VolumeError::WrongKey)?, *key));
    }
    let before = bytes[SLOTS_AT..SLOTS_AT + SLOTS * SLOT_BYTES].to_vec();
    bytes[SLOTS_AT..SLOTS_AT + SLOTS * SLOT_BYTES].fill(0);
    for (number, key) in slots {
        let at = number * SLOT_BYTES;
        let stretch = slots::stretch_of(&before[at..at + SLOT_BYTES]);
        let new = NewSlot { key, stretch, salt: fresh.slot_salts[number] };
        let place = &mut bytes[SLOTS_AT + at..][..SLOT_BYTES];
        place.fill(0);
        new.write(place, &fresh.master, &opened.uuid)?;
    }
    let keyring = [
        (number, ENTRY_KEY, &fresh.key),
        (old.number, ENTRY_RETIRING, &old.secret),
        (0, ENTRY_DERIVATION, &opened.derivation.now),
    ];
    seal_keyring(bytes, &fresh.master, &fresh.keyring_salt, &opened.uuid, &keyring);
    let features = get64(bytes, INCOMPAT_AT);
    put64(bytes, INCOMPAT_AT, features | INCOMPAT_REKEY);
    put64(bytes, GENERATION_AT, opened.generation + 1);
    finish(bytes, &fresh.master, &opened.uuid);
    Ok(true)
}

/// Ends a rekey in an intact header that `key` opens: only the newest volume key stays.
///
/// # Errors
/// As [`decode`].
pub(crate) fn end_rekey(
    bytes: &mut HeaderBytes,
    key: &SlotKey,
    keyring_salt: &[u8; 24],
) -> Result<(), VolumeError> {
    let (opened, master) = unlock(bytes, key)?;
    let (_, entries) = keyring_entries(bytes, &master, &opened.uuid)?;
    let kept = entries.iter().find(|entry| entry.state == ENTRY_KEY);
    let kept = kept.ok_or(VolumeError::DamagedHeader)?;
    let keyring = [(kept.number, ENTRY_KEY, &kept.secret)];
    seal_keyring(bytes, &master, keyring_salt, &opened.uuid, &keyring);
    let features = get64(bytes, INCOMPAT_AT);
    put64(bytes, INCOMPAT_AT, features & !INCOMPAT_REKEY);
    put64(bytes, GENERATION_AT, opened.generation + 1);
    finish(bytes, &master, &opened.uuid);
    Ok(())
}
