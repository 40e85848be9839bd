//! What the daemon tells of its requests: by volume, record by record, and to a real Prometheus.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::host::InProcess;
use common::{FakeLane, directory, skip};
use postern_edl::calls::{CallError, PosternTellRequest};
use postern_edl::port::{Submission, op};
use postern_edl::{CLAIMS, MEASURED_LATENCY, MEASURED_RECORDS, MEASURED_VOLUMES};
use posternd::engine::now_ns;
use posternd::problem::EXIT_CONFIG;
use serde_json::Value;

/// Far above what anything here takes: who waits longer hangs.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// A daemon with these arguments over two files of 1 MiB; nothing here depends on O_DIRECT.
fn daemon(dir: &Path, arguments: &[&str]) -> InProcess {
    for name in ["a", "b"] {
        std::fs::write(dir.join(name), vec![7; 1 << 20]).unwrap();
    }
    let root = ["--allow-buffered", "--root", dir.to_str().unwrap()];
    InProcess::start(dir, &[&root[..], arguments].concat())
}

fn request(id: u64, op: u64, handle: u32, data: u64) -> Submission {
    let length = if op == op::FLUSH { 0 } else { 4096 };
    let data = if op == op::FLUSH { 0 } else { data };
    let op = u32::try_from(op).unwrap();
    Submission { id, op, handle, length, data, enqueued_ns: now_ns(), ..Submission::default() }
}

/// Reads `reads` times and writes once, each delivered; index 0 is used again and again.
fn work(lane: &mut FakeLane, name: &str, reads: u64) {
    let handle = lane.open(name).handle;
    let data = lane.block(0);
    for n in 0..reads {
        assert_eq!(lane.run(request(n << 32, op::READ, handle, data)), 4096);
        lane.deliver(0);
    }
    assert_eq!(lane.run(request(reads << 32, op::WRITE, handle, data)), 4096);
    lane.deliver(0);
}

#[test]
fn each_volume_has_its_own_counts_and_the_stages_add_up_to_the_whole_way() {
    let dir = directory();
    let daemon = daemon(dir.path(), &[]);
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    work(&mut lane, "a", 30);
    work(&mut lane, "b", 20);
    // Without a claim of its publication, and one of the future.
    let handle = lane.open("b").handle;
    let data = lane.block(0);
    let read = request(99 << 32, op::READ, handle, data);
    assert_eq!(lane.run(Submission { enqueued_ns: 0, ..read }), 4096);
    lane.deliver(0);
    let future = now_ns() + 3_600_000_000_000;
    assert_eq!(lane.run(Submission { enqueued_ns: future, id: 100 << 32, ..read }), 4096);
    // Never told delivered, and its index used again.
    assert_eq!(lane.run(request(101 << 32, op::READ, handle, data)), 4096);
    lane.deliver(0);

    let volumes = lane.measured(MEASURED_VOLUMES, u64::MAX, 0);
    let named: Vec<_> = volumes.iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(named, ["a", "b"]);
    for (volume, reads) in volumes.iter().zip([30, 23]) {
        let operations = &volume["operations"];
        assert_eq!(operations["read"]["outcomes"]["ok"], reads);
        assert_eq!(operations["read"]["bytes"], reads * 4096);
        assert_eq!(operations["write"]["outcomes"]["ok"], 1);
        assert_eq!(volume["in_flight"], 0);
    }
    let stages = lane.measured(MEASURED_LATENCY, u64::MAX, 0);
    let find = |volume: &Value, operation: &str, stage: &str| {
        let mut all = stages.iter();
        let found = all.find(|s| {
            s["volume"] == volume["volume"] && s["operation"] == operation && s["stage"] == stage
        });
        found.map_or((0, 0), |s| (s["count"].as_u64().unwrap(), s["sum_ns"].as_u64().unwrap()))
    };
    for (operation, count) in [("read", 30), ("write", 1)] {
        let parts = ["crossing_out", "host_submit", "device", "crossing_in"];
        let parts = parts.map(|stage| find(&volumes[0], operation, stage));
        assert!(parts.iter().all(|(seen, _)| *seen == count), "{operation}: {parts:?}");
        let whole = find(&volumes[0], operation, "end_to_end");
        assert_eq!(whole, (count, parts.iter().map(|(_, ns)| ns).sum()), "{operation}");
    }
    for (stage, count) in [("crossing_out", 21), ("device", 23), ("end_to_end", 21)] {
        assert_eq!(find(&volumes[1], "read", stage).0, count, "{stage}");
    }
    for series in &stages {
        let buckets: u64 =
            series["buckets"].as_array().unwrap().iter().map(|b| b[1].as_u64().unwrap()).sum();
        assert_eq!(series["count"], buckets, "{series}");
    }
    let counters = lane.stats().counters;
    assert_eq!((counters["claims_missing"], counters["claims_negative"]), (1, 1));
    assert_eq!((counters["claims_undelivered"], counters["claims_refused"]), (1, 3));
    assert_eq!(counters["unmatched_completions"], 0);
    drop(lane);
    daemon.stop().unwrap();
}

