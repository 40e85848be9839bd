//! The volume's side of the monotonic counter: which states are the newest, and who may go on.
//!
//! A *point* of a volume is a superblock and a journal block of the chain behind it; its digest
//! names both, and with them everything they reach. The counter holds the digest of a point. Each
//! superblock of a bound volume says what the counter held when it was written (`registered`), and
//! what a move of unknown outcome would have made of it (`attempted`).
//!
//! The order of things: storage durable, then the counter moves, then it is acknowledged. So the
//! counter is never ahead of the storage after an honest crash, and a state that it does not know
//! is an old one, or one of another writer who went on from the same state.
//!
//! Holds: the counter moves only to points that are durable; no move begins between the moment a
//! superblock takes down what the counter holds and the moment that superblock is durable, except
//! the one that it took down; a move that may or may not have happened is tried again unchanged
//! before any other.

use alloc::{collections::VecDeque, sync::Arc};
use core::{fmt, future::poll_fn, task::Poll};

use super::{
    OpenOptions, Volume,
    core::{Core, Health, Waiters, wake},
    crypto::{Tag, sha256},
    error::VolumeError,
    ring_scan::Scan,
    superblock::{Bound, Superblock},
};
use crate::{
    counter::{Counter, CounterError, Lasting, Moves, Record, Swapped},
    disk::HostError,
    errno::Errno,
};

/// The counter of a volume that is opened, and how it is used.
#[derive(Clone)]
pub struct CounterUse {
    /// The counter.
    pub counter: Arc<dyn Counter>,
    /// How often it moves.
    pub moves: Moves,
    /// Take the volume for the newest, whatever the counter holds, and bind it to the counter.
    pub adopt: bool,
}

impl fmt::Debug for CounterUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CounterUse")
            .field("moves", &self.moves)
            .field("adopt", &self.adopt)
            .finish_non_exhaustive()
    }
}

/// What opening found out about the volume's freshness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freshness {
    /// The volume has no counter.
    #[default]
    Unbound,
    /// The volume has a counter, which nobody asked.
    Unchecked {
        /// The counter's sequence number as far as the volume knows.
        sequence: u64,
    },
    /// The counter knows this state.
    Confirmed {
        /// The counter's sequence number.
        sequence: u64,
    },
    /// The counter does not know this state: `OpenReport::loss` says why.
    Refused,
}

/// Names one superblock: the hash of its sealed bytes.
pub(crate) type SuperblockId = [u8; 32];

/// The digest of a point.
fn digest(uuid: &[u8; 16], superblock: &SuperblockId, seq: u64, tag: &Tag) -> [u8; 32] {
    let mut bytes = [0; 96];
    bytes[..16].copy_from_slice(b"postern/1 point\0");
    bytes[16..32].copy_from_slice(uuid);
    bytes[32..64].copy_from_slice(superblock);
    bytes[64..72].copy_from_slice(&seq.to_le_bytes());
    bytes[72..88].copy_from_slice(tag);
    sha256(&bytes)
}

/// What the check at open found.
pub(crate) struct Checked {
    pub(crate) freshness: Freshness,
    /// Why the volume must not be written.
    pub(crate) refusal: Option<VolumeError>,
    /// The journal block up to which the counter vouches.
    pub(crate) vouched: u64,
    /// What the counter held.
    held: Option<Record>,
}

