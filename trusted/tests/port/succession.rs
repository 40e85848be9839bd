//! One daemon ends and another takes over: every request ends once, with its own data.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use postern_edl::port::{Submission, cursor, op};
use postern_trusted::{
    disk::{Disk, HostError, Transfer},
    port::{HostFault, Lane, Sleeper},
};

use crate::host::{CountingBell, Host, executor, file, pattern, settle};

impl Host {
    /// The next daemon of the same region, over the same host file.
    fn successor(self) -> Self {
        Self { taken: 0, answered: 0, ..self }
    }
}

fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % below
    }
}

/// Each task writes blocks of its own and reads them back, over and over.
fn begin_work(
    executor: &postern_trusted::exec::Executor,
    lane: &Lane,
    tasks: u64,
    rounds: u64,
) -> Arc<AtomicUsize> {
    let done = Arc::new(AtomicUsize::new(0));
    for task in 0..tasks {
        let (disk, done) = (file(lane), done.clone());
        executor.spawn(async move {
            for round in 0..rounds {
                let blocks = 1 + usize::try_from((task + round) % 4).unwrap();
                let place = task * 8;
                let seed = |n: usize| (round << 16) + place + n as u64;
                let mut out = disk.transfer(blocks).await.unwrap();
                (0..blocks).for_each(|n| out.put(n, &pattern(seed(n))));
                out.write(place, blocks).await.unwrap();
                drop(out);
                disk.flush().await.unwrap();
                let mut back = disk.transfer(blocks).await.unwrap();
                back.read(place).await.unwrap();
                for n in 0..blocks {
                    let mut block = [0; 4096];
                    back.get(n, &mut block);
                    assert_eq!(block, pattern(seed(n)), "task {task}, round {round}");
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    done
}

#[test]
fn whenever_daemons_end_each_request_ends_once_and_with_its_data() {
    for seed in 0..40 {
        let mut number = numbers(seed);
        let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
        let executor = executor();
        let done = begin_work(&executor, &lane, 12, 6);
        for _ in 0..10 {
            for _ in 0..number(6) {
                executor.run(usize::try_from(number(10)).unwrap());
                let asked = host.take();
                for submission in &asked {
                    // Done and answered, done and not answered, not done.
                    let fate = number(3);
                    if fate < 2 {
                        host.perform(submission, submission.length);
                    }
                    if fate == 0 {
                        host.answer(submission.id, i64::try_from(submission.length).unwrap());
                    }
                }
                lane.poll(usize::try_from(number(6)).unwrap());
            }
            lane.withhold();
            executor.run(usize::try_from(number(20)).unwrap());
            // What the daemon had still published may be taken or not.
            lane.poll(usize::try_from(number(3)).unwrap());
            lane.renew();
            host = host.successor();
            executor.run(usize::try_from(number(20)).unwrap());
            assert_eq!(host.take().len(), 0, "nothing is published before it is released");
            lane.release(|_| false);
        }
        settle(&executor, &lane, &mut host);
        assert_eq!(done.load(Ordering::Relaxed), 72, "seed {seed}");
        assert_eq!((lane.in_flight(), lane.fault()), (0, None), "seed {seed}");
    }
}

#[test]
fn an_answer_to_what_the_daemon_before_was_asked_poisons_the_lane() {
    let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let executor = executor();
    begin_work(&executor, &lane, 1, 1);
    executor.run(usize::MAX);
    let [old] = host.take()[..] else { panic!("one request") };
    lane.withhold();
    lane.renew();
    let mut host = host.successor();
    lane.release(|_| false);
    let [again] = host.take()[..] else { panic!("the same request") };
    assert_eq!(Submission { id: 0, ..old }, Submission { id: 0, ..again });
    assert_ne!(old.id, again.id);
    host.answer(old.id, 4096);
    lane.poll(usize::MAX);
    assert_eq!(lane.fault(), Some(HostFault::UnknownRequest { id: old.id }));
}

#[test]
fn a_flush_that_the_daemon_before_was_at_can_be_ended_with_eio() {
    let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let executor = executor();
    let ended = Arc::new(AtomicUsize::new(0));
    for (handle, expected) in [(7, Ok(())), (9, Err(HostError::Errno(5)))] {
        let disk = lane.file(handle, 100, Arc::new(crate::host::NoPlatform));
        let ended = ended.clone();
        executor.spawn(async move {
            assert_eq!(disk.flush().await, expected, "handle {handle}");
            ended.fetch_add(1, Ordering::Relaxed);
        });
    }
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 2);
    lane.withhold();
    lane.renew();
    let mut host = host.successor();
    lane.release(|handle| handle == 9);
    let asked = host.take();
    assert_eq!((asked.len(), u64::from(asked[0].op), asked[0].handle), (1, op::FLUSH, 7));
    host.answer(asked[0].id, 0);
    lane.poll(usize::MAX);
    executor.run(usize::MAX);
    assert_eq!(ended.load(Ordering::Relaxed), 2);
}

#[test]
fn a_sleeper_that_slept_before_is_seen_by_the_next_daemon_and_rung_for() {
    let bell = CountingBell::default();
    let (host, lane) = Host::with_lane(8, 1 << 20, bell.clone());
    assert!(lane.prepare_sleep(Sleeper::Driver));
    lane.withhold();
    lane.renew();
    let host = host.successor();
    assert_eq!(host.get(cursor::DRIVER_SLEEPS), 1);
    assert_eq!(host.get(cursor::SERVICE_SLEEPS), 0);
    host.set(cursor::DAEMON_SLEEPS, 1);
    let rung = bell.rings();
    lane.release(|_| false);
    assert_eq!(bell.rings(), rung + 1, "what is released may be what the daemon waits for");
    lane.cancel_sleep(Sleeper::Driver);
    assert_eq!(host.get(cursor::DRIVER_SLEEPS), 0);
}
