//! Small enclaves of a few instructions each, in both modes of leaving.
//!
//! What must come out follows from the manual's description of the instructions.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Mutex, thread};

use sgx_emu::{
    Config, Enclave, EnterError, Exit, Fault, FaultKind, KeyRoot, LoadError, REPORT_BYTES,
    Registers,
};
use sgx_image::{EXECUTE, Identity, Image, PAGE, READ, REGULAR, SigningKey, Sigstruct, TCS, WRITE};

/// The tests' own signing key, that of the image crate.
const KEY: &str = include_str!("../../image/tests/test-key.pem");

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const READ_ONLY: u64 = 0x3000;
const THREADS: u64 = 0x4000;
const SIZE: u64 = 0x10000;

/// A program: its bytes between two labels, to be copied into an image.
macro_rules! program {
    ($name:ident, $($line:literal),+ $(,)?) => {
        mod $name {
            core::arch::global_asm!(
                ".pushsection .rodata",
                concat!(".global ", "sgx_test_", stringify!($name)),
                concat!("sgx_test_", stringify!($name), ":"),
                $($line,)+
                concat!(".global ", "sgx_test_", stringify!($name), "_end"),
                concat!("sgx_test_", stringify!($name), "_end:"),
                ".popsection",
            );
        }
    };
}

// Each leaves to the address in RCX; the base comes from RIP, since code begins at CODE.
program!(
    sum,
    "lea rdi, [rdi + rsi]",
    "add rdi, rdx",
    "add rdi, r8",
    "add rdi, r9",
    "mov rsi, gs:[0]",
    "mov rdx, rbx",
    "mov rbx, rcx",
    "mov eax, 4",
    "enclu"
);
program!(
    clobber,
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "xor esp, esp",
    "std",
    "mov rbx, rcx",
    "mov eax, 4",
    "enclu"
);
program!(ud2, "nop", "ud2");
program!(divide, "xor ecx, ecx", "xor edx, edx", "mov eax, 1", "div ecx");
program!(store, "mov byte ptr [rdi], 1", "ud2");
program!(load, "mov al, byte ptr [rdi]", "mov rbx, rcx", "mov eax, 4", "enclu");
program!(jump, "jmp rdi");
program!(cpuid, "xor eax, eax", "cpuid");
program!(getpid, "mov rbx, rcx", "mov eax, 39", "syscall", "mov rdi, rax", "mov eax, 4", "enclu");
program!(int80, "mov eax, 20", "int 0x80");
program!(unknown, "mov eax, 5", "enclu");
// EREPORT to DATA + 0x400, of the target at DATA and the data at DATA + 0x200.
program!(
    report,
    "mov r12, rcx",
    "lea rbx, [rip - 7 - 3 + 0x1000]",
    "lea rcx, [rbx + 0x200]",
    "lea rdx, [rbx + 0x400]",
    "xor eax, eax",
    "enclu",
    "mov rdi, rdx",
    "mov rbx, r12",
    "mov eax, 4",
    "enclu"
);
// EGETKEY to DATA + 0x400, of the request at DATA; answers RAX and whether ZF was set.
program!(
    key,
    "mov r12, rcx",
    "lea rbx, [rip - 7 - 3 + 0x1000]",
    "lea rcx, [rbx + 0x400]",
    "mov eax, 1",
    "enclu",
    "setz dil",
    "movzx edi, dil",
    "mov rsi, rax",
    "mov rdx, [rcx]",
    "mov r8, [rcx + 8]",
    "mov rbx, r12",
    "mov eax, 4",
    "enclu"
);

