//! An ELF that is put together here: everything that an enclave's has, and hardly more.

/// Where the constants lie.
const DATA: u64 = 0;
/// Where the code lies.
pub const CODE: u64 = 0x1000;
/// Where the variables lie.
pub const WRITABLE: u64 = 0x2000;
/// Where the numbers that are filled in begin; eight bytes each.
pub const NUMBERS: u64 = 0x400;

/// Names of the numbers in the order in which they lie there.
pub const NAMES: [&str; 13] = [
    "HEAP_BASE",
    "HEAP_SIZE",
    "RELA",
    "RELACOUNT",
    "ENCLAVE_SIZE",
    "CFGDATA_BASE",
    "DEBUG",
    "TEXT_BASE",
    "TEXT_SIZE",
    "EH_FRM_HDR_OFFSET",
    "EH_FRM_HDR_LEN",
    "EH_FRM_OFFSET",
    "EH_FRM_LEN",
];

struct Section {
    name: &'static str,
    kind: u32,
    address: u64,
    link: u32,
    data: Vec<u8>,
}

/// A small ELF with everything that an enclave has: one page each of constants, code and data.
pub fn elf(relocation: (u64, u64), code: &[u8]) -> Vec<u8> {
    let words =
        |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let (mut names, mut symbols) = (vec![0_u8], vec![0_u8; 24]);
    let mut symbol = |name: &str, address: u64, size: u64, info: u8| {
        symbols.extend((names.len() as u32).to_le_bytes());
        symbols.extend([info, 0, 1, 0]);
        symbols.extend(words(&[address, size]));
        names.extend(name.bytes().chain([0]));
    };
    symbol("sgx_entry", CODE, 16, 0x12);
    for (index, name) in NAMES.iter().enumerate() {
        let size = if *name == "DEBUG" { 1 } else { 8 };
        symbol(name, NUMBERS + 8 * index as u64, size, 0x10);
    }
    let mut note = vec![18, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0];
    note.extend(b"toolchain-version\0\0\0\x01\0\0\0");
    let outside = [0x0f, 0x05]; // syscall
    let mut text = code.to_vec();
    let sections = [
        Section { name: "", kind: 0, address: 0, link: 0, data: vec![] },
        Section { name: ".dynsym", kind: 11, address: 0, link: 2, data: symbols },
        Section { name: ".dynstr", kind: 3, address: 0, link: 0, data: names },
        Section {
            name: ".rela.dyn",
            kind: 4,
            address: 0x300,
            link: 0,
            data: words(&[relocation.0, relocation.1, CODE]),
        },
        Section { name: ".eh_frame", kind: 1, address: 0x310, link: 0, data: vec![7; 5] },
        Section { name: ".eh_frame_hdr", kind: 1, address: 0x320, link: 0, data: vec![8; 6] },
        Section { name: ".text", kind: 1, address: CODE, link: 0, data: text.clone() },
        Section {
            name: ".text_no_sgx",
            kind: 1,
            address: CODE + text.len() as u64,
            link: 0,
            data: outside.to_vec(),
        },
        Section {
            name: ".note.x86_64-fortanix-unknown-sgx",
            kind: 7,
            address: 0,
            link: 0,
            data: note,
        },
    ];
    text.extend(outside);
    let dynamic = words(&[7, 0x300, 0x6fff_fff9, 1, 0, 0]);
    let constants: Vec<u8> = vec![0x55; 0x600];
    let variables = vec![0x66; 0x20];

    let mut file = vec![0_u8; 64 + 4 * 56];
    let mut segments = Vec::new();
    for (kind, flags, address, memory, data) in [
        (1_u32, 4_u32, DATA, 0x600, &constants),
        (1, 5, CODE, text.len() as u64, &text),
        (1, 6, WRITABLE + 0x10, 0x30, &variables),
        (2, 6, WRITABLE, 48, &dynamic),
    ] {
        segments.extend(kind.to_le_bytes());
        segments.extend(flags.to_le_bytes());
        segments.extend(words(&[
            file.len() as u64,
            address,
            address,
            data.len() as u64,
            memory,
            8,
        ]));
        file.extend(data);
    }
    file[64..64 + 4 * 56].copy_from_slice(&segments);
    let (mut headers, mut strings) = (Vec::new(), Vec::new());
    for section in &sections {
        headers.extend((strings.len() as u32).to_le_bytes());
        headers.extend(section.kind.to_le_bytes());
        headers.extend(words(&[0, section.address, file.len() as u64, section.data.len() as u64]));
        headers.extend(section.link.to_le_bytes());
        headers.extend([0; 20]);
        strings.extend(section.name.bytes().chain([0]));
        file.extend(&section.data);
    }
    let names_at = file.len() as u64;
    headers.extend((strings.len() as u32).to_le_bytes());
    strings.extend(b".shstrtab\0");
    headers.extend(3_u32.to_le_bytes());
    headers.extend(words(&[0, 0, names_at, strings.len() as u64, 0, 0, 0]));
    file.extend(&strings);
    let sections_at = file.len() as u64;
    file.extend(headers);
    file[..20].copy_from_slice(&[
        0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 62, 0,
    ]);
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[40..48].copy_from_slice(&sections_at.to_le_bytes());
    for (at, value) in [(54, 56_u16), (56, 4), (58, 64), (60, 10), (62, 9)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    file
}
