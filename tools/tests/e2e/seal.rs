//! `--no-host-writes`: nothing goes around the port onto the host's file systems. Natively, or
//! without the option, the same program changes the host: it is no test that cannot fail.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::common::{World, end, skip};

/// errno(3): how Landlock and the filter refuse. One directory's end is not another's business:
/// a rename that would replace is refused as crossing (EXDEV) at times.
const REFUSALS: [&str; 3] = ["1", "13", "18"];
/// As many as the program knows.
const WAYS: usize = 46;

/// Inode, size, mode, owner, time and content.
type State = (u64, u64, u32, u32, i64, Vec<u8>);

/// What lies in a directory.
fn state(directory: &Path) -> BTreeMap<PathBuf, State> {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let kind = std::fs::symlink_metadata(&path).unwrap();
            let content = std::fs::read(&path).unwrap_or_default();
            (path, (kind.ino(), kind.len(), kind.mode(), kind.uid(), kind.mtime(), content))
        })
        .collect()
}

fn stage(world: &World) -> PathBuf {
    let directory = world.path("host");
    std::fs::create_dir(&directory).unwrap();
    for name in ["there", "other"] {
        std::fs::write(directory.join(name), b"content").unwrap();
    }
    std::fs::create_dir(directory.join("empty")).unwrap();
    directory
}

/// The program as it is usually linked, and statically; the second is missing without a static libc.
fn programs(world: &World) -> Option<Vec<PathBuf>> {
    let dynamic = world.guest("escape")?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/guests/escape.c");
    let fixed = world.path("escape-static");
    let mut compile = world.command("cc");
    compile.args(["-std=gnu11", "-static", "-o"]).arg(&fixed).arg(source);
    let mut programs = vec![dynamic];
    if end(&mut compile).code() == 0 {
        programs.push(fixed);
    } else {
        skip("no static libc: static children not tried");
    }
    Some(programs)
}

/// `--no-host-writes` on a kernel that cannot do it is refused; then there is nothing to test.
fn can_seal(world: &World, volume: &Path) -> bool {
    let ended = end(&mut world.run_with(volume, &["--no-probes", "--no-host-writes"], ["true"]));
    if ended.stderr.contains("can not be enforced") {
        assert_eq!(ended.code(), 70);
        skip(ended.stderr.trim());
        return false;
    }
    ended.expect(0);
    true
}

#[test]
fn a_sealed_off_program_changes_nothing_on_the_host_by_libc_instruction_or_static_child() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    if !can_seal(&world, &volume) {
        return;
    }
    let Some(programs) = programs(&world) else { return };
    let host = stage(&world);
    let before = state(&host);
    for program in &programs {
        // By a shell, so that the static one is a child.
        let script = format!("{} {}", program.display(), host.display());
        let options = ["--no-probes", "--no-host-writes"];
        let ended = end(&mut world.run_with(&volume, &options, ["sh", "-c", &script])).expect(0);
        let ways: Vec<&str> = ended.stdout.lines().collect();
        assert_eq!(ways.len(), WAYS, "{}", ended.stdout);
        for way in ways {
            let errno = way.rsplit(' ').next().unwrap();
            assert!(REFUSALS.contains(&errno), "{}: {way}", program.display());
        }
        assert_eq!(state(&host), before);
    }
    // The control: without the option most of it works.
    let script = format!("{} {}", programs[0].display(), host.display());
    let open = end(&mut world.run(&volume, ["sh", "-c", &script]));
    assert!(open.stdout.lines().filter(|way| way.ends_with(" 0")).count() > 10, "{}", open.stdout);
    assert_ne!(state(&host), before);
}

#[test]
fn a_sealed_off_program_works_on_its_volume_and_writes_where_the_operator_lets_it() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "4M");
    if !can_seal(&world, &volume) {
        return;
    }
    let host = stage(&world);
    let allowed = host.to_str().unwrap();
    let options = ["--no-probes", "--no-host-writes", "--allow-write", allowed];
    let script = format!(
        "echo sealed >/sealed/data && echo plain >{allowed}/new && cat /sealed/data {allowed}/new \
         && ! echo lost 2>/dev/null >{allowed}/../lost"
    );
    let ended = end(&mut world.run_with(&volume, &options, ["sh", "-c", &script])).expect(0);
    assert_eq!(ended.stdout, "sealed\nplain\n");
    assert!(!world.path("lost").exists());
    // A program of weight, with native AIO, forked jobs and threads.
    let fio = [
        "fio",
        "--name=x",
        "--filename=/sealed/data",
        "--ioengine=libaio",
        "--direct=1",
        "--bs=4k",
        "--rw=randwrite",
        "--iodepth=8",
        "--size=4m",
        "--verify=crc32c",
        "--verify_state_save=0",
    ];
    let sealed = ["--no-probes", "--no-host-writes"];
    end(&mut world.run_with(&volume, &sealed, fio)).expect(0);
}

#[test]
fn a_place_to_write_that_is_not_there_or_not_asked_for_is_refused() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    if !can_seal(&world, &volume) {
        return;
    }
    let options = ["--no-probes", "--no-host-writes", "--allow-write", "no-such-place"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(64, "--allow-write");
    let alone = ["--no-probes", "--allow-write", "."];
    end(&mut world.run_with(&volume, &alone, ["true"])).expect_line(64, "--no-host-writes");
}
