//! The launcher as a parent: statuses, signals, standard streams, what stays behind.

use std::{ffi::OsStr, io::Write as _, path::Path};

use crate::common::{Running, World, begin, children, end, name_of, signal, until};

#[test]
fn the_exit_code_of_the_program_comes_through() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    for code in [0, 1, 3, 64, 127, 255] {
        let program = ["sh", "-c", &format!("exit {code}")];
        assert_eq!(end(&mut world.run(&volume, program)).code(), code);
    }
}

#[test]
fn death_by_a_signal_is_128_and_its_number() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    for (name, number) in [("TERM", 15), ("KILL", 9), ("USR1", 10), ("ABRT", 6)] {
        let program = ["sh", "-c", &format!("kill -{name} $$")];
        assert_eq!(end(&mut world.run(&volume, program)).code(), 128 + number, "{name}");
    }
}

#[test]
fn signals_sent_to_the_launcher_reach_the_program() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    for name in ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"] {
        let ready = world.path(&format!("ready-{name}"));
        let script = format!(
            "trap 'echo got-{name}; exit 7' {name}; : > {}; while :; do sleep 0.01; done",
            ready.display()
        );
        // A shell does not trap what was ignored when it began, as nohup and `&` leave it.
        let program = ["env", "--default-signal", "sh", "-c", &script];
        let mut running = begin(&mut world.run(&volume, program));
        until("the program is ready", || (ready.exists() || !running.is_running()).then_some(()));
        signal(name, running.pid());
        let ended = running.wait().expect(7);
        assert_eq!(ended.stdout, format!("got-{name}\n"));
    }
}

#[test]
fn standard_streams_pass_through_untouched() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let mut command = world.run(&volume, ["sh", "-c", "cat; echo err >&2"]);
    command.stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\0bytes\xff").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"\0bytes\xff");
    assert!(output.stderr.ends_with(b"err\n"));
}

#[test]
fn nothing_stays_behind_no_process_no_socket_no_directory() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let runtime = world.path("runtime");
    std::fs::create_dir(&runtime).unwrap();
    let left = || std::fs::read_dir(&runtime).unwrap().count();
    for script in ["true", "exit 9", "kill -KILL $$"] {
        let mut command = world.run(&volume, ["sh", "-c", script]);
        end(command.env("XDG_RUNTIME_DIR", &runtime));
        assert_eq!(left(), 0, "{script}");
    }
    // Nor if the launcher itself is killed: the daemon and the program go with it.
    let mut command = world.run(&volume, ["sleep", "600"]);
    let mut running = begin(command.env("XDG_RUNTIME_DIR", &runtime));
    let (daemon, program) = until("daemon and program", || {
        let all = children(running.pid());
        let find = |name: &str| all.iter().copied().find(|&pid| name_of(pid) == name);
        assert!(running.is_running());
        find("posternd").zip(find("sleep"))
    });
    signal("KILL", running.pid());
    until("the daemon has gone", || (name_of(daemon) != "posternd").then_some(()));
    // So does the program: nobody would answer for its filtered calls.
    until("the program has gone", || (name_of(program) != "sleep").then_some(()));
    running.wait();
}

#[test]
fn the_program_keeps_its_name_its_arguments_and_its_environment() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let script = "echo \"$0|$1|$2|$MARK\"";
    let mut command = world.run(&volume, ["sh", "-c", script, "zero", "a b", ""]);
    let ended = end(command.env("MARK", "x=y")).expect(0);
    assert_eq!(ended.stdout, "zero|a b||x=y\n");
    let mut command = world.run(&volume, ["sh", "-c", "echo $LD_PRELOAD"]);
    let ended = end(command.env("LD_PRELOAD", "/no/such/library.so")).expect(0);
    let list = ended.stdout.trim_end();
    assert!(list.ends_with("libpostern_preload.so:/no/such/library.so"), "{list}");
}

/// Waits until the daemon of a run has the host file open; answers its number.
pub fn daemon_at_work(running: &mut Running, volume: &Path) -> u32 {
    serving(running, volume).expect("the program has ended")
}

/// The launcher's daemon, once it has `volume` open; `None` when the program has ended.
pub fn serving(running: &mut Running, volume: &Path) -> Option<u32> {
    // The program may yet have to make it.
    let place = volume.parent().unwrap().canonicalize().unwrap();
    let volume = place.join(volume.file_name().unwrap());
    until("a daemon has the volume open or the program has ended", || {
        if !running.is_running() {
            return Some(None);
        }
        let all = children(running.pid());
        let daemon = all.into_iter().find(|&pid| name_of(pid) == "posternd")?;
        let mut open = std::fs::read_dir(format!("/proc/{daemon}/fd")).ok()?;
        open.any(|fd| fd.is_ok_and(|fd| fd.path().read_link().is_ok_and(|to| to == volume)))
            .then_some(Some(daemon))
    })
}

