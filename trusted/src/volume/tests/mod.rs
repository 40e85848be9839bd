//! Tests of the volume against a simulated disk that reorders, tears, loses and fails.
//!
//! `POSTERN_SIM_SEEDS` sets how many seeds the crash simulation runs (default
//! [`crash::DEFAULT_SEEDS`]), `POSTERN_SIM_FIRST` the first one, `POSTERN_SIM_THREADS` the threads;
//! a failure prints the seed, `POSTERN_SIM_SEED` replays it. `cargo xtask crash` sets them.

#![cfg_attr(
    target_env = "sgx",
    allow(dead_code, unused_imports, reason = "tests that are left out there use them")
)]

/// A test for each canary, with the seed it was caught by before; `caught` is the module's own.
macro_rules! canaries {
    ($($name:ident => $canary:ident from $first:literal,)*) => {
        $(#[test]
        fn $name() {
            caught(Canary::$canary, $first);
        })*
    };
}

mod attacks;
mod audit;
mod canaries;
mod capacity;
mod counted_space;
mod counter;
mod crash;
mod disk;
// With files and a second implementation, of which there are none inside an enclave.
#[cfg(not(target_env = "sgx"))]
mod golden;
mod hostile;
mod memory;
mod model;
#[cfg(not(target_env = "sgx"))]
mod reader;
mod recorded;
mod rekey;
mod run;
mod slots;
mod small;
mod space;
mod tamper;
mod usage;

use core::{any::Any, cell::Cell, fmt::Debug};

use alloc::{boxed::Box, string::String, vec::Vec};
use std::{panic, println};

use crate::disk::{BLOCK, Block, Transfer};

/// A rule that is broken on purpose, to see that the simulation notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Canary {
    /// Nothing is broken.
    None,
    /// No flush between the nodes and the superblock that names them.
    NoNodeFlush,
    /// A sync does not wait for earlier journal blocks.
    EarlySync,
    /// The durable mark runs ahead.
    EarlyMark,
    /// Recovery believes uncertain records.
    NoVerify,
    /// Recovery does not write its decisions down.
    NoPersist,
    /// Places are given out again before the checkpoint.
    EarlyReuse,
    /// The last completion wins, not the highest order.
    LastCompletes,
    /// A failed eager write is not taken back.
    NoVoid,
    /// Eager writes in flight at the cut are not published again.
    NoCarry,
    /// The superblock does not wait for them.
    NoCarryWait,
    /// The superblock overwrites the last one.
    SameSlot,
    /// Places are discarded before the checkpoint that frees them is durable.
    EarlyDiscard,
    /// A place is given out while it is being discarded.
    DiscardUnheld,
    /// What a snapshot holds is freed.
    FreeHeld,
    /// What is written after a snapshot is as old as it.
    SameBirth,
    /// A sync does not wait for the monotonic counter.
    NoRegister,
    /// A superblock forgets a move of the counter that is on its way.
    NoAttempted,
    /// A write of a part of a block does not keep others off the block.
    SharedPartial,
    /// An opening does not shut out late moves of the one before.
    NoFence,
    /// A superblock of a directory's file names the newest record alone, not the durable one.
    NoDurable,
    /// Places of the journal's ring are written again before the superblock beyond them is durable.
    EarlyRing,
    /// The node cache looks for the place alone, and keeps what it has of it.
    CacheByPlace,
    /// The host does not wait for what a dead guest has asked for: it lands when the next one runs.
    LateWrites,
    /// A cut takes places for settled whose writes are still on their way.
    InFlightSettled,
    /// Seals of one request share a counter.
    SharedNonce,
    /// A failed flush is asked for again, and the next one believed.
    FlushAgain,
    /// Only the beginning of the journal is read, whatever was left.
    BriefScan,
    /// A completion is taken for the request that has its index now, whatever its generation.
    AnyGeneration,
    /// A completion is taken for what was asked of the daemon before, and not of this one yet.
    BeforeHandover,
    /// A completion is taken for a request that was completed before.
    TwiceDone,
    /// A length that cannot be is taken for the length done.
    AnyResult,
    /// What a host did of a request is taken for all of it.
    ShortIsWhole,
    /// A cursor may run ahead of the ring.
    AnyCursor,
    /// A cursor may go back.
    CursorBack,
    /// The lane's own cursor is read from shared memory.
    SharedCursor,
    /// A word is checked at one load and used at another.
    TwiceLoaded,
    /// A buffer is read once to authenticate it and once to use it.
    OpenedTwice,
    /// A block whose tag does not fit is taken all the same.
    AnyTag,
    /// A buffer is handed out again before the host has answered.
    EarlyBuffer,
    /// A poisoned lane goes on.
    AfterPoison,
    /// A call takes as many completions as there are.
    NoLimit,
    /// The doorbell is rung under the lane's lock.
    LockedBell,
}

