//! What only the enclave knows, told by the daemon as the enclave's claim.

use std::os::unix::fs::FileExt as _;

use serde_json::Value;

use crate::{
    common::{World, end, fio_words, signal},
    succession::daemon,
};

/// fio's words for a load.
fn fio(load: &[&str]) -> Vec<String> {
    fio_words("/sealed/data").into_iter().chain(load.iter().map(|w| (*w).to_owned())).collect()
}

#[test]
fn journal_checkpoints_space_and_damage_are_told_as_the_enclave_claims_them() {
    let Some(world) = World::new() else { return };
    let volume = world.format("v", "16M");
    let socket = world.path("own.sock");
    let daemon = daemon(&world, &socket, &[]);
    let options = ["--key-file", "v.key", "--socket", socket.to_str().unwrap()];
    let run = |load: &[&str]| end(&mut world.run_with("v".as_ref(), &options, fio(load)));
    let claimed = || {
        let mut top = world.postern(["top", "--once", "--json", "--socket"]);
        let said = end(top.arg(&socket)).expect(0).stdout;
        let said: Value = serde_json::from_str(&said).unwrap();
        said["since_start"]["volumes"][0]["claimed"].clone()
    };
    let number = |claims: &Value, name: &str| claims[name].as_u64().unwrap();

    run(&["--rw=write", "--bs=64k", "--size=8m", "--fsync=16"]).expect(0);
    let claims = claimed();
    // Closed cleanly: all was written down, and what is closed has no space.
    assert!(number(&claims, "checkpoints") >= 1, "{claims}");
    assert!(number(&claims, "journal_blocks") >= 1, "{claims}");
    assert!(number(&claims, "data_blocks") >= 2048, "{claims}");
    assert_eq!(number(&claims, "integrity_failures"), 0, "{claims}");
    assert_eq!(
        (number(&claims, "used_blocks"), number(&claims, "free_blocks")),
        (0, 0),
        "{claims}"
    );

    // A byte of each block in the middle of what was written: most of them hold data.
    let host = std::fs::OpenOptions::new().read(true).write(true).open(&volume).unwrap();
    let mut block = [0; 4096];
    let mut written = Vec::new();
    for at in (0..host.metadata().unwrap().len()).step_by(block.len()) {
        host.read_exact_at(&mut block, at).unwrap();
        if block.iter().any(|byte| *byte != 0) {
            written.push((at + 77, block[77]));
        }
    }
    for (at, byte) in &written[written.len() / 4..written.len() / 4 * 3] {
        host.write_all_at(&[byte ^ 1], *at).unwrap();
    }
    let ended = run(&["--rw=read", "--bs=4k", "--size=8m"]);
    assert_ne!(ended.code(), 0, "{ended:?}");
    let after = claimed();
    assert!(number(&after, "integrity_failures") >= 1, "{after}");
    // Both runs together.
    assert!(number(&after, "data_blocks") >= number(&claims, "data_blocks"), "{after}");
    let mut top = world.postern(["top", "--once", "--socket"]);
    assert!(end(top.arg(&socket)).expect(0).stdout.contains("claimed by enclaves"));
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
}
