//! What a patched system call instruction jumps to.
//!
//! Decides by the number and the descriptor table in a few instructions; only what may be ours
//! goes on to Rust, with every register but rax, rcx and r11 kept, as the kernel keeps them. The
//! call itself, when it is the kernel's, is made here and not in Rust: a thread that is cancelled
//! in it unwinds straight into the C library (the directives below describe the way).
//!
//! Holds: uses no memory below the caller's red zone but its own, no thread-local storage until it
//! asks, and changes nothing that a vfork or CLONE_VM child shares with its parent.
#![allow(unsafe_code)]

use core::{
    arch::global_asm,
    ffi::c_long,
    sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering},
};

use postern_sim::{
    files::{self, table::SLOTS},
    inside, sys,
};

use super::{Arguments, NUMBERS, answer_call, class, class_of};

/// The class of each number; filled by [`prepare`], read by the assembly.
#[unsafe(no_mangle)]
static POSTERN_CLASSES: [AtomicU8; NUMBERS] = [const { AtomicU8::new(0) }; NUMBERS];
/// The descriptor table's words.
#[unsafe(no_mangle)]
static POSTERN_WORDS: AtomicPtr<AtomicUsize> = AtomicPtr::new(core::ptr::null_mut());
/// Whether the processor has XSAVEC.
#[unsafe(no_mangle)]
static POSTERN_XSAVEC: AtomicU8 = AtomicU8::new(0);

/// Room for FXSAVE, or XSAVEC of x87, SSE, AVX and AVX-512 state (compact form: 2432 bytes).
const ROOM: usize = 2560;
/// x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM.
const STATES: u32 = 0xe7;

global_asm!(
    ".pushsection .text.postern_catch,\"ax\",@progbits",
    ".p2align 4",
    ".globl postern_catch",
    ".hidden postern_catch",
    ".hidden POSTERN_CLASSES",
    ".hidden POSTERN_WORDS",
    ".hidden POSTERN_XSAVEC",
    ".type postern_catch,@function",
    // Stack: where to go on; the instruction behind the caller's system call; its red zone.
    // rax: the number. rcx, r11: free.
    "postern_catch:",
    ".cfi_startproc",
    ".cfi_def_cfa rsp, 144",
    ".cfi_offset rip, -136",
    "mov ecx, eax",
    "lea r11, [rip + POSTERN_CLASSES]",
    "movzx r11d, byte ptr [r11 + rcx]",
    "test r11d, {descriptor}",
    "jz 4f",
    "cmp edi, {slots}",
    "jae 2f",
    "mov rcx, qword ptr [rip + POSTERN_WORDS]",
    "push rdi",
    ".cfi_adjust_cfa_offset 8",
    "mov edi, edi",
    "cmp qword ptr [rcx + rdi * 8], 0",
    "pop rdi",
    ".cfi_adjust_cfa_offset -8",
    "jne 4f",
    // The kernel's.
    "2:",
    "test r11d, {pass}",
    "jnz 3f",
    "syscall",
    "jmp 9f",
    "3:",
    "push r9",
    ".cfi_adjust_cfa_offset 8",
    "push r11",
    ".cfi_adjust_cfa_offset 8",
    "movabs r9, {magic}",
    "syscall",
    "pop r11",
    ".cfi_adjust_cfa_offset -8",
    "pop r9",
    ".cfi_adjust_cfa_offset -8",
    "test r11d, {opens}",
    "jz 9f",
    "cmp rax, {slots}",
    "jae 9f",
    "mov rcx, qword ptr [rip + POSTERN_WORDS]",
    "cmp qword ptr [rcx + rax * 8], 0",
    "je 9f",
    // A descriptor that the table still has an entry for: rsi tells the two questions apart.
    "mov r11d, 1",
    "jmp 5f",
    "4:",
    "xor r11d, r11d",
    "5:",
    "push r9",
    ".cfi_adjust_cfa_offset 8",
    "push r8",
    ".cfi_adjust_cfa_offset 8",
    "push r10",
    ".cfi_adjust_cfa_offset 8",
    "push rdx",
    ".cfi_adjust_cfa_offset 8",
    "push rsi",
    ".cfi_adjust_cfa_offset 8",
    "push rdi",
    ".cfi_adjust_cfa_offset 8",
    "push rax",
    ".cfi_adjust_cfa_offset 8",
    "push rbp",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset rbp, 0",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, {room}",
    "and rsp, -64",
    "cmp byte ptr [rip + POSTERN_XSAVEC], 0",
    "je 6f",
    "xor eax, eax",
    "mov qword ptr [rsp + 512], rax",
    "mov qword ptr [rsp + 520], rax",
    "mov qword ptr [rsp + 528], rax",
    "mov qword ptr [rsp + 536], rax",
    "mov qword ptr [rsp + 544], rax",
    "mov qword ptr [rsp + 552], rax",
    "mov qword ptr [rsp + 560], rax",
    "mov qword ptr [rsp + 568], rax",
    "mov eax, {states}",
    "xor edx, edx",
    "xsavec64 [rsp]",
    "jmp 7f",
    "6:",
    "fxsave64 [rsp]",
    "7:",
    "lea rdi, [rbp + 8]",
    "mov esi, r11d",
    "cld",
    "call {asked}",
    "mov esi, eax",
    "cmp byte ptr [rip + POSTERN_XSAVEC], 0",
    "je 6f",
    "mov eax, {states}",
    "xor edx, edx",
    "xrstor64 [rsp]",
    "jmp 7f",
    "6:",
    "fxrstor64 [rsp]",
    "7:",
    "mov ecx, esi",
    "mov rsp, rbp",
    ".cfi_def_cfa_register rsp",
    "pop rbp",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_restore rbp",
    "pop rax",
    ".cfi_adjust_cfa_offset -8",
    "pop rdi",
    ".cfi_adjust_cfa_offset -8",
    "pop rsi",
    ".cfi_adjust_cfa_offset -8",
    "pop rdx",
    ".cfi_adjust_cfa_offset -8",
    "pop r10",
    ".cfi_adjust_cfa_offset -8",
    "pop r8",
    ".cfi_adjust_cfa_offset -8",
    "pop r9",
    ".cfi_adjust_cfa_offset -8",
    "test ecx, ecx",
    "jnz 9f",
    "mov ecx, eax",
    "lea r11, [rip + POSTERN_CLASSES]",
    "movzx r11d, byte ptr [r11 + rcx]",
    "jmp 2b",
    "9:",
    "pop rcx",
    ".cfi_adjust_cfa_offset -8",
    "lea rsp, [rsp + 136]",
    ".cfi_adjust_cfa_offset -136",
    "jmp rcx",
    ".cfi_endproc",
    ".size postern_catch, .-postern_catch",
    ".popsection",
    descriptor = const class::DESCRIPTOR,
    pass = const class::PASS,
    opens = const class::OPENS,
    slots = const SLOTS,
    magic = const sys::PASS,
    room = const ROOM,
    states = const STATES,
    asked = sym asked,
);

