//! The probes against the running kernel: real io_submit on real files, counted request by request.
//!
//! Needs root, BTF and the object that `cargo xtask build` builds; says so and passes where one is
//! missing. Every expectation is either a number of requests that the test made, or a pair of
//! CLOCK_MONOTONIC times that enclose what was measured.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use postern_ebpf_common::{TracedIocb, aio_data};
use posternd::engine::Interface;
use posternd::probes::{OBJECT_NAME, OBJECT_VARIABLE, Probes, ProbesUnavailable};
use posternd::stats::StageRow;

const READ: u64 = 1;
const WRITE: u64 = 2;
const FLUSH: u64 = 3;
const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// The probes see the whole process, so tests that make requests run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn say(text: &str) {
    // Past the test harness, which would keep it for itself.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Fresh probes on process `tgid`; `None`, with a loud reason, where this machine can not have them.
fn probes_on(tgid: u32) -> Option<(MutexGuard<'static, ()>, Probes)> {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let named = std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from);
    let places = ["", "debug", "release"].map(|sub| target.join(sub).join(OBJECT_NAME));
    let Some(object) = named.into_iter().chain(places).find(|path| path.is_file()) else {
        say("SKIPPED: no postern-probes.o; build it by `cargo xtask build`");
        return None;
    };
    match Probes::load(Some(&object), tgid, Interface::Libaio) {
        Ok(probes) => Some((guard, probes)),
        Err(error @ (ProbesUnavailable::Object { .. } | ProbesUnavailable::Refused { .. })) => {
            panic!("{error}")
        }
        Err(error) => {
            say(&format!("SKIPPED: {error}"));
            None
        }
    }
}

fn probes() -> Option<(MutexGuard<'static, ()>, Probes)> {
    probes_on(std::process::id())
}

fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// A file that goes away with the test. `O_DIRECT`, unless the file system refuses it.
struct TestFile {
    file: File,
    direct: bool,
    _directory: tempfile::TempDir,
}

impl TestFile {
    /// `written` bytes of data in a file of `length` bytes; the rest is a hole.
    fn new(length: usize, written: usize) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("data");
        let plain = File::create(&path).unwrap();
        plain.write_all_at(&vec![0x5a; written], 0).unwrap();
        plain.set_len(length as u64).unwrap();
        plain.sync_all().unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let direct = options.custom_flags(libc::O_DIRECT).open(&path);
        if let Err(error) = &direct {
            say(&format!("SKIPPED in part: {} refuses O_DIRECT ({error})", path.display()));
        }
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(_) => (options.custom_flags(0).open(&path).unwrap(), false),
        };
        Self { file, direct, _directory: directory }
    }
}

/// Memory for data, aligned to a block.
struct Buffer {
    start: NonNull<u8>,
    length: usize,
}

impl Buffer {
    fn new(length: usize) -> Self {
        // SAFETY: a fresh private mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: NonNull::new(start.cast()).unwrap(), length }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; requests on it are reaped before it goes.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// What the measured times of some requests must lie between.
#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    /// Sum of the times surely spent between io_submit's entry and io_getevents' return.
    least_ns: u64,
    /// Sum of the times from before io_submit until after io_getevents.
    most_ns: u64,
}

/// A small AIO program that submits traced requests as the daemon does.
struct Program {
    context: u64,
    lane: u64,
    generation: u64,
    delivered: BTreeMap<u64, u64>,
    buffer: Buffer,
    bounds: Bounds,
    /// Submit by addresses in reverse order, so that the batch is not contiguous.
    scattered: bool,
}

impl Program {
    fn new(lane: u64, buffer: usize) -> Self {
        let mut context = 0u64;
        // SAFETY: the kernel writes the context's id to `context`.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, 4096, &raw mut context) };
        assert_eq!(result, 0, "io_setup: {}", std::io::Error::last_os_error());
        let (bounds, buffer) = (Bounds::default(), Buffer::new(buffer));
        let delivered = BTreeMap::new();
        Self { context, lane, generation: 0, delivered, buffer, bounds, scattered: false }
    }

