//! What a run may take of its daemon: enough for ordinary programs, and a clear word where not.

use std::ffi::OsStr;

use crate::common::{World, end};

const EIO: i32 = 5;

/// So many processes read a protected file at once; answers how many did, and the first errno.
fn crowd(world: &World, options: &[&str], count: &str) -> Option<(usize, i32, String)> {
    let program = world.guest("crowd")?;
    let volume = world.format("v", "1M");
    let words = [program.as_os_str(), OsStr::new("/sealed/data"), OsStr::new(count)];
    let options: Vec<&str> = options.iter().copied().chain(["--no-probes"]).collect();
    let ended = end(&mut world.run_with(&volume, &options, words)).expect(0);
    let mut numbers = ended.stdout.split_whitespace();
    let mut next = || numbers.next().unwrap().parse::<i32>().unwrap();
    let (worked, errno) = (next(), next());
    Some((usize::try_from(worked).unwrap(), errno, ended.stderr))
}

#[test]
fn a_hundred_processes_of_a_run_are_at_work_on_a_protected_file_at_once() {
    let Some(world) = World::new() else { return };
    let Some((worked, errno, said)) = crowd(&world, &[], "100") else { return };
    assert_eq!((worked, errno), (100, 0), "{said}");
}

#[test]
fn a_process_too_many_is_told_the_limit_and_its_option() {
    let Some(world) = World::new() else { return };
    let Some((worked, errno, said)) = crowd(&world, &["--limit", "lanes=5"], "9") else { return };
    // The parent never opened the file: all lanes are the children's.
    assert_eq!((worked, errno), (5, EIO), "{said}");
    assert!(said.contains("--session-lanes") && said.contains("--limit lanes=N"), "{said}");
    assert!(!said.contains("start the program again"), "{said}");
}

#[test]
fn a_limit_that_is_none_is_refused_before_anything_starts() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "1M");
    for wrong in ["lanes", "lanes=", "lanes=-1", "lanes=0", "speed=3"] {
        end(&mut world.run_with(&volume, &["--limit", wrong], ["true"])).expect_line(64, "--limit");
    }
    // What the daemon does not take is told with its words.
    end(&mut world.run_with(&volume, &["--no-probes", "--limit", "lanes=5000"], ["true"]))
        .expect_line(69, "--session-lanes");
}
