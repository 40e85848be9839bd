//! The only code of the trusted side that touches memory shared with the host.
//!
//! Every access is a whole aligned 8-byte word. A narrower or unaligned enclave store to host
//! memory would need VERW and fences (INTEL-SA-00615), loads must be 8-byte aligned
//! (INTEL-SA-00657). There is no way to get a reference or a slice of the region, so nothing can
//! be decided on bytes that change between two looks without this file showing two loads.
//!
//! Indexes come from private state only. One outside the region is a bug of the caller, stopped
//! by a debug assertion; otherwise such a load answers zero and such a store is dropped, so that
//! no path leads out of the region.
#![allow(unsafe_code)]

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use super::PortError;
use crate::disk::{BLOCK, Block};

/// Words in a block.
const BLOCK_WORDS: usize = BLOCK / 8;

/// A region of untrusted memory, as 8-byte words.
///
/// ```
/// fn whole(words: &postern_trusted::port::SharedWords) -> u64 { words.load(0) }
/// ```
/// A narrower access does not compile:
/// ```compile_fail,E0308
/// fn narrow(words: &postern_trusted::port::SharedWords) -> u32 { words.load(0) }
/// ```
/// ```compile_fail,E0308
/// fn narrow(words: &postern_trusted::port::SharedWords) { words.store(0, 1_u32) }
/// ```
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: 1. Aliasing: all access goes through `cell` (atomics) or the word-wise copies, which are
//    defined whatever other threads do. 2. Lifetime: `new` obliges its caller to keep the mapping
//    for as long as this value lives, on whatever thread.
unsafe impl Send for SharedWords {}
// SAFETY: as for Send; there is no interior state besides the region.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Takes the region of `bytes` bytes at `base`.
    ///
    /// `outside` is asked once with address and length: whether the whole range lies in untrusted
    /// memory. Inside SGX it compares with the enclave's own range; in a simulated enclave there
    /// is no such range and it answers `true`.
    ///
    /// # Errors
    /// [`PortError::BadRegion`] and [`PortError::InsideEnclave`].
    ///
    /// # Safety
    /// 1. `base..base + bytes` is mapped readable and writable, and stays so until the value is
    ///    dropped; the mapping cannot shrink (a host that truncates the file behind it makes an
    ///    access fault: the process ends, no rule of the language is broken).
    /// 2. No Rust reference to any byte of the region exists while the value lives, except to
    ///    atomics of 8 bytes.
    pub unsafe fn new(
        base: *mut u8,
        bytes: usize,
        outside: impl FnOnce(usize, usize) -> bool,
    ) -> Result<Self, PortError> {
        let address = base.addr();
        let bad = PortError::BadRegion { base: address, bytes };
        let whole = address.is_multiple_of(8) && bytes.is_multiple_of(8) && bytes > 0;
        let fits = isize::try_from(bytes).is_ok() && address.checked_add(bytes).is_some();
        let Some(base) = NonNull::new(base.cast::<AtomicU64>()).filter(|_| whole && fits) else {
            return Err(bad);
        };
        if !outside(address, bytes) {
            return Err(PortError::InsideEnclave { base: address, bytes });
        }
        Ok(Self { base, words: bytes / 8 })
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.words * 8
    }

    /// Address of the region: what names the port to the host.
    pub(super) fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    #[inline]
    fn cell(&self, index: usize) -> Option<&AtomicU64> {
        debug_assert!(index < self.words, "word {index} of {}", self.words);
        if index >= self.words {
            return None;
        }
        // SAFETY:
        // 1. In bounds and aligned: compared above with the length that `new` checked.
        // 2. Race: an atomic, so a host store at any moment is defined behaviour, and any bit
        //    pattern is a value.
        // 3. Lifetime: the mapping outlives `self` (contract of `new`).
        Some(unsafe { self.base.add(index).as_ref() })
    }

    /// Loads a word that an earlier [`Self::observe`] ordered.
    #[inline]
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        let value = self.cell(index).map_or(0, |cell| cell.load(Ordering::Relaxed));
        #[cfg(test)]
        let value = probe::loaded(index, value);
        value
    }

    /// Loads a cursor or flag: what the other side stored before it, later loads will see.
    /// Acquire, pairs with the other side's Release.
    #[inline]
    #[must_use]
    pub fn observe(&self, index: usize) -> u64 {
        let value = self.cell(index).map_or(0, |cell| cell.load(Ordering::Acquire));
        #[cfg(test)]
        let value = probe::loaded(index, value);
        value
    }

    /// Stores a word that a later [`Self::publish`] orders.
    #[inline]
    pub fn store(&self, index: usize, value: u64) {
        #[cfg(test)]
        probe::stored(index, value);
        if let Some(cell) = self.cell(index) {
            cell.store(value, Ordering::Relaxed);
        }
    }

    /// Stores a cursor or flag after everything stored before. Release, pairs with the other
    /// side's Acquire.
    #[inline]
    pub fn publish(&self, index: usize, value: u64) {
        #[cfg(test)]
        probe::stored(index, value);
        if let Some(cell) = self.cell(index) {
            cell.store(value, Ordering::Release);
        }
    }

    /// Copies a private block to the words from `index` on.
    pub fn put_block(&self, index: usize, block: &Block) {
        let Some(to) = self.block(index) else { return };
        let from = block.as_ptr();
        #[cfg(target_arch = "x86_64")]
        if from.addr().is_multiple_of(8) {
            // SAFETY: 1. Destination: BLOCK_WORDS words inside the region (`block`). 2. Source: a
            //    whole block that is borrowed and aligned (checked); it cannot overlap the region,
            //    to whose bytes no reference exists.
            unsafe { copy_words(from.cast(), to.as_ptr().cast()) };
            return;
        }
        for (n, bytes) in block.as_chunks::<8>().0.iter().enumerate() {
            self.store(index + n, u64::from_ne_bytes(*bytes));
        }
    }

    /// Copies the words from `index` on to a private block, each loaded once.
    pub fn get_block(&self, index: usize, block: &mut Block) {
        let Some(from) = self.block(index) else {
            block.fill(0);
            return;
        };
        let to = block.as_mut_ptr();
        #[cfg(target_arch = "x86_64")]
        if to.addr().is_multiple_of(8) {
            // SAFETY: 1. Source: BLOCK_WORDS words inside the region (`block`). 2. Destination: a
            //    whole block that is borrowed exclusively and aligned (checked); no overlap, as
            //    in `put_block`.
            unsafe { copy_words(from.as_ptr().cast(), to.cast()) };
            #[cfg(test)]
            probe::copied(index);
            return;
        }
        for (n, bytes) in block.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *bytes = self.load(index + n).to_ne_bytes();
        }
        #[cfg(test)]
        probe::copied(index);
    }

    /// The first of [`BLOCK_WORDS`] words that lie wholly inside the region.
    #[inline]
    fn block(&self, index: usize) -> Option<NonNull<AtomicU64>> {
        let inside = index.checked_add(BLOCK_WORDS).is_some_and(|end| end <= self.words);
        debug_assert!(inside, "block at word {index} of {}", self.words);
        // SAFETY: 1. In bounds: `index + BLOCK_WORDS <= words`, just compared.
        inside.then(|| unsafe { self.base.add(index) })
    }
}