    /// A request with index `index`; it reads to or writes from its own part of the buffer.
    fn request(
        &mut self,
        file: &File,
        index: u64,
        op: u64,
        length: usize,
        at: usize,
    ) -> TracedIocb {
        self.generation += 1;
        let opcode = [0, 0, 1, 3][usize::try_from(op).unwrap()]; // PREAD, PWRITE, FDSYNC
        let place = usize::try_from(index).unwrap() * length % self.buffer.length;
        assert!(place + length <= self.buffer.length);
        let fd = u64::from(file.as_raw_fd().cast_unsigned());
        let time = now();
        TracedIocb {
            iocb: [
                aio_data(self.lane, index, self.generation),
                0,
                opcode | fd << 32,
                if op == FLUSH { 0 } else { self.buffer.start.as_ptr() as u64 + place as u64 },
                length as u64,
                at as u64,
                0,
                0,
            ],
            enqueued_ns: time,
            picked_ns: time,
            prev_delivered_ns: self.delivered.get(&index).copied().unwrap_or(0),
            op,
            length: length as u64,
            volume: 0,
            reserved: [0; 2],
        }
    }

    /// io_submit; answers how many were accepted.
    fn submit(&self, batch: &mut [TracedIocb]) -> usize {
        let mut pointers: Vec<_> = batch.iter_mut().map(std::ptr::from_mut).collect();
        if self.scattered {
            pointers.reverse();
        }
        // SAFETY: the pointers lead to iocbs whose memory is this program's buffer.
        let result = unsafe {
            libc::syscall(libc::SYS_io_submit, self.context, pointers.len(), pointers.as_ptr())
        };
        usize::try_from(result).unwrap_or(0)
    }

