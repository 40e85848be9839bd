//! The same C program, natively on ext4 and under `postern run` on a protected path: it must print
//! the same lines. The expected values are the kernel's.

mod common;

use std::ffi::OsStr;

use common::Ground;

/// Natively and inside, on one file.
fn compare(name: &str) {
    let Some(ground) = Ground::find(name) else { return };
    let Some(program) = ground.compile("cc", &format!("{name}.c"), &["-laio"]) else { return };
    ground.compare(&program, &[]);
}

#[test]
fn file_calls_answer_on_a_protected_path_what_they_answer_on_ext4() {
    compare("files");
}

#[test]
fn transfers_whose_memory_ends_early_move_on_a_protected_path_what_they_move_on_ext4() {
    compare("faulting");
}

#[test]
fn children_threads_and_moved_rings_behave_on_a_protected_path_as_on_ext4() {
    compare("processes");
}

#[test]
fn names_attributes_and_listings_of_a_protected_directory_are_what_ext4_has() {
    let Some(ground) = Ground::find("directory") else { return };
    let Some(program) = ground.compile("cc", "directory.c", &[]) else { return };
    ground.compare_in_directory(&program);
}

#[test]
fn paths_out_of_a_protected_directory_and_openat2_lead_where_they_lead_on_ext4() {
    let Some(ground) = Ground::find("leaving") else { return };
    let Some(program) = ground.compile("cc", "leaving.c", &[]) else { return };
    ground.compare_in_directory(&program);
}

#[test]
fn what_a_process_passes_on_by_calls_of_its_own_is_what_it_passes_on_on_ext4() {
    compare("passing");
}

#[test]
fn the_times_of_a_file_outlive_the_run_and_a_crash_as_on_ext4() {
    let Some(ground) = Ground::find("times") else { return };
    let Some(program) = ground.compile("cc", "times.c", &[]) else { return };
    for step in ["set", "show", "write", "show", "kill", "show"] {
        let [there, here] = ground.run_both(&program, &[OsStr::new(step)]);
        assert_eq!(there.stdout, here.stdout, "{step} (left: ext4, right: protected)");
        assert_eq!(there.stdout.ends_with("done\n"), step != "kill", "{}", there.stdout);
    }
}

#[test]
fn mappings_and_sendfile_on_a_protected_path_behave_as_on_ext4() {
    compare("moving");
}

#[test]
fn shared_mappings_of_a_protected_path_show_and_take_what_they_do_on_ext4() {
    compare("mapped");
}

#[test]
fn locks_on_a_protected_path_behave_as_on_ext4() {
    compare("locking");
}

#[test]
fn descriptors_of_a_protected_file_pass_through_exec_as_on_ext4() {
    compare("inheriting");
}

#[test]
fn posix_aio_on_a_protected_path_behaves_as_on_ext4() {
    compare("posixaio");
}
