//! Keys from outside: passphrases, slots, a rekey that is killed, and where no key may ever be.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use ring::{aead, hkdf};

use crate::common::{World, children, end, name_of, skip};

const USAGE: i32 = 64;
const DAMAGED: i32 = 65;
const KEY: i32 = 67;
const IN_USE: i32 = 73;
const ABORTED: i32 = 128 + 6;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A key file of the test's own.
fn key_file(world: &World, name: &str, byte: u8) -> PathBuf {
    let path = world.path(name);
    std::fs::write(&path, [byte; 32]).unwrap();
    path
}

fn passphrase_file(world: &World, name: &str, words: &str) -> PathBuf {
    let path = world.path(name);
    std::fs::write(&path, format!("{words}\n")).unwrap();
    path
}

fn json(said: &str) -> serde_json::Value {
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

#[test]
fn a_passphrase_makes_opens_and_runs_and_keys_come_and_go() {
    let Some(world) = World::new() else { return };
    let volume = world.path("v");
    let (v, first) = (text(&volume), passphrase_file(&world, "p1", "correct horse"));
    let (second, key) = (passphrase_file(&world, "p2", "battery staple"), key_file(&world, "k", 7));
    let (first, second, key) = (text(&first), text(&second), text(&key));
    let postern = |words: &[&str]| end(&mut world.postern(words));

    postern(&["format", v, "--size", "4M", "--passphrase-file", first]).expect(0);
    assert!(!world.path("v.key").exists(), "no development key beside a passphrase");
    // What one run wrote the next one reads, by whatever key.
    let run = |options: &[&str], program: &[&str]| {
        let mut all = vec!["--no-probes"];
        all.extend_from_slice(options);
        end(&mut world.run_with(&volume, &all, program))
    };
    let write = ["sh", "-c", "echo sealed > /sealed/data && exec head -n 1 /sealed/data"];
    let read = ["sh", "-c", "head -n 1 /sealed/data; ls /proc/self/fd | wc -l"];
    let ended = run(&["--passphrase-file", first], &write).expect(0);
    assert_eq!(ended.stdout, "sealed\n");

    let added = postern(&["key", "add", v, "--passphrase-file", first, "--new-key-file", key]);
    assert!(added.expect(0).stdout.contains("slot 1: added"));
    assert!(run(&["--key-file", key], &read).expect(0).stdout.starts_with("sealed\n"));
    let list = postern(&["key", "list", v, "--json"]).expect(0);
    let slots = &json(&list.stdout)["slots"];
    assert_eq!(slots[0]["kind"], "passphrase");
    assert_eq!(slots[0]["memory_kib"], 65536);
    assert_eq!(slots[1]["kind"], "key file");
    assert_eq!(slots.as_array().unwrap().len(), 2);

    let changed = ["key", "change", v, "--passphrase-file", first, "--new-passphrase-file", second];
    assert!(postern(&changed).expect(0).stdout.contains("slot 0: changed"));
    for dropped in ["info", "verify"] {
        postern(&[dropped, v, "--passphrase-file", first]).expect_line(KEY, "opens with this key");
        postern(&[dropped, v, "--passphrase-file", second]).expect(0);
    }
    run(&["--passphrase-file", first], &read).expect_line(KEY, "opens with this key");

    postern(&["key", "remove", v, "--key-file", key, "--slot", "3"]).expect_line(USAGE, "slot");
    postern(&["key", "remove", v, "--key-file", key, "--slot", "0"]).expect(0);
    postern(&["info", v, "--passphrase-file", second]).expect_line(KEY, "opens with this key");
    postern(&["key", "remove", v, "--key-file", key]).expect_line(USAGE, "last key slot");
    assert!(run(&["--key-file", key], &read).expect(0).stdout.starts_with("sealed\n"));
    postern(&["key", "remove", v, "--key-file", key, "--destroy-volume"]).expect(0);
    postern(&["info", v, "--key-file", key]).expect_line(KEY, "opens with this key");
}

#[test]
fn a_passphrase_that_cannot_be_had_is_told_before_anything_is_made() {
    let Some(world) = World::new() else { return };
    let volume = world.path("v");
    let v = text(&volume);
    let empty = passphrase_file(&world, "empty", "");
    let postern = |words: &[&str]| end(&mut world.postern(words));
    for source in [&["--passphrase-file", text(&empty)][..], &["--passphrase-file", "none"]] {
        let words = [&["format", v, "--size", "4M"], source].concat();
        postern(&words).expect_line(KEY, "passphrase");
        assert!(!volume.exists());
    }
    // Without a terminal nothing can be asked for.
    let mut command = Command::new("setsid");
    let run = world.postern(["format", v, "--size", "4M", "--passphrase"]);
    command.arg("-w").arg(run.get_program()).args(run.get_args()).current_dir(world.directory());
    end(&mut command).expect_line(KEY, "--passphrase-file");
    assert!(!volume.exists());
}

#[test]
fn a_directory_takes_a_passphrase_and_its_slots_are_those_of_its_index() {
    let Some(world) = World::new() else { return };
    let (directory, words) = (world.path("d"), passphrase_file(&world, "p", "open sesame"));
    let shown = format!("/data/={}", text(&directory));
    let run = |options: &[&str], script: &str| {
        let mut all = vec!["run", "--volume", &shown, "--no-probes"];
        all.extend_from_slice(options);
        all.extend_from_slice(&["--", "sh", "-c", script]);
        end(&mut world.postern(all))
    };
    let options = ["--passphrase-file", text(&words)];
    run(&["--passphrase-file", text(&words), "--create", "1G"], "echo a > /data/x").expect(0);
    assert_eq!(run(&options, "cat /data/x").expect(0).stdout, "a\n");
    let key = key_file(&world, "k", 3);
    let d = text(&directory);
    let add = ["key", "add", d, "--passphrase-file", text(&words), "--new-key-file", text(&key)];
    end(&mut world.postern(add)).expect(0);
    assert_eq!(run(&["--key-file", text(&key)], "cat /data/x").expect(0).stdout, "a\n");
    end(&mut world.postern(["verify", d, "--passphrase-file", text(&words)])).expect(0);
    let index = format!("{d}/index");
    end(&mut world.postern(["rekey", &index, "--key-file", text(&key)]))
        .expect_line(USAGE, "directory");
}

/// Kills a command after so many lines that it said; `false` if it had ended well before.
fn cut_off(mut command: Command, lines: usize) -> bool {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..lines {
        let _ = said.next();
    }
    child.kill().unwrap();
    !child.wait().unwrap().success()
}

#[test]
fn a_rekey_that_is_killed_goes_on_and_at_its_end_the_dropped_key_opens_nothing() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "64M");
    let (v, own) = (text(&volume), world.path("v.key"));
    let (kept, dropped) = (key_file(&world, "kept", 1), key_file(&world, "dropped", 2));
    for key in [&kept, &dropped] {
        end(&mut world.postern(["key", "add", v, "--new-key-file", text(key)])).expect(0);
    }
    let fill = ["--rw=write", "--bs=64k", "--size=64m", "--verify=crc32c", "--do_verify=0"];
    world.fio(&volume, &fill).expect(0);
    let check = ["--rw=read", "--bs=64k", "--size=64m", "--verify=crc32c"];
    let old_header = std::fs::read(&volume).unwrap()[..16 * 4096].to_vec();
    let rekey = ["rekey", v, "--key-file", text(&own), "--keep-key-file", text(&kept), "--json"];

    // Killed after its first, second and third word of progress.
    for lines in 1..=3 {
        cut_off(world.postern(rekey), lines);
        world.fio(&volume, &check).expect(0);
        end(&mut world.postern(["verify", v, "--key-file", text(&kept)])).expect(0);
    }
    let info = end(&mut world.postern(["info", v, "--key-file", text(&own), "--json"])).expect(0);
    if json(&info.stdout)["rekeying"] != true {
        return skip("the rekey came to its end before it was killed");
    }

    let ended = end(&mut world.postern(rekey)).expect(0);
    let report = json(&ended.stdout);
    assert_eq!((&report["resumed"], &report["key_version"]), (&true.into(), &2.into()));
    world.fio(&volume, &check).expect(0);
    for (key, code) in [(&own, 0), (&kept, 0), (&dropped, KEY)] {
        assert_eq!(end(&mut world.postern(["verify", v, "--key-file", text(key)])).code(), code);
    }
    // Whoever kept the old header and the dropped key has the old master: it leads nowhere.
    let file = File::options().write(true).open(&volume).unwrap();
    file.write_all_at(&old_header, 0).unwrap();
    drop(file);
    end(&mut world.postern(["info", v, "--key-file", text(&dropped)])).expect_line(DAMAGED, "root");
}

