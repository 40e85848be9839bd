//! The simulated enclave as the AIO contexts see it: descriptors, rings, waiting.

#![allow(unsafe_code)]

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicPtr, Ordering},
};
use std::sync::Arc;

use postern_trusted::{
    aio::{
        AioContexts, AioFile, AioHost, Completion, Descriptor, EventCounter, FileTraits,
        KernelContext, Op, Request, RingMapping, Signals, Wait, WaitEnd, WaitKey,
    },
    errno::Errno,
    platform::{Buffer as _, Fault, GuestMemory},
};

use crate::{
    counter::Counters,
    family::{self, standing::Held},
    files::{self, OpenFile, direct::Transfer, transfer::Moving},
    guest::Guest,
    identity, kernel_aio,
    limits::{self, TooBig},
    message, process, service, sys, wait,
};

/// The calling process, as its AIO contexts see it.
pub struct SimHost {
    guest: Guest,
    possible_cpus: u32,
    counters: Counters,
}

struct Owned {
    process: u32,
    contexts: AioContexts,
}

/// Private to the process; a forked child finds its parent's and makes its own.
static CONTEXTS: AtomicPtr<Owned> = AtomicPtr::new(core::ptr::null_mut());

/// The calling process's contexts. A forked child has none of its parent's.
pub fn contexts() -> &'static AioContexts {
    loop {
        if let Some(contexts) = known() {
            return contexts;
        }
        let before = CONTEXTS.load(Ordering::Acquire);
        let made = Box::into_raw(Box::new(Owned {
            process: identity::process_id(),
            contexts: AioContexts::new(Arc::new(SimHost::new())),
        }));
        if CONTEXTS.compare_exchange(before, made, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: made above and published nowhere.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

fn known() -> Option<&'static AioContexts> {
    // SAFETY: null or a leaked object in the arena.
    let owned = unsafe { CONTEXTS.load(Ordering::Acquire).as_ref() }?;
    (owned.process == identity::process_id()).then_some(&owned.contexts)
}

/// At exit: waits for everything in flight, if this process ever used AIO.
pub fn drain() {
    if let Some(contexts) = known() {
        drop(contexts.drain());
    }
}

/// Moves what the kernel has for this process's contexts into their rings.
pub fn deliver() {
    if let Some(contexts) = known() {
        contexts.deliver();
    }
}

impl SimHost {
    fn new() -> Self {
        Self { guest: Guest, possible_cpus: possible_cpus(), counters: Counters::default() }
    }
}

fn number_in(path: &[u8]) -> Option<u64> {
    let text = message::read_file(path, 4096).ok()?;
    core::str::from_utf8(&text).ok()?.trim().parse().ok()
}

/// Highest number in `/sys/devices/system/cpu/possible` ("0-1", "0,2-3") and one.
fn possible_cpus() -> u32 {
    message::read_file(b"/sys/devices/system/cpu/possible", 4096)
        .ok()
        .and_then(|text| {
            let text = String::from_utf8(text).ok()?;
            let last = text.trim().rsplit([',', '-']).next()?.parse::<u32>().ok()?;
            last.checked_add(1)
        })
        .unwrap_or(1)
}

impl GuestMemory for SimHost {
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.guest.read(from, out)
    }

    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        self.guest.write(to, data)
    }
}

impl AioHost for SimHost {
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno> {
        let (guest, alias) = map_twice(bytes).map_err(|_| Errno::ENOMEM)?;
        let alias = NonNull::new(alias as *mut u8).ok_or(Errno::ENOMEM)?;
        // SAFETY: mapped for `bytes`, until `unmap_ring`; the guest's doings with its own view
        // leave this one whole.
        Ok(unsafe { RingMapping::new(guest as u64, alias, bytes) })
    }

    fn unmap_ring(&self, mapping: RingMapping) {
        let bytes = mapping.bytes();
        if let Ok(guest) = usize::try_from(mapping.guest()) {
            unmap(guest, bytes);
        }
        unmap(mapping.alias().as_ptr() as usize, bytes);
    }

    fn file(&self, fd: i32) -> Result<Descriptor, Errno> {
        match files::lookup(fd) {
            // An O_PATH descriptor counts as not open.
            Some(file) if file.is_path() => Err(Errno::EBADF),
            Some(file) => Ok(Descriptor::Served(file)),
            None => kernel_aio::find(fd).map(|()| Descriptor::Kernels),
        }
    }

    fn kernel_context(&self, nr_events: u32) -> Result<Arc<dyn KernelContext>, Errno> {
        Ok(Arc::new(kernel_aio::Hidden::new(nr_events)?))
    }

    fn event_counter(&self, fd: i32) -> Result<Arc<dyn EventCounter>, Errno> {
        if files::is_internal(fd) {
            return Err(Errno::EBADF);
        }
        let counter = self.counters.get(fd)?;
        service::take_over();
        Ok(counter)
    }

    fn possible_cpus(&self) -> u32 {
        self.possible_cpus
    }

