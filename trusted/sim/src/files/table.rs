//! Descriptor numbers to objects: one word per number, private to the process.
//!
//! A word is empty, marks a descriptor of our own, or points to an object in the family arena
//! together with one reference to it. fork() copies the words; the references the copies stand for
//! are taken before the fork ([`Table::fork_prepare`]), so that no moment exists at which a
//! process holds a pointer that is not counted.
//!
//! Holds: a word that points to an object owns one strong reference. A lookup locks its word for
//! the few instructions that raise the count, so an object cannot die between load and increment.
#![allow(unsafe_code)]

use core::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
};
use std::sync::Arc;

use crate::{message, process, sys};

/// Descriptor numbers a table covers: 0..SLOTS. Higher ones are never protected.
pub const SLOTS: usize = 65536;

const EMPTY: usize = 0;
/// Set while a lookup raises the count or a writer replaces the word.
const LOCKED: usize = 1;
/// A descriptor of our own.
const INTERNAL: usize = 2;

/// What a descriptor number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing of ours: the kernel alone knows.
    Other,
    /// A descriptor of the simulated enclave itself: the guest must not touch it.
    Internal,
    /// A placeholder for a protected file.
    Protected,
}

/// A table of objects by descriptor number.
pub struct Table<T> {
    words: [AtomicUsize; SLOTS],
    /// One past the highest number ever used: bounds every scan.
    high: AtomicUsize,
    /// Held by writers, and across a fork: 0, or the thread that holds it.
    writer: AtomicU32,
    objects: PhantomData<Arc<T>>,
}

/// Writers' exclusion while it lives.
struct Writing<'a, T>(&'a Table<T>);

impl<T> Drop for Writing<'_, T> {
    fn drop(&mut self) {
        self.0.writer.store(0, Ordering::Release);
    }
}

impl<T: Send + Sync> Default for Table<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Send + Sync> Table<T> {
    /// A table without entries.
    #[must_use]
    pub const fn new() -> Self {
        const { assert!(align_of::<T>() >= 4, "the low two bits of a pointer carry marks") };
        Self {
            words: [const { AtomicUsize::new(EMPTY) }; SLOTS],
            high: AtomicUsize::new(0),
            writer: AtomicU32::new(0),
            objects: PhantomData,
        }
    }

    /// The words themselves, [`SLOTS`] of them; an empty one is 0.
    #[must_use]
    pub const fn words(&self) -> *const AtomicUsize {
        self.words.as_ptr()
    }

    fn slot(&self, fd: i32) -> Option<&AtomicUsize> {
        self.words.get(usize::try_from(fd).ok()?)
    }

    /// What `fd` stands for. One load.
    #[inline]
    pub fn kind(&self, fd: i32) -> Kind {
        match self.slot(fd).map_or(EMPTY, |slot| slot.load(Ordering::Acquire)) & !LOCKED {
            EMPTY => Kind::Other,
            INTERNAL => Kind::Internal,
            _ => Kind::Protected,
        }
    }

    /// The object behind `fd`.
    pub fn get(&self, fd: i32) -> Option<Arc<T>> {
        let slot = self.slot(fd)?;
        // The usual case: nothing of ours, nothing to lock.
        if slot.load(Ordering::Relaxed) & !(LOCKED | INTERNAL) == EMPTY {
            return None;
        }
        let word = lock(slot);
        let found = object(word).map(|at| {
            // SAFETY: 1. The word owns a strong reference, so the count is at least one. 2. It
            //    stays so while the word is locked: `replace` waits for the lock.
            unsafe {
                Arc::increment_strong_count(at);
                Arc::from_raw(at)
            }
        });
        slot.store(word, Ordering::Release); // Pairs with the Acquire in `lock`.
        found
    }

