//! The gate that is shut while a process ends, in a process in which nobody has shut it before.

use std::sync::mpsc;

use postern_sim::inside::{Scope, gate};

#[test]
fn a_thread_that_came_first_of_all_is_seen_to_be_inside() {
    let (came, seen) = mpsc::channel();
    let (go, waits) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let _inside = Scope::new();
        came.send(()).unwrap();
        let _ = waits.recv();
    });
    seen.recv().unwrap();
    assert!(gate::try_shut());
    assert!(!gate::all_are_out());
    drop(go);
    thread.join().unwrap();
    assert!(gate::all_are_out());
    gate::open();
}
