//! Leaves out of a sequence what a difference does not need (delta debugging).

/// Tries at most.
const TRIES: u32 = 120;

/// The fewest of `0..size` found for which `differs` still answers something, with what it
/// answered last; `None` if it does not differ for all of them either.
pub fn shrink<T>(size: u32, differs: impl Fn(&[u32]) -> Option<T>) -> (Vec<u32>, Option<T>) {
    let mut kept: Vec<u32> = (0..size).collect();
    let Some(mut answer) = differs(&kept) else { return (kept, None) };
    let (mut chunk, mut tries) = (kept.len().div_ceil(2), 0);
    loop {
        let mut at = 0;
        let before = kept.len();
        while at < kept.len() && tries < TRIES {
            let end = (at + chunk).min(kept.len());
            let fewer: Vec<u32> = kept[..at].iter().chain(&kept[end..]).copied().collect();
            tries += 1;
            match differs(&fewer) {
                Some(still) => (kept, answer) = (fewer, still),
                None => at = end,
            }
        }
        if tries >= TRIES || (chunk == 1 && kept.len() == before) {
            return (kept, Some(answer));
        }
        chunk = chunk.div_ceil(2).max(1);
    }
}

#[test]
fn shrinking_finds_the_two_steps_that_matter() {
    let needs = |kept: &[u32]| (kept.contains(&3) && kept.contains(&40)).then_some(());
    assert_eq!(shrink(64, needs), (vec![3, 40], Some(())));
}

#[test]
fn what_does_not_differ_again_is_not_shrunk() {
    assert_eq!(shrink(5, |_| None::<()>), (vec![0, 1, 2, 3, 4], None));
}
