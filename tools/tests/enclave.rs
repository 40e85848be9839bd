//! Genuine enclave programs, run by `postern enclave` as a user would.
//!
//! `cargo xtask enclave test` builds them and says by POSTERN_ENCLAVE_IMAGES where they are, and by
//! POSTERN_E2E_PARTS where posternd is; without them these tests skip. What must come out is what the programs print outside of an enclave.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead as _, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
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
    let (code, stdout, stderr) =
        run(image.to_str().unwrap(), &["--strict"], &["memory", "64", "256"]);
    // 256 writes, a sync, and each of the 64 blocks once.
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
    let (code, _, stderr) = run(&sgxs, &options, &["memory", "32", "32"]);
    assert_eq!(code, Some(0), "{stderr}");
    let (code, _, stderr) = run(&sgxs, &["--mrenclave", &"0".repeat(64)], &[]);
    assert_eq!(code, Some(126), "{stderr}");

    // A byte of the first page's contents.
    let mut bytes = fs::read(&sgxs).unwrap();
    bytes[64 + 64 + 64 + 8] ^= 1;
    fs::write(&sgxs, bytes).unwrap();
    let (code, _, stderr) = run(&sgxs, &["--signature", &signature], &["memory", "32", "32"]);
    assert_eq!(code, Some(126), "{stderr}");
    assert!(stderr.contains("the signature is for"), "{stderr}");
}

/// A volume and a daemon that serves it; the key in `key`.
struct Served {
    directory: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Served {
    /// `None`, and says so, where no daemon was built.
    fn start() -> Option<Self> {
        let Some(parts) = std::env::var_os("POSTERN_E2E_PARTS") else {
            eprintln!("SKIPPED: no posternd; `cargo xtask enclave test` builds it");
            return None;
        };
        let directory = tempfile::tempdir_in(parts).unwrap();
        let mut served = Self { directory, daemon: None };
        fs::write(served.path("key"), [7; 32]).unwrap();
        let formatted = Command::new(env!("CARGO_BIN_EXE_postern"))
            .args(["format", "--size", "32M", "--key-file"])
            .args([served.path("key"), served.path("volume")])
            .output()
            .unwrap();
        assert!(formatted.status.success(), "{}", text(&formatted.stderr));
        served.start_daemon();
        Some(served)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start_daemon(&mut self) {
        let mut file = OsString::from("data=");
        file.push(self.path("volume"));
        let posternd = self.directory.path().with_file_name("posternd");
        let mut daemon = Command::new(posternd)
            .args(["--no-probes", "--allow-buffered", "--socket"])
            .arg(self.path("socket"))
            .arg("--file")
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ready = lines(&mut daemon).next().unwrap().unwrap();
        assert!(ready.starts_with("posternd: ready"), "{ready}");
        self.daemon = Some(daemon);
    }

    fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// The program in its image, the key on its standard input.
    fn program(&self, image: &Path, arguments: &[&str]) -> Command {
        self.program_with(&[], image, arguments)
    }

    /// The same with these options of the runner.
    fn program_with(&self, options: &[&str], image: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_postern"));
        command.args(["enclave", "run", "--strict", "--daemon"]).arg(self.path("socket"));
        command.args(options).arg(image).arg("--").args(arguments);
        command.stdin(File::open(self.path("key")).unwrap());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill_daemon();
    }
}

fn lines(child: &mut Child) -> Lines<BufReader<ChildStdout>> {
    BufReader::new(child.stdout.take().unwrap()).lines()
}

#[test]
fn a_load_at_a_daemon_is_verified_and_goes_on_at_another_one_when_it_is_killed() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(mut served) = Served::start() else { return };
    let load = ["work", "data", "--requests", "3000", "--blocks", "512", "--daemons", "1"];
    let mut enclave = served.program(&image, &load).spawn().unwrap();
    let mut said = lines(&mut enclave);
    let first = said.next().unwrap().unwrap();
    assert_eq!(first, "at work");
    served.kill_daemon();
    served.start_daemon();
    let rest: Vec<String> = said.map(Result::unwrap).collect();
    let ended = enclave.wait_with_output().unwrap();
    assert!(ended.status.success(), "{rest:?}: {}", text(&ended.stderr));
    assert_eq!(rest[0], "another daemon took over");
    assert!(rest[1].ends_with(" requests, 0 errors, 0 wrong blocks"), "{rest:?}");
}

#[test]
fn what_the_store_has_acknowledged_is_there_after_its_enclave_was_killed() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(served) = Served::start() else { return };
    let mut enclave = served.program(&image, &["store", "data"]).spawn().unwrap();
    let acknowledged = lines(&mut enclave)
        .map(|line| line.unwrap().strip_prefix("acknowledged ").unwrap().parse::<u64>().unwrap())
        .find(|number| *number >= 200)
        .unwrap();
    enclave.kill().unwrap();
    enclave.wait().unwrap();
    let least = acknowledged.to_string();
    let checked = served.program(&image, &["check", "data", "--least", &least]).output().unwrap();
    let said = text(&checked.stdout);
    assert!(checked.status.success(), "{said}{}", text(&checked.stderr));
    assert!(said.contains("every acknowledged put is there"), "{said}");
}

