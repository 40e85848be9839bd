//! Every target over its checked-in seeds, and over mutations of them that a fixed generator draws:
//! what runs where there is no libFuzzer. `POSTERN_FUZZ_RUNS` sets how many mutations.

use alloc::{format, string::String, vec::Vec};
use std::{eprintln, fs, panic, println, time::Instant};

use super::{TARGETS, Target};

/// Mutations of each target that plain `cargo test` runs.
const RUNS: u64 = 40;

/// A small deterministic generator (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The seeds of a target: a line of hexadecimal digits each; `#` begins a remark.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/fuzz/seeds/{target}.hex", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().split_whitespace().collect())
        .filter(|digits: &String| !digits.is_empty())
        .map(|digits| {
            (0..digits.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
                .collect()
        })
        .collect()
}

fn mutated(seed: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::from(seed);
    for _ in 0..1 + rng.next() % 4 {
        let at = (rng.next() % (bytes.len() as u64 + 1)) as usize;
        match rng.next() % 4 {
            0 if at < bytes.len() => bytes[at] ^= 1 << (rng.next() % 8),
            1 if at < bytes.len() => bytes[at] = rng.next() as u8,
            2 => bytes.extend_from_slice(&rng.next().to_le_bytes()[..4]),
            _ => {
                let patch = rng.next().to_le_bytes();
                let at = at / 4 * 4 % 12;
                bytes.resize(bytes.len().max(at + 4), 0);
                bytes[at..at + 4].copy_from_slice(&patch[..4]);
            }
        }
    }
    bytes
}

fn run(name: &str, target: Target) {
    let runs = std::env::var("POSTERN_FUZZ_RUNS").ok().and_then(|text| text.parse().ok());
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let mut rng = Rng(1);
    let drawn = (0..runs.unwrap_or(RUNS))
        .map(|n| mutated(&seeds[n as usize % seeds.len()], &mut rng))
        .collect::<Vec<_>>();
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

#[test]
fn no_bytes_of_any_structure_give_a_panic_or_a_wrong_byte() {
    // Each on its own thread: they share nothing, and the nonce table is a thread's own.
    std::thread::scope(|scope| {
        let running: Vec<_> = TARGETS
            .iter()
            .map(|(name, target)| (name, scope.spawn(|| run(name, *target))))
            .collect();
        let failed: Vec<_> = running
            .into_iter()
            .filter_map(|(name, thread)| thread.join().is_err().then_some(name))
            .collect();
        assert!(failed.is_empty(), "targets that found something: {failed:?}");
    });
}

/// The control: the targets reach behind the tags, and their model of what is right is sharp.
#[test]
fn a_changed_structure_is_sealed_so_that_it_opens() {
    use super::{super::VolumeError, base::*, host::*, *};
    let open = |base: &Base| {
        let host = Host::new(base.image.clone(), base.blocks, 7);
        wait(Volume::open(&host, &key(), &OpenOptions::default())).map(|(volume, report)| {
            let holes = wait(volume.verify(&host, |_, _| ()));
            (volume.size(), report.records_applied, holes.holes, holes.damaged.len())
        })
    };
    let (closed, synced) = (Base::closed(), Base::synced());
    let before = [open(&closed).unwrap(), open(&synced).unwrap()];
    assert!(before[0].1 == 0 && before[1].1 > 0 && before[0].3 == 0, "{before:?}");

    let mut changed = Base::closed();
    changed.with_superblock(|block| block[88..96].copy_from_slice(&8192_u64.to_le_bytes()));
    assert_eq!(open(&changed).unwrap().0, 8192);

    let mut changed = Base::closed();
    changed.with_superblock(|block| {
        block[48..56].copy_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0]);
        (block[288], block[328]) = (0x60, 1);
    });
    let host = Host::new(changed.image.clone(), changed.blocks, 7);
    let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
    assert_eq!(wait(volume.snapshots(&host)), Err(VolumeError::DamagedSnapshots));

    let names = |base: &Base| {
        let host = Host::new(base.image.clone(), base.blocks, 7);
        let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
        let listed = wait(volume.snapshots(&host)).unwrap();
        listed.into_iter().map(|kept| kept.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&Base::kept()), ["before", "after"]);
    let mut changed = Base::kept();
    changed.with_snapshots(|table| table[32 + 72] = b'B');
    assert_eq!(names(&changed), ["Before", "after"]);

    let mut changed = Base::synced();
    changed.with_journal(1, |block| block[112..].fill(0));
    assert!(open(&changed).unwrap().1 < before[1].1);

    let mut changed = Base::closed();
    changed.with_node(Tree::Map, 1, 0, |node| node.fill(0));
    assert!(open(&changed).unwrap().2 > before[0].2);

    let mut changed = Base::closed();
    changed.with_node(Tree::Epochs, 0, 0, |node| node.fill(0));
    assert!(open(&changed).is_ok());

    let mut changed = Base::closed();
    changed.with_node(Tree::Space, 3, 0, |node| node.fill(0));
    assert!(open(&changed).is_ok());

    assert!(is_known(7, &plain(7, 2)) && is_known(7, &[0; BLOCK]));
    assert!(!is_known(7, &plain(8, 2)) && !is_known(7, &plain(7, 4)));
}
