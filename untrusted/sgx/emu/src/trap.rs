//! Signals: EEXIT, EREPORT and EGETKEY where they trap, and faults of the enclave.
//!
//! The handler runs on an alternate stack, in the thread that raised the signal, and decides by the
//! frame of that thread whether an enclave is inside. It allocates nothing and takes no lock.
//! A fault of the host's own code goes on to what was there before.

use core::{cell::Cell, ffi::c_int, fmt, ptr};
use std::{
    io,
    sync::{Once, OnceLock},
};

use crate::{
    enclave::Inner,
    enter::{Frame, postern_sgx_emu_aex, postern_sgx_emu_exit},
    keys::{REPORT_BYTES, REQUEST_BYTES},
    strict,
};

/// What an enclave did that ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// It read, wrote or ran memory that it may not.
    Memory {
        /// The address it reached for; 0 where the CPU does not say.
        address: u64,
    },
    /// An instruction that does not exist inside an enclave, or none at all.
    Instruction,
    /// CPUID, which does not exist inside an enclave.
    Cpuid,
    /// A system call of this number, which cannot be made from inside an enclave.
    SystemCall {
        /// Number of the call.
        number: i64,
    },
    /// An ENCLU function that is not emulated (dynamic memory), or one with wrong operands.
    Enclu {
        /// EAX.
        function: u64,
    },
    /// An exception of arithmetic, or a breakpoint.
    Exception {
        /// The signal it became.
        signal: i32,
    },
}

/// How an enclave ended by a fault, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub kind: FaultKind,
    /// Address of the instruction.
    pub instruction: u64,
    /// First address of the enclave.
    pub base: u64,
    /// Bytes of the enclave's range.
    pub size: u64,
}

impl Fault {
    /// A fault of the instruction at this address, in an enclave of this range. For backends that
    /// are not the emulator.
    #[must_use]
    pub const fn new(kind: FaultKind, instruction: u64, base: u64, size: u64) -> Self {
        Self { kind, instruction, base, size }
    }

    /// Offset of the instruction in the enclave; `None` if it lies outside.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.instruction.checked_sub(self.base).filter(|offset| *offset < self.size)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FaultKind::Memory { address } => {
                let offset = address.wrapping_sub(self.base);
                write!(f, "the enclave reached for memory that it may not: {address:#x}")?;
                if offset < self.size {
                    write!(f, " (offset {offset:#x} of the enclave)")?;
                }
                Ok(())
            }
            FaultKind::Instruction => f.write_str("the enclave ran an invalid instruction"),
            FaultKind::Cpuid => f.write_str("the enclave ran CPUID, which no enclave can"),
            FaultKind::SystemCall { number } => {
                write!(f, "the enclave made system call {number}, which no enclave can")
            }
            FaultKind::Enclu { function } => {
                write!(f, "the enclave ran ENCLU function {function} that is not emulated or wrong")
            }
            FaultKind::Exception { signal } => {
                write!(f, "the enclave raised an exception (signal {signal})")
            }
        }
    }
}

impl core::error::Error for Fault {}

/// What a thread that is inside leaves for the handler.
pub struct Guest<'a> {
    /// The registers and where to come back to.
    pub frame: *mut Frame,
    /// The enclave.
    pub inner: &'a Inner,
    /// First address of the frame of the save area that an exit would use.
    pub save: u64,
    /// Set by the handler.
    pub fault: Option<Fault>,
}

thread_local! {
    static GUEST: Cell<*mut Guest<'static>> = const { Cell::new(ptr::null_mut()) };
    static STACK: AlternateStack = AlternateStack::install();
}

/// Makes `guest` the one of this thread while `inside` runs.
pub fn with_guest(guest: &mut Guest<'_>, inside: impl FnOnce()) {
    STACK.with(|_| ());
    let guest: *mut Guest<'_> = guest;
    let before = GUEST.replace(guest.cast());
    inside();
    GUEST.set(before);
}

/// Bytes of the alternate stack: the frame of a CPU with AMX has 11 KiB.
const STACK_BYTES: usize = 128 << 10;

/// The alternate stack of a thread.
struct AlternateStack {
    memory: *mut libc::c_void,
}

