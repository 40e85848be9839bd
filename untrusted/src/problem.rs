//! What the operator is told: one line, `posternd: what: where: what to do`.

use std::fmt;

/// A problem that stops the daemon, with the exit code that tells its kind.
#[derive(Debug)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// Which thing it is about: a path, a name, a session.
    pub place: String,
    /// What to do about it.
    pub remedy: String,
    /// Exit code of the process: [`EXIT_SOCKET`] or [`EXIT_CONFIG`].
    pub exit: u8,
}

/// Exit code: the control socket can not be had.
pub const EXIT_SOCKET: u8 = 3;
/// Exit code: a file or the configuration is not usable.
pub const EXIT_CONFIG: u8 = 4;

impl Problem {
    /// A problem with the control socket.
    pub fn socket(what: impl fmt::Display, place: impl fmt::Display, remedy: &str) -> Self {
        Self::new(what, place, remedy, EXIT_SOCKET)
    }

    /// A problem with a file or the configuration.
    pub fn config(what: impl fmt::Display, place: impl fmt::Display, remedy: &str) -> Self {
        Self::new(what, place, remedy, EXIT_CONFIG)
    }

    fn new(what: impl fmt::Display, place: impl fmt::Display, remedy: &str, exit: u8) -> Self {
        Self { what: what.to_string(), place: place.to_string(), remedy: remedy.to_owned(), exit }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.what, self.place, self.remedy)
    }
}

impl std::error::Error for Problem {}

/// Writes one line to stderr. Text that came from a peer must be passed in `{:?}` form, so that it
/// can not break the line.
pub fn log(what: impl fmt::Display, place: impl fmt::Display, remedy: impl fmt::Display) {
    use std::io::Write;
    let line = format!("posternd: {what}: {place}: {remedy}\n");
    // Nowhere left to report a failure of the log itself.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
