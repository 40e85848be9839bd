//! Events of an enclave's threads: bits that are sent to one and waited for by it.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The bits that there are.
pub const EVENTS: u64 = 0b1111;
/// Do not wait.
const NO_WAIT: u64 = 0;
/// Wait for ever.
const FOR_EVER: u64 = u64::MAX;

/// What was sent to one thread and not yet taken.
#[derive(Default)]
pub struct Inbox {
    bits: Mutex<u64>,
    sent: Condvar,
}

/// Why a wait ends without an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEvent {
    /// It was not to wait.
    WouldBlock,
    /// The time was over.
    TimedOut,
    /// There is no such event, or none was named and the wait has no end.
    Invalid,
}

impl Inbox {
    /// Adds events.
    pub fn send(&self, events: u64) {
        *self.bits.lock().unwrap_or_else(PoisonError::into_inner) |= events;
        self.sent.notify_all();
    }

    /// Takes those of `mask` that are there, waiting at most `timeout` nanoseconds for one.
    ///
    /// # Errors
    /// Why there is none.
    pub fn wait(&self, mask: u64, timeout: u64) -> Result<u64, NoEvent> {
        if mask & !EVENTS != 0 || (mask == 0 && timeout == FOR_EVER) {
            return Err(NoEvent::Invalid);
        }
        // A time too far off to be told apart from never.
        let deadline = Instant::now().checked_add(Duration::from_nanos(timeout));
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let taken = *bits & mask;
            if taken != 0 {
                *bits &= !taken;
                return Ok(taken);
            }
            bits = match (timeout, deadline) {
                (NO_WAIT, _) => return Err(NoEvent::WouldBlock),
                (FOR_EVER, _) | (_, None) => {
                    self.sent.wait(bits).unwrap_or_else(PoisonError::into_inner)
                }
                (_, Some(deadline)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(NoEvent::TimedOut);
                    }
                    self.sent.wait_timeout(bits, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// The inboxes of all threads that run, by their control structures.
#[derive(Default)]
pub struct Inboxes(Mutex<Vec<(u64, Arc<Inbox>)>>);

impl Inboxes {
    /// A thread starts: what is sent to it is kept from now on.
    pub fn begin(&self, tcs: u64) -> Arc<Inbox> {
        let inbox = Arc::new(Inbox::default());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((tcs, inbox.clone()));
        inbox
    }

    /// A thread has ended.
    pub fn end(&self, tcs: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| *other != tcs);
    }

    /// Sends events to the thread of this control structure; `false` if there is none.
    pub fn send(&self, events: u64, tcs: u64) -> bool {
        let inboxes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut to = inboxes.iter().filter(|(other, _)| *other == tcs).peekable();
        let any = to.peek().is_some();
        to.for_each(|(_, inbox)| inbox.send(events));
        any
    }

    /// Sends events to all threads.
    pub fn send_to_all(&self, events: u64) {
        let inboxes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inboxes.iter().for_each(|(_, inbox)| inbox.send(events));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_taken_once_and_only_by_who_waits_for_it() {
        let inbox = Inbox::default();
        inbox.send(0b110);
        assert_eq!(inbox.wait(0b101, NO_WAIT), Ok(0b100));
        assert_eq!(inbox.wait(0b101, NO_WAIT), Err(NoEvent::WouldBlock));
        assert_eq!(inbox.wait(0b010, FOR_EVER), Ok(0b010));
        assert_eq!(inbox.wait(0b010, 1), Err(NoEvent::TimedOut));
        assert_eq!(inbox.wait(0b10000, 1), Err(NoEvent::Invalid));
        assert_eq!(inbox.wait(0, FOR_EVER), Err(NoEvent::Invalid));
    }
}
