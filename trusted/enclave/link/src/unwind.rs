//! The names of the unwinder that the standard library links to. A program that aborts on panic
//! calls none but the first, for a backtrace: it finds no frame. One that would unwind, as tests
//! do, is told that it cannot, and aborts.

use core::ffi::{c_int, c_void};

/// Refuses (`_URC_END_OF_STACK`): the standard library then aborts.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_RaiseException(_: *mut c_void) -> c_int {
    5
}

/// Ends every walk over frames at once (`_URC_END_OF_STACK`).
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Backtrace(_: *const c_void, _: *mut c_void) -> c_int {
    5
}

/// Functions that are given frames, of which there are none.
macro_rules! never_called {
    ($($name:ident),+) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> usize {
                0
            }
        )+
    };
}

never_called!(
    _Unwind_DeleteException,
    _Unwind_FindEnclosingFunction,
    _Unwind_GetCFA,
    _Unwind_GetDataRelBase,
    _Unwind_GetIP,
    _Unwind_GetIPInfo,
    _Unwind_GetLanguageSpecificData,
    _Unwind_GetRegionStart,
    _Unwind_GetTextRelBase,
    _Unwind_Resume,
    _Unwind_SetGR,
    _Unwind_SetIP
);
