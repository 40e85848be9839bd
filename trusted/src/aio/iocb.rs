//! `struct iocb` and the checks that io_submit makes on it, in the kernel's order.
//!
//! The iocb is copied once from the guest; every decision is made on the copy. Follows
//! `__io_submit_one` and its callees in Linux fs/aio.c, `kiocb_set_rw_flags` and
//! `rw_verify_area`.

use alloc::sync::Arc;

use super::{AioHost, FileTraits, GuestVector, Op, Request, RwFlags};
use crate::{errno::Errno, platform::Buffer};

/// Bytes of a `struct iocb`.
pub(super) const IOCB_BYTES: usize = 64;
/// Where `aio_key` lies in it.
pub(super) const KEY_OFFSET: u64 = 8;
/// What Linux stores into `aio_key` of an accepted iocb (`KIOCB_KEY`).
pub(super) const KEY: u32 = 0;

/// `aio_flags`: `aio_resfd` is an eventfd to signal.
const FLAG_RESFD: u32 = 1;
/// `aio_flags`: `aio_reqprio` is an I/O priority.
const FLAG_IOPRIO: u32 = 2;

/// `aio_lio_opcode`.
mod opcode {
    pub const PREAD: u16 = 0;
    pub const PWRITE: u16 = 1;
    pub const FSYNC: u16 = 2;
    pub const FDSYNC: u16 = 3;
    pub const POLL: u16 = 5;
    pub const PREADV: u16 = 7;
    pub const PWRITEV: u16 = 8;
}

/// I/O priority classes.
mod ioprio {
    pub const NONE: u16 = 0;
    pub const REALTIME: u16 = 1;
    pub const BEST_EFFORT: u16 = 2;
    pub const IDLE: u16 = 3;
}

/// Events of POLL that are always asked for: POLLERR | POLLHUP.
const POLL_ALWAYS: u16 = 0x18;

/// A `struct iocb`, copied. `aio_key` is not looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Iocb {
    pub(super) data: u64,
    rw_flags: u32,
    opcode: u16,
    priority: u16,
    pub(super) fd: i32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    flags: u32,
    eventfd: i32,
}

/// What a checked iocb asks for.
pub(super) enum Asked {
    /// The file's work.
    Request(Request),
    /// A poll whose answer is known already: these events.
    Ready(u16),
}

