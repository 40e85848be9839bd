//! The guest's eventfds that requests signal (`aio_resfd`).
//!
//! Each is held open by a descriptor of our own as long as a request needs it, whatever the guest
//! closes; requests in flight with the same eventfd share that descriptor.
//!
//! Holds: signalling never blocks on the guest's counter, whatever that holds, and brings it up to
//! 2^64-1 at most, as the kernel does.
#![allow(unsafe_code)]

use std::sync::{Arc, Weak};

use postern_trusted::{aio::EventCounter, errno::Errno, sync::Lock};

use crate::{
    files::{self, placeholder},
    kernel_aio, sys, wait,
};

/// An eventfd of the guest, held open by a descriptor of our own.
pub struct Counter {
    copy: i32,
    /// A write to it may block when it is full.
    blocking: bool,
}

impl EventCounter for Counter {
    fn signal(&self) {
        if self.blocking && !wait::is_writable(self.copy)
            || sys::write(self.copy, &1_u64.to_ne_bytes()).is_err()
        {
            // write(2) fills it up to 2^64-2; the last step is the kernel's alone.
            kernel_aio::signal(self.copy);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        files::close_internal(self.copy);
    }
}

/// The eventfds that requests in flight will signal.
#[derive(Default)]
pub struct Counters(Lock<Vec<Weak<Counter>>>);

impl Counters {
    /// The eventfd behind the guest's `fd`.
    ///
    /// # Errors
    /// `EBADF`: not open. `EINVAL`: not an eventfd. `EMFILE`: no descriptor is left to hold it by.
    pub fn get(&self, fd: i32) -> Result<Arc<Counter>, Errno> {
        let known = self.0.lock().iter().find_map(|counter| {
            let counter = counter.upgrade()?;
            sys::is_same_file(fd, counter.copy).then_some(counter)
        });
        if let Some(counter) = known {
            return Ok(counter);
        }
        let mut room = [0; 32];
        let mut target = [0; 64];
        let length = sys::readlink(placeholder::own_path(fd, &mut room)?, &mut target);
        let length = length.map_err(|_| Errno::EBADF)?;
        if target.get(..length) != Some(b"anon_inode:[eventfd]") {
            return Err(Errno::EINVAL);
        }
        let blocking = sys::fcntl(fd, libc::F_GETFL, 0)? & libc::O_NONBLOCK as usize == 0;
        let copy = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0)?;
        let copy = i32::try_from(copy).map_err(|_| Errno::EMFILE)?;
        let counter = Arc::new(Counter { copy: files::protect_internal(copy), blocking });
        let mut known = self.0.lock();
        known.retain(|counter| counter.strong_count() > 0);
        known.push(Arc::downgrade(&counter));
        Ok(counter)
    }
}
