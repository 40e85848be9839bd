//! Monotonic counters: where they are, how they are asked, what the operator does with them.
//!
//! Everything here runs in the launcher, which holds the keys anyway: the simulated enclave asks it
//! over a socket of the run ([`serve`]). In real SGX the same exchange, its TLS included, has to
//! happen inside the enclave.
//!
//! Holds: credentials appear in no message; a counter that gives no answer in time is an error,
//! never a guess.

mod command;
mod etcd;
mod file;
mod serve;

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use clap::Args;
use postern_trusted::{
    counter::{Answer, Counter, CounterError, Moves, Record, Swapped},
    volume::{CounterUse, VolumeError},
};

pub use self::{command::command, serve::Server};
use crate::error::{Exit, Failure};

/// How a counter is reached; part of several commands.
#[derive(Args, Debug, Default)]
pub struct CounterArgs {
    /// Monotonic counter of the volume, against rollback: file:PATH (development only), or
    /// etcd:URL[,URL...]/KEY. With several volumes give one for each, in their order
    #[arg(long, value_name = "COUNTER")]
    pub counter: Vec<OsString>,
    #[command(flatten)]
    pub access: AccessArgs,
}

/// What etcd asks for.
#[derive(Args, Clone, Debug, Default)]
pub struct AccessArgs {
    /// Certificates (PEM) of the authority that etcd's certificate must come from; without it the
    /// usual public authorities
    #[arg(long, value_name = "FILE")]
    pub counter_ca: Option<std::path::PathBuf>,
    /// Certificate and private key (PEM, in one file) to show to etcd
    #[arg(long, value_name = "FILE")]
    pub counter_cert: Option<std::path::PathBuf>,
    /// File with NAME:PASSWORD of an etcd user
    #[arg(long, value_name = "FILE")]
    pub counter_login: Option<std::path::PathBuf>,
}

/// `--counter-moves`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MovesArg {
    /// At each opening and clean close
    Open,
    /// At each checkpoint too, in the background
    #[default]
    Checkpoint,
    /// Before each fsync returns, too
    Sync,
}

impl From<MovesArg> for Moves {
    fn from(arg: MovesArg) -> Self {
        match arg {
            MovesArg::Open => Self::Open,
            MovesArg::Checkpoint => Self::Checkpoint,
            MovesArg::Sync => Self::Sync,
        }
    }
}

/// Why a counter did not answer.
#[derive(Debug)]
struct Trouble {
    error: CounterError,
    text: String,
}

impl Trouble {
    fn new(error: CounterError, text: impl ToString) -> Self {
        Self { error, text: text.to_string() }
    }
}

/// A place that keeps one record and changes it by compare-and-swap. Blocks its caller.
trait Provider: Send + Sync {
    fn load(&self) -> Result<Option<Record>, Trouble>;
    fn swap(&self, old: Option<Record>, new: Record) -> Result<Swapped, Trouble>;
}

/// One counter.
pub struct Source {
    name: String,
    provider: Box<dyn Provider>,
    trouble: Mutex<String>,
}

impl Source {
    /// The counter that `text` names.
    ///
    /// # Errors
    /// [`Exit::Usage`] if it names none; those of reading certificates and logins.
    pub fn parse(text: &OsStr, access: &AccessArgs) -> Result<Arc<Self>, Failure> {
        let name = text.to_string_lossy().into_owned();
        let bad = |what: &str, advice: &str| Failure::new(Exit::Usage, what, &name, advice);
        let provider: Box<dyn Provider> = if let Some(path) = name.strip_prefix("file:") {
            let path = std::path::absolute(path)
                .map_err(|_| bad("no path in the counter", "write file:PATH"))?;
            Box::new(file::FileCounter::new(path))
        } else if let Some(rest) = name.strip_prefix("etcd:") {
            let (urls, key) = etcd::parse(rest)
                .ok_or_else(|| bad("not an etcd counter", "write etcd:https://HOST:2379/KEY"))?;
            Box::new(etcd::EtcdCounter::new(urls, key, access)?)
        } else {
            return Err(bad("not a counter", "write file:PATH or etcd:URL/KEY"));
        };
        Ok(Arc::new(Self { name, provider, trouble: Mutex::default() }))
    }

