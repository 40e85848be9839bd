//! Contexts of the kernel's own, behind the guest's: for descriptors that are not protected.
//!
//! The kernel reads and writes the guest's buffers itself, as the guest would have had it do; only
//! the ring is one that the guest does not know of.
//!
//! Holds: the ring is mapped from [`Hidden::new`] until `destroy`; a forked child has none of it.
#![allow(unsafe_code)]

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use postern_trusted::{
    aio::{KernelContext, KernelIocb, RingMapping, hurry, take_time},
    errno::Errno,
};

use crate::{
    files::{self, io::rwf},
    inside, process, sys,
};

/// `AIO_RING_MAGIC`.
const MAGIC: u32 = 0xa10a_10a1;

/// Checks a descriptor that is not protected as io_submit does first.
///
/// # Errors
/// `EBADF`: not open, opened with `O_PATH`, or one of our own.
pub fn find(fd: i32) -> Result<(), Errno> {
    const O_PATH: usize = libc::O_PATH as usize;
    let flags = sys::fcntl(fd, libc::F_GETFL, 0)?;
    if flags & O_PATH != 0 || files::is_internal(fd) { Err(Errno::EBADF) } else { Ok(()) }
}

/// A context that the guest does not see.
pub struct Hidden {
    id: usize,
    ring: RingMapping,
    bell: i32,
}

impl Hidden {
    /// io_setup(2), with the process's bell.
    ///
    /// # Errors
    /// What the kernel answers (`EAGAIN`: the machine's `aio-max-nr` is used up; `ENOMEM`);
    /// `EMFILE` for the bell; `ENOSYS` where the kernel has no AIO.
    pub fn new(nr_events: u32) -> Result<Self, Errno> {
        let bell = process::current().aio_bell()?;
        let mut id = 0_usize;
        // SAFETY: the kernel writes eight bytes to `id`.
        sys::check(unsafe {
            let (nr, to) = (nr_events as usize, (&raw mut id) as usize);
            sys::syscall6(libc::SYS_io_setup, nr, to, 0, 0, 0, 0)
        })?;
        match view(id) {
            Some(ring) => Ok(Self { id, ring, bell }),
            None => {
                destroy(id);
                Err(Errno::ENOMEM)
            }
        }
    }
}

/// The ring that the kernel has just mapped at `id`.
fn view(id: usize) -> Option<RingMapping> {
    let header = NonNull::new(id as *mut AtomicU32)?;
    // SAFETY: a ring begins with eight words; the kernel mapped it readable and writable.
    let [nr, magic] = [1, 4].map(|word| unsafe { header.add(word).as_ref() });
    if magic.load(Ordering::Relaxed) != MAGIC {
        return None;
    }
    // Whole pages: a header as long as one event, and as many events as fit.
    let bytes = (nr.load(Ordering::Relaxed) as usize).checked_add(1)?.checked_mul(32)?;
    if !bytes.is_multiple_of(4096) {
        return None;
    }
    let advice = libc::MADV_DONTFORK as usize;
    // SAFETY: advice about the mapping. Where it fails a child has pages that it does not use.
    unsafe { sys::syscall6(libc::SYS_madvise, id, bytes, advice, 0, 0, 0) };
    // SAFETY: 1. Mapped for `bytes` by the kernel until io_destroy, which the AIO layer calls when
    //    it no longer touches the ring. 2. No reference to it lives beyond this function.
    Some(unsafe { RingMapping::new(id as u64, header.cast(), bytes) })
}

fn destroy(id: usize) {
    // SAFETY: takes a number; the ring is not touched any more.
    unsafe { sys::syscall6(libc::SYS_io_destroy, id, 0, 0, 0, 0, 0) };
}

