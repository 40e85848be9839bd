//! A scan for instructions that do not belong into an enclave.
//!
//! Code is decoded from the start of each function that has a name, else from the start of each
//! stretch of executable pages, so that bytes inside of immediates are not taken for instructions.
//! It finds what a compiler or an assembler put there, not what is hidden: code that is jumped into
//! in the middle of an instruction is not seen. The CPU (or strict mode of the emulator) decides.
//!
//! Follows: Intel SDM volume 3D, "Illegal instructions inside an enclave".

use core::fmt;

use iced_x86::{
    Code, Decoder, DecoderOptions, Formatter as _, Instruction, Mnemonic, NasmFormatter,
};

use crate::{
    Symbols,
    image::{EXECUTE, Image, PAGE},
};

/// An instruction that an enclave must not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Offset in the enclave, bytes.
    pub offset: u64,
    /// The instruction as text.
    pub text: String,
    /// Why not.
    pub why: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}: {}: {}", self.offset, self.text, self.why)
    }
}

/// Every instruction of `image` that the CPU refuses inside an enclave, by offset.
#[must_use]
pub fn scan(image: &Image, symbols: &Symbols) -> Vec<Finding> {
    let mut found = Vec::new();
    let code = |flags: u64| flags & EXECUTE != 0;
    let mut pages = image.pages().iter().filter(|page| code(page.flags())).peekable();
    while let Some(first) = pages.next() {
        let start = first.offset();
        let mut end = start + PAGE as u64;
        while pages.next_if(|next| next.offset() == end).is_some() {
            end += PAGE as u64;
        }
        let inside = |at: &u64| (start..end).contains(at);
        let mut starts: Vec<u64> = symbols.functions().iter().copied().filter(inside).collect();
        starts.insert(0, start);
        for (index, from) in starts.iter().enumerate() {
            let to = starts.get(index + 1).copied().unwrap_or(end);
            // A stretch of pages of an image, which fits into memory.
            let bytes = image.read(*from, (to - from) as usize);
            scan_code(*from, &bytes, &mut found);
        }
    }
    found
}

fn scan_code(offset: u64, bytes: &[u8], found: &mut Vec<Finding>) {
    let mut decoder = Decoder::with_ip(64, bytes, offset, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut formatter = NasmFormatter::new();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if let Some(why) = refused(&instruction) {
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            found.push(Finding { offset: instruction.ip(), text, why });
        }
    }
}

/// Why an enclave must not have this instruction.
fn refused(instruction: &Instruction) -> Option<&'static str> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Cpuid => Some("asks the CPU what it is, which only the host can answer"),
        M::Syscall | M::Sysenter => Some("a system call, which cannot be made from an enclave"),
        M::Int | M::Into => Some("a software interrupt, which cannot be made from an enclave"),
        M::In | M::Insb | M::Insw | M::Insd | M::Out | M::Outsb | M::Outsw | M::Outsd => {
            Some("input or output by port")
        }
        M::Iret
        | M::Iretd
        | M::Iretq
        | M::Retf
        | M::Sysret
        | M::Sysretq
        | M::Sysexit
        | M::Sysexitq => Some("a return to another segment or privilege"),
        M::Lfs | M::Lgs | M::Lss => Some("loads a segment"),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => Some("reads a table of the system"),
        M::Rdpmc | M::Getsec | M::Vmcall | M::Vmfunc => Some("not available inside an enclave"),
        M::Hlt
        | M::Encls
        | M::Wrmsr
        | M::Rdmsr
        | M::Cli
        | M::Sti
        | M::Invd
        | M::Wbinvd
        | M::Lgdt
        | M::Lidt
        | M::Lldt
        | M::Ltr
        | M::Clts
        | M::Invlpg
        | M::Lmsw => Some("needs the kernel's privilege"),
        _ if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() => {
            Some("a jump to another segment")
        }
        _ => match instruction.code() {
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
                Some("loads a segment")
            }
            Code::Popw_FS | Code::Popq_FS | Code::Popw_GS | Code::Popq_GS => {
                Some("loads a segment")
            }
            _ => None,
        },
    }
}
