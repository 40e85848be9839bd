//! Genuine enclave programs, run by `postern enclave` as a user would.
//!
//! `cargo xtask enclave test` builds them and says by POSTERN_ENCLAVE_IMAGES where they are; without
//! it these tests skip. What must come out is what the programs print outside of an enclave.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

/// A signing key for tests, that of the image crate.
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../untrusted/sgx/image/tests/test-key.pem");

/// The program of this name, if the programs were built.
fn image(name: &str) -> Option<PathBuf> {
    let Some(images) = std::env::var_os("POSTERN_ENCLAVE_IMAGES") else {
        eprintln!("SKIPPED: no enclave programs; `cargo xtask enclave test` builds them");
        return None;
    };
    Some(PathBuf::from(images).join(name))
}

fn postern(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_postern")).arg("enclave").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a program: exit code, standard output, standard error.
fn run(image: &str, options: &[&str], arguments: &[&str]) -> (Option<i32>, String, String) {
    let done = postern(&[&["run", image][..], options, &["--"], arguments].concat());
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn a_program_of_the_standard_library_alone_runs_unmodified_in_every_mode() {
    let Some(image) = image("examples/std") else { return };
    let expected = "Hello, world!\narguments: one two\nthreads: 570\nchannel: 499500\n\
                    time passes: true\necho: to me\n";
    for mode in [&[][..], &["--exact"], &["--strict"], &["--transition-cycles", "5000"]] {
        let (code, stdout, stderr) = run(image.to_str().unwrap(), mode, &["one", "two"]);
        assert_eq!((code, stdout.as_str()), (Some(0), expected), "{mode:?}: {stderr}");
    }
}

#[test]
fn a_panic_is_told_and_is_a_failure() {
    let Some(image) = image("examples/std") else { return };
    let (code, _, stderr) = run(image.to_str().unwrap(), &[], &["panic"]);
    assert_eq!(code, Some(101), "{stderr}");
    assert!(stderr.contains("as asked"), "{stderr}");
}

#[test]
fn a_system_call_ends_an_enclave_in_strict_mode_with_its_place() {
    let Some(image) = image("examples/std") else { return };
    let (code, stdout, stderr) = run(image.to_str().unwrap(), &["--strict"], &["system-call"]);
    assert_eq!(code, Some(128 + 31), "{stderr}");
    assert!(stderr.contains("system call 39"), "{stderr}");
    assert!(stderr.contains("main"), "the symbol is named: {stderr}");
    assert!(!stdout.contains("a system call was made"), "{stdout}");
}

#[test]
fn memory_that_is_not_there_ends_an_enclave_with_its_address() {
    let Some(image) = image("examples/std") else { return };
    let (code, _, stderr) = run(image.to_str().unwrap(), &[], &["null"]);
    assert_eq!(code, Some(128 + 11), "{stderr}");
    assert!(stderr.contains("may not: 0x8"), "{stderr}");
}

#[test]
fn a_sealed_volume_is_kept_and_verified_inside_an_enclave() {
    let Some(image) = image("postern-enclave") else { return };
    let (code, stdout, stderr) = run(image.to_str().unwrap(), &["--strict"], &["64", "8"]);
    // Eight rounds of 32 writes, a sync, and each of the 64 blocks once.
    let expected = "321 requests, 0 errors, 0 wrong blocks\nthe host sees none of it\n\
                    a host that changes blocks is found out: errno 5\n";
    assert_eq!((code, stdout.as_str()), (Some(0), expected), "{stderr}");
}

#[test]
fn an_image_is_signed_and_another_one_is_refused() {
    let Some(image) = image("postern-enclave") else { return };
    let directory = tempfile::tempdir().unwrap();
    let name = directory.path().join("signed");
    let name = name.to_str().unwrap();
    let signed = postern(&["sign", image.to_str().unwrap(), "--key", KEY, "--output", name]);
    assert!(signed.status.success(), "{}", text(&signed.stderr));
    let (sgxs, signature) = (format!("{name}.sgxs"), format!("{name}.sig"));

    let shown = postern(&["inspect", &sgxs, "--signature", &signature]);
    let shown = (shown.status.code(), text(&shown.stdout));
    assert_eq!(shown.0, Some(0), "{}", shown.1);
    let mrenclave = shown.1.lines().next().unwrap().split_whitespace().nth(1).unwrap();
    assert!(text(&signed.stdout).contains(mrenclave), "{}", shown.1);

    let options = ["--signature", &signature, "--mrenclave", mrenclave];
    let (code, _, stderr) = run(&sgxs, &options, &["32", "1"]);
    assert_eq!(code, Some(0), "{stderr}");
    let (code, _, stderr) = run(&sgxs, &["--mrenclave", &"0".repeat(64)], &[]);
    assert_eq!(code, Some(126), "{stderr}");

    // A byte of the first page's contents.
    let mut bytes = fs::read(&sgxs).unwrap();
    bytes[64 + 64 + 64 + 8] ^= 1;
    fs::write(&sgxs, bytes).unwrap();
    let (code, _, stderr) = run(&sgxs, &["--signature", &signature], &["32", "1"]);
    assert_eq!(code, Some(126), "{stderr}");
    assert!(stderr.contains("the signature is for"), "{stderr}");
}
