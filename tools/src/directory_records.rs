//! What a directory's index records of one of its files, for commands that have the directory to
//! themselves.

use std::{
    future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use postern_trusted::{
    counter::{Answer, Counter, Lasting, Moves, Record, Swapped},
    volume::CounterUse,
};

/// The record of one file: the durable one, and what it becomes when the index is written.
#[derive(Clone)]
pub struct Recorded {
    durable: Option<Record>,
    newest: Arc<Mutex<Option<Record>>>,
}

impl Recorded {
    /// As the index has it.
    #[must_use]
    pub fn new(durable: Option<Record>) -> Self {
        Self { durable, newest: Arc::new(Mutex::new(durable)) }
    }

    /// For opening the file's volume.
    #[must_use]
    pub fn used(&self) -> CounterUse {
        CounterUse { counter: Arc::new(self.clone()), moves: Moves::Open, adopt: false }
    }

    /// What it is now.
    #[must_use]
    pub fn newest(&self) -> Option<Record> {
        *self.held()
    }

    fn held(&self) -> MutexGuard<'_, Option<Record>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counter for Recorded {
    fn load(&self) -> Answer<'_, Option<Record>> {
        Box::pin(future::ready(Ok(*self.held())))
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Answer<'_, Swapped> {
        let mut held = self.held();
        let swapped = if *held == old { Swapped::Done } else { Swapped::Lost(*held) };
        if swapped == Swapped::Done {
            *held = Some(new);
        }
        Box::pin(future::ready(Ok(swapped)))
    }

    fn lasting(&self) -> Option<Lasting> {
        Some(Lasting { durable: self.durable, newest: *self.held() })
    }
}
