//! Giving places that became free back to the host.
//!
//! Holds: a place is discarded only when the durable space map says that it is free, no later
//! state named it, and nobody can be given it until the host has answered (rule R1 and the
//! exclusion of FORMAT.md); one discard of at most [`PIECE`] blocks is in flight. The places
//! written at format for the map's nodes are never given back, and neither is more than a quarter
//! of what is free at once.
//! Nothing relies on the host: what lies at a discarded place is never believed.
//!
//! Places rest first: those that the next overwrites take again stay warm, because a hole costs
//! half the speed of the next write there.

use alloc::{collections::BTreeMap, vec::Vec};

use super::{Volume, core::Core, layout::REGION, places::Places, space::Run};
use crate::disk::Disk;

/// Shortest run worth a host call, in blocks: 1 MiB.
const LEAST: u64 = 256;
/// Longest run of one host call, in blocks: 32 MiB.
const PIECE: u64 = 8192;
/// Places between two runs that are looked at as one, in blocks: as many as a home has to spare.
const GAP: u64 = 32;
/// Runs remembered; the shortest are forgotten first.
const MOST: usize = 4096;
/// Discards of one turn in the background.
const TURN: usize = 8;
/// Discards when the volume is closed.
const AT_CLOSE: usize = 256;
/// A freed place rests at least this long, at most twice as long, in nanoseconds.
const REST_NS: u64 = 5_000_000_000;

/// What was freed and may be given back.
pub(crate) struct Discards {
    /// The host is to be asked at all.
    wanted: bool,
    /// Freed since `since`, and before: start and end of each run.
    young: BTreeMap<u64, u64>,
    old: BTreeMap<u64, u64>,
    since: Option<u64>,
    /// In flight. Stays when its task is gone: the host may still be at work on it.
    pub(crate) going: Option<Run>,
    least: u64,
    rest_ns: u64,
}

impl Default for Discards {
    fn default() -> Self {
        Self {
            wanted: false,
            young: BTreeMap::new(),
            old: BTreeMap::new(),
            since: None,
            going: None,
            least: LEAST,
            rest_ns: REST_NS,
        }
    }
}

/// Adds a run, joined with those near it: homes have gaps, and whether these are free is seen
/// later.
fn add(runs: &mut BTreeMap<u64, u64>, mut start: u64, mut end: u64) {
    while let Some((&first, &last)) = runs.range(..=end + GAP).next_back()
        && last + GAP >= start
    {
        runs.remove(&first);
        (start, end) = (start.min(first), end.max(last));
    }
    runs.insert(start, end);
}

/// Forgets the shorter half of too many runs.
fn bound(runs: &mut BTreeMap<u64, u64>) {
    if runs.len() > MOST {
        let mut lengths: Vec<u64> = runs.iter().map(|(start, end)| end - start).collect();
        lengths.sort_unstable();
        let median = lengths[lengths.len() / 2];
        runs.retain(|start, end| *end - *start > median);
    }
}

impl Discards {
    /// Whether freed places are collected.
    pub(crate) const fn wanted(&self) -> bool {
        self.wanted
    }

    fn stop(&mut self) {
        self.wanted = false;
        self.young.clear();
        self.old.clear();
    }

    /// A checkpoint is durable that freed these runs.
    pub(crate) fn freed(&mut self, runs: Vec<(u64, u64)>) {
        if self.wanted {
            runs.into_iter().for_each(|(start, end)| add(&mut self.young, start, end));
            bound(&mut self.young);
        }
    }

    fn ripen(&mut self) {
        for (start, end) in core::mem::take(&mut self.young) {
            add(&mut self.old, start, end);
        }
        bound(&mut self.old);
    }

    /// Whether a turn is due.
    pub(crate) fn is_due(&mut self, now: u64) -> bool {
        if !self.wanted || self.going.is_some() {
            return false;
        }
        if now.saturating_sub(*self.since.get_or_insert(now)) >= self.rest_ns {
            self.since = Some(now);
            self.ripen();
        }
        self.old.iter().any(|(start, end)| end - start >= self.least)
    }

    /// The next candidate, within one region.
    fn next(&mut self) -> Option<(u64, u64)> {
        let (&start, &end) = self.old.iter().find(|(start, end)| **end - **start >= self.least)?;
        self.old.remove(&start);
        let stop = end.min((start / REGION + 1) * REGION);
        if stop < end {
            self.old.insert(stop, end);
        }
        Some((start, stop))
    }
}