#[test]
fn a_volume_in_use_keeps_its_keys() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "4M");
    let new = key_file(&world, "new", 1);
    let options = ["--no-probes", "--exclusive"];
    let words = ["sh", "-c", "exec 3</sealed/data; echo ready; read x"];
    let mut holder = world.run_with(&volume, &options, words);
    let (mut child, _) = ready(&mut holder);
    for words in [
        &["key", "add", text(&volume), "--new-key-file", text(&new)][..],
        &["rekey", text(&volume)],
        &["key", "list", text(&volume)],
    ] {
        end(world.postern(words).args(["--wait", "0"])).expect_line(IN_USE, "in use");
    }
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Starts `command` and waits for its first line.
fn ready(command: &mut Command) -> (Child, impl std::io::Read) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    if line != "ready\n" {
        let mut why = String::new();
        child.stderr.take().unwrap().read_to_string(&mut why).unwrap();
        panic!("it said {line:?} and {why}");
    }
    (child, said)
}

/// What is looked for, by name.
type Needles = Vec<(&'static str, Vec<u8>)>;

fn derived(secret: &[u8], salt: &[u8], label: &[u8], uuid: &[u8]) -> [u8; 32] {
    struct Length;
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            32
        }
    }
    let mut out = [0; 32];
    let key = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    key.expand(&[label, uuid], Length).unwrap().fill(&mut out).unwrap();
    out
}

