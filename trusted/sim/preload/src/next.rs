//! The same name in the next library, and how an answer becomes a C return value.

use core::{
    ffi::{CStr, c_int, c_void},
    sync::atomic::{AtomicPtr, Ordering},
};

use postern_trusted::errno::Errno;

/// A symbol of the libraries behind this one, looked up once.
pub struct Next {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
}

impl Next {
    /// The symbol `name`.
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, at: AtomicPtr::new(core::ptr::null_mut()) }
    }

    /// Its address; `None` if no library behind this one has it.
    pub fn find(&self) -> Option<*mut c_void> {
        let known = self.at.load(Ordering::Relaxed);
        if !known.is_null() {
            return Some(known);
        }
        // SAFETY: a C string; dlsym looks behind the library that calls it, which is this one.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.at.store(found, Ordering::Relaxed);
        (!found.is_null()).then_some(found)
    }
}

/// What a C function returns when it fails.
pub trait Failed {
    /// -1, or a null pointer.
    const FAILED: Self;
}

impl Failed for c_int {
    const FAILED: Self = -1;
}

impl Failed for isize {
    const FAILED: Self = -1;
}

impl Failed for i64 {
    const FAILED: Self = -1;
}

impl Failed for *mut c_void {
    const FAILED: Self = usize::MAX as Self; // MAP_FAILED: only mmap returns this type here.
}

impl Failed for *mut libc::FILE {
    const FAILED: Self = core::ptr::null_mut();
}

macro_rules! fail_with_null {
    ($($type:ty)+) => { $(
        impl Failed for *mut $type {
            const FAILED: Self = core::ptr::null_mut();
        }
    )+ };
}

fail_with_null! { libc::DIR libc::dirent64 core::ffi::c_char }

/// Sets `errno`.
pub fn set_errno(errno: Errno) {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno.0 };
}

/// Runs `job` and answers as C does: the value with `errno` as it was, or a failure with `errno`
/// set.
pub fn answer<T: Failed>(job: impl FnOnce() -> Result<T, Errno>) -> T {
    // SAFETY: the calling thread's own errno.
    let before = unsafe { *libc::__errno_location() };
    match job() {
        Ok(value) => {
            set_errno(Errno(before));
            value
        }
        Err(errno) => {
            set_errno(errno);
            T::FAILED
        }
    }
}

/// As [`answer`], for functions that return the errno itself (posix_fallocate, posix_fadvise).
pub fn number(job: impl FnOnce() -> Result<(), Errno>) -> c_int {
    // SAFETY: the calling thread's own errno.
    let before = unsafe { *libc::__errno_location() };
    let result = job();
    set_errno(Errno(before));
    result.map_or_else(|errno| errno.0, |()| 0)
}

/// As [`answer`], for libaio's convention: a negative errno, and `errno` untouched.
pub fn negative(job: impl FnOnce() -> Result<usize, Errno>) -> c_int {
    // SAFETY: the calling thread's own errno.
    let before = unsafe { *libc::__errno_location() };
    let result = job();
    set_errno(Errno(before));
    result.map_or_else(|errno| -errno.0, |n| c_int::try_from(n).unwrap_or(c_int::MAX))
}

/// A length or count as a C return value.
pub fn signed(n: usize) -> isize {
    isize::try_from(n).unwrap_or(isize::MAX)
}

/// Exports C functions. Each body may call its last name, a closure that passes the call on to the
/// next library; several names share one body. Functions that are variadic in C are given all
/// their possible arguments: the x86-64 calling convention passes them in the same places.
macro_rules! export {
    ($(
        fn [$($name:ident),+ $(,)?]$arguments:tt -> $ret:ty, $next:ident => $body:expr;
    )*) => { $($(
        export! { @one $name $arguments $ret, $next => $body }
    )+)* };
    (@one $name:ident($($arg:ident: $ty:ty),* $(,)?) $ret:ty,
        $next:ident => $body:expr) => {
        /// The C function of this name, in front of protected files.
        ///
        /// # Safety
        /// As the C function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($arg: $ty),*) -> $ret {
            // Dropped last: handlers of signals that came meanwhile run then.
            let _inside = postern_sim::inside::Scope::new();
            #[allow(unused_variables)]
            let $next = || -> $ret {
                static NEXT: $crate::next::Next = {
                    const NAME: &str = concat!(stringify!($name), "\0");
                    // A name without inner NULs: the fallback is never taken.
                    $crate::next::Next::new(match core::ffi::CStr::from_bytes_with_nul(
                        NAME.as_bytes(),
                    ) {
                        Ok(name) => name,
                        Err(_) => c"",
                    })
                };
                let Some(at) = NEXT.find() else {
                    $crate::next::set_errno(postern_trusted::errno::Errno::ENOSYS);
                    return <$ret as $crate::next::Failed>::FAILED;
                };
                // SAFETY: 1. The symbol of this name in libc or libaio has this signature (or is
                //    variadic, see above). 2. The arguments are the caller's own.
                //    3. Unwinds when the thread is cancelled in it.
                postern_sim::inside::outside(|| unsafe {
                    let next: unsafe extern "C-unwind" fn($($ty),*) -> $ret =
                        core::mem::transmute(at);
                    next($($arg),*)
                })
            };
            $body
        }
    };
}
pub(crate) use export;
