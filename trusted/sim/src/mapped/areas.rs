//! Where this process has protected files mapped shared: a table of its own, copied by fork.
//!
//! An area owns one reference to its [`Hold`], the open file with its content, so a mapping
//! outlives close(2) of the descriptor. Changes of the address space that concern an area are made
//! under the table's lock.
//!
//! Holds: what the table says is mapped was mapped by the calls that come through here. Does not
//! hold: an area that the guest unmaps by an instruction of its own stays in the table until the
//! process ends.
#![allow(unsafe_code)]

use core::{
    ops::Range,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};
use std::sync::Arc;

use postern_trusted::{
    errno::Errno,
    sync::{Lock, LockGuard},
};

use super::{
    content::Content,
    now,
    reach::{self, reach},
};
use crate::{
    files::{self, OpenFile, placeholder},
    process, sys,
};

/// Most areas of a process.
pub const MOST: usize = 4096;
const PAGE: usize = 4096;
/// mremap(2): the old mapping stays (uapi/linux/mman.h).
const MREMAP_DONTUNMAP: i32 = 4;

/// What keeps a mapping alive: one for each mmap(2), shared by the areas that came of it.
pub struct Hold {
    file: Arc<OpenFile>,
    content: Arc<Content>,
}

#[derive(Clone, Copy)]
struct Area {
    start: usize,
    end: usize,
    /// In the file, of `start`.
    offset: u64,
    /// An [`Arc<Hold>`], as a word.
    hold: usize,
}

struct Areas {
    count: usize,
    list: [Area; MOST],
}

static AREAS: Lock<Areas> =
    Lock::new(Areas { count: 0, list: [Area { start: 0, end: 0, offset: 0, hold: 0 }; MOST] });
/// Their number, for looks without the lock. Written under it.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// The references are on their way to the next program.
static LENT: AtomicBool = AtomicBool::new(false);

/// A wish of mmap(2).
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// Address.
    pub at: usize,
    /// Bytes.
    pub length: usize,
    /// PROT_* bits.
    pub protection: i32,
    /// MAP_* bits.
    pub flags: i32,
    /// In the file, a multiple of the page.
    pub offset: u64,
}

/// A reference more to what an area's word stands for.
fn share(word: usize) -> Arc<Hold> {
    let at = word as *const Hold;
    // SAFETY: the word owns a reference, and the table's lock keeps it meanwhile.
    unsafe {
        Arc::increment_strong_count(at);
        Arc::from_raw(at)
    }
}

impl Areas {
    fn listed(&self) -> &[Area] {
        &self.list[..self.count]
    }

    fn overlaps(&self, range: &Range<usize>) -> bool {
        self.listed().iter().any(|area| area.start < range.end && range.start < area.end)
    }

    /// Whether there is room for one area more, and for the rest of one that is cut in two.
    const fn has_room(&self) -> bool {
        self.count + 2 <= MOST
    }

    fn add(&mut self, range: Range<usize>, offset: u64, hold: Arc<Hold>) {
        let hold = Arc::into_raw(hold) as usize;
        self.list[self.count] = Area { start: range.start, end: range.end, offset, hold };
        self.count += 1;
        COUNT.store(self.count, Ordering::Release);
    }

    /// Takes a range out; answers the references that it had.
    fn cut(&mut self, range: &Range<usize>) -> Vec<Arc<Hold>> {
        let mut freed = Vec::new();
        let mut at = 0;
        while at < self.count {
            let area = self.list[at];
            if area.end <= range.start || range.end <= area.start {
                at += 1;
                continue;
            }
            let left = area.start < range.start;
            let right = range.end < area.end;
            let rest = Area {
                start: range.end,
                offset: area.offset + (range.end.saturating_sub(area.start)) as u64,
                ..area
            };
            match (left, right) {
                (true, _) => {
                    self.list[at].end = range.start;
                    if right {
                        self.add(rest.start..rest.end, rest.offset, share(area.hold));
                    }
                    at += 1;
                }
                (false, true) => {
                    self.list[at] = rest;
                    at += 1;
                }
                (false, false) => {
                    self.count -= 1;
                    self.list[at] = self.list[self.count];
                    // SAFETY: the word owned one reference, which passes to the caller.
                    freed.push(unsafe { Arc::from_raw(area.hold as *const Hold) });
                }
            }
        }
        COUNT.store(self.count, Ordering::Release);
        freed
    }

