use super::*;
use crate::sys;
use core::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

const PAGE: usize = 4096;

/// Pages of this process, `protection` per page; PROT_NONE pages are mapped without access.
fn pages(protections: &[i32]) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let length = protections.len() * PAGE;
    // SAFETY: fresh mapping; protection of its own pages.
    unsafe {
        let all = libc::PROT_READ | libc::PROT_WRITE;
        let base = libc::mmap(core::ptr::null_mut(), length, all, flags, -1, 0);
        assert_ne!(base, libc::MAP_FAILED);
        for (n, protection) in protections.iter().enumerate() {
            assert_eq!(libc::mprotect(base.byte_add(n * PAGE), PAGE, *protection), 0);
        }
        base as u64
    }
}

/// Runs `body` in a forked child and answers how it ended, as waitpid(2) puts it.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child only runs `body` and _exit; nothing here waits for another thread.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::setrlimit(libc::RLIMIT_CORE, &raw const core);
            libc::_exit(body());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    }
}

fn faults(address: u64) {
    for length in [1, 4, 8, 64, 5000] {
        let mut out = vec![0; length];
        assert_eq!(Guest.read(address, &mut out), Err(Fault), "read {length} at {address:#x}");
        assert_eq!(Guest.write(address, &out), Err(Fault), "write {length} at {address:#x}");
    }
}

#[test]
fn addresses_that_nobody_can_use_answer_a_fault() {
    fault::install();
    let none = pages(&[libc::PROT_NONE, libc::PROT_NONE]);
    for address in [
        0,
        1,
        8,
        none,
        none + 100,
        USER_END - 1,
        USER_END,
        0x0000_8000_0000_0000, // Non-canonical.
        0x1234_5678_0000_0000,
        0xffff_8000_0000_0000, // Kernel.
        u64::MAX - 4,
        u64::MAX,
    ] {
        faults(address);
    }
}

#[test]
fn a_non_canonical_address_below_the_range_check_faults_in_the_leaf_itself() {
    fault::install();
    // The processor raises a general protection fault, which Linux delivers as SIGSEGV.
    // SAFETY: the leaf survives the fault.
    let loaded = unsafe { postern_guest_load(0x1234_5678_0000_0000) };
    assert_eq!(loaded.fault, 1);
    let mut byte = 0_u8;
    // SAFETY: as above; the destination is ours.
    let left = unsafe { postern_guest_copy((&raw mut byte) as usize, 0xffff_8000_0000_0000, 1) };
    assert_eq!(left, 1);
}

#[test]
fn copies_inside_mapped_memory_arrive_whole() {
    fault::install();
    let base = pages(&[libc::PROT_READ | libc::PROT_WRITE; 2]);
    let data: Vec<u8> = (0..5000_u32).map(|n| n.to_le_bytes()[0]).collect();
    for length in [0, 1, 7, 8, 9, 4096, 5000] {
        assert_eq!(Guest.write(base + 3, &data[..length]), Ok(()));
        let mut out = vec![0; length];
        assert_eq!(Guest.read(base + 3, &mut out), Ok(()));
        assert_eq!(out, data[..length]);
    }
}

#[test]
fn a_half_mapped_range_faults_after_its_mapped_part() {
    fault::install();
    let all = libc::PROT_READ | libc::PROT_WRITE;
    let base = pages(&[all, libc::PROT_NONE]);
    let edge = base + PAGE as u64 - 10;
    assert_eq!(Guest.write(edge, &[7; 10]), Ok(()));
    let mut out = [0; 20];
    assert_eq!(Guest.read(edge, &mut out), Err(Fault));
    assert_eq!(out[..10], [7; 10]);
    assert_eq!(Guest.read(base + PAGE as u64 - 4, &mut [0; 8]), Err(Fault));
}

#[test]
fn a_read_only_page_can_be_read_and_not_written() {
    fault::install();
    let base = pages(&[libc::PROT_READ]);
    assert_eq!(Guest.read(base, &mut [1; 16]), Ok(()));
    for length in [1, 8, 16] {
        assert_eq!(Guest.write(base, &vec![1; length]), Err(Fault));
    }
}

#[test]
fn memory_beyond_the_end_of_a_mapped_file_faults_instead_of_raising_sigbus() {
    fault::install();
    let memfd = sys::memfd(c"postern-test").unwrap();
    // SAFETY: a mapping of an empty file: every access raises SIGBUS.
    let base = unsafe {
        let all = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(core::ptr::null_mut(), PAGE, all, libc::MAP_SHARED, memfd, 0)
    };
    assert_ne!(base, libc::MAP_FAILED);
    faults(base as u64);
    sys::close(memfd).unwrap();
}

