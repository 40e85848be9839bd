//! One process of the simulated enclave: its executor, its link to the daemon, its sleepers.
//!
//! [`current`] answers the calling process's own object, also in a child that a raw fork has just
//! made: the parent's object stays where it is (it is shared memory and still the parent's), the
//! child closes the descriptors it inherited from it and makes one of its own.
//!
//! Holds: whoever waits drives. A thread sleeps only after it has taken a place that keeps every
//! ring for it, announced itself to the daemon, and then looked at everything once more.
#![allow(unsafe_code)]

use core::{
    future::Future,
    pin::pin,
    sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering},
    task::{Context, Poll, Waker},
};
use std::{sync::Arc, task::Wake};

use once_cell::race::OnceBox;
use postern_edl::calls::PosternFile;
use postern_trusted::{
    errno::Errno,
    exec::{Executor, Start},
    platform::{NoEntropy, Platform},
    port::{LaneFile, Sleeper},
    sync::{self, Lock},
};

use crate::{
    family::{self, Family, standing::Core},
    files,
    freshness::CounterLink,
    host::Work,
    identity, inheritance, inside,
    link::Link,
    message, service,
    spin::Spinner,
    sys,
    wait::{self, Place, Signals, Sleepers, WaitEnd},
};

/// A process of the family.
pub struct Process {
    id: u32,
    /// Tasks of this process: requests of its guest and chores it took over.
    pub executor: Executor,
    /// Starts requests of its guest on protected files. Whoever does drives before it returns.
    pub workers: Box<dyn Start<Work>>,
    /// Where threads sleep that wait inside a call and drive.
    pub sleepers: Arc<Sleepers>,
    /// Where the service thread sleeps: other bells, so that what wakes a driver leaves it alone.
    pub service: Arc<Sleepers>,
    link: OnceBox<Link>,
    counters: OnceBox<CounterLink>,
    spinner: Spinner,
    /// One process attaches once; held across the attach.
    attaching: Lock<()>,
    /// Open volumes' host files over this process's lane, by volume index, with their handles.
    disks: Lock<Vec<Option<(u32, LaneFile)>>>,
    /// Rings when a hidden context of the kernel has events; -1 before there is one.
    aio_bell: AtomicI32,
    /// What `aio-nr` holds for this process's contexts.
    pub aio_charged: AtomicU64,
    /// Times that somebody drove.
    drives: AtomicU64,
    /// Number of the last guest request, for the claims in descriptors.
    requests: AtomicU64,
    /// It has a service thread.
    served: AtomicBool,
    /// The signal that it is to die of; 0 is none.
    doomed: AtomicI32,
}

/// Time and randomness of the simulated enclave.
pub struct SimPlatform;

impl Platform for SimPlatform {
    fn now_ns(&self) -> u64 {
        wait::now_ns()
    }

    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        let mut done = 0;
        while done < out.len() {
            let rest = &mut out[done..];
            // SAFETY: `rest` is writable for its length.
            let answer = sys::check(unsafe {
                let at = rest.as_mut_ptr() as usize;
                sys::syscall6(libc::SYS_getrandom, at, rest.len(), 0, 0, 0, 0)
            });
            match answer {
                Ok(0) => return Err(NoEntropy),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(_) => return Err(NoEntropy),
            }
        }
        Ok(())
    }
}

static HOOKS: sync::Hooks = sync::Hooks { owner: inside::thread_id, contended: yield_to };

/// A lock is contended: lets its holder run, and ends this process if the holder is dead. One that
/// died after it had let go left nothing torn.
fn yield_to(holder: u32, holds: &dyn Fn() -> bool) {
    if holder == inside::thread_id() {
        message::say_fault("a thread waits for a lock that it holds");
        abort();
    }
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    sys::yield_now();
    let look = ROUNDS.fetch_add(1, Ordering::Relaxed) % 1024 == 1023;
    if look && !identity::is_alive(holder) && holds() {
        family::end_torn(holder);
    }
}

