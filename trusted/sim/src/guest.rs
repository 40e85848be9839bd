//! The guest's memory: copies that answer "fault" where a plain one would kill the program.
//!
//! One assembly leaf does every access to an address that the guest chose. The handler of SIGSEGV
//! and SIGBUS ([`fault`]) knows the addresses of its three instructions that touch guest memory:
//! a fault at one of them resumes behind it and the copy reports what is left; a fault anywhere
//! else is the guest's own business.
//!
//! Holds: NULL, kernel, non-canonical, unmapped, protected, half-mapped and truncated-file
//! addresses all give [`Fault`]. Needs: [`fault::install`] has run, and neither signal is blocked
//! in the kernel's mask of the thread ([`mask`] sees to that).
#![allow(unsafe_code)]

pub mod fault;
pub mod handlers;
pub mod mask;

use core::arch::global_asm;

use postern_trusted::{
    errno::Errno,
    platform::{Buffer, Fault, GuestMemory},
};

/// First address that no guest range may reach (x86-64, 47 bits, Linux TASK_SIZE_MAX).
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// Most bytes that one read or write moves (Linux MAX_RW_COUNT).
pub const MAX_COUNT: u64 = 0x7fff_f000;

/// Most segments of one vector (UIO_MAXIOV).
pub const MAX_SEGMENTS: usize = 1024;

global_asm!(
    ".pushsection .text.postern_guest,\"ax\",@progbits",
    ".p2align 4",
    ".globl postern_guest_copy",
    ".hidden postern_guest_copy",
    ".type postern_guest_copy,@function",
    "postern_guest_copy:", // (rdi to, rsi from, rdx length) -> bytes not copied
    ".cfi_startproc",
    "mov rcx, rdx",
    ".globl postern_guest_copy_at",
    ".hidden postern_guest_copy_at",
    "postern_guest_copy_at:",
    "rep movsb",
    ".globl postern_guest_copy_out",
    ".hidden postern_guest_copy_out",
    "postern_guest_copy_out:",
    "mov rax, rcx", // The processor keeps rcx exact across a fault.
    "ret",
    ".cfi_endproc",
    ".size postern_guest_copy, .-postern_guest_copy",
    ".p2align 4",
    ".globl postern_guest_load",
    ".hidden postern_guest_load",
    ".type postern_guest_load,@function",
    "postern_guest_load:", // (rdi from) -> rax value, rdx 0; or rdx 1 after a fault
    ".cfi_startproc",
    "xor edx, edx",
    ".globl postern_guest_load_at",
    ".hidden postern_guest_load_at",
    "postern_guest_load_at:",
    "mov rax, [rdi]",
    "ret",
    ".globl postern_guest_load_out",
    ".hidden postern_guest_load_out",
    "postern_guest_load_out:",
    "mov edx, 1",
    "ret",
    ".cfi_endproc",
    ".size postern_guest_load, .-postern_guest_load",
    ".popsection",
);

/// What the load leaf returns in rax and rdx.
#[repr(C)]
struct Loaded {
    value: u64,
    fault: u64,
}

unsafe extern "C" {
    fn postern_guest_copy(to: usize, from: usize, length: usize) -> usize;
    fn postern_guest_load(from: usize) -> Loaded;
    safe static postern_guest_copy_at: u8;
    safe static postern_guest_copy_out: u8;
    safe static postern_guest_load_at: u8;
    safe static postern_guest_load_out: u8;
}

/// Where execution goes on after a fault at `instruction`, if that is one of the leaf's.
fn landing(instruction: usize) -> Option<usize> {
    let at = |label: &u8| core::ptr::from_ref(label) as usize;
    if instruction == at(&postern_guest_copy_at) {
        Some(at(&postern_guest_copy_out))
    } else if instruction == at(&postern_guest_load_at) {
        Some(at(&postern_guest_load_out))
    } else {
        None
    }
}

/// Whether `length` bytes at `address` lie below the kernel's half: Linux's access_ok(), which
/// looks at numbers only.
#[must_use]
pub fn is_user_range(address: u64, length: u64) -> bool {
    address.checked_add(length).is_some_and(|end| end <= USER_END)
}

fn user_range(address: u64, length: usize) -> Result<usize, Fault> {
    if !is_user_range(address, length as u64) {
        return Err(Fault);
    }
    usize::try_from(address).map_err(|_| Fault)
}

/// The memory of the calling process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guest;

impl GuestMemory for Guest {
    #[inline]
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        let from = user_range(from, out.len())?;
        if let Ok(word) = <&mut [u8; 8]>::try_from(&mut *out) {
            // SAFETY: the leaf reads eight bytes and survives a fault; it writes no memory.
            let loaded = unsafe { postern_guest_load(from) };
            *word = loaded.value.to_ne_bytes();
            return if loaded.fault == 0 { Ok(()) } else { Err(Fault) };
        }
        // SAFETY: 1. Destination: `out` is ours and as long as the copy. 2. Source: the leaf
        //    survives a fault; a racing guest changes which bytes arrive, nothing else.
        let left = unsafe { postern_guest_copy(out.as_mut_ptr() as usize, from, out.len()) };
        if left == 0 { Ok(()) } else { Err(Fault) }
    }

    #[inline]
    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        let to = user_range(to, data.len())?;
        // SAFETY: 1. Source: `data` is ours. 2. Destination: memory that the guest named; it may
        //    ask to have any of its memory overwritten, as it may of the kernel; the leaf
        //    survives a fault.
        let left = unsafe { postern_guest_copy(to, data.as_ptr() as usize, data.len()) };
        if left == 0 { Ok(()) } else { Err(Fault) }
    }
}

