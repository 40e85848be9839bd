//! Hardware: the kernel's driver and its way in for user space.
//!
//! Written against the kernel's interface (`asm/sgx.h`): numbers and layouts are checked against it,
//! the way in against a stand-in for the kernel's. No machine with SGX has run it.
//!
//! Holds: only images that are signed are loaded; every page is mapped with its own permissions.

use core::{arch::global_asm, ffi::CStr, fmt, mem::offset_of, ptr};
use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::Path,
    sync::{Mutex, PoisonError},
};

use sgx_emu::{Counters, Counts, EnterError, Exit, Fault, FaultKind, Registers};
use sgx_image::{ATTRIBUTE_MODE64, EXECUTE, Image, PAGE, PERMISSIONS, READ, Sigstruct, WRITE};

use crate::backend::Backend;

/// The kernel's driver.
const DEVICE: &str = "/dev/sgx_enclave";

/// Whether this machine runs enclaves.
#[must_use]
pub fn is_present() -> bool {
    Path::new(DEVICE).exists()
}

/// Why the hardware does not take an enclave.
#[derive(Debug)]
#[non_exhaustive]
pub enum HardwareError {
    /// The driver or a mapping of it refuses; at which step.
    System(&'static str, io::Error),
    /// EINIT refuses with this number.
    Init(i32),
    /// The image measures pages in part, which the driver cannot.
    PartialPage {
        /// Offset in the enclave, bytes.
        offset: u64,
    },
    /// The kernel has no way in for user space.
    NoWayIn,
}

impl fmt::Display for HardwareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System(step, error) => write!(f, "the kernel refuses to {step}: {error}"),
            Self::Init(number) => write!(f, "the CPU refuses the enclave (EINIT: {number})"),
            Self::PartialPage { offset } => {
                write!(f, "page {offset:#x} is measured in part, which the kernel cannot do")
            }
            Self::NoWayIn => f.write_str("the kernel has no __vdso_sgx_enter_enclave"),
        }
    }
}

impl core::error::Error for HardwareError {}

const CREATE: libc::c_ulong = 0x4008_a400;
const ADD_PAGES: libc::c_ulong = 0xc030_a401;
const INIT: libc::c_ulong = 0x4008_a402;
/// Measure the whole page.
const MEASURE: u64 = 1;
const EENTER: u32 = 2;
const EEXIT: u32 = 4;
const XFRM: u64 = 3;

/// `struct sgx_enclave_add_pages`.
#[allow(dead_code, reason = "the kernel reads them")]
#[derive(Default)]
#[repr(C)]
struct AddPages {
    source: u64,
    offset: u64,
    length: u64,
    secinfo: u64,
    flags: u64,
    count: u64,
}

/// `struct sgx_enclave_run`.
#[allow(dead_code, reason = "the kernel reads them")]
#[repr(C)]
struct Run {
    tcs: u64,
    function: u32,
    vector: u16,
    error_code: u16,
    address: u64,
    handler: u64,
    data: u64,
    reserved: [u8; 216],
}

const _: () = {
    assert!(size_of::<AddPages>() == 48 && size_of::<Run>() == 256);
    assert!(offset_of!(Run, handler) == 24 && offset_of!(Run, data) == 32);
};

/// A page, aligned as the driver asks.
#[allow(dead_code, reason = "the kernel reads it")]
#[repr(C, align(4096))]
struct Aligned([u8; PAGE]);

/// SECINFO: flags and zeros, aligned as the CPU asks.
#[allow(dead_code, reason = "the kernel reads it")]
#[repr(C, align(64))]
struct Secinfo([u64; 8]);

/// An enclave that the CPU runs.
#[derive(Debug)]
pub struct Hardware {
    base: usize,
    size: usize,
    tcs: Vec<u64>,
    /// Which threads are inside; `None` for one that faulted.
    inside: Mutex<Vec<Option<bool>>>,
    way_in: usize,
    counters: Counters,
    /// The enclave lives as long as it is open.
    _device: File,
}

