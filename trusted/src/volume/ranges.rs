//! Who may write which blocks now.
//!
//! Whole-block writes share; a write of a part of a block, a truncate and a punch exclude. Served
//! in the order of arrival: nobody waits for one that came later, so nobody starves and there is
//! no deadlock (each holder takes the end-of-file range first, then one range of blocks).

use alloc::vec::Vec;
use core::task::Waker;

/// Stands for the position of the end of the file: appends and truncates exclude each other.
pub(crate) const EOF: u64 = u64::MAX;

struct Entry {
    ticket: u64,
    first: u64,
    last: u64,
    exclusive: bool,
    waker: Option<Waker>,
}

/// The ranges in use and those waited for.
#[derive(Default)]
pub(crate) struct RangeLocks {
    entries: Vec<Entry>,
    next: u64,
    exclusive: usize,
}

impl RangeLocks {
    /// Queues for blocks `first..=last`; returns the ticket.
    pub(crate) fn enter(&mut self, first: u64, last: u64, exclusive: bool) -> u64 {
        self.next += 1;
        self.exclusive += usize::from(exclusive);
        self.entries.push(Entry { ticket: self.next, first, last, exclusive, waker: None });
        self.next
    }

    /// Whether the ticket's turn has come; else `waker` is called when it may have.
    pub(crate) fn granted(&mut self, ticket: u64, waker: Option<&Waker>) -> bool {
        if self.exclusive == 0 {
            return true;
        }
        let Some(me) = self.entries.iter().position(|e| e.ticket == ticket) else { return true };
        let (first, last, exclusive) =
            (self.entries[me].first, self.entries[me].last, self.entries[me].exclusive);
        let blocked = self.entries.iter().any(|e| {
            e.ticket < ticket && (exclusive || e.exclusive) && e.first <= last && first <= e.last
        });
        if blocked && let Some(waker) = waker {
            self.entries[me].waker = Some(waker.clone());
        }
        !blocked
    }

    /// Gives the range back. Returns those that may go on now.
    pub(crate) fn leave(&mut self, ticket: u64) -> Vec<Waker> {
        let Some(me) = self.entries.iter().position(|e| e.ticket == ticket) else {
            return Vec::new();
        };
        let gone = self.entries.swap_remove(me);
        self.exclusive -= usize::from(gone.exclusive);
        if self.exclusive == 0 && !gone.exclusive {
            return Vec::new();
        }
        self.entries
            .iter_mut()
            .filter(|e| e.first <= gone.last && gone.first <= e.last)
            .filter_map(|e| e.waker.take())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_write_waits_for_earlier_writes_and_holds_later_ones_up() {
        let mut locks = RangeLocks::default();
        let whole = locks.enter(0, 7, false);
        let partial = locks.enter(3, 3, true);
        let later = locks.enter(2, 4, false);
        let elsewhere = locks.enter(4, 9, false);
        assert!(locks.granted(whole, None));
        assert!(!locks.granted(partial, None));
        assert!(!locks.granted(later, None));
        assert!(locks.granted(elsewhere, None));
        locks.leave(whole);
        assert!(locks.granted(partial, None));
        assert!(!locks.granted(later, None));
        locks.leave(partial);
        assert!(locks.granted(later, None));
    }
}
