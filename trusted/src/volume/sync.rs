//! Making durable: one flush in flight, one forming.
//!
//! Holds: a sync is acknowledged only by a successful flush that was issued after the data it
//! covers had completed and after every journal block up to the one with their records had been
//! written. A failed flush is final: a later success proves nothing about what it lost.

use core::{future::poll_fn, sync::atomic::Ordering, task::Poll};

use super::{
    Volume,
    core::{Health, wake},
};
use crate::{disk::Disk, errno::Errno};

/// Syncs in a row that must have been small before the next one is expected.
const EXPECT_AFTER: u32 = 4;
/// Blocks that a small sync covers at most.
const SMALL: u64 = 8;
/// A sync is expected for this long after the last one, in nanoseconds.
pub(crate) const EXPECT_NS: u64 = 100_000_000;

/// Whose turn it is to flush.
enum Turn {
    Covered,
    Mine { stamp: u64, seq: u64, settled: u64, unsettled: u64 },
}

impl Volume {
    /// fsync, fdatasync: everything that had completed before the call is durable when it returns
    /// `Ok`. Costs one flush (shared with others that wait), and nothing where nothing changed.
    ///
    /// # Errors
    /// `EIO` when the host's flush or the journal failed, now or before: no later call succeeds
    /// until the volume is opened again. `EIO` also when syncs move the monotonic counter and it
    /// does not answer: then a later call that succeeds covers this one, too.
    pub async fn sync<D: Disk>(&self, disk: &D) -> Result<(), Errno> {
        let now = disk.now_ns();
        let (stamp, queued) = {
            let mut core = self.core.lock();
            match core.health {
                Health::Failed => return Err(Errno::EIO),
                Health::ReadOnly => return Ok(()),
                Health::Good => {}
            }
            let expect = &mut core.expect;
            if expect.since > 0 {
                let quick = now.saturating_sub(expect.last_ns) < EXPECT_NS;
                let small = expect.since <= SMALL && (quick || expect.last_ns == 0);
                expect.small = if small { expect.small.saturating_add(1) } else { 0 };
                expect.since = 0;
            }
            expect.last_ns = now.max(1);
            self.expecting.store(expect.small >= EXPECT_AFTER, Ordering::Relaxed);
            (core.stamp, core.journal.queued)
        };
        self.sync_to(disk, stamp, queued).await?;
        self.register_sync().await
    }

    /// Makes completions up to `stamp` and records up to `queued` durable.
    pub(crate) async fn sync_to<D: Disk>(
        &self,
        disk: &D,
        stamp: u64,
        queued: u64,
    ) -> Result<(), Errno> {
        self.publish(disk, queued).await?;
        let seq = self.last_sealed().await;
        if !self.core.lock().is(canary!(EarlySync)) {
            self.written(seq).await?;
        }
        self.flush(disk, stamp, seq).await
    }

    /// Waits for, or makes, a flush that covers completions up to `stamp` and journal blocks up
    /// to `seq`, which have been written.
    pub(crate) async fn flush<D: Disk>(&self, disk: &D, stamp: u64, seq: u64) -> Result<(), Errno> {
        loop {
            let turn = poll_fn(|cx| {
                let mut core = self.core.lock();
                if core.health == Health::Failed {
                    return Poll::Ready(Err(Errno::EIO));
                }
                let early = core.is(canary!(EarlySync));
                if core.flushes.stamp >= stamp && (core.flushes.seq >= seq || early) {
                    return Poll::Ready(Ok(Turn::Covered));
                }
                if core.flushes.running {
                    core.flushes.waiters.add(cx.waker());
                    return Poll::Pending;
                }
                core.flushes.running = true;
                Poll::Ready(Ok(Turn::Mine {
                    stamp: core.stamp,
                    seq: core.journal.complete(),
                    settled: core.journal.settled(),
                    unsettled: core.journal.unsettled,
                }))
            })
            .await?;
            let Turn::Mine { stamp, seq, settled, unsettled } = turn else { return Ok(()) };
            let flushed = disk.flush().await;
            let wakers = {
                let mut core = self.core.lock();
                core.flushes.running = false;
                core.counters.flushes += 1;
                if flushed.is_ok() && core.health != Health::Failed {
                    core.flushes.stamp = core.flushes.stamp.max(stamp);
                    core.flushes.seq = core.flushes.seq.max(seq);
                    core.journal.durable = core.journal.durable.max(settled);
                    core.journal.unsettled -= unsettled.min(core.journal.unsettled);
                    core.flushes.waiters.take()
                } else if core.is(canary!(FlushAgain)) {
                    core.flushes.waiters.take()
                } else {
                    core.fail()
                }
            };
            wake(wakers);
            if flushed.is_err() {
                return Err(Errno::EIO);
            }
        }
    }
}
