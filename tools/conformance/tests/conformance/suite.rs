//! The cases, one by one.

use std::ffi::OsString;

use crate::ground::{Ground, Place, Transcripts, side_by_side};

/// Cases whose difference is shown in full; of the others only the name.
const SHOWN: usize = 40;
/// Lines shown of each.
const LINES: usize = 16;
/// What the program prints of a rule that does not hold.
const BROKEN_RULE: &str = "BROKEN RULE";

fn words(words: &[&str]) -> Vec<OsString> {
    let only = std::env::var_os("POSTERN_CONFORMANCE_ONLY");
    words.iter().map(OsString::from).chain(only).collect()
}

/// Panics if anything differs, with what.
fn compare(native: &Transcripts, inside: &Transcripts) {
    let broken: Vec<_> = native
        .iter()
        .filter(|(_, lines)| lines.iter().any(|line| line.starts_with(BROKEN_RULE)))
        .map(|(name, lines)| format!("  {name}\n    {}\n", lines.join("\n    ")))
        .collect();
    assert!(
        broken.is_empty(),
        "the kernel itself does not keep the rules of {} cases:\n{}",
        broken.len(),
        broken.concat()
    );
    assert!(native.keys().eq(inside.keys()), "not the same cases ran in both places");
    let differ: Vec<_> = native.iter().filter(|(name, lines)| inside[*name] != **lines).collect();
    let mut text = String::new();
    for (name, lines) in differ.iter().take(SHOWN) {
        text.push_str(&format!("  {name}\n{}", side_by_side(lines, &inside[*name], LINES)));
    }
    for (name, _) in differ.iter().skip(SHOWN) {
        text.push_str(&format!("  {name}\n"));
    }
    assert!(differ.is_empty(), "{} of {} cases differ:\n{text}", differ.len(), native.len());
}

#[test]
fn every_aio_call_answers_inside_what_the_kernel_answers() {
    let Some(ground) = Ground::new() else { return };
    let [native, inside] = ground.both(&|part, parts| {
        let (part, parts) = (part.to_string(), parts.to_string());
        words(&["run", "--alone", "false", "--part", &part, "--parts", &parts])
    });
    compare(&native, &inside);
}

#[test]
fn counts_of_the_machine_and_many_contexts_are_inside_what_the_kernel_has() {
    let Some(ground) = Ground::new() else { return };
    let arguments = words(&["run", "--alone", "true"]);
    let [native, inside] =
        [Place::Native, Place::Inside].map(|place| ground.once(place, 0, &arguments));
    compare(&native, &inside);
}