    fn aio_max_nr(&self) -> u64 {
        number_in(b"/proc/sys/fs/aio-max-nr").unwrap_or(65536)
    }

    fn charge(&self, nr: u32) -> Result<(), Errno> {
        let Some(family) = family::family() else { return Err(Errno::EAGAIN) };
        let most = self.aio_max_nr();
        let add = |now: u64| now.checked_add(u64::from(nr)).filter(|sum| *sum <= most);
        let try_it = || family.aio_nr.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        if try_it().is_err() {
            // Processes that were killed may still be counted.
            family.check_the_dead();
            try_it().map_err(|_| Errno::EAGAIN)?;
        }
        process::current().aio_charged.fetch_add(u64::from(nr), Ordering::Relaxed);
        Ok(())
    }

    fn uncharge(&self, nr: u32) {
        process::current().aio_charged.fetch_sub(u64::from(nr), Ordering::Relaxed);
        if let Some(family) = family::family() {
            family.aio_nr.fetch_sub(u64::from(nr), Ordering::Relaxed);
        }
    }

    fn may_use_realtime_io(&self) -> bool {
        /// CAP_SYS_ADMIN and CAP_SYS_NICE.
        const EITHER: u32 = 1 << 21 | 1 << 23;
        sys::effective_capabilities() & EITHER != 0
    }

    fn now_ns(&self) -> u64 {
        wait::now_ns()
    }

    fn start(&self) {
        process::current().start();
    }

    fn drive(&self) {
        process::current().step();
    }

    fn wait(&self, wait: Wait<'_>) -> WaitEnd {
        let process = process::current();
        let signals = match wait.signals {
            Signals::Held => wait::Signals::Held,
            Signals::Open => wait::Signals::AsTheyAre,
            Signals::Masked(mask) => wait::Signals::Masked(mask),
        };
        loop {
            let progress = process.step();
            if (wait.ready)() {
                // Pending signals that the mask lets through are handled first.
                let handled = match wait.signals {
                    Signals::Masked(mask) => wait::let_in(mask),
                    Signals::Held | Signals::Open => false,
                };
                return if handled { WaitEnd::Interrupted } else { WaitEnd::Ready };
            }
            if progress {
                continue;
            }
            let left = match wait.deadline_ns {
                None => None,
                Some(deadline) => match deadline.checked_sub(wait::now_ns()) {
                    None | Some(0) => return WaitEnd::TimedOut,
                    left => left,
                },
            };
            match process.sleep(wait.ready, left, signals) {
                wait::WaitEnd::Interrupted => return WaitEnd::Interrupted,
                wait::WaitEnd::Woken | wait::WaitEnd::TimedOut => {}
            }
        }
    }

    fn wake(&self, _: WaitKey, _: u32) {
        process::current().sleepers.wake();
    }

    fn reaps_in_user_space(&self) {
        service::take_over();
    }
}

/// New memory, mapped twice where the kernel chooses: the guest's view and ours. Nothing can
/// shrink it, so that our view stays whole whatever the guest does to its own.
fn map_twice(bytes: usize) -> Result<(usize, usize), Errno> {
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let map = |flags: i32, file: usize| {
        // SAFETY: new memory where the kernel chooses.
        sys::check(unsafe {
            sys::syscall6(libc::SYS_mmap, 0, bytes, protection, flags as usize, file, 0)
        })
    };
    let both = |guest: usize, alias: Result<usize, Errno>| {
        alias.inspect_err(|_| unmap(guest, bytes)).map(|alias| (guest, alias))
    };
    let file = sys::memfd(c"[aio]")?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    let sized = sys::size_memory_file(file, bytes)
        .and_then(|()| sys::fcntl(file, libc::F_ADD_SEALS, seals as usize));
    let mapped = sized.and_then(|_| {
        let guest = map(libc::MAP_SHARED, file as usize)?;
        both(guest, map(libc::MAP_SHARED, file as usize))
    });
    let _ = sys::close(file);
    if mapped != Err(Errno::EFBIG) {
        return mapped;
    }
    // RLIMIT_FSIZE forbids a file, but no memory: a mapping grown from nothing is the same one.
    let guest = map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, usize::MAX)?;
    let may_move = libc::MREMAP_MAYMOVE as usize;
    // SAFETY: duplicates the mapping made above; moves nothing.
    let alias =
        sys::check(unsafe { sys::syscall6(libc::SYS_mremap, guest, 0, bytes, may_move, 0, 0) });
    both(guest, alias)
}

fn unmap(at: usize, bytes: usize) {
    // SAFETY: a mapping that `map_ring` made and that nobody uses any more.
    unsafe { sys::syscall6(libc::SYS_munmap, at, bytes, 0, 0, 0, 0) };
}

impl AioFile for OpenFile {
    fn traits(&self) -> FileTraits {
        let flags = self.flags();
        FileTraits {
            readable: self.readable(),
            writable: self.writable(),
            append: flags & libc::O_APPEND != 0,
            dsync: flags & libc::O_DSYNC != 0,
            sync: flags & libc::O_SYNC == libc::O_SYNC,
            // A directory can be synced and nothing else.
            has_data: self.listing().is_none(),
            dontcache: true,
            ..FileTraits::REGULAR
        }
    }

