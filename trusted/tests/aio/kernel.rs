//! Requests on descriptors that the kernel serves: the real kernel behind our contexts must be
//! indistinguishable from the kernel itself, and a made-up one must not be able to do harm.

use std::{
    cell::RefCell,
    fs::File,
    os::fd::{AsRawFd, FromRawFd},
    ptr::NonNull,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use postern_trusted::{
    aio::{FileTraits, KernelContext, KernelIocb, RingMapping, hurry, take_time},
    errno::Errno,
};

use crate::{
    ASKING_THE_KERNEL, Aio, EAGAIN, EBADF, EFAULT, EINVAL, EOPNOTSUPP, Postern,
    guest::{self, Area, Batch, Events, FSYNC, HEAD, Iocb, NOOP, POLL, PWRITE, TAIL},
    native::Kernel,
    process::{KernelMaker, Machine},
    submit::{eventfd, scratch},
};

const EINPROGRESS: i64 = -115;
const POLLIN: u64 = 1;
const POLLOUT: u64 = 4;

/// A context of the real kernel's.
struct Real {
    id: u64,
    ring: RingMapping,
    bell: File,
}

impl Real {
    fn open(nr_events: u32) -> Result<Arc<dyn KernelContext>, Errno> {
        let id = Kernel::find().ok_or(Errno::ENOSYS)?.context(nr_events);
        let bytes = (guest::ring_word(id, guest::NR) as usize + 1) * 32;
        let alias = NonNull::new(id as *mut u8).unwrap();
        // SAFETY: mapped until io_destroy; the tests look at it through checked copies only.
        let ring = unsafe { RingMapping::new(id, alias, bytes) };
        Ok(Arc::new(Self { id, ring, bell: eventfd() }))
    }
}

impl KernelContext for Real {
    fn ring(&self) -> &RingMapping {
        &self.ring
    }
    fn bell(&self) -> i32 {
        self.bell.as_raw_fd()
    }
    fn submit(&self, iocb: &KernelIocb) -> Result<(), Errno> {
        let array = Area::new(1);
        array.put(0, iocb.as_ptr() as u64);
        match Kernel::find().unwrap().io_submit(self.id, 1, array.at(0)) {
            1 => Ok(()),
            errno => Err(Errno(i32::try_from(-errno).unwrap())),
        }
    }
    fn cancel(&self, iocb: &KernelIocb) -> bool {
        Kernel::find().unwrap().io_cancel(self.id, iocb.as_ptr() as u64, 0) == EINPROGRESS
    }
    fn destroy(&self) {
        assert_eq!(Kernel::find().unwrap().io_destroy(self.id), 0);
    }
}

fn on_the_kernel(kernel: KernelMaker) -> Postern {
    Postern::on(Machine { kernel: Some(kernel), ..Machine::default() })
}

/// Runs `scenario` on the kernel and on our contexts in front of it; both must answer `expected`.
fn forwarded(expected: &[i64], scenario: impl Fn(&dyn Aio) -> Vec<i64>) {
    let _one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(kernel) = Kernel::find() else { return };
    assert_eq!(scenario(&kernel), expected, "the kernel disagrees with the expectation");
    assert_eq!(scenario(&on_the_kernel(Real::open)), expected, "we disagree");
}

/// The two ends of a pipe: for reading, for writing.
fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors, which are owned here.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK), 0);
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    }
}

fn poll(file: &File, events: u64) -> Iocb {
    Iocb { opcode: POLL, fd: file.as_raw_fd(), buf: events, ..Iocb::default() }
}

fn write_one(file: &File) {
    std::io::Write::write_all(&mut &*file, b"x").unwrap();
}

/// The next event's data and result, however late it comes.
fn next(aio: &dyn Aio, ctx: u64) -> [i64; 2] {
    let events = Events::new(1);
    while aio.reap(ctx, 1, &events) != 1 {
        thread::yield_now();
    }
    [events.data(0).cast_signed(), events.res(0)]
}

/// What an eventfd has counted.
fn count(counter: &File) -> i64 {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut &*counter, &mut bytes).map_or(0, |()| i64::from_ne_bytes(bytes))
}

