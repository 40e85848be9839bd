//! A protected directory: kill -9 amid its changes, and a host that exchanges, removes and cuts
//! files.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{World, begin, children, end, name_of, signal, until};

const ROUNDS: u64 = 8;
const DAMAGED: i32 = 65;

/// `postern run` of `program` with the directory under `/data`.
fn run<A: AsRef<std::ffi::OsStr>>(
    world: &World,
    directory: &Path,
    program: impl IntoIterator<Item = A>,
) -> Command {
    let mut shown = OsString::from("/data/=");
    shown.push(directory);
    let mut command = world.postern(["run", "--no-probes", "--create", "1M", "--volume"]);
    command.arg(shown).arg("--").args(program);
    command
}

/// Runs a line of the shell in the directory.
fn shell(world: &World, directory: &Path, line: &str) -> crate::common::Ended {
    end(&mut run(world, directory, ["sh", "-c", line]))
}

/// The host files that have an id for a name.
fn volumes(directory: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = all.filter(|path| !path.ends_with("index")).collect();
    files.sort();
    files
}

#[test]
fn every_synced_name_survives_kill_9_with_its_content_and_nothing_else_is_left() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("names") else { return };
    let (directory, log) = (world.path("d"), world.path("log"));
    let words = |mode: &str| -> Vec<OsString> {
        vec![program.clone().into(), mode.into(), "/data".into(), log.clone().into()]
    };
    let finished = || fs::metadata(&log).map_or(0, |log| log.len() / 8);
    for round in 0..ROUNDS {
        let enough = finished() + 1 + round;
        let mut running = begin(&mut run(&world, &directory, words("write")));
        until("enough finished files", || {
            assert!(running.is_running(), "the guest ended by itself");
            (finished() >= enough).then_some(())
        });
        let all = children(running.pid());
        let guest = all.into_iter().find(|&pid| name_of(pid) == "names").unwrap();
        signal("KILL", guest);
        running.wait().expect(128 + 9);
        end(&mut run(&world, &directory, words("check"))).expect(0);
        let info = end(&mut world.postern(["info", "d", "--json"])).expect(0);
        let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
        assert_eq!(info["files"], volumes(&directory).len(), "round {round}");
    }
    end(&mut world.postern(["verify", "d"])).expect(0);
}

#[test]
fn exchanged_missing_and_cut_host_files_give_eio_and_name_the_guests_path() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    shell(&world, &directory, "echo one > /data/one; echo two > /data/two").expect(0);
    let files = volumes(&directory);
    assert_eq!(files.len(), 2);
    let refused = |what: &str| {
        for name in ["one", "two"] {
            let ended = shell(&world, &directory, &format!("cat /data/{name}"));
            assert_ne!(ended.code(), 0, "{what}");
            assert_eq!(ended.stdout, "", "{what}");
            assert!(ended.stderr.contains("Input/output error"), "{what}: {}", ended.stderr);
            let named = format!("postern: /data/{name}: ");
            assert!(ended.stderr.contains(&named), "{what}: {}", ended.stderr);
        }
        end(&mut world.postern(["verify", "d"])).expect(DAMAGED);
    };
    let aside = world.path("aside");
    let exchange = || {
        fs::rename(&files[0], &aside).unwrap();
        fs::rename(&files[1], &files[0]).unwrap();
        fs::rename(&aside, &files[1]).unwrap();
    };
    exchange();
    refused("exchanged");
    exchange();
    let moved = world.path("moved");
    fs::create_dir(&moved).unwrap();
    files.iter().for_each(|f| fs::rename(f, moved.join(f.file_name().unwrap())).unwrap());
    refused("missing");
    files.iter().for_each(|f| fs::rename(moved.join(f.file_name().unwrap()), f).unwrap());
    let lengths: Vec<u64> = files.iter().map(|f| fs::metadata(f).unwrap().len()).collect();
    let cut = |to: &dyn Fn(u64) -> u64| {
        for (file, length) in files.iter().zip(&lengths) {
            fs::OpenOptions::new().write(true).open(file).unwrap().set_len(to(*length)).unwrap();
        }
    };
    cut(&|length| length - 4096);
    refused("cut");
    cut(&|length| length);
    let ended = shell(&world, &directory, "cat /data/one /data/two").expect(0);
    assert_eq!(ended.stdout, "one\ntwo\n");
    end(&mut world.postern(["verify", "d"])).expect(0);
}

