//! The same C program, natively on ext4 and under `postern run` on a protected path: it must print
//! the same lines. The expected values are the kernel's.

mod common;

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
fn mappings_and_sendfile_on_a_protected_path_behave_as_on_ext4() {
    compare("moving");
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
