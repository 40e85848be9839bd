//! The transfer area as a pool of buffers, and the tasks that wait for one.

use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use super::{
    buddy::{Buddy, Extent},
    turnstile::{Ticket, Turnstile},
};
use crate::{disk::HostError, sync::Lock};

/// Waiters there is room for without allocating.
const WAITERS: usize = 256;

struct Inner {
    buddy: Buddy,
    /// Orders of the chunks that tasks wait for.
    waiting: Turnstile<u8>,
    /// The lane is poisoned.
    closed: bool,
}

impl Inner {
    /// A waker for the first in line, if there is a chunk for it.
    fn next_in_line(&mut self) -> Option<Waker> {
        let (order, waker) = self.waiting.front()?;
        self.buddy.has(order).then(|| waker.clone())
    }
}

/// The pool. Requests are served in the order in which they came, whatever their size.
pub(super) struct Pool(Lock<Inner>);

impl Pool {
    /// All of an area of `blocks` blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self(Lock::new(Inner {
            buddy: Buddy::new(blocks),
            waiting: Turnstile::with_capacity(WAITERS),
            closed: false,
        }))
    }

    /// A chunk of `order` if one is free and nobody waits.
    pub(super) fn try_take(&self, order: u8) -> Option<Extent> {
        let mut inner = self.0.lock();
        if inner.closed || !inner.waiting.may_take(None) {
            return None;
        }
        inner.buddy.take(order)
    }

    /// Waits for a chunk of `order`.
    pub(super) const fn take(&self, order: u8) -> Take<'_> {
        Take { pool: self, order, ticket: None }
    }

    /// Gives a chunk back.
    pub(super) fn give(&self, extent: Extent) {
        let next = {
            let mut inner = self.0.lock();
            inner.buddy.give(extent);
            inner.next_in_line()
        };
        next.inspect(Waker::wake_by_ref);
    }

    /// Ends all waiting with [`HostError::Gone`], now and for ever.
    pub(super) fn close(&self) {
        self.0.lock().closed = true;
        loop {
            let waker = self.0.lock().waiting.dismiss();
            match waker {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }
}

/// Waiting for a chunk. Gives up its place in the queue when dropped.
pub(super) struct Take<'a> {
    pool: &'a Pool,
    order: u8,
    ticket: Ticket,
}

impl Future for Take<'_> {
    type Output = Result<Extent, HostError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { pool, order, ticket } = &mut *self;
        let mut inner = pool.0.lock();
        let (answer, dropped, next) = if inner.closed {
            (Poll::Ready(Err(HostError::Gone)), inner.waiting.leave(ticket), None)
        } else if inner.waiting.may_take(*ticket)
            && let Some(extent) = inner.buddy.take(*order)
        {
            let mine = inner.waiting.leave(ticket);
            (Poll::Ready(Ok(extent)), mine, inner.next_in_line())
        } else {
            (Poll::Pending, inner.waiting.wait(ticket, *order, cx.waker()), None)
        };
        drop(inner);
        drop(dropped);
        next.inspect(Waker::wake_by_ref);
        answer
    }
}

impl Drop for Take<'_> {
    fn drop(&mut self) {
        if self.ticket.is_none() {
            return;
        }
        let mut inner = self.pool.0.lock();
        let mine = inner.waiting.leave(&mut self.ticket);
        let next = inner.next_in_line();
        drop(inner);
        drop(mine);
        next.inspect(Waker::wake_by_ref);
    }
}