#[test]
fn what_the_kernel_refuses_on_a_descriptor_of_its_own_is_refused_in_its_order() {
    let expected = [EBADF, EBADF, EINVAL, EINVAL, EINVAL, EINVAL, EFAULT, EINVAL, EOPNOTSUPP];
    forwarded(&expected, |aio| {
        let ((from, to), directory) = (pipe(), File::open("/").unwrap());
        let ctx = aio.context(1);
        let on = |file: &File| Iocb { fd: file.as_raw_fd(), ..Iocb::default() };
        let cases = [
            on(&to),
            Iocb { opcode: PWRITE, ..on(&from) },
            Iocb { opcode: FSYNC, ..on(&from) },
            Iocb { opcode: NOOP, ..on(&from) },
            on(&directory),
            Iocb { offset: -1, ..on(&from) },
            Iocb { buf: u64::MAX, nbytes: 1, ..on(&from) },
            Iocb { flags: 1, resfd: to.as_raw_fd(), opcode: 99, ..on(&from) },
            Iocb { rw_flags: 0x4000_0000, ..on(&from) },
        ];
        cases.iter().map(|case| aio.submit(ctx, &Batch::new(&[*case]))).collect()
    });
}

#[test]
fn what_is_done_when_io_submit_returns_is_in_the_ring_in_order_under_the_guests_names() {
    // data, under its own address, res; of each.
    forwarded(&[3, 3, 1, 1, 5, 2, 1, 5, 3, 1, EAGAIN, 1], |aio| {
        let (from, to) = pipe();
        let signal = eventfd();
        let ctx = aio.context(1);
        let ink = Area::new(1);
        let [from, to] = [from.as_raw_fd(), to.as_raw_fd()];
        let signalled = Iocb { flags: 1, resfd: signal.as_raw_fd(), ..Iocb::default() };
        let write = Iocb { opcode: PWRITE, fd: to, buf: ink.at(0), nbytes: 5, ..signalled };
        let read = Iocb { fd: from, ..Iocb::default() };
        let batch = Batch::new(&[
            Iocb { data: 1, ..write },
            Iocb { data: 2, ..read },
            Iocb { data: 3, ..read },
        ]);
        let mut answers = vec![aio.submit(ctx, &batch)];
        let events = Events::new(3);
        answers.push(aio.reap(ctx, 3, &events));
        for index in 0..3 {
            let [data, obj, res, res2] = events.get(index).map(u64::cast_signed);
            let named = obj.cast_unsigned() == batch.iocb(index) && res2 == 0;
            answers.extend([data, i64::from(named), res]);
        }
        answers.push(count(&signal));
        answers
    });
}

#[test]
fn a_poll_comes_with_the_wakers_mask_and_can_be_cancelled_by_its_address() {
    let expected = [1, 7, 4, 1, 0, 8, 0x41, EINVAL, 2, EINPROGRESS, 9, 0, EINPROGRESS, 9, 0];
    let expected = [&expected[..], &[EINVAL, 2]].concat();
    forwarded(&expected, |aio| {
        let (from, to) = pipe();
        let ctx = aio.context(1);
        let signal = eventfd();
        let ready = Batch::new(&[Iocb { data: 7, ..poll(&to, POLLOUT) }]);
        let mut answers = vec![aio.submit(ctx, &ready)];
        answers.extend(next(aio, ctx));
        let waits = Batch::new(&[Iocb { data: 8, ..poll(&from, POLLIN) }]);
        answers.push(aio.submit(ctx, &waits));
        answers.push(aio.reap(ctx, 1, &Events::new(1)));
        write_one(&to);
        answers.extend(next(aio, ctx));
        answers.push(aio.io_cancel(ctx, waits.iocb(0), 0));

        let (from, _to) = pipe();
        let signalled = Iocb { flags: 1, resfd: signal.as_raw_fd(), ..poll(&from, POLLIN) };
        let twice = Batch::new(&[Iocb { data: 9, ..signalled }; 2]);
        guest::poke(twice.array() + 8, twice.iocb(0));
        answers.push(aio.submit(ctx, &twice));
        for _ in 0..2 {
            answers.push(aio.io_cancel(ctx, twice.iocb(0), u64::MAX));
            answers.extend(next(aio, ctx));
        }
        answers.push(aio.io_cancel(ctx, twice.iocb(0), 0));
        answers.push(count(&signal));
        answers
    });
}