/// Copies one block by aligned quadwords.
///
/// `rep movsq` moves quadwords; with both pointers aligned the processor may join neighbouring
/// ones into wider aligned moves, and never splits one. This is the instruction that Rust's
/// standard library for SGX copies to and from host memory with, for the same two advisories.
/// Against the unrolled loop of 8-byte moves it takes 60 % of the time (95 against 155 ns on a
/// 2.1 GHz Xeon), but only while the private side is aligned too; else the loop is the faster one.
///
/// # Safety
/// 1. Both ranges are valid for [`BLOCK`] bytes, aligned to 8, and do not overlap.
/// 2. The private one of the two is not accessed otherwise during the call; the shared one may be,
///    by anybody: to the compiler the access is opaque, and any bytes are values.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_words(from: *const u64, to: *mut u64) {
    // SAFETY: 1. Memory: the caller's obligations. 2. The direction flag is clear on entry to an
    //    asm block; flags and stack stay untouched.
    unsafe {
        core::arch::asm!(
            "rep movsq",
            inout("rcx") BLOCK_WORDS => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// A test that sees every access of its thread to shared memory, and decides what a load answers.
#[cfg(test)]
pub(crate) mod probe {
    use alloc::boxed::Box;
    use std::cell::RefCell;

    pub(crate) trait Probe {
        /// Word `index` was loaded; what the lane gets to see.
        fn loaded(&mut self, index: usize, value: u64) -> u64;
        /// Word `index` is about to be stored.
        fn stored(&mut self, index: usize, value: u64);
        /// The block at word `index` was copied into private memory.
        fn copied(&mut self, index: usize);
    }

    std::thread_local! {
        static PROBE: RefCell<Option<Box<dyn Probe>>> = const { RefCell::new(None) };
    }

    /// Puts a probe in place, or takes it away.
    pub(crate) fn set(probe: Option<Box<dyn Probe>>) {
        PROBE.replace(probe);
    }

    fn with<R>(look: impl FnOnce(&mut dyn Probe) -> R) -> Option<R> {
        PROBE.with_borrow_mut(|probe| probe.as_mut().map(|probe| look(&mut **probe)))
    }

    pub(super) fn loaded(index: usize, value: u64) -> u64 {
        with(|probe| probe.loaded(index, value)).unwrap_or(value)
    }

    pub(super) fn stored(index: usize, value: u64) {
        with(|probe| probe.stored(index, value));
    }

    pub(super) fn copied(index: usize) {
        with(|probe| probe.copied(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{boxed::Box, vec::Vec};

    fn region(words: usize) -> &'static [AtomicU64] {
        Box::leak((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn shared(region: &'static [AtomicU64]) -> SharedWords {
        // SAFETY: 1. Leaked, so mapped for ever. 2. Only atomics refer to it.
        unsafe { SharedWords::new(region.as_ptr() as *mut u8, region.len() * 8, |_, _| true) }
            .unwrap()
    }

    #[test]
    fn a_region_of_broken_words_or_inside_the_enclave_is_refused() {
        let region = region(16);
        let base = region.as_ptr() as *mut u8;
        let make = |base: *mut u8, bytes, outside| {
            // SAFETY: 1. Leaked. 2. Refused or dropped at once, never accessed.
            unsafe { SharedWords::new(base, bytes, |_, _| outside) }.err()
        };
        assert!(matches!(make(base.wrapping_add(4), 64, true), Some(PortError::BadRegion { .. })));
        assert!(matches!(make(base, 63, true), Some(PortError::BadRegion { .. })));
        assert!(matches!(make(base, 0, true), Some(PortError::BadRegion { .. })));
        assert!(matches!(make(core::ptr::null_mut(), 64, true), Some(PortError::BadRegion { .. })));
        assert!(matches!(make(base, usize::MAX - 7, true), Some(PortError::BadRegion { .. })));
        assert!(matches!(make(base, 64, false), Some(PortError::InsideEnclave { .. })));
        assert_eq!(make(base, 64, true), None);
    }

    #[test]
    fn blocks_arrive_whole_from_and_at_any_private_alignment() {
        let region = region(3 * BLOCK_WORDS);
        let words = shared(region);
        let source: Vec<u8> = (0..BLOCK + 8).map(|n| (n * 7 % 251) as u8).collect();
        for shift in 0..8 {
            let block: &Block = source[shift..shift + BLOCK].try_into().unwrap();
            words.put_block(BLOCK_WORDS, block);
            let seen: Vec<u8> = region[BLOCK_WORDS..2 * BLOCK_WORDS]
                .iter()
                .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
                .collect();
            assert_eq!(seen, block);
            let mut back = alloc::vec![0_u8; BLOCK + 16];
            let target: &mut Block = (&mut back[shift..shift + BLOCK]).try_into().unwrap();
            words.get_block(BLOCK_WORDS, target);
            assert_eq!(target, block);
            assert!(back[..shift].iter().chain(&back[shift + BLOCK..]).all(|&b| b == 0));
        }
        let untouched = region[..BLOCK_WORDS].iter().chain(&region[2 * BLOCK_WORDS..]);
        assert!(untouched.into_iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }
}
