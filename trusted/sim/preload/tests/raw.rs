//! Calls that no symbol sees: the C library's inside itself, a program's own instructions, a
//! signal handler's in the middle of another call. C and C++ programs run natively on ext4 and
//! under `postern run`, and must print the same lines; where the answer is Postern's own (a call it
//! refuses) the test names the errno.

mod common;

use std::ffi::OsStr;

use common::{Ground, skip};

#[test]
fn streams_and_temporary_files_behave_on_a_protected_path_as_on_ext4() {
    let Some(ground) = Ground::find("streams") else { return };
    let Some(program) = ground.compile("cc", "streams.c", &[]) else { return };
    ground.compare(&program, &[ground.ordinary().as_os_str()]);
}

#[test]
fn cpp_streams_and_cancelled_threads_behave_on_a_protected_path_as_on_ext4() {
    let Some(ground) = Ground::find("cpp") else { return };
    let Some(program) = ground.compile("c++", "streams.cc", &["-pthread"]) else { return };
    ground.compare(&program, &[ground.ordinary().as_os_str()]);
}

#[test]
fn children_and_masks_that_a_trapping_filter_kills_work_under_ours() {
    let Some(ground) = Ground::find("started") else { return };
    let Some(program) = ground.compile("cc", "started.c", &["-pthread"]) else { return };
    ground.compare(&program, &[ground.ordinary().as_os_str()]);
}

#[test]
fn after_ten_thousand_handlers_that_call_in_or_jump_out_everything_still_works() {
    let Some(ground) = Ground::find("handlers") else { return };
    let Some(program) = ground.compile("cc", "handlers.c", &["-laio"]) else { return };
    ground.compare(&program, &[OsStr::new("10000")]);
}

#[test]
fn calls_by_instructions_of_the_programs_own_are_refused_and_leave_no_plain_file() {
    let Some(ground) = Ground::find("instructions") else { return };
    let Some(program) = ground.compile("cc", "instructions.c", &[]) else { return };
    let ordinary = ground.path("plain");
    let ended = ground.protected(&program, [ground.guest(), ordinary]);
    let said = ended.stderr.clone();
    if said.contains("raw system calls are not covered") {
        skip(&format!("this host gives no seccomp listener: {said}"));
        return;
    }
    let [access, bad] = [libc::EACCES, libc::EBADF].map(|errno| -errno);
    let none = -libc::ENOSYS;
    let expected = format!(
        "openat: {access}\ncreat: {access}\nrename onto it: {access}\nmkdir: {access}\n\
         io_uring_setup: {none}\nan ordinary file: 1 5 0\nopen: 1\nwrite, read: {bad} {bad}\n\
         fsync, fdatasync, fchmod: {bad} {bad} {bad}\ndone\n"
    );
    assert_eq!(ended.expect_success(), expected);
    let vault = ground.guest().display().to_string();
    assert!(
        said.lines().any(|line| line.starts_with("postern: ") && line.contains(&vault)),
        "{said}"
    );
}

#[test]
fn a_static_program_is_refused_the_protected_path_and_leaves_no_plain_file() {
    let Some(ground) = Ground::find("static") else { return };
    let Some(program) = ground.compile("cc", "instructions.c", &["-static"]) else { return };
    let line = format!(
        "{} {} {}",
        program.display(),
        ground.guest().display(),
        ground.path("plain").display()
    );
    let ended = ground.protected("sh", ["-c", &line]);
    if ended.stderr.contains("raw system calls are not covered") {
        skip(&format!("this host gives no seccomp listener: {}", ended.stderr));
        return;
    }
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("open: 0\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("an ordinary file: 1 5 0\n"), "{}", ended.stdout);
    assert!(ended.stderr.contains("refused (EACCES)"), "{}", ended.stderr);
}

#[test]
fn a_shells_redirections_append_one_after_the_other() {
    let Some(ground) = Ground::find("shell") else { return };
    let vault = ground.guest().display().to_string();
    let script = format!(
        "echo one > {vault}; echo two >> {vault}; (echo three >> {vault}); \
         for n in 1 2 3 4; do (i=0; while [ $i -lt 25 ]; do echo $n >> {vault}; i=$((i+1)); done) & \
         done; wait; while read -r line; do echo $line; done < {vault}"
    );
    let said = ground.protected("sh", ["-c", &script]).expect_success();
    let mut lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.drain(..3).collect::<Vec<_>>(), ["one", "two", "three"]);
    lines.sort_unstable();
    let expected: Vec<&str> = ["1", "2", "3", "4"].into_iter().flat_map(|n| [n; 25]).collect();
    assert_eq!(lines, expected);
}