#[test]
fn destruction_cancels_polls_and_signals_their_eventfds() {
    forwarded(&[3, 0, 3, EINVAL], |aio| {
        let (from, _to) = pipe();
        let signal = eventfd();
        let ctx = aio.context(1);
        let signalled = Iocb { flags: 1, resfd: signal.as_raw_fd(), ..poll(&from, POLLIN) };
        let submitted = aio.submit(ctx, &Batch::new(&[signalled; 3]));
        vec![submitted, aio.io_destroy(ctx), count(&signal), aio.io_destroy(ctx)]
    });
}

#[test]
fn ordinary_files_and_ours_share_one_ring_and_a_refusal_stops_the_batch_between_them() {
    let _one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(_) = Kernel::find() else { return };
    let postern = on_the_kernel(Real::open);
    let ours = postern.process.open_controlled(FileTraits::REGULAR);
    let (file, (from, _to)) = (scratch(), pipe());
    let ctx = postern.context(1);
    let on = |fd, data| Iocb { fd, data, ..Iocb::default() };
    let batch = Batch::new(&[
        on(ours.fd(), 1),
        on(file.as_raw_fd(), 2),
        Iocb { opcode: PWRITE, ..on(from.as_raw_fd(), 3) },
        on(ours.fd(), 4),
    ]);
    assert_eq!(postern.submit(ctx, &batch), 2);
    assert_eq!(next(&postern, ctx), [2, 512]);
    assert_eq!(ours.pending(), 1);
    ours.complete(Ok(100));
    assert_eq!(next(&postern, ctx), [1, 100]);
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn polls_that_wait_hold_their_slots_and_refused_ones_do_not() {
    let _one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(_) = Kernel::find() else { return };
    let postern = on_the_kernel(Real::open);
    let (from, to) = pipe();
    let ctx = postern.context(8);
    let slots = i64::from(guest::ring_word(ctx, guest::NR)) - 1;
    let refused = Batch::new(&[Iocb { opcode: NOOP, ..poll(&from, POLLIN) }]);
    for _ in 0..2 * slots {
        assert_eq!(postern.submit(ctx, &refused), EINVAL);
    }
    let waits = Batch::new(&[poll(&from, POLLIN)]);
    let mut held = 0;
    while postern.submit(ctx, &waits) == 1 {
        held += 1;
    }
    assert_eq!(postern.submit(ctx, &waits), EAGAIN);
    assert!((8..=slots).contains(&held), "{held}");
    assert_eq!(postern.contexts.in_flight() as i64, held);
    write_one(&to);
    for _ in 0..held {
        next(&postern, ctx);
    }
    assert_eq!(postern.contexts.in_flight(), 0);
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn draining_does_not_wait_for_what_the_kernel_has() {
    let _one_at_a_time = ASKING_THE_KERNEL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(_) = Kernel::find() else { return };
    let postern = on_the_kernel(Real::open);
    let (from, _to) = pipe();
    let ctx = postern.context(1);
    assert_eq!(postern.submit(ctx, &Batch::new(&[poll(&from, POLLIN)])), 1);
    drop(postern.contexts.drain());
    assert_eq!(postern.contexts.in_flight(), 1);
    assert_eq!(postern.io_destroy(ctx), 0);
}

/// A kernel that answers what a test wants, with a ring that the test fills.
struct MadeUp {
    ring: RingMapping,
    base: u64,
    /// The data words of the iocbs it was given.
    given: Mutex<Vec<u64>>,
    refuses: AtomicBool,
    /// Requests are hurried; with 2 that is taken back.
    hurries: AtomicU32,
    /// While set, `submit` does not return.
    blocks: Mutex<bool>,
    unblocked: Condvar,
    destroyed: AtomicU32,
}

thread_local! {
    static MADE_UP: RefCell<Option<Arc<MadeUp>>> = const { RefCell::new(None) };
}

impl MadeUp {
    const SLOTS: u32 = 127;

    /// A process in front of it, with one context.
    fn open() -> (Arc<Postern>, Arc<Self>, u64) {
        let alias = guest::map(guest::PAGE, -1);
        let base = alias.as_ptr() as u64;
        let made_up = Arc::new(Self {
            // SAFETY: never unmapped, and reached through checked copies by the tests.
            ring: unsafe { RingMapping::new(base, alias, guest::PAGE) },
            base,
            given: Mutex::default(),
            refuses: AtomicBool::new(false),
            hurries: AtomicU32::new(0),
            blocks: Mutex::new(false),
            unblocked: Condvar::new(),
            destroyed: AtomicU32::new(0),
        });
        MADE_UP.set(Some(made_up.clone()));
        let postern = Arc::new(on_the_kernel(|_| {
            MADE_UP.with_borrow(|made_up| Ok(made_up.clone().unwrap() as Arc<dyn KernelContext>))
        }));
        let ctx = postern.context(1);
        (postern, made_up, ctx)
    }

    /// Stores an event as the kernel would.
    fn tell(&self, data: u64, res: i64) {
        let tail = guest::ring_word(self.base, TAIL) % Self::SLOTS;
        let slot = self.base + 32 + u64::from(tail) * 32;
        guest::poke(slot, data);
        guest::poke(slot + 16, res.cast_unsigned());
        guest::set_ring_word(self.base, TAIL, (tail + 1) % Self::SLOTS);
    }

    fn given(&self, index: usize) -> u64 {
        self.given.lock().unwrap()[index]
    }
}

impl KernelContext for MadeUp {
    fn ring(&self) -> &RingMapping {
        &self.ring
    }
    fn bell(&self) -> i32 {
        77
    }
    fn submit(&self, iocb: &KernelIocb) -> Result<(), Errno> {
        assert_eq!(iocb[7].load(Ordering::Relaxed), 77 << 32 | 1, "our bell, not the guest's");
        let hurries = self.hurries.load(Ordering::Relaxed);
        if hurries > 0 {
            hurry(iocb);
            assert_eq!(iocb[1].load(Ordering::Relaxed), 8 << 32, "RWF_NOWAIT");
        }
        if hurries > 1 {
            take_time(iocb);
            assert_eq!(iocb[1].load(Ordering::Relaxed), 0);
        }
        self.given.lock().unwrap().push(iocb[0].load(Ordering::Relaxed));
        let blocks = self.blocks.lock().unwrap();
        let _blocks = self.unblocked.wait_while(blocks, |blocks| *blocks).unwrap();
        if self.refuses.load(Ordering::Relaxed) { Err(Errno::EBUSY) } else { Ok(()) }
    }
    fn cancel(&self, _: &KernelIocb) -> bool {
        false
    }
    fn destroy(&self) {
        self.destroyed.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_event_that_names_no_request_in_flight_is_dropped_and_none_counts_twice() {
    let (postern, kernel, ctx) = MadeUp::open();
    let (from, _to) = pipe();
    let batch = Batch::new(&[Iocb { data: 40, ..poll(&from, POLLIN) }]);
    let events = Events::new(8);
    assert_eq!(postern.submit(ctx, &batch), 1);
    let first = kernel.given(0);
    for bogus in [u64::MAX, first + 1, first | 9 << 32, first ^ 1 << 63] {
        kernel.tell(bogus, 1);
    }
    assert_eq!(postern.reap(ctx, 8, &events), 0);
    kernel.tell(first, -5);
    kernel.tell(first, 6);
    assert_eq!(postern.reap(ctx, 8, &events), 1);
    assert_eq!([events.data(0).cast_signed(), events.res(0)], [40, -5]);
    // The entry has a new user: the old name is not its own.
    assert_eq!(postern.submit(ctx, &batch), 1);
    kernel.tell(first, 7);
    assert_eq!(postern.reap(ctx, 8, &events), 0);
    for (word, value) in [(TAIL, u32::MAX), (HEAD, u32::MAX - 1), (guest::NR, 0)] {
        guest::set_ring_word(kernel.base, word, value);
        postern.reap(ctx, 8, &events);
    }
    assert!(postern.contexts.in_flight() <= 1);
    assert_eq!(postern.io_destroy(ctx), 0);
    assert_eq!(kernel.destroyed.load(Ordering::Relaxed), 1);
}

#[test]
fn a_hurried_request_is_interrupted_where_it_would_have_waited() {
    let (postern, kernel, ctx) = MadeUp::open();
    let (from, _to) = pipe();
    let events = Events::new(8);
    let [would_wait, interrupted] = [Errno::EAGAIN, Errno::EINTR].map(|it| -i64::from(it.0));
    let cases = [
        (1, would_wait, interrupted),
        (1, 5, 5),
        (1, -5, -5),
        (2, would_wait, would_wait),
        (0, would_wait, would_wait),
    ];
    for (index, (hurries, told, seen)) in cases.into_iter().enumerate() {
        kernel.hurries.store(hurries, Ordering::Relaxed);
        assert_eq!(postern.submit(ctx, &Batch::new(&[Iocb { data: 3, ..poll(&from, POLLIN) }])), 1);
        kernel.tell(kernel.given(index), told);
        assert_eq!(postern.reap(ctx, 8, &events), 1);
        assert_eq!([events.data(0).cast_signed(), events.res(0)], [3, seen]);
    }
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn events_keep_the_kernels_order_across_wraps_of_both_rings() {
    let (postern, kernel, ctx) = MadeUp::open();
    let (from, _to) = pipe();
    let events = Events::new(100);
    for round in 0..5_u64 {
        let numbers = round * 100..round * 100 + 100;
        let iocbs: Vec<_> =
            numbers.clone().map(|data| Iocb { data, ..poll(&from, POLLIN) }).collect();
        assert_eq!(postern.submit(ctx, &Batch::new(&iocbs)), 100);
        let given = std::mem::take(&mut *kernel.given.lock().unwrap());
        for name in given.iter().rev() {
            kernel.tell(*name, 0);
        }
        assert_eq!(postern.reap(ctx, 100, &events), 100);
        let came: Vec<_> = (0..100).map(|index| events.data(index)).collect();
        assert_eq!(came, numbers.rev().collect::<Vec<_>>());
    }
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn a_kernel_that_refuses_after_all_leaves_nothing_behind() {
    let (postern, kernel, ctx) = MadeUp::open();
    let (from, _to) = pipe();
    let signal = eventfd();
    kernel.refuses.store(true, Ordering::Relaxed);
    let signalled = Iocb { flags: 1, resfd: signal.as_raw_fd(), ..poll(&from, POLLIN) };
    for _ in 0..300 {
        assert_eq!(postern.submit(ctx, &Batch::new(&[signalled])), -16);
    }
    assert_eq!((postern.contexts.in_flight(), count(&signal)), (0, 0));
    assert_eq!(postern.reap(ctx, 1, &Events::new(1)), 0);
    assert_eq!(postern.io_destroy(ctx), 0);
}

#[test]
fn destruction_does_not_overtake_a_submitter_that_blocks_in_the_kernel() {
    let (postern, kernel, ctx) = MadeUp::open();
    let (from, _to) = pipe();
    // Makes the hidden context in this thread.
    assert_eq!(postern.submit(ctx, &Batch::new(&[poll(&from, POLLIN)])), 1);
    *kernel.blocks.lock().unwrap() = true;
    let submitter = thread::spawn({
        let (postern, fd) = (postern.clone(), from.try_clone().unwrap());
        move || postern.submit(ctx, &Batch::new(&[poll(&fd, POLLIN)]))
    });
    while kernel.given.lock().unwrap().len() < 2 {
        thread::yield_now();
    }
    let destroyer = thread::spawn({
        let postern = postern.clone();
        move || postern.io_destroy(ctx)
    });
    postern.process.until_asleep(1);
    assert_eq!(kernel.destroyed.load(Ordering::Relaxed), 0);
    *kernel.blocks.lock().unwrap() = false;
    kernel.unblocked.notify_all();
    assert_eq!(destroyer.join().unwrap(), 0);
    assert_eq!(submitter.join().unwrap(), 1);
    assert_eq!(kernel.destroyed.load(Ordering::Relaxed), 1);
    assert_eq!(postern.contexts.in_flight(), 0);
}
