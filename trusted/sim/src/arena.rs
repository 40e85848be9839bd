//! The family arena: the heap that a guest program and its forked children share.
//!
//! One `MAP_SHARED` region at a fixed address, made before the first allocation. fork() carries it
//! along, so an `Arc` made in one process is the same object at the same address in every other:
//! volume core, open files, nonce counters and executors exist once for the whole family.
//! (A private heap would duplicate the nonce counter at fork: the same nonce for two plaintexts.)
//!
//! Holds: objects here hold no process-private pointers except into the program image, which fork
//! copies at the same address. The region is left out of core dumps and gone with the last process.
#![allow(unsafe_code)]

use core::{
    alloc::{GlobalAlloc, Layout},
    cell::UnsafeCell,
    ptr,
    sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering},
};

use dlmalloc::Dlmalloc;
use lock_api::RawMutex;
use postern_trusted::sync::RawLock;

use crate::sys;

/// Where the arena lies in every process of every family (an address no loader or mmap picks).
pub const BASE: usize = 0x6e00_0000_0000;
/// Reserved length; pages cost memory only when touched.
pub const BYTES: usize = 8 << 30;
/// The heap asks for memory in steps of this.
const STEP: usize = 256 << 10;

/// Takes memory from the arena, never gives it back.
struct Bump;

// SAFETY: 1. `alloc` hands out each byte of the mapped arena at most once (fetch_add under the
//    heap's lock), page-aligned, zeroed by the kernel. 2. Nothing is freed or moved.
unsafe impl dlmalloc::Allocator for Bump {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let size = size.next_multiple_of(STEP);
        let header = header();
        let at = header.used.load(Ordering::Relaxed);
        if at.checked_add(size).is_none_or(|end| end > BYTES) {
            return (ptr::null_mut(), 0, 0);
        }
        header.used.store(at + size, Ordering::Relaxed);
        ((BASE + at) as *mut u8, size, 0)
    }
    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }
    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }
    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }
    fn can_release_part(&self, _: u32) -> bool {
        false
    }
    fn allocates_zeros(&self) -> bool {
        true
    }
    fn page_size(&self) -> usize {
        4096
    }
}

/// First bytes of the arena.
#[repr(C)]
struct Header {
    lock: RawLock,
    /// Bytes of the arena handed to the heap, header included.
    used: AtomicUsize,
    /// What the family shares ([`root`]).
    root: AtomicPtr<u8>,
    heap: UnsafeCell<Dlmalloc<Bump>>,
}

const HEADER_BYTES: usize = 16 << 10;
const _: () = assert!(size_of::<Header>() <= HEADER_BYTES);

fn header() -> &'static Header {
    // SAFETY: 1. Mapped and initialised: every path here goes through `ready`. 2. Shared access
    //    only; the heap behind the UnsafeCell is touched under `lock`.
    unsafe { &*(BASE as *const Header) }
}

const UNMADE: u8 = 0;
const MAKING: u8 = 1;
const MADE: u8 = 2;
const FAILED: u8 = 3;
/// Private to the process; a forked child inherits MADE together with the mapping.
static STATE: AtomicU8 = AtomicU8::new(UNMADE);

fn ready() -> bool {
    loop {
        match STATE.load(Ordering::Acquire) {
            MADE => return true,
            FAILED => return false,
            UNMADE => {
                let won =
                    STATE.compare_exchange(UNMADE, MAKING, Ordering::Acquire, Ordering::Relaxed);
                if won.is_ok() {
                    STATE.store(if make() { MADE } else { FAILED }, Ordering::Release);
                }
            }
            _ => core::hint::spin_loop(),
        }
    }
}

fn make() -> bool {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let flags =
        (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE)
            as usize;
    // SAFETY: a new mapping at an address where nothing is mapped (NOREPLACE).
    let at =
        unsafe { sys::syscall6(libc::SYS_mmap, BASE, BYTES, protection, flags, usize::MAX, 0) };
    if at.cast_unsigned() != BASE {
        return false;
    }
    // SAFETY: advice about our own mapping. Failure is harmless (a debugging kernel without it).
    unsafe {
        sys::syscall6(libc::SYS_madvise, BASE, BYTES, libc::MADV_DONTDUMP as usize, 0, 0, 0);
    }
    // SAFETY: the header's pages are mapped, zero and ours alone until STATE says MADE.
    unsafe {
        let header = BASE as *mut Header;
        ptr::addr_of_mut!((*header).used).write(AtomicUsize::new(HEADER_BYTES));
        ptr::addr_of_mut!((*header).heap)
            .write(UnsafeCell::new(Dlmalloc::new_with_allocator(Bump)));
    }
    true
}

/// The allocator of the preload library.
pub struct FamilyArena;

fn with_heap<T>(run: impl FnOnce(&mut Dlmalloc<Bump>) -> T) -> Option<T> {
    if !ready() {
        return None;
    }
    let header = header();
    header.lock.lock();
    // SAFETY: exclusive: the lock is held.
    let answer = run(unsafe { &mut *header.heap.get() });
    // SAFETY: locked above by this thread.
    unsafe { header.lock.unlock() };
    Some(answer)
}

// SAFETY: 1. dlmalloc gives disjoint, aligned blocks out of memory that only it manages.
//    2. Its state is only touched under the lock.
unsafe impl GlobalAlloc for FamilyArena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: size and alignment come from a valid layout.
        with_heap(|heap| unsafe { heap.malloc(layout.size(), layout.align()) })
            .unwrap_or(ptr::null_mut())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        with_heap(|heap| unsafe { heap.calloc(layout.size(), layout.align()) })
            .unwrap_or(ptr::null_mut())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: `block` came from this allocator with this layout.
        with_heap(|heap| unsafe { heap.free(block, layout.size(), layout.align()) });
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`.
        with_heap(|heap| unsafe { heap.realloc(block, layout.size(), layout.align(), size) })
            .unwrap_or(ptr::null_mut())
    }
}

/// The family's root object, the same for all its processes. Made by the first that asks; if two
/// ask at once one object is lost (never freed) and both get the other.
pub fn root<T: Send + Sync>(make: impl FnOnce() -> T) -> Option<&'static T> {
    if !ready() {
        return None;
    }
    let slot = &header().root;
    let mut at = slot.load(Ordering::Acquire);
    if at.is_null() {
        let made = alloc_root(make());
        match slot.compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => at = made,
            Err(other) => at = other,
        }
    }
    // SAFETY: 1. The only writer is above: the pointer is a leaked T. 2. One T per program image:
    //    the function has a single caller type (`Family`).
    Some(unsafe { &*at.cast::<T>() })
}

fn alloc_root<T>(value: T) -> *mut u8 {
    Box::into_raw(Box::new(value)).cast()
}
