//! An enclave with a sealed volume.
//!
//! ```text
//! [memory [BLOCKS [REQUESTS]]]      a volume in memory of the host: makes it, does AIO on it at
//!                                   depth 32, verifies every block, opens it again, and sees what
//!                                   the host changed
//! work NAME [--depth N] [--block BYTES] [--requests N] [--writes PERCENT] [--blocks N] [--seed N]
//!      [--daemons N] [--spin-us N] [--plain 1]
//!                                   a load on the volume that a posternd has as NAME, verified, once
//!                                   so many other daemons have taken over; says what the enclave
//!                                   was left for meanwhile
//! store NAME [--puts N]             a key-value store in that volume: says after which put all are
//!                                   durable, again and again
//! check NAME --least N              opens the store, and verifies what N puts or more have left
//! ```
//!
//! With `--seal mrenclave` or `--seal mrsigner` the volume is opened by a key slot of kind `sgx`, whose
//! key no other enclave gets (EGETKEY). Where none opens, and without the option, the key is read
//! from standard input, as a key file holds it: the host that hands it over knows it, so do that
//! where it may, once. Each of them fails if anything is not as it must be.

use std::{io::Read as _, process::ExitCode, sync::Arc};

use postern_enclave::{
    exits::Counter,
    guest::Runtime as _,
    host::Outside,
    process::{Keys, Process},
    store::Store,
    work::{InMemory, Load, Opened},
};
use postern_trusted::{
    disk::BLOCK,
    errno::Errno,
    exec::run_to_end,
    platform::{Memory, Platform as _},
    volume::{FormatOptions, OpenOptions, SealingPolicy, SlotKey, Volume},
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [] => memory(256, 2048),
        ["memory", rest @ ..] => memory_as(rest),
        ["work", name, rest @ ..] => work(name, rest),
        ["store", name, rest @ ..] => store(name, rest),
        ["check", name, rest @ ..] => check(name, rest),
        _ => Err("usage: memory [BLOCKS [REQUESTS]] | work NAME | store NAME | check NAME".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("failed: {what}");
            ExitCode::FAILURE
        }
    }
}

/// The numbers of options `--name N`, in the order of `known`, or what stands there.
fn numbers<const N: usize>(words: &[&str], known: [(&str, u64); N]) -> Result<[u64; N], String> {
    let mut values = known.map(|(_, value)| value);
    for pair in words.chunks(2) {
        let place = known.iter().position(|(name, _)| pair[0].strip_prefix("--") == Some(*name));
        let number = pair.get(1).and_then(|text| text.parse().ok());
        let (Some(place), Some(number)) = (place, number) else {
            return Err(format!("{}: no such option, or no number", pair.join(" ")));
        };
        values[place] = number;
    }
    Ok(values)
}

/// The key on standard input: 32 bytes, or 64 hexadecimal digits; `None` if there is nothing.
fn handed_in() -> Result<Option<SlotKey>, String> {
    let mut text = Vec::new();
    let read = std::io::stdin().lock().take(66).read_to_end(&mut text);
    read.map_err(|error| format!("standard input: {error}"))?;
    let digits = text.strip_suffix(b"\n").unwrap_or(&text);
    let hexadecimal = || {
        let pairs = digits.as_chunks::<2>().0.iter();
        let byte = |pair: &[u8; 2]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = pairs.map(byte).collect();
        bytes.filter(|_| digits.len() == 64)?.try_into().ok()
    };
    if text.is_empty() {
        return Ok(None);
    }
    let key = <[u8; 32]>::try_from(&text[..]).ok().or_else(hexadecimal);
    key.map(|key| Some(SlotKey::new(key))).ok_or_else(|| "standard input holds no key".into())
}

/// `--seal POLICY` of the options, and the others.
fn sealed<'a>(options: &[&'a str]) -> Result<(Option<SealingPolicy>, Vec<&'a str>), String> {
    let Some(at) = options.iter().position(|word| *word == "--seal") else {
        return Ok((None, options.to_vec()));
    };
    let policy = match options.get(at + 1) {
        Some(&"mrenclave") => SealingPolicy::Enclave,
        Some(&"mrsigner") => SealingPolicy::Signer,
        _ => return Err("--seal takes mrenclave or mrsigner".into()),
    };
    Ok((Some(policy), [&options[..at], &options[at + 2..]].concat()))
}

fn work(name: &str, options: &[&str]) -> Result<(), String> {
    let known = [
        ("depth", 32),
        ("block", 4096),
        ("requests", 10_000),
        ("writes", 50),
        ("blocks", 1024),
        ("seed", 1),
        ("daemons", 0),
        ("spin-us", 400),
        ("plain", 0),
    ];
    let (seal, rest) = sealed(options)?;
    let [depth, block, requests, writes, blocks, seed, daemons, spin, plain] =
        numbers(&rest, known)?;
    if block == 0 || !block.is_multiple_of(BLOCK as u64) || block > 1 << 20 {
        return Err("--block must be a multiple of 4096, and at most 1 MiB".into());
    }
    let process = Process::open(name, &Keys { seal, handed_in: &handed_in })?;
    process.spin_for(spin.saturating_mul(1000));
    let blocks = blocks.min(process.size() / block);
    if blocks < depth {
        return Err(format!("{blocks} blocks are too few for {depth} requests at once"));
    }
    let plain = plain != 0;
    let load = Load { depth: depth as usize, bytes: block as usize, writes, blocks, seed, plain };
    let aio = |errno: Errno| format!("AIO: errno {}", errno.0);
    let counter = Counter::open().map_err(|error| format!("the count of exits: {error}"))?;
    let mut run = load.begin(process.clone()).map_err(aio)?;
    println!("at work");
    run.requests(requests / 10 + depth).map_err(aio)?;
    while process.successors() < daemons && run.tally().errors == 0 {
        run.requests(depth).map_err(aio)?;
    }
    // The steady state: whatever had to be made or sought is there.
    let began = process.now_ns();
    let (done, exits) = counter.around(|| run.requests(requests)).map_err(|e| e.to_string())?;
    let took = process.now_ns().saturating_sub(began).max(1);
    done.map_err(aio)?;
    let tally = run.finish().map_err(aio)?;
    println!("{} requests, {} errors, {} wrong blocks", tally.requests, tally.errors, tally.wrong);
    let rate = u128::from(requests) * 1_000_000_000 / u128::from(took);
    println!("{rate} requests/s at depth {depth}, by the host's clock");
    println!("steady state: {requests} requests, {exits}");
    println!("{} other daemon(s) took over", process.successors());
    process.close().map_err(|errno| format!("close: errno {}", errno.0))?;
    if (tally.errors, tally.wrong) != (0, 0) {
        return Err("the volume is not as it was written".into());
    }
    Ok(())
}

