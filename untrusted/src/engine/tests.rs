use super::*;

struct Bench {
    engine: Engine,
    enclave: Region,
    handle: u32,
    directory: tempfile::TempDir,
}

/// An engine over a fresh port, with a 64 KiB buffered file (nothing here depends on O_DIRECT).
fn bench(entries: usize) -> Bench {
    bench_with(entries, LaneShare::unlimited())
}

fn bench_with(entries: usize, share: LaneShare) -> Bench {
    bench_over(entries, share, Interface::Libaio)
}

fn bench_over(entries: usize, share: LaneShare, interface: Interface) -> Bench {
    let (region, enclave, doorbells) = fuzz::fresh_port(entries, 1 << 20);
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![7u8; 65536]).unwrap();
    let roots = [directory.path().to_owned()];
    let catalog = crate::files::Catalog::new(&[], &roots, &[], true).unwrap();
    let mut engine = Engine::new(region, 0, doorbells, Arc::default(), share, interface).unwrap();
    let handle = MAX_FILES as u32;
    let crate::files::Opening::Leased(file) =
        catalog.open("disk", 0, std::time::Instant::now()).unwrap()
    else {
        panic!("somebody has the lease of a file that is ours");
    };
    engine.add_file(handle, Arc::new(file));
    Bench { engine, enclave, handle, directory }
}

impl Bench {
    fn publish(&self, at: u64, submission: Submission) {
        let word = self.enclave.geometry().sqe_word(at);
        for (i, value) in submission.to_words().into_iter().enumerate() {
            self.enclave.word(word + i).store(value, Ordering::Relaxed);
        }
        self.enclave.word(cursor::SQ_PUBLISHED).store(at + 1, Ordering::Release);
    }

    fn completion(&self, n: u64) -> Completion {
        let word = self.enclave.geometry().cqe_word(n);
        Completion::from_words(std::array::from_fn(|i| {
            self.enclave.word(word + i).load(Ordering::Relaxed)
        }))
    }

    fn published(&self) -> u64 {
        self.enclave.word(cursor::CQ_PUBLISHED).load(Ordering::Acquire)
    }

    /// A turn of the engine, and what its owner does after it.
    fn turn(&mut self) {
        self.engine.turn().unwrap();
        let work: Vec<_> = self.engine.take_work().collect();
        for work in work {
            self.engine.done(work.index, work.run());
        }
    }

    fn flush(&self, id: u64) -> Submission {
        Submission { id, op: op::FLUSH as u32, handle: self.handle, ..Submission::default() }
    }
}

/// The kernels at hand all have an asynchronous fdatasync, so its refusal is played.
#[test]
fn a_flush_the_kernel_has_no_operation_for_goes_to_a_thread_and_completes_once() {
    let mut bench = bench(8);
    bench.publish(0, bench.flush(5 << 32 | 3));
    assert!(bench.engine.take().unwrap());
    bench.engine.refused_by_kernel(Errno::INVAL);
    bench.engine.publish();
    assert_eq!((bench.published(), bench.engine.is_drained()), (0, false));
    let flushes: Vec<_> = bench.engine.take_work().collect();
    assert_eq!((flushes.len(), flushes[0].index, flushes[0].act), (1, 3, Act::Flush));
    bench.engine.done(flushes[0].index, flushes[0].run());
    assert_eq!((bench.published(), bench.engine.is_drained()), (1, true));
    assert_eq!((bench.completion(0).id, bench.completion(0).result), (5 << 32 | 3, 0));
}

#[test]
fn a_short_flush_is_done_here_if_nothing_else_is_in_flight() {
    let mut bench = bench(8);
    bench.engine.flushes.learn(1000);
    bench.publish(0, bench.flush(1));
    assert!(bench.engine.turn().unwrap());
    let alone: Vec<_> = bench.engine.take_work().collect();
    assert_eq!((alone.len(), alone[0].place, alone[0].act), (1, Place::Here, Act::Flush));
    assert_eq!((bench.published(), bench.engine.is_drained()), (0, false));
    // Beside it, another one goes to the kernel.
    bench.publish(1, bench.flush(2));
    assert!(bench.engine.turn().unwrap());
    assert_eq!(bench.engine.take_work().count(), 0);
    bench.engine.done(alone[0].index, alone[0].run());
    while bench.published() < 2 {
        bench.turn();
    }
    let mut results = [0, 1].map(|n| (bench.completion(n).id, bench.completion(n).result));
    results.sort_unstable();
    assert_eq!(results, [(1, 0), (2, 0)]);
    assert!(bench.engine.is_drained());
}

#[test]
fn a_discard_goes_to_a_thread_and_leaves_the_rest_of_the_file_and_its_length() {
    let mut bench = bench(8);
    bench.engine.serve_discards();
    let (offset, length) = (8192, 16384);
    let discard = Submission { op: op::DISCARD as u32, offset, length, ..bench.flush(2) };
    bench.publish(0, discard);
    assert!(bench.engine.turn().unwrap());
    let work: Vec<_> = bench.engine.take_work().collect();
    assert_eq!((work.len(), work[0].act), (1, Act::Discard { offset, length }));
    assert_eq!((bench.published(), bench.engine.is_drained()), (0, false));
    let result = work[0].run();
    bench.engine.done(work[0].index, result);
    assert_eq!((bench.completion(0).id, bench.completion(0).result), (2, result));
    if result == -i64::from(libc::EOPNOTSUPP) {
        eprintln!("SKIPPED: the temporary directory's file system punches no holes");
        return;
    }
    assert_eq!(result, 0);
    let bytes = std::fs::read(bench.directory.path().join("disk")).unwrap();
    let hole = 8192..24576;
    assert_eq!(bytes.len(), 65536);
    assert!(
        bytes.iter().enumerate().all(|(i, byte)| *byte == if hole.contains(&i) { 0 } else { 7 })
    );
}