/// Tells locks who their owners are: before the first one that other processes may hold.
pub fn set_lock_hooks() {
    sync::set_hooks(&HOOKS);
}

/// Private to the process, but copied by fork: then it points to the parent's object.
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(core::ptr::null_mut());

/// The calling process, if it has made its object already.
pub fn known() -> Option<&'static Process> {
    // SAFETY: null or a leaked object in the arena, which lives as long as the family.
    let known = unsafe { CURRENT.load(Ordering::Acquire).as_ref() };
    known.filter(|process| process.id == identity::process_id())
}

/// The calling process. Call only where [`family::family`] answers.
pub fn current() -> &'static Process {
    loop {
        if let Some(process) = known() {
            return process;
        }
        set_lock_hooks();
        let at = CURRENT.load(Ordering::Acquire);
        // SAFETY: as in `known`: here it is null or the parent's.
        let inherited = unsafe { at.as_ref() }.map(Process::descriptors).unwrap_or_default();
        match Process::new() {
            Ok(made) => {
                let made = Box::into_raw(Box::new(made));
                let won = CURRENT.compare_exchange(at, made, Ordering::AcqRel, Ordering::Acquire);
                if won.is_ok() {
                    inherited.into_iter().for_each(files::close_internal);
                    // SAFETY: leaked above.
                    let process: &'static Process = unsafe { &*made };
                    if let Some(family) = family::family() {
                        family.enrol(process);
                    }
                }
            }
            // No descriptor for an eventfd: nothing works in such a process, but the guest may
            // free some.
            Err(_) => sys::yield_now(),
        }
    }
}

fn note_open(name: &str, flags: u32, file: &PosternFile) {
    if let Some(family) = family::family() {
        family.host_files.opened(name, flags, file);
    }
}

/// Moves a descriptor of our own out of the guest's way.
#[must_use]
pub fn keep(descriptor: i32) -> i32 {
    files::protect_internal(descriptor)
}

/// Lets others run for a moment, and what this process has in flight progress.
pub fn pause() {
    let process = current();
    process.drive();
    if let Some(link) = process.linked() {
        link.check_daemon();
    }
    process.mend();
    if let Ok(place) = process.sleepers.enter(keep) {
        let _ = place.sleep(Some(1_000_000), Signals::Held);
    }
}

/// Ends the process at once, without destructors.
pub fn abort() -> ! {
    loop {
        // SAFETY: signals the calling process only; SIGABRT then SIGKILL leave nothing running.
        unsafe {
            let me = sys::syscall6(libc::SYS_getpid, 0, 0, 0, 0, 0, 0).cast_unsigned();
            sys::syscall6(libc::SYS_kill, me, libc::SIGKILL as usize, 0, 0, 0, 0);
        }
    }
}

