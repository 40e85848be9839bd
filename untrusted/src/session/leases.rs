//! The leases of sessions: who is asked, who keeps, who loses.
//!
//! Holds: a lease that is taken away is given up only when nothing is in flight on its file, no lane
//! takes a descriptor for it any more, and what was written is flushed.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use postern_edl::{LEASE_ASKED, LEASE_LOST};
use rustix::io::Errno;

use super::{Session, Sessions, State, in_background};
use crate::engine::now_ns;
use crate::lane::Command;
use crate::lease::{Terms, Verdict};
use crate::problem::log;

/// A session that does not come back for a lease this long no longer wants it.
const WISH_LASTS: Duration = Duration::from_secs(2);
/// How often leases are looked at while a file is open.
const LOOK: Duration = Duration::from_millis(20);
/// How often it is looked whether one is.
const LOOK_IDLE: Duration = Duration::from_millis(500);

impl Sessions {
    /// Looks after the leases of all sessions for ever: asks holders, and takes from those who do
    /// not answer. Also ends wishes for records whose time is over.
    pub async fn keep_leases(&self) {
        let mut pause = LOOK_IDLE;
        loop {
            tokio::time::sleep(pause).await;
            self.hub.terms().forget(now_ns());
            pause = LOOK_IDLE;
            let sessions: Vec<_> = self.lock().sessions.values().cloned().collect();
            for session in sessions {
                // One that opens or closes something is looked at next time.
                let Ok(mut state) = session.state.try_lock() else { continue };
                let (asked, lost) = state.look(Instant::now(), &self.terms);
                session.leases.asked.fetch_add(asked, Relaxed);
                if !state.files.is_empty() || !state.wishes.is_empty() {
                    pause = LOOK;
                }
                drop(state);
                if !lost.is_empty() {
                    // What is in flight may take its time; others do not wait for it.
                    tokio::spawn(async move { session.fence(lost).await });
                }
            }
        }
    }
}

impl Session {
    /// The first lease with a handle of `first` or above that is asked for or lost, as
    /// `postern_lease` tells it.
    ///
    /// # Errors
    /// `ENOENT`: there is none.
    pub async fn lease(&self, first: u64) -> Result<(u32, u32), Errno> {
        let state = self.state.lock().await;
        let told = state.files.iter().filter_map(|open| {
            let asked = open.lease.is_asked().then_some(LEASE_ASKED);
            let told = if open.lease.is_lost() { LEASE_LOST } else { asked? };
            (u64::from(open.handle) >= first).then_some((open.handle, told))
        });
        told.min().ok_or(Errno::NOENT)
    }

    /// The session keeps a lease that it was asked for.
    ///
    /// # Errors
    /// `EBADF` for a handle that is not open; `ESTALE` for a lease that is lost.
    pub async fn keep(&self, handle: u32) -> Result<(), Errno> {
        let mut state = self.state.lock().await;
        let open = state.files.iter_mut().find(|open| open.handle == handle);
        let open = open.ok_or(Errno::BADF)?;
        if open.lease.is_lost() {
            return Err(Errno::STALE);
        }
        if open.lease.is_asked() {
            self.leases.kept.fetch_add(1, Relaxed);
        }
        open.lease.kept(Instant::now());
        Ok(())
    }

    /// Lets nobody of the session use these files any more, and gives their leases up when what is
    /// in flight on them has completed.
    async fn fence(&self, handles: Vec<u32>) {
        let mut state = self.state.lock().await;
        // First: whose descriptors are refused can know why.
        state.tell_of_leases();
        for handle in handles {
            state.tell(|done| Command::Close { handle, done }).await;
            let open = state.files.iter_mut().find(|open| open.handle == handle);
            if let Some(file) = open.and_then(|open| open.file.take()) {
                self.leases.taken.fetch_add(1, Relaxed);
                log(
                    "a lease was taken from a program that does not answer",
                    format_args!("session {}, {:?}", self.number, file.name),
                    "its I/O on the volume fails until it takes the lease back",
                );
                let _ = in_background(move || {
                    // What its enclave has written and closed has nobody else who flushes it.
                    if file.writable {
                        let _ = rustix::fs::fdatasync(&file);
                    }
                })
                .await;
            }
        }
    }
}

impl State {
    /// Looks at all leases; tells the lanes if one is asked for. Answers how many are asked for now,
    /// and those that are lost.
    fn look(&mut self, now: Instant, terms: &Terms) -> (u64, Vec<u32>) {
        self.wishes.retain(|wish| now.duration_since(wish.seen) < WISH_LASTS);
        let (mut asked, mut lost) = (0, Vec::new());
        for open in &mut self.files {
            let wanted = open.file.as_ref().is_some_and(|file| file.is_wanted());
            match open.lease.look(wanted, now, terms) {
                Verdict::Rest => {}
                Verdict::Ask => asked += 1,
                Verdict::Revoke => lost.push(open.handle),
            }
        }
        if asked > 0 {
            self.tell_of_leases();
        }
        (asked, lost)
    }

    /// Has every lane's process look at the session's leases.
    fn tell_of_leases(&self) {
        for lane in self.lanes.values() {
            // A lane that has ended has nobody to tell.
            let _ = lane.send(Command::Leases);
        }
    }
}
