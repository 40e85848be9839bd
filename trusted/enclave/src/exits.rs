//! How often the enclave is left, and for what, as its host counts it. The emulator is exact; another
//! host may say what it likes: numbers for people, never for a decision.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, IoSliceMut},
    os::fortanix_sgx::usercalls::{self, raw::Fd},
};

/// The host's count.
pub struct Counter(Fd);

/// Exits by what they were for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits(BTreeMap<String, u64>);

impl Counter {
    /// Opens it; a host other than this project's runner has none.
    ///
    /// # Errors
    /// What the host says.
    pub fn open() -> io::Result<Self> {
        usercalls::connect_stream("postern-exits").map(|(stream, ..)| Self(stream))
    }

    /// The exits while `run` runs: what asking costs is taken off, as asking once more shows it.
    ///
    /// # Errors
    /// What the host says; `InvalidData` for an answer that makes no sense.
    pub fn around<R>(&self, run: impl FnOnce() -> R) -> io::Result<(R, Exits)> {
        let first = self.ask()?;
        let before = self.ask()?;
        let done = run();
        let after = self.ask()?;
        let asking = before.less(&first);
        Ok((done, after.less(&before).less(&asking)))
    }

    fn ask(&self) -> io::Result<Exits> {
        let mut text = [0; 1024];
        let length = usercalls::read(self.0, &mut [IoSliceMut::new(&mut text)])?;
        let text = String::from_utf8_lossy(&text[..length]).into_owned();
        Exits::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        usercalls::close(self.0);
    }
}

impl Exits {
    /// Reads `wait 3, flush 1`, or `none`.
    fn parse(text: &str) -> Option<Self> {
        let parts = text.split(", ").filter(|part| *part != "none");
        parts
            .map(|part| {
                let (name, count) = part.rsplit_once(' ')?;
                Some((name.into(), count.parse().ok()?))
            })
            .collect::<Option<_>>()
            .map(Self)
    }

    fn less(&self, other: &Self) -> Self {
        let left = |(name, count): (&String, &u64)| {
            let count = count.saturating_sub(other.0.get(name).copied().unwrap_or(0));
            (count > 0).then(|| (name.clone(), count))
        };
        Self(self.0.iter().filter_map(left).collect())
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} exits", self.total())?;
        let mut before = ": ";
        for (name, count) in &self.0 {
            write!(f, "{before}{name} {count}")?;
            before = ", ";
        }
        Ok(())
    }
}
