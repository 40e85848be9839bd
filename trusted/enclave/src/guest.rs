//! The program's side: its memory, its one open file, and AIO requests made of them.
//!
//! The memory has addresses of its own, so that a program in an enclave does what one outside does:
//! it writes iocbs, calls io_submit and io_getevents, and reads events.

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use std::sync::Arc;

use postern_trusted::{
    aio::{
        AioContexts, AioFile, AioHost, Descriptor, EventCounter, KernelContext, RingMapping, Wait,
        WaitEnd, WaitKey,
    },
    errno::Errno,
    platform::{Fault, GuestMemory},
    sync::Lock,
};

/// What runs the program's requests.
pub trait Runtime: Send + Sync + 'static {
    /// The open file.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    fn file(&self) -> Result<Arc<dyn AioFile>, Errno>;

    /// Monotonic nanoseconds.
    fn now_ns(&self) -> u64;

    /// Lets requests progress. Those that complete on submission need none.
    fn drive(&self) {}

    /// As [`AioHost::wait`]. Nobody waits for requests that complete on submission.
    fn wait(&self, _: &Wait<'_>) -> WaitEnd {
        WaitEnd::TimedOut
    }
}

/// The descriptor of the volume.
const FILE: u64 = 3;
/// Where the ring of completions lies.
const RING: u64 = 4096;
/// Where the program's memory begins: the id of its context, its iocbs, pointers to them, its
/// events and its buffers.
const MEMORY: u64 = 1 << 24;
const IOCBS: u64 = MEMORY + 4096;

/// The most requests in flight.
pub const MOST: usize = 1024;

struct Guest {
    runtime: Arc<dyn Runtime>,
    memory: Lock<Vec<u8>>,
    /// The ring of completions, once there is one.
    ring: Lock<&'static [AtomicU64]>,
}

impl Guest {
    /// Bytes of the ring, which the program may read.
    fn read_ring(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        for (at, byte) in (from..).zip(out) {
            let at = at.checked_sub(RING).ok_or(Fault)?;
            let word = self.ring.lock().get((at / 8) as usize).ok_or(Fault)?.load(Relaxed);
            *byte = word.to_le_bytes()[(at % 8) as usize];
        }
        Ok(())
    }

    fn within(from: u64, length: usize, all: usize) -> Result<core::ops::Range<usize>, Fault> {
        let start =
            from.checked_sub(MEMORY).and_then(|at| usize::try_from(at).ok()).ok_or(Fault)?;
        let end = start.checked_add(length).filter(|end| *end <= all).ok_or(Fault)?;
        Ok(start..end)
    }
}

impl GuestMemory for Guest {
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        if from < MEMORY {
            return self.read_ring(from, out);
        }
        let memory = self.memory.lock();
        out.copy_from_slice(&memory[Self::within(from, out.len(), memory.len())?]);
        Ok(())
    }

    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        let mut memory = self.memory.lock();
        let range = Self::within(to, data.len(), memory.len())?;
        memory[range].copy_from_slice(data);
        Ok(())
    }
}

impl AioHost for Guest {
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno> {
        if bytes as u64 > MEMORY - RING {
            return Err(Errno::ENOMEM);
        }
        let room: &[AtomicU64] = Vec::leak((0..bytes / 8).map(|_| AtomicU64::new(0)).collect());
        *self.ring.lock() = room;
        // SAFETY: so many bytes, alive for ever, and atomics: nobody's alone.
        Ok(unsafe { RingMapping::new(RING, NonNull::from(room).cast(), bytes) })
    }

    fn unmap_ring(&self, _: RingMapping) {}

    fn file(&self, descriptor: i32) -> Result<Descriptor, Errno> {
        if u64::try_from(descriptor) == Ok(FILE) {
            Ok(Descriptor::Served(self.runtime.file()?))
        } else {
            Err(Errno::EBADF)
        }
    }

    fn kernel_context(&self, _: u32) -> Result<Arc<dyn KernelContext>, Errno> {
        Err(Errno::ENOSYS)
    }

    fn event_counter(&self, _: i32) -> Result<Arc<dyn EventCounter>, Errno> {
        Err(Errno::EBADF)
    }

    fn possible_cpus(&self) -> u32 {
        1
    }

    fn aio_max_nr(&self) -> u64 {
        65_536
    }

    fn charge(&self, _: u32) -> Result<(), Errno> {
        Ok(())
    }

    fn uncharge(&self, _: u32) {}

    fn may_use_realtime_io(&self) -> bool {
        false
    }

    fn now_ns(&self) -> u64 {
        self.runtime.now_ns()
    }

    fn drive(&self) {
        self.runtime.drive();
    }

    fn wait(&self, wait: Wait<'_>) -> WaitEnd {
        self.runtime.wait(&wait)
    }

    fn wake(&self, _: WaitKey, _: u32) {}

    fn reaps_in_user_space(&self) {}
}

