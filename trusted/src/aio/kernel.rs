//! Requests on descriptors that are none of ours: the kernel serves them.
//!
//! A pipe, a socket, a file outside the sealed paths: what Linux answers for those only the kernel
//! knows. So each context that meets such a descriptor gets a hidden context of the kernel's own
//! ([`KernelContext`]), made when it is first needed. A request goes there as a copy of the guest's
//! iocb whose `aio_data` names it; the kernel's checks decide whether it is accepted, and its
//! event moves from the hidden ring into the guest's under the guest's own names.
//!
//! Holds whatever the kernel answers: an event completes a request that was handed over and has
//! not completed, once, or is dropped; the hidden ring is not touched after
//! [`KernelContext::destroy`], and that is called only while nobody submits to it.
//! Does not hold: that the kernel's results are true; they are about its own files.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::{
    array,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use super::{
    Completion, RingMapping,
    context::Context,
    iocb::IOCB_BYTES,
    ring::{EVENT_BYTES, Event},
};
use crate::{errno::Errno, sync::Lock};

/// A `struct iocb` that the kernel reads, and whose `aio_key` it writes. It stays where it is until
/// the context is gone: io_cancel knows a request by this address.
pub type KernelIocb = [AtomicU64; IOCB_BYTES / 8];

/// A context of the kernel's own that serves one context of the guest.
pub trait KernelContext: Send + Sync {
    /// The kernel's completion ring, as this process sees it.
    fn ring(&self) -> &RingMapping;

    /// An eventfd of ours for `aio_resfd`: rings when an event has come. Whoever hears it calls
    /// [`super::AioContexts::deliver`] or waits on a context.
    fn bell(&self) -> i32;

    /// io_submit(2) of this one iocb. Blocks where the kernel blocks. While a signal is to be handled
    /// that the kernel does not know of any more it must not: see [`hurry`].
    ///
    /// # Errors
    /// What the kernel answers.
    fn submit(&self, iocb: &KernelIocb) -> Result<(), Errno>;

    /// io_cancel(2): whether the request is being cancelled; its event comes through the ring.
    fn cancel(&self, iocb: &KernelIocb) -> bool;

    /// io_destroy(2): cancels polls, waits for what is in flight, unmaps the ring. Called once.
    fn destroy(&self);
}

/// Where `aio_data` lies in the words of an iocb.
const DATA: usize = 0;
/// Where `aio_key` (low half) and `aio_rw_flags` (high half) lie.
const KEY_RW_FLAGS: usize = 1;
/// `RWF_NOWAIT`, in that word.
const NOWAIT: u64 = 0x8 << 32;
/// In `aio_data`, of a request that [`hurry`] was called for.
const HURRIED: u64 = 1 << 31;
/// Where `aio_flags` (low half) and `aio_resfd` (high half) lie.
const FLAGS_RESFD: usize = 7;
/// `IOCB_FLAG_RESFD`.
const FLAG_RESFD: u64 = 1;

const WOULD_WAIT: i64 = -(Errno::EAGAIN.0 as i64);
const INTERRUPTED: i64 = -(Errno::EINTR.0 as i64);

/// Makes a request that may wait for the other end of a pipe, a socket or the like one that does
/// not: where it would wait, its result is `EINTR`, as if a signal had come. For the kernel that is
/// `RWF_NOWAIT`; not for regular files, nor for a request that would not wait anyway.
pub fn hurry(iocb: &KernelIocb) {
    iocb[DATA].fetch_or(HURRIED, Ordering::Relaxed);
    iocb[KEY_RW_FLAGS].fetch_or(NOWAIT, Ordering::Relaxed);
}

/// Takes [`hurry`] back: the kernel has refused the request with `EOPNOTSUPP`.
pub fn take_time(iocb: &KernelIocb) {
    iocb[DATA].fetch_and(!HURRIED, Ordering::Relaxed);
    iocb[KEY_RW_FLAGS].fetch_and(!NOWAIT, Ordering::Relaxed);
}

/// Events moved with the lock held once.
const FEW: usize = 16;

/// One context's requests at the kernel.
#[derive(Default)]
pub(super) struct Forwards {
    /// Whether there has ever been one: answers quickly for all contexts without.
    used: AtomicBool,
    /// Requests handed over that have not come to their end (event stored, eventfd signalled).
    pub(super) in_flight: AtomicU32,
    /// Threads inside [`KernelContext::submit`].
    submitting: AtomicU32,
    state: Lock<State>,
}

#[derive(Default)]
struct State {
    stage: Stage,
    entries: Vec<Entry>,
    /// Entries that hold no request.
    free: Vec<u32>,
    /// Number of the next request: tells the users of one entry apart.
    next: u32,
}

