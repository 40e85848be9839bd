//! libaio's entry points, and the five system calls behind them.
//!
//! libaio returns a negative errno and leaves `errno` alone; libc's `syscall` is in [`crate::raw`].
//! The names carry no version here: the loader lets such a definition satisfy references to
//! LIBAIO_0.1, 0.4 and 0.5 alike.
//!
//! Follows libaio 0.3.113 (src/*.c).

use core::{
    ffi::{c_char, c_int, c_long, c_void},
    sync::atomic::{AtomicBool, Ordering},
};

use postern_sim::{family, files, guest, host};
use postern_trusted::errno::Errno;

use crate::{
    next::{export, negative},
    state,
};

/// Magic word of a ring header, and its place.
const RING_MAGIC: u32 = 0xa10a_10a1;

/// struct io_event.
#[repr(C)]
#[derive(Default)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// struct __aio_sigset, the kernel's.
#[repr(C)]
struct SignalMask {
    mask: u64,
    bytes: u64,
}

/// What `event.data` points to for io_queue_run.
type Callback = unsafe extern "C" fn(context: u64, iocb: u64, res: c_long, res2: c_long);

static NO_TIME: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 0 };

/// Whether this process or the one that forked it has ever made a context.
static USED: AtomicBool = AtomicBool::new(false);

/// Whether there may be rings in this process.
pub fn is_used() -> bool {
    USED.load(Ordering::Relaxed)
}

/// io_setup(2).
pub fn setup(events: u64, context: u64) -> Result<usize, Errno> {
    USED.store(true, Ordering::Relaxed);
    // The kernel's parameter has 32 bits.
    host::contexts().io_setup(events as u32, context).map(|()| 0)
}

/// io_destroy(2).
pub fn destroy(context: u64) -> Result<usize, Errno> {
    host::contexts().io_destroy(context).map(|()| 0)
}

/// io_submit(2).
pub fn submit(context: u64, count: i64, iocbs: u64) -> Result<usize, Errno> {
    host::contexts().io_submit(context, count, iocbs)
}

/// io_cancel(2).
pub fn cancel(context: u64, iocb: u64) -> Result<usize, Errno> {
    host::contexts().io_cancel(context, iocb).map(|()| 0)
}

/// io_getevents(2).
pub fn get_events(
    context: u64,
    min: i64,
    max: i64,
    events: u64,
    timeout: u64,
) -> Result<usize, Errno> {
    host::contexts().io_getevents(context, min, max, events, timeout)
}

/// io_pgetevents(2).
pub fn get_events_masked(
    context: u64,
    min: i64,
    max: i64,
    events: u64,
    timeout: u64,
    mask: u64,
) -> Result<usize, Errno> {
    host::contexts().io_pgetevents(context, min, max, events, timeout, mask)
}

/// What /proc/sys/fs/aio-nr holds for the guest: a descriptor of a file with the family's number,
/// if that is the file that `path` names and it is to be read.
pub fn open_number(path: *const c_char, flags: c_int) -> Option<Result<c_int, Errno>> {
    const PATH: &[u8] = b"/proc/sys/fs/aio-nr";
    // Most paths differ in their first eight bytes.
    if flags & libc::O_ACCMODE != libc::O_RDONLY
        || !state::active()
        || guest::read_u64(path as u64) != Ok(u64::from_ne_bytes(*b"/proc/sy"))
    {
        return None;
    }
    let mut room = [0; guest::PATH_ROOM];
    let family = family::family()?;
    if guest::read_path(path as u64, &mut room) != Ok(PATH) {
        return None;
    }
    family.check_the_dead();
    let number = family.aio_nr.load(Ordering::Relaxed);
    Some(files::text(&format!("{number}\n"), flags & libc::O_CLOEXEC))
}

/// libaio answers 0 without a system call when asked to poll an empty ring, whatever the other
/// arguments are.
fn is_poll_of_empty_ring(context: u64, timeout: u64) -> bool {
    let look = || -> Result<bool, Errno> {
        if context == 0 || timeout == 0 {
            return Ok(false);
        }
        let timeout = (guest::read_u64(timeout)?, guest::read_u64(timeout.wrapping_add(8))?);
        // Header words: id and nr, head and tail, magic.
        let cursors = guest::read_u64(context.wrapping_add(8))?;
        let magic = guest::read_u64(context.wrapping_add(16))? as u32;
        Ok(timeout == (0, 0) && magic == RING_MAGIC && cursors as u32 == (cursors >> 32) as u32)
    };
    look() == Ok(true)
}

