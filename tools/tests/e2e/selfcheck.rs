//! The probes against fio: fio, the daemon and the probes see the same requests, and count and time
//! them by themselves.
//!
//! fio reads a volume that was written in full: each of its reads is one read of the host. The others,
//! for opening the volume and its map, are the same in each run: fio begins with a job that reads all of
//! it one after the other, so that no two reads look for the same part of the map. A read's way lies within fio's: fio
//! begins before the enclave publishes it (`lat`, from before its io_submit), and has it after the
//! enclave took its completion. What fio measures beyond that is its own, sealing and opening included.
//! So, whatever the machine is busy with:
//!
//! - the requests of the probes, the daemon and fio are as many, to the last one;
//! - the stages of the probes together take what the daemon's own clock measures from end to end, but
//!   for the last way back of each place in the lane, which the probes do not see;
//! - of as many reads, the nth fastest takes no longer from end to end than the nth fastest in fio;
//! - where the device is slow, fio's own part is small: a quarter is far more than it takes.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    blame::probed,
    common::{World, end, fio_words, signal},
    devices::{Loop, Mounted, Throttled, are_possible},
    told::Said,
};

const MIB: &str = "16";

/// What fio says of its reads.
struct Heard {
    reads: u64,
    /// From submission's begin until collected, nanoseconds: each bucket's value and count, ascending.
    lat: Vec<(u64, u64)>,
    /// The same of all reads together, by the means of slat and clat.
    lat_sum: f64,
}

impl Heard {
    fn of(file: &Path) -> Self {
        let text = std::fs::read_to_string(file).unwrap();
        let json: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let mut heard = Self { reads: 0, lat: Vec::new(), lat_sum: 0.0 };
        for job in json["jobs"].as_array().unwrap() {
            let read = &job["read"];
            let bins = read["lat_ns"]["bins"].as_object().unwrap().iter();
            let bins = bins.map(|(value, count)| (value.parse().unwrap(), count.as_u64().unwrap()));
            heard.lat.extend(bins.filter(|(_, count)| *count > 0));
            let reads = read["total_ios"].as_u64().unwrap();
            heard.reads += reads;
            let mean = |name: &str| read[name]["mean"].as_f64().unwrap();
            heard.lat_sum += (mean("slat_ns") + mean("clat_ns")) * reads as f64;
        }
        heard.lat.sort_unstable();
        assert_eq!(heard.lat.iter().map(|(_, count)| count).sum::<u64>(), heard.reads, "{json}");
        heard
    }

    /// The `rank`th fastest, from 1.
    fn nth(&self, rank: u64) -> u64 {
        let mut left = rank;
        for &(value, count) in &self.lat {
            if left <= count {
                return value;
            }
            left -= count;
        }
        panic!("{rank} of {}", self.reads);
    }
}

/// A job that reads all of the volume, one block after the other.
const FIRST: [&str; 2] = ["--name=first", "--rw=read"];
/// One that reads at random, after it.
const THEN: [&str; 4] = ["--name=then", "--stonewall", "--rw=randread", "--norandommap"];

/// fio's words for reads of the volume in these jobs.
fn reading(jobs: &[&[&str]], into: &Path) -> Vec<String> {
    let mut words = fio_words("/sealed/data");
    words.retain(|word| word != "--minimal" && !word.starts_with("--name"));
    // What is said here goes for each job. They are threads: the volume is opened once.
    words.insert(1, "--name=global".to_owned());
    words.extend(["--thread", "--bs=4k", "--lat_percentiles=1"].map(str::to_owned));
    words.push(format!("--size={MIB}m"));
    words.extend(jobs.iter().flat_map(|job| job.iter()).map(|word| (*word).to_owned()));
    words.push("--output-format=json+".to_owned());
    words.push(format!("--output={}", into.display()));
    words
}

/// A volume that was written in full.
fn written(world: &World) -> PathBuf {
    let volume = world.format("v", &format!("{MIB}M"));
    let size = format!("--size={MIB}m");
    world.fio(&volume, &["--rw=write", "--bs=64k", &size]).expect(0);
    volume
}

/// One row of a report.
fn row<'a>(report: &'a Value, of: &str, stage: &str) -> &'a Value {
    let mut rows = report[of].as_array().unwrap().iter();
    rows.find(|row| row["stage"] == stage && row["operation"] == "read").unwrap()
}

fn number(row: &Value, name: &str) -> u64 {
    row[name].as_u64().unwrap()
}