    /// Enters `object` at `fd`, and answers what was there. `Err` gives it back: the number is
    /// outside the table or one of our own.
    ///
    /// # Errors
    /// The object itself.
    pub fn insert(&self, fd: i32, object: Arc<T>) -> Result<Option<Arc<T>>, Arc<T>> {
        let _writing = self.write();
        if self.slot(fd).is_none() || self.kind(fd) == Kind::Internal {
            return Err(object);
        }
        Ok(self.replace(fd, Arc::into_raw(object) as usize))
    }

    /// Takes the entry at `fd` out. A descriptor of our own stays.
    pub fn remove(&self, fd: i32) -> Option<Arc<T>> {
        if self.kind(fd) != Kind::Protected {
            return None;
        }
        let _writing = self.write();
        if self.kind(fd) == Kind::Protected { self.replace(fd, EMPTY) } else { None }
    }

    /// Marks `fd` as our own. `false` if the number is outside the table.
    pub fn mark_internal(&self, fd: i32) -> bool {
        let _writing = self.write();
        if self.slot(fd).is_none() {
            return false;
        }
        drop(self.replace(fd, INTERNAL));
        true
    }

    /// Takes back the mark that `fd` is our own.
    pub fn unmark_internal(&self, fd: i32) {
        let _writing = self.write();
        if self.kind(fd) == Kind::Internal {
            drop(self.replace(fd, EMPTY));
        }
    }

    /// The first number in `from..=to` whose kind is `kind`.
    pub fn first(&self, kind: Kind, from: u32, to: u32) -> Option<i32> {
        let from = usize::try_from(from).ok()?;
        let end = usize::try_from(to).unwrap_or(usize::MAX).saturating_add(1);
        let end = end.min(self.high.load(Ordering::Acquire));
        (from..end).filter_map(|at| i32::try_from(at).ok()).find(|&fd| self.kind(fd) == kind)
    }

    /// Takes one more reference for every entry, for the copy that a fork is about to make, and
    /// keeps writers out until [`Self::fork_parent`] or [`Self::fork_child`]. The references pass
    /// to the child: forget the answer if the fork came about, drop it if it did not.
    #[must_use]
    pub fn fork_prepare(&self) -> Vec<Arc<T>> {
        core::mem::forget(self.write());
        (0..self.used().len()).filter_map(|at| self.get(i32::try_from(at).ok()?)).collect()
    }

    /// After the fork, in the parent.
    pub fn fork_parent(&self) {
        self.writer.store(0, Ordering::Release);
    }

    /// After the fork, in the child: opens what other threads of the parent held at that moment.
    pub fn fork_child(&self) {
        for word in self.used() {
            word.fetch_and(!LOCKED, Ordering::AcqRel);
        }
        self.writer.store(0, Ordering::Release);
    }

    fn used(&self) -> &[AtomicUsize] {
        &self.words[..self.high.load(Ordering::Acquire).min(SLOTS)]
    }

    fn write(&self) -> Writing<'_, T> {
        let me = sys::gettid();
        while let Err(holder) =
            self.writer.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed)
        {
            if holder == me {
                // It would wait for ever.
                message::say_fault("a thread waits for the descriptor table that it holds");
                process::abort();
            }
            sys::yield_now();
        }
        Writing(self)
    }

    /// Puts `word` at `fd`; the caller is the writer and `fd` is inside the table.
    fn replace(&self, fd: i32, word: usize) -> Option<Arc<T>> {
        let slot = self.slot(fd)?;
        let number = usize::try_from(fd).unwrap_or(0);
        self.high.fetch_max(number + 1, Ordering::AcqRel);
        let old = lock(slot);
        slot.store(word, Ordering::Release);
        // SAFETY: the word owned one reference, which passes to the caller.
        object(old).map(|at| unsafe { Arc::from_raw(at) })
    }
}

/// Locks a word and answers it without the mark. Held for a few instructions.
fn lock(slot: &AtomicUsize) -> usize {
    let mut spins = 0_u32;
    loop {
        let word = slot.load(Ordering::Relaxed) & !LOCKED;
        if slot
            .compare_exchange_weak(word, word | LOCKED, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            return word;
        }
        spins += 1;
        if spins.is_multiple_of(128) {
            sys::yield_now();
        }
        core::hint::spin_loop();
    }
}

