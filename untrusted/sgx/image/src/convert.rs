//! An ELF of the target `x86_64-fortanix-unknown-sgx` as an enclave image.
//!
//! The layout is that of the target's own tools: segments, heap, then for each thread a guard, its
//! stack, a page of thread state, the TCS and its state save area. Numbers that the program reads
//! of itself (where its heap is, how large it is) are written into its read-only data.
//!
//! Holds: the same ELF and options make the same bytes, those that the target's own tool makes.

use core::fmt;

use crate::{
    ElfError, ImageError,
    bytes::u64_at,
    elf::{Elf, PT_DYNAMIC, PT_LOAD, SHT_REL, SHT_RELA, Segment},
    image::{EXECUTE, Image, MAX_IMAGE_BYTES, PAGE, READ, REGULAR, TCS, WRITE},
};

/// How large the parts of an enclave are that its ELF file does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of heap; whole pages.
    pub heap_bytes: u64,
    /// Bytes of stack for each thread; whole pages.
    pub stack_bytes: u64,
    /// Threads that can be in the enclave at once, the main one included.
    pub threads: u32,
    /// Pages of a frame of the state save area. One is enough without AMX.
    pub ssa_frame_pages: u32,
    /// Whether the program may tell the host what it panics of.
    pub debug: bool,
}

impl Default for Options {
    /// The defaults of the target's tools: 32 MiB, 128 KiB, 4 threads; for development.
    fn default() -> Self {
        Self {
            heap_bytes: 32 << 20,
            stack_bytes: 128 << 10,
            threads: 4,
            ssa_frame_pages: 1,
            debug: true,
        }
    }
}

