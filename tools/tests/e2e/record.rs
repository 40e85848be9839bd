//! The real host writes of a run, recorded below the kernel's own AIO and played back: whatever
//! part of the unflushed ones a power cut leaves, every write that the program saw confirmed is
//! there.
//!
//! The volume lies on a file system of this test, which notes what reaches it: the daemon, the
//! kernel and `O_DIRECT` are the real ones. The program's log lies there, too, so that what was
//! confirmed has its place in the same row of events.
//!
//! `POSTERN_RECORD_STATES` sets how many states are opened (default [`STATES`]),
//! `POSTERN_RECORD_WRITES` how many confirmed writes are recorded (default [`WRITES`]).
//! `cargo xtask crash --record` sets both.

mod replay;
mod stage;

use std::{ffi::OsString, path::Path};

use self::{replay::Replay, stage::Stage};
use crate::common::{World, begin, children, name_of, signal, until};

/// States opened without `POSTERN_RECORD_STATES`.
const STATES: usize = 250;
/// Confirmed writes recorded without `POSTERN_RECORD_WRITES`.
const WRITES: usize = 150;
/// Blocks of the guest's file.
const BLOCKS: u64 = 256;

/// Something that reached the host, in the order in which it did.
enum Event {
    /// Bytes of the volume's host file.
    Write(u64, Vec<u8>),
    /// Everything before is durable.
    Flush,
    /// Lines that the program wrote down.
    Log(Vec<u8>),
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// How many writes the events say are confirmed.
fn confirmed(events: &[Event]) -> usize {
    let lines = events.iter().map(|event| match event {
        Event::Log(text) => text.iter().filter(|c| **c == b'C').count(),
        Event::Write(..) | Event::Flush => 0,
    });
    lines.sum()
}

/// Runs `synclog` on the volume until enough writes are confirmed, and kills it; what reached the
/// host meanwhile.
fn record(world: &World, volume: &Path, writes: usize) -> Option<Vec<Event>> {
    let program = world.guest("synclog")?;
    let stage = Stage::new(world, volume)?;
    let words: Vec<OsString> = vec![
        program.into(),
        "write".into(),
        "/sealed/data".into(),
        stage.log().into(),
        BLOCKS.to_string().into(),
        "77".into(),
    ];
    let mut key = volume.as_os_str().to_owned();
    key.push(".key");
    let mut shown = OsString::from("/sealed/data=");
    shown.push(stage.volume());
    let mut command = world.postern(["run", "--no-probes", "--key-file"]);
    command.arg(key).arg("--volume").arg(shown).arg("--").args(words);
    let mut running = begin(&mut command);
    let mut enough = false;
    until("enough confirmed writes", || {
        enough = stage.look(confirmed) >= writes;
        (enough || !running.is_running()).then_some(())
    });
    if enough {
        let family = children(running.pid());
        let guest = family.into_iter().find(|&pid| name_of(pid) == "synclog");
        signal("KILL", guest.expect("the guest is there"));
    }
    let ended = running.wait();
    assert!(enough, "the guest ended by itself: {}", ended.stderr);
    Some(stage.strike())
}

#[test]
fn whatever_part_of_the_unflushed_host_writes_is_left_every_confirmed_write_is_there() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let base = replay::image_of(&volume);
    let blocks = std::fs::metadata(&volume).unwrap().len() / 4096;
    let Some(events) = record(&world, &volume, number("POSTERN_RECORD_WRITES", WRITES)) else {
        return;
    };
    let flushes = events.iter().filter(|event| matches!(event, Event::Flush)).count();
    assert!(flushes > 20, "only {flushes} flushes reached the host");
    let mut key = volume.into_os_string();
    key.push(".key");
    let key = std::fs::read(key).unwrap().try_into().unwrap();
    let states = number("POSTERN_RECORD_STATES", STATES);
    let opened = Replay::new(base.clone(), blocks, key, BLOCKS).run(&events, states);
    let opened = opened.unwrap_or_else(|lost| panic!("{lost}"));
    println!("{} events, {flushes} flushes, {opened} states opened", events.len());
    assert!(opened >= states.min(events.len()), "only {opened} states");
    // The control: without the flushes the same play finds something lost.
    let mut careless = Replay::new(base, blocks, key, BLOCKS);
    careless.forget_flushes();
    let lost = careless.run(&events, 40).expect_err("a host that forgets what it flushed");
    assert!(lost.contains("was confirmed"), "{lost}");
}
