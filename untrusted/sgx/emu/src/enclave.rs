//! An enclave in this process: loading it, its threads, entering it.
//!
//! Holds: an enclave is entered by one thread of the host for each of its own; one that faulted is
//! not entered again by that thread; nothing is loaded that its signature does not answer for.

use core::fmt;
use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use sgx_image::{ATTRIBUTE_MODE64, Image, PAGE, Sigstruct, SigstructError};

use crate::{
    cpu,
    enter::{Frame, Registers, postern_sgx_emu_enter},
    keys::{ATTRIBUTE_INIT, KeyRoot, Secs},
    memory::Range,
    strict,
    trap::{self, Fault, Guest},
};

/// How an enclave is run.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Leave every byte of the code as the image has it: exits trap, and cost ten times as much.
    pub exact: bool,
    /// Let system calls and CPUID fault, as on a CPU. Cannot be undone in this process.
    pub strict: bool,
    /// Cycles of the time stamp counter to spend on each entry and on each exit.
    pub transition_cycles: u64,
    /// What takes the place of the CPU's secrets.
    pub root: KeyRoot,
}

/// Why an enclave is not loaded.
#[derive(Debug)]
#[non_exhaustive]
pub enum LoadError {
    /// The signature is wrong in itself.
    Signature(SigstructError),
    /// The signature answers for another image.
    Measurement {
        /// MRENCLAVE of the image.
        image: [u8; 32],
        /// MRENCLAVE that is signed.
        signed: [u8; 32],
    },
    /// The signature asks for attributes that are not emulated.
    Attributes,
    /// A thread of the image has a control structure that no CPU takes.
    Thread {
        /// Its offset, bytes.
        offset: u64,
    },
    /// The image has no thread.
    NoThreads,
    /// The kernel does not let user space set GS (FSGSBASE: Linux 5.9 or newer).
    NoFsGsBase,
    /// The kernel refuses what the emulator needs.
    System(io::Error),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signature(error) => error.fmt(f),
            Self::Measurement { .. } => {
                f.write_str("the signature is for another image: the measurements differ")
            }
            Self::Attributes => f.write_str("the signature asks for attributes not emulated"),
            Self::Thread { offset } => write!(f, "the thread at {offset:#x} is malformed"),
            Self::NoThreads => f.write_str("the image has no thread"),
            Self::NoFsGsBase => f.write_str("the kernel does not let user space set GS"),
            Self::System(error) => write!(f, "the system refuses: {error}"),
        }
    }
}

impl core::error::Error for LoadError {}

impl From<io::Error> for LoadError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// Why an enclave is not entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EnterError {
    /// The enclave has no thread of this number.
    NoThread,
    /// Somebody is in by this thread already.
    Busy,
    /// This thread faulted, and has no room for another entry.
    Dead,
}

impl fmt::Display for EnterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoThread => "the enclave has no such thread",
            Self::Busy => "the thread is inside already",
            Self::Dead => "the thread ended by a fault",
        })
    }
}

impl core::error::Error for EnterError {}

/// How a stay inside ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By EEXIT, with these registers.
    Left(Registers),
    /// By a fault; this thread cannot be entered again.
    Fault(Fault),
}

/// Kinds of exits that are told apart.
pub const EXIT_KINDS: usize = 18;

/// How often the wall was crossed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries.
    pub entries: u64,
    /// Exits by the enclave's own will, by what RDI held, where the target's ABI has the number of
    /// the call. The last one counts all higher numbers.
    pub exits: [u64; EXIT_KINDS],
    /// Faults.
    pub faults: u64,
}

/// Counts as they are counted.
#[derive(Debug, Default)]
pub struct Counters {
    entries: AtomicU64,
    exits: [AtomicU64; EXIT_KINDS],
    faults: AtomicU64,
}

impl Counters {
    /// An entry.
    pub fn entered(&self) {
        self.entries.fetch_add(1, Relaxed);
    }

    /// How it ended.
    pub fn left(&self, exit: &Exit) {
        match exit {
            Exit::Left(registers) => {
                let kind = usize::try_from(registers.rdi).unwrap_or(usize::MAX);
                self.exits[kind.min(EXIT_KINDS - 1)].fetch_add(1, Relaxed);
            }
            Exit::Fault(_) => {
                self.faults.fetch_add(1, Relaxed);
            }
        }
    }

    /// What was counted until now.
    #[must_use]
    pub fn get(&self) -> Counts {
        Counts {
            entries: self.entries.load(Relaxed),
            exits: core::array::from_fn(|kind| self.exits[kind].load(Relaxed)),
            faults: self.faults.load(Relaxed),
        }
    }
}

/// A thread of the enclave. Offsets in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// The control structure.
    pub tcs: u64,
    entry: u64,
    gs: u64,
    /// Of the registers in the only frame of the save area that is used.
    save: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Busy,
    Dead,
}

/// What the handler of signals looks at.
pub struct Inner {
    /// The enclave's memory.
    pub range: Range,
    /// What the enclave is.
    pub secs: Secs,
    /// The root of its keys.
    pub root: KeyRoot,
    /// Runs of pages the enclave may write: offset and bytes. In order.
    writable: Vec<(u64, u64)>,
    readable: Vec<(u64, u64)>,
}