/// Why no enclave can be made of an ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvertError {
    /// The file itself.
    Elf(ElfError),
    /// A symbol of the target's runtime is missing, twice, undefined, or of another size: the file
    /// was not made for `x86_64-fortanix-unknown-sgx`.
    Symbol(String),
    /// The section that every program of the target has is missing.
    Section(&'static str),
    /// The runtime is of a version that is not known here.
    Version,
    /// The program needs what an enclave's loader does not do.
    Dynamic(&'static str),
    /// A relocation that is not relative to the image, or outside of writable memory.
    Relocation {
        /// Where it applies.
        address: u64,
    },
    /// The first page is executable, which leaves no room to catch stray loads (LVI).
    FirstPage,
    /// Segments overlap, are too large, or the options ask for too much or for parts of pages.
    Layout,
    /// The pages do not make an image.
    Image(ImageError),
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elf(error) => error.fmt(f),
            Self::Symbol(name) => {
                write!(f, "symbol {name} is not as the target x86_64-fortanix-unknown-sgx makes it")
            }
            Self::Section(name) => write!(f, "section {name} is missing"),
            Self::Version => f.write_str("the program's runtime is of an unknown version"),
            Self::Dynamic(what) => write!(f, "the program has {what}, which no enclave can have"),
            Self::Relocation { address } => {
                write!(f, "the relocation of {address:#x} cannot be done inside an enclave")
            }
            Self::FirstPage => f.write_str("the first page of the program is executable"),
            Self::Layout => {
                f.write_str("segments, heap, stacks and threads do not fit into an enclave")
            }
            Self::Image(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ConvertError {}

impl From<ElfError> for ConvertError {
    fn from(error: ElfError) -> Self {
        Self::Elf(error)
    }
}

impl From<ImageError> for ConvertError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// Unused addresses before each stack.
const GUARD: u64 = 0x1_0000;
const PAGE_BYTES: u64 = PAGE as u64;
/// The most bytes of program that are converted.
const MAX_SEGMENTS: u64 = 1 << 28;
const MAX_THREADS: u32 = 4096;
/// The version of the runtime's entry code that this follows.
const TOOLCHAIN: u32 = 1;
const NOTE: &[u8] = b".note.x86_64-fortanix-unknown-sgx";

/// Makes an image of an ELF file.
///
/// # Errors
/// Why this file, or these options, make none.
pub fn convert(file: &[u8], options: &Options) -> Result<Image, ConvertError> {
    let elf = Elf::parse(file)?;
    check_version(&elf)?;
    let names = Names::find(&elf)?;
    let relocations = dynamic(&elf)?;
    check_relocations(&elf, relocations.1)?;
    let plan = Plan::new(&elf, options)?;
    let mut image = Image::new(plan.size, options.ssa_frame_pages)?;

    let mut patches = names.patches(&elf, options, &plan, relocations)?;
    let outside = elf.section(b".text_no_sgx").map(|section| (section.address, section.size));
    if let Some((address, size)) = outside {
        let size = usize::try_from(size).ok().filter(|size| *size as u64 <= MAX_SEGMENTS);
        patches.push((address, vec![0x90; size.ok_or(ConvertError::Layout)?]));
    }
    for segment in loads(&elf) {
        add_segment(&mut image, segment, &patches, outside)?;
    }
    zeros(&mut image, plan.heap, options.heap_bytes)?;
    for thread in 0..options.threads {
        add_thread(&mut image, &plan, options, thread, names.entry)?;
    }
    Ok(image)
}

fn loads<'e>(elf: &'e Elf<'e>) -> impl Iterator<Item = &'e Segment<'e>> {
    elf.segments.iter().filter(|segment| segment.kind == PT_LOAD)
}

/// Where things lie in the enclave, bytes from its start.
struct Plan {
    heap: u64,
    threads: u64,
    /// From one thread's guard to the next.
    stride: u64,
    /// End of all pages.
    end: u64,
    size: u64,
}

impl Plan {
    fn new(elf: &Elf<'_>, options: &Options) -> Result<Self, ConvertError> {
        let small = |bytes: u64| bytes <= MAX_IMAGE_BYTES && bytes.is_multiple_of(PAGE_BYTES);
        let fits = small(options.heap_bytes)
            && small(options.stack_bytes)
            && (1..=MAX_THREADS).contains(&options.threads)
            && options.ssa_frame_pages <= 16;
        let top = loads(elf).map(|segment| segment.address + segment.memory).max();
        let top = top.filter(|top| fits && *top <= MAX_IMAGE_BYTES).ok_or(ConvertError::Layout)?;
        // Every number below is at most 2^37 and their products at most 2^50.
        let heap = top.next_multiple_of(PAGE_BYTES);
        let threads = heap + options.heap_bytes;
        let state = (2 + u64::from(options.ssa_frame_pages)) * PAGE_BYTES;
        let stride = GUARD + options.stack_bytes + state;
        let end = threads + u64::from(options.threads) * stride;
        Ok(Self { heap, threads, stride, end, size: end.next_power_of_two() })
    }
}

/// Addresses of the symbols that the image is entered and told of itself by.
struct Names {
    entry: u64,
    symbols: Vec<(&'static str, u64)>,
}

/// Symbols of eight bytes that are written.
const NUMBERS: [&str; 8] = [
    "HEAP_BASE",
    "HEAP_SIZE",
    "RELA",
    "RELACOUNT",
    "ENCLAVE_SIZE",
    "CFGDATA_BASE",
    "TEXT_BASE",
    "TEXT_SIZE",
];
/// Those of the unwinder's tables, and what they were called before.
const UNWIND: [&str; 4] = ["EH_FRM_HDR_OFFSET", "EH_FRM_HDR_LEN", "EH_FRM_OFFSET", "EH_FRM_LEN"];
const UNWIND_OLD: [&str; 2] = ["EH_FRM_HDR_BASE", "EH_FRM_HDR_SIZE"];

impl Names {
    fn find(elf: &Elf<'_>) -> Result<Self, ConvertError> {
        if let Some(open) = elf.dynamic_symbols().find(|symbol| !symbol.is_defined) {
            return Err(ConvertError::Symbol(String::from_utf8_lossy(open.name).into_owned()));
        }
        let one = |name: &'static str, size: Option<u64>| {
            let mut all = elf.dynamic_symbols().filter(|symbol| symbol.name == name.as_bytes());
            match (all.next(), all.next()) {
                (Some(symbol), None) if size.is_none_or(|size| size == symbol.size) => {
                    Ok((name, symbol.address))
                }
                _ => Err(ConvertError::Symbol(name.to_owned())),
            }
        };
        let (_, entry) = one("sgx_entry", None)?;
        let mut symbols = vec![one("DEBUG", Some(1))?];
        for name in NUMBERS {
            symbols.push(one(name, Some(8))?);
        }
        let all = |names: &[&'static str]| {
            names.iter().map(|name| one(name, Some(8))).collect::<Result<Vec<_>, _>>()
        };
        symbols.extend(all(&UNWIND_OLD).or_else(|_| all(&UNWIND))?);
        Ok(Self { entry, symbols })
    }

    /// What is written where.
    fn patches(
        &self,
        elf: &Elf<'_>,
        options: &Options,
        plan: &Plan,
        relocations: (u64, u64),
    ) -> Result<Vec<(u64, Vec<u8>)>, ConvertError> {
        let of = |name: &'static str| {
            let section = elf.section(name.as_bytes()).ok_or(ConvertError::Section(name))?;
            Ok::<_, ConvertError>((section.address, section.size))
        };
        let (text, frames, header) = (of(".text")?, of(".eh_frame")?, of(".eh_frame_hdr")?);
        let number = |name| match name {
            "HEAP_BASE" => plan.heap,
            "HEAP_SIZE" => options.heap_bytes,
            "RELA" => relocations.0,
            "RELACOUNT" => relocations.1,
            "ENCLAVE_SIZE" => plan.size,
            "CFGDATA_BASE" => plan.end,
            "TEXT_BASE" => text.0,
            "TEXT_SIZE" => text.1,
            "EH_FRM_HDR_OFFSET" | "EH_FRM_HDR_BASE" => header.0,
            "EH_FRM_HDR_LEN" | "EH_FRM_HDR_SIZE" => header.1,
            "EH_FRM_OFFSET" => frames.0,
            _ => frames.1,
        };
        let patch = |(name, address): &(&'static str, u64)| match *name {
            "DEBUG" => (*address, vec![u8::from(options.debug)]),
            name => (*address, number(name).to_le_bytes().to_vec()),
        };
        let patches: Vec<_> = self.symbols.iter().map(patch).collect();
        for ((name, address), (_, bytes)) in self.symbols.iter().zip(&patches) {
            let last = address.checked_add(bytes.len() as u64);
            let inside = |segment: &Segment<'_>| {
                let end = segment.address + segment.data.len() as u64;
                *address >= segment.address && last.is_some_and(|last| last <= end)
            };
            if !loads(elf).any(inside) {
                return Err(ConvertError::Symbol((*name).to_owned()));
            }
        }
        Ok(patches)
    }
}

