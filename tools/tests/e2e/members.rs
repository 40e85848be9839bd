//! Members of a forked program that are killed: in guest code, asleep, with locks, with requests in
//! flight. The others go on, as natively.

use std::{fs, process::Command};

use crate::common::{World, end};

#[test]
fn a_member_killed_outside_of_the_library_leaves_the_others_unharmed_and_its_aio_done() {
    let Some(world) = World::new() else { return };
    let Some(program) = world.guest("members") else { return };
    let plain = world.path("plain");
    fs::write(&plain, vec![0; 1 << 20]).unwrap();
    let native = end(Command::new(&program).arg(&plain)).expect(0);
    let volume = world.format("volume", "1M");
    let inside = end(&mut world.run(&volume, [program.as_os_str(), "/sealed/data".as_ref()]));
    let inside = inside.expect(0);
    assert_eq!(inside.stdout, native.stdout, "stderr: {}", inside.stderr);
    assert_eq!(inside.stdout.lines().count(), 10);
    // Nothing was left open: the volume was closed cleanly, so the next run recovers nothing.
    let again = end(&mut world.run(&volume, ["cat", "/sealed/data"])).expect(0);
    assert!(!again.stderr.contains("recovered"), "{}", again.stderr);
}