    /// io_getevents until `count` events came; answers (data, result) of each and the time when the
    /// call that brought it began.
    fn reap(&self, count: usize) -> Vec<([u64; 4], u64)> {
        let mut events = Vec::new();
        while events.len() < count {
            let mut room = vec![[0u64; 4]; count - events.len()];
            let began = now();
            // SAFETY: room for as many events as asked for.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    1,
                    room.len(),
                    room.as_mut_ptr(),
                    std::ptr::null::<libc::timespec>(),
                )
            };
            let got = usize::try_from(result).expect("io_getevents failed");
            events.extend(room[..got].iter().map(|event| (*event, began)));
        }
        events
    }

    /// Submits a batch, reaps all of it, checks the results, and notes the times around it.
    fn run(&mut self, batch: &mut [TracedIocb]) {
        let before = now();
        assert_eq!(self.submit(batch), batch.len());
        let submitted = now();
        for ([data, _, result, _], began) in self.reap(batch.len()) {
            let after = now();
            let request = batch.iter().find(|r| r.iocb[0] == data).expect("an event of ours");
            assert_eq!(result, if request.op == FLUSH { 0 } else { request.length });
            // The call that brought the event may have begun while it waited for another.
            self.bounds.least_ns += began.saturating_sub(submitted);
            self.bounds.most_ns += after - before;
            self.delivered.insert(postern_ebpf_common::index_of(data), after);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the context of `new`; waits for what is in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn row(probes: &Probes, stage: &str, operation: &str) -> StageRow {
    let mut rows = probes.rows().into_iter();
    rows.find(|r| r.stage == stage && r.operation == operation).unwrap_or_default()
}

/// All counters that are not zero, without those that are no trouble: how many were seen, how fast
/// the device was, what another daemon on this machine does.
fn troubles(probes: &Probes) -> BTreeMap<String, u64> {
    let harmless = ["requests_seen", "completed_in_submit", "stamp_foreign"];
    let mut counters = probes.counters();
    counters.retain(|name, n| *n != 0 && !harmless.contains(&name.as_str()));
    counters
}

fn none() -> BTreeMap<String, u64> {
    BTreeMap::new()
}

fn only(name: &str, count: u64) -> BTreeMap<String, u64> {
    BTreeMap::from([(name.to_owned(), count)])
}

/// Checks that `operation` was recorded `count` times in each stage, and that the host's stages
/// together lie within what the program measured around them.
fn check(probes: &Probes, program: &Program, operation: &str, count: u64, exact: bool) {
    let stages = ["crossing_out", "host_submit", "device"];
    for stage in stages {
        let row = row(probes, stage, operation);
        assert_eq!(row.count, count, "{stage} {operation}; {:?}", probes.counters());
        assert!(row.p50_ns <= row.p99_ns && row.p99_ns <= row.p999_ns && row.p999_ns <= row.max_ns);
        assert!(row.max_ns <= row.sum_ns && row.sum_ns <= row.max_ns * count);
    }
    assert_eq!(row(probes, "reap", operation).count, if exact { count } else { 0 });
    let total: u64 =
        ["host_submit", "device", "reap"].map(|s| row(probes, s, operation).sum_ns).iter().sum();
    let Bounds { least_ns, most_ns } = program.bounds;
    assert!(total >= least_ns && total <= most_ns, "{least_ns} <= {total} <= {most_ns}");
    say(&format!(
        "{operation} x {count}: stages are {:.1} % of the time around them; {}",
        total as f64 * 100.0 / most_ns as f64,
        stages
            .iter()
            .chain(&["reap", "crossing_in"])
            .map(|stage| {
                let row = row(probes, stage, operation);
                format!("{stage} {} us ", row.sum_ns / row.count.max(1) / 1000)
            })
            .collect::<String>()
    ));
}

#[test]
fn every_request_is_recorded_once_in_every_stage() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(8 * MIB, 8 * MIB);
    for (op, operation) in [(READ, "read"), (WRITE, "write")] {
        let mut program = Program::new(3, MIB);
        let mut place = 1;
        for _ in 0..100 {
            let mut batch: Vec<_> = (0..32)
                .map(|index| {
                    place = place * 5 % 2039; // A prime below the number of blocks: all over the file.
                    program.request(&file.file, index, op, BLOCK, place * BLOCK)
                })
                .collect();
            program.run(&mut batch);
        }
        check(&probes, &program, operation, 3200, file.direct && probes.traces_device());
        assert_eq!(
            row(&probes, "crossing_in", operation).count,
            3200 - 32, // The last of each index has no successor to tell.
        );
    }
    if file.direct && probes.traces_device() {
        assert_eq!(troubles(&probes), none());
        assert!(probes.notes().iter().all(|n| n.contains("mounted")), "{:?}", probes.notes());
    }
    assert_eq!(probes.counters()["requests_seen"], 6400);
}

#[test]
fn split_and_merged_requests_end_with_their_own_last_part() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(64 * MIB, 64 * MIB);
    let exact = file.direct && probes.traces_device();
    let mut program = Program::new(0, 8 * MIB);
    for round in 0..4 {
        // Larger than the device takes at once.
        let mut batch: Vec<_> = (0..8usize)
            .map(|i| program.request(&file.file, i as u64, READ, MIB, (round * 8 + i) * MIB))
            .collect();
        program.run(&mut batch);
    }
    check(&probes, &program, "read", 32, exact);
    let mut program = Program::new(1, MIB);
    for round in 0..8usize {
        // One after the other, so that the kernel merges them.
        let mut batch: Vec<_> = (0..128usize)
            .map(|i| program.request(&file.file, i as u64, WRITE, BLOCK, (round * 128 + i) * BLOCK))
            .collect();
        program.run(&mut batch);
    }
    check(&probes, &program, "write", 1024, exact);
    if exact {
        assert_eq!(troubles(&probes), none());
    }
}

#[test]
fn a_scattered_batch_is_recorded_like_a_contiguous_one() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(63, MIB);
    program.scattered = true;
    for _ in 0..10 {
        let mut batch: Vec<_> = (0..100u32)
            .map(|i| {
                program.request(&file.file, u64::from(i) + 3996, READ, BLOCK, i as usize * BLOCK)
            })
            .collect();
        program.run(&mut batch);
    }
    check(&probes, &program, "read", 1000, file.direct && probes.traces_device());
}