/// The probes' stages of all reads add up to the time from end to end by the daemon's clock.
#[track_caller]
fn times_agree(said: &Said) {
    for name in ["claim_missing", "negative_crossing_out", "negative_crossing_in", "overflow"] {
        assert_eq!(said.counter(&format!("probe_{name}")), 0, "{name}: {}", said.report);
    }
    assert_eq!(said.counter("claims_refused"), 0, "{}", said.report);
    let stages = ["crossing_out", "host_submit", "device", "reap", "crossing_in"];
    let each = stages.map(|stage| row(&said.report, "stages", stage));
    let sum: u64 = each.iter().map(|row| number(row, "sum_ns")).sum();
    let whole = row(&said.report, "daemon_stages", "end_to_end");
    assert_eq!(number(each[0], "count"), number(whole, "count"), "{}", said.report);
    let unseen = number(whole, "count") - number(each[4], "count");
    let more = number(whole, "sum_ns").checked_sub(sum);
    let more = more.unwrap_or_else(|| panic!("the stages take longer: {}", said.report));
    assert!(more <= unseen * number(whole, "max_ns"), "{more} ns are missing: {}", said.report);
}

#[test]
fn fio_the_daemon_and_the_probes_count_the_same_requests_and_their_times_agree() {
    let Some(world) = World::new() else { return };
    let volume = written(&world);
    let run = |load: &[&str]| {
        let (stats, fio) = (world.path("stats.json"), world.path("fio.json"));
        let options = ["--stats", stats.to_str().unwrap()];
        end(&mut world.run_with(&volume, &options, reading(&[&FIRST, &THEN, load], &fio)))
            .expect(0);
        let report = serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap();
        Said::of(report).map(|said| (said, Heard::of(&fio)))
    };
    let Some((few, heard)) = run(&["--iodepth=32", "--number_ios=2000"]) else { return };
    few.adds_up();
    let others = few.row("device", "read") - heard.reads;

    // As fast as it goes.
    let Some((said, heard)) = run(&["--iodepth=32", "--time_based", "--runtime=5"]) else { return };
    said.adds_up();
    times_agree(&said);
    let whole = row(&said.report, "daemon_stages", "end_to_end");
    assert_eq!(number(whole, "count"), heard.reads + others, "{}", said.report);
    assert_eq!(said.row("device", "read"), heard.reads + others, "{}", said.report);

    // A bucket of ours shows up to 1/64 more, one of fio's up to 1/128 less.
    let least = |ns: u64| ns as f64 * (1.0 + 1.0 / 64.0) * (1.0 + 1.0 / 128.0);
    for (name, per_mille) in [("p50_ns", 500), ("p99_ns", 990)] {
        let rank = (number(whole, "count") * per_mille).div_ceil(1000);
        // On a machine that is too busy for that many.
        if rank > heard.reads {
            continue;
        }
        let (ours, fios) = (number(whole, name), heard.nth(rank));
        assert!(ours as f64 <= least(fios), "{name}: {ours} ns, {fios} ns in fio");
    }
    let most = heard.lat_sum + (others * number(whole, "max_ns")) as f64;
    assert!(number(whole, "sum_ns") as f64 <= most * 1.001, "{most}: {}", said.report);
}

#[test]
fn where_the_device_is_slow_the_probes_know_of_nearly_all_that_fio_waits_for() {
    let Some(world) = World::new() else { return };
    if !are_possible(&[]) {
        return;
    }
    let volume = written(&world);
    let Some(base) = Mounted::new("tmpfs", None, &world.path("base")) else { return };
    let Some(device) = Loop::over(&base.path().join("device"), "200M", false) else { return };
    let mut copy = Command::new("dd");
    copy.arg(format!("if={}", volume.display())).arg(format!("of={}", device.path().display()));
    end(copy.args(["bs=1M", "oflag=direct", "conv=fsync", "status=none"])).expect(0);
    let socket = world.path("own.sock");
    let Some(daemon) = probed(&world, &socket, device.path()) else { return };
    let Some(slow) = Throttled::new(&device, daemon.pid()) else { return };
    // Each of eight requests takes 40 ms.
    slow.limit(Some(200));
    let fio = world.path("fio.json");
    let mut command = world.postern(["run", "--key-file", "v.key", "--volume"]);
    command.arg("/sealed/data=v").arg("--socket").arg(&socket).arg("--");
    end(command.args(reading(&[&THEN, &["--iodepth=8", "--number_ios=600"]], &fio))).expect(0);
    let mut ask = world.postern(["stats", "--json", "--socket"]);
    let said = end(ask.arg(&socket)).expect(0).stdout;
    let said = Said::of(serde_json::from_str(&said).unwrap()).unwrap();
    signal("TERM", daemon.pid());
    daemon.wait().expect(0);
    said.adds_up();
    times_agree(&said);

    let heard = Heard::of(&fio);
    let whole = row(&said.report, "daemon_stages", "end_to_end");
    let others = number(whole, "count") - heard.reads;
    let median = number(whole, "p50_ns");
    // Whatever the other reads took, among fio's the same is found this much further down.
    let fios = heard.nth(number(whole, "count").div_ceil(2) - others);
    assert!(median >= fios - fios / 4, "{median} ns, {fios} ns in fio: {}", said.report);
    let device = number(row(&said.report, "stages", "device"), "sum_ns");
    assert!(device > number(whole, "sum_ns") / 4 * 3, "{}", said.report);
    drop(slow);
}
