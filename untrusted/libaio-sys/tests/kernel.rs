//! The bindings against the kernel of this machine, over real files.
#![allow(clippy::unwrap_used)]

use libaio_sys::*;
use std::ffi::{c_long, c_void};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicI64, Ordering};

#[repr(C, align(4096))]
struct Page([u8; 4096]);

struct Context(io_context_t);

impl Context {
    /// `None`, and a loud word, where the kernel has no native AIO.
    fn new(requests: i32) -> Option<Self> {
        let mut context: io_context_t = ptr::null_mut();
        // SAFETY: 1. `context` is a place for a context.
        match unsafe { io_setup(requests, &raw mut context) } {
            0 => Some(Self(context)),
            error if error == -libc::ENOSYS || error == -libc::EPERM => {
                let why = "this kernel or sandbox has no native AIO";
                skipped(format_args!("io_setup says {error}; {why}"));
                None
            }
            error => panic!("io_setup: {error}"),
        }
    }

    /// Submits one request, which must be accepted.
    ///
    /// # Safety
    /// As [`io_submit`].
    unsafe fn submit(&self, request: &mut iocb) {
        let mut requests = [&raw mut *request];
        // SAFETY: 1. One pointer to a live iocb. 2. The memory it names: the caller vouches.
        assert_eq!(unsafe { io_submit(self.0, 1, requests.as_mut_ptr()) }, 1);
    }

    fn event(&self) -> io_event {
        let mut event = io_event::ZEROED;
        // SAFETY: 1. The context is alive. 2. `event` is room for one. 3. A null timeout is allowed.
        let count = unsafe { io_getevents(self.0, 1, 1, &raw mut event, ptr::null_mut()) };
        assert_eq!(count, 1);
        event
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: 1. The context is alive and this is its last use.
        assert_eq!(unsafe { io_destroy(self.0) }, 0);
    }
}

/// A file that is gone when it is closed; `None`, and a loud word, without O_DIRECT.
fn direct(name: &str) -> Option<File> {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    let file = match file {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let remedy = "put the target directory on a disk file system";
            skipped(format_args!("{} refuses O_DIRECT; {remedy}", path.display()));
            None
        }
        file => Some(file.unwrap()),
    };
    std::fs::remove_file(&path).unwrap();
    file
}

fn eventfd() -> OwnedFd {
    // SAFETY: 1. No pointers. 2. The new descriptor is nobody else's.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn counted(eventfd: &OwnedFd) -> u64 {
    let mut count = 0_u64;
    // SAFETY: 1. `count` is eight bytes.
    let read = unsafe { libc::read(eventfd.as_raw_fd(), (&raw mut count).cast(), 8) };
    assert_eq!(read, 8);
    count
}

fn transfer(opcode: i16, file: &File, page: &mut Page, offset: i64, data: usize) -> iocb {
    let mut request = iocb::ZEROED;
    request.data = ptr::without_provenance_mut(data);
    request.aio_lio_opcode = opcode;
    request.aio_fildes = file.as_raw_fd();
    request.u.c = io_iocb_common {
        buf: (&raw mut page.0).cast(),
        nbytes: 4096,
        offset,
        __pad3: 0,
        flags: 0,
        resfd: 0,
    };
    request
}

#[test]
fn a_page_written_with_o_direct_reads_back_and_the_eventfd_counts_both() {
    let (Some(context), Some(file)) = (Context::new(4), direct("libaio_sys_direct")) else {
        return;
    };
    let eventfd = eventfd();
    let mut page = Page([0; 4096]);
    for (n, byte) in page.0.iter_mut().enumerate() {
        *byte = (n % 251) as u8;
    }
    let mut write = transfer(IO_CMD_PWRITE, &file, &mut page, 8192, 0x1111);
    write.u.c.flags = IOCB_FLAG_RESFD;
    write.u.c.resfd = eventfd.as_raw_fd().cast_unsigned();
    // SAFETY: 1. `page` is not touched until the event.
    unsafe { context.submit(&mut write) };
    let event = context.event();
    assert_eq!((event.data.addr(), event.res, event.res2), (0x1111, 4096, 0));
    assert_eq!(event.obj.addr(), (&raw const write).addr());

    let mut back = Page([0xff; 4096]);
    let mut read = transfer(IO_CMD_PREAD, &file, &mut back, 8192, usize::MAX);
    read.u.c.flags = IOCB_FLAG_RESFD;
    read.u.c.resfd = eventfd.as_raw_fd().cast_unsigned();
    // SAFETY: 1. `back` is not touched until the event.
    unsafe { context.submit(&mut read) };
    let event = context.event();
    assert_eq!((event.data.addr(), event.res, event.res2), (usize::MAX, 4096, 0));
    assert_eq!(back.0, page.0);
    assert_eq!(counted(&eventfd), 2);

    let mut flush = iocb::ZEROED;
    flush.aio_lio_opcode = IO_CMD_FDSYNC;
    flush.aio_fildes = file.as_raw_fd();
    // SAFETY: 1. A flush names no memory.
    unsafe { context.submit(&mut flush) };
    assert_eq!(context.event().res, 0);
}

#[test]
fn what_fails_later_comes_back_as_a_negative_number_in_the_event() {
    let (Some(context), Some(file)) = (Context::new(1), direct("libaio_sys_fault")) else {
        return;
    };
    let mut page = Page([0; 4096]);
    let mut write = transfer(IO_CMD_PWRITE, &file, &mut page, 0, 0);
    write.u.c.buf = ptr::null_mut();
    // SAFETY: 1. A write only reads memory, and at null there is none to read.
    unsafe { context.submit(&mut write) };
    assert_eq!(context.event().res.cast_signed(), -i64::from(libc::EFAULT));
}

