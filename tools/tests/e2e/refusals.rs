//! What cannot be done is said in one line, with an exit code of its own, and leaves nothing
//! behind.

use std::{ffi::OsStr, os::unix::fs::PermissionsExt, path::Path};

use crate::common::{World, end, is_root, on_path, skip};

const USAGE: i32 = 64;
const NO_VOLUME: i32 = 66;
const KEY: i32 = 67;
const NO_DIRECT: i32 = 68;
const NO_DAEMON: i32 = 69;
const INTERNAL: i32 = 70;
const IN_USE: i32 = 73;
const PERMISSION: i32 = 77;
const CANNOT_EXECUTE: i32 = 126;
const NOT_FOUND: i32 = 127;

#[test]
fn a_malformed_volume_is_refused() {
    let Some(world) = World::new() else { return };
    world.format("v", "1M");
    for volume in ["", "v", "/x", "x=v", "/x=", "/=v", "/x/../y=v"] {
        end(&mut world.postern(["run", "--volume", volume, "--", "true"]))
            .expect_line(USAGE, "--volume");
    }
    end(&mut world.postern(["run", "--volume", "/x/=v", "--", "true"]))
        .expect_line(USAGE, "not a directory");
    let twice = ["run", "--volume", "/a=v", "--volume", "/a=w", "--", "true"];
    end(&mut world.postern(twice)).expect_line(USAGE, "/a");
    end(&mut world.postern(["run", "--", "true"])).expect_line(USAGE, "--volume");
    end(&mut world.postern(["run", "--volume", "/a=v"])).expect_line(USAGE, "PROGRAM");
}

#[test]
fn a_missing_program_is_127_and_one_that_cannot_run_inside_is_126() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    end(&mut world.run(&volume, ["no-such-program"])).expect_line(NOT_FOUND, "no-such-program");
    end(&mut world.run(&volume, ["/no/such/program"])).expect_line(NOT_FOUND, "/no/such/program");
    end(&mut world.run(&volume, ["/"])).expect_line(CANNOT_EXECUTE, "not executable");
    let script = world.path("script");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    end(&mut world.run(&volume, [&script])).expect_line(CANNOT_EXECUTE, "not executable");
    let Some(guest) = static_program(&world) else { return };
    end(&mut world.run(&volume, [&guest])).expect_line(CANNOT_EXECUTE, "statically linked");
}

fn static_program(world: &World) -> Option<std::path::PathBuf> {
    let (source, program) = (world.path("s.c"), world.path("s"));
    std::fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let mut compile = std::process::Command::new("cc");
    compile.args(["-static", "-o"]).args([&program, &source]);
    if !on_path("cc") || end(&mut compile).code() != 0 {
        skip("no C compiler, or no static libc: static programs not tried");
        return None;
    }
    Some(program)
}

#[test]
fn a_program_that_is_missing_leaves_nothing_behind() {
    let Some(world) = World::new() else { return };
    let runtime = world.path("runtime");
    std::fs::create_dir(&runtime).unwrap();
    let volume = world.path("new");
    let options = ["--create", "1M", "--no-probes"];
    let mut command = world.run_with(&volume, &options, ["no-such-program"]);
    end(command.env("XDG_RUNTIME_DIR", &runtime)).expect_line(NOT_FOUND, "no-such-program");
    assert!(!volume.exists(), "the program is looked for before a volume is made");
    assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 0);
}

#[test]
fn a_missing_volume_is_refused_with_a_hint_and_made_only_when_asked() {
    let Some(world) = World::new() else { return };
    let volume = world.path("none");
    end(&mut world.run(&volume, ["true"])).expect_line(NO_VOLUME, "--create");
    end(&mut world.postern(["info", "none"])).expect_line(NO_VOLUME, "none");
    end(&mut world.postern(["verify", "none"])).expect_line(NO_VOLUME, "none");
    assert!(!volume.exists());
    let options = ["--create", "1M", "--no-probes"];
    let made = end(&mut world.run_with(&volume, &options, ["true"])).expect(0);
    assert!(made.stderr.contains("development key"), "{}", made.stderr);
    let key = world.path("none.key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&key).unwrap();
    let again = end(&mut world.run_with(&volume, &options, ["true"])).expect(0);
    assert!(again.stderr.contains("development key"), "{}", again.stderr);
    assert_eq!(std::fs::read(&key).unwrap(), before, "an existing key is kept");
}

#[test]
fn a_key_of_the_wrong_length_is_refused() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let key = world.path("key");
    for length in [0, 31, 33, 63, 66, 4096] {
        std::fs::write(&key, vec![b'a'; length]).unwrap();
        let options = ["--no-probes", "--key-file", "key"];
        end(&mut world.run_with(&volume, &options, ["true"])).expect_line(KEY, "32 bytes");
        end(&mut world.postern(["info", "v", "--key-file", "key"])).expect_line(KEY, "32 bytes");
    }
    let options = ["--no-probes", "--key-file", "no-such-key"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(KEY, "no-such-key");
}

#[test]
fn a_wrong_key_is_told_before_the_program_starts() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    std::fs::write(world.path("key"), [7; 32]).unwrap();
    let options = ["--no-probes", "--key-file", "key"];
    let touched = world.path("touched");
    let program = [OsStr::new("touch"), touched.as_os_str()];
    end(&mut world.run_with(&volume, &options, program)).expect_line(KEY, "key");
    assert!(!touched.exists(), "the program ran");
    end(&mut world.postern(["verify", "v", "--key-file", "key"])).expect_line(KEY, "key");
    std::fs::remove_file(world.path("v.key")).unwrap();
    end(&mut world.run(&volume, ["true"])).expect_line(KEY, "--key-file");
}

