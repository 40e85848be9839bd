//! A port in user memory, its doorbell, and the host's clock beside it, by the usercalls that
//! `sgx-runner` documents (`daemon`).
//!
//! Holds: memory that the host names is used only if it lies outside of the enclave; time is the
//! host's word and never goes back; nothing here leaves the enclave but ringing, sleeping, opening
//! and closing.

use core::{
    arch::x86_64::_rdtsc,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Acquire, Relaxed},
        fence,
    },
};
use std::{
    io,
    os::fortanix_sgx::{
        mem::is_user_range,
        usercalls::{self, raw::Fd},
    },
    sync::Arc,
};

use postern_edl::port::Geometry;
use postern_trusted::port::{Doorbell, Lane, SharedWords, Sleeper, Switchless};

/// The event of a doorbell, and that of a daemon that has hung up.
const RUNG: u64 = 0b10;
const OVER: u64 = 0b01;

/// An open port: its stream at the host, and the clock.
pub struct Port {
    stream: Fd,
    clock: Clock,
    /// A daemon has hung up, since somebody asked last.
    over: AtomicBool,
}

impl Port {
    /// A port of this geometry, and the lane on it.
    ///
    /// # Errors
    /// What the host says; `InvalidData` if it names memory that is not its own.
    pub fn make(geometry: Geometry) -> io::Result<(Arc<Self>, Lane)> {
        let bytes = geometry.region_bytes().next_multiple_of(4096);
        let (stream, local, _) = usercalls::connect_stream(&format!("postern-port:{bytes}"))?;
        let wrong = || {
            usercalls::close(stream);
            io::Error::from(io::ErrorKind::InvalidData)
        };
        let mut addresses = local.split(' ').map(|word| usize::from_str_radix(word, 16));
        let (Some(Ok(base)), Some(Ok(clock))) = (addresses.next(), addresses.next()) else {
            return Err(wrong());
        };
        let clock = Clock::at(clock).ok_or_else(wrong)?;
        let port = Arc::new(Self { stream, clock, over: AtomicBool::new(false) });
        let outside = |base: usize, bytes| is_user_range(base as *const u8, bytes);
        // SAFETY: 1. The host says that so many bytes are mapped there; if they are not, an access
        //    faults. They stay until the stream is closed, which the last holder of `port` does:
        //    the lane holds it as its bell, behind the words. 2. It is outside, where no reference
        //    of ours points.
        let words = unsafe { SharedWords::new(base as *mut u8, bytes, outside) };
        let words = words.map_err(io::Error::other)?;
        let lane = Lane::new(words, geometry, Bell(port.clone())).map_err(io::Error::other)?;
        Ok((port, lane))
    }

    /// Number of its stream.
    pub fn stream(&self) -> Fd {
        self.stream
    }

    /// Nanoseconds of the host's monotonic clock.
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Whether a daemon was said to have hung up since this was asked last.
    pub fn was_hung_up(&self) -> bool {
        self.over.load(Relaxed) && self.over.swap(false, Relaxed)
    }

    /// Sleeps until something rings, `limit_ns` nanoseconds at most.
    pub fn sleep(&self, limit_ns: u64) {
        // A limit of 0 would be no sleep, one of all ones has no end.
        let limit = limit_ns.clamp(1, u64::MAX - 1);
        if usercalls::wait(RUNG | OVER, limit).is_ok_and(|events| events & OVER != 0) {
            self.over.store(true, Relaxed);
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        usercalls::close(self.stream);
    }
}

/// A lane's hold on its port.
struct Bell(Arc<Port>);

impl Switchless for Bell {
    fn postern_wake(&self, _port: u64) -> Result<(), u32> {
        // A port that cannot be rung has no daemon that hears.
        let _ = usercalls::flush(self.0.stream);
        Ok(())
    }

    fn postern_sleep(&self, _port: u64, _: Sleeper, limit_ns: u64) -> Result<(), u32> {
        self.0.sleep(limit_ns);
        Ok(())
    }
}

impl Doorbell for Bell {
    fn now_ns(&self) -> u64 {
        self.0.now_ns()
    }
}

/// The host's clock: sequence, time stamp counter, nanoseconds, nanoseconds per tick times 2^32.
struct Clock {
    words: &'static [AtomicU64; 4],
    /// The latest time that was given out.
    last: AtomicU64,
}

impl Clock {
    fn at(address: usize) -> Option<Self> {
        let words = address as *const [AtomicU64; 4];
        if !address.is_multiple_of(8) || !is_user_range(words.cast(), size_of_val(&[0_u64; 4])) {
            return None;
        }
        // SAFETY: aligned, and outside of the enclave, where only atomics are used. That it is mapped
        //    as long as the port is open is the host's word: else an access faults.
        let words = unsafe { words.as_ref() }?;
        Some(Self { words, last: AtomicU64::new(0) })
    }

    fn now_ns(&self) -> u64 {
        /// Looks at a clock that is being written.
        const LOOKS: usize = 8;
        let mut now = 0;
        for _ in 0..LOOKS {
            let sequence = self.words[0].load(Acquire);
            let [ticks, ns, rate] =
                [&self.words[1], &self.words[2], &self.words[3]].map(|word| word.load(Relaxed));
            // The words were loaded before the sequence is loaded again.
            fence(Acquire);
            if !sequence.is_multiple_of(2) || self.words[0].load(Relaxed) != sequence {
                continue;
            }
            now = ns;
            if rate != 0 {
                // SAFETY: the host says that the CPU lets enclaves read it; else this faults.
                let passed = unsafe { _rdtsc() }.saturating_sub(ticks);
                let passed = (u128::from(passed) * u128::from(rate)) >> 32;
                now = ns.saturating_add(u64::try_from(passed).unwrap_or(0));
            }
            break;
        }
        self.last.fetch_max(now, Relaxed).max(now)
    }
}
