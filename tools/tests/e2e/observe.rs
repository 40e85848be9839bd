//! Looking at a running daemon: `postern top` and `postern trace`.

use std::path::Path;

use serde_json::Value;

use crate::{
    common::{World, end, signal, until},
    succession::{daemon, served},
};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Requests by operation and result, added up.
fn ended(volume: &Value) -> u64 {
    let operations = volume["operations"].as_object().unwrap().values();
    let outcomes = operations.flat_map(|operation| operation["outcomes"].as_object().unwrap());
    outcomes.map(|(_, count)| count.as_u64().unwrap()).sum()
}

#[test]
fn top_and_trace_tell_what_the_daemon_counted() {
    let Some(world) = World::new() else { return };
    world.format("v", "16M");
    let Some(program) = world.guest("serve") else { return };
    let socket = world.path("own.sock");
    let daemon = daemon(&world, &socket, &[]);
    let mut server = served(&world, &program, &socket, &[]);
    let ask = |command: &str, options: &[&str]| {
        let mut command = world.postern([command, "--socket"]);
        end(command.arg(&socket).args(options)).expect(0).stdout
    };

    // Whoever wants all requests recorded has to say so again from time to time.
    let mut block = 0;
    let records = until("records of writes and flushes", || {
        ask("trace", &["--one-in", "1", "--duration", "0"]);
        server.expect(&format!("w {block} 7"), "ok");
        server.expect("s", "ok");
        block += 1;
        let options = ["--one-in", "1", "--recent", "--duration", "0", "--json"];
        let records = lines(&ask("trace", &options));
        let has = |operation: &str| records.iter().any(|r| r["operation"] == operation);
        (has("write") && has("flush")).then_some(records)
    });
    for record in &records {
        assert_eq!(record["volume"], "v");
        let result = record["result"].as_i64().unwrap();
        assert!(result >= 0, "{record}");
        let stages = record["stages"].as_object().unwrap();
        let sum: u64 = stages.values().map(|ns| ns.as_u64().unwrap()).sum();
        assert_eq!(record["total_ns"], sum, "{record}");
    }
    let numbers: Vec<_> = records.iter().map(|r| r["number"].as_u64().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    let only = ask("trace", &["--recent", "--duration", "0", "--json", "--operation", "write"]);
    assert!(lines(&only).iter().all(|record| record["operation"] == "write"));
    let none = ask("trace", &["--recent", "--duration", "0", "--json", "--min-latency", "3600s"]);
    assert_eq!(none, "");
    let file = world.path("trace.json");
    ask("trace", &["--recent", "--duration", "0", "--perfetto", file.to_str().unwrap()]);
    let events: Vec<Value> =
        serde_json::from_slice(&std::fs::read(Path::new(&file)).unwrap()).unwrap();
    let slices = |phase: &str| events.iter().filter(|event| event["ph"] == phase).count();
    assert!(slices("b") > 0 && slices("b") == slices("e"));

    // Nothing goes on any more: all that was counted is told by both.
    server.end();
    let top: Value = serde_json::from_str(&ask("top", &["--once", "--json"])).unwrap();
    let report: Value = serde_json::from_str(&ask("stats", &["--json"])).unwrap();
    let since = &top["since_start"];
    assert_eq!(since["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(since["volumes"][0]["name"], "v");
    assert_eq!(report["counters"]["completions"], ended(&since["volumes"][0]));
    for row in report["daemon_stages"].as_array().unwrap() {
        let mut stages = since["stages"].as_array().unwrap().iter();
        let same =
            stages.find(|s| s["stage"] == row["stage"] && s["operation"] == row["operation"]);
        assert_eq!(same.map(|s| &s["count"]), Some(&row["count"]), "{row}");
    }
    assert!(ask("top", &["--once"]).contains("\nv "));
    assert!(ask("stats", &[]).contains("end_to_end"));
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
    let gone = end(world.postern(["top", "--once", "--socket"]).arg(&socket));
    gone.expect_line(69, "no daemon answers");
}
