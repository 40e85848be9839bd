//! EREPORT and EGETKEY: what an enclave can prove of itself, and the keys that only it gets.
//!
//! Holds: a key depends on every field that the architecture lets it depend on, and on the root; a
//! request for a higher security version than the enclave's is refused; debug and production
//! enclaves never share a key.
//! Does not hold: secrecy. A CPU's root is in its fuses; a [`KeyRoot`] is in this process.
//! Follows: Intel SDM volume 3D, EGETKEY and EREPORT, without KSS.

use aes::Aes128;
use cmac::{Cmac, Mac as _};

/// Bytes of a REPORT.
pub const REPORT_BYTES: usize = 432;
/// Bytes of a report that its MAC covers.
const REPORT_BODY: usize = 384;
/// Bytes of a TARGETINFO and of a KEYREQUEST.
pub const REQUEST_BYTES: usize = 512;

const KEY_REPORT: u16 = 3;
const KEY_SEAL: u16 = 4;
const POLICY_MRENCLAVE: u16 = 1;
const POLICY_MRSIGNER: u16 = 2;
const POLICY_NO_PRODUCT: u16 = 4;
/// INIT and DEBUG count in every sealing key, whatever mask is asked for.
const REQUIRED_SEALING_FLAGS: u64 = 3;

/// ATTRIBUTES: EINIT has accepted the enclave.
pub const ATTRIBUTE_INIT: u64 = 1;

/// Why EGETKEY refuses. The numbers are the CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum KeyError {
    /// The enclave has not the attribute that this key needs.
    Attribute = 2,
    /// A CPU version above the current one.
    CpuVersion = 32,
    /// A security version above the enclave's.
    Version = 64,
    /// No such key.
    Name = 256,
}

/// What takes the place of a CPU's fused secrets: whoever knows it has every key of every enclave.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyRoot([u8; 16]);

impl KeyRoot {
    /// A root of one's own, to stand for another machine.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl Default for KeyRoot {
    /// A root that is printed here, so that nobody takes it for a secret.
    fn default() -> Self {
        Self(*b"NOT A SECRET KEY")
    }
}

impl core::fmt::Debug for KeyRoot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("KeyRoot(..)")
    }
}

/// What the CPU knows of an enclave after EINIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secs {
    /// The measurement.
    pub mrenclave: [u8; 32],
    /// The signer; zeros for an image that nobody signed.
    pub mrsigner: [u8; 32],
    /// Product number.
    pub product: u16,
    /// Security version.
    pub version: u16,
    /// ATTRIBUTES flags.
    pub flags: u64,
    /// ATTRIBUTES.XFRM.
    pub xfrm: u64,
}

/// Version of the emulated CPU's microcode.
const CPU_VERSION: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// In a CPU this is drawn at boot.
const REPORT_KEY_ID: [u8; 32] = *b"report key id of the emulator\0\0\0";

/// What a key depends on, in the order of the manual.
#[derive(Default)]
struct Dependencies {
    name: u16,
    product: u16,
    version: u16,
    flags: u64,
    xfrm: u64,
    flags_mask: u64,
    xfrm_mask: u64,
    mrenclave: [u8; 32],
    mrsigner: [u8; 32],
    key_id: [u8; 32],
    cpu_version: [u8; 16],
    misc_mask: u32,
    policy: u16,
}

impl Dependencies {
    fn key(&self, root: &KeyRoot) -> [u8; 16] {
        let mut mac = new_mac(&root.0);
        mac.update(&self.name.to_le_bytes());
        mac.update(&self.product.to_le_bytes());
        mac.update(&self.version.to_le_bytes());
        for word in [self.flags, self.xfrm, self.flags_mask, self.xfrm_mask] {
            mac.update(&word.to_le_bytes());
        }
        mac.update(&self.mrenclave);
        mac.update(&self.mrsigner);
        mac.update(&self.key_id);
        mac.update(&self.cpu_version);
        mac.update(&self.misc_mask.to_le_bytes());
        mac.update(&self.policy.to_le_bytes());
        mac.finalize().into_bytes().into()
    }
}

fn new_mac(key: &[u8; 16]) -> Cmac<Aes128> {
    <Cmac<Aes128> as cmac::Mac>::new(key.into())
}

fn report_key(
    root: &KeyRoot,
    mrenclave: [u8; 32],
    (flags, xfrm): (u64, u64),
    key_id: [u8; 32],
) -> [u8; 16] {
    Dependencies {
        name: KEY_REPORT,
        flags,
        xfrm,
        mrenclave,
        key_id,
        cpu_version: CPU_VERSION,
        ..Dependencies::default()
    }
    .key(root)
}