impl Process {
    fn new() -> Result<Self, Errno> {
        let id = identity::process_id();
        let family_kick = family::family().map_or(-1, |family| family.kick);
        let sleepers = Arc::new(Sleepers::new(family_kick, keep)?);
        let service = Arc::new(Sleepers::new(family_kick, keep)?);
        let (drivers, servant) = (sleepers.clone(), service.clone());
        let executor = Executor::new(move || {
            if identity::process_id() == id {
                if !drivers.wake() {
                    servant.wake();
                }
            } else if let Some(family) = family::family() {
                wait::ring(family.kick);
            }
        });
        Ok(Self {
            id,
            workers: executor.pool(Work::run),
            executor,
            sleepers,
            service,
            link: OnceBox::new(),
            counters: OnceBox::new(),
            spinner: Spinner::new(),
            attaching: Lock::new(()),
            disks: Lock::new(Vec::new()),
            aio_bell: AtomicI32::new(-1),
            aio_charged: AtomicU64::new(0),
            drives: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            served: AtomicBool::new(false),
            doomed: AtomicI32::new(0),
        })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its service thread runs.
    pub fn set_served(&self) {
        self.served.store(true, Ordering::Release);
    }

    /// Whether it has a service thread.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }

    /// The service thread is to end the process by `signal`, unless it is doomed already.
    pub fn doom(&self, signal: i32) {
        let _ = self.doomed.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
    }

    /// What [`Self::doom`] was told.
    #[must_use]
    pub fn doomed(&self) -> Option<i32> {
        Some(self.doomed.load(Ordering::Acquire)).filter(|signal| *signal != 0)
    }

    fn descriptors(&self) -> Vec<i32> {
        let mut all = self.sleepers.descriptors();
        all.extend(self.service.descriptors());
        all.extend(Some(self.aio_bell.load(Ordering::Relaxed)).filter(|bell| *bell >= 0));
        if let Some(link) = self.link.get() {
            all.extend(link.descriptors());
        }
        all.extend(self.counters.get().map(CounterLink::descriptor));
        all
    }

    /// The link to the daemon, if the process has one.
    #[must_use]
    pub fn linked(&self) -> Option<&Link> {
        self.link.get()
    }

    /// The link to the daemon; attaches at the first call.
    ///
    /// # Errors
    /// `EIO` with a message if the daemon cannot be reached.
    pub fn link(&self) -> Result<&Link, Errno> {
        if let Some(link) = self.link.get() {
            return Ok(link);
        }
        let _one = self.attaching.lock();
        if let Some(link) = self.link.get() {
            return Ok(link);
        }
        let family = family::family().ok_or(Errno::EIO)?;
        // First of all: from here on there is something that a signal must not cut off.
        service::start();
        let link = Link::attach(family, keep)?;
        service::wait_for_start();
        let [driver, service, socket] = link.bells();
        [driver, socket].into_iter().for_each(|bell| self.sleepers.watch(bell));
        [service, socket].into_iter().for_each(|bell| self.service.watch(bell));
        let _ = self.link.set(Box::new(link));
        inheritance::connected();
        self.service.kick();
        self.link.get().ok_or(Errno::EIO)
    }

    /// The connection to the launcher's counters; made at the first call.
    ///
    /// # Errors
    /// What connect(2) says.
    pub fn counter_link(&self) -> Result<&CounterLink, Errno> {
        if let Some(link) = self.counters.get() {
            return Ok(link);
        }
        let _one = self.attaching.lock();
        if let Some(link) = self.counters.get() {
            return Ok(link);
        }
        let family = family::family().ok_or(Errno::EIO)?;
        let link = CounterLink::connect(&family.config.counter_socket, keep)?;
        self.sleepers.watch(link.descriptor());
        self.service.watch(link.descriptor());
        let _ = self.counters.set(Box::new(link));
        self.counters.get().ok_or(Errno::EIO)
    }

    /// The eventfd that hidden contexts of the kernel ring, heard by whoever sleeps inside a call
    /// and by the service thread, which this starts.
    ///
    /// # Errors
    /// What eventfd2(2) says.
    pub fn aio_bell(&self) -> Result<i32, Errno> {
        let known = || Some(self.aio_bell.load(Ordering::Acquire)).filter(|bell| *bell >= 0);
        if let Some(bell) = known() {
            return Ok(bell);
        }
        let _one = self.attaching.lock();
        if let Some(bell) = known() {
            return Ok(bell);
        }
        let bell = keep(wait::eventfd()?);
        self.sleepers.watch(bell);
        self.service.watch(bell);
        self.aio_bell.store(bell, Ordering::Release);
        service::start();
        Ok(bell)
    }

    /// Opens a host file by its name at the daemon, with flags of `postern_open`.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub fn open_host_file(&self, name: &str, flags: u32) -> Result<PosternFile, Errno> {
        let file = self.link()?.open(name, flags)?;
        note_open(name, flags, &file);
        Ok(file)
    }