    /// The parts of files that lie in a range.
    fn within(&self, range: &Range<usize>) -> Vec<(Arc<Hold>, Range<u64>)> {
        let part = |area: &Area| {
            let (start, end) = (area.start.max(range.start), area.end.min(range.end));
            let offset = area.offset + start.saturating_sub(area.start) as u64;
            (start < end).then(|| (share(area.hold), offset..offset + (end - start) as u64))
        };
        self.listed().iter().filter_map(part).collect()
    }
}

/// Gives a reference back. With the last of a mapping it is counted no more, and the file closed if
/// nothing else leads to it. Call without the table's lock.
pub fn release(hold: Arc<Hold>) {
    if let Some(Hold { file, content }) = Arc::into_inner(hold) {
        now(file.volume().unview(&content));
        files::give_back(file);
    }
}

fn release_each(holds: Vec<Arc<Hold>>) {
    holds.into_iter().for_each(release);
}

/// The whole pages of `length` bytes at `at`.
fn pages(at: usize, length: usize) -> Option<Range<usize>> {
    let length = length.checked_next_multiple_of(PAGE)?;
    Some(at..at.checked_add(length)?)
}

/// Whether there are areas in the range. Cheap where there are none at all.
fn concerns(range: &Range<usize>) -> bool {
    COUNT.load(Ordering::Acquire) != 0 && AREAS.lock().overlaps(range)
}

/// The table, if it has areas in the range.
fn areas_in(range: &Range<usize>) -> Option<LockGuard<'static, Areas>> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return None;
    }
    let areas = AREAS.lock();
    areas.overlaps(range).then_some(areas)
}

/// mmap(2) of a protected file, shared.
///
/// # Errors
/// `ENODEV`: more than [`super::content::MOST_BYTES`] of files would be mapped. `ENOMEM`, `EIO`;
/// what the kernel says.
pub fn map(file: &Arc<OpenFile>, wish: Wish) -> Result<usize, Errno> {
    let length = wish.length.checked_next_multiple_of(PAGE).ok_or(Errno::ENOMEM)?;
    let end = wish.offset.checked_add(length as u64).ok_or(Errno::EOVERFLOW)?;
    let stores = file.writable();
    let content = now(file.volume().view(&(wish.offset..end), stores))?;
    let hold = Arc::new(Hold { file: file.clone(), content });
    let mapped = place(&hold, wish, stores);
    release(hold);
    mapped
}

fn place(hold: &Arc<Hold>, wish: Wish, stores: bool) -> Result<usize, Errno> {
    let reached = reach(&hold.content)?;
    let mut room = [0; 32];
    // What is not open for writing cannot be made writable later (mprotect).
    let reader = if stores {
        None
    } else {
        let path = placeholder::own_path(reached.fd, &mut room)?;
        Some(sys::open(path, libc::O_RDONLY | libc::O_CLOEXEC)?)
    };
    let mapped = place_at(hold, wish, reader.unwrap_or(reached.fd));
    if let Some(reader) = reader {
        let _ = sys::close(reader);
    }
    let at = mapped?;
    keep_private(at, wish.length);
    Ok(at)
}