#[test]
fn a_daemon_that_is_not_there_and_a_wrong_key_are_failures_that_say_so() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(mut served) = Served::start() else { return };
    fs::write(served.path("key"), [8; 32]).unwrap();
    let refused = served.program(&image, &["work", "data"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(101), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("failed: data: "), "{}", text(&refused.stderr));
    served.kill_daemon();
    let refused = served.program(&image, &["work", "data"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(101), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("attach: "), "{}", text(&refused.stderr));
}

/// The exit code, and all that was said.
fn ended(command: &mut Command) -> (Option<i32>, String) {
    let done = command.output().unwrap();
    (done.status.code(), text(&done.stdout) + &text(&done.stderr))
}

/// The same without a key on standard input.
fn ended_without_key(command: &mut Command) -> (Option<i32>, String) {
    ended(command.stdin(Stdio::null()))
}

const PUTS: [&str; 6] = ["store", "data", "--puts", "8", "--seal", "mrenclave"];

#[test]
fn a_slot_of_the_enclave_takes_the_place_of_the_key_and_opens_on_no_other_root() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(served) = Served::start() else { return };
    let (code, said) = ended_without_key(&mut served.program(&image, &PUTS));
    assert_eq!(code, Some(101), "{said}");
    assert!(said.contains("no slot is sealed to an enclave yet"), "{said}");

    // The first start makes the slot, the others need no key.
    let (code, said) = ended(&mut served.program(&image, &PUTS));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("slot 1 is sealed to this enclave"), "{said}");
    let (code, said) = ended_without_key(&mut served.program(&image, &PUTS));
    assert_eq!((code, said.contains("acknowledged 16")), (Some(0), true), "{said}");

    // Another machine, and another enclave: the same program with another heap.
    fs::write(served.path("root"), [9; 16]).unwrap();
    let root = served.path("root");
    let elsewhere = ["--root", root.to_str().unwrap()];
    for options in [&elsewhere[..], &["--heap", "33M"]] {
        let (code, said) = ended_without_key(&mut served.program_with(options, &image, &PUTS));
        assert_eq!(code, Some(101), "{options:?}: {said}");
        assert!(said.contains("slot 1 is sealed to another enclave"), "{options:?}: {said}");
    }
    // The key handed in once more makes a slot there as well; both open.
    let (code, said) = ended(&mut served.program_with(&elsewhere, &image, &PUTS));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("slot 2 is sealed to this enclave"), "{said}");
    for options in [&elsewhere[..], &[]] {
        let (code, said) = ended_without_key(&mut served.program_with(options, &image, &PUTS));
        assert_eq!(code, Some(0), "{options:?}: {said}");
    }
}

