use super::*;

/// Runs `body` in a forked child; the number it answers is its exit status.
fn in_child(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child only runs `body` and _exit; nothing here waits for another thread.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::_exit(body());
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    }
}

fn is_open(fd: i32) -> bool {
    sys::fcntl(fd, libc::F_GETFD, 0).is_ok()
}

#[test]
fn our_own_descriptors_survive_every_way_of_closing_all() {
    let status = in_child(|| {
        let own = protect_internal(sys::memfd(c"own").unwrap());
        let theirs = sys::memfd(c"theirs").unwrap();
        if own < theirs || !is_internal(own) {
            return 1;
        }
        if close(own) != Err(Errno::EBADF) || !is_open(own) {
            return 2;
        }
        if close_range(3, u32::MAX, 0).is_err() || is_open(theirs) || !is_open(own) {
            return 3;
        }
        let number = own.unsigned_abs();
        if close_range(number, number, 0).is_err() || !is_open(own) {
            return 4;
        }
        if close_range(5, 4, 0) != Err(Errno::EINVAL) {
            return 5;
        }
        close_internal(own);
        i32::from(is_open(own) || is_internal(own)) * 6
    });
    assert_eq!(status, 0);
}

#[test]
fn a_range_that_ends_or_begins_at_our_own_descriptor_is_closed_around_it() {
    let status = in_child(|| {
        let own = protect_internal(sys::memfd(c"own").unwrap());
        let memfd = sys::memfd(c"theirs").unwrap();
        let (below, above) = (own - 1, own + 1);
        for fd in [below, above] {
            sys::dup3(memfd, fd, 0).unwrap();
        }
        let [first, number, last] = [below, own, above].map(i32::unsigned_abs);
        close_range(first, number, 0).unwrap();
        if is_open(below) || !is_open(above) {
            return 1;
        }
        close_range(number, last, 0).unwrap();
        i32::from(is_open(above) || !is_open(own)) * 2
    });
    assert_eq!(status, 0);
}

#[test]
fn marking_a_range_close_on_exec_closes_nothing() {
    let status = in_child(|| {
        let memfd = sys::memfd(c"theirs").unwrap();
        sys::fcntl(memfd, libc::F_SETFD, 0).unwrap();
        close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).unwrap();
        i32::from(sys::fcntl(memfd, libc::F_GETFD, 0) != Ok(libc::FD_CLOEXEC as usize))
    });
    assert_eq!(status, 0);
}