    fn completes_in_submit(&self, request: &Request) -> bool {
        let sync = matches!(request.op, Op::Fsync | Op::Fdatasync);
        if !sync && self.flags() & libc::O_DIRECT == 0 {
            return true;
        }
        let end = request.offset.saturating_add(request.buffer.len() as u64);
        match request.op {
            // As ext4 does: extending O_DIRECT writes are synchronous.
            Op::Write => request.flags.append() || end > self.volume().size(),
            Op::Read => self.volume().is_hole(request.offset, request.buffer.len() as u64),
            Op::Fsync | Op::Fdatasync => false,
        }
    }

    fn submit(self: Arc<Self>, mut request: Request, done: Completion) {
        match self.admit(&mut request) {
            Ok(()) => {}
            Err(Stop::With(answer)) => return done.finish(answer),
            Err(Stop::TooBig(too_big)) => {
                done.finish(Err(Errno::EFBIG));
                // Last: a handler may leave by siglongjmp.
                too_big.signal();
                return;
            }
        }
        let held = self.volume().try_hold();
        process::current().workers.start(Work { file: self, held, request, done });
    }
}

/// A request of the guest on a protected file. The open file is held until it is done: close(2)
/// does not end it.
pub struct Work {
    file: Arc<OpenFile>,
    /// The volume, unless another program has it.
    held: Option<Held>,
    request: Request,
    done: Completion,
}

impl Work {
    /// Serves the request and completes it.
    pub async fn run(self) {
        let Self { file, held, request, done } = self;
        let held = match held {
            Some(held) => Ok(held),
            None => file.volume().hold_soon().await,
        };
        let answer = match held {
            Ok(held) => Self::serve(&file, &held, request).await,
            Err(errno) => Err(errno),
        };
        done.finish(answer);
    }

    async fn serve(file: &OpenFile, held: &Held, request: Request) -> Result<usize, Errno> {
        let disk = held.disk_for_guest(request.submitted_ns)?;
        match request.op {
            Op::Read | Op::Write => {
                let write = request.op == Op::Write;
                let append = write && request.flags.append();
                let moving = Moving {
                    write,
                    offset: (!append).then_some(request.offset),
                    sync: write && request.flags.dsync(),
                };
                let moved = file.transfer((held, &disk), moving, &request.buffer).await;
                moved.map(|(_, length)| length)
            }
            Op::Fsync | Op::Fdatasync => {
                let synced = file.volume().make_durable(held, &disk).await;
                file.after_sync(synced).map(|()| 0)
            }
        }
    }
}

/// Why a request ends before it begins.
enum Stop {
    With(Result<usize, Errno>),
    TooBig(TooBig),
}

impl From<TooBig> for Stop {
    fn from(too_big: TooBig) -> Self {
        Self::TooBig(too_big)
    }
}

impl OpenFile {
    /// What ext4 decides about a request before it touches data, in its order: RWF_NOWAIT, the
    /// limits of size (which may shorten a write), `O_DIRECT`'s alignment.
    fn admit(&self, request: &mut Request) -> Result<(), Stop> {
        let stop = |errno| Err(Stop::With(Err(errno)));
        let direct = self.direct();
        let length = request.buffer.len() as u64;
        let write = match request.op {
            Op::Read => false,
            Op::Write => true,
            Op::Fsync | Op::Fdatasync => return Ok(()),
        };
        let append = write && request.flags.append();
        let offset = if append { self.volume().size() } else { request.offset };
        if write {
            if request.flags.nowait() && !direct {
                return stop(Errno::EOPNOTSUPP);
            }
            if length == 0 {
                return Ok(());
            }
            let room = limits::room(offset, length, files::io::MAX_BYTES)?;
            if room < length {
                request.buffer.truncate(room);
            }
        }
        if !direct || length == 0 {
            return Ok(());
        }
        if request.flags.nowait() && self.waits_for_writeback(offset, length) {
            return stop(Errno::EAGAIN);
        }
        // Only an overwrite can be started without waiting.
        if write && request.flags.nowait() {
            let end = offset.saturating_add(request.buffer.len() as u64);
            let waits = !self.volume().standing().is_here();
            if waits || end > self.volume().size() || self.has_hole(offset, end) {
                return stop(Errno::EAGAIN);
            }
        }
        let transfer = Transfer { write, offset, ranges: request.buffer.ranges() };
        if !transfer.is_aligned() {
            let checked = self
                .volume()
                .hold()
                .and_then(|held| process::current().block_on(self.check_direct(&held, transfer)));
            checked.or_else(stop)?;
        }
        Ok(())
    }

    /// Whether a block of the range has never been written.
    fn has_hole(&self, offset: u64, end: u64) -> bool {
        const BLOCK: u64 = 4096;
        let first = offset - offset % BLOCK;
        (first..end).step_by(BLOCK as usize).any(|at| self.volume().is_hole(at, BLOCK))
    }
}
