//! Key slots: who can open a volume.
//!
//! A slot wraps the volume's master under what its user knows: a key file of 32 bytes, a passphrase
//! stretched with Argon2id (RFC 9106), or a key that a CPU derives for one enclave alone (EGETKEY).
//! Slots are changed in the header alone, by whoever can open one of them; the data stays as it is.
//!
//! Holds: at least one slot stays; both copies of the header carry the change when it returns, and
//! after a crash in between either copy opens with some key that opened it before or after.
//! Does not hold: that an emptied slot's key opens no copy of the header that somebody kept: the
//! master is the same.

use alloc::vec::Vec;
use core::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{
    Volume,
    crypto::{self, AeadKey, SINGLE, Secret, TAG},
    error::{Misuse, VolumeError},
    format::write_blocks,
    front::read_header,
    header::{self, Change, HeaderBytes},
    layout::{HEADERS, get_array, get32, put, put32},
};
use crate::disk::{BLOCK, Disk};

pub(crate) const SLOT_BYTES: usize = 512;
pub(crate) const SLOTS: usize = 8;

/// Slot holds a wrapped master.
const USED: u8 = 1;
/// The secret is 32 bytes of a key file.
const KIND_KEY_FILE: u8 = 1;
/// The secret is stretched from a passphrase.
const KIND_PASSPHRASE: u8 = 2;
/// The secret is a sealing key of an enclave.
const KIND_SGX: u8 = 3;
const SGX_VERSION_AT: usize = 4;
const SGX_CPU_VERSION_AT: usize = 16;
const SALT_AT: usize = 32;
const WRAPPED_AT: usize = 64;
const COMMITMENT_AT: usize = WRAPPED_AT + 32 + TAG;

/// What a user presents to open a slot. Wiped when dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct SlotKey(Presented);

#[derive(Zeroize, ZeroizeOnDrop)]
enum Presented {
    KeyFile([u8; 32]),
    Passphrase(Vec<u8>),
    /// What Argon2id made of a passphrase for one slot.
    Stretched([u8; 32]),
    /// A sealing key, and what it was asked for with.
    Sealing(#[zeroize(skip)] SealingRequest, [u8; 16]),
}

impl SlotKey {
    /// The 32 bytes of a key file.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(Presented::KeyFile(bytes))
    }

    /// What [`Volume::stretch`] made of a passphrase.
    #[must_use]
    pub const fn stretched(bytes: [u8; 32]) -> Self {
        Self(Presented::Stretched(bytes))
    }

    /// The sealing key that EGETKEY gives this enclave for `request`. It opens the slots that name
    /// the same request.
    #[must_use]
    pub const fn sealing(request: SealingRequest, key: [u8; 16]) -> Self {
        Self(Presented::Sealing(request, key))
    }

    /// A passphrase: any bytes, all of them count.
    #[must_use]
    pub fn passphrase(text: &[u8]) -> Self {
        Self(Presented::Passphrase(text.into()))
    }
}

#[cfg(test)]
impl SlotKey {
    pub(crate) fn key_file(&self) -> Option<[u8; 32]> {
        match &self.0 {
            Presented::KeyFile(bytes) => Some(*bytes),
            _ => None,
        }
    }
}

impl fmt::Debug for SlotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SlotKey(..)")
    }
}

/// What a slot is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotKind {
    /// A key file.
    KeyFile,
    /// A passphrase.
    Passphrase(Stretch),
    /// A sealing key of an enclave.
    Sgx(SealingRequest),
    /// Something this build does not know.
    Unknown(u8),
}

/// Which enclaves get a sealing key. The numbers are those of KEYPOLICY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SealingPolicy {
    /// Those of the same measurement.
    Enclave = 1,
    /// Those of the same signer and product.
    Signer = 2,
}

/// What a sealing key depends on beside the CPU and the enclave: the part of a KEYREQUEST that is
/// not the same for every slot. Versions are the lowest that an enclave and its CPU must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealingRequest {
    /// KEYPOLICY.
    pub policy: SealingPolicy,
    /// ISVSVN: the enclave's security version.
    pub version: u16,
    /// CPUSVN.
    pub cpu_version: [u8; 16],
}

