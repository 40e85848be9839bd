//! Spinning before sleeping, where it pays.
//!
//! A wake-up costs tens of microseconds on both sides, and while it lasts the other requests in
//! flight complete too: from then on all of them travel as one convoy. A completion that is nearly
//! there is had more cheaply by looking for it. A spin that is lost costs credit, one that is won
//! earns it; out of credit only every 32nd occasion is tried, so the waste is bounded to a small
//! share of one core whatever the device does.
//!
//! Holds: at most one thread fewer than there are processors spins at a time in the whole family,
//! so that the daemon always has one to work on.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{sys, wait};

/// Longest spin in nanoseconds.
const LONGEST_NS: u64 = 400_000;
const MOST_CREDIT: u32 = 8;
const TRY_EVERY: u32 = 32;
/// Looks between two readings of the clock.
const LOOKS: u32 = 16;

/// The right to spin, for the threads of a family.
///
/// A ticket says when its holder stops at the latest: one that died spinning blocks nobody.
pub struct Tickets(Box<[AtomicU64]>);

impl Tickets {
    /// Tickets for all but one of `processors`.
    #[must_use]
    pub fn new(processors: usize) -> Self {
        Self((1..processors).map(|_| AtomicU64::new(0)).collect())
    }

    /// A ticket from `now` until `end`, if one is free.
    fn take(&self, now: u64, end: u64) -> Option<Ticket<'_>> {
        self.0.iter().find_map(|ticket| {
            let held = ticket.load(Ordering::Relaxed);
            let free = held <= now
                && ticket.compare_exchange(held, end, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            free.then_some(Ticket { ticket, end })
        })
    }
}

/// A ticket in use.
struct Ticket<'a> {
    ticket: &'a AtomicU64,
    end: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        // Unless it ran out and is somebody else's by now.
        let _ = self.ticket.compare_exchange(self.end, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// The credit of one process. Threads share it; lost updates do no harm.
pub struct Spinner {
    credit: AtomicU32,
    skipped: AtomicU32,
}

impl Spinner {
    /// Full credit.
    #[must_use]
    pub const fn new() -> Self {
        Self { credit: AtomicU32::new(MOST_CREDIT), skipped: AtomicU32::new(0) }
    }

    /// Looks for `there` for a short while, if that has paid lately. Answers whether it came.
    pub fn spin(&self, tickets: &Tickets, there: impl Fn() -> bool) -> bool {
        if !self.may_try() {
            return false;
        }
        let now = wait::now_ns();
        let end = now + LONGEST_NS;
        let Some(_ticket) = tickets.take(now, end) else { return false };
        let won = loop {
            if (0..LOOKS).any(|_| {
                core::hint::spin_loop();
                there()
            }) {
                break true;
            }
            if wait::now_ns() >= end {
                break false;
            }
            // The kernel ends direct writes on a worker of the processor that was interrupted. It
            // does not take the place of a thread that spins there before that one's slice is over.
            sys::yield_now();
        };
        self.settle(won);
        won
    }

    fn may_try(&self) -> bool {
        if self.credit.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let skipped = self.skipped.fetch_add(1, Ordering::Relaxed) + 1;
        skipped.is_multiple_of(TRY_EVERY)
    }

    fn settle(&self, won: bool) {
        let credit = self.credit.load(Ordering::Relaxed);
        let credit = if won { (credit + 2).min(MOST_CREDIT) } else { credit.saturating_sub(1) };
        self.credit.store(credit, Ordering::Relaxed);
    }
}

impl Default for Spinner {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_looked_for_on_one_occasion_in_32() {
        let spinner = Spinner::new();
        let tried = (0..MOST_CREDIT + 320)
            .filter(|_| spinner.may_try().then(|| spinner.settle(false)).is_some());
        assert_eq!(tried.count() as u32, MOST_CREDIT + 10);
    }

    #[test]
    fn one_success_brings_spinning_back() {
        let spinner = Spinner::new();
        (0..MOST_CREDIT).for_each(|_| spinner.settle(false));
        assert!(!spinner.may_try());
        spinner.settle(true);
        assert!(spinner.may_try());
        assert!(spinner.spin(&Tickets::new(2), || true));
    }

    #[test]
    fn all_processors_but_one_may_spin() {
        assert!(Tickets::new(1).take(10, 20).is_none());
        let tickets = Tickets::new(3);
        let first = tickets.take(10, 20);
        let second = tickets.take(11, 21);
        assert!(first.is_some() && second.is_some());
        assert!(tickets.take(12, 22).is_none());
        drop(first);
        assert!(tickets.take(12, 22).is_some());
    }

    #[test]
    fn a_ticket_nobody_gives_back_runs_out() {
        let tickets = Tickets::new(2);
        let lost = tickets.take(10, 20);
        assert!(tickets.take(19, 29).is_none());
        let next = tickets.take(20, 30);
        assert!(next.is_some());
        drop(lost);
        assert!(tickets.take(21, 31).is_none(), "the late one gave back what was not its own");
    }
}
