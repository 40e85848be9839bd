//! `postern probes`: switched off and on under a running program, they lose nothing of what they saw.

use serde_json::Value;

use crate::blame::Scene;

/// A program beyond this would be near the verifier's limit of a million for a kernel that counts a
/// little differently.
const ROOM: u64 = 100_000;

/// Requests that were seen and accepted; panics if one was lost or mistaken for another.
#[track_caller]
fn seen(report: &Value) -> u64 {
    let of = |name: &str| report["counters"][format!("probe_{name}")].as_u64().unwrap();
    for name in ["reap_unmatched", "overwritten", "batch_lost", "negative_crossing_in"] {
        assert_eq!(of(name), 0, "{name}: {report}");
    }
    of("requests_seen") - of("not_accepted")
}

#[test]
fn probes_that_are_switched_lose_nothing_of_what_they_saw() {
    let Some(mut scene) = Scene::new() else { return };
    scene.requests(1);
    let shown = scene.ask(&["probes"]);
    assert_eq!(shown[0]["on"], true, "{shown}");
    for program in &shown.as_array().unwrap()[1..] {
        // 0: a kernel that does not tell (before 5.16).
        assert!(program["verified_instructions"].as_u64().unwrap() < ROOM, "{program}");
    }

    let off = scene.ask(&["probes", "off"]);
    // All that was seen is recorded.
    assert_eq!((&off[0]["on"], &off[0]["under_way"]), (&false.into(), &0.into()), "{off}");
    let before = seen(&scene.report());
    assert!(before >= 32);
    scene.requests(2);
    let report = scene.report();
    assert_eq!(seen(&report), before, "what comes while they are off is not looked at");
    assert_eq!(report["source"], "daemon");
    assert!(report["source_note"].as_str().unwrap().contains("switched off"), "{report}");

    assert_eq!(scene.ask(&["probes", "on"])[0]["on"], true);
    scene.requests(1);
    let idle = scene.ask(&["probes", "off"]);
    assert_eq!(idle[0]["under_way"], 0, "{idle}");
    assert!(seen(&scene.report()) >= before + 32);
    assert_eq!(scene.ask(&["probes", "on"])[0]["on"], true);
    let report = scene.report();
    assert_eq!(report["source"], "ebpf");
    let rows = report["stages"].as_array().unwrap().iter();
    let recorded: u64 = rows
        .filter(|row| row["stage"] == "host_submit")
        .map(|row| row["count"].as_u64().unwrap())
        .sum();
    // What was recorded before the switch is still there.
    assert!(recorded >= before + 32, "{report}");
    scene.end();
}
