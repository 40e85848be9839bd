//! The guest's `struct aiocb`: what a request asks for, and where its result goes.
//!
//! The C library's own aio_error(3) and aio_return(3) read two private fields of the structure; the
//! results are written there, so that a program sees them whichever function it calls.
//!
//! Source: glibc's <aio.h> for x86-64; `aiocb64` is the same structure there.

use core::mem::offset_of;

use postern_trusted::{
    errno::Errno,
    platform::{Fault, GuestMemory},
};

use super::notice::Notice;
use crate::guest::{self, Guest};

/// Highest priority offset: AIO_PRIO_DELTA_MAX.
const MOST_PRIORITY: i32 = 20;
/// Place of `__error_code`.
const ERROR: usize = 112;
/// Place of `__return_value`.
const RETURN: usize = 120;
const BYTES: usize = size_of::<libc::aiocb>();
// The two private fields lie between the event and the offset, behind two words of the queue.
const _: () = assert!(
    offset_of!(libc::aiocb, aio_sigevent) + size_of::<libc::sigevent>() + 16 == ERROR
        && RETURN + 8 == offset_of!(libc::aiocb, aio_offset)
);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// aio_read(3).
    Read,
    /// aio_write(3).
    Write,
    /// aio_fsync(3).
    Sync,
    /// An operation of lio_listio(3) that there is not.
    Unknown,
}

/// Address of the guest's `struct aiocb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Control(pub u64);

/// What the guest wrote into it.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// aio_fildes.
    pub fd: i32,
    /// aio_lio_opcode.
    pub opcode: i32,
    /// aio_reqprio.
    pub priority: i32,
    /// aio_buf.
    pub buffer: u64,
    /// aio_nbytes.
    pub length: u64,
    /// aio_offset.
    pub offset: i64,
    /// aio_sigevent.
    pub notice: Notice,
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut word = [0; N];
    if let Some(part) = bytes.get(at..at + N) {
        word.copy_from_slice(part);
    }
    word
}

impl Control {
    /// Copies it.
    ///
    /// # Errors
    /// `EFAULT` if it cannot be read.
    pub fn read(self) -> Result<Asked, Errno> {
        let mut bytes = [0; BYTES];
        Guest.read(self.0, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        let event = offset_of!(libc::aiocb, aio_sigevent);
        Ok(Asked {
            fd: i32::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_fildes))),
            opcode: i32::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_lio_opcode))),
            priority: i32::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_reqprio))),
            buffer: u64::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_buf))),
            length: u64::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_nbytes))),
            offset: i64::from_ne_bytes(word(&bytes, offset_of!(libc::aiocb, aio_offset))),
            notice: Notice::of_event(&word(&bytes, event)),
        })
    }

    fn put(self, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        guest::write(self.0.wrapping_add(at as u64), bytes)
    }

    /// Marks it as in progress, after a look at the priority.
    ///
    /// # Errors
    /// `EINVAL` for a priority outside 0..=20, which is then the request's result as well; `EFAULT`.
    pub fn accept(self, operation: Operation, priority: i32) -> Result<(), Errno> {
        if operation == Operation::Sync {
            self.put(offset_of!(libc::aiocb, aio_reqprio), &0_i32.to_ne_bytes())?;
        } else if !(0..=MOST_PRIORITY).contains(&priority) {
            self.end(Err(Errno::EINVAL));
            return Err(Errno::EINVAL);
        }
        let opcode = match operation {
            Operation::Read => Some(libc::LIO_READ),
            Operation::Write => Some(libc::LIO_WRITE),
            Operation::Sync | Operation::Unknown => None,
        };
        if let Some(opcode) = opcode {
            self.put(offset_of!(libc::aiocb, aio_lio_opcode), &opcode.to_ne_bytes())?;
        }
        self.put(RETURN, &0_i64.to_ne_bytes())?;
        self.put(ERROR, &Errno::EINPROGRESS.0.to_ne_bytes())
    }

    /// Writes the result, the word that says so last. A guest that took its structure away in the
    /// meantime gets no result.
    pub fn end(self, result: Result<usize, Errno>) {
        let (value, errno) = match result {
            Ok(length) => (i64::try_from(length).unwrap_or(i64::MAX), 0),
            Err(errno) => (-1, errno.0),
        };
        let _ = self.put(RETURN, &value.to_ne_bytes());
        // The guest polls this word. Errnos differ from EINPROGRESS in their low byte alone, so a
        // copy byte by byte is as good as one store.
        core::sync::atomic::fence(core::sync::atomic::Ordering::Release);
        let _ = self.put(ERROR, &errno.to_ne_bytes());
    }

    /// What aio_error(3) says.
    ///
    /// # Errors
    /// `EFAULT` if it cannot be read.
    pub fn error(self) -> Result<i32, Errno> {
        let mut bytes = [0; 4];
        let at = self.0.wrapping_add(ERROR as u64);
        Guest.read(at, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        Ok(i32::from_ne_bytes(bytes))
    }

    /// Whether a request is made of it that has not ended.
    #[must_use]
    pub fn in_progress(self) -> bool {
        self.error() == Ok(Errno::EINPROGRESS.0)
    }
}
