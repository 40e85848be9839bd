//! A small executor for the trusted side: one per process, driven by whoever has time.
//!
//! Tasks are futures that wait for host completions, for slots and for each other. There is no
//! thread here: a caller inside io_getevents, a service thread or a synchronous file call drives
//! the queue through [`Executor::run`] while it holds an [`Active`] guard.
//!
//! Holds: a woken task is polled again; if nobody is active when a task becomes ready, the
//! notifier is called (it may wake a sleeping thread, also one of another process).

use alloc::{boxed::Box, collections::VecDeque, sync::Arc, task::Wake};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicU8, AtomicUsize, Ordering},
    task::{Context, Poll, Waker},
};

use crate::sync::Lock;

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A queue of ready tasks.
#[derive(Clone)]
pub struct Executor(Arc<Inner>);

struct Inner {
    ready: Lock<VecDeque<Arc<Task>>>,
    /// Threads that promise to run the queue before they sleep.
    active: AtomicUsize,
    /// Tasks spawned and not finished.
    live: AtomicUsize,
    notify: Box<dyn Fn() + Send + Sync>,
}

const IDLE: u8 = 0;
const QUEUED: u8 = 1;
const RUNNING: u8 = 2;
/// Woken while running: goes back to the queue.
const AGAIN: u8 = 3;

struct Task {
    state: AtomicU8,
    /// Only the thread that moved `state` to RUNNING touches it; the lock is never contended.
    future: Lock<Option<BoxFuture>>,
    executor: Arc<Inner>,
}

impl Inner {
    fn push(&self, task: Arc<Task>) {
        self.put(task);
        // SeqCst pairs with the decrement in `Active::drop`: either we see nobody active, or the
        // one that leaves sees the queue non-empty.
        core::sync::atomic::fence(Ordering::SeqCst);
        if self.active.load(Ordering::SeqCst) == 0 {
            (self.notify)();
        }
    }

    fn put(&self, task: Arc<Task>) {
        self.ready.lock().push_back(task);
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        Self::wake_by_ref(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut seen = self.state.load(Ordering::Acquire);
        loop {
            let next = match seen {
                IDLE => QUEUED,
                RUNNING => AGAIN,
                _ => return,
            };
            match self.state.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(IDLE) => return self.executor.push(self.clone()),
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

/// While it lives, its thread runs the queue before it sleeps.
pub struct Active<'a>(&'a Executor);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let inner = &self.0.0;
        if inner.active.fetch_sub(1, Ordering::SeqCst) == 1 && !inner.ready.lock().is_empty() {
            (inner.notify)();
        }
    }
}

impl Executor {
    /// An empty executor. `notify` is called when a task becomes ready and nobody is active.
    pub fn new(notify: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner {
            ready: Lock::new(VecDeque::with_capacity(256)),
            active: AtomicUsize::new(0),
            live: AtomicUsize::new(0),
            notify: Box::new(notify),
        }))
    }

    /// Declares that the calling thread will run the queue before it sleeps.
    #[must_use]
    pub fn activate(&self) -> Active<'_> {
        self.0.active.fetch_add(1, Ordering::SeqCst);
        Active(self)
    }

    /// Queues `future`. It runs at the next [`Self::run`], for which somebody is woken.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.0.push(self.task(future));
    }

    /// Queues `future` and wakes nobody: the caller runs the queue itself before it returns to the
    /// guest or sleeps. Saves a system call for each request of a busy guest.
    pub fn spawn_to_run(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.0.put(self.task(future));
    }

    fn task(&self, future: impl Future<Output = ()> + Send + 'static) -> Arc<Task> {
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Arc::new(Task {
            state: AtomicU8::new(QUEUED),
            future: Lock::new(Some(Box::pin(future))),
            executor: self.0.clone(),
        })
    }

    /// Polls ready tasks, at most `limit` polls. Returns the number of polls.
    pub fn run(&self, limit: usize) -> usize {
        let mut polls = 0;
        while polls < limit {
            let Some(task) = self.0.ready.lock().pop_front() else { break };
            self.poll(task);
            polls += 1;
        }
        polls
    }

    fn poll(&self, task: Arc<Task>) {
        task.state.store(RUNNING, Ordering::Release);
        let waker = Waker::from(task.clone());
        let mut slot = task.future.lock();
        let Some(future) = slot.as_mut() else { return };
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        if done {
            *slot = None;
            self.0.live.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        drop(slot);
        let back = task.state.compare_exchange(RUNNING, IDLE, Ordering::AcqRel, Ordering::Acquire);
        if back.is_err() {
            task.state.store(QUEUED, Ordering::Release);
            self.0.push(task);
        }
    }

    /// Tasks that have not finished.
    #[must_use]
    pub fn live(&self) -> usize {
        self.0.live.load(Ordering::Relaxed)
    }

    /// Whether a task is ready to run.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.0.ready.lock().is_empty()
    }
}

/// Runs `future` to its end on the spot. For futures whose host answers at once (offline tools,
/// the simulator), where nothing else could make progress in between.
///
/// # Panics
/// If the future waits for something that its own host does not deliver.
pub fn run_to_end<F: Future>(future: F) -> F::Output {
    let mut future = core::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1_000_000_000_u64 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
    panic!("future made no progress on its own host");
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU32;

    /// Pending `n` times, waking itself each time.
    struct Yield(u32);
    impl Future for Yield {
        type Output = ();
        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            if self.0 == 0 {
                return Poll::Ready(());
            }
            self.0 -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    #[test]
    fn every_spawned_task_runs_to_its_end() {
        let executor = Executor::new(|| ());
        let done = Arc::new(AtomicU32::new(0));
        for n in 0..50 {
            let done = done.clone();
            executor.spawn(async move {
                Yield(n % 7).await;
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        let _active = executor.activate();
        while executor.live() > 0 {
            assert!(executor.run(10) > 0);
        }
        assert_eq!(done.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn the_notifier_is_called_exactly_when_nobody_is_active() {
        let calls = Arc::new(AtomicU32::new(0));
        let seen = calls.clone();
        let executor = Executor::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        executor.spawn(async {});
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        let active = executor.activate();
        executor.spawn(async {});
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        drop(active);
        assert_eq!(calls.load(Ordering::Relaxed), 2, "left with work in the queue");
        executor.run(usize::MAX);
        drop(executor.activate());
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        executor.spawn_to_run(async {});
        assert_eq!(calls.load(Ordering::Relaxed), 2, "the caller promised to run it");
        assert_eq!(executor.run(usize::MAX), 1);
    }
}