#[test]
fn iovecs_gather_and_poll_tells_the_events_that_are_ready() {
    let (Some(context), Some(file)) = (Context::new(2), direct("libaio_sys_vectors")) else {
        return;
    };
    let (mut one, mut two) = (Page([1; 4096]), Page([2; 4096]));
    let vectors = [&mut one, &mut two]
        .map(|page| libc::iovec { iov_base: (&raw mut page.0).cast::<c_void>(), iov_len: 4096 });
    let mut write = iocb::ZEROED;
    write.aio_lio_opcode = IO_CMD_PWRITEV;
    write.aio_fildes = file.as_raw_fd();
    write.u.v = io_iocb_vector { vec: vectors.as_ptr().cast(), nr: 2, offset: 0 };
    // SAFETY: 1. The pages and the iovecs are not touched until the event.
    unsafe { context.submit(&mut write) };
    assert_eq!(context.event().res, 8192);

    let eventfd = eventfd();
    let mut poll = iocb::ZEROED;
    poll.aio_lio_opcode = IO_CMD_POLL;
    poll.aio_fildes = eventfd.as_raw_fd();
    poll.u.poll = io_iocb_poll { events: (libc::POLLIN | libc::POLLOUT).into(), __pad1: 0 };
    // SAFETY: 1. A poll names no memory.
    unsafe { context.submit(&mut poll) };
    assert_eq!(context.event().res, libc::POLLOUT as u64);
}

/// Linux fs/aio.c: a cancelled poll answers EINPROGRESS and its event comes through the ring.
#[test]
fn a_pending_poll_is_cancelled_through_the_ring_and_nothing_else_is() {
    let Some(context) = Context::new(1) else { return };
    let eventfd = eventfd();
    let mut poll = iocb::ZEROED;
    poll.data = ptr::without_provenance_mut(7);
    poll.aio_lio_opcode = IO_CMD_POLL;
    poll.aio_fildes = eventfd.as_raw_fd();
    poll.u.poll = io_iocb_poll { events: libc::POLLIN.into(), __pad1: 0 };
    let mut event = io_event::ZEROED;
    // SAFETY: 1. The context is alive. 2. `poll` and `event` live through the calls.
    unsafe {
        assert_eq!(io_cancel(context.0, &raw mut poll, &raw mut event), -libc::EINVAL);
        context.submit(&mut poll);
        assert_eq!(io_cancel(context.0, &raw mut poll, &raw mut event), -libc::EINPROGRESS);
    }
    let event = context.event();
    assert_eq!((event.data.addr(), event.res), (7, 0));
}

#[test]
fn errors_are_returned_as_negative_numbers() {
    if Context::new(1).is_none() {
        return;
    }
    let mut context: io_context_t = ptr::without_provenance_mut(1);
    // SAFETY: 1. `context` is a place for a context; the calls refuse what is none.
    unsafe {
        assert_eq!(io_setup(1, &raw mut context), -libc::EINVAL);
        assert_eq!(io_queue_init(0, &raw mut context), -libc::EINVAL);
        assert_eq!(io_destroy(ptr::null_mut()), -libc::EINVAL);
        assert_eq!(io_submit(ptr::null_mut(), 0, ptr::null_mut()), -libc::EINVAL);
    }
}

static CALLED: AtomicI64 = AtomicI64::new(0);

unsafe extern "C" fn called(_: io_context_t, _: *mut iocb, res: c_long, _: c_long) {
    CALLED.store(res, Ordering::SeqCst);
}

#[test]
fn queue_run_calls_back_and_pgetevents_takes_a_mask() {
    if Context::new(1).is_none() {
        return;
    }
    let eventfd = eventfd();
    let mut poll = iocb::ZEROED;
    poll.data = called as *mut c_void;
    poll.aio_lio_opcode = IO_CMD_POLL;
    poll.aio_fildes = eventfd.as_raw_fd();
    poll.u.poll = io_iocb_poll { events: libc::POLLOUT.into(), __pad1: 0 };
    let mut requests = [&raw mut poll];
    let mut event = io_event::ZEROED;
    let mut context: io_context_t = ptr::null_mut();
    let mut at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY:
    // 1. The context is alive from io_queue_init to io_queue_release. 2. A poll names no memory.
    // 3. The request's data is an io_callback_t. 4. A sigset_t of zeros is the empty set.
    unsafe {
        assert_eq!(io_queue_init(1, &raw mut context), 0);
        assert_eq!(io_submit(context, 1, requests.as_mut_ptr()), 1);
        assert_eq!(io_queue_run(context), 0);
        assert_eq!(CALLED.load(Ordering::SeqCst), i64::from(libc::POLLOUT));

        let mut none: libc::sigset_t = std::mem::zeroed();
        for mask in [ptr::null_mut(), &raw mut none] {
            let events = &raw mut event;
            assert_eq!(io_pgetevents(context, 1, 1, events, &raw mut at_once, mask), 0);
            assert_eq!(io_submit(context, 1, requests.as_mut_ptr()), 1);
            assert_eq!(io_pgetevents(context, 1, 1, events, ptr::null_mut(), mask), 1);
            assert_eq!(event.res, libc::POLLOUT as u64);
        }
        assert_eq!(io_queue_release(context), 0);
    }
}

/// Past the test harness, which swallows what a passing test prints.
fn skipped(why: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