/// The object a word without the lock mark points to.
fn object<T>(word: usize) -> Option<*const T> {
    (word != EMPTY && word != INTERNAL).then_some(word as *const T)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(8))]
    struct Object;

    fn table() -> Box<Table<Object>> {
        // Half a megabyte: not on the stack.
        // SAFETY: all-zero is the empty table.
        unsafe { Box::<Table<Object>>::new_zeroed().assume_init() }
    }

    #[test]
    fn a_number_leads_to_the_object_entered_until_it_is_removed() {
        let table = table();
        let object = Arc::new(Object);
        assert!(table.get(7).is_none());
        assert!(table.insert(7, object.clone()).is_ok_and(|old| old.is_none()));
        assert!(table.insert(1000, object.clone()).is_ok());
        assert_eq!((table.kind(7), table.kind(8)), (Kind::Protected, Kind::Other));
        assert!(Arc::ptr_eq(&table.get(7).unwrap(), &object));
        assert_eq!(Arc::strong_count(&object), 3);
        assert!(table.remove(1000).is_some_and(|old| Arc::ptr_eq(&old, &object)));
        assert!(table.remove(1000).is_none());
        drop(table.remove(7));
        assert_eq!(Arc::strong_count(&object), 1);
    }

    #[test]
    fn numbers_outside_the_table_and_our_own_are_refused() {
        let table = table();
        assert!(table.mark_internal(5));
        for fd in [-1, i32::MIN, 65536, i32::MAX, 5] {
            assert!(table.insert(fd, Arc::new(Object)).is_err(), "{fd}");
            assert!(table.get(fd).is_none() && table.remove(fd).is_none());
        }
        assert_eq!(table.first(Kind::Internal, 0, u32::MAX), Some(5));
        assert_eq!(table.first(Kind::Internal, 6, u32::MAX), None);
        table.unmark_internal(5);
        assert_eq!(table.kind(5), Kind::Other);
        assert!(table.insert(5, Arc::new(Object)).is_ok());
    }

    #[test]
    fn a_fork_takes_one_reference_per_entry_and_a_failed_one_gives_them_back() {
        let table = table();
        let object = Arc::new(Object);
        for fd in [3, 4, 600] {
            assert!(table.insert(fd, object.clone()).is_ok());
        }
        let transit = table.fork_prepare();
        assert_eq!(Arc::strong_count(&object), 1 + 3 + 3);
        table.fork_parent();
        drop(transit);
        assert_eq!(Arc::strong_count(&object), 1 + 3);
        core::mem::forget(table.fork_prepare());
        table.fork_parent();
        assert_eq!(Arc::strong_count(&object), 1 + 3 + 3);
        core::mem::forget(table.fork_prepare());
        // What a thread of the parent held at the moment of the fork must not stop the child.
        table.words[3].fetch_or(LOCKED, Ordering::Relaxed);
        table.fork_child();
        assert!(table.get(3).is_some() && table.remove(4).is_some());
    }

    #[test]
    fn lookups_that_race_with_replacement_never_see_a_dead_object() {
        let table = Arc::<Table<Object>>::from(table());
        let live = Arc::new(Object);
        assert!(table.insert(9, live.clone()).is_ok());
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let table = table.clone();
                std::thread::spawn(move || {
                    (0..20_000)
                        .filter(|_| table.get(9).is_some_and(|o| Arc::strong_count(&o) > 0))
                        .count()
                })
            })
            .collect();
        for _ in 0..2_000 {
            assert!(table.insert(9, Arc::new(Object)).is_ok());
        }
        for reader in readers {
            assert_eq!(reader.join().unwrap(), 20_000);
        }
        assert_eq!(Arc::strong_count(&live), 1);
    }
}
