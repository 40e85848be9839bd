//! A daemon on a thread of its own: no wake-up is lost, no byte is mixed up.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};

use postern_edl::port::cursor;
use postern_trusted::{
    disk::{Disk, Transfer},
    exec::Executor,
    port::{Doorbell, Lane, Sleeper, Switchless},
};

use crate::host::{Host, file, pattern};

/// Only turns a hang into a failure; no test waits for it to pass.
const HANG: Duration = Duration::from_secs(120);

/// Like an eventfd in an epoll set: a ring wakes everybody who looked before it.
#[derive(Clone, Default)]
struct Bell(Arc<(Mutex<u64>, Condvar)>);

impl Bell {
    fn seen(&self) -> u64 {
        *self.0.0.lock().unwrap()
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() += 1;
        self.0.1.notify_all();
    }

    fn wait_past(&self, seen: u64) {
        let rung = self.0.0.lock().unwrap();
        let (_rung, timeout) =
            self.0.1.wait_timeout_while(rung, HANG, |rings| *rings == seen).unwrap();
        assert!(!timeout.timed_out(), "a wake-up was lost");
    }
}

struct DaemonBell(Bell, Instant);

impl Switchless for DaemonBell {
    fn postern_wake(&self, _port: u64) -> Result<(), u32> {
        self.0.ring();
        Ok(())
    }

    /// The drivers here sleep by themselves: they wait for each other too.
    fn postern_sleep(&self, _port: u64, _sleeper: Sleeper, _limit_ns: u64) -> Result<(), u32> {
        Err(38)
    }
}

impl Doorbell for DaemonBell {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.1.elapsed().as_nanos()).unwrap()
    }
}

/// Serves until told to stop. Returns how often it slept.
fn daemon(mut host: Host, mine: &Bell, enclave: &Bell, stop: &AtomicBool) -> u64 {
    let mut sleeps = 0;
    loop {
        if host.serve() > 0 {
            fence(Ordering::SeqCst);
            if host.get(cursor::DRIVER_SLEEPS) != 0 {
                enclave.ring();
            }
            continue;
        }
        if stop.load(Ordering::Acquire) {
            return sleeps;
        }
        let seen = mine.seen();
        host.set(cursor::DAEMON_SLEEPS, 1);
        fence(Ordering::SeqCst);
        if host.get(cursor::SQ_PUBLISHED) == host.taken && !stop.load(Ordering::Acquire) {
            sleeps += 1;
            mine.wait_past(seen);
        }
        host.set(cursor::DAEMON_SLEEPS, 0);
    }
}

/// Drives until all tasks are done.
fn driver(lane: &Lane, executor: &Executor, bell: &Bell) {
    loop {
        let active = executor.activate();
        {
            let _plug = lane.plug();
            while lane.poll(64) + executor.run(64) > 0 {}
        }
        drop(active);
        let seen = bell.seen();
        if executor.live() == 0 {
            bell.ring(); // The other drivers.
            return;
        }
        if lane.prepare_sleep(Sleeper::Driver) && !executor.has_ready() && executor.live() > 0 {
            bell.wait_past(seen);
        }
        lane.cancel_sleep(Sleeper::Driver);
    }
}

fn exchange(tasks: u64, rounds: u64, entries: usize, drivers: usize) {
    let (to_daemon, to_enclave) = (Bell::default(), Bell::default());
    let bell = DaemonBell(to_daemon.clone(), Instant::now());
    let (host, lane) = Host::with_lane(entries, 256 << 10, bell);
    let notify = to_enclave.clone();
    let executor = Executor::new(move || notify.ring());
    let done = Arc::new(AtomicU64::new(0));
    for task in 0..tasks {
        let (disk, done) = (file(&lane), done.clone());
        executor.spawn(async move {
            let (mut block, mut expected) = ([0; 4096], [0; 4096]);
            for round in 0..rounds {
                let mut transfer = disk.transfer(1).await.unwrap();
                if round % 64 == 0 {
                    expected = pattern(task << 32 | round);
                    transfer.put(0, &expected);
                    transfer.write(task, 1).await.unwrap();
                } else {
                    transfer.read(task).await.unwrap();
                    transfer.get(0, &mut block);
                    assert!(block == expected, "task {task}, round {round}");
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let serving = scope.spawn(|| daemon(host, &to_daemon, &to_enclave, &stop));
        let drive = || driver(&lane, &executor, &to_enclave);
        let driving: Vec<_> = (0..drivers).map(|_| scope.spawn(drive)).collect();
        let driven: Vec<_> = driving.into_iter().map(|thread| thread.join()).collect();
        stop.store(true, Ordering::Release);
        to_daemon.ring();
        let sleeps = serving.join().unwrap();
        driven.into_iter().for_each(|driver| driver.unwrap());
        println!("{sleeps} sleeps of the daemon, {:?}", lane.stats());
    });
    assert_eq!(done.load(Ordering::Relaxed), tasks * rounds);
    assert_eq!((lane.in_flight(), lane.fault()), (0, None));
}

#[test]
fn two_hundred_thousand_requests_pass_between_threads_without_a_lost_wake_up() {
    exchange(32, 6250, 16, 1);
}

#[test]
fn one_request_at_a_time_passes_between_threads_without_a_lost_wake_up() {
    exchange(1, 20_000, 2, 1);
}

#[test]
fn two_drivers_share_a_lane_without_a_lost_wake_up() {
    exchange(24, 2000, 8, 2);
}
