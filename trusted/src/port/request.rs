//! One descriptor on its way: from waiting for an index to its answer.

use core::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use postern_edl::port::Submission;

use super::{Lane, buddy::Extent, lane::Submitted, table::Released, turnstile::Ticket};
use crate::disk::HostError;

/// A buffer and the request that is in flight on it, if one is. Dropping it gives the buffer
/// back: at once, or when the host has answered.
pub(super) struct Held {
    lane: Lane,
    extent: Option<Extent>,
    index: Option<u32>,
}

impl Held {
    /// A holder of `extent`; `None` for a request that has no data.
    pub(super) const fn new(lane: Lane, extent: Option<Extent>) -> Self {
        Self { lane, extent, index: None }
    }

    /// The lane it belongs to.
    pub(super) const fn lane(&self) -> &Lane {
        &self.lane
    }

    /// First block of the buffer in the transfer area. `None` while a request is in flight on it
    /// (between uses that means: its future was dropped, and the host may still be at work).
    pub(super) fn settled(&self) -> Option<usize> {
        self.extent.as_ref().filter(|_| self.index.is_none()).map(Extent::block)
    }

    /// Sends `submission` and waits for the answer: the bytes done.
    pub(super) const fn request(&mut self, submission: Submission) -> Request<'_> {
        Request { held: self, submission, ticket: None }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let extent = self.extent.take();
        let Released { waker, extent } = match self.index {
            Some(index) => {
                let (released, next) = self.lane.with_table(|table| {
                    let released = table.abandon(index, extent);
                    (released, table.next_in_line())
                });
                next.inspect(Waker::wake_by_ref);
                released
            }
            None => Released { waker: None, extent },
        };
        drop(waker);
        if let Some(extent) = extent {
            self.lane.0.pool.give(extent);
        }
    }
}

/// The future of [`Held::request`]. Dropped in flight, it leaves the index to its holder.
pub(super) struct Request<'a> {
    held: &'a mut Held,
    submission: Submission,
    ticket: Ticket,
}

impl Future for Request<'_> {
    type Output = Result<u64, HostError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { held, submission, ticket } = &mut *self;
        let Some(index) = held.index else {
            match held.lane.submit(*submission, ticket, cx.waker()) {
                Ok(Submitted::Yes(index)) => held.index = Some(index),
                Ok(Submitted::Waits) => {}
                Err(gone) => return Poll::Ready(Err(gone)),
            }
            return Poll::Pending;
        };
        let (answer, dropped, next) = held.lane.with_table(|table| {
            let (answer, dropped) = table.take(index, cx.waker());
            let next = answer.is_ready().then(|| table.next_in_line()).flatten();
            (answer, dropped, next)
        });
        drop(dropped);
        next.inspect(Waker::wake_by_ref);
        if answer.is_ready() {
            held.index = None;
        }
        answer
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if self.ticket.is_none() {
            return;
        }
        let (mine, next) = self
            .held
            .lane
            .with_table(|table| (table.waiting.leave(&mut self.ticket), table.next_in_line()));
        drop(mine);
        next.inspect(Waker::wake_by_ref);
    }
}