#[test]
fn a_slot_by_signer_follows_the_signer_and_is_closed_to_older_versions_once_a_newer_has_it() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(served) = Served::start() else { return };
    let by_signer = ["store", "data", "--puts", "8", "--seal", "mrsigner"];
    let (code, said) = ended(&mut served.program(&image, &by_signer));
    assert_eq!(code, Some(101), "{said}");
    assert!(said.contains("nobody has signed this enclave"), "{said}");

    // Two images of one signer, the second of a higher security version and another measurement.
    let sign = |name: &str, more: &[&str]| {
        let output = served.path(name).to_str().unwrap().to_owned();
        let arguments = ["sign", image.to_str().unwrap(), "--key", KEY, "--output", &output];
        let signed = postern(&[&arguments[..], more].concat());
        assert!(signed.status.success(), "{}", text(&signed.stderr));
        let (sgxs, signature) = (format!("{output}.sgxs"), format!("{output}.sig"));
        let options = ["--backend", "emu", "--signature", &signature];
        // A command runs once.
        [(); 3].map(|()| served.program_with(&options, Path::new(&sgxs), &by_signer))
    };
    let mut old = sign("old", &[]).into_iter();
    let mut new = sign("new", &["--heap", "33M", "--security-version", "2"]).into_iter();
    let (code, said) = ended(&mut old.next().unwrap());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("slot 1 is sealed to this enclave"), "{said}");
    let (code, said) = ended_without_key(&mut old.next().unwrap());
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = ended_without_key(&mut new.next().unwrap());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("slot 1 was raised to security version 2"), "{said}");
    let (code, said) = ended_without_key(&mut old.next().unwrap());
    assert_eq!(code, Some(101), "{said}");
    assert!(said.contains("to one of a higher version"), "{said}");
    let (code, said) = ended_without_key(&mut new.next().unwrap());
    assert_eq!((code, said.contains("was raised")), (Some(0), false), "{said}");
}

#[test]
fn what_the_enclave_was_left_for_adds_up_to_its_exits() {
    let Some(image) = image("postern-enclave") else { return };
    let Some(served) = Served::start() else { return };
    let load = ["work", "data", "--requests", "500", "--blocks", "64"];
    let (code, said) = ended(&mut served.program_with(&["--counts"], &image, &load));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("steady state: 500 requests, "), "{said}");
    let counts = said.lines().find(|line| line.contains(" entries, ")).unwrap();
    let (_, exits) = counts.split_once(" entries, ").unwrap();
    let (total, reasons) = exits.split_once(" exits (").unwrap();
    let reasons = reasons.split_once(')').unwrap().0;
    let sum: u64 = reasons
        .split(", ")
        .map(|reason| reason.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(total.parse(), Ok(sum), "{counts}");
}

/// Two enclaves of which each names the other; the roots of their machines.
fn attest(image: &str, roots: [&[&str]; 2]) -> [(Option<i32>, String); 2] {
    let begin = |options: &[&str], word: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_postern"));
        command.args(["enclave", "run"]).args(options).args([image, "--", word]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut listener = begin(roots[0], "listen");
    let mut said = lines(&mut listener);
    let mut heard = String::new();
    let address = said
        .by_ref()
        .map(Result::unwrap)
        .find_map(|line| {
            heard += &format!("{line}\n");
            line.strip_prefix("listening at ").map(str::to_owned)
        })
        .unwrap();
    let other = begin(roots[1], &address).wait_with_output().unwrap();
    let rest: Vec<String> = said.map(Result::unwrap).collect();
    let listener = listener.wait_with_output().unwrap();
    let other = (other.status.code(), text(&other.stdout) + &text(&other.stderr));
    let heard = heard + &rest.join("\n") + &text(&listener.stderr);
    [(listener.status.code(), heard), other]
}

#[test]
fn two_enclaves_of_one_machine_prove_to_each_other_what_they_are() {
    let Some(image) = image("examples/attest") else { return };
    let image = image.to_str().unwrap();
    let measured = |options: &[&str]| {
        let shown = postern(&[&["inspect", image], options].concat());
        text(&shown.stdout).lines().next().unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    // The same program with another heap is another enclave.
    let larger = ["--heap", "33M"];
    let (one, two) = (measured(&[]), measured(&larger));
    assert_ne!(one, two);
    let [listener, other] = attest(image, [&[], &larger]);
    assert_eq!((listener.0, other.0), (Some(0), Some(0)), "{listener:?} {other:?}");
    assert!(listener.1.contains(&format!("other {two}")), "{listener:?}");
    assert!(other.1.contains(&format!("other {one}")), "{other:?}");

    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    fs::write(&root, [9; 16]).unwrap();
    let elsewhere = attest(image, [&[], &["--root", root.to_str().unwrap()]]);
    for (code, said) in elsewhere {
        assert_eq!(code, Some(101), "{said}");
        assert!(said.contains("was not made on this machine"), "{said}");
    }
}

#[test]
fn inspect_ends_quietly_when_nobody_reads_on() {
    let Some(image) = image("postern-enclave") else { return };
    let mut shown = Command::new(env!("CARGO_BIN_EXE_postern"))
        .args(["enclave", "inspect"])
        .arg(image)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(shown.stdout.take());
    let ended = shown.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), text(&ended.stderr)), (Some(0), String::new()));
}