fn place_at(hold: &Arc<Hold>, wish: Wish, fd: i32) -> Result<usize, Errno> {
    let [protection, flags, fd] = [wish.protection, wish.flags, fd].map(|n| n as isize as usize);
    let offset = usize::try_from(wish.offset).map_err(|_| Errno::EOVERFLOW)?;
    let mut areas = AREAS.lock();
    if !areas.has_room() {
        return Err(Errno::ENOMEM);
    }
    let (at, length) = (wish.at, wish.length);
    // SAFETY: the guest's own wish for its address space, with a file of ours.
    let at = sys::check(unsafe {
        sys::syscall6(libc::SYS_mmap, at, length, protection, flags, fd, offset)
    })?;
    let range = pages(at, length).unwrap_or(at..at);
    let replaced = areas.cut(&range);
    areas.add(range, wish.offset, hold.clone());
    drop(areas);
    release_each(replaced);
    Ok(at)
}

/// Leaves the memory out of core dumps. (Locked in memory it is not: msync would tell, by EBUSY.)
fn keep_private(at: usize, length: usize) {
    // SAFETY: advice about a mapping of the guest's that shows a protected file. Failure is
    // harmless.
    unsafe {
        sys::syscall6(libc::SYS_madvise, at, length, libc::MADV_DONTDUMP as usize, 0, 0, 0);
    }
}

/// Something else was mapped over a range.
pub fn replaced(at: usize, length: usize) {
    if let Some(range) = pages(at, length)
        && let Some(mut areas) = areas_in(&range)
    {
        let freed = areas.cut(&range);
        drop(areas);
        release_each(freed);
    }
}

/// munmap(2), where it concerns a protected file; `None`: it does not.
pub fn unmap(at: usize, length: usize) -> Option<Result<(), Errno>> {
    let range = pages(at, length)?;
    let mut areas = areas_in(&range)?;
    if !areas.has_room() {
        return Some(Err(Errno::ENOMEM));
    }
    // SAFETY: the guest's own wish for its address space.
    let answer = sys::check(unsafe { sys::syscall6(libc::SYS_munmap, at, length, 0, 0, 0, 0) });
    let freed = if answer.is_ok() { areas.cut(&range) } else { Vec::new() };
    drop(areas);
    release_each(freed);
    Some(answer.map(drop))
}

/// mremap(2), where it concerns a protected file; `None`: it does not.
pub fn remap(
    (at, length): (usize, usize),
    wanted: usize,
    flags: i32,
    to: usize,
) -> Option<Result<usize, Errno>> {
    let old = pages(at, length.max(1))?;
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let target = if fixed { pages(to, wanted)? } else { 0..0 };
    if !concerns(&old) && !concerns(&target) {
        return None;
    }
    Some(move_area((at, length), wanted, flags, to))
}

fn move_area(
    (at, length): (usize, usize),
    wanted: usize,
    flags: i32,
    to: usize,
) -> Result<usize, Errno> {
    let old = pages(at, length).ok_or(Errno::EINVAL)?;
    let first = AREAS.lock().within(&(at..at.saturating_add(1))).pop();
    let more = match &first {
        Some((hold, part)) if wanted > length => {
            let end = part.start.saturating_add(wanted.next_multiple_of(PAGE) as u64);
            let range = part.start..end;
            now(hold.file.volume().view_more(&hold.content, &range)).map_err(|_| Errno::ENOMEM)
        }
        _ => Ok(()),
    };
    let moved = more.and_then(|()| {
        let mut areas = AREAS.lock();
        // Two cuts.
        if areas.count + 3 > MOST {
            return Err(Errno::ENOMEM);
        }
        let bits = flags as isize as usize;
        // SAFETY: the guest's own wish for its address space.
        let now_at = sys::check(unsafe {
            sys::syscall6(libc::SYS_mremap, at, length, wanted, bits, to, 0)
        })?;
        let new = pages(now_at, wanted).unwrap_or(now_at..now_at);
        let mut freed = Vec::new();
        if flags & MREMAP_DONTUNMAP == 0 {
            freed = areas.cut(&old);
        }
        freed.extend(areas.cut(&new));
        if let Some((hold, part)) = &first {
            areas.add(new, part.start, hold.clone());
        }
        drop(areas);
        release_each(freed);
        Ok(now_at)
    });
    if let Some((hold, _)) = first {
        release(hold);
    }
    moved
}