impl Hardware {
    /// Loads `image` as `signature` answers for it.
    ///
    /// # Errors
    /// What the kernel or the CPU refuses.
    pub fn load(image: &Image, signature: &Sigstruct) -> Result<Self, HardwareError> {
        let way_in = vdso(c"__vdso_sgx_enter_enclave").ok_or(HardwareError::NoWayIn)?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(|error| HardwareError::System("open the driver", error))?;
        let size = usize::try_from(image.size())
            .map_err(|_| HardwareError::System("reserve", io::ErrorKind::OutOfMemory.into()))?;
        let base = sgx_emu::reserve(size, libc::MAP_SHARED)
            .map_err(|error| HardwareError::System("reserve", error))?;
        let enclave = Self {
            base,
            size,
            tcs: tcs(image, base as u64),
            inside: Mutex::new(vec![Some(false); tcs(image, 0).len()]),
            way_in,
            counters: Counters::default(),
            _device: device,
        };
        enclave.create(image, signature)?;
        enclave.add(image)?;
        let source = ptr::from_ref(signature.as_bytes()) as u64;
        match enclave.call(INIT, &mut [source]) {
            Ok(0) => {}
            Ok(number) => return Err(HardwareError::Init(number)),
            Err(error) => return Err(HardwareError::System("start the enclave", error)),
        }
        enclave.map(image).map_err(|error| HardwareError::System("map the enclave", error))?;
        Ok(enclave)
    }

    /// ECREATE.
    fn create(&self, image: &Image, signature: &Sigstruct) -> Result<(), HardwareError> {
        let mut secs = Aligned([0; PAGE]);
        let (flags, xfrm) = signature.attributes();
        let debug = flags & sgx_image::ATTRIBUTE_DEBUG;
        for (at, value) in [
            (0, image.size()),
            (8, self.base as u64),
            (16, u64::from(image.ssa_frame_pages())),
            (48, ATTRIBUTE_MODE64 | debug),
            (56, xfrm | XFRM),
        ] {
            secs.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let done = self.call(CREATE, &mut [ptr::from_ref(&secs) as u64]);
        done.map(|_| ()).map_err(|error| HardwareError::System("create the enclave", error))
    }

    /// EADD and EEXTEND of each page.
    fn add(&self, image: &Image) -> Result<(), HardwareError> {
        let mut page = Box::new(Aligned([0; PAGE]));
        for added in image.pages() {
            let offset = added.offset();
            let measure = match added.measured() {
                u16::MAX => MEASURE,
                0 => 0,
                _ => return Err(HardwareError::PartialPage { offset }),
            };
            page.0 = added.data().copied().unwrap_or([0; PAGE]);
            let secinfo = Secinfo([added.flags(), 0, 0, 0, 0, 0, 0, 0]);
            let mut request = AddPages {
                source: ptr::from_ref(&*page) as u64,
                offset,
                length: PAGE as u64,
                secinfo: ptr::from_ref(&secinfo) as u64,
                flags: measure,
                count: 0,
            };
            while request.count < request.length {
                match self.call(ADD_PAGES, &mut request) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(HardwareError::System("add a page", error)),
                }
            }
        }
        Ok(())
    }

