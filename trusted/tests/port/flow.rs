//! The honest way: data, order, laps, doorbells, sleep, claims and stamps.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use postern_edl::port::{Geometry, MAGIC, cursor, header, op};
use postern_trusted::{
    disk::{Disk, Transfer},
    platform::Platform,
    port::{Doorbell, Lane, PortError, SharedWords, Sleeper, Switchless},
};

use crate::host::{CountingBell, Host, executor, file, pattern, settle};

#[test]
fn blocks_written_are_read_back_whole() {
    let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let checked = Arc::new(AtomicUsize::new(0));
    for blocks in [1, 2, 3, 5, 8, 13, 21, 32] {
        let (disk, checked) = (disk.clone(), checked.clone());
        executor.spawn(async move {
            let place = blocks as u64 * 100;
            let mut out = disk.transfer(blocks).await.unwrap();
            (0..blocks).for_each(|n| out.put(n, &pattern(place + n as u64)));
            out.write(place, blocks).await.unwrap();
            drop(out);
            let mut back = disk.transfer(blocks).await.unwrap();
            assert_eq!(back.blocks(), blocks);
            (0..blocks).for_each(|n| back.put(n, &[0; 4096]));
            back.read(place).await.unwrap();
            for n in 0..blocks {
                let mut block = [0; 4096];
                back.get(n, &mut block);
                assert_eq!(block, pattern(place + n as u64), "block {n} of {blocks}");
                checked.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    settle(&executor, &lane, &mut host);
    assert_eq!((executor.live(), checked.load(Ordering::Relaxed)), (0, 85));
    assert_eq!((lane.in_flight(), lane.fault()), (0, None));
}

#[test]
fn a_write_of_fewer_blocks_than_the_buffer_leaves_the_rest_of_the_file_alone() {
    let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    executor.spawn(async move {
        let mut out = disk.transfer(4).await.unwrap();
        (0..4).for_each(|n| out.put(n, &pattern(n as u64)));
        out.write(10, 2).await.unwrap();
    });
    settle(&executor, &lane, &mut host);
    assert_eq!(host.blocks.keys().copied().collect::<Vec<_>>(), [10, 11]);
}

#[test]
fn descriptors_reach_the_daemon_in_the_order_of_submission_and_fully_described() {
    let (mut host, lane) = Host::with_lane(16, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    for n in 0..10_u64 {
        let disk = disk.for_guest(1000 + n, 50 + n);
        executor.spawn(async move {
            let mut out = disk.transfer(1).await.unwrap();
            let _ = out.write(n, 1).await;
        });
    }
    executor.spawn(async move {
        let _ = disk.flush().await;
    });
    executor.run(usize::MAX);
    let taken = host.take();
    assert_eq!(taken.len(), 11);
    let data = host.geometry.data_offset as u64..host.geometry.region_bytes() as u64;
    for (n, sub) in (0..10).zip(&taken) {
        assert_eq!((u64::from(sub.op), sub.handle), (op::WRITE, 7));
        assert_eq!((sub.offset, sub.length), (n * 4096, 4096));
        assert!(data.contains(&sub.data) && sub.data.is_multiple_of(4096));
        assert_eq!((sub.submitted_ns, sub.guest), (1000 + n, 50 + n));
        assert_eq!(sub.enqueued_ns, n + 1, "the clock at publishing");
    }
    let flush = taken[10];
    assert_eq!((u64::from(flush.op), flush.handle), (op::FLUSH, 7));
    assert_eq!((flush.offset, flush.length, flush.data), (0, 0, 0));
    assert_eq!((flush.submitted_ns, flush.guest), (0, 0), "the volume's own");
    let mut ids: Vec<_> = taken.iter().map(|sub| sub.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 11);
    assert!(ids.iter().all(|id| id & 0xffff_ffff < 16 && id >> 32 != 0));
}

#[test]
fn rings_go_round_for_many_laps_without_losing_a_request() {
    for entries in [2, 4, 16] {
        let (mut host, lane) = Host::with_lane(entries, 1 << 20, CountingBell::default());
        let (executor, disk) = (executor(), file(&lane));
        let done = Arc::new(AtomicUsize::new(0));
        for task in 0..7_u64 {
            let (disk, done) = (disk.clone(), done.clone());
            executor.spawn(async move {
                let mut transfer = disk.transfer(1).await.unwrap();
                let mut block = [0; 4096];
                for round in 0..500 {
                    transfer.put(0, &pattern(task << 32 | round));
                    transfer.write(task, 1).await.unwrap();
                    transfer.read(task).await.unwrap();
                    transfer.get(0, &mut block);
                    assert_eq!(block, pattern(task << 32 | round));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        settle(&executor, &lane, &mut host);
        assert_eq!(done.load(Ordering::Relaxed), 7 * 500);
        assert_eq!(host.get(cursor::CQ_TAKEN), 7000);
        let stats = lane.stats();
        assert_eq!((stats.submitted, stats.completed), (7000, 7000));
    }
}

#[test]
fn answers_in_any_order_reach_the_right_tasks() {
    let (mut host, lane) = Host::with_lane(16, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let finished = Arc::new(Mutex::new(Vec::new()));
    for n in 0..16_u64 {
        let (disk, finished) = (disk.clone(), finished.clone());
        executor.spawn(async move {
            let mut transfer = disk.transfer(1).await.unwrap();
            let answer = transfer.read(n).await;
            finished.lock().unwrap().push((n, answer.is_ok()));
        });
    }
    executor.run(usize::MAX);
    let mut asked = host.take();
    asked.reverse();
    for sub in &asked {
        let odd = sub.offset / 4096 % 2 == 1;
        host.answer(sub.id, if odd { -5 } else { 4096 });
    }
    assert_eq!(lane.poll(5), 5, "the limit holds");
    assert_eq!(lane.poll(usize::MAX), 11);
    executor.run(usize::MAX);
    let expected: Vec<_> = (0..16).rev().map(|n| (n, n % 2 == 0)).collect();
    assert_eq!(*finished.lock().unwrap(), expected);
}

/// The calls of postern.edl that make no message: made for this port, and only when they are due.
#[test]
fn a_lane_sleeps_only_over_an_empty_ring_and_says_whose_port_it_is() {
    let bell = CountingBell::default();
    let (mut host, lane) = Host::with_lane(8, 1 << 20, bell.clone());
    let (executor, disk) = (executor(), file(&lane));
    let port = host.region.as_ptr().addr() as u64;
    lane.sleep(Sleeper::Service, 7);
    assert_eq!(bell.slept(), [(port, Sleeper::Service, 7)]);
    assert_eq!(host.get(cursor::SERVICE_SLEEPS), 0, "awake again, although the bell said no");
    host.set(cursor::DAEMON_SLEEPS, 1);
    executor.spawn(async move { disk.flush().await.unwrap() });
    while executor.run(usize::MAX) > 0 {}
    assert_eq!((bell.rings(), bell.rung()), (1, port));
    assert_eq!(host.serve(), 1);
    lane.sleep(Sleeper::Driver, u64::MAX);
    assert_eq!(bell.slept().len(), 1, "there is something to poll");
    settle(&executor, &lane, &mut host);
    lane.sleep(Sleeper::Driver, u64::MAX);
    assert_eq!(bell.slept()[1..], [(port, Sleeper::Driver, u64::MAX)]);
}

#[test]
fn the_doorbell_rings_exactly_when_the_daemon_sleeps() {
    let bell = CountingBell::default();
    let (mut host, lane) = Host::with_lane(8, 1 << 20, bell.clone());
    let (executor, disk) = (executor(), file(&lane));
    let flush = || {
        let disk = disk.clone();
        executor.spawn(async move { disk.flush().await.unwrap() });
    };
    flush();
    settle(&executor, &lane, &mut host);
    assert_eq!(bell.rings(), 0, "awake");
    host.set(cursor::DAEMON_SLEEPS, 1);
    flush();
    settle(&executor, &lane, &mut host);
    assert_eq!(bell.rings(), 1, "asleep");
    host.set(cursor::DAEMON_SLEEPS, 0);
    flush();
    settle(&executor, &lane, &mut host);
    assert_eq!(bell.rings(), 1, "awake again");
    assert_eq!(lane.stats().doorbells, 1);
}

#[test]
fn a_plug_makes_a_batch_ring_once_and_an_empty_one_not_at_all() {
    let bell = CountingBell::default();
    let (mut host, lane) = Host::with_lane(8, 1 << 20, bell.clone());
    let (executor, disk) = (executor(), file(&lane));
    host.set(cursor::DAEMON_SLEEPS, 1);
    drop(lane.plug());
    assert_eq!(bell.rings(), 0);
    let outer = lane.plug();
    for _ in 0..5 {
        let (disk, inner) = (disk.clone(), lane.plug());
        executor.spawn(async move { disk.flush().await.unwrap() });
        executor.run(usize::MAX);
        drop(inner);
    }
    assert_eq!((bell.rings(), host.get(cursor::SQ_PUBLISHED)), (0, 5), "published, not rung");
    drop(outer);
    assert_eq!(bell.rings(), 1);
    drop(lane.plug());
    assert_eq!(bell.rings(), 1);
    settle(&executor, &lane, &mut host);
    assert_eq!(executor.live(), 0);
}

#[test]
fn a_sleeper_shows_its_flag_and_does_not_sleep_on_a_completion() {
    let (mut host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let flags = |host: &Host| (host.get(cursor::DRIVER_SLEEPS), host.get(cursor::SERVICE_SLEEPS));
    assert!(lane.prepare_sleep(Sleeper::Driver));
    assert!(lane.prepare_sleep(Sleeper::Driver));
    assert!(lane.prepare_sleep(Sleeper::Service));
    assert_eq!(flags(&host), (1, 1));
    lane.cancel_sleep(Sleeper::Driver);
    assert_eq!(flags(&host), (1, 1), "another driver still sleeps");
    lane.cancel_sleep(Sleeper::Driver);
    lane.cancel_sleep(Sleeper::Service);
    assert_eq!(flags(&host), (0, 0));

    executor.spawn(async move { disk.flush().await.unwrap() });
    executor.run(usize::MAX);
    assert_eq!(lane.in_flight(), 1);
    assert!(lane.prepare_sleep(Sleeper::Driver), "nothing there yet");
    lane.cancel_sleep(Sleeper::Driver);
    host.serve();
    assert!(lane.needs_drive());
    assert!(!lane.prepare_sleep(Sleeper::Driver), "a completion is waiting");
    lane.cancel_sleep(Sleeper::Driver);
    assert_eq!(lane.poll(1), 1);
    assert!(!lane.needs_drive() && lane.in_flight() == 0);
}

#[test]
fn the_stamp_of_an_index_is_stored_with_its_completion() {
    let bell = CountingBell::default();
    let (mut host, lane) = Host::with_lane(8, 1 << 20, bell.clone());
    let (executor, disk) = (executor(), file(&lane));
    executor.spawn(async move { disk.flush().await.unwrap() });
    executor.run(usize::MAX);
    let id = host.take()[0].id;
    let stamp = host.geometry.stamp_word(usize::try_from(id & 0xffff_ffff).unwrap());
    assert_eq!(host.get(stamp), 0);
    host.answer(id, 0);
    lane.poll(1);
    assert_eq!((host.get(stamp), bell.ticks()), (2, 2), "enqueued at 1, delivered at 2");
}

/// A host that answers at the very moment at which the enclave looks at the clock, its second answer
/// told as taken at the time that the clock shows then.
struct AnsweringBell {
    clock: CountingBell,
    /// The second answer, once: who gives it, and its request.
    late: Arc<Mutex<Option<(Host, u64)>>>,
}

impl Switchless for AnsweringBell {
    fn postern_wake(&self, port: u64) -> Result<(), u32> {
        self.clock.postern_wake(port)
    }

    fn postern_sleep(&self, port: u64, sleeper: Sleeper, limit_ns: u64) -> Result<(), u32> {
        self.clock.postern_sleep(port, sleeper, limit_ns)
    }
}

impl Doorbell for AnsweringBell {
    fn now_ns(&self) -> u64 {
        let now = self.clock.now_ns();
        if let Some((mut host, id)) = self.late.lock().unwrap().take() {
            // The host's clock goes on as well.
            self.clock.now_ns();
            host.answer(id, 0);
        }
        now
    }
}

#[test]
fn a_stamp_is_no_older_than_the_answer_that_it_is_for() {
    let (clock, late) = (CountingBell::default(), Arc::default());
    let bell = AnsweringBell { clock: clock.clone(), late: Arc::clone(&late) };
    let (mut host, lane) = Host::with_lane(8, 1 << 20, bell);
    let executor = executor();
    for _ in 0..2 {
        let disk = file(&lane);
        executor.spawn(async move { disk.flush().await.unwrap() });
    }
    executor.run(usize::MAX);
    let ids: Vec<u64> = host.take().iter().map(|submission| submission.id).collect();
    host.answer(ids[0], 0);
    let (region, geometry) = (host.region, host.geometry);
    *late.lock().unwrap() = Some((host, ids[1]));
    let answered = clock.ticks() + 2;
    while lane.poll(usize::MAX) > 0 {}
    assert_eq!(lane.in_flight(), 0);
    let stamp = geometry.stamp_word(usize::try_from(ids[1] & 0xffff_ffff).unwrap());
    let stamp = region[stamp].load(Ordering::Acquire);
    assert!(stamp > answered, "delivered at {stamp}, answered at {answered}");
}

#[test]
fn the_header_describes_the_region_and_the_cursors_start_at_zero() {
    let (host, _lane) = Host::with_lane(64, 1 << 20, CountingBell::default());
    assert_eq!(host.get(header::MAGIC), MAGIC);
    assert_eq!(host.get(header::VERSION), 1);
    assert_eq!(host.get(header::ENTRIES), 64);
    // 8192 + 64 * (64 + 32 + 8) = 14848, rounded up to 16384.
    assert_eq!(host.get(header::DATA_OFFSET), 16384);
    assert_eq!(host.get(header::DATA_BYTES), 1 << 20);
    assert!((512..16384 / 8).all(|word| host.get(word) == 0));
}

#[test]
fn a_region_that_does_not_fit_its_geometry_is_refused() {
    let refuse = |bytes: usize, geometry| {
        let region = Box::leak(vec![0_u64; bytes / 8].into_boxed_slice());
        let base = region.as_mut_ptr().cast();
        // SAFETY: 1. Leaked. 2. The reference ended with the cast.
        let words = unsafe { SharedWords::new(base, bytes, |_, _| true) }.unwrap();
        Lane::new(words, geometry, CountingBell::default()).err()
    };
    let geometry = Geometry::new(8, 1 << 20).unwrap();
    let needed = geometry.region_bytes();
    assert_eq!(refuse(needed, geometry), None);
    let short = PortError::RegionTooShort { needed, bytes: needed - 8 };
    assert_eq!(refuse(needed - 8, geometry), Some(short));
    let moved = Geometry { cq_offset: geometry.cq_offset + 32, ..geometry };
    assert_eq!(refuse(needed, moved), Some(PortError::BadGeometry));
    let small = Geometry::new(8, 124 << 10).unwrap();
    assert_eq!(refuse(needed, small), Some(PortError::BadGeometry));
}

#[test]
fn the_disk_answers_for_its_platform_and_its_size() {
    let (_host, lane) = Host::with_lane(8, 1 << 20, CountingBell::default());
    let disk = file(&lane).for_guest(5, 6);
    assert_eq!((disk.now_ns(), disk.host_blocks()), (4711, 1_000_000));
    assert!(disk.random(&mut [0]).is_err());
}
