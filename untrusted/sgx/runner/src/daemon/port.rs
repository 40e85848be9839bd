//! The memory of a port and its doorbells.
#![allow(unsafe_code)]

use core::ptr::NonNull;
use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use super::{Bell, clock::Clock};

/// The longest port.
const LONGEST: usize = 1 << 29;

/// A port: memory that enclave and daemon share, in no allocation of the enclave's.
pub struct Port {
    memory: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
    /// Rung for the daemon.
    daemon: Bell,
    /// Rung for one of the enclave's threads that drives its requests.
    driver: Bell,
    /// Rung for the one that looks after the rest.
    service: Bell,
    clock: Arc<Clock>,
}

// SAFETY: the mapping belongs to the process; nothing here touches it.
unsafe impl Send for Port {}
// SAFETY: as above.
unsafe impl Sync for Port {}

impl Port {
    /// A port of `bytes` zeros, beside which `clock` lives.
    ///
    /// # Errors
    /// `InvalidInput` for a size that no port has; the system's.
    pub fn new(bytes: usize, clock: Arc<Clock>) -> io::Result<Self> {
        if bytes == 0 || bytes > LONGEST || !bytes.is_multiple_of(4096) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let memory = memfd_create("postern-port", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, bytes as u64)?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(File::from);
        let (daemon, driver, service) = (bell()?, bell()?, bell()?);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel chooses.
        let base = unsafe {
            mmap(core::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &memory, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory, base, bytes, daemon, driver, service, clock })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The clock beside it.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// What an attach hands over: memory, and the bells of daemon, driver and service.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 4] {
        [self.memory.as_fd(), self.daemon.as_fd(), self.driver.as_fd(), self.service.as_fd()]
    }

    /// The bells of the enclave's threads.
    pub fn bells(&self) -> [&Bell; 2] {
        [&self.driver, &self.service]
    }

    /// Rings the daemon.
    pub fn ring(&self) {
        // An eventfd that is full has been rung.
        let _ = (&self.daemon).write(&1_u64.to_ne_bytes());
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length. An enclave that goes on using a port that it
        //    has closed faults, or meets what the host has put there: it is outside.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