impl SealingRequest {
    /// KEYID of every slot: what its key is for. Slots differ by their salts.
    pub const KEY_ID: [u8; 32] = *b"postern/1 sgx slot\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    /// ATTRIBUTEMASK, flags and XFRM: INIT, DEBUG and the reserved flags count, so that an enclave
    /// under a debugger has other keys; what the CPU offers and saves does not.
    pub const ATTRIBUTE_MASK: [u64; 2] = [0xff00_0000_0000_000b, 0];

    /// MISCMASK: the reserved half counts.
    pub const MISC_MASK: u32 = 0xf000_0000;

    fn write(&self, slot: &mut [u8]) {
        (slot[1], slot[2]) = (KIND_SGX, self.policy as u8);
        put(slot, SGX_VERSION_AT, &self.version.to_le_bytes());
        put(slot, SGX_CPU_VERSION_AT, &self.cpu_version);
    }

    /// What a slot of the kind names; `None` for a policy that there is not.
    fn read(slot: &[u8]) -> Option<Self> {
        let policy = match slot[2] {
            1 => SealingPolicy::Enclave,
            2 => SealingPolicy::Signer,
            _ => return None,
        };
        let version = u16::from_le_bytes(get_array(slot, SGX_VERSION_AT));
        Some(Self { policy, version, cpu_version: get_array(slot, SGX_CPU_VERSION_AT) })
    }
}

/// How much work a passphrase costs: the parameters of Argon2id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Memory in KiB, 8 per lane to 2^20 (1 GiB).
    pub memory_kib: u32,
    /// Passes over it, 1 to 64.
    pub passes: u32,
    /// Lanes, 1 to 16.
    pub lanes: u32,
}

impl Default for Stretch {
    /// The second of the two recommended sets of RFC 9106, section 4: 64 MiB, three passes.
    fn default() -> Self {
        Self { memory_kib: 64 << 10, passes: 3, lanes: 4 }
    }
}

impl Stretch {
    /// Bounds the work that a host can demand by writing a header.
    fn is_sound(&self) -> bool {
        (1..=16).contains(&self.lanes)
            && (1..=64).contains(&self.passes)
            && (8 * self.lanes..=1 << 20).contains(&self.memory_kib)
    }

    fn stretch(&self, passphrase: &[u8], salt: &[u8]) -> Option<Secret> {
        if !self.is_sound() {
            return None;
        }
        let params =
            argon2::Params::new(self.memory_kib, self.passes, self.lanes, Some(32)).ok()?;
        let argon =
            argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let mut memory = Vec::new();
        memory.try_reserve_exact(argon.params().block_count()).ok()?;
        memory.resize(argon.params().block_count(), argon2::Block::new());
        let mut secret = Secret([0; 32]);
        let done =
            argon.hash_password_into_with_memory(passphrase, salt, &mut secret.0, &mut memory);
        memory.iter_mut().for_each(Zeroize::zeroize);
        done.ok().map(|()| secret)
    }
}

/// One slot, as anybody can see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// Its number, 0 to 7.
    pub number: usize,
    /// What opens it.
    pub kind: SlotKind,
}

/// A key for a slot, with fresh randomness.
pub(crate) struct NewSlot<'a> {
    pub(crate) key: &'a SlotKey,
    pub(crate) stretch: Stretch,
    pub(crate) salt: [u8; 32],
}

impl NewSlot<'_> {
    /// Fills a slot (all zeros) that wraps `master`.
    ///
    /// # Errors
    /// [`Misuse::Stretch`].
    pub(crate) fn write(
        &self,
        slot: &mut [u8],
        master: &Secret,
        uuid: &[u8; 16],
    ) -> Result<(), VolumeError> {
        slot[0] = USED;
        put(slot, SALT_AT, &self.salt);
        match &self.key.0 {
            Presented::KeyFile(_) => slot[1] = KIND_KEY_FILE,
            // Made for one salt: a slot has a new one each time it is written.
            Presented::Stretched(_) => return Err(VolumeError::Misuse(Misuse::Stretch)),
            Presented::Passphrase(_) => {
                slot[1] = KIND_PASSPHRASE;
                put32(slot, 4, self.stretch.memory_kib);
                put32(slot, 8, self.stretch.passes);
                put32(slot, 12, self.stretch.lanes);
            }
            Presented::Sealing(request, _) => request.write(slot),
        }
        let secret = secret(slot, self.key).ok_or(VolumeError::Misuse(Misuse::Stretch))?;
        let (wrap, commitment) = keys(&secret, &self.salt, uuid);
        let aad = aad(slot, uuid);
        let mut wrapped = master.clone();
        let tag = wrap.seal(SINGLE, &aad, &mut wrapped.0);
        put(slot, WRAPPED_AT, &wrapped.0);
        put(slot, WRAPPED_AT + 32, &tag);
        let committed = crypto::mac(&commitment, &[&slot[..COMMITMENT_AT]]);
        put(slot, COMMITMENT_AT, &committed);
        Ok(())
    }
}

