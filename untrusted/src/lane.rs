//! A lane: one port, one thread with a tokio runtime of its own, one [`Engine`].
//!
//! The thread turns the engine while there is work, spins for a short adaptive time, then sleeps
//! in tokio on the enclave's doorbell, the kernel's completions and the session's commands. A lane
//! of its own keeps a hostile or busy enclave from delaying the control socket or another lane.
//!
//! Holds: the lane ends only after everything in flight has completed; its mapping and its files
//! are released before the end is told.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::{Act, Engine, Place, Work, now_ns};
use crate::files::HostFile;
use crate::problem::log;
use crate::socket::watch as watch_fd;
use crate::stats::LaneStats;

/// Most threads of a lane beside its own, for flushes and discards that the kernel does not do by
/// itself; further ones wait.
const MOST_THREADS: usize = 4;

/// What a session asks of a lane.
#[derive(Debug)]
pub enum Command {
    /// Accept descriptors for this file.
    Open {
        /// Its handle.
        handle: u32,
        /// The file.
        file: Arc<HostFile>,
        /// Told when it is known.
        done: oneshot::Sender<()>,
    },
    /// Accept no further descriptors for this file.
    Close {
        /// Its handle.
        handle: u32,
        /// Told, or dropped, when nothing is in flight on it.
        done: oneshot::Sender<()>,
    },
    /// Have the enclave look at its leases.
    Leases,
    /// Bring the statistics up to date.
    Settle(oneshot::Sender<()>),
    /// Take no further descriptors, finish what is in flight, end.
    Stop,
    /// A flush done on a thread: request index, 0 or a negative errno.
    Done(usize, i64),
    /// The same of a discard: another may begin.
    Discarded(usize, i64),
}

/// What a lane runs with.
pub struct LaneParts {
    /// Its data path.
    pub engine: Engine,
    /// The eventfd by which the enclave wakes it.
    pub doorbell: OwnedFd,
    /// Its counters.
    pub stats: Arc<LaneStats>,
    /// Longest time to spin before sleeping; zero: never spin.
    pub spin: Duration,
    /// Number of the lane, for its thread's name and its log lines.
    pub number: u64,
}

/// The way to a running lane.
#[derive(Debug)]
pub struct LaneHandle {
    /// Where its commands go.
    pub commands: mpsc::UnboundedSender<Command>,
    /// Its sender is gone when the lane has ended.
    ended: watch::Receiver<()>,
}

impl LaneHandle {
    /// Resolves when the lane has ended: drained, mapping and files released.
    pub async fn ended(&mut self) {
        while self.ended.changed().await.is_ok() {}
    }
}

/// Starts the thread of a lane.
///
/// # Errors
/// The host has no thread or descriptor left.
pub fn start(parts: LaneParts) -> std::io::Result<LaneHandle> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MOST_THREADS)
        .build()?;
    let (commands, inbox) = mpsc::unbounded_channel();
    let (alive, ended) = watch::channel(());
    let LaneParts { engine, doorbell, stats, spin, number } = parts;
    let (doorbell, completed) = {
        let _runtime = runtime.enter();
        let completed = engine.completed().try_clone()?;
        (watch_fd(doorbell, Interest::READABLE)?, watch_fd(completed, Interest::READABLE)?)
    };
    let lane = Lane {
        engine,
        doorbell,
        completed,
        stats,
        spinner: Spinner::new(spin),
        number,
        commands: commands.downgrade(),
        inbox,
        stopping: false,
        discards: VecDeque::new(),
        discarding: false,
    };
    std::thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
        runtime.block_on(lane.run());
        drop(runtime);
        drop(alive);
    })?;
    Ok(LaneHandle { commands, ended })
}

struct Lane {
    engine: Engine,
    doorbell: AsyncFd<OwnedFd>,
    completed: AsyncFd<OwnedFd>,
    stats: Arc<LaneStats>,
    spinner: Spinner,
    number: u64,
    commands: mpsc::WeakUnboundedSender<Command>,
    inbox: mpsc::UnboundedReceiver<Command>,
    stopping: bool,
    /// Wait for their turn: one at a time, the file system works on each for a while. At most one
    /// for each request index.
    discards: VecDeque<Work>,
    discarding: bool,
}

