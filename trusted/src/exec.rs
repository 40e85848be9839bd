//! A small executor for the trusted side: one per process, driven by whoever has time.
//!
//! Tasks are futures that wait for host completions, for slots and for each other. There is no
//! thread here: a caller inside io_getevents, a service thread or a synchronous file call drives
//! the queue through [`Executor::run`] while it holds an [`Active`] guard.
//!
//! Holds: a woken task is polled again; if nobody is active when a task becomes ready, the
//! notifier is called (it may wake a sleeping thread, also one of another process).

use alloc::{
    boxed::Box,
    collections::VecDeque,
    sync::{Arc, Weak},
    task::Wake,
    vec::Vec,
};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicU8, AtomicUsize, Ordering},
    task::{Context, Poll, Waker},
};

use crate::sync::Lock;

/// Idle tasks that a [`Pool`] keeps for reuse.
const KEPT: usize = 1024;

/// A queue of ready tasks.
#[derive(Clone)]
pub struct Executor(Arc<Inner>);

struct Inner {
    ready: Lock<VecDeque<Arc<dyn Run>>>,
    /// Length of `ready`, for looks without the lock. Written under it.
    queued: AtomicUsize,
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

/// A task of whatever future.
trait Run: Send + Sync {
    /// Polls it once.
    fn run(self: Arc<Self>);
}

/// A future, or the room for one: a pool uses it again for the next.
struct Task<F> {
    state: AtomicU8,
    /// Only the thread that moved `state` to RUNNING polls it; so the lock is contended only where
    /// a late wake-up meets the next future.
    future: Lock<Pin<Box<Option<F>>>>,
    executor: Arc<Inner>,
    /// Where it waits for its next future.
    home: Weak<Home<F>>,
}

/// Tasks without a future.
struct Home<F>(Lock<Vec<Arc<Task<F>>>>);

impl Inner {
    fn push(&self, task: Arc<dyn Run>) {
        self.put(task);
        // SeqCst pairs with the decrement in `Active::drop`: either we see nobody active, or the
        // one that leaves sees the queue non-empty.
        core::sync::atomic::fence(Ordering::SeqCst);
        if self.active.load(Ordering::SeqCst) == 0 {
            (self.notify)();
        }
    }

    fn pop(&self) -> Option<Arc<dyn Run>> {
        let mut ready = self.ready.lock();
        let task = ready.pop_front();
        self.queued.store(ready.len(), Ordering::Release);
        task
    }

    fn put(&self, task: Arc<dyn Run>) {
        let mut ready = self.ready.lock();
        ready.push_back(task);
        self.queued.store(ready.len(), Ordering::Release);
    }
}

impl<F: Future<Output = ()> + Send + 'static> Task<F> {
    fn new(executor: Arc<Inner>, home: Weak<Home<F>>, future: Option<F>) -> Arc<Self> {
        let future = Lock::new(Box::pin(future));
        Arc::new(Self { state: AtomicU8::new(IDLE), future, executor, home })
    }

