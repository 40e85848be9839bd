//! `format`, `snapshot`, `resize`, `rekey`, `info`, `verify` of the built command, on a volume that nobody has
//! open. Through the page cache, so that any file system will do.

use std::{path::Path, process::Command};

use serde_json::Value;

/// Runs the command; its exit code and what it printed.
fn postern(directory: &Path, arguments: &str) -> (i32, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_postern"))
        .args(arguments.split_whitespace())
        .args(["--allow-buffered", "--json"])
        .current_dir(directory)
        .output()
        .expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it speaks UTF-8");
    (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
}

/// As [`postern`], for what must succeed; its answer.
fn answer(directory: &Path, arguments: &str) -> Value {
    let (code, out, err) = postern(directory, arguments);
    assert_eq!(code, 0, "postern {arguments}: {err}");
    serde_json::from_str(&out).expect("it answers as JSON")
}

#[test]
fn a_volume_is_resized_and_kept_and_copied_and_stays_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = directory.path();
    answer(at, "format v --size 8M");
    answer(at, "snapshot create v first");
    assert_eq!(postern(at, "snapshot create v first").0, 64);
    assert_eq!(answer(at, "resize v --size 32M")["size"], 32 << 20);
    let (code, _, why) = postern(at, "resize v --size 4M");
    assert_eq!((code, why.contains("snapshots")), (64, true), "{why}");
    let listed = answer(at, "snapshot list v");
    assert_eq!(listed["snapshots"][0]["name"], "first");
    assert_eq!(listed["snapshots"][0]["size"], 8 << 20);

    answer(at, "snapshot export v first copy");
    assert_eq!(answer(at, "info copy")["size"], 8 << 20);
    answer(at, "snapshot export v first plain --plain");
    assert_eq!(std::fs::read(at.join("plain")).expect("it is there"), vec![0; 8 << 20]);
    assert_eq!(postern(at, "snapshot export v first plain --plain").0, 64, "over nothing");
    assert_eq!(postern(at, "snapshot export v none other").0, 64);
    assert!(!at.join("other").exists() && !at.join("other.key").exists());

    assert_eq!(postern(at, "snapshot delete v none").0, 64);
    answer(at, "snapshot delete v first");
    let host = |answer: &Value| answer["host_bytes"].as_u64();
    let resized = answer(at, "resize v --size 4M");
    let length = std::fs::metadata(at.join("v")).expect("it is there").len();
    assert_eq!(host(&resized), Some(length), "the host file is cut off");
    assert_eq!(host(&answer(at, "info v")), Some(length));
    let whole = answer(at, "verify v");
    assert_eq!((&whole["size"], &whole["leaked_blocks"]), (&Value::from(4 << 20), &Value::from(0)));
    assert_eq!(postern(at, "resize v --size 4097").0, 64);
    assert_eq!(postern(at, "resize v --size 100T").0, 64);
}

#[test]
fn a_volume_that_is_bound_to_a_counter_is_changed_with_it_only() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = directory.path();
    std::fs::write(at.join("words"), "correct horse").expect("it can be written");
    answer(at, "format v --size 8M --counter file:c --passphrase-file words");
    let key = "--passphrase-file words";
    for change in
        ["resize v --size 16M", "snapshot create v one", "snapshot delete v one", "rekey v"]
    {
        let old = std::fs::read(at.join("v")).expect("it is there");
        let (code, _, why) = postern(at, &format!("{change} {key}"));
        assert_eq!((code, why.contains("--counter")), (64, true), "{change}: {why}");
        assert!(std::fs::read(at.join("v")).expect("it is there") == old, "{change} has written");
        let with = format!("{change} {key} --counter file:c");
        let (code, _, why) = postern(at, &with);
        assert_eq!(code, 0, "{with}: {why}");
        assert_eq!(answer(at, &format!("info v {key} --counter file:c"))["freshness"], "newest");
        std::fs::write(at.join("old"), old).expect("it can be written");
        let before = answer(at, &format!("info old {key} --counter file:c"));
        assert_eq!(before["freshness"], "refused", "the state before {change}");
    }
    answer(at, &format!("snapshot create v two {key} --counter file:c"));
    let (code, _, why) = postern(at, &format!("rekey v {key} --counter file:c"));
    assert_eq!((code, why.contains("snapshot delete")), (64, true), "{why}");
    answer(at, &format!("verify v {key} --counter file:c"));
}