#[test]
fn a_volume_is_locked_while_a_program_that_keeps_it_works_on_it() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "16M");
    let ready = world.path("ready");
    let script =
        format!("exec 3<>/sealed/data; : > {}; while :; do sleep 0.01; done", ready.display());
    let options = ["--no-probes", "--exclusive"];
    let mut running = begin(&mut world.run_with(&volume, &options, ["sh", "-c", &script]));
    until("the program is ready", || (ready.exists() || !running.is_running()).then_some(()));
    end(&mut world.postern(["info", "v", "--wait", "1"])).expect_line(73, "in use");
    let options = ["--no-probes", "--wait", "0"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(73, "in use");
    signal("TERM", running.pid());
    running.wait();
    end(&mut world.postern(["verify", "v"])).expect(0);
}

#[test]
fn statistics_are_saved_and_count_what_the_program_did() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "16M");
    let options = ["--stats", "stats.json"];
    let fio = [
        "fio",
        "--name=x",
        "--filename=/sealed/data",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randread",
        "--bs=4k",
        "--iodepth=8",
        "--size=16m",
        "--eta=never",
    ];
    world.fio(&volume, &["--rw=write", "--bs=64k", "--size=16m"]).expect(0);
    end(&mut world.run_with(&volume, &options, fio)).expect(0);
    let text = std::fs::read_to_string(world.path("stats.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(["ebpf", "daemon"].contains(&report["source"].as_str().unwrap()), "{text}");
    let reads = report["stages"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["stage"] == "device" && row["operation"] == "read")
        .unwrap();
    // 4096 reads of the guest; the volume joins none at this size, and adds reads of its map.
    assert!(reads["count"].as_u64().unwrap() >= 4096, "{text}");
    let time = |name: &str| reads[name].as_u64().unwrap();
    assert!(time("p50_ns") > 0 && time("p50_ns") <= time("p99_ns"), "{text}");
    assert!(time("p99_ns") <= time("p999_ns") && time("p999_ns") <= time("max_ns"), "{text}");
}

#[test]
fn a_daemon_of_ones_own_serves_a_run_and_answers_stats() {
    let Some(world) = World::new() else { return };
    world.format("v", "16M");
    let socket = world.path("own.sock");
    let mut command = std::process::Command::new(world.part("posternd"));
    command.arg("--socket").arg(&socket).arg("--root").arg(world.directory()).arg("--no-probes");
    let mut daemon = begin(&mut command);
    until("the daemon listens", || {
        assert!(daemon.is_running());
        socket.exists().then_some(())
    });
    let mut command = world.postern(["run", "--volume", "/sealed/data=v", "--key-file", "v.key"]);
    command.arg("--socket").arg(&socket).args(["--stats", "saved.json", "--"]);
    command.args(["fio", "--name=x", "--filename=/sealed/data", "--ioengine=libaio"]);
    command.args(["--direct=1", "--rw=write", "--bs=64k", "--size=16m", "--verify=crc32c"]);
    end(&mut command).expect(0);
    assert!(daemon.is_running(), "it is not ours to stop");
    let stats = [OsStr::new("stats"), "--socket".as_ref(), socket.as_os_str()];
    let table = end(&mut world.postern(stats)).expect(0).stdout;
    assert!(table.contains("device") && table.contains("write"), "{table}");
    let json = end(world.postern(stats).arg("--json")).expect(0).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let saved = std::fs::read_to_string(world.path("saved.json")).unwrap();
    let saved: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(json["source"], saved["source"]);
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
}

#[test]
fn a_daemon_that_dies_gives_errors_and_not_wrong_data() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "16M");
    let fio = [
        "fio",
        "--name=x",
        "--filename=/sealed/data",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--bs=4k",
        "--size=16m",
        "--time_based",
        "--runtime=600",
    ];
    let options = ["--no-probes", "--daemon-wait", "0"];
    let mut running = begin(&mut world.run_with(&volume, &options, fio));
    let daemon = daemon_at_work(&mut running, &volume);
    signal("KILL", daemon);
    let ended = running.wait();
    assert_ne!(ended.code(), 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("postern: the daemon died"), "{}", ended.stderr);
    end(&mut world.postern(["verify", "v"])).expect(0);
}