std::thread_local! {
    static CANARY: Cell<Canary> = const { Cell::new(Canary::None) };
}

/// Tries `limit` seeds from `first` on, which is where the canary was caught before: to save time,
/// no more. `check` runs a seed with a rule broken; its `Err` is what it found.
fn caught<T: Debug + PartialEq>(
    canary: Canary,
    first: u64,
    limit: u64,
    check: impl Fn(u64, Canary) -> Result<T, String>,
) {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| ()));
    let found =
        (first..first + limit).find_map(|seed| check(seed, canary).err().map(|why| (seed, why)));
    panic::set_hook(hook);
    let Some((seed, why)) = found else { panic!("{canary:?} was not caught by {limit} seeds") };
    // Without the breach the same seed finds nothing.
    assert_eq!(check(seed, Canary::None).err(), None);
    let why: Vec<&str> = why.split(',').take(2).collect();
    println!("{canary:?}: caught by seed {seed}: {}", why.join(","));
}

/// The words of a panic.
fn words_of(cause: Box<dyn Any + Send>) -> String {
    cause
        .downcast::<String>()
        .map(|text| *text)
        .or_else(|cause| cause.downcast::<&str>().map(|text| (*text).into()))
        .unwrap_or_else(|_: Box<_>| "a panic".into())
}

/// What an environment variable says, if it is a number.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The rule broken in volumes that this thread opens.
pub(crate) fn canary() -> Canary {
    CANARY.get()
}

/// With [`Canary::OpenedTwice`]: gives the guest what a second look at the buffer would open to.
/// The cipher is a stream cipher: what differs in the one differs in the other.
pub(crate) fn open_again(transfer: &impl Transfer, at: usize, sealed: &Block, open: &mut Block) {
    if canary() != Canary::OpenedTwice {
        return;
    }
    let mut again = [0; BLOCK];
    transfer.get(at, &mut again);
    let changed = sealed.iter().zip(&again).map(|(before, now)| before ^ now);
    open.iter_mut().zip(changed).for_each(|(byte, change)| *byte ^= change);
}

/// The table of everything sealed by this thread: no (key, nonce) for two messages.
pub(crate) mod nonces {
    use std::{cell::RefCell, collections::HashMap};

    use crate::volume::crypto::sha256;

    type Message = ([u8; 32], [u8; 12]);

    std::thread_local! {
        static SEEN: RefCell<HashMap<Message, [u8; 32]>> = RefCell::default();
    }

    /// Forgets everything.
    pub(crate) fn reset() {
        SEEN.with_borrow_mut(HashMap::clear);
    }

    /// Notes that `data` is about to be sealed.
    pub(crate) fn record(secret: &[u8; 32], nonce: [u8; 12], aad: &[u8], data: &[u8]) {
        let mut message = std::vec::Vec::from(aad);
        message.extend_from_slice(data);
        let message = sha256(&message);
        SEEN.with_borrow_mut(|seen| {
            let before = seen.insert((*secret, nonce), message);
            assert!(before.is_none_or(|before| before == message), "nonce {nonce:?} used twice");
        });
    }
}