impl Iocb {
    /// Reads the fields, and refuses what is refused before any descriptor is looked at.
    pub(super) fn parse(bytes: &[u8; IOCB_BYTES]) -> Result<Self, Errno> {
        let mut words = [0_u64; IOCB_BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [data, key_flags, op_prio_fd, buf, nbytes, offset, reserved2, flags_eventfd] = words;
        if reserved2 != 0 || nbytes.cast_signed() < 0 {
            return Err(Errno::EINVAL);
        }
        #[allow(clippy::cast_possible_truncation)]
        Ok(Self {
            data,
            rw_flags: (key_flags >> 32) as u32,
            opcode: op_prio_fd as u16,
            priority: (op_prio_fd >> 16) as u16,
            fd: ((op_prio_fd >> 32) as u32).cast_signed(),
            buf,
            nbytes,
            offset: offset.cast_signed(),
            flags: flags_eventfd as u32,
            eventfd: ((flags_eventfd >> 32) as u32).cast_signed(),
        })
    }

    /// The eventfd's descriptor, if completion is to be signalled.
    pub(super) const fn eventfd(&self) -> Option<i32> {
        if self.flags & FLAG_RESFD != 0 { Some(self.eventfd) } else { None }
    }

    /// The checks from the opcode on.
    pub(super) fn build(
        &self,
        host: &Arc<dyn AioHost>,
        file: &FileTraits,
        submitted_ns: u64,
    ) -> Result<Asked, Errno> {
        let sync = |op| {
            if self.buf != 0 || self.offset != 0 || self.nbytes != 0 || self.rw_flags != 0 {
                return Err(Errno::EINVAL);
            }
            if !file.has_fsync {
                return Err(Errno::EINVAL);
            }
            Ok(Asked::Request(Request {
                op,
                offset: 0,
                buffer: GuestVector::empty(host.clone()),
                flags: RwFlags::default(),
                submitted_ns,
            }))
        };
        match self.opcode {
            opcode::PREAD => self.transfer(host, file, Op::Read, false, submitted_ns),
            opcode::PREADV => self.transfer(host, file, Op::Read, true, submitted_ns),
            opcode::PWRITE => self.transfer(host, file, Op::Write, false, submitted_ns),
            opcode::PWRITEV => self.transfer(host, file, Op::Write, true, submitted_ns),
            opcode::FSYNC => sync(Op::Fsync),
            opcode::FDSYNC => sync(Op::Fdatasync),
            opcode::POLL => self.poll(file),
            _ => Err(Errno::EINVAL),
        }
    }

    fn transfer(
        &self,
        host: &Arc<dyn AioHost>,
        file: &FileTraits,
        op: Op,
        vectored: bool,
        submitted_ns: u64,
    ) -> Result<Asked, Errno> {
        if self.flags & FLAG_IOPRIO != 0 {
            check_priority(self.priority, &**host)?;
        }
        let flags = rw_flags(self.rw_flags, op, file)?;
        if !(if op == Op::Read { file.readable } else { file.writable }) {
            return Err(Errno::EBADF);
        }
        if !file.has_data {
            return Err(Errno::EINVAL);
        }
        let buffer = if vectored {
            // The count is an unsigned int in the kernel.
            #[allow(clippy::cast_possible_truncation)]
            let count = self.nbytes as u32;
            GuestVector::vector(host.clone(), self.buf, count)?
        } else {
            GuestVector::range(host.clone(), self.buf, self.nbytes)?
        };
        // At most MAX_RW_BYTES, so the length is exact.
        let end = i64::try_from(buffer.len()).ok().and_then(|len| self.offset.checked_add(len));
        let (Ok(offset), Some(_)) = (u64::try_from(self.offset), end) else {
            return Err(Errno::EINVAL);
        };
        Ok(Asked::Request(Request { op, offset, buffer, flags, submitted_ns }))
    }

    /// A file without wait queues answers at once or, having nothing to wait on, not at all.
    fn poll(&self, file: &FileTraits) -> Result<Asked, Errno> {
        let Ok(events) = u16::try_from(self.buf) else { return Err(Errno::EINVAL) };
        if self.offset != 0 || self.nbytes != 0 || self.rw_flags != 0 {
            return Err(Errno::EINVAL);
        }
        match file.ready & (events | POLL_ALWAYS) {
            0 => Err(Errno::EINVAL),
            ready => Ok(Asked::Ready(ready)),
        }
    }
}

/// `ioprio_check_cap`.
fn check_priority(priority: u16, host: &dyn AioHost) -> Result<(), Errno> {
    // Three bits of level: every level of a class that has levels is valid.
    let (class, level) = (priority >> 13, priority & 7);
    match class {
        ioprio::REALTIME if !host.may_use_realtime_io() => Err(Errno::EPERM),
        ioprio::NONE if level != 0 => Err(Errno::EINVAL),
        ioprio::NONE | ioprio::REALTIME | ioprio::BEST_EFFORT | ioprio::IDLE => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

/// `kiocb_set_rw_flags`, on top of what the descriptor itself demands.
fn rw_flags(asked: u32, op: Op, file: &FileTraits) -> Result<RwFlags, Errno> {
    let asks = |bit| asked & bit != 0;
    let refuse = |refused: bool, errno| if refused { Err(errno) } else { Ok(()) };
    refuse(asked & !RwFlags::KNOWN != 0, Errno::EOPNOTSUPP)?;
    refuse(asks(RwFlags::APPEND) && asks(RwFlags::NOAPPEND), Errno::EINVAL)?;
    refuse(asks(RwFlags::NOWAIT) && !file.nowait, Errno::EOPNOTSUPP)?;
    refuse(asks(RwFlags::ATOMIC) && (op != Op::Write || !file.atomic), Errno::EOPNOTSUPP)?;
    refuse(asks(RwFlags::DONTCACHE) && !file.dontcache, Errno::EOPNOTSUPP)?;

    let mut bits = asked & !(RwFlags::HIPRI | RwFlags::NOAPPEND);
    if file.dsync {
        bits |= RwFlags::DSYNC;
    }
    if file.sync {
        bits |= RwFlags::SYNC;
    }
    if file.append {
        if !asks(RwFlags::NOAPPEND) {
            bits |= RwFlags::APPEND;
        } else if file.append_only {
            return Err(Errno::EPERM);
        }
    }
    Ok(RwFlags::new(bits))
}
