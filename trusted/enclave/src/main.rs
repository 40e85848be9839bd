//! An enclave that keeps a sealed volume: makes it in memory that the host has, does AIO on it at
//! depth 32, verifies every block, opens it again, and sees what the host changed.
//!
//! `postern enclave run IMAGE -- [BLOCKS [ROUNDS]]`. It fails if anything is not as it must be.

use std::{process::ExitCode, sync::Arc};

use postern_enclave::{
    host::Outside,
    work::{DEPTH, Opened, Work},
};
use postern_trusted::{
    disk::BLOCK,
    exec::run_to_end,
    platform::{Memory, Platform as _},
    volume::{FormatOptions, OpenOptions, SlotKey, Volume},
};

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let (blocks, rounds) = (numbers.next(), numbers.next());
    let (Ok(blocks), Ok(rounds)) = (blocks.unwrap_or(Ok(256)), rounds.unwrap_or(Ok(64))) else {
        eprintln!("usage: [BLOCKS [ROUNDS]]");
        return ExitCode::FAILURE;
    };
    match work(blocks.clamp(DEPTH, 4096), rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("failed: {what}");
            ExitCode::FAILURE
        }
    }
}

fn work(blocks: u64, rounds: u64) -> Result<(), String> {
    let size = blocks * BLOCK as u64;
    let outside = Outside::new(Volume::host_blocks(size));
    let mut key = [0; 32];
    outside.random(&mut key).map_err(|_| "the CPU gives no randomness")?;
    let key = SlotKey::new(key);
    run_to_end(Volume::format(&outside, &key, &FormatOptions { size }))
        .map_err(|error| format!("format: {error:?}"))?;

    let opened = open(&outside, &key)?;
    let tally = Work::new(opened.clone())
        .write_and_verify(blocks, rounds)
        .ok_or("an AIO call was refused")?;
    println!("{} requests, {} errors, {} wrong blocks", tally.requests, tally.errors, tally.wrong);
    if (tally.errors, tally.wrong) != (0, 0) {
        return Err("the volume is not as it was written".into());
    }
    if outside.holds(b"postern 0") {
        return Err("the host sees what was written".into());
    }
    println!("the host sees none of it");
    run_to_end(opened.volume.close(&outside)).map_err(|error| format!("close: {error:?}"))?;
    drop(opened);

    // The same volume again, and one bit changed in every block of the host's.
    let opened = open(&outside, &key)?;
    for place in 0..outside.blocks() {
        outside.flip_a_bit(place);
    }
    let buffer = Memory::new(vec![0; size as usize]);
    let read = run_to_end(opened.volume.read(&outside, 0, &buffer));
    match read {
        Err(error) => println!("a host that changes blocks is found out: errno {}", error.0),
        Ok(_) => return Err("a changed block was read".into()),
    }
    Ok(())
}

fn open(outside: &Outside, key: &SlotKey) -> Result<Arc<Opened>, String> {
    let (volume, _) = run_to_end(Volume::open(outside, key, &OpenOptions::default()))
        .map_err(|error| format!("open: {error:?}"))?;
    Ok(Arc::new(Opened { volume, outside: outside.clone() }))
}