impl AlternateStack {
    fn install() -> Self {
        // SAFETY: a fresh mapping; if there is none, the kernel refuses the stack below and faults
        // end the process, as they would have.
        let memory = unsafe {
            let (rights, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(ptr::null_mut(), STACK_BYTES, rights, flags, -1, 0)
        };
        let stack = libc::stack_t { ss_sp: memory, ss_flags: 0, ss_size: STACK_BYTES };
        // SAFETY: the memory is this thread's alone until the thread has gone back to no stack.
        unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) };
        Self { memory }
    }
}

impl Drop for AlternateStack {
    fn drop(&mut self) {
        let none = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: no handler runs on it here, and after the first call none will.
        unsafe {
            libc::sigaltstack(&raw const none, ptr::null_mut());
            libc::munmap(self.memory, STACK_BYTES);
        }
    }
}

const SIGNALS: [c_int; 6] =
    [libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// What was there before, by place in [`SIGNALS`].
static BEFORE: OnceLock<[libc::sigaction; 6]> = OnceLock::new();

/// Takes the signals, once for the process.
pub fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid sigaction: the default with an empty mask.
        let mut before: [libc::sigaction; 6] = unsafe { core::mem::zeroed() };
        for (signal, old) in SIGNALS.into_iter().zip(&mut before) {
            // SAFETY: reads the present action into memory of ours.
            unsafe { libc::sigaction(signal, ptr::null(), old) };
        }
        let _ = BEFORE.set(before);
        for signal in SIGNALS {
            // SAFETY: as above.
            let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: the handler follows the rules for one, and has the form that SA_SIGINFO asks.
            if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
                result = Err(io::Error::last_os_error());
            }
        }
    });
    result
}

const ENCLU: [u8; 3] = [0x0f, 0x01, 0xd7];
const CPUID: [u8; 2] = [0x0f, 0xa2];
const CARRY_TO_OVERFLOW: i64 = 0x8d5;
const ZERO: i64 = 0x40;
/// Trap, direction and alignment check: what the host does not want back from an enclave.
const UNWANTED: i64 = 0x100 | 0x400 | 0x4_0000;

fn reg(context: &mut libc::ucontext_t, register: c_int) -> &mut i64 {
    // The constants of libc are indices into this array.
    &mut context.uc_mcontext.gregs[register as usize]
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY:
    // 1. The kernel hands a handler with SA_SIGINFO valid pointers to both, nobody else's until it
    //    returns.
    // 2. A set guest lives until `with_guest` of this same thread goes on, which is below us.
    let (info, context, guest) =
        unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>(), GUEST.get().as_mut()) };
    let is_inside = |guest: &Guest<'_>| {
        // SAFETY: the frame lives as long as the guest, and the thread that uses it stands here.
        unsafe { (*guest.frame).inside == 1 }
    };
    if let Some(guest) = guest.filter(|guest| is_inside(guest)) {
        from_inside(signal, info, context, guest);
    } else if signal == libc::SIGSEGV && code_at(*reg(context, libc::REG_RIP) as u64) == CPUID {
        cpuid_for_host(context);
    } else {
        before_us(signal);
    }
}

/// The `N` bytes of code at `address`, which has just been run.
fn code_at<const N: usize>(address: u64) -> [u8; N] {
    let (mut bytes, here) = ([0_u8; N], address as *mut libc::c_void);
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: N };
    let remote = libc::iovec { iov_base: here, iov_len: N };
    // SAFETY: the kernel copies, so that any address will do; `local` is `bytes`.
    unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    bytes
}

fn from_inside(
    signal: c_int,
    info: &libc::siginfo_t,
    context: &mut libc::ucontext_t,
    guest: &mut Guest<'_>,
) {
    let mut at = *reg(context, libc::REG_RIP) as u64;
    if signal == libc::SIGILL && guest.inner.range.contains(at, 3) && code_at(at) == ENCLU {
        if enclu(context, guest).is_some() {
            return;
        }
        let function = *reg(context, libc::REG_RAX) as u64;
        return leave(FaultKind::Enclu { function }, at, context, guest);
    }
    let kind = match signal {
        libc::SIGSYS => {
            let number = *reg(context, libc::REG_RAX);
            at = at.wrapping_sub(2);
            // The kernel's place for the number is `si_syscall`; RAX still holds it.
            FaultKind::SystemCall { number }
        }
        libc::SIGSEGV if code_at(at) == CPUID => FaultKind::Cpuid,
        libc::SIGSEGV | libc::SIGBUS => {
            // SAFETY: these two signals carry an address.
            FaultKind::Memory { address: unsafe { info.si_addr() } as u64 }
        }
        libc::SIGILL => FaultKind::Instruction,
        signal => FaultKind::Exception { signal },
    };
    leave(kind, at, context, guest);
}