/// Adds 1 to an eventfd as completions do, up to 2^64-1: write(2) stops one short of that. By a
/// POLL of the eventfd itself that signals it, in a context that lasts no longer; where there can
/// be none the eventfd stays as it is. Takes as long as io_destroy(2).
pub fn signal(eventfd: i32) {
    const POLL: u64 = 5;
    const FLAG_RESFD: u64 = 1;
    let mut id = 0_usize;
    let to = (&raw mut id) as usize;
    // SAFETY: the kernel writes eight bytes to `id`.
    let made = unsafe { sys::syscall6(libc::SYS_io_setup, 1, to, 0, 0, 0, 0) };
    if made != 0 {
        return;
    }
    let fd = u64::from(eventfd.cast_unsigned()) << 32;
    let events = u64::from(libc::POLLIN.cast_unsigned());
    // struct iocb: opcode with fildes, then buf, flags with resfd.
    let mut iocb = [0, 0, POLL | fd, events, 0, 0, 0, FLAG_RESFD | fd];
    let pointer = (&raw mut iocb) as usize;
    let array = (&raw const pointer) as usize;
    // SAFETY: one pointer to an iocb of 64 bytes, whose key the kernel writes.
    unsafe { sys::syscall6(libc::SYS_io_submit, id, 1, array, 0, 0, 0) };
    destroy(id);
}

/// Whether io_submit(2) of this may wait for as long as it takes, until a signal comes.
fn may_wait(iocb: &KernelIocb) -> bool {
    const O_NONBLOCK: usize = libc::O_NONBLOCK as usize;
    let [flags, target] = [1, 2].map(|word: usize| iocb[word].load(Ordering::Relaxed));
    // Opcodes of PREAD, PWRITE, PREADV, PWRITEV.
    if !matches!(target & 0xffff, 0 | 1 | 7 | 8) || (flags >> 32) as i32 & rwf::NOWAIT != 0 {
        return false;
    }
    let fd = ((target >> 32) as u32).cast_signed();
    let kind = sys::fstat(fd).map(|it| it.st_mode & libc::S_IFMT);
    let waits = sys::fcntl(fd, libc::F_GETFL, 0).is_ok_and(|flags| flags & O_NONBLOCK == 0);
    waits && kind.is_ok_and(|kind| !matches!(kind, libc::S_IFREG | libc::S_IFBLK | libc::S_IFDIR))
}

impl KernelContext for Hidden {
    fn ring(&self) -> &RingMapping {
        &self.ring
    }

    fn bell(&self) -> i32 {
        self.bell
    }

    fn submit(&self, iocb: &KernelIocb) -> Result<(), Errno> {
        let pointer = iocb.as_ptr();
        let array = (&raw const pointer) as usize;
        let accepted = loop {
            // SAFETY: one pointer to an iocb of 64 bytes, both alive through the call; the guest's
            // buffer that it names is for the kernel to check.
            let answer = unsafe {
                let arguments = [self.id, 1, array, 0, 0, 0];
                inside::interruptible(libc::SYS_io_submit, arguments, None)
            };
            if answer != Err(Errno::EINTR) {
                break answer?;
            }
            // Not the kernel's answer: a handler is to run, and its signal would be pending in the
            // kernel. It ends all that would wait in this call of the guest's, and nothing else.
            let may_wait = may_wait(iocb);
            if may_wait {
                hurry(iocb);
            }
            // SAFETY: as above.
            let hurried = sys::check(unsafe {
                sys::syscall6(libc::SYS_io_submit, self.id, 1, array, 0, 0, 0)
            });
            if !may_wait || hurried != Err(Errno::EOPNOTSUPP) {
                break hurried?;
            }
            // A file that only knows how to wait: the handler runs first.
            take_time(iocb);
            inside::outside(|| ());
        };
        if accepted == 1 { Ok(()) } else { Err(Errno::EAGAIN) }
    }

    fn cancel(&self, iocb: &KernelIocb) -> bool {
        // SAFETY: an iocb of 64 bytes that the kernel reads; it writes no result.
        let answer = sys::check(unsafe {
            let at = iocb.as_ptr() as usize;
            sys::syscall6(libc::SYS_io_cancel, self.id, at, 0, 0, 0, 0)
        });
        matches!(answer, Err(Errno::EINPROGRESS) | Ok(_))
    }

    fn destroy(&self) {
        destroy(self.id);
    }
}