#[test]
fn every_request_leaves_a_record_while_somebody_asks_for_all_and_its_stages_add_up() {
    let dir = directory();
    let daemon = daemon(dir.path(), &[]);
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    let before = lane.measured(MEASURED_RECORDS, 0, 1);
    assert!(before.is_empty());
    let handle = lane.open("a").handle;
    let data = lane.block(0);
    for n in 0..41 {
        let op = if n == 40 { op::WRITE } else { op::READ };
        assert_eq!(lane.run(request(n << 32, op, handle, data)), 4096);
        lane.deliver(0);
        // Asked again: a wish ends by itself.
        lane.measured(MEASURED_RECORDS, 0, 1);
    }
    let records = lane.measured(MEASURED_RECORDS, u64::MAX, 0);
    assert_eq!(records.len(), 41);
    for (n, record) in (1..).zip(&records) {
        assert_eq!(record["number"], n);
        assert_eq!(record["operation"], if n == 41 { op::WRITE } else { op::READ });
        assert_eq!((&record["result"], &record["length"]), (&4096.into(), &4096.into()));
        let at = |name: &str| record[name].as_u64().unwrap();
        let way = ["enqueued_ns", "picked_ns", "submitted_ns", "reaped_ns", "delivered_ns"];
        let way = way.map(at);
        assert!(way[0] > 0 && way.is_sorted(), "{record}");
        // The generation is the high half of the request's id.
        assert_eq!(at("id") & 0xff_ffff, n - 1, "{record}");
    }
    // Records of a lane that has ended are still there.
    drop(lane);
    let mut other = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    let until = Instant::now() + HANGS_AFTER;
    while other.stats().lanes > 1 {
        assert!(Instant::now() < until, "the lane does not end");
    }
    assert_eq!(other.measured(MEASURED_RECORDS, u64::MAX, 0), records);
    drop(other);
    daemon.stop().unwrap();
}