/// Copies a host file, sparse: a file's volume takes up to 16 GiB on the host.
fn copy_sparse(world: &World, from: &Path, to: &Path) {
    end(world.command("cp").arg("--sparse=always").arg(from).arg(to)).expect(0);
}

/// The index records the state of each file, whether it has a counter or not.
#[test]
fn an_older_state_of_one_file_alone_is_refused_and_the_other_files_go_on() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    shell(&world, &directory, "echo one > /data/one; echo two > /data/two").expect(0);
    let copy = |from: &Path, to: &Path| copy_sparse(&world, from, to);
    let old = world.path("old");
    fs::create_dir(&old).unwrap();
    volumes(&directory).iter().for_each(|file| copy(file, &old));
    // Reading is an opening, too.
    shell(&world, &directory, "echo more >> /data/one; cat /data/two").expect(0);
    let aside = world.path("aside");
    for file in volumes(&directory) {
        copy(&file, &aside);
        copy(&old.join(file.file_name().unwrap()), &file);
        let ended = shell(&world, &directory, "cat /data/one /data/two; stat -c %s /data/*");
        assert_ne!(ended.code(), 0, "{}", ended.stdout);
        assert!(ended.stderr.contains("the directory's index records"), "{}", ended.stderr);
        let shown = ["one\nmore\n", "two\n"].map(|text| ended.stdout.contains(text));
        assert!(shown == [true, false] || shown == [false, true], "{}", ended.stdout);
        let verified = end(&mut world.postern(["verify", "d"])).expect(DAMAGED);
        assert!(verified.stdout.contains("the directory's index records"), "{}", verified.stdout);
        copy(&aside, &file);
    }
    let ended = shell(&world, &directory, "cat /data/one /data/two").expect(0);
    assert_eq!(ended.stdout, "one\nmore\ntwo\n");
}

#[test]
fn an_index_of_garbage_is_refused_and_a_shell_shares_its_open_file_with_its_children() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    shell(&world, &directory, "echo one > /data/one").expect(0);
    let held = shell(&world, &directory, "exec 3</data/one; ls /data; cat <&3").expect(0);
    assert_eq!(held.stdout, "one\none\n");
    let index = directory.join("index");
    let whole = fs::read(&index).unwrap();
    fs::write(&index, vec![0x5a; whole.len()]).unwrap();
    let ended = shell(&world, &directory, "cat /data/one");
    assert_eq!(ended.code(), DAMAGED, "{}", ended.stderr);
    fs::write(&index, whole).unwrap();
    assert_eq!(shell(&world, &directory, "cat /data/one").expect(0).stdout, "one\n");
}

#[test]
fn a_file_that_the_host_brings_back_or_adds_has_no_name() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    shell(&world, &directory, "echo one > /data/one; echo two > /data/two").expect(0);
    let copy = |from: &Path, to: &Path| copy_sparse(&world, from, to);
    let kept = world.path("kept");
    end(world.command("cp").args(["-r", "--sparse=always"]).args([&directory, &kept])).expect(0);
    shell(&world, &directory, "rm /data/one").expect(0);
    let left = volumes(&directory);
    assert_eq!(left.len(), 1);
    let all = volumes(&kept);
    let gone = all.iter().find(|file| !left[0].ends_with(file.file_name().unwrap())).unwrap();
    copy(gone, &directory.join(gone.file_name().unwrap()));
    copy(gone, &directory.join("0".repeat(32)));
    let ended =
        shell(&world, &directory, "ls /data; cat /data/two; ! cat /data/one 2>/dev/null").expect(0);
    assert_eq!(ended.stdout, "two\ntwo\n");
    // A new file of that name is a new one.
    shell(&world, &directory, "echo new > /data/one; cat /data/one").expect(0);
    end(&mut world.postern(["verify", "d"])).expect(0);
}