    /// Makes a host file by its name at the daemon and opens it.
    ///
    /// # Errors
    /// As [`Link::create`].
    pub fn create_host_file(&self, name: &str, blocks: u64) -> Result<PosternFile, Errno> {
        let file = self.link()?.create(name, blocks)?;
        note_open(name, 0, &file);
        Ok(file)
    }

    /// Removes a host file. One that stays is removed when its directory is opened next.
    pub fn remove_host_file(&self, name: &str) {
        if let Ok(link) = self.link() {
            link.remove(name);
        }
    }

    /// Tells the daemon what only the enclave knows of a volume, where that is news.
    pub fn tell(&self, core: &Core) {
        if let Some(link) = self.link.get().filter(|link| !link.is_lost())
            && let Some(claims) = core.news()
        {
            link.tell(core.handle, claims);
        }
    }

    /// Gives a host file back to the daemon.
    pub fn give_back(&self, handle: u32) {
        if let Some(family) = family::family() {
            family.host_files.closing(handle);
        }
        if let Some(link) = self.link.get() {
            link.close(handle);
        }
    }

    /// A host file as this process reaches it.
    ///
    /// # Errors
    /// As [`Self::link`].
    pub fn lane_file(&self, handle: u32, host_blocks: u64) -> Result<LaneFile, Errno> {
        Ok(self.link()?.lane.file(handle, host_blocks, Arc::new(SimPlatform)))
    }

    /// The host file of volume `index`, whose core this is, over this process's own lane.
    ///
    /// # Errors
    /// As [`Self::link`].
    pub fn disk(&self, index: usize, core: &Core) -> Result<LaneFile, Errno> {
        if let Some(Some((handle, file))) = self.disks.lock().get(index)
            && *handle == core.handle
        {
            return Ok(file.clone());
        }
        let file = self.lane_file(core.handle, core.host_blocks)?;
        let mut disks = self.disks.lock();
        if disks.len() <= index {
            disks.resize_with(index + 1, || None);
        }
        disks[index] = Some((core.handle, file.clone()));
        Ok(file)
    }