#[derive(Default)]
enum Stage {
    /// No ordinary descriptor was seen yet.
    #[default]
    Unused,
    Open(Arc<dyn KernelContext>),
    /// io_destroy has begun.
    Closed,
}

struct Entry {
    iocb: Arc<KernelIocb>,
    number: u32,
    /// The request's, while the kernel has it.
    done: Option<Completion>,
}

/// Which request: its entry and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    entry: u32,
    number: u32,
}

impl Token {
    fn data(self) -> u64 {
        u64::from(self.number) << 32 | u64::from(self.entry)
    }

    #[allow(clippy::cast_possible_truncation)]
    const fn parse(data: u64) -> Self {
        Self { entry: (data & !HURRIED) as u32, number: (data >> 32) as u32 }
    }
}

impl State {
    /// Gives the request an entry and the kernel's copy of its iocb.
    fn enter(
        &mut self,
        iocb: &[u8; IOCB_BYTES],
        bell: i32,
        done: Completion,
    ) -> Result<(Token, Arc<KernelIocb>), (Completion, Errno)> {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                let room = self.entries.try_reserve(1).and(self.free.try_reserve(1));
                // One bit of an `aio_data` is not the entry's.
                let place = i32::try_from(self.entries.len()).map(i32::cast_unsigned);
                let (Ok(()), Ok(place)) = (room, place) else {
                    return Err((done, Errno::ENOMEM));
                };
                let iocb = Arc::new(array::from_fn(|_| AtomicU64::new(0)));
                self.entries.push(Entry { iocb, number: 0, done: None });
                place
            }
        };
        let token = Token { entry: place, number: self.next };
        self.next = self.next.wrapping_add(1);
        let entry = &mut self.entries[place as usize];
        let bell = u64::from(bell.cast_unsigned()) << 32;
        for (index, (word, bytes)) in entry.iocb.iter().zip(iocb.as_chunks().0).enumerate() {
            let guests = u64::from_le_bytes(*bytes);
            let value = match index {
                DATA => token.data(),
                FLAGS_RESFD => guests & 0xffff_ffff | FLAG_RESFD | bell,
                _ => guests,
            };
            word.store(value, Ordering::Relaxed);
        }
        entry.number = token.number;
        entry.done = Some(done);
        Ok((token, entry.iocb.clone()))
    }

    /// Takes a request back from the kernel; `None` if it is not there.
    fn take(&mut self, token: Token) -> Option<Completion> {
        let entry = self.entries.get_mut(token.entry as usize)?;
        let done = entry.done.take_if(|_| entry.number == token.number)?;
        // Reserved when the entry was made.
        self.free.push(token.entry);
        Some(done)
    }
}

impl Forwards {
    /// Whether there is a hidden context.
    pub(super) fn is_used(&self) -> bool {
        // Acquire pairs with the Release in `open`.
        self.used.load(Ordering::Acquire)
    }
}

impl Context {
    /// The hidden context, made now if there is none.
    fn open(&self) -> Result<Arc<dyn KernelContext>, Errno> {
        match &self.forwards.state.lock().stage {
            Stage::Open(kernel) => return Ok(kernel.clone()),
            Stage::Closed => return Err(Errno::EINVAL),
            Stage::Unused => {}
        }
        let made = self.host.kernel_context(self.charged)?;
        let mut state = self.forwards.state.lock();
        let answer = match &state.stage {
            Stage::Unused => {
                state.stage = Stage::Open(made.clone());
                self.forwards.used.store(true, Ordering::Release);
                return Ok(made);
            }
            Stage::Open(other) => Ok(other.clone()),
            Stage::Closed => Err(Errno::EINVAL),
        };
        drop(state);
        made.destroy();
        answer
    }

    /// Hands a request to the kernel; answers its token once the kernel has accepted it.
    ///
    /// # Errors
    /// What the kernel refuses it with. Then it is as if it had never been: its slot is free.
    pub(super) fn forward(
        &self,
        iocb: &[u8; IOCB_BYTES],
        mut done: Completion,
    ) -> Result<Token, Errno> {
        let kernel = match self.open() {
            Ok(kernel) => kernel,
            Err(errno) => {
                done.refuse();
                return Err(errno);
            }
        };
        // Frees the slots of the hidden ring.
        self.deliver();
        done.hand_over();
        let entered = {
            let mut state = self.forwards.state.lock();
            if matches!(state.stage, Stage::Open(_)) {
                self.forwards.submitting.fetch_add(1, Ordering::Relaxed);
                state.enter(iocb, kernel.bell(), done)
            } else {
                Err((done, Errno::EINVAL))
            }
        };
        let (token, copy) = match entered {
            Ok(entered) => entered,
            Err((done, errno)) => {
                done.refuse();
                return Err(errno);
            }
        };
        let submitted = kernel.submit(&copy);
        // Release pairs with the Acquire in `close`.
        self.forwards.submitting.fetch_sub(1, Ordering::Release);
        self.host.wake(self.key, 0);
        if let Err(errno) = submitted {
            let refused = self.forwards.state.lock().take(token);
            if let Some(refused) = refused {
                refused.refuse();
            }
            return Err(errno);
        }
        self.deliver();
        Ok(token)
    }