impl Lane {
    async fn run(mut self) {
        // Whether the last wake-up brought nothing: then spinning again would be a waste.
        let mut in_vain = false;
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                self.obey(command);
            }
            let busy = self.turn();
            if busy {
                in_vain = false;
                continue;
            }
            if self.stopping && self.engine.is_drained() {
                break;
            }
            if !in_vain && self.spin() {
                continue;
            }
            self.sleep().await;
            in_vain = true;
        }
        self.engine.settle();
    }

    fn turn(&mut self) -> bool {
        let busy = self.engine.turn().unwrap_or_else(|fault| {
            self.stats.add(|c| &c.broken_rings, 1);
            log(fault, format_args!("lane {}", self.number), "the lane ends; restart its program");
            self.engine.stop();
            self.stopping = true;
            true
        });
        // Of nothing, which is usual, this allocates nothing.
        let work: Vec<_> = self.engine.take_work().collect();
        for work in work {
            match (work.place, work.act) {
                (Place::Here, _) => self.engine.done(work.index, work.run()),
                (Place::Thread, Act::Flush) => self.on_thread(work, Command::Done),
                (Place::Thread, Act::Discard { .. }) => self.discards.push_back(work),
            }
        }
        self.discard();
        busy
    }

    /// Does `work` on a thread, which tells the lane of its end.
    fn on_thread(&mut self, work: Work, end: fn(usize, i64) -> Command) {
        let Some(commands) = self.commands.upgrade() else {
            // The session forgot this lane: nobody is delayed by it any more.
            let result = work.run();
            return self.obey(end(work.index, result));
        };
        tokio::task::spawn_blocking(move || {
            let result = work.run();
            let Work { index, file, .. } = work;
            drop(file);
            // The lane waits for this before it ends.
            let _ = commands.send(end(index, result));
        });
    }

    /// Begins the next discard, if none is under way.
    fn discard(&mut self) {
        if !self.discarding
            && let Some(work) = self.discards.pop_front()
        {
            self.discarding = true;
            self.on_thread(work, Command::Discarded);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Open { handle, file, done } => {
                self.engine.add_file(handle, file);
                let _ = done.send(());
            }
            Command::Close { handle, done } => self.engine.close_file(handle, done),
            Command::Leases => self.engine.tell_of_leases(),
            Command::Settle(done) => {
                self.engine.settle();
                let _ = done.send(());
            }
            Command::Stop => {
                self.engine.stop();
                self.stopping = true;
            }
            Command::Done(index, result) => self.engine.done(index, result),
            Command::Discarded(index, result) => {
                self.discarding = false;
                self.engine.done(index, result);
                self.discard();
            }
        }
    }

    /// Answers whether work came while spinning.
    fn spin(&mut self) -> bool {
        let Some(until) = self.spinner.begin() else { return false };
        self.stats.add(|c| &c.spins, 1);
        let won = loop {
            if self.engine.has_submissions() || self.engine.has_completions() {
                break true;
            }
            if now_ns() >= until {
                break false;
            }
            // The kernel ends direct writes on a worker of the processor that was interrupted. It
            // does not take the place of a thread that spins there before that one's slice is over.
            std::thread::yield_now();
        };
        self.spinner.end(won);
        self.stats.add(|c| &c.spins_won, u64::from(won));
        won
    }

    async fn sleep(&mut self) {
        let mut command = None;
        if self.engine.prepare_sleep() {
            self.stats.add(|c| &c.sleeps, 1);
            let held = self.engine.held_until();
            let pause = held.map_or(Duration::ZERO, |until| {
                // The runtime's clock has steps of a millisecond.
                Duration::from_nanos(until.saturating_sub(now_ns())).max(Duration::from_millis(1))
            });
            // Edge-triggered: an eventfd need not be read for its next signal to be seen.
            tokio::select! {
                biased;
                guard = self.completed.readable() => {
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                }
                guard = self.doorbell.readable() => {
                    self.stats.add(|c| &c.doorbells_received, 1);
                    if let Ok(mut guard) = guard {
                        guard.clear_ready();
                    }
                }
                () = tokio::time::sleep(pause), if held.is_some() => {}
                // `None`: the session forgot this lane without a word, which is a stop.
                received = self.inbox.recv() => command = Some(received.unwrap_or(Command::Stop)),
            }
        }
        self.engine.awake();
        if let Some(command) = command {
            self.obey(command);
        }
    }
}

/// Decides whether spinning pays: a spin that is lost costs credit, one that is won earns it; out
/// of credit only every 32nd occasion is tried.
#[derive(Debug)]
struct Spinner {
    longest_ns: u64,
    credit: u32,
    skipped: u32,
}

impl Spinner {
    const MOST_CREDIT: u32 = 8;

    fn new(longest: Duration) -> Self {
        let longest_ns = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        Self { longest_ns, credit: Self::MOST_CREDIT, skipped: 0 }
    }

    /// Until when to spin, CLOCK_MONOTONIC nanoseconds; `None`: not now.
    fn begin(&mut self) -> Option<u64> {
        if self.longest_ns == 0 {
            return None;
        }
        if self.credit == 0 {
            self.skipped += 1;
            if self.skipped < 32 {
                return None;
            }
            self.skipped = 0;
        }
        Some(now_ns().saturating_add(self.longest_ns))
    }

    fn end(&mut self, won: bool) {
        self.credit = if won {
            (self.credit + 2).min(Self::MOST_CREDIT)
        } else {
            self.credit.saturating_sub(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spinner_that_always_loses_tries_one_occasion_in_32() {
        let mut spinner = Spinner::new(Duration::from_nanos(1));
        let mut spun = 0;
        for _ in 0..Spinner::MOST_CREDIT + 320 {
            if spinner.begin().is_some() {
                spun += 1;
                spinner.end(false);
            }
        }
        assert_eq!(spun, Spinner::MOST_CREDIT + 10);
        assert!(Spinner::new(Duration::ZERO).begin().is_none());
    }

    #[test]
    fn a_spinner_that_wins_again_spins_again() {
        let mut spinner = Spinner::new(Duration::from_nanos(1));
        spinner.credit = 0;
        spinner.end(true);
        assert!(spinner.begin().is_some());
    }
}