/// The measure of the documentation: a small file costs a write of its volume, of its data, of its
/// journal and a flush, and a share of the name table.
#[test]
fn a_small_file_costs_at_most_five_host_requests() {
    const FILES: u64 = 400;
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    shell(&world, &directory, "true").expect(0);
    let line = format!("i=0; while [ $i -lt {FILES} ]; do echo $i > /data/f$i; i=$((i+1)); done");
    let stats = world.path("stats");
    let mut shown = OsString::from("/data/=");
    shown.push(&directory);
    let mut command = world.postern(["run", "--no-probes", "--stats"]);
    command.arg(&stats).arg("--volume").arg(shown).args(["--", "sh", "-c", &line]);
    end(&mut command).expect(0);
    let told: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
    let requests = told["counters"]["submissions"].as_u64().unwrap();
    // Opening and closing the index, the name tables, a checkpoint.
    assert!(requests <= 5 * FILES + 200, "{requests} host requests for {FILES} files");
    let count = shell(&world, &directory, "ls /data | wc -l; cat /data/f399").expect(0);
    assert_eq!(count.stdout, format!("{FILES}\n399\n"));
    end(&mut world.postern(["verify", "d"])).expect(0);
}

/// What opening costs, seen by a program that opens each file once to tell its size: three reads of
/// the front, one of the journal. In the first run files rest with their journal, in the second they
/// were closed.
#[test]
fn a_file_that_was_put_away_is_opened_again_with_four_reads() {
    const FILES: u64 = 60;
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    let line = format!("i=0; while [ $i -lt {FILES} ]; do echo $i > /data/f$i; i=$((i+1)); done");
    shell(&world, &directory, &line).expect(0);
    let stats = world.path("stats");
    for round in 0..2 {
        let mut shown = OsString::from("/data/=");
        shown.push(&directory);
        let mut command = world.postern(["run", "--no-probes", "--stats"]);
        command.arg(&stats).arg("--volume").arg(shown);
        let ended = end(command.args(["--", "sh", "-c", "ls -l /data | wc -l"])).expect(0);
        assert_eq!(ended.stdout, format!("{}\n", FILES + 1));
        let told: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
        let stages = told["stages"].as_array().unwrap().iter();
        let reads = stages.filter(|s| s["stage"] == "device" && s["operation"] == "read");
        let reads: u64 = reads.map(|s| s["count"].as_u64().unwrap()).sum();
        // Opening the index and reading the name table.
        assert!(reads <= 4 * FILES + 40, "round {round}: {reads} host reads for {FILES} files");
        assert!(reads >= 3 * FILES, "round {round}: {reads} host reads cannot be all");
        shell(&world, &directory, "cat /data/*").expect(0);
    }
    end(&mut world.postern(["verify", "d"])).expect(0);
}

/// Files made and removed between two batches never get a name on the host; those that had one
/// are removed there.
#[test]
fn removed_files_leave_nothing_on_the_host() {
    let Some(world) = World::new() else { return };
    let directory = world.path("d");
    let line = "cd /data; for i in 1 2 3 4; do echo $i > f$i; done; sync -f .; rm f1 f2; \
                for i in 5 6; do echo $i > f$i; done; rm f5; mv f6 f3; cat f3 f4";
    let ended = shell(&world, &directory, line).expect(0);
    assert_eq!(ended.stdout, "6\n4\n");
    assert_eq!(volumes(&directory).len(), 2);
    // What rests with its journal opens again, also to be written.
    let more = shell(&world, &directory, "cd /data; echo more >> f4; cat *").expect(0);
    assert_eq!((more.stdout.as_str(), more.stderr.contains("recovered")), ("6\n4\nmore\n", false));
    end(&mut world.postern(["verify", "d"])).expect(0);
}
