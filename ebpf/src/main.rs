//! The probes: what the kernel sees of the daemon's native AIO, request by request.
//!
//! A request is known by its `aio_data` (lane and index name its slot, the generation tells it from
//! the one before). Its slot is filled when io_submit is entered, stamped when io_submit returns and
//! when the block layer completes it, and turned into histograms when io_getevents returns it. With
//! io_uring the calls are io_uring_enter, and the last is the completion's way into the ring.
//!
//! Holds: the probes only read user memory and never change what a system call does. A value that
//! contradicts itself (negative, of another request, unreadable) is counted by its kind and never
//! enters a histogram; all stages of a request are recorded together or not at all, except where
//! [`postern_ebpf_common::stage`] says otherwise.
//! Does not hold: the truth of the times that the enclave claims.
//!
//! A gate, written by the daemon, closes the probes: then each ends with its first look, and what
//! was recorded stays.
//!
//! Classic tracepoints of system calls run in the calling thread with preemption off and never
//! nest, so histograms and scratch memory need no atomics. The block layer's completions come in
//! interrupts: they only write to slots, and count in places of their own.
//!
//! Functions that are exported (`no_mangle`, numbers only) are verified by the kernel on their own,
//! once, instead of again for every turn of the loop that calls them.
#![no_std]
#![no_main]

mod device;
mod reap;
mod state;
mod submit;
mod uring;

/// The kernel lends some of its helpers to programs under the GPL only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: nothing here can panic; a call that were left would not pass the verifier.
    unsafe { core::hint::unreachable_unchecked() }
}