#[test]
fn the_hexadecimal_form_of_a_key_opens_what_the_raw_form_made() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let raw = std::fs::read(world.path("v.key")).unwrap();
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(world.path("hex"), hex + "\n").unwrap();
    let options = ["--no-probes", "--key-file", "hex"];
    let fio = ["fio", "--name=x", "--filename=/sealed/data", "--size=1m", "--rw=write"];
    end(&mut world.run_with(&volume, &options, fio)).expect(0);
}

#[test]
fn nothing_is_formatted_over_a_file_with_content() {
    let Some(world) = World::new() else { return };
    std::fs::write(world.path("precious"), b"data").unwrap();
    end(&mut world.postern(["format", "precious", "--size", "1M"])).expect_line(USAGE, "precious");
    assert_eq!(std::fs::read(world.path("precious")).unwrap(), b"data");
    for size in ["0", "1000", "1X", "16Q"] {
        end(&mut world.postern(["format", "x", "--size", size])).expect_line(USAGE, "size");
        assert!(!world.path("x").exists());
    }
    std::fs::write(world.path("empty"), b"").unwrap();
    end(&mut world.postern(["format", "empty", "--size", "1M"])).expect(0);
}

#[test]
fn a_file_system_without_direct_io_is_refused_unless_allowed() {
    let Some(world) = World::new() else { return };
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        return skip("no tmpfs at /dev/shm");
    };
    let volume = memory.path().join("v");
    let name = volume.to_str().unwrap();
    end(&mut world.postern(["format", name, "--size", "1M", "--key-file", "k"]))
        .expect_line(KEY, "no such key file");
    let key = world.path("k");
    std::fs::write(&key, [1; 32]).unwrap();
    end(&mut world.postern(["format", name, "--size", "1M", "--key-file", "k"]))
        .expect_line(NO_DIRECT, "--allow-buffered");
    assert!(!volume.exists(), "a volume that could not be made is removed again");
    let format = ["format", name, "--size", "1M", "--key-file", "k", "--allow-buffered"];
    end(&mut world.postern(format)).expect(0);
    let refused = ["--no-probes", "--key-file", "k"];
    end(&mut world.run_with(&volume, &refused, ["true"])).expect_line(NO_DIRECT, name);
    let allowed = ["--no-probes", "--key-file", "k", "--allow-buffered"];
    let fio = ["fio", "--name=x", "--filename=/sealed/data", "--size=1m", "--rw=write"];
    let fio = fio.into_iter().chain(["--verify=crc32c", "--ioengine=libaio"]);
    end(&mut world.run_with(&volume, &allowed, fio)).expect(0);
}

#[test]
fn a_daemon_that_is_not_there_is_69() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let options = ["--socket", "no.sock", "--key-file", "v.key"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(NO_DAEMON, "no.sock");
    end(&mut world.postern(["stats", "--socket", "no.sock"])).expect_line(NO_DAEMON, "no.sock");
}

#[test]
fn a_daemon_that_does_not_start_is_told_with_its_own_words() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let broken = world.path("broken");
    std::fs::write(&broken, "#!/bin/sh\necho 'the reason' >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&broken, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = world.run(&volume, ["true"]);
    end(command.env("POSTERN_DAEMON", &broken)).expect_line(NO_DAEMON, "the reason");
    let mut command = world.run(&volume, ["true"]);
    end(command.env("POSTERN_DAEMON", "/no/daemon")).expect_line(INTERNAL, "POSTERN_DAEMON");
}

#[test]
fn a_volume_in_use_is_73() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    let holder = std::fs::File::open(&volume).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let options = ["--no-probes", "--wait", "0"];
    end(&mut world.run_with(&volume, &options, ["true"])).expect_line(IN_USE, "in use");
    end(&mut world.postern(["info", "v", "--wait", "0"])).expect_line(IN_USE, "in use");
    drop(holder);
    end(&mut world.postern(["info", "v"])).expect(0);
}

#[test]
fn a_volume_that_may_not_be_written_is_77() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    std::fs::set_permissions(&volume, PermissionsExt::from_mode(0o400)).unwrap();
    let run = world.run(&volume, ["true"]);
    // Root, too, may not write it once this capability is gone.
    let mut without = world.command("setpriv");
    if is_root() {
        without.arg("--bounding-set=-dac_override");
    }
    end(without.arg(run.get_program()).args(run.get_args())).expect_line(PERMISSION, "v");
}

#[test]
fn help_and_operations_name_every_exit_code() {
    let Some(world) = World::new() else { return };
    let help = end(&mut world.postern(["--help"])).expect(0).stdout;
    let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OPERATIONS.md");
    let book = std::fs::read_to_string(book).unwrap();
    for code in [0, 64, 65, 66, 67, 68, 69, 70, 72, 73, 74, 77, 126, 127] {
        assert!(help.contains(&format!("{code}  ")), "{code} in --help:\n{help}");
        assert!(book.contains(&format!("| {code} |")), "{code} in docs/OPERATIONS.md");
    }
}
