//! POSIX AIO: aio_read(3), lio_listio(3) and their kin.
//!
//! Requests on protected descriptors are ours, all others the C library's own; a list may hold
//! both. Which one a request is, its descriptor says when it is made and the list of unfinished
//! requests afterwards. aio_return(3) and aio_init(3) are the C library's: the one reads a field
//! that both fill, the other tunes threads that a protected file has no use for.
//!
//! Does not hold: lio_listio(3) as programs linked before glibc 2.4 have it (members of a list gave
//! no notice of their own).

use core::ffi::{c_int, c_void};

use libc::{aiocb, sigevent, timespec};
use postern_sim::{
    files::{self, Kind},
    guest,
    posix_aio::{
        self, Cancelled, Group,
        control::{Control, Operation},
        notice::Notice,
    },
    service,
};
use postern_trusted::errno::Errno;

use crate::{
    next::{Next, answer, export},
    state,
};

/// Members of a list that are not looked at: more than any program has, fewer than would overflow.
const MOST_MEMBERS: usize = 1 << 20;

fn control_at(at: *const aiocb) -> Control {
    Control(at as u64)
}

/// Whether the request that `control` describes concerns a descriptor of ours.
fn concerns(control: Control) -> bool {
    control.read().is_ok_and(|asked| files::kind(asked.fd) != Kind::Other)
}

/// Makes one request of a descriptor that is not the C library's business.
fn submit(
    control: Control,
    operation: Operation,
    group: Option<std::sync::Arc<Group>>,
) -> Result<(), Errno> {
    let asked = control.read()?;
    if let Some(file) = files::lookup(asked.fd) {
        return posix_aio::submit(control, operation, file, group);
    }
    // One of our own: to the guest it is closed.
    control.accept(operation, asked.priority)?;
    control.end(Err(Errno::EBADF));
    if let Some(group) = group {
        group.leave();
    }
    Ok(())
}

fn submit_or(at: *mut aiocb, operation: Operation, next: impl FnOnce() -> c_int) -> c_int {
    let control = control_at(at);
    if !concerns(control) {
        return next();
    }
    answer(|| {
        submit(control, operation, None)?;
        posix_aio::start();
        Ok(0)
    })
}

/// The members of a list, without the empty ones.
fn members(list: *const *mut aiocb, count: c_int) -> Result<Vec<Control>, Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
    if count > MOST_MEMBERS {
        return Err(Errno::EINVAL);
    }
    let mut found = Vec::with_capacity(count);
    for n in 0..count as u64 {
        let at = guest::read_u64((list as u64).wrapping_add(8 * n))?;
        if at != 0 {
            found.push(Control(at));
        }
    }
    Ok(found)
}

/// aio_suspend(3)'s timeout in nanoseconds; a negative one has passed.
fn timeout_ns(at: *const timespec) -> Result<Option<u64>, Errno> {
    if at.is_null() {
        return Ok(None);
    }
    let seconds = guest::read_u64(at as u64)?.cast_signed();
    let nanoseconds = guest::read_u64((at as u64).wrapping_add(8))?.cast_signed();
    if !(0..1_000_000_000).contains(&nanoseconds) {
        return Err(Errno::EINVAL);
    }
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Ok(Some(u64::try_from(total.clamp(0, i128::from(i64::MAX))).unwrap_or(0)))
}

/// aio_suspend(3) of a list with requests of ours in it; `None`: the C library's alone.
fn suspend(
    list: *const *mut aiocb,
    count: c_int,
    timeout: *const timespec,
) -> Option<Result<c_int, Errno>> {
    let controls = members(list, count).ok()?;
    let pending = controls.iter().filter(|control| control.in_progress());
    let (mut ours, mut foreign) = (false, false);
    for control in pending {
        if posix_aio::is_ours(*control) { ours = true } else { foreign = true }
    }
    if !ours {
        return None;
    }
    let ready = || controls.iter().any(|control| !control.in_progress());
    Some(
        timeout_ns(timeout)
            .and_then(|timeout| posix_aio::wait(&ready, foreign, timeout))
            .map(|()| 0),
    )
}

type Suspend = unsafe extern "C" fn(*const *const aiocb, c_int, *const timespec) -> c_int;
type ListIo = unsafe extern "C" fn(c_int, *const *mut aiocb, c_int, *mut sigevent) -> c_int;

/// Whether the C library's `call` on the requests at `list` succeeded; else its errno.
fn of_libc(call: impl FnOnce() -> Option<c_int>) -> Result<(), Errno> {
    match call() {
        Some(0) => Ok(()),
        // SAFETY: the calling thread's own errno.
        Some(_) => Err(Errno(unsafe { *libc::__errno_location() })),
        None => Err(Errno::ENOSYS),
    }
}

fn libc_list(list: &[Control], event: *mut sigevent) -> Result<(), Errno> {
    static NEXT: Next = Next::new(c"lio_listio");
    of_libc(|| {
        let at = NEXT.find()?;
        let count = c_int::try_from(list.len()).ok()?;
        // SAFETY: the C function of this name, with the caller's requests; `Control` is laid out
        // as the pointer it holds.
        unsafe {
            let next: ListIo = core::mem::transmute(at);
            Some(next(libc::LIO_NOWAIT, list.as_ptr().cast(), count, event))
        }
    })
}

fn libc_suspend(control: Control) -> Result<(), Errno> {
    static NEXT: Next = Next::new(c"aio_suspend");
    of_libc(|| {
        let at = NEXT.find()?;
        let list = control.0 as *const aiocb;
        // SAFETY: the C function of this name; the list is one request of the caller's.
        unsafe {
            let next: Suspend = core::mem::transmute(at);
            Some(next(&raw const list, 1, core::ptr::null()))
        }
    })
}

