//! A deterministic executor: which task runs and which host request completes next is drawn.

use alloc::{boxed::Box, sync::Arc, task::Wake, vec::Vec};
use core::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Waker},
};
use std::sync::Mutex;

use super::{counter::SimCounter, disk::SimDisk, recorded::SimIndex};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub(super) struct Runner {
    pub(super) disk: SimDisk,
    /// Answers when the simulation decides, too.
    pub(super) counter: Option<SimCounter>,
    /// The index of the directory that the volume is a file of.
    pub(super) index: Option<SimIndex>,
    tasks: Vec<(Task, Arc<Flag>)>,
}

impl Runner {
    pub(super) fn new(disk: SimDisk) -> Self {
        Self { disk, counter: None, index: None, tasks: Vec::new() }
    }

    pub(super) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push((Box::pin(task), Arc::new(Flag(AtomicBool::new(true)))));
    }

    pub(super) fn live(&self) -> usize {
        self.tasks.len()
    }

    /// One step. `false`: nothing can move any more.
    pub(super) fn step(&mut self) -> bool {
        let ready: Vec<usize> =
            (0..self.tasks.len()).filter(|i| self.tasks[*i].1.0.load(Ordering::SeqCst)).collect();
        let draw = {
            let mut state = self.disk.state();
            state.now += state.rng.0 % 50_000;
            state.rng.next()
        };
        if ready.is_empty() || draw % 3 == 0 {
            let counts = || self.counter.as_ref().is_some_and(SimCounter::complete_one);
            // Rarely the counter first: it is the slower one.
            let before = draw % 7 == 0 && counts();
            let lands = || self.index.as_ref().is_some_and(SimIndex::land);
            let moved = before || self.disk.complete_one() || counts() || lands();
            if moved {
                return true;
            }
            if ready.is_empty() {
                return false;
            }
        }
        let pick = ready[(draw >> 8) as usize % ready.len()];
        let (task, flag) = &mut self.tasks[pick];
        flag.0.store(false, Ordering::SeqCst);
        let waker = Waker::from(flag.clone());
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            drop(self.tasks.swap_remove(pick));
        }
        true
    }

    /// Runs everything to its end.
    pub(super) fn drain(&mut self) {
        while self.live() > 0 {
            assert!(self.step(), "{} tasks wait for each other for ever", self.live());
        }
    }

    /// Runs `future` to its end, with everything else. `None` after `limit` steps.
    pub(super) fn finish<T: Send + 'static>(
        &mut self,
        future: impl Future<Output = T> + Send + 'static,
        limit: u64,
    ) -> Option<T> {
        let result = Arc::new(Mutex::new(None));
        let slot = result.clone();
        self.spawn(async move {
            let output = future.await;
            *slot.lock().unwrap() = Some(output);
        });
        for _ in 0..limit {
            if let Some(output) = result.lock().unwrap().take() {
                return Some(output);
            }
            assert!(self.step(), "{} tasks wait for each other for ever", self.live());
        }
        result.lock().unwrap().take()
    }

    /// Runs `future` to its end.
    pub(super) fn block_on<T: Send + 'static>(
        &mut self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> T {
        self.finish(future, u64::MAX).unwrap()
    }

    /// The process dies: its tasks are gone.
    pub(super) fn kill(&mut self) {
        // Their transfer buffers are gone with them; the disk starts with all of them again.
        self.tasks.clear();
        if let Some(counter) = &self.counter {
            counter.forget_callers();
        }
    }
}
