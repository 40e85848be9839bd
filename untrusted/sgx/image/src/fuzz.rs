//! Fuzz targets: files of any content, as the tools and the loader read them.
//!
//! Holds, or a target panics: an end, whatever the file; an ELF file that is taken makes an image
//! that is its own SGXS file; an SGXS file that is taken is written the same, byte for byte, and its
//! measurement is that of an oracle that knows the records alone; of a signature no byte can be
//! another.
//!
//! An input patches a good file: place (2 bytes, taken modulo the length), what (1), value (1). With
//! a first byte of 80h or more the rest is the whole file.

#[path = "../tests/small_elf/mod.rs"]
#[allow(dead_code, reason = "the tests' constants")]
mod small_elf;

use std::sync::OnceLock;

use rsa::sha2::{Digest as _, Sha256};

use crate::{Image, Options, Sigstruct, Symbols, convert, scan};

/// Larger ones are left alone: they take long, and are no other.
const MOST: u64 = 1 << 24;

const OPTIONS: Options = Options {
    heap_bytes: 0x2000,
    stack_bytes: 0x1000,
    threads: 2,
    ssa_frame_pages: 1,
    debug: true,
};

fn good_elf() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    // A relocation of the kind that there may be, and a return.
    GOOD.get_or_init(|| small_elf::elf((small_elf::WRITABLE + 0x20, 8), &[0x90, 0x90, 0xc3]))
}

fn good_sgxs() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| convert(good_elf(), &OPTIONS).map_or(Vec::new(), |image| image.to_sgxs()))
}

fn good_signature() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let text = include_str!("../tests/sigstruct.hex");
        let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.as_chunks().0.iter().map(|[high, low]| (high << 4 | low) as u8).collect()
    })
}

/// The file that an input stands for.
fn file(good: &[u8], data: &[u8]) -> Vec<u8> {
    let Some((first, rest)) = data.split_first() else { return good.to_vec() };
    if *first >= 0x80 {
        return rest.to_vec();
    }
    let mut file = good.to_vec();
    for [low, high, what, value] in rest.as_chunks::<4>().0.iter().take(64) {
        if file.is_empty() {
            break;
        }
        let at = usize::from(u16::from_le_bytes([*low, *high])) % file.len();
        let wide = u64::from(*value);
        let number = match what % 10 {
            0 => {
                file[at] = *value;
                continue;
            }
            1 => {
                file[at] ^= value;
                continue;
            }
            2 => {
                file.truncate(at);
                continue;
            }
            3 => {
                // A record more, or one from elsewhere.
                let from = at / 64 * 64;
                let record = file[from..(from + 64).min(file.len())].to_vec();
                let to = usize::from(*value) * 64 % file.len();
                file.splice(to..to, record);
                continue;
            }
            4 => {
                file.drain(at / 64 * 64..(at / 64 * 64 + 64).min(file.len()));
                continue;
            }
            5 => wide,
            6 => u64::MAX - wide,
            7 => 1 << (value % 64),
            8 => wide << 12,
            _ => (1 << (value % 64)) - 1,
        };
        if let Some(word) = file.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            *word = number.to_le_bytes();
        }
    }
    file
}

/// An ELF file of any content: its conversion, its symbols, and the scan of what comes of it.
pub fn elf(data: &[u8]) {
    let file = file(good_elf(), data);
    let symbols = Symbols::of_elf(&file);
    let _ = symbols.name(small_elf::CODE);
    let Ok(image) = convert(&file, &OPTIONS) else { return };
    if image.size() > MOST {
        return;
    }
    let sgxs = image.to_sgxs();
    assert_eq!(Image::parse(&sgxs).as_ref(), Ok(&image), "the SGXS file is of another image");
    assert_eq!(image.mrenclave(), measurement(&sgxs), "the measurement");
    let _ = scan(&image, &symbols);
}

/// An SGXS file of any content.
pub fn sgxs(data: &[u8]) {
    let file = file(good_sgxs(), data);
    let Ok(image) = Image::parse(&file) else { return };
    assert!(image.to_sgxs() == file, "a file that is written otherwise than it was read");
    assert_eq!(image.mrenclave(), measurement(&file), "the measurement");
    if image.size() <= MOST {
        let _ = scan(&image, &Symbols::default());
    }
}

/// SHA-256 of the records that are measured, by their tags alone.
fn measurement(mut file: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    while !file.is_empty() {
        let chunk = matches!(&file[..8], b"EEXTEND\0" | b"UNMEASRD");
        let (record, rest) = file.split_at(if chunk { 64 + 256 } else { 64 });
        if !record.starts_with(b"UNMEASRD") {
            hash.update(record);
        }
        file = rest;
    }
    hash.finalize().into()
}

/// A SIGSTRUCT of any content: each of its bytes is under the signature, or has to be what it is.
pub fn sigstruct(data: &[u8]) {
    let file = file(good_signature(), data);
    let Ok(signature) = Sigstruct::from_bytes(&file) else { return };
    let _ = (signature.identity(), signature.mrsigner(), signature.mrenclave());
    let right = file == good_signature();
    assert_eq!(signature.verify().is_ok(), right, "{:?}", signature.verify());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_makes_a_reader_panic_or_is_taken_for_another() {
        postern_hostile::inputs::run("elf", elf, Some(300));
        postern_hostile::inputs::run("sgxs", sgxs, Some(300));
        postern_hostile::inputs::run("sigstruct", sigstruct, Some(60));
    }

    /// The control: the good files are good, and inputs say what they are meant to.
    #[test]
    fn an_input_is_the_file_that_its_bytes_say() {
        assert!(convert(good_elf(), &OPTIONS).is_ok());
        assert!(Image::parse(good_sgxs()).is_ok());
        let signature = Sigstruct::from_bytes(good_signature()).unwrap();
        assert_eq!(signature.verify(), Ok(()));
        assert_eq!(file(b"abcd", &[0x80, 1, 2]), [1, 2]);
        assert_eq!(file(b"abcd", &[0, 1, 0, 0, b'x']), b"axcd");
        assert_eq!(file(b"abcd", &[0, 2, 0, 2, 0]), b"ab");
        assert_eq!(file(&[7; 8], &[0, 0, 0, 6, 1]), (u64::MAX - 1).to_le_bytes());
    }
}
