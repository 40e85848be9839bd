//! When ids or buffers run out, and when tasks go away.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use postern_trusted::{
    disk::{Disk, HostError, Transfer},
    port::HostFault,
};

use crate::host::{CountingBell, Host, executor, file, pattern, settle};

fn poll<F: Future + ?Sized>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn no_more_than_the_entries_are_in_flight_and_the_rest_follows_in_order() {
    let (mut host, lane) = Host::with_lane(4, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    for n in 0..20_u64 {
        let disk = disk.clone();
        executor.spawn(async move {
            let mut transfer = disk.transfer(1).await.unwrap();
            transfer.read(n).await.unwrap();
        });
    }
    let mut order = Vec::new();
    while executor.live() > 0 {
        executor.run(usize::MAX);
        assert!(lane.in_flight() <= 4);
        let asked = host.take();
        order.extend(asked.iter().map(|sub| sub.offset / 4096));
        for sub in asked {
            host.answer(sub.id, 4096);
        }
        lane.poll(usize::MAX);
    }
    assert_eq!(order, (0..20).collect::<Vec<_>>());
}

#[test]
fn a_request_that_gives_up_waiting_for_an_id_lets_the_next_one_in() {
    let (mut host, lane) = Host::with_lane(2, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let flush = || {
        let disk = disk.clone();
        Box::pin(async move { disk.flush().await })
    };
    let (mut a, mut b, mut c) = (flush(), flush(), flush());
    for future in [&mut a, &mut b, &mut c] {
        assert!(poll(future).is_pending());
    }
    let last = flush();
    executor.spawn(async move { last.await.unwrap() });
    executor.run(usize::MAX);
    let asked = host.take();
    assert_eq!(asked.len(), 2);
    host.answer(asked[0].id, 0);
    lane.poll(1);
    assert_eq!(poll(&mut a), Poll::Ready(Ok(())), "it is the third one's turn");
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 0);
    drop(c);
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 1, "the last one is in");
}

#[test]
fn a_newcomer_does_not_pass_a_request_that_waits_for_an_id() {
    let (mut host, lane) = Host::with_lane(2, 1 << 20, CountingBell::default());
    let disk = file(&lane);
    let ask = |place| {
        let disk = disk.clone();
        Box::pin(async move { disk.transfer(1).await?.read(place).await })
    };
    let (mut first, mut second, mut third) = (ask(1), ask(2), ask(3));
    for future in [&mut first, &mut second, &mut third] {
        assert!(poll(future).is_pending());
    }
    host.serve();
    lane.poll(1);
    assert_eq!(poll(&mut first), Poll::Ready(Ok(())));
    let mut newcomer = ask(4);
    assert!(poll(&mut newcomer).is_pending());
    assert_eq!(host.take().len(), 0, "an id is free, but the third was here before");
    assert!(poll(&mut third).is_pending());
    assert_eq!(host.take()[0].offset, 3 * 4096);
}

#[test]
fn several_free_ids_serve_all_that_wait() {
    let (mut host, lane) = Host::with_lane(2, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let flush = || {
        let disk = disk.clone();
        Box::pin(async move { disk.flush().await })
    };
    let (mut a, mut b) = (flush(), flush());
    assert!(poll(&mut a).is_pending() && poll(&mut b).is_pending());
    for _ in 0..2 {
        let waits = flush();
        executor.spawn(async move { waits.await.unwrap() });
    }
    executor.run(usize::MAX);
    for asked in host.take() {
        host.answer(asked.id, 0);
    }
    lane.poll(2);
    assert!(poll(&mut a).is_ready() && poll(&mut b).is_ready());
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 2);
}

