//! One lane: a thread at the daemon's end of a port.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    thread::JoinHandle,
    time::Duration,
};

use postern_edl::port::cursor;
use postern_hostile::{Deeds, Host, Rng};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{read, write},
    net::{Shutdown, shutdown},
};

use crate::{
    files::Files,
    port::Port,
    script::{Bells, Script},
};

/// An idle lane looks around this often, for a doorbell may have been lost on purpose.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// What a lane still does after it has hung up.
const HAUNTS: u64 = 20_000;
/// Bits that flip before the thread that flips them rests.
const FLIPS: usize = 256;

/// What all lanes have done wrong.
pub static MISDEEDS: AtomicU64 = AtomicU64::new(0);

/// What a lane is made of.
pub struct Parts {
    /// Its memory.
    pub port: Arc<Port>,
    /// Rung for the daemon, a driver, the service thread.
    pub bells: [OwnedFd; 3],
    /// The files of its session.
    pub files: Files,
    /// The control connection.
    pub socket: OwnedFd,
    /// Changes when the daemon ends.
    pub life: Arc<AtomicU64>,
}

/// A lane at work. Dropping it ends it.
pub struct Lane {
    quit: Arc<AtomicBool>,
    haunts: bool,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    /// Starts the thread.
    pub fn start(parts: Parts, script: Script, seed: u64) -> Self {
        let quit = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&quit);
        let thread = std::thread::spawn(move || {
            let done = Arc::new(AtomicBool::new(false));
            let flicker = script.flickers.then(|| {
                let (port, done) = (Arc::clone(&parts.port), Arc::clone(&done));
                std::thread::spawn(move || flicker(&port, &done, seed))
            });
            Worker::new(parts, script, seed).run(&told);
            done.store(true, Ordering::Relaxed);
            if let Some(flicker) = flicker {
                let _ = flicker.join();
            }
        });
        Self { quit, haunts: script.haunts, thread: Some(thread) }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return };
        // A ghost does not keep anybody from making another lane of the same memory.
        if !self.haunts {
            let _ = thread.join();
        }
    }
}

struct Worker {
    parts: Parts,
    script: Script,
    host: Host<Files>,
    rng: Rng,
    /// Of its misdeeds.
    counted: u64,
}

impl Worker {
    fn new(parts: Parts, script: Script, seed: u64) -> Self {
        let host = Host::new(*parts.port.geometry(), seed, script.temper, parts.files.clone());
        Self { parts, script, host, rng: Rng::new(!seed), counted: 0 }
    }

    fn run(mut self, quit: &AtomicBool) {
        let port = Arc::clone(&self.parts.port);
        let words = port.words();
        let life = self.parts.life.load(Ordering::Acquire);
        let (mut acts, mut left) = (0, None);
        loop {
            if left.is_none() {
                if self.rng.chance(self.script.leaves) && acts > 0 {
                    // Only the first to end it does.
                    let (set, seen) = (Ordering::AcqRel, Ordering::Relaxed);
                    let _ = self.parts.life.compare_exchange(life, life + 1, set, seen);
                }
                let ended = self.parts.life.load(Ordering::Acquire) != life;
                if ended || quit.load(Ordering::Relaxed) {
                    left = Some(acts);
                }
            }
            if let Some(at) = left {
                let more = self.script.haunts && acts < at + HAUNTS;
                if acts == at || !more {
                    // Who sees it may rely on it that an honest daemon is done.
                    let _ = shutdown(&self.parts.socket, Shutdown::Both);
                }
                if !more {
                    return;
                }
            }
            if self.script.mute_after.is_some_and(|most| acts >= most) {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            let seen = words[cursor::SQ_PUBLISHED].load(Ordering::Acquire);
            let answered = self.host.act(words);
            acts += 1;
            self.count();
            self.ring(answered);
            if self.host.waiting() == 0 {
                self.rest(seen);
            }
        }
    }

    /// Adds what was done wrong since the last time.
    fn count(&mut self) {
        let Deeds { honest: _, fidgets, shorts, refusals, lies, breaches } = *self.host.deeds();
        let wrong = fidgets + shorts + refusals + lies + breaches;
        MISDEEDS.fetch_add(wrong - self.counted, Ordering::Relaxed);
        self.counted = wrong;
    }

    fn ring(&self, answered: bool) {
        let words = self.parts.port.words();
        let ring = |bell: &OwnedFd| {
            // Full is rung.
            let _ = write(bell, &1_u64.to_ne_bytes());
        };
        let [_, driver, service] = &self.parts.bells;
        match self.script.bells {
            Bells::Never => {}
            Bells::Always => [driver, service].into_iter().for_each(ring),
            Bells::AsAgreed if answered => {
                // Partner: the enclave's fence between its word and its last look at the ring.
                fence(Ordering::SeqCst);
                if words[cursor::DRIVER_SLEEPS].load(Ordering::Relaxed) != 0 {
                    ring(driver);
                } else if words[cursor::SERVICE_SLEEPS].load(Ordering::Relaxed) != 0 {
                    ring(service);
                }
            }
            Bells::AsAgreed => {}
        }
    }

    /// Sleeps until the doorbell, unless something was published since `seen`.
    fn rest(&self, seen: u64) {
        let words = self.parts.port.words();
        words[cursor::DAEMON_SLEEPS].store(1, Ordering::Relaxed);
        // Partner: the enclave's fence between what it publishes and its look at this word.
        fence(Ordering::SeqCst);
        if words[cursor::SQ_PUBLISHED].load(Ordering::Acquire) == seen {
            let bell = &self.parts.bells[0];
            let rung = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&LOOK));
            if rung == Ok(1) {
                let _ = read(bell, &mut [0; 8]);
            }
        }
        words[cursor::DAEMON_SLEEPS].store(0, Ordering::Relaxed);
    }
}

/// Flips bits of buffers, at times of completions, and flips them back at once.
fn flicker(port: &Port, done: &AtomicBool, seed: u64) {
    let (words, geometry) = (port.words(), port.geometry());
    let mut rng = Rng::new(seed.rotate_left(17));
    // The buffers that are used most lie first.
    let (data, most) = (geometry.data_offset / 8, (64 << 10).min(geometry.data_bytes / 8));
    let completions = geometry.cq_offset / 8..geometry.stamps_offset / 8;
    while !done.load(Ordering::Relaxed) {
        for _ in 0..FLIPS {
            let at = if rng.chance(20) {
                completions.start + rng.index(completions.len())
            } else {
                data + rng.index(most)
            };
            let bit = 1 << rng.below(64);
            words[at].fetch_xor(bit, Ordering::AcqRel);
            words[at].fetch_xor(bit, Ordering::AcqRel);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