/// The C library's part of a list has ended.
unsafe extern "C" fn foreign_ended(group: libc::sigval) {
    // SAFETY: the reference that `list_io` gave away, taken back once.
    unsafe { std::sync::Arc::from_raw(group.sival_ptr.cast::<Group>().cast_const()) }.leave();
}

/// The C library's part of a list; its end counts as one member of `group`.
fn start_foreign(list: &[Control], group: Option<std::sync::Arc<Group>>) -> Result<(), Errno> {
    let Some(group) = group else { return libc_list(list, core::ptr::null_mut()) };
    let group = std::sync::Arc::into_raw(group).cast_mut().cast::<c_void>();
    let mut event = [0_u64; 8];
    let function: unsafe extern "C" fn(libc::sigval) = foreign_ended;
    // value; signal and kind; function; attributes.
    event[0] = group as u64;
    event[1] = u64::from(libc::SIGEV_THREAD.unsigned_abs()) << 32;
    event[2] = function as usize as u64;
    libc_list(list, event.as_mut_ptr().cast())
}

/// lio_listio(3) of a list with members of ours.
fn list_io(mode: c_int, list: &[(Control, c_int)], event: *mut sigevent) -> Result<c_int, Errno> {
    let notice = if event.is_null() { Notice::None } else { notice_at(event as u64)? };
    let (ours, foreign): (Vec<_>, Vec<_>) =
        list.iter().copied().partition(|(control, _)| concerns(*control));
    let foreign: Vec<_> = foreign.into_iter().map(|(control, _)| control).collect();
    let waits = mode == libc::LIO_WAIT;
    let members = ours.len() + usize::from(!foreign.is_empty());
    let group = (!waits && notice != Notice::None).then(|| Group::new(members, notice));
    let mut result = Ok(());
    if !foreign.is_empty() {
        result = start_foreign(&foreign, group.clone());
    }
    let mut made = Vec::with_capacity(ours.len());
    for (control, opcode) in ours {
        let operation = match opcode {
            libc::LIO_READ => Operation::Read,
            libc::LIO_WRITE => Operation::Write,
            _ => Operation::Unknown,
        };
        match submit(control, operation, group.clone()) {
            Ok(()) => made.push(control),
            Err(errno) => {
                result = Err(errno);
                if let Some(group) = &group {
                    group.leave();
                }
            }
        }
    }
    posix_aio::start();
    if !waits {
        return result.map(|()| 0);
    }
    let ready = || made.iter().all(|control| !control.in_progress());
    posix_aio::wait(&ready, false, None)?;
    for control in &foreign {
        while control.in_progress() {
            libc_suspend(*control)?;
        }
    }
    let failed = made.iter().chain(&foreign).any(|control| control.error() != Ok(0));
    if failed || result.is_err() { Err(Errno::EIO) } else { Ok(0) }
}

fn notice_at(event: u64) -> Result<Notice, Errno> {
    let mut bytes = [0; 32];
    for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&guest::read_u64(event.wrapping_add(8 * n as u64))?.to_ne_bytes());
    }
    Ok(Notice::of_event(&bytes))
}

/// The members of a list that ask for something, with their operations; `None` if none of them
/// concerns us, or the list cannot be read.
fn wanted(list: *const *mut aiocb, count: c_int) -> Option<Vec<(Control, c_int)>> {
    let mut wanted = Vec::new();
    for control in members(list, count).ok()? {
        let opcode = control.read().ok()?.opcode;
        if opcode != libc::LIO_NOP {
            wanted.push((control, opcode));
        }
    }
    wanted.iter().any(|(control, _)| concerns(*control)).then_some(wanted)
}

export! {
    fn [aio_read, aio_read64](request: *mut aiocb) -> c_int, next =>
        submit_or(request, Operation::Read, next);
    fn [aio_write, aio_write64](request: *mut aiocb) -> c_int, next =>
        submit_or(request, Operation::Write, next);
    fn [aio_fsync, aio_fsync64](how: c_int, request: *mut aiocb) -> c_int, next =>
        if how == libc::O_SYNC || how == libc::O_DSYNC {
            submit_or(request, Operation::Sync, next)
        } else {
            next()
        };
    // A program that asks and goes on working wants progress without waiting for it. Reads a word
    // and may ring a bell: fit for signal handlers.
    fn [aio_error, aio_error64](request: *const aiocb) -> c_int, next => {
        if state::active() && control_at(request).in_progress() {
            service::take_over();
        }
        next()
    };
    fn [aio_suspend, aio_suspend64](
        list: *const *mut aiocb, count: c_int, timeout: *const timespec,
    ) -> c_int, next =>
        match if state::active() { suspend(list, count, timeout) } else { None } {
            Some(result) => answer(|| result),
            None => next(),
        };
    fn [aio_cancel, aio_cancel64](fd: c_int, request: *mut aiocb) -> c_int, next =>
        match files::kind(fd) {
            Kind::Other => next(),
            Kind::Internal => answer(|| Err(Errno::EBADF)),
            Kind::Protected => answer(|| {
                let request = (!request.is_null()).then(|| control_at(request));
                posix_aio::cancel(fd, request).map(|cancelled: Cancelled| cancelled as c_int)
            }),
        };
    fn [lio_listio, lio_listio64](
        mode: c_int, list: *const *mut aiocb, count: c_int, event: *mut sigevent,
    ) -> c_int, next => {
        let known = mode == libc::LIO_WAIT || mode == libc::LIO_NOWAIT;
        match if known && state::active() { wanted(list, count) } else { None } {
            Some(wanted) => answer(|| list_io(mode, &wanted, event)),
            None => next(),
        }
    };
}
