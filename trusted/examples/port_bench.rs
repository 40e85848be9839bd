//! What the trusted end of the port costs: `cargo run --release -p postern-trusted --example port_bench`.
//!
//! The round trips run against a host on the same thread that answers at once without moving
//! data, so that they show the lane and its executor, not the daemon.

#[allow(clippy::unwrap_used, reason = "the tests' host: it fails by panicking")]
#[path = "../tests/port/host.rs"]
mod host;

use std::{hint::black_box, time::Instant};

use host::{CountingBell, Host, executor, file};
use postern_trusted::disk::{Disk, Transfer};

/// Runs `work` `times` times, five times over; the best nanoseconds per time.
fn best(times: u32, mut work: impl FnMut()) -> f64 {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            (0..times).for_each(|_| work());
            start.elapsed().as_secs_f64() * 1e9 / f64::from(times)
        })
        .fold(f64::INFINITY, f64::min)
}

#[repr(align(8))]
struct Aligned([u8; 4104]);

fn copies() {
    let (_host, lane) = Host::with_lane(64, 4 << 20, CountingBell::default());
    let disk = file(&lane);
    let mut transfers: Vec<_> =
        (0..64).map(|_| disk.try_transfer(1).expect("the area holds 64")).collect();
    let mut memory = Aligned([7; 4104]);
    for (name, shift) in [("aligned", 0), ("unaligned", 1)] {
        let block: &mut [u8; 4096] =
            (&mut memory.0[shift..shift + 4096]).try_into().expect("a block");
        let mut next = 0;
        let put = best(200_000, || {
            next = (next + 1) % 64;
            transfers[next].put(0, black_box(block));
        });
        let get = best(200_000, || {
            next = (next + 1) % 64;
            transfers[next].get(0, black_box(block));
        });
        println!("4 KiB, {name:9} private block: put {put:6.1} ns, get {get:6.1} ns");
    }
}

fn buffers() {
    let (_host, lane) = Host::with_lane(64, 4 << 20, CountingBell::default());
    let disk = file(&lane);
    for (name, blocks) in [("4 KiB", 1), ("128 KiB", 32)] {
        let cost = best(200_000, || drop(black_box(disk.try_transfer(blocks))));
        println!("take and give back a buffer of {name}: {cost:6.1} ns");
    }
}

fn round_trips(depth: u32) {
    let (mut host, lane) = Host::with_lane(256, 4 << 20, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    for _ in 0..depth {
        let disk = disk.clone();
        executor.spawn(async move {
            let mut place = 0;
            loop {
                let Ok(mut transfer) = disk.transfer(1).await else { return };
                if transfer.read(place).await.is_err() {
                    return;
                }
                place += 1;
            }
        });
    }
    let _active = executor.activate();
    let mut asked = Vec::new();
    let cost = best(200_000 / depth, || {
        while executor.run(usize::MAX) > 0 {}
        asked.extend(host.take().into_iter().map(|submission| (submission.id, submission.length)));
        for (id, length) in asked.drain(..) {
            host.answer(id, length.cast_signed());
        }
        lane.poll(usize::MAX);
    }) / f64::from(depth);
    println!("request and answer without the host's work, depth {depth:3}: {cost:6.1} ns each");
    lane.poison(postern_trusted::port::HostFault::DaemonGone);
    executor.run(usize::MAX);
}

fn main() {
    copies();
    buffers();
    [1, 32, 128].into_iter().for_each(round_trips);
}