    /// Whether the kernel still has the request.
    pub(super) fn is_at_the_kernel(&self, token: Token) -> bool {
        let state = self.forwards.state.lock();
        let entry = state.entries.get(token.entry as usize);
        entry.is_some_and(|entry| entry.done.is_some() && entry.number == token.number)
    }

    /// Moves events that the kernel has for this context into the guest's ring, in their order.
    /// When it returns, those that were there are in the ring, whoever moved them.
    pub(super) fn deliver(&self) {
        if !self.forwards.is_used() {
            return;
        }
        // As often as a full ring needs: a kernel that moves the tail on and on keeps nobody here.
        for _ in 0..=self.slots as usize / FEW {
            let mut moved: [Option<(Completion, u32)>; FEW] = array::from_fn(|_| None);
            let count = self.take_events(&mut moved);
            for (done, have) in moved.into_iter().flatten() {
                done.announce(have);
            }
            if count < FEW {
                return;
            }
        }
    }

    /// Stores up to [`FEW`] events; answers how many slots of the hidden ring it went through.
    fn take_events(&self, moved: &mut [Option<(Completion, u32)>; FEW]) -> usize {
        let mut state = self.forwards.state.lock();
        let Stage::Open(kernel) = &state.stage else { return 0 };
        let kernel = kernel.clone();
        let ring = kernel.ring();
        let slots = ring.slots();
        let (mut head, tail) = (ring.head() % slots, ring.tail() % slots);
        let mut count = 0;
        while count < FEW && head != tail {
            let mut bytes = [0; EVENT_BYTES];
            ring.get(head, &mut bytes);
            let event = Event::parse(&bytes);
            head = (head + 1) % slots;
            if let Some(mut done) = state.take(Token::parse(event.data)) {
                let res = match event.res {
                    WOULD_WAIT if event.data & HURRIED != 0 => INTERRUPTED,
                    res => res,
                };
                let have = done.store_event(res);
                moved[count] = Some((done, have));
            }
            count += 1;
        }
        if count > 0 {
            ring.set_head(head);
        }
        count
    }

    /// Cancels the poll that waits under the guest's `iocb`, the oldest if there are several;
    /// `false` if there is none.
    pub(super) fn cancel(&self, iocb: u64) -> bool {
        if !self.forwards.is_used() {
            return false;
        }
        let (kernel, mut found) = {
            let state = self.forwards.state.lock();
            let Stage::Open(kernel) = &state.stage else { return false };
            let entries = state.entries.iter();
            let named =
                entries.filter(|entry| entry.done.as_ref().is_some_and(|it| it.iocb() == iocb));
            let age = |entry: &Entry| state.next.wrapping_sub(entry.number);
            let found: Vec<_> = named.map(|entry| (age(entry), entry.iocb.clone())).collect();
            (kernel.clone(), found)
        };
        found.sort_unstable_by_key(|found| core::cmp::Reverse(found.0));
        let cancelled = found.iter().any(|(_, iocb)| kernel.cancel(iocb));
        self.deliver();
        cancelled
    }

    /// Ends the hidden context; what it had has completed afterwards. The context is dead.
    pub(super) fn close(&self, wait: impl Fn(&dyn Fn() -> bool)) {
        let stage = core::mem::replace(&mut self.forwards.state.lock().stage, Stage::Closed);
        let Stage::Open(kernel) = stage else { return };
        // Acquire pairs with the Release in `forward`. A submitter is not overtaken: the kernel
        // may give the address of the context to another one as soon as it is destroyed.
        wait(&|| self.forwards.submitting.load(Ordering::Acquire) == 0);
        kernel.destroy();
        let left: Box<[Completion]> = {
            let entries = &mut self.forwards.state.lock().entries;
            entries.iter_mut().filter_map(|entry| entry.done.take()).collect()
        };
        // The results went with the hidden ring; the guest's goes next, unread.
        left.into_iter().for_each(|done| done.finish(Ok(0)));
    }
}