/// An asynchronous exit: the registers go into the save area, the thread back to the host.
fn leave(kind: FaultKind, at: u64, context: &mut libc::ucontext_t, guest: &mut Guest<'_>) {
    use libc::{
        REG_EFL, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX,
        REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP,
    };
    const ORDER: [c_int; 18] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
        REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_EFL, REG_RIP,
    ];
    for (index, register) in ORDER.into_iter().enumerate() {
        let value = reg(context, register).to_le_bytes();
        // A save area that cannot be written takes the registers with it, as on a CPU.
        guest.inner.write(guest.save + 8 * index as u64, &value);
    }
    let range = &guest.inner.range;
    let (base, size) = (range.base() as u64, range.size() as u64);
    guest.fault = Some(Fault { kind, instruction: at, base, size });
    *reg(context, libc::REG_RIP) = postern_sgx_emu_aex as *const () as i64;
    *reg(context, libc::REG_RBP) = guest.frame as i64;
    *reg(context, libc::REG_EFL) &= !UNWANTED;
}

/// Does what ENCLU asks for; `None` if that is a fault.
fn enclu(context: &mut libc::ucontext_t, guest: &Guest<'_>) -> Option<()> {
    let inner = guest.inner;
    let [function, rbx, rcx, rdx] = [libc::REG_RAX, libc::REG_RBX, libc::REG_RCX, libc::REG_RDX]
        .map(|register| *reg(context, register) as u64);
    match function {
        0 => {
            let target = inner.read::<REQUEST_BYTES>(rbx, 512)?;
            let data = inner.read::<64>(rcx, 128)?;
            if !rdx.is_multiple_of(512) || !inner.range.contains(rdx, REPORT_BYTES) {
                return None;
            }
            inner.write(rdx, &inner.secs.report(&inner.root, &target, &data)).then_some(())?;
        }
        1 => {
            let request = inner.read::<REQUEST_BYTES>(rbx, 512)?;
            if !rcx.is_multiple_of(16) || !inner.range.contains(rcx, 16) {
                return None;
            }
            let answer = inner.secs.key(&inner.root, &request)?;
            *reg(context, libc::REG_EFL) &= !CARRY_TO_OVERFLOW;
            match answer {
                Ok(key) => {
                    inner.write(rcx, &key).then_some(())?;
                    *reg(context, libc::REG_RAX) = 0;
                }
                Err(error) => {
                    *reg(context, libc::REG_RAX) = error as i64;
                    *reg(context, libc::REG_EFL) |= ZERO;
                }
            }
        }
        4 => {
            // Anywhere else the host would not get its registers back.
            if rbx != postern_sgx_emu_exit as *const () as u64 {
                return None;
            }
            *reg(context, libc::REG_RIP) = rbx as i64;
            *reg(context, libc::REG_RBP) = guest.frame as i64;
            *reg(context, libc::REG_EFL) &= !UNWANTED;
            return Some(());
        }
        _ => return None,
    }
    *reg(context, libc::REG_RIP) += ENCLU.len() as i64;
    Some(())
}

/// CPUID of the host's code on a thread where it raises a fault for the enclave's sake.
fn cpuid_for_host(context: &mut libc::ucontext_t) {
    let leaf = *reg(context, libc::REG_RAX) as u32;
    let sub = *reg(context, libc::REG_RCX) as u32;
    strict::let_cpuid_fault(false);
    let answer = std::arch::x86_64::__cpuid_count(leaf, sub);
    strict::let_cpuid_fault(true);
    *reg(context, libc::REG_RAX) = i64::from(answer.eax);
    *reg(context, libc::REG_RBX) = i64::from(answer.ebx);
    *reg(context, libc::REG_RCX) = i64::from(answer.ecx);
    *reg(context, libc::REG_RDX) = i64::from(answer.edx);
    *reg(context, libc::REG_RIP) += CPUID.len() as i64;
}

/// The fault is the host's: puts back what was there and returns to the same instruction.
fn before_us(signal: c_int) {
    let place = SIGNALS.iter().position(|known| *known == signal);
    if let (Some(place), Some(before)) = (place, BEFORE.get()) {
        // SAFETY: an action that this process had before.
        unsafe { libc::sigaction(signal, &raw const before[place], ptr::null_mut()) };
    }
}