    /// Notes a wake-up; answers whether the task must be queued.
    fn must_queue(&self) -> bool {
        let mut seen = self.state.load(Ordering::Acquire);
        loop {
            let next = match seen {
                IDLE => QUEUED,
                RUNNING => AGAIN,
                _ => return false,
            };
            match self.state.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(was) => return was == IDLE,
                Err(now) => seen = now,
            }
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Wake for Task<F> {
    fn wake(self: Arc<Self>) {
        Self::wake_by_ref(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.must_queue() {
            self.executor.push(self.clone());
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Run for Task<F> {
    fn run(self: Arc<Self>) {
        self.state.store(RUNNING, Ordering::Release);
        let waker = Waker::from(self.clone());
        let mut slot = self.future.lock();
        // A waker that outlived its future polls nothing, or the next future once too often.
        let done = slot
            .as_mut()
            .as_pin_mut()
            .is_some_and(|future| future.poll(&mut Context::from_waker(&waker)).is_ready());
        if done {
            slot.set(None);
            self.executor.live.fetch_sub(1, Ordering::Relaxed);
        }
        drop(slot);
        let back = self.state.compare_exchange(RUNNING, IDLE, Ordering::AcqRel, Ordering::Acquire);
        if back.is_err() {
            // Woken meanwhile: for a future that is done, in vain.
            self.state.store(if done { IDLE } else { QUEUED }, Ordering::Release);
            if !done {
                let executor = self.executor.clone();
                return executor.push(self);
            }
        }
        if done && let Some(home) = self.home.upgrade() {
            let mut idle = home.0.lock();
            if idle.len() < idle.capacity() {
                idle.push(self);
            }
        }
    }
}

/// Starts futures of one kind, made from an `A` each.
pub trait Start<A>: Send + Sync {
    /// Queues the future for `argument` and wakes nobody: the caller runs the queue itself before
    /// it returns to the guest or sleeps.
    fn start(&self, argument: A);
}

/// Futures of one kind whose tasks are used again: nothing is allocated once as many tasks exist
/// as are in flight at a time.
struct Pool<A, F> {
    make: fn(A) -> F,
    executor: Arc<Inner>,
    home: Arc<Home<F>>,
}

impl<A, F: Future<Output = ()> + Send + 'static> Start<A> for Pool<A, F> {
    fn start(&self, argument: A) {
        let future = (self.make)(argument);
        self.executor.live.fetch_add(1, Ordering::Relaxed);
        let idle = self.home.0.lock().pop();
        let task = match idle {
            Some(task) => {
                task.future.lock().set(Some(future));
                task
            }
            None => Task::new(self.executor.clone(), Arc::downgrade(&self.home), Some(future)),
        };
        if task.must_queue() {
            self.executor.put(task);
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

/// While it lives, [`Executor::live`] counts one more.
pub struct Counted<'a>(&'a Executor);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Executor {
    /// An empty executor. `notify` is called when a task becomes ready and nobody is active.
    pub fn new(notify: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner {
            ready: Lock::new(VecDeque::with_capacity(256)),
            queued: AtomicUsize::new(0),
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
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Task::new(self.0.clone(), Weak::new(), Some(future)).wake();
    }

    /// A starter of futures made by `make`, for what happens too often to allocate each time.
    pub fn pool<A, F>(&self, make: fn(A) -> F) -> Box<dyn Start<A>>
    where
        A: 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let home = Arc::new(Home(Lock::new(Vec::with_capacity(KEPT))));
        Box::new(Pool { make, executor: self.0.clone(), home })
    }

    /// Polls ready tasks, at most `limit` polls. Returns the number of polls.
    pub fn run(&self, limit: usize) -> usize {
        let mut polls = 0;
        while polls < limit {
            let Some(task) = self.0.pop() else { break };
            task.run();
            polls += 1;
        }
        polls
    }

    /// Counts work that is no task as one that has not finished.
    #[must_use]
    pub fn count(&self) -> Counted<'_> {
        self.0.live.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }

    /// Tasks that have not finished.
    #[must_use]
    pub fn live(&self) -> usize {
        self.0.live.load(Ordering::Relaxed)
    }

    /// Whether a task is ready to run. Takes no lock: spinning threads look here all the time, and
    /// one that is killed must not be found holding anything.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        // Pairs with the fence in `push`: whoever announced that it will sleep sees the task here,
        // or is seen by whoever queues it.
        core::sync::atomic::fence(Ordering::SeqCst);
        self.0.queued.load(Ordering::Acquire) > 0
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
        executor.pool(|()| async {}).start(());
        assert_eq!(calls.load(Ordering::Relaxed), 2, "the caller promised to run it");
        assert_eq!(executor.run(usize::MAX), 1);
    }

    #[test]
    fn a_pool_uses_its_tasks_again() {
        let executor = Executor::new(|| ());
        let pool = executor.pool(|(n, done): (u32, Arc<AtomicU32>)| async move {
            Yield(n % 3).await;
            done.fetch_add(1, Ordering::Relaxed);
        });
        let done = Arc::new(AtomicU32::new(0));
        let _active = executor.activate();
        for round in 1..=20 {
            for n in 0..10 {
                pool.start((n, done.clone()));
            }
            while executor.run(7) > 0 {}
            assert_eq!((executor.live(), done.load(Ordering::Relaxed)), (0, 10 * round));
        }
        assert_eq!(Arc::strong_count(&done), 1, "a future is dropped when it is done");
    }

    #[test]
    fn a_late_wake_up_does_the_next_future_no_harm() {
        type Kept = Arc<Lock<Option<Waker>>>;
        let executor = Executor::new(|| ());
        let pool = executor.pool(|(kept, done): (Kept, Arc<AtomicU32>)| async move {
            core::future::poll_fn(|cx| {
                *kept.lock() = Some(cx.waker().clone());
                Poll::Ready(())
            })
            .await;
            Yield(1).await;
            done.fetch_add(1, Ordering::Relaxed);
        });
        let (kept, done) = (Kept::default(), Arc::new(AtomicU32::new(0)));
        let _active = executor.activate();
        for round in 0..5 {
            pool.start((kept.clone(), done.clone()));
            // The waker of the round before: its task has this round's future now.
            if let Some(late) = kept.lock().clone() {
                late.wake();
            }
            while executor.run(1) > 0 {}
            assert_eq!(done.load(Ordering::Relaxed), round + 1);
            if let Some(late) = kept.lock().clone() {
                late.wake();
            }
            assert_eq!(executor.run(usize::MAX), 1, "polled in vain");
        }
    }
}