/// Asks the counter about the state that was found.
pub(crate) async fn check(
    options: &OpenOptions,
    uuid: &[u8; 16],
    superblock: &Superblock,
    id: &SuperblockId,
    scan: &Scan,
) -> Result<Checked, VolumeError> {
    let mut checked =
        Checked { freshness: Freshness::Unbound, refusal: None, vouched: 0, held: None };
    let known = superblock.counter.and_then(|bound| bound.registered);
    let sequence = known.map_or(0, |record| record.sequence);
    let Some(used) = &options.counter else {
        if superblock.counter.is_some() {
            checked.freshness = Freshness::Unchecked { sequence };
            // Reading without the counter is for looking; writing without it would lose the thread.
            let wants = !options.read_only && !options.unbind;
            checked.refusal = wants.then_some(VolumeError::CounterNeeded { sequence });
        }
        return Ok(checked);
    };
    checked.held = used.counter.load().await.map_err(VolumeError::Counter)?;
    let verdict = match (superblock.counter, checked.held) {
        (bound, held) if used.counter.lasting().is_some() => {
            vouch_file(uuid, superblock, bound, id, scan, held)
        }
        (None, _) => Err(VolumeError::NotBound),
        (Some(_), None) => Err(VolumeError::CounterEmpty { sequence }),
        (Some(bound), Some(held)) => vouch(uuid, superblock, &bound, id, scan, &held)
            .ok_or(VolumeError::RolledBack { found: sequence, counter: held.sequence }),
    };
    match verdict {
        Ok(seq) => {
            checked.vouched = seq;
            let sequence = checked.held.map_or(0, |held| held.sequence);
            checked.freshness = Freshness::Confirmed { sequence };
        }
        Err(error) => {
            checked.freshness = Freshness::Refused;
            checked.refusal = (!used.adopt).then_some(error);
        }
    }
    Ok(checked)
}

/// Whether what was found is what the index of a directory has of a file that was put away: the
/// point that its record names; or no record, of a file that never had one.
pub(crate) async fn is_exact(
    options: &OpenOptions,
    uuid: &[u8; 16],
    superblock: &Superblock,
    id: &SuperblockId,
    scan: &Scan,
) -> bool {
    let Some(used) = options.counter.as_ref().filter(|used| used.counter.lasting().is_some())
    else {
        return false;
    };
    match used.counter.load().await {
        Ok(Some(held)) => {
            let (tip, tag) = (scan.tip(superblock), scan.tip_tag(superblock));
            digest(uuid, id, tip, &tag) == held.digest
        }
        Ok(None) => superblock.counter.is_none_or(|bound| bound.registered.is_none()),
        Err(_) => false,
    }
}

/// The journal block up to which the counter's record vouches for what was found; `None` if it
/// means another state.
fn vouch(
    uuid: &[u8; 16],
    superblock: &Superblock,
    bound: &Bound,
    id: &SuperblockId,
    scan: &Scan,
    held: &Record,
) -> Option<u64> {
    let base = superblock.replay_seq - 1;
    if [bound.registered, bound.attempted].contains(&Some(*held)) {
        return Some(base);
    }
    let points = scan.chain.iter().rev().map(|found| (found.header.seq, found.tag));
    points
        .chain([(base, superblock.replay_prev)])
        .find(|(seq, tag)| digest(uuid, id, *seq, tag) == held.digest)
        .map(|(seq, _)| seq)
}

/// As [`vouch`], for a record in a directory's index. The file may be newer than the record: then
/// its superblock names the record as one that was to be found. A file that has no record yet is
/// what its superblock says.
fn vouch_file(
    uuid: &[u8; 16],
    superblock: &Superblock,
    bound: Option<Bound>,
    id: &SuperblockId,
    scan: &Scan,
    held: Option<Record>,
) -> Result<u64, VolumeError> {
    let known = bound.and_then(|bound| bound.registered);
    let vouched = match (bound, held) {
        (None, None) => Some(superblock.replay_seq - 1),
        (Some(_), None) => known.is_none().then_some(superblock.replay_seq - 1),
        (None, Some(_)) => None,
        (Some(bound), Some(held)) => vouch(uuid, superblock, &bound, id, scan, &held),
    };
    let number = |record: Option<Record>| record.map_or(0, |record| record.sequence);
    let refusal = VolumeError::NotAsRecorded { found: number(known), recorded: number(held) };
    vouched.ok_or(refusal)
}

/// How far the counter is, in terms of the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Superblock generation.
    generation: u64,
    /// Journal block.
    seq: u64,
}

impl Reach {
    const fn covers(&self, other: &Self) -> bool {
        self.generation >= other.generation && self.seq >= other.seq
    }
}