/// The master in `slot`, if `key` opens it.
pub(crate) fn open(slot: &[u8], key: &SlotKey, uuid: &[u8; 16]) -> Option<Secret> {
    let secret = secret(slot, key)?;
    let (wrap, commitment) = keys(&secret, &slot[SALT_AT..SALT_AT + 32], uuid);
    let committed = &slot[COMMITMENT_AT..COMMITMENT_AT + 32];
    if !crypto::mac_holds(&commitment, &slot[..COMMITMENT_AT], committed) {
        return None;
    }
    let mut master = Secret(get_array(slot, WRAPPED_AT));
    let tag = get_array(slot, WRAPPED_AT + 32);
    wrap.open(SINGLE, &aad(slot, uuid), &tag, &mut master.0).ok()?;
    Some(master)
}

/// What is in a slot; `None` for an empty one.
fn kind(slot: &[u8]) -> Option<SlotKind> {
    (slot[0] == USED).then(|| match slot[1] {
        KIND_KEY_FILE => SlotKind::KeyFile,
        KIND_PASSPHRASE => SlotKind::Passphrase(Stretch {
            memory_kib: get32(slot, 4),
            passes: get32(slot, 8),
            lanes: get32(slot, 12),
        }),
        KIND_SGX => SealingRequest::read(slot).map_or(SlotKind::Unknown(KIND_SGX), SlotKind::Sgx),
        other => SlotKind::Unknown(other),
    })
}

/// The work that a passphrase of this slot costs.
pub(crate) fn stretch_of(slot: &[u8]) -> Stretch {
    match kind(slot) {
        Some(SlotKind::Passphrase(stretch)) => stretch,
        _ => Stretch::default(),
    }
}

/// The secret that `key` is for this slot, if it is of the slot's kind.
fn secret(slot: &[u8], key: &SlotKey) -> Option<Secret> {
    match (kind(slot)?, &key.0) {
        (SlotKind::KeyFile, Presented::KeyFile(bytes)) => Some(Secret(*bytes)),
        (SlotKind::Passphrase(stretch), Presented::Passphrase(text)) => {
            stretch.stretch(text, &slot[SALT_AT..SALT_AT + 32])
        }
        (SlotKind::Passphrase(_), Presented::Stretched(bytes)) => Some(Secret(*bytes)),
        (SlotKind::Sgx(asked), Presented::Sealing(request, key)) if asked == *request => {
            let mut secret = Secret([0; 32]);
            secret.0[..key.len()].copy_from_slice(key);
            Some(secret)
        }
        _ => None,
    }
}

fn keys(secret: &Secret, salt: &[u8], uuid: &[u8; 16]) -> (AeadKey, Secret) {
    let wrap = crypto::derive(&secret.0, salt, &[b"postern/1 slot kek", uuid]);
    (AeadKey::new(&wrap), crypto::derive(&secret.0, salt, &[b"postern/1 slot commitment", uuid]))
}

fn aad(slot: &[u8], uuid: &[u8; 16]) -> [u8; 80] {
    let mut aad = [0; 80];
    aad[..64].copy_from_slice(&slot[..64]);
    aad[64..].copy_from_slice(uuid);
    aad
}

impl Volume {
    /// A key for another volume, which whoever can open this one can derive: `salt` names that
    /// volume within `purpose`. It stays the same when key slots change.
    #[must_use]
    pub fn derive_key(&self, salt: &[u8], purpose: &[u8]) -> SlotKey {
        SlotKey::new(crypto::derive(&self.derivation.now.0, salt, &[purpose]).0)
    }

