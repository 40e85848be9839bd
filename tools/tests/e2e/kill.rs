//! kill -9 in the middle of synced writing: every confirmed write reads back, every time.
//!
//! `POSTERN_KILLS` sets how often each victim is killed (default 20).

use std::{
    ffi::OsString,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    process::Command,
};

use crate::common::{Ended, Running, World, begin, children, end, name_of, signal, until};

/// Kills of each victim without `POSTERN_KILLS`.
const ROUNDS: u64 = 20;
/// The most confirmed writes that a round waits for.
const LONGEST: u64 = 1_200;
const BLOCKS: &str = "512";

/// Words for `synclog` on `file`.
pub fn words(program: &Path, mode: &str, file: &Path, log: &Path, seed: u64) -> Vec<OsString> {
    vec![
        program.into(),
        mode.into(),
        file.into(),
        log.into(),
        BLOCKS.into(),
        seed.to_string().into(),
    ]
}

/// How many writes the guest's log confirms; what was counted is not read again.
pub struct Confirmed<'a> {
    log: &'a Path,
    read: u64,
    count: usize,
}

impl<'a> Confirmed<'a> {
    pub const fn of(log: &'a Path) -> Self {
        Self { log, read: 0, count: 0 }
    }

    pub fn now(&mut self) -> usize {
        let Ok(mut log) = File::open(self.log) else { return 0 };
        let mut new = String::new();
        log.seek(SeekFrom::Start(self.read)).unwrap();
        log.read_to_string(&mut new).unwrap();
        // The last line may not be whole yet.
        let whole = new.rfind('\n').map_or(0, |end| end + 1);
        self.count += new[..whole].lines().filter(|line| line.starts_with('C')).count();
        self.read += whole as u64;
        self.count
    }

    /// Waits until there are `enough`; the guest must not end before.
    pub fn reach(&mut self, enough: usize, running: &mut Running) {
        until("enough confirmed writes", || {
            let seen = self.now();
            assert!(running.is_running() || seen >= enough, "the guest ended by itself");
            (seen >= enough).then_some(())
        });
    }
}

/// Ends `synclog` below a run, which has met no error.
pub fn stop(running: Running) -> Ended {
    let all = children(running.pid());
    signal("TERM", all.into_iter().find(|&pid| name_of(pid) == "synclog").unwrap());
    let ended = running.wait().expect(128 + 15);
    assert!(!ended.stderr.contains("EIO"), "{}", ended.stderr);
    ended
}

/// Kills a process below `postern` by its name while it writes; then checks the volume. Each round
/// is killed after another number of confirmed writes.
fn kill_in_rounds(victim: &str, expected_code: Option<i32>) {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    let volume = world.format("v", "2M");
    let (sealed, log) = (Path::new("/sealed/data"), world.path("log"));
    let mut confirmed = Confirmed::of(&log);
    let rounds = std::env::var("POSTERN_KILLS").ok().and_then(|text| text.parse().ok());
    for round in 0..rounds.unwrap_or(ROUNDS) {
        let before = confirmed.now();
        let write = words(&program, "write", sealed, &log, round * 1_000_003);
        // A daemon that dies is not to be replaced here: see `succession`.
        let options = ["--no-probes", "--daemon-wait", "0"];
        let mut running = begin(&mut world.run_with(&volume, &options, write));
        // A different count each round, so that the kill falls into different phases.
        let enough = before + 1 + usize::try_from(round * round * 3 % LONGEST).unwrap();
        confirmed.reach(enough, &mut running);
        let pid = if victim == "postern" {
            running.pid()
        } else {
            let all = children(running.pid());
            all.into_iter().find(|&pid| name_of(pid) == victim).unwrap()
        };
        let family = children(running.pid());
        signal("KILL", pid);
        let ended = running.wait();
        if let Some(code) = expected_code {
            assert_eq!(ended.code(), code, "{}", ended.stderr);
        }
        if victim == "postern" {
            // The guest lost its launcher and goes on; the daemon stops and leaves it with errors.
            until("the family has gone", || {
                family
                    .iter()
                    .all(|&pid| !["synclog", "posternd"].contains(&&*name_of(pid)))
                    .then_some(())
            });
        }
        let check = words(&program, "check", sealed, &log, 0);
        let ended = end(&mut world.run(&volume, check));
        assert_eq!(ended.code(), 0, "round {round}: {} {}", ended.stdout, ended.stderr);
    }
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn every_confirmed_write_survives_kills_of_the_program() {
    kill_in_rounds("synclog", Some(137));
}

/// Past the library: nothing is closed or written back at the end.
#[test]
fn what_was_stored_in_a_mapping_and_synced_survives_a_kill() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("mapper") else { return };
    let volume = world.format("v", "2M");
    let (file, sign) = (OsString::from("/sealed/data"), world.path("sign"));
    let words =
        |mode: &str| [program.clone().into(), mode.into(), file.clone(), sign.clone().into()];
    let mut running = begin(&mut world.run(&volume, words("store")));
    until("stored and synced", || {
        assert!(running.is_running() || sign.exists(), "the guest ended by itself");
        sign.exists().then_some(())
    });
    let all = children(running.pid());
    signal("KILL", all.into_iter().find(|&pid| name_of(pid) == "mapper").unwrap());
    running.wait().expect(137);
    let checked = end(&mut world.run(&volume, words("check"))).expect(0);
    assert_eq!(checked.stdout, "0 bytes are wrong\n");
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn every_confirmed_write_survives_kills_of_the_daemon() {
    kill_in_rounds("posternd", None);
}

#[test]
fn every_confirmed_write_survives_kills_of_the_launcher() {
    kill_in_rounds("postern", Some(137));
}

/// The control of this file: the checker does find a lost write and a torn block on a plain file.
#[test]
fn the_checker_finds_what_a_plain_file_lost() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("synclog") else { return };
    let (plain, log) = (world.path("plain"), world.path("log"));
    std::fs::write(&plain, vec![0; 2 << 20]).unwrap();
    let tool = |mode: &str| {
        let words = words(&program, mode, &plain, &log, 7);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    };
    let mut confirmed = Confirmed::of(&log);
    let mut running = begin(&mut tool("write"));
    confirmed.reach(50, &mut running);
    signal("KILL", running.pid());
    running.wait();
    end(&mut tool("check")).expect(0);

    let first = std::fs::read_to_string(&log).unwrap();
    let first = first.lines().find(|line| line.starts_with('C')).unwrap();
    let block: usize = first.split(' ').nth(1).unwrap().parse().unwrap();
    let whole = std::fs::read(&plain).unwrap();
    let mut lost = whole.clone();
    lost[block * 4096..(block + 1) * 4096].fill(0);
    std::fs::write(&plain, lost).unwrap();
    let said = end(&mut tool("check")).expect(1).stdout;
    assert!(said.contains(&format!("block {block}: version 0")), "{said}");
    let mut torn = whole;
    torn[block * 4096 + 512..(block + 1) * 4096].fill(0);
    std::fs::write(&plain, torn).unwrap();
    let said = end(&mut tool("check")).expect(1).stdout;
    assert!(said.contains(&format!("block {block}: torn")), "{said}");
}
