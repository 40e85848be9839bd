//! The two places where each side stores its own word and then looks at the other's: at least one
//! of the two must see the other, each time. Both act in lockstep, so that it is at one moment.

use std::{
    future::Future,
    hint::spin_loop,
    sync::atomic::{AtomicU64, Ordering, fence},
    task::{Context, Waker},
    thread,
};

use postern_edl::port::cursor;
use postern_trusted::{disk::Disk, port::Sleeper};

use crate::host::{CountingBell, Host, file};

const ROUNDS: u64 = 20_000;

/// Two threads that meet.
#[derive(Default)]
struct Meeting([AtomicU64; 2]);

impl Meeting {
    /// Returns when the other has called it as often.
    fn meet(&self, me: usize) {
        let times = self.0[me].fetch_add(1, Ordering::AcqRel) + 1;
        let mut spins = 0;
        while self.0[1 - me].load(Ordering::Acquire) < times {
            spins += 1;
            if spins % 1000 == 0 {
                thread::yield_now();
            }
            spin_loop();
        }
    }
}

/// The enclave's part in a round. Only `Act` runs beside the host.
enum Part {
    Prepare,
    Act,
    Finish,
}

/// Lets the host and the enclave act at one moment, round after round, the one or the other some
/// steps later. Acting tells whether one saw the other; returns the rounds in which neither did.
fn blind_rounds(
    mut host: impl FnMut() -> bool + Send,
    mut enclave: impl FnMut(Part) -> bool,
) -> u64 {
    let (meeting, seen) = (Meeting::default(), AtomicU64::new(0));
    let wait = |steps: u64| (0..steps).for_each(|_| spin_loop());
    let mut blind = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                meeting.meet(0);
                wait(round % 32);
                seen.store(host().into(), Ordering::Relaxed);
                meeting.meet(0);
            }
        });
        for round in 0..ROUNDS {
            enclave(Part::Prepare);
            meeting.meet(1);
            wait(round / 32 % 32);
            let saw = enclave(Part::Act);
            meeting.meet(1);
            blind += u64::from(!saw && seen.load(Ordering::Relaxed) == 0);
            enclave(Part::Finish);
        }
    });
    blind
}

#[test]
fn a_driver_that_falls_asleep_and_a_daemon_that_answers_never_miss_each_other() {
    let (host, lane) = Host::with_lane(2, 256 << 10, CountingBell::default());
    let (disk, region, geometry) = (file(&lane), host.region, host.geometry);
    let set = |word: usize, value| region[word].store(value, Ordering::Release);
    let mut published = 0;
    let host = || {
        published += 1;
        set(cursor::CQ_PUBLISHED, published);
        fence(Ordering::SeqCst);
        region[cursor::DRIVER_SLEEPS].load(Ordering::Acquire) != 0
    };
    let (mut number, mut request) = (0, None);
    let mut context = Context::from_waker(Waker::noop());
    let blind = blind_rounds(host, |part| match part {
        Part::Prepare => {
            let mut flush = Box::pin(disk.flush());
            assert!(flush.as_mut().poll(&mut context).is_pending());
            request = Some(flush);
            // The answer lies ready; it has only to be announced.
            let id = region[geometry.sqe_word(number)].load(Ordering::Acquire);
            set(geometry.cqe_word(number), id);
            set(geometry.cqe_word(number) + 1, 0);
            number += 1;
            false
        }
        Part::Act => !lane.prepare_sleep(Sleeper::Driver),
        Part::Finish => {
            lane.cancel_sleep(Sleeper::Driver);
            assert_eq!(lane.poll(2), 1);
            request.take().is_some_and(|mut flush| flush.as_mut().poll(&mut context).is_ready())
        }
    });
    assert_eq!((blind, lane.fault()), (0, None), "of {ROUNDS} rounds");
}

#[test]
fn a_daemon_that_falls_asleep_and_a_task_that_submits_never_miss_each_other() {
    let bell = CountingBell::default();
    let (host, lane) = Host::with_lane(2, 256 << 10, bell.clone());
    let (disk, region, geometry) = (file(&lane), host.region, host.geometry);
    let set = |word: usize, value| region[word].store(value, Ordering::Release);
    let mut taken = 0;
    let host = || {
        set(cursor::DAEMON_SLEEPS, 1);
        fence(Ordering::SeqCst);
        let published = region[cursor::SQ_PUBLISHED].load(Ordering::Acquire);
        taken += 1;
        published == taken
    };
    let (mut number, mut rings) = (0, 0);
    let mut context = Context::from_waker(Waker::noop());
    let mut request = None;
    let blind = blind_rounds(host, |part| match part {
        Part::Prepare => {
            set(cursor::DAEMON_SLEEPS, 0);
            rings = bell.rings();
            request = Some(Box::pin(disk.flush()));
            false
        }
        Part::Act => {
            let flush = request.as_mut();
            assert!(flush.is_some_and(|flush| flush.as_mut().poll(&mut context).is_pending()));
            bell.rings() > rings
        }
        Part::Finish => {
            set(
                geometry.cqe_word(number),
                region[geometry.sqe_word(number)].load(Ordering::Acquire),
            );
            set(geometry.cqe_word(number) + 1, 0);
            number += 1;
            set(cursor::CQ_PUBLISHED, number);
            assert_eq!(lane.poll(2), 1);
            request.take().is_some_and(|mut flush| flush.as_mut().poll(&mut context).is_ready())
        }
    });
    assert_eq!((blind, lane.fault()), (0, None), "of {ROUNDS} rounds");
}
