//! What a daemon does wrong, by name.

use postern_hostile::{Rng, Temper, replies::Manners};

/// How it rings the enclave's doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bells {
    /// When somebody sleeps.
    AsAgreed,
    /// All the time.
    Always,
    /// Never.
    Never,
}

/// The character of a daemon.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// At the ring and with the files.
    pub temper: Temper,
    /// On the control connection.
    pub manners: Manners,
    /// With the doorbells.
    pub bells: Bells,
    /// Bits of buffers and completions flip, and flip back at once, while the enclave reads.
    pub flickers: bool,
    /// Hangs up so often amid the work of a lane, in ten thousandths of what it does there.
    pub leaves: u32,
    /// Goes on with a lane's memory after it has hung up.
    pub haunts: bool,
    /// Says that a file was closed however often it is told to.
    pub forgetful: bool,
    /// Does nothing any more after so many things at one lane.
    pub mute_after: Option<u64>,
    /// The first lane is attached as it should be; else no program gets anywhere.
    pub spares_first: bool,
}

const HONEST: Script = Script {
    temper: Temper::HONEST,
    manners: Manners::HONEST,
    bells: Bells::AsAgreed,
    flickers: false,
    leaves: 0,
    haunts: false,
    forgetful: false,
    mute_after: None,
    spares_first: true,
};

/// The scripts there are.
pub const NAMES: [&str; 13] = [
    "honest",
    "fidgety",
    "ringing",
    "never-ringing",
    "refusing",
    "lying",
    "breaching",
    "flickering",
    "misinforming",
    "hanging-up",
    "haunting",
    "mute",
    "everything",
];

impl Script {
    /// The script of this name; what it leaves open, the seed decides.
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let mut rng = Rng::new(seed ^ 0x5c21_7000);
        let tempered = |name| Temper::named(name).map(|temper| Self { temper, ..HONEST });
        let hang_ups = Manners { hang_ups: 1500, ..Manners::HONEST };
        let misinforming = Manners { lies: 2500, refusals: 500, nonsense: 500, ..Manners::HONEST };
        let spares_first = !rng.chance(2000);
        Some(match name {
            "ringing" => Self { bells: Bells::Always, ..tempered("fidgety")? },
            "never-ringing" => Self { bells: Bells::Never, ..HONEST },
            "flickering" => Self { flickers: true, ..HONEST },
            "misinforming" => Self { manners: misinforming, spares_first, ..HONEST },
            "hanging-up" => Self { manners: hang_ups, leaves: 20, forgetful: true, ..HONEST },
            "haunting" => Self { leaves: 20, haunts: true, ..HONEST },
            "mute" => Self { mute_after: Some(1 + rng.below(400)), ..HONEST },
            "everything" => Self {
                manners: Manners { hang_ups: 500, ..misinforming },
                bells: rng.one_of(&[Bells::AsAgreed, Bells::Always, Bells::Never]),
                flickers: rng.chance(5000),
                leaves: 10,
                haunts: rng.chance(5000),
                forgetful: true,
                spares_first,
                ..tempered("all")?
            },
            name => tempered(name).filter(|_| NAMES.contains(&name))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_has_a_name_and_only_one_is_honest() {
        for name in NAMES {
            let script = Script::named(name, 3).unwrap();
            assert_eq!(format!("{script:?}") == format!("{HONEST:?}"), name == "honest", "{name}");
        }
        assert!(Script::named("silent", 3).is_none() && Script::named("", 3).is_none());
    }
}
