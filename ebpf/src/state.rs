//! Maps, counters, histograms and configuration: everything that lives between two probes.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::bindings::{bpf_pidns_info, task_struct};
use aya_ebpf::helpers::generated::{
    bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_task_btf,
    bpf_get_ns_current_pid_tgid, bpf_probe_read_kernel, bpf_probe_read_user, bpf_task_pt_regs,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray};
use postern_ebpf_common::config::{Config, WORDS};
use postern_ebpf_common::counter::{COUNTERS as COUNTER_COUNT, Counter, WRITERS};
use postern_ebpf_common::histogram::{BUCKETS, Histogram, bucket};
use postern_ebpf_common::slot::Slot;
use postern_ebpf_common::{SERIES, TracedIocb, VOLUMES, gate, slot};

/// Written by the loader before the kernel sees it; read-only and frozen afterwards.
#[unsafe(no_mangle)]
static CONFIG: [u64; WORDS] = [0; WORDS];

#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(slot::SLOTS as u32, 0);

/// [`SERIES`] histograms for each volume; the loader makes it smaller where there are many CPUs.
#[map]
static HISTOGRAMS: PerCpuArray<Histogram> =
    PerCpuArray::with_max_entries((VOLUMES * SERIES) as u32, 0);

/// `BPF_F_MMAPABLE`: the daemon writes it without a system call.
const MMAPABLE: u32 = 1 << 10;

#[map]
static GATE: Array<[u64; gate::WORDS]> = Array::with_max_entries(1, MMAPABLE);

/// Number of the thread group that is traced. A map of its own, and not to be mapped: a daemon writes
/// it before it gives its rights up, and can not turn the probes to others later.
#[map]
static TARGET: Array<u64> = Array::with_max_entries(1, 0);

#[map]
static COUNTERS: PerCpuArray<[u64; COUNTER_COUNT]> = PerCpuArray::with_max_entries(WRITERS, 0);

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Requests or events that are copied from user memory at once.
pub const CHUNK: u64 = 32;

/// Where copies of user memory go. One for each CPU; used by system-call probes only.
pub struct Scratch {
    /// Addresses of iocbs.
    pub pointers: [u64; CHUNK as usize],
    /// The iocbs.
    pub iocbs: [TracedIocb; CHUNK as usize],
    /// `struct io_event`s: data, obj, res, res2.
    pub events: [[u64; 4]; CHUNK as usize],
}

/// A word of the configuration; a constant to the verifier.
#[inline(always)]
pub fn config(word: Config) -> u64 {
    // SAFETY: in bounds, as `Config` has WORDS values. Volatile, because the loader rewrites the
    // array after compilation.
    unsafe { read_volatile(&raw const CONFIG[word as usize]) }
}

/// A word of the gate, as it is now.
#[inline(always)]
pub fn gate(word: usize) -> u64 {
    let Some(words) = GATE.get_ptr(0) else { return 0 };
    // SAFETY: in bounds: `word` is a constant of `postern_ebpf_common::gate`. Volatile, because user
    // space writes it meanwhile.
    unsafe { read_volatile(words.cast::<u64>().add(word)) }
}

/// This CPU's scratch memory.
#[inline(always)]
pub fn scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(0)
}

/// The record of a slot.
#[inline(always)]
pub fn slot_at(index: u64) -> Option<*mut Slot> {
    SLOTS.get_ptr_mut(index as u32)
}

/// Counts `by` events. Only for the probes of system calls.
#[inline(always)]
pub fn count(counter: Counter, by: u64) {
    postern_count(0, counter as u64, by);
}

/// Counts `by` events as `writer` (below [`WRITERS`]); `counter` is a [`Counter`].
///
/// Programs that can interrupt each other on a CPU must be different writers; the kernel lets no
/// program interrupt itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_count(writer: u64, counter: u64, by: u64) -> u64 {
    if let Some(counters) = COUNTERS.get_ptr_mut(writer as u32)
        && counter < COUNTER_COUNT as u64
    {
        // SAFETY: 1. In bounds: just checked.
        //    2. Race: this CPU's memory, and one program at a time is this writer.
        unsafe { (*counters)[counter as usize] += by };
    }
    0
}