/// msync(2), where the kernel found nothing wrong: what was stored is written to the volumes, and
/// is durable if that is asked.
///
/// # Errors
/// `EIO`, `ENOSPC`; only where it is to be durable.
pub fn sync(at: usize, length: usize, durable: bool) -> Result<(), Errno> {
    let Some(range) = pages(at, length) else { return Ok(()) };
    let Some(areas) = areas_in(&range) else { return Ok(()) };
    let parts = areas.within(&range);
    drop(areas);
    let mut answer = Ok(());
    for (hold, part) in parts {
        let volume = hold.file.volume();
        let synced = now(async {
            let held = volume.hold_soon().await?;
            let disk = held.disk()?;
            volume.write_back((&held, &disk), part).await?;
            if durable { volume.make_written_durable(&held, &disk).await } else { Ok(()) }
        });
        if durable {
            answer = answer.and(hold.file.after_sync(synced));
        }
        release(hold);
    }
    answer
}

/// What this process has stored is written back. A forked child that has done nothing but store
/// leaves it to the others that have the same memory.
fn write_back_all() {
    if COUNT.load(Ordering::Acquire) == 0 {
        return;
    }
    let parts = AREAS.lock().within(&(0..usize::MAX));
    let mut seen = Vec::new();
    let is_silent = process::known().is_none_or(|process| process.linked().is_none());
    for (hold, _) in parts {
        if is_silent && reach::is_held_elsewhere(&hold.content) {
            seen.push(hold.content.number);
        }
        if !seen.contains(&hold.content.number) {
            seen.push(hold.content.number);
            let volume = hold.file.volume();
            let written = now(async {
                let held = volume.hold_soon().await?;
                volume.write_back((&held, &held.disk()?), 0..u64::MAX).await
            });
            if let Err(errno) = written {
                volume.tell_loss("what was stored in a mapping could not be written", errno);
            }
        }
        release(hold);
    }
}

/// The process ends: nothing is mapped any more.
pub fn release_all() {
    if LENT.load(Ordering::Acquire) {
        return;
    }
    write_back_all();
    let freed = if COUNT.load(Ordering::Acquire) == 0 {
        Vec::new()
    } else {
        AREAS.lock().cut(&(0..usize::MAX))
    };
    release_each(freed);
    reach::withdraw();
}

/// Just before exec: writes back what was stored and gives the references away. The table stays as
/// it is until [`take_back`].
#[must_use]
pub fn lend() -> Vec<Arc<Hold>> {
    write_back_all();
    LENT.store(true, Ordering::Release);
    reach::withdraw();
    let areas = AREAS.lock();
    // SAFETY: each word owns one reference, which passes to the caller.
    areas.listed().iter().map(|area| unsafe { Arc::from_raw(area.hold as *const Hold) }).collect()
}

/// After an exec that failed: the references are the table's again.
pub fn take_back(holds: Vec<Arc<Hold>>) {
    holds.into_iter().for_each(core::mem::forget);
    LENT.store(false, Ordering::Release);
    reach::offer();
}

/// References for the copy of the table that a fork is about to make. Keeps it still meanwhile.
#[must_use]
pub fn fork_prepare() -> Vec<Arc<Hold>> {
    let areas = AREAS.lock();
    let shared = areas.listed().iter().map(|area| share(area.hold)).collect();
    core::mem::forget(areas);
    shared
}

/// The other end of [`fork_prepare`], in both processes.
pub fn fork_done() {
    // SAFETY: locked by `fork_prepare` in this thread (or its copy).
    unsafe { AREAS.force_unlock() };
}
