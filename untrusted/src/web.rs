//! What the page asks for: its files, and what was measured as JSON.
//!
//! Holds: an answer is bounded in size and changes nothing; the numbers are those of
//! [`crate::measured`] and [`crate::report`], which the other faces show too.

use postern_edl::MEASURED_RECORDS;
use postern_page::{Asset, asset};

use crate::measured::{page, snapshot};
use crate::report::Source;
use crate::session::Sessions;

/// Most bytes of latency in a snapshot; some ten kilobytes for each volume at work.
const MOST_LATENCY: usize = 4 << 20;
/// Most bytes of records in one answer.
const MOST_RECORDS: usize = 1 << 20;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A file of the page.
    File(&'static Asset),
    /// All that was counted.
    Snapshot,
    /// The records from this number on.
    Records(u64),
}

impl Wish {
    /// What is at a path; `None`: nothing.
    #[must_use]
    pub fn of(path: &str, query: &str) -> Option<Self> {
        match path {
            "/api/snapshot" => Some(Self::Snapshot),
            "/api/records" => {
                let first = query.strip_prefix("first=").and_then(|first| first.parse().ok());
                Some(Self::Records(first.unwrap_or(0)))
            }
            _ => asset(path).map(Self::File),
        }
    }
}

/// The answer as of now.
#[must_use]
pub fn text(sessions: &Sessions, source: &Source, wish: Wish) -> String {
    match wish {
        Wish::File(file) => file.text.to_owned(),
        Wish::Snapshot => snapshot(sessions, source, MOST_LATENCY),
        Wish::Records(first) => {
            let page = page(sessions.hub(), source, MEASURED_RECORDS, first, MOST_RECORDS);
            page.and_then(|page| String::from_utf8(page).ok()).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_a_file_or_a_question_or_nothing() {
        assert!(matches!(Wish::of("/", ""), Some(Wish::File(file)) if file.path == "/"));
        assert_eq!(Wish::of("/api/snapshot", "x"), Some(Wish::Snapshot));
        for (query, first) in [("", 0), ("first=7", 7), ("first=-1", 0), ("last=7", 0)] {
            assert_eq!(Wish::of("/api/records", query), Some(Wish::Records(first)), "{query}");
        }
        assert_eq!(Wish::of("/api/", ""), None);
        assert_eq!(Wish::of("//", ""), None);
    }
}