    /// What [`Self::derive_key`] gave before a rekey of this volume that is not finished.
    #[must_use]
    pub fn derive_former_key(&self, salt: &[u8], purpose: &[u8]) -> Option<SlotKey> {
        let former = self.derivation.former.as_ref()?;
        Some(SlotKey::new(crypto::derive(&former.0, salt, &[purpose]).0))
    }

    /// The work of a passphrase, done once: 32 bytes that open the slot that `passphrase` opens,
    /// given back as [`SlotKey::stretched`], until that slot changes. As secret as the passphrase,
    /// for this volume. `None` for a key that takes no work.
    ///
    /// # Errors
    /// [`VolumeError::WrongKey`] if it opens no slot, and those of a header that cannot be read.
    pub async fn stretch<D: Disk>(
        disk: &D,
        passphrase: &SlotKey,
    ) -> Result<Option<Zeroizing<[u8; 32]>>, VolumeError> {
        let Presented::Passphrase(_) = &passphrase.0 else { return Ok(None) };
        let header = read_header(disk, header::look, |generation| *generation).await?;
        let bytes = &header.bytes;
        let uuid = header::uuid(bytes);
        (0..SLOTS)
            .find_map(|n| {
                let slot = header::slot(bytes, n);
                let stretched = SlotKey::stretched(secret(slot, passphrase)?.0);
                open(slot, &stretched, &uuid)?;
                let Presented::Stretched(bytes) = &stretched.0 else { return None };
                Some(Some(Zeroizing::new(*bytes)))
            })
            .ok_or(VolumeError::WrongKey)
    }

    /// Number of the slot that `key` opens.
    ///
    /// # Errors
    /// [`VolumeError::WrongKey`] if there is none, and those of opening with it.
    pub async fn slot_of<D: Disk>(disk: &D, key: &SlotKey) -> Result<usize, VolumeError> {
        let decode = |bytes: &HeaderBytes| header::decode(bytes, key);
        let header = read_header(disk, decode, |opened| opened.generation).await?;
        let opens =
            |n: &usize| open(header::slot(&header.bytes, *n), key, &header.found.uuid).is_some();
        (0..SLOTS).find(opens).ok_or(VolumeError::WrongKey)
    }

    /// The key slots in use. Takes no key: this much anybody can see.
    ///
    /// # Errors
    /// [`VolumeError::NotAVolume`] and the others of a header that cannot be read.
    pub async fn slots<D: Disk>(disk: &D) -> Result<Vec<SlotInfo>, VolumeError> {
        let header = read_header(disk, header::look, |generation| *generation).await?;
        Ok(used(&header.bytes))
    }

    /// Puts `new` into slot `number`, or into the first free one, in place of whatever is there.
    /// Answers the slot's number. The volume must not be open elsewhere.
    ///
    /// # Errors
    /// Those of opening with `key`; [`Misuse::NoSlot`] if none is free or there is no such slot,
    /// [`Misuse::Stretch`]; [`VolumeError::Host`], [`VolumeError::Flush`].
    pub async fn put_slot<D: Disk>(
        disk: &D,
        key: &SlotKey,
        new: &SlotKey,
        stretch: Stretch,
        number: Option<usize>,
    ) -> Result<usize, VolumeError> {
        let mut salt = [0; 32];
        disk.random(&mut salt)?;
        let new = Change::Put(NewSlot { key: new, stretch, salt });
        change(disk, key, &new, |in_use| {
            let is_free = |n: &usize| in_use.iter().all(|slot| slot.number != *n);
            number
                .or_else(|| (0..SLOTS).find(is_free))
                .filter(|number| *number < SLOTS)
                .ok_or(Misuse::NoSlot)
        })
        .await
    }

    /// Empties slot `number`. The volume must not be open elsewhere. With `even_the_last` nobody
    /// can ever open the volume again if it was the last one.
    ///
    /// # Errors
    /// Those of opening with `key`; [`Misuse::NoSlot`] if it is empty, [`Misuse::LastSlot`] if no
    /// other is in use; [`VolumeError::Host`], [`VolumeError::Flush`].
    pub async fn clear_slot<D: Disk>(
        disk: &D,
        key: &SlotKey,
        number: usize,
        even_the_last: bool,
    ) -> Result<(), VolumeError> {
        change(disk, key, &Change::Clear, |in_use| match in_use {
            [one] if one.number == number && !even_the_last => Err(Misuse::LastSlot),
            slots if slots.iter().any(|slot| slot.number == number) => Ok(number),
            _ => Err(Misuse::NoSlot),
        })
        .await
        .map(drop)
    }
}