#[test]
fn a_discard_that_was_not_agreed_on_is_refused_and_leaves_the_file_alone() {
    let mut bench = bench(8);
    let discard =
        Submission { op: op::DISCARD as u32, offset: 8192, length: 16384, ..bench.flush(2) };
    bench.publish(0, discard);
    assert!(bench.engine.turn().unwrap());
    assert_eq!(bench.engine.take_work().count(), 0);
    let answer = bench.completion(0);
    assert_eq!((answer.id, answer.result), (2, -i64::from(libc::EINVAL)));
    let bytes = std::fs::read(bench.directory.path().join("disk")).unwrap();
    assert!(bytes == [7; 65536]);
}

#[test]
fn another_refusal_by_the_kernel_is_the_requests_result() {
    let mut bench = bench(8);
    bench.publish(0, bench.flush(0));
    assert!(bench.engine.take().unwrap());
    bench.engine.refused_by_kernel(Errno::NOMEM);
    bench.engine.publish();
    assert_eq!((bench.published(), bench.completion(0).result), (1, -12));
    assert!(bench.engine.is_drained());
}

/// What came before the broken descriptor is carried out; the rest is not looked at.
#[test]
fn a_broken_id_ends_the_lane_after_what_was_taken_before_it() {
    for hostile in [8, u64::MAX, 1 << 32 | 1] {
        let mut bench = bench(8);
        bench.publish(0, bench.flush(1));
        bench.publish(1, bench.flush(hostile));
        bench.publish(2, bench.flush(2));
        assert_eq!(bench.engine.turn(), Err(BrokenRing::Id { id: hostile }));
        bench.engine.stop();
        while !bench.engine.is_drained() {
            bench.engine.turn().unwrap();
        }
        assert_eq!((bench.published(), bench.completion(0).id), (1, 1));
    }
}

#[test]
fn a_cursor_beyond_the_ring_takes_nothing() {
    for hostile in [9, u64::MAX, 1 << 63] {
        let mut bench = bench(8);
        bench.enclave.word(cursor::SQ_PUBLISHED).store(hostile, Ordering::Release);
        let broken = Err(BrokenRing::Cursor { published: hostile, taken: 0 });
        assert_eq!(bench.engine.turn(), broken);
        assert!(bench.engine.is_drained());
    }
}

#[test]
fn a_stopped_engine_takes_nothing_more() {
    let mut bench = bench(8);
    bench.publish(0, bench.flush(1));
    bench.engine.stop();
    assert_eq!(bench.engine.turn(), Ok(false));
    assert!(bench.engine.is_drained() && bench.engine.prepare_sleep());
    assert_eq!(bench.published(), 0);
}

#[test]
fn an_engine_does_not_sleep_over_a_published_descriptor_and_says_when_it_sleeps() {
    let mut bench = bench(8);
    let sleeps = |bench: &Bench| bench.enclave.word(cursor::DAEMON_SLEEPS).load(Ordering::Relaxed);
    assert!(bench.engine.prepare_sleep());
    assert_eq!(sleeps(&bench), 1);
    bench.engine.awake();
    assert_eq!(sleeps(&bench), 0);
    bench.publish(0, bench.flush(1));
    assert!(!bench.engine.prepare_sleep());
}

#[test]
fn dropping_an_engine_waits_for_the_kernel_and_then_lets_files_go() {
    let mut bench = bench(8);
    bench.publish(0, bench.flush(1));
    bench.engine.turn().unwrap();
    let file = Arc::clone(bench.engine.files.at(0).unwrap());
    drop(bench.engine);
    assert_eq!(Arc::strong_count(&file), 1);
}

#[test]
fn an_engine_at_its_sessions_depth_sleeps_over_the_rest_and_takes_it_when_something_ended() {
    let limits = crate::limits::Limits { depth: 2, ..Default::default() };
    let account = Arc::new(crate::limits::Account::new(Arc::new(limits), 1, 0));
    let mut bench = bench_with(8, account.enter(0).unwrap());
    for n in 0..3 {
        bench.publish(n, bench.flush(n));
    }
    assert!(bench.engine.take().unwrap());
    let taken = |bench: &Bench| bench.enclave.word(cursor::SQ_TAKEN).load(Ordering::Relaxed);
    assert_eq!(taken(&bench), 2);
    assert!(bench.engine.submit());
    assert!(!bench.engine.take().unwrap());
    assert!(!bench.engine.has_submissions(), "or it would spin");
    while bench.published() < 3 {
        bench.turn();
    }
    assert!(bench.engine.is_drained());
    assert_eq!(account.row().in_flight, 0);
}
