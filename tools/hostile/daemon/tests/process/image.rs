//! The same for a genuine enclave image, in the emulator: its load compares every block.
//!
//! `cargo xtask enclave test` names the directory of the images in `POSTERN_ENCLAVE_IMAGES`; without
//! it the tests here skip, and say so.

use std::path::PathBuf;

use super::{Hostile, World, volume};

/// Exit code of a program in an enclave that says itself that it failed.
const FAILED: i32 = 101;

/// A load inside the image at a daemon of this script; answers how many things were done wrong, and
/// whether the load went through.
fn load(script: &str, seed: u64) -> Option<(u64, bool)> {
    let world = World::new()?;
    let Some(images) = std::env::var_os("POSTERN_ENCLAVE_IMAGES") else {
        eprintln!("SKIPPED: no enclave programs; `cargo xtask enclave test` builds them");
        return None;
    };
    let image = PathBuf::from(images).join("postern-enclave");
    let file = volume(&world, "v", "8M");
    let mut hostile = Hostile::start(&world, script, seed, &[("--file v", &file)]);
    // The key is on its standard input.
    let mut command = world.command("sh");
    command.args(["-c", "exec \"$@\" < key", "sh"]).arg(world.part("postern"));
    command.args(["enclave", "run", "--strict", "--daemon"]).arg(&hostile.socket).arg(image);
    command.args(["--", "work", "v", "--requests", "600", "--blocks", "256", "--depth", "8"]);
    let what = format!("hostile-daemon --script {script} --seed {seed}");
    let ended = hostile.see_out(&what, &mut command);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert!([0, FAILED].contains(&ended.code()), "{what}: {}\n{said}", ended.code());
    assert!(!said.contains("panicked"), "{what}: {said}");
    if let Some(tally) = said.lines().find(|line| line.ends_with(" wrong blocks")) {
        assert!(tally.ends_with(", 0 wrong blocks"), "{what}: {said}");
    }
    Some((hostile.end(), ended.code() == 0))
}

#[test]
fn what_a_daemon_may_do_makes_no_error_in_an_enclave_image() {
    for script in ["honest", "fidgety", "ringing"] {
        let Some((_, went_through)) = load(script, 1) else { return };
        assert!(went_through, "{script}");
    }
}

#[test]
fn no_daemon_shows_an_enclave_image_a_wrong_byte() {
    for script in ["refusing", "lying", "breaching", "flickering", "misinforming"] {
        let mut misdeeds = 0;
        for seed in 1..4 {
            let Some((deeds, _)) = load(script, seed) else { return };
            misdeeds += deeds;
        }
        let counted = !["flickering", "misinforming"].contains(&script);
        assert!(misdeeds > 0 || !counted, "{script}");
    }
}
