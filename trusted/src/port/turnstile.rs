//! A queue of tasks that wait for a resource, first come first served.
//!
//! Nobody passes: while somebody waits, a newcomer joins the end even if what it wants is free, so
//! neither small nor large wishes starve. The one at the front stays there until it takes the
//! resource or gives up, and whoever makes room wakes it.
//!
//! No waker is dropped in here: the last one of a task drops the task, which may come back for the
//! same lock. Wakers leave through return values, to be woken or dropped outside.

use alloc::collections::VecDeque;
use core::task::Waker;

/// Place in a queue; `None` before joining it.
pub(super) type Ticket = Option<u64>;

struct Waiter<T> {
    ticket: u64,
    wish: T,
    waker: Waker,
}

/// The queue. `T` is what somebody waits for.
pub(super) struct Turnstile<T> {
    waiting: VecDeque<Waiter<T>>,
    next: u64,
}

impl<T: Copy> Turnstile<T> {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(capacity), next: 0 }
    }

    /// Whether the holder of `ticket` may take the resource if there is one.
    pub(super) fn may_take(&self, ticket: Ticket) -> bool {
        match (self.waiting.front(), ticket) {
            (None, _) => true,
            (Some(first), Some(ticket)) => first.ticket == ticket,
            (Some(_), None) => false,
        }
    }

    /// Joins the end, or renews the waker of one that waits already. Returns a waker to drop.
    #[must_use]
    pub(super) fn wait(&mut self, ticket: &mut Ticket, wish: T, waker: &Waker) -> Option<Waker> {
        if let Some(at) = ticket.and_then(|ticket| self.find(ticket)) {
            let known = &mut self.waiting[at].waker;
            let renew = !known.will_wake(waker);
            return renew.then(|| core::mem::replace(known, waker.clone()));
        }
        *ticket = Some(self.next);
        self.waiting.push_back(Waiter { ticket: self.next, wish, waker: waker.clone() });
        self.next += 1;
        None
    }

    /// Leaves the queue, with the resource or without. Returns the waker of the one that left.
    #[must_use]
    pub(super) fn leave(&mut self, ticket: &mut Ticket) -> Option<Waker> {
        let at = self.find(ticket.take()?)?;
        self.waiting.remove(at).map(|waiter| waiter.waker)
    }

    /// Who is at the front: its wish, and a waker to wake outside the lock.
    pub(super) fn front(&self) -> Option<(T, &Waker)> {
        self.waiting.front().map(|first| (first.wish, &first.waker))
    }

    /// Sends the one at the front away.
    pub(super) fn dismiss(&mut self) -> Option<Waker> {
        self.waiting.pop_front().map(|first| first.waker)
    }

    /// Tickets only grow and the queue is in their order.
    fn find(&self, ticket: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&ticket, |waiter| waiter.ticket).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_came_first_is_served_first_and_a_newcomer_does_not_pass() {
        let mut queue = Turnstile::with_capacity(0);
        let (mut a, mut b, mut c) = (None, None, None);
        assert!(queue.may_take(None));
        for ticket in [&mut a, &mut b, &mut c] {
            assert!(queue.wait(ticket, (), Waker::noop()).is_none());
        }
        assert!(!queue.may_take(None));
        assert!(queue.may_take(a) && !queue.may_take(b));
        drop(queue.wait(&mut a, (), Waker::noop()));
        assert!(queue.may_take(a), "renewing the waker keeps the place");
        assert!(queue.leave(&mut b).is_some(), "gives up in the middle");
        assert!(queue.leave(&mut a).is_some());
        assert!(queue.may_take(c) && a.is_none());
        assert!(queue.dismiss().is_some() && queue.front().is_none());
        assert!(queue.leave(&mut c).is_none(), "was sent away");
    }
}