    /// Maps each run of pages with its permissions; control structures as the CPU writes them.
    fn map(&self, image: &Image) -> io::Result<()> {
        for page in image.pages() {
            let flags = if page.is_tcs() { READ | WRITE } else { page.flags() & PERMISSIONS };
            let rights =
                [(READ, libc::PROT_READ), (WRITE, libc::PROT_WRITE), (EXECUTE, libc::PROT_EXEC)]
                    .into_iter()
                    .filter(|(flag, _)| flags & flag != 0)
                    .fold(libc::PROT_NONE, |rights, (_, right)| rights | right);
            let at = (self.base + page.offset() as usize) as *mut libc::c_void;
            // SAFETY: the address lies in the range that this value reserved, and nobody uses it
            // before the enclave is entered.
            let mapped = unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                libc::mmap(at, PAGE, rights, flags, self._device.as_raw_fd(), 0)
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    fn call<T: ?Sized>(&self, number: libc::c_ulong, argument: &mut T) -> io::Result<i32> {
        // SAFETY: each number is called with the structure that the kernel's header names for it,
        // which the kernel reads and writes only until it returns.
        let done = unsafe {
            libc::ioctl(self._device.as_raw_fd(), number, ptr::from_mut(argument).cast::<u8>())
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and entering borrows the value.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.size) };
    }
}

fn tcs(image: &Image, base: u64) -> Vec<u64> {
    let control = image.pages().iter().filter(|page| page.is_tcs());
    control.map(|page| base + page.offset()).collect()
}

/// The address of a function of the kernel's own library.
fn vdso(name: &CStr) -> Option<usize> {
    let flags = libc::RTLD_LAZY | libc::RTLD_LOCAL | libc::RTLD_NOLOAD;
    // SAFETY: both strings end with NUL; the library is there already and is never unloaded.
    let address = unsafe {
        let library = libc::dlopen(c"linux-vdso.so.1".as_ptr(), flags);
        if library.is_null() { library } else { libc::dlsym(library, name.as_ptr()) }
    };
    (!address.is_null()).then_some(address as usize)
}

unsafe extern "C" {
    /// Calls `way_in` (the kernel's) with these registers; answers what it does.
    fn postern_sgx_hw_enter(way_in: usize, registers: *const Registers, run: *mut Run) -> i32;
}

global_asm!(
    ".pushsection .text",
    ".balign 16",
    ".global postern_sgx_hw_enter",
    ".hidden postern_sgx_hw_enter",
    ".type postern_sgx_hw_enter,@function",
    "postern_sgx_hw_enter:",
    "push rbp",
    "mov rbp, rsp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 16", // Floating-point control words, and alignment.
    "stmxcsr dword ptr [rbp - 48]",
    "fnstcw word ptr [rbp - 44]",
    "push rdx", // The seventh argument.
    "mov rax, rdi",
    "mov r11, rsi",
    "mov rdi, [r11]",
    "mov rsi, [r11 + 8]",
    "mov rdx, [r11 + 16]",
    "mov r8, [r11 + 24]",
    "mov r9, [r11 + 32]",
    "mov r10, [r11 + 40]",
    "mov ecx, 2", // EENTER.
    "call rax",
    "cld",
    "ldmxcsr dword ptr [rbp - 48]",
    "fldcw word ptr [rbp - 44]",
    "lea rsp, [rbp - 40]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    ".size postern_sgx_hw_enter, . - postern_sgx_hw_enter",
    ".popsection",
);

/// The kernel calls this when the enclave leaves: takes the registers.
extern "C" fn on_exit(
    rdi: u64,
    rsi: u64,
    rdx: u64,
    _rsp: u64,
    r8: u64,
    r9: u64,
    run: *mut Run,
) -> i32 {
    // SAFETY: the kernel hands back what it was given, which `enter` keeps alive and looks at only
    // afterwards; `data` is the address of its registers.
    unsafe {
        if (*run).function == EEXIT {
            let registers = (*run).data as *mut Registers;
            *registers = Registers { rdi, rsi, rdx, r8, r9, r10: 0 };
            0
        } else {
            -libc::EFAULT
        }
    }
}

/// Enters, and says what the kernel says.
fn enter(way_in: usize, tcs: u64, registers: &mut Registers) -> (i32, Run) {
    let given = *registers;
    let mut run = Run {
        tcs,
        function: EENTER,
        vector: 0,
        error_code: 0,
        address: 0,
        handler: on_exit as *const () as u64,
        data: ptr::from_mut(registers) as u64,
        reserved: [0; 216],
    };
    // SAFETY:
    // 1. `way_in` has the prototype of the kernel's function; everything given lives on.
    // 2. What the enclave's code does to this process it does by the rules of a CPU: it can write
    //    the host's memory, and is trusted not to.
    let answer = unsafe { postern_sgx_hw_enter(way_in, &raw const given, &raw mut run) };
    (answer, run)
}

impl Backend for Hardware {
    fn name(&self) -> &'static str {
        "hardware"
    }