fn opened(key: [u8; 32], aad: &[u8], sealed: &[u8], tag: &[u8]) -> Vec<u8> {
    let key = aead::UnboundKey::new(&aead::AES_256_GCM, &key).unwrap();
    let nonce = aead::Nonce::assume_unique_for_key([0; 12]);
    let mut data = [sealed, tag].concat();
    let key = aead::LessSafeKey::new(key);
    key.open_in_place(nonce, aead::Aad::from(aad), &mut data).unwrap().to_vec()
}

/// The keys of a volume that a key file's 32 bytes open by slot 0, found as docs/FORMAT.md says.
fn secrets(volume: &Path, user: &[u8]) -> Needles {
    let mut header = vec![0; 32768];
    File::open(volume).unwrap().read_exact(&mut header).unwrap();
    let uuid = &header[48..64];
    let slot = &header[4096..4608];
    let kek = derived(user, &slot[32..64], b"postern/1 slot kek", uuid);
    let master = opened(kek, &[&slot[..64], uuid].concat(), &slot[64..96], &slot[96..112]);
    let ring = &header[8192..12288];
    let key = derived(&master, &ring[..24], b"postern/1 keyring", uuid);
    let keyring = opened(key, uuid, &ring[64..], &ring[24..40]);
    vec![
        ("the user's key", user.to_vec()),
        ("the master", master),
        ("the volume key", keyring[72..104].to_vec()),
    ]
}