/// Reads one `u64` of the guest.
///
/// # Errors
/// `EFAULT` if it cannot be read.
pub fn read_u64(from: u64) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    Guest.read(from, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Writes plain bytes of the guest.
///
/// # Errors
/// `EFAULT` if any byte cannot be written.
pub fn write(to: u64, data: &[u8]) -> Result<(), Errno> {
    Guest.write(to, data).map_err(|Fault| Errno::EFAULT)
}

/// Room for the paths that this library looks at, in bytes with the NUL. A longer path names no
/// protected file; so small because it lies on the guest's stack.
pub const PATH_ROOM: usize = 1024;

/// Reads a path of the guest, without its NUL.
///
/// # Errors
/// `EFAULT` if it cannot be read, `ENAMETOOLONG` if it does not fit with its NUL.
pub fn read_path(from: u64, out: &mut [u8; PATH_ROOM]) -> Result<&[u8], Errno> {
    const PAGE: u64 = 4096;
    let mut length = 0;
    while length < PATH_ROOM {
        let at = from.checked_add(length as u64).ok_or(Errno::EFAULT)?;
        // Never past the page that the string may end in; short steps, as paths are short.
        let step = (PAGE - at % PAGE).min(128).min((PATH_ROOM - length) as u64);
        let step = usize::try_from(step).map_err(|_| Errno::EFAULT)?;
        let part = &mut out[length..length + step];
        Guest.read(at, part).map_err(|Fault| Errno::EFAULT)?;
        if let Some(end) = part.iter().position(|&byte| byte == 0) {
            return Ok(&out[..length + end]);
        }
        length += step;
    }
    Err(Errno::ENAMETOOLONG)
}

/// One run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address of the first byte.
    pub base: u64,
    /// Bytes.
    pub length: usize,
}

/// The buffer of a read or write: guest segments, checked as Linux's import_iovec does.
#[derive(Clone, Debug, Default)]
pub struct GuestBuffer {
    /// A single segment needs no heap.
    one: Option<Segment>,
    many: Vec<Segment>,
    length: usize,
}

impl GuestBuffer {
    /// `length` bytes at `base`, at most [`MAX_COUNT`] of them.
    ///
    /// # Errors
    /// `EFAULT` if the whole range, before it is cut, reaches the kernel's half.
    pub fn single(base: u64, length: u64) -> Result<Self, Errno> {
        if !is_user_range(base, length) {
            return Err(Errno::EFAULT);
        }
        let length = usize::try_from(length.min(MAX_COUNT)).map_err(|_| Errno::EFAULT)?;
        Ok(Self { one: Some(Segment { base, length }), many: Vec::new(), length })
    }

    /// The `count` iovecs at `array`. Bytes beyond [`MAX_COUNT`] in all are cut off.
    ///
    /// # Errors
    /// `EINVAL` for more than 1024 or a negative length; `EFAULT` if the array cannot be read or
    /// a segment reaches the kernel's half.
    pub fn import(array: u64, count: u64) -> Result<Self, Errno> {
        let count = usize::try_from(count).ok().filter(|&n| n <= MAX_SEGMENTS);
        let count = count.ok_or(Errno::EINVAL)?;
        let mut made = Self { one: None, many: Vec::with_capacity(count), length: 0 };
        // All lengths are looked at before any address is.
        for n in 0..count as u64 {
            let at = array.checked_add(16 * n).ok_or(Errno::EFAULT)?;
            let base = read_u64(at)?;
            let length = read_u64(at.checked_add(8).ok_or(Errno::EFAULT)?)?;
            let length = i64::try_from(length).ok().and_then(|n| usize::try_from(n).ok());
            made.many.push(Segment { base, length: length.ok_or(Errno::EINVAL)? });
        }
        for segment in &mut made.many {
            if !is_user_range(segment.base, segment.length as u64) {
                return Err(Errno::EFAULT);
            }
            let room = usize::try_from(MAX_COUNT).unwrap_or(usize::MAX) - made.length;
            segment.length = segment.length.min(room);
            made.length += segment.length;
        }
        Ok(made)
    }

    /// The segments in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + Clone + '_ {
        self.one.iter().chain(&self.many).copied()
    }

    /// Guest addresses and lengths in bytes of the segments, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + Clone {
        self.segments().map(|segment| (segment.base, segment.length as u64))
    }

    /// Cuts off what is beyond `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        let mut left = length.min(self.length);
        self.length = left;
        for segment in self.one.iter_mut().chain(&mut self.many) {
            segment.length = segment.length.min(left);
            left -= segment.length;
        }
    }

    /// Calls `part` with guest address, place in the caller's slice and length for each piece of
    /// `length` bytes at `at`.
    fn pieces(
        &self,
        at: usize,
        length: usize,
        mut part: impl FnMut(u64, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        if at.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(Fault);
        }
        let (mut skip, mut done) = (at, 0);
        for segment in self.segments() {
            if done == length {
                break;
            }
            if skip >= segment.length {
                skip -= segment.length;
                continue;
            }
            let step = (segment.length - skip).min(length - done);
            part(segment.base + skip as u64, done, step)?;
            done += step;
            skip = 0;
        }
        Ok(())
    }
}

impl Buffer for GuestBuffer {
    fn len(&self) -> usize {
        self.length
    }

    fn copy_in(&self, at: usize, out: &mut [u8]) -> Result<(), Fault> {
        let length = out.len();
        self.pieces(at, length, |base, to, n| Guest.read(base, &mut out[to..to + n]))
    }

    fn copy_out(&self, at: usize, data: &[u8]) -> Result<(), Fault> {
        self.pieces(at, data.len(), |base, from, n| Guest.write(base, &data[from..from + n]))
    }
}

#[cfg(test)]
mod tests;
