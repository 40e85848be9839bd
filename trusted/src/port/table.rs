//! What is in flight: the private truth that a host's completions are held against.
//!
//! A pure state machine without shared memory and without locks. An index goes
//! `free -> in flight -> done -> free`; its generation grows with each use, so that an id names one
//! use. `done` holds the result until the task takes it. When the task has gone away the index is
//! `abandoned` and the buffer waits here until the host has answered, since it may still write
//! into it.
//!
//! Each slot keeps the descriptor as it was published: what a new daemon is handed again, under a
//! fresh id. Until it is handed over, no answer to it is accepted.

use alloc::{boxed::Box, vec::Vec};
use core::task::{Poll, Waker};

use postern_edl::port::{Submission, op};

use super::{HostFault, buddy::Extent, turnstile::Turnstile};
use crate::disk::HostError;

/// Largest errno a kernel answers.
const MAX_ERRNO: i64 = 4095;
/// Unit of lengths done: the smallest sector of a host file.
const SECTOR: u64 = 512;

enum State {
    Free,
    InFlight(Option<Waker>),
    /// Nobody waits any more; the buffer is kept until the answer.
    Abandoned(Option<Extent>),
    Done(Result<u64, HostError>),
}

struct Slot {
    generation: u32,
    state: State,
    /// As published last, or to be published.
    submission: Submission,
    /// The daemon of now has it.
    published: bool,
}

impl Slot {
    /// The descriptor under an id that was never used.
    fn renew(&mut self, index: u32) -> Submission {
        // Skips 0, so that no id is ever 0.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.submission.id = u64::from(self.generation) << 32 | u64::from(index);
        self.submission
    }
}

/// What a completion sets free, to be woken and given back outside the lock.
#[derive(Default)]
pub(super) struct Released {
    pub(super) waker: Option<Waker>,
    pub(super) extent: Option<Extent>,
}

/// The table of requests by index.
pub(super) struct Table {
    slots: Box<[Slot]>,
    /// Free indexes, last in first out; never grows beyond the number of slots.
    free: Vec<u32>,
    in_flight: usize,
    /// Tasks that wait for a free index.
    pub(super) waiting: Turnstile<()>,
    fault: Option<HostFault>,
}

impl Table {
    /// A table of `entries` free indexes.
    pub(super) fn new(entries: usize) -> Self {
        let slot = |_| Slot {
            generation: 0,
            state: State::Free,
            submission: Submission::default(),
            published: false,
        };
        let entries_u32 = u32::try_from(entries).unwrap_or(u32::MAX);
        Self {
            slots: (0..entries).map(slot).collect(),
            free: (0..entries_u32).rev().collect(),
            in_flight: 0,
            waiting: Turnstile::with_capacity(entries),
            fault: None,
        }
    }

    /// Why the lane is poisoned, if it is.
    pub(super) const fn fault(&self) -> Option<HostFault> {
        self.fault
    }

    /// Requests that the host has not answered, abandoned ones included.
    pub(super) const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether [`Self::begin`] would find a free index.
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts `submission` in flight under a fresh id. Returns its index and the descriptor, which
    /// the caller publishes now unless it is `withheld`; `None` if no index is free.
    pub(super) fn begin(
        &mut self,
        submission: Submission,
        waker: &Waker,
        withheld: bool,
    ) -> Option<(u32, Submission)> {
        let index = self.free.pop()?;
        let slot = &mut self.slots[index as usize];
        slot.submission = submission;
        slot.state = State::InFlight(Some(waker.clone()));
        slot.published = !withheld;
        self.in_flight += 1;
        Some((index, slot.renew(index)))
    }