/// Records `ns` nanoseconds in the histogram `series` of `volume`, its place among the histograms;
/// too large a value is counted instead. Not for the probes of the block layer. A histogram that does
/// not exist is ignored.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn postern_record(volume: u64, series: u64, ns: u64) -> u64 {
    let at = (volume * SERIES + series) as u32;
    let Some(histogram) = HISTOGRAMS.get_ptr_mut(at) else { return 0 };
    let at = bucket(ns);
    if at >= BUCKETS as u64 {
        count(Counter::Overflow, 1);
        return 0;
    }
    // SAFETY: 1. In bounds: checked above.
    //    2. Race: system-call probes neither nest nor are preempted, and the memory is this CPU's;
    //       the reader in user space may see the words of one record change one after the other.
    unsafe {
        (*histogram).buckets[at as usize] += 1;
        (*histogram).sum_ns += ns;
        if ns > (*histogram).max_ns {
            (*histogram).max_ns = ns;
        }
    }
    1
}

/// Whether the calling thread belongs to the traced process, as far as the gate lets this be of
/// interest: `most` is the last of its states in which it is.
#[inline(always)]
pub fn is_wanted(most: u64) -> bool {
    gate(gate::STATE) <= most && is_traced()
}

/// The kernel's record of the current thread.
#[inline(always)]
pub fn current_task() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_get_current_task() }
}

/// Whether the calling thread belongs to the traced process.
#[inline(always)]
fn is_traced() -> bool {
    let Some(target) = TARGET.get_ptr(0) else { return false };
    // SAFETY: in bounds. Volatile, because user space writes it meanwhile.
    let target = unsafe { read_volatile(target) };
    let inode = config(Config::PidNsInode);
    if inode == 0 {
        // SAFETY: no arguments.
        let ids = unsafe { bpf_get_current_pid_tgid() };
        return ids >> 32 == target;
    }
    let mut ids = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: the helper writes `size_of(ids)` bytes to `ids`.
    let failed = unsafe {
        bpf_get_ns_current_pid_tgid(
            config(Config::PidNsDevice),
            inode,
            &raw mut ids,
            size_of::<bpf_pidns_info>() as u32,
        )
    };
    failed == 0 && u64::from(ids.tgid) == target
}

/// An argument of the system call that the current thread is in.
#[inline(always)]
pub fn argument(offset: Config) -> u64 {
    // SAFETY: the kernel's helpers give the registers of the current thread; the verifier checks
    // the constant offset against the layout of `pt_regs`.
    unsafe {
        let task = bpf_get_current_task_btf();
        let registers = bpf_task_pt_regs(task.cast::<task_struct>()) as *const u8;
        read_volatile(registers.add(config(offset) as usize).cast::<u64>())
    }
}

/// Word `n` of a classic tracepoint's record.
///
/// # Safety
/// `context` must be the context of a classic tracepoint whose record has that word.
#[inline(always)]
pub unsafe fn field(context: *mut c_void, n: usize) -> u64 {
    // SAFETY: the caller's promise, checked by the verifier.
    unsafe { read_volatile(context.cast::<u64>().cast_const().add(n)) }
}

/// `value`, of which the compiler knows nothing. It would fold two bounds of a loop into one that it
/// can prove and the verifier can not.
#[inline(always)]
pub fn opaque(value: u64) -> u64 {
    // SAFETY: a local variable.
    unsafe { read_volatile(&raw const value) }
}

/// Copies `bytes` bytes of the current process to `to`; whether they were readable.
///
/// # Safety
/// `to` must have room for `bytes` bytes; the verifier checks it.
#[inline(always)]
pub unsafe fn read_user(to: *mut c_void, bytes: u64, from: u64) -> bool {
    // SAFETY: the caller's promise; any `from` is allowed.
    unsafe { bpf_probe_read_user(to, bytes as u32, from as *const c_void) == 0 }
}

/// A word of the current process's memory.
#[inline(always)]
pub fn read_user_word(from: u64) -> Option<u64> {
    let mut word = 0u64;
    // SAFETY: room for 8 bytes.
    unsafe { read_user((&raw mut word).cast(), 8, from) }.then_some(word)
}

/// `N` words of kernel memory.
#[inline(always)]
pub fn read_kernel<const N: usize>(from: u64) -> Option<[u64; N]> {
    let mut words = [0u64; N];
    // SAFETY: room for 8 N bytes; any `from` is allowed, the helper fails where nothing is mapped.
    let failed = unsafe {
        bpf_probe_read_kernel((&raw mut words).cast(), 8 * N as u32, from as *const c_void)
    };
    (failed == 0).then_some(words)
}