#[test]
fn requests_without_a_device_end_are_counted_as_such() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(2 * MIB, MIB);
    let mut program = Program::new(5, MIB);
    // A flush has no bio of its own.
    for index in 0..10 {
        let mut batch = [program.request(&file.file, index, FLUSH, 0, 0)];
        program.run(&mut batch);
    }
    check(&probes, &program, "flush", 10, false);
    // A hole is read without the device.
    let mut program = Program::new(6, MIB);
    let mut batch: Vec<_> = (0..64)
        .map(|i| {
            program.request(&file.file, i, READ, BLOCK, MIB + usize::try_from(i).unwrap() * BLOCK)
        })
        .collect();
    program.run(&mut batch);
    check(&probes, &program, "read", 64, false);
    assert_eq!(troubles(&probes), only("device_end_unknown", 74));
    assert_eq!(probes.counters()["requests_seen"], 74);
}

#[test]
fn what_io_submit_does_not_accept_is_not_recorded() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(7, MIB);
    let mut batch: Vec<_> = (0..40)
        .map(|i| program.request(&file.file, i, READ, BLOCK, usize::try_from(i).unwrap() * BLOCK))
        .collect();
    batch[35].iocb[2] = 0xffff; // No such operation: io_submit stops in front of it.
    assert_eq!(program.submit(&mut batch), 35);
    assert_eq!(program.submit(&mut batch[35..]), 0);
    batch[35].iocb[2] = batch[34].iocb[2];
    assert_eq!(program.submit(&mut batch[35..]), 5);
    program.reap(40);
    for stage in ["crossing_out", "host_submit", "device"] {
        assert_eq!(row(&probes, stage, "read").count, 40, "{stage}");
    }
    let counters = probes.counters();
    assert_eq!((counters["requests_seen"], counters["not_accepted"]), (50, 10));
    assert_eq!((counters["reap_unmatched"], counters["overwritten"]), (0, 0));
}

#[test]
fn each_volume_has_histograms_of_its_own_and_unknown_ones_share_one() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(11, MIB);
    let last = probes.volumes() - 1;
    let mut batch: Vec<_> = (0..12)
        .map(|i| program.request(&file.file, i, READ, BLOCK, usize::try_from(i).unwrap() * BLOCK))
        .collect();
    for (request, volume) in batch.iter_mut().zip([1, 1, 1, last, last, last + 1, u64::MAX]) {
        request.volume = volume;
    }
    program.run(&mut batch);
    let mut found = BTreeMap::new();
    for (volume, stage, operation, histogram) in probes.latency() {
        assert_eq!(operation, "read");
        if stage == "device" {
            *found.entry(volume).or_insert(0) += histogram.count();
        }
    }
    let mut expected = BTreeMap::new();
    for request in &batch {
        let own = if request.volume <= last { request.volume } else { 0 };
        *expected.entry(own).or_insert(0) += 1;
    }
    assert_eq!(found, expected);
    assert_eq!(row(&probes, "device", "read").count, 12, "all together");
}

#[test]
fn switched_off_probes_end_what_they_saw_and_see_nothing_new() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(12, MIB);
    let request = |program: &mut Program, index| {
        [program.request(&file.file, index, READ, BLOCK, usize::try_from(index).unwrap() * BLOCK)]
    };
    let mut first = request(&mut program, 0);
    assert_eq!(program.submit(&mut first), 1);
    probes.switch_off();
    assert!(!probes.is_on());
    assert_eq!(probes.under_way(), 1);
    let mut unseen = request(&mut program, 1);
    assert_eq!(program.submit(&mut unseen), 1);
    program.reap(2);
    assert_eq!(probes.under_way(), 0);
    probes.close();
    let mut unseen = request(&mut program, 2);
    assert_eq!(program.submit(&mut unseen), 1);
    probes.switch_on();
    program.reap(1);
    // What was in this place before was delivered while nobody looked.
    let mut again = request(&mut program, 0);
    again[0].prev_delivered_ns = now();
    program.run(&mut again);
    let counters = probes.counters();
    assert_eq!((counters["requests_seen"], counters["submitted_while_off"]), (2, 2));
    assert_eq!((counters["reap_unmatched"], counters["overwritten"]), (0, 0));
    assert_eq!(row(&probes, "device", "read").count, 2);
    assert_eq!(row(&probes, "crossing_in", "read").count, 0);
}