fn used(bytes: &HeaderBytes) -> Vec<SlotInfo> {
    (0..SLOTS)
        .filter_map(|number| {
            kind(header::slot(bytes, number)).map(|kind| SlotInfo { number, kind })
        })
        .collect()
}

/// Changes the slot that `choose` takes, given those in use, and writes the header: over the copy
/// that is not the newest first. Answers the slot's number.
async fn change<D: Disk>(
    disk: &D,
    key: &SlotKey,
    change: &Change<'_>,
    choose: impl FnOnce(&[SlotInfo]) -> Result<usize, Misuse>,
) -> Result<usize, VolumeError> {
    let decode = |bytes: &HeaderBytes| header::decode(bytes, key);
    let mut header = read_header(disk, decode, |opened| opened.generation).await?;
    let number = choose(&used(&header.bytes)).map_err(VolumeError::Misuse)?;
    header::change_slot(&mut header.bytes, key, number, change)?;
    write_header(disk, &header.bytes, header.copy).await?;
    Ok(number)
}

/// Writes both copies of the header, over the one that is not the `newest` first.
pub(crate) async fn write_header<D: Disk>(
    disk: &D,
    bytes: &HeaderBytes,
    newest: usize,
) -> Result<(), VolumeError> {
    let (blocks, _) = bytes.as_chunks::<BLOCK>();
    for place in [HEADERS[1 - newest], HEADERS[newest]] {
        write_blocks(disk, place, blocks).await?;
        disk.flush().await.map_err(VolumeError::Flush)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    /// Values of the reference implementation (phc-winner-argon2, src/test.c, Argon2id 1.3).
    #[test]
    fn a_passphrase_is_stretched_as_argon2id_says() {
        let hex = |bits: u32, passphrase: &[u8], salt: &[u8]| {
            let stretch = Stretch { memory_kib: 1 << bits, passes: 2, lanes: 1 };
            let secret = stretch.stretch(passphrase, salt).unwrap();
            secret.0.iter().fold(alloc::string::String::new(), |hex, b| format!("{hex}{b:02x}"))
        };
        assert_eq!(
            hex(8, b"password", b"somesalt"),
            "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"
        );
        assert_eq!(
            hex(16, b"password", b"somesalt"),
            "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"
        );
    }

    /// RFC 9106, section 5.3, which has a secret and associated data: the library under the
    /// parameters that slots cannot have.
    #[test]
    fn argon2id_agrees_with_rfc_9106() {
        let mut params = argon2::ParamsBuilder::new();
        params.m_cost(32).t_cost(3).p_cost(4).output_len(32);
        params.data(argon2::AssociatedData::new(&[4; 12]).unwrap());
        let argon = argon2::Argon2::new_with_secret(
            &[3; 8],
            argon2::Algorithm::Argon2id,
            argon2::Version::V0x13,
            params.build().unwrap(),
        );
        let mut memory = alloc::vec![argon2::Block::new(); 32];
        let mut tag = [0; 32];
        argon
            .unwrap()
            .hash_password_into_with_memory(&[1; 32], &[2; 16], &mut tag, &mut memory)
            .unwrap();
        let hex = tag.iter().fold(alloc::string::String::new(), |hex, b| format!("{hex}{b:02x}"));
        assert_eq!(hex, "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659");
    }

    #[test]
    fn a_key_shows_nothing_of_itself() {
        let policy = SealingPolicy::Signer;
        let request = SealingRequest { policy, version: 0x41, cpu_version: [0x41; 16] };
        for key in [
            SlotKey::new([0x41; 32]),
            SlotKey::passphrase(b"AAAA"),
            SlotKey::stretched([0x41; 32]),
            SlotKey::sealing(request, [0x41; 16]),
        ] {
            assert_eq!(format!("{key:?}{key:#?}"), "SlotKey(..)SlotKey(..)");
        }
    }
}
