//! How many control connections without a lane are let in.
//!
//! A lane counts against its session's limits; a connection that has none yet counts here, against
//! its user and its process, until it attaches one or ends.
//!
//! Holds: however many connections one user opens, the other one that may connect still gets in; as
//! far as process ids are known, no process keeps another one of its user out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connections without a lane of one user: as many processes may come over from a daemon that
/// ended at one moment; more of them come again.
pub const MOST_OF_A_USER: usize = 256;
/// Most of one process.
pub const MOST_OF_A_PROCESS: usize = 32;

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Process id; 0 if it is in another namespace.
    pub pid: i32,
}

/// The connections without a lane.
#[derive(Debug, Default)]
pub struct Admission {
    waiting: Mutex<BTreeMap<Peer, usize>>,
}

/// A place of a connection without a lane; free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    peer: Peer,
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crowded {
    /// Its user has [`MOST_OF_A_USER`].
    User,
    /// Its process has [`MOST_OF_A_PROCESS`].
    Process,
}

impl std::fmt::Display for Crowded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User => write!(f, "its user has {MOST_OF_A_USER} connections without a lane"),
            Self::Process => write!(f, "it has {MOST_OF_A_PROCESS} connections without a lane"),
        }
    }
}

impl Admission {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Peer, usize>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in.
    ///
    /// # Errors
    /// [`Crowded`].
    pub fn enter(self: &Arc<Self>, peer: Peer) -> Result<Place, Crowded> {
        let mut waiting = self.lock();
        let of_user = Peer { pid: i32::MIN, ..peer }..=Peer { pid: i32::MAX, ..peer };
        if waiting.range(of_user).map(|(_, count)| count).sum::<usize>() >= MOST_OF_A_USER {
            return Err(Crowded::User);
        }
        let of_process = waiting.get(&peer).copied().unwrap_or_default();
        // Those of another namespace are not told from each other.
        if of_process >= MOST_OF_A_PROCESS && peer.pid != 0 {
            return Err(Crowded::Process);
        }
        waiting.insert(peer, of_process + 1);
        Ok(Place { admission: Arc::clone(self), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.admission.lock();
        if let Some(count) = waiting.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(admission: &Arc<Admission>, uid: u32, pid: i32) -> Result<Place, Crowded> {
        admission.enter(Peer { uid, pid })
    }

    #[test]
    fn a_process_at_its_limit_keeps_no_other_out_and_what_ends_makes_room() {
        let admission = Arc::default();
        let mut places: Vec<_> =
            (0..MOST_OF_A_PROCESS).map(|_| enter(&admission, 1000, 7).unwrap()).collect();
        assert_eq!(enter(&admission, 1000, 7).err(), Some(Crowded::Process));
        places.push(enter(&admission, 1000, 8).unwrap());
        places.swap_remove(3);
        enter(&admission, 1000, 7).unwrap();
        drop(places);
        assert!(admission.lock().is_empty());
    }

    #[test]
    fn a_user_at_its_limit_keeps_no_other_out() {
        let admission = Arc::default();
        // Of processes of other namespaces, which all have the number 0.
        let places: Vec<_> =
            (0..MOST_OF_A_USER).map(|_| enter(&admission, 1000, 0).unwrap()).collect();
        assert_eq!(enter(&admission, 1000, 0).err(), Some(Crowded::User));
        assert_eq!(enter(&admission, 1000, 9).err(), Some(Crowded::User));
        enter(&admission, 0, 9).unwrap();
        enter(&admission, 1001, 0).unwrap();
        drop(places);
        enter(&admission, 1000, 0).unwrap();
    }
}