/// What a request is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Read a block.
    Read = 0,
    /// Write a block.
    Write = 1,
    /// Make durable what is written.
    Sync = 3, // IOCB_CMD_FDSYNC
}

/// A program with one AIO context: up to so many requests at once, each with a buffer of its own.
pub struct Requests {
    guest: Arc<Guest>,
    aio: AioContexts,
    depth: usize,
    bytes: usize,
}

impl Requests {
    /// A program that makes `depth` requests of `bytes` bytes at once.
    ///
    /// # Errors
    /// What io_setup(2) says; `EINVAL` for more than [`MOST`].
    pub fn new(runtime: Arc<dyn Runtime>, depth: usize, bytes: usize) -> Result<Self, Errno> {
        if !(1..=MOST).contains(&depth) {
            return Err(Errno::EINVAL);
        }
        let all = 4096 + depth * (64 + 8 + 32 + bytes);
        let memory = Lock::new(vec![0; all]);
        let guest = Arc::new(Guest { runtime, memory, ring: Lock::new(&[]) });
        let aio = AioContexts::new(guest.clone());
        aio.io_setup(depth as u32, MEMORY)?;
        Ok(Self { guest, aio, depth, bytes })
    }

    fn pointers(&self) -> u64 {
        IOCBS + 64 * self.depth as u64
    }

    fn events(&self) -> u64 {
        self.pointers() + 8 * self.depth as u64
    }

    fn buffer(&self, slot: usize) -> u64 {
        self.events() + 32 * self.depth as u64 + (slot * self.bytes) as u64
    }

    /// Requests at once.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Fills the buffer of a slot.
    ///
    /// # Errors
    /// `EFAULT` for more than it holds.
    pub fn put(&self, slot: usize, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.len() > self.bytes {
            return Err(Errno::EFAULT);
        }
        self.guest.write(self.buffer(slot), bytes).map_err(|Fault| Errno::EFAULT)
    }

    /// Copies the buffer of a slot.
    ///
    /// # Errors
    /// `EFAULT` for more than it holds.
    pub fn get(&self, slot: usize, bytes: &mut [u8]) -> Result<(), Errno> {
        if bytes.len() > self.bytes {
            return Err(Errno::EFAULT);
        }
        self.guest.read(self.buffer(slot), bytes).map_err(|Fault| Errno::EFAULT)
    }

    /// io_submit(2): a request for each of `calls`, by the slot whose buffer it uses and the
    /// block's place in the file.
    ///
    /// # Errors
    /// What io_submit says; `EAGAIN` if it did not take all.
    pub fn submit(&self, calls: &[(usize, Call, u64)]) -> Result<(), Errno> {
        for (n, (slot, call, place)) in (0..).zip(calls) {
            // struct iocb: data; key and flags; opcode, priority, descriptor; buffer; bytes; offset.
            let iocb = IOCBS + 64 * *slot as u64;
            let (to, bytes) = match call {
                Call::Sync => (0, 0),
                _ => (self.buffer(*slot), self.bytes as u64),
            };
            let opcode = *call as u64 | FILE << 32;
            let at = place * bytes;
            let words = [*slot as u64, 0, opcode, to, bytes, at, 0, 0].map(u64::to_le_bytes);
            let pointer = self.pointers() + 8 * n;
            let written = self.guest.write(iocb, words.as_flattened());
            written
                .and_then(|()| self.guest.write(pointer, &iocb.to_le_bytes()))
                .map_err(|Fault| Errno::EFAULT)?;
        }
        let count = calls.len();
        match self.aio.io_submit(RING, count as i64, self.pointers())? {
            taken if taken == count => Ok(()),
            _ => Err(Errno::EAGAIN),
        }
    }

    /// io_getevents(2): waits for at least `least`; hands each slot and its result to `each`.
    ///
    /// # Errors
    /// What io_getevents says.
    pub fn reap(&self, least: usize, mut each: impl FnMut(usize, i64)) -> Result<usize, Errno> {
        let events = self.events();
        let got = self.aio.io_getevents(RING, least as i64, self.depth as i64, events, 0)?;
        for event in (0..got as u64).map(|n| events + 32 * n) {
            let mut words = [[0; 8]; 3];
            let read = self.guest.read(event, words.as_flattened_mut());
            read.map_err(|Fault| Errno::EFAULT)?;
            each(u64::from_le_bytes(words[0]) as usize, i64::from_le_bytes(words[2]));
        }
        Ok(got)
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// `EIO`, or what the calls say.
    pub fn sync(&self) -> Result<(), Errno> {
        self.submit(&[(0, Call::Sync, 0)])?;
        let mut result = 0;
        self.reap(1, |_, answer| result = answer)?;
        if result == 0 { Ok(()) } else { Err(Errno::EIO) }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // The context waits for what is in flight.
        let _ = self.aio.io_destroy(RING);
    }
}