/// Which of them `memory` holds.
fn found(needles: &Needles, memory: &[u8]) -> BTreeSet<&'static str> {
    let holds = |needle: &[u8]| memchr::memmem::find(memory, needle).is_some();
    needles.iter().filter(|(_, needle)| holds(needle)).map(|(name, _)| *name).collect()
}

/// Which of them lie in the memory of a process, the pages it shares included. `None`: the system
/// does not let us look.
fn in_process(pid: u32, needles: &Needles) -> Option<BTreeSet<&'static str>> {
    const PAGE: u64 = 4096;
    let mut memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut all = BTreeSet::new();
    for line in maps.lines().filter(|line| !line.ends_with("[vvar]") && !line.contains("[vsys")) {
        let (range, rest) = line.split_once(' ').unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let number = |hex| u64::from_str_radix(hex, 16).unwrap();
        let (from, to) = (number(from), number(to));
        if !rest.starts_with('r') {
            continue;
        }
        // Only pages that are there: reading others would make them.
        let mut entries = vec![0; usize::try_from((to - from) / PAGE * 8).unwrap()];
        if pagemap.read_exact_at(&mut entries, from / PAGE * 8).is_err() {
            continue;
        }
        let mut run = Vec::new();
        for (at, entry) in (from..to).step_by(4096).zip(entries.as_chunks::<8>().0) {
            if u64::from_le_bytes(*entry) >> 62 == 0 {
                all.extend(found(needles, &std::mem::take(&mut run)));
                continue;
            }
            let mut page = [0; PAGE as usize];
            memory.seek(SeekFrom::Start(at)).ok()?;
            if memory.read_exact(&mut page).is_ok() {
                run.extend_from_slice(&page);
            }
        }
        all.extend(found(needles, &run));
    }
    Some(all)
}

/// Runs the guest that aborts when told, looks at the daemon and at the guest, and answers what of
/// the needles is in the guest, in the daemon, and in the guest's core dump.
fn looked(
    world: &World,
    volume: &Path,
    options: &[&str],
    needles: &Needles,
) -> Option<[BTreeSet<&'static str>; 3]> {
    let guest = world.guest("keyholder")?;
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.starts_with('|') || pattern.contains('/') {
        skip("core dumps go elsewhere (core_pattern)");
        return None;
    }
    let run = world.run_with(volume, options, [text(&guest), "/sealed/data"]);
    let mut command = world.command("sh");
    command.args(["-c", "ulimit -c unlimited || exit 99; exec \"$@\"", "sh"]);
    command.arg(run.get_program()).args(run.get_args());
    let (mut child, _said) = ready(&mut command);
    let process = |name: &str| {
        let named = |pid: &u32| name_of(*pid) == name;
        children(child.id()).into_iter().find(named).unwrap_or_else(|| panic!("no {name}"))
    };
    let daemon = in_process(process("posternd"), needles);
    let inside = in_process(process("keyholder"), needles);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let status = child.wait().unwrap();
    let (Some(daemon), Some(inside)) = (daemon, inside) else {
        skip("the system lets nobody look at another process");
        return None;
    };
    assert_eq!(status.code(), Some(ABORTED));
    let core = std::fs::read_dir(world.directory()).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let is_core = path.file_name()?.to_str()?.starts_with("core");
        is_core.then_some(path)
    });
    let Some(core) = core else {
        skip("the system wrote no core dump");
        return None;
    };
    let dump = std::fs::read(core).unwrap();
    let marker = vec![("the marker", b"postern-core-marker".to_vec())];
    assert_eq!(found(&marker, &dump).len(), 1, "the dump holds what the guest's heap held");
    Some([inside, daemon, found(needles, &dump)])
}

