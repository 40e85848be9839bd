//! The AIO calls and their structures, as the kernel lays them out.

use std::time::Duration;

use crate::sys::{SYS_IO_PGETEVENTS, call, load32, load64, put, store32};

/// Opcodes.
pub mod op {
    pub const PREAD: u16 = 0;
    pub const PWRITE: u16 = 1;
    pub const FSYNC: u16 = 2;
    pub const FDSYNC: u16 = 3;
    pub const POLL: u16 = 5;
    pub const PREADV: u16 = 7;
    pub const PWRITEV: u16 = 8;
}

/// `IOCB_FLAG_*`.
pub mod flag {
    pub const RESFD: u32 = 1;
    pub const IOPRIO: u32 = 2;
}

/// `RWF_*`.
pub mod rwf {
    pub const DSYNC: u32 = 0x2;
    pub const SYNC: u32 = 0x4;
    pub const NOWAIT: u32 = 0x8;
    pub const APPEND: u32 = 0x10;
    pub const NOAPPEND: u32 = 0x20;
    pub const NOSIGNAL: u32 = 0x100;
}

/// `struct iocb`, 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Iocb {
    pub data: u64,
    pub key: u32,
    pub rw_flags: u32,
    pub opcode: u16,
    pub reqprio: u16,
    pub fildes: i32,
    pub buf: u64,
    pub nbytes: u64,
    pub offset: i64,
    pub reserved2: u64,
    pub flags: u32,
    pub resfd: i32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

impl Iocb {
    /// A request of any kind.
    pub fn new(opcode: u16, fildes: i32, buf: u64, nbytes: u64, offset: i64) -> Self {
        Self { opcode, fildes, buf, nbytes, offset, ..Self::default() }
    }

    /// POLL for `events`.
    pub fn poll(fildes: i32, events: i16) -> Self {
        Self::new(op::POLL, fildes, u64::from(events.cast_unsigned()), 0, 0)
    }

    /// Signals the eventfd `resfd`.
    pub fn signalling(self, resfd: i32) -> Self {
        Self { flags: self.flags | flag::RESFD, resfd, ..self }
    }

    /// With this `data`.
    pub fn data(self, data: u64) -> Self {
        Self { data, ..self }
    }

    /// With these `RWF_*`.
    pub fn rw(self, rw_flags: u32) -> Self {
        Self { rw_flags, ..self }
    }

    /// Stores it at an address.
    pub fn store(&self, at: u64) {
        put(at, self);
    }
}

/// Offset of `aio_key`.
pub const KEY: u64 = 8;

/// `struct io_event`, 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub data: u64,
    pub obj: u64,
    pub res: i64,
    pub res2: i64,
}

impl Event {
    /// The event at an address.
    pub fn load(at: u64) -> Self {
        let [data, obj, res, res2] = [0, 8, 16, 24].map(|offset| load64(at + offset));
        Self { data, obj, res: res.cast_signed(), res2: res2.cast_signed() }
    }
}

/// Bytes of an event.
pub const EVENT: u64 = 32;

/// A context and its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context(pub u64);

impl Context {
    fn header(self, index: u64) -> u32 {
        load32(self.0 + 4 * index)
    }

    /// Place in the process's table.
    pub fn id(self) -> u32 {
        self.header(0)
    }

    /// Slots of the ring.
    pub fn slots(self) -> u32 {
        self.header(1)
    }

    /// Where the next event is read.
    pub fn head(self) -> u32 {
        self.header(2)
    }

    /// Where the next event is stored.
    pub fn tail(self) -> u32 {
        self.header(3)
    }

    /// The eight words of the header.
    pub fn words(self) -> [u32; 8] {
        [0, 1, 2, 3, 4, 5, 6, 7].map(|index| self.header(index))
    }

    /// Stores a word of the header.
    pub fn set_word(self, index: u64, value: u32) {
        store32(self.0 + 4 * index, value);
    }

    /// Events in the ring.
    pub fn ready(self) -> u32 {
        let (head, tail, slots) = (self.head(), self.tail(), self.slots().max(1));
        (tail + slots - head % slots) % slots
    }

    /// An event in the ring.
    pub fn event(self, slot: u32) -> Event {
        Event::load(self.0 + 32 + u64::from(slot) * EVENT)
    }

    /// Bytes of the ring's mapping.
    pub fn bytes(self) -> u64 {
        (32 + u64::from(self.slots()) * EVENT).next_multiple_of(4096)
    }
}

/// io_setup(2).
pub fn setup(nr: u64, context_at: u64) -> i64 {
    call(libc::SYS_io_setup, &[nr, context_at])
}

/// io_destroy(2).
pub fn destroy(context: u64) -> i64 {
    call(libc::SYS_io_destroy, &[context])
}

/// io_submit(2).
pub fn submit(context: u64, nr: i64, list: u64) -> i64 {
    call(libc::SYS_io_submit, &[context, nr.cast_unsigned(), list])
}

/// io_getevents(2).
pub fn get(context: u64, min: i64, nr: i64, events: u64, timeout: u64) -> i64 {
    let (min, nr) = (min.cast_unsigned(), nr.cast_unsigned());
    call(libc::SYS_io_getevents, &[context, min, nr, events, timeout])
}

/// io_pgetevents(2).
pub fn get_masked(context: u64, min: i64, nr: i64, events: u64, timeout: u64, signals: u64) -> i64 {
    let (min, nr) = (min.cast_unsigned(), nr.cast_unsigned());
    call(SYS_IO_PGETEVENTS, &[context, min, nr, events, timeout, signals])
}

/// io_cancel(2).
pub fn cancel(context: u64, iocb: u64, result: u64) -> i64 {
    call(libc::SYS_io_cancel, &[context, iocb, result])
}

/// A `struct timespec`.
pub fn timespec(time: Duration) -> [i64; 2] {
    [i64::try_from(time.as_secs()).unwrap_or(i64::MAX), i64::from(time.subsec_nanos())]
}