fn check_version(elf: &Elf<'_>) -> Result<(), ConvertError> {
    const MISSING: ConvertError = ConvertError::Section(".note.x86_64-fortanix-unknown-sgx");
    // Name length 18, description length 4, kind 1, the name padded to 20, the version.
    let note = elf.section(NOTE).ok_or(MISSING)?.data;
    let name = b"\x12\0\0\0\x04\0\0\0\x01\0\0\0toolchain-version\0\0\0";
    let version = note.strip_prefix(name).and_then(|rest| rest.first_chunk());
    match version.map(|bytes| u32::from_le_bytes(*bytes)) {
        Some(0..=TOOLCHAIN) => Ok(()),
        Some(_) => Err(ConvertError::Version),
        None => Err(MISSING),
    }
}

/// Where the relocations are and how many; zeros if there are none.
fn dynamic(elf: &Elf<'_>) -> Result<(u64, u64), ConvertError> {
    let table = elf.segments.iter().find(|segment| segment.kind == PT_DYNAMIC);
    let table = table.ok_or(ConvertError::Dynamic("no dynamic table"))?;
    let (mut place, mut count) = (None, None);
    for entry in table.data.chunks_exact(16) {
        let (Some(tag), Some(value)) = (u64_at(entry, 0), u64_at(entry, 8)) else { break };
        let known = match tag {
            0 => break,
            2 | 20 | 23 => return Err(ConvertError::Dynamic("a procedure linkage table")),
            12 | 25 | 27 => return Err(ConvertError::Dynamic("functions run at its start")),
            13 | 26 | 28 => return Err(ConvertError::Dynamic("functions run at its end")),
            17..=19 | 0x6fff_fffa => {
                return Err(ConvertError::Dynamic("relocations without addend"));
            }
            7 => place.replace(value),
            0x6fff_fff9 => count.replace(value),
            _ => None,
        };
        if known.is_some() {
            return Err(ConvertError::Dynamic("two tables of relocations"));
        }
    }
    match (place, count) {
        (Some(place), Some(count)) => Ok((place, count)),
        (None, None) => Ok((0, 0)),
        _ => Err(ConvertError::Dynamic("relocations that are not relative")),
    }
}