#[test]
fn no_key_is_in_the_daemon_in_shared_memory_or_in_a_core_dump() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "16M");
    let key = std::fs::read(world.path("v.key")).unwrap();
    let needles = secrets(&volume, &key);
    let Some([guest, daemon, dump]) = looked(&world, &volume, &["--no-probes"], &needles) else {
        return;
    };
    assert!(guest.contains("the volume key"), "the control: the enclave has it");
    assert_eq!((daemon, dump), (BTreeSet::new(), BTreeSet::new()));
}

#[test]
fn a_passphrase_is_in_no_process_but_the_launcher() {
    let Some(world) = World::new() else { return };
    let (volume, words) = (world.path("v"), "a passphrase to be looked for");
    let file = passphrase_file(&world, "p", words);
    let options = ["--passphrase-file", text(&file)];
    let format = ["format", text(&volume), "--size", "4M", options[0], options[1]];
    end(&mut world.postern(format)).expect(0);
    let needles = vec![("the passphrase", words.as_bytes().to_vec())];
    let options = [&["--no-probes"][..], &options].concat();
    let Some(seen) = looked(&world, &volume, &options, &needles) else { return };
    assert_eq!(seen, [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()]);
}

/// A protected directory: its index and every file, killed after each number of files.
#[test]
fn a_directory_whose_rekey_is_killed_runs_on_and_at_its_end_the_dropped_key_opens_nothing() {
    let Some(world) = World::new() else { return };
    let (host, own, dropped) =
        (world.path("d"), key_file(&world, "own", 1), key_file(&world, "dropped", 2));
    let shell = |line: &str| {
        let mut shown = std::ffi::OsString::from("/data/=");
        shown.push(&host);
        let mut command = world.postern(["run", "--no-probes", "--create", "1M", "--volume"]);
        command.arg(shown).args(["--key-file", text(&own), "--", "sh", "-ec", line]);
        end(&mut command)
    };
    let index = host.join("index");
    let all = "cd /data; cat one two a/three; stat -c %s empty; cat new* 2>/dev/null || :";
    shell("cd /data; seq 20000 > one; seq 9 > two; mkdir a; seq 500 > a/three; : > empty")
        .expect(0);
    let mut before = shell(all).expect(0).stdout;
    let add = ["key", "add", text(&index), "--key-file", text(&own), "--new-key-file"];
    end(world.postern(add).arg(&dropped)).expect(0);
    let old = std::fs::read(&index).unwrap();
    let rekey = ["rekey", text(&host), "--key-file", text(&own), "--json"];

    let mut killed = 0;
    for lines in 1..=3 {
        killed += usize::from(cut_off(world.postern(rekey), lines));
        assert_eq!(shell(all).expect(0).stdout, before, "killed after {lines} files");
        // A file made meanwhile is one more.
        shell(&format!("echo {lines} > /data/new{lines}")).expect(0);
        before.push_str(&format!("{lines}\n"));
        end(&mut world.postern(["verify", text(&host), "--key-file", text(&own)])).expect(0);
    }
    let ended = end(&mut world.postern(rekey)).expect(0);
    let last = ended.stdout.lines().last().unwrap();
    let report = json(last);
    assert_eq!((&report["files"], &report["resumed"]), (&7.into(), &(killed > 0).into()));
    assert_eq!(shell(all).expect(0).stdout, before);
    end(&mut world.postern(["verify", text(&host), "--key-file", text(&own)])).expect(0);
    let verify = ["verify", text(&host), "--key-file", text(&dropped)];
    assert_eq!(end(&mut world.postern(verify)).code(), KEY);
    // The old index gives the keys that the files had: none of them opens any more.
    let new = std::fs::read(&index).unwrap();
    std::fs::write(&index, old).unwrap();
    let ended = end(&mut world.postern(verify)).expect(DAMAGED);
    let refused = ended.stdout.lines().filter(|line| line.contains("no key slot")).count();
    assert_eq!(refused, 4, "{}", ended.stdout);
    std::fs::write(&index, new).unwrap();
}