    fn base(&self) -> u64 {
        self.base as u64
    }

    fn size(&self) -> u64 {
        self.size as u64
    }

    fn threads(&self) -> Vec<u64> {
        self.tcs.clone()
    }

    fn counts_time(&self) -> bool {
        // RDTSC inside came with SGX2: CPUID leaf 0x12, sub-leaf 0, EAX bit 1.
        core::arch::x86_64::__cpuid_count(0x12, 0).eax & 2 != 0
    }

    fn enter(&self, thread: usize, registers: Registers) -> Result<Exit, EnterError> {
        const PAGE_FAULT: u16 = 14;
        let tcs = *self.tcs.get(thread).ok_or(EnterError::NoThread)?;
        let change = |to| {
            let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
            inside.get_mut(thread).map(|state| core::mem::replace(state, to))
        };
        match change(Some(true)).ok_or(EnterError::NoThread)? {
            Some(false) => {}
            Some(true) => return Err(EnterError::Busy),
            None => {
                change(None);
                return Err(EnterError::Dead);
            }
        }
        self.counters.entered();
        let mut registers = registers;
        let (answer, run) = enter(self.way_in, tcs, &mut registers);
        if answer == 0 {
            change(Some(false));
            let exit = Exit::Left(registers);
            self.counters.left(&exit);
            return Ok(exit);
        }
        change(None);
        let kind = match run.vector {
            PAGE_FAULT => FaultKind::Memory { address: run.address },
            _ => FaultKind::Instruction,
        };
        // Where the enclave was is in its own memory, which the host cannot read.
        let (base, size) = (self.base(), self.size());
        let exit = Exit::Fault(Fault::new(kind, 0, base, size));
        self.counters.left(&exit);
        Ok(exit)
    }

    fn counts(&self) -> Counts {
        self.counters.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands for the kernel's: checks what comes in, and leaves as an enclave would.
    extern "C" fn way_in(
        rdi: u64,
        rsi: u64,
        rdx: u64,
        function: u32,
        r8: u64,
        r9: u64,
        run: *mut Run,
    ) -> i32 {
        assert_eq!((rdi, rsi, rdx, function, r8, r9), (1, 2, 3, EENTER, 4, 5));
        // SAFETY: the caller's, alive until this returns; the handler is what the caller put there.
        unsafe {
            (*run).function = EEXIT;
            assert_eq!((*run).handler, on_exit as *const () as u64);
            on_exit(10, 20, (*run).tcs, 0, 40, 50, run)
        }
    }

    extern "C" fn way_in_that_faults(
        _: u64,
        _: u64,
        _: u64,
        _: u32,
        _: u64,
        _: u64,
        run: *mut Run,
    ) -> i32 {
        // SAFETY: as above.
        unsafe {
            (*run).vector = 14;
            (*run).address = 0x1234;
            on_exit(0, 0, 0, 0, 0, 0, run)
        }
    }

    #[test]
    fn registers_go_in_and_come_out_as_the_kernels_header_says() {
        let mut registers = Registers { rdi: 1, rsi: 2, rdx: 3, r8: 4, r9: 5, r10: 6 };
        let (answer, _) = enter(way_in as *const () as usize, 77, &mut registers);
        assert_eq!(answer, 0);
        assert_eq!(registers, Registers { rdi: 10, rsi: 20, rdx: 77, r8: 40, r9: 50, r10: 0 });
    }

    #[test]
    fn a_fault_is_told_with_its_vector_and_address() {
        let (answer, run) =
            enter(way_in_that_faults as *const () as usize, 0, &mut Registers::default());
        assert_eq!((answer, run.vector, run.address), (-libc::EFAULT, 14, 0x1234));
    }

    #[test]
    fn functions_of_the_kernels_library_are_found() {
        assert!(vdso(c"__vdso_clock_gettime").is_some());
        assert!(vdso(c"__vdso_no_such_function").is_none());
    }
}
