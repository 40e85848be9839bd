//! Raw bindings to the system's libaio, the library over Linux native AIO (`io_submit` and its kin).
//!
//! Names, types and layouts are those of `<libaio.h>` 0.3.113 for 64-bit little-endian machines; a
//! test compiles a C program against the header and compares each offset. The flags and opcodes
//! that only `<linux/aio_abi.h>` names are here too. There is no safe wrapper: an accepted request
//! borrows its buffer until its event is reaped, which only its submitter can promise.
//!
//! The functions return a negative errno and leave the variable `errno` as it was. They are
//! thread-safe. [`io_getevents`] and [`io_pgetevents`] make no system call when the timeout is zero
//! and the ring that the kernel maps at the context's address is empty: argument errors then show
//! as 0 events, and a context that was destroyed is a bad pointer.
//!
//! Follows io_setup(2), io_submit(2), io_getevents(2), io_cancel(2), io_destroy(2).
#![no_std]
#![allow(non_camel_case_types)]

use core::ffi::{c_int, c_long, c_longlong, c_short, c_uint, c_ulong, c_void};
use core::mem::{offset_of, size_of};
use core::ptr;

/// What an [`io_context_t`] points to: the kernel's ring of events, mapped into the process.
#[repr(C)]
#[derive(Debug)]
pub struct io_context {
    _opaque: [u8; 0],
}

/// A context. Null before [`io_setup`], which refuses any other value with `EINVAL`.
pub type io_context_t = *mut io_context;

/// What [`io_queue_run`] calls for each event; it lies in the iocb's [`iocb::data`].
pub type io_callback_t =
    Option<unsafe extern "C" fn(ctx: io_context_t, iocb: *mut iocb, res: c_long, res2: c_long)>;

/// Opcode: read `nbytes` at `offset` into `buf`.
pub const IO_CMD_PREAD: c_short = 0;
/// Opcode: write `nbytes` of `buf` at `offset`.
pub const IO_CMD_PWRITE: c_short = 1;
/// Opcode: fsync(2). Every field of [`io_iocb_common`] but flags and resfd is zero.
pub const IO_CMD_FSYNC: c_short = 2;
/// Opcode: fdatasync(2). As [`IO_CMD_FSYNC`].
pub const IO_CMD_FDSYNC: c_short = 3;
/// Opcode: wait once for the poll(2) events in `u.poll.events`.
pub const IO_CMD_POLL: c_short = 5;
/// Opcode that the header names and Linux refuses with `EINVAL`.
pub const IO_CMD_NOOP: c_short = 6;
/// Opcode: read into `nbytes` iovecs at `buf`.
pub const IO_CMD_PREADV: c_short = 7;
/// Opcode: write from `nbytes` iovecs at `buf`.
pub const IO_CMD_PWRITEV: c_short = 8;

/// [`io_iocb_common::flags`]: [`io_iocb_common::resfd`] is an eventfd to signal at completion.
pub const IOCB_FLAG_RESFD: c_uint = 1 << 0;
/// [`io_iocb_common::flags`]: [`iocb::aio_reqprio`] is an I/O priority (ioprio_set(2)).
pub const IOCB_FLAG_IOPRIO: c_uint = 1 << 1;

/// A request's operands for all opcodes; the other three views lie over its first members.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct io_iocb_common {
    /// The buffer, or the iovecs. `aio_buf` to the kernel.
    pub buf: *mut c_void,
    /// Its length in bytes, or the number of iovecs. `aio_nbytes` to the kernel.
    pub nbytes: c_ulong,
    /// Byte offset in the file.
    pub offset: c_longlong,
    /// Zero, or the request is refused with `EINVAL`. `aio_reserved2` to the kernel.
    pub __pad3: c_longlong,
    /// `IOCB_FLAG_*`. `aio_flags` to the kernel.
    pub flags: c_uint,
    /// The eventfd of [`IOCB_FLAG_RESFD`]. `aio_resfd` to the kernel.
    pub resfd: c_uint,
}

