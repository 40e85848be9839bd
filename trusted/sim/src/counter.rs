//! The guest's eventfds that requests signal (`aio_resfd`).
//!
//! Each is held open by a descriptor of our own as long as a request needs it, whatever the guest
//! closes; requests in flight with the same eventfd share that descriptor.
//!
//! Holds: signalling never blocks, whatever the guest's counter holds.
#![allow(unsafe_code)]

use std::sync::{Arc, Weak};

use postern_trusted::{aio::EventCounter, errno::Errno, sync::Lock};

use crate::{
    files::{self, placeholder},
    sys, wait,
};

/// An eventfd of the guest, held open by a descriptor of our own.
pub struct Counter {
    copy: i32,
    /// A write to it may block when it is full.
    blocking: bool,
}

impl EventCounter for Counter {
    fn signal(&self) {
        // One that is full stays as it is: the guest sees it readable all the same.
        if !self.blocking || wait::is_writable(self.copy) {
            wait::ring(self.copy);
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
