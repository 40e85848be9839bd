//! What of an ELF file an enclave image is made of.
//!
//! Holds: every range that is handed out lies inside the file; nothing is trusted but bounds that
//! were checked here.

use core::fmt;

use crate::bytes::{range, u16_at, u32_at, u64_at};

/// What is wrong with an ELF file as one that an enclave is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ElfError {
    /// It does not begin as an ELF file does.
    NotElf,
    /// It is not 64-bit, little-endian, position-independent code for x86-64.
    Machine,
    /// This part is cut off or lies outside the file.
    Truncated(&'static str),
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf => f.write_str("this is no ELF file"),
            Self::Machine => f.write_str("the ELF file is no static-pie for x86-64"),
            Self::Truncated(what) => write!(f, "the {what} of the ELF file lies outside of it"),
        }
    }
}

impl core::error::Error for ElfError {}

/// Program header of loadable memory.
pub const PT_LOAD: u32 = 1;
/// Program header of the dynamic table.
pub const PT_DYNAMIC: u32 = 2;
/// Section of relocations with addends.
pub const SHT_RELA: u32 = 4;
/// Section of relocations without.
pub const SHT_REL: u32 = 9;
const SHT_NOBITS: u32 = 8;
const SHT_SYMTAB: u32 = 2;
const SHT_DYNSYM: u32 = 11;
const SYMBOL: usize = 24;

/// A program header.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// `PT_*`.
    pub kind: u32,
    /// Bit 0: execute, 1: write, 2: read.
    pub flags: u32,
    /// Address in the image.
    pub address: u64,
    /// Bytes in memory, at least those of `data`.
    pub memory: u64,
    /// What the file has of it.
    pub data: &'a [u8],
}

/// A section header.
#[derive(Clone, Copy, Debug)]
pub struct Section<'a> {
    /// Its name, without the NUL.
    pub name: &'a [u8],
    /// `SHT_*`.
    pub kind: u32,
    /// Address in the image.
    pub address: u64,
    /// Bytes in memory.
    pub size: u64,
    /// What the file has of it.
    pub data: &'a [u8],
    /// Number of the section that belongs to it.
    link: u32,
}

/// An entry of a symbol table.
#[derive(Clone, Copy, Debug)]
pub struct Symbol<'a> {
    /// Its name, without the NUL.
    pub name: &'a [u8],
    /// Address in the image.
    pub address: u64,
    /// Bytes, 0 if unknown.
    pub size: u64,
    /// Whether it is code.
    pub is_function: bool,
    /// Whether it is defined here.
    pub is_defined: bool,
}

/// An ELF file whose headers are whole.
#[derive(Clone, Debug)]
pub struct Elf<'a> {
    /// The program headers in the file's order.
    pub segments: Vec<Segment<'a>>,
    /// The section headers in the file's order; none if it was stripped of them.
    pub sections: Vec<Section<'a>>,
}