#[test]
fn requests_that_are_not_ours_are_counted_by_their_kind() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(8, MIB);
    let mut batch: Vec<_> = (0..6)
        .map(|i| program.request(&file.file, i, READ, BLOCK, usize::try_from(i).unwrap() * BLOCK))
        .collect();
    batch[1].iocb[0] = 0x1234; // No tag, submission and event.
    batch[2].iocb[0] = aio_data(64, 0, 1); // A lane beyond those that are traced.
    batch[3].op = 9;
    batch[4].enqueued_ns = 0;
    batch[5].enqueued_ns = u64::MAX;
    assert_eq!(program.submit(&mut batch), 6);
    program.reap(6);
    let counters = probes.counters();
    let found =
        ["untagged", "lane_out_of_range", "bad_operation", "claim_missing", "reap_unmatched"]
            .map(|name| counters[name]);
    assert_eq!(found, [2, 1, 1, 1, 1]);
    assert_eq!(counters["negative_crossing_out"], 1);
    assert_eq!(row(&probes, "crossing_out", "read").count, 1);
    assert_eq!(row(&probes, "host_submit", "read").count, 3);
}

#[test]
fn a_claimed_delivery_outside_of_its_possible_time_is_refused() {
    let Some((_guard, probes)) = probes() else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(9, MIB);
    // Before it was reaped, after the next submission, in between, none.
    let claims = [Some(1), Some(u64::MAX), None, Some(0)];
    for claim in [Some(7)].into_iter().chain(claims) {
        let mut batch = [program.request(&file.file, 0, READ, BLOCK, 0)];
        if let Some(claim) = claim {
            batch[0].prev_delivered_ns = claim;
        }
        program.run(&mut batch);
    }
    assert_eq!(probes.counters()["negative_crossing_in"], 2);
    assert_eq!(row(&probes, "crossing_in", "read").count, 1);
}

#[test]
fn another_process_is_not_recorded_even_with_our_tag() {
    // Number 0 is the idle task's.
    let Some((_guard, probes)) = probes_on(0) else { return };
    let file = TestFile::new(MIB, MIB);
    let mut program = Program::new(10, MIB);
    let mut batch: Vec<_> = (0..16)
        .map(|i| program.request(&file.file, i, READ, BLOCK, usize::try_from(i).unwrap() * BLOCK))
        .collect();
    program.run(&mut batch);
    assert_eq!(probes.rows(), []);
    assert_eq!(troubles(&probes), none());
    let counters = probes.counters();
    assert_eq!(counters["requests_seen"], 0);
    if file.direct && probes.traces_device() {
        // Merged into one block request or not, each has a bio of its own.
        assert!(counters["stamp_foreign"] >= 16, "{counters:?}");
    }
}

#[test]
fn dropped_probes_leave_no_program_behind() {
    let Some((_guard, probes)) = probes() else { return };
    let costs = probes.costs();
    assert!(costs.len() >= 3, "{costs:?}");
    assert!(costs.iter().all(|c| c.verified_instructions > 0), "{costs:?}");
    for cost in &costs {
        say(&format!("{}: {} instructions verified", cost.name, cost.verified_instructions));
    }
    let loaded = || {
        aya::programs::loaded_programs()
            .filter_map(Result::ok)
            .filter(|program| costs.iter().any(|cost| cost.id == u64::from(program.id())))
            .count()
    };
    assert_eq!(loaded(), costs.len());
    drop(probes);
    // The kernel frees them when all CPUs have left them.
    let deadline = Instant::now() + Duration::from_secs(30);
    while loaded() != 0 {
        assert!(Instant::now() < deadline, "{costs:?}");
        std::thread::yield_now();
    }
}
