//! EENTER and where EEXIT comes back to: the few instructions between the host's registers and the
//! enclave's.
//!
//! The contract is that of the kernel's own entry for user space: an enclave may change every
//! register but RBP, and leaves to the address that it was given in RCX.

use core::arch::global_asm;

/// The registers that carry values in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// First.
    pub rdi: u64,
    /// Second.
    pub rsi: u64,
    /// Third.
    pub rdx: u64,
    /// Fourth.
    pub r8: u64,
    /// Fifth.
    pub r9: u64,
    /// Sixth; inwards alone.
    pub r10: u64,
}

/// What the instructions below work with; they know it by offset.
#[repr(C)]
pub struct Frame {
    /// In: as the host gives them. Out: as the enclave leaves them.
    pub registers: Registers,
    /// Address of the thread control structure.
    pub tcs: u64,
    /// Address of the first instruction.
    pub entry: u64,
    /// GS base inside.
    pub gs: u64,
    host_rsp: u64,
    host_gs: u64,
    /// 1 from the first instruction inside to the first one outside.
    pub inside: u64,
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Frame, tcs) == 48 && offset_of!(Frame, entry) == 56);
    assert!(offset_of!(Frame, gs) == 64 && offset_of!(Frame, host_rsp) == 72);
    assert!(offset_of!(Frame, host_gs) == 80 && offset_of!(Frame, inside) == 88);
};

impl Frame {
    /// A frame for one entry.
    pub fn new(registers: Registers, tcs: u64, entry: u64, gs: u64) -> Self {
        Self { registers, tcs, entry, gs, host_rsp: 0, host_gs: 0, inside: 0 }
    }
}

unsafe extern "C" {
    /// Enters; returns after EEXIT or after [`crate::trap`] has sent the thread to
    /// `postern_sgx_emu_aex`.
    pub fn postern_sgx_emu_enter(frame: *mut Frame);
    /// Where EEXIT must go to.
    pub fn postern_sgx_emu_exit();
    /// Where an asynchronous exit goes to, with RBP the frame.
    pub fn postern_sgx_emu_aex();
}

global_asm!(
    ".pushsection .text",
    ".balign 16",
    ".global postern_sgx_emu_enter",
    ".hidden postern_sgx_emu_enter",
    ".type postern_sgx_emu_enter,@function",
    "postern_sgx_emu_enter:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "stmxcsr dword ptr [rsp]",
    "fnstcw word ptr [rsp + 4]",
    "mov rbp, rdi",
    "mov [rbp + 72], rsp",
    "rdgsbase rax",
    "mov [rbp + 80], rax",
    "mov rax, [rbp + 64]",
    "wrgsbase rax",
    "mov rdi, [rbp]",
    "mov rsi, [rbp + 8]",
    "mov rdx, [rbp + 16]",
    "mov r8, [rbp + 24]",
    "mov r9, [rbp + 32]",
    "mov r10, [rbp + 40]",
    "mov rbx, [rbp + 48]",
    "mov r11, [rbp + 56]",
    "lea rcx, [rip + postern_sgx_emu_exit]",
    "xor eax, eax", // CSSA: entries above the first save area are refused before.
    "mov qword ptr [rbp + 88], 1",
    "jmp r11",
    ".global postern_sgx_emu_exit",
    ".hidden postern_sgx_emu_exit",
    "postern_sgx_emu_exit:",
    "mov [rbp], rdi",
    "mov [rbp + 8], rsi",
    "mov [rbp + 16], rdx",
    "mov [rbp + 24], r8",
    "mov [rbp + 32], r9",
    ".global postern_sgx_emu_aex",
    ".hidden postern_sgx_emu_aex",
    "postern_sgx_emu_aex:",
    "mov qword ptr [rbp + 88], 0",
    "mov rax, [rbp + 80]",
    "wrgsbase rax",
    "mov rsp, [rbp + 72]",
    "cld",
    "ldmxcsr dword ptr [rsp]",
    "fldcw word ptr [rsp + 4]",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    ".size postern_sgx_emu_enter, . - postern_sgx_emu_enter",
    ".popsection",
);
