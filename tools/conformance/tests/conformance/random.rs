//! Random sequences of calls, and the shortest that still differs.

use std::ffi::OsString;

use crate::{
    ground::{Ground, Place, say, side_by_side},
    shrink::shrink,
};

/// Sequences of an ordinary run.
pub const DEFAULT_SEEDS: u64 = 300;
/// Lines shown of a difference.
const LINES: usize = 200;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| {
        text.parse().unwrap_or_else(|error| panic!("{variable}={text}: not a number: {error}"))
    })
}

fn words(seed: u64, count: u64, keep: Option<&[u32]>) -> Vec<OsString> {
    let mut words = vec!["random".to_owned(), "--seed".into(), seed.to_string()];
    words.extend(["--count".into(), count.to_string()]);
    if let Some(keep) = keep {
        let numbers: Vec<String> = keep.iter().map(u32::to_string).collect();
        words.extend(["--keep".into(), numbers.join(",")]);
    }
    words.into_iter().map(OsString::from).collect()
}

#[test]
fn random_sequences_of_calls_answer_inside_what_the_kernel_answers() {
    let Some(ground) = Ground::new() else { return };
    let (seed, count) = (number("POSTERN_CONFORMANCE_SEED"), number("POSTERN_CONFORMANCE_SEEDS"));
    let count = count.unwrap_or(if seed.is_some() { 1 } else { DEFAULT_SEEDS });
    let first = seed.unwrap_or(1);
    let seeds = first..first.saturating_add(count);
    say(&format!("random sequences of seeds {} to {}", seeds.start, seeds.end - 1));
    let [native, inside] = ground.both(&|part, parts| {
        let (part, parts) = (part as u64, parts as u64);
        let count = seeds.end - seeds.start;
        let [from, to] = [part, part + 1].map(|part| seeds.start + count * part / parts);
        words(from, to - from, None)
    });
    let name = |seed: u64| format!("seed {seed}");
    let differ: Vec<u64> =
        seeds.clone().filter(|&seed| native[&name(seed)] != inside[&name(seed)]).collect();
    let Some(&seed) = differ.first() else { return };

    let size = size(&ground, seed);
    let try_out = |keep: &[u32]| {
        // Of nothing the program makes no sequence, and there is nothing in it that could differ.
        if keep.is_empty() {
            return None;
        }
        let run = |place| ground.once(place, 0, &words(seed, 1, Some(keep)));
        let [native, inside] = [Place::Native, Place::Inside].map(run);
        (native != inside).then(|| [native, inside].map(|said| said[&name(seed)].clone()))
    };
    let (keep, shortest) = shrink(size, try_out);
    let shown = match &shortest {
        Some([native, inside]) => side_by_side(native, inside, LINES),
        None => format!(
            "it does not differ each time; the whole of it:\n{}",
            side_by_side(&native[&name(seed)], &inside[&name(seed)], LINES)
        ),
    };
    panic!(
        "{} of {} sequences differ: {differ:?}\nreplay with POSTERN_CONFORMANCE_SEED={seed}; of \
         seed {seed} the steps {keep:?} are left:\n{shown}",
        differ.len(),
        seeds.end - seeds.start,
    );
}

/// Steps and requests of a seed's sequence.
fn size(ground: &Ground, seed: u64) -> u32 {
    let mut arguments = words(seed, 1, None);
    arguments.push("--size".into());
    let said = ground.once(Place::Native, 0, &arguments);
    said["size"][0].parse().unwrap()
}
