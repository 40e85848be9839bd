//! The family arena: the heap that a guest program and its forked children share.
//!
//! One `MAP_SHARED` region at a fixed address, made before the first allocation. fork() carries it
//! along, so an `Arc` made in one process is the same object at the same address in every other:
//! volume core, open files, nonce counters and executors exist once for the whole family.
//! (A private heap would duplicate the nonce counter at fork: the same nonce for two plaintexts.)
//!
//! The region is a memory file whose descriptor survives exec: the next program maps it again, if
//! it belongs to the same run (`run_name`) and has this library, the same build at the same
//! address ([`Image`]).
//!
//! Holds: objects here hold no process-private pointers except into the library's image, which
//! fork copies at the same address and a program after exec has there too, or it does not join.
//! The region is left out of core dumps, kept out of swap where the limit on locked memory allows
//! it, and gone with the last process.
#![allow(unsafe_code)]

use core::{
    alloc::{GlobalAlloc, Layout},
    cell::UnsafeCell,
    ffi::CStr,
    ptr,
    sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicUsize, Ordering},
};

use dlmalloc::Dlmalloc;
use lock_api::RawMutex;
use postern_trusted::sync::RawLock;

use crate::{config, image::Image, inheritance, process, sys};

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
    /// Who can share it; `None`: nobody after exec.
    image: Option<Image>,
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

/// The memory file's descriptor; -1 is none. Private to the process.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// The arena is never swapped out, as long as this process lives.
static LOCKED: AtomicBool = AtomicBool::new(false);

/// Whether the arena, and with it every key, is kept out of swap.
#[must_use]
pub fn is_locked() -> bool {
    LOCKED.load(Ordering::Relaxed)
}

/// Whether the list of a process's mappings, as proc_pid_maps(5) has it, shows an arena.
#[must_use]
pub fn is_among(maps: &[u8]) -> bool {
    let from = format!("{BASE:x}-");
    maps.split(|&byte| byte == b'\n').any(|line| line.starts_with(from.as_bytes()))
}

/// The descriptor that carries the arena across exec, if there is one.
#[must_use]
pub fn descriptor() -> Option<i32> {
    let fd = DESCRIPTOR.load(Ordering::Relaxed);
    (fd >= 0).then_some(fd)
}

/// Name of the memory file: "postern-arena-" and a number that stands for the run file's path, so
/// that a run started inside another one has an arena of its own.
fn run_name(room: &mut [u8; 32]) -> &CStr {
    const PREFIX: &[u8] = b"postern-arena-";
    let mut variable = [0_u8; 32];
    variable[..config::RUN_VARIABLE.len()].copy_from_slice(config::RUN_VARIABLE.as_bytes());
    // SAFETY: a C string; the answer is null or one too.
    let path = unsafe {
        let path = libc::getenv(variable.as_ptr().cast());
        if path.is_null() { c"" } else { CStr::from_ptr(path) }
    };
    // FNV-1a.
    let hash = path.to_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    room[..PREFIX.len()].copy_from_slice(PREFIX);
    for (n, digit) in room[PREFIX.len()..PREFIX.len() + 16].iter_mut().enumerate() {
        let nibble = hash >> (60 - 4 * n) & 15;
        *digit = b"0123456789abcdef"[usize::try_from(nibble).unwrap_or(0)];
    }
    CStr::from_bytes_until_nul(room).unwrap_or(c"postern-arena")
}

fn make() -> bool {
    let mut room = [0; 32];
    let name = run_name(&mut room);
    let image = Image::own();
    if image.is_some()
        && let Some(inherited) = inheritance::find_memory(name.to_bytes())
        && join(inherited, image)
    {
        DESCRIPTOR.store(inherited, Ordering::Relaxed);
        return true;
    }
    let file = image.and_then(|_| memory_file(name));
    if !map(file) {
        return false;
    }
    DESCRIPTOR.store(file.unwrap_or(-1), Ordering::Relaxed);
    // SAFETY: the header's pages are mapped, zero and ours alone until STATE says MADE.
    unsafe {
        let header = BASE as *mut Header;
        ptr::addr_of_mut!((*header).used).write(AtomicUsize::new(HEADER_BYTES));
        ptr::addr_of_mut!((*header).image).write(image);
        ptr::addr_of_mut!((*header).heap)
            .write(UnsafeCell::new(Dlmalloc::new_with_allocator(Bump)));
    }
    true
}

/// A memory file of the arena's size that can neither shrink nor grow, under a high number, kept
/// across exec. `None`: the arena is for forked children alone.
fn memory_file(name: &CStr) -> Option<i32> {
    let made = sys::memfd(name).ok()?;
    let fits = sys::size_memory_file(made, BYTES).is_ok();
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let sealed = fits && sys::fcntl(made, libc::F_ADD_SEALS, seals.unsigned_abs() as usize).is_ok();
    let limit = sys::descriptor_limit().min(4096);
    let from = usize::try_from(limit - limit / 16).unwrap_or(0);
    let moved = if sealed { sys::fcntl(made, libc::F_DUPFD, from).ok() } else { None };
    let _ = sys::close(made);
    moved.and_then(|fd| i32::try_from(fd).ok())
}

/// Maps the memory file, or memory for this process and its children alone, at [`BASE`].
fn map(file: Option<i32>) -> bool {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let kind =
        if file.is_some() { libc::MAP_SHARED } else { libc::MAP_SHARED | libc::MAP_ANONYMOUS };
    let flags = (kind | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE) as usize;
    let file = file.map_or(usize::MAX, |fd| fd as usize);
    // SAFETY: a new mapping at an address where nothing is mapped (NOREPLACE).
    let at = unsafe { sys::syscall6(libc::SYS_mmap, BASE, BYTES, protection, flags, file, 0) };
    if at.cast_unsigned() != BASE {
        return false;
    }
    // SAFETY: advice about our own mapping. Failure is harmless (a debugging kernel without it).
    unsafe {
        sys::syscall6(libc::SYS_madvise, BASE, BYTES, libc::MADV_DONTDUMP as usize, 0, 0, 0);
    }
    // SAFETY: pages of our own mapping stay in memory once they are there; it takes the whole
    // length out of RLIMIT_MEMLOCK, or fails and changes nothing.
    let locked = unsafe {
        let on_fault = libc::MLOCK_ONFAULT as usize;
        sys::syscall6(libc::SYS_mlock2, BASE, BYTES, on_fault, 0, 0, 0)
    };
    LOCKED.store(locked == 0, Ordering::Relaxed);
    true
}

/// Maps the arena that the program before exec left, if its objects make sense in this image.
fn join(file: i32, image: Option<Image>) -> bool {
    if sys::file_size(file) != Ok(BYTES as u64) || !map(Some(file)) {
        return false;
    }
    // SAFETY: mapped just now; a memory file of this name and size was made by `make`, which
    // writes the header before anything can exec. Any bytes that fail the comparison are refused.
    let theirs = unsafe { ptr::addr_of!((*(BASE as *const Header)).image).read() };
    process::set_lock_hooks();
    let known = theirs == image && !header().root.load(Ordering::Acquire).is_null();
    if !known {
        // SAFETY: the mapping made above, of which nothing is kept.
        unsafe { sys::syscall6(libc::SYS_munmap, BASE, BYTES, 0, 0, 0, 0) };
    }
    known
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

/// The family's root object, if there is one already.
#[must_use]
pub fn existing_root<T: Send + Sync>() -> Option<&'static T> {
    if !ready() {
        return None;
    }
    // SAFETY: as in `root`.
    unsafe { header().root.load(Ordering::Acquire).cast::<T>().as_ref() }
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