impl Core {
    /// Takes a free run out of the candidate `start..end`, and keeps it from being given out.
    fn begin_discard(&mut self, start: u64, end: u64) -> Option<Run> {
        let most = PIECE.min(self.space.available() / 4);
        let least = self.discards.least;
        if most < least || self.discards.going.is_some() {
            return None;
        }
        let run = self.space.claim(start, end, least, most)?;
        let rest = run.place + run.count;
        if rest < end {
            self.discards.old.insert(rest, end);
        }
        self.discards.going = Some(run);
        Some(run)
    }
}

impl Volume {
    /// Whether places that become free from now on are given back to the host. Off at first.
    pub fn discard_freed(&self, wanted: bool) {
        let mut core = self.core.lock();
        if wanted {
            core.discards.wanted = true;
        } else {
            core.discards.stop();
        }
    }

    /// Runs of the places that the checkpoint in progress frees, for [`Discards::freed`].
    pub(crate) fn freed_runs(&self, frees: &Places) -> Vec<(u64, u64)> {
        if !self.core.lock().discards.wanted() {
            return Vec::new();
        }
        let mut places: Vec<u64> = frees
            .iter()
            .filter(|place| (self.geometry.home_start..self.geometry.host_blocks).contains(place))
            .collect();
        places.sort_unstable();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for place in places {
            match runs.last_mut() {
                Some((_, end)) if *end == place => *end += 1,
                _ => runs.push((place, place + 1)),
            }
        }
        runs
    }

    /// A turn of discards in the background.
    pub(crate) async fn discard_turn<D: Disk>(&self, disk: &D) {
        self.discard_up_to(disk, TURN).await;
    }

    /// Before the last user goes: what still rests. Nothing is given out any more.
    pub(crate) async fn discard_rest<D: Disk>(&self, disk: &D) {
        self.core.lock().discards.ripen();
        self.discard_up_to(disk, AT_CLOSE).await;
    }

    async fn discard_up_to<D: Disk>(&self, disk: &D, most: usize) {
        for _ in 0..most {
            let Some(run) = self.next_discard(disk).await else { return };
            let answer = disk.discard(run.place, run.count).await;
            let mut core = self.core.lock();
            core.discards.going = None;
            if !core.is(canary!(DiscardUnheld)) {
                core.space.give_back(run);
            }
            match answer {
                Ok(()) => core.counters.discarded_blocks += run.count,
                // A host that cannot is not asked again.
                Err(_) => core.discards.stop(),
            }
        }
    }

    async fn next_discard<D: Disk>(&self, disk: &D) -> Option<Run> {
        loop {
            let (start, end) = {
                let mut core = self.core.lock();
                if core.discards.going.is_some() {
                    return None;
                }
                core.discards.next()?
            };
            // A page that cannot be read: nothing there is known to be free.
            if self.load_region(disk, start / REGION).await.is_err() {
                continue;
            }
            let mut core = self.core.lock();
            if let Some(run) = core.begin_discard(start, end) {
                if core.is(canary!(DiscardUnheld)) {
                    core.space.give_back(run);
                }
                return Some(run);
            }
        }
    }

    /// For tests on volumes too small for the usual measures.
    #[cfg(test)]
    pub(crate) fn discard_at_once(&self) {
        let mut core = self.core.lock();
        core.discards.wanted = true;
        (core.discards.least, core.discards.rest_ns) = (2, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_overlap_or_lie_near_each_other_become_one() {
        let mut runs = BTreeMap::new();
        for (start, end) in [(100, 200), (300, 400), (550, 600), (232, 268), (10, 67), (590, 700)] {
            add(&mut runs, start, end);
        }
        let all: Vec<_> = runs.into_iter().collect();
        assert_eq!(all, [(10, 67), (100, 400), (550, 700)]);
    }

    #[test]
    fn a_place_rests_before_it_is_due() {
        let mut discards = Discards { wanted: true, ..Discards::default() };
        discards.freed(Vec::from([(REGION - 300, REGION + 400)]));
        assert!(!discards.is_due(1));
        assert!(!discards.is_due(REST_NS));
        assert!(discards.is_due(REST_NS + 1));
        // One region at a time.
        assert_eq!(discards.next(), Some((REGION - 300, REGION)));
        assert_eq!(discards.next(), Some((REGION, REGION + 400)));
        assert_eq!(discards.next(), None);
    }

    #[test]
    fn more_runs_than_are_remembered_lose_the_shortest() {
        let mut discards = Discards { wanted: true, ..Discards::default() };
        let runs = (0..2 * MOST as u64).map(|n| (n * 1000, n * 1000 + 1 + n % 500)).collect();
        discards.freed(runs);
        assert!(discards.young.len() <= MOST);
        assert!(discards.young.iter().any(|(start, end)| end - start == 500));
        assert!(discards.young.iter().all(|(start, end)| end - start > 200));
    }
}