    /// There is another daemon: nothing of what is in flight was published to it.
    pub(super) fn forget_published(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.published = false);
    }

    /// The descriptor on `index`, under a fresh id, if it is in flight and was not published: the
    /// caller publishes it now.
    pub(super) fn publish_again(&mut self, index: usize) -> Option<Submission> {
        let slot = self.slots.get_mut(index)?;
        let waits = matches!(slot.state, State::InFlight(_) | State::Abandoned(_));
        if !waits || slot.published {
            return None;
        }
        slot.published = true;
        Some(slot.renew(u32::try_from(index).ok()?))
    }

    /// Ends the request on `index` with `errno` if it is in flight, was not published, and `holds`
    /// for its descriptor. Only of requests without a buffer.
    pub(super) fn refuse(
        &mut self,
        index: usize,
        errno: i32,
        holds: impl FnOnce(&Submission) -> bool,
    ) -> Option<Waker> {
        let slot = self.slots.get_mut(index)?;
        if slot.published || !holds(&slot.submission) {
            return None;
        }
        self.end_with(index, HostError::Errno(errno))
    }

    /// Takes a completion as the host wrote it. Returns the index and what it sets free.
    ///
    /// # Errors
    /// A [`HostFault`], with nothing changed.
    pub(super) fn complete(
        &mut self,
        id: u64,
        result: i64,
    ) -> Result<(usize, Released), HostFault> {
        #[allow(clippy::cast_possible_truncation, reason = "the low half is the index")]
        let index = id as u32;
        let place = index as usize;
        let Some(slot) = self.slots.get_mut(place) else {
            return Err(HostFault::UnknownRequest { id });
        };
        let of_another = slot.submission.id != id && !left_out!(AnyGeneration);
        if slot.generation == 0 || of_another {
            return Err(HostFault::UnknownRequest { id });
        }
        if matches!(slot.state, State::Free | State::Done(_)) && !left_out!(TwiceDone) {
            return Err(HostFault::DuplicateCompletion { id });
        }
        if !slot.published && !left_out!(BeforeHandover) {
            return Err(HostFault::UnknownRequest { id });
        }
        let asked = slot.submission.length;
        let verdict = judge(slot.submission.op, asked, result)
            .ok_or(HostFault::ResultOutOfRange { id, result, asked })?;
        self.in_flight -= 1;
        let released = match core::mem::replace(&mut slot.state, State::Done(verdict)) {
            State::Abandoned(extent) => {
                slot.state = State::Free;
                self.free.push(index);
                Released { waker: self.next_in_line(), extent }
            }
            State::InFlight(waker) => Released { waker, extent: None },
            State::Free | State::Done(_) => Released::default(),
        };
        Ok((place, released))
    }

    /// The result of the request on `index`, which frees the index; or renews its waker. The
    /// second value is a waker to drop outside the lock.
    pub(super) fn take(
        &mut self,
        index: u32,
        waker: &Waker,
    ) -> (Poll<Result<u64, HostError>>, Option<Waker>) {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return (Poll::Ready(Err(HostError::Gone)), None);
        };
        match &mut slot.state {
            State::InFlight(Some(known)) if known.will_wake(waker) => (Poll::Pending, None),
            State::InFlight(known) => (Poll::Pending, known.replace(waker.clone())),
            State::Done(result) => {
                let result = *result;
                slot.state = State::Free;
                self.free.push(index);
                (Poll::Ready(result), None)
            }
            State::Free | State::Abandoned(_) => (Poll::Ready(Err(HostError::Gone)), None),
        }
    }

    /// Nobody waits for `index` any more. Keeps `extent` until the host has answered; returns it
    /// if it may be used again now. The released waker is to be dropped outside the lock.
    pub(super) fn abandon(&mut self, index: u32, extent: Option<Extent>) -> Released {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Released { waker: None, extent };
        };
        match core::mem::replace(&mut slot.state, State::Free) {
            State::InFlight(waker) if left_out!(EarlyBuffer) => {
                slot.state = State::Abandoned(None);
                Released { waker, extent }
            }
            State::InFlight(waker) => {
                slot.state = State::Abandoned(extent);
                Released { waker, extent: None }
            }
            State::Done(_) => {
                self.free.push(index);
                Released { waker: None, extent }
            }
            State::Free => Released { waker: None, extent },
            State::Abandoned(kept) => {
                slot.state = State::Abandoned(kept);
                Released { waker: None, extent }
            }
        }
    }

    /// A waker for the first task that waits for an index, if there is an index for it.
    pub(super) fn next_in_line(&self) -> Option<Waker> {
        self.waiting.front().filter(|_| self.has_free()).map(|(_, waker)| waker.clone())
    }

    /// Poisons the table: from now on nothing begins. The first fault stays. What is in flight is
    /// ended by [`Self::end`].
    pub(super) fn poison(&mut self, fault: HostFault) -> bool {
        let first = self.fault.is_none();
        self.fault.get_or_insert(fault);
        first
    }

    /// Ends the request on `index`, if one is in flight, with [`HostError::Gone`]; for a poisoned
    /// table. The buffer of an abandoned one stays kept for ever: the host may still write to it.
    pub(super) fn end(&mut self, index: usize) -> Option<Waker> {
        self.end_with(index, HostError::Gone)
    }

    fn end_with(&mut self, index: usize, error: HostError) -> Option<Waker> {
        let slot = self.slots.get_mut(index)?;
        let State::InFlight(waker) = &mut slot.state else { return None };
        let waker = waker.take();
        slot.state = State::Done(Err(error));
        self.in_flight -= 1;
        waker
    }
}