/// The state of a bound volume's counter, behind the core's lock.
pub(crate) struct Fresh {
    used: CounterUse,
    /// What the counter is known to hold.
    registered: Option<Record>,
    /// A move on its way or of unknown outcome, and how far it reaches.
    attempted: Option<(Record, Reach)>,
    /// How far `registered` reaches.
    reached: Reach,
    /// The last durable superblock: its name, generation, and the journal block before its replay.
    id: SuperblockId,
    generation: u64,
    base: (u64, Tag),
    /// Tags of journal blocks since, for moves at each sync.
    tags: VecDeque<(u64, Tag)>,
    /// One task moves the counter at a time.
    moving: bool,
    /// A superblock that says what the counter held is on its way: no new move begins.
    committing: bool,
    waiters: Waiters,
    /// When a move was tried last.
    tried_ns: u64,
    pub(crate) claimed: bool,
}

/// Time between two tries of a move in the background, in nanoseconds.
const AGAIN_NS: u64 = 1_000_000_000;

/// Why the counter did not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// Another writer has moved it: this one is over.
    Lost,
    /// No answer; to be tried again.
    Counter(CounterError),
    /// The volume failed before.
    Failed,
}

impl From<Stuck> for VolumeError {
    fn from(stuck: Stuck) -> Self {
        match stuck {
            Stuck::Lost => Self::CounterLost,
            Stuck::Failed => Self::Host { place: 0, error: HostError::Errno(Errno::EIO.0) },
            Stuck::Counter(error) => Self::Counter(error),
        }
    }
}

impl Fresh {
    /// For a volume that is about to be opened for writing.
    pub(crate) fn new(
        used: &CounterUse,
        checked: &Checked,
        superblock: &Superblock,
        id: SuperblockId,
    ) -> Self {
        Self {
            used: used.clone(),
            registered: checked.held,
            attempted: None,
            reached: Reach::default(),
            id,
            generation: superblock.generation,
            base: (superblock.replay_seq - 1, superblock.replay_prev),
            tags: VecDeque::new(),
            moving: false,
            committing: false,
            waiters: Waiters::default(),
            tried_ns: 0,
            claimed: false,
        }
    }

    /// For a volume that has just been made, which the counter knows nothing of.
    pub(crate) fn of_new(used: &CounterUse, superblock: &Superblock, id: SuperblockId) -> Self {
        let checked =
            Checked { freshness: Freshness::Unbound, refusal: None, vouched: 0, held: None };
        let mut fresh = Self::new(used, &checked, superblock, id);
        // What making it has written needs no record.
        fresh.reached.generation = superblock.generation;
        fresh
    }

    /// What a superblock written now says: every record that may be found after a crash.
    fn bound(&self, careless: bool) -> Bound {
        let attempted = self.attempted.map(|(record, _)| record);
        match self.used.counter.lasting() {
            Some(Lasting { newest, .. }) if careless => {
                Bound { registered: newest, attempted: None }
            }
            Some(Lasting { durable, newest }) => {
                Bound { registered: durable, attempted: newest.filter(|_| newest != durable) }
            }
            None => Bound { registered: self.registered, attempted },
        }
    }

    /// Whether nobody outside this enclave can move the counter, and its moves last later.
    fn is_batched(&self) -> bool {
        self.used.counter.lasting().is_some()
    }

    /// Whether syncs wait for the counter; then no record is published before its data.
    pub(crate) const fn counts_syncs(&self) -> bool {
        matches!(self.used.moves, Moves::Sync)
    }

    /// A journal block was sealed.
    pub(crate) fn sealed(&mut self, seq: u64, tag: Tag) {
        if self.counts_syncs() {
            self.tags.push_back((seq, tag));
        }
    }

    /// The counter's sequence number.
    pub(crate) fn sequence(&self) -> u64 {
        self.registered.map_or(0, |record| record.sequence)
    }

    fn next(&self, uuid: &[u8; 16], seq: u64, tag: &Tag) -> Record {
        let sequence = self.sequence() + 1;
        Record { sequence, digest: digest(uuid, &self.id, seq, tag) }
    }
}

/// The newest point of the volume that is durable and settled.
fn point(core: &Core, fresh: &Fresh) -> (u64, Tag) {
    let seq = core.journal.durable;
    if seq <= fresh.base.0 {
        fresh.base
    } else if seq + 1 == core.journal.next {
        (seq, core.journal.prev)
    } else {
        fresh.tags.iter().find(|(at, _)| *at == seq).copied().unwrap_or(fresh.base)
    }
}