static SEEN: AtomicI32 = AtomicI32::new(0);
static SEEN_AT: AtomicUsize = AtomicUsize::new(0);

/// A guest's handler: notes the signal and steps over by giving access to the page.
extern "C" fn guest_handler(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
    SEEN.store(signal, Ordering::Relaxed);
    // SAFETY: the kernel's siginfo of a fault; the page is the test's own.
    unsafe {
        let at = (*info).si_addr() as usize;
        SEEN_AT.store(at, Ordering::Relaxed);
        libc::mprotect((at & !(PAGE - 1)) as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE);
    }
}

fn guest_sets(signal: i32, handler: usize, flags: i32) -> fault::Action {
    let action = fault::Action { handler, flags: flags as u64, restorer: 0, mask: 0 };
    fault::sigaction(signal, Some(&action)).unwrap()
}

#[test]
fn the_guests_own_fault_reaches_its_own_handler_and_the_leaf_still_works() {
    let status = in_child(|| {
        fault::install();
        let before =
            guest_sets(libc::SIGSEGV, guest_handler as *const () as usize, libc::SA_SIGINFO);
        let page = pages(&[libc::PROT_NONE]);
        if Guest.read(page, &mut [0; 16]) != Err(Fault) || SEEN.load(Ordering::Relaxed) != 0 {
            return 1;
        }
        // SAFETY: the handler makes the page writable before the store goes on.
        unsafe { core::ptr::write_volatile((page + 40) as *mut u8, 5) };
        if SEEN.load(Ordering::Relaxed) != libc::SIGSEGV {
            return 2;
        }
        if SEEN_AT.load(Ordering::Relaxed) as u64 != page + 40 {
            return 3;
        }
        if Guest.read(0, &mut [0; 16]) != Err(Fault) {
            return 4;
        }
        let now = fault::sigaction(libc::SIGSEGV, None).unwrap();
        if now.handler != guest_handler as *const () as usize {
            return 5;
        }
        i32::from(before.handler == now.handler) * 6
    });
    assert_eq!(status, 0);
}

#[test]
fn a_fault_of_a_guest_without_a_handler_kills_it_by_that_signal() {
    for ignored in [false, true] {
        let status = in_child(|| {
            fault::install();
            guest_sets(libc::SIGSEGV, if ignored { libc::SIG_IGN } else { libc::SIG_DFL }, 0);
            let page = pages(&[libc::PROT_NONE]);
            // SAFETY: kills this child, which is the point.
            unsafe { core::ptr::write_volatile(page as *mut u8, 5) };
            9
        });
        assert!(libc::WIFSIGNALED(status), "{status:#x}");
        assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
    }
}

#[test]
fn a_sent_sigsegv_kills_by_default_and_passes_when_ignored() {
    let status = in_child(|| {
        fault::install();
        guest_sets(libc::SIGSEGV, libc::SIG_IGN, 0);
        // SAFETY: sends signals to this child.
        unsafe { libc::raise(libc::SIGSEGV) };
        guest_sets(libc::SIGSEGV, libc::SIG_DFL, 0);
        // SAFETY: as above.
        unsafe { libc::raise(libc::SIGSEGV) };
        9
    });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
}

#[test]
fn a_handler_set_with_resethand_is_called_once() {
    let status = in_child(|| {
        fault::install();
        let flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        guest_sets(libc::SIGSEGV, guest_handler as *const () as usize, flags);
        let page = pages(&[libc::PROT_NONE, libc::PROT_NONE]);
        // SAFETY: the handler makes the first page writable; the second store kills this child.
        unsafe {
            core::ptr::write_volatile(page as *mut u8, 5);
            core::ptr::write_volatile((page as *mut u8).add(PAGE), 5);
        }
        9
    });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
}

#[test]
fn a_guest_that_blocks_everything_still_gets_faults_from_the_leaf_and_sees_its_mask() {
    let status = in_child(|| {
        fault::install();
        let change = mask::Change::new(libc::SIG_SETMASK, u64::MAX);
        // SAFETY: eight readable bytes.
        unsafe {
            let set = (&raw const change.kernel) as usize;
            let how = libc::SIG_SETMASK as usize;
            sys::syscall6(libc::SYS_rt_sigprocmask, how, set, 0, 8, 0, 0);
        }
        change.commit();
        if mask::shadow() != mask::FAULTS {
            return 1;
        }
        if Guest.read(0, &mut [0; 16]) != Err(Fault) {
            return 2;
        }
        mask::Change::new(libc::SIG_UNBLOCK, mask::bit(libc::SIGBUS)).commit();
        i32::from(mask::shadow() != mask::bit(libc::SIGSEGV)) * 3
    });
    assert_eq!(status, 0);
}

