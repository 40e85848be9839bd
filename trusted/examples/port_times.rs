//! What crossing the port costs, as `cargo xtask port` prints it.
//!
//! ```text
//! port_times             two threads on two processors: times of the port and of a doorbell
//! port_times count N     N requests on one thread: for a tool that counts instructions
//! ```
//!
//! The host here answers at once and moves no data, so that the port shows and nothing behind it.

#[allow(clippy::unwrap_used, reason = "the tests' host: it fails by panicking")]
#[path = "../tests/port/host.rs"]
mod host;

use std::{
    hint::spin_loop,
    mem::{size_of, zeroed},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use host::{CountingBell, Host, executor, file};
use postern_edl::port::{Completion, Geometry, SQE_WORDS, Submission, cursor};
use postern_trusted::{
    disk::{Disk, Transfer},
    exec::Executor,
    port::{Doorbell, HostFault, Lane, Sleeper, Switchless},
};

/// Requests of one measurement, and how many measurements; the first is to warm up.
const REQUESTS: usize = 20_000;
const ROUNDS: usize = 11;
/// Rings of a doorbell.
const RINGS: usize = 2_000;
/// Long enough for a thread that says so to be asleep, nanoseconds.
const FALL_ASLEEP_NS: u64 = 50_000;

/// CLOCK_MONOTONIC in nanoseconds.
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// The first two processors that this thread may run on.
fn processors() -> Option<[usize; 2]> {
    // SAFETY: all zeros is a set, and it is writable for its length.
    let set = unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        set
    };
    // SAFETY: the number is below the set's.
    let mut allowed =
        (0..libc::CPU_SETSIZE as usize).filter(|n| unsafe { libc::CPU_ISSET(*n, &set) });
    Some([allowed.next()?, allowed.next()?])
}

