//! A clock in user memory: the host's monotonic time for an enclave that must not leave to ask.
//!
//! ```text
//! word 0   sequence: odd while the others change
//! word 1   time stamp counter
//! word 2   CLOCK_MONOTONIC at that moment, nanoseconds
//! word 3   nanoseconds per tick of the counter, times 2^32; 0: the program must not read it
//! ```
//!
//! The enclave reads the counter (allowed inside since SGX2) and adds what has passed since. Where
//! it may not, it takes the time as it was written last.
//!
//! Holds: written anew every few milliseconds, so that what the counter's rate is off by does not
//! add up. It is a claim of the host's like any other time.
#![allow(unsafe_code)]

use std::{
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed, Ordering::Release, fence},
    },
    thread,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// How often it is written, with a counter and without.
const OFTEN: Duration = Duration::from_millis(20);
const OFTENER: Duration = Duration::from_millis(1);
/// From the first look at the counter to the second.
const BASE_LINE_NS: u64 = 2_000_000;

/// The words.
#[repr(align(64))]
pub struct Clock {
    words: [AtomicU64; 4],
    counts: bool,
    /// Counter and time when it was started.
    first: (u64, u64),
}

impl Clock {
    /// Starts a clock; it stops when it is dropped. `counts`: the program may read the counter.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub fn start(counts: bool) -> io::Result<Arc<Self>> {
        let first = look();
        while look().1 < first.1.saturating_add(BASE_LINE_NS) {
            core::hint::spin_loop();
        }
        let clock = Arc::new(Self { words: Default::default(), counts, first });
        clock.write();
        let running = Arc::downgrade(&clock);
        let pause = if counts { OFTEN } else { OFTENER };
        thread::Builder::new().name("clock".into()).spawn(move || run(&running, pause))?;
        Ok(clock)
    }

    /// Where it lies.
    pub fn address(&self) -> u64 {
        core::ptr::from_ref(&self.words) as u64
    }

    fn write(&self) {
        let (ticks, ns) = look();
        let (passed, counted) = (ns - self.first.1, ticks.saturating_sub(self.first.0));
        let rate = (u128::from(passed) << 32) / u128::from(counted.max(1));
        let rate = if self.counts { u64::try_from(rate).unwrap_or(0) } else { 0 };
        let sequence = self.words[0].load(Relaxed);
        self.words[0].store(sequence.wrapping_add(1), Relaxed);
        // The sequence is odd before a word changes, and even after all have.
        fence(Release);
        for (word, value) in self.words[1..].iter().zip([ticks, ns, rate]) {
            word.store(value, Relaxed);
        }
        self.words[0].store(sequence.wrapping_add(2), Release);
    }
}

fn run(clock: &Weak<Clock>, pause: Duration) {
    loop {
        thread::sleep(pause);
        let Some(clock) = clock.upgrade() else { return };
        clock.write();
    }
}

/// Counter and time of one moment: the closest of a few looks.
fn look() -> (u64, u64) {
    const LOOKS: usize = 3;
    let mut best = (u64::MAX, (0, 0));
    for _ in 0..LOOKS {
        // SAFETY: every x86-64 CPU has the counter, and Linux lets everybody read it.
        let (before, ns, after) = unsafe {
            use core::arch::x86_64::_rdtsc;
            (_rdtsc(), monotonic_ns(), _rdtsc())
        };
        let apart = after.wrapping_sub(before);
        if apart < best.0 {
            best = (apart, (before.wrapping_add(apart / 2), ns));
        }
    }
    best.1
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::Ordering::Acquire;

    #[test]
    fn what_the_words_say_lies_between_two_looks_at_the_system_clock() {
        let clock = Clock::start(false).unwrap();
        let before = clock.first.1;
        let read = || clock.words.each_ref().map(|word| word.load(Acquire));
        let words = loop {
            let words = read();
            if words[0].is_multiple_of(2) && read() == words {
                break words;
            }
        };
        assert!(before < words[2] && words[2] <= monotonic_ns(), "{words:?}");
        assert_eq!(words[3], 0, "a program that may not count is told so");
    }
}