unsafe extern "C" {
    safe static postern_catch: u8;
}

/// Where a stub jumps to.
pub fn address() -> usize {
    core::ptr::from_ref(&postern_catch) as usize
}

/// Fills what the assembly reads. Before the first jump to [`address`].
pub fn prepare() {
    for (number, class) in POSTERN_CLASSES.iter().enumerate() {
        class.store(class_of(number), Ordering::Relaxed);
    }
    POSTERN_WORDS.store(files::words().cast_mut(), Ordering::Relaxed);
    // Leaf 13, subleaf 1, eax bit 1: XSAVEC. A processor without leaf 13 answers zeros or the
    // highest leaf it has, so the operating system's use of XSAVE (leaf 1, ecx bit 27) comes first.
    let features = core::arch::x86_64::__cpuid(1);
    let has = features.ecx & (1 << 27) != 0
        && core::arch::x86_64::__cpuid(0).eax >= 13
        && core::arch::x86_64::__cpuid_count(13, 1).eax & 2 != 0;
    POSTERN_XSAVEC.store(u8::from(has), Ordering::Release);
}

/// Registers as the assembly saved them: the number (then the result), the arguments.
#[repr(C)]
struct Registers {
    number: i64,
    arguments: Arguments,
}

/// Answers 1 with the result in place of the number, or 0: the kernel's. With `opened` the number
/// is a descriptor that the kernel has just given.
///
/// # Safety
/// Called by the assembly only.
unsafe extern "C-unwind" fn asked(registers: *mut Registers, opened: u32) -> u32 {
    inside::enter();
    // SAFETY: the assembly's own stack.
    let registers = unsafe { &mut *registers };
    let handled = if opened != 0 {
        files::is_ordinary(i32::try_from(registers.number).unwrap_or(-1));
        true
    } else {
        let number = c_long::from(registers.number as u32 as i32);
        // SAFETY: the guest's arguments.
        match unsafe { answer_call(number, registers.arguments) } {
            Some(result) => {
                registers.number = result as i64;
                true
            }
            None => false,
        }
    };
    // Nothing is owned from here on: deferred handlers run, and may not come back.
    inside::leave();
    u32::from(handled)
}
