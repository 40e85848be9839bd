//! What the hot path allocates: nothing.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use postern_trusted::aio::FileTraits;

use crate::{
    Aio, Postern,
    guest::{Batch, Events, Iocb},
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

// SAFETY: passes everything on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends may allocate after its counter is gone.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn submitting_and_reaping_allocates_nothing_once_it_has_been_done_before() {
    let aio = Postern::new();
    let file = aio.process.open_controlled(FileTraits::REGULAR);
    let iocbs: Vec<Iocb> =
        (0..32).map(|data| Iocb { fd: file.fd(), data, ..Iocb::default() }).collect();
    let batch = Batch::new(&iocbs);
    let ctx = aio.context(32);
    let events = Events::new(32);
    let round = || {
        assert_eq!(aio.submit(ctx, &batch), 32);
        for _ in 0..32 {
            file.complete(Ok(0));
        }
        assert_eq!(aio.reap(ctx, 32, &events), 32);
    };
    // The double's own queue grows.
    round();
    let before = allocations();
    assert!(before > 0, "the counter counts");
    for _ in 0..100 {
        round();
    }
    assert_eq!(allocations(), before);
    assert_eq!(aio.io_destroy(ctx), 0);
}