/// A request's operands with iovecs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct io_iocb_vector {
    /// The iovecs (`struct iovec`).
    pub vec: *const c_void,
    /// Their number.
    pub nr: c_ulong,
    /// Byte offset in the file.
    pub offset: c_longlong,
}

/// A request's operands for [`IO_CMD_POLL`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct io_iocb_poll {
    /// poll(2) events.
    pub events: c_int,
    /// Zero.
    pub __pad1: c_int,
}

/// A request's operands with a socket address; no opcode of Linux uses them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct io_iocb_sockaddr {
    /// The address (`struct sockaddr`).
    pub addr: *mut c_void,
    /// Its length in bytes.
    pub len: c_ulong,
}

/// The views of a request's operands.
#[repr(C)]
#[derive(Clone, Copy)]
pub union iocb_operands {
    /// For all opcodes.
    pub c: io_iocb_common,
    /// With iovecs.
    pub v: io_iocb_vector,
    /// For [`IO_CMD_POLL`].
    pub poll: io_iocb_poll,
    /// With a socket address.
    pub saddr: io_iocb_sockaddr,
}

/// A request. The kernel copies it at submission and writes only [`Self::key`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct iocb {
    /// Comes back in [`io_event::data`]. `aio_data` to the kernel.
    pub data: *mut c_void,
    /// Written by the kernel at submission, read by [`io_cancel`]. `aio_key` to the kernel.
    pub key: c_uint,
    /// `RWF_*` of preadv2(2).
    pub aio_rw_flags: c_uint,
    /// `IO_CMD_*`.
    pub aio_lio_opcode: c_short,
    /// I/O priority, with [`IOCB_FLAG_IOPRIO`].
    pub aio_reqprio: c_short,
    /// The file's descriptor.
    pub aio_fildes: c_int,
    /// The operands.
    pub u: iocb_operands,
}

impl iocb {
    /// All bytes zero: where building a request starts.
    pub const ZEROED: Self = Self {
        data: ptr::null_mut(),
        key: 0,
        aio_rw_flags: 0,
        aio_lio_opcode: 0,
        aio_reqprio: 0,
        aio_fildes: 0,
        u: iocb_operands {
            c: io_iocb_common {
                buf: ptr::null_mut(),
                nbytes: 0,
                offset: 0,
                __pad3: 0,
                flags: 0,
                resfd: 0,
            },
        },
    };
}

/// What became of a request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct io_event {
    /// The request's [`iocb::data`].
    pub data: *mut c_void,
    /// Where the request's iocb lay when it was submitted. Not to be followed: it may be gone.
    pub obj: *mut iocb,
    /// Bytes done or poll(2) events; a negative errno in two's complement.
    pub res: c_ulong,
    /// Zero.
    pub res2: c_ulong,
}

impl io_event {
    /// All bytes zero: room for [`io_getevents`] to write to.
    pub const ZEROED: Self = Self { data: ptr::null_mut(), obj: ptr::null_mut(), res: 0, res2: 0 };
}

// The kernel's layout (`struct iocb` and `struct io_event` of linux/aio_abi.h), which is the same
// for every 64-bit little-endian machine.
const _: () = assert!(cfg!(all(target_pointer_width = "64", target_endian = "little")));
const _: () = assert!(size_of::<iocb>() == 64 && align_of::<iocb>() == 8);
const _: () = assert!(offset_of!(iocb, data) == 0 && offset_of!(iocb, key) == 8);
const _: () = assert!(offset_of!(iocb, aio_rw_flags) == 12);
const _: () = assert!(offset_of!(iocb, aio_lio_opcode) == 16);
const _: () = assert!(offset_of!(iocb, aio_reqprio) == 18);
const _: () = assert!(offset_of!(iocb, aio_fildes) == 20 && offset_of!(iocb, u) == 24);
const _: () = assert!(size_of::<io_iocb_common>() == 40);
const _: () = assert!(offset_of!(io_iocb_common, nbytes) == 8);
const _: () = assert!(offset_of!(io_iocb_common, offset) == 16);
const _: () = assert!(offset_of!(io_iocb_common, __pad3) == 24);
const _: () = assert!(offset_of!(io_iocb_common, flags) == 32);
const _: () = assert!(offset_of!(io_iocb_common, resfd) == 36);
const _: () = assert!(size_of::<io_event>() == 32 && align_of::<io_event>() == 8);
const _: () = assert!(offset_of!(io_event, obj) == 8 && offset_of!(io_event, res) == 16);
const _: () = assert!(offset_of!(io_event, res2) == 24);

