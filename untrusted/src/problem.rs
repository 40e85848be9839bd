//! What the operator is told: one line, `posternd: what: where: what to do`.

use std::fmt;
use std::sync::{Mutex, PoisonError};

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
/// can not break the line. Beyond [`LINES_PER_SECOND`] lines are left out and counted: a peer must
/// not fill the operator's disk.
pub fn log(what: impl fmt::Display, place: impl fmt::Display, remedy: impl fmt::Display) {
    use std::io::Write;
    static METER: Mutex<Meter> = Mutex::new(Meter { second: 0, lines: 0, left_out: 0 });
    let second = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
    let Some(left_out) = METER.lock().unwrap_or_else(PoisonError::into_inner).admit(second) else {
        return;
    };
    let mut text = String::new();
    if left_out > 0 {
        text = format!("posternd: {left_out} lines left out: this log: see the counters\n");
    }
    text.push_str(&format!("posternd: {what}: {place}: {remedy}\n"));
    // Nowhere left to report a failure of the log itself.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Most lines logged in a second.
pub const LINES_PER_SECOND: u32 = 50;

struct Meter {
    second: i64,
    lines: u32,
    left_out: u64,
}

impl Meter {
    /// Whether a line may be written in this second, and how many were left out before it.
    fn admit(&mut self, second: i64) -> Option<u64> {
        if second != self.second {
            (self.second, self.lines) = (second, 0);
        }
        if self.lines == LINES_PER_SECOND {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_counted_and_over_in_the_next_second() {
        let mut meter = Meter { second: 0, lines: 0, left_out: 0 };
        for _ in 0..LINES_PER_SECOND {
            assert_eq!(meter.admit(7), Some(0));
        }
        assert_eq!((meter.admit(7), meter.admit(7)), (None, None));
        assert_eq!((meter.admit(8), meter.admit(8)), (Some(2), Some(0)));
    }
}