#[test]
fn what_an_enclave_claims_is_told_of_its_own_volume_and_no_other() {
    let dir = directory();
    let daemon = daemon(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let mut honest = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    let mut hostile = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    let tell = |lane: &mut FakeLane, handle, claims| {
        let told = lane.calls.postern_tell(&PosternTellRequest { handle, claims });
        told.map_err(|error| matches!(error, CallError::Refused(9)))
    };
    let a = honest.open("a").handle;
    let b = hostile.open("b").handle;
    assert!(tell(&mut honest, a, [1, 2, 3, 4, 5, 6, 7, 80, 90]).is_ok());
    assert!(tell(&mut honest, a, [1, 3, 3, 4, 5, 6, 7, 81, 89]).is_ok());
    for claims in [[u64::MAX; 9], [0; 9], [u64::MAX; 9]] {
        assert!(tell(&mut hostile, b, claims).is_ok());
    }
    // Handles that are not its own, or none: EBADF.
    for handle in [0, b ^ 1, a.wrapping_add(1 << 20), u32::MAX] {
        assert_eq!(tell(&mut hostile, handle, [7; 9]).err(), Some(true), "{handle}");
    }
    let claimed = |lane: &mut FakeLane, name: &str| {
        let volumes = lane.measured(MEASURED_VOLUMES, u64::MAX, 0);
        volumes.iter().find(|volume| volume["name"] == name).unwrap()["claimed"].clone()
    };
    let of_a = claimed(&mut honest, "a");
    let numbers: Vec<u64> = CLAIMS.iter().map(|name| of_a[*name].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 3, 3, 4, 5, 6, 7, 81, 89]);
    assert_eq!(claimed(&mut honest, "b")["checkpoints"], u64::MAX);
    let ask = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let samples = samples(&get(daemon.metrics.unwrap(), ask).1);
    let checkpoints = r#"postern_claimed_events_total{volume="a",event="checkpoints"}"#;
    assert_eq!(samples[checkpoints], 3.0);
    assert_eq!(samples[r#"postern_claimed_space_blocks{volume="a",state="free"}"#], 89.0);
    // What is closed has no space; what was counted stays.
    honest.close(a).unwrap();
    let of_a = claimed(&mut honest, "a");
    assert_eq!((&of_a["free_blocks"], &of_a["checkpoints"]), (&0.into(), &3.into()));
    drop((honest, hostile));
    daemon.stop().unwrap();
}

/// What an HTTP client gets: status line and body.
fn get(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    // A daemon that has answered already does not read the rest.
    let _ = stream.write_all(request.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

/// Samples of a text, by name and labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let split = |line: &str| {
        let line = line.split(" # ").next().unwrap();
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    lines.map(split).collect()
}

#[test]
fn the_endpoint_tells_the_daemons_own_counts_and_hostile_peers_do_not_end_it() {
    let dir = directory();
    let daemon = daemon(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let address = daemon.metrics.unwrap();
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    work(&mut lane, "a", 30);

    let silent = TcpStream::connect(address).unwrap();
    let endless = "x".repeat(20 << 10);
    for (request, status) in [
        ("nonsense\r\n\r\n", "400"),
        (&*format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: {endless}\r\n\r\n"), "431"),
        ("GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", "403"),
        ("GET /other HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
    ] {
        let (line, body) = get(address, request);
        // Closed with bytes unread, a connection may be reset before its answer is seen.
        assert!(line.contains(status) || line.is_empty(), "{line}");
        assert!(!body.contains("postern_"));
    }
    let ask = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n";
    let (status, text) = get(address, ask);
    assert_eq!(status, "HTTP/1.1 200 OK");
    let (samples, report) = (samples(&text), lane.stats());
    let sample = |name: &str| samples.get(name).copied();
    assert_eq!(sample("postern_completions_total"), Some(report.counters["completions"] as f64));
    assert_eq!(sample("postern_sessions"), Some(1.0));
    for row in &report.daemon_stages {
        let labels =
            format!("{{volume=\"a\",operation=\"{}\",stage=\"{}\"}}", row.operation, row.stage);
        let count = sample(&format!("postern_stage_seconds_count{labels}"));
        assert_eq!(count, Some(row.count as f64), "{row:?}");
        let sum = sample(&format!("postern_stage_seconds_sum{labels}"));
        assert_eq!(sum, Some(row.sum_ns as f64 / 1e9), "{row:?}");
    }
    if let Ok(mut promtool) =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn()
    {
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(promtool.wait().unwrap().success(), "{text}");
    } else {
        skip("promtool is not installed (`cargo xtask setup`)");
    }
    drop((silent, lane));
    daemon.stop().unwrap();
}

#[test]
fn metrics_for_other_machines_want_a_token_and_a_busy_address_is_refused() {
    let dir = directory();
    let refused = |arguments: &[&str]| {
        let problem = InProcess::try_start(dir.path(), arguments).map(|_| ()).unwrap_err();
        assert_eq!(problem.exit, EXIT_CONFIG, "{problem}");
        problem.to_string()
    };
    assert!(refused(&["--metrics", "0.0.0.0:0"]).contains("--metrics-token-file"));
    let token = dir.path().join("token");
    std::fs::write(&token, "short\n").unwrap();
    assert!(refused(&["--web", "0.0.0.0:0"]).contains("--web-token-file"));
    let alone = ["--web-token-file", token.to_str().unwrap()];
    assert!(refused(&alone).contains("nothing is served"));
    let with = ["--metrics", "127.0.0.1:0", "--metrics-token-file", token.to_str().unwrap()];
    assert!(refused(&with).contains("16 characters"));
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy_at = busy.local_addr().unwrap().to_string();
    assert!(refused(&["--metrics", &busy_at]).contains(&busy_at));

    std::fs::write(&token, "0123456789abcdef\n").unwrap();
    let daemon = daemon(dir.path(), &with);
    let address = daemon.metrics.unwrap();
    let ask = |header: &str| {
        get(address, &format!("GET /metrics HTTP/1.1\r\nHost: elsewhere\r\n{header}\r\n")).0
    };
    assert!(ask("").contains("401"));
    assert!(ask("Authorization: Bearer 0123456789abcdef\r\n").contains("200"));
    daemon.stop().unwrap();
}

/// A running Prometheus; ended when dropped.
struct Prometheus {
    child: Child,
    address: SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    /// One that scrapes `target` each second, with `features` switched on; `None` if it is not
    /// installed.
    fn start(dir: &Path, target: SocketAddr, features: &str) -> Option<Self> {
        let config = dir.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: posternd\n  \
             static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::write(&config, text).unwrap();
        // Somebody may take the port before Prometheus does: then with another one.
        for attempt in 0..5 {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = free.local_addr().unwrap();
            drop(free);
            let child = Command::new("prometheus")
                .arg(format!("--config.file={}", config.display()))
                .arg(format!(
                    "--storage.tsdb.path={}",
                    dir.join(format!("tsdb{attempt}")).display()
                ))
                .arg(format!("--web.listen-address={address}"))
                .args(["--log.level=error", &format!("--enable-feature={features}")])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            let Ok(child) = child else {
                skip("prometheus is not installed (`cargo xtask setup`)");
                return None;
            };
            let mut prometheus = Self { child, address };
            let until = Instant::now() + HANGS_AFTER;
            while prometheus.child.try_wait().unwrap().is_none() {
                if TcpStream::connect(address).is_ok() {
                    return Some(prometheus);
                }
                assert!(Instant::now() < until, "prometheus does not listen");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("prometheus does not start");
    }

    /// The value of a query; `None` while there is none.
    fn query(&self, query: &str) -> Option<f64> {
        let (_, body) = get(
            self.address,
            &format!("GET /api/v1/query?query={query} HTTP/1.0\r\nHost: localhost\r\n\r\n"),
        );
        let answer: Value = serde_json::from_str(&body).ok()?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }

    /// Waits until a query answers what it should.
    fn expect(&self, query: &str, right: impl Fn(f64) -> bool) {
        let until = Instant::now() + HANGS_AFTER;
        loop {
            let value = self.query(query);
            if value.is_some_and(&right) {
                return;
            }
            assert!(Instant::now() < until, "{query} stays {value:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_real_prometheus_has_the_daemons_counts_after_scraping_it_under_load() {
    let dir = directory();
    let daemon = daemon(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let target = daemon.metrics.unwrap();
    let Some(prometheus) = Prometheus::start(dir.path(), target, "exemplar-storage") else {
        return;
    };
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    let handle = lane.open("a").handle;
    let data = lane.block(0);
    let mut requests = 0u64;
    // Until it has seen the load grow.
    let until = Instant::now() + HANGS_AFTER;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        for _ in 0..500 {
            assert_eq!(lane.run(request(requests << 32, op::READ, handle, data)), 4096);
            lane.deliver(0);
            requests += 1;
        }
        let now = prometheus.query("sum(postern_requests_total)").filter(|now| *now > 0.0);
        if let Some(now) = now.filter(|now| seen.last().is_none_or(|last| now > last)) {
            seen.push(now);
        }
        assert!(Instant::now() < until, "prometheus sees no load: {seen:?}");
    }
    let report = lane.stats();
    let is = |wanted: u64| move |value: f64| value == wanted as f64;
    prometheus.expect("sum(postern_requests_total)", is(requests));
    prometheus.expect("sum(postern_moved_bytes_total)", is(requests * 4096));
    prometheus.expect("postern_completions_total", is(report.counters["completions"]));
    for row in &report.daemon_stages {
        let labels = format!(
            "%7Bvolume=%22a%22,operation=%22{}%22,stage=%22{}%22%7D",
            row.operation, row.stage
        );
        prometheus.expect(&format!("postern_stage_seconds_count{labels}"), is(row.count));
        let sum = row.sum_ns as f64 / 1e9;
        prometheus.expect(&format!("postern_stage_seconds_sum{labels}"), |v| v == sum);
    }
    prometheus.expect("up", is(1));
    drop(lane);
    daemon.stop().unwrap();
}

/// With the feature Prometheus asks for protobuf; of a text it makes no native histograms.
#[test]
fn a_real_prometheus_reads_native_histograms_as_they_are() {
    let dir = directory();
    let daemon = daemon(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let target = daemon.metrics.unwrap();
    let features = "exemplar-storage,native-histograms";
    let Some(prometheus) = Prometheus::start(dir.path(), target, features) else { return };
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    work(&mut lane, "a", 3_000);
    let report = lane.stats();
    let is = |wanted: u64| move |value: f64| value == wanted as f64;
    prometheus.expect("postern_completions_total", is(report.counters["completions"]));
    for row in &report.daemon_stages {
        let series = format!(
            "postern_stage_seconds%7Bvolume=%22a%22,operation=%22{}%22,stage=%22{}%22%7D",
            row.operation, row.stage
        );
        prometheus.expect(&format!("histogram_count({series})"), is(row.count));
        let sum = row.sum_ns as f64 / 1e9;
        prometheus.expect(&format!("histogram_sum({series})"), |v| v == sum);
        // A native bucket is 1.1 % wide, and read from within; Prometheus' ranks are not whole
        // numbers, so only many values tell.
        if row.count > 1_000 {
            let median = row.p50_ns as f64 / 1e9;
            let near = move |v: f64| v > median / 1.04 && v < median * 1.04;
            prometheus.expect(&format!("histogram_quantile(0.5,{series})"), near);
        }
    }
    drop(lane);
    daemon.stop().unwrap();
}

/// Words of a text that name a metric of ours.
fn metrics_in(text: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let words = text.split(|c: char| !is_name(c));
    words.filter(|word| word.starts_with("postern_")).collect()
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_are_there() {
    let dir = directory();
    let daemon = daemon(dir.path(), &["--metrics", "127.0.0.1:0"]);
    let mut lane = FakeLane::attach(&daemon.socket, 8, 1 << 16);
    work(&mut lane, "a", 1);
    let ask = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let (_, text) = get(daemon.metrics.unwrap(), ask);
    let there = metrics_in(&text);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/dashboards");
    for file in ["grafana.json", "alerts.yml"] {
        let text = std::fs::read_to_string(folder.join(file)).unwrap();
        let asked = metrics_in(&text);
        assert!(asked.len() > 5);
        for metric in asked.into_iter().filter(|metric| !metric.starts_with("postern_probe_")) {
            assert!(there.contains(&metric), "{file}: {metric}");
        }
    }
    serde_json::from_str::<Value>(&std::fs::read_to_string(folder.join("grafana.json")).unwrap())
        .unwrap();
    drop(lane);
    daemon.stop().unwrap();
    let Ok(checked) =
        Command::new("promtool").args(["check", "rules"]).arg(folder.join("alerts.yml")).output()
    else {
        return skip("promtool is not installed (`cargo xtask setup`)");
    };
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success(), "{said}");
}
