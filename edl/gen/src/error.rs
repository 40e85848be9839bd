//! Where an EDL file is wrong, what is wrong and what to do about it.

use core::fmt;

/// A place in an EDL file, both numbers from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column, in characters; a tab is one.
    pub column: u32,
}

/// A refusal. Shown as `file:line:column: what; what to do`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file's name as it was given.
    pub file: String,
    /// Where it stands.
    pub at: Position,
    /// What is wrong.
    pub what: String,
    /// What its author can do about it.
    pub remedy: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}:{}: {}; {}",
            self.file, self.at.line, self.at.column, self.what, self.remedy
        )
    }
}

impl std::error::Error for Error {}

/// A refusal before the file's name is added to it.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub at: Position,
    pub what: String,
    pub remedy: String,
}

impl Fault {
    pub fn in_file(self, file: &str) -> Error {
        Error { file: file.to_owned(), at: self.at, what: self.what, remedy: self.remedy }
    }
}

/// `Err` with a place, what is wrong, and what to do.
pub(crate) fn refuse<T>(
    at: Position,
    what: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T, Fault> {
    Err(Fault { at, what: what.into(), remedy: remedy.into() })
}