    /// The counters of a command line.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_all(args: &CounterArgs) -> Result<Vec<Arc<Self>>, Failure> {
        args.counter.iter().map(|text| Self::parse(text, &args.access)).collect()
    }

    /// The one counter of a command that takes one volume.
    ///
    /// # Errors
    /// As [`Self::parse`]; [`Exit::Usage`] if several were given.
    pub fn one(args: &CounterArgs) -> Result<Option<Arc<Self>>, Failure> {
        let mut all = Self::parse_all(args)?;
        let last = all.pop();
        if all.is_empty() {
            return Ok(last);
        }
        Err(Failure::new(
            Exit::Usage,
            "several counters",
            all.len() + 1,
            "one volume has one counter",
        ))
    }

    /// What it holds.
    ///
    /// # Errors
    /// [`Exit::NoCounter`].
    pub fn look(&self) -> Result<Option<Record>, Failure> {
        self.provider.load().map_err(|trouble| {
            self.note(&trouble);
            self.failure(trouble.error)
        })
    }

    /// For opening a volume. Blocks where the answers are awaited: for tools without other work.
    pub fn used(self: &Arc<Self>, adopt: bool) -> CounterUse {
        CounterUse { counter: Arc::new(Blocking(self.clone())), moves: Moves::Open, adopt }
    }

    /// What a refusal of a volume that was opened with this counter means to the operator, if it
    /// is about the counter.
    pub fn explain(&self, volume: &Path, error: &VolumeError) -> Option<Failure> {
        let place = volume.display();
        Some(match error {
            VolumeError::Counter(error) => self.failure(*error),
            VolumeError::NotBound | VolumeError::CounterEmpty { .. } => Failure::new(
                Exit::RolledBack,
                error,
                place,
                "check --counter; to bind the volume as it is: `postern counter reset`",
            ),
            VolumeError::RolledBack { .. } => Failure::new(
                Exit::RolledBack,
                error,
                place,
                "find the newest copy; to accept this one on purpose: `postern counter reset`",
            ),
            VolumeError::CounterLost => {
                Failure::new(Exit::InUse, error, place, "find out who else uses the volume")
            }
            _ => return None,
        })
    }

    fn failure(&self, error: CounterError) -> Failure {
        let text = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        Failure::new(
            Exit::NoCounter,
            format_args!("{error}: {text}"),
            &self.name,
            "see that it runs and can be reached; without it no bound volume opens for writing",
        )
    }

    fn note(&self, trouble: &Trouble) {
        let mut text = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        text.clone_from(&trouble.text);
    }
}

/// For a bound volume that was given no counter.
pub fn needed(volume: &Path, error: &VolumeError) -> Failure {
    Failure::new(
        Exit::Usage,
        error,
        volume.display(),
        "give --counter, or take the volume off it with `postern counter reset --none`",
    )
}

/// Answers at once, by blocking.
struct Blocking(Arc<Source>);

impl Counter for Blocking {
    fn load(&self) -> Answer<'_, Option<Record>> {
        let answer = self.0.provider.load();
        Box::pin(core::future::ready(answer.map_err(|trouble| {
            self.0.note(&trouble);
            trouble.error
        })))
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        let answer = self.0.provider.swap(old, new);
        Box::pin(core::future::ready(answer.map_err(|trouble| {
            self.0.note(&trouble);
            trouble.error
        })))
    }
}

/// A record as people and providers see it: `postern1 SEQUENCE DIGEST`.
fn text_of(record: &Record) -> String {
    let digest: String = record.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("postern1 {} {digest}", record.sequence)
}

/// What [`text_of`] made.
fn record_of(text: &str) -> Option<Record> {
    let mut words = text.trim_end_matches('\n').split(' ');
    if words.next()? != "postern1" {
        return None;
    }
    let sequence = words.next()?.parse().ok()?;
    let digits = words.next().filter(|digits| digits.len() == 64 && digits.is_ascii())?;
    let mut digest = [0; 32];
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    words.next().is_none().then_some(Record { sequence, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_of_three_words_and_nothing_else() {
        let record = Record { sequence: 57, digest: [0xa5; 32] };
        let text = format!("postern1 57 {}", "a5".repeat(32));
        assert_eq!(text_of(&record), text);
        assert_eq!(record_of(&text), Some(record));
        assert_eq!(record_of(&format!("{text}\n")), Some(record));
        for bad in ["", "postern1", "postern1 5", "postern2 5 aa", "postern1 5 aa", &text[1..]] {
            assert_eq!(record_of(bad), None, "{bad}");
        }
        assert_eq!(record_of(&format!("{text} x")), None);
        assert_eq!(record_of(&text.replace("57", "-1")), None);
        assert_eq!(record_of(&format!("postern1 57 {}", "ä".repeat(32))), None);
    }

    #[test]
    fn what_names_no_counter_is_refused() {
        for text in ["", "etcd:", "etcd:http://h", "etcd:h/k", "etcd:ftp://h/k", "file:", "x:y"] {
            let failure = Source::parse(OsStr::new(text), &AccessArgs::default()).err();
            assert_eq!(failure.map(|failure| failure.exit), Some(Exit::Usage), "{text}");
        }
    }
}