#[test]
fn masks_of_other_handlers_are_reported_as_they_were_set() {
    let status = in_child(|| {
        fault::install();
        let asked = fault::Action { handler: 1, flags: 0, restorer: 0, mask: u64::MAX };
        fault::sigaction(libc::SIGUSR1, Some(&asked)).unwrap();
        let kernel = fault::raw_sigaction(libc::SIGUSR1, None).unwrap();
        if kernel.mask & mask::FAULTS != 0 {
            return 1;
        }
        let seen = fault::sigaction(libc::SIGUSR1, None).unwrap();
        // The kernel never keeps SIGKILL and SIGSTOP in a mask.
        let kept = !(mask::bit(libc::SIGKILL) | mask::bit(libc::SIGSTOP));
        i32::from(seen.mask != kept) * 2
    });
    assert_eq!(status, 0);
}

#[test]
fn vectors_follow_the_kernels_import_rules() {
    fault::install();
    let iov = |base: u64, length: u64| [base, length];
    let array = [iov(0x1000, 10), iov(0x2000, 0), iov(0x1_0000, 0x7fff_ffff_0000)];
    let at = array.as_ptr() as u64;
    assert_eq!(GuestBuffer::import(at, 1025).unwrap_err(), Errno::EINVAL);
    assert_eq!(GuestBuffer::import(8, 1).unwrap_err(), Errno::EFAULT);
    assert_eq!(GuestBuffer::import(0, 0).unwrap().len(), 0);
    assert_eq!(GuestBuffer::import(at, 2).unwrap().len(), 10);
    let capped = GuestBuffer::import(at, 3).unwrap_err();
    assert_eq!(capped, Errno::EFAULT, "a segment that reaches the kernel's half");
    let negative = [iov(0x1000, u64::MAX)];
    let at = negative.as_ptr() as u64;
    assert_eq!(GuestBuffer::import(at, 1).unwrap_err(), Errno::EINVAL);
    let big = [iov(0x1000, 0x7fff_0000), iov(0x1000, 0x7fff_0000)];
    let vector = GuestBuffer::import(big.as_ptr() as u64, 2).unwrap();
    assert_eq!(vector.len() as u64, MAX_COUNT);
    assert_eq!(GuestBuffer::single(0x1000, 1 << 40).unwrap().len() as u64, MAX_COUNT);
    assert_eq!(GuestBuffer::single(0x1000, u64::MAX).unwrap_err(), Errno::EFAULT);
    assert_eq!(GuestBuffer::single(USER_END, 1).unwrap_err(), Errno::EFAULT);
}

#[test]
fn a_vector_is_one_run_of_bytes_across_its_segments() {
    fault::install();
    let (mut a, mut b) = ([1_u8, 2, 3], [4_u8, 5, 6, 7]);
    let (at_a, at_b) = (a.as_mut_ptr() as u64, b.as_mut_ptr() as u64);
    let array = [[at_a, 3], [0, 0], [at_b, 4]];
    let mut vector = GuestBuffer::import(array.as_ptr() as u64, 3).unwrap();
    let mut out = [0; 4];
    vector.copy_in(2, &mut out).unwrap();
    assert_eq!(out, [3, 4, 5, 6]);
    vector.copy_out(1, &[9, 9, 9]).unwrap();
    assert_eq!(vector.copy_in(4, &mut out), Err(Fault), "beyond the end");
    vector.truncate(4);
    assert_eq!(vector.len(), 4);
    assert_eq!(vector.copy_out(4, &[0]), Err(Fault));
    assert_eq!((a, b), ([1, 9, 9], [9, 5, 6, 7]));
}

#[test]
fn paths_are_read_up_to_their_end_and_never_past_a_page_without_need() {
    fault::install();
    let base = pages(&[libc::PROT_READ | libc::PROT_WRITE, libc::PROT_NONE]);
    let at = base + PAGE as u64 - 5;
    Guest.write(at, b"/a/b\0").unwrap();
    let mut out = [0; PATH_ROOM];
    assert_eq!(read_path(at, &mut out), Ok(&b"/a/b"[..]));
    Guest.write(at, b"/a/bc").unwrap();
    assert_eq!(read_path(at, &mut out), Err(Errno::EFAULT));
    assert_eq!(read_path(0, &mut out), Err(Errno::EFAULT));
    let long = [b'x'; 1024];
    assert_eq!(read_path(long.as_ptr() as u64, &mut out), Err(Errno::ENAMETOOLONG));
}