// Linked by build.rs.
unsafe extern "C" {
    /// io_setup(2): makes a context with room for at least `maxevents` requests.
    ///
    /// 0, or `-EAGAIN` (fs.aio-max-nr is used up), `-EINVAL`, `-EFAULT`, `-ENOMEM`, `-ENOSYS`.
    ///
    /// # Safety
    /// `ctxp` leads to a readable and writable context; it is written on success only.
    pub fn io_setup(maxevents: c_int, ctxp: *mut io_context_t) -> c_int;

    /// io_destroy(2): waits for every request, drops unread events, unmaps the ring.
    ///
    /// 0, or `-EINVAL` if `ctx` is no context.
    ///
    /// # Safety
    /// No thread uses `ctx` afterwards, nor the ring at its address.
    pub fn io_destroy(ctx: io_context_t) -> c_int;

    /// io_submit(2): hands over up to `nr` requests in order and stops at the first refusal.
    ///
    /// How many were accepted; or, if none, `-EAGAIN` (no room), `-EBADF`, `-EFAULT`, `-EINVAL`.
    ///
    /// # Safety
    /// `ios` leads to `nr` pointers to readable iocbs whose key is writable. The memory an accepted
    /// request names is not used otherwise until its event was reaped or the context destroyed.
    pub fn io_submit(ctx: io_context_t, nr: c_long, ios: *mut *mut iocb) -> c_int;

    /// io_cancel(2): ends a pending [`IO_CMD_POLL`]; Linux cancels nothing else.
    ///
    /// `-EINPROGRESS` on success: the event comes through the ring. `-EINVAL` if there is nothing
    /// to cancel. Never 0, and `evt` is never written.
    ///
    /// # Safety
    /// `iocb` leads to the iocb that was submitted.
    pub fn io_cancel(ctx: io_context_t, iocb: *mut iocb, evt: *mut io_event) -> c_int;

    /// io_getevents(2): reaps up to `nr` events, waiting until there are `min_nr` or for `timeout`.
    ///
    /// How many, or `-EINVAL`, `-EFAULT`, `-EINTR`. With `min_nr` 0 it never waits.
    ///
    /// # Safety
    /// `ctx` is alive and `events` has room for `nr`; `timeout` is null (for ever) or readable.
    pub fn io_getevents(
        ctx: io_context_t,
        min_nr: c_long,
        nr: c_long,
        events: *mut io_event,
        timeout: *mut libc::timespec,
    ) -> c_int;

    /// As [`io_getevents`], with `sigmask` (null for none) in force during the wait.
    ///
    /// # Safety
    /// As [`io_getevents`]; `sigmask` is null or readable.
    pub fn io_pgetevents(
        ctx: io_context_t,
        min_nr: c_long,
        nr: c_long,
        events: *mut io_event,
        timeout: *mut libc::timespec,
        sigmask: *mut libc::sigset_t,
    ) -> c_int;

    /// [`io_setup`] with the context set to null before. `-EINVAL` if `maxevents` is not above 0.
    ///
    /// # Safety
    /// `ctxp` leads to a writable context.
    pub fn io_queue_init(maxevents: c_int, ctxp: *mut io_context_t) -> c_int;

    /// [`io_destroy`].
    ///
    /// # Safety
    /// As [`io_destroy`].
    pub fn io_queue_release(ctx: io_context_t) -> c_int;

    /// Reaps what is there, without waiting, and calls the [`io_callback_t`] in each event's data.
    ///
    /// 0, or a negative errno as [`io_getevents`].
    ///
    /// # Safety
    /// `ctx` is alive and the data of every request in it is an [`io_callback_t`].
    pub fn io_queue_run(ctx: io_context_t) -> c_int;
}
