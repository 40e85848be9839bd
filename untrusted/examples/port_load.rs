//! The daemon's ceiling: a fake enclave that seals nothing drives 4 KiB random requests through a
//! real posternd at several depths.
//!
//! ```text
//! port_load SOCKET NAME [--seconds S] [--write] [--spin-us US] [DEPTH...]
//! ```
//!
//! Prints one line for each depth: requests a second, and latency as the enclave sees it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use common::{FakeLane, now_ns};
use postern_edl::port::{Completion, Submission, cursor, op};
use posternd::histogram::Histogram;

struct Load {
    seconds: u64,
    operation: u64,
    /// How long the fake enclave spins for completions before it sleeps, nanoseconds.
    spin_ns: u64,
}

fn main() -> ExitCode {
    let mut load = Load { seconds: 5, operation: op::READ, spin_ns: 0 };
    let (mut depths, mut names) = (Vec::new(), Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let number = |text: Option<String>| text.and_then(|t| t.parse().ok()).unwrap_or(1);
        match argument.as_str() {
            "--seconds" => load.seconds = number(arguments.next()),
            "--write" => load.operation = op::WRITE,
            "--spin-us" => load.spin_ns = number(arguments.next()) * 1000,
            text => match text.parse::<usize>() {
                Ok(depth) => depths.push(depth),
                Err(_) => names.push(argument),
            },
        }
    }
    let [socket, name] = names.as_slice() else {
        eprintln!("port_load SOCKET NAME [--seconds S] [--write] [--spin-us US] [DEPTH...]");
        return ExitCode::from(2);
    };
    if depths.is_empty() {
        depths = vec![1, 32, 128];
    }
    for depth in depths {
        run(Path::new(socket), name, depth, &load);
    }
    ExitCode::SUCCESS
}

fn run(socket: &Path, name: &str, depth: usize, load: &Load) {
    let mut lane = FakeLane::attach(socket, depth.next_power_of_two().max(2), depth * 4096);
    let file = lane.open(name);
    let latency = Histogram::new();
    let mut started = vec![0u64; depth];
    let mut generation = vec![0u64; depth];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ now_ns();
    let mut idle: Vec<usize> = (0..depth).collect();
    let mut done: Vec<Completion> = Vec::new();
    let mut batch: Vec<Submission> = Vec::new();
    let (begin, mut asleep) = (now_ns(), 0u64);
    let end = begin + load.seconds * 1_000_000_000;
    let mut in_flight = 0;
    loop {
        let now = now_ns();
        if now < end {
            for index in idle.drain(..) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                generation[index] += 1;
                started[index] = now;
                batch.push(Submission {
                    id: generation[index] << 32 | index as u64,
                    op: load.operation as u32,
                    handle: file.handle,
                    offset: random % file.blocks * 4096,
                    length: 4096,
                    data: lane.block(index),
                    enqueued_ns: now,
                    ..Submission::default()
                });
            }
            in_flight += batch.len();
            lane.submit(&batch);
            batch.clear();
        }
        if in_flight == 0 {
            break;
        }
        let give_up = now_ns() + load.spin_ns;
        while lane.region.word(cursor::CQ_PUBLISHED).load(Ordering::Relaxed) == lane.cq_taken
            && now_ns() < give_up
        {
            std::hint::spin_loop();
        }
        lane.take(&mut done);
        if done.is_empty() {
            asleep += 1;
            lane.sleep();
            lane.take(&mut done);
        }
        let now = now_ns();
        in_flight -= done.len();
        for completion in done.drain(..) {
            assert_eq!(completion.result, 4096, "request {:#x}", completion.id);
            let index = (completion.id & 0xffff_ffff) as usize;
            latency.record(now - started[index]);
            let stamp = lane.region.geometry().stamp_word(index);
            lane.region.word(stamp).store(now, Ordering::Relaxed);
            idle.push(index);
        }
    }
    let spent = (now_ns() - begin) as f64 / 1e9;
    let latency = latency.snapshot();
    println!(
        "depth {depth:4}: {:8.0} requests/s, p50 {:7.1} us, p99 {:7.1} us, {asleep} sleeps",
        latency.count() as f64 / spent,
        latency.quantile(500) as f64 / 1e3,
        latency.quantile(990) as f64 / 1e3,
    );
    let report = lane.stats();
    for row in report.daemon_stages {
        println!(
            "    {:12} {:6} n {:9} p50 {:8.1} us  p99 {:8.1} us (since the daemon started)",
            row.stage,
            row.operation,
            row.count,
            row.p50_ns as f64 / 1e3,
            row.p99_ns as f64 / 1e3
        );
    }
    println!("    {:?}", report.counters);
}
