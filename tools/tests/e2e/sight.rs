//! Who touches the host file, seen by strace: the daemon, directly; the program, never.

use std::{collections::BTreeMap, path::Path};

use crate::common::{World, end, on_path, skip};

/// The system calls of each task, by task number.
type Trace = BTreeMap<u32, Vec<String>>;

fn read_trace(directory: &Path) -> Trace {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let task = path.extension().unwrap().to_str().unwrap().parse().unwrap();
            let lines = std::fs::read(&path).unwrap();
            (task, String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect())
        })
        .collect()
}

/// The program each task runs at its end: its own exec's, else that of the task that made it.
fn programs(trace: &Trace) -> BTreeMap<u32, String> {
    let mut parents = BTreeMap::new();
    let mut own = BTreeMap::new();
    for (&task, lines) in trace {
        for line in lines {
            let call = line.split('(').next().unwrap();
            if call == "execve" && line.ends_with("= 0") {
                let path = line.split('"').nth(1).unwrap();
                own.insert(task, path.rsplit('/').next().unwrap().to_owned());
            } else if ["clone", "clone3", "vfork", "fork"].contains(&call) {
                let answer = line.rsplit("= ").next().unwrap().split_whitespace().next().unwrap();
                if let Ok(child) = answer.parse::<u32>() {
                    parents.insert(child, task);
                }
            }
        }
    }
    trace
        .keys()
        .filter_map(|&task| {
            let mut at = task;
            while !own.contains_key(&at) {
                at = *parents.get(&at)?;
            }
            Some((task, own[&at].clone()))
        })
        .collect()
}

#[test]
fn only_the_daemon_touches_the_host_file_and_by_direct_native_aio() {
    let Some(world) = World::new() else { return };
    if !on_path("strace") {
        return skip("strace is not installed");
    }
    let volume = world.format("v", "16M");
    let traces = world.path("traces");
    std::fs::create_dir(&traces).unwrap();
    let fio = [
        "fio",
        "--name=x",
        "--filename=/sealed/data",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=8",
        "--size=4m",
        "--verify=crc32c",
    ];
    let run = world.run(&volume, fio);
    let mut command = std::process::Command::new("strace");
    command.args(["-ff", "-y", "-qq", "-s", "256"]);
    command.args([
        "-e",
        "trace=execve,clone,clone3,fork,vfork,openat,openat2,open,io_submit,io_setup",
    ]);
    command.arg("-o").arg(traces.join("t")).arg("--").arg(run.get_program()).args(run.get_args());
    let ended = end(command.current_dir(world.directory()));
    if ended.stderr.contains("Operation not permitted") {
        return skip("ptrace is not permitted");
    }
    ended.expect(0);

    let trace = read_trace(&traces);
    let programs = programs(&trace);
    let host_file = volume.canonicalize().unwrap();
    let host_file = host_file.to_str().unwrap();
    let of = |program: &str| -> Vec<&String> {
        let tasks = programs.iter().filter(|(_, name)| *name == program).map(|(task, _)| task);
        tasks.flat_map(|task| &trace[task]).collect()
    };
    let (daemon, guest) = (of("posternd"), of("fio"));
    assert!(!daemon.is_empty() && !guest.is_empty(), "{programs:?}");

    // With -y the answer carries the path: `open(.., O_RDWR|O_DIRECT) = 9</path/v>`.
    let opened = format!("<{host_file}>");
    assert!(
        daemon.iter().any(|line| line.starts_with("open")
            && line.contains("O_DIRECT")
            && line.ends_with(&opened)),
        "the daemon opens the host file O_DIRECT: {daemon:#?}"
    );
    let submits: Vec<_> = daemon.iter().filter(|line| line.starts_with("io_submit")).collect();
    assert!(!submits.is_empty(), "the daemon uses native AIO");
    assert!(
        submits.iter().all(|line| !line.contains("aio_fildes") || line.contains(host_file)),
        "on the host file"
    );
    for line in guest {
        let touches = [format!("\"{host_file}\""), opened.clone()];
        assert!(
            !touches.iter().any(|named| line.contains(named)),
            "the program touches the host file: {line}"
        );
        assert!(!line.starts_with("io_s"), "the program uses the kernel's AIO itself: {line}");
    }
}
