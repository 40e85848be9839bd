//! Measurement and signature against numbers that were worked out by other means.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use sgx_image::{
    EXECUTE, Identity, Image, ImageError, PAGE, READ, REGULAR, SIGSTRUCT_BYTES, SignError,
    SigningKey, Sigstruct, SigstructError, TCS, WRITE,
};

/// Made for these tests by `openssl genrsa -3 3072`; it signs nothing else.
const KEY: &str = include_str!("test-key.pem");
/// 2048 bits, exponent 65537.
const WRONG_KEY: &str = include_str!("wrong-key.pem");
const IDENTITY: Identity = Identity { product: 7, version: 3, date: 0x2026_1122, debug: false };

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn image() -> Image {
    let mut image = Image::new(0x4000, 1).unwrap();
    let data: [u8; PAGE] = core::array::from_fn(|index| (index % 251) as u8);
    image.add(0, REGULAR | READ, Some(&data)).unwrap();
    image.add(0x1000, REGULAR | READ | WRITE, None).unwrap();
    image.add(0x3000, TCS, Some(&[0; PAGE])).unwrap();
    image
}

/// The number is SHA-256 of the records as Python's struct and hashlib make them.
#[test]
fn the_measurement_is_what_a_second_implementation_says() {
    let expected = "102da9df2c1b0dfa222239584f21ad52a9346b369187c55e2ef55e5a9d3e7ed3";
    assert_eq!(hex(&image().mrenclave()), expected);
}

#[test]
fn a_file_read_back_is_the_same_image() {
    assert_eq!(Image::parse(&image().to_sgxs()), Ok(image()));
}

#[test]
fn a_changed_byte_permission_or_place_changes_the_measurement_or_is_refused() {
    let (file, mrenclave) = (image().to_sgxs(), image().mrenclave());
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 1;
        let same = Image::parse(&changed).is_ok_and(|image| image.mrenclave() == mrenclave);
        assert!(!same, "byte {at}");
    }
}

#[test]
fn pages_that_no_cpu_takes_are_refused() {
    let mut image = Image::new(0x4000, 1).unwrap();
    let flags = |offset, flags| ImageError::Flags { offset, flags };
    assert_eq!(image.add(0, TCS | READ, None), Err(flags(0, TCS | READ)));
    assert_eq!(image.add(0, REGULAR | WRITE, None), Err(flags(0, REGULAR | WRITE)));
    assert_eq!(image.add(0, READ, None), Err(flags(0, READ)));
    assert_eq!(image.add(0x4000, REGULAR, None), Err(ImageError::Place { offset: 0x4000 }));
    assert_eq!(image.add(8, REGULAR, None), Err(ImageError::Place { offset: 8 }));
    image.add(0x1000, REGULAR | EXECUTE, None).unwrap();
    assert_eq!(image.add(0x1000, REGULAR, None), Err(ImageError::Place { offset: 0x1000 }));
    assert_eq!(Image::new(0x3000, 1), Err(ImageError::Size { bytes: 0x3000 }));
    assert_eq!(Image::new(0x4000, 0), Err(ImageError::Size { bytes: 0x4000 }));
}

#[test]
fn an_image_without_a_size_is_refused() {
    let mut file = image().to_sgxs();
    file[..8].copy_from_slice(b"UNSIZED\0");
    assert_eq!(Image::parse(&file), Err(ImageError::Unsized));
    assert_eq!(Image::parse(&[]), Err(ImageError::Truncated { record: 0 }));
}

#[test]
fn a_signature_verifies_and_says_who_signed_what() {
    let key = SigningKey::from_pem(KEY).unwrap();
    let signed = Sigstruct::sign(&image().mrenclave(), &IDENTITY, &key).unwrap();
    assert_eq!(signed.verify(), Ok(()));
    assert_eq!(signed.mrenclave(), image().mrenclave());
    assert_eq!(signed.identity(), IDENTITY);
    let again = Sigstruct::from_bytes(&signed.as_bytes()[..]).unwrap();
    assert_eq!(again, signed);
    assert_eq!(Sigstruct::from_bytes(&[0; 12]), Err(SigstructError::Length));
}

/// PKCS#1 v1.5 has no randomness, so the whole structure is one number. It was worked out with
/// Python's integers: the signature as m^d mod n, the quotients as the manual defines them.
#[test]
fn the_whole_structure_is_what_a_second_implementation_makes() {
    let key = SigningKey::from_pem(KEY).unwrap();
    let signed = Sigstruct::sign(&image().mrenclave(), &IDENTITY, &key).unwrap();
    let expected = include_str!("sigstruct.hex").split_whitespace().collect::<String>();
    assert_eq!(hex(&signed.as_bytes()[..]), expected);
}

#[test]
fn a_change_of_any_byte_of_a_signature_is_refused() {
    let key = SigningKey::from_pem(KEY).unwrap();
    let signed = Sigstruct::sign(&image().mrenclave(), &IDENTITY, &key).unwrap();
    for at in 0..SIGSTRUCT_BYTES {
        let mut bytes = *signed.as_bytes();
        bytes[at] ^= 0x10;
        assert!(Sigstruct::from_bytes(&bytes).unwrap().verify().is_err(), "byte {at}");
    }
}

#[test]
fn keys_of_another_kind_are_refused() {
    let refused = |text| SigningKey::from_pem(text).unwrap_err();
    assert_eq!(refused("no key"), SignError::Unreadable);
    assert_eq!(refused(WRONG_KEY), SignError::Kind { bits: 2048, exponent_3: false });
}