/// One move of the counter.
struct Move {
    counter: Arc<dyn Counter>,
    old: Option<Record>,
    new: Record,
    reach: Reach,
}

enum Turn {
    Covered,
    Mine(Move),
}

impl Volume {
    /// Before the first superblock of an opening: registers the state that was found, so that no
    /// late move of an earlier session can happen any more. `settled` is a journal block of the
    /// chain up to which everything was durable and resolved; `tip`: it is the chain's last.
    pub(crate) async fn fence(&self, settled: u64, tag: Tag, tip: bool) -> Result<(), Stuck> {
        let planned = {
            let core = self.core.lock();
            let Some(fresh) = core.fresh.as_ref().filter(|fresh| !fresh.is_batched()) else {
                return Ok(());
            };
            let new = fresh.next(self.key.uuid(), settled, &tag);
            // Nothing was ever there, or it is exactly this state and nothing lies behind it that a
            // move on its way could name.
            let same = fresh.registered.is_none_or(|held| held.digest == new.digest);
            let settled = same && tip;
            (!settled).then(|| Move {
                counter: fresh.used.counter.clone(),
                old: fresh.registered,
                new,
                reach: Reach::default(),
            })
        };
        match planned {
            Some(planned) => self.make(planned).await,
            None => Ok(()),
        }
    }

    /// After a clean close. A record in an index that cannot be written now stays as it is: the
    /// file opens all the same.
    pub(crate) async fn register_close(&self) -> Result<(), Stuck> {
        let batched = self.core.lock().fresh.as_ref().is_some_and(Fresh::is_batched);
        match self.register().await {
            Err(Stuck::Counter(_)) if batched => Ok(()),
            done => done,
        }
    }

    /// Registers the newest durable point.
    pub(crate) async fn register(&self) -> Result<(), Stuck> {
        let want = {
            let core = self.core.lock();
            let Some(fresh) = core.fresh.as_ref() else { return Ok(()) };
            let (seq, _) = point(&core, fresh);
            Reach { generation: fresh.generation, seq }
        };
        self.reach(want).await
    }

    /// After a flush: registers what it made durable, if syncs are to wait for that.
    pub(crate) async fn register_sync(&self) -> Result<(), Errno> {
        let counts = |core: &Core| core.fresh.as_ref().is_some_and(Fresh::counts_syncs);
        if !counts(&self.core.lock()) || self.core.lock().is(canary!(NoRegister)) {
            return Ok(());
        }
        self.register().await.map_err(|stuck| match stuck {
            Stuck::Counter(CounterError::Full) => Errno::ENOSPC,
            _ => Errno::EIO,
        })
    }

    async fn reach(&self, want: Reach) -> Result<(), Stuck> {
        loop {
            let turn = poll_fn(|cx| {
                let mut guard = self.core.lock();
                let core = &mut *guard;
                if core.health == Health::Failed {
                    return Poll::Ready(Err(Stuck::Failed));
                }
                let Some(fresh) = core.fresh.as_mut() else {
                    return Poll::Ready(Ok(Turn::Covered));
                };
                if fresh.reached.covers(&want) {
                    return Poll::Ready(Ok(Turn::Covered));
                }
                if fresh.moving || fresh.committing && fresh.attempted.is_none() {
                    fresh.waiters.add(cx.waker());
                    return Poll::Pending;
                }
                Poll::Ready(Ok(self.plan(core).map_or(Turn::Covered, Turn::Mine)))
            })
            .await?;
            let Turn::Mine(planned) = turn else { return Ok(()) };
            self.make(planned).await?;
        }
    }

    /// The next move: the one of unknown outcome, or one to the newest point.
    fn plan(&self, core: &mut Core) -> Option<Move> {
        let fresh = core.fresh.as_ref()?;
        let (new, reach) = fresh.attempted.unwrap_or_else(|| {
            let (seq, tag) = point(core, fresh);
            let reach = Reach { generation: fresh.generation, seq };
            (fresh.next(self.key.uuid(), seq, &tag), reach)
        });
        let fresh = core.fresh.as_mut()?;
        fresh.moving = true;
        fresh.attempted = Some((new, reach));
        Some(Move { counter: fresh.used.counter.clone(), old: fresh.registered, new, reach })
    }

