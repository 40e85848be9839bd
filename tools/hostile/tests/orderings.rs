//! The orderings of the port, in every interleaving and with every stale value that the memory model
//! allows (loom): a model of the protocol as both sides follow it, word by word. The code itself is
//! held to it by the litmus tests of either side (`trusted/tests/port/litmus.rs`).
//!
//! Each protocol stands beside a copy that lacks one ordering: the model must find that one broken,
//! or it would find nothing.

#![allow(clippy::unwrap_used)]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use loom::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    thread,
};

/// Whether the fence stands where it belongs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fence {
    There,
    LeftOut,
}

impl Fence {
    fn full(self) {
        if self == Self::There {
            fence(Ordering::SeqCst);
        }
    }
}

/// Whether the publishing store releases and the look at it acquires.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Publish {
    Ordered,
    Relaxed,
}

impl Publish {
    fn store(self) -> Ordering {
        if self == Self::Ordered { Ordering::Release } else { Ordering::Relaxed }
    }

    fn load(self) -> Ordering {
        if self == Self::Ordered { Ordering::Acquire } else { Ordering::Relaxed }
    }
}

/// Whether the model finds `protocol` broken in some interleaving.
fn is_broken(protocol: impl Fn() + Sync + Send + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| loom::model(protocol))).is_err()
}

/// One side publishes and then looks whether the other sleeps; that one announces its sleep and then
/// looks whether something was published. The submission way (the enclave publishes, the daemon
/// sleeps) and the completion way (the daemon publishes, a driver sleeps) are the same protocol.
fn sleep(publisher: Fence, sleeper: Fence) {
    let cursor = Arc::new(AtomicU64::new(0));
    let asleep = Arc::new(AtomicU64::new(0));
    let (published, sleeps) = (cursor.clone(), asleep.clone());
    let thread = thread::spawn(move || {
        published.store(1, Ordering::Release);
        publisher.full();
        sleeps.load(Ordering::Acquire) != 0
    });
    asleep.store(1, Ordering::Release);
    sleeper.full();
    let stays_awake = cursor.load(Ordering::Acquire) != 0;
    let rings = thread.join().unwrap();
    assert!(stays_awake || rings, "a wake-up is lost");
}

/// A descriptor or completion is written, then the cursor; who sees the cursor sees the words. Then
/// the slot is given back by the other cursor, and written over only after that was seen.
fn ring(publish: Publish, give_back: Publish) {
    let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let published = Arc::new(AtomicU64::new(0));
    let taken = Arc::new(AtomicU64::new(0));
    let (theirs, announced, free) = (words.clone(), published.clone(), taken.clone());
    let writer = thread::spawn(move || {
        theirs.iter().for_each(|word| word.store(7, Ordering::Relaxed));
        announced.store(1, publish.store());
        // The slot again, if it is free by now.
        if free.load(give_back.load()) == 1 {
            theirs.iter().for_each(|word| word.store(9, Ordering::Relaxed));
        }
    });
    if published.load(publish.load()) == 1 {
        let seen = words.each_ref().map(|word| word.load(Ordering::Relaxed));
        assert_eq!(seen, [7, 7], "words that were not published");
        taken.store(1, give_back.store());
    }
    writer.join().unwrap();
}

/// The enclave stamps a completion and then says that it was taken; who sees that sees the stamp.
fn stamp(publish: Publish) {
    let stamp = Arc::new(AtomicU64::new(0));
    let taken = Arc::new(AtomicU64::new(0));
    let (stamped, said) = (stamp.clone(), taken.clone());
    let enclave = thread::spawn(move || {
        stamped.store(5, Ordering::Relaxed);
        said.store(1, publish.store());
    });
    if taken.load(publish.load()) == 1 {
        assert_eq!(stamp.load(Ordering::Relaxed), 5, "the stamp of another request");
    }
    enclave.join().unwrap();
}

/// A thread submits while another takes its plug away: one of the two rings. The daemon sleeps all
/// the time.
fn plug(settles: Fence, unplugs: Fence) {
    let plugs = Arc::new(AtomicUsize::new(1));
    let owed = Arc::new(AtomicBool::new(false));
    let rung = Arc::new(AtomicUsize::new(0));
    let (there, debt, bell) = (plugs.clone(), owed.clone(), rung.clone());
    let submitter = thread::spawn(move || {
        let plugged = there.load(Ordering::Relaxed) > 0;
        if plugged {
            debt.store(true, Ordering::Relaxed);
        }
        settles.full();
        if !plugged || there.load(Ordering::Relaxed) == 0 {
            bell.fetch_add(1, Ordering::Relaxed);
        }
    });
    let last = if unplugs == Fence::There { Ordering::SeqCst } else { Ordering::Relaxed };
    if plugs.fetch_sub(1, last) == 1 {
        unplugs.full();
        if owed.load(Ordering::Relaxed) {
            rung.fetch_add(1, Ordering::Relaxed);
        }
    }
    submitter.join().unwrap();
    assert!(rung.load(Ordering::Relaxed) > 0, "nobody rings for what was published");
}

#[test]
fn who_publishes_sees_the_sleeper_or_the_sleeper_sees_what_was_published() {
    loom::model(|| sleep(Fence::There, Fence::There));
}

#[test]
fn a_full_fence_left_out_on_either_side_loses_a_wake_up() {
    assert!(is_broken(|| sleep(Fence::LeftOut, Fence::There)), "the publisher's");
    assert!(is_broken(|| sleep(Fence::There, Fence::LeftOut)), "the sleeper's");
}

#[test]
fn who_sees_a_cursor_sees_the_words_below_it_and_none_of_the_next_lap() {
    loom::model(|| ring(Publish::Ordered, Publish::Ordered));
}

#[test]
fn a_cursor_without_release_and_acquire_shows_words_that_are_not_there() {
    assert!(is_broken(|| ring(Publish::Relaxed, Publish::Ordered)));
}

#[test]
fn who_sees_a_completion_taken_sees_its_stamp() {
    loom::model(|| stamp(Publish::Ordered));
    assert!(is_broken(|| stamp(Publish::Relaxed)), "without release and acquire");
}

#[test]
fn a_submission_under_a_plug_is_rung_for_by_one_of_the_two() {
    loom::model(|| plug(Fence::There, Fence::There));
}

#[test]
fn a_fence_left_out_around_a_plug_leaves_a_submission_without_a_ring() {
    assert!(is_broken(|| plug(Fence::LeftOut, Fence::There)), "the submitter's");
    assert!(is_broken(|| plug(Fence::There, Fence::LeftOut)), "the plug's");
}
