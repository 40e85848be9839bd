//! ELF to image, with an ELF that is put together here: what the layout must be follows from the
//! target's loader, and no damage to a file panics.

use proptest::prelude::*;
use sgx_image::{
    ConvertError, Dump, EXECUTE, Image, Options, PAGE, READ, REGULAR, Symbols, WRITE, convert, scan,
};

mod small_elf;

use small_elf::{CODE, NAMES, NUMBERS, WRITABLE, elf};

const OPTIONS: Options = Options {
    heap_bytes: 0x3000,
    stack_bytes: 0x2000,
    threads: 2,
    ssa_frame_pages: 1,
    debug: true,
};
const NOP: &[u8] = &[0x90; 16];

fn good() -> Vec<u8> {
    elf((WRITABLE + 0x10, 8), NOP)
}

fn number(image: &Image, offset: u64) -> u64 {
    image.read(offset, 8).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn the_program_reads_of_itself_what_the_layout_is() {
    let image = convert(&good(), &OPTIONS).unwrap();
    // Three pages of program, three of heap, then twice 16 of guard, 2 of stack, 1 of state, TCS, SSA.
    let end = 0x6000 + 2 * (0x10000 + 0x2000 + 0x3000);
    let expected = [
        0x3000,
        0x3000,
        0x300,
        1,
        0x40000,
        end,
        0x5555_5555_5555_5501,
        CODE,
        16,
        0x320,
        6,
        0x310,
        5,
    ];
    for (index, (name, expected)) in NAMES.iter().zip(expected).enumerate() {
        assert_eq!(number(&image, NUMBERS + 8 * index as u64), expected, "{name}");
    }
    assert_eq!(image.size(), 0x40000);
}

#[test]
fn each_thread_has_a_guard_a_stack_its_state_a_tcs_and_a_save_area() {
    let image = convert(&good(), &OPTIONS).unwrap();
    let (tcs, rw) = (0x100, REGULAR | READ | WRITE);
    let places: Vec<_> = image.pages().iter().map(|page| (page.offset(), page.flags())).collect();
    let thread = |guard: u64| {
        let at = guard + 0x10000;
        [(at, rw), (at + 0x1000, rw), (at + 0x2000, rw), (at + 0x3000, tcs), (at + 0x4000, rw)]
    };
    let program = [
        (0, REGULAR | READ),
        (0x1000, REGULAR | READ | EXECUTE),
        (0x2000, rw),
        (0x3000, rw),
        (0x4000, rw),
        (0x5000, rw),
    ];
    let expected = [&program[..], &thread(0x6000), &thread(0x1b000)].concat();
    assert_eq!(places, expected);
    // OSSA, NSSA, OENTRY, OGSBASGX; top of the stack; only the second is not the main thread.
    for (state, secondary) in [(0x18000, 0), (0x2d000, 1)] {
        let tcs = state + 0x1000;
        assert_eq!((number(&image, state), number(&image, state + 8)), (state, secondary));
        assert_eq!(number(&image, tcs + 16), tcs + 0x1000);
        assert_eq!(number(&image, tcs + 24), 1 << 32);
        assert_eq!(number(&image, tcs + 32), CODE);
        assert_eq!(number(&image, tcs + 56), state);
    }
}

#[test]
fn what_only_linux_would_run_is_not_in_the_image() {
    let image = convert(&good(), &OPTIONS).unwrap();
    assert_eq!(image.read(CODE, 18), [NOP, &[0, 0]].concat());
    assert_eq!(scan(&image, &Symbols::default()), []);
}

#[test]
fn instructions_are_found_and_bytes_of_immediates_are_not() {
    // mov eax, 0x050f0f05; cpuid; mov $0xcd, %al; int 0x80; out dx, al; syscall.
    let code = [0xb8, 0x05, 0x0f, 0x0f, 0x05, 0x0f, 0xa2, 0xb0, 0xcd, 0xcd, 0x80, 0xee, 0x0f, 0x05];
    let file = elf((WRITABLE + 0x10, 8), &code);
    let image = convert(&file, &OPTIONS).unwrap();
    let found: Vec<_> = scan(&image, &Symbols::of_elf(&file))
        .into_iter()
        .map(|finding| (finding.offset - CODE, finding.text))
        .collect();
    let expected = [(5, "cpuid"), (9, "int 80h"), (11, "out dx,al"), (12, "syscall")];
    assert_eq!(found, expected.map(|(at, text)| (at, text.to_owned())));
}

#[test]
fn an_address_in_a_function_has_its_name_and_one_outside_has_none() {
    let symbols = Symbols::of_elf(&good());
    assert_eq!(symbols.name(CODE), "sgx_entry");
    assert_eq!(symbols.name(CODE + 5), "sgx_entry+0x5");
    assert_eq!(symbols.name(CODE + 16), "offset 0x1010");
}

#[test]
fn relocations_that_no_enclave_can_do_are_refused() {
    let of = |relocation| convert(&elf(relocation, NOP), &OPTIONS);
    assert_eq!(of((CODE, 8)), Err(ConvertError::Relocation { address: CODE }));
    assert_eq!(
        of((WRITABLE + 0x10, 6)),
        Err(ConvertError::Relocation { address: WRITABLE + 0x10 })
    );
    assert!(of((WRITABLE + 0x40, 8)).is_err(), "beyond the segment");
    assert!(of((u64::MAX, 8)).is_err(), "beyond all addresses");
}

#[test]
fn options_beyond_an_enclave_are_refused() {
    for options in [
        Options { heap_bytes: 1, ..OPTIONS },
        Options { heap_bytes: u64::MAX - 0xfff, ..OPTIONS },
        Options { stack_bytes: 1 << 50, ..OPTIONS },
        Options { threads: 0, ..OPTIONS },
        Options { threads: u32::MAX, ..OPTIONS },
        Options { ssa_frame_pages: u32::MAX, ..OPTIONS },
    ] {
        assert!(convert(&good(), &options).is_err(), "{options:?}");
    }
}

#[test]
fn the_dump_names_each_run_of_pages_and_each_thread() {
    let text = Dump(&convert(&good(), &OPTIONS).unwrap()).to_string();
    assert_eq!(text.matches("TCS").count(), 2, "{text}");
    assert!(text.contains("r-x   measured"), "{text}");
    assert!(text.contains("entry 0x1000"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_damage_to_an_elf_panics_the_converter(
        damage in proptest::collection::vec((0_usize..4096, any::<u8>()), 1..6),
        wide in proptest::option::of((0_usize..512, any::<u64>())),
        cut in 0_usize..8192,
    ) {
        let mut file = good();
        for (at, byte) in damage {
            let at = at % file.len();
            file[at] = byte;
        }
        if let Some((at, word)) = wide {
            let at = at * 8 % (file.len() - 8);
            file[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        file.truncate(cut);
        let symbols = Symbols::of_elf(&file);
        if let Ok(image) = convert(&file, &OPTIONS) {
            let _ = (scan(&image, &symbols), Dump(&image).to_string(), symbols.name(CODE));
            prop_assert_eq!(Image::parse(&image.to_sgxs()), Ok(image));
        }
    }

    #[test]
    fn no_damage_to_an_sgxs_file_panics_its_reader_and_what_it_takes_is_what_it_writes(
        damage in proptest::collection::vec((0_usize..40_000, any::<u8>()), 0..4),
        cut in 0_usize..80_000,
    ) {
        let mut file = convert(&good(), &OPTIONS).unwrap().to_sgxs();
        for (at, byte) in damage {
            let at = at % file.len();
            file[at] = byte;
        }
        file.truncate(cut);
        if let Ok(image) = Image::parse(&file) {
            prop_assert!(image.pages().iter().all(|page| page.offset() + PAGE as u64 <= image.size()));
            prop_assert_eq!(image.to_sgxs(), file);
        }
    }
}
