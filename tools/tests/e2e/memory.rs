//! What the enclave costs in memory: less than 64 MiB beside the program for a volume of 1 GiB.

use std::collections::BTreeMap;

use crate::common::{Running, World, begin, children, name_of, until};

const LIMIT_KIB: u64 = 64 << 10;

/// Proportional set size, in KiB, of all fio processes below `root`: what they share counts once.
fn fio_kib(root: u32) -> u64 {
    let mut waiting = vec![root];
    let mut total = 0;
    while let Some(pid) = waiting.pop() {
        waiting.extend(children(pid));
        if name_of(pid) != "fio" {
            continue;
        }
        let rollup =
            std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let fields: BTreeMap<&str, u64> = rollup
            .lines()
            .filter_map(|line| {
                let (name, rest) = line.split_once(':')?;
                Some((name, rest.split_whitespace().next()?.parse().ok()?))
            })
            .collect();
        total += fields.get("Pss").copied().unwrap_or(0);
    }
    total
}

/// The most that was seen until the run ended.
fn peak(mut running: Running) -> u64 {
    let mut most = 0;
    until("fio ends", || {
        most = most.max(fio_kib(running.pid()));
        (!running.is_running()).then_some(())
    });
    running.wait().expect(0);
    most
}

#[test]
fn the_enclave_takes_less_than_64_mib_for_a_volume_of_1_gib() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1G");
    let load = |file: &str| {
        [
            "fio",
            "--name=m",
            &format!("--filename={file}"),
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=128",
            "--size=1g",
            "--io_size=512m",
            "--eta=never",
            "--norandommap",
        ]
        .map(str::to_owned)
    };
    let plain = world.path("plain");
    let words = load(&plain.display().to_string());
    let mut command = std::process::Command::new(&words[0]);
    let own = peak(begin(command.args(&words[1..]).current_dir(world.directory())));
    let both = peak(begin(&mut world.run(&volume, load("/sealed/data"))));
    let enclave = both.saturating_sub(own);
    eprintln!("memory: fio alone {own} KiB, with the enclave {both} KiB: enclave {enclave} KiB");
    assert!(own > 0 && both > own, "nothing was seen");
    assert!(enclave < LIMIT_KIB, "the enclave takes {enclave} KiB");
}