    /// The same for one request of the guest, which carries its claims.
    ///
    /// # Errors
    /// As [`Self::link`].
    pub fn disk_for_guest(
        &self,
        index: usize,
        core: &Core,
        submitted_ns: u64,
    ) -> Result<LaneFile, Errno> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(self.disk(index, core)?.for_guest(submitted_ns, number))
    }

    /// Takes completions and runs tasks until there is nothing to do without waiting.
    pub fn drive(&self) -> bool {
        let mut progress = false;
        while self.step() {
            progress = true;
        }
        progress
    }

    /// Takes a few completions and runs what they wake; answers whether there was anything. A
    /// caller that waits for one event gets it before the rest is worked on: the guest's next
    /// submission then overlaps with that, instead of all requests travelling as one convoy.
    pub fn step(&self) -> bool {
        const FEW: usize = 4;
        self.drives.fetch_add(1, Ordering::Relaxed);
        let _active = self.executor.activate();
        let lane = self.link.get().map(|link| &link.lane);
        let counted = self.counters.get().map_or(0, CounterLink::poll);
        let taken = counted + lane.map_or(0, |lane| lane.poll(FEW));
        taken + self.start_up_to(2 * FEW) > 0
    }

    /// Runs ready tasks, so that new requests reach the daemon, with one ring of its doorbell.
    pub fn start(&self) {
        let _active = self.executor.activate();
        while self.start_up_to(16) > 0 {}
    }

    fn start_up_to(&self, limit: usize) -> usize {
        let _plug = self.link.get().map(|link| link.lane.plug());
        self.executor.run(limit)
    }

    /// How often somebody has driven so far: unchanged between two looks, the guest is silent.
    #[must_use]
    pub fn drives(&self) -> u64 {
        self.drives.load(Ordering::Relaxed)
    }

    /// Starts what is due of the family's background work, and drives if `take_over`. Otherwise
    /// the guest's threads go on with it: a second driver would only get in their way.
    pub fn tend(&'static self, family: &'static Family, take_over: bool) {
        let minded = family.mind_leases(self);
        let started = self.chores(family, wait::now_ns()) || minded;
        if take_over {
            self.drive();
        } else if started && self.sleepers.sleeping() == 0 {
            self.executor.run(1);
        }
    }

    /// Runs `future` to its end, driving everything else meanwhile. Signals are handled after it.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let flag = Arc::new(Flag {
            woken: AtomicBool::new(true),
            process: self.id,
            sleepers: self.sleepers.clone(),
        });
        let waker = Waker::from(flag.clone());
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        // Until its end the process has something under way.
        let _counted = self.executor.count();
        loop {
            let _active = self.executor.activate();
            if flag.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return output;
            }
            if self.drive() || flag.woken.load(Ordering::Acquire) {
                continue;
            }
            drop(_active);
            self.mend();
            let longest = service::longest_sleep(self);
            self.sleep(&|| flag.woken.load(Ordering::Acquire), longest, Signals::Held);
        }
    }

    /// Comes over to another daemon when the process's has ended, if that is the calling thread's
    /// to do.
    pub fn mend(&self) {
        if let Some(link) = self.link.get()
            && service::is_mine_to_mend()
            && link.is_lost()
            && let Some(family) = family::family()
        {
            link.mend(family);
        }
    }

    /// Whether the process waits for another daemon.
    #[must_use]
    pub fn waits_for_a_daemon(&self) -> bool {
        self.link.get().is_some_and(|link| link.is_lost() && link.lane.fault().is_none())
    }

    /// Sleeps unless `ready` holds or there is work; returns how the sleep ended.
    pub fn sleep(
        &self,
        ready: &dyn Fn() -> bool,
        timeout_ns: Option<u64>,
        signals: Signals,
    ) -> WaitEnd {
        if timeout_ns != Some(0)
            && let Some(link) = self.link.get()
            && let Some(family) = family::family()
            && self
                .spinner
                .spin(&family.tickets, || link.lane.needs_drive() || self.executor.has_ready())
        {
            return WaitEnd::Woken;
        }
        let Ok(place) = self.sleepers.enter(keep) else {
            sys::yield_now();
            return WaitEnd::Woken;
        };
        self.sleep_in(&place, Sleeper::Driver, ready, timeout_ns, signals)
    }

    /// As [`Self::sleep`], in a place already taken.
    pub fn sleep_in(
        &self,
        place: &Place<'_>,
        sleeper: Sleeper,
        ready: &dyn Fn() -> bool,
        timeout_ns: Option<u64>,
        signals: Signals,
    ) -> WaitEnd {
        let lane = self.link.get().map(|link| &link.lane);
        let quiet = lane.is_none_or(|lane| lane.prepare_sleep(sleeper));
        let end = if !quiet || self.executor.has_ready() || ready() {
            WaitEnd::Woken
        } else {
            place.sleep(timeout_ns, signals)
        };
        if let Some(lane) = lane {
            lane.cancel_sleep(sleeper);
        }
        if end != WaitEnd::Interrupted
            && let Some(link) = self.link.get()
            && !link.lane.needs_drive()
            && !self.executor.has_ready()
        {
            link.check_daemon();
        }
        end
    }
}

/// Wakes a thread that waits for one future.
struct Flag {
    woken: AtomicBool,
    process: u32,
    sleepers: Arc<Sleepers>,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        if identity::process_id() == self.process {
            self.sleepers.wake();
        } else if let Some(family) = family::family() {
            wait::ring(family.kick);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_that_died_after_it_had_let_go_ends_nobody() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!identity::is_alive(child.id()));
        // Every 1024th round looks.
        (0..2048).for_each(|_| yield_to(child.id(), &|| false));
        family::wait_for(child.id(), || false);
    }
}
