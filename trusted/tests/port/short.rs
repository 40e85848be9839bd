//! Results that are less than what was asked.

use std::sync::{Arc, Mutex};

use postern_edl::port::Submission;
use postern_trusted::{
    disk::{Disk, HostError, Transfer},
    exec::Executor,
    port::Lane,
};

use crate::host::{CountingBell, Host, executor, file, pattern};

type End = Arc<Mutex<Option<Result<(), HostError>>>>;

/// Starts a write or read of 8 blocks at place 100.
fn start(executor: &Executor, lane: &Lane, write: bool) -> End {
    let (disk, end) = (file(lane), End::default());
    let seen = end.clone();
    executor.spawn(async move {
        let mut transfer = disk.transfer(8).await.unwrap();
        (0..8).for_each(|n| transfer.put(n, &pattern(n as u64)));
        let answer = if write { transfer.write(100, 8).await } else { transfer.read(100).await };
        *seen.lock().unwrap() = Some(answer);
    });
    end
}

/// Answers each descriptor with the next number of bytes. Returns the descriptors and the end.
fn play(write: bool, script: &[u64]) -> (Vec<Submission>, Option<Result<(), HostError>>, Host) {
    let (mut host, lane) = Host::with_lane(4, 128 << 10, CountingBell::default());
    let executor = executor();
    let end = start(&executor, &lane, write);
    let mut asked = Vec::new();
    for bytes in script {
        executor.run(usize::MAX);
        let mut taken = host.take();
        assert!(taken.len() <= 1);
        let Some(submission) = taken.pop() else { break };
        let result = host.perform(&submission, *bytes);
        host.answer(submission.id, result);
        asked.push(submission);
        assert_eq!(lane.poll(usize::MAX), 1);
    }
    executor.run(usize::MAX);
    assert!(host.take().is_empty(), "nothing is asked beyond the script");
    assert_eq!(lane.fault(), None);
    let end = *end.lock().unwrap();
    (asked, end, host)
}

#[test]
fn the_rest_of_a_short_write_is_written_from_whole_blocks_on() {
    // 8 blocks = 32768 bytes; 5 sectors into the third block, then all the rest.
    let (asked, end, host) = play(true, &[8192 + 5 * 512, 24576]);
    assert_eq!(end, Some(Ok(())));
    assert_eq!((asked[0].offset, asked[0].length), (409_600, 32768));
    assert_eq!((asked[1].offset, asked[1].length), (409_600 + 8192, 24576));
    assert_eq!(asked[1].data, asked[0].data + 8192);
    assert_ne!(asked[0].id, asked[1].id);
    for n in 0..8_u64 {
        let bytes: Vec<u8> = host.blocks[&(100 + n)].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(bytes, pattern(n));
    }
}

#[test]
fn a_write_is_asked_for_again_three_times_and_no_more() {
    let (asked, end, _) = play(true, &[0, 0, 0, 32768]);
    assert_eq!((asked.len(), end), (4, Some(Ok(()))));
    let (asked, end, _) = play(true, &[4096, 512, 0, 4096, 32768]);
    assert_eq!((asked.len(), end), (4, Some(Err(HostError::Errno(5)))));
}

#[test]
fn the_rest_of_a_short_read_is_read() {
    let (asked, end, _) = play(false, &[4096, 8192, 512, 20480]);
    assert_eq!(end, Some(Ok(())));
    let lengths: Vec<_> = asked.iter().map(|sub| sub.length).collect();
    assert_eq!(lengths, [32768, 28672, 20480, 20480]);
}

#[test]
fn a_read_past_the_end_of_the_host_file_is_eio_at_once() {
    let (asked, end, _) = play(false, &[0]);
    assert_eq!((asked.len(), end), (1, Some(Err(HostError::Errno(5)))));
    let (asked, end, _) = play(false, &[12288, 0]);
    assert_eq!((asked.len(), end), (2, Some(Err(HostError::Errno(5)))));
}

#[test]
fn a_place_beyond_the_reach_of_a_byte_offset_is_refused_without_asking_the_host() {
    let (mut host, lane) = Host::with_lane(4, 128 << 10, CountingBell::default());
    let (executor, disk) = (executor(), file(&lane));
    executor.spawn(async move {
        let mut transfer = disk.transfer(2).await.unwrap();
        let invalid = Err(HostError::Errno(22));
        assert_eq!(transfer.read(u64::MAX / 4096).await, invalid, "ends beyond 2^64");
        assert_eq!(transfer.read(1 << 52).await, invalid);
        assert_eq!(transfer.write(0, 3).await, invalid, "longer than the buffer");
        assert_eq!(transfer.write(0, 0).await, invalid);
    });
    executor.run(usize::MAX);
    assert_eq!((executor.live(), host.take().len()), (0, 0));
}
