//! The second implementation of the format, `tools/reader` (Python, written from docs/FORMAT.md
//! alone), reads what the built parts have written, byte for byte.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{World, begin, children, end, name_of, signal, skip, until};

/// The second implementation.
const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/reader");
/// More sessions than a superblock remembers epochs, so that the epoch table is read, too.
const SESSIONS: u64 = 36;

/// A Python that can read volumes; `None`, said loudly, without one.
fn python() -> Option<&'static str> {
    let found = ["python3", "/usr/bin/python3"].into_iter().find(|python| {
        let mut command = Command::new(python);
        let done = command.arg("-B").arg(READER).arg("--check").output();
        done.is_ok_and(|done| done.status.success())
    });
    if found.is_none() {
        skip("no python3 with `cryptography` and `argon2`; `cargo xtask setup` installs both");
    }
    found
}

/// What the reader says of `volume` (one line), its content in `content`.
#[track_caller]
fn read(python: &str, volume: &Path, key: &Path, content: &Path, audit: bool) -> serde_json::Value {
    let mut command = Command::new(python);
    command.arg("-B").arg(READER);
    command.arg(volume).arg("--key-file").arg(key).arg("--content").arg(content);
    let said = end(command.args(audit.then_some("--audit"))).expect(0);
    serde_json::from_str(&said.stdout).unwrap()
}

fn key_of(volume: &Path) -> PathBuf {
    let mut key = volume.as_os_str().to_owned();
    key.push(".key");
    key.into()
}

/// Words of a shell for `file`: one short write, punch or change of size, drawn from `seed`.
fn change(file: &str, noise: &Path, seed: u64) -> String {
    let draw =
        |n: u64, of: u64| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(n as u32 * 7) % of;
    let noise = noise.display();
    let dd = |unit: u64, count: u64, at: u64| {
        let from = draw(3, 40);
        format!(
            "dd if={noise} of={file} bs={unit} count={count} skip={from} seek={at} conv=notrunc \
             status=none"
        )
    };
    match seed % 6 {
        0 | 1 => dd(4096, 1 + draw(1, 40), draw(2, 400)),
        2 => dd(512, 1 + draw(1, 60), draw(2, 3200)),
        3 => dd(1 << 16, 1 + draw(1, 4), draw(2, 24)),
        4 => format!(
            "fallocate --punch-hole --offset {} --length {} {file}",
            draw(1, 300) * 1000,
            1 + draw(2, 300_000)
        ),
        _ => format!("truncate --size {} {file}", (1 << 20) + draw(1, 1 << 20)),
    }
}

#[test]
fn a_second_implementation_reads_what_many_sessions_wrote() {
    let (Some(world), Some(python)) = (World::new(), python()) else { return };
    let (volume, plain) = (world.format("v", "2M"), world.path("plain"));
    let (noise, content) = (world.path("noise"), world.path("content"));
    let bytes: Vec<u8> = (0..5_u64 << 18)
        .flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16).to_le_bytes()[..4].to_vec())
        .collect();
    std::fs::write(&noise, bytes).unwrap();
    std::fs::write(&plain, vec![0; 2 << 20]).unwrap();
    for session in 0..SESSIONS {
        let run = |file: &str| ["sh".into(), "-ec".into(), change(file, &noise, session)];
        end(&mut world.run(&volume, run("/sealed/data"))).expect(0);
        let [shell, option, words] = run(&plain.display().to_string());
        end(Command::new(shell).args([option, words])).expect(0);
    }
    let said = read(python, &volume, &key_of(&volume), &content, true);
    assert!(std::fs::read(&content).unwrap() == std::fs::read(&plain).unwrap(), "{said}");
    assert_eq!(said["clean"], true);
    assert_eq!(said["sessions"], SESSIONS);
    for list in ["leaked", "missing", "twice"] {
        assert_eq!(said["space"][list].as_array().unwrap().len(), 0, "the space map: {said}");
    }
}

#[test]
fn a_second_implementation_reads_what_a_kill_left() {
    let (Some(world), Some(python)) = (World::new(), python()) else { return };
    let Some(program) = world.guest("synclog") else { return };
    let volume = world.format("v", "2M");
    let (log, left, content) = (world.path("log"), world.path("left"), world.path("content"));
    let confirmed = || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().filter(|line| line.starts_with('C')).count()
    };
    let mut tails = 0;
    for round in 0..4_u64 {
        let (enough, seed) = (confirmed() + 40 + 97 * round as usize, (round * 77_777).to_string());
        let words = [program.as_os_str(), "write".as_ref(), "/sealed/data".as_ref()];
        let words = words.into_iter().chain([log.as_os_str(), "512".as_ref(), seed.as_ref()]);
        let mut running = begin(&mut world.run(&volume, words.map(OsStr::to_owned)));
        until("enough confirmed writes", || {
            assert!(running.is_running(), "the guest ended by itself");
            (confirmed() >= enough).then_some(())
        });
        // Both, so that nobody writes anything down after it.
        let family = children(running.pid());
        for pid in family.iter().filter(|pid| ["synclog", "posternd"].contains(&&*name_of(**pid))) {
            signal("KILL", *pid);
        }
        running.wait();
        until("the family has gone", || {
            family
                .iter()
                .all(|&pid| !["synclog", "posternd"].contains(&&*name_of(pid)))
                .then_some(())
        });
        std::fs::copy(&volume, &left).unwrap();
        let said = read(python, &left, &key_of(&volume), &content, true);
        tails += said["journal"]["entries"].as_u64().unwrap();
        let copy = |file: &str, to: &Path| {
            let words = ["dd", "bs=64k", "status=none"].map(str::to_owned);
            words.into_iter().chain([format!("if={file}"), format!("of={}", to.display())])
        };
        let ours = world.path("ours");
        end(&mut world.run(&volume, copy("/sealed/data", &ours))).expect(0);
        let same = std::fs::read(&content).unwrap() == std::fs::read(&ours).unwrap();
        assert!(same, "round {round}: {said}");
    }
    assert!(tails > 0, "no round left anything in the journal");
}

#[test]
fn a_second_implementation_reads_a_protected_directory() {
    let (Some(world), Some(python)) = (World::new(), python()) else { return };
    let (host, key) = (world.path("files"), world.path("key"));
    std::fs::write(&key, [7; 32]).unwrap();
    let script = |at: &str| {
        format!(
            "cd {at}; seq 20000 > one; mkdir -p a/b; seq 7 > a/b/two; mv a/b/two a/three; \
             seq 90000 > a/gone; rm a/gone; : > empty; truncate --size 12345 one"
        )
    };
    let mut command = world.postern(["run", "--no-probes", "--create", "64M", "--volume"]);
    let mut shown = std::ffi::OsString::from("/sealed/=");
    shown.push(&host);
    command.arg(shown).arg("--key-file").arg(&key);
    end(command.args(["--", "sh", "-ec", &script("/sealed")])).expect(0);
    let plain = world.path("plain");
    std::fs::create_dir(&plain).unwrap();
    end(Command::new("sh").args(["-ec", &script(&plain.display().to_string())])).expect(0);
    let content = world.path("content");
    read(python, &host, &key, &content, true);
    end(Command::new("diff").arg("-r").args([&plain, &content])).expect(0);
}