impl Inner {
    /// The `N` bytes at `address`, aligned to `alignment`; `None` if the enclave may not read them.
    pub fn read<const N: usize>(&self, address: u64, alignment: u64) -> Option<[u8; N]> {
        let fits = address.is_multiple_of(alignment) && self.covers(&self.readable, address, N);
        let mut bytes = [0_u8; N];
        for (index, byte) in bytes.iter_mut().enumerate().take(if fits { N } else { 0 }) {
            // SAFETY: the page was added readable and stays so. Other threads of the enclave may
            // write it meanwhile: volatile, and any value will do.
            *byte = unsafe { ((address as usize + index) as *const u8).read_volatile() };
        }
        fits.then_some(bytes)
    }

    /// Writes `bytes` at `address`; `false` if the enclave may not.
    pub fn write(&self, address: u64, bytes: &[u8]) -> bool {
        if !self.covers(&self.writable, address, bytes.len()) {
            return false;
        }
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`, for a page that was added writable.
            unsafe { ((address as usize + index) as *mut u8).write_volatile(*byte) };
        }
        true
    }

    fn covers(&self, runs: &[(u64, u64)], address: u64, length: usize) -> bool {
        let Some(offset) = address.checked_sub(self.range.base() as u64) else { return false };
        runs.iter().any(|(start, bytes)| {
            offset >= *start
                && offset.checked_add(length as u64).is_some_and(|end| end <= start + bytes)
        })
    }
}

/// An enclave that is loaded.
pub struct Enclave {
    inner: Inner,
    threads: Vec<Thread>,
    states: Mutex<Vec<State>>,
    config: Config,
    cpuid_faults: bool,
    counters: Counters,
}

impl fmt::Debug for Enclave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enclave").field("base", &self.base()).finish_non_exhaustive()
    }
}

/// `mov $4, %eax; enclu`, and what takes its place: `jmp *%rbx` and an instruction that is none.
const EXIT: [u8; 8] = [0xb8, 4, 0, 0, 0, 0x0f, 0x01, 0xd7];
const FAST_EXIT: [u8; 8] = [0xff, 0xe3, 0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b];

fn make_exits_fast(code: &mut [u8]) {
    let mut at = 0;
    while let Some(found) =
        code.get(at..).and_then(|rest| rest.windows(EXIT.len()).position(|window| window == EXIT))
    {
        code[at + found..at + found + EXIT.len()].copy_from_slice(&FAST_EXIT);
        at += found + EXIT.len();
    }
}

impl Enclave {
    /// Loads `image`. With a signature as EINIT would; without one the enclave has no signer, and is
    /// one for debugging.
    ///
    /// # Errors
    /// Why not.
    pub fn load(
        image: &Image,
        signature: Option<&Sigstruct>,
        config: &Config,
    ) -> Result<Self, LoadError> {
        if !cpu::has_fsgsbase() {
            return Err(LoadError::NoFsGsBase);
        }
        let secs = secs(image, signature)?;
        let threads = threads(image)?;
        let size = usize::try_from(image.size())
            .map_err(|_| io::ErrorKind::OutOfMemory)
            .map_err(io::Error::from)?;
        let mut range = Range::reserve(size, config.strict)?;
        range.fill(image, |code| {
            if !config.exact {
                make_exits_fast(code);
            }
        })?;
        trap::install()?;
        if config.strict {
            strict::refuse_system_calls(range.base() as u64, range.size() as u64)?;
        }
        let states = Mutex::new(vec![State::Free; threads.len()]);
        let inner = Inner {
            range,
            secs,
            root: config.root,
            writable: runs(image, sgx_image::WRITE),
            readable: runs(image, sgx_image::READ),
        };
        let counters = Counters::default();
        let config = config.clone();
        // Tried on this thread alone: others try again when they enter.
        let cpuid_faults = config.strict && strict::let_cpuid_fault(true);
        Ok(Self { inner, threads, states, config, cpuid_faults, counters })
    }

    /// First address of the enclave.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.inner.range.base() as u64
    }

    /// Bytes of its range.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.inner.range.size() as u64
    }

    /// What it is.
    #[must_use]
    pub fn secs(&self) -> &Secs {
        &self.inner.secs
    }

    /// Its threads, by offset.
    #[must_use]
    pub fn threads(&self) -> &[Thread] {
        &self.threads
    }

    /// Whether CPUID faults inside: strict mode, on a CPU that can do that.
    #[must_use]
    pub fn cpuid_faults(&self) -> bool {
        self.cpuid_faults
    }

    /// How often it was entered and left.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counters.get()
    }

    /// Enters by the thread of this number, and returns when it leaves.
    ///
    /// # Errors
    /// Why it was not entered.
    pub fn enter(&self, thread: usize, registers: Registers) -> Result<Exit, EnterError> {
        let place = *self.threads.get(thread).ok_or(EnterError::NoThread)?;
        self.change(thread, |state| match state {
            State::Free => Ok(State::Busy),
            State::Busy => Err(EnterError::Busy),
            State::Dead => Err(EnterError::Dead),
        })?;
        if self.config.strict {
            strict::let_cpuid_fault(true);
        }
        let base = self.base();
        let mut frame =
            Frame::new(registers, base + place.tcs, base + place.entry, base + place.gs);
        let save = base + place.save;
        let mut guest = Guest { frame: &raw mut frame, inner: &self.inner, save, fault: None };
        self.counters.entered();
        cpu::spend(self.config.transition_cycles);
        trap::with_guest(&mut guest, || {
            // SAFETY:
            // 1. The frame is complete and lives on; nobody else has it but the handler of this
            //    thread's signals, which returns it.
            // 2. The entry lies in a page of the image. What the code there does to this process is
            //    as with an enclave of a CPU: it can write the host's memory, and is trusted not to.
            // 3. The handler and its stack are installed, and GS is nobody's on Linux.
            unsafe { postern_sgx_emu_enter(&raw mut frame) };
        });
        cpu::spend(self.config.transition_cycles);
        let fault = guest.fault;
        let after = if fault.is_some() { State::Dead } else { State::Free };
        self.change(thread, |_| Ok(after))?;
        let exit = fault.map_or(Exit::Left(frame.registers), Exit::Fault);
        self.counters.left(&exit);
        Ok(exit)
    }

    fn change(
        &self,
        thread: usize,
        to: impl FnOnce(State) -> Result<State, EnterError>,
    ) -> Result<(), EnterError> {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let state = states.get_mut(thread).ok_or(EnterError::NoThread)?;
        *state = to(*state)?;
        Ok(())
    }
}

/// What EINIT would make of the image and its signature.
fn secs(image: &Image, signature: Option<&Sigstruct>) -> Result<Secs, LoadError> {
    const XFRM: u64 = 3;
    let mrenclave = image.mrenclave();
    let mut secs = Secs {
        mrenclave,
        mrsigner: [0; 32],
        product: 0,
        version: 0,
        flags: ATTRIBUTE_INIT | ATTRIBUTE_MODE64 | sgx_image::ATTRIBUTE_DEBUG,
        xfrm: XFRM,
    };
    if let Some(signature) = signature {
        signature.verify().map_err(LoadError::Signature)?;
        let signed = signature.mrenclave();
        if signed != mrenclave {
            return Err(LoadError::Measurement { image: mrenclave, signed });
        }
        let ((flags, xfrm), (flags_mask, xfrm_mask)) =
            (signature.attributes(), signature.attribute_mask());
        let known = ATTRIBUTE_MODE64 | sgx_image::ATTRIBUTE_DEBUG;
        if flags & !known != 0 || (xfrm ^ XFRM) & xfrm_mask != 0 || flags & ATTRIBUTE_MODE64 == 0 {
            return Err(LoadError::Attributes);
        }
        let _ = flags_mask; // The host asks for exactly the flags that are signed.
        let identity = signature.identity();
        secs.mrsigner = signature.mrsigner();
        (secs.product, secs.version) = (identity.product, identity.version);
        secs.flags = ATTRIBUTE_INIT | flags;
    }
    Ok(secs)
}

fn threads(image: &Image) -> Result<Vec<Thread>, LoadError> {
    /// Bytes of the registers at the end of a frame of the save area.
    const SAVED: u64 = 184;
    let frame = u64::from(image.ssa_frame_pages()) * PAGE as u64;
    let mut threads = Vec::new();
    for page in image.pages().iter().filter(|page| page.is_tcs()) {
        let wrong = LoadError::Thread { offset: page.offset() };
        let Some(data) = page.data() else { return Err(wrong) };
        let word =
            |at: usize| data[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (save, saves, entry, gs) = (word(16), word(24), word(32), word(56));
        let whole = save.is_multiple_of(PAGE as u64) && gs.is_multiple_of(PAGE as u64);
        // CSSA is the low half and must be 0, NSSA the high one and at least 1.
        let used = saves as u32 == 0 && saves >> 32 != 0;
        let inside =
            |at: u64, length: u64| at.checked_add(length).is_some_and(|end| end <= image.size());
        let reserved = data[..16].iter().chain(&data[40..48]).chain(&data[72..]);
        if !whole
            || !used
            || !inside(save, frame)
            || !inside(entry, 1)
            || !inside(gs, 1)
            || reserved.into_iter().any(|byte| *byte != 0)
        {
            return Err(wrong);
        }
        threads.push(Thread { tcs: page.offset(), entry, gs, save: save + frame - SAVED });
    }
    if threads.is_empty() { Err(LoadError::NoThreads) } else { Ok(threads) }
}

/// Runs of pages that have `permission`: offset and bytes.
fn runs(image: &Image, permission: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let with = |page: &&sgx_image::Page| page.flags() & permission != 0;
    for page in image.pages().iter().filter(with) {
        match runs.last_mut() {
            Some((start, bytes)) if *start + *bytes == page.offset() => *bytes += PAGE as u64,
            _ => runs.push((page.offset(), PAGE as u64)),
        }
    }
    runs
}
