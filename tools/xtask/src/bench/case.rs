//! The loads that are measured.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

/// A load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// What `--case` calls it.
    pub name: String,
    /// Words for a reader.
    pub words: String,
    /// fio's arguments.
    pub arguments: Vec<String>,
    /// Whether its speed is told in bytes.
    pub large: bool,
}

/// Depths of the requests of 4 KiB.
const DEPTHS: [u32; 6] = [1, 4, 16, 32, 64, 128];
/// What is measured where nothing is chosen.
const USUAL: [&str; 9] = [
    "randread-4k-1",
    "randread-4k-32",
    "randread-4k-128",
    "randwrite-4k-1",
    "randwrite-4k-32",
    "randwrite-4k-128",
    "read-1m-8",
    "write-1m-8",
    "sync",
];

impl Case {
    fn new(rw: &str, bs: &str, depth: u32) -> Self {
        let mut arguments =
            vec![format!("--rw={rw}"), format!("--bs={bs}"), format!("--iodepth={depth}")];
        if rw == "randrw" {
            arguments.push("--rwmixread=70".to_owned());
        }
        Self {
            name: format!("{rw}-{bs}-{depth}"),
            words: format!("{rw} {bs} depth {depth}"),
            arguments,
            large: bs != "4k",
        }
    }

    fn with(mut self, name: &str, words: &str, arguments: &[&str]) -> Self {
        name.clone_into(&mut self.name);
        words.clone_into(&mut self.words);
        self.arguments.extend(arguments.iter().map(|word| (*word).to_owned()));
        self
    }
}

/// All loads there are.
fn all() -> Vec<Case> {
    let mut all = Vec::new();
    for rw in ["randread", "randwrite", "randrw"] {
        all.extend(DEPTHS.map(|depth| Case::new(rw, "4k", depth)));
    }
    for (bs, depth) in [("16k", 16), ("64k", 16), ("1m", 8)] {
        all.extend(["read", "write", "randread", "randwrite"].map(|rw| Case::new(rw, bs, depth)));
    }
    let sync = Case::new("randwrite", "4k", 1);
    all.push(sync.with("sync", "randwrite 4k, fdatasync after each", &["--fdatasync=1"]));
    for rw in ["randread", "randwrite"] {
        all.push(Case::new(rw, "4k", 16).with(
            &format!("{rw}-threads"),
            &format!("{rw} 4k, 4 threads of depth 16"),
            &["--thread", "--numjobs=4", "--group_reporting"],
        ));
    }
    all
}

/// The cases whose names begin as one of `wanted` does; the usual ones where nothing is wanted.
///
/// # Errors
/// If one of `wanted` names none: the message has all names.
pub fn choose(wanted: &[String], every: bool) -> Result<Vec<Case>> {
    let mut unknown: BTreeSet<&String> = wanted.iter().collect();
    let mut chosen = all();
    if every && wanted.is_empty() {
        return Ok(chosen);
    }
    let names = chosen.iter().map(|case| case.name.clone()).collect::<Vec<_>>().join(" ");
    chosen.retain(|case| {
        let usual = wanted.is_empty() && USUAL.contains(&&*case.name);
        let mut any = usual;
        for prefix in wanted {
            if case.name.starts_with(&**prefix) {
                unknown.remove(prefix);
                any = true;
            }
        }
        any
    });
    ensure!(unknown.is_empty(), "no case begins with {unknown:?}; there are: {names}");
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_the_beginning_of_their_names() {
        let names = |wanted: &[&str], every| -> Vec<String> {
            let wanted: Vec<String> = wanted.iter().map(|&word| word.to_owned()).collect();
            choose(&wanted, every).unwrap().into_iter().map(|case| case.name).collect()
        };
        assert_eq!(names(&[], false), USUAL);
        assert_eq!(
            names(&["sync", "randrw-4k-1"], false),
            ["randrw-4k-1", "randrw-4k-16", "randrw-4k-128", "sync"]
        );
        assert_eq!(names(&[], true).len(), 33);
        let all: BTreeSet<String> = names(&[], true).into_iter().collect();
        assert_eq!(all.len(), 33, "each name once");
        let error = choose(&["randfoo".to_owned()], false).unwrap_err().to_string();
        assert!(error.contains("randfoo") && error.contains("write-1m-8"), "{error}");
    }
}