/// What a result means for a request of `asked` bytes; `None` if it cannot be one.
fn judge(op: u32, asked: u64, result: i64) -> Option<Result<u64, HostError>> {
    if (-MAX_ERRNO..0).contains(&result) {
        return i32::try_from(-result).ok().map(|errno| Err(HostError::Errno(errno)));
    }
    let done = u64::try_from(result).ok()?;
    let limit = if matches!(u64::from(op), op::FLUSH | op::DISCARD) { 0 } else { asked };
    let possible = done <= limit && done.is_multiple_of(SECTOR);
    (possible || left_out!(AnyResult)).then_some(Ok(done))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submission(op: u64, length: u64) -> Submission {
        Submission { op: u32::try_from(op).unwrap(), length, ..Submission::default() }
    }

    #[test]
    fn a_result_is_an_errno_or_whole_sectors_of_what_was_asked() {
        let read = |result| judge(1, 8192, result);
        assert_eq!(read(8192), Some(Ok(8192)));
        assert_eq!(read(0), Some(Ok(0)));
        assert_eq!(read(512), Some(Ok(512)));
        assert_eq!(read(-1), Some(Err(HostError::Errno(1))));
        assert_eq!(read(-4095), Some(Err(HostError::Errno(4095))));
        for wrong in [8193, 8704, 100, -4096, i64::MIN, i64::MAX] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(judge(3, 0, 0), Some(Ok(0)));
        assert_eq!(judge(3, 0, 512), None);
        assert_eq!(judge(3, 0, -5), Some(Err(HostError::Errno(5))));
    }

    #[test]
    fn a_generation_that_wraps_skips_zero() {
        let mut table = Table::new(2);
        table.slots[0].generation = u32::MAX;
        let (index, published) = table.begin(submission(1, 4096), Waker::noop(), false).unwrap();
        assert_eq!((index, published.id), (0, 1 << 32));
    }

    #[test]
    fn what_the_daemon_of_now_does_not_have_it_cannot_answer() {
        let mut table = Table::new(4);
        let (first, old) = table.begin(submission(1, 4096), Waker::noop(), false).unwrap();
        table.forget_published();
        let (second, withheld) = table.begin(submission(1, 512), Waker::noop(), true).unwrap();
        for id in [old.id, withheld.id] {
            let fault = Some(HostFault::UnknownRequest { id });
            assert_eq!(table.complete(id, 512).err(), fault);
        }
        let again = table.publish_again(first as usize).unwrap();
        assert_eq!(again, Submission { id: again.id, ..old });
        assert_ne!(again.id, old.id);
        assert!(table.publish_again(first as usize).is_none(), "once");
        let late = Some(HostFault::UnknownRequest { id: old.id });
        assert_eq!(table.complete(old.id, 4096).err(), late);
        table.complete(again.id, 4096).unwrap();
        table.publish_again(second as usize).unwrap();
        assert_eq!(table.in_flight(), 1);
        assert!((0..4).all(|index| table.publish_again(index).is_none()), "nothing else");
    }

    #[test]
    fn a_request_is_refused_only_before_it_is_handed_over() {
        let mut table = Table::new(2);
        let (index, _) = table.begin(submission(3, 0), Waker::noop(), true).unwrap();
        assert!(table.refuse(index as usize, 5, |s| s.op == 1).is_none());
        assert!(table.refuse(index as usize, 5, |s| s.op == 3).is_some());
        let (answer, _) = table.take(index, Waker::noop());
        assert_eq!(answer, Poll::Ready(Err(HostError::Errno(5))));
        let (index, _) = table.begin(submission(3, 0), Waker::noop(), false).unwrap();
        assert!(table.refuse(index as usize, 5, |_| true).is_none());
        assert_eq!(table.in_flight(), 1);
    }

    #[test]
    fn an_abandoned_buffer_comes_back_with_the_answer_and_not_before() {
        let mut table = Table::new(2);
        let mut buddy = super::super::buddy::Buddy::new(32);
        let extent = buddy.take(0);
        let (index, published) = table.begin(submission(2, 4096), Waker::noop(), false).unwrap();
        assert!(table.abandon(index, extent).extent.is_none());
        assert_eq!(table.in_flight(), 1);
        let (_, released) = table.complete(published.id, 4096).unwrap();
        assert!(released.extent.is_some());
        assert_eq!(table.in_flight(), 0);
        assert_eq!(
            table.complete(published.id, 4096).err(),
            Some(HostFault::DuplicateCompletion { id: published.id })
        );
    }
}