    /// Makes one move and gives the turn back.
    async fn make(&self, planned: Move) -> Result<(), Stuck> {
        let Move { counter, old, new, reach } = planned;
        let answer = counter.swap(old, new).await;
        let mut guard = self.core.lock();
        let core = &mut *guard;
        let Some(fresh) = core.fresh.as_mut() else { return Ok(()) };
        fresh.moving = false;
        let mut wakers = fresh.waiters.take();
        let result = match answer {
            // The second: an earlier try did it, whose answer was lost.
            Ok(Swapped::Done) => Ok(()),
            Ok(Swapped::Lost(held)) if held == Some(new) => Ok(()),
            Ok(Swapped::Lost(_)) => Err(Stuck::Lost),
            Err(error) => Err(Stuck::Counter(error)),
        };
        match result {
            Ok(()) => {
                fresh.registered = Some(new);
                fresh.attempted = None;
                fresh.reached = reach;
                fresh.tags.retain(|(seq, _)| *seq >= reach.seq);
            }
            Err(Stuck::Lost) => wakers.extend(core.fail()),
            // It has not happened, and means a state that a superblock may leave behind.
            Err(_) if fresh.is_batched() => fresh.attempted = None,
            Err(_) => {}
        }
        drop(guard);
        wake(wakers);
        result
    }

    /// A superblock is about to be written: answers what it has to say about the counter.
    pub(crate) async fn hold_counter(&self) -> Option<Bound> {
        poll_fn(|cx| {
            let mut core = self.core.lock();
            let forgets = core.is(canary!(NoAttempted));
            let careless = core.is(canary!(NoDurable));
            let Some(fresh) = core.fresh.as_mut() else { return Poll::Ready(None) };
            if fresh.moving && fresh.is_batched() {
                // Not to be durable before it is a record that this superblock names.
                fresh.waiters.add(cx.waker());
                return Poll::Pending;
            }
            let bound = fresh.bound(careless);
            fresh.committing = true;
            let attempted = bound.attempted.filter(|_| !forgets);
            Poll::Ready(Some(Bound { attempted, ..bound }))
        })
        .await
    }

    /// After the first superblock of an opening: registers it, so that a copy of what was found
    /// opens nowhere else. A batched counter has no one else who could.
    pub(crate) async fn register_opening(&self) -> Result<(), Stuck> {
        {
            let mut core = self.core.lock();
            let Some(fresh) = core.fresh.as_mut() else { return Ok(()) };
            if fresh.is_batched() {
                // What the opening itself has written needs no record.
                fresh.reached.generation = fresh.generation;
                return Ok(());
            }
        }
        self.register().await
    }

    /// The superblock is durable, or (`None`) nobody knows. Then the counter must not move any
    /// more, for either state may be found next.
    pub(crate) fn release_counter(&self, committed: Option<(&Superblock, SuperblockId)>) {
        let mut guard = self.core.lock();
        let core = &mut *guard;
        let Some(fresh) = core.fresh.as_mut() else { return };
        fresh.committing = false;
        let mut wakers = fresh.waiters.take();
        match committed {
            Some((superblock, id)) => {
                fresh.id = id;
                fresh.generation = superblock.generation;
                fresh.base = (superblock.replay_seq - 1, superblock.replay_prev);
                fresh.tags.retain(|(seq, _)| *seq >= superblock.replay_seq);
            }
            None => wakers.extend(core.fail()),
        }
        drop(guard);
        wake(wakers);
    }
}

impl Core {
    /// Whether the counter is behind and it is time to try (again).
    pub(crate) fn wants_register(&mut self, now: u64) -> bool {
        let Some(fresh) = self.fresh.as_mut() else { return false };
        let due =
            fresh.used.moves >= Moves::Checkpoint && fresh.reached.generation < fresh.generation;
        let wants = due || fresh.attempted.is_some();
        let soon = fresh.attempted.is_some() && now.saturating_sub(fresh.tried_ns) < AGAIN_NS;
        if !wants || soon || fresh.claimed || fresh.moving {
            return false;
        }
        fresh.tried_ns = now;
        fresh.claimed = true;
        true
    }
}
