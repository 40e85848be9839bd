//! Whose turn it is: a lock that tasks of all processes of the family wait for, and hold across
//! I/O.
//!
//! Holds: one holder at a time. A process that is killed while it holds it ends the family, as
//! with everything that is under way on a volume.

use core::{
    future::poll_fn,
    mem,
    task::{Poll, Waker},
};

use postern_trusted::sync::Lock;

#[derive(Default)]
struct State {
    taken: bool,
    waiters: Vec<Waker>,
}

/// The lock.
#[derive(Default)]
pub struct Turn(Lock<State>);

/// It is the holder's turn while this lives.
pub struct Taken<'a>(&'a Turn);

impl Turn {
    /// Waits for the turn.
    pub async fn take(&self) -> Taken<'_> {
        poll_fn(|context| {
            let mut state = self.0.lock();
            if !mem::replace(&mut state.taken, true) {
                return Poll::Ready(());
            }
            if !state.waiters.iter().any(|waiter| waiter.will_wake(context.waker())) {
                state.waiters.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
        Taken(self)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.0.0.lock();
            state.taken = false;
            mem::take(&mut state.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use core::task::Context;
    use std::pin::pin;

    use super::*;

    #[test]
    fn the_turn_is_one_holders_and_passes_on_when_that_one_is_done() {
        let turn = Turn::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(turn.take()).as_mut().poll(&mut context) else {
            panic!("nobody has it");
        };
        let mut second = pin!(turn.take());
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(second.as_mut().poll(&mut context).is_ready());
    }
}
