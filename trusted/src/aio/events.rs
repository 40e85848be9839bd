//! io_getevents(2) and io_pgetevents(2).
//!
//! Events are copied to the guest first and taken out of the ring afterwards, without a lock held
//! while copying: if another reader took events in between, the copy is made again. So a fault
//! consumes nothing, and no event is handed out twice or lost.
//!
//! The guest's own tail is what a reader goes by, as in Linux: a guest that writes it reads stale
//! slots of its own ring, never anything else.

use alloc::sync::Arc;

use super::{AioContexts, Signals, Wait, WaitEnd, context::Context, ring::EVENT_BYTES};
use crate::{errno::Errno, platform::Fault};

/// Events copied at a time, through the caller's stack.
const CHUNK: usize = 32;

/// How long a caller wants to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// Not at all.
    None,
    /// For so many nanoseconds, at least 1.
    For(u64),
    /// For ever.
    Unlimited,
}

impl AioContexts {
    /// io_getevents(2): copies at least `min_nr` and at most `nr` events to `events`, waiting for
    /// them as long as the `struct timespec` at `timeout` says (0: for ever). Returns how many.
    ///
    /// The time is not validated, as Linux does not: nanoseconds carry over, a negative time is
    /// for ever. With `min_nr` 0 it never waits.
    ///
    /// # Errors
    /// In the kernel's order: `EFAULT` (`timeout`), `EINVAL` (no such context, or not
    /// `0 <= min_nr <= nr`); and if no event was got: `EFAULT` (`events`; nothing is consumed),
    /// `EINVAL` (destroyed meanwhile), `EINTR`.
    pub fn io_getevents(
        &self,
        ctx: u64,
        min_nr: i64,
        nr: i64,
        events: u64,
        timeout: u64,
    ) -> Result<usize, Errno> {
        let patience = self.patience(timeout)?;
        self.get_events(ctx, min_nr, nr, events, patience, Signals::Open)
    }

    /// io_pgetevents(2): as [`Self::io_getevents`], under the signal mask of the
    /// `struct __aio_sigset` at `usig` (0: none; a null mask inside it: none, whatever its size).
    ///
    /// # Errors
    /// As [`Self::io_getevents`]; between `timeout` and the rest: `EFAULT` (`usig`), `EINVAL`
    /// (size not 8), `EFAULT` (mask).
    pub fn io_pgetevents(
        &self,
        ctx: u64,
        min_nr: i64,
        nr: i64,
        events: u64,
        timeout: u64,
        usig: u64,
    ) -> Result<usize, Errno> {
        let patience = self.patience(timeout)?;
        let signals = match self.signal_mask(usig)? {
            Some(mask) => Signals::Masked(mask),
            None => Signals::Open,
        };
        self.get_events(ctx, min_nr, nr, events, patience, signals)
    }

    fn patience(&self, timeout: u64) -> Result<Patience, Errno> {
        if timeout == 0 {
            return Ok(Patience::Unlimited);
        }
        let [seconds, nanoseconds] = self.read_words(timeout)?.map(u64::cast_signed);
        // `ktime_set`: wrapping arithmetic, and more seconds than a ktime_t holds are for ever.
        if seconds >= i64::MAX / 1_000_000_000 {
            return Ok(Patience::Unlimited);
        }
        Ok(match seconds.wrapping_mul(1_000_000_000).wrapping_add(nanoseconds) {
            0 => Patience::None,
            ns => u64::try_from(ns).map_or(Patience::Unlimited, Patience::For),
        })
    }

