//! How often a host does what kind of thing.

use crate::Rng;

/// How often a host strays, in ten thousandths of what it does. All zero: an honest host, which
/// still answers in any order and at any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Temper {
    /// Writes words that the enclave must not read, rings and sleeps at random: what must not
    /// matter.
    pub fidgets: u32,
    /// Does less than was asked, not too often in a row: what must not matter either.
    pub shorts: u32,
    /// Refuses with any errno, does less than was asked time and again: what the contract allows.
    pub refusals: u32,
    /// Loses, alters, exchanges and brings back blocks, answers what it has not done.
    pub lies: u32,
    /// Breaks the contract of the rings: ids, lengths, cursors that cannot be.
    pub breaches: u32,
    /// Answers no more for a while.
    pub silences: u32,
}

impl Temper {
    /// An honest host.
    pub const HONEST: Self =
        Self { fidgets: 0, shorts: 0, refusals: 0, lies: 0, breaches: 0, silences: 0 };

    /// One of several characters.
    pub fn drawn(rng: &mut Rng) -> Self {
        let fidgets = rng.one_of(&[0, 500, 3000]);
        let shorts = rng.one_of(&[0, 0, 1000]);
        let silences = rng.one_of(&[0, 0, 20]);
        let (refusals, lies, breaches) = rng.one_of(&[
            (0, 0, 0),
            (150, 0, 0),
            (0, 60, 0),
            (0, 600, 0),
            (50, 200, 0),
            (0, 0, 40),
            (30, 60, 40),
            (500, 1500, 300),
        ]);
        Self { fidgets, shorts, refusals, lies, breaches, silences }
    }

    /// One character by its name, for a command line: `honest`, `fidgety`, `refusing`, `lying`,
    /// `breaching`, `silent` or `all`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let honest = Self::HONEST;
        Some(match name {
            "honest" => honest,
            "fidgety" => Self { fidgets: 3000, shorts: 1000, ..honest },
            "refusing" => Self { refusals: 200, ..honest },
            "lying" => Self { fidgets: 500, lies: 100, ..honest },
            "breaching" => Self { fidgets: 500, breaches: 20, ..honest },
            "silent" => Self { silences: 20, ..honest },
            "all" => Self {
                fidgets: 1000,
                shorts: 500,
                refusals: 50,
                lies: 50,
                breaches: 5,
                silences: 1,
            },
            _ => return None,
        })
    }
}
