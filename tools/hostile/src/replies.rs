//! What a hostile host answers to control calls.

use postern_edl::calls::{PosternAttached, PosternFile, PosternLease};

use crate::Rng;

/// How often a host answers a control call otherwise than it should, in ten thousandths of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Manners {
    /// Tells something else than there is: sizes, handles, alignments, flags, lists, leases.
    pub lies: u32,
    /// Refuses with any errno, whether it has done what was asked or not.
    pub refusals: u32,
    /// Answers bytes that are no reply.
    pub nonsense: u32,
    /// Hangs up instead of an answer, whether it has done what was asked or not.
    pub hang_ups: u32,
}

impl Manners {
    /// A host that answers as it should.
    pub const HONEST: Self = Self { lies: 0, refusals: 0, nonsense: 0, hang_ups: 0 };
}

/// Any of the numbers that are dear to bugs, or one near `true_one`.
pub fn number(rng: &mut Rng, true_one: u64) -> u64 {
    match rng.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << 63,
        3 => u64::from(u32::MAX),
        4 => true_one.wrapping_add(1),
        5 => true_one.wrapping_sub(1),
        6 => true_one ^ 1 << rng.below(64),
        _ => rng.any(),
    }
}

/// The same as 32 bits.
#[allow(clippy::cast_possible_truncation, reason = "any bits will do")]
fn word(rng: &mut Rng, true_one: u32) -> u32 {
    number(rng, true_one.into()) as u32
}

/// Tells something else of a file that was opened or made.
pub fn twist_file(rng: &mut Rng, file: &mut PosternFile) {
    match rng.below(4) {
        0 => file.handle = word(rng, file.handle),
        1 => file.flags = word(rng, file.flags),
        2 => file.blocks = number(rng, file.blocks),
        _ => file.alignment = number(rng, file.alignment),
    }
}

/// Tells something else of a lane that was attached.
pub fn twist_attached(rng: &mut Rng, attached: &mut PosternAttached) {
    match rng.below(5) {
        0 => attached.version = word(rng, attached.version),
        1 => attached.lane = word(rng, attached.lane),
        2 => attached.features = number(rng, attached.features),
        3 => attached.session = number(rng, attached.session),
        _ => attached.token[rng.index(2)] = rng.any(),
    }
}

/// Tells something else of a lease; of one that nobody asked for, too.
pub fn twist_lease(rng: &mut Rng, lease: &mut PosternLease) {
    if rng.chance(5000) {
        lease.handle = word(rng, lease.handle);
    } else {
        lease.state = word(rng, lease.state);
    }
}

/// Tells other ids than there are, of 32 bytes each: some left out, twice, in another order,
/// made up, no digits, cut in the middle. Answers the length that is told with them.
pub fn twist_ids(rng: &mut Rng, ids: &mut Vec<u8>) -> u64 {
    const DIGITS: usize = 32;
    let count = ids.len() / DIGITS;
    let at = rng.index(count.max(1)) * DIGITS;
    match rng.below(7) {
        0 if count > 0 => drop(ids.drain(at..at + DIGITS)),
        1 if count > 0 => ids.extend_from_within(at..at + DIGITS),
        2 => {
            let mut all: Vec<&[u8]> = ids.chunks(DIGITS).collect();
            all.reverse();
            *ids = all.concat();
        }
        3 => ids.extend(format!("{:032x}", rng.any()).bytes()),
        4 => ids.iter_mut().skip(at).take(DIGITS).for_each(|byte| *byte = b'/'),
        5 => {
            let some = rng.index(ids.len() + 1);
            ids.iter_mut().skip(some).take(3).for_each(|byte| *byte = 0xff);
        }
        _ => ids.truncate(rng.index(ids.len() + 1)),
    }
    if rng.chance(3000) { number(rng, ids.len() as u64) } else { ids.len() as u64 }
}

/// Makes something of an encoded reply that may be none.
pub fn mangle(rng: &mut Rng, reply: &mut Vec<u8>) {
    match rng.below(5) {
        0 => reply.truncate(rng.index(reply.len()).max(1)),
        1 => reply.extend((0..=rng.below(4096)).map(|n| n.to_le_bytes()[0])),
        2 if !reply.is_empty() => {
            let at = rng.index(reply.len());
            reply[at] ^= 1 << rng.below(8);
        }
        3 => {
            let words = 1 + rng.below(64);
            *reply = (0..words).flat_map(|_| rng.any().to_le_bytes()).collect();
        }
        _ => *reply = vec![0xff; 1 + rng.index(64)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_never_empty_which_would_be_a_hang_up_and_never_longer_than_a_message() {
        let mut rng = Rng::new(7);
        for length in (0..400).chain([128 << 10]) {
            for _ in 0..20 {
                let mut reply = vec![1; length];
                mangle(&mut rng, &mut reply);
                assert!((1..=(128 << 10) + 4096).contains(&reply.len()) || length == 0);
            }
        }
    }

    #[test]
    fn ids_of_any_number_can_be_twisted() {
        let mut rng = Rng::new(8);
        for count in 0..5 {
            for _ in 0..200 {
                let mut ids = "0123456789abcdef".repeat(2 * count).into_bytes();
                twist_ids(&mut rng, &mut ids);
                assert!(ids.len() <= 32 * (count + 1));
            }
        }
    }
}