    fn signal_mask(&self, usig: u64) -> Result<Option<u64>, Errno> {
        if usig == 0 {
            return Ok(None);
        }
        let [mask, size] = self.read_words(usig)?;
        if mask == 0 {
            return Ok(None);
        }
        if size != 8 {
            return Err(Errno::EINVAL);
        }
        let mut bytes = [0; 8];
        self.host.read(mask, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        Ok(Some(u64::from_ne_bytes(bytes)))
    }

    fn read_words(&self, address: u64) -> Result<[u64; 2], Errno> {
        let mut bytes = [0; 16];
        self.host.read(address, &mut bytes).map_err(|Fault| Errno::EFAULT)?;
        let value = u128::from_le_bytes(bytes);
        #[allow(clippy::cast_possible_truncation)]
        Ok([value as u64, (value >> 64) as u64])
    }

    fn get_events(
        &self,
        ctx: u64,
        min_nr: i64,
        nr: i64,
        events: u64,
        patience: Patience,
        signals: Signals,
    ) -> Result<usize, Errno> {
        let context = self.lookup(ctx)?;
        let (Ok(min), Ok(max)) = (u64::try_from(min_nr), u64::try_from(nr)) else {
            return Err(Errno::EINVAL);
        };
        if min > max {
            return Err(Errno::EINVAL);
        }
        let deadline_ns = match patience {
            Patience::For(ns) => self.host.now_ns().checked_add(ns),
            Patience::None | Patience::Unlimited => None,
        };
        let mut reader = Reader { context, min, max, events, got: 0 };
        self.host.drive();
        let mut result = reader.read();
        let mut end = None;
        while patience != Patience::None && matches!(result, Ok(Progress::More)) {
            end = Some(reader.wait(deadline_ns, signals));
            result = reader.read();
            if end != Some(WaitEnd::Ready) {
                break;
            }
        }
        if let (None, Signals::Masked(_)) = (end, signals) {
            // The mask is put in place even by a call that does not sleep.
            end = Some(reader.glance(signals));
        }
        match result {
            Err(errno) if reader.got == 0 => Err(errno),
            Ok(_) if reader.got == 0 && end == Some(WaitEnd::Interrupted) => Err(Errno::EINTR),
            _ => Ok(usize::try_from(reader.got).unwrap_or(usize::MAX)),
        }
    }
}

/// Whether a reader has what it came for.
enum Progress {
    /// At least the minimum.
    Enough,
    /// Less.
    More,
}

/// One call that reads a ring.
struct Reader {
    context: Arc<Context>,
    min: u64,
    max: u64,
    /// Guest address of the first event's place.
    events: u64,
    /// Events taken out of the ring so far.
    got: u64,
}

impl Reader {
    /// Takes what is there: `aio_read_events`.
    fn read(&mut self) -> Result<Progress, Errno> {
        self.context.deliver();
        self.take()?;
        if self.context.is_dead() {
            return Err(Errno::EINVAL);
        }
        Ok(if self.got >= self.min { Progress::Enough } else { Progress::More })
    }

    /// `aio_read_events_ring`.
    fn take(&mut self) -> Result<(), Errno> {
        loop {
            let look = self.context.look().ok_or(Errno::EINVAL)?;
            if look.empty {
                return Ok(());
            }
            let count =
                u32::try_from(self.max - self.got).map_or(look.count, |n| n.min(look.count));
            self.copy(look.head, count)?;
            if self.context.commit(&look, count) {
                self.got += u64::from(count);
                return Ok(());
            }
        }
    }

    /// Copies `count` events from ring position `from` on to the guest.
    fn copy(&self, from: u32, count: u32) -> Result<(), Errno> {
        let mut chunk = [[0; EVENT_BYTES]; CHUNK];
        let mut done = 0;
        while done < count {
            let events = &mut chunk[..(count - done).min(CHUNK as u32) as usize];
            self.context.copy(from + done, events).ok_or(Errno::EINVAL)?;
            let place = (self.got + u64::from(done)) * EVENT_BYTES as u64;
            self.context
                .host
                .write(self.events.wrapping_add(place), events.as_flattened())
                .map_err(|Fault| Errno::EFAULT)?;
            done += events.len() as u32;
        }
        Ok(())
    }

    /// Sleeps until the rest of the minimum is there all at once.
    fn wait(&self, deadline_ns: Option<u64>, signals: Signals) -> WaitEnd {
        let missing = u32::try_from(self.min - self.got).unwrap_or(u32::MAX);
        let ready = || {
            self.context.deliver();
            self.context.has(missing)
        };
        loop {
            let end = self.context.host.wait(Wait {
                key: self.context.key,
                at_least: missing,
                deadline_ns,
                signals,
                ready: &ready,
            });
            if end != WaitEnd::Ready || ready() {
                return end;
            }
        }
    }

    /// Puts the mask in place without sleeping.
    fn glance(&self, signals: Signals) -> WaitEnd {
        self.context.host.wait(Wait {
            key: self.context.key,
            at_least: 0,
            deadline_ns: None,
            signals,
            ready: &|| true,
        })
    }
}
