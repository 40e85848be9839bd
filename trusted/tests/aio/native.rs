//! The kernel's own AIO, called past libc.

use std::{io::Write as _, sync::LazyLock};

use crate::{Aio, guest::Area};

/// The call's number on x86-64; libc does not name it.
const SYS_IO_PGETEVENTS: i64 = 333;

/// The kernel.
pub struct Kernel(());

impl Kernel {
    /// The kernel, if it has native AIO; else says loudly that it could not be asked.
    pub fn find() -> Option<Self> {
        static THERE: LazyLock<bool> = LazyLock::new(|| {
            let (kernel, place) = (Kernel(()), Area::new(1));
            let answer = kernel.io_setup(1, place.at(0));
            if answer != 0 {
                // Past the test harness, which would keep it for itself.
                let why = format!("no comparison with the kernel: io_setup answers {answer}");
                let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
                return false;
            }
            kernel.io_destroy(place.get(0)) == 0
        });
        THERE.then(|| Self(()))
    }
}

fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the AIO calls reach memory through checked copies; what they write to (a context id,
    // events, buffers) lies in mapped areas of the test, or is refused.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if answer < 0 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        answer
    }
}

impl Aio for Kernel {
    fn io_setup(&self, nr: u32, ctxp: u64) -> i64 {
        call(libc::SYS_io_setup, [u64::from(nr), ctxp, 0, 0, 0, 0])
    }
    fn io_destroy(&self, ctx: u64) -> i64 {
        call(libc::SYS_io_destroy, [ctx, 0, 0, 0, 0, 0])
    }
    fn io_submit(&self, ctx: u64, nr: i64, iocbpp: u64) -> i64 {
        call(libc::SYS_io_submit, [ctx, nr.cast_unsigned(), iocbpp, 0, 0, 0])
    }
    fn io_getevents(&self, ctx: u64, min: i64, nr: i64, events: u64, timeout: u64) -> i64 {
        let (min, nr) = (min.cast_unsigned(), nr.cast_unsigned());
        call(libc::SYS_io_getevents, [ctx, min, nr, events, timeout, 0])
    }
    fn io_pgetevents(
        &self,
        ctx: u64,
        min: i64,
        nr: i64,
        events: u64,
        timeout: u64,
        usig: u64,
    ) -> i64 {
        let (min, nr) = (min.cast_unsigned(), nr.cast_unsigned());
        call(SYS_IO_PGETEVENTS, [ctx, min, nr, events, timeout, usig])
    }
    fn io_cancel(&self, ctx: u64, iocb: u64, result: u64) -> i64 {
        call(libc::SYS_io_cancel, [ctx, iocb, result, 0, 0, 0])
    }
}