/// `N` bytes at `at`; the callers' offsets are constants inside of what they give.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_field(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u64_field(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

impl Secs {
    /// EREPORT: what this enclave is and says, for the enclave that `target` (a TARGETINFO) names.
    #[must_use]
    pub fn report(
        &self,
        root: &KeyRoot,
        target: &[u8; REQUEST_BYTES],
        data: &[u8; 64],
    ) -> [u8; REPORT_BYTES] {
        let mut report = [0; REPORT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| report[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &CPU_VERSION);
        put(48, &self.flags.to_le_bytes());
        put(56, &self.xfrm.to_le_bytes());
        put(64, &self.mrenclave);
        put(128, &self.mrsigner);
        put(256, &self.product.to_le_bytes());
        put(258, &self.version.to_le_bytes());
        put(320, data);
        put(REPORT_BODY, &REPORT_KEY_ID);
        let attributes = (u64_field(target, 32), u64_field(target, 40));
        let key = report_key(root, field(target, 0), attributes, REPORT_KEY_ID);
        let mut mac = new_mac(&key);
        mac.update(&report[..REPORT_BODY]);
        let mac: [u8; 16] = mac.finalize().into_bytes().into();
        report[REPORT_BODY + 32..].copy_from_slice(&mac);
        report
    }

    /// EGETKEY for a KEYREQUEST; `None` where the CPU raises #GP (a reserved field is not zero).
    ///
    /// # Errors
    /// Why the CPU refuses.
    #[must_use]
    pub fn key(
        &self,
        root: &KeyRoot,
        request: &[u8; REQUEST_BYTES],
    ) -> Option<Result<[u8; 16], KeyError>> {
        let (name, policy) = (u16_field(request, 0), u16_field(request, 2));
        let (version, reserved) = (u16_field(request, 4), u16_field(request, 6));
        let cpu_version: [u8; 16] = field(request, 8);
        let (flags_mask, xfrm_mask) = (u64_field(request, 24), u64_field(request, 32));
        let key_id = field(request, 40);
        let known = POLICY_MRENCLAVE | POLICY_MRSIGNER | POLICY_NO_PRODUCT;
        if reserved != 0 || policy & !known != 0 || request.iter().skip(76).any(|byte| *byte != 0) {
            return None;
        }
        Some(match name {
            KEY_REPORT => Ok(report_key(root, self.mrenclave, (self.flags, self.xfrm), key_id)),
            KEY_SEAL if cpu_version > CPU_VERSION => Err(KeyError::CpuVersion),
            KEY_SEAL if version > self.version => Err(KeyError::Version),
            KEY_SEAL => Ok(Dependencies {
                name,
                product: if policy & POLICY_NO_PRODUCT == 0 { self.product } else { 0 },
                version,
                flags: self.flags & (flags_mask | REQUIRED_SEALING_FLAGS),
                xfrm: self.xfrm & xfrm_mask,
                flags_mask,
                xfrm_mask,
                mrenclave: if policy & POLICY_MRENCLAVE == 0 { [0; 32] } else { self.mrenclave },
                mrsigner: if policy & POLICY_MRSIGNER == 0 { [0; 32] } else { self.mrsigner },
                key_id,
                cpu_version,
                misc_mask: u32::from_le_bytes(field(request, 72)),
                policy,
            }
            .key(root)),
            // Launch and provisioning keys are for Intel's own enclaves.
            0..=2 => Err(KeyError::Attribute),
            _ => Err(KeyError::Name),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: KeyRoot = KeyRoot::new([3; 16]);

    fn enclave(mrenclave: u8, mrsigner: u8) -> Secs {
        Secs {
            mrenclave: [mrenclave; 32],
            mrsigner: [mrsigner; 32],
            product: 5,
            version: 9,
            flags: 5,
            xfrm: 3,
        }
    }

    fn request(name: u16, policy: u16, version: u16) -> [u8; REQUEST_BYTES] {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&name.to_le_bytes());
        request[2..4].copy_from_slice(&policy.to_le_bytes());
        request[4..6].copy_from_slice(&version.to_le_bytes());
        request
    }

    fn seal(of: &Secs, policy: u16, version: u16) -> [u8; 16] {
        of.key(&ROOT, &request(KEY_SEAL, policy, version)).unwrap().unwrap()
    }

    /// RFC 4493, example 2: the MAC that all of this rests on.
    #[test]
    fn the_mac_is_aes_cmac() {
        let key = 0x2b7e1516_28aed2a6_abf71588_09cf4f3c_u128.to_be_bytes();
        let mut mac = new_mac(&key);
        mac.update(&0x6bc1bee2_2e409f96_e93d7e11_7393172a_u128.to_be_bytes());
        let made: [u8; 16] = mac.finalize().into_bytes().into();
        assert_eq!(u128::from_be_bytes(made), 0x070a16b4_6b4d4144_f79bdd9d_d04a287c);
    }

    #[test]
    fn a_report_is_verified_by_its_target_and_by_nobody_else() {
        let (from, to, other) = (enclave(1, 1), enclave(2, 2), enclave(3, 3));
        let mut target = [0; REQUEST_BYTES];
        target[..32].copy_from_slice(&to.mrenclave);
        target[32..40].copy_from_slice(&to.flags.to_le_bytes());
        target[40..48].copy_from_slice(&to.xfrm.to_le_bytes());
        let report = from.report(&ROOT, &target, &[8; 64]);
        assert_eq!((&report[64..96], &report[320..384]), (&[1; 32][..], &[8; 64][..]));
        let verifies = |by: &Secs, root: &KeyRoot| {
            let mut request = request(KEY_REPORT, 0, 0);
            request[40..72].copy_from_slice(&report[384..416]);
            let mut mac = new_mac(&by.key(root, &request).unwrap().unwrap());
            mac.update(&report[..384]);
            mac.verify_slice(&report[416..]).is_ok()
        };
        assert!(verifies(&to, &ROOT));
        assert!(!verifies(&other, &ROOT));
        assert!(!verifies(&from, &ROOT));
        assert!(!verifies(&to, &KeyRoot::default()), "another machine");
        assert!(!verifies(&Secs { flags: 7, ..to }, &ROOT), "the same code under a debugger");
    }

    #[test]
    fn a_sealing_key_follows_the_policy() {
        let (one, same_signer, other) = (enclave(1, 1), enclave(2, 1), enclave(3, 3));
        assert_ne!(seal(&one, POLICY_MRENCLAVE, 0), seal(&same_signer, POLICY_MRENCLAVE, 0));
        assert_eq!(seal(&one, POLICY_MRSIGNER, 0), seal(&same_signer, POLICY_MRSIGNER, 0));
        assert_ne!(seal(&one, POLICY_MRSIGNER, 0), seal(&other, POLICY_MRSIGNER, 0));
        let product = Secs { product: 6, ..one.clone() };
        assert_ne!(seal(&one, POLICY_MRSIGNER, 0), seal(&product, POLICY_MRSIGNER, 0));
        let any = POLICY_MRSIGNER | POLICY_NO_PRODUCT;
        assert_eq!(seal(&one, any, 0), seal(&product, any, 0));
        let debug = Secs { flags: 7, ..one.clone() };
        assert_ne!(seal(&one, POLICY_MRENCLAVE, 0), seal(&debug, POLICY_MRENCLAVE, 0));
    }

    #[test]
    fn keys_of_older_versions_are_given_and_of_newer_ones_refused() {
        let one = enclave(1, 1);
        let newer = Secs { version: 10, ..one.clone() };
        assert_eq!(seal(&one, POLICY_MRSIGNER, 9), seal(&newer, POLICY_MRSIGNER, 9));
        assert_ne!(seal(&newer, POLICY_MRSIGNER, 9), seal(&newer, POLICY_MRSIGNER, 10));
        let refused = |request: [u8; REQUEST_BYTES]| one.key(&ROOT, &request);
        assert_eq!(refused(request(KEY_SEAL, 2, 10)), Some(Err(KeyError::Version)));
        let mut newer_cpu = request(KEY_SEAL, 2, 0);
        newer_cpu[8] = 2;
        assert_eq!(refused(newer_cpu), Some(Err(KeyError::CpuVersion)));
        assert_eq!(refused(request(0, 0, 0)), Some(Err(KeyError::Attribute)));
        assert_eq!(refused(request(9, 0, 0)), Some(Err(KeyError::Name)));
        assert_eq!(refused(request(KEY_SEAL, 0x40, 0)), None);
        let mut reserved = request(KEY_SEAL, 2, 0);
        reserved[100] = 1;
        assert_eq!(refused(reserved), None);
    }
}
