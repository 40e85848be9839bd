//! docs/THREAT_MODEL.md and docs/FORMAT.md name tests: each of them must exist.

use std::{collections::BTreeSet, fs, path::Path};

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
/// Where tests are.
const SOURCES: [&str; 4] = ["edl", "tools", "trusted", "untrusted"];
/// Names of tests are sentences: this many words at least.
const WORDS: usize = 4;

/// What stands between backticks, in order.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a quoted word can only be the name of a test.
fn is_test_name(word: &str) -> bool {
    let plain = word.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_');
    plain && word.split('_').count() >= WORDS
}

/// Names of functions below `directory` that follow `#[test]`, or are rows of a macro that makes
/// tests.
fn tests_below(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                tests_below(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.extend(tests_in(&fs::read_to_string(&path).unwrap()));
        }
    }
}

fn tests_in(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut marked = false;
    for line in source.lines().map(str::trim) {
        let name = |rest: &str| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            rest[..end.unwrap_or(rest.len())].to_owned()
        };
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            marked = true;
        } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| marked) {
            found.push(name(rest));
            marked = false;
        } else if let Some((first, _)) = line.split_once(" => ") {
            // A row of a macro: its name becomes a test's.
            found.extend(is_test_name(first).then(|| first.to_owned()));
        }
    }
    found
}

fn tests() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for directory in SOURCES {
        tests_below(&Path::new(ROOT).join(directory), &mut found);
    }
    found
}

fn document(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join("docs").join(name)).unwrap()
}

/// The rows of the tables: their last cells.
fn evidence(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter(|line| line.starts_with("| ")).filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches(['|', ' ']).split(" | ").collect();
        Some((*cells.first()?, *cells.last()?))
    })
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let tests = tests();
    assert!(tests.len() > 500, "only {} tests were found", tests.len());
    for name in ["THREAT_MODEL.md", "FORMAT.md", "DESIGN.md"] {
        let text = document(name);
        let missing: Vec<&str> =
            quoted(&text).filter(|word| is_test_name(word) && !tests.contains(*word)).collect();
        assert!(missing.is_empty(), "docs/{name} names tests that are not there: {missing:#?}");
    }
}

#[test]
fn every_promise_and_attack_of_the_threat_model_is_tied_to_a_test() {
    let text = document("THREAT_MODEL.md");
    let shown = |heading: &str| {
        let from = text.find(heading).unwrap_or_else(|| panic!("no table `{heading}`"));
        let table = text[from..].split("\n\n").next().unwrap();
        evidence(table).skip(1).map(|(what, tests)| (what.to_owned(), tests.to_owned())).collect()
    };
    let rows: [Vec<(String, String)>; 2] =
        ["| promise | how | shown by |", "| attack | answer | test |"].map(shown);
    for (what, tests) in rows.iter().flatten() {
        assert!(quoted(tests).any(is_test_name), "no test shows: {what}");
    }
    assert!(rows.iter().all(|rows| rows.len() > 10), "the tables are not found whole");
}

#[test]
fn every_path_that_the_threat_model_names_exists() {
    let text = document("THREAT_MODEL.md");
    let paths = quoted(&text)
        .filter(|word| SOURCES.iter().any(|source| word.starts_with(&format!("{source}/"))));
    for path in paths {
        assert!(Path::new(ROOT).join(path).exists(), "{path}");
    }
}

#[test]
fn a_test_is_found_by_its_mark_or_its_row() {
    let source = "#[test]\nfn one_two_three_four() {}\nfn helper_that_is_no_test() {}\n\
                  a_row_of_a_macro => Canary from 3,\n";
    assert_eq!(tests_in(source), ["one_two_three_four", "a_row_of_a_macro"]);
}
