//! `--no-host-writes`: nothing goes around the port onto the host's file systems; with
//! `--no-host-files` nothing comes from there either. Natively, or without the option, the same
//! programs change and read the host: these are no tests that cannot fail.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::common::{World, end, fio_words, skip};

/// errno(3): how Landlock and the filter refuse. One directory's end is not another's business:
/// a rename that would replace is refused as crossing (EXDEV) at times.
const REFUSALS: [&str; 3] = ["1", "13", "18"];
/// As many as the program knows.
const WAYS: usize = 46;

/// As many as the program that reads knows.
const WAYS_TO_READ: usize = 12;

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

/// A program as it is usually linked, and statically; the second is missing without a static libc.
fn programs(world: &World, name: &str) -> Option<Vec<PathBuf>> {
    let dynamic = world.guest(name)?;
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/guests");
    let source = guests.join(format!("{name}.c"));
    let fixed = world.path(&format!("{name}-static"));
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

/// A volume of this size, where the kernel can do what `--no-host-writes` asks for; where it can not,
/// that is refused, and then there is nothing to test.
fn sealable(size: &str) -> Option<(World, PathBuf)> {
    let world = World::new()?;
    let volume = world.format("v", size);
    let ended = end(&mut world.run_with(&volume, &["--no-probes", "--no-host-writes"], ["true"]));
    if ended.stderr.contains("can not be enforced") {
        assert_eq!(ended.code(), 70);
        skip(ended.stderr.trim());
        return None;
    }
    ended.expect(0);
    Some((world, volume))
}

#[test]
fn a_sealed_off_program_changes_nothing_on_the_host_by_libc_instruction_or_static_child() {
    let Some((world, volume)) = sealable("1M") else { return };
    let Some(programs) = programs(&world, "escape") else { return };
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
    let Some((world, volume)) = sealable("4M") else { return };
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
    let mut fio = fio_words("/sealed/data");
    let load = ["--bs=4k", "--rw=randwrite", "--iodepth=8", "--size=4m", "--verify=crc32c"];
    fio.extend(load.map(str::to_owned));
    let sealed = ["--no-probes", "--no-host-writes"];
    end(&mut world.run_with(&volume, &sealed, fio)).expect(0);
}

#[test]
fn a_program_without_host_files_reads_lists_and_runs_none_by_libc_instruction_or_static_child() {
    let Some((world, volume)) = sealable("4M") else { return };
    let Some(programs) = programs(&world, "peek") else { return };
    let host = stage(&world);
    std::fs::copy(&programs[0], host.join("program")).unwrap();
    let (shell, place) = (Path::new("/bin/sh").canonicalize().unwrap(), host.to_str().unwrap());
    for program in &programs {
        let child = program.to_str().unwrap();
        let peek = |options: &[&str]| {
            let sealed = ["--no-probes", "--no-host-files", "--let-read", child];
            let options: Vec<&str> = sealed.iter().chain(options).copied().collect();
            let script = format!("{child} {place}; exit 0");
            let words = [shell.to_str().unwrap(), "-c", &script];
            end(&mut world.run_with(&volume, &options, words)).expect(0).stdout
        };
        let refused = peek(&[]);
        assert_eq!(refused.lines().count(), WAYS_TO_READ, "{refused}");
        for way in refused.lines() {
            assert!(way.ends_with(" 13"), "{child}: {way}");
        }
        // The control: with the place allowed the same ways lead there.
        let read = peek(&["--let-read", place]);
        assert!(read.lines().filter(|way| way.ends_with(" 0 c")).count() >= 8, "{read}");
    }
}

#[test]
fn a_program_without_host_files_works_on_its_volume() {
    let Some((world, volume)) = sealable("4M") else { return };
    let sealed = ["--no-probes", "--no-host-files"];
    let script = "echo sealed >/sealed/data && read word </sealed/data && echo $word";
    let ended = end(&mut world.run_with(&volume, &sealed, ["sh", "-c", script])).expect(0);
    assert_eq!(ended.stdout, "sealed\n");
    let mut fio = fio_words("/sealed/data");
    let load = ["--bs=4k", "--rw=randwrite", "--iodepth=8", "--size=4m", "--verify=crc32c"];
    fio.extend(load.map(str::to_owned));
    // fio looks where its own helpers and the machine's facts are.
    let sealed = ["--no-probes", "--no-host-files", "--let-read", "/sys"];
    end(&mut world.run_with(&volume, &sealed, fio)).expect(0);
}

#[test]
fn a_place_to_write_that_is_not_there_or_not_asked_for_is_refused() {
    let Some((world, volume)) = sealable("1M") else { return };
    let options = ["--no-probes", "--no-host-writes", "--allow-write", "no-such-place"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(64, "--allow-write");
    let alone = ["--no-probes", "--allow-write", "."];
    end(&mut world.run_with(&volume, &alone, ["true"])).expect_line(64, "--no-host-writes");
    let alone = ["--no-probes", "--let-read", "."];
    end(&mut world.run_with(&volume, &alone, ["true"])).expect_line(64, "--no-host-files");
}