fn check_relocations(elf: &Elf<'_>, counted: u64) -> Result<(), ConvertError> {
    const RELATIVE: u64 = 8;
    let mut count = 0;
    for section in &elf.sections {
        if section.kind == SHT_REL {
            return Err(ConvertError::Dynamic("relocations without addend"));
        }
        if section.kind != SHT_RELA {
            continue;
        }
        for entry in section.data.chunks_exact(24) {
            let (Some(address), Some(info)) = (u64_at(entry, 0), u64_at(entry, 8)) else { break };
            let inside = |segment: &Segment<'_>| {
                let end = segment.address + segment.memory;
                let last = address.checked_add(8);
                segment.flags & 2 != 0
                    && address >= segment.address
                    && last.is_some_and(|last| last <= end)
            };
            if info != RELATIVE || !loads(elf).any(inside) {
                return Err(ConvertError::Relocation { address });
            }
            count += 1;
        }
    }
    if count == counted {
        Ok(())
    } else {
        Err(ConvertError::Dynamic("relocations that its table does not count"))
    }
}

/// Adds the pages of a loadable segment, patched; `outside` is what only Linux would run: it is
/// overwritten, or left away if it ends the segment.
fn add_segment(
    image: &mut Image,
    segment: &Segment<'_>,
    patches: &[(u64, Vec<u8>)],
    outside: Option<(u64, u64)>,
) -> Result<(), ConvertError> {
    let flags = [(4, READ), (2, WRITE), (1, EXECUTE)]
        .iter()
        .filter(|(bit, _)| segment.flags & bit != 0)
        .fold(REGULAR, |flags, (_, permission)| flags | permission);
    let base = segment.address & !(PAGE_BYTES - 1);
    let mut end = segment.address + segment.memory;
    if base == 0 && flags & EXECUTE != 0 {
        return Err(ConvertError::FirstPage);
    }
    if let Some((address, size)) = outside
        && address >= base
        && address.checked_add(size) == Some(end)
    {
        end = address;
    }
    if end.saturating_sub(base) > MAX_SEGMENTS {
        return Err(ConvertError::Layout);
    }
    // Bounded above.
    let length = (end - base).next_multiple_of(PAGE_BYTES) as usize;
    let mut bytes = vec![0; length];
    // Bytes of the file lie from `address` on, patches where their symbols say.
    write(&mut bytes, segment.address - base, segment.data, end - base);
    for (address, patch) in patches {
        if let Some(at) = address.checked_sub(base) {
            write(&mut bytes, at, patch, end - base);
        }
    }
    for (index, page) in bytes.as_chunks::<PAGE>().0.iter().enumerate() {
        image.add(base + (index * PAGE) as u64, flags, Some(page))?;
    }
    Ok(())
}

/// Copies as much of `source` to `at` as lies before `end`.
fn write(target: &mut [u8], at: u64, source: &[u8], end: u64) {
    let Ok(start) = usize::try_from(at) else { return };
    let end = usize::try_from(end).unwrap_or(usize::MAX).min(target.len());
    let Some(room) = target.get_mut(start..end) else { return };
    let length = room.len().min(source.len());
    room[..length].copy_from_slice(&source[..length]);
}

fn zeros(image: &mut Image, from: u64, bytes: u64) -> Result<(), ConvertError> {
    for page in 0..bytes / PAGE_BYTES {
        image.add(from + page * PAGE_BYTES, REGULAR | READ | WRITE, None)?;
    }
    Ok(())
}

fn add_thread(
    image: &mut Image,
    plan: &Plan,
    options: &Options,
    thread: u32,
    entry: u64,
) -> Result<(), ConvertError> {
    let stack = plan.threads + u64::from(thread) * plan.stride + GUARD;
    let state = stack + options.stack_bytes;
    let tcs = state + PAGE_BYTES;
    zeros(image, stack, options.stack_bytes)?;
    // The runtime's own thread state: top of the stack, and whether this is not the main thread.
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&state.to_le_bytes());
    page[8] = u8::from(thread != 0);
    image.add(state, REGULAR | READ | WRITE, Some(&page))?;
    let mut page = [0; PAGE];
    let fields = [
        (16, tcs + PAGE_BYTES),    // OSSA
        (24, 1 << 32),             // CSSA 0, NSSA 1
        (32, entry),               // OENTRY
        (48, state),               // OFSBASGX
        (56, state),               // OGSBASGX
        (64, 0xfff | 0xfff << 32), // FSLIMIT, GSLIMIT
    ];
    for (at, value) in fields {
        page[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    image.add(tcs, TCS, Some(&page))?;
    zeros(image, tcs + PAGE_BYTES, u64::from(options.ssa_frame_pages) * PAGE_BYTES)
}