fn run_on(processor: usize) {
    // SAFETY: all zeros is a set; it is readable for its length.
    unsafe {
        let mut set: libc::cpu_set_t = zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Nobody sleeps; time is the machine's.
struct Awake;

impl Switchless for Awake {
    fn postern_wake(&self, _port: u64) -> Result<(), u32> {
        Ok(())
    }
    fn postern_sleep(&self, _port: u64, _sleeper: Sleeper, _limit_ns: u64) -> Result<(), u32> {
        Ok(())
    }
}

impl Doorbell for Awake {
    fn now_ns(&self) -> u64 {
        now_ns()
    }
}

fn median(mut numbers: Vec<u64>) -> (u64, u64) {
    numbers.sort_unstable();
    (numbers[numbers.len() / 2], numbers[numbers.len() * 99 / 100])
}

/// Has a task read block after block for ever.
fn reads(executor: &Executor, lane: &Lane) {
    let disk = file(lane);
    executor.spawn(async move {
        let mut place = 0;
        while let Ok(mut transfer) = disk.transfer(1).await {
            if transfer.read(place).await.is_err() {
                return;
            }
            place = (place + 1) % 1000;
        }
    });
}

/// Answers each descriptor as soon as it is seen; keeps how long each was on its way.
fn answer(region: &[AtomicU64], geometry: &Geometry, stop: &AtomicBool) -> Vec<u64> {
    let (mut taken, mut ways) = (0, Vec::with_capacity(REQUESTS * (ROUNDS + 1)));
    while !stop.load(Ordering::Relaxed) {
        if region[cursor::SQ_PUBLISHED].load(Ordering::Acquire) == taken {
            spin_loop();
            continue;
        }
        let at = geometry.sqe_word(taken);
        let words: [u64; SQE_WORDS] =
            std::array::from_fn(|n| region[at + n].load(Ordering::Relaxed));
        let asked = Submission::from_words(words);
        let seen_ns = now_ns();
        ways.push(seen_ns.saturating_sub(asked.enqueued_ns));
        let result = asked.length.cast_signed();
        let done = Completion { id: asked.id, result, reaped_ns: seen_ns, published_ns: seen_ns };
        let to = geometry.cqe_word(taken);
        for (n, word) in done.to_words().into_iter().enumerate() {
            region[to + n].store(word, Ordering::Relaxed);
        }
        taken += 1;
        region[cursor::SQ_TAKEN].store(taken, Ordering::Release);
        region[cursor::CQ_PUBLISHED].store(taken, Ordering::Release);
    }
    ways
}

/// A request's way through the lane to a host that spins, and back.
fn port(here: usize, there: usize) {
    let (host, lane) = Host::with_lane(64, 4 << 20, Awake);
    let (region, geometry, stop) = (host.region, host.geometry, AtomicBool::new(false));
    let (trips, ways) = thread::scope(|scope| {
        let other = scope.spawn(|| {
            run_on(there);
            answer(region, &geometry, &stop)
        });
        run_on(here);
        let executor = executor();
        reads(&executor, &lane);
        let _active = executor.activate();
        let trips: Vec<u64> = (0..ROUNDS)
            .map(|_| {
                let start = now_ns();
                for _ in 0..REQUESTS {
                    executor.run(usize::MAX);
                    while lane.poll(1) == 0 {
                        spin_loop();
                    }
                }
                (now_ns() - start) / REQUESTS as u64
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        (trips, other.join().unwrap_or_default())
    });
    lane.poison(HostFault::DaemonGone);
    let (way, late) = median(ways.into_iter().skip(REQUESTS).collect());
    let fewest = trips[1..].iter().min().copied().unwrap_or_default();
    let (trip, _) = median(trips[1..].to_vec());
    println!("one way, from the task to the host: {way} ns (99 % within {late})");
    println!("round trip, from task to task: {trip} ns (fewest {fewest})");
}

/// A cache line's way to the other processor and back: what no port can be faster than.
fn line(here: usize, there: usize) {
    #[repr(align(128))]
    struct Word(AtomicU64);
    let (ask, reply) = (Word(AtomicU64::new(0)), Word(AtomicU64::new(0)));
    let last = (REQUESTS * ROUNDS) as u64;
    let wait = |word: &Word, for_what: u64| {
        while word.0.load(Ordering::Acquire) != for_what {
            spin_loop();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            run_on(there);
            for n in 1..=last {
                wait(&ask, n);
                reply.0.store(n, Ordering::Release);
            }
        });
        run_on(here);
        let start = now_ns();
        for n in 1..=last {
            ask.0.store(n, Ordering::Release);
            wait(&reply, n);
        }
        println!("a word's round trip, for scale: {} ns", (now_ns() - start) / last);
    });
}

/// From a ring of an eventfd until the thread that waited for it runs.
fn doorbell(here: usize, there: usize) {
    // SAFETY: takes no pointers.
    let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    let (asleep, rung_ns, woken_ns) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let latencies: Vec<u64> = thread::scope(|scope| {
        scope.spawn(|| {
            run_on(there);
            for n in 1..=RINGS as u64 {
                let mut word = 0_u64;
                asleep.store(n, Ordering::Release);
                // SAFETY: eight writable bytes.
                unsafe { libc::read(bell, (&raw mut word).cast(), 8) };
                woken_ns.store(now_ns(), Ordering::Release);
            }
        });
        run_on(here);
        (1..=RINGS as u64)
            .map(|n| {
                while asleep.load(Ordering::Acquire) != n {
                    spin_loop();
                }
                let until = now_ns() + FALL_ASLEEP_NS;
                while now_ns() < until {
                    spin_loop();
                }
                woken_ns.store(0, Ordering::Release);
                rung_ns.store(now_ns(), Ordering::Relaxed);
                let one = 1_u64;
                // SAFETY: eight readable bytes.
                unsafe { libc::write(bell, (&raw const one).cast(), 8) };
                loop {
                    let woken = woken_ns.load(Ordering::Acquire);
                    if woken != 0 {
                        return woken.saturating_sub(rung_ns.load(Ordering::Relaxed));
                    }
                    spin_loop();
                }
            })
            .collect()
    });
    // SAFETY: our own, and both threads are done with it.
    unsafe { libc::close(bell) };
    let (latency, late) = median(latencies);
    println!("doorbell, from the ring until the sleeper runs: {latency} ns (99 % within {late})");
}

/// Requests and answers on one thread.
fn count(requests: usize) {
    let (mut host, lane) = Host::with_lane(64, 4 << 20, CountingBell::default());
    let executor = executor();
    reads(&executor, &lane);
    let _active = executor.activate();
    for _ in 0..requests {
        executor.run(usize::MAX);
        for asked in host.take() {
            host.answer(asked.id, asked.length.cast_signed());
        }
        lane.poll(1);
    }
    lane.poison(HostFault::DaemonGone);
    executor.run(usize::MAX);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, number] = arguments.as_slice()
        && word == "count"
        && let Ok(requests) = number.parse()
    {
        return count(requests);
    }
    match processors() {
        Some([here, there]) => {
            line(here, there);
            port(here, there);
            doorbell(here, there);
        }
        None => println!("SKIPPED: one processor, and two sides that spin"),
    }
}
