//! Fuzz targets without a fuzzer: their checked-in seeds, and mutations of them that a fixed
//! generator draws. `POSTERN_FUZZ_RUNS` sets how many mutations.
//!
//! The seeds lie in `trusted/fuzz/seeds`, where `cargo xtask fuzz` finds them too: a line of
//! hexadecimal digits each; `#` begins a remark.

use std::{fs, panic, time::Instant};

use crate::Rng;

/// A fuzz target: takes bytes of any content, panics if something does not hold.
pub type Target = fn(&[u8]);

/// Where the seeds lie.
const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../trusted/fuzz/seeds");

/// Mutations of each target that plain `cargo test` runs.
const RUNS: u64 = 40;

/// Runs `target` over its seeds, and over as many mutations of them as `POSTERN_FUZZ_RUNS` says, or
/// `mutations` if it says nothing.
///
/// # Panics
/// As the target does, after its input was printed; if the seeds cannot be read or are none.
pub fn run(name: &str, target: Target, mutations: Option<u64>) {
    let asked = std::env::var("POSTERN_FUZZ_RUNS").ok().and_then(|text| text.parse().ok());
    let mutations = asked.or(mutations).unwrap_or(RUNS);
    let seeds = seeds(name);
    let mut rng = Rng::new(1);
    let drawn: Vec<Vec<u8>> = (0..mutations)
        .map(|_| {
            let seed = rng.index(seeds.len());
            mutated(&seeds[seed], &mut rng)
        })
        .collect();
    let began = Instant::now();
    for input in seeds.iter().chain(&drawn) {
        if let Err(cause) = panic::catch_unwind(|| target(input)) {
            let digits: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("target `{name}` fell over this input: {digits}");
            panic::resume_unwind(cause);
        }
    }
    println!("{name}: {} inputs in {} ms", seeds.len() + drawn.len(), began.elapsed().as_millis());
}

/// The seeds of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let path = format!("{SEEDS}/{target}.hex");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let seeds: Vec<Vec<u8>> = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().split_whitespace().collect())
        .filter(|digits: &String| !digits.is_empty())
        .map(|digits| {
            let byte = |pair: &[u8]| {
                let pair = String::from_utf8_lossy(pair);
                u8::from_str_radix(&pair, 16).unwrap_or_else(|_| panic!("{path}: no byte: {pair}"))
            };
            digits.as_bytes().chunks(2).map(byte).collect()
        })
        .collect();
    assert!(!seeds.is_empty(), "{path}: no seeds");
    seeds
}

fn mutated(seed: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=rng.below(4) {
        let at = rng.index(bytes.len() + 1);
        let [first, second, ..] = rng.any().to_le_bytes();
        match rng.below(5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << (first % 8),
            1 if at < bytes.len() => bytes[at] = first,
            2 => bytes.extend_from_slice(&rng.any().to_le_bytes()[..4]),
            3 => bytes.insert(at, second),
            _ => {
                // A whole patch, where the first ones stand.
                let at = at / 4 * 4 % 12;
                bytes.resize(bytes.len().max(at + 4), 0);
                bytes[at..at + 4].copy_from_slice(&rng.any().to_le_bytes()[..4]);
            }
        }
    }
    bytes
}
