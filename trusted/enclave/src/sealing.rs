//! Key slots that only this enclave opens, or those of its signer: keys by EGETKEY.
//!
//! Holds: a key never leaves the enclave; one for a signer's enclaves is made only for an enclave
//! that somebody has signed, since all others have the same signer: none.
//! Does not hold: secrecy in the emulator, whose root of keys anybody has.

use postern_trusted::{
    disk::Disk,
    volume::{SealingPolicy, SealingRequest, SlotKey, SlotKind, Stretch, Volume, VolumeError},
};
use sgx_isa::{Keyname, Keypolicy, Keyrequest, Report};

/// The request for a new slot of this policy: of this enclave's security version, and this CPU's.
///
/// # Errors
/// If the enclave has no signer and the policy goes by it.
pub fn request(policy: SealingPolicy) -> Result<SealingRequest, String> {
    let own = Report::for_self();
    if policy == SealingPolicy::Signer && own.mrsigner == [0; 32] {
        return Err("nobody has signed this enclave, so no slot can go by its signer: \
                    sign it (postern enclave sign), or seal by mrenclave"
            .into());
    }
    Ok(SealingRequest { policy, version: own.isvsvn, cpu_version: own.cpusvn })
}

/// The key for `request`; `None` if this enclave or this CPU is of a lower version.
fn key(request: SealingRequest) -> Option<SlotKey> {
    let keypolicy = match request.policy {
        SealingPolicy::Enclave => Keypolicy::MRENCLAVE,
        SealingPolicy::Signer => Keypolicy::MRSIGNER,
    };
    let asked = Keyrequest {
        keyname: Keyname::Seal as u16,
        keypolicy,
        isvsvn: request.version,
        cpusvn: request.cpu_version,
        attributemask: SealingRequest::ATTRIBUTE_MASK,
        keyid: SealingRequest::KEY_ID,
        miscmask: SealingRequest::MISC_MASK,
        ..Keyrequest::default()
    };
    asked.egetkey().ok().map(|key| SlotKey::sealing(request, key))
}

/// What a volume's slots are to this enclave.
pub enum Found {
    /// This key opens one. It was raised to this enclave's security version if it was of a lower.
    Opens(SlotKey),
    /// These slots of the kind are there, and none opens.
    Closed(Vec<usize>),
}

/// Looks for a slot that this enclave opens.
///
/// # Errors
/// Those of [`Volume::slots`], [`Volume::slot_of`] and [`Volume::put_slot`].
pub async fn find<D: Disk>(disk: &D) -> Result<Found, VolumeError> {
    let mut closed = Vec::new();
    for slot in Volume::slots(disk).await? {
        let SlotKind::Sgx(asked) = slot.kind else { continue };
        closed.push(slot.number);
        let Some(key) = key(asked) else { continue };
        match Volume::slot_of(disk, &key).await {
            Ok(number) => return raised(disk, key, asked, number).await.map(Found::Opens),
            Err(VolumeError::WrongKey) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Found::Closed(closed))
}

/// `old` opens slot `number`: if it is of a lower security version than this enclave, the slot is
/// written anew, so that enclaves of that version do not open it any more.
async fn raised<D: Disk>(
    disk: &D,
    old: SlotKey,
    asked: SealingRequest,
    number: usize,
) -> Result<SlotKey, VolumeError> {
    let own = Report::for_self();
    if asked.version >= own.isvsvn {
        return Ok(old);
    }
    let newer = SealingRequest { version: own.isvsvn, cpu_version: own.cpusvn, ..asked };
    let Some(new) = key(newer) else { return Ok(old) };
    Volume::put_slot(disk, &old, &new, Stretch::default(), Some(number)).await?;
    println!("slot {number} was raised to security version {}", own.isvsvn);
    Ok(new)
}

/// Makes a slot for this enclave with a key that opens the volume; answers its key.
///
/// # Errors
/// Those of [`request`], and of [`Volume::put_slot`].
pub async fn make<D: Disk>(
    disk: &D,
    by: &SlotKey,
    policy: SealingPolicy,
) -> Result<SlotKey, String> {
    let new = key(request(policy)?).ok_or("the CPU gives no sealing key")?;
    let number = Volume::put_slot(disk, by, &new, Stretch::default(), None)
        .await
        .map_err(|error| error.to_string())?;
    println!("slot {number} is sealed to this enclave");
    Ok(new)
}