#[test]
fn ids_of_tasks_that_went_away_serve_those_that_wait() {
    let (mut host, lane) = Host::with_lane(2, 1 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let flush = || {
        let disk = disk.clone();
        Box::pin(async move { disk.flush().await })
    };
    let (mut gone, mut late) = (flush(), flush());
    assert!(poll(&mut gone).is_pending() && poll(&mut late).is_pending());
    let asked = host.take();
    for _ in 0..2 {
        let disk = disk.clone();
        executor.spawn(async move { disk.flush().await.unwrap() });
    }
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 0);
    drop(gone);
    host.answer(asked[0].id, 0);
    lane.poll(1);
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 1, "the one that was answered after it was dropped");
    host.answer(asked[1].id, 0);
    lane.poll(1);
    drop(late);
    executor.run(usize::MAX);
    assert_eq!(host.take().len(), 1, "the one that was answered before it was dropped");
}

#[test]
fn neither_large_nor_small_transfers_starve() {
    // Room for one large transfer. Small ones keep coming; the large one must get its turn, and
    // after it the small ones again.
    let (mut host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let log = Arc::new(Mutex::new(Vec::new()));
    for task in 0..40 {
        let (disk, log) = (disk.clone(), log.clone());
        let blocks = if task % 10 == 5 { 32 } else { 1 };
        executor.spawn(async move {
            for _ in 0..3 {
                let mut transfer = disk.transfer(blocks).await.unwrap();
                log.lock().unwrap().push((task, blocks));
                transfer.read(task).await.unwrap();
            }
        });
    }
    settle(&executor, &lane, &mut host);
    assert_eq!(executor.live(), 0);
    let log = log.lock().unwrap();
    // First come, first served: the first turns of all tasks are in the order of their calls.
    let mut first: Vec<u64> = Vec::new();
    for (task, _) in log.iter() {
        if !first.contains(task) {
            first.push(*task);
        }
    }
    assert_eq!(first, (0..40).collect::<Vec<_>>());
}

#[test]
fn try_transfer_takes_what_is_free_and_never_passes_somebody_who_waits() {
    let (_host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let disk = file(&lane);
    let half = disk.try_transfer(16).unwrap();
    assert!(disk.try_transfer(32).is_none());
    let small = disk.try_transfer(1).unwrap();
    let mut waits = Box::pin(disk.transfer(32));
    assert!(poll(&mut waits).is_pending());
    assert!(disk.try_transfer(1).is_none(), "a large one waits");
    drop(half);
    assert!(poll(&mut waits).is_pending());
    drop(small);
    let Poll::Ready(Ok(large)) = poll(&mut waits) else { panic!("the area is free") };
    assert!(disk.try_transfer(1).is_none());
    drop(large);
    assert!(disk.try_transfer(1).is_some());
    for blocks in [0, 33, usize::MAX] {
        assert!(disk.try_transfer(blocks).is_none());
        let refused = poll(&mut Box::pin(disk.transfer(blocks)));
        assert!(matches!(refused, Poll::Ready(Err(HostError::Errno(22)))));
    }
}

#[test]
fn who_gives_up_waiting_for_a_buffer_lets_the_next_one_in() {
    let (_host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let all = disk.try_transfer(32).unwrap();
    let mut large = Box::pin(disk.transfer(32));
    assert!(poll(&mut large).is_pending());
    let got = Arc::new(AtomicUsize::new(0));
    let (inner, seen) = (disk.clone(), got.clone());
    executor.spawn(async move {
        let transfer = inner.transfer(1).await.unwrap();
        seen.fetch_add(transfer.blocks(), Ordering::Relaxed);
    });
    executor.run(usize::MAX);
    let half = {
        drop(all);
        disk.try_transfer(16)
    };
    assert!(half.is_none());
    executor.run(usize::MAX);
    assert_eq!(got.load(Ordering::Relaxed), 0, "not past the large one");
    drop(large);
    executor.run(usize::MAX);
    assert_eq!(got.load(Ordering::Relaxed), 1);
}

#[test]
fn room_for_several_serves_all_that_wait() {
    let (_host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let all = disk.try_transfer(32).unwrap();
    let held = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..5 {
        let (disk, held) = (disk.clone(), held.clone());
        executor.spawn(async move {
            let transfer = disk.transfer(4).await.unwrap();
            held.lock().unwrap().push(transfer);
        });
    }
    executor.run(usize::MAX);
    assert_eq!(held.lock().unwrap().len(), 0);
    drop(all);
    executor.run(usize::MAX);
    assert_eq!(held.lock().unwrap().len(), 5);
}

#[test]
fn a_buffer_whose_task_went_away_is_not_used_again_before_the_host_has_answered() {
    let (mut host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let disk = file(&lane);
    let mut task = Box::pin({
        let disk = disk.clone();
        async move { disk.transfer(32).await?.read(0).await }
    });
    assert!(poll(&mut task).is_pending());
    let asked = host.take()[0];
    drop(task);
    assert!(disk.try_transfer(1).is_none(), "the host may still write into it");
    assert_eq!(lane.in_flight(), 1);
    host.answer(asked.id, 131_072);
    assert_eq!(lane.poll(usize::MAX), 1);
    assert!(disk.try_transfer(32).is_some());
    assert_eq!((lane.in_flight(), lane.fault()), (0, None));
}

#[test]
fn a_transfer_whose_read_was_dropped_in_flight_is_spent() {
    let (mut host, lane) = Host::with_lane(16, 128 << 10, CountingBell::default());
    let disk = file(&lane);
    let mut transfer = disk.try_transfer(32).unwrap();
    transfer.put(0, &pattern(1));
    {
        let mut read = pin!(transfer.read(0));
        assert!(read.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let asked = host.take()[0];
    transfer.put(0, &pattern(2));
    let shared = usize::try_from(asked.data / 8).unwrap();
    let lies = host.get(shared).to_le_bytes();
    assert_eq!(lies, pattern(1)[..8], "the buffer belongs to the host");
    let mut block = pattern(3);
    transfer.get(0, &mut block);
    assert_eq!(block, [0; 4096]);
    let refused = poll(&mut Box::pin(transfer.write(0, 1)));
    assert_eq!(refused, Poll::Ready(Err(HostError::Errno(125))));
    drop(transfer);
    assert!(disk.try_transfer(1).is_none());
    host.answer(asked.id, -5);
    lane.poll(1);
    assert!(disk.try_transfer(32).is_some());
}

#[test]
fn all_tasks_of_a_lane_whose_daemon_is_gone_end_wherever_they_wait() {
    let (mut host, lane) = Host::with_lane(2, 256 << 10, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    let ends = Arc::new(Mutex::new(Vec::new()));
    for n in 0..6 {
        // Two in flight of which one answered, then one that waits for an id, three for buffers.
        let (disk, ends) = (disk.clone(), ends.clone());
        executor.spawn(async move {
            let end = match disk.transfer(if n < 3 { 8 } else { 32 }).await {
                Ok(mut transfer) => transfer.read(n).await,
                Err(error) => Err(error),
            };
            ends.lock().unwrap().push((n, end));
        });
    }
    executor.run(usize::MAX);
    let asked = host.take();
    host.answer(asked[0].id, 32768);
    assert_eq!(lane.poll(1), 1);
    lane.poison(HostFault::DaemonGone);
    lane.poison(HostFault::UnknownRequest { id: 0 });
    assert_eq!(lane.fault(), Some(HostFault::DaemonGone), "the first one stays");
    executor.run(usize::MAX);
    assert_eq!(executor.live(), 0);
    let mut ends = ends.lock().unwrap().clone();
    ends.sort_unstable_by_key(|end| end.0);
    assert_eq!(ends[0], (0, Ok(())), "what was answered before counts");
    assert!(ends[1..].iter().all(|end| end.1 == Err(HostError::Gone)), "{ends:?}");
    assert!(disk.try_transfer(1).is_none());
    assert_eq!(poll(&mut Box::pin(disk.flush())), Poll::Ready(Err(HostError::Gone)));
    assert_eq!(lane.in_flight(), 0);
    host.answer(asked[1].id, 32768);
    assert_eq!((lane.poll(10), lane.needs_drive()), (0, false), "nothing is taken any more");
}
