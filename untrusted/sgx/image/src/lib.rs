//! SGX enclave images without SGX: what a CPU would be given, as bytes on any machine.
//!
//! [`convert()`] makes an [`Image`] of an ELF of the target `x86_64-fortanix-unknown-sgx`;
//! [`Image::parse`] and [`Image::to_sgxs`] read and write the SGXS form of it; [`Image::mrenclave`]
//! is its measurement; [`Sigstruct`] its signature; [`scan()`] finds instructions that do not belong
//! into an enclave; [`Symbols`] names addresses.
//!
//! Holds: no input panics or makes anything allocate beyond [`MAX_IMAGE_BYTES`]; an [`Image`] is
//! canonical (ascending pages inside a power of two, each chunk once), so its bytes and its
//! measurement are functions of each other.
//! Follows: Intel SDM volume 3D (ECREATE, EADD, EEXTEND, SIGSTRUCT), and for SGXS and the layout of
//! an ELF what the loader of the Fortanix EDP expects.
#![forbid(unsafe_code)]

mod bytes;
mod convert;
mod dump;
mod elf;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod image;
mod scan;
mod sigstruct;
mod symbols;

pub use convert::{ConvertError, Options, convert};
pub use dump::Dump;
pub use elf::ElfError;
pub use image::{
    CHUNK, EXECUTE, Image, ImageError, MAX_IMAGE_BYTES, PAGE, PERMISSIONS, Page, READ, REGULAR,
    TCS, WRITE,
};
pub use scan::{Finding, scan};
pub use sigstruct::{
    ATTRIBUTE_DEBUG, ATTRIBUTE_MODE64, Identity, SIGSTRUCT_BYTES, SignError, SigningKey, Sigstruct,
    SigstructError,
};
pub use symbols::Symbols;
