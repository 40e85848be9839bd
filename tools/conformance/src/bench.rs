//! What an empty request costs: the calls themselves, with hardly any data behind them.
//!
//! Not a test: run it natively and under `postern run` when the machine is quiet and compare.

use std::{ffi::CStr, time::Instant};

use crate::{
    aio::{self, Context, Iocb, op},
    run::hold,
    sys::{self, PAGE, load64},
    world::{SIZE, World, nameless_file},
};

/// How long it measures.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Calls of each kind in one round
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    calls: u32,
    /// Rounds, of which the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// One call or pair of calls; false if it does not answer what it should.
type Call<'a> = Box<dyn FnMut() -> bool + 'a>;

/// Measures and prints a table.
pub fn run(options: &Options, path: &CStr) {
    hold(path);
    let world = World::new(path, c"/", std::fs::File::from(nameless_file()));
    println!("| call | ns, median of {} rounds | fewest | most |", options.rounds);
    println!("|---|---|---|---|");
    for (name, mut call) in calls(&world) {
        let mut times: Vec<u64> = (0..options.rounds)
            .map(|_| {
                let started = Instant::now();
                let wrong = (0..options.calls).filter(|_| !call()).count();
                assert_eq!(wrong, 0, "{name}: wrong answers");
                (started.elapsed().as_nanos() / u128::from(options.calls)) as u64
            })
            .collect();
        times.sort_unstable();
        let (fewest, most) = (times[0], times[times.len() - 1]);
        println!("| {name} | {} | {fewest} | {most} |", times[times.len() / 2]);
    }
}

fn calls(w: &World) -> Vec<(&'static str, Call<'_>)> {
    let cached = w.open(libc::O_RDWR);
    let (context, events, now) = (w.context(64), w.memory(64), w.time(0, 0));
    let request = move |len: u64, offset: u64| {
        let iocb = Iocb::new(op::PREAD, cached, w.memory(PAGE), len, offset.cast_signed());
        w.list(&[w.place(&iocb)])
    };
    let round = move |context: Context, list: u64| {
        aio::submit(context.0, 1, list) == 1
            && aio::get(context.0, 1, 1, events, 0) == 1
            && load64(events + 16) < SIZE
    };
    let (nothing, hole, block) = (request(0, 0), request(PAGE, SIZE - PAGE), request(PAGE, 0));
    vec![
        ("getppid, for scale", Box::new(|| sys::call(libc::SYS_getppid, &[]) > 0)),
        (
            "io_getevents of an empty ring, min 0",
            Box::new(move || aio::get(context.0, 0, 1, events, now) == 0),
        ),
        ("io_submit of nothing", Box::new(move || aio::submit(context.0, 0, 0) == 0)),
        ("io_submit + io_getevents, read of 0 bytes", Box::new(move || round(context, nothing))),
        (
            "io_submit + io_getevents, cached read of a hole, 4096 bytes",
            Box::new(move || round(context, hole)),
        ),
        (
            "io_submit + io_getevents, cached read of data, 4096 bytes",
            Box::new(move || round(context, block)),
        ),
    ]
}