impl<'a> Elf<'a> {
    /// Reads the headers.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn parse(file: &'a [u8]) -> Result<Self, ElfError> {
        const HEADER: ElfError = ElfError::Truncated("header");
        if file.get(..4) != Some(b"\x7fELF") {
            return Err(ElfError::NotElf);
        }
        // 64 bits, little-endian; ET_DYN; EM_X86_64.
        let kind = (u16_at(file, 16).ok_or(HEADER)?, u16_at(file, 18).ok_or(HEADER)?);
        if file.get(4..6) != Some(&[2, 1]) || kind != (3, 62) {
            return Err(ElfError::Machine);
        }
        let table = |offset_at, size_at, smallest: u16, what| {
            let offset = u64_at(file, offset_at).ok_or(HEADER)?;
            let size = u16_at(file, size_at).ok_or(HEADER)?;
            let count = u16_at(file, size_at + 2).ok_or(HEADER)?;
            if count == 0 {
                return Ok([].chunks_exact(1));
            }
            if size < smallest {
                return Err(ElfError::Truncated(what));
            }
            let bytes = u64::from(size) * u64::from(count);
            let bytes = range(file, offset, bytes).ok_or(ElfError::Truncated(what))?;
            Ok(bytes.chunks_exact(usize::from(size)))
        };
        let segments = table(32, 54, 56, "program headers")?
            .map(|entry| segment(file, entry).ok_or(ElfError::Truncated("segment")))
            .collect::<Result<_, _>>()?;
        let mut sections = table(40, 58, 64, "section headers")?
            .map(|entry| section(file, entry).ok_or(ElfError::Truncated("section")))
            .collect::<Result<Vec<_>, _>>()?;
        let names = usize::from(u16_at(file, 62).ok_or(HEADER)?);
        let names = sections.get(names).map_or(&[][..], |(section, _)| section.data);
        for (section, name) in &mut sections {
            section.name = text(names, *name);
        }
        Ok(Self { segments, sections: sections.into_iter().map(|(section, _)| section).collect() })
    }

    /// The first section of this name.
    pub fn section(&self, name: &[u8]) -> Option<&Section<'a>> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The dynamic symbols, those of the enclave's interface.
    pub fn dynamic_symbols(&self) -> impl Iterator<Item = Symbol<'a>> {
        self.symbols_of(SHT_DYNSYM)
    }

    /// All symbols, also local ones where the file has them.
    pub fn symbols(&self) -> impl Iterator<Item = Symbol<'a>> {
        self.symbols_of(SHT_SYMTAB).chain(self.symbols_of(SHT_DYNSYM))
    }

    fn symbols_of(&self, kind: u32) -> impl Iterator<Item = Symbol<'a>> {
        self.sections.iter().filter(move |section| section.kind == kind).flat_map(|table| {
            let names = usize::try_from(table.link).ok().and_then(|link| self.sections.get(link));
            let names = names.map_or(&[][..], |names| names.data);
            // The first entry is the one that stands for none.
            table.data.chunks_exact(SYMBOL).skip(1).filter_map(|entry| symbol(names, entry))
        })
    }
}

fn segment<'a>(file: &'a [u8], entry: &[u8]) -> Option<Segment<'a>> {
    let (offset, filled) = (u64_at(entry, 8)?, u64_at(entry, 32)?);
    let segment = Segment {
        kind: u32_at(entry, 0)?,
        flags: u32_at(entry, 4)?,
        address: u64_at(entry, 16)?,
        memory: u64_at(entry, 40)?,
        data: range(file, offset, filled)?,
    };
    (segment.memory >= filled && segment.address.checked_add(segment.memory).is_some())
        .then_some(segment)
}

fn section<'a>(file: &'a [u8], entry: &[u8]) -> Option<(Section<'a>, u32)> {
    let kind = u32_at(entry, 4)?;
    let (address, offset, size) = (u64_at(entry, 16)?, u64_at(entry, 24)?, u64_at(entry, 32)?);
    let data = if matches!(kind, 0 | SHT_NOBITS) { &[] } else { range(file, offset, size)? };
    address.checked_add(size)?;
    let section = Section { name: &[], kind, address, size, data, link: u32_at(entry, 40)? };
    Some((section, u32_at(entry, 0)?))
}

fn symbol<'a>(names: &'a [u8], entry: &[u8]) -> Option<Symbol<'a>> {
    Some(Symbol {
        name: text(names, u32_at(entry, 0)?),
        is_function: entry.get(4)? & 0xf == 2,
        is_defined: u16_at(entry, 6)? != 0,
        address: u64_at(entry, 8)?,
        size: u64_at(entry, 16)?,
    })
}

/// The string that begins at `at` of a string table.
fn text(names: &[u8], at: u32) -> &[u8] {
    let name = usize::try_from(at).ok().and_then(|at| names.get(at..)).unwrap_or_default();
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}