macro_rules! bytes_of {
    ($name:ident) => {{
        unsafe extern "C" {
            #[link_name = concat!("sgx_test_", stringify!($name))]
            static START: u8;
            #[link_name = concat!("sgx_test_", stringify!($name), "_end")]
            static END: u8;
        }
        // SAFETY: both labels are in one read-only section, the second after the first.
        unsafe {
            let (start, end) = (&raw const START, &raw const END);
            core::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}

/// A page that begins with these bytes.
fn page(bytes: &[u8]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..bytes.len()].copy_from_slice(bytes);
    page
}

fn image(code: &[u8], data: &[u8]) -> Image {
    let mut image = Image::new(SIZE, 1).unwrap();
    image.add(CODE, REGULAR | READ | EXECUTE, Some(&page(code))).unwrap();
    image.add(DATA, REGULAR | READ | WRITE, Some(&page(data))).unwrap();
    image.add(READ_ONLY, REGULAR | READ, Some(&page(b"constant"))).unwrap();
    for thread in 0..2 {
        let tcs = THREADS + 0x2000 * thread;
        let mut control = [0; PAGE];
        for (at, value) in
            [(16, tcs + 0x1000), (24, 1 << 32), (32, CODE), (56, DATA), (64, 0xfff_0000_0fff)]
        {
            control[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        image.add(tcs, TCS, Some(&control)).unwrap();
        image.add(tcs + 0x1000, REGULAR | READ | WRITE, None).unwrap();
    }
    image
}

fn load(code: &[u8], config: &Config) -> Enclave {
    Enclave::load(&image(code, b"GS0 word"), None, config).unwrap()
}

fn both_modes(check: impl Fn(&Config)) {
    for exact in [false, true] {
        check(&Config { exact, ..Config::default() });
    }
}

fn left(enclave: &Enclave, registers: Registers) -> Registers {
    match enclave.enter(0, registers).unwrap() {
        Exit::Left(registers) => registers,
        Exit::Fault(fault) => panic!("{fault} at {:?}", fault.offset()),
    }
}

fn fault(enclave: &Enclave, rdi: u64) -> Fault {
    match enclave.enter(0, Registers { rdi, ..Registers::default() }).unwrap() {
        Exit::Fault(fault) => fault,
        Exit::Left(registers) => panic!("left with {registers:?}"),
    }
}

#[test]
fn registers_go_in_and_come_out_and_gs_is_the_threads() {
    both_modes(|config| {
        let enclave = load(bytes_of!(sum), config);
        let given = Registers { rdi: 1, rsi: 20, rdx: 300, r8: 4000, r9: 50_000, r10: 0 };
        let back = left(&enclave, given);
        assert_eq!(back.rdi, 54_321);
        assert_eq!(back.rsi, u64::from_le_bytes(*b"GS0 word"));
        assert_eq!(back.rdx, enclave.base() + THREADS, "RBX is the control structure");
        let counts = enclave.counts();
        assert_eq!((counts.entries, counts.exits.iter().sum::<u64>()), (1, 1));
        assert_eq!(enclave.base() % SIZE, 0, "naturally aligned");
    });
}

#[test]
fn an_enclave_may_leave_with_every_register_changed_but_rbp() {
    both_modes(|config| {
        let enclave = load(bytes_of!(clobber), config);
        for _ in 0..3 {
            left(&enclave, Registers::default());
        }
    });
}

#[test]
fn each_thread_of_an_enclave_can_be_inside_at_once() {
    let enclave = load(bytes_of!(sum), &Config::default());
    thread::scope(|scope| {
        let threads = [0, 1].map(|number| {
            let enclave = &enclave;
            scope.spawn(move || {
                (0..1000_u64).all(|value| {
                    let given = Registers { rdi: value, ..Registers::default() };
                    matches!(enclave.enter(number, given), Ok(Exit::Left(back)) if back.rdi == value)
                })
            })
        });
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    });
    assert_eq!(enclave.counts().entries, 2000);
    assert_eq!(enclave.enter(2, Registers::default()), Err(EnterError::NoThread));
}

#[test]
fn a_fault_names_what_and_where_and_ends_the_thread_alone() {
    both_modes(|config| {
        let enclave = load(bytes_of!(ud2), config);
        let found = fault(&enclave, 0);
        assert_eq!((found.kind, found.offset()), (FaultKind::Instruction, Some(CODE + 1)));
        assert_eq!(enclave.enter(0, Registers::default()), Err(EnterError::Dead));
        assert!(matches!(enclave.enter(1, Registers::default()), Ok(Exit::Fault(_))));
        assert_eq!(enclave.counts().faults, 2);
    });
    let enclave = load(bytes_of!(divide), &Config::default());
    assert_eq!(fault(&enclave, 0).kind, FaultKind::Exception { signal: libc::SIGFPE });
}

#[test]
fn pages_have_the_permissions_of_the_image() {
    let reaches = |code: &[u8], offset: u64| {
        let enclave = load(code, &Config::default());
        let address = enclave.base() + offset;
        match enclave.enter(0, Registers { rdi: address, ..Registers::default() }).unwrap() {
            Exit::Left(_) => true,
            Exit::Fault(fault) => {
                let refused = fault.kind == FaultKind::Memory { address };
                assert!(refused || fault.kind == FaultKind::Instruction, "{fault}");
                !refused
            }
        }
    };
    for (offset, read, write, run) in [
        (CODE, true, false, true),
        (DATA, true, true, false),
        (READ_ONLY, true, false, false),
        (THREADS, false, false, false),
        (THREADS + 0x1000, true, true, false),
        (0, false, false, false),
        (SIZE - 1, false, false, false),
    ] {
        assert_eq!(reaches(bytes_of!(load), offset), read, "read {offset:#x}");
        assert_eq!(reaches(bytes_of!(store), offset), write, "write {offset:#x}");
        if !run {
            assert!(!reaches(bytes_of!(jump), offset), "run {offset:#x}");
        }
    }
}

#[test]
fn an_enclave_that_runs_off_into_nowhere_leaves_the_host_whole() {
    let enclave = load(bytes_of!(jump), &Config::default());
    let found = fault(&enclave, 8);
    assert_eq!((found.kind, found.offset()), (FaultKind::Memory { address: 8 }, None));
}

#[test]
fn functions_that_are_not_emulated_end_the_enclave() {
    let enclave = load(bytes_of!(unknown), &Config::default());
    assert_eq!(fault(&enclave, 0).kind, FaultKind::Enclu { function: 5 });
}

#[test]
fn a_sealing_key_depends_on_the_image_and_on_the_root() {
    let mut request = [0; 512];
    request[..4].copy_from_slice(&[4, 0, 1, 0]); // SEAL, MRENCLAVE
    let key = |extra: u8, root: KeyRoot| {
        let mut data = request.to_vec();
        data.resize(0x800, 0);
        data.push(extra);
        let config = Config { root, ..Config::default() };
        let enclave = Enclave::load(&image(bytes_of!(key), &data), None, &config).unwrap();
        let back = left(&enclave, Registers::default());
        assert_eq!((back.rdi, back.rsi), (0, 0), "ZF and RAX");
        (back.rdx, back.r8)
    };
    let root = KeyRoot::new([9; 16]);
    assert_eq!(key(0, root), key(0, root));
    assert_ne!(key(0, root), key(1, root), "another image");
    assert_ne!(key(0, root), key(0, KeyRoot::default()), "another machine");
    request[0] = 77;
    let enclave =
        Enclave::load(&image(bytes_of!(key), &request), None, &Config::default()).unwrap();
    let back = left(&enclave, Registers::default());
    assert_eq!((back.rdi, back.rsi), (1, 256), "no such key");
}

#[test]
fn a_report_says_what_the_enclave_is() {
    let mut data = vec![0; 0x240];
    data[0x200..].fill(0xab);
    let image = image(bytes_of!(report), &data);
    let enclave = Enclave::load(&image, None, &Config::default()).unwrap();
    let back = left(&enclave, Registers::default());
    assert_eq!(back.rdi, enclave.base() + DATA + 0x400);
    let mut report = [0; REPORT_BYTES];
    // SAFETY: the address was just compared; the enclave is loaded and nobody is inside.
    unsafe {
        core::ptr::copy_nonoverlapping(back.rdi as *const u8, report.as_mut_ptr(), REPORT_BYTES)
    };
    assert_eq!(report[64..96], image.mrenclave());
    assert_eq!(report[320..384], [0xab; 64]);
}

fn signed(image: &Image, debug: bool) -> Sigstruct {
    let identity = Identity { product: 1, version: 1, date: 0x2026_1122, debug };
    Sigstruct::sign(&image.mrenclave(), &identity, &SigningKey::from_pem(KEY).unwrap()).unwrap()
}

#[test]
fn a_changed_image_or_signature_is_not_loaded() {
    let (good, other) = (image(bytes_of!(sum), b"one"), image(bytes_of!(sum), b"two"));
    let signature = signed(&good, false);
    let config = Config::default();
    let enclave = Enclave::load(&good, Some(&signature), &config).unwrap();
    assert_eq!(enclave.secs().mrsigner, signature.mrsigner());
    let refused = Enclave::load(&other, Some(&signature), &config).unwrap_err();
    assert!(matches!(refused, LoadError::Measurement { .. }), "{refused}");
    let mut bytes = *signature.as_bytes();
    bytes[1026] ^= 1; // The security version, which is signed.
    let forged = Sigstruct::from_bytes(&bytes).unwrap();
    let refused = Enclave::load(&good, Some(&forged), &config).unwrap_err();
    assert!(matches!(refused, LoadError::Signature(_)), "{refused}");
}

/// Strict mode is for the whole process and for ever; the other tests do not mind.
#[test]
fn strict_mode_ends_an_enclave_that_makes_system_calls_or_asks_the_cpu() {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap();
    let free = load(bytes_of!(getpid), &Config::default());
    assert_eq!(left(&free, Registers::default()).rdi, u64::from(std::process::id()), "not strict");

    let config = Config { strict: true, ..Config::default() };
    let enclave = load(bytes_of!(getpid), &config);
    let found = fault(&enclave, 0);
    assert_eq!(found.kind, FaultKind::SystemCall { number: 39 });
    assert_eq!(found.offset(), Some(CODE + 8));
    assert_eq!(
        fault(&load(bytes_of!(int80), &config), 0).kind,
        FaultKind::SystemCall { number: 20 }
    );
    assert!(std::fs::metadata("/").is_ok(), "the host makes system calls as before");

    let enclave = load(bytes_of!(cpuid), &config);
    if enclave.cpuid_faults() {
        assert_eq!(fault(&enclave, 0).kind, FaultKind::Cpuid);
        let leaf = std::arch::x86_64::__cpuid(0);
        assert_ne!(leaf.eax, 0, "the host asks the CPU as before");
    } else {
        eprintln!("SKIPPED: CPUID in strict mode: this CPU or its hypervisor cannot make it fault");
    }
}