/// io_getevents as libaio has it. Polling an empty ring drives what is in flight all the same:
/// nobody else may.
fn get_events_or_poll(
    context: u64,
    min: c_long,
    max: c_long,
    events: u64,
    timeout: u64,
) -> Result<usize, Errno> {
    if is_poll_of_empty_ring(context, timeout) {
        return Ok(get_events(context, 0, max.max(0), events, timeout).unwrap_or(0));
    }
    get_events(context, min, max, events, timeout)
}

fn run_queue(context: u64) -> Result<usize, Errno> {
    let timeout = (&raw const NO_TIME) as u64;
    let mut event = Event::default();
    loop {
        let at = (&raw mut event) as u64;
        if get_events_or_poll(context, 0, 1, at, timeout)? != 1 {
            return Ok(0);
        }
        let callback = usize::try_from(event.data).map_err(|_| Errno::EFAULT)?;
        if callback == 0 {
            return Err(Errno::EFAULT);
        }
        // SAFETY: the guest's own function, as io_queue_run's contract has it.
        unsafe {
            let callback: Callback = core::mem::transmute(callback);
            callback(context, event.obj, event.res, event.res2);
        }
    }
}

fn queue_init(events: c_int, context: u64) -> Result<usize, Errno> {
    let events = u64::try_from(events).ok().filter(|&n| n > 0).ok_or(Errno::EINVAL)?;
    guest::write(context, &[0; 8])?;
    setup(events, context)
}

export! {
    fn [io_setup](events: c_int, context: *mut c_void) -> c_int, next =>
        if state::active() {
            negative(|| setup(u64::from(events.cast_unsigned()), context as u64))
        } else {
            next()
        };
    fn [io_destroy, io_queue_release](context: *mut c_void) -> c_int, next =>
        if state::active() { negative(|| destroy(context as u64)) } else { next() };
    fn [io_submit](context: *mut c_void, count: c_long, iocbs: *mut c_void) -> c_int, next =>
        if state::active() {
            negative(|| submit(context as u64, count, iocbs as u64))
        } else {
            next()
        };
    fn [io_cancel](context: *mut c_void, iocb: *mut c_void, event: *mut c_void) -> c_int, next =>
        if state::active() {
            negative(|| cancel(context as u64, iocb as u64))
        } else {
            next()
        };
    fn [io_getevents](
        context: *mut c_void, min: c_long, max: c_long, events: *mut c_void,
        timeout: *mut libc::timespec,
    ) -> c_int, next =>
        if state::active() {
            negative(|| {
                get_events_or_poll(context as u64, min, max, events as u64, timeout as u64)
            })
        } else {
            next()
        };
    fn [io_pgetevents](
        context: *mut c_void, min: c_long, max: c_long, events: *mut c_void,
        timeout: *mut libc::timespec, mask: *mut libc::sigset_t,
    ) -> c_int, next =>
        if state::active() {
            negative(|| {
                let (context, events) = (context as u64, events as u64);
                if is_poll_of_empty_ring(context, timeout as u64) {
                    return get_events_or_poll(context, min, max, events, timeout as u64);
                }
                let mask = SignalMask { mask: mask as u64, bytes: 8 };
                let at = (&raw const mask) as u64;
                get_events_masked(context, min, max, events, timeout as u64, at)
            })
        } else {
            next()
        };
    fn [io_queue_init](events: c_int, context: *mut c_void) -> c_int, next =>
        if state::active() {
            negative(|| queue_init(events, context as u64))
        } else {
            next()
        };
    fn [io_queue_run](context: *mut c_void) -> c_int, next =>
        if state::active() { negative(|| run_queue(context as u64)) } else { next() };
    fn [io_queue_wait](context: *mut c_void, timeout: *mut libc::timespec) -> c_int, next =>
        if state::active() {
            negative(|| get_events_or_poll(context as u64, 0, 0, 0, timeout as u64))
        } else {
            next()
        };
}
