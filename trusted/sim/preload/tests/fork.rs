//! References held by descriptor tables across fork, with the family arena as the heap: both
//! processes count in the same memory.
#![allow(unsafe_code)]

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use postern_sim::{arena::FamilyArena, files::table::Table};

#[global_allocator]
static ARENA: FamilyArena = FamilyArena;

/// Counts how often it was dropped, in memory that both processes see.
struct Probe(Arc<AtomicU32>);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

static TABLE: Table<Probe> = Table::new();

/// Forks with the table counted for the child, runs `body` there, and waits for it.
fn in_forked_child(body: impl FnOnce()) {
    let transit = TABLE.fork_prepare();
    // SAFETY: the child only touches the table and ends with _exit.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            TABLE.fork_child();
            core::mem::forget(transit);
            body();
            libc::_exit(0);
        }
        TABLE.fork_parent();
        transit.into_iter().for_each(core::mem::forget);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert_eq!(status, 0);
    }
}

#[test]
fn an_open_file_shared_by_fork_is_dropped_once_and_by_the_last_that_closes_it() {
    let dropped = Arc::new(AtomicU32::new(0));
    for (fd, first_closer_is_child) in [(5, true), (6, false)] {
        dropped.store(0, Ordering::Relaxed);
        assert!(TABLE.insert(fd, Arc::new(Probe(dropped.clone()))).is_ok());
        assert!(TABLE.insert(900, TABLE.get(fd).unwrap()).is_ok());
        if first_closer_is_child {
            in_forked_child(|| drop((TABLE.remove(fd), TABLE.remove(900))));
            assert_eq!(dropped.load(Ordering::Relaxed), 0, "the parent still has it");
            drop(TABLE.remove(900));
            assert_eq!(dropped.load(Ordering::Relaxed), 0, "under another number");
            drop(TABLE.remove(fd));
        } else {
            let seen = dropped.clone();
            let transit = TABLE.fork_prepare();
            TABLE.fork_parent();
            // The parent closes while the child's copies are on their way.
            drop((TABLE.remove(fd), TABLE.remove(900)));
            assert_eq!(seen.load(Ordering::Relaxed), 0, "the child has it");
            drop(transit);
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
    }
}
