#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| posternd::engine::fuzz::descriptors(data));