/// Keys of the store, written over and over.
const KEYS: u64 = 500;
/// Puts of one commit.
const TOGETHER: u64 = 8;

/// What put number `n` writes: its key and its value.
fn entry(n: u64) -> (String, String) {
    (format!("key {}", n % KEYS), format!("value {n} ").repeat(1 + (n % 40) as usize))
}

fn store(name: &str, options: &[&str]) -> Result<(), String> {
    let (seal, rest) = sealed(options)?;
    let [puts] = numbers(&rest, [("puts", u64::MAX)])?;
    let process = Process::open(name, &Keys { seal, handed_in: &handed_in })?;
    let io = |errno: Errno| format!("the store: errno {}", errno.0);
    let mut store = Store::open(process.clone(), process.size() / BLOCK as u64).map_err(io)?;
    let first = last(&store)? + 1;
    for n in first..first.saturating_add(puts) {
        let (key, value) = entry(n);
        store.put(key.as_bytes(), Some(value.as_bytes())).map_err(io)?;
        if n % TOGETHER == 0 || n + 1 == first.saturating_add(puts) {
            store.commit().map_err(io)?;
            println!("acknowledged {n}");
        }
    }
    drop(store);
    process.close().map_err(|errno| format!("close: errno {}", errno.0))
}

/// The last put that the store knows of; 0: none.
fn last(store: &Store) -> Result<u64, String> {
    let mut last = 0;
    for key in 0..KEYS {
        let Some(value) = store.get(format!("key {key}").as_bytes()) else { continue };
        let number = str::from_utf8(value).ok().and_then(|text| text.split(' ').nth(1));
        let number: u64 =
            number.and_then(|n| n.parse().ok()).ok_or_else(|| format!("key {key} is torn"))?;
        let (whose, whole) = entry(number);
        if whose != format!("key {key}") || whole.as_bytes() != value {
            return Err(format!("key {key} does not hold what was put"));
        }
        last = last.max(number);
    }
    Ok(last)
}

fn check(name: &str, options: &[&str]) -> Result<(), String> {
    let (seal, rest) = sealed(options)?;
    let [least] = numbers(&rest, [("least", 0)])?;
    let process = Process::open(name, &Keys { seal, handed_in: &handed_in })?;
    let io = |errno: Errno| format!("the store: errno {}", errno.0);
    let store = Store::open(process.clone(), process.size() / BLOCK as u64).map_err(io)?;
    let last = last(&store)?;
    println!("the store holds {} keys, up to put {last}", store.len());
    if last < least {
        return Err(format!("put {least} was acknowledged, and {last} is the last one there"));
    }
    // Every put up to the last is there, unless a later one took its place.
    for n in last.saturating_sub(KEYS - 1).max(1)..=last {
        let (key, value) = entry(n);
        if store.get(key.as_bytes()) != Some(value.as_bytes()) {
            return Err(format!("put {n} is lost"));
        }
    }
    println!("every acknowledged put is there");
    drop(store);
    process.close().map_err(|errno| format!("close: errno {}", errno.0))
}

fn memory_as(words: &[&str]) -> Result<(), String> {
    let mut numbers = words.iter().map(|text| text.parse::<u64>());
    match (numbers.next().unwrap_or(Ok(256)), numbers.next().unwrap_or(Ok(2048))) {
        (Ok(blocks), Ok(requests)) => memory(blocks.clamp(32, 4096), requests),
        _ => Err("usage: memory [BLOCKS [REQUESTS]]".into()),
    }
}

fn memory(blocks: u64, requests: u64) -> Result<(), String> {
    let size = blocks * BLOCK as u64;
    let outside = Outside::new(Volume::host_blocks(size));
    let mut key = [0; 32];
    outside.random(&mut key).map_err(|_| "the CPU gives no randomness")?;
    let key = SlotKey::new(key);
    run_to_end(Volume::format(&outside, &key, &FormatOptions { size }))
        .map_err(|error| format!("format: {error:?}"))?;

    let opened = open(&outside, &key)?;
    let load = Load { depth: 32, bytes: BLOCK, writes: 100, blocks, seed: 1, plain: false };
    let refused = |errno: Errno| format!("an AIO call was refused: errno {}", errno.0);
    let mut run = load.begin(Arc::new(InMemory(opened.clone()))).map_err(refused)?;
    run.requests(requests).map_err(refused)?;
    let tally = run.finish().map_err(refused)?;
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
